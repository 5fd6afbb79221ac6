//! Stock QEMU guests whose memory somebody else reaches, past QEMU: refused before anything stops.
//!
//! The test with a real VFIO device is ignored unless asked for: it needs `scripts/soft-roce/lab
//! --vfio`, and root there.
#![allow(clippy::unwrap_used)] // helpers of tests, where a panic is the report

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use postcopy_e2e::qemu::{NOBODY, Plain, QemuGuest};
use postcopy_e2e::system::load_module;
use postcopy_e2e::{Scratch, assert_refused, stderr, wait_until};
use serde_json::json;

/// A process that serves a disk by vhost-user. Ended when dropped.
struct Backend {
    process: Child,
    socket: PathBuf,
}

impl Backend {
    fn start(scratch: &Scratch) -> Self {
        let socket = scratch.file("backend.sock");
        let export = format!("vhost-user-blk,id=e,node-name=d,addr.type=unix,addr.path={}", socket.display());
        let process = Command::new("qemu-storage-daemon")
            .args(["--blockdev", "null-co,node-name=d,size=67108864", "--export", &export])
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        wait_until("the backend listens", || socket.exists());
        Self { process, socket }
    }

    /// QEMU's end.
    fn chardev(&self) -> String {
        format!("socket,id=backend,path={}", self.socket.display())
    }
}

