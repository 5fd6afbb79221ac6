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

/// Whether the kernel that runs here is of this version or a newer one.
pub fn kernel_is_since(major: u32, minor: u32) -> bool {
    let name = rustix::system::uname();
    let release = name.release().to_str().unwrap();
    let mut numbers = release.split(['.', '-']).map(|number| number.parse().unwrap_or(0));
    (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0)) >= (major, minor)
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
