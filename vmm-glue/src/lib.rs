//! A thin KVM virtual machine monitor that shows the engine whole.

#![warn(missing_docs)]
