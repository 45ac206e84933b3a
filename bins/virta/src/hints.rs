//! What hands used to `qemu-img` and `openstack` type, and what it is called here.

use std::ffi::OsString;

/// Flags that `openstack` takes before the command, each with a value.
const GLOBAL: [&str; 4] = ["--os-cloud", "--os-region-name", "--os-interface", "--os-cacert"];

/// Puts flags that choose the cloud behind the command, where they stand here: `openstack --os-cloud X …` is a habit.
pub fn reordered(arguments: impl IntoIterator<Item = OsString>) -> Vec<OsString> {
    let mut arguments = arguments.into_iter();
    let mut ordered: Vec<OsString> = arguments.by_ref().take(1).collect();
    let mut early = Vec::new();
    while let Some(argument) = arguments.next() {
        let text = argument.to_string_lossy().into_owned();
        let with_value = GLOBAL.iter().any(|flag| text.strip_prefix(flag).is_some_and(|rest| rest.starts_with('=')));
        if GLOBAL.contains(&text.as_str()) {
            early.push(argument);
            early.extend(arguments.next());
        } else if with_value || text == "--insecure" {
            early.push(argument);
        } else {
            ordered.push(argument);
            break;
        }
    }
    ordered.extend(arguments);
    // behind `--` nothing is a flag
    let end = ordered.iter().position(|argument| argument == "--").unwrap_or(ordered.len());
    ordered.splice(end..end, early);
    ordered
}

/// A hint if the arguments are those of `openstack`, for what has another name here.
fn openstack_hint(words: &[String]) -> Option<&'static str> {
    let word = |at: usize| words.get(at).map_or("", String::as_str);
    let has = |flag: &str| words.iter().any(|word| word == flag);
    Some(match (word(0), word(1)) {
        ("image", "save") => "virta download IMAGE FILE",
        ("image", "create") => "virta upload FILE NAME",
        ("image", "unset") => "virta image set --remove-property KEY, or --remove-tag TAG",
        ("image", "add") => "virta share IMAGE PROJECT",
        ("image", "remove") => "virta unshare IMAGE PROJECT",
        ("image", "member") => "virta members IMAGE",
        ("image", "set") if has("--accept") => "virta accept IMAGE",
        ("image", "set") if has("--reject") => "virta reject IMAGE",
        ("image", "set") if has("--shared") => "virta share IMAGE PROJECT (it makes the image shared)",
        ("image", "set") if has("--private") || has("--public") || has("--community") => {
            "virta share and virta unshare; visibility stays with openstack image set"
        }
        ("image", "set") if has("--description") => "virta image set --property description=TEXT",
        ("server", "image") => "virta snapshot SERVER NAME",
        ("server", "stop" | "start") => "virta snapshot stops and starts by itself; else that stays with openstack",
        ("server", _) => "servers stay with openstack; virta snapshot SERVER NAME makes an image of one",
        ("list" | "ls", _) => "virta image list",
        ("show", _) => "virta image show IMAGE",
        ("delete" | "rm", _) => "virta image delete IMAGE",
        _ => return None,
    })
}

/// A hint if the arguments are openstack's, or those of `convert` are qemu-img's.
pub fn hint(arguments: impl IntoIterator<Item = OsString>) -> Option<String> {
    let arguments: Vec<String> = arguments.into_iter().skip(1).map(|argument| argument.to_string_lossy().into_owned()).collect();
    if let Some(here) = openstack_hint(&arguments) {
        return Some(format!("here that is: {here}"));
    }
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
        assert!(hint_for("virta image save --file x y").unwrap().contains("virta download"));
        assert!(hint_for("virta image set --accept x").unwrap().contains("virta accept"));
        assert_eq!(hint_for("virta image set --name x y"), None);
    }

    #[test]
    fn the_cloud_can_be_chosen_before_the_command() {
        let line = |line: &str| {
            let words = reordered(line.split(' ').map(OsString::from));
            words.iter().map(|word| word.to_string_lossy().into_owned()).collect::<Vec<_>>().join(" ")
        };
        assert_eq!(line("virta --os-cloud a --insecure image list"), "virta image list --os-cloud a --insecure");
        assert_eq!(line("virta --os-cloud=a convert -- x y"), "virta convert --os-cloud=a -- x y");
        assert_eq!(line("virta convert --os-cloud a x y"), "virta convert --os-cloud a x y");
        assert_eq!(line("virta --version"), "virta --version");
    }
}
