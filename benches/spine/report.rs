//! What was measured, against what, and whether it is enough: as a table for people and as JSON.

use serde_json::{Map, Value, json};

use crate::processes::Spent;
use crate::sent::Sent;

/// What has to be reached. `stretch` is what would be better still.
#[derive(Debug, Clone, Copy)]
pub enum Bar {
    AtLeast { bar: f64, stretch: Option<f64> },
    AtMost { bar: f64, stretch: Option<f64> },
}

/// One side of a comparison, round by round.
#[derive(Debug, Default, Clone)]
pub struct Side {
    /// Events a second of each round.
    pub rates: Vec<f64>,
    /// Seconds of processor for a thousand events, of each round.
    pub costs: Vec<Spent>,
    /// Times that something had to be sent again, for the server said that it was unavailable.
    pub again: usize,
}

impl Side {
    /// Adds a round.
    #[allow(clippy::cast_precision_loss)]
    pub fn add(&mut self, events: usize, sent: Sent, spent: Spent) {
        self.rates.push(events as f64 / sent.seconds);
        self.costs.push(spent.per_thousand(events));
        self.again += sent.again;
    }

    fn cost(&self) -> [f64; 3] {
        let of = |pick: fn(&Spent) -> f64| median(&self.costs.iter().map(pick).collect::<Vec<_>>());
        [of(|spent| spent.server), of(|spent| spent.database), of(|spent| spent.load)]
    }

    fn json(&self) -> Value {
        let [server, database, load] = self.cost();
        json!({
            "events_per_second": median(&self.rates),
            "rounds": self.rates,
            "sent_again": self.again,
            "cpu_seconds_per_1000_events": {"server": server, "postgresql": database, "load": load},
        })
    }
}

