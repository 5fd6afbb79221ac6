//! The threads of a guest's vCPUs, begun before there is a guest.
//!
//! The scheduler has a new thread wait until those that run have used up their slices, one that was asleep it
//! does not. So a destination begins them while the guest still runs at the source.

use std::sync::Arc;
use std::sync::mpsc::{SyncSender, sync_channel};
use std::thread::JoinHandle;

use crate::error::{SystemContext, VmError};
use crate::machine::Machine;

/// Threads that wait for their machine, one for each vCPU. Dropped, they end.
pub(crate) struct Crew {
    waiting: Vec<(SyncSender<Arc<Machine>>, JoinHandle<()>)>,
}

impl Crew {
    /// Begins `cpus` threads.
    ///
    /// Errors: there can be no more threads.
    pub(crate) fn begin(cpus: u8) -> Result<Self, VmError> {
        let begin = |index: usize| -> Result<_, VmError> {
            let (machine, machines) = sync_channel::<Arc<Machine>>(1);
            let run = move || {
                if let Ok(machine) = machines.recv() {
                    machine.vcpus[index].run(&machine);
                }
            };
            let thread = std::thread::Builder::new().name(format!("vcpu{index}")).spawn(run);
            Ok((machine, thread.system("spawning a vCPU thread")?))
        };
        Ok(Self { waiting: (0..usize::from(cpus)).map(begin).collect::<Result<_, _>>()? })
    }

    /// Gives them the machine, which has as many vCPUs.
    pub(crate) fn man(self, machine: &Arc<Machine>) -> Vec<JoinHandle<()>> {
        let man = |(sender, thread): (SyncSender<_>, _)| {
            // Who waits takes it: a thread ends without a machine only when its sender is gone.
            let _ = sender.send(machine.clone());
            thread
        };
        self.waiting.into_iter().map(man).collect()
    }
}
