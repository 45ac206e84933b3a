//! One thing that is asked for.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::{
    compress::{Codec, Compression},
    convert::{After, Options, Verify},
};

/// An image, and what is to be different for it. What is not said is as for all.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Request {
    /// A name or an id.
    pub image: String,
    /// The new image's name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Properties of the new image, over those for all.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub properties: BTreeMap<String, String>,
    /// `none`, `zlib` or `zstd`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub compress: Option<String>,
    /// Its level.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub compress_level: Option<u8>,
    /// `none`, `hash` or `readback`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub verify: Option<String>,
    /// Delete the source once the new image is verified.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub delete_source: Option<bool>,
    /// The new image takes the source's name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub replace: Option<bool>,
    /// Share the new image as the source is shared.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub copy_members: Option<bool>,
}

impl Request {
    /// For an image, with nothing of its own.
    #[must_use]
    pub fn of(image: &str) -> Self {
        Self { image: image.to_owned(), ..Self::default() }
    }

    /// The options for this one.
    ///
    /// # Errors
    /// A text that names the word that is not known, or the two that contradict each other.
    pub fn options(&self, all: &Options) -> Result<Options, String> {
        let mut options = all.clone();
        for (key, value) in &self.properties {
            options.properties.retain(|(known, _)| known != key);
            options.properties.push((key.clone(), value.clone()));
        }
        crate::openstack::carry_over::check_properties(&options.properties)?;
        let codec = match self.compress.as_deref() {
            None => options.compression.map(Compression::codec),
            Some("none") => None,
            Some("zlib") => Some(Codec::Deflate),
            Some("zstd") => Some(Codec::Zstd),
            Some(other) => return Err(format!("compress has to be none, zlib or zstd, not {other:?}")),
        };
        if self.compress.is_some() || self.compress_level.is_some() {
            options.compression = match (codec, self.compress_level) {
                (None, Some(_)) => return Err("compress_level needs compress zlib or zstd".to_owned()),
                (None, None) => None,
                (Some(codec), None) => Some(Compression::new(codec)),
                (Some(codec), Some(level)) => {
                    Some(Compression::with_level(codec, level).map_err(|error| format!("compress_level: {error}"))?)
                }
            };
        }
        match (self.delete_source, self.replace) {
            (Some(true), Some(true)) => {
                return Err("delete_source and replace exclude each other: replace deletes it, too".to_owned());
            }
            (Some(false), Some(true)) => {
                return Err("delete_source is no, and replace deletes the source: say no to both, or to none".to_owned());
            }
            (_, Some(true)) => options.after = After::Replace,
            (Some(true), _) => options.after = After::Delete,
            // whatever is said for all
            (Some(false), _) => options.after = After::Keep,
            (_, Some(false)) if options.after == After::Replace => options.after = After::Keep,
            _ => {}
        }
        if let Some(copy) = self.copy_members {
            options.copy_members = copy;
        }
        match self.verify.as_deref() {
            None if options.after != After::Keep && all.after == After::Keep => options.verify = Verify::Readback,
            None => {}
            Some("none") => options.verify = Verify::None,
            Some("hash") => options.verify = Verify::Hash,
            Some("readback") => options.verify = Verify::Readback,
            Some(other) => return Err(format!("verify has to be none, hash or readback, not {other:?}")),
        }
        if options.after != After::Keep && options.verify == Verify::None {
            return Err("a source is deleted only after verification: verify none cannot be".to_owned());
        }
        Ok(options)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_one_image_says_goes_before_what_is_said_for_all() {
        let all = Options { properties: vec![("a".into(), "1".into()), ("b".into(), "2".into())], ..Options::default() };
        let request = Request {
            properties: [("b".to_owned(), "3".to_owned())].into(),
            compress: Some("zstd".into()),
            delete_source: Some(true),
            ..Request::of("x")
        };
        let options = request.options(&all).unwrap();
        assert_eq!(options.properties, [("a".to_owned(), "1".to_owned()), ("b".to_owned(), "3".to_owned())]);
        assert_eq!(options.compression.unwrap().codec(), Codec::Zstd);
        assert_eq!((options.after, options.verify), (After::Delete, Verify::Readback), "what is deleted was read back before");
        for after in [After::Delete, After::Replace] {
            let all = Options { after, verify: Verify::Readback, ..Options::default() };
            let kept = Request { delete_source: Some(false), ..Request::of("x") }.options(&all).unwrap();
            assert_eq!(kept.after, After::Keep, "{after:?}: a source that shall stay stays");
        }
    }

    #[test]
    fn contradictions_are_named() {
        let bad = |request: Request| request.options(&Options::default()).unwrap_err();
        assert!(bad(Request { compress: Some("gzip".into()), ..Request::of("x") }).contains("gzip"));
        assert!(bad(Request { compress_level: Some(3), ..Request::of("x") }).contains("compress_level needs"));
        assert!(
            bad(Request { delete_source: Some(true), verify: Some("none".into()), ..Request::of("x") }).contains("verification")
        );
        assert!(bad(Request { delete_source: Some(true), replace: Some(true), ..Request::of("x") }).contains("exclude"));
        assert!(bad(Request { delete_source: Some(false), replace: Some(true), ..Request::of("x") }).contains("say no to both"));
        assert!(
            bad(Request { properties: [("disk_format".to_owned(), "raw".to_owned())].into(), ..Request::of("x") })
                .contains("disk_format")
        );
    }
}
