//! The duties of process 1: file systems, the console, and the machine's end.

use std::fs::File;
use std::io;
use std::path::Path;

use rustix::mount::{MountFlags, mount};
use rustix::system::{RebootCommand, finit_module, reboot};
use rustix::termios::{LocalModes, OptionalActions, OutputModes, tcgetattr, tcsetattr};

/// Where `scripts/guest-image --modules` puts kernel modules, and their list in loading order.
const MODULES: &str = "/modules";

/// True if this process is the machine's first.
pub fn is_init() -> bool {
    std::process::id() == 1
}

/// Mounts /proc, /sys and /dev, and makes ttyS0 this process's standard streams.
///
/// Errors: there is no serial port. File systems that are mounted already are left so.
pub fn set_up() -> io::Result<()> {
    for (kind, target) in [("devtmpfs", "/dev"), ("proc", "/proc"), ("sysfs", "/sys")] {
        let _ = std::fs::create_dir_all(target);
        if let Err(error) = mount(kind, target, kind, MountFlags::empty(), None)
            && error != rustix::io::Errno::BUSY
        {
            println!("pcguest: cannot mount {target}: {error}");
        }
    }
    let serial = File::options().read(true).write(true).open("/dev/ttyS0")?;
    rustix::stdio::dup2_stdin(&serial)?;
    rustix::stdio::dup2_stdout(&serial)?;
    rustix::stdio::dup2_stderr(&serial)?;
    set_line_mode(&serial)
}

/// Loads the kernel modules of the image, if it has some.
///
/// Errors: one of them is missing, or the kernel refuses it.
pub fn load_modules() -> io::Result<()> {
    let folder = Path::new(MODULES);
    let Ok(order) = std::fs::read_to_string(folder.join("order")) else { return Ok(()) };
    for name in order.lines() {
        let refused = |error: io::Error| io::Error::new(error.kind(), format!("module {name}: {error}"));
        let file = File::open(folder.join(name)).map_err(refused)?;
        finit_module(&file, c"", 0).map_err(|errno| refused(errno.into()))?;
    }
    Ok(())
}

/// Whole lines in, no echo of them among the reports, no carriage returns out.
fn set_line_mode(serial: &File) -> io::Result<()> {
    let mut mode = tcgetattr(serial)?;
    mode.local_modes -= LocalModes::ECHO;
    mode.output_modes -= OutputModes::OPOST;
    tcsetattr(serial, OptionalActions::Now, &mode)?;
    Ok(())
}

/// Ends the machine. By a reset, which a machine without ACPI can do, and a VMM takes as the end.
///
/// Returns only if the kernel refuses.
pub fn end_machine() -> io::Error {
    let _ = rustix::termios::tcdrain(io::stdout());
    rustix::fs::sync();
    match reboot(RebootCommand::Restart) {
        Ok(()) => io::Error::other("the machine goes on"),
        Err(error) => error.into(),
    }
}
