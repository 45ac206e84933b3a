//! What hands used to `qemu-img` and `openstack` type, and what it is called here.

use std::ffi::OsString;

/// A hint if the arguments of `convert` are qemu-img's.
pub fn hint(arguments: impl IntoIterator<Item = OsString>) -> Option<String> {
    let arguments: Vec<String> = arguments.into_iter().skip(1).map(|argument| argument.to_string_lossy().into_owned()).collect();
    if arguments.first().map(String::as_str) != Some("convert") {
        return None;
    }
    let mut rest = arguments.iter().skip(1).peekable();
    while let Some(argument) = rest.next() {
        let next = rest.peek().map(|next| next.as_str());
        let hint = match argument.as_str() {
            "--" => return None,
            "-O" => "-O FORMAT is qemu-img's: virta always makes qcow2, so leave it out",
            "-Oqcow2" => "-O FORMAT is qemu-img's: virta always makes qcow2, so leave it out",
            "-c" => "-c is qemu-img's: here it is --compress zlib, or --compress zstd",
            "-W" => "-W is qemu-img's: virta always works in parallel, so leave it out",
            "-p" => "-p is qemu-img's: virta shows progress by itself (--progress none hides it)",
            "-f" if matches!(next, Some("raw" | "qcow2")) => {
                "-f is the output format here, as with openstack (table, json, value): the source's format is found from its bytes"
            }
            "-S" | "-m" | "-t" | "-T" | "-o" => "that flag is qemu-img's; see virta help convert for what there is",
            _ => continue,
        };
        return Some(format!("{hint}.\nTry: virta convert SOURCE DESTINATION"));
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn qemu_imgs_flags_are_explained_and_ours_are_not_touched() {
        let hint_for = |line: &str| hint(line.split(' ').map(OsString::from));
        assert!(hint_for("virta convert -O qcow2 a b").unwrap().contains("always makes qcow2"));
        assert!(hint_for("virta convert -f raw a b").unwrap().contains("output format"));
        assert!(hint_for("virta convert -p a b").unwrap().contains("progress"));
        assert_eq!(hint_for("virta convert -f json a b"), None);
        assert_eq!(hint_for("virta demo"), None);
    }
}
