//! The control messages and their frames.
//!
//! ```text
//! 0        4        8                       8 + length
//! | length | CRC-32 |  postcard-encoded message …  |     little-endian; length at most 1 MiB
//! ```
//!
//! A frame's length is checked before anything is allocated, its checksum before anything is
//! decoded. What may be long travels in pieces that fit a frame.

use bytes::{Buf, BufMut, Bytes, BytesMut};
use serde::{Deserialize, Serialize};

use super::SessionError;
use super::report::ArrivalReport;
use crate::memory::MemoryLayout;
use crate::planner::Bandwidth;
use crate::stats::PagerReport;

/// Longest body of a frame.
pub(super) const MAX_FRAME: usize = 1 << 20;
/// Bytes of device state in one message: a few, so that one side sums up a piece while the other takes the one before.
pub(super) const STATE_PIECE: usize = 64 << 10;
/// Longest device state. A vCPU has some 10 KiB of it; a display may have its memory in it, more than once if it is drawn
/// to meanwhile.
pub(super) const MAX_STATE: usize = 256 << 20;
/// Length and checksum before the body.
const HEADER: usize = 8;

const _: () = assert!(STATE_PIECE + 64 <= MAX_FRAME && MAX_FRAME <= u32::MAX as usize);

/// What a VMM says of its guest, so that another can prepare for it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestDescription {
    /// The kind and version of the VMM whose state this is, such as `postcopy-vmm/1`.
    pub vmm: String,
    /// The guest's memory.
    pub layout: MemoryLayout,
    /// The VMM's own configuration, opaque to the engine. At most 64 KiB.
    pub config: Vec<u8>,
    /// Its memory is in huge pages at the source.
    pub huge_pages: bool,
}

/// When memory moves.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Mode {
    /// All of it after the guest was resumed at the destination.
    #[default]
    Postcopy,
    /// Once while the guest still runs at the source; after it was resumed at the destination, what it
    /// has written meanwhile.
    Hybrid,
}

/// In which order pages lie, for policies that look around a fault, and for the sweep.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PageOrder {
    /// By address.
    #[default]
    Address,
    /// As the source notes that the guest uses them, what it used last first: the paper's LRU order.
    Recency,
}

/// Everything that is said on a control connection. S: by the source, D: by the destination.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) enum Message {
    /// S: this guest would come, over one of these transports, best first.
    Offer {
        guest: GuestDescription,
        transports: Vec<String>,
        mode: Mode,
        /// What may cross a second at most, where nobody waits for it.
        max_bandwidth: Option<Bandwidth>,
    },
    /// D: it may come, over this one; here are the lane requests. Its pages will lie in this order.
    Accept { transport: String, lanes: Vec<Vec<u8>>, order: PageOrder },
    /// S: the lanes are granted, and this is the memory to read.
    Granted { lanes: Vec<Vec<u8>>, regions: [[u8; 24]; 2] },
    /// D: lanes are connected and tested, the pager waits.
    LanesReady,
    /// S: a piece of device state. The guest may run yet: see Recent.
    State(Bytes),
    /// S: that was all of it.
    StateEnd { length: u64 },
    /// D: the state is loaded; the guest could run.
    StateLoaded { load_us: u64 },
    /// S: the guest is yours. From here on the source never runs it by itself.
    Commit,
    /// D: it runs.
    Resumed,
    /// D: how far its memory has come, in the round of pre-copy or after Resumed.
    Progress(PagerReport),
    /// D: all of it is here, and the lanes are closed; or the guest has ended, and needs no more.
    Resident(ArrivalReport),
    /// S: the guest's memory here is let go. The session is over.
    Release,
    /// Either, before Commit: no, because. After Commit, D: its memory does not come any more.
    Refuse(String),
    /// S, before StateEnd: the guest stands still, and its memory may be read. It touched these pages last, the
    /// likeliest first: first page and count of each run.
    Recent(Vec<(u64, u32)>),
    /// S, first on a connection of that kind: this side still has the memory of the session's guest, and would
    /// offer it again over one of these transports, best first, with the limit of an offer.
    Rejoin { transports: Vec<String>, max_bandwidth: Option<Bandwidth> },
    /// S, before State, where it was asked for: pages that the guest has used, the last used first, by runs. There is more,
    /// or that was all.
    Order { runs: Vec<(u64, u32)>, more: bool },
}

