//! The guest's network on this host: a bridge with a tap for each process, and open connections
//! through it.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::PATIENCE;
use crate::system::{ip, load_module};

/// The guest's address, wherever it runs.
pub(super) const GUEST: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 2);
/// How much of it is the network's.
pub(super) const PREFIX: u8 = 24;
const HOST: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 1);

/// Longest message, from which on lengths begin anew.
const MESSAGE_BYTES: u64 = 1000;

/// A bridge with this host's address and some taps, which are gone when it is dropped.
pub struct Network {
    bridge: String,
    taps: Vec<String>,
}

impl Network {
    /// A bridge and so many taps.
    pub fn new(taps: usize) -> Self {
        for module in ["tun", "bridge", "vhost_net"] {
            load_module(module, &[]);
        }
        let named = |kind: &str| format!("pc{}{kind}", std::process::id());
        let network =
            Self { bridge: named("b"), taps: (0..taps).map(|tap| named(&format!("t{tap}"))).collect() };
        let bridge = &network.bridge;
        ip(&format!("link add {bridge} type bridge forward_delay 0"));
        ip(&format!("address add {HOST}/{PREFIX} dev {bridge}"));
        ip(&format!("link set {bridge} up"));
        for tap in &network.taps {
            ip(&format!("tuntap add {tap} mode tap"));
            ip(&format!("link set {tap} master {bridge} up"));
        }
        network
    }

    /// A tap's name.
    pub fn tap(&self, index: usize) -> &str {
        &self.taps[index]
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        for link in self.taps.iter().chain([&self.bridge]) {
            let _ = Command::new("ip").args(["link", "delete", link]).status();
        }
    }
}

/// An open TCP connection to an echo, with numbered messages.
pub struct Connection {
    stream: TcpStream,
    messages: u64,
}

impl Connection {
    /// Connects, as soon as somebody answers there.
    pub fn open(to: SocketAddr) -> Self {
        let begin = Instant::now();
        let stream = loop {
            match TcpStream::connect_timeout(&to, PATIENCE) {
                Ok(stream) => break stream,
                Err(error) => assert!(begin.elapsed() < PATIENCE, "cannot connect to {to}: {error}"),
            }
            std::thread::sleep(Duration::from_millis(50));
        };
        stream.set_nodelay(true).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        Self { stream, messages: 0 }
    }

    /// How many messages have come back.
    pub fn messages(&self) -> u64 {
        self.messages
    }

    /// Sends the next message, and checks that it comes back and nothing else. Gives how long it took.
    pub fn exchange(&mut self) -> Duration {
        let (number, width) = (self.messages, (8 + self.messages % MESSAGE_BYTES) as usize);
        let message = format!("{number:>width$}\n");
        let begin = Instant::now();
        self.stream.write_all(message.as_bytes()).unwrap_or_else(|e| panic!("message {number}: {e}"));
        let mut back = vec![0; message.len()];
        self.stream.read_exact(&mut back).unwrap_or_else(|e| panic!("the echo of message {number}: {e}"));
        assert_eq!(String::from_utf8_lossy(&back), message, "the echo of message {number}");
        self.messages += 1;
        begin.elapsed()
    }

    /// Has a thread exchange messages, with a pause after each, until it is stopped.
    pub fn keep_busy(mut self, pace: Duration) -> Chatter {
        let (stop, messages) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(self.messages)));
        let (stopped, count) = (stop.clone(), messages.clone());
        let thread = std::thread::spawn(move || {
            let mut longest = Duration::ZERO;
            while !stopped.load(Ordering::Acquire) {
                longest = longest.max(self.exchange());
                count.store(self.messages, Ordering::Release);
                std::thread::sleep(pace);
            }
            (self, longest)
        });
        Chatter { stop, messages, thread }
    }
}

/// A connection that a thread keeps busy.
pub struct Chatter {
    stop: Arc<AtomicBool>,
    messages: Arc<AtomicU64>,
    thread: JoinHandle<(Connection, Duration)>,
}

impl Chatter {
    /// How many messages have come back.
    pub fn messages(&self) -> u64 {
        self.messages.load(Ordering::Acquire)
    }

    /// Waits until `more` messages have come back.
    pub fn wait_for(&self, more: u64) {
        let wanted = self.messages() + more;
        crate::wait_until("the guest answers on the network", || {
            assert!(!self.thread.is_finished(), "the connection has broken; see above");
            self.messages() >= wanted
        });
    }

    /// Gives the connection back, and the longest time that a message took.
    pub fn stop(self) -> (Connection, Duration) {
        self.stop.store(true, Ordering::Release);
        self.thread.join().unwrap_or_else(|_| panic!("the connection has broken; see above"))
    }
}
