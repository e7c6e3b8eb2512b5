//! The load generator's report: one self-contained HTML file.
//!
//! It has no script, font or request. The plots are inline SVG, narrow enough for a phone, and coloured by CSS
//! variables, so that dark mode needs no second drawing. Every text from outside passes through [`escape`].

/// The results of a run, ready for display.
#[derive(Clone, Debug, Default)]
pub(crate) struct Report {
    /// The title of the run.
    pub(crate) title: String,
    /// Name and value of each condition: CPU, cores, filesystem, commit, durability, command line.
    pub(crate) facts: Vec<(String, String)>,
    /// Name and value of the most important figures.
    pub(crate) headline: Vec<(String, String)>,
    /// Reasons why the figures are less reliable than they look.
    pub(crate) warnings: Vec<String>,
    /// The latency distributions.
    pub(crate) stages: Vec<Stage>,
    /// The run, interval by interval.
    pub(crate) timeseries: Vec<Tick>,
    /// Each shard and its number of events.
    pub(crate) shards: Vec<(u16, u64)>,
    /// Latency by offered load; empty without a search.
    pub(crate) load: Vec<LoadPoint>,
    /// The number of events at every stage: published, appended, durable, replayed.
    pub(crate) integrity: Vec<(String, u64)>,
}

/// The latency from publishing to one stage.
#[derive(Clone, Debug, Default)]
pub(crate) struct Stage {
    /// Such as `publish → appended`.
    pub(crate) name: String,
    /// The durability mode it was measured in.
    pub(crate) durability: String,
    /// Events measured.
    pub(crate) count: u64,
    /// Median in nanoseconds, like the quantiles below.
    pub(crate) p50: u64,
    /// 90 %.
    pub(crate) p90: u64,
    /// 99 %.
    pub(crate) p99: u64,
    /// 99.9 %.
    pub(crate) p999: u64,
    /// 99.99 %.
    pub(crate) p9999: u64,
    /// The slowest event.
    pub(crate) max: u64,
    /// Percentile (0 to 100) and nanoseconds, ascending. If empty, the quantiles above are drawn.
    pub(crate) curve: Vec<(f64, u64)>,
}

/// One interval of the run.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Tick {
    /// Time since the start at the interval's end.
    pub(crate) seconds: f64,
    /// Within the interval.
    pub(crate) events_per_second: f64,
    /// Within the interval.
    pub(crate) p99_ns: u64,
    /// Events published but not yet appended, at the interval's end.
    pub(crate) backlog: u64,
}

/// One step of the search for the highest load.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct LoadPoint {
    /// Offered events per second.
    pub(crate) offered: f64,
    /// Achieved events per second.
    pub(crate) achieved: f64,
    /// Nanoseconds, from the intended time.
    pub(crate) p50_ns: u64,
    /// Nanoseconds, from the intended time.
    pub(crate) p99_ns: u64,
}

/// Returns the report as one HTML document.
pub(crate) fn html(report: &Report) -> String {
    let title = escape(&report.title);
    let warnings: String =
        report.warnings.iter().map(|text| format!("<p role=\"note\">{}</p>", escape(text))).collect();
    let plots = [
        percentiles(&report.stages),
        throughput(&report.timeseries),
        p99(&report.timeseries),
        backlog(&report.timeseries),
        latency_by_load(&report.load),
        shards(&report.shards),
    ];
    [
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">",
        "<meta name=\"viewport\" content=\"width=device-width,initial-scale=1\">",
        "<meta name=\"color-scheme\" content=\"light dark\">",
        &format!("<title>{title}</title><style>{STYLE}</style></head><body><main>"),
        &format!("<header><h1>{title}</h1></header>"),
        &wrap("<dl class=\"headline\">", &pairs(&report.headline), "</dl>"),
        &wrap("<div class=\"warnings\">", &warnings, "</div>"),
        &integrity(&report.integrity),
        &wrap("<div class=\"plots\">", &plots.concat(), "</div>"),
        &stage_table(&report.stages),
        &wrap("<section><h2>Conditions</h2><dl class=\"facts\">", &pairs(&report.facts), "</dl></section>"),
        "</main></body></html>\n",
    ]
    .concat()
}

/// Formats a duration: `1.2 µs`.
pub(crate) fn ns(ns: u64) -> String {
    scaled(ns as f64, &["ns", "µs", "ms", "s"])
}

