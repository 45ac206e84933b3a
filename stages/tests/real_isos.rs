//! Bootable installation media are ISOs, as Glance sees them, whatever their first sectors look like as a disk.
//!
//! The fixtures are bytes 0 to 1023 and 32768 to 34815 of: memtest86+x64.iso (Debian's memtest86+ 6.10-4; an MBR with a data and an EFI partition, as
//! Debian's own installation media have it), ipxe.iso (ipxe 1.0.0+git-20190125; isohybrid, as Alpine's have it), grub-rescue-cdrom.iso (grub-rescue-pc
//! 2.06-13; grub-mkrescue), and one that `xorriso -as mkisofs -isohybrid-gpt-basdat -append_partition 2 0xef EFI -appended_part_as_gpt` made, as
//! Ubuntu's are (a protective MBR and a GPT). A real Glance 33 took each of the four as `iso`.
#![allow(clippy::unwrap_used)] // a panic is how a test fails

use stages::{inspect::format::identify, magic::DiskFormat};

#[test]
fn hybrid_installation_media_are_isos_and_nothing_else() {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/iso");
    let mut seen = 0;
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let sectors = std::fs::read(&path).unwrap();
        let mut head = vec![0; 65536];
        head[..1024].copy_from_slice(&sectors[..1024]);
        head[32768..32768 + 2048].copy_from_slice(&sectors[1024..]);
        let found = identify(&head).unwrap();
        assert_eq!((found.format, found.boot_sector), (DiskFormat::Iso, true), "{}", path.display());
        seen += 1;
    }
    assert_eq!(seen, 4);
}
