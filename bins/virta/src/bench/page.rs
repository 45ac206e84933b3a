//! Runs as one HTML page: nothing is fetched, nothing is run, it can be mailed.

use maud::{DOCTYPE, Markup, PreEscaped, html};
use stages::text::{size, time};

use super::{
    record::{Group, Job, Measure, Record},
    text::{keys, speed},
};

const STYLE: &str = include_str!("page.css");
/// Colors of runs; a ninth run begins anew.
const COLORS: [&str; 8] = ["#2a78b8", "#e07b39", "#3a9d6e", "#b4508f", "#8a6fd1", "#c2a33a", "#5ba7a5", "#9a5b4f"];

/// The page. One run, or several side by side.
pub fn page(records: &[Record]) -> String {
    let title = match records {
        [one] => format!("virta bench: {}", one.title()),
        several => format!("virta bench: {} runs side by side", several.len()),
    };
    let page = html! {
        (DOCTYPE)
        html lang="en" {
            head {
                meta charset="utf-8";
                meta name="viewport" content="width=device-width, initial-scale=1";
                title { (title) }
                style { (PreEscaped(STYLE)) }
            }
            body {
                main {
                    h1 { (title) }
                    (machines(records))
                    @for record in records { @if let Some(job) = &record.job { (ways(record, job, records.len() > 1)) } }
                    @for group in Group::ALL { (bars(records, group)) }
                    (scaling(records))
                    (notes(records))
                    footer { "Medians; a thin line shows the lowest and the highest sample. MiB and GiB are 1024-based. Made by virta " (env!("CARGO_PKG_VERSION")) "." }
                }
            }
        }
    };
    page.into_string()
}

fn color(run: usize) -> &'static str {
    COLORS[run % COLORS.len()]
}

fn machines(records: &[Record]) -> Markup {
    html! {
        section.machines {
            @for (run, record) in records.iter().enumerate() {
                @let machine = &record.machine;
                div.machine style=(format!("border-color: {}", color(run))) {
                    h2 { (record.title()) }
                    dl {
                        dt { "host" } dd { (machine.host) }
                        dt { "processor" } dd { (machine.cpu) ", " (machine.cores) " cores" }
                        dt { "memory" } dd { (size(machine.memory_bytes)) }
                        dt { "folder" } dd { (machine.folder) " (" (machine.filesystem) ")" }
                        @if let Some(cloud) = &machine.cloud { dt { "cloud" } dd { (cloud) } }
                        dt { "when" } dd { (record.date) ", virta " (record.virta) }
                    }
                }
            }
        }
    }
}

/// Percent of the widest, for a style attribute.
fn percent(value: f64, most: f64) -> String {
    format!("{:.2}%", (value / most * 100.0).clamp(0.0, 100.0))
}

fn bars(records: &[Record], group: Group) -> Markup {
    let measures =
        |record: &Record| record.measures.iter().filter(|measure| measure.group == group).cloned().collect::<Vec<Measure>>();
    let of_group: Vec<Vec<Measure>> = records.iter().map(measures).collect();
    // the zero test runs at memory's speed, and would make everything else a sliver: each family has its own scale
    let family = |key: &str| {
        let second = key.split('.').nth(1).unwrap_or_default();
        let alike = [("sha512", "hash"), ("md5", "hash"), ("zlib", "compression"), ("zstd", "compression")];
        alike.iter().find(|(one, _)| *one == second).map_or(second, |(_, family)| family).to_owned()
    };
    let most = |key: &str| {
        let alike = of_group.iter().flatten().filter(|measure| family(&measure.key) == family(key));
        alike.map(|measure| measure.high).fold(1.0, f64::max)
    };
    let rows: Vec<(String, String)> =
        keys(records).into_iter().filter(|(key, _)| of_group.iter().flatten().any(|measure| measure.key == *key)).collect();
    html! {
        @if !rows.is_empty() {
            section {
                h2 { (group.title()) }
                div.bars {
                    @for (key, name) in &rows {
                        div.name { (name) }
                        div.tracks {
                            @for (run, measures) in of_group.iter().enumerate() {
                                @if let Some(measure) = measures.iter().find(|measure| measure.key == *key) {
                                    div.track {
                                        div.bar style=(format!("width: {}; background: {}", percent(measure.bytes_per_s, most(key)), color(run)))
                                            title=(format!("{}: {} ({} to {})", records[run].title(), speed(measure.bytes_per_s), speed(measure.low), speed(measure.high))) {}
                                        div.spread style=(format!("left: {}; width: {}", percent(measure.low, most(key)), percent(measure.high - measure.low, most(key)))) {}
                                    }
                                    div.figure {
                                        (speed(measure.bytes_per_s))
                                        @if let Some(ratio) = measure.ratio { " · " (format!("{:.0} %", ratio * 100.0)) }
                                    }
                                }
                            }
                        }
                    }
                }
                @if group == Group::Processor { p.hint { "Each family has its own scale. Behind a compression's speed: what is left of the size." } }
            }
        }
    }
}

