//! What `pcvm` and `pcbench` have in common: flags, sizes, the machine's description, pictures.
//!
//! It is not an interface for other programs. Both binaries take their RDMA flags, the way they
//! read sizes, the colours of their plots and the escaping of their pages from here, so that they
//! cannot drift apart.

pub mod cli;
pub mod device;
pub mod drain;
pub mod ink;
pub mod machine;
pub mod size;
pub mod text;
pub mod trust;
