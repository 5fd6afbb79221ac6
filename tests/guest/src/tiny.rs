//! A guest of a few hundred instructions, for hosts where booting Linux would take too long.
//!
//! It is entered as the Linux 64-bit boot protocol enters a kernel (RSI on the zero page) and
//! needs a serial port at 0x3f8, nothing else: no interrupts, no timer. It finds its memory in
//! the memory map and prints, one line each:
//!
//! * `tiny: up` at the start;
//! * `tiny: round N ok` after each round: in a round it writes [`word_at`] of that round to
//!   [`TinyGuest::words_per_page`] places of each page from 2 MiB to the end of the memory that
//!   starts at 1 MiB, having verified before each write what the round before has written;
//! * `tiny: BAD page P` for each word that is not what it should be (P is the guest physical
//!   address divided by 4096), and then `tiny: round N bad M` at the round's end;
//! * `tiny: got C` for each character C typed at it, looked for after each round. `q` resets the
//!   machine and `t` ends it in a triple fault.

use std::arch::global_asm;

/// Where the tiny guest's code is loaded; its pages are not tested.
const LOAD_ADDRESS: u64 = 1 << 20;

/// First byte of the memory that it writes and verifies.
pub const TESTED_FROM: u64 = 2 << 20;

const ROUND_FACTOR: u64 = 0x9e37_79b9_7f4a_7c15;
const MIX_FACTOR: u64 = 0xbf58_476d_1ce4_e5b9;
const PARAMETER_BYTES: u64 = 32;

global_asm!(
    ".pushsection .rodata.postcopy_tiny_guest, \"a\", @progbits",
    ".p2align 4",
    "postcopy_tiny_start:",
    "2: .quad 0", // words a page
    "3: .quad 0", // bytes from one word to the next
    "4: .quad 0", // rounds before it resets itself, 0 for never
    "5: .quad 0",
    // The end of the memory that starts at 1 MiB, from the memory map: r15.
    "   movzx ecx, byte ptr [rsi + 0x1e8]",
    "   lea rdi, [rsi + 0x2d0]",
    "6: mov rax, [rdi]",
    "   cmp rax, 0x100000",
    "   je 7f",
    "   add rdi, 20",
    "   dec ecx",
    "   jnz 6b",
    "   jmp 30f",
    "7: add rax, [rdi + 8]",
    "   mov r15, rax",
    "   lea rdi, [rip + 50f]",
    "   call 40f",
    "   mov r14, 1",
    // A round: r14 its number, r13 the page, r12 bad words so far.
    "8: xor r12d, r12d",
    "   mov r13, 0x200000",
    "9: mov rbx, [rip + 2b]",
    "   mov rdi, r13",
    "60: cmp r14, 1",
    "   je 12f",
    "   lea rax, [r14 - 1]",
    "   movabs rdx, {round_factor}",
    "   imul rax, rdx",
    "   xor rax, rdi",
    "   movabs rdx, {mix_factor}",
    "   imul rax, rdx",
    "   cmp rax, [rdi]",
    "   je 12f",
    "   inc r12",
    "   push rdi",
    "   lea rdi, [rip + 51f]",
    "   call 40f",
    "   mov rax, r13",
    "   shr rax, 12",
    "   call 43f",
    "   call 46f",
    "   pop rdi",
    "12: mov rax, r14",
    "   movabs rdx, {round_factor}",
    "   imul rax, rdx",
    "   xor rax, rdi",
    "   movabs rdx, {mix_factor}",
    "   imul rax, rdx",
    "   mov [rdi], rax",
    "   add rdi, [rip + 3b]",
    "   dec rbx",
    "   jnz 60b",
    "   add r13, 0x1000",
    "   cmp r13, r15",
    "   jb 9b",
    // The round's end.
    "   lea rdi, [rip + 52f]",
    "   call 40f",
    "   mov rax, r14",
    "   call 43f",
    "   test r12, r12",
    "   jnz 13f",
    "   lea rdi, [rip + 53f]",
    "   call 40f",
    "   jmp 14f",
    "13: lea rdi, [rip + 54f]",
    "   call 40f",
    "   mov rax, r12",
    "   call 43f",
    "   call 46f",
    // Typed characters.
    "14: mov dx, 0x3fd",
    "   in al, dx",
    "   test al, 1",
    "   jz 16f",
    "   mov dx, 0x3f8",
    "   in al, dx",
    "   movzx ebx, al",
    "   lea rdi, [rip + 55f]",
    "   call 40f",
    "   mov al, bl",
    "   call 42f",
    "   call 46f",
    "   cmp bl, 'q'",
    "   je 20f",
    "   cmp bl, 't'",
    "   je 21f",
    "   jmp 14b",
    "16: cmp r14, [rip + 4b]",
    "   je 20f",
    "   inc r14",
    "   jmp 8b",
    // The ends: reset, triple fault (the interrupt table is empty), nothing to do.
    "20: mov al, 0xfe",
    "   out 0x64, al",
    "   jmp 20b",
    "21: ud2",
    "30: hlt",
    "   jmp 30b",
    // Prints the zero-terminated text at rdi.
    "40: mov al, [rdi]",
    "   test al, al",
    "   jz 41f",
    "   call 42f",
    "   inc rdi",
    "   jmp 40b",
    "41: ret",
    // Prints al.
    "42: mov dx, 0x3f8",
    "   out dx, al",
    "   ret",
    // Prints rax in decimal.
    "43: xor ecx, ecx",
    "   mov r8d, 10",
    "44: xor edx, edx",
    "   div r8",
    "   push rdx",
    "   inc ecx",
    "   test rax, rax",
    "   jnz 44b",
    "45: pop rax",
    "   add al, '0'",
    "   call 42b",
    "   dec ecx",
    "   jnz 45b",
    "   ret",
    // Prints a line end.
    "46: mov al, 10",
    "   jmp 42b",
    "50: .asciz \"tiny: up\\n\"",
    "51: .asciz \"tiny: BAD page \"",
    "52: .asciz \"tiny: round \"",
    "53: .asciz \" ok\\n\"",
    "54: .asciz \" bad \"",
    "55: .asciz \"tiny: got \"",
    "postcopy_tiny_end:",
    ".popsection",
    round_factor = const ROUND_FACTOR as i64,
    mix_factor = const MIX_FACTOR as i64,
);