/// Formats events per second: `12.3 M/s`.
pub(crate) fn rate(per_second: f64) -> String {
    scaled(per_second, &["/s", "k/s", "M/s", "G/s"])
}

/// Formats a value with at most four digits and its unit. Whole numbers of the smallest unit stay whole.
fn scaled(value: f64, units: &[&str]) -> String {
    if !value.is_finite() {
        return "–".to_owned();
    }
    let (mut value, mut unit) = (value, 0);
    // 999.95 would print as 1000.0.
    while value.abs() >= 999.95 && unit + 1 < units.len() {
        (value, unit) = (value / 1000.0, unit + 1);
    }
    let digits = usize::from(unit > 0 && value.abs() < 99.95);
    format!("{value:.digits$} {}", units[unit])
}

/// Formats `12345678` as `12,345,678`.
fn grouped(n: u64) -> String {
    let digits = n.to_string();
    let mut out = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            c => out.push(c),
        }
    }
    out
}

/// Wraps a text, unless it is empty.
fn wrap(open: &str, inner: &str, close: &str) -> String {
    if inner.is_empty() { String::new() } else { [open, inner, close].concat() }
}

fn pairs(pairs: &[(String, String)]) -> String {
    pairs
        .iter()
        .map(|(name, value)| format!("<div><dt>{}</dt><dd>{}</dd></div>", escape(name), escape(value)))
        .collect()
}

fn integrity(counts: &[(String, u64)]) -> String {
    let Some(&(_, first)) = counts.first() else {
        return String::new();
    };
    let cells: Vec<_> = counts.iter().map(|(name, n)| (name.clone(), grouped(*n))).collect();
    let least = counts.iter().map(|(_, n)| *n).min().unwrap_or(first);
    let most = counts.iter().map(|(_, n)| *n).max().unwrap_or(first);
    let (class, verdict) = match most - least {
        0 => ("good", "✓ All counts agree: nothing lost, nothing duplicated.".to_owned()),
        gap => ("bad", format!("✗ The counts differ by {}.", grouped(gap))),
    };
    format!(
        "<section><h2>Integrity</h2><dl class=\"counts\">{}</dl><p class=\"verdict {class}\">{verdict}</p></section>",
        pairs(&cells)
    )
}

fn stage_table(stages: &[Stage]) -> String {
    let rows: String = stages
        .iter()
        .map(|stage| {
            let Stage { p50, p90, p99, p999, p9999, max, .. } = *stage;
            let cells: String = [p50, p90, p99, p999, p9999, max].map(|v| format!("<td>{}</td>", ns(v))).concat();
            let (name, durability) = (escape(&stage.name), escape(&stage.durability));
            let count = grouped(stage.count);
            format!("<tr><th scope=\"row\">{name}<small>{durability}</small></th>{cells}<td>{count}</td></tr>")
        })
        .collect();
    let heads = ["p50", "p90", "p99", "p99.9", "p99.99", "max", "events"];
    let heads = heads.map(|head| format!("<th scope=\"col\">{head}</th>")).concat();
    wrap(
        &format!(
            "<section><h2>Stages</h2><div class=\"scroll\" tabindex=\"0\" role=\"region\" aria-label=\"Latency by stage\">\
             <table><thead><tr><th scope=\"col\">stage</th>{heads}</tr></thead><tbody>"
        ),
        &rows,
        "</tbody></table></div></section>",
    )
}

// ---- plots ----

const WIDTH: f64 = 360.0;
const HEIGHT: f64 = 236.0;
const LEFT: f64 = 50.0;
const RIGHT: f64 = 14.0;
const TOP: f64 = 10.0;
const BOTTOM: f64 = 40.0;
const POINTS_MAX: usize = 400;
const COLOURS: usize = 6;
/// The share of an offered load that must be achieved for the load to count as sustained.
const SUSTAINED: f64 = 0.98;

/// One axis: its two end values, ticks and label.
struct Axis {
    low: f64,
    high: f64,
    log: bool,
    ticks: Vec<(f64, String)>,
    label: &'static str,
}

