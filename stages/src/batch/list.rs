//! Wishes out of a file: one a line, CSV with a head line, or JSON (an array, or an object a line).
//!
//! Which it is, its first bytes tell: `[` or `{` is JSON, a first line that names the column `image` is CSV, anything else is a name or an
//! id a line. A `#` begins a comment line in a plain list.

use super::Request;

/// More than that in one list is a mistake, or an attack.
pub const WISHES_MAX: usize = 100_000;

/// Longest name of an image: Glance has 255 characters.
const WORD_BYTES_MAX: usize = 2048;

/// What is wrong with a list, and where.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("line {line}: {what}")]
pub struct ListError {
    /// Counted from 1.
    pub line: usize,
    /// What is wrong there.
    pub what: String,
}

fn at(line: usize, what: impl Into<String>) -> ListError {
    ListError { line, what: what.into() }
}

/// Reads a list.
///
/// # Errors
/// [`ListError`]; nothing of a list with an error is used.
pub fn parse(text: &str) -> Result<Vec<Request>, ListError> {
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let requests = match text.trim_start().chars().next() {
        Some('[') => array(text)?,
        Some('{') => objects(text)?,
        _ if is_csv(text) => csv(text)?,
        _ => lines(text)?,
    };
    if requests.len() > WISHES_MAX {
        return Err(at(WISHES_MAX + 1, format!("more than {WISHES_MAX} images")));
    }
    Ok(requests)
}

/// One request: JSON, or a name or an id. The form in which engines hand it over.
///
/// # Errors
/// [`ListError`].
pub fn parse_one(text: &str) -> Result<Request, ListError> {
    let mut requests = match text.trim_start().chars().next() {
        // a JSON string is what HyperQueue makes of a plain item
        Some('"') => vec![Request::of(&serde_json::from_str::<String>(text.trim()).map_err(|error| at(1, error.to_string()))?)],
        Some('{') => objects(text)?,
        Some('[') => return Err(at(1, "an array, where one image was expected")),
        _ if text.trim() == "null" => return Err(at(1, "null, where an image was expected")),
        _ => lines(text)?,
    };
    match requests.len() {
        1 => Ok(requests.remove(0)),
        0 => Err(at(1, "it is empty, where an image was expected")),
        more => Err(at(2, format!("{more} images, where one was expected"))),
    }
}

fn checked(request: Request, line: usize) -> Result<Request, ListError> {
    if request.image.trim().is_empty() {
        return Err(at(line, "image is empty"));
    }
    if request.image.len() > WORD_BYTES_MAX {
        return Err(at(line, "that is no image's name: it is far too long"));
    }
    Ok(request)
}

fn lines(text: &str) -> Result<Vec<Request>, ListError> {
    let mut requests = Vec::new();
    for (number, line) in text.lines().map(str::trim).enumerate().filter(|(_, line)| !line.is_empty() && !line.starts_with('#')) {
        if number == 0 && (line.starts_with("image;") || line.starts_with("image\t")) {
            return Err(at(1, "columns are separated by commas"));
        }
        requests.push(checked(Request::of(line), number + 1)?);
    }
    Ok(requests)
}

fn array(text: &str) -> Result<Vec<Request>, ListError> {
    #[derive(serde::Deserialize)]
    #[serde(untagged)]
    enum Item {
        Word(String),
        Request(Request),
    }
    // element by element, so that an error says more than that no variant fits
    let items: Vec<&serde_json::value::RawValue> =
        serde_json::from_str(text).map_err(|error| at(error.line(), error.to_string()))?;
    let mut requests = Vec::with_capacity(items.len());
    let mut line = 1;
    let mut passed = 0;
    for item in items {
        let start = item.get().as_ptr() as usize - text.as_ptr() as usize;
        line += text[passed..start].matches('\n').count();
        passed = start;
        let request = match item.get().starts_with('{') {
            true => serde_json::from_str(item.get()).map(Item::Request),
            false => serde_json::from_str(item.get()).map(Item::Word),
        };
        let request = match request.map_err(|error| at(line, error.to_string()))? {
            Item::Word(word) => Request::of(&word),
            Item::Request(request) => request,
        };
        requests.push(checked(request, line)?);
    }
    Ok(requests)
}

