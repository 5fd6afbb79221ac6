//! What was measured: JSON first, the table from the same values.

use std::fmt::Write;

use serde::Serialize;

use crate::read::Measurement;

/// Version of the JSON.
const VERSION: u32 = 1;

/// Everything that a reader of the figures needs to know.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    version: u32,
    environment: Environment,
    measurements: Vec<Measurement>,
}

/// The machine that measured.
#[derive(Debug, Serialize)]
struct Environment {
    cpu: String,
    cores: usize,
    kernel: String,
    rdma_devices: Vec<String>,
}

impl Environment {
    fn read() -> Self {
        let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let model = info.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
        let devices = std::fs::read_dir("/sys/class/infiniband").into_iter().flatten().flatten();
        let uname = rustix::system::uname();
        Self {
            cpu: model.map_or_else(|| "unknown".into(), |(_, name)| name.into()),
            cores: std::thread::available_parallelism().map_or(0, usize::from),
            kernel: uname.release().to_string_lossy().into_owned(),
            rdma_devices: devices.map(|device| device.file_name().to_string_lossy().into_owned()).collect(),
        }
    }
}

impl Report {
    pub(crate) fn new(measurements: Vec<Measurement>) -> Self {
        Self { version: VERSION, environment: Environment::read(), measurements }
    }

    pub(crate) fn json(&self) -> anyhow::Result<String> {
        Ok(serde_json::to_string_pretty(self)?)
    }

    pub(crate) fn table(&self) -> String {
        let Environment { cpu, cores, kernel, .. } = &self.environment;
        let mut out = format!("{cpu}, {cores} cores, Linux {kernel}; latency in µs\n\n");
        out.push_str(
            "transport     bytes    reads       min       p50       p90       p99     p99.9       max      MB/s\n",
        );
        for m in &self.measurements {
            let l = &m.latency;
            let _ = writeln!(
                out,
                "{:<9} {:>9} {:>8} {:>9.2} {:>9.2} {:>9.2} {:>9.2} {:>9.2} {:>9.2} {:>9.0}",
                m.transport,
                m.bytes,
                l.count,
                l.min_us,
                l.p50_us,
                l.p90_us,
                l.p99_us,
                l.p999_us,
                l.max_us,
                m.mb_per_s
            );
        }
        out.push_str(&self.verdict());
        out
    }

    /// What it means for a fault, in words.
    fn verdict(&self) -> String {
        let pages = self.measurements.iter().filter(|m| m.bytes == 4096);
        let best = pages
            .filter(|m| m.transport != "shm")
            .min_by(|a, b| a.latency.p50_us.total_cmp(&b.latency.p50_us));
        best.map_or_else(String::new, |m| {
            format!(
                "\nA fault over {} waits {:.1} µs for its 4 KiB page at the median, {:.1} µs at p99, plus the kernel's \
                 own share.\n",
                m.transport, m.latency.p50_us, m.latency.p99_us
            )
        })
    }
}
