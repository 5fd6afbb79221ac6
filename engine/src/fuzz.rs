//! Entry points for fuzzing: each feeds any bytes to a decoder of what a peer says. They return
//! nothing; what they must not do is panic, hang, or allocate by a length that nobody checked.

use crate::pagemap::{PAGES_A_BYTE, Said, decode_known, pages_said};

/// The source's page map: 16 bytes of header, then bits.
pub fn page_map(bytes: &[u8]) {
    let Some((header, bits)) = bytes.split_first_chunk::<16>() else { return };
    let pages = bits.len() as u64 * PAGES_A_BYTE;
    if let Some(known) = decode_known(header, pages) {
        for said in [Said::Content, Said::Zero, Said::Clean] {
            assert!(pages_said(bits, 0, known.pages, said).all(|page| page.0 < known.pages));
        }
    }
}

/// A control connection's frames.
pub fn control_frame(bytes: &[u8]) {
    crate::session::fuzz_frame(bytes);
}

/// A connection's first bytes.
pub fn preamble(bytes: &[u8]) {
    crate::session::fuzz_preamble(bytes);
}
