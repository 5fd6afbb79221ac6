//! Two hosts as network namespaces: each with an interface of its own, and a switch in a third.

use std::net::{IpAddr, Ipv4Addr};
use std::path::Path;
use std::process::Command;

use super::{ip, load_module, succeed};

/// Two hosts on one switch. A host that is parted from it vanishes without a word: its interface stays up, and
/// what is sent to it is lost. Needs root. Gone when dropped.
pub struct Hosts {
    names: [String; 2],
    switch: String,
}

impl Hosts {
    /// Two hosts that are slow at sending: so many bits a second.
    pub fn new(bits_a_second: u64) -> Self {
        for module in ["veth", "bridge", "sch_tbf"] {
            load_module(module, &[]);
        }
        let named = |kind: &str| format!("pc{}{kind}", std::process::id());
        let hosts = Self { names: [named("a"), named("b")], switch: named("s") };
        let switch = &hosts.switch;
        ip(&format!("netns add {switch}"));
        ip(&format!("-n {switch} link add switch type bridge forward_delay 0"));
        ip(&format!("-n {switch} link set switch up"));
        for (host, name) in hosts.names.iter().enumerate() {
            ip(&format!("netns add {name}"));
            ip(&format!("-n {switch} link add port{host} type veth peer name net0 netns {name}"));
            ip(&format!("-n {switch} link set port{host} up master switch"));
            ip(&format!("-n {name} address add {}/24 dev net0", Self::address(host)));
            ip(&format!("-n {name} link set net0 up"));
            let mut slow = Command::new("tc");
            slow.args(["-n", name, "qdisc", "add", "dev", "net0", "root", "tbf"]);
            succeed(slow.args(["rate", &bits_a_second.to_string(), "burst", "32k", "latency", "100ms"]));
        }
        hosts
    }

    /// The address of host 0 or 1.
    pub fn address(host: usize) -> IpAddr {
        Ipv4Addr::new(192, 0, 2, 1 + host as u8).into()
    }

    /// A program that runs on a host.
    pub fn command(&self, host: usize, program: &Path) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.names[host]]).arg(program);
        command
    }

    /// Parts the hosts.
    pub fn part(&self) {
        ip(&format!("-n {} link set port1 nomaster", self.switch));
    }

    /// Undoes [`Hosts::part`].
    pub fn join(&self) {
        ip(&format!("-n {} link set port1 master switch", self.switch));
    }
}

impl Drop for Hosts {
    fn drop(&mut self) {
        for name in self.names.iter().chain([&self.switch]) {
            let _ = Command::new("ip").args(["netns", "delete", name]).status();
        }
    }
}
