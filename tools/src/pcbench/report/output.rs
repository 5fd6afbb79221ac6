//! The files that a report is written to. That each can be written is found before the run.

use std::fs::OpenOptions;
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, ensure};

use super::plot::{Panel, picture};
use super::times::Times;
use super::{Circumstances, hdr};
use crate::args::OutputArgs;

/// A report as it is written to files.
pub(crate) trait Written {
    /// When it was measured, and by whom.
    fn circumstances(&self) -> &Circumstances;
    /// What was measured: a tag for names of files and in logs, and the times.
    fn distributions(&self) -> Vec<(String, &Times)>;
    /// Its plots.
    fn panels(&self) -> Vec<Panel<'_>>;
    /// What a picture of them shows, for those who do not see it.
    fn label(&self) -> &'static str;
    /// One HTML page that needs nothing else.
    ///
    /// Errors: a plot cannot be drawn.
    fn page(&self) -> anyhow::Result<String>;
}

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
    /// Opens every file that is asked for; `tags` are those that the report's
    /// [distributions](Written::distributions) may have.
    ///
    /// Errors: one cannot be written, or is named twice.
    pub(crate) fn open(asked: &OutputArgs, tags: Vec<String>) -> anyhow::Result<Self> {
        let named = [&asked.report, &asked.plot, &asked.hlog, &asked.hgrm].map(|path| path.as_deref());
        let mut paths: Vec<&Path> = named.into_iter().flatten().collect();
        paths.sort();
        if let Some(twice) = paths.windows(2).find(|pair| pair[0] == pair[1]) {
            anyhow::bail!("{} is named for two reports; give each a file of its own", twice[0].display());
        }
        let open = |path: &Option<PathBuf>| path.clone().map(Output::open).transpose();
        let mut hgrm = Vec::new();
        if let Some(path) = &asked.hgrm {
            let single = tags.len() == 1;
            for tag in tags {
                let path = if single { path.clone() } else { beside(path, &tag) };
                hgrm.push((tag, Output::open(path)?));
            }
        }
        Ok(Self { report: open(&asked.report)?, plot: open(&asked.plot)?, hlog: open(&asked.hlog)?, hgrm })
    }

    /// Writes every file.
    ///
    /// Errors: a plot cannot be drawn, or the system refuses.
    pub(crate) fn write(self, report: &impl Written) -> anyhow::Result<()> {
        if let Some(output) = self.report {
            output.write(report.page()?.as_bytes())?;
        }
        if let Some(output) = self.plot {
            output.write(picture(&report.panels(), report.label())?.as_bytes())?;
        }
        let measured = report.distributions();
        if let Some(output) = self.hlog {
            output.write(&hdr::hlog(report.circumstances(), &measured)?)?;
        }
        for (tag, output) in self.hgrm {
            // What was left out has none, and its file is removed again.
            if let Some((_, times)) = measured.iter().find(|(of, _)| *of == tag) {
                output.write(hdr::hgrm(times).as_bytes())?;
            }
        }
        Ok(())
    }
}

/// The file for the distribution of one measurement among several.
fn beside(path: &Path, tag: &str) -> PathBuf {
    let (stem, extension) = (path.file_stem().unwrap_or_default(), path.extension().unwrap_or_default());
    let name = format!("{}-{tag}.{}", stem.to_string_lossy(), extension.to_string_lossy());
    path.with_file_name(name.trim_end_matches('.'))
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
