//! The control protocol: JSON lines over a Unix socket. Documented in `docs/control.md`.
//!
//! A client sends one request, as one line, and reads lines until one says `done` or `error`.

use postcopy_engine::planner::Bandwidth;
use postcopy_engine::session::{MigrationReport, Mode, Progress};
use postcopy_engine::stats::PagerReport;
use postcopy_tools::device::DeviceArgs;
use postcopy_tools::trust::TrustArgs;
use serde::{Deserialize, Serialize};

use crate::args::Resolution;

/// Longest request line.
pub(crate) const MAX_REQUEST: u64 = 64 << 10;

/// What a client asks.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "command", rename_all = "kebab-case")]
pub(crate) enum Request {
    /// Where the guest is.
    Status,
    /// Move the guest.
    Migrate {
        /// HOST:PORT of the destination.
        to: String,
        /// Transports, best first; empty for all between hosts.
        #[serde(default)]
        transports: Vec<String>,
        /// How lanes are made, as the flags of these names say it.
        #[serde(default)]
        lanes: DeviceArgs,
        /// When memory moves.
        #[serde(default)]
        mode: Mode,
        /// For how many seconds to try to reach a destination again that is lost after the handover.
        #[serde(default = "patience")]
        patience: u64,
        /// How many bytes may cross a second where nobody waits for them.
        #[serde(default)]
        max_bandwidth: Option<Bandwidth>,
        /// Whom to give it to, as the flags of these names say it.
        #[serde(default, flatten)]
        trust: TrustArgs,
    },
    /// Reach a destination again that was lost after the handover.
    Recover {
        /// HOST:PORT, if that is another now.
        #[serde(default)]
        to: Option<String>,
        /// As for a migration; if nothing is said here nor in `lanes`, as before.
        #[serde(default)]
        transports: Vec<String>,
        #[serde(default)]
        lanes: DeviceArgs,
        /// As for a migration; if nothing is said, as before.
        #[serde(default)]
        max_bandwidth: Option<Bandwidth>,
        /// For how many seconds to try.
        #[serde(default = "patience")]
        patience: u64,
    },
    /// Call off a migration while the guest still runs here.
    Cancel,
    /// Change how much of the memory of a guest that arrives here may cross.
    Limit {
        /// Bytes a second where nobody waits for them; none: as many as the link carries.
        #[serde(default)]
        max_bandwidth: Option<Bandwidth>,
    },
    /// Type at the guest's console.
    Type {
        /// The text, as it is.
        text: String,
    },
    /// End the doubt about who has the guest.
    Resolve {
        /// Where it is to be.
        guest: Resolution,
    },
    /// End.
    Quit,
}

/// For how many seconds a lost destination is tried, where nothing is said.
pub(crate) const PATIENCE: u64 = 60;

fn patience() -> u64 {
    PATIENCE
}

/// What the process answers, a line each.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Answer {
    /// A migration goes on.
    Progress(Box<Progress>),
    /// A migration is complete. The last line.
    Report(Box<MigrationReport>),
    /// Where the guest is. The last line.
    Status(Box<Status>),
    /// It was done. The last line.
    Done,
    /// It was not done, because. The last line.
    Error(String),
}

/// Where a guest is, as `pcvm status` says it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Status {
    /// The state's name: waiting, running, migrating, in-doubt, stranded, kept or gone.
    pub(crate) state: String,
    /// What that means for the guest, in words.
    pub(crate) detail: String,
    /// A migration from here that is under way.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub(crate) migration: Option<Progress>,
    /// What the pager has done, where the guest arrived here.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub(crate) arrival: Option<PagerReport>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_documented_lines_are_understood() {
        let line = r#"{"command":"migrate","to":"192.0.2.7:7070","transports":["tcp"]}"#;
        let Request::Migrate { to, transports, lanes, mode, patience, max_bandwidth, trust } =
            serde_json::from_str(line).unwrap()
        else {
            panic!("{line}");
        };
        assert_eq!((to.as_str(), transports.len(), lanes), ("192.0.2.7:7070", 1, DeviceArgs::default()));
        assert_eq!((mode, patience, trust), (Mode::Postcopy, 60, TrustArgs::default()));
        assert_eq!(max_bandwidth, None);
        let line = r#"{"command":"migrate","to":"192.0.2.7:7070","tls":"/etc/pki/qemu","tls_hostname":"b"}"#;
        let Request::Migrate { trust, .. } = serde_json::from_str(line).unwrap() else { panic!("{line}") };
        assert_eq!(trust, TrustArgs { tls: Some("/etc/pki/qemu".into()), tls_hostname: Some("b".into()) });
        assert_eq!(serde_json::from_str::<Request>(r#"{"command":"status"}"#).unwrap(), Request::Status);
        assert_eq!(serde_json::to_string(&Answer::Done).unwrap(), r#""done""#);
        assert_eq!(serde_json::to_string(&Answer::Error("no".into())).unwrap(), r#"{"error":"no"}"#);
        assert!(serde_json::from_str::<Request>(r#"{"command":"explode"}"#).is_err());
    }
}
