//! What a QEMU is set to for a move of ours, and back: a later migration of its own must carry the RAM, and whoever manages
//! it has settings of its own.

use serde_json::{Value, json};

use super::QemuError;
use super::qmp::Qmp;

/// Which side of a move it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Side {
    Source,
    Destination,
}

impl Side {
    /// Capabilities of QEMU's migration that such a side needs.
    fn needs(self) -> &'static [&'static str] {
        match self {
            Self::Source => &["x-ignore-shared", "events"],
            Self::Destination => &["x-ignore-shared", "events", "late-block-activate"],
        }
    }
}

/// Bytes a second that QEMU may write its state with.
const NO_LIMIT: u64 = 10 << 30;
/// Whether it leaves out a description of its state, for tools that look into one. It takes time while the guest stands
/// still, and QEMU's own post-copy leaves it out too. Both sides have to be of one mind.
const SUPPRESSED: &str = "suppress-vmdesc";

/// What a QEMU is set to without a move of ours.
pub(super) struct Settings {
    /// What is needed and off.
    capabilities: Vec<&'static str>,
    bandwidth: Value,
    suppressed: Value,
}

impl Settings {
    /// What it is set to.
    ///
    /// Errors: QEMU has ended.
    pub(super) fn now(qmp: &mut Qmp, side: Side) -> Result<Self, QemuError> {
        let now = qmp.execute("query-migrate-capabilities", &json!({}))?;
        let is_on = |name: &str| {
            let mut all = now.as_array().into_iter().flatten();
            all.any(|one| one["capability"] == name && one["state"] == true)
        };
        let capabilities = side.needs().iter().copied().filter(|name| !is_on(name)).collect();
        let bandwidth = qmp.execute("query-migrate-parameters", &json!({}))?["max-bandwidth"].take();
        let suppressed = qmp.execute("qom-get", &json!({"path": "/machine", "property": SUPPRESSED}))?;
        Ok(Self { capabilities, bandwidth, suppressed })
    }

    /// Sets it up.
    ///
    /// Errors: QEMU refuses, or has ended.
    pub(super) fn for_a_move(&self, qmp: &mut Qmp) -> Result<(), QemuError> {
        self.set(qmp, true, &json!(NO_LIMIT), &json!(true))
    }

    /// Sets it back.
    ///
    /// Errors: as [`Settings::for_a_move`].
    pub(super) fn restore(&self, qmp: &mut Qmp) -> Result<(), QemuError> {
        self.set(qmp, false, &self.bandwidth, &self.suppressed)
    }

    fn set(&self, qmp: &mut Qmp, on: bool, bandwidth: &Value, suppressed: &Value) -> Result<(), QemuError> {
        let each = self.capabilities.iter().map(|name| json!({"capability": name, "state": on}));
        let all: Vec<Value> = each.collect();
        qmp.execute("migrate-set-capabilities", &json!({"capabilities": all}))?;
        qmp.execute("migrate-set-parameters", &json!({"max-bandwidth": bandwidth}))?;
        let suppress = json!({"path": "/machine", "property": SUPPRESSED, "value": suppressed});
        qmp.execute("qom-set", &suppress).map(drop)
    }
}
