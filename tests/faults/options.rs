//! What may be asked on the command line: our own options, and those that `cargo test` hands to every test binary.

use std::path::PathBuf;
use std::sync::OnceLock;
use std::time::Duration;

pub const HELP: &str = "\
cargo test --test faults -- [OPTIONS] [PART OF A ROW'S NAME]...

  --long           the long form: 30 rounds of the kills, a million fingerprints
  --rounds N       so many rounds of each row
  --row NAME       this row; may be given again
  --seed N         what is drawn by lot is drawn again as with this seed
  --json FILE      the table as JSON, too
  --list           the names of the rows

Exit code 0: nothing was lost, nothing was stored twice, everything kept to its bounds.";

#[derive(Debug, Default)]
pub struct Options {
    pub long: bool,
    pub rounds: Option<u32>,
    pub seed: u64,
    pub json: Option<PathBuf>,
    rows: Vec<String>,
    filters: Vec<String>,
    skips: Vec<String>,
    exact: bool,
    /// Only tests that are marked as ignored; no row is.
    only_ignored: bool,
}

pub enum Order {
    Run(Options),
    List,
    Help,
}

/// Options of the standard test harness that have a value of their own.
const WITH_VALUE: [&str; 6] = ["--test-threads", "--format", "--color", "--logfile", "--shuffle-seed", "-Z"];

impl Options {
    pub fn read(arguments: impl Iterator<Item = String>) -> Result<Order, String> {
        let mut options = Self { seed: rand::random_range(1..1_000_000), ..Self::default() };
        let (mut arguments, mut list) = (arguments, false);
        while let Some(argument) = arguments.next() {
            let (name, inline) = match argument.split_once('=') {
                Some((name, value)) if name.starts_with("--") => (name.to_owned(), Some(value.to_owned())),
                _ => (argument, None),
            };
            let mut value = || inline.clone().or_else(|| arguments.next()).ok_or(format!("{name} needs a value"));
            let number = |text: String| text.parse::<u64>().map_err(|_| format!("{name}: `{text}` is no number"));
            match name.as_str() {
                "--long" => options.long = true,
                "--rounds" => {
                    let rounds = number(value()?)?;
                    options.rounds = Some(u32::try_from(rounds).map_err(|_| "--rounds: too many".to_owned())?.max(1));
                }
                "--seed" => options.seed = number(value()?)?,
                "--json" => options.json = Some(value()?.into()),
                "--row" => options.rows.push(value()?),
                "--skip" => options.skips.push(value()?),
                "--exact" => options.exact = true,
                "--ignored" => options.only_ignored = true,
                "--list" => list = true,
                "--help" | "-h" => return Ok(Order::Help),
                known if WITH_VALUE.contains(&known) => drop(value()?),
                // Further switches of the harness: --nocapture, --quiet, --show-output, ...
                switch if switch.starts_with('-') => {}
                _ => options.filters.push(name),
            }
        }
        for row in &options.rows {
            if !super::ROWS.iter().any(|known| known.name == row) {
                return Err(format!("there is no row `{row}`"));
            }
        }
        Ok(if list { Order::List } else { Order::Run(options) })
    }

    pub fn wants(&self, row: &str) -> bool {
        let fits = |filter: &String| if self.exact { row == filter } else { row.contains(filter.as_str()) };
        !self.only_ignored
            && (self.rows.is_empty() || self.rows.iter().any(|name| name == row))
            && (self.filters.is_empty() || self.filters.iter().any(fits))
            && !self.skips.iter().any(fits)
    }

    /// Whoever asks for many rounds wants them long.
    pub fn is_long(&self) -> bool {
        self.long || self.rounds.is_some_and(|rounds| rounds > 3)
    }

    pub fn form(&self) -> &'static str {
        if self.is_long() { "long" } else { "short" }
    }
}

static SLACK: OnceLock<Duration> = OnceLock::new();

/// The short form runs wherever tests run, also beside others on a machine that has no time: it looks for what is lost or doubled, and for
/// who waits without end. The bounds themselves are the long form's.
pub fn allow_for(options: &Options) {
    SLACK.get_or_init(|| if options.is_long() { Duration::ZERO } else { Duration::from_secs(20) });
}

/// What every bound of time is longer by.
pub fn slack() -> Duration {
    SLACK.get().copied().unwrap_or_default()
}
