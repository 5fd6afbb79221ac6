//! The VMM that the engine is embedded in: as small as one can be. Nothing in this file is about migration.
//!
//! Its guest is one vCPU that runs [`PROGRAM`] in 32-bit mode without paging: for ever, it picks one of 16384 pages
//! by a generator of random numbers and counts up the word at its beginning. So its registers tell what every page
//! has to hold, and [`Machine::audit`] compares that with all of it.

use std::error::Error;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use kvm_bindings::{kvm_regs, kvm_segment, kvm_sregs, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use postcopy_engine::memory::{GuestMemory, LayoutError, MemoryLayout, PAGE_SIZE};
use serde::{Deserialize, Serialize};

/// What goes wrong here, in words.
pub(crate) type Failure = Box<dyn Error + Send + Sync>;

const PROGRAM_AT: u64 = 0x1000;
const COUNTERS_AT: u64 = 1 << 20;
const COUNTERS: u64 = 16384;
const FACTOR: u32 = 1_664_525;
const ADDEND: u32 = 1_013_904_223;

#[rustfmt::skip]
const PROGRAM: [u8; 38] = [
    0x69, 0xc0, 0x0d, 0x66, 0x19, 0x00, // next:  imul eax, eax, FACTOR
    0x05, 0x5f, 0xf3, 0x6e, 0x3c,       //        add  eax, ADDEND
    0x89, 0xc3,                         //        mov  ebx, eax
    0xc1, 0xeb, 0x12,                   //        shr  ebx, 18            the upper 14 bits
    0xc1, 0xe3, 0x0c,                   //        shl  ebx, 12            the page's address
    0xff, 0x83, 0x00, 0x00, 0x10, 0x00, //        inc  dword [ebx + COUNTERS_AT]
    0x47,                               //        inc  edi                how often so far
    0xf7, 0xc7, 0xff, 0x00, 0x00, 0x00, //        test edi, 0xff
    0x75, 0xde,                         //        jnz  next
    0xe6, 0x80,                         //        out  0x80, al           lets the VMM look up
    0xeb, 0xda,                         //        jmp  next
];

/// All that this guest is, but for its memory.
#[derive(Serialize, Deserialize)]
pub(crate) struct State {
    regs: kvm_regs,
    sregs: kvm_sregs,
}

/// A guest: a virtual machine, its memory, and its vCPU, which runs in a thread or stands still.
pub(crate) struct Machine {
    vcpu: Vcpu,
    stop: Arc<AtomicBool>,
    _vm: VmFd,
    memory: GuestMemory,
}

enum Vcpu {
    Still(VcpuFd),
    Running(JoinHandle<Result<VcpuFd, Failure>>),
    /// It failed, and has said why.
    Gone,
}

/// 1 MiB for the program, 64 MiB for its counters.
pub(crate) fn layout() -> Result<MemoryLayout, LayoutError> {
    MemoryLayout::pc(COUNTERS_AT + COUNTERS * PAGE_SIZE, 3 << 30)
}

impl Machine {
    /// A machine over `memory`, which it does not touch.
    pub(crate) fn new(memory: GuestMemory) -> Result<Self, Failure> {
        let vm = Kvm::new()?.create_vm()?;
        vm.set_tss_address(0xfffb_d000)?;
        for (slot, region) in (0u32..).zip(memory.layout().regions()) {
            let host = memory.guest().at(region.offset, usize::try_from(region.len)?);
            let slot = kvm_userspace_memory_region {
                slot,
                flags: 0,
                guest_phys_addr: region.gpa.0,
                memory_size: region.len,
                userspace_addr: host.ok_or("the memory is smaller than its layout")? as u64,
            };
            // SAFETY: the range is all in the guest mapping, and no other slot has it. `memory`, which keeps
            // it, is kept by whoever can enter the guest: this machine, and its vCPU's thread.
            unsafe { vm.set_user_memory_region(slot) }?;
        }
        let vcpu = Vcpu::Still(vm.create_vcpu(0)?);
        Ok(Self { vcpu, stop: Arc::default(), _vm: vm, memory })
    }

    /// Fills the memory and sets the vCPU to the program's beginning.
    pub(crate) fn boot(&mut self) -> Result<(), Failure> {
        for page in 0..COUNTERS {
            self.write(COUNTERS_AT + page * PAGE_SIZE, &expected(page, 0))?;
        }
        self.write(PROGRAM_AT, &PROGRAM)?;
        let mut sregs = self.still()?.get_sregs()?;
        let flat = kvm_segment {
            limit: u32::MAX,
            selector: 16,
            type_: 3,
            present: 1,
            db: 1,
            s: 1,
            g: 1,
            ..sregs.ds
        };
        (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (flat, flat, flat, flat, flat);
        sregs.cs = kvm_segment { base: 0, selector: 8, type_: 11, ..flat };
        sregs.cr0 |= 1; // protected mode
        let regs = kvm_regs { rip: PROGRAM_AT, rflags: 2, ..kvm_regs::default() };
        self.load(&State { regs, sregs })
    }

    fn write(&self, at: u64, bytes: &[u8]) -> Result<(), Failure> {
        let written = self.memory.guest().write(at, bytes);
        if written { Ok(()) } else { Err("the memory is smaller than its layout".into()) }
    }

    /// Lets the guest run.
    pub(crate) fn start(&mut self) -> Result<(), Failure> {
        let Vcpu::Still(mut vcpu) = std::mem::replace(&mut self.vcpu, Vcpu::Gone) else {
            return Err("the guest runs already".into());
        };
        self.stop.store(false, Ordering::Relaxed);
        let (stop, memory) = (self.stop.clone(), self.memory.clone());
        // A touch of a page that is not here waits in KVM_RUN until the engine has brought it.
        self.vcpu = Vcpu::Running(std::thread::spawn(move || {
            let _kept = memory;
            loop {
                match vcpu.run()? {
                    VcpuExit::IoOut(0x80, _) if stop.load(Ordering::Relaxed) => break,
                    VcpuExit::IoOut(0x80, _) => {}
                    other => return Err(format!("the guest left its program: {other:?}").into()),
                }
            }
            // The kernel ends the instruction that it left for when it is entered again.
            vcpu.set_kvm_immediate_exit(1);
            let left = vcpu.run().map(|exit| format!("{exit:?}"));
            vcpu.set_kvm_immediate_exit(0);
            match left {
                Err(error) if error.errno() == libc::EINTR => Ok(vcpu),
                other => Err(format!("the guest does not stop: {other:?}").into()),
            }
        }));
        Ok(())
    }

    /// Stops the guest between two instructions.
    pub(crate) fn stop(&mut self) -> Result<(), Failure> {
        self.stop.store(true, Ordering::Relaxed);
        match std::mem::replace(&mut self.vcpu, Vcpu::Gone) {
            Vcpu::Running(thread) => {
                self.vcpu = Vcpu::Still(thread.join().map_err(|_| "the vCPU's thread panicked")??);
            }
            other => self.vcpu = other,
        }
        Ok(())
    }

    /// The state of a guest that stands still.
    pub(crate) fn save(&self) -> Result<State, Failure> {
        let vcpu = self.still()?;
        Ok(State { regs: vcpu.get_regs()?, sregs: vcpu.get_sregs()? })
    }

    /// Takes a state in.
    pub(crate) fn load(&self, state: &State) -> Result<(), Failure> {
        let vcpu = self.still()?;
        vcpu.set_sregs(&state.sregs)?;
        Ok(vcpu.set_regs(&state.regs)?)
    }

    fn still(&self) -> Result<&VcpuFd, Failure> {
        match &self.vcpu {
            Vcpu::Still(vcpu) => Ok(vcpu),
            _ => Err("the guest runs, or has failed".into()),
        }
    }

    /// How often a guest that stands still has counted, and how many of its pages are not byte for byte what they
    /// have to be after that.
    pub(crate) fn audit(&self) -> Result<(u64, usize), Failure> {
        let steps = self.save()?.regs.rdi;
        let (mut random, mut counted) = (0u32, vec![0u32; COUNTERS as usize]);
        for _ in 0..steps {
            random = random.wrapping_mul(FACTOR).wrapping_add(ADDEND);
            counted[(random >> 18) as usize] += 1;
        }
        let mut page_now = [0; PAGE_SIZE as usize];
        let wrong = (0..COUNTERS).zip(counted).filter(|&(page, count)| {
            let read = self.memory.guest().read(COUNTERS_AT + page * PAGE_SIZE, &mut page_now);
            !read || page_now != expected(page, count)
        });
        Ok((steps, wrong.count()))
    }
}

/// A page whose word has been counted up `count` times: other content in each page and each word of it.
fn expected(page: u64, count: u32) -> [u8; PAGE_SIZE as usize] {
    let mut bytes = [0; PAGE_SIZE as usize];
    for (at, word) in bytes.chunks_exact_mut(8).enumerate() {
        word.copy_from_slice(&((page + 1) << 32 | at as u64).to_le_bytes());
    }
    bytes[..4].copy_from_slice(&count.to_le_bytes());
    bytes
}
