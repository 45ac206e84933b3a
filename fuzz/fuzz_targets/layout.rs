//! Any set of data clusters gets a layout that tiles the file, and a metadata stream that a reader agrees with.
#![no_main]

use libfuzzer_sys::{arbitrary::Arbitrary, fuzz_target};
use stages::{
    qcow2::{ClusterMap, Geometry, Layout, Mapping, Qcow2, StreamWriter, verify},
    units::ClusterBits,
};

#[derive(Arbitrary, Debug)]
struct Input {
    bits: u8,
    bytes: u32,
    runs: Vec<(u16, u8)>,
}

fuzz_target!(|input: Input| {
    let bits = ClusterBits::from_bits(9 + u32::from(input.bits) % 5).expect("9 to 13");
    let geometry = Geometry::new(u64::from(input.bytes) % (8 << 20) + 1, bits).expect("small disks fit");
    let mut map = ClusterMap::new();
    for (first, count) in input.runs.iter().take(64) {
        let first = u64::from(*first) % geometry.guest_clusters();
        map.insert_run(first, (u64::from(*count) + 1).min(geometry.guest_clusters() - first));
    }
    let layout = Layout::plan(geometry, &map).expect("small disks fit");
    let mut file: Vec<u8> = StreamWriter::new(&layout, &map).metadata().flatten().collect();
    assert_eq!(file.len() as u64, layout.metadata_bytes());
    file.resize(usize::try_from(layout.file_bytes()).expect("small"), 0xda);
    let image = Qcow2::open(file).expect("what is written opens");
    let report = verify::check(&image).expect("what is written is consistent");
    assert_eq!((report.data_clusters, report.leaked_clusters), (map.count(), 0));
    let mut guest_offset = 0;
    while let Some((range, mapping)) = image.mapping_at(guest_offset).expect("what is written reads") {
        let cluster = guest_offset / bits.cluster_bytes();
        assert_eq!(map.contains(cluster), matches!(mapping, Mapping::Data(_)));
        guest_offset = range.end.0;
    }
});
