//! A VMM with the engine in it, from one end to the other: what the author of another VMM writes is in this file.
//!
//! ```text
//! cargo run --example embed -- receive 127.0.0.1:7070
//! cargo run --example embed -- run 127.0.0.1:7070          # in another terminal, or on another host
//! ```
//!
//! The second boots a guest (`machine.rs`), moves it to the first, and says what that cost. The first lets it run on
//! and then compares every byte of its memory with what its registers say must be there. See docs/embedding.md.

mod machine;

use std::io::{Read, Write};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use machine::{Failure, Machine, layout};
use postcopy_engine::memory::GuestMemory;
use postcopy_engine::session::{
    ArrivalReport, Arrived, DestinationGuest, DestinationHost, GuestDescription, GuestError, MigrateOptions,
    MigrationReport, Owner, Progress, ReceiveOptions, Rejoined, SourceGuest, migrate, receive,
};
use tokio::net::TcpListener;
use tokio::sync::watch;

/// Kind and version of the VMM. A guest goes to no other.
const VMM: &str = "embed-example/1";
/// The longest state that is taken from a peer, in bytes.
const MAX_STATE: u64 = 64 << 10;

/// A guest as the engine sees it.
struct Guest {
    memory: GuestMemory,
    machine: Mutex<Machine>,
}

impl Guest {
    fn new(memory: GuestMemory) -> Result<Self, Failure> {
        let machine = Mutex::new(Machine::new(memory.clone())?);
        Ok(Self { memory, machine })
    }

    fn machine(&self) -> MutexGuard<'_, Machine> {
        self.machine.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl SourceGuest for Guest {
    fn memory(&self) -> GuestMemory {
        self.memory.clone()
    }

    fn describe(&self) -> Result<(String, Vec<u8>), GuestError> {
        // A VMM whose machines differ would say here how many vCPUs this one has, and of what kind.
        Ok((VMM.into(), Vec::new()))
    }

    fn freeze(&self, state: &mut dyn Write) -> Result<Instant, GuestError> {
        let since = Instant::now();
        let mut machine = self.machine();
        machine.stop()?;
        state.write_all(&postcard::to_stdvec(&machine.save()?)?)?;
        Ok(since)
    }

    fn thaw(&self) -> Result<(), GuestError> {
        self.machine().start()
    }

    fn runs_on_our_mapping(&self) -> bool {
        true // what it has touched last is seen there, and read first
    }
}

/// Makes guests for what arrives.
struct Host;

impl DestinationHost for Host {
    type Guest = Guest;

    fn prepare(&self, description: &GuestDescription, memory: &GuestMemory) -> Result<Guest, GuestError> {
        if description.vmm != VMM || description.layout != layout()? {
            return Err(format!("a guest of {:?} cannot run in {VMM}", description.vmm).into());
        }
        Guest::new(memory.clone())
    }
}

impl DestinationGuest for Guest {
    fn load(&self, state: &mut dyn Read) -> Result<(), GuestError> {
        let mut saved = Vec::new();
        state.take(MAX_STATE).read_to_end(&mut saved)?;
        self.machine().load(&postcard::from_bytes(&saved)?)
    }

    fn resume(&self) -> Result<(), GuestError> {
        self.machine().start()
    }
}

/// Boots a guest and moves it away.
async fn run(to: SocketAddr) -> Result<MigrationReport, Failure> {
    let guest = Arc::new(Guest::new(GuestMemory::new(layout()?)?)?);
    guest.machine().boot()?;
    guest.machine().start()?;
    tokio::time::sleep(Duration::from_millis(200)).await;
    // If the network is lost after the handover, the destination is tried again for as long.
    let options = MigrateOptions { patience: Duration::from_secs(60), ..MigrateOptions::default() };
    let progress = watch::Sender::new(Progress::default());
    match migrate(guest.clone(), to, options, &progress).await {
        Ok(report) => Ok(report),
        Err(failed) => match failed.owner() {
            Owner::Source => {
                guest.machine().stop()?;
                let (steps, wrong) = guest.machine().audit()?;
                Err(format!("{failed}\nThe guest ran on here: {steps} steps, {wrong} pages wrong").into())
            }
            // The destination needs what `failed.owed` holds: keep it, and `session::recover` it.
            owner => Err(format!("{failed}\nThe guest is not this side's to run: {owner:?}").into()),
        },
    }
}

/// Takes a guest in; returns when all of its memory is here, and it has run on for a while.
async fn take_in(listener: &TcpListener) -> Result<(ArrivalReport, u64, usize), Failure> {
    let Arrived { guest, drain, .. } = receive(listener, Arc::new(Host), ReceiveOptions::default()).await?;
    let mut finished = drain.finish().await;
    let report = loop {
        // As long as `parted` lives the guest waits for what is missing and never reads zeros in its place.
        let parted = match finished {
            Ok(report) => break report,
            Err(parted) => parted,
        };
        eprintln!("embed: {}; waiting for the source to come back", parted.reason());
        finished = match parted.rejoin(listener).await {
            Ok(Rejoined::Draining(drain)) => drain.finish().await,
            Ok(Rejoined::Released(report)) => Ok(*report),
            Err((error, parted)) => {
                eprintln!("embed: {error}");
                Err(parted)
            }
        };
    };
    tokio::time::sleep(Duration::from_millis(200)).await;
    guest.machine().stop()?;
    let (steps, wrong) = guest.machine().audit()?;
    Ok((report, steps, wrong))
}

const USAGE: &str = "usage: embed receive HOST:PORT, and then embed run HOST:PORT";

fn main() {
    if let Err(failure) = command() {
        eprintln!("embed: {failure}");
        std::process::exit(1);
    }
}

fn command() -> Result<(), Failure> {
    let mut args = std::env::args().skip(1);
    let (Some(role), Some(address), None) = (args.next(), args.next(), args.next()) else {
        return Err(USAGE.into());
    };
    let address: SocketAddr = address.parse().map_err(|error| format!("{address}: {error}; {USAGE}"))?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    match role.as_str() {
        "run" => {
            let report = runtime.block_on(run(address))?;
            println!(
                "moved over {}: stood still for {:.1} ms, all of it there {:.0} ms after that",
                report.transport,
                report.downtime_us as f64 / 1e3,
                report.resident_us as f64 / 1e3,
            );
        }
        "receive" => {
            let taken = async { take_in(&TcpListener::bind(address).await?).await };
            let (report, steps, wrong) = runtime.block_on(taken)?;
            println!("took a guest in: {} pages were waited for", report.pager.pages.network_faults);
            println!("after {steps} steps {wrong} of its pages are wrong");
            if wrong > 0 {
                return Err("its memory is not what it has to be".into());
            }
        }
        _ => return Err(USAGE.into()),
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_guest_moves_and_every_byte_is_right() {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("an address");
        let (moved, taken) = tokio::join!(run(address), take_in(&listener));
        let (moved, (arrived, steps, wrong)) = (moved.expect("it moves"), taken.expect("it arrives"));
        assert_eq!(wrong, 0, "pages are wrong after {steps} steps");
        assert!(
            moved.memory_bytes > 64 << 20 && arrived.pager.pages.network_faults > 0,
            "{moved:?} {arrived:?}"
        );
    }

    #[tokio::test]
    async fn where_nobody_listens_it_runs_on() {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("an address");
        drop(listener);
        let failed = run(address).await.expect_err("nobody is there").to_string();
        assert!(failed.contains("The guest ran on here") && failed.ends_with(", 0 pages wrong"), "{failed}");
    }
}
