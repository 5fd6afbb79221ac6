//! The kernel file: what kind it is, how much memory it needs, and loading it.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;

use linux_loader::bootparam::setup_header;
use linux_loader::loader::{BzImage, Elf, KernelLoader, KernelLoaderResult};
use vm_memory::{ByteValued, GuestMemoryMmap};

use super::layout::HIGH_MEMORY;
use crate::error::VmError;

const SETUP_HEADER_AT: u64 = 0x1f1;
const BZIMAGE_MAGIC: u32 = 0x5372_6448;
const BZIMAGE_OLDEST: u16 = 0x020c;
const XLF_KERNEL_64: u16 = 1;
const ELF_MAGIC: &[u8] = b"\x7fELF";
const ELF_MACHINE_X86_64: u16 = 62;
const ELF_PROGRAM_HEADER_BYTES: usize = 56;
const ELF_LOAD: u32 = 1;

/// Entry of a 64-bit bzImage, from where its protected-mode part is loaded.
const BZIMAGE_ENTRY_64: u64 = 0x200;

/// A kernel file that has been looked at but not loaded.
pub(super) struct Kernel {
    file: File,
    path: std::path::PathBuf,
    /// The setup header, for a bzImage.
    header: Option<setup_header>,
    /// End of the memory that it needs to be loaded and to start.
    pub(super) end: u64,
}

/// A kernel in memory.
pub(super) struct Loaded {
    pub(super) entry: u64,
    pub(super) header: setup_header,
}

impl Kernel {
    /// Opens the file and finds out what it is.
    ///
    /// Errors: it cannot be read, is no kernel, or one that cannot be entered in 64-bit mode.
    pub(super) fn open(path: &Path) -> Result<Self, VmError> {
        let unreadable = |source| VmError::BootFile { what: "kernel", path: path.to_path_buf(), source };
        let mut file = File::open(path).map_err(unreadable)?;
        let mut start = Vec::new();
        (&mut file).take(4096).read_to_end(&mut start).map_err(unreadable)?;
        let size = file.metadata().map_err(unreadable)?.len();
        let (header, end) = if start.starts_with(ELF_MAGIC) {
            (None, elf_end(&mut file, &start, size).ok_or_else(|| VmError::NotAKernel(path.into()))?)
        } else {
            let header = bzimage_header(&start).ok_or_else(|| VmError::NotAKernel(path.into()))?;
            check_bzimage(path, &header)?;
            (Some(header), bzimage_end(&header, size))
        };
        Ok(Self { file, path: path.into(), header, end })
    }

    /// The longest command line that it takes.
    pub(super) fn cmdline_limit(&self) -> Option<usize> {
        self.header.map(|header| header.cmdline_size as usize)
    }

    /// The highest address that its initrd may reach.
    pub(super) fn initrd_limit(&self) -> u64 {
        self.header.map_or(u64::from(u32::MAX), |header| u64::from(header.initrd_addr_max))
    }

    /// Copies it into guest memory.
    pub(super) fn load(mut self, memory: &GuestMemoryMmap) -> Result<Loaded, VmError> {
        let bad = |error: linux_loader::loader::Error| VmError::BadKernel {
            path: self.path.clone(),
            reason: error.to_string(),
        };
        if self.header.is_some() {
            let loaded = BzImage::load(memory, None, &mut self.file, None).map_err(bad)?;
            let entry = loaded.kernel_load.0 + BZIMAGE_ENTRY_64;
            return Ok(Loaded { entry, header: header_of(&loaded) });
        }
        let loaded = Elf::load(memory, None, &mut self.file, None).map_err(bad)?;
        Ok(Loaded { entry: loaded.kernel_load.0, header: elf_setup_header() })
    }
}

fn header_of(loaded: &KernelLoaderResult) -> setup_header {
    loaded.setup_header.unwrap_or_else(elf_setup_header)
}

/// What a boot loader fills in for a kernel that brought no setup header.
fn elf_setup_header() -> setup_header {
    setup_header {
        boot_flag: 0xaa55,
        header: BZIMAGE_MAGIC,
        version: BZIMAGE_OLDEST,
        kernel_alignment: 0x100_0000,
        ..Default::default()
    }
}

/// The setup header of a bzImage, if `start` is the start of one.
fn bzimage_header(start: &[u8]) -> Option<setup_header> {
    let mut header = setup_header::default();
    let from = SETUP_HEADER_AT as usize;
    let bytes = start.get(from..from + size_of::<setup_header>())?;
    header.as_mut_slice().copy_from_slice(bytes);
    (header.header == BZIMAGE_MAGIC).then_some(header)
}

fn check_bzimage(path: &Path, header: &setup_header) -> Result<(), VmError> {
    let (version, flags) = (header.version, header.xloadflags);
    let reason = if version < BZIMAGE_OLDEST {
        format!("boot protocol {}.{}, 2.12 or newer is needed", version >> 8, version & 0xff)
    } else if flags & XLF_KERNEL_64 == 0 {
        "it has no 64-bit entry point; use an x86-64 kernel".into()
    } else {
        return Ok(());
    };
    Err(VmError::BadKernel { path: path.into(), reason })
}

/// End of the memory that a bzImage touches before it knows the memory map: it is loaded at 1 MiB
/// and unpacks itself within `init_size` bytes from its preferred address.
fn bzimage_end(header: &setup_header, file_bytes: u64) -> u64 {
    let loaded = HIGH_MEMORY.saturating_add(file_bytes);
    let unpacked = header.pref_address.saturating_add(u64::from(header.init_size));
    loaded.max(unpacked)
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    bytes.get(at..at + 2)?.try_into().ok().map(u16::from_le_bytes)
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    bytes.get(at..at + 8)?.try_into().ok().map(u64::from_le_bytes)
}

/// End of an ELF file's segments in memory; none if it is not a sound x86-64 ELF file.
fn elf_end(file: &mut File, start: &[u8], size: u64) -> Option<u64> {
    let is_64_bit_little_endian = start.get(4..6)? == [2, 1];
    let right_size = usize::from(u16_at(start, 54)?) == ELF_PROGRAM_HEADER_BYTES;
    if !is_64_bit_little_endian || u16_at(start, 18)? != ELF_MACHINE_X86_64 || !right_size {
        return None;
    }
    let mut headers = vec![0; usize::from(u16_at(start, 56)?) * ELF_PROGRAM_HEADER_BYTES];
    file.seek(SeekFrom::Start(u64_at(start, 32)?)).ok()?;
    file.read_exact(&mut headers).ok()?;
    let mut end = 0;
    for header in headers.chunks_exact(ELF_PROGRAM_HEADER_BYTES) {
        if header.get(..4)? != ELF_LOAD.to_le_bytes() {
            continue;
        }
        let file_end = u64_at(header, 8)?.checked_add(u64_at(header, 32)?)?;
        let memory_len = u64_at(header, 40)?.max(u64_at(header, 32)?);
        end = end.max(u64_at(header, 24)?.checked_add(memory_len)?);
        if file_end > size {
            return None;
        }
    }
    (end > 0).then_some(end)
}
