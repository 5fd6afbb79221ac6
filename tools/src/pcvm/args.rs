//! The command line of pcvm, as typed.

mod host;

use std::ffi::OsString;
use std::net::SocketAddr;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
use postcopy_engine::planner::Bandwidth;
use postcopy_engine::session::Mode;
use postcopy_tools::drain::{LimitArgs, bandwidth};
use postcopy_tools::size;
use postcopy_tools::trust::TrustArgs;

use crate::control::PATIENCE;

pub(crate) use host::{HostArgs, SelfService, WireArgs};

/// Runs KVM guests and moves them by post-copy live migration.
///
/// The guest resumes at the destination at once; its memory follows by one-sided reads, over TCP
/// or RDMA.
#[derive(Debug, Parser)]
#[command(name = "pcvm", version, max_term_width = 100)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Boot a guest, and run it until it ends or has moved away.
    Run(RunArgs),
    /// Wait for a guest to arrive, and run it until it ends or has moved away.
    Receive(ReceiveArgs),
    /// Move a guest to a destination where `pcvm receive` listens.
    Migrate(MigrateArgs),
    /// Call off a move while the guest still runs at the source, before it is stopped there.
    ///
    /// Of a QEMU's guest: interrupt `pcvm migrate --qmp`.
    Cancel(ControlArgs),
    /// Change how much may cross a second of a guest's memory that is on its way here.
    Limit(LimitNowArgs),
    /// Say where a guest is and what it is doing.
    Status(ControlArgs),
    /// End a guest, or a receiver that waits for one.
    Quit(ControlArgs),
    /// Type a line at a guest's console.
    Type(TypeArgs),
    /// End the doubt after a migration whose handover was not confirmed.
    Resolve(ResolveArgs),
    /// Reach a destination again that was lost after the handover, and serve it the memory that it has not got.
    Recover(RecoverArgs),
    /// Keep what a QEMU's guest does not use in its balloon, so that it need not move.
    ///
    /// The paper's dynamic self-ballooning, with the guest's own driver: every few seconds most of what the guest calls
    /// free goes into its balloon, and comes back as the guest uses more; a guest that is pressed for memory gets half of it
    /// back at once and is left alone for ten turns. Ends when QEMU does, as at the end of a move; or by a signal, and then
    /// the guest has all of its memory again.
    Balloon(BalloonArgs),
    /// Compare migrations side by side: a table, and on request JSON and a page with plots.
    Compare(CompareArgs),
    /// Print a completion script for a shell.
    Completions {
        /// Which shell.
        shell: clap_complete::Shell,
    },
    /// Print the manual page, in roff.
    Man {
        /// Write it and one page for each command into this folder instead.
        #[arg(long, value_name = "FOLDER")]
        dir: Option<PathBuf>,
    },
}

#[derive(Debug, Args)]
pub(crate) struct RunArgs {
    /// Kernel: a bzImage such as a distribution's vmlinuz, or a 64-bit ELF file.
    #[arg(long, value_name = "FILE")]
    pub(crate) kernel: PathBuf,
    /// Initial RAM file system.
    #[arg(long, value_name = "FILE")]
    pub(crate) initrd: Option<PathBuf>,
    /// Appended to the kernel's command line.
    #[arg(long, default_value = "", value_name = "TEXT")]
    pub(crate) cmdline: String,
    /// Guest memory: a number with K, M, G or none for bytes.
    #[arg(long, default_value = "256M", value_parser = size::parse, value_name = "SIZE")]
    pub(crate) memory: u64,
    /// Number of vCPUs.
    #[arg(long, default_value_t = 1, value_name = "N")]
    pub(crate) cpus: u8,
    #[command(flatten)]
    pub(crate) host: HostArgs,
    /// Where to wait for a guest when this one has moved away. Needs --again.
    #[arg(long, value_name = "HOST:PORT", requires = "again")]
    pub(crate) listen: Option<String>,
    #[command(flatten)]
    pub(crate) wire: WireArgs,
}

