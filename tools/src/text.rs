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
    fn a_cause_that_is_said_already_is_not_said_again() {
        let error = anyhow::anyhow!("no such file").context("reading x: no such file").context("setting up");
        assert_eq!(one_line(&error), "setting up: reading x: no such file");
    }
}
