//! Guest bytes out of a qcow2 image, and which of them it stores. Reads what both writers produce and what
//! `qemu-img create`/`convert` produces, compressed or not; anything else is refused by name.
//!
//! A hostile image costs bounded memory: at most 32 MiB of L1 table and one L2 table, and no table is read past
//! the file's end.

use std::sync::{Arc, Mutex, PoisonError};

use super::{
    Header, Qcow2Error,
    entry::{L1Entry, L2Entry, L2Kind},
};
use crate::{
    compress::{Codec, Decoder},
    read_at::ReadAt,
    units::{GuestRange, HostOffset, to_u64, to_usize},
};

/// What an image says of a run of guest bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mapping {
    /// Reads as zeros.
    Zero,
    /// Stored at this host offset, contiguous.
    Data(HostOffset),
    /// One cluster, stored compressed in these sector-rounded bytes.
    Compressed {
        /// First byte.
        host: HostOffset,
        /// Bytes up to the end of the last sector.
        sector_rounded_bytes: u64,
    },
}

/// An open image. Shared by threads; calls block on the storage below.
pub struct Qcow2<R> {
    storage: R,
    header: Header,
    file_bytes: u64,
    l1: Vec<L1Entry>,
    /// The L2 table read last, by L1 index. Sequential readers hit it nearly always.
    last_table: Mutex<Option<(u64, Arc<Vec<u8>>)>>,
    /// Made with the first compressed cluster that is read.
    decompressing: Mutex<Option<Decompressing>>,
}

/// A codec's context and the compressed cluster decoded last.
struct Decompressing {
    decoder: Decoder,
    stored: Vec<u8>,
    cluster: Vec<u8>,
    /// Which one `cluster` holds.
    of: Option<HostOffset>,
}

impl<R: ReadAt> Qcow2<R> {
    /// Opens an image: reads header and L1 table.
    ///
    /// # Errors
    /// What [`Header::parse`] refuses; tables past the file's end; reserved bits; storage errors.
    pub fn open(storage: R) -> Result<Self, Qcow2Error> {
        let io = |host_offset| move |source| Qcow2Error::Io { host_offset, source };
        let file_bytes = storage.len_bytes().map_err(io(0))?;
        let mut head = vec![0; to_usize(file_bytes.min(to_u64(Header::PARSE_BYTES)))];
        storage.read_exact_at(0, &mut head).map_err(io(0))?;
        let header = Header::parse(&head)?;
        let l1_bytes = u64::from(header.l1_entries) * 8;
        if header.l1_table.0.checked_add(l1_bytes).is_none_or(|end| end > file_bytes) {
            return Err(Qcow2Error::Header {
                field: "l1_table_offset",
                value: header.l1_table.0,
                rule: "the table passes the end of the file",
            });
        }
        let mut words = vec![0; to_usize(l1_bytes)];
        storage.read_exact_at(header.l1_table.0, &mut words).map_err(io(header.l1_table.0))?;
        let l1 = words.chunks_exact(8).map(|word| L1Entry::from_word(be_word(word))).collect();
        Ok(Self { storage, header, file_bytes, l1, last_table: Mutex::new(None), decompressing: Mutex::new(None) })
    }

    /// The validated header.
    pub const fn header(&self) -> &Header {
        &self.header
    }

    /// Size of the virtual disk as QEMU sees it: whole 512-byte sectors.
    pub const fn virtual_bytes(&self) -> u64 {
        self.header.virtual_bytes & !511
    }

    /// Length of the file, bytes.
    pub const fn file_bytes(&self) -> u64 {
        self.file_bytes
    }

    /// The active L1 table.
    pub(super) fn l1(&self) -> &[L1Entry] {
        &self.l1
    }

    /// The storage below.
    pub const fn storage(&self) -> &R {
        &self.storage
    }

