//! The saved machine as bytes: a fixed header, then the payload in postcard's encoding.
//!
//! ```text
//!  0        8         12        16        20         24
//!  ├────────┼─────────┼─────────┼─────────┼──────────┼───────────────
//!  │PCVMSTAT│ version │ length  │ crc32   │ reserved │ payload …
//!  └────────┴─────────┴─────────┴─────────┴──────────┴───────────────
//! ```
//!
//! Integers are little-endian; `length` and `crc32` are the payload's; `reserved` is zero. Bytes
//! that come from a peer are checked in this order: bound, magic, version, length, checksum,
//! contents. No length that they state is allocated before it was compared with what is there.

use postcopy_engine::memory::MemoryLayout;
use serde::{Deserialize, Serialize};

use crate::config::VmConfig;
use crate::cpu::state::VcpuState;
use crate::devices::DeviceState;
use crate::error::{StateError, VmError};
use crate::platform::PlatformState;

/// Longest state that is read or written.
pub const MAX_STATE_BYTES: usize = 16 << 20;

/// The version written here, and the only one that is read.
pub const STATE_VERSION: u32 = 1;

const MAGIC: &[u8; 8] = b"PCVMSTAT";
const HEADER_BYTES: usize = 24;

/// Everything of a guest but its memory.
#[derive(Serialize, Deserialize)]
pub(crate) struct VmState {
    pub(crate) config: VmConfig,
    pub(crate) layout: MemoryLayout,
    pub(crate) platform: PlatformState,
    pub(crate) devices: DeviceState,
    pub(crate) vcpus: Vec<VcpuState>,
}

impl VmState {
    pub(crate) fn encode(&self) -> Result<Vec<u8>, VmError> {
        let payload = postcard::to_allocvec(self).map_err(|error| StateError::Contents(error.to_string()))?;
        let total = HEADER_BYTES + payload.len();
        if total > MAX_STATE_BYTES {
            return Err(StateError::TooLong(total).into());
        }
        let mut bytes = Vec::with_capacity(total);
        bytes.extend(MAGIC);
        bytes.extend(STATE_VERSION.to_le_bytes());
        bytes.extend((payload.len() as u32).to_le_bytes());
        bytes.extend(crc32fast::hash(&payload).to_le_bytes());
        bytes.extend([0; 4]);
        bytes.extend(payload);
        Ok(bytes)
    }

    pub(crate) fn decode(bytes: &[u8]) -> Result<Self, StateError> {
        let payload = checked_payload(bytes)?;
        let contents = |error: postcard::Error| StateError::Contents(error.to_string());
        let (state, rest) = postcard::take_from_bytes::<Self>(payload).map_err(contents)?;
        if !rest.is_empty() {
            return Err(StateError::Contents(format!("{} bytes left over", rest.len())));
        }
        if state.vcpus.len() != usize::from(state.config.cpus) {
            return Err(StateError::Contents("another number of vCPUs than it says".into()));
        }
        Ok(state)
    }

    /// Refuses a state of a machine of another shape than is configured here.
    pub(crate) fn check_shape(&self, config: &VmConfig, layout: &MemoryLayout) -> Result<(), StateError> {
        let describe =
            |config: &VmConfig| format!("{} vCPUs and {} bytes of memory", config.cpus, config.memory_bytes);
        if self.config != *config {
            return Err(StateError::Machine { found: describe(&self.config), configured: describe(config) });
        }
        if self.layout != *layout {
            let (found, configured) = (format!("{:?}", self.layout), format!("{layout:?}"));
            return Err(StateError::Machine { found, configured });
        }
        Ok(())
    }
}

/// Feeds any bytes to the decoder, as they are and as the payload of a state whose header is right.
#[cfg(feature = "fuzz")]
pub(crate) fn fuzz(bytes: &[u8]) {
    drop(VmState::decode(bytes));
    let mut whole = MAGIC.to_vec();
    whole.extend(STATE_VERSION.to_le_bytes());
    whole.extend((bytes.len() as u32).to_le_bytes());
    whole.extend(crc32fast::hash(bytes).to_le_bytes());
    whole.extend([0; 4]);
    whole.extend(bytes);
    drop(VmState::decode(&whole));
}

fn word(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..at + 4).and_then(|word| word.try_into().ok()).map_or(0, u32::from_le_bytes)
}

fn checked_payload(bytes: &[u8]) -> Result<&[u8], StateError> {
    if bytes.len() > MAX_STATE_BYTES {
        return Err(StateError::TooLong(bytes.len()));
    }
    if !bytes.starts_with(MAGIC) {
        return Err(StateError::Magic);
    }
    let Some((header, payload)) = bytes.split_at_checked(HEADER_BYTES) else {
        return Err(StateError::Length { expected: HEADER_BYTES, found: bytes.len() });
    };
    let version = word(header, 8);
    if version != STATE_VERSION {
        return Err(StateError::Version { found: version, known: STATE_VERSION });
    }
    let expected = HEADER_BYTES.saturating_add(word(header, 12) as usize);
    if expected != bytes.len() {
        return Err(StateError::Length { expected, found: bytes.len() });
    }
    if word(header, 16) != crc32fast::hash(payload) {
        return Err(StateError::Checksum);
    }
    if word(header, 20) != 0 {
        return Err(StateError::Contents("reserved bytes are not zero".into()));
    }
    Ok(payload)
}
