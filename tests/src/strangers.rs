//! Those who come to a port, say nothing and stay.

use std::net::TcpStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use crate::wait_until;

/// One comes every so often.
const EVERY: Duration = Duration::from_millis(20);

/// See the module. They leave when this is dropped.
pub struct Strangers {
    over: Arc<AtomicBool>,
    coming: Option<JoinHandle<()>>,
}

impl Strangers {
    /// The first of them is there when this returns.
    pub fn at(port: u16) -> Self {
        let dial = move || TcpStream::connect(("127.0.0.1", port));
        wait_until("somebody listens", || dial().is_ok());
        let mut here = vec![dial().unwrap()];
        let over = Arc::new(AtomicBool::new(false));
        let until = over.clone();
        let coming = std::thread::spawn(move || {
            while !until.load(Ordering::Acquire) {
                std::thread::sleep(EVERY);
                here.extend(dial());
            }
        });
        Self { over, coming: Some(coming) }
    }
}

impl Drop for Strangers {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Release);
        if let Some(coming) = self.coming.take() {
            let _ = coming.join();
        }
    }
}