impl Axis {
    /// Returns the relative position of a value, from 0 to 1.
    fn at(&self, value: f64) -> f64 {
        let scale = |v: f64| {
            if self.log { v.max(f64::MIN_POSITIVE).log10() } else { v }
        };
        ((scale(value) - scale(self.low)) / (scale(self.high) - scale(self.low))).clamp(0.0, 1.0)
    }

    /// Returns an axis from zero in steps of 1, 2 or 5.
    fn linear(most: f64, label: &'static str, unit: impl Fn(f64) -> String) -> Self {
        let most = if most.is_finite() && most > 0.0 { most } else { 1.0 };
        let magnitude = 10_f64.powf((most / 4.0).log10().floor());
        let step = [1.0, 2.0, 5.0, 10.0].map(|n| n * magnitude).into_iter().find(|step| most / step <= 4.5);
        let step = step.unwrap_or(10.0 * magnitude);
        let steps = (most / step).ceil().max(1.0);
        let ticks = (0..=steps as u32).map(|n| f64::from(n) * step).map(|v| (v, unit(v))).collect();
        Self { low: 0.0, high: steps * step, log: false, ticks, label }
    }

    /// Returns a logarithmic axis of nanoseconds in whole decades.
    fn decades(values: impl Iterator<Item = u64>, label: &'static str) -> Self {
        let (least, most) = values.fold((u64::MAX, 1), |(least, most), v| (least.min(v.max(1)), most.max(v)));
        let low = least.min(most).ilog10();
        let high = (most as f64).log10().ceil().max(f64::from(low) + 1.0) as u32;
        let ticks = (low..=high).map(|n| 10_f64.powi(n as i32)).map(|v| (v, short(ns(v as u64)))).collect();
        Self { low: 10_f64.powi(low as i32), high: 10_f64.powi(high as i32), log: true, ticks, label }
    }

    /// Returns an axis of 1/(1−p), on which every further nine takes the same space.
    fn nines(most: f64) -> Self {
        let high = most.clamp(1e4, 1e5);
        let ticks = [50.0, 90.0, 99.0, 99.9, 99.99].map(|p| (rarity(p), format!("{p} %")));
        Self { low: 1.0, high, log: true, ticks: ticks.to_vec(), label: "percentile" }
    }
}

/// Returns n if one in n events is slower than the percentile.
fn rarity(percentile: f64) -> f64 {
    1.0 / (1.0 - percentile / 100.0).max(1e-9)
}

/// Shortens a tick: `10.0 µs` to `10 µs`, and zero to `0`. Ticks are round numbers.
fn short(text: String) -> String {
    if text.starts_with("0 ") { "0".to_owned() } else { text.replace(".0 ", " ") }
}

/// One line of a plot.
struct Series {
    name: String,
    points: Vec<(f64, f64)>,
    area: bool,
    /// CSS class of the dot at each point; empty for no dots.
    dots: Vec<&'static str>,
}

