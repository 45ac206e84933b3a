//! An extent's data clusters in the form that is stored, with the record by which a re-read or a read-back is checked.

use bytes::Bytes;
use engine::{Emitter, StageError, Transform};
use xxhash_rust::xxh3::xxh3_128;

use super::{Compression, Encoder, policy::looks_incompressible};
use crate::{
    extent::{Classified, Record, Stored},
    progress::Progress,
    units::{ClusterBits, to_u64, to_usize},
};

/// Bytes that a compressed cluster has to save: less than a sector is not worth the time of every later read.
const SAVED_BYTES_MIN: usize = 512;

/// The 128-bit digest of a cluster's guest bytes: XXH3. It guards against accidents, not against an adversary who chooses the bytes;
/// against him stands the source's own hash.
#[must_use]
pub fn digest(cluster: &[u8]) -> [u32; 4] {
    let digest = xxh3_128(cluster).to_le_bytes();
    let (words, _) = digest.as_chunks::<4>();
    [words[0], words[1], words[2], words[3]].map(u32::from_le_bytes)
}

/// Appends a cluster as it is stored: compressed, or as it is where that would save too little.
pub fn append_stored(encoder: &mut Encoder, cluster: &[u8], packed: &mut Vec<u8>) {
    let limit = cluster.len() - SAVED_BYTES_MIN.min(cluster.len() / 4);
    if looks_incompressible(cluster) || encoder.append(cluster, limit, packed).is_none() {
        packed.extend_from_slice(cluster);
    }
}

/// Digests, compresses and packs clusters. One a thread; holds a cluster's worth of scratch beside the codec's context.
#[derive(Debug)]
pub struct EncodeClusters {
    cluster_bits: ClusterBits,
    encoder: Option<Encoder>,
    /// Clusters of one extent, packed, before they are copied into an allocation of their exact size.
    packed: Vec<u8>,
    progress: Progress,
}

impl EncodeClusters {
    /// With `compression`, or digests alone.
    #[must_use]
    pub fn new(cluster_bits: ClusterBits, compression: Option<Compression>, progress: Progress) -> Self {
        Self { cluster_bits, encoder: compression.map(Encoder::new), packed: Vec::new(), progress }
    }

    /// Appends the stored form of one cluster to `packed`; returns its record.
    fn encode_one(&mut self, cluster: &[u8]) -> Record {
        let digest = digest(cluster);
        let before = self.packed.len();
        match &mut self.encoder {
            Some(encoder) => append_stored(encoder, cluster, &mut self.packed),
            None => self.packed.extend_from_slice(cluster),
        }
        let stored_bytes = u32::try_from(self.packed.len() - before).expect("at most a cluster, and that has at most 2 MiB");
        Record { stored_bytes, digest }
    }

    /// Makes the records of an extent's data clusters and, with compression, their packed form: then its lease returns.
    #[must_use]
    pub fn encode(&mut self, classified: Classified) -> Classified {
        let Stored::Whole(slice) = &classified.stored else { return classified };
        let cluster_bytes = to_usize(self.cluster_bits.cluster_bytes());
        let mut records = Vec::new();
        if self.encoder.is_none() {
            let whole = u32::try_from(cluster_bytes).expect("a cluster has at most 2 MiB");
            for at in classified.data_clusters() {
                records
                    .push(Record { stored_bytes: whole, digest: digest(&slice[at * cluster_bytes..(at + 1) * cluster_bytes]) });
            }
            return Classified { records, ..classified };
        }
        self.packed.clear();
        for at in classified.data_clusters() {
            records.push(self.encode_one(&slice[at * cluster_bytes..(at + 1) * cluster_bytes]));
        }
        self.progress.add_stored(to_u64(self.packed.len()));
        let packed = Bytes::copy_from_slice(&self.packed);
        Classified { guest: classified.guest, runs: classified.runs, records, stored: Stored::Packed(packed) }
    }
}

impl Transform for EncodeClusters {
    type In = Classified;
    type Out = Classified;
    type Report = ();

    fn apply(&mut self, classified: Classified, out: &mut Emitter<'_, Classified>) -> Result<(), StageError> {
        let encoded = self.encode(classified);
        out.emit(encoded)
    }

    fn finish(self, _: &mut Emitter<'_, Classified>) -> Result<(), StageError> {
        Ok(())
    }
}
