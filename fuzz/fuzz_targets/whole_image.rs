//! A whole image out of any bytes: reading and checking end, in bounded memory, with a value or an error.
#![no_main]

use libfuzzer_sys::fuzz_target;
use stages::qcow2::{Qcow2, verify};

fuzz_target!(|bytes: &[u8]| {
    let Ok(image) = Qcow2::open(bytes) else { return };
    let _ = verify::check(&image);
    let mut guest_offset = 0;
    // a hostile L1 table may describe petabytes: walk the first thousand runs
    for _ in 0..1000 {
        let Ok(Some((range, _))) = image.mapping_at(guest_offset) else { break };
        assert!(range.start.0 == guest_offset && range.end.0 > guest_offset && range.end.0 <= image.virtual_bytes());
        let mut buffer = vec![0; usize::try_from(range.bytes().min(4096)).expect("at most 4096")];
        let _ = image.read_guest(guest_offset, &mut buffer);
        guest_offset = range.end.0;
    }
});