fn objects(text: &str) -> Result<Vec<Request>, ListError> {
    // a single one may be spread over lines
    if let Ok(request) = serde_json::from_str(text) {
        return Ok(vec![checked(request, 1)?]);
    }
    let mut requests = Vec::new();
    for (line, text) in text.lines().enumerate().filter(|(_, text)| !text.trim().is_empty()) {
        let request = serde_json::from_str(text).map_err(|error| at(line + 1, error.to_string()))?;
        requests.push(checked(request, line + 1)?);
    }
    Ok(requests)
}

fn is_csv(text: &str) -> bool {
    let head = text.lines().next().unwrap_or_default();
    head.trim() == "image"
        || head.contains(',') && head.split(',').any(|column| column.trim().trim_matches('"').eq_ignore_ascii_case("image"))
}

fn csv(text: &str) -> Result<Vec<Request>, ListError> {
    let wrong = |error: &::csv::Error, what: String| {
        let line = error.position().map_or(1, |position| usize::try_from(position.line()).unwrap_or(1));
        at(line, what)
    };
    let mut reader = ::csv::ReaderBuilder::new().trim(::csv::Trim::All).from_reader(text.as_bytes());
    let head = reader.headers().map_err(|error| wrong(&error, error.to_string()))?.clone();
    for (index, column) in head.iter().enumerate() {
        known(column).map_err(|what| at(1, what))?;
        // a property's name is what it is, in whatever case
        let same = |before: &str| before == column || property(column).is_none() && before.eq_ignore_ascii_case(column);
        if !column.is_empty() && head.iter().take(index).any(same) {
            return Err(at(1, format!("column {column:?} is there twice")));
        }
    }
    let mut requests = Vec::new();
    for record in reader.records() {
        let record = record.map_err(|error| match error.kind() {
            ::csv::ErrorKind::UnequalLengths { expected_len, len, .. } => {
                wrong(&error, format!("{len} columns, where the first line has {expected_len}"))
            }
            _ => wrong(&error, error.to_string()),
        })?;
        let line = record.position().map_or(1, |position| usize::try_from(position.line()).unwrap_or(1));
        let mut request = Request::default();
        for (column, value) in head.iter().zip(record.iter()) {
            set(&mut request, column, value).map_err(|what| at(line, what))?;
        }
        requests.push(checked(request, line)?);
    }
    Ok(requests)
}

/// One cell. An empty one says nothing.
fn set(request: &mut Request, column: &str, value: &str) -> Result<(), String> {
    let yes = |value: &str| match value.to_ascii_lowercase().as_str() {
        "yes" | "true" | "1" => Ok(Some(true)),
        "no" | "false" | "0" => Ok(Some(false)),
        other => Err(format!("{column} has to be yes or no, not {other:?}")),
    };
    let lower = column.to_ascii_lowercase();
    let text = || Some(value.to_owned());
    match lower.as_str() {
        "image" => value.clone_into(&mut request.image),
        _ if value.is_empty() => {}
        "name" => request.name = text(),
        "compress" => request.compress = text(),
        "verify" => request.verify = text(),
        "compress_level" => {
            request.compress_level =
                Some(value.parse().map_err(|_| format!("compress_level has to be a number, not {value:?}"))?);
        }
        "delete_source" => request.delete_source = yes(value)?,
        "replace" => request.replace = yes(value)?,
        "copy_members" => request.copy_members = yes(value)?,
        _ => match property(column) {
            Some(key) => drop(request.properties.insert(key.to_owned(), value.to_owned())),
            None => return Err(format!("{value:?} stands under a heading that is empty")),
        },
    }
    Ok(())
}

