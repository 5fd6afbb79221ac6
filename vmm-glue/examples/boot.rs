//! Boots a kernel with its console on this terminal: `boot KERNEL [INITRD [MIB [CPUS [CMDLINE]]]]`.
//!
//! What follows `+` in CMDLINE is added to the default command line; else it replaces it. Ctrl-A x
//! ends the guest.

use std::time::Duration;

use postcopy_engine::memory::GuestMemory;
use postcopy_vmm::{BootSource, Console, DEFAULT_CMDLINE, Vm, VmConfig};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let kernel = args.first().ok_or("usage: boot KERNEL [INITRD [MIB [CPUS [CMDLINE]]]]")?.into();
    let number = |at: usize, default: &str| args.get(at).map_or(default, String::as_str).parse::<u64>();
    let config = VmConfig { cpus: u8::try_from(number(3, "1")?)?, memory_bytes: number(2, "256")? << 20 };
    let cmdline = match args.get(4).map(|text| (text.strip_prefix('+'), text)) {
        None => DEFAULT_CMDLINE.to_owned(),
        Some((Some(more), _)) => format!("{DEFAULT_CMDLINE} {more}"),
        Some((None, all)) => all.clone(),
    };
    let initrd = args.get(1).filter(|path| !path.is_empty()).map(Into::into);
    let memory = GuestMemory::new(config.layout()?)?;
    let vm = Vm::boot(config, memory, &BootSource { kernel, initrd, cmdline }, Console::Stdio)?;
    vm.start()?;
    let reason = vm.exit_event().wait(Duration::MAX);
    drop(vm);
    if let Some(reason) = reason {
        println!("the guest has ended: {reason}");
    }
    Ok(())
}
