//! The properties that Virta writes into images.

/// Property that names the source of a conversion: the source's id.
pub const SOURCE_ID: &str = "virta_source_id";

/// Property that holds the source's hash, as far as it had one.
pub const SOURCE_HASH: &str = "virta_source_hash";

/// Property that names the run that makes the image.
pub const RUN: &str = "virta_run";

/// Property of an image that `virta bench` sends: noise, of no use to anybody.
pub const BENCH: &str = "virta_bench";

/// Property that is there only once the image was verified.
pub const VERIFIED: &str = "virta_verified";

/// Property of an unmarked image: for how long after its last change other runs leave it alone, seconds.
pub const CLAIM_S: &str = "virta_claim_s";

/// The same as a time (UTC), as releases before wrote it.
pub const CLAIM_UNTIL: &str = "virta_claim_until";

/// Property that names the image that this one takes the place of.
pub const REPLACES: &str = "virta_replaces";

/// Property that holds that image's name, for a run that finds it gone.
pub const REPLACES_NAME: &str = "virta_replaces_name";
