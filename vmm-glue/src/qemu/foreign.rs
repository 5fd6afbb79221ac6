//! Who else reaches a guest's memory, past QEMU's own mapping of it, and so past our pager.
//!
//! What QEMU itself and its host's kernel do for it (vhost-net, vhost-vsock, direct disk access) goes by
//! QEMU's address space and is trapped there. A device of the host, or a process that maps the RAM
//! file by itself, is not: at a destination it would read, or overwrite, pages that have not come yet.
//! Asked of QEMU, which knows also what was plugged in later, behind bridges, or without a name;
//! [`in_arguments`] says of the commonest cases at once what QEMU might wait for a partner to say.

use std::ffi::OsString;

use serde_json::{Value, json};

use super::QemuError;
use super::qmp::Qmp;

const OF_THIS_HOST: &str = "is of this host, and writes to memory unseen; unplug it first";
const OF_ANOTHER_PROCESS: &str = "is served by another process, which maps the guest's memory by itself and would not \
                                  wait for pages that have not come yet; use one that QEMU or the kernel serves";

/// What is wrong with a type of QEMU's, if anything is.
fn wrong(what: What, kind: &str) -> Option<&'static str> {
    match (what, kind) {
        // Drivers that give the guest's pages to a device.
        (What::Disk, "nvme" | "nvme-io_uring" | "virtio-blk-vfio-pci" | "virtio-blk-vhost-vdpa") => {
            Some(OF_THIS_HOST)
        }
        (What::Disk, "virtio-blk-vhost-user") | (_, "cryptodev-vhost-user" | "x-pci-proxy-dev") => {
            Some(OF_ANOTHER_PROCESS)
        }
        (_, "pvrdma") => Some(OF_THIS_HOST),
        _ if kind.starts_with("vfio-") || kind.starts_with("vhost-vdpa") => Some(OF_THIS_HOST),
        _ if kind.starts_with("vhost-user") => Some(OF_ANOTHER_PROCESS),
        _ => None,
    }
}

/// Kinds of things that a machine has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum What {
    Device,
    Netdev,
    Object,
    Disk,
}

impl std::fmt::Display for What {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str(match self {
            Self::Device => "device",
            Self::Netdev => "netdev",
            Self::Object => "object",
            Self::Disk => "disk",
        })
    }
}

/// One of them.
#[derive(Debug, PartialEq, Eq)]
struct Part {
    what: What,
    name: String,
    kind: String,
}

impl Part {
    fn new(what: What, name: &str, kind: &str) -> Self {
        Self { what, name: name.to_owned(), kind: kind.to_owned() }
    }

    fn check(&self) -> Result<(), QemuError> {
        let Self { what, name, kind } = self;
        match wrong(*what, kind) {
            Some(text) => Err(QemuError::Unfit(format!("the {what} {name} ({kind}) {text}"))),
            None => Ok(()),
        }
    }
}

