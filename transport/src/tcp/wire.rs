//! The frames of a TCP lane. Little-endian, fixed size.
//!
//! ```text
//! request    0        4        8               16              24              32
//!            | opcode | length |      tag      |      key      |    address    |
//! response   0               8        12       16
//!            |      tag      | status | length |  length bytes of payload …
//! ```
//!
//! Responses come in the order of their requests, so a reader knows where each payload belongs
//! before it arrives and receives it straight into its landing place. A refused read is answered
//! with its full length too (of zeros), for the same reason.

use zerocopy::byteorder::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// The one opcode there is.
pub(crate) const OP_READ: u32 = 1;
/// The payload is what was asked for.
pub(crate) const STATUS_OK: u32 = 0;
/// Unknown key or out of bounds; the payload is zeros.
pub(crate) const STATUS_REFUSED: u32 = 1;

/// Asks for `len` bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(crate) struct Request {
    pub(crate) opcode: U32,
    pub(crate) len: U32,
    pub(crate) tag: U64,
    pub(crate) key: U64,
    pub(crate) addr: U64,
}

/// Precedes the payload.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned,
)]
#[repr(C)]
pub(crate) struct Response {
    pub(crate) tag: U64,
    pub(crate) status: U32,
    pub(crate) len: U32,
}

pub(crate) const REQUEST_BYTES: usize = size_of::<Request>();
pub(crate) const RESPONSE_BYTES: usize = size_of::<Response>();
const _: () = assert!(REQUEST_BYTES == 32 && RESPONSE_BYTES == 16);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn golden_bytes() {
        let request = Request {
            opcode: OP_READ.into(),
            len: 4096.into(),
            tag: 7.into(),
            key: 9.into(),
            addr: 0x1122.into(),
        };
        let mut golden = [0u8; 32];
        golden[0] = 1;
        golden[5] = 0x10;
        golden[8] = 7;
        golden[16] = 9;
        (golden[24], golden[25]) = (0x22, 0x11);
        assert_eq!(request.as_bytes(), golden);

        let response = Response { tag: 7.into(), status: STATUS_REFUSED.into(), len: 4096.into() };
        let mut golden = [0u8; 16];
        golden[0] = 7;
        golden[8] = 1;
        golden[13] = 0x10;
        assert_eq!(response.as_bytes(), golden);
    }
}
