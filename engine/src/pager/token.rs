//! The tokens of a shard's reads: which pages, or the page map.

use postcopy_transport::Token;

use crate::memory::PageIndex;
use crate::planner::Run;

/// Tokens with this bit are the map reader's; the others name runs of pages.
pub(super) const MAP_TOKEN: Token = Token(1 << 63);
/// A run's token is its first page and, in the upper bits below the map's, its count.
const COUNT_SHIFT: u32 = 48;

pub(super) fn is_map(token: Token) -> bool {
    token.0 & MAP_TOKEN.0 != 0
}

pub(super) fn token_of(run: Run) -> Token {
    Token(u64::from(run.count) << COUNT_SHIFT | run.first.0)
}

pub(super) fn run_of(token: Token) -> Run {
    let first = PageIndex(token.0 & ((1 << COUNT_SHIFT) - 1));
    Run { first, count: (token.0 >> COUNT_SHIFT) as u32 }
}