/// A line of the table.
#[derive(Debug)]
pub struct Line {
    pub row: &'static str,
    pub what: String,
    pub unit: &'static str,
    pub measured: f64,
    pub reference: Option<f64>,
    /// Part of the reference; absent where the figure stands for itself.
    pub ratio: Option<f64>,
    pub bar: Option<Bar>,
    pub sides: Vec<(&'static str, Side)>,
    /// Further figures, by name.
    pub more: Map<String, Value>,
}

impl Line {
    /// A rate against a reference of the same rounds. The ratio is the median of the rounds' own ratios: what disturbs one round disturbs both sides.
    pub fn ratio(
        row: &'static str,
        what: impl Into<String>,
        names: [&'static str; 2],
        measured: Side,
        reference: Side,
        bar: Bar,
    ) -> Self {
        let ratios: Vec<f64> = measured.rates.iter().zip(&reference.rates).map(|(one, other)| one / other).collect();
        Self {
            row,
            what: what.into(),
            unit: "events/s",
            measured: median(&measured.rates),
            reference: Some(median(&reference.rates)),
            ratio: Some(median(&ratios)),
            bar: Some(bar),
            sides: names.into_iter().zip([measured, reference]).collect(),
            more: Map::new(),
        }
    }

    /// A figure that stands for itself.
    pub fn figure(
        row: &'static str,
        what: impl Into<String>,
        unit: &'static str,
        measured: f64,
        bar: Option<Bar>,
    ) -> Self {
        Self {
            row,
            what: what.into(),
            unit,
            measured,
            reference: None,
            ratio: None,
            bar,
            sides: Vec::new(),
            more: Map::new(),
        }
    }

    pub fn with(mut self, name: &str, value: impl Into<Value>) -> Self {
        self.more.insert(name.to_owned(), value.into());
        self
    }

    fn judged(&self) -> f64 {
        self.ratio.unwrap_or(self.measured)
    }

    /// Whether the bar is reached, and the stretch; nothing where there is none.
    pub fn met(&self) -> (Option<bool>, Option<bool>) {
        let judged = self.judged();
        match self.bar {
            None => (None, None),
            Some(Bar::AtLeast { bar, stretch }) => (Some(judged >= bar), stretch.map(|stretch| judged >= stretch)),
            Some(Bar::AtMost { bar, stretch }) => (Some(judged <= bar), stretch.map(|stretch| judged <= stretch)),
        }
    }

    fn limit(&self, pick: fn(Bar) -> (&'static str, Option<f64>)) -> String {
        let Some((sign, Some(limit))) = self.bar.map(pick) else { return "–".to_owned() };
        if self.ratio.is_some() {
            format!("{sign} {:.0} %", limit * 100.0)
        } else {
            format!("{sign} {}", number(limit))
        }
    }

    fn cells(&self) -> [String; 8] {
        let verdict = match self.met() {
            (None, _) => "–",
            (Some(false), _) => "no",
            (Some(true), Some(true)) => "yes, stretch",
            (Some(true), _) => "yes",
        };
        [
            self.row.to_owned(),
            self.what.clone(),
            format!("{} {}", number(self.measured), self.unit),
            self.reference.map_or_else(|| "–".to_owned(), |reference| format!("{} {}", number(reference), self.unit)),
            self.ratio.map_or_else(|| "–".to_owned(), |ratio| format!("{:.1} %", ratio * 100.0)),
            self.limit(|bar| match bar {
                Bar::AtLeast { bar, .. } => ("≥", Some(bar)),
                Bar::AtMost { bar, .. } => ("≤", Some(bar)),
            }),
            self.limit(|bar| match bar {
                Bar::AtLeast { stretch, .. } => ("≥", stretch),
                Bar::AtMost { stretch, .. } => ("≤", stretch),
            }),
            verdict.to_owned(),
        ]
    }

    /// One line, for who watches: a whole run is long.
    pub fn brief(&self) -> String {
        let [row, _, measured, reference, ratio, bar, _, met] = self.cells();
        format!("    {row}: {measured}, reference {reference}, ratio {ratio}, bar {bar}: {met}")
    }

    fn json(&self) -> Value {
        let (bar, stretch) = self.met();
        let (kind, limits) = match self.bar {
            None => (Value::Null, [Value::Null, Value::Null]),
            Some(Bar::AtLeast { bar, stretch }) => (json!("at_least"), [json!(bar), json!(stretch)]),
            Some(Bar::AtMost { bar, stretch }) => (json!("at_most"), [json!(bar), json!(stretch)]),
        };
        let [at, stretch_at] = limits;
        let sides: Map<String, Value> =
            self.sides.iter().map(|(name, side)| ((*name).to_owned(), side.json())).collect();
        json!({
            "row": self.row, "what": self.what, "unit": self.unit, "measured": self.measured, "reference": self.reference,
            "ratio": self.ratio, "bar": {"kind": kind, "at": at, "stretch_at": stretch_at, "met": bar, "stretch_met": stretch},
            "sides": sides, "more": self.more,
        })
    }
}

/// The table, with the figures beside it below.
pub fn table(lines: &[Line]) -> String {
    const HEADS: [&str; 8] = ["row", "what", "measured", "reference", "ratio", "bar", "stretch", "met"];
    let rows: Vec<[String; 8]> =
        std::iter::once(HEADS.map(str::to_owned)).chain(lines.iter().map(Line::cells)).collect();
    let mut text = markdown(&rows);
    let costs: Vec<[String; 5]> = lines
        .iter()
        .flat_map(|line| line.sides.iter().map(move |(name, side)| (line, name, side.cost())))
        .map(|(line, name, cost)| {
            let [server, database, load] = cost.map(|seconds| format!("{:.1}", seconds * 1000.0));
            [line.row.to_owned(), (*name).to_owned(), server, database, load]
        })
        .collect();
    if !costs.is_empty() {
        text.push_str(
            "\nMilliseconds of processor for a thousand events, which other work on the machine does not change:\n\n",
        );
        let heads = ["row", "side", "server", "PostgreSQL", "load"].map(str::to_owned);
        let rows: Vec<[String; 5]> = std::iter::once(heads).chain(costs).collect();
        text.push_str(&markdown(&rows));
    }
    for (line, name, side) in
        lines.iter().flat_map(|line| line.sides.iter().map(move |(name, side)| (line, name, side)))
    {
        if side.again > 0 {
            text.push_str(&format!(
                "\n{}: {} answers of `{name}` were *unavailable*: the machine is not quiet",
                line.row, side.again
            ));
        }
    }
    for line in lines.iter().filter(|line| !line.more.is_empty()) {
        let more: Vec<String> = line.more.iter().map(|(name, value)| format!("{name} {}", shown(value))).collect();
        text.push_str(&format!("\n{}: {}", line.row, more.join(", ")));
    }
    if !text.ends_with('\n') {
        text.push('\n');
    }
    text
}

fn shown(value: &Value) -> String {
    match value {
        Value::Number(found) => found.as_f64().map_or_else(|| found.to_string(), number),
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}

fn markdown<const N: usize>(rows: &[[String; N]]) -> String {
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..N).map(width).collect();
    let mut text = String::new();
    for (at, row) in rows.iter().enumerate() {
        for (cell, width) in row.iter().zip(&widths) {
            let pad = " ".repeat(width - cell.chars().count());
            text.push_str(&format!("| {cell}{pad} "));
        }
        text.push_str("|\n");
        if at == 0 {
            let rules: Vec<String> = widths.iter().map(|width| format!("| {} ", "-".repeat(*width))).collect();
            text.push_str(&format!("{}|\n", rules.concat()));
        }
    }
    text
}

/// The whole run as JSON.
pub fn json(lines: &[Line], settings: &[String], short: bool, seconds: f64) -> Value {
    let version = env!("CARGO_PKG_VERSION");
    let processors = std::thread::available_parallelism().map_or(0, usize::from);
    json!({
        "version": version, "short": short, "optimised": !cfg!(debug_assertions), "processors": processors, "seconds": seconds, "postgresql": settings,
        "at": chrono::Utc::now(), "rows": lines.iter().map(Line::json).collect::<Vec<_>>(),
    })
}

fn number(number: f64) -> String {
    match number.abs() {
        large if large >= 100.0 => format!("{number:.0}"),
        small if small >= 10.0 => format!("{number:.1}").trim_end_matches(".0").to_owned(),
        _ => format!("{number:.2}").trim_end_matches("00").trim_end_matches('.').to_owned(),
    }
}

/// The middle one.
pub fn median(numbers: &[f64]) -> f64 {
    let mut sorted = numbers.to_vec();
    sorted.sort_unstable_by(f64::total_cmp);
    match sorted.len() {
        0 => f64::NAN,
        odd if odd % 2 == 1 => sorted[odd / 2],
        even => f64::midpoint(sorted[even / 2 - 1], sorted[even / 2]),
    }
}
