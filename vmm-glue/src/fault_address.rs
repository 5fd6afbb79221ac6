//! Which page a vCPU missed: what KVM does not say when KVM_RUN fails with EFAULT.
//!
//! With UFFD_FEATURE_SIGBUS a guest's touch of a missing page makes KVM_RUN return EFAULT, and no
//! kernel up to 6.18 tells the address. Its tracepoint `kvm_page_fault` has it: a BPF program of 26
//! instructions on it leaves (thread, address) in an array that is mapped here, in the slot of the
//! thread's number modulo the array's length. Two threads in one slot overwrite each other; who
//! finds another's number there runs the vCPU again and faults again.
//!
//! The program looks only at threads of this process, by their numbers in this process's PID
//! namespace. It needs CAP_BPF and CAP_PERFMON (or root), and tracefs to tell the order of the
//! tracepoint's arguments, which changed in Linux 6.1.

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::ptr::NonNull;

/// Slots of the array; a power of two, far above the vCPUs of one process.
const SLOTS: usize = 1024;
const SLOT_BYTES: usize = 16;

const BPF_MAP_CREATE: libc::c_long = 0;
const BPF_PROG_LOAD: libc::c_long = 5;
const BPF_RAW_TRACEPOINT_OPEN: libc::c_long = 17;
const BPF_MAP_TYPE_ARRAY: u32 = 2;
const BPF_F_MMAPABLE: u32 = 1 << 10;
const BPF_PROG_TYPE_RAW_TRACEPOINT: u32 = 17;
const HELPER_MAP_LOOKUP_ELEM: i32 = 1;
const HELPER_GET_NS_CURRENT_PID_TGID: i32 = 120;
const LICENSE: &CStr = c"Dual MIT/GPL";
const TRACEPOINT: &CStr = c"kvm_page_fault";
const FORMATS: [&str; 2] = [
    "/sys/kernel/tracing/events/kvm/kvm_page_fault/format",
    "/sys/kernel/debug/tracing/events/kvm/kvm_page_fault/format",
];

/// The program, attached, and the array that it fills. Dropping it detaches.
pub(crate) struct FaultAddresses {
    slots: NonNull<u64>,
    _link: OwnedFd,
    _program: OwnedFd,
    _map: OwnedFd,
}

// SAFETY: the mapping is only read, by volatile loads of aligned words, on whatever thread.
unsafe impl Send for FaultAddresses {}
// SAFETY: as above.
unsafe impl Sync for FaultAddresses {}

impl FaultAddresses {
    /// Loads and attaches the program.
    ///
    /// Errors: the kernel refuses (privileges, no BPF), or has no such tracepoint (KVM is not loaded,
    /// tracefs is not mounted).
    pub(crate) fn attach() -> io::Result<Self> {
        let argument = address_argument()?;
        let map = bpf(
            BPF_MAP_CREATE,
            &Attributes::default().words(&[
                (0, BPF_MAP_TYPE_ARRAY),
                (4, 4),
                (8, SLOT_BYTES as u32),
                (12, SLOTS as u32),
                (16, BPF_F_MMAPABLE),
            ]),
        )?;
        let code = program(argument, map.as_raw_fd())?;
        let program = bpf(
            BPF_PROG_LOAD,
            &Attributes::default()
                .words(&[(0, BPF_PROG_TYPE_RAW_TRACEPOINT), (4, code.len() as u32)])
                .pointer(8, code.as_ptr().cast())
                .pointer(16, LICENSE.as_ptr().cast()),
        )?;
        let link = bpf(
            BPF_RAW_TRACEPOINT_OPEN,
            &Attributes::default()
                .pointer(0, TRACEPOINT.as_ptr().cast())
                .words(&[(8, program.as_raw_fd() as u32)]),
        )?;
        let len = SLOTS * SLOT_BYTES;
        // SAFETY: a new mapping of the array, at an address of the kernel's choice.
        let at = unsafe {
            libc::mmap(std::ptr::null_mut(), len, libc::PROT_READ, libc::MAP_SHARED, map.as_raw_fd(), 0)
        };
        let slots = if at == libc::MAP_FAILED { None } else { NonNull::new(at.cast()) };
        let slots = slots.ok_or_else(io::Error::last_os_error)?;
        Ok(Self { slots, _link: link, _program: program, _map: map })
    }

    /// The guest physical address that the calling thread's vCPU last faulted on. `None` if another
    /// thread's is in the slot, or none was seen.
    pub(crate) fn of_this_thread(&self) -> Option<u64> {
        // SAFETY: gettid(2) has no preconditions.
        let thread = unsafe { libc::gettid() } as u64;
        let slot = self.slots.as_ptr().wrapping_add(thread as usize % SLOTS * (SLOT_BYTES / 8));
        // SAFETY: the slot lies in the mapping, which lives as long as `self`.
        let owner = unsafe { slot.read_volatile() };
        // SAFETY: as above; a slot is two words.
        let address = unsafe { slot.wrapping_add(1).read_volatile() };
        (owner == thread).then_some(address)
    }
}

