//! What commands print: results on standard output, what a person wants to know meanwhile on standard error.
//!
//! Whoever reads the output may have had enough of it, as `| head` has. That ends a command that only prints, in order and without complaint; one that
//! works goes on and prints no more ([`Voice`]). A closed standard error is nobody's loss.

use std::fmt;
use std::io::{self, Write};

use anyhow::Context;

/// Whoever read the output is gone.
#[derive(Debug, thiserror::Error)]
#[error("nobody reads the output any more")]
pub(super) struct NobodyReads;

/// Prints a line.
macro_rules! say {
    ($($text:tt)*) => { $crate::cli::output::line(format_args!($($text)*)) };
}

/// Tells a line to the person before the terminal.
macro_rules! note {
    ($($text:tt)*) => { $crate::dev::progress::write_stderr(&format!("{}\n", format_args!($($text)*))) };
}

pub(super) fn line(text: fmt::Arguments<'_>) -> anyhow::Result<()> {
    match writeln!(io::stdout().lock(), "{text}") {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Err(NobodyReads.into()),
        written => written.context("writing to standard output"),
    }
}

/// Prints for a script: one JSON document.
pub(super) fn print_json(value: &impl serde::Serialize) -> anyhow::Result<()> {
    say!("{}", serde_json::to_string_pretty(value)?)
}

/// A list in JSON, printed while it is read: however long it is, only one element is held.
#[derive(Default)]
pub(super) struct JsonList {
    begun: bool,
}

impl JsonList {
    pub(super) fn push(&mut self, element: &impl serde::Serialize) -> anyhow::Result<()> {
        let before = if self.begun { "," } else { "[\n" };
        self.begun = true;
        // A line break inside of a text is escaped, so each of these is one between values.
        let text = serde_json::to_string_pretty(element)?.replace('\n', "\n  ");
        say!("{before}  {text}")
    }

    pub(super) fn end(self) -> anyhow::Result<()> {
        if self.begun { say!("]") } else { say!("[]") }
    }
}

/// For a command whose work is worth more than its words.
#[derive(Default)]
pub(super) struct Voice {
    unheard: bool,
}

impl Voice {
    /// Keeps silent once nobody listens.
    pub(super) fn heed(&mut self, said: anyhow::Result<()>) -> anyhow::Result<()> {
        match said {
            Err(error) if error.is::<NobodyReads>() => self.unheard = true,
            said => return said,
        }
        Ok(())
    }

    pub(super) fn is_heard(&self) -> bool {
        !self.unheard
    }
}

/// A command that nobody listens to any more has done what it could.
pub(super) fn ended(result: anyhow::Result<()>) -> anyhow::Result<()> {
    match result {
        Err(error) if error.is::<NobodyReads>() => Ok(()),
        result => result,
    }
}
