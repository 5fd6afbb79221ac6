//! Entry points for fuzzing: each feeds any bytes to a decoder of what a peer says. They return
//! nothing; what they must not do is panic, hang, or write where nothing was asked for.

use std::io::{Read as _, Write as _};
use std::net::{Shutdown, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use crate::endpoint;
use crate::lane::{Lane, LaneClass, Read, Token};
use crate::memory::HostMemory;
use crate::region::{LocalRegion, RemoteRegion};
use crate::tcp::{Exports, TcpLane, serve};

const LEN: usize = 64 << 10;
/// What memory is filled with before.
const BEFORE: u8 = 0xa5;

/// The envelope of lane requests and grants, and what verbs says in it.
pub fn lane_setup(bytes: &[u8]) {
    endpoint::fuzz_envelope(bytes);
    #[cfg(feature = "rdma")]
    crate::verbs::fuzz_addresses(bytes);
}

/// A connected pair, as streams; the kernel's own, without ports.
fn streams() -> Option<(TcpStream, TcpStream)> {
    let (one, other) = UnixStream::pair().ok()?;
    Some((OwnedFd::from(one).into(), OwnedFd::from(other).into()))
}

/// A TCP lane with some reads under way, whose server answers with `bytes`.
pub fn tcp_lane(bytes: &[u8]) {
    let Some((ours, mut theirs)) = streams() else { return };
    let Ok(landing) = HostMemory::anonymous("fuzz-landing", LEN) else { return };
    assert!(landing.write(0, &[BEFORE; LEN]));
    let Ok(mut lane) = TcpLane::over(ours.into(), vec![landing.clone()]) else { return };
    let local = LocalRegion { index: 0, len: LEN as u64 };
    let remote = RemoteRegion::new(0, LEN as u64, 1);
    let places = [(0u64, 8u32), (4096, 4096), (16384, 100)];
    for (token, (at, len)) in places.into_iter().enumerate() {
        let slices = local.slice(at, len).zip(remote.slice(at, len));
        let read = slices.and_then(|(local, remote)| Read::new(Token(token as u64), local, remote));
        assert!(matches!(lane.post(&[read.expect("the places lie in the region")]), Ok(1)));
    }
    drop(theirs.write_all(bytes));
    drop(theirs.shutdown(Shutdown::Write));
    let mut done = Vec::new();
    // Every poll takes something, until the bytes are used up and the end of the stream is seen.
    while lane.poll(&mut done).is_ok() && lane.in_flight() > 0 {}
    let mut landed = [0; LEN];
    assert!(landing.read(0, &mut landed));
    for (at, byte) in landed.iter().enumerate() {
        let asked = places.iter().any(|(from, len)| (*from..from + u64::from(*len)).contains(&(at as u64)));
        assert!(asked || *byte == BEFORE, "a byte landed at {at}, where nothing was asked for");
    }
}

/// A TCP responder whose client says `bytes`.
pub fn tcp_responder(bytes: &[u8]) {
    let Some((ours, mut theirs)) = streams() else { return };
    let Ok(memory) = HostMemory::anonymous("fuzz", LEN) else { return };
    // A key that a short input can name, so that reads inside the region are tried too.
    let exports = Arc::new(Exports::new(vec![(0, memory)]));
    let client = std::thread::spawn({
        let (bytes, mut reading) = (bytes.to_vec(), theirs.try_clone());
        move || {
            drop(theirs.write_all(&bytes));
            drop(theirs.shutdown(Shutdown::Write));
            let mut sink = vec![0; LEN];
            while reading.as_mut().is_ok_and(|from| from.read(&mut sink).is_ok_and(|got| got > 0)) {}
        }
    });
    let mut ours = ours.into();
    drop(serve(&mut ours, &exports, LaneClass::Urgent, Duration::ZERO));
    drop(ours);
    assert!(client.join().is_ok());
}
