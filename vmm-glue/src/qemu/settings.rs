//! What a QEMU is set to for a move of ours, and back: a later migration of its own must carry the RAM, and whoever manages
//! it has settings of its own.

use serde::{Deserialize, Serialize};
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
    /// Capabilities of QEMU's migration that such a side needs. All others are off for a move: of those that whoever manages it
    /// may have left on, some do not go with these, and with others its migration would wait, the guest stopped, for
    /// somebody to tell it to go on.
    fn needs(self) -> &'static [&'static str] {
        match self {
            Self::Source => &["x-ignore-shared", "events"],
            Self::Destination => &["x-ignore-shared", "events", "late-block-activate"],
        }
    }
}

/// Bytes a second that QEMU may write its state with.
const NO_LIMIT: u64 = 10 << 30;
/// None: its state goes to us, who speak no TLS with it.
const NO_TLS: &str = "";
/// Whether it leaves out a description of its state, for tools that look into one. It takes time while the guest stands
/// still, and QEMU's own post-copy leaves it out too. Both sides have to be of one mind.
const SUPPRESSED: &str = "suppress-vmdesc";

/// What a QEMU is set to without a move of ours.
#[derive(Clone, Serialize, Deserialize)]
pub(super) struct Settings {
    /// Those that are needed and off, and those that are on and not needed.
    capabilities: Vec<(String, bool)>,
    bandwidth: Value,
    tls: Value,
    suppressed: Value,
}

impl Settings {
    /// What it is set to.
    ///
    /// Errors: QEMU has ended.
    pub(super) fn now(qmp: &mut Qmp, side: Side) -> Result<Self, QemuError> {
        let now = qmp.execute("query-migrate-capabilities", &json!({}))?;
        let each = now.as_array().into_iter().flatten().filter_map(|one| {
            let (name, on) = (one["capability"].as_str()?, one["state"] == true);
            (on != side.needs().contains(&name)).then(|| (name.to_owned(), on))
        });
        let capabilities = each.collect();
        let mut now = qmp.execute("query-migrate-parameters", &json!({}))?;
        let [bandwidth, tls] = ["max-bandwidth", "tls-creds"].map(|name| now[name].take());
        let suppressed = qmp.execute("qom-get", &json!({"path": "/machine", "property": SUPPRESSED}))?;
        Ok(Self { capabilities, bandwidth, tls, suppressed })
    }

    /// Sets it up.
    ///
    /// Errors: QEMU refuses, or has ended.
    pub(super) fn for_a_move(&self, qmp: &mut Qmp) -> Result<(), QemuError> {
        self.set(qmp, true, [&json!(NO_LIMIT), &json!(NO_TLS)], &json!(true))
    }

    /// Sets it back.
    ///
    /// Errors: as [`Settings::for_a_move`].
    pub(super) fn restore(&self, qmp: &mut Qmp) -> Result<(), QemuError> {
        self.set(qmp, false, [&self.bandwidth, &self.tls], &self.suppressed)
    }

    /// Sets capabilities to what they are not, for a move, or to what they were; and the rest to these.
    fn set(
        &self,
        qmp: &mut Qmp,
        moves: bool,
        [bandwidth, tls]: [&Value; 2],
        suppressed: &Value,
    ) -> Result<(), QemuError> {
        let each =
            self.capabilities.iter().map(|(name, on)| json!({"capability": name, "state": *on != moves}));
        let all: Vec<Value> = each.collect();
        qmp.execute("migrate-set-capabilities", &json!({"capabilities": all}))?;
        let parameters = json!({"max-bandwidth": bandwidth, "tls-creds": tls});
        qmp.execute("migrate-set-parameters", &parameters)?;
        let suppress = json!({"path": "/machine", "property": SUPPRESSED, "value": suppressed});
        qmp.execute("qom-set", &suppress).map(drop)
    }
}