impl Message {
    /// The message's name, for errors.
    pub(super) fn name(&self) -> &'static str {
        match self {
            Self::Offer { .. } => "Offer",
            Self::Accept { .. } => "Accept",
            Self::Granted { .. } => "Granted",
            Self::LanesReady => "LanesReady",
            Self::State(_) => "State",
            Self::StateEnd { .. } => "StateEnd",
            Self::StateLoaded { .. } => "StateLoaded",
            Self::Commit => "Commit",
            Self::Resumed => "Resumed",
            Self::Progress(_) => "Progress",
            Self::Resident(_) => "Resident",
            Self::Release => "Release",
            Self::Refuse(_) => "Refuse",
            Self::Recent(_) => "Recent",
            Self::Rejoin { .. } => "Rejoin",
            Self::Order { .. } => "Order",
        }
    }
}

/// Appends a message's frame.
pub(super) fn encode(message: &Message, buffer: &mut BytesMut) -> Result<(), SessionError> {
    let body =
        postcard::to_stdvec(message).map_err(|_| SessionError::Protocol("a message cannot be encoded"))?;
    if body.len() > MAX_FRAME {
        return Err(SessionError::Protocol("a message is longer than a frame"));
    }
    buffer.reserve(HEADER + body.len());
    buffer.put_u32_le(body.len() as u32);
    buffer.put_u32_le(crc32fast::hash(&body));
    buffer.put_slice(&body);
    Ok(())
}

/// Takes the first message out of `buffer`, if it is there whole.
pub(super) fn decode(buffer: &mut BytesMut) -> Result<Option<Message>, SessionError> {
    let Some(mut header) = buffer.get(..HEADER) else { return Ok(None) };
    let (length, crc) = (header.get_u32_le() as usize, header.get_u32_le());
    if length > MAX_FRAME {
        return Err(SessionError::Protocol("a frame is longer than 1 MiB"));
    }
    if buffer.len() < HEADER + length {
        buffer.reserve(HEADER + length - buffer.len());
        return Ok(None);
    }
    let frame = buffer.split_to(HEADER + length);
    let body = &frame[HEADER..];
    if crc32fast::hash(body) != crc {
        return Err(SessionError::Protocol("a frame's checksum is wrong"));
    }
    match postcard::take_from_bytes(body) {
        Ok((message, [])) => Ok(Some(message)),
        _ => Err(SessionError::Protocol("a frame holds no message")),
    }
}

