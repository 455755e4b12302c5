//! What a row came to, and the table of all rows: for people, and as JSON.

use std::fmt;
use std::time::Duration;

use serde_json::{Value, json};

/// What a row came to. Events and calls count alike.
#[derive(Debug, Default)]
pub struct Report {
    /// Distinct ones that were sent.
    pub sent: u64,
    /// Of these: answered 200, stored or acknowledged before anything was sent again.
    pub answered: u64,
    /// Answers that said: not now.
    pub refused: u64,
    /// Rows in the end.
    pub stored: u64,
    /// Answered as stored, or sent until answered, and not there.
    pub lost: u64,
    /// There more than once.
    pub doubled: u64,
    /// The longest time from the end of the fault until all was well again.
    pub recovery: Option<Duration>,
    /// The longest that anybody waited for an answer.
    pub slowest: Option<Duration>,
    /// Further figures.
    pub notes: Vec<String>,
    /// Why the row does not hold.
    pub wrong: Vec<String>,
    /// Why the row could not be tried at all.
    pub skipped: Option<String>,
}

impl Report {
    pub fn broken(why: &str) -> Self {
        Self { wrong: vec![why.to_owned()], ..Self::default() }
    }

    /// The machine does not allow it.
    pub fn skipped(why: impl fmt::Display) -> Self {
        Self { skipped: Some(why.to_string()), ..Self::default() }
    }

    /// A tool is missing and cannot be installed. With `CI=true` that is a failure, so that no build is green for want of tools.
    pub fn without(tool: impl fmt::Display) -> Self {
        match std::env::var("CI").is_ok_and(|value| value == "true" || value == "1") {
            true => Self::broken(&tool.to_string()),
            false => Self::skipped(tool),
        }
    }

    /// Holds the row to something.
    pub fn demand(&mut self, holds: bool, otherwise: impl fmt::Display) {
        if holds {
            return;
        }
        let complaint = otherwise.to_string();
        // The first few say enough.
        if self.wrong.len() < 12 && !self.wrong.contains(&complaint) {
            self.wrong.push(complaint);
        }
    }

    pub fn note(&mut self, note: impl fmt::Display) {
        self.notes.push(note.to_string());
    }

    pub fn recovered_after(&mut self, took: Duration) {
        self.recovery = self.recovery.max(Some(took));
    }

    pub fn waited(&mut self, took: Duration) {
        self.slowest = self.slowest.max(Some(took));
    }
}

/// A row of the table.
pub struct Line {
    pub name: &'static str,
    pub what: &'static str,
    pub rounds: u32,
    pub took: Duration,
    pub report: Report,
}

impl Line {
    pub fn holds(&self) -> bool {
        self.report.wrong.is_empty() && self.report.lost == 0 && self.report.doubled == 0
    }

    fn verdict(&self) -> &'static str {
        match (&self.report.skipped, self.holds()) {
            (_, false) => "FAILS",
            (Some(_), true) => "skipped",
            (None, true) => "holds",
        }
    }
}

fn seconds(time: Option<Duration>) -> String {
    time.map_or("-".to_owned(), |time| format!("{:.2} s", time.as_secs_f64()))
}

impl fmt::Display for Line {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {} after {:.1} s", self.name, self.verdict(), self.took.as_secs_f64())?;
        let report = &self.report;
        for note in &report.notes {
            write!(f, "\n    {note}")?;
        }
        if let Some(why) = &report.skipped {
            write!(f, "\n    *** SKIPPED: {why}")?;
        }
        for wrong in &report.wrong {
            write!(f, "\n    *** {wrong}")?;
        }
        Ok(())
    }
}

const HEAD: [&str; 11] =
    ["row", "rounds", "sent", "answered", "refused", "stored", "lost", "doubled", "slowest", "recovery", "verdict"];

/// The table for people; its form is Markdown's.
pub fn table(lines: &[Line]) -> String {
    let mut rows: Vec<Vec<String>> = vec![HEAD.map(str::to_owned).to_vec()];
    for line in lines {
        let report = &line.report;
        let counts = [report.sent, report.answered, report.refused, report.stored, report.lost, report.doubled];
        let mut row = vec![line.name.to_owned(), line.rounds.to_string()];
        row.extend(counts.map(|count| count.to_string()));
        row.extend([seconds(report.slowest), seconds(report.recovery), line.verdict().to_owned()]);
        rows.push(row);
    }
    let width = |at: usize| rows.iter().map(|row| row[at].len()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..HEAD.len()).map(width).collect();
    let mut text = String::from("\n");
    for (n, row) in rows.iter().enumerate() {
        let cells: Vec<String> = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}")).collect();
        text += &format!("| {} |\n", cells.join(" | "));
        if n == 0 {
            let rule: Vec<String> = widths.iter().map(|width| "-".repeat(*width)).collect();
            text += &format!("| {} |\n", rule.join(" | "));
        }
    }
    text
}

pub fn json(lines: &[Line], seed: u64) -> String {
    let milliseconds = |time: Option<Duration>| time.map(|time| time.as_secs_f64() * 1000.0);
    let rows: Vec<Value> = lines
        .iter()
        .map(|line| {
            let report = &line.report;
            json!({"row": line.name, "what": line.what, "rounds": line.rounds, "sent": report.sent, "answered": report.answered,
                "refused": report.refused, "stored": report.stored, "lost": report.lost, "doubled": report.doubled,
                "slowest_ms": milliseconds(report.slowest), "recovery_ms": milliseconds(report.recovery),
                "took_s": line.took.as_secs_f64(), "verdict": line.verdict(), "notes": report.notes, "wrong": report.wrong,
                "skipped": report.skipped})
        })
        .collect();
    let holds = lines.iter().all(Line::holds);
    format!("{:#}\n", json!({"seed": seed, "holds": holds, "rows": rows}))
}
