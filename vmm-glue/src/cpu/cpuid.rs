//! The processor features that a guest is shown, and whether a host has those of a saved guest.
//!
//! A guest sees what KVM supports, less what would not survive a migration or would stand in the
//! way of one:
//!
//! * the invariant TSC: a kernel that sees it uses the TSC itself as its clock, and that runs at
//!   another speed on the next host; without it, kvmclock is the clock;
//! * asynchronous page faults: the guest would schedule around a missing page, and what a stall
//!   costs could not be seen;
//! * performance counters: they are the host's own.

use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use kvm_ioctls::{Cap, Kvm};

use crate::error::{KvmContext, StateError, VmError};

const VENDOR: u32 = 0;
const FEATURES: u32 = 1;
const PERFORMANCE_COUNTERS: u32 = 0xa;
const TOPOLOGY: [u32; 2] = [0xb, 0x1f];
const KVM_FEATURES: u32 = 0x4000_0001;
const AMD_FEATURES: u32 = 0x8000_0001;
const POWER_MANAGEMENT: u32 = 0x8000_0007;
const AMD_PERFORMANCE_COUNTERS: u32 = 0x8000_0022;

const ECX_PDCM: u32 = 1 << 15;
const ECX_X2APIC: u32 = 1 << 21;
const ECX_TSC_DEADLINE: u32 = 1 << 24;
const ECX_OSXSAVE: u32 = 1 << 27;
const ECX_HYPERVISOR: u32 = 1 << 31;
const EDX_APIC: u32 = 1 << 9;
const ECX_OSPKE: u32 = 1 << 4;
const EDX_INVARIANT_TSC: u32 = 1 << 8;
const AMD_ECX_PERFORMANCE: u32 = (1 << 23) | (1 << 24) | (1 << 28);
/// KVM_FEATURE_ASYNC_PF, _ASYNC_PF_VMEXIT and _ASYNC_PF_INT.
const EAX_ASYNC_PF: u32 = (1 << 4) | (1 << 10) | (1 << 14);

/// What KVM supports here, as it reports it.
pub(crate) fn supported(kvm: &Kvm) -> Result<CpuId, VmError> {
    kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).kvm("KVM_GET_SUPPORTED_CPUID")
}

/// What vCPU `index` of a new guest is shown.
pub(crate) fn for_guest(kvm: &Kvm, supported: &CpuId, index: u8) -> CpuId {
    let deadline = kvm.check_extension(Cap::TscDeadlineTimer);
    let mut cpuid = supported.clone();
    for entry in cpuid.as_mut_slice() {
        mask(entry, deadline);
        identify(entry, index);
    }
    cpuid
}

fn mask(entry: &mut kvm_cpuid_entry2, deadline: bool) {
    match entry.function {
        FEATURES => {
            entry.ecx &= !ECX_PDCM;
            entry.ecx |= ECX_HYPERVISOR;
            if deadline {
                entry.ecx |= ECX_TSC_DEADLINE;
            }
        }
        PERFORMANCE_COUNTERS | AMD_PERFORMANCE_COUNTERS => {
            (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0);
        }
        KVM_FEATURES => entry.eax &= !EAX_ASYNC_PF,
        AMD_FEATURES => entry.ecx &= !AMD_ECX_PERFORMANCE,
        POWER_MANAGEMENT => entry.edx &= !EDX_INVARIANT_TSC,
        _ => {}
    }
}

/// Puts in the vCPU's own number.
fn identify(entry: &mut kvm_cpuid_entry2, index: u8) {
    if entry.function == FEATURES {
        entry.ebx = (entry.ebx & 0x00ff_ffff) | u32::from(index) << 24;
    } else if TOPOLOGY.contains(&entry.function) {
        entry.edx = u32::from(index);
    }
}

/// A register of a leaf whose bits each stand for a feature, and those bits of it that a host
/// need not report to have them (they mirror the guest's own settings, or KVM adds them).
struct FeatureWord {
    function: u32,
    index: u32,
    name: &'static str,
    read: fn(&kvm_cpuid_entry2) -> u32,
    ignore: u32,
}

const fn word(
    function: u32,
    index: u32,
    name: &'static str,
    read: fn(&kvm_cpuid_entry2) -> u32,
    ignore: u32,
) -> FeatureWord {
    FeatureWord { function, index, name, read, ignore }
}