/// How a job's time comes about.
fn ways(record: &Record, job: &Job, several: bool) -> Markup {
    let most =
        job.ways.iter().flat_map(|way| way.parts.iter().map(|part| part.seconds).chain([way.seconds])).fold(0.001, f64::max);
    html! {
        section {
            h2 {
                (size(job.image_bytes)) " with " (size(job.data_bytes)) " of data"
                @if several { " on " (record.title()) }
            }
            @for (number, way) in job.ways.iter().enumerate() {
                div.way.best[number == 0] {
                    div.time { (time(way.seconds)) }
                    div.what {
                        code { (way.command) }
                        div.hint { "waits for: " strong { (way.bottleneck) } "; makes " (size(way.stored_bytes)) }
                        div.bars.parts {
                            @for part in &way.parts {
                                div.name { (part.name) }
                                div.tracks {
                                    div.track { div.bar style=(format!("width: {}", percent(part.seconds, most))) {} }
                                    div.figure { (time(part.seconds)) }
                                }
                            }
                        }
                    }
                }
            }
            @if job.ways.is_empty() { p.hint { "The figures that it follows from are missing." } }
            @else { p.hint { "Each bar is what the part would take alone; many run at the same time." } }
        }
    }
}

const PLOT: (f64, f64) = (640.0, 260.0);
const MARGIN: (f64, f64) = (84.0, 52.0);
/// Above the plot: half a line of text.
const ABOVE: f64 = 10.0;

/// A step of a scale, bytes a second, so that four steps or fewer reach `most`: 1, 2, 2.5 or 5 times a power of ten, MiB.
fn scale_step(most: f64) -> f64 {
    let least = (most / f64::from(1 << 20) / 4.0).max(0.01);
    let power = 10_f64.powf(least.log10().floor());
    let step = [1.0, 2.0, 2.5, 5.0, 10.0].into_iter().map(|factor| factor * power).find(|step| *step >= least);
    step.unwrap_or(10.0 * power) * f64::from(1 << 20)
}

/// Throughput over connections.
fn scaling(records: &[Record]) -> Markup {
    let points = |record: &Record| -> Vec<(f64, f64)> {
        let down = record.measures.iter().filter(|measure| measure.key.starts_with("glance.down."));
        #[expect(clippy::cast_precision_loss, reason = "a few connections")]
        down.map(|measure| (measure.parallel as f64, measure.bytes_per_s)).collect()
    };
    let lines: Vec<Vec<(f64, f64)>> = records.iter().map(points).collect();
    let step = scale_step(lines.iter().flatten().map(|(_, rate)| *rate).fold(0.0, f64::max));
    let most = step * 4.0;
    if lines.iter().all(|line| line.len() < 2) {
        return html! {};
    }
    let (width, height) = PLOT;
    let (left, below) = MARGIN;
    // connections double from one place to the next
    let x = |connections: f64| left + connections.log2() / 3.0 * (width - left - 16.0);
    let y = |rate: f64| (height - below) * (1.0 - rate / most) + ABOVE;
    html! {
        section {
            h2 { "Fetching with more connections" }
            svg viewBox=(format!("0 0 {width} {height}")) role="img" aria-label="throughput over connections" {
                @for number in 0..=4_u8 {
                    @let rate = step * f64::from(number);
                    line.grid x1=(left) x2=(width - 16.0) y1=(y(rate)) y2=(y(rate)) {}
                    text.axis x=(left - 8.0) y=(y(rate) + 4.0) text-anchor="end" { @if number == 0 { "0" } @else { (speed(rate)) } }
                }
                text.axis x=((left + width - 16.0) / 2.0) y=(height - 6.0) text-anchor="middle" { "connections" }
                @for connections in [1.0, 2.0, 4.0, 8.0] {
                    text.axis x=(x(connections)) y=(height - 24.0) text-anchor="middle" { (connections) }
                }
                @for (run, line) in lines.iter().enumerate() {
                    polyline.curve style=(format!("stroke: {}", color(run))) points=(line.iter().map(|(at, rate)| format!("{:.1},{:.1}", x(*at), y(*rate))).collect::<Vec<_>>().join(" ")) {}
                    @for (at, rate) in line {
                        circle cx=(format!("{:.1}", x(*at))) cy=(format!("{:.1}", y(*rate))) r="4" style=(format!("fill: {}", color(run))) { title { (speed(*rate)) } }
                    }
                }
            }
        }
    }
}

fn notes(records: &[Record]) -> Markup {
    html! {
        @if records.iter().any(|record| !record.notes.is_empty()) {
            section {
                h2 { "Notes" }
                ul { @for record in records { @for note in &record.notes {
                    li { @if records.len() > 1 { (record.title()) ": " } (note) }
                } } }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::{predict, record::Machine};

    #[test]
    fn what_comes_from_elsewhere_is_text_and_never_markup() {
        let machine = Machine {
            host: "<script>alert(1)</script>".to_owned(),
            flavor: Some("\"><img src=x>".to_owned()),
            ..Machine::default()
        };
        let record = Record { machine, notes: vec!["<b>".to_owned()], ..Record::default() };
        let text = page(&[record]);
        assert!(!text.contains("<script") && !text.contains("<img") && !text.contains("<b>"), "{text}");
        assert!(text.contains("&lt;script&gt;"));
    }

    #[test]
    fn nothing_is_fetched_and_every_figure_is_there() {
        let down = |connections: usize, rate: f64| {
            Measure::new(&format!("glance.down.{connections}"), Group::Glance, "fetch", connections, vec![rate]).unwrap()
        };
        let mut record = Record { measures: vec![down(1, 1e8), down(4, 3e8)], ..Record::default() };
        record.job = Some(predict::job(&record, 1 << 30, 1 << 29));
        let text = page(&[record.clone(), record]);
        assert!(!text.contains("http") && !text.contains("url("), "something is fetched");
        assert_eq!(text.matches("class=\"bar\"").count(), 4);
        assert_eq!(text.matches("<polyline").count(), 2);
        assert_eq!(
            text.matches("286 MiB/s").count(),
            2 * (1 + 3 + 1),
            "figure, tooltip of the bar with its range, tooltip of the point"
        );
    }
}
