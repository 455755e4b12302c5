//! What stands in the way of a feed, and its cure. No secret is ever in these texts.

use super::FeedError;
use super::link::LinkError;
use crate::store::feed::Fitness;

const POOLER: &str = "FEED_DATABASE_URL must lead to the database itself: what answers there does not pass on replication connections, \
     as a pooler does not";
const NO_SLOT: &str = "no replication slot is free: raise max_replication_slots and restart PostgreSQL";
const NO_SENDER: &str = "no WAL sender is free: raise max_wal_senders and restart PostgreSQL";
const NO_PUBLICATION: &str = "the publication opsmantik_feed is missing, or does not tell everything of sessions, events, calls and \
     opsmantik.vanished: `DROP PUBLICATION opsmantik_feed`, then `CREATE PUBLICATION opsmantik_feed FOR TABLE public.sessions, \
     public.events, public.calls, opsmantik.vanished WITH (publish_via_partition_root)`";
/// Whoever watches may come again.
pub(super) const HELD: &str = "transactions that write, or that are prepared, hold up its beginning: look for old ones in \
     pg_stat_activity (backend_xid) and in pg_prepared_xacts";
const STANDBY: &str = "the database is a standby: let FEED_DATABASE_URL lead to the primary";
const WAL_LEVEL: &str = "`ALTER SYSTEM SET wal_level = logical` and restart PostgreSQL";
/// The feed's database is not the pool's.
pub(super) const OTHER_DATABASE: &str = "FEED_DATABASE_URL leads to another database than DATABASE_URL";

/// What a query could see that is in the way. `own_login`: whether the feed logs in as the pool does. `running`: whether what is taken is
/// the feed's own.
pub(super) fn obstacle(fitness: &Fitness, own_login: bool, running: bool) -> Option<String> {
    let login = &fitness.login;
    if fitness.standby {
        return Some(STANDBY.to_owned());
    }
    if fitness.wal_level != "logical" {
        return Some(format!("wal_level is {}: {WAL_LEVEL}", fitness.wal_level));
    }
    if !fitness.published {
        return Some(NO_PUBLICATION.to_owned());
    }
    if own_login && !fitness.may_replicate {
        return Some(not_allowed(login));
    }
    if running {
        return None;
    }
    if fitness.free_senders <= 0 {
        return Some(NO_SENDER.to_owned());
    }
    (fitness.free_slots <= 0).then(|| NO_SLOT.to_owned())
}

fn not_allowed(login: &str) -> String {
    let quoted = login.replace('"', "\"\"");
    format!("the role {login} may not read the log: `ALTER ROLE \"{quoted}\" REPLICATION`")
}

/// What a refusal of the replication connection means. Those that pass by themselves are [`FeedError::Away`].
pub(super) fn judge(error: &LinkError, login: &str) -> FeedError {
    let LinkError::Refused { code, message } = error else {
        return match error {
            LinkError::Protocol(why) if why.contains("channel_binding") => FeedError::Unfit((*why).to_owned()),
            _ => FeedError::Away,
        };
    };
    let cure = match code.as_str() {
        // Its name is not translated.
        "53300" if message.contains("max_wal_senders") => NO_SENDER.to_owned(),
        "55P03" => return FeedError::Held,
        "53400" => NO_SLOT.to_owned(),
        "42501" => not_allowed(login),
        "0A000" => STANDBY.to_owned(),
        "55000" if message.contains("wal_level") => format!("wal_level is not logical: {WAL_LEVEL}"),
        "42601" | "08P01" => POOLER.to_owned(),
        "3D000" => "the database that the feed asks for does not exist: look at FEED_DATABASE_URL".to_owned(),
        "28000" | "28P01" => {
            format!("the login of the feed is refused ({code}): look at FEED_DATABASE_URL and at pg_hba.conf")
        }
        _ => return FeedError::Away,
    };
    FeedError::Unfit(cure)
}
