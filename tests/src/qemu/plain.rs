//! A machine of processors and memory only, which differs from test to test.

use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use super::{Place, QEMU, QemuGuest};
use crate::{Scratch, free_port, program, run, variable};

/// See the module.
#[derive(Clone, Debug)]
pub struct Plain {
    /// The program.
    pub qemu: String,
    /// The machine type.
    pub kind: String,
    /// RAM backend, with `FILE` and `MIB` where its file's name and its size go; none: RAM that nobody
    /// else can map.
    pub backend: Option<String>,
    /// MiB of RAM.
    pub mib: u64,
    /// Number of vCPUs.
    pub cpus: u32,
    /// Kernel, initramfs and command line; none: only the firmware runs.
    pub kernel: Option<[String; 3]>,
    /// More arguments.
    pub more: Vec<String>,
}

/// What is preloaded into a QEMU.
pub fn library() -> PathBuf {
    let library = program("pcvm").with_file_name("libpostcopy_handover.so");
    assert!(library.exists(), "build it: cargo build -p postcopy-handover");
    library
}

impl Plain {
    /// Two vCPUs and 256 MiB in a shared file in memory; only firmware.
    pub fn firmware() -> Self {
        let backend = "memory-backend-file,id=ram0,size=MIBM,mem-path=FILE,share=on".to_owned();
        let (qemu, kind, backend) = (QEMU.to_owned(), "q35".to_owned(), Some(backend));
        Self { qemu, kind, backend, mib: 256, cpus: 2, kernel: None, more: Vec::new() }
    }

    /// The same in a memfd.
    pub fn in_a_memfd() -> Self {
        let backend = Some("memory-backend-memfd,id=ram0,size=MIBM,share=on".to_owned());
        Self { backend, ..Self::firmware() }
    }

    /// The same machine with its RAM in a file of this path, or one that QEMU makes in a folder of it.
    pub fn within(&self, path: &Path) -> Self {
        let backend = format!("memory-backend-file,id=ram0,size=MIBM,mem-path={},share=on", path.display());
        Self { backend: Some(backend), ..self.clone() }
    }

    /// Firmware with the test guest, as POSTCOPY_KERNEL and POSTCOPY_INITRD say.
    pub fn linux(load: &str) -> Self {
        let line = format!("console=ttyS0 quiet panic=-1 no_timer_check {load}");
        let kernel = Some([variable("POSTCOPY_KERNEL"), variable("POSTCOPY_INITRD"), line]);
        Self { kernel, ..Self::firmware() }
    }

    /// QEMU's command line for this machine at `place`.
    pub fn command_line(&self, place: &Place) -> Vec<String> {
        // Emulated unless told otherwise: a KVM that cannot run a stock guest looks like one that can.
        let accelerator = std::env::var("POSTCOPY_ACCELERATOR").unwrap_or_else(|_| "tcg".into());
        let processor = if accelerator == "kvm" { "host" } else { "max" };
        let mut machine = format!("{},accel={accelerator}", self.kind);
        let mut pairs = Vec::new();
        if let Some(backend) = &self.backend {
            machine += ",memory-backend=ram0";
            let file = place.ram.to_str().unwrap();
            pairs.push(("-object", backend.replace("FILE", file).replace("MIB", &self.mib.to_string())));
        }
        pairs.extend([
            ("-machine", machine),
            ("-cpu", processor.to_owned()),
            ("-m", format!("{}M", self.mib)),
            ("-smp", self.cpus.to_string()),
        ]);
        if let Some(kernel) = &self.kernel {
            pairs.extend(["-kernel", "-initrd", "-append"].into_iter().zip(kernel.iter().cloned()));
        }
        let pairs = pairs.into_iter().flat_map(|(name, value)| [name.to_owned(), value]);
        // A guest that panics is not to begin anew, as if nothing had been.
        let here = std::iter::once(self.qemu.clone()).chain(place.args()).chain(["-no-reboot".to_owned()]);
        here.chain(pairs).chain(self.more.iter().cloned()).collect()
    }

    /// Starts it, by itself.
    pub fn start(&self, scratch: &Scratch, name: &str) -> QemuGuest {
        let place = Place::apart(scratch, name);
        let line = self.command_line(&place);
        QemuGuest::start_by_itself(place, &line)
    }

    /// The same with the library preloaded that `pcvm receive` gives to the QEMUs that it starts.
    pub fn start_preloaded(&self, scratch: &Scratch, name: &str) -> QemuGuest {
        let place = Place::apart(scratch, name);
        let preload = format!("LD_PRELOAD={}", library().display());
        let line = ["env".to_owned(), preload].into_iter().chain(self.command_line(&place));
        let line: Vec<String> = line.collect();
        QemuGuest::start_by_itself(place, &line)
    }

    /// Starts `pcvm receive` with `options` and such a QEMU, which waits for a guest; says where.
    pub fn receive(
        &self,
        scratch: &Scratch,
        name: &str,
        address: IpAddr,
        options: &[&str],
    ) -> (QemuGuest, SocketAddr) {
        let place = Place::apart(scratch, name);
        let line = self.command_line(&place);
        QemuGuest::receive(place, &line, address, options)
    }

    /// Runs `pcvm receive` with it to its end: it is to be refused.
    pub fn receive_to_the_end(&self, scratch: &Scratch, name: &str) -> Output {
        let control = scratch.file("refused.sock");
        let listen = format!("127.0.0.1:{}", free_port());
        let mut command = Command::new(program("pcvm"));
        command.args(["receive", "--vmm", "qemu", "--listen", &listen, "--control"]).arg(control);
        run(command.arg("--").args(self.command_line(&Place::apart(scratch, name))))
    }
}
