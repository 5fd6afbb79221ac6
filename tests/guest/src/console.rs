//! What the program says: lines of its own, whole, from whichever thread.

use std::io::Write;
use std::sync::atomic::{AtomicU64, Ordering};

use serde::Serialize;

/// Most lines about one kind of damage that are printed; all of it is counted.
pub const MAX_BAD_PRINTED: u64 = 32;

/// Prints a line, whole.
pub fn say(line: &str) {
    let mut out = std::io::stdout().lock();
    let _ = out.write_all(format!("pcguest: {line}\n").as_bytes());
    let _ = out.flush();
}

/// A value as a line of JSON.
pub fn json(value: &impl Serialize) -> String {
    serde_json::to_string(value).unwrap_or_else(|error| format!("{{\"error\":\"{error}\"}}"))
}

/// Damage of one kind, the first of which is printed.
#[derive(Debug, Default)]
pub struct BadLines(AtomicU64);

impl BadLines {
    /// Says what is bad, unless much has been said already.
    pub fn say(&self, what: &impl Serialize) {
        if self.0.fetch_add(1, Ordering::Relaxed) < MAX_BAD_PRINTED {
            say(&format!("BAD {}", json(what)));
        }
    }
}
