//! The files that a report is written to. That each can be written is found before the run.

use std::fs::OpenOptions;
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, ensure};
use postcopy_transport::Transport;

use super::{Report, hdr, page, plot};
use crate::plan::Plan;

/// Files that are open for writing; those that did not exist before are removed again if nothing
/// is written.
pub(crate) struct Outputs {
    report: Option<Output>,
    plot: Option<Output>,
    hlog: Option<Output>,
    /// By measurement.
    hgrm: Vec<(String, Output)>,
}

struct Output {
    path: PathBuf,
    file: std::fs::File,
    is_new: bool,
    written: bool,
}

impl Outputs {
    /// Opens every file that `plan` names.
    ///
    /// Errors: one cannot be written, or is named twice.
    pub(crate) fn open(plan: &Plan) -> anyhow::Result<Self> {
        let asked = &plan.output;
        let named = [&asked.report, &asked.plot, &asked.hlog, &asked.hgrm].map(|path| path.as_deref());
        let mut paths: Vec<&Path> = named.into_iter().flatten().collect();
        paths.sort();
        if let Some(twice) = paths.windows(2).find(|pair| pair[0] == pair[1]) {
            anyhow::bail!("{} is named for two reports; give each a file of its own", twice[0].display());
        }
        let open = |path: &Option<PathBuf>| path.clone().map(Output::open).transpose();
        let mut hgrm = Vec::new();
        if let Some(path) = &asked.hgrm {
            let all = plan.transports.iter().flat_map(|t| plan.sizes.iter().map(|bytes| (*t, *bytes)));
            let single = plan.transports.len() * plan.sizes.len() == 1;
            for (transport, bytes) in all {
                let (tag, path) = distribution(path, transport, bytes, single);
                hgrm.push((tag, Output::open(path)?));
            }
        }
        Ok(Self { report: open(&asked.report)?, plot: open(&asked.plot)?, hlog: open(&asked.hlog)?, hgrm })
    }

    /// Writes every file.
    ///
    /// Errors: a plot cannot be drawn, or the system refuses.
    pub(crate) fn write(self, report: &Report) -> anyhow::Result<()> {
        if let Some(output) = self.report {
            output.write(page::page(report)?.as_bytes())?;
        }
        if let Some(output) = self.plot {
            output.write(plot::picture(report)?.as_bytes())?;
        }
        if let Some(output) = self.hlog {
            output.write(&hdr::hlog(report)?)?;
        }
        for (tag, output) in self.hgrm {
            // A transport that was left out has none, and its file is removed again.
            if let Some(measurement) = report.measurements.iter().find(|m| m.tag() == tag) {
                output.write(hdr::hgrm(measurement).as_bytes())?;
            }
        }
        Ok(())
    }
}

/// The tag of a measurement, and the file for its distribution: the one that was named if there is
/// no other measurement, else beside it.
fn distribution(path: &Path, transport: Transport, bytes: u32, single: bool) -> (String, PathBuf) {
    let tag = format!("{transport}-{bytes}");
    let (stem, extension) = (path.file_stem().unwrap_or_default(), path.extension().unwrap_or_default());
    let name = format!("{}-{tag}.{}", stem.to_string_lossy(), extension.to_string_lossy());
    let own = path.with_file_name(name.trim_end_matches('.'));
    (tag, if single { path.to_owned() } else { own })
}

impl Output {
    fn open(path: PathBuf) -> anyhow::Result<Self> {
        let is_new = !path.exists();
        let file = OpenOptions::new().write(true).create(true).truncate(false).open(&path);
        let file = file.with_context(|| format!("cannot write {}", path.display()))?;
        ensure!(file.metadata()?.is_file() || !is_new, "{} is no file", path.display());
        Ok(Self { path, file, is_new, written: false })
    }

    fn write(mut self, contents: &[u8]) -> anyhow::Result<()> {
        let failed = || format!("writing {}", self.path.display());
        if self.file.metadata()?.is_file() {
            self.file.set_len(0).with_context(failed)?;
        }
        self.file.write_all(contents).with_context(failed)?;
        self.written = true;
        Ok(())
    }
}

impl Drop for Output {
    fn drop(&mut self) {
        if self.is_new && !self.written {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}
