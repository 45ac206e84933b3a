//! Runs as text: one run, or several side by side.

use comfy_table::{CellAlignment, Table, presets::NOTHING};
use stages::text::{printable, size, time};

use super::record::{Group, Job, Machine, Record, Route};

/// Bytes a second, for people.
pub fn speed(bytes_per_s: f64) -> String {
    let mib = bytes_per_s / f64::from(1 << 20);
    if mib >= 10_240.0 {
        format!("{:.1} GiB/s", mib / 1024.0)
    } else if mib >= 100.0 {
        format!("{mib:.0} MiB/s")
    } else {
        format!("{mib:.1} MiB/s")
    }
}

fn described(machine: &Machine) -> Vec<(&'static str, String)> {
    let mut lines = vec![(
        "machine",
        format!(
            "{}, {}, {} cores, {}, Linux {}",
            machine.host,
            machine.cpu,
            machine.cores,
            size(machine.memory_bytes),
            machine.kernel
        ),
    )];
    let from = machine.flavor_from.as_deref().unwrap_or_default();
    lines.extend(machine.flavor.as_ref().map(|flavor| ("flavor", format!("{flavor} (from {from})"))));
    lines.push(("folder", format!("{} ({})", machine.folder, machine.filesystem)));
    lines.extend(machine.cloud.clone().map(|cloud| ("cloud", cloud)));
    lines
}

fn table() -> Table {
    let mut table = Table::new();
    table.load_style(NOTHING);
    table
}

/// One run.
pub fn one(record: &Record) -> String {
    let mut lines: Vec<String> =
        described(&record.machine).into_iter().map(|(what, text)| format!("{what:<10} {}", printable(&text))).collect();
    for group in Group::ALL {
        let mut rows = table();
        for measure in record.measures.iter().filter(|measure| measure.group == group) {
            let ratio = measure.ratio.map(|ratio| format!("to {:.1} % of the size", ratio * 100.0)).unwrap_or_default();
            let spread =
                if measure.samples > 1 { format!("{} to {}", speed(measure.low), speed(measure.high)) } else { String::new() };
            rows.add_row([printable(&measure.name), speed(measure.bytes_per_s), spread, ratio]);
        }
        if rows.is_empty() {
            continue;
        }
        right(&mut rows, &[1]);
        lines.push(format!("\n{}", group.title()));
        lines.extend(rows.lines().map(|line| line.trim_end().to_owned()));
    }
    lines.extend(record.notes.iter().map(|note| format!("note: {}", printable(note))));
    lines.extend(record.job.as_ref().map(job));
    lines.join("\n")
}

