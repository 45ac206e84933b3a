//! Content-Range out of any text.
#![no_main]

use libfuzzer_sys::fuzz_target;
use stages::glance::range::ContentRange;

fuzz_target!(|text: &str| {
    if let Some(range) = ContentRange::parse(text) {
        assert!(range.first <= range.last);
        assert!(range.total.is_none_or(|total| range.last < total));
        if let Some(total) = range.total {
            assert!(range.answers(&(range.first..range.last + 1), total));
            let canonical = format!("bytes {}-{}/{total}", range.first, range.last);
            assert_eq!(ContentRange::parse(&canonical), Some(range));
        }
    }
});
