//! Text from elsewhere, made safe to show; errors on one line.

/// An error and its causes on one line, without those that the line says already.
pub fn one_line(error: &anyhow::Error) -> String {
    let mut line = error.to_string();
    for cause in error.chain().skip(1).map(ToString::to_string) {
        if !line.contains(&cause) {
            line = format!("{line}: {cause}");
        }
    }
    printable(&line, usize::MAX)
}

/// At most `longest` characters of a text that a peer or a file gave, control characters (which
/// could command a terminal) replaced by blanks.
pub fn printable(text: &str, longest: usize) -> String {
    let shown = text.chars().map(|c| if c.is_control() { ' ' } else { c });
    let mut out: String = shown.take(longest).collect();
    if text.chars().nth(longest).is_some() {
        out.push('…');
    }
    out
}

/// A time since 1970 in seconds as a date, such as `2026-01-31 12:00:00 UTC`.
pub fn date(unix_s: f64) -> String {
    let seconds = unix_s.clamp(0.0, 4e11) as u64;
    let (days, rest) = (seconds / 86_400, seconds % 86_400);
    // Days in eras of 400 years that begin in March, so that the leap day is the last of a year.
    let shifted = days + 719_468;
    let (era, day) = (shifted / 146_097, shifted % 146_097);
    let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
    let of_year = day - (365 * year + year / 4 - year / 100);
    let month = (5 * of_year + 2) / 153;
    let of_month = of_year - (153 * month + 2) / 5 + 1;
    let (month, next) = if month < 10 { (month + 3, 0) } else { (month - 9, 1) };
    let year = year + era * 400 + next;
    let (hour, minute, second) = (rest / 3600, rest / 60 % 60, rest % 60);
    format!("{year}-{month:02}-{of_month:02} {hour:02}:{minute:02}:{second:02} UTC")
}

/// Text for HTML or SVG, in an element or a quoted attribute.
pub fn escape(text: &str) -> String {
    text.chars().fold(String::with_capacity(text.len()), |mut out, c| {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            c => out.push(c),
        }
        out
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_peer_says_commands_no_terminal_and_no_browser() {
        assert_eq!(printable("a\x1b[2J\nb", 80), "a [2J b");
        assert_eq!(printable("abcdef", 3), "abc…");
        assert_eq!(escape("<b a='1' c=\"2\">&"), "&lt;b a=&#39;1&#39; c=&quot;2&quot;&gt;&amp;");
    }

    #[test]
    fn dates() {
        assert_eq!(date(0.0), "1970-01-01 00:00:00 UTC");
        assert_eq!(date(951_782_400.0), "2000-02-29 00:00:00 UTC");
        assert_eq!(date(1_795_403_919.9), "2026-11-23 03:18:39 UTC");
    }

    #[test]
    fn a_cause_that_is_said_already_is_not_said_again() {
        let error = anyhow::anyhow!("no such file").context("reading x: no such file").context("setting up");
        assert_eq!(one_line(&error), "setting up: reading x: no such file");
    }
}
