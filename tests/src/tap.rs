//! Somebody on the way between source and destination, who hears, pretends and changes what passes.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicI64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use postcopy_engine::session::SourceTls;

use crate::cutter::{GREETING, LANE, PURPOSE};

/// See the module. It relays connections to one address, until the test ends.
pub struct Tap {
    address: SocketAddr,
    state: Arc<State>,
}

struct State {
    target: SocketAddr,
    /// All that has passed on lanes.
    heard: Mutex<Vec<u8>>,
    /// What it pretends to be a source by: no certificate, or this one.
    pretends: Mutex<Option<Option<SourceTls>>>,
    pretended: AtomicUsize,
    /// Bytes from the source that lanes still carry before one is changed.
    changes_after: AtomicI64,
}

impl Tap {
    /// On the way to `target`.
    pub fn to(target: impl Into<SocketAddr>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let state = Arc::new(State {
            target: target.into(),
            heard: Mutex::default(),
            pretends: Mutex::default(),
            pretended: AtomicUsize::new(0),
            changes_after: AtomicI64::new(i64::MAX),
        });
        let relaying = state.clone();
        std::thread::spawn(move || {
            for client in listener.incoming().map_while(Result::ok) {
                let state = relaying.clone();
                std::thread::spawn(move || state.relay(client));
            }
        });
        Self { address, state }
    }

    /// Where to connect to.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Whether these bytes have passed on a lane, one behind the other.
    pub fn has_heard(&self, bytes: &[u8]) -> bool {
        self.state.heard.lock().unwrap().windows(bytes.len()).any(|heard| heard == bytes)
    }

    /// Comes before each lane and greets as it does; then shows that certificate, or says nothing that a source would.
    pub fn pretend(&self, by: Option<SourceTls>) {
        *self.state.pretends.lock().unwrap() = Some(by);
    }

    /// How often it has pretended.
    pub fn pretended(&self) -> usize {
        self.state.pretended.load(Ordering::SeqCst)
    }

    /// Changes one bit of what lanes carry from the source, after so many bytes.
    pub fn change_after(&self, bytes: i64) {
        self.state.changes_after.store(bytes, Ordering::SeqCst);
    }

    /// Whether it has.
    pub fn has_changed(&self) -> bool {
        self.state.changes_after.load(Ordering::SeqCst) < 0
    }
}

impl State {
    fn relay(self: &Arc<Self>, mut client: TcpStream) -> std::io::Result<()> {
        let mut greeting = [0; GREETING];
        client.read_exact(&mut greeting)?;
        let is_lane = greeting[PURPOSE] == LANE;
        let pretends = self.pretends.lock().unwrap().clone();
        if let (true, Some(by)) = (is_lane, pretends) {
            self.pretend(&greeting, by)?;
        }
        let mut server = TcpStream::connect(self.target)?;
        server.write_all(&greeting)?;
        let (answers, asks) = (server.try_clone()?, client.try_clone()?);
        let state = self.clone();
        std::thread::spawn(move || state.pass(answers, asks, is_lane, false));
        self.pass(client, server, is_lane, is_lane);
        Ok(())
    }

    /// Its lane is there before the one that it has heard of, and is listened to.
    fn pretend(&self, greeting: &[u8], by: Option<SourceTls>) -> std::io::Result<()> {
        let mut server = TcpStream::connect(self.target)?;
        server.write_all(greeting)?;
        let below = server.try_clone()?;
        let _lane = match by {
            Some(certificate) => Some(certificate.dial_lane(below, self.target.ip())?),
            None => {
                server.write_all(&[0xee; 256])?;
                server.shutdown(Shutdown::Write)?;
                None
            }
        };
        // What it hears is that it is not wanted.
        let _ = server.read_to_end(&mut Vec::new());
        self.pretended.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }

    fn pass(&self, mut from: TcpStream, mut to: TcpStream, is_lane: bool, changes: bool) {
        let mut buffer = vec![0; 16 << 10];
        while let Ok(got @ 1..) = from.read(&mut buffer) {
            if changes {
                let before = self.changes_after.fetch_sub(got as i64, Ordering::SeqCst);
                if (0..got as i64).contains(&before) {
                    buffer[before as usize] ^= 1;
                }
            }
            if is_lane {
                self.heard.lock().unwrap().extend(&buffer[..got]);
            }
            if to.write_all(&buffer[..got]).is_err() {
                break;
            }
        }
        for end in [from, to] {
            let _ = end.shutdown(Shutdown::Both);
        }
    }
}
