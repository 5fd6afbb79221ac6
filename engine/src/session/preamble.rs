//! The first bytes of every connection: who speaks, what version, and what the connection is for.
//!
//! ```text
//! 0          8         10     12       16              32
//! | "PCOPYMIG" | version | kind | lane  |  session id   |     little-endian
//! ```
//!
//! The layout of these 32 bytes is the same in every version, so that two versions can tell each
//! other what they are. The dialer sends it first; on a connection to speak over (control, rejoin) the listener answers
//! with its own. The highest bit of `kind` says that the sender is set up for TLS: it follows if both are, and neither
//! goes on if one is not. The session id is 128 random bits chosen by the dialer: it is what ties a lane's
//! connection to its session. Who sees the packets knows it, and without TLS nothing else tells a lane's ends from strangers.

use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::SessionError;

/// Version of the protocol. Peers must have the same.
pub const PROTOCOL_VERSION: u16 = 15;

const MAGIC: [u8; 8] = *b"PCOPYMIG";
pub(super) const PREAMBLE_BYTES: usize = 32;
const CONTROL: u16 = 0;
const LANE: u16 = 1;
const REJOIN: u16 = 2;
const TLS: u16 = 1 << 15;

/// Ties the connections of one session together.
pub(super) type SessionId = [u8; 16];

/// What a connection is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Purpose {
    Control,
    Lane(u32),
    /// Control again, of a session whose connections were lost.
    Rejoin,
}

/// The decoded first bytes of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Preamble {
    pub(super) session: SessionId,
    pub(super) purpose: Purpose,
    /// TLS is to follow.
    pub(super) tls: bool,
}

impl Preamble {
    /// What a listener answers.
    pub(super) fn answer(tls: bool) -> Self {
        Self { session: SessionId::default(), purpose: Purpose::Control, tls }
    }

    /// Errors: one side is set up for TLS, and the other is not.
    pub(super) fn agrees(&self, tls: bool) -> Result<(), SessionError> {
        let agreed = self.tls == tls;
        agreed.then_some(()).ok_or(SessionError::OneSided { ours: tls })
    }

    pub(super) fn encode(&self) -> [u8; PREAMBLE_BYTES] {
        let (kind, lane) = match self.purpose {
            Purpose::Control => (CONTROL, 0),
            Purpose::Lane(lane) => (LANE, lane),
            Purpose::Rejoin => (REJOIN, 0),
        };
        let kind = if self.tls { kind | TLS } else { kind };
        let mut bytes = [0; PREAMBLE_BYTES];
        bytes[..8].copy_from_slice(&MAGIC);
        bytes[8..10].copy_from_slice(&PROTOCOL_VERSION.to_le_bytes());
        bytes[10..12].copy_from_slice(&kind.to_le_bytes());
        bytes[12..16].copy_from_slice(&lane.to_le_bytes());
        bytes[16..].copy_from_slice(&self.session);
        bytes
    }

    pub(super) fn decode(bytes: &[u8; PREAMBLE_BYTES]) -> Result<Self, SessionError> {
        if bytes[..8] != MAGIC {
            return Err(SessionError::NotOurs);
        }
        let short = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        if short(8) != PROTOCOL_VERSION {
            return Err(SessionError::Version { theirs: short(8), ours: PROTOCOL_VERSION });
        }
        let lane = u32::from_le_bytes([bytes[12], bytes[13], bytes[14], bytes[15]]);
        let tls = short(10) & TLS != 0;
        let purpose = match (short(10) & !TLS, lane) {
            (CONTROL, 0) => Purpose::Control,
            (LANE, lane) => Purpose::Lane(lane),
            (REJOIN, 0) => Purpose::Rejoin,
            _ => return Err(SessionError::Protocol("a connection of unknown purpose")),
        };
        let mut session = SessionId::default();
        session.copy_from_slice(&bytes[16..]);
        Ok(Self { session, purpose, tls })
    }
}

/// Feeds any bytes to the decoder.
#[cfg(feature = "fuzz")]
pub(crate) fn fuzz_preamble(bytes: &[u8]) {
    let Some(bytes) = bytes.first_chunk() else { return };
    if let Ok(preamble) = Preamble::decode(bytes) {
        assert_eq!(preamble.encode(), *bytes, "what is understood has one form");
    }
}

/// Reads a peer's preamble.
pub(super) async fn read(stream: &mut TcpStream, patience: Duration) -> Result<Preamble, SessionError> {
    let mut bytes = [0; PREAMBLE_BYTES];
    let read = tokio::time::timeout(patience, stream.read_exact(&mut bytes)).await;
    match read {
        Err(_) => Err(SessionError::Silent { waiting_for: "its greeting", patience }),
        Ok(Err(_)) => Err(SessionError::Closed { waiting_for: "its greeting" }),
        Ok(Ok(_)) => Preamble::decode(&bytes),
    }
}

/// Sends our preamble.
pub(super) async fn write(stream: &mut TcpStream, preamble: Preamble) -> Result<(), SessionError> {
    stream.write_all(&preamble.encode()).await.map_err(|source| SessionError::Connection { source })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn example(purpose: Purpose) -> Preamble {
        Preamble { session: [7; 16], purpose, tls: false }
    }

    #[test]
    fn golden_bytes() {
        let mut golden = [7u8; 32];
        golden[..8].copy_from_slice(b"PCOPYMIG");
        golden[8..16].copy_from_slice(&[15, 0, 1, 0, 5, 0, 0, 0]);
        assert_eq!(example(Purpose::Lane(5)).encode(), golden);
        assert_eq!(Preamble::decode(&golden).unwrap(), example(Purpose::Lane(5)));
        golden[11] = 0x80;
        assert_eq!(Preamble { tls: true, ..example(Purpose::Lane(5)) }.encode(), golden);
        assert!(Preamble::decode(&golden).unwrap().tls);
        golden[10..16].copy_from_slice(&[2, 0, 0, 0, 0, 0]);
        assert_eq!(example(Purpose::Rejoin).encode(), golden);
        assert_eq!(Preamble::decode(&golden).unwrap(), example(Purpose::Rejoin));
        golden[11] = 0x80;
        assert_eq!(Preamble { tls: true, ..example(Purpose::Rejoin) }.encode(), golden);
        assert!(Preamble::decode(&golden).unwrap().tls);
    }

    #[test]
    fn what_is_not_our_preamble_is_refused_with_what_it_is() {
        let good = example(Purpose::Control).encode();
        assert_eq!(Preamble::decode(&good).unwrap(), example(Purpose::Control));
        let mut http = good;
        http[..8].copy_from_slice(b"GET / HT");
        assert!(matches!(Preamble::decode(&http), Err(SessionError::NotOurs)));
        let mut newer = good;
        newer[8] = 16;
        let said = Preamble::decode(&newer).unwrap_err().to_string();
        assert!(said.contains("16") && said.contains("15"), "{said}");
        for (at, kind) in [(10, [3, 0]), (10, [3, 0x80]), (12, [1, 0])] {
            let mut bad = good;
            bad[at..at + 2].copy_from_slice(&kind);
            assert!(matches!(Preamble::decode(&bad), Err(SessionError::Protocol(_))));
        }
    }
}