/// Returns a figure with its caption, a legend if it has several lines, and the drawing.
fn plot(title: &str, note: &str, x: &Axis, y: &Axis, series: &[Series]) -> String {
    let px = |v: f64| LEFT + x.at(v) * (WIDTH - LEFT - RIGHT);
    let py = |v: f64| HEIGHT - BOTTOM - y.at(v) * (HEIGHT - TOP - BOTTOM);
    let (right, base) = (WIDTH - RIGHT, HEIGHT - BOTTOM);
    let mut body = String::new();
    for (value, text) in &y.ticks {
        let at = py(*value);
        body += &format!("<path class=\"grid\" d=\"M{LEFT} {at:.1}H{right}\"/>");
        body += &format!("<text class=\"y\" x=\"{:.1}\" y=\"{:.1}\">{text}</text>", LEFT - 7.0, at + 4.0);
    }
    for (value, text) in &x.ticks {
        let at = px(*value);
        body += &format!("<path class=\"tick\" d=\"M{at:.1} {base}v5\"/>");
        // A character is about half as wide as high; keeps the last text inside the drawing.
        let at = at.min(WIDTH - 1.0 - text.chars().count() as f64 * 3.5);
        body += &format!("<text x=\"{at:.1}\" y=\"{:.1}\">{text}</text>", base + 17.0);
    }
    body += &format!("<path class=\"axis\" d=\"M{LEFT} {base}H{right}\"/>");
    let middle = f64::midpoint(LEFT, right);
    body += &format!("<text class=\"label\" x=\"{middle}\" y=\"{}\">{}</text>", HEIGHT - 6.0, x.label);
    for (n, line) in series.iter().enumerate() {
        let colour = n % COLOURS;
        let points: Vec<_> = line.points.iter().map(|&(a, b)| (px(a), py(b))).collect();
        let path: String = points.iter().map(|(a, b)| format!("{a:.1} {b:.1} ")).collect();
        if let (true, Some(first), Some(last)) = (line.area, points.first(), points.last()) {
            body +=
                &format!("<path class=\"area c{colour}\" d=\"M{:.1} {base}L{path}L{:.1} {base}Z\"/>", first.0, last.0);
        }
        body += &wrap(&format!("<path class=\"line c{colour}\" d=\"M"), path.trim_end(), "\"/>");
        // A line of one point is invisible.
        let lone: &[&str] = if points.len() == 1 { &["full"] } else { &[] };
        let dots = if line.dots.is_empty() { lone } else { &line.dots };
        for ((a, b), class) in points.iter().zip(dots) {
            body += &format!("<circle class=\"{class} c{colour}\" cx=\"{a:.1}\" cy=\"{b:.1}\" r=\"3\"/>");
        }
    }
    let keys: String = series
        .iter()
        .enumerate()
        .map(|(n, line)| {
            let colour = n % COLOURS;
            let swatch = format!(
                "<svg viewBox=\"0 0 22 8\" aria-hidden=\"true\"><path class=\"line c{colour}\" d=\"M1 4H21\"/></svg>"
            );
            format!("<li>{swatch}{}</li>", escape(&line.name))
        })
        .collect();
    let legend = if series.len() > 1 { wrap("<ul class=\"legend\">", &keys, "</ul>") } else { String::new() };
    figure(title, note, &legend, HEIGHT, &body)
}

fn figure(title: &str, note: &str, legend: &str, height: f64, body: &str) -> String {
    format!(
        "<figure><figcaption><h2>{title}</h2><p>{note}</p></figcaption>\
         <svg viewBox=\"0 0 {WIDTH} {height}\" role=\"img\" aria-label=\"{title}. {note}\">{body}</svg>{legend}</figure>"
    )
}

fn percentiles(stages: &[Stage]) -> String {
    let curves: Vec<_> = stages.iter().filter(|stage| stage.count > 0).map(|stage| (stage, curve(stage))).collect();
    if curves.is_empty() {
        return String::new();
    }
    let finite = curves.iter().flat_map(|(_, curve)| curve).filter(|(p, _)| *p < 100.0);
    let x = Axis::nines(finite.map(|(p, _)| rarity(*p)).fold(1e4, f64::max));
    let y = Axis::decades(curves.iter().flat_map(|(_, curve)| curve).map(|(_, v)| *v), "");
    let series: Vec<_> = curves
        .iter()
        .map(|(stage, curve)| Series {
            name: if stage.durability.is_empty() {
                stage.name.clone()
            } else {
                format!("{} · {}", stage.name, stage.durability)
            },
            points: curve.iter().map(|&(p, v)| (rarity(p), v as f64)).collect(),
            area: false,
            dots: Vec::new(),
        })
        .collect();
    let worst = curves.iter().map(|(stage, _)| stage.p99).max().unwrap_or(0);
    let note = match series.len() {
        1 => format!("{}: 99 % within {}.", escape(&series[0].name), ns(worst)),
        _ => format!("In every stage 99 % of the events within {}.", ns(worst)),
    };
    plot("Latency by percentile", &note, &x, &y, &series)
}

fn curve(stage: &Stage) -> Vec<(f64, u64)> {
    let usable = stage.curve.iter().copied().filter(|(p, _)| (0.0..=100.0).contains(p));
    let curve: Vec<_> = usable.collect();
    if !curve.is_empty() {
        return curve;
    }
    let Stage { p50, p90, p99, p999, p9999, max, .. } = *stage;
    vec![(50.0, p50), (90.0, p90), (99.0, p99), (99.9, p999), (99.99, p9999), (100.0, max)]
}

