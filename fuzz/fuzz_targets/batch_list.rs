//! Lists of images out of any text: no panic, no endless loop, and what was read survives being written.
#![no_main]

use libfuzzer_sys::fuzz_target;
use stages::batch::{list, select::parse_age};

fuzz_target!(|text: &str| {
    if let Ok(wishes) = list::parse(text) {
        for wish in &wishes {
            assert!(!wish.image.is_empty());
            let written = serde_json::to_string(wish).expect("a wish is plain data");
            assert_eq!(list::parse_one(&written).as_ref(), Ok(wish));
        }
    }
    let _ = list::parse_one(text);
    let _ = parse_age(text);
});
