//! Writes the tiny guest as an ELF file: `tiny FILE`.

fn main() -> std::io::Result<()> {
    let path = std::env::args().nth(1).ok_or_else(|| std::io::Error::other("usage: tiny FILE"))?;
    std::fs::write(path, postcopy_guest::tiny::tiny_elf())
}
