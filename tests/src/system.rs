//! The machine that the tests run on: its kernel's modules, its network, and [`Hosts`], two machines that it plays.

mod hosts;

use std::process::Command;

pub use hosts::Hosts;

/// Loads a module of the kernel that runs here: in the lab from the lab's own kernel package.
pub fn load_module(name: &str, parameters: &[&str]) {
    let mut command = Command::new("modprobe");
    if let Some(root) = std::env::var_os("LAB_KERNEL_ROOT") {
        command.arg("-d").arg(root);
    }
    succeed(command.arg(name).args(parameters));
}

/// Runs a program that must succeed.
pub(crate) fn succeed(command: &mut Command) {
    let out = crate::run(command);
    assert!(out.status.success(), "{command:?}: {}", crate::stderr(&out));
}

/// `ip`, with words that a blank separates.
pub(crate) fn ip(arguments: &str) {
    succeed(Command::new("ip").args(arguments.split(' ')));
}
