//! Relays between source and destination: one that cuts the control connection after so many messages, and a
//! [`Line`] that loses all connections at once.
//!
//! It knows of the protocol only what `docs/wire-format.md` says of framing: a 32-byte greeting
//! each way, then frames of length, checksum and body. Lanes pass through untouched.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::process::Output;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use crate::{assert_refused, stderr};

pub(crate) const GREETING: usize = 32;
/// Where a greeting has what it is for, and what it has there of a control connection and of a lane.
pub(crate) const PURPOSE: usize = 10;
const CONTROL: u8 = 0;
pub(crate) const LANE: u8 = 1;
const FRAME_HEADER: usize = 8;

/// Relays connections to `target` and cuts each control connection when `messages` messages have
/// passed, counting both directions. Returns the port to connect to. Lives until the test ends.
pub fn cut_after(messages: i64, target: u16) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    std::thread::spawn(move || {
        for client in listener.incoming().map_while(Result::ok) {
            if let Ok(server) = TcpStream::connect(("127.0.0.1", target)) {
                std::thread::spawn(move || relay(client, server, messages));
            }
        }
    });
    port
}

fn relay(mut client: TcpStream, mut server: TcpStream, messages: i64) -> std::io::Result<()> {
    let mut greeting = [0; GREETING];
    client.read_exact(&mut greeting)?;
    server.write_all(&greeting)?;
    let is_control = greeting[PURPOSE] == CONTROL;
    let left = Arc::new(AtomicI64::new(messages));
    if is_control {
        server.read_exact(&mut greeting)?;
        client.write_all(&greeting)?;
    }
    let (mut client_too, mut server_too) = (client.try_clone()?, server.try_clone()?);
    if !is_control {
        std::thread::spawn(move || {
            let _ = std::io::copy(&mut server_too, &mut client_too);
            client_too.shutdown(Shutdown::Both)
        });
        let passed = std::io::copy(&mut client, &mut server);
        // An end that the other side does not hear of is none of a lane's.
        server.shutdown(Shutdown::Both)?;
        return passed.map(drop);
    }
    let back = left.clone();
    std::thread::spawn(move || pass_frames(&mut server_too, &mut client_too, &back));
    pass_frames(&mut client, &mut server, &left);
    Ok(())
}

/// Until the messages are used up, or either end is gone: both then hear of it, whatever they did before.
fn pass_frames(from: &mut TcpStream, to: &mut TcpStream, left: &AtomicI64) {
    while let Ok(true) = pass_frame(from, to, left) {}
    for end in [from, to] {
        let _ = end.shutdown(Shutdown::Both);
    }
}

/// Passes the next one on, if it may pass.
fn pass_frame(from: &mut TcpStream, to: &mut TcpStream, left: &AtomicI64) -> std::io::Result<bool> {
    if left.load(Ordering::Acquire) <= 0 {
        return Ok(false);
    }
    let mut header = [0; FRAME_HEADER];
    from.read_exact(&mut header)?;
    if left.fetch_sub(1, Ordering::AcqRel) <= 0 {
        return Ok(false);
    }
    let length = u32::from_le_bytes([header[0], header[1], header[2], header[3]]);
    let mut frame = header.to_vec();
    frame.resize(FRAME_HEADER + length as usize, 0);
    from.read_exact(&mut frame[FRAME_HEADER..])?;
    to.write_all(&frame)?;
    Ok(true)
}

/// It was the cut that ended the migration, before the handover, and nothing else.
pub fn assert_cut(out: &Output) {
    assert_refused(out, &["the guest runs on here"]);
    let reasons = ["pcvm: the peer closed the connection", "pcvm: the control connection broke"];
    assert!(reasons.iter().any(|reason| stderr(out).starts_with(reason)), "{}", stderr(out));
}

/// A slow line between source and destination. When it is cut all its connections are lost, and it takes no other
/// until it is mended.
pub struct Line {
    address: SocketAddr,
    state: Arc<LineState>,
}

struct LineState {
    cut: AtomicBool,
    /// Whether lanes carry nothing from who dials.
    hushed: AtomicBool,
    /// When something passed last.
    passed: Mutex<Instant>,
    /// Bytes a second of each connection, from who dials.
    rate: AtomicU64,
    open: Mutex<Vec<TcpStream>>,
}

impl Line {
    /// A line to `target` of so many bytes a second, for each connection.
    pub fn to(target: impl Into<SocketAddr>, rate: u64) -> Self {
        let target = target.into();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let state = Arc::new(LineState {
            cut: AtomicBool::new(false),
            hushed: AtomicBool::new(false),
            passed: Mutex::new(Instant::now()),
            rate: AtomicU64::new(rate),
            open: Mutex::default(),
        });
        let line = state.clone();
        std::thread::spawn(move || {
            for client in listener.incoming().map_while(Result::ok) {
                let whole = !line.cut.load(Ordering::SeqCst);
                if let Some(Ok(server)) = whole.then(|| TcpStream::connect(target)) {
                    line.join(&client, &server);
                }
            }
        });
        Self { address, state }
    }

    /// Where to connect to.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// What lanes carry from who dials is lost from now on, until they are.
    pub fn hush_lanes(&self) {
        self.state.hushed.store(true, Ordering::SeqCst);
    }

    /// For how long nothing has passed.
    pub fn still_for(&self) -> Duration {
        self.state.passed.lock().unwrap().elapsed()
    }

    /// Loses all connections.
    pub fn cut(&self) {
        self.state.cut.store(true, Ordering::SeqCst);
        for end in self.state.open.lock().unwrap().drain(..) {
            let _ = end.shutdown(Shutdown::Both);
        }
    }

    /// Takes connections again, as fast as they are.
    pub fn mend(&self) {
        self.state.rate.store(u64::MAX, Ordering::SeqCst);
        self.state.hushed.store(false, Ordering::SeqCst);
        self.state.cut.store(false, Ordering::SeqCst);
    }
}

impl LineState {
    fn join(self: &Arc<Self>, client: &TcpStream, server: &TcpStream) {
        for end in [client, server] {
            end.set_nodelay(true).unwrap();
            self.open.lock().unwrap().push(end.try_clone().unwrap());
        }
        for (from, to, slow) in [(client, server, true), (server, client, false)] {
            let (from, to, state) = (from.try_clone().unwrap(), to.try_clone().unwrap(), self.clone());
            std::thread::spawn(move || state.pass(from, to, slow));
        }
    }

    /// `slow` is the way from who dials, which begins with a greeting.
    fn pass(&self, mut from: TcpStream, mut to: TcpStream, slow: bool) {
        let mut greeting = [0; GREETING];
        if slow && (from.read_exact(&mut greeting).is_err() || to.write_all(&greeting).is_err()) {
            let _ = to.shutdown(Shutdown::Both);
            return;
        }
        let is_lane = slow && greeting[PURPOSE] == LANE;
        let mut buffer = vec![0; 16 << 10];
        while let Ok(got @ 1..) = from.read(&mut buffer) {
            if slow {
                std::thread::sleep(
                    Duration::from_secs(1).mul_f64(got as f64 / self.rate.load(Ordering::SeqCst) as f64),
                );
            }
            *self.passed.lock().unwrap() = Instant::now();
            if is_lane && self.hushed.load(Ordering::SeqCst) {
                continue;
            }
            if to.write_all(&buffer[..got]).is_err() {
                break;
            }
        }
        let _ = to.shutdown(Shutdown::Write);
    }
}
