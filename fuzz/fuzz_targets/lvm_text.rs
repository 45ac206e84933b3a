//! LVM's metadata out of any text.
#![no_main]

use libfuzzer_sys::fuzz_target;
use stages::inspect::lvm::group;

fuzz_target!(|text: &str| {
    let own = "aaaaaabbbbccccddddeeeeffffgggggg";
    let framed = format!(
        "vg {{ extent_size = 8 physical_volumes {{ pv0 {{ id = \"{own}\" pe_start = 8 }} }} logical_volumes {{ {text} }} }}"
    );
    for text in [text, &framed] {
        if let Ok(group) = group(text, own) {
            for volume in group.volumes {
                let places = volume.segments.unwrap_or_default();
                let sum = places.iter().fold(0_u64, |sum, place| sum.saturating_add(place.1));
                assert!(places.is_empty() || sum == volume.bytes);
            }
        }
    }
});