/// Feeds any bytes to the decoder, as they are and as the body of a frame whose length and checksum
/// are right.
#[cfg(feature = "fuzz")]
pub(crate) fn fuzz_frame(bytes: &[u8]) {
    drop(decode(&mut BytesMut::from(bytes)));
    let mut framed = BytesMut::new();
    framed.put_u32_le(bytes.len() as u32);
    framed.put_u32_le(crc32fast::hash(bytes));
    framed.put_slice(bytes);
    if let Ok(Some(message)) = decode(&mut framed) {
        // By its bytes: a figure in it may be no number, which does not equal itself.
        let (mut once, mut again) = (BytesMut::new(), BytesMut::new());
        assert!(encode(&message, &mut once).is_ok());
        let sent = once.clone();
        let back = decode(&mut once).ok().flatten();
        assert!(back.is_some_and(|back| encode(&back, &mut again).is_ok()));
        assert_eq!(sent, again, "a message survives the way");
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::memory::{Gpa, MemoryRegion};

    fn framed(message: &Message) -> BytesMut {
        let mut buffer = BytesMut::new();
        encode(message, &mut buffer).unwrap();
        buffer
    }

    fn offer() -> Message {
        let layout = MemoryLayout::pc(4096, 4096).unwrap();
        let guest = GuestDescription { vmm: "v".into(), layout, config: vec![9], huge_pages: true };
        let (transports, max_bandwidth) = (vec!["tcp".into()], Bandwidth::new(128));
        Message::Offer { guest, transports, mode: Mode::Hybrid, max_bandwidth }
    }

    #[test]
    fn golden_bytes() {
        let body = [0, 1, b'v', 1, 0, 0x80, 0x20, 0, 1, 9, 1, 1, 3, b't', b'c', b'p', 1, 1, 0x80, 1];
        let mut golden = vec![20, 0, 0, 0];
        golden.extend(crc32fast::hash(&body).to_le_bytes());
        golden.extend(body);
        assert_eq!(framed(&offer()), golden);
        let commit = framed(&Message::Commit);
        assert_eq!(commit[8..], [7], "the order of messages is part of the protocol");
        assert_eq!(framed(&Message::Refuse(String::new()))[8..], [12, 0]);
        let order = PageOrder::Recency;
        assert_eq!(
            framed(&Message::Accept { transport: "".into(), lanes: vec![], order })[8..],
            [1, 0, 0, 1]
        );
        let rejoin = Message::Rejoin { transports: vec![], max_bandwidth: None };
        assert_eq!(framed(&rejoin)[8..], [14, 0, 0]);
        assert_eq!(framed(&Message::Order { runs: vec![(9, 2)], more: true })[8..], [15, 1, 9, 2, 1]);
    }

    #[test]
    fn a_message_survives_the_way_in_pieces() {
        let whole = framed(&offer());
        let mut buffer = BytesMut::new();
        for (at, byte) in whole.iter().enumerate() {
            buffer.put_u8(*byte);
            let message = decode(&mut buffer).unwrap();
            assert_eq!(message.is_some(), at + 1 == whole.len());
        }
    }

    #[test]
    fn bad_frames_are_refused_before_anything_is_allocated() {
        let frame = |length: u32, crc: u32, body: &[u8]| {
            let mut bytes = BytesMut::new();
            bytes.put_u32_le(length);
            bytes.put_u32_le(crc);
            bytes.put_slice(body);
            bytes
        };
        let known = |body: &[u8]| frame(body.len() as u32, crc32fast::hash(body), body);
        for mut bad in [
            frame(u32::MAX, 0, &[]),
            frame(MAX_FRAME as u32 + 1, 0, &[]),
            frame(1, 0, &[7]),
            known(&[]),
            known(&[99]),
            known(&[7, 0]),
            // A limit that would let nothing cross.
            known(&[14, 0, 1, 0]),
            // An offer whose string says that it is 4 GiB long.
            known(&[0, 0xff, 0xff, 0xff, 0xff, 0x0f]),
        ] {
            assert!(decode(&mut bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn an_offer_with_an_impossible_layout_is_refused() {
        // A layout cannot be made with a gap, so the bytes of a good one are bent.
        let regions = vec![MemoryRegion { gpa: Gpa(0), len: 4096, offset: 4096 }];
        let mut body = vec![0, 1, b'v'];
        body.extend(postcard::to_stdvec(&regions).unwrap());
        body.extend([0, 0, 0, 0]);
        let mut buffer = BytesMut::new();
        buffer.put_u32_le(body.len() as u32);
        buffer.put_u32_le(crc32fast::hash(&body));
        buffer.put_slice(&body);
        assert!(decode(&mut buffer).is_err());
    }

    #[test]
    fn state_travels_as_its_bytes() {
        let framed = framed(&Message::State(Bytes::from_static(b"state")));
        assert_eq!(framed[HEADER..], [4, 5, b's', b't', b'a', b't', b'e']);
    }

    proptest! {
        #[test]
        fn no_bytes_make_the_decoder_panic(body in proptest::collection::vec(any::<u8>(), 0..200)) {
            let mut buffer = BytesMut::new();
            buffer.put_u32_le(body.len() as u32);
            buffer.put_u32_le(crc32fast::hash(&body));
            buffer.put_slice(&body);
            let _ = decode(&mut buffer);
            let _ = decode(&mut BytesMut::from(&body[..]));
        }
    }
}