/// Reduces the number of points: averages rates, and keeps the maxima of latency and backlog.
fn thinned(ticks: &[Tick]) -> Vec<Tick> {
    let ticks: Vec<_> =
        ticks.iter().copied().filter(|tick| tick.seconds.is_finite() && tick.events_per_second.is_finite()).collect();
    let several = ticks.len().div_ceil(POINTS_MAX).max(1);
    ticks
        .chunks(several)
        .map(|chunk| Tick {
            seconds: chunk[chunk.len() - 1].seconds,
            events_per_second: chunk.iter().map(|tick| tick.events_per_second).sum::<f64>() / chunk.len() as f64,
            p99_ns: chunk.iter().map(|tick| tick.p99_ns).max().unwrap_or(0),
            backlog: chunk.iter().map(|tick| tick.backlog).max().unwrap_or(0),
        })
        .collect()
}

/// Plots one value of every interval over time.
fn over_time(title: &str, note: &str, y: &Axis, ticks: &[Tick], value: impl Fn(&Tick) -> f64) -> String {
    let last = ticks.iter().map(|tick| tick.seconds).fold(0.0, f64::max);
    let mut x = Axis::linear(last, "seconds", |v| format!("{}", (v * 1000.0).round() / 1000.0));
    if last > 0.0 {
        // The axis ends with the run.
        x.high = last;
        x.ticks.retain(|(value, _)| *value <= last);
    }
    let points = ticks.iter().map(|tick| (tick.seconds, value(tick))).collect();
    plot(title, note, &x, y, &[Series { name: title.to_owned(), points, area: true, dots: Vec::new() }])
}

fn throughput(ticks: &[Tick]) -> String {
    let ticks = thinned(ticks);
    if ticks.is_empty() {
        return String::new();
    }
    let rates = || ticks.iter().map(|tick| tick.events_per_second);
    let y = Axis::linear(rates().fold(0.0, f64::max), "", |v| short(rate(v)));
    let mean = rates().sum::<f64>() / ticks.len() as f64;
    let least = rates().fold(f64::INFINITY, f64::min);
    let note = format!("Mean {}, slowest interval {}.", rate(mean), rate(least));
    over_time("Throughput over time", &note, &y, &ticks, |tick| tick.events_per_second)
}

fn p99(ticks: &[Tick]) -> String {
    let ticks = thinned(ticks);
    let values = || ticks.iter().map(|tick| tick.p99_ns);
    let worst = values().max().unwrap_or(0);
    if worst == 0 {
        return String::new();
    }
    let note = format!("Worst interval {}.", ns(worst));
    over_time("p99 over time", &note, &Axis::decades(values(), ""), &ticks, |tick| tick.p99_ns as f64)
}

fn backlog(ticks: &[Tick]) -> String {
    let ticks = thinned(ticks);
    let most = ticks.iter().map(|tick| tick.backlog).max().unwrap_or(0);
    if most == 0 {
        return String::new();
    }
    let y = Axis::linear(most as f64, "", |v| short(scaled(v, &["", "k", "M", "G"])));
    let note = format!("At most {} events in flight.", grouped(most));
    over_time("Backlog over time", &note, &y, &ticks, |tick| tick.backlog as f64)
}

fn latency_by_load(load: &[LoadPoint]) -> String {
    let mut load: Vec<_> = load.iter().filter(|at| at.offered.is_finite()).collect();
    if load.is_empty() {
        return String::new();
    }
    load.sort_unstable_by(|a, b| a.offered.total_cmp(&b.offered));
    let x = Axis::linear(load[load.len() - 1].offered, "offered load", |v| short(rate(v)));
    let y = Axis::decades(load.iter().flat_map(|at| [at.p50_ns, at.p99_ns]), "");
    let is_sustained = |at: &LoadPoint| at.achieved >= SUSTAINED * at.offered;
    let line = |name: &str, value: fn(&LoadPoint) -> u64| Series {
        name: name.to_owned(),
        points: load.iter().map(|at| (at.offered, value(at) as f64)).collect(),
        area: false,
        dots: load.iter().map(|at| if is_sustained(at) { "full" } else { "hollow" }).collect(),
    };
    let most = load.iter().take_while(|at| is_sustained(at)).last();
    let note = match most {
        Some(at) => {
            format!("Sustained up to {}, with p99 {}. Hollow dots: not sustained.", rate(at.offered), ns(at.p99_ns))
        }
        None => "No load was sustained.".to_owned(),
    };
    plot("Latency by offered load", &note, &x, &y, &[line("p50", |at| at.p50_ns), line("p99", |at| at.p99_ns)])
}