fn right(rows: &mut Table, columns: &[usize]) {
    for column in columns {
        if let Some(column) = rows.column_mut(*column) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
}

fn job(job: &Job) -> String {
    let mut lines = vec![format!("\n{} with {} of data would take about", size(job.image_bytes), size(job.data_bytes))];
    let mut rows = table();
    for way in &job.ways {
        let waits = format!("waits for: {}", printable(&way.bottleneck));
        rows.add_row([time(way.seconds), printable(&way.command), size(way.stored_bytes), waits]);
    }
    right(&mut rows, &[0, 2]);
    lines.extend(rows.lines().map(|line| line.trim_end().to_owned()));
    if job.ways.is_empty() {
        lines.push("  nothing that can be told: the figures that it follows from are missing (see the notes)".to_owned());
    }
    if job.ways.iter().any(|way| way.command.contains("--verify none")) {
        lines.push(
            "--verify none: nobody compares what was read with the source's hash; what was sent is compared all the same"
                .to_owned(),
        );
    }
    if !job.ways.iter().any(|way| way.route == Route::Glance) {
        let hash = job.hash_s.map(|seconds| {
            format!("at least {}, for SHA-512 of the whole disk alone (--verify none leaves that out); ", time(seconds))
        });
        lines.push(format!(
            "Glance to Glance: {}choose a cloud (--os-cloud NAME, or OS_CLOUD), then fetching and sending are measured, too",
            hash.unwrap_or_default()
        ));
    }
    if let Some(seconds) = job.read_whole_s {
        lines.push(format!(
            "file to file: where the file has holes for its zeros; one without holes takes at least {}, for reading",
            time(seconds)
        ));
    }
    lines.join("\n")
}

/// Several runs side by side: a row a figure, a column a run; the best of a row is marked.
pub fn side_by_side(records: &[Record]) -> String {
    let mut rows = table();
    let heading = |text: &dyn Fn(&Record) -> String| records.iter().map(text).collect::<Vec<_>>();
    rows.add_row([vec![String::new()], heading(&|record| printable(record.title()))].concat());
    rows.add_row([vec!["when".to_owned()], heading(&|record| printable(&record.date))].concat());
    rows.add_row([vec!["folder".to_owned()], heading(&|record| printable(&record.machine.folder))].concat());
    let mut any_best = false;
    for (key, name) in keys(records) {
        let figures: Vec<_> = records.iter().map(|record| record.measure(&key)).collect();
        let mut cell = |at: usize| {
            let Some(figure) = figures[at] else { return "-  ".to_owned() };
            let mut others =
                figures.iter().enumerate().filter(|(other, _)| *other != at).filter_map(|(_, other)| *other).peekable();
            let is_best = others.peek().is_some() && others.all(|other| figure.beats(other));
            any_best |= is_best;
            format!("{}{}", speed(figure.bytes_per_s), if is_best { " *" } else { "  " })
        };
        rows.add_row([vec![name], (0..records.len()).map(&mut cell).collect()].concat());
    }
    right(&mut rows, &(1..=records.len()).collect::<Vec<_>>());
    let mut lines: Vec<String> = rows.lines().map(|line| line.trim_end().to_owned()).collect();
    if any_best {
        lines.push("* faster than all others in its row, with the slowest of its samples".to_owned());
    }
    for record in records {
        if let Some(way) = record.job.as_ref().and_then(|job| Some((job, job.ways.first()?))) {
            let (of, first) = way;
            lines.push(format!(
                "{}: {} with {} of data in about {} ({}; waits for: {})",
                printable(record.title()),
                size(of.image_bytes),
                size(of.data_bytes),
                time(first.seconds),
                printable(&first.command),
                printable(&first.bottleneck)
            ));
        }
    }
    lines.join("\n")
}

/// Keys and names of all figures of all runs, in the order of their first appearance, groups together.
pub fn keys(records: &[Record]) -> Vec<(String, String)> {
    let mut found: Vec<(String, String)> = Vec::new();
    for group in Group::ALL {
        for measure in records.iter().flat_map(|record| &record.measures).filter(|measure| measure.group == group) {
            if !found.iter().any(|(key, _)| *key == measure.key) {
                found.push((measure.key.clone(), printable(&measure.name)));
            }
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::{
        super::record::{Measure, Record},
        *,
    };

    #[test]
    fn numbers_are_for_people() {
        assert_eq!(speed(500.0 * f64::from(1 << 20)), "500 MiB/s");
        assert_eq!(speed(12.34 * f64::from(1 << 20)), "12.3 MiB/s");
        assert_eq!(speed(20.0 * f64::from(1 << 30)), "20.0 GiB/s");
    }

    #[test]
    fn runs_stand_side_by_side_and_the_best_of_a_row_is_marked() {
        let run = |flavor: &str, rates: &[(&str, f64)]| {
            let samples =
                |rate: &f64| vec![rate * f64::from(1 << 20), rate * f64::from(1 << 20), rate * 0.9 * f64::from(1 << 20)];
            let measures = rates.iter().map(|(key, rate)| Measure::new(key, Group::Disk, key, 1, samples(rate)).unwrap());
            let machine = Machine { flavor: Some(flavor.to_owned()), ..Machine::default() };
            Record { machine, measures: measures.collect(), ..Record::default() }
        };
        let text = side_by_side(&[
            run("io.160GB", &[("w", 100.0), ("n", 96.0)]),
            run("io.700GB", &[("w", 300.0), ("r", 7.0), ("n", 100.0)]),
        ]);
        let lines: Vec<_> = text.lines().collect();
        assert!(lines[0].contains("io.160GB") && lines[0].contains("io.700GB"), "{text}");
        let row = |name: &str| lines.iter().find(|line| line.trim_start().starts_with(name)).unwrap().to_string();
        assert!(row("w ").contains("100 MiB/s") && row("w ").contains("300 MiB/s *"), "{text}");
        assert!(row("r ").contains('-') && row("r ").contains("7.0 MiB/s"), "{text}");
        assert!(!row("r ").contains('*'), "there is nothing that it beats: {text}");
        assert!(!row("n ").contains('*'), "their samples overlap: {text}");
    }
}