const FEATURE_WORDS: [FeatureWord; 15] = [
    word(FEATURES, 0, "ecx", |e| e.ecx, ECX_OSXSAVE | ECX_HYPERVISOR | ECX_X2APIC | ECX_TSC_DEADLINE),
    word(FEATURES, 0, "edx", |e| e.edx, EDX_APIC),
    word(7, 0, "ebx", |e| e.ebx, 0),
    word(7, 0, "ecx", |e| e.ecx, ECX_OSPKE),
    word(7, 0, "edx", |e| e.edx, 0),
    word(7, 1, "eax", |e| e.eax, 0),
    word(0xd, 0, "eax", |e| e.eax, 0),
    word(0xd, 0, "edx", |e| e.edx, 0),
    word(0xd, 1, "eax", |e| e.eax, 0),
    word(KVM_FEATURES, 0, "eax", |e| e.eax, 0),
    word(AMD_FEATURES, 0, "ecx", |e| e.ecx, 0),
    word(AMD_FEATURES, 0, "edx", |e| e.edx, EDX_APIC),
    word(POWER_MANAGEMENT, 0, "edx", |e| e.edx, 0),
    word(0x8000_0008, 0, "ebx", |e| e.ebx, 0),
    word(0x8000_0021, 0, "eax", |e| e.eax, 0),
];

fn find(entries: &[kvm_cpuid_entry2], function: u32, index: u32) -> Option<&kvm_cpuid_entry2> {
    entries.iter().find(|entry| entry.function == function && entry.index == index)
}

/// Refuses a guest that was shown features which `host` does not support.
///
/// Errors: another processor vendor, or the missing features by leaf, register and bit.
pub(crate) fn check(guest: &[kvm_cpuid_entry2], host: &[kvm_cpuid_entry2]) -> Result<(), StateError> {
    let vendor = |entries| find(entries, VENDOR, 0).map(|e| (e.ebx, e.edx, e.ecx));
    if vendor(guest) != vendor(host) {
        return Err(StateError::Cpu("a processor of the same vendor".into()));
    }
    let missing: Vec<String> = FEATURE_WORDS.iter().filter_map(|word| missing(word, guest, host)).collect();
    match missing.is_empty() {
        true => Ok(()),
        false => Err(StateError::Cpu(missing.join(", "))),
    }
}

fn missing(word: &FeatureWord, guest: &[kvm_cpuid_entry2], host: &[kvm_cpuid_entry2]) -> Option<String> {
    let read = |entries| find(entries, word.function, word.index).map_or(0, word.read);
    let bits = read(guest) & !read(host) & !word.ignore;
    let list: Vec<String> = (0..32).filter(|bit| bits >> bit & 1 == 1).map(|bit| bit.to_string()).collect();
    let FeatureWord { function, index, name, .. } = word;
    (bits != 0).then(|| format!("CPUID {function:#x}.{index} {name} bit {}", list.join("+")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(function: u32, ecx: u32, edx: u32) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 { function, ecx, edx, ..Default::default() }
    }

    #[test]
    fn a_missing_feature_is_named_and_a_mirrored_one_is_not() {
        let host = [entry(0, 1, 2), entry(1, 0, 0)];
        assert_eq!(check(&[entry(0, 1, 2), entry(1, ECX_OSXSAVE, EDX_APIC)], &host), Ok(()));
        let error = check(&[entry(0, 1, 2), entry(1, 1 << 28, 0)], &host).unwrap_err();
        assert_eq!(error, StateError::Cpu("CPUID 0x1.0 ecx bit 28".into()));
        assert!(matches!(check(&[entry(0, 9, 9)], &host), Err(StateError::Cpu(_))));
    }

    #[test]
    fn a_guest_is_not_shown_what_does_not_migrate() {
        let mut power = entry(POWER_MANAGEMENT, 0, u32::MAX);
        mask(&mut power, true);
        assert_eq!(power.edx & EDX_INVARIANT_TSC, 0);
        let mut kvm = kvm_cpuid_entry2 { function: KVM_FEATURES, eax: u32::MAX, ..Default::default() };
        mask(&mut kvm, true);
        assert_eq!(kvm.eax & EAX_ASYNC_PF, 0);
        assert_ne!(kvm.eax & (1 << 3), 0, "kvmclock stays");
    }
}