    /// The L2 table at L1 `index`, as bytes; `None` where there is none.
    pub(super) fn l2_table(&self, index: u64) -> Result<Option<Arc<Vec<u8>>>, Qcow2Error> {
        let Some(&entry) = self.l1.get(to_usize(index)) else { return Ok(None) };
        let bad = |rule| Qcow2Error::Entry { table: "L1", index, entry: entry.word(), rule };
        if entry.reserved_bits() != 0 {
            return Err(bad("reserved bits are set"));
        }
        let Some(host) = entry.host_offset() else { return Ok(None) };
        let cluster_bytes = self.header.cluster_bits.cluster_bytes();
        if host.0 % cluster_bytes != 0 {
            return Err(bad("is not cluster aligned"));
        }
        if host.0 + cluster_bytes > self.file_bytes {
            return Err(bad("points past the end of the file"));
        }
        {
            let last = self.last_table.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some((cached, table)) = &*last
                && *cached == index
            {
                return Ok(Some(Arc::clone(table)));
            }
        }
        let mut table = vec![0; to_usize(cluster_bytes)];
        self.storage.read_exact_at(host.0, &mut table).map_err(|source| Qcow2Error::Io { host_offset: host.0, source })?;
        let table = Arc::new(table);
        *self.last_table.lock().unwrap_or_else(PoisonError::into_inner) = Some((index, Arc::clone(&table)));
        Ok(Some(table))
    }

    /// What the image says of guest cluster `cluster`.
    fn cluster_mapping(&self, table: Option<&[u8]>, cluster: u64) -> Result<Mapping, Qcow2Error> {
        let bits = self.header.cluster_bits;
        let Some(table) = table else { return Ok(Mapping::Zero) };
        let at = to_usize(cluster % bits.entries_per_cluster()) * 8;
        let entry = L2Entry::from_word(be_word(&table[at..at + 8]));
        let bad = |rule| Qcow2Error::Entry { table: "L2", index: cluster, entry: entry.word(), rule };
        match entry.kind(bits) {
            L2Kind::Compressed { host, sector_rounded_bytes } => {
                if entry.is_copied() {
                    return Err(bad("a compressed cluster has no COPIED flag"));
                }
                // the last sector may be cut short by the end of the file
                if host.0 >= self.file_bytes {
                    return Err(bad("points past the end of the file"));
                }
                Ok(Mapping::Compressed { host, sector_rounded_bytes })
            }
            _ if entry.reserved_bits(self.header.version) != 0 => Err(bad("reserved bits are set")),
            L2Kind::Unallocated | L2Kind::Zero { .. } => Ok(Mapping::Zero),
            L2Kind::Data { host } => {
                if host.0 % bits.cluster_bytes() != 0 {
                    return Err(bad("is not cluster aligned"));
                }
                if host.0 + bits.cluster_bytes() > self.file_bytes {
                    return Err(bad("points past the end of the file"));
                }
                Ok(Mapping::Data(host))
            }
        }
    }

    /// The first run of guest bytes at or after `guest_offset`, inside one L2 table, that maps alike: zeros, or
    /// data at consecutive host offsets. `None` at the disk's end.
    ///
    /// # Errors
    /// Entries that are not allowed; storage errors.
    pub fn mapping_at(&self, guest_offset: u64) -> Result<Option<(GuestRange, Mapping)>, Qcow2Error> {
        let bits = self.header.cluster_bits;
        let virtual_bytes = self.virtual_bytes();
        if guest_offset >= virtual_bytes {
            return Ok(None);
        }
        let cluster_bytes = bits.cluster_bytes();
        let first = guest_offset / cluster_bytes;
        let index = first / bits.entries_per_cluster();
        let table_end = ((index + 1) * bits.entries_per_cluster()).min(bits.clusters_for(virtual_bytes));
        let table = self.l2_table(index)?;
        let table = table.as_ref().map(|table| table.as_slice());
        let in_cluster = guest_offset % cluster_bytes;
        let mapping = self.cluster_mapping(table, first)?;
        let mut end = first + 1;
        if table.is_none() {
            end = table_end;
        }
        while end < table_end {
            let next = self.cluster_mapping(table, end)?;
            let continues = match (mapping, next) {
                (Mapping::Zero, Mapping::Zero) => true,
                (Mapping::Data(host), Mapping::Data(next)) => next.0 == host.0 + (end - first) * cluster_bytes,
                _ => false,
            };
            if !continues {
                break;
            }
            end += 1;
        }
        let end_byte = (end * cluster_bytes).min(virtual_bytes);
        let mapping = match mapping {
            Mapping::Data(host) => Mapping::Data(host.plus(in_cluster)),
            other => other,
        };
        Ok(Some((GuestRange::new(guest_offset, end_byte - guest_offset), mapping)))
    }