fn shards(shards: &[(u16, u64)]) -> String {
    const ROW: f64 = 26.0;
    let most = shards.iter().map(|(_, events)| *events).max().unwrap_or(0);
    if most == 0 {
        return String::new();
    }
    let sum: u64 = shards.iter().map(|(_, events)| *events).sum();
    let digits = shards.iter().map(|(shard, _)| shard.to_string().len()).max().unwrap_or(1);
    let from = 48.0 + 7.0 * digits as f64;
    let room = WIDTH - from - 8.0 - 7.0 * grouped(most).len() as f64;
    let mut body = String::new();
    for (n, (shard, events)) in shards.iter().enumerate() {
        let top = n as f64 * ROW + 4.0;
        let width = (*events as f64 / most as f64 * room).max(1.0);
        let text = top + 13.0;
        body += &format!("<text class=\"y\" x=\"{}\" y=\"{text}\">shard {shard}</text>", from - 7.0);
        body +=
            &format!("<rect class=\"bar c0\" x=\"{from}\" y=\"{top}\" width=\"{width:.1}\" height=\"18\" rx=\"2\"/>");
        body += &format!("<text class=\"x\" x=\"{:.1}\" y=\"{text}\">{}</text>", from + width + 8.0, grouped(*events));
    }
    let mean = sum as f64 / shards.len() as f64;
    let note = format!("The largest has {:.2} times the mean.", most as f64 / mean);
    figure("Events by shard", &note, "", shards.len() as f64 * ROW + 4.0, &body)
}

