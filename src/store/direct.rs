//! Whether a connection reaches PostgreSQL itself, or a pooler that lends each transaction another one.
//!
//! At its start a connection says a word, as a setting. PostgreSQL itself can repeat it; a pooler refuses the setting, forgets it, or passes
//! on to a connection that was opened before. So who does not hear the word is taken to be behind a pooler, which is right or costs speed only.

use tokio_postgres::Client;
use tokio_postgres::error::SqlState;

/// The setting that carries the word.
const SETTING: &str = "opsmantik.direct";

/// What one connection says, and no other.
pub(super) struct Word(String);

impl Word {
    pub fn new() -> Self {
        Self(uuid::Uuid::new_v4().simple().to_string())
    }

    /// The start-up option that says it.
    pub fn option(&self) -> String {
        format!("-c {SETTING}={}", self.0)
    }

    /// Whether who answers on this connection has heard it.
    #[allow(clippy::disallowed_methods)] // no transaction is open yet
    pub async fn comes_back(&self, client: &Client) -> Result<bool, tokio_postgres::Error> {
        let ask = format!("SELECT current_setting('{SETTING}', true)");
        let said = client.query_typed(&ask, &[]).await?;
        let heard: Option<&str> = said.first().and_then(|row| row.try_get(0).ok());
        Ok(heard == Some(&self.0))
    }
}

/// Whether a connection may have been refused for its word.
pub(super) fn is_refusal(error: &tokio_postgres::Error) -> bool {
    let codes = [&SqlState::PROTOCOL_VIOLATION, &SqlState::FEATURE_NOT_SUPPORTED];
    error.code().is_some_and(|code| codes.contains(&code))
}