unsafe extern "C" {
    #[link_name = "postcopy_tiny_start"]
    static START: u8;
    #[link_name = "postcopy_tiny_end"]
    static END: u8;
}

/// The program as assembled.
fn program() -> &'static [u8] {
    let (start, end) = (&raw const START, &raw const END);
    // SAFETY: both symbols delimit one run of bytes in this program's read-only data, which is
    // initialised and never written.
    unsafe { std::slice::from_raw_parts(start, end.addr() - start.addr()) }
}

/// What the guest does; see the module.
#[derive(Clone, Copy, Debug)]
pub struct TinyGuest {
    /// Words written and verified in each page, evenly spread: a power of two up to 512. A host
    /// that emulates each instruction does about 10,000 pages a second with 8.
    pub words_per_page: u64,
    /// It resets the machine after so many rounds; 0 for never.
    pub rounds: u64,
}

impl Default for TinyGuest {
    fn default() -> Self {
        Self { words_per_page: 8, rounds: 0 }
    }
}

impl TinyGuest {
    /// The guest as an ELF64 file to boot.
    ///
    /// Panics if `words_per_page` is not a power of two up to 512.
    pub fn elf(&self) -> Vec<u8> {
        assert!(self.words_per_page.is_power_of_two() && self.words_per_page <= 512);
        let mut program = program().to_vec();
        let parameters = [self.words_per_page, 4096 / self.words_per_page, self.rounds];
        for (place, value) in program.chunks_exact_mut(8).zip(parameters) {
            place.copy_from_slice(&value.to_le_bytes());
        }
        let mut file = elf_header(program.len() as u64);
        file.extend(program);
        file
    }
}

/// The tiny guest that runs for ever.
pub fn tiny_elf() -> Vec<u8> {
    TinyGuest::default().elf()
}

/// What the guest writes to `gpa` in `round`.
pub fn word_at(gpa: u64, round: u64) -> u64 {
    (round.wrapping_mul(ROUND_FACTOR) ^ gpa).wrapping_mul(MIX_FACTOR)
}

/// An ELF header and one program header for a segment of `len` bytes that follows them.
fn elf_header(len: u64) -> Vec<u8> {
    const HEADERS: u64 = 64 + 56;
    let mut out = vec![0x7f, b'E', b'L', b'F', 2, 1, 1, 0];
    out.extend([0; 8]);
    let halves = |out: &mut Vec<u8>, values: &[u16]| values.iter().for_each(|v| out.extend(v.to_le_bytes()));
    let words = |out: &mut Vec<u8>, values: &[u64]| values.iter().for_each(|v| out.extend(v.to_le_bytes()));
    halves(&mut out, &[2, 62, 1, 0]); // executable, x86-64, version 1
    words(&mut out, &[LOAD_ADDRESS + PARAMETER_BYTES, 64, 0]); // entry, program headers, sections
    halves(&mut out, &[0, 0, 64, 56, 1, 0, 0, 0]); // flags, header sizes, one program header
    halves(&mut out, &[1, 0, 7, 0]); // loadable; readable, writable, executable
    words(&mut out, &[HEADERS, LOAD_ADDRESS, LOAD_ADDRESS, len, len, 4096]);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_file_is_an_elf_with_its_parameters_in_place() {
        let file = TinyGuest { words_per_page: 16, rounds: 3 }.elf();
        assert!(file.starts_with(b"\x7fELF"));
        let program = &file[120..];
        assert_eq!(program[..8], 16u64.to_le_bytes());
        assert_eq!(program[8..16], 256u64.to_le_bytes());
        assert_eq!(program[16..24], 3u64.to_le_bytes());
        assert!(program.len() < 4096, "{} bytes", program.len());
    }
}
