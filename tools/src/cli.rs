//! What every command line of the project does alike: completions, manual pages, refusals.

use std::io::{self, Write};
use std::path::Path;

use clap::error::ErrorKind;

/// The exit status of a command line that cannot be followed.
pub const USAGE: u8 = 2;

/// Prints a completion script for `shell`.
pub fn completions(shell: clap_complete::Shell, mut command: clap::Command) {
    let name = command.get_name().to_owned();
    clap_complete::generate(shell, &mut command, name, &mut io::stdout());
}

/// Prints the manual page, or writes it and one for each subcommand into `folder`.
///
/// Errors: the pages cannot be written.
pub fn manual(command: clap::Command, folder: Option<&Path>) -> io::Result<()> {
    match folder {
        Some(folder) => {
            std::fs::create_dir_all(folder)?;
            clap_mangen::generate_to(command, folder)
        }
        None => clap_mangen::Man::new(command).render(&mut io::stdout()),
    }
}

/// One line for what clap found wrong, or `None` where it has help or a version to show.
pub fn refusal(error: &clap::Error) -> Option<String> {
    match error.kind() {
        ErrorKind::DisplayHelp
        | ErrorKind::DisplayVersion
        | ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => None,
        _ => {
            let text = error.to_string();
            let first = text.strip_prefix("error: ").unwrap_or(&text).split("\n\n").next().unwrap_or("");
            let words: Vec<&str> = first.split_whitespace().collect();
            Some(format!("{}; see --help", words.join(" ")))
        }
    }
}

/// Writes a line to stderr. That nobody reads it any more, as a terminal that has hung up, ends nothing.
pub fn say(line: &str) {
    let _ = writeln!(io::stderr(), "{line}");
}

/// Writes to stdout. A reader that has gone away (`| head`) is no error.
///
/// Errors: any other failure to write.
pub fn print(text: &str) -> io::Result<()> {
    match io::stdout().write_all(text.as_bytes()) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        other => other,
    }
}
