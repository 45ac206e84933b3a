//! Any set of data clusters, plain and compressed, gets a layout that tiles the file, and a metadata stream that a reader agrees with.
#![no_main]

use libfuzzer_sys::{arbitrary::Arbitrary, fuzz_target};
use stages::{
    compress::Codec,
    extent::Record,
    qcow2::{ClusterIndex, ClusterMap, Geometry, Layout, Mapping, Qcow2, StreamWriter, verify},
    units::ClusterBits,
};

#[derive(Arbitrary, Debug)]
struct Input {
    bits: u8,
    bytes: u32,
    runs: Vec<(u16, u8)>,
    /// Stored lengths, used in turn; those of a cluster or more stand for plain ones.
    lengths: Vec<u16>,
    zstd: bool,
}

fuzz_target!(|input: Input| {
    let bits = ClusterBits::from_bits(9 + u32::from(input.bits) % 5).expect("9 to 13");
    let cluster_bytes = u32::try_from(bits.cluster_bytes()).expect("small");
    let geometry = Geometry::new(u64::from(input.bytes) % (8 << 20) + 1, bits).expect("small disks fit");
    let mut map = ClusterMap::new();
    for (first, count) in input.runs.iter().take(64) {
        let first = u64::from(*first) % geometry.guest_clusters();
        map.insert_run(first, (u64::from(*count) + 1).min(geometry.guest_clusters() - first));
    }
    let mut index = ClusterIndex::new();
    let clusters = map.runs().flat_map(|run| run.first..run.first + run.count);
    for (cluster, number) in clusters.zip(0_usize..) {
        let wished = input.lengths.get(number % input.lengths.len().max(1)).copied().unwrap_or(u16::MAX);
        let stored_bytes = u32::from(wished).clamp(1, cluster_bytes);
        index.push(cluster, Record { stored_bytes, digest: [0; 4] }, stored_bytes == cluster_bytes);
    }
    index.complete();
    let codec = if input.zstd { Codec::Zstd } else { Codec::Deflate };
    let layout = Layout::plan(geometry, &index, Some(codec)).expect("small disks fit");
    let writer = StreamWriter::new(&layout, &index);
    let mut file: Vec<u8> = writer.metadata().flatten().collect();
    assert_eq!(file.len() as u64, layout.metadata_bytes());
    let mut data = writer.data();
    for record in index.records() {
        let stored = vec![0xda_u8; record.stored_bytes as usize].into();
        if record.stored_bytes == cluster_bytes {
            data.push_plain(stored, 1)
        } else {
            data.push_compressed(stored)
        }
        file.extend(std::iter::from_fn(|| data.pop()).flatten());
    }
    data.close();
    file.extend(std::iter::from_fn(|| data.pop()).flatten());
    assert_eq!(file.len() as u64, layout.file_bytes());
    let image = Qcow2::open(file).expect("what is written opens");
    let report = verify::check(&image).expect("what is written is consistent");
    assert_eq!((report.data_clusters + report.compressed_clusters, report.leaked_clusters), (index.count(), 0));
    assert_eq!(report.compressed_clusters, index.compressed_clusters());
    let mut guest_offset = 0;
    while let Some((range, mapping)) = image.mapping_at(guest_offset).expect("what is written reads") {
        let cluster = guest_offset / bits.cluster_bytes();
        assert_eq!(map.contains(cluster), mapping != Mapping::Zero);
        guest_offset = range.end.0;
    }
});