impl Drop for FaultAddresses {
    fn drop(&mut self) {
        // SAFETY: the mapping was made in `attach` with this length and is not used after this.
        unsafe { libc::munmap(self.slots.as_ptr().cast(), SLOTS * SLOT_BYTES) };
    }
}

/// Which argument of the tracepoint is the address: the second where the first is the vCPU.
fn address_argument() -> io::Result<i16> {
    let mut failure = io::ErrorKind::NotFound.into();
    for path in FORMATS {
        match std::fs::read_to_string(path) {
            Ok(format) if format.contains("fault_address") => {
                return Ok(i16::from(format.contains("vcpu_id")));
            }
            Ok(_) => failure = io::Error::other("the tracepoint kvm_page_fault has no fault_address"),
            Err(error) => failure = error,
        }
    }
    Err(failure)
}

/// The bytes of a union bpf_attr.
#[derive(Default)]
struct Attributes([u64; 16]);

impl Attributes {
    /// Sets words of 32 bits, by their offsets in bytes.
    fn words(mut self, words: &[(usize, u32)]) -> Self {
        for (at, value) in words {
            self.0[at / 8] |= u64::from(*value) << (at % 8 * 8);
        }
        self
    }

    fn pointer(mut self, at: usize, value: *const u8) -> Self {
        self.0[at / 8] = value as u64;
        self
    }
}

/// bpf(2), for the commands that answer with a descriptor.
fn bpf(command: libc::c_long, attributes: &Attributes) -> io::Result<OwnedFd> {
    // SAFETY: the attributes are larger than any that these commands read, their unused part is zero,
    // and what they point to lives across the call.
    let fd = unsafe { libc::syscall(libc::SYS_bpf, command, attributes.0.as_ptr(), size_of::<Attributes>()) };
    match i32::try_from(fd) {
        // SAFETY: a new descriptor that nobody else owns.
        Ok(fd) if fd >= 0 => Ok(unsafe { OwnedFd::from_raw_fd(fd) }),
        _ => Err(io::Error::last_os_error()),
    }
}

/// One instruction, as linux/bpf.h has it: code, destination, source, offset, immediate.
fn instruction(code: u8, to: u8, from: u8, offset: i16, immediate: i32) -> u64 {
    let registers = u64::from(to | from << 4);
    u64::from(code) | registers << 8 | u64::from(offset as u16) << 16 | u64::from(immediate as u32) << 32
}

/// The program; see the module. `argument` is the address's place among the tracepoint's.
fn program(argument: i16, map: i32) -> io::Result<Vec<u64>> {
    let namespace = std::fs::metadata("/proc/self/ns/pid")?;
    let process = std::process::id() as i32;
    let op = instruction;
    // A 64-bit constant takes two instructions; with source 1 it is a map's descriptor.
    let wide = |to, from, value: u64| {
        [op(0x18, to, from, 0, value as u32 as i32), op(0, 0, 0, 0, (value >> 32) as i32)]
    };
    let mut code = vec![op(0x79, 7, 1, 8 * argument, 0)]; //     r7 = the address
    code.extend(wide(1, 0, namespace.dev()));
    code.extend(wide(2, 0, namespace.ino()));
    code.extend([
        op(0xbf, 3, 10, 0, 0),
        op(0x07, 3, 0, 0, -8),
        op(0xb7, 4, 0, 0, 8),
        op(0x85, 0, 0, 0, HELPER_GET_NS_CURRENT_PID_TGID), //    { thread, process } at r10 - 8
        op(0x55, 0, 0, 14, 0),                             //    another namespace: out
        op(0x61, 8, 10, -4, 0),
        op(0x55, 8, 0, 12, process), //                          another process: out
        op(0x61, 8, 10, -8, 0),      //                          r8 = the thread
        op(0xbf, 1, 8, 0, 0),
        op(0x57, 1, 0, 0, SLOTS as i32 - 1),
        op(0x63, 10, 1, -12, 0), //                              the slot's number at r10 - 12
    ]);
    code.extend(wide(1, 1, map as u64));
    code.extend([
        op(0xbf, 2, 10, 0, 0),
        op(0x07, 2, 0, 0, -12),
        op(0x85, 0, 0, 0, HELPER_MAP_LOOKUP_ELEM),
        op(0x15, 0, 0, 2, 0),
        op(0x7b, 0, 7, 8, 0),
        op(0x7b, 0, 8, 0, 0),
        op(0xb7, 0, 0, 0, 0), //                                 out:
        op(0x95, 0, 0, 0, 0),
    ]);
    Ok(code)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn jumps_land_on_the_way_out() {
        let code = program(1, 5).unwrap();
        let out = code.len() - 2;
        for (at, word) in code.iter().enumerate().filter(|(_, word)| matches!(*word & 0xff, 0x15 | 0x55)) {
            let offset = (word >> 16) as u16 as usize;
            assert_eq!(at + 1 + offset, out, "the jump of instruction {at}");
        }
        assert_eq!(code.len(), 26);
    }

    #[test]
    fn it_attaches_or_says_why_not() {
        match FaultAddresses::attach() {
            Ok(addresses) => assert_eq!(addresses.of_this_thread(), None),
            Err(error) => assert!(!error.to_string().is_empty()),
        }
    }
}
