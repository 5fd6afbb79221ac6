//! What a process of pcvm holds: a guest of its own VMM, or one of a stock QEMU.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::Context;
use postcopy_engine::session::{DestinationGuest, DestinationHost, SourceGuest};
use postcopy_vmm::qemu::{QemuCommand, QemuGuest, QemuHost};
use postcopy_vmm::{MovableVm, VmHost};

use crate::args::{ReceiveArgs, SelfService, Vmm};

/// How a guest has ended.
pub(crate) struct End {
    /// In words.
    pub(crate) how: String,
    /// Whether that is an error.
    pub(crate) failed: bool,
}

/// A guest that a process holds and can move away.
pub(crate) trait HeldGuest: SourceGuest {
    /// How it ended, if it has.
    fn ended(&self) -> Option<End>;

    /// Types at its console, if that is ours; says how many bytes were taken.
    fn console_input(&self, bytes: &[u8]) -> Option<usize>;

    /// Ends it here: it runs elsewhere, or is no longer wanted. May take as long as a page that does
    /// not come.
    fn end(&self);
}

impl HeldGuest for MovableVm {
    fn ended(&self) -> Option<End> {
        let reason = MovableVm::ended(self)?;
        Some(End { how: reason.to_string(), failed: reason.failed() })
    }

    fn console_input(&self, bytes: &[u8]) -> Option<usize> {
        Some(MovableVm::console_input(self, bytes))
    }

    fn end(&self) {
        MovableVm::end(self);
    }
}

impl HeldGuest for QemuGuest {
    fn ended(&self) -> Option<End> {
        let ended = QemuGuest::ended(self)?;
        Some(End { how: format!("its QEMU ended: {ended}"), failed: ended.failed() })
    }

    fn console_input(&self, _bytes: &[u8]) -> Option<usize> {
        None
    }

    fn end(&self) {
        QemuGuest::end(self);
    }
}

/// What makes room for a guest, each time that one is waited for. Called from a blocking thread.
pub(crate) trait Room: Send + Sync + 'static {
    type Guest: DestinationGuest + HeldGuest;
    type Host: DestinationHost<Guest = Self::Guest>;

    fn make(&self) -> anyhow::Result<Arc<Self::Host>>;
}

/// Room for guests of our own VMM.
pub(crate) struct OwnRoom(pub(crate) Arc<VmHost>);

impl Room for OwnRoom {
    type Guest = MovableVm;
    type Host = VmHost;

    fn make(&self) -> anyhow::Result<Arc<VmHost>> {
        Ok(self.0.clone())
    }
}

/// Room for a guest of a stock QEMU, started for each, if there is to be any.
pub(crate) struct QemuRoom(pub(crate) Option<QemuCommand>);

impl Room for QemuRoom {
    type Guest = QemuGuest;
    type Host = QemuHost;

    fn make(&self) -> anyhow::Result<Arc<QemuHost>> {
        let command = self.0.as_ref().context("there is no QEMU to start for a guest")?;
        Ok(Arc::new(QemuHost::start(command)?))
    }
}

/// The QEMU to start for a guest, if it is to be one of QEMU's.
pub(crate) fn qemu_command(args: &ReceiveArgs) -> anyhow::Result<Option<QemuCommand>> {
    match (args.vmm, args.command.split_first()) {
        (Vmm::Own, _) if args.take_over.is_some() => anyhow::bail!("--take-over is for --vmm qemu"),
        (Vmm::Own, None) => Ok(None),
        (Vmm::Own, Some(_)) => anyhow::bail!("a command after -- is for --vmm qemu"),
        (Vmm::Qemu, None) if args.take_over.is_some() => {
            anyhow::ensure!(
                !args.host.again,
                "--again needs QEMU's command line after --, for the next guest"
            );
            Ok(None)
        }
        (Vmm::Qemu, None) => {
            anyhow::bail!(
                "--vmm qemu needs QEMU's command line: -- qemu-system-x86_64 ARGUMENTS, as at the source"
            )
        }
        (Vmm::Qemu, Some(_)) if args.host.self_service == SelfService::On => {
            anyhow::bail!("the vCPUs of a QEMU cannot serve their own faults; leave --self-service out")
        }
        (Vmm::Qemu, Some((program, arguments))) => {
            let library = handover_library(args.handover_library.as_deref())?;
            let (program, arguments) = (program.clone(), arguments.to_vec());
            Ok(Some(QemuCommand { program, arguments, library, shards: args.host.shards }))
        }
    }
}

/// The library that QEMU is started with: beside this program, or in ../lib as an installation has it.
fn handover_library(named: Option<&Path>) -> anyhow::Result<PathBuf> {
    if let Some(named) = named {
        return Ok(named.to_owned());
    }
    let program = std::env::current_exe().context("finding this program")?;
    let beside = program.with_file_name("libpostcopy_handover.so");
    let installed = program.parent().map(|bin| bin.join("../lib/libpostcopy_handover.so"));
    Ok(installed.filter(|library| library.exists() && !beside.exists()).unwrap_or(beside))
}
