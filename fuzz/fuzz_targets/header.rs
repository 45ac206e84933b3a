//! A header out of any bytes: an error or a header that is written and parsed back the same.
#![no_main]

use libfuzzer_sys::fuzz_target;
use stages::qcow2::Header;

fuzz_target!(|bytes: &[u8]| {
    if let Ok(header) = Header::parse(bytes) {
        let again = Header::parse(&Header { version: 3, ..header.clone() }.to_bytes()).expect("what is valid is written valid");
        assert_eq!(Header { version: 3, ..header }, again);
    }
});
