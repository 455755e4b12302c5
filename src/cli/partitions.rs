//! `opsmantik partitions`: the months.

use clap::Subcommand;

use super::{Database, print_json};
use crate::domain::month::Month;
use crate::keeper;

/// List and make monthly partitions.
#[derive(Debug, Subcommand)]
pub(super) enum Partitions {
    /// List the months with their leaves, estimated rows and size
    List {
        #[command(flatten)]
        database: Database,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Make and mend months: those that a running server keeps, or the ones given
    Ensure {
        #[command(flatten)]
        database: Database,
        /// A month, `2026-11-01` or `2026-11`; may be given more than once
        #[arg(long = "month", value_name = "MONTH")]
        months: Vec<Month>,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
}

impl Partitions {
    pub(super) async fn run(self) -> anyhow::Result<()> {
        match self {
            Self::List { database, json } => {
                let months = database.store().await?.list_months().await?;
                if json {
                    return print_json(&months);
                }
                for month in months {
                    let (sessions, events) = (month.sessions_rows.unwrap_or(0), month.events_rows.unwrap_or(0));
                    let missing = [("sessions", &month.sessions_leaf), ("events", &month.events_leaf)]
                        .iter()
                        .filter(|(_, leaf)| leaf.is_none())
                        .map(|(table, _)| format!("  MISSING in {table}"))
                        .collect::<String>();
                    let mib = month.bytes.unwrap_or(0) / (1 << 20);
                    println!("{}  ~{sessions} sessions  ~{events} events  {mib} MiB{missing}", month.month);
                }
                Ok(())
            }
            Self::Ensure { database, months, json } => {
                let store = database.store().await?;
                let mut made = Vec::new();
                if months.is_empty() {
                    made = keeper::keep(&store, chrono::Utc::now()).await?;
                }
                for month in months {
                    made.extend(store.ensure_month(month).await?);
                }
                match (json, made.is_empty()) {
                    (true, _) => print_json(&made),
                    (false, true) => {
                        println!("nothing was missing");
                        Ok(())
                    }
                    (false, false) => {
                        println!("made {}", made.join(", "));
                        Ok(())
                    }
                }
            }
        }
    }
}
