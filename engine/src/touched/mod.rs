//! Which pages of guest memory are touched from a moment on: an idea of what a guest works with.
//!
//! All pages are taken out of the mapping, and what is mapped again was touched. The kernel maps some pages
//! around one that is read (fault_around_bytes); not where userfaultfd is told of writes, so the mapping is
//! registered for that, and no page is write-protected. Where that is refused, a page stands for its 64 KiB.
//!
//! [`Touched`] is for a mapping of this process, [`TouchedThere`] for one of another, which takes its pages out itself
//! when it is asked (`away.rs`).

mod away;
mod there;

use std::io;

use postcopy_transport::HostMemory;
use userfaultfd::{FeatureFlags, RegisterMode, Uffd, UffdBuilder};

pub use self::there::TouchedThere;
use crate::page_set::PageSet;
use crate::proc_pages::mapped;
use crate::tracker::WP_SHMEM;

/// A mapping of this process that is watched. Costs a minor fault for each page that is touched.
#[derive(Debug)]
pub struct Touched {
    memory: HostMemory,
    /// Its end takes the registration with it.
    _exact: Option<Uffd>,
}

impl Touched {
    /// Begins.
    ///
    /// Errors: the system refuses.
    pub fn begin(memory: &HostMemory) -> io::Result<Self> {
        let watch = Self { memory: memory.clone(), _exact: registered(memory) };
        watch.memory.unmap_pages()?;
        Ok(watch)
    }

    /// Pages that were touched since it began, or began anew.
    ///
    /// Errors: the system refuses.
    pub fn pages(&self) -> io::Result<PageSet> {
        mapped(&self.memory)
    }

    /// As [`Touched::pages`], and begins anew.
    ///
    /// Errors: the system refuses.
    pub fn again(&self) -> io::Result<PageSet> {
        let touched = self.pages()?;
        self.memory.unmap_pages()?;
        Ok(touched)
    }
}

fn registered(memory: &HostMemory) -> Option<Uffd> {
    let mut builder = UffdBuilder::new();
    builder
        .close_on_exec(true)
        .user_mode_only(false)
        .require_features(FeatureFlags::PAGEFAULT_FLAG_WP | FeatureFlags::from_bits_retain(WP_SHMEM));
    let uffd = builder.create().ok()?;
    let done = uffd.register_with_mode(memory.base().cast(), memory.len(), RegisterMode::WRITE_PROTECT);
    done.ok().map(|_| uffd)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn touched_pages_are_seen_and_their_content_stays() {
        let memory = HostMemory::anonymous("touched", 256 << 12).unwrap();
        (0..256).for_each(|page| assert!(memory.write(page << 12, &[page as u8 | 1])));
        let watch = Touched::begin(&memory).unwrap();
        assert!(watch.pages().unwrap().is_empty());
        let mut byte = [0];
        assert!(memory.read(7 << 12, &mut byte) && memory.write((200 << 12) + 1, &[9]));
        let touched = watch.again().unwrap();
        assert!(touched.has(7) && touched.has(200) && byte == [7], "{touched:?}");
        let most = if watch._exact.is_some() { 2 } else { 17 };
        assert!(touched.len() <= most && !touched.has(100), "{touched:?}");
        assert!(watch.pages().unwrap().is_empty());
        drop(watch);
        for page in 0..256 {
            assert!(memory.read(page << 12, &mut byte) && byte == [page as u8 | 1]);
        }
    }
}