    /// Where the bytes of the first guest cluster lie that has any; `None` for a disk of zeros.
    ///
    /// # Errors
    /// As [`Qcow2::mapping_at`].
    pub fn first_data(&self) -> Result<Option<HostOffset>, Qcow2Error> {
        let mut guest_offset = 0;
        while let Some((range, mapping)) = self.mapping_at(guest_offset)? {
            match mapping {
                Mapping::Data(host) | Mapping::Compressed { host, .. } => return Ok(Some(host)),
                Mapping::Zero => guest_offset = range.end.0,
            }
        }
        Ok(None)
    }

    /// Fills `buf` with the guest bytes from `guest_offset` on.
    ///
    /// # Errors
    /// [`Qcow2Error::PastEnd`]; entries that are not allowed; compressed clusters that do not decode; storage errors.
    pub fn read_guest(&self, guest_offset: u64, buf: &mut [u8]) -> Result<(), Qcow2Error> {
        let bytes = to_u64(buf.len());
        if guest_offset.checked_add(bytes).is_none_or(|end| end > self.virtual_bytes()) {
            return Err(Qcow2Error::PastEnd { guest_offset, bytes, virtual_bytes: self.virtual_bytes() });
        }
        let mut done = 0;
        while done < buf.len() {
            let at = guest_offset + to_u64(done);
            let (range, mapping) = self.mapping_at(at)?.expect("inside the disk, checked above");
            let here = to_usize(range.bytes()).min(buf.len() - done);
            let part = &mut buf[done..done + here];
            match mapping {
                Mapping::Zero => part.fill(0),
                Mapping::Data(host) => {
                    self.storage.read_exact_at(host.0, part).map_err(|source| Qcow2Error::Io { host_offset: host.0, source })?
                }
                Mapping::Compressed { host, sector_rounded_bytes } => {
                    let in_cluster = to_usize(at % self.header.cluster_bits.cluster_bytes());
                    self.read_compressed(at, host, sector_rounded_bytes, |cluster| {
                        part.copy_from_slice(&cluster[in_cluster..in_cluster + here]);
                    })?;
                }
            }
            done += here;
        }
        Ok(())
    }

    /// Decodes a compressed cluster and lets `take` have it. A hostile image costs a read of two clusters and one decoding.
    fn read_compressed(
        &self,
        guest_offset: u64,
        host: HostOffset,
        bytes: u64,
        take: impl FnOnce(&[u8]),
    ) -> Result<(), Qcow2Error> {
        let cluster_bytes = to_usize(self.header.cluster_bits.cluster_bytes());
        let mut slot = self.decompressing.lock().unwrap_or_else(PoisonError::into_inner);
        let state = slot.get_or_insert_with(|| {
            let codec = Codec::from_qcow2_type(self.header.compression_type).expect("the header was checked");
            Decompressing { decoder: Decoder::new(codec), stored: Vec::new(), cluster: vec![0; cluster_bytes], of: None }
        });
        if state.of != Some(host) {
            state.of = None;
            // the last sector may be cut short by the end of the file
            let there = bytes.min(self.file_bytes - host.0);
            state.stored.resize(to_usize(there), 0);
            let io = |source| Qcow2Error::Io { host_offset: host.0, source };
            self.storage.read_exact_at(host.0, &mut state.stored).map_err(io)?;
            let decoded = state.decoder.decode(&state.stored, &mut state.cluster);
            decoded.map_err(|source| Qcow2Error::Stream { guest_offset, host_offset: host.0, source })?;
            state.of = Some(host);
        }
        take(&state.cluster);
        Ok(())
    }
}

/// The big-endian word in 8 bytes.
pub(super) fn be_word(bytes: &[u8]) -> u64 {
    u64::from_be_bytes(bytes.try_into().expect("a word has 8 bytes"))
}
