//! Lists of images out of any text: no panic, no endless loop, and what was read survives being written.
#![no_main]

use libfuzzer_sys::fuzz_target;
use stages::batch::{list, select::parse_age};

fuzz_target!(|text: &str| {
    if let Ok(requests) = list::parse(text) {
        for request in &requests {
            assert!(!request.image.is_empty());
            let written = serde_json::to_string(request).expect("a request is plain data");
            assert_eq!(list::parse_one(&written).as_ref(), Ok(request));
        }
    }
    let _ = list::parse_one(text);
    let _ = parse_age(text);
});