const STYLE: &str = "
:root{--bg:#faf9f7;--card:#fff;--ink:#1d2127;--soft:#5c6470;--line:#e4e1db;--good:#17693f;--bad:#b3261e;--warn:#8a5a00;--warn-bg:#fdf4de;
--c0:#1d5fc0;--c1:#c2500b;--c2:#0b7a6e;--c3:#8a3fc7;--c4:#8a6a00;--c5:#b82468}
@media(prefers-color-scheme:dark){:root{--bg:#121417;--card:#1a1d21;--ink:#e7e9ec;--soft:#a0a8b3;--line:#2d3238;--good:#6fd39a;--bad:#ff8b80;--warn:#f0c469;--warn-bg:#2a2312;
--c0:#79aeff;--c1:#ff9d5c;--c2:#5ad1c1;--c3:#c89bff;--c4:#dcc057;--c5:#ff8ab5}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--ink);font:16px/1.5 system-ui,-apple-system,'Segoe UI',Roboto,'Helvetica Neue',sans-serif;-webkit-text-size-adjust:100%}
main{max-width:72rem;margin:0 auto;padding:1.5rem .75rem 3rem}
h1{font-size:clamp(1.4rem,1.1rem + 1.4vw,2rem);line-height:1.2;letter-spacing:-.015em;margin:0 0 1.25rem;font-weight:650;text-wrap:balance;overflow-wrap:anywhere}
h2{font-size:1rem;line-height:1.3;margin:0;font-weight:650}
p{margin:0}dl,dd{margin:0}
section,figure{margin:0;background:var(--card);border:1px solid var(--line);border-radius:.6rem;padding:1rem}
section{margin-top:1rem}
.headline{display:flex;flex-wrap:wrap;gap:1px;background:var(--line);border:1px solid var(--line);border-radius:.6rem;overflow:hidden}
.headline div{flex:1 1 9.5rem;background:var(--card);padding:.85rem 1rem;display:flex;flex-direction:column;justify-content:space-between}
.headline dt,.counts dt,.facts dt,figcaption p,small{color:var(--soft);font-size:.8125rem;line-height:1.4}
.headline dd{font-size:clamp(1.35rem,1.1rem + 1vw,1.75rem);line-height:1.25;font-weight:600;letter-spacing:-.02em;font-variant-numeric:tabular-nums;overflow-wrap:anywhere}
.warnings{margin-top:1rem;display:grid;gap:.5rem}
.warnings p{background:var(--warn-bg);border-left:3px solid var(--warn);border-radius:.25rem;padding:.6rem .85rem;font-size:.9375rem;overflow-wrap:anywhere}
.counts{display:grid;grid-template-columns:repeat(auto-fit,minmax(8rem,1fr));gap:.6rem 1rem;margin-top:.6rem}
.counts dd{font-variant-numeric:tabular-nums;font-weight:550}
.verdict{margin-top:.6rem;font-size:.9375rem;font-weight:550}.good{color:var(--good)}.bad{color:var(--bad)}
.plots{display:grid;grid-template-columns:minmax(0,1fr);gap:1rem;margin-top:1rem}
@media(min-width:48rem){.plots{grid-template-columns:repeat(2,minmax(0,1fr))}main{padding:2.5rem 1.5rem 4rem}}
figure{display:flex;flex-direction:column}
figure>svg{width:100%;height:auto;display:block;margin-top:.75rem}
figcaption p{margin-top:.1rem}
svg text{font-size:12px;fill:var(--soft);text-anchor:middle;font-variant-numeric:tabular-nums}
@media(min-width:48rem){svg text{font-size:9.5px}}
svg .y{text-anchor:end}svg .x{text-anchor:start}
.grid,.tick,.axis{stroke:var(--line);stroke-width:1;fill:none}.axis,.tick{stroke:var(--soft);stroke-opacity:.6}
.line,.grid,.tick,.axis,circle{vector-effect:non-scaling-stroke}
.line{fill:none;stroke:var(--c);stroke-width:2;stroke-linejoin:round;stroke-linecap:round}
.area{fill:var(--c);fill-opacity:.1}circle{fill:var(--c);stroke:var(--c);stroke-width:2}.hollow{fill:var(--card)}.bar{fill:var(--c);fill-opacity:.85}
.c0{--c:var(--c0)}.c1{--c:var(--c1)}.c2{--c:var(--c2)}.c3{--c:var(--c3)}.c4{--c:var(--c4)}.c5{--c:var(--c5)}
.line.c1{stroke-dasharray:7 4}.line.c2{stroke-dasharray:2 4}.line.c3{stroke-dasharray:9 3 2 3}.line.c4{stroke-dasharray:4 3}.line.c5{stroke-dasharray:12 3}
.legend{list-style:none;margin:.6rem 0 0;padding:0;display:flex;flex-wrap:wrap;gap:.2rem 1rem;font-size:.8125rem}
.legend li{display:flex;align-items:center;gap:.4rem}.legend svg{width:22px;height:8px;flex:none}
.scroll{overflow-x:auto;margin:.6rem 0 -.4rem}
table{border-collapse:separate;border-spacing:0;width:100%;font-size:.875rem;font-variant-numeric:tabular-nums}
th,td{padding:.5rem 0 .5rem 1.1rem;text-align:right;white-space:nowrap}
tbody>tr>*{border-top:1px solid var(--line)}
thead th,thead th:first-child{color:var(--soft);font-weight:400;font-size:.8125rem}
tbody th{font-weight:550}
th:first-child{text-align:left;padding-left:0;position:sticky;left:0;background:var(--card);white-space:normal;min-width:7.5rem}
small{display:block;font-weight:400}
.facts{display:grid;grid-template-columns:minmax(0,1fr);margin-top:.4rem}
.facts div{display:grid;grid-template-columns:clamp(6rem,24%,10rem) minmax(0,1fr);gap:1rem;padding:.4rem 0;border-bottom:1px solid var(--line)}
.facts div:last-child{border-bottom:0}.facts dt{line-height:1.5rem}
.facts dd{font-size:.9375rem;overflow-wrap:anywhere}
@media print{body{background:#fff}section,figure{break-inside:avoid}}
";

#[cfg(test)]
mod tests {
    use super::*;

    fn full() -> Report {
        let stage = |name: &str, p50: u64| Stage {
            name: name.into(),
            durability: "GroupCommit".into(),
            count: 1_000_000,
            p50,
            p90: p50 * 2,
            p99: p50 * 9,
            p999: p50 * 50,
            p9999: p50 * 300,
            max: p50 * 900,
            curve: vec![(0.0, p50 / 2), (50.0, p50), (99.0, p50 * 9), (99.999, p50 * 800), (100.0, p50 * 900)],
        };
        Report {
            title: "a run".into(),
            facts: vec![("cpu".into(), "some".into())],
            headline: vec![("rate".into(), rate(1.2e7))],
            warnings: vec!["noisy".into()],
            stages: vec![stage("publish → appended", 900), stage("publish → durable", 400_000)],
            timeseries: (1..=5000)
                .map(|n| Tick { seconds: f64::from(n), events_per_second: 1e6, p99_ns: 1000, backlog: 5 })
                .collect(),
            shards: vec![(0, 10), (1, 12)],
            load: vec![LoadPoint { offered: 1e6, achieved: 1e6, p50_ns: 1000, p99_ns: 9000 }],
            integrity: vec![("published".into(), 22), ("durable".into(), 22)],
        }
    }

    #[test]
    fn durations_have_a_unit_and_few_digits() {
        let expected = [
            (0, "0 ns"),
            (999, "999 ns"),
            (1_000, "1.0 µs"),
            (1_234, "1.2 µs"),
            (99_949, "99.9 µs"),
            (123_456, "123 µs"),
        ];
        for (value, text) in expected {
            assert_eq!(ns(value), text);
        }
        assert_eq!(ns(999_960), "1.0 ms");
        assert_eq!(ns(12_300_000_000), "12.3 s");
        assert_eq!(ns(u64::MAX), "18446744074 s");
    }

    #[test]
    fn rates_have_a_unit_and_few_digits() {
        assert_eq!(rate(0.0), "0 /s");
        assert_eq!(rate(12_345_678.0), "12.3 M/s");
        assert_eq!(rate(999_999.0), "1.0 M/s");
        assert_eq!(rate(2e12), "2000 G/s");
        assert_eq!(rate(f64::NAN), "–");
        assert_eq!(grouped(1_234_567), "1,234,567");
        assert_eq!(grouped(999), "999");
    }

    #[test]
    fn texts_from_outside_are_escaped() {
        const EVIL: &str = "<script>\"&'";
        let mut report = full();
        report.title = EVIL.into();
        report.facts = vec![(EVIL.into(), EVIL.into())];
        report.headline = vec![(EVIL.into(), EVIL.into())];
        report.warnings = vec![EVIL.into()];
        report.integrity = vec![(EVIL.into(), 1)];
        report.stages[0].name = EVIL.into();
        report.stages[0].durability = EVIL.into();
        let html = html(&report);
        assert!(!html.contains("<script"));
        assert!(!html.contains("\"&'"));
        assert!(html.contains("&lt;script&gt;&quot;&amp;&#39;"));
    }

    #[test]
    fn an_empty_report_is_short_and_does_not_panic() {
        let html = html(&Report::default());
        assert!(html.ends_with("</html>\n"));
        assert!(!html.contains("<figure>") && !html.contains("NaN"));
    }

    #[test]
    fn degenerate_numbers_produce_valid_coordinates() {
        let tick = |seconds, events_per_second| Tick { seconds, events_per_second, p99_ns: u64::MAX, backlog: 0 };
        let load = |offered| LoadPoint { offered, achieved: f64::NAN, p50_ns: 0, p99_ns: u64::MAX };
        let report = Report {
            stages: vec![Stage::default(), Stage { count: 1, ..Stage::default() }],
            timeseries: vec![tick(0.0, 0.0), tick(f64::NAN, 1.0), tick(1.0, f64::INFINITY)],
            shards: vec![(0, 0), (1, 1)],
            load: vec![load(0.0), load(f64::NAN)],
            ..Report::default()
        };
        let html = html(&report);
        assert!(html.contains("<figure>"));
        for bad in ["NaN", "inf", "\"-"] {
            assert!(!html.contains(bad), "{bad}");
        }
    }

    #[test]
    fn a_full_report_draws_everything_without_external_resources() {
        let html = html(&full());
        for title in ["Latency by percentile", "Throughput over time", "p99 over time", "Backlog over time"] {
            assert!(html.contains(title), "{title}");
        }
        for title in ["Latency by offered load", "Events by shard", "Stages", "Integrity", "Conditions"] {
            assert!(html.contains(title), "{title}");
        }
        assert!(!html.contains("http") && !html.contains("src="));
        assert!(html.len() < 100_000, "{} bytes for 5000 ticks", html.len());
    }

    #[test]
    fn differing_counts_are_reported() {
        let counts = |durable| integrity(&[("published".into(), 10), ("durable".into(), durable)]);
        assert!(counts(10).contains("All counts agree"));
        assert!(counts(7).contains("differ by 3"));
    }
}
