//! `opsmantik token`: what lets machines in by gRPC.

use anyhow::{Context, bail};
use chrono::{DateTime, TimeDelta, Utc};
use clap::Subcommand;
use serde_json::json;
use uuid::Uuid;

use super::Database;
use super::duration::{self, LONGEST};
use super::output::print_json;
use crate::access::ApiToken;
use crate::domain::access::Scope;
use crate::domain::id::{SiteId, TokenId};
use crate::store::Store;
use crate::store::tokens::{Revoked, TokenRow};

/// Issue, list, revoke and rotate the API tokens of machines.
#[derive(Debug, Subcommand)]
pub(super) enum Token {
    /// Issue a token and print it, once: only its hash is kept
    ///
    /// Scopes: `ingest:write` sends events; `scoring:read` reads scores and sessions; `events:read` watches events; `calls:read`
    /// reads calls; `calls:write` pushes and reviews them. A telephone integration needs `--scope calls:write`, and no more.
    ///
    /// The token alone goes to standard output: `TOKEN=$(opsmantik token issue --site shop --scope calls:write)`. Send it as
    /// metadata, `authorization: Bearer om_…`.
    Issue {
        #[command(flatten)]
        database: Database,
        #[command(flatten)]
        reach: ReachFlags,
        /// What it may do: one of ingest:write, scoring:read, calls:read, calls:write, events:read; may be given more than once, or
        /// several separated by commas
        #[arg(long = "scope", value_name = "SCOPE", value_delimiter = ',')]
        scopes: Vec<String>,
        /// What people call it, such as the integration that has it
        #[arg(long, default_value = "", hide_default_value = true)]
        name: String,
        /// When it ends: after a time (90d, 12h, 30m, 2w), or at one (2027-01-31T00:00:00Z). Never if not given
        #[arg(long, value_name = "WHEN")]
        expires: Option<String>,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// List tokens: their ids, names, sites, scopes and times, never the tokens themselves
    List {
        #[command(flatten)]
        database: Database,
        /// Only those for this site alone (public id or UUID)
        #[arg(long)]
        site: Option<String>,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Revoke a token; running servers stop taking it within five seconds
    Revoke {
        #[command(flatten)]
        database: Database,
        /// Its id, from `list`
        id: TokenId,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Replace a token by a new one of the same name, scopes and sites, and print that, once
    ///
    /// A token that was issued with an end gets a successor that is good for as long from now on.
    Rotate {
        #[command(flatten)]
        database: Database,
        /// Its id, from `list`
        id: TokenId,
        /// Keep the old one for this long (1h, 2d), so that whoever has it can change over. Revoked at once if not given
        #[arg(long, value_name = "TIME")]
        grace: Option<String>,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
}

/// Which sites a token opens; there is no default, so that nobody opens all by leaving something out.
#[derive(Debug, clap::Args)]
#[group(required = true, multiple = false)]
pub(super) struct ReachFlags {
    /// The one site that it opens (public id or UUID)
    #[arg(long)]
    site: Option<String>,
    /// It opens every site, also those that are added later
    #[arg(long)]
    all_sites: bool,
}

impl Token {
    pub(super) async fn run(self) -> anyhow::Result<()> {
        match self {
            Self::Issue { database, reach, scopes, name, expires, json } => {
                let scopes = checked_scopes(&scopes)?;
                let expires_at = expires.map(|text| end(&text, Utc::now())).transpose()?;
                let name = crate::domain::text::clean_line(&name, 200).unwrap_or_default();
                let store = database.store().await?;
                let site = match &reach.site {
                    Some(text) => Some(site(&store, text).await?),
                    None => None,
                };
                let token = ApiToken::generate()?;
                let row = store.issue_token(&token.hash(), &name, &scopes, site, expires_at).await?;
                print_once(&token, &row, json)
            }
            Self::List { database, site: wanted, json } => {
                let store = database.store().await?;
                let wanted = match &wanted {
                    Some(text) => Some(site(&store, text).await?),
                    None => None,
                };
                let tokens = store.list_tokens(wanted).await?;
                if json {
                    return print_json(&tokens);
                }
                tokens.iter().try_for_each(|token| say!("{}", line(token)))
            }
            Self::Revoke { database, id, json } => match database.store().await?.revoke_token(id).await? {
                None => bail!("there is no token {id}: see `opsmantik token list`"),
                Some(was) => {
                    let before = match was {
                        Revoked::Now => None,
                        Revoked::Before(at) => Some(at),
                    };
                    if json {
                        return print_json(&json!({"id": id, "revoked": true, "already_revoked_at": before}));
                    }
                    match before {
                        None => say!("{id} is revoked; running servers stop taking it within five seconds"),
                        Some(at) => say!("{id} was revoked already, at {}", at.to_rfc3339()),
                    }
                }
            },
            Self::Rotate { database, id, grace, json } => {
                let grace = grace.map(|text| {
                    duration::read(&text).with_context(|| {
                        format!("--grace `{text}` is no time such as 30m, 1h or 2d, of at most 100 years")
                    })
                });
                let grace = grace.transpose()?.unwrap_or_default();
                let token = ApiToken::generate()?;
                let rotated = database.store().await?.rotate_token(id, &token.hash(), grace).await;
                let row = rotated.with_context(|| format!("token {id} is not rotated"))?;
                print_once(&token, &row, json)
            }
        }
    }
}

fn checked_scopes(names: &[String]) -> anyhow::Result<Vec<Scope>> {
    let all = || Scope::ALL.map(Scope::name).join(", ");
    if names.is_empty() {
        bail!("--scope is missing: at least one of {}", all());
    }
    let mut scopes = Vec::new();
    for name in names {
        let Some(scope) = Scope::from_name(name.trim()) else {
            bail!("--scope `{name}` is no scope; there are {}", all());
        };
        scopes.push(scope);
    }
    scopes.sort_unstable();
    scopes.dedup();
    Ok(scopes)
}

async fn site(store: &Store, text: &str) -> anyhow::Result<SiteId> {
    let id = Uuid::try_parse(text.trim()).ok().map(SiteId::from_uuid);
    let found = store.find_site(text.trim(), id).await?;
    let site = found.with_context(|| format!("--site `{text}` is no site: see `opsmantik site list`"))?;
    Ok(site.id)
}

/// The moment that `--expires` names.
fn end(text: &str, now: DateTime<Utc>) -> anyhow::Result<DateTime<Utc>> {
    let wrong =
        || format!("--expires `{text}` is neither a time such as 90d or 12h nor a moment such as 2027-01-31T00:00:00Z");
    let at = match duration::read(text).and_then(|time| TimeDelta::from_std(time).ok()) {
        Some(time) => now.checked_add_signed(time).with_context(wrong)?,
        None => DateTime::parse_from_rfc3339(text.trim()).with_context(wrong)?.to_utc(),
    };
    if at <= now {
        bail!("--expires `{text}` is over already");
    }
    if (at - now).to_std().is_ok_and(|time| time > LONGEST) {
        bail!("--expires `{text}` is more than 100 years away: leave it out for a token that does not end");
    }
    Ok(at)
}

/// For a script as JSON or the token alone; what a person wants to know besides goes to standard error.
fn print_once(token: &ApiToken, row: &TokenRow, json: bool) -> anyhow::Result<()> {
    if json {
        return print_json(&json!({
            "id": row.id, "token": token.reveal(), "site_id": row.site_id, "all_sites": row.all_sites,
            "scopes": row.scopes, "name": row.name, "expires_at": row.expires_at,
        }));
    }
    say!("{}", token.reveal())?;
    note!("{}", line(row));
    note!("Keep the token: it is not shown again. `opsmantik token revoke {}` ends it.", row.id);
    Ok(())
}

fn line(row: &TokenRow) -> String {
    let at = |what: &str, at: Option<DateTime<Utc>>| {
        at.map_or_else(String::new, |at| format!("  {what} {}", at.to_rfc3339_opts(chrono::SecondsFormat::Secs, true)))
    };
    let reach = if row.all_sites { "all sites" } else { row.site.as_deref().unwrap_or("-") };
    let name = if row.name.is_empty() { "-" } else { &row.name };
    let times = [
        at("created", Some(row.created_at)),
        at("expires", row.expires_at),
        at("revoked", row.revoked_at),
        at("last used", row.last_used_at),
    ];
    format!("{}  {reach}  {}  {name}{}", row.id, row.scopes.join(","), times.concat())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_ends_after_a_time_or_at_a_moment_that_is_not_over() {
        let now = DateTime::from_timestamp(1_790_000_000, 0).unwrap_or_default();
        assert!(end("90d", now).is_ok_and(|at| at - now == TimeDelta::days(90)));
        assert!(end("2027-01-31T02:00:00+02:00", now).is_ok_and(|at| at.to_rfc3339() == "2027-01-31T00:00:00+00:00"));
        for bad in ["2020-01-01T00:00:00Z", "tomorrow", "2027-01-31", "0d", "9000-01-01T00:00:00Z"] {
            assert!(end(bad, now).is_err_and(|error| error.to_string().contains("--expires")), "{bad}");
        }
    }
}
