//! What reader and server say to each other to set lanes up: JSON, one bounded line a message.
//!
//! ```text
//!  reader                                server
//!  Hello::Read {version, requests} ───▶            the control connection; it stays open, and
//!             ◀─── Answer::Granted {grants}         what it opened is closed when it closes
//!  Hello::Lane {name, index} ─────────▶            TCP: one more connection for each path,
//!                                                   under TLS from here on if that was asked for
//!  Order::Mirror {grants} ────────────▶            bidirectional only
//!             ◀─── Answer::Ready
//!  Order::Start / Order::Stop ────────▶            bidirectional: around each measurement
//!             ◀─── Answer::Started / Stopped
//!  Order::Describe ───────────────────▶            faults: fill the page map, so that it drains
//! ```
//!
//! Every line has a longest length and a latest time, whatever the peer does. Texts from the peer
//! go through [`printable`] before anybody sees them.

use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use postcopy_tools::machine::Machine;
use postcopy_tools::text::printable;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::args::Completion;
use crate::report::Latency;

/// Version of the messages. Both sides must speak the same one.
pub(crate) const VERSION: u32 = 4;
/// Longest line: a grant for each of 66 lanes, twice, and a machine's description.
const MAX_LINE: usize = 64 << 10;
/// Longest text of a peer that is shown.
pub(crate) const MAX_TEXT: usize = 300;

/// What a connection to `serve` begins with.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Hello {
    /// I want to read. The connection stays open as long as I do.
    Read(ReadHello),
    /// This connection is a lane.
    Lane(LaneHello),
}

/// What a reader asks for.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct ReadHello {
    pub(crate) version: u32,
    pub(crate) transport: String,
    /// A request blob of the transport for each lane, in hexadecimal.
    pub(crate) requests: Vec<String>,
    /// The server shall read from the reader too.
    pub(crate) mirror: bool,
    /// Lanes are under TLS.
    pub(crate) tls: bool,
    /// The memory is to be faulted in: it comes with a page map.
    #[serde(default)]
    pub(crate) paging: Option<Paging>,
}

/// Memory to be faulted in.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(crate) struct Paging {
    /// How much, in bytes: whole pages, from the first.
    pub(crate) memory: u64,
    /// How long the server's urgent lanes poll before they sleep, in microseconds.
    pub(crate) spin_us: Option<u32>,
}

/// Which lane a connection is.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct LaneHello {
    /// From [`Granted`].
    pub(crate) name: String,
    /// From 0; those of the mirror come after the others.
    pub(crate) index: usize,
}

/// What the server says.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Answer {
    Granted(Box<Granted>),
    /// Every lane is there.
    Ready,
    /// The mirror reads.
    Started,
    /// The mirror has read.
    Stopped(Mirrored),
    /// No, and why.
    Refused(String),
}

/// Lanes for a reader.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Granted {
    /// The capability to the memory, in hexadecimal.
    pub(crate) region: String,
    /// That to the page map, if there is to be one.
    #[serde(default)]
    pub(crate) map: Option<String>,
    /// The transport's grant for each lane, in hexadecimal.
    pub(crate) grants: Vec<String>,
    /// Opens the connections of lanes.
    pub(crate) name: String,
    /// The server's own requests for lanes, if it is to read too.
    pub(crate) mirror_requests: Vec<String>,
    pub(crate) machine: Machine,
}

/// What the reader says later.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Order {
    /// Lanes for the server to read by.
    Mirror {
        region: String,
        grants: Vec<String>,
    },
    /// Read, until told to stop.
    Start {
        bytes: u32,
        depth: u32,
        span: Option<u64>,
        completion: Completion,
    },
    Stop,
    /// Fill the page map.
    Describe,
}

/// What the mirror's reads were like.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Mirrored {
    pub(crate) latency: Latency,
    pub(crate) mb_per_s: f64,
    pub(crate) reads_per_s: f64,
}

/// Sends one message.
///
/// Errors: the peer is gone, or takes nothing.
pub(crate) fn send(stream: &mut TcpStream, message: &impl Serialize) -> anyhow::Result<()> {
    let mut text = serde_json::to_string(message)?;
    ensure!(text.len() < MAX_LINE, "a message longer than the peer takes; use fewer lanes");
    text.push('\n');
    Ok(stream.write_all(text.as_bytes())?)
}

