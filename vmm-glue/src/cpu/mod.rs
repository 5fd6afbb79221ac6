//! A virtual processor's state: what it is given at boot, what is saved, and what a destination
//! must have to take it over.

pub(crate) mod cpuid;
pub(crate) mod msrs;
pub(crate) mod state;
pub(crate) mod tsc;
pub(crate) mod xsave;
