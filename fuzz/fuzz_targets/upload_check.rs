//! What is looked at before an upload: the format, and a qcow2's tables. A qcow2 that passes can be read wholly.
#![no_main]

use libfuzzer_sys::fuzz_target;
use stages::{
    inspect::format::{check_qcow2, identify},
    magic::DiskFormat,
    qcow2::Qcow2,
};

fuzz_target!(|bytes: Vec<u8>| {
    let Ok(found) = identify(&bytes) else { return };
    assert_eq!(found.file_bytes, bytes.len() as u64);
    if found.format != DiskFormat::Qcow2 {
        return;
    }
    let Ok(facts) = check_qcow2(&bytes, "disk") else { return };
    let image = Qcow2::open(&bytes).expect("what passed the check opens");
    let mut at = 0;
    let mut clusters = 0_u64;
    while let Ok(Some((range, mapping))) = image.mapping_at(at) {
        at = range.end.0;
        if !matches!(mapping, stages::qcow2::Mapping::Zero) {
            clusters += range.bytes().div_ceil(image.header().cluster_bits.cluster_bytes());
        }
        if clusters > 10_000 {
            return;
        }
    }
    assert!(at >= image.virtual_bytes(), "every table that passed the check can be read");
    assert!(clusters <= facts.contents.data_clusters + facts.contents.compressed_clusters);
});