#[derive(Debug, Args)]
pub(crate) struct ReceiveArgs {
    /// Where to wait for a guest. All its connections come to this port.
    #[arg(long, value_name = "HOST:PORT")]
    pub(crate) listen: String,
    #[command(flatten)]
    pub(crate) host: HostArgs,
    #[command(flatten)]
    pub(crate) wire: WireArgs,
    /// What is to run the guest: pcvm itself, or a stock QEMU, started with the command after `--`.
    #[arg(long, value_enum, default_value_t = Vmm::Own)]
    pub(crate) vmm: Vmm,
    /// Go on with the guest of a QEMU that another `pcvm receive` has started, which was killed: the process PID. Its source
    /// comes back by itself, or is told to (`pcvm recover`), also to another --listen. With --again, QEMU's command after `--`
    /// is for the next guest.
    #[arg(long, value_name = "PID", value_parser = clap::value_parser!(i32).range(1..))]
    pub(crate) take_over: Option<i32>,
    /// The library that QEMU is started with, where it is not beside pcvm or in ../lib.
    #[arg(long, value_name = "FILE")]
    pub(crate) handover_library: Option<PathBuf>,
    /// QEMU and its arguments, which make the machine that it is at the source; without -incoming.
    #[arg(last = true, value_name = "QEMU ARGUMENTS")]
    pub(crate) command: Vec<OsString>,
}

/// Who runs a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Vmm {
    /// Pcvm itself.
    Own,
    /// A stock QEMU.
    Qemu,
}

/// When memory moves.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum When {
    Postcopy,
    Hybrid,
}

impl From<When> for Mode {
    fn from(when: When) -> Self {
        match when {
            When::Postcopy => Self::Postcopy,
            When::Hybrid => Self::Hybrid,
        }
    }
}