/// The property that a column is for.
fn property(column: &str) -> Option<&str> {
    let key = column.strip_prefix("property:").or_else(|| column.strip_prefix("property."));
    key.filter(|key| !key.is_empty())
}

/// Is a column of this name known?
fn known(column: &str) -> Result<(), String> {
    const COLUMNS: [&str; 8] =
        ["image", "name", "compress", "compress_level", "verify", "delete_source", "replace", "copy_members"];
    // spreadsheets leave such behind
    if column.is_empty() {
        return Ok(());
    }
    if property(column).is_some() || COLUMNS.contains(&column.to_ascii_lowercase().as_str()) {
        return Ok(());
    }
    Err(format!("column {column:?} is not known; there are {} and property:KEY", COLUMNS.join(", ")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_forms_of_a_list_say_the_same() {
        let plain = vec![Request::of("a b"), Request::of("c")];
        assert_eq!(parse("# mine\na b\n\n  c\n").unwrap(), plain);
        assert_eq!(parse("[\"a b\", {\"image\": \"c\"}]").unwrap(), plain);
        assert_eq!(parse("{\"image\":\"a b\"}\n{\"image\":\"c\"}\n").unwrap(), plain);
        assert_eq!(parse("name,image\n,a b\n,c\n").unwrap(), plain);
        assert_eq!(parse("{\n  \"image\": \"c\"\n}\n").unwrap(), [Request::of("c")]);
        assert_eq!(parse("").unwrap(), []);
        assert_eq!(parse("image\na b\nc\n").unwrap(), plain);
        let full = Request {
            name: Some("new, with a comma".into()),
            properties: [("os_distro".to_owned(), "debian".to_owned())].into(),
            compress: Some("zstd".into()),
            delete_source: Some(true),
            ..Request::of("c")
        };
        let csv = "image,name,property:os_distro,compress,delete_source\nc,\"new, with a comma\",debian,zstd,yes\n";
        assert_eq!(parse(csv).unwrap(), std::slice::from_ref(&full));
        let json = serde_json::to_string(&full).unwrap();
        assert_eq!(parse(&json).unwrap(), std::slice::from_ref(&full));
        assert_eq!(parse_one(&json).unwrap(), full);
        assert_eq!(parse_one("\"a b\"").unwrap(), Request::of("a b"));
        assert_eq!(parse_one("a b").unwrap(), Request::of("a b"));
    }

    #[test]
    fn errors_say_which_line_and_what() {
        for (text, line, what) in [
            ("image,colour\nx,red\n", 1, "colour"),
            ("image,name,,\nx,y,,\na,b,,c\n", 3, "heading that is empty"),
            ("image,delete_source,Delete_Source\nx,no,yes\n", 1, "twice"),
            ("image,verify\nx,hash\ny\n", 3, "1 columns"),
            ("image,delete_source\nx,maybe\n", 2, "maybe"),
            ("[\"a\",\n {\"image\": \"b\", \"colour\": 1}]", 2, "colour"),
            ("{\"image\":\"a\"}\n{\"name\":\"b\"}\n", 2, "image"),
            ("image,name\n,n\n", 2, "empty"),
            ("[\"a\",\n", 2, "EOF"),
        ] {
            let error = parse(text).unwrap_err();
            assert_eq!(error.line, line, "{text:?}: {error}");
            assert!(error.to_string().contains(what), "{text:?}: {error}");
        }
        for text in ["[\"a\"]", "[]", "null", "{", "\""] {
            assert!(parse_one(text).is_err(), "{text}");
        }
        assert!(parse("image;name\na;b\n").unwrap_err().to_string().contains("commas"));
        assert!(parse(&"a".repeat(5000)).is_err());
        assert!(parse_one("a\nb").is_err() && parse_one("  ").is_err());
    }
}