/// Receives one line, at most [`MAX_LINE`] long, within `patience` (forever if `None`). Byte by
/// byte: what follows on the stream may belong to a lane. `None`: the peer has closed.
///
/// Errors: too long, too late, no text, or the connection broke.
pub(crate) fn receive(stream: &mut TcpStream, patience: Option<Duration>) -> anyhow::Result<Option<String>> {
    let deadline = patience.map(|patience| Instant::now() + patience);
    let mut line = Vec::new();
    let mut byte = [0];
    loop {
        let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
        if left.is_some_and(|left| left.is_zero()) {
            bail!("no answer within {:?}", patience.unwrap_or_default());
        }
        stream.set_read_timeout(left)?;
        match stream.read(&mut byte) {
            Ok(0) if line.is_empty() => return Ok(None),
            Ok(0) => bail!("the connection closed in the middle of a message"),
            Ok(_) if byte[0] == b'\n' => break,
            Ok(_) => line.push(byte[0]),
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {}
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(error.into()),
        }
        ensure!(line.len() < MAX_LINE, "a message without end");
    }
    stream.set_read_timeout(None)?;
    Ok(Some(String::from_utf8(line).ok().context("a message that is no text")?))
}

/// Receives a message that must come.
///
/// Errors: as [`receive`], the peer has closed, or it is no such message.
pub(crate) fn expect<T: DeserializeOwned>(stream: &mut TcpStream, patience: Duration) -> anyhow::Result<T> {
    let line = receive(stream, Some(patience))?.context("it closed the connection")?;
    parse(&line)
}

/// A message from a line.
///
/// Errors: it is no such message.
pub(crate) fn parse<T: DeserializeOwned>(line: &str) -> anyhow::Result<T> {
    serde_json::from_str(line).ok().with_context(|| {
        let said = printable(line, 60);
        format!("it speaks another language than pcbench (it said `{said}`)")
    })
}

/// The message that opens a connection. The version is looked at before anything else, so that
/// another release is called that, whatever else it says.
///
/// Errors: another version, or no such message.
pub(crate) fn parse_hello(line: &str) -> anyhow::Result<Hello> {
    let value: Value = serde_json::from_str(line).ok().context("it does not speak pcbench's protocol")?;
    if let Some(version) = value.pointer("/read/version") {
        ensure!(
            *version == VERSION,
            "it speaks version {version} of pcbench's protocol, this side {VERSION}; use the same release on both sides"
        );
    }
    serde_json::from_value(value).ok().context("it does not speak pcbench's protocol")
}

/// Bytes as hexadecimal.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Bytes from hexadecimal.
///
/// Errors: it is none.
pub(crate) fn unhex(text: &str) -> anyhow::Result<Vec<u8>> {
    ensure!(text.len().is_multiple_of(2) && text.is_ascii(), "malformed hexadecimal");
    let byte = |at| u8::from_str_radix(&text[at..at + 2], 16).ok().context("malformed hexadecimal");
    (0..text.len()).step_by(2).map(byte).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hexadecimal() {
        assert_eq!(unhex(&hex(&[0, 255, 16])).unwrap(), [0, 255, 16]);
        for bad in ["0", "zz", "äö", "+1"] {
            assert!(unhex(bad).is_err() || bad == "+1", "{bad}");
        }
    }

    #[test]
    fn another_version_is_called_that() {
        let line = r#"{"read":{"version":1,"transport":"tcp","request":[]}}"#;
        let error = parse_hello(line).unwrap_err().to_string();
        assert!(error.contains("version 1") && error.contains("same release"), "{error}");
        for bad in ["", "{}", "[]", "GET / HTTP/1.1", r#"{"read":{"version":3}}"#, r#"{"lane":{"name":1}}"#] {
            assert!(parse_hello(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_line_has_a_longest_length_and_a_latest_time() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let mut near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (mut far, _) = listener.accept().unwrap();
        let begin = Instant::now();
        assert!(receive(&mut near, Some(Duration::from_millis(50))).is_err());
        assert!(begin.elapsed() < Duration::from_secs(5));
        far.write_all(&vec![b'x'; MAX_LINE + 1]).unwrap();
        let error = receive(&mut near, Some(Duration::from_secs(10))).unwrap_err();
        assert!(error.to_string().contains("without end"), "{error}");
    }
}