/// Where the guest is that is to move.
#[derive(Clone, Debug, Args)]
#[group(required = true, multiple = false)]
pub(crate) struct FromArgs {
    /// Control socket of the pcvm process that holds the guest.
    #[arg(long, value_name = "SOCK")]
    pub(crate) control: Option<PathBuf>,
    /// Monitor (QMP) socket of the QEMU that runs the guest. Its RAM must be a shared file in memory.
    #[arg(long, value_name = "SOCK")]
    pub(crate) qmp: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub(crate) struct MigrateArgs {
    #[command(flatten)]
    pub(crate) from: FromArgs,
    /// Where `pcvm receive` listens.
    #[arg(long, value_name = "HOST:PORT")]
    pub(crate) to: String,
    #[command(flatten)]
    pub(crate) wire: WireArgs,
    /// When memory moves: all of it after the handover, or once while the guest still runs here, and
    /// after the handover what it has written meanwhile.
    #[arg(long, value_enum, default_value_t = When::Postcopy)]
    pub(crate) mode: When,
    /// Have the guest's balloon take so many per cent of its free memory before the move, which then need not
    /// move, and give it back when all else is there (the paper's self-ballooning takes 95). For a QEMU's guest with a
    /// virtio-balloon.
    #[arg(long, value_name = "PERCENT", requires = "qmp", value_parser = clap::value_parser!(u8).range(1..=100))]
    pub(crate) balloon: Option<u8>,
    #[command(flatten)]
    pub(crate) limit: LimitArgs,
    #[command(flatten)]
    pub(crate) trust: TrustArgs,
    #[command(flatten)]
    pub(crate) told: ToldArgs,
}

/// Where the memory is that a destination still needs.
#[derive(Clone, Debug, Args)]
#[group(required = true, multiple = false)]
pub(crate) struct OwedByArgs {
    /// Control socket of the source, which keeps the memory on offer.
    #[arg(long, value_name = "SOCK")]
    pub(crate) control: Option<PathBuf>,
    /// Monitor (QMP) socket of the source's QEMU, whose `pcvm migrate` was killed: this process takes its place.
    #[arg(long, value_name = "SOCK")]
    pub(crate) qmp: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub(crate) struct RecoverArgs {
    #[command(flatten)]
    pub(crate) from: OwedByArgs,
    /// Where the destination listens now, if that is elsewhere. With --qmp it must be said.
    #[arg(long, value_name = "HOST:PORT")]
    pub(crate) to: Option<String>,
    #[command(flatten)]
    pub(crate) wire: WireArgs,
    #[command(flatten)]
    pub(crate) limit: LimitArgs,
    #[command(flatten)]
    pub(crate) trust: TrustArgs,
    #[command(flatten)]
    pub(crate) told: ToldArgs,
}

/// How long a move is tried, and how it is told of.
#[derive(Debug, Args)]
pub(crate) struct ToldArgs {
    /// For how many seconds to try to reach the destination again when it is lost after the handover. The guest
    /// waits for what it has not got, and its memory stays on offer here also after that.
    #[arg(long, default_value_t = PATIENCE, value_name = "SECONDS")]
    pub(crate) patience: u64,
    /// Print the report as JSON.
    #[arg(long)]
    pub(crate) json: bool,
    /// No progress on stderr.
    #[arg(long)]
    pub(crate) quiet: bool,
}

#[derive(Debug, Args)]
pub(crate) struct BalloonArgs {
    /// Monitor (QMP) socket of the QEMU that runs the guest. It is held for a moment in each turn, and others have it in
    /// between: `pcvm migrate --qmp` among them.
    #[arg(long, value_name = "SOCK")]
    pub(crate) qmp: PathBuf,
    /// How much of what would be free without a balloon goes into it.
    #[arg(long, default_value_t = 95, value_name = "PERCENT", value_parser = clap::value_parser!(u8).range(1..=99))]
    pub(crate) percent: u8,
    /// How long from turn to turn.
    #[arg(long, default_value_t = 5, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..=3600))]
    pub(crate) interval: u64,
    /// Print each change as a line of JSON.
    #[arg(long)]
    pub(crate) json: bool,
    /// Do not tell of changes on stderr.
    #[arg(long)]
    pub(crate) quiet: bool,
}

#[derive(Debug, Args)]
pub(crate) struct CompareArgs {
    /// Write one self-contained HTML page with the table and plots.
    #[arg(long, value_name = "FILE")]
    pub(crate) html: Option<PathBuf>,
    /// Write all reports and this machine's description as one JSON document.
    #[arg(long, value_name = "FILE")]
    pub(crate) json: Option<PathBuf>,
    /// Title of the page.
    #[arg(long, default_value = "Migrations compared", value_name = "TEXT")]
    pub(crate) title: String,
    /// A remark below the title, such as what the guest was doing.
    #[arg(long, default_value = "", value_name = "TEXT")]
    pub(crate) note: String,
    /// A migration: its name, the file with what `pcvm migrate --json` printed, and if there is
    /// one a file with the line that the test guest printed.
    #[arg(required = true, value_name = "LABEL=REPORT.json[,GUEST.json]")]
    pub(crate) migrations: Vec<String>,
}

#[derive(Debug, Args)]
pub(crate) struct ControlArgs {
    /// Control socket.
    #[arg(long, value_name = "SOCK")]
    pub(crate) control: PathBuf,
    /// Print JSON.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct LimitNowArgs {
    /// Control socket of the process that the guest arrives in.
    #[arg(long, value_name = "SOCK")]
    pub(crate) control: PathBuf,
    /// How many bytes may cross a second where nobody waits for them: a number with K, M, G or none; or `none` for as many as
    /// the link carries.
    #[arg(value_name = "SIZE|none", value_parser = limit)]
    pub(crate) max_bandwidth: Limit,
}

/// A limit to the bandwidth, or none.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limit(pub(crate) Option<Bandwidth>);

fn limit(text: &str) -> Result<Limit, String> {
    match text {
        "none" => Ok(Limit(None)),
        text => bandwidth(text).map(|limit| Limit(Some(limit))),
    }
}

#[derive(Debug, Args)]
pub(crate) struct TypeArgs {
    /// Control socket.
    #[arg(long, value_name = "SOCK")]
    pub(crate) control: PathBuf,
    /// What to type; a newline follows.
    pub(crate) text: String,
}

#[derive(Debug, Args)]
pub(crate) struct ResolveArgs {
    /// Control socket of the source.
    #[arg(long, value_name = "SOCK")]
    pub(crate) control: PathBuf,
    /// Where the guest is to be: `here` runs it on (only if it certainly does not run at the
    /// destination), `there` gives it up.
    #[arg(long, value_enum)]
    pub(crate) guest: Resolution,
}

/// How a doubt ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Resolution {
    /// Run it on at the source.
    Here,
    /// It is the destination's.
    There,
}

/// An address from a flag: a host name or an IP address, and a port.
pub(crate) fn resolve(text: &str) -> anyhow::Result<SocketAddr> {
    use std::net::ToSocketAddrs;
    let mut found = text.to_socket_addrs().map_err(|error| {
        anyhow::anyhow!("`{text}` is no address ({error}); write HOST:PORT, such as 192.0.2.7:7070")
    })?;
    found.next().ok_or_else(|| anyhow::anyhow!("`{text}` has no address"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        use clap::CommandFactory;
        Cli::command().debug_assert();
    }
}
