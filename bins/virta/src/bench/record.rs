//! What a run of `virta bench` found: a contract, for runs are laid side by side later.

use serde::{Deserialize, Serialize};

/// A run.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// Virta's version.
    pub virta: String,
    /// When, UTC.
    pub date: String,
    /// How long it took.
    pub elapsed_s: f64,
    /// Where.
    pub machine: Machine,
    /// The figures, in the order in which they are shown.
    pub measures: Vec<Measure>,
    /// What could not be measured, and why.
    pub notes: Vec<String>,
    /// What the job would take, if one was asked for.
    #[serde(default)]
    pub job: Option<Job>,
    /// The file that it was read from, where flavors or hosts do not tell runs apart.
    #[serde(skip)]
    pub label: Option<String>,
}

/// A machine.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Machine {
    /// Its host name.
    pub host: String,
    /// Its flavor, and how it is known: `metadata`, `flag`; both absent where it is not.
    #[serde(default)]
    pub flavor: Option<String>,
    /// How the flavor is known.
    #[serde(default)]
    pub flavor_from: Option<String>,
    /// Processor.
    pub cpu: String,
    /// Processors that this process may use.
    pub cores: usize,
    /// Memory, bytes.
    pub memory_bytes: u64,
    /// Kernel.
    pub kernel: String,
    /// Folder whose disk was measured.
    pub folder: String,
    /// Its file system.
    pub filesystem: String,
    /// Cloud, region and project, where one was measured.
    #[serde(default)]
    pub cloud: Option<String>,
}

/// What a figure is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Group {
    /// The folder's disk.
    Disk,
    /// Cores.
    Processor,
    /// The image service, and the network in between.
    Glance,
}

impl Group {
    /// All, in the order in which they are shown.
    pub const ALL: [Self; 3] = [Self::Disk, Self::Processor, Self::Glance];

    /// A heading.
    pub const fn title(self) -> &'static str {
        match self {
            Self::Disk => "disk",
            Self::Processor => "processor",
            Self::Glance => "Glance",
        }
    }
}

/// A figure: the median of several samples, with the lowest and the highest.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Measure {
    /// By this runs are laid side by side: `disk.write.pwrite.buffered`, `glance.down.4`, …
    pub key: String,
    /// About what.
    pub group: Group,
    /// For people.
    pub name: String,
    /// Bytes a second.
    pub bytes_per_s: f64,
    /// The lowest sample.
    pub low: f64,
    /// The highest sample.
    pub high: f64,
    /// Samples.
    pub samples: usize,
    /// Threads or connections at work.
    pub parallel: usize,
    /// Of compression: bytes out for each byte in.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ratio: Option<f64>,
}

impl Measure {
    /// Is its slowest sample faster than another one's fastest?
    pub fn beats(&self, other: &Self) -> bool {
        self.low > other.high
    }

    /// Is it faster than another one by so much, and so surely, that it is worth a flag?
    pub fn clearly_above(&self, other: &Self) -> bool {
        self.bytes_per_s > other.bytes_per_s * 1.1 && self.beats(other) && self.samples.min(other.samples) >= 2
    }

    /// A figure out of samples; `None` if there are none.
    pub fn new(key: &str, group: Group, name: &str, parallel: usize, mut samples: Vec<f64>) -> Option<Self> {
        samples.retain(|sample| sample.is_finite() && *sample > 0.0);
        samples.sort_by(f64::total_cmp);
        let (low, high) = (*samples.first()?, *samples.last()?);
        let middle = samples.len() / 2;
        let median = if samples.len() % 2 == 1 { samples[middle] } else { f64::midpoint(samples[middle - 1], samples[middle]) };
        Some(Self {
            key: key.to_owned(),
            group,
            name: name.to_owned(),
            bytes_per_s: median,
            low,
            high,
            samples: samples.len(),
            parallel,
            ratio: None,
        })
    }
}

impl Record {
    /// What a column of a comparison is called.
    pub fn title(&self) -> &str {
        self.label.as_deref().or(self.machine.flavor.as_deref()).unwrap_or(&self.machine.host)
    }

    /// A figure by its key.
    pub fn rate(&self, key: &str) -> Option<f64> {
        self.measure(key).map(|measure| measure.bytes_per_s)
    }

    /// A figure by its key.
    pub fn measure(&self, key: &str) -> Option<&Measure> {
        self.measures.iter().find(|measure| measure.key == key)
    }
}

/// A conversion that was asked about.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Job {
    /// Size of the disk, bytes.
    pub image_bytes: u64,
    /// What of it is not zero, bytes.
    pub data_bytes: u64,
    /// Ways to do it.
    pub ways: Vec<Way>,
    /// SHA-512 of the whole disk, seconds: no checked conversion out of Glance takes less.
    #[serde(default)]
    pub hash_s: Option<f64>,
    /// Reading the whole disk, seconds: what a file without holes takes at least.
    #[serde(default)]
    pub read_whole_s: Option<f64>,
}

/// From where to where.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Route {
    /// A file in the folder becomes a file in the folder.
    Local,
    /// An image in Glance becomes an image in Glance.
    Glance,
}

/// A way to do the job, and what it would take.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Way {
    /// From where to where.
    pub route: Route,
    /// The command.
    pub command: String,
    /// Seconds.
    pub seconds: f64,
    /// Bytes of the image that is made.
    pub stored_bytes: u64,
    /// What it waits for most.
    pub bottleneck: String,
    /// Seconds that each part would take alone; many run at the same time.
    pub parts: Vec<Part>,
}

/// A part of a way.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Part {
    /// `fetch`, `hash`, `upload`, …
    pub name: String,
    /// Seconds.
    pub seconds: f64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_shown_and_nonsense_is_not() {
        let of = |samples: &[f64]| Measure::new("k", Group::Disk, "n", 1, samples.to_vec());
        assert_eq!(of(&[3.0, 1.0, 2.0]).unwrap().bytes_per_s, 2.0);
        let four = of(&[4.0, 1.0, f64::INFINITY, 2.0, 3.0, f64::NAN, 0.0]).unwrap();
        assert_eq!((four.bytes_per_s, four.low, four.high, four.samples), (2.5, 1.0, 4.0, 4));
        assert_eq!(of(&[f64::NAN]), None);
    }

    #[test]
    fn a_record_comes_back_as_it_was_saved() {
        let measure = Measure { ratio: Some(0.5), ..Measure::new("a.b", Group::Glance, "n", 2, vec![1e9]).unwrap() };
        let record = Record { measures: vec![measure], notes: vec!["x".to_owned()], ..Record::default() };
        let text = serde_json::to_string(&record).unwrap();
        assert_eq!(serde_json::from_str::<Record>(&text).unwrap(), record);
        assert_eq!(record.rate("a.b"), Some(1e9));
        assert_eq!(record.rate("a"), None);
    }
}