/// What QEMU's tree has of devices and objects, each with the place where it is listed.
pub(super) struct Parts(Vec<(&'static str, Part)>);

impl Parts {
    pub(super) fn of(qmp: &mut Qmp) -> Result<Self, QemuError> {
        let devices = ["/machine/peripheral", "/machine/peripheral-anon", "/machine/unattached"];
        let places = devices.map(|path| (What::Device, path)).into_iter().chain([(What::Object, "/objects")]);
        let mut all = Vec::new();
        for (what, path) in places {
            let listed = qmp.execute("qom-list", &json!({"path": path}))?;
            all.extend(children(what, &listed).into_iter().map(|part| (path, part)));
        }
        Ok(Self(all))
    }

    /// Where its balloon is, if it has one.
    pub(super) fn balloon(&self) -> Option<String> {
        let balloon = self.0.iter().find(|(_, part)| part.kind.contains("balloon"));
        balloon.map(|(path, part)| format!("{path}/{}", part.name))
    }
}

/// Refuses a machine with a part, of these or others, that reaches its memory past QEMU.
pub(super) fn look(qmp: &mut Qmp, parts: &Parts) -> Result<(), QemuError> {
    parts.0.iter().try_for_each(|(_, part)| part.check())?;
    // QMP itself does not tell what a netdev is.
    let network = qmp.execute("human-monitor-command", &json!({"command-line": "info network"}))?;
    netdevs(network.as_str().unwrap_or_default()).iter().try_for_each(Part::check)?;
    let nodes = qmp.execute("query-named-block-nodes", &json!({"flat": true}))?;
    for node in nodes.as_array().into_iter().flatten() {
        let text = |name: &str| node[name].as_str().unwrap_or_default();
        Part::new(What::Disk, text("node-name"), text("drv")).check()?;
    }
    Ok(())
}

/// What is listed at a place of QEMU's tree that is a thing of its own.
fn children(what: What, listed: &Value) -> Vec<Part> {
    let each = listed.as_array().into_iter().flatten();
    let parts = each.filter_map(|each| {
        let kind = each["type"].as_str()?.strip_prefix("child<")?.strip_suffix('>')?;
        Some(Part::new(what, each["name"].as_str()?, kind))
    });
    parts.collect()
}

/// The netdevs in what `info network` prints: `NAME: index=0,type=KIND,...`, one a line. A passt is served
/// by another process in one of its two forms.
fn netdevs(printed: &str) -> Vec<Part> {
    let line = |line: &str| {
        let (name, rest) = line.trim_start_matches([' ', '\\']).split_once(": index=")?;
        let (_, rest) = rest.split_once(",type=")?;
        let kind = rest.strip_prefix("passt,").filter(|rest| rest.starts_with("vhost-user")).unwrap_or(rest);
        Some(Part::new(What::Netdev, name, kind.split(',').next()?.trim()))
    };
    printed.lines().filter_map(line).collect()
}

/// Refuses a command line that names such a part. It need not find all: [`look`] does.
pub(super) fn in_arguments(arguments: &[OsString]) -> Result<(), QemuError> {
    for pair in arguments.windows(2) {
        let [option, value] = [&pair[0], &pair[1]].map(|text| text.to_string_lossy());
        let what = match option.trim_start_matches('-') {
            "device" => What::Device,
            "netdev" | "nic" => What::Netdev,
            "object" => What::Object,
            _ => continue,
        };
        let (name, kind) = named(&value);
        Part::new(what, &name, &kind).check()?;
    }
    Ok(())
}

/// The id and the type in an option's value: `KIND,id=NAME,...`, with `driver=`, or JSON.
fn named(value: &str) -> (String, String) {
    const KIND: [&str; 3] = ["driver", "type", "qom-type"];
    if let Ok(Value::Object(json)) = serde_json::from_str(value) {
        let text = |name: &str| json.get(name).and_then(Value::as_str).map(str::to_owned);
        return (text("id").unwrap_or_default(), KIND.into_iter().find_map(text).unwrap_or_default());
    }
    let (mut name, mut kind) = ("", value.split(',').next().unwrap_or_default());
    for (key, value) in value.split(',').filter_map(|item| item.split_once('=')) {
        match key {
            "id" => name = value,
            _ if KIND.contains(&key) => kind = value,
            _ => {}
        }
    }
    (name.to_owned(), kind.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_goes_by_qemus_own_mapping_is_right() {
        for kind in [
            "vfio-pci",
            "vfio-ap",
            "vhost-vdpa",
            "vhost-vdpa-device-pci",
            "vhost-user",
            "vhost-user-fs-pci",
            "vhost-user-vga",
            "cryptodev-vhost-user",
        ] {
            assert!(wrong(What::Device, kind).is_some(), "{kind}");
        }
        for kind in ["virtio-net-pci", "tap", "user", "vhost-vsock-pci", "vhost-scsi-pci", "qcow2", "edu", ""]
        {
            assert_eq!(wrong(What::Device, kind), None, "{kind}");
        }
        // An NVMe controller of QEMU's own is one thing, the block driver for a real one another.
        assert_eq!(wrong(What::Device, "nvme"), None);
        assert!(wrong(What::Disk, "nvme").is_some() && wrong(What::Disk, "virtio-blk-vhost-user").is_some());
    }

    #[test]
    fn netdevs_are_told_by_their_type_and_by_nothing_else() {
        let printed = "virtio-net-pci.0: index=0,type=nic,model=virtio-net-pci,macaddr=52:54:00:12:34:56\r\n \\ n0: \
                       index=0,type=vhost-user,connected\r\nn1: index=1,type=tap,ifname=vhost-user,script=no\n\
                       n2: index=0,type=passt,vhost-user,connected to pid 7\nn3: index=0,type=passt,stream\n\
                       hub 0\n";
        let found: Vec<(String, String)> =
            netdevs(printed).into_iter().map(|part| (part.name, part.kind)).collect();
        let wanted = [("virtio-net-pci.0", "nic"), ("n0", "vhost-user"), ("n1", "tap"), ("n2", "vhost-user")];
        let wanted = wanted.into_iter().chain([("n3", "passt")]);
        assert_eq!(found, wanted.map(|(name, kind)| (name.to_owned(), kind.to_owned())).collect::<Vec<_>>());
    }

    #[test]
    fn arguments_are_read_in_all_their_forms() {
        let check = |text: &str| {
            in_arguments(&text.split(' ').map(OsString::from).collect::<Vec<_>>())
                .map_err(|error| error.to_string())
        };
        for (wrong, name) in [
            ("-device vfio-pci,host=0000:01:00.0,id=gpu", "device gpu (vfio-pci)"),
            ("-m 1G --device driver=vfio-pci,id=x", "device x (vfio-pci)"),
            ("-netdev vhost-user,id=n,chardev=c", "netdev n (vhost-user)"),
            ("-netdev {\"type\":\"vhost-vdpa\",\"id\":\"n\"}", "netdev n (vhost-vdpa)"),
            ("-object {\"qom-type\":\"cryptodev-vhost-user\"}", "cryptodev-vhost-user"),
        ] {
            assert!(check(wrong).unwrap_err().contains(name), "{wrong}");
        }
        for right in ["-device nvme,id=d", "-name vfio-pci", "-netdev tap,id=vhost-user,vhost=on", "-device"]
        {
            assert_eq!(check(right), Ok(()), "{right}");
        }
    }
}