impl Drop for Backend {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn with(more: &[&str]) -> Plain {
    Plain { more: more.iter().map(|each| (*each).to_owned()).collect(), ..Plain::firmware() }
}

/// The guest cannot be moved for a reason with these words, and runs on.
fn refused_and_runs(guest: &QemuGuest, words: &[&str]) {
    assert_refused(&guest.try_migrate(NOBODY, "tcp"), &[&["this guest cannot be moved"], words].concat());
    assert_eq!(guest.status(), "running");
}

#[test]
fn a_disk_that_another_process_serves() {
    let scratch = Scratch::new("vhost-user-disk");
    let backend = Backend::start(&scratch);
    let chardev = backend.chardev();
    let port = "pcie-root-port,id=root1,bus=pcie.0";
    let disk = "vhost-user-blk-pci,chardev=backend,num-queues=1,bus=root1";
    let machine = with(&["-chardev", &chardev, "-device", port, "-device", disk]);
    let words = ["(vhost-user-blk-pci) is served by another process"];
    refused_and_runs(&machine.start(&scratch, "behind-a-bridge"), &words);
    assert_refused(&machine.receive_to_the_end(&scratch, "there"), &words);
    // A destination whose device only QEMU itself can tell of.
    let file = scratch.file("machine.conf");
    std::fs::write(
        &file,
        "[device \"x\"]\ndriver = \"vhost-user-blk-pci\"\nchardev = \"backend\"\nnum-queues = \"1\"\n",
    )
    .unwrap();
    let read = with(&["-chardev", &chardev, "-readconfig", file.to_str().unwrap()]);
    let words = ["device x (vhost-user-blk-pci) is served by another process"];
    assert_refused(&read.receive_to_the_end(&scratch, "there"), &words);
}

#[test]
fn a_disk_of_another_process_that_is_plugged_in_later() {
    let scratch = Scratch::new("vhost-user-later");
    let backend = Backend::start(&scratch);
    let guest = with(&["-device", "pcie-root-port,id=root1,bus=pcie.0"]).start(&scratch, "a");
    let address = json!({"type": "unix", "data": {"path": backend.socket}});
    let socket = json!({"type": "socket", "data": {"addr": address, "server": false}});
    guest.qmp("chardev-add", json!({"id": "backend", "backend": socket}));
    guest.qmp(
        "device_add",
        json!({"driver": "vhost-user-blk-pci", "chardev": "backend", "num-queues": 1, "bus": "root1", "id": "d"}),
    );
    refused_and_runs(&guest, &["the device d (vhost-user-blk-pci) is served by another process"]);
}

#[test]
fn a_network_that_another_process_serves() {
    let scratch = Scratch::new("vhost-user-net");
    // It says that it serves a disk, but QEMU asks for no more than that it answers.
    let backend = Backend::start(&scratch);
    let netdev = ["-netdev", "vhost-user,id=n0,chardev=backend", "-device", "virtio-net-pci,netdev=n0"];
    let machine = with(&[&["-chardev", &backend.chardev()], &netdev[..]].concat());
    let words =
        ["the netdev n0 (vhost-user) is served by another process", "one that QEMU or the kernel serves"];
    refused_and_runs(&machine.start(&scratch, "a"), &words);
    assert_refused(&machine.receive_to_the_end(&scratch, "there"), &words);
}

#[test]
fn memory_that_is_encrypted_as_the_machine_says() {
    let scratch = Scratch::new("encrypted");
    let guest = Plain::firmware().start(&scratch, "a");
    // No processor here encrypts: QEMU is only told that it would.
    guest.qmp(
        "object-add",
        json!({"qom-type": "sev-guest", "id": "sev0", "cbitpos": 51, "reduced-phys-bits": 1}),
    );
    let link =
        json!({"path": "/machine", "property": "confidential-guest-support", "value": "/objects/sev0"});
    guest.qmp("qom-set", link);
    refused_and_runs(&guest, &["its memory is encrypted"]);
}

/// Gives a PCI device of these numbers (vendor, device) to vfio-pci; gives its address.
fn bind_to_vfio(vendor: &str, device: &str) -> String {
    for module in ["vfio_iommu_type1", "vfio-pci"] {
        load_module(module, &[]);
    }
    let is = |folder: &Path, file: &str, wanted: &str| {
        std::fs::read_to_string(folder.join(file)).is_ok_and(|number| number.trim() == wanted)
    };
    let folders = std::fs::read_dir("/sys/bus/pci/devices").unwrap().flatten().map(|entry| entry.path());
    let folder = folders
        .into_iter()
        .find(|folder| is(folder, "vendor", vendor) && is(folder, "device", device))
        .expect("the lab has that device only with --vfio");
    std::fs::write(folder.join("driver_override"), "vfio-pci").unwrap();
    let address = folder.file_name().unwrap().to_str().unwrap().to_owned();
    if let Ok(driver) = folder.join("driver").canonicalize() {
        std::fs::write(driver.join("unbind"), &address).unwrap();
    }
    std::fs::write("/sys/bus/pci/drivers_probe", &address).unwrap();
    assert!(folder.join("driver").canonicalize().unwrap().ends_with("vfio-pci"));
    address
}

#[test]
#[ignore = "needs the lab: scripts/test runs it there"]
fn a_device_of_the_host() {
    let scratch = Scratch::new("vfio");
    let address = bind_to_vfio("0x1234", "0x11e8");
    let device = format!("vfio-pci,host={address}");
    let bridge = ["-device", "pcie-pci-bridge,id=bridge"];
    let words = ["(vfio-pci) is of this host", "unplug it first"];
    // Without a name, behind a bridge; then plugged in later.
    let nameless = format!("{device},bus=bridge,addr=1");
    let machine = with(&[&bridge[..], &["-device", &nameless]].concat());
    refused_and_runs(&machine.start(&scratch, "a"), &words);
    assert_refused(&machine.receive_to_the_end(&scratch, "there"), &words);
    let guest = with(&["-device", "pcie-root-port,id=root1"]).start(&scratch, "b");
    guest.qmp("device_add", json!({"driver": "vfio-pci", "host": address, "id": "later", "bus": "root1"}));
    refused_and_runs(&guest, &[&["device later"], &words[..]].concat());
    drop(guest);
    let file = scratch.file("machine.conf");
    std::fs::write(&file, format!("[device \"x\"]\ndriver = \"vfio-pci\"\nhost = \"{address}\"\n")).unwrap();
    let read = with(&["-readconfig", file.to_str().unwrap()]);
    let out = read.receive_to_the_end(&scratch, "there");
    // QEMU says something too: this device cannot be reset.
    let said = stderr(&out);
    assert!(!out.status.success() && said.contains("the device x (vfio-pci) is of this host"), "{said}");
}
