//! What a QEMU is: enough to say before anything stops whether its guest can be moved, and whether
//! another QEMU can take it.

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::qmp::Qmp;
use super::{QemuError, backend, foreign};
use crate::qemu::backend::Backend;
use crate::touches;

/// Which QEMU it is and what machine it has.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Facts {
    /// Major, minor, micro.
    pub version: [u32; 3],
    /// The machine type with its version, such as `pc-q35-7.2`.
    pub machine: String,
    /// Number of vCPUs.
    pub cpus: u32,
    /// What its RAM is made of, each a shared file, ordered by name.
    pub ram: Vec<Backend>,
    /// Where in QEMU's tree its balloon is, by which it gives memory back, if it has one.
    pub balloon: Option<String>,
}

/// The threads of a QEMU's vCPUs in their order, as gettid(2) gives them.
pub(super) fn vcpu_threads(qmp: &mut Qmp) -> Result<Vec<i32>, QemuError> {
    let all = qmp.execute("query-cpus-fast", &json!({}))?;
    let mut all: Vec<&Value> = all.as_array().into_iter().flatten().collect();
    all.sort_by_key(|cpu| cpu["cpu-index"].as_u64());
    Ok(all.into_iter().filter_map(|cpu| cpu["thread-id"].as_i64()).map(|thread| thread as i32).collect())
}

/// How many pages the vCPUs of a QEMU have touched since it began (see `touches.rs`). `None` if it does not tell, as when
/// they are emulated.
pub(super) fn touched_pages(qmp: &mut Qmp) -> Option<u64> {
    let wanted = json!({"target": "vcpu", "providers": [{"provider": "kvm", "names": [touches::NAME]}]});
    let told = qmp.execute("query-stats", &wanted).ok()?;
    let vcpus = told.as_array().filter(|vcpus| !vcpus.is_empty())?;
    touches::sum(vcpus.iter().map(|vcpu| vcpu["stats"][0]["value"].as_u64()))
}

impl Facts {
    /// Asks a QEMU, and refuses a guest that cannot be moved.
    ///
    /// Errors: RAM that is not of shared files, devices or protection that bind it to this host.
    pub(super) fn gather(qmp: &mut Qmp) -> Result<Self, QemuError> {
        let version = version(&qmp.execute("query-version", &json!({}))?)?;
        let machine = text(qmp, "/machine", "type")?.trim_end_matches("-machine").to_owned();
        let cpus = qmp.execute("query-cpus-fast", &json!({}))?.as_array().map_or(0, Vec::len) as u32;
        let ram = backend::all(qmp, version)?;
        let parts = foreign::Parts::of(qmp)?;
        foreign::look(qmp, &parts)?;
        refuse_what_is_blocked(qmp)?;
        let balloon = parts.balloon();
        Ok(Self { version, machine, cpus, ram, balloon })
    }

    /// Bytes of RAM.
    pub fn ram_bytes(&self) -> u64 {
        self.ram.iter().fold(0, |sum, backend| sum.saturating_add(backend.bytes))
    }

    /// Whether a guest of `self` can go on in `there`.
    ///
    /// Errors: how they differ, and the remedy.
    pub(super) fn fits(&self, there: &Self) -> Result<(), QemuError> {
        let unlike = |text: String| Err(QemuError::Unlike(text));
        if self.machine != there.machine {
            return unlike(format!(
                "its machine is {}, the one here {}; start the QEMU here with -machine {}",
                self.machine, there.machine, self.machine
            ));
        }
        if (there.version[0], there.version[1]) < (self.version[0], self.version[1]) {
            return unlike(format!(
                "it comes from QEMU {}, and the one here is older ({}); QEMU moves guests to the same or a \
                 newer version",
                dotted(self.version),
                dotted(there.version)
            ));
        }
        if self.cpus != there.cpus {
            return unlike(format!(
                "it has {} vCPUs, the machine here {}; use -smp {}",
                self.cpus, there.cpus, self.cpus
            ));
        }
        let [here, bytes] = [there, self].map(Self::ram_bytes);
        if bytes != here {
            return unlike(format!(
                "it has {bytes} bytes of RAM, the machine here {here}; use -m {}M",
                bytes >> 20
            ));
        }
        if !Backend::are_alike(&self.ram, &there.ram) {
            let [ours, theirs] = [self, there].map(|facts| backend::named(&facts.ram));
            return unlike(format!(
                "its RAM is made of {ours}, that of the machine here of {theirs}; use the same backends \
                 (-object …,id=NAME,size=SIZE)"
            ));
        }
        Ok(())
    }
}

