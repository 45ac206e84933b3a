//! Live counters of a conversion, for whoever draws them.

use std::sync::{
    Arc,
    atomic::{AtomicU8, AtomicU64, Ordering::Relaxed},
};

use crate::{extent::Classified, units::ClusterBits};

/// What a conversion is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Phase {
    /// Signing in, looking up, opening.
    Preparing = 0,
    /// Reading the source.
    Reading = 1,
    /// Sending the image.
    Uploading = 2,
    /// Everything is sent; waiting for hashes, Glance or the disk.
    Finishing = 3,
    /// Comparing the result with the source.
    Verifying = 4,
}

#[derive(Debug, Default)]
struct Counters {
    phase: AtomicU8,
    virtual_bytes: AtomicU64,
    surveyed_bytes: AtomicU64,
    zero_bytes: AtomicU64,
    data_bytes: AtomicU64,
    stored_bytes: AtomicU64,
    fetched_bytes: AtomicU64,
    reread_bytes: AtomicU64,
    retried_bytes: AtomicU64,
    scratch_bytes: AtomicU64,
    hashed_bytes: AtomicU64,
    hash_expected: AtomicU64,
    image_bytes: AtomicU64,
    uploaded_bytes: AtomicU64,
    sent_in_vain: AtomicU64,
    verified_bytes: AtomicU64,
    retries: AtomicU64,
}

/// Shared counters; clones are the same. Updating is a relaxed add an extent.
#[derive(Clone, Debug, Default)]
pub struct Progress(Arc<Counters>);

macro_rules! counter {
    ($($(#[$doc:meta])* $get:ident, $add:ident;)*) => {
        $(
            $(#[$doc])*
            #[must_use]
            pub fn $get(&self) -> u64 {
                self.0.$get.load(Relaxed)
            }

            /// Adds to the counter of the same name.
            pub fn $add(&self, bytes: u64) {
                self.0.$get.fetch_add(bytes, Relaxed);
            }
        )*
    };
}

impl Progress {
    counter! {
        /// Guest bytes that have been looked at.
        surveyed_bytes, add_surveyed;
        /// Of those, in clusters that are all zero.
        zero_bytes, add_zero;
        /// Of those, in clusters that are stored.
        data_bytes, add_data;
        /// What compressed data clusters take so far.
        stored_bytes, add_stored;
        /// Bytes received from Glance.
        fetched_bytes, add_fetched;
        /// Of those, received a second time because nothing kept them, or to verify.
        reread_bytes, add_reread;
        /// Of those, received again after an error or a pause.
        retried_bytes, add_retried;
        /// Bytes written to the scratch file.
        scratch_bytes, add_scratch;
        /// Guest bytes the source hash has covered.
        hashed_bytes, add_hashed;
        /// Bytes of the image handed to the connection.
        uploaded_bytes, add_uploaded;
        /// Guest bytes compared with the source.
        verified_bytes, add_verified;
        /// Requests that were tried again.
        retries, add_retries;
    }

    /// Size of the virtual disk, bytes; 0 while it is unknown.
    #[must_use]
    pub fn virtual_bytes(&self) -> u64 {
        self.0.virtual_bytes.load(Relaxed)
    }

    /// Sets the size of the virtual disk.
    pub fn set_virtual_bytes(&self, bytes: u64) {
        self.0.virtual_bytes.store(bytes, Relaxed);
    }

    /// Length of the image, bytes; 0 while it is unknown.
    #[must_use]
    pub fn image_bytes(&self) -> u64 {
        self.0.image_bytes.load(Relaxed)
    }

    /// Sets the length of the image.
    pub fn set_image_bytes(&self, bytes: u64) {
        self.0.image_bytes.store(bytes, Relaxed);
    }

    /// Guest bytes that the source hash will cover; 0 where there is none to check.
    #[must_use]
    pub fn hash_expected(&self) -> u64 {
        self.0.hash_expected.load(Relaxed)
    }

    /// Sets what the source hash will cover.
    pub fn set_hash_expected(&self, bytes: u64) {
        self.0.hash_expected.store(bytes, Relaxed);
    }

    /// An upload starts from the beginning again.
    pub fn restart_upload(&self) {
        let sent = self.0.uploaded_bytes.swap(0, Relaxed);
        self.0.sent_in_vain.fetch_add(sent, Relaxed);
    }

    /// Bytes handed to the connection by all tries.
    #[must_use]
    pub fn sent_bytes(&self) -> u64 {
        self.uploaded_bytes() + self.0.sent_in_vain.load(Relaxed)
    }

    /// Another comparison begins.
    pub fn restart_verify(&self) {
        self.0.verified_bytes.store(0, Relaxed);
    }

    /// What is going on.
    #[must_use]
    pub fn phase(&self) -> Phase {
        match self.0.phase.load(Relaxed) {
            1 => Phase::Reading,
            2 => Phase::Uploading,
            3 => Phase::Finishing,
            4 => Phase::Verifying,
            _ => Phase::Preparing,
        }
    }

    /// Something else is going on.
    pub fn set_phase(&self, phase: Phase) {
        self.0.phase.store(phase as u8, Relaxed);
    }

    /// An extent has its fates.
    pub fn surveyed(&self, classified: &Classified, cluster_bits: ClusterBits) {
        let data = classified.data_bytes(cluster_bits);
        self.add_surveyed(classified.guest.bytes());
        self.add_data(data);
        self.add_zero(classified.guest.bytes() - data);
    }
}
