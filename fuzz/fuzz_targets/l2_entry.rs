//! Table words mean something bounded, whatever their bits.
#![no_main]

use libfuzzer_sys::fuzz_target;
use stages::{
    qcow2::entry::{L1Entry, L2Entry, L2Kind, RefcountTableEntry},
    units::ClusterBits,
};

fuzz_target!(|input: (u64, u8)| {
    let (word, bits) = input;
    let bits = ClusterBits::from_bits(9 + u32::from(bits) % 13).expect("9 to 21");
    match L2Entry::from_word(word).kind(bits) {
        L2Kind::Compressed { host, sector_rounded_bytes } => {
            assert!(sector_rounded_bytes > 0 && sector_rounded_bytes <= 2 * bits.cluster_bytes() + 512);
            assert_eq!((host.0 + sector_rounded_bytes) % 512, 0);
        }
        L2Kind::Data { host } | L2Kind::Zero { host: Some(host) } => assert!(host.0 % 512 == 0 && host.0 >> 56 == 0),
        L2Kind::Unallocated | L2Kind::Zero { host: None } => {}
    }
    if let Some(host) = L1Entry::from_word(word).host_offset() {
        assert!(host.0 % 512 == 0 && host.0 >> 56 == 0);
    }
    if let Some(host) = RefcountTableEntry::from_word(word).host_offset() {
        assert_eq!(host.0 % 512, 0);
    }
});
