//! Shows what is being done while somebody waits for it.
//!
//! One line a step, on stderr. On a terminal the line is redrawn in place with the
//! seconds that have passed and the last line of output of the program at work; in
//! a log it is written when the step begins and ends, and every fifteen seconds in
//! between, so that a quiet log never means a hung build.

use std::collections::VecDeque;
use std::io::{BufRead, BufReader, IsTerminal, Write};
use std::process::{Command, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How often the line on a terminal is redrawn.
const REDRAW: Duration = Duration::from_millis(250);
/// How often a log hears that a step is still at work.
const STILL_AT_WORK: Duration = Duration::from_secs(15);
/// Lines of output kept to explain a failure.
const KEPT_LINES: usize = 25;
/// Width beyond which a line would wrap, and could not be redrawn in place.
const LINE_WIDTH: usize = 100;

/// Where progress is shown, if anywhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// Redrawn in place.
    Terminal,
    /// A line at a time.
    Log,
    /// Not at all.
    Silent,
}

/// A program that was run as a step and did not succeed.
#[derive(Debug, thiserror::Error)]
pub enum CommandError {
    #[error("cannot run {program}: {source}")]
    NotRun { program: String, source: std::io::Error },
    #[error("{program} failed ({status}):\n{output}")]
    Failed { program: String, status: std::process::ExitStatus, output: String },
}

impl Progress {
    /// Progress on stderr, in the manner that suits what stderr is.
    pub fn stderr() -> Self {
        if std::io::stderr().is_terminal() { Progress::Terminal } else { Progress::Log }
    }

    /// Says one line that stays.
    pub fn say(self, line: impl AsRef<str>) {
        if self != Progress::Silent {
            write_stderr(&format!("{}\n", line.as_ref()));
        }
    }

    /// Begins a step; it ends by [`Step::done`], or by being dropped, which counts as a failure.
    pub fn step(self, what: impl Into<String>) -> Step {
        let what = what.into();
        let began = Instant::now();
        let (news, inbox) = mpsc::channel::<String>();
        let drawer = match self {
            Progress::Silent => None,
            Progress::Terminal => {
                let what = what.clone();
                Some(std::thread::spawn(move || {
                    let mut last = String::new();
                    loop {
                        let seconds = began.elapsed().as_secs();
                        let line = format!("  … {what} ({seconds} s) {last}");
                        write_stderr(&format!("\r\x1b[K{}", cut(&line)));
                        match inbox.recv_timeout(REDRAW) {
                            Ok(line) => last = line,
                            Err(RecvTimeoutError::Timeout) => {}
                            Err(RecvTimeoutError::Disconnected) => break,
                        }
                    }
                    write_stderr("\r\x1b[K");
                }))
            }
            Progress::Log => {
                let what = what.clone();
                write_stderr(&format!("  … {what}\n"));
                Some(std::thread::spawn(move || {
                    let mut last = String::new();
                    let mut due = Instant::now() + STILL_AT_WORK;
                    loop {
                        match inbox.recv_timeout(due.saturating_duration_since(Instant::now())) {
                            Ok(line) => last = line,
                            Err(RecvTimeoutError::Timeout) => {
                                let seconds = began.elapsed().as_secs();
                                let line = format!("  … {what} ({seconds} s) {last}");
                                write_stderr(&format!("{}\n", cut(&line)));
                                due += STILL_AT_WORK;
                            }
                            Err(RecvTimeoutError::Disconnected) => break,
                        }
                    }
                }))
            }
        };
        Step { progress: self, what, began, news: Some(news), drawer, succeeded: false }
    }

    /// Runs a program as a step: shows the last line it wrote, and keeps the end of its output
    /// for the error. It gets no stdin.
    pub fn run(self, what: &str, command: &mut Command) -> Result<(), CommandError> {
        let program = command.get_program().to_string_lossy().into_owned();
        let not_run = |source| CommandError::NotRun { program: program.clone(), source };
        let step = self.step(what);
        // One pipe for both, so that an error stands where it was written.
        let (output, both) = std::io::pipe().map_err(not_run)?;
        command.stdin(Stdio::null()).stdout(both.try_clone().map_err(not_run)?).stderr(both);
        let mut child = command.spawn().map_err(not_run)?;
        // The command holds our ends of the pipe, and without them closed it never ends.
        command.stdout(Stdio::null()).stderr(Stdio::null());
        let mut kept = VecDeque::with_capacity(KEPT_LINES);
        let mut output = BufReader::new(output);
        let mut line = Vec::new();
        // By bytes: a program may write what is no UTF-8, and must not be cut off for it.
        while matches!(output.read_until(b'\n', &mut line), Ok(n) if n > 0) {
            let text = String::from_utf8_lossy(&line).trim_end().to_owned();
            line.clear();
            if text.is_empty() {
                continue;
            }
            step.detail(&text);
            if kept.len() == KEPT_LINES {
                kept.pop_front();
            }
            kept.push_back(text);
        }
        let status = child.wait().map_err(not_run)?;
        if status.success() {
            step.done();
            return Ok(());
        }
        Err(CommandError::Failed { program: program.clone(), status, output: Vec::from(kept).join("\n") })
    }
}

/// A step under way.
#[derive(Debug)]
pub struct Step {
    progress: Progress,
    what: String,
    began: Instant,
    news: Option<Sender<String>>,
    drawer: Option<JoinHandle<()>>,
    succeeded: bool,
}

impl Step {
    /// Tells what the step is busy with right now.
    pub fn detail(&self, line: &str) {
        if let Some(news) = &self.news {
            // Nobody listens when progress is silent.
            let _ = news.send(line.trim().to_owned());
        }
    }

    /// Ends the step well.
    pub fn done(mut self) {
        self.succeeded = true;
    }
}

impl Drop for Step {
    fn drop(&mut self) {
        self.news = None;
        if let Some(drawer) = self.drawer.take() {
            let _ = drawer.join();
        }
        let mark = if self.succeeded { "✓" } else { "✗" };
        let seconds = self.began.elapsed().as_secs_f32();
        self.progress.say(format!("  {mark} {} ({seconds:.1} s)", self.what));
    }
}

/// Writes past the test harness, which would swallow `eprintln!`; a closed stderr is nobody's loss.
pub(crate) fn write_stderr(text: &str) {
    let mut stderr = std::io::stderr().lock();
    let _ = stderr.write_all(text.as_bytes());
    let _ = stderr.flush();
}

fn cut(line: &str) -> String {
    line.chars().filter(|c| !c.is_control()).take(LINE_WIDTH).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failing_program_is_told_with_the_end_of_what_it_wrote() {
        let script = "for i in $(seq 1 100); do echo line $i; done; printf 'why \\377' >&2; exit 3";
        let error =
            Progress::Silent.run("fail", Command::new("sh").args(["-c", script])).expect_err("exit 3 is a failure");
        let text = error.to_string();
        assert!(text.contains("why"), "{text}");
        assert!(text.contains("line 100"), "{text}");
        assert!(!text.contains("line 10\n"), "only the end is kept: {text}");
    }

    #[test]
    fn a_program_that_is_not_there_is_named() {
        let error = Progress::Silent
            .run("run it", &mut Command::new("/no/such/program"))
            .expect_err("there is no such program");
        assert!(matches!(error, CommandError::NotRun { .. }));
        assert!(error.to_string().contains("/no/such/program"));
    }
}
