//! Instruction counts against a baseline that is kept in the repository.
//!
//! Seconds differ from machine to machine and from minute to minute; the number of instructions of one thread over a fixed input does
//! not. `benches/instructions.rs` counts them under callgrind; here they are compared.

use std::{collections::BTreeMap, fmt};

use serde::{Deserialize, Serialize};

/// More instructions than this share above the baseline fail.
pub const TOLERANCE_PERCENT: u64 = 5;

/// What was counted, by the name of the case, and with what.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counts {
    /// `rustc --version`: another compiler makes other code.
    pub rustc: String,
    /// Vector extensions that the code looks for when it runs.
    pub features: Vec<String>,
    /// Instructions of each case.
    pub instructions: BTreeMap<String, u64>,
}

/// How a case compares.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Within the tolerance.
    Same,
    /// Fewer than the tolerance allows: good, and wants a new baseline, or it could be lost again unnoticed.
    Fewer,
    /// More: a regression.
    More,
    /// The baseline does not know it.
    New,
    /// The baseline knows it, and it was not counted.
    Gone,
}

/// A case's line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Line {
    /// The case.
    pub case: String,
    /// Instructions in the baseline.
    pub before: Option<u64>,
    /// Instructions now.
    pub now: Option<u64>,
    /// What that means.
    pub verdict: Verdict,
}

impl Line {
    /// Does it keep the change from landing?
    #[must_use]
    pub const fn fails(&self) -> bool {
        !matches!(self.verdict, Verdict::Same)
    }
}

impl fmt::Display for Line {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let count = |count: Option<u64>| count.map_or_else(|| "-".to_owned(), |count| count.to_string());
        write!(f, "{:28} {:>14} -> {:>14}", self.case, count(self.before), count(self.now))?;
        if let (Some(before), Some(now)) = (self.before, self.now) {
            #[expect(clippy::cast_precision_loss, reason = "a percentage for people")]
            let percent = (now as f64 / before as f64 - 1.0) * 100.0;
            write!(f, "  {percent:+6.2} %")?;
        }
        match self.verdict {
            Verdict::Same => Ok(()),
            Verdict::Fewer => f.write_str("  FEWER: a gain to be kept, by a new baseline"),
            Verdict::More => write!(f, "  MORE than {TOLERANCE_PERCENT} % above the baseline"),
            Verdict::New => f.write_str("  NOT IN THE BASELINE"),
            Verdict::Gone => f.write_str("  NOT COUNTED any more"),
        }
    }
}

/// Compares case by case, in the order of their names.
#[must_use]
pub fn compare(baseline: &BTreeMap<String, u64>, now: &BTreeMap<String, u64>) -> Vec<Line> {
    let mut cases: Vec<&String> = baseline.keys().chain(now.keys()).collect();
    cases.sort();
    cases.dedup();
    let line = |case: &String| {
        let (before, now) = (baseline.get(case).copied(), now.get(case).copied());
        let verdict = match (before, now) {
            (None, _) => Verdict::New,
            (_, None) => Verdict::Gone,
            (Some(before), Some(now)) if now * 100 > before * (100 + TOLERANCE_PERCENT) => Verdict::More,
            (Some(before), Some(now)) if now * (100 + TOLERANCE_PERCENT) < before * 100 => Verdict::Fewer,
            _ => Verdict::Same,
        };
        Line { case: case.clone(), before, now, verdict }
    };
    cases.into_iter().map(line).collect()
}

/// The total out of what callgrind prints: `==12== Collected : 4711`.
#[must_use]
pub fn collected(stderr: &str) -> Option<u64> {
    let line = stderr.lines().find_map(|line| line.split_once("Collected : "))?.1;
    line.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn beyond_five_percent_fails_either_way_and_so_does_what_is_missing() {
        let counts = |pairs: &[(&str, u64)]| pairs.iter().map(|(name, count)| ((*name).to_owned(), *count)).collect();
        let baseline: BTreeMap<String, u64> =
            counts(&[("a", 1000), ("b", 1000), ("c", 1000), ("d", 1000), ("e", 1000), ("g", 0)]);
        let now = counts(&[("a", 1050), ("b", 1051), ("c", 960), ("d", 900), ("f", 1), ("g", 1)]);
        let lines = compare(&baseline, &now);
        let verdicts: Vec<_> = lines.iter().map(|line| (line.case.as_str(), line.verdict, line.fails())).collect();
        assert_eq!(
            verdicts,
            [
                ("a", Verdict::Same, false),
                ("b", Verdict::More, true),
                ("c", Verdict::Same, false),
                ("d", Verdict::Fewer, true),
                ("e", Verdict::Gone, true),
                ("f", Verdict::New, true),
                ("g", Verdict::More, true),
            ]
        );
    }

    #[test]
    fn callgrinds_total_is_found() {
        let text = "==7== Events    : Ir\n==7== Collected : 123456\n==7== \n==7== I   refs:      123,456\n";
        assert_eq!(collected(text), Some(123_456));
        assert_eq!(collected("valgrind: not found"), None);
    }
}