fn dotted(version: [u32; 3]) -> String {
    version.map(|part| part.to_string()).join(".")
}

fn version(answer: &Value) -> Result<[u32; 3], QemuError> {
    let part = |name: &str| answer["qemu"][name].as_u64().map(|part| part as u32);
    match (part("major"), part("minor"), part("micro")) {
        (Some(major), Some(minor), Some(micro)) => Ok([major, minor, micro]),
        _ => Err(QemuError::Answer { command: "query-version".into(), answer: answer.to_string() }),
    }
}

/// A property that is text.
pub(super) fn text(qmp: &mut Qmp, path: &str, property: &str) -> Result<String, QemuError> {
    let answer = qmp.execute("qom-get", &json!({"path": path, "property": property}))?;
    let text = answer.as_str().map(str::to_owned);
    text.ok_or_else(|| QemuError::Answer {
        command: format!("qom-get {property}"),
        answer: answer.to_string(),
    })
}

/// What QEMU calls a migration that has begun and is not over.
const UNDER_WAY: [&str; 9] = [
    "setup",
    "active",
    "wait-unplug",
    "pre-switchover",
    "device",
    "postcopy-active",
    "postcopy-paused",
    "colo",
    "cancelling",
];

/// What QEMU calls its migration, by its answer to `query-migrate`, if there is one that has begun and is not over.
pub(super) fn under_way(migration: &Value) -> Option<&str> {
    migration["status"].as_str().filter(|status| UNDER_WAY.contains(status))
}

/// Refuses what QEMU itself would not move, or moves already, and encrypted memory.
fn refuse_what_is_blocked(qmp: &mut Qmp) -> Result<(), QemuError> {
    if text(qmp, "/machine", "confidential-guest-support").is_ok_and(|guest| !guest.is_empty()) {
        return Err(QemuError::Unfit(
            "its memory is encrypted (confidential-guest-support), and cannot be read from outside".into(),
        ));
    }
    let migration = qmp.execute("query-migrate", &json!({}))?;
    if let Some(status) = under_way(&migration) {
        return Err(QemuError::Unfit(format!(
            "QEMU is moving it already (query-migrate says {status}); wait for the end of that, or end it (migrate_cancel)"
        )));
    }
    let reasons = migration["blocked-reasons"].as_array().into_iter().flatten();
    let reasons: Vec<&str> = reasons.filter_map(Value::as_str).collect();
    match reasons.is_empty() {
        true => Ok(()),
        false => Err(QemuError::Unfit(reasons.join("; "))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn part(id: &str, mib: u64) -> Backend {
        Backend { id: id.into(), bytes: mib << 20, path: None }
    }

    fn facts() -> Facts {
        Facts {
            version: [7, 2, 22],
            machine: "pc-q35-7.2".into(),
            cpus: 2,
            ram: vec![part("ram0", 128), part("ram1", 128)],
            balloon: None,
        }
    }

    #[test]
    fn an_unlike_pair_is_refused_with_the_remedy() {
        let refused = |change: fn(&mut Facts)| {
            let mut there = facts();
            change(&mut there);
            facts().fits(&there).unwrap_err().to_string()
        };
        assert!(refused(|there| there.machine = "pc-q35-7.1".into()).contains("-machine pc-q35-7.2"));
        assert!(refused(|there| there.version = [7, 1, 0]).contains("older"));
        assert!(refused(|there| there.cpus = 1).contains("-smp 2"));
        assert!(refused(|there| there.ram[0].bytes = 1 << 20).contains("-m 256M"));
        let other = refused(|there| there.ram = vec![part("ram0", 192), part("ram1", 64)]);
        assert!(
            other.contains("ram0 (128 MiB), ram1 (128 MiB)") && other.contains("ram0 (192 MiB), ram1"),
            "{other}"
        );
        assert!(refused(|there| there.ram = vec![part("ram0", 256)]).contains("the same backends"));
        assert!(refused(|there| there.ram[1].id = "ram2".into()).contains("ram2 (128 MiB)"));
        let by_a_page = refused(|there| {
            there.ram[0].bytes += 4096;
            there.ram[1].bytes -= 4096;
        });
        assert!(by_a_page.contains("134221824 bytes"), "{by_a_page}");
        let newer = Facts { version: [10, 0, 2], ..facts() };
        assert!(facts().fits(&facts()).is_ok() && facts().fits(&newer).is_ok());
    }
}
