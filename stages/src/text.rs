//! Text for people: sizes, and names from elsewhere made harmless.

/// Bytes as people read them, in powers of 1024: `80.0 GiB`.
#[must_use]
#[allow(clippy::cast_precision_loss)] // three digits are shown
pub fn size(bytes: u64) -> String {
    const UNITS: [&str; 6] = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    if bytes < 1024 {
        return format!("{bytes} B");
    }
    let mut value = bytes as f64;
    let mut unit = "";
    for next in UNITS {
        if value < 1023.95 {
            break;
        }
        value /= 1024.0;
        unit = next;
    }
    format!("{value:.1} {unit}")
}

/// Seconds as people read them: `1.3 s`, `2 min 05 s`, `2 h 01 min`.
#[must_use]
pub fn time(seconds: f64) -> String {
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "rounded, and above zero")]
    let whole = seconds.round().max(0.0) as u64;
    match whole {
        0..10 => format!("{seconds:.1} s"),
        10..120 => format!("{whole} s"),
        120..7200 => format!("{} min {:02} s", whole / 60, whole % 60),
        _ => format!("{} h {:02} min", whole / 3600, whole % 3600 / 60),
    }
}

/// A name from the cloud or a file system with its control characters escaped, so that it cannot drive a terminal.
#[must_use]
pub fn printable(name: &str) -> String {
    // bidirectional overrides can disguise a name as well as an escape sequence can
    let harmful =
        |c: char| c.is_control() || matches!(c, '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
    name.chars().flat_map(|c| if harmful(c) { c.escape_default().collect::<Vec<_>>() } else { vec![c] }).collect()
}

/// A word for a POSIX shell, quoted if it has to be.
#[must_use]
pub fn shell_word(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "_-./:=@%+,".contains(c);
    if !word.is_empty() && word.chars().all(plain) { word.to_owned() } else { format!("'{}'", word.replace('\'', r"'\''")) }
}

/// An error and what caused it, the outermost first; a cause that says the same as what it caused is left out.
#[must_use]
pub fn chain(error: &dyn std::error::Error) -> Vec<String> {
    let mut lines: Vec<String> = std::iter::successors(Some(error), |error| error.source()).map(ToString::to_string).collect();
    lines.dedup();
    lines
}

/// An error with what caused it, on one line.
#[must_use]
pub fn causes(error: &dyn std::error::Error) -> String {
    // a list, one below the other, goes on the line, too
    chain(error).join(": ").lines().map(str::trim).collect::<Vec<_>>().join(" ")
}

/// So many of them: `1 image`, `2 images`.
#[must_use]
pub fn counted(number: usize, one: &str) -> String {
    format!("{number} {one}{}", if number == 1 { "" } else { "s" })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_in_powers_of_1024() {
        assert_eq!(size(0), "0 B");
        assert_eq!(size(1023), "1023 B");
        assert_eq!(size(80 << 30), "80.0 GiB");
        assert_eq!(size((1 << 20) - 1), "1.0 MiB");
    }

    #[test]
    fn times_are_as_fine_as_anybody_wants_them() {
        assert_eq!([time(1.26), time(59.7), time(125.0), time(7265.0)], ["1.3 s", "60 s", "2 min 05 s", "2 h 01 min"]);
    }

    #[test]
    fn an_error_with_a_list_is_one_line_and_one_thing_is_singular() {
        let error = std::io::Error::other("shared with:\n    a\n    b");
        assert_eq!(causes(&error), "shared with: a b");
        assert_eq!([counted(0, "image"), counted(1, "image"), counted(12, "image")], ["0 images", "1 image", "12 images"]);
    }

    #[test]
    fn control_characters_cannot_reach_a_terminal() {
        assert_eq!(printable("a\x1b[2Jb\n"), "a\\u{1b}[2Jb\\n");
        assert_eq!(printable("naïve ☃"), "naïve ☃");
        assert_eq!(shell_word("it's"), r"'it'\''s'");
    }
}
