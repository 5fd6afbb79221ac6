//! The post-copy paging engine.
//!
//! A guest resumes at the destination at once; this crate brings its memory. It knows no KVM: a
//! VMM hands it memory and device state, and is told when to stop and when to run.

#![warn(missing_docs)]

pub mod export;
#[cfg(feature = "fuzz")]
#[doc(hidden)]
pub mod fuzz;
pub mod import;
pub mod memory;
pub mod page_set;
pub mod pagemap;
pub mod pager;
pub mod places;
pub mod planner;
pub mod proc_pages;
pub mod room;
pub mod session;
pub mod stats;
pub mod touched;
mod tracker;
pub mod written;

pub use postcopy_transport::is_crowded;
