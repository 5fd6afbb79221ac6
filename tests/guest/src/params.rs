//! What the guest program is told to do, by the kernel command line or by its own arguments.

use std::fmt;
use std::path::PathBuf;

use crate::network::Ipv4Net;

/// Which page comes after which.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pattern {
    /// Every page once a pass, in an order that differs from pass to pass.
    Random,
    /// Ascending.
    Sequential,
    /// Every `stride`-th page, then from one further on.
    Strided,
}

/// What is done to each page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Verified.
    Read,
    /// Verified, then rewritten.
    Write,
}

/// All parameters. `pcguest.NAME=VALUE` on the kernel command line, `--NAME VALUE` as arguments.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Params {
    /// `mb`: MiB of memory to walk.
    pub mb: u64,
    /// `pattern`: `random`, `sequential` or `strided`.
    pub pattern: Pattern,
    /// `access`: `read` or `write`.
    pub access: Access,
    /// `seed` of page contents and of the random order.
    pub seed: u64,
    /// `stride` in pages.
    pub stride: u64,
    /// `report_ms`: time between reports, 0 for only when asked.
    pub report_ms: u64,
    /// `pace_us`: pause between accesses.
    pub pace_us: u64,
    /// `thp`: `on` lets the kernel use huge pages.
    pub thp: bool,
    /// `populate`: `on` has the kernel make all pages before they are filled.
    pub populate: bool,
    /// `passes` after which to end, 0 for never.
    pub passes: u64,
    /// `disk`: a device or file to write a journal to, from its first byte to its last.
    pub disk: Option<PathBuf>,
    /// `disk_pace_us`: pause between the journal's blocks.
    pub disk_pace_us: u64,
    /// `net`: `ADDRESS/PREFIX` for the first network interface. Only of a virtual machine.
    pub net: Option<Ipv4Net>,
    /// `echo`: a TCP port that sends back what it is sent.
    pub echo: Option<u16>,
}

impl Default for Params {
    fn default() -> Self {
        Self {
            mb: 64,
            pattern: Pattern::Random,
            access: Access::Read,
            seed: 1,
            stride: 16,
            report_ms: 1000,
            pace_us: 0,
            thp: false,
            populate: false,
            passes: 0,
            disk: None,
            disk_pace_us: 2000,
            net: None,
            echo: None,
        }
    }
}

/// A parameter that was not understood.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BadParam(String);

impl fmt::Display for BadParam {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "parameter not understood: {}", self.0)
    }
}

impl std::error::Error for BadParam {}

fn choice<T: Copy>(choices: &[(&str, T)], value: &str) -> Option<T> {
    choices.iter().find(|(name, _)| *name == value).map(|(_, choice)| *choice)
}

impl Params {
    /// From a kernel command line; words that are not ours are passed over.
    ///
    /// Errors: one of ours with a name or value that does not exist.
    pub fn from_cmdline(cmdline: &str) -> Result<Self, BadParam> {
        let mut params = Self::default();
        for word in cmdline.split_whitespace().filter_map(|word| word.strip_prefix("pcguest.")) {
            let (name, value) = word.split_once('=').unwrap_or((word, ""));
            params.set(name, value)?;
        }
        params.checked()
    }

    /// From program arguments.
    ///
    /// Errors: as [`Params::from_cmdline`].
    pub fn from_args(args: impl IntoIterator<Item = String>) -> Result<Self, BadParam> {
        let mut params = Self::default();
        let mut args = args.into_iter();
        while let Some(arg) = args.next() {
            let name = arg.strip_prefix("--").ok_or_else(|| BadParam(arg.clone()))?;
            let (name, value) = match name.split_once('=') {
                Some((name, value)) => (name.to_owned(), value.to_owned()),
                None => (name.to_owned(), args.next().unwrap_or_default()),
            };
            params.set(&name, &value)?;
        }
        params.checked()
    }

    fn checked(self) -> Result<Self, BadParam> {
        match (1..=1 << 20).contains(&self.mb) && self.stride > 0 {
            true => Ok(self),
            false => Err(BadParam(format!("mb={} stride={}", self.mb, self.stride))),
        }
    }

    fn set(&mut self, name: &str, value: &str) -> Result<(), BadParam> {
        self.try_set(name, value).ok_or_else(|| BadParam(format!("{name}={value}")))
    }

    fn try_set(&mut self, name: &str, value: &str) -> Option<()> {
        const SWITCH: [(&str, bool); 2] = [("on", true), ("off", false)];
        const PATTERNS: [(&str, Pattern); 3] =
            [("random", Pattern::Random), ("sequential", Pattern::Sequential), ("strided", Pattern::Strided)];
        match name {
            "mb" => self.mb = value.parse().ok()?,
            "pattern" => self.pattern = choice(&PATTERNS, value)?,
            "access" => self.access = choice(&[("read", Access::Read), ("write", Access::Write)], value)?,
            "seed" => self.seed = value.parse().ok()?,
            "stride" => self.stride = value.parse().ok()?,
            "report_ms" => self.report_ms = value.parse().ok()?,
            "pace_us" => self.pace_us = value.parse().ok()?,
            "thp" => self.thp = choice(&SWITCH, value)?,
            "populate" => self.populate = choice(&SWITCH, value)?,
            "passes" => self.passes = value.parse().ok()?,
            "disk" => self.disk = Some((!value.is_empty()).then(|| value.into())?),
            "disk_pace_us" => self.disk_pace_us = value.parse().ok()?,
            "net" => self.net = Some(Ipv4Net::parse(value)?),
            "echo" => self.echo = Some(value.parse().ok().filter(|port| *port > 0)?),
            _ => return None,
        }
        Some(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_ways_of_telling_give_the_same() {
        let line = "quiet pcguest.mb=8 pcguest.pattern=strided pcguest.access=write pcguest.thp=on panic=1";
        let args = "--mb 8 --pattern=strided --access write --thp on";
        let from_line = Params::from_cmdline(line).unwrap();
        assert_eq!(Params::from_args(args.split(' ').map(String::from)), Ok(from_line.clone()));
        assert_eq!(from_line.pattern, Pattern::Strided);
        assert_eq!(Params::from_cmdline("console=ttyS0").unwrap(), Params::default());
    }

    #[test]
    fn a_disk_and_a_network_are_told_of() {
        let line = "pcguest.disk=/dev/vda pcguest.disk_pace_us=50 pcguest.net=10.77.0.2/24 pcguest.echo=7";
        let params = Params::from_cmdline(line).unwrap();
        assert_eq!(params.disk, Some("/dev/vda".into()));
        assert_eq!((params.disk_pace_us, params.echo), (50, Some(7)));
        assert_eq!(params.net, Ipv4Net::parse("10.77.0.2/24"));
        assert_eq!(Params::default().disk_pace_us, 2000);
    }

    #[test]
    fn what_is_not_understood_is_refused() {
        let bad = "mb=x mb=0 nonsense=1 stride=0 mb disk disk= disk_pace_us=x net=10.0.0.1 net=x/8 net echo=0 echo=65536";
        for bad in bad.split(' ') {
            assert!(Params::from_cmdline(&format!("pcguest.{bad}")).is_err(), "{bad}");
        }
    }
}
