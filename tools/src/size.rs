//! Sizes as people write them.

/// A number of bytes with an optional suffix: K, M or G (powers of 1024), also as KiB, MiB, GiB.
///
/// Errors: one line that says what to write instead.
pub fn parse(text: &str) -> Result<u64, String> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let shift = match &text[digits.len()..] {
        "" => 0,
        "K" | "k" | "KiB" => 10,
        "M" | "m" | "MiB" => 20,
        "G" | "g" | "GiB" => 30,
        other => return Err(format!("unknown suffix `{other}`; use K, M or G")),
    };
    let number: u64 =
        digits.parse().map_err(|_| format!("`{text}` is no size; write something like 4K or 256M"))?;
    number.checked_mul(1 << shift).ok_or_else(|| format!("{text} is more than this machine can count"))
}

/// The shortest exact way to write a number of bytes: `4K`, `1M`, `100`.
pub fn short(bytes: u64) -> String {
    match bytes {
        0 => "0".into(),
        _ if bytes.is_multiple_of(1 << 30) => format!("{}G", bytes >> 30),
        _ if bytes.is_multiple_of(1 << 20) => format!("{}M", bytes >> 20),
        _ if bytes.is_multiple_of(1 << 10) => format!("{}K", bytes >> 10),
        _ => bytes.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        assert_eq!(parse("256M"), Ok(256 << 20));
        assert_eq!(parse("4096"), Ok(4096));
        assert_eq!(parse("2GiB"), Ok(2 << 30));
        for bad in ["", "M", "1X", "-1", "99999999999G", "4KK"] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn what_is_written_is_read_back() {
        for bytes in [1, 100, 1023, 1024, 1536, 4096, 1 << 20, 3 << 30] {
            assert_eq!(parse(&short(bytes)), Ok(bytes));
        }
    }
}
