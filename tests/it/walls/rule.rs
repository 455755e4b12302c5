//! The rule: what each actor may do with each table. Written once more, by tables and columns, so that grants and policies are judged.

use uuid::Uuid;

use super::world::{ALL, Actor, NOBODYS, Table};

/// What an attempt has to come to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum May {
    /// It is refused: 42501.
    Not,
    /// It reaches the rows of these sites, which may be none, and no others.
    Of(&'static [Uuid]),
}

/// Columns by name.
#[derive(Debug, Clone, Copy)]
pub enum Columns {
    None,
    Only(&'static [&'static str]),
    But(&'static [&'static str]),
}

impl Columns {
    const ALL: Self = Self::But(&[]);

    pub fn has(self, column: &str) -> bool {
        match self {
            Self::None => false,
            Self::Only(columns) => columns.contains(&column),
            Self::But(columns) => !columns.contains(&column),
        }
    }
}

/// Supabase's key opens everything in `public`; without its power to bypass it opens the door to an empty room.
fn key(actor: &Actor, table: &Table) -> May {
    match (table.kind.starts_with("public."), actor.bypasses) {
        (false, _) => May::Not,
        (true, true) => May::Of(ALL),
        (true, false) => May::Of(NOBODYS),
    }
}

/// Which columns are read, and of which rows.
pub fn reads(actor: &Actor, table: &Table) -> (Columns, May) {
    let (columns, opened) = match (actor.role, table.kind.as_str()) {
        (
            "authenticated",
            "public.sites" | "public.site_members" | "public.sessions" | "public.events" | "public.calls",
        ) => (Columns::ALL, true),
        ("opsmantik_tenant", "public.sites" | "public.sessions" | "public.events" | "public.calls") => {
            (Columns::ALL, true)
        }
        (
            "opsmantik_operator",
            "public.sites" | "public.site_members" | "public.api_tokens" | "public.dead_letters",
        ) => (Columns::ALL, true),
        (
            "opsmantik_service",
            "public.sessions"
            | "public.events"
            | "public.calls"
            | "public.dead_letters"
            | "opsmantik.call_rematches"
            | "opsmantik.late_followers"
            | "opsmantik.vanished",
        ) => (Columns::ALL, true),
        ("opsmantik_service", "public.sites") => {
            (Columns::Only(&["id", "public_id", "domain", "origins", "region"]), true)
        }
        ("opsmantik_service", "public.api_tokens") => {
            (Columns::But(&["name", "all_sites", "created_at", "rotated_at"]), true)
        }
        ("service_role", _) => return (Columns::ALL, key(actor, table)),
        _ => (Columns::None, false),
    };
    (columns, if opened { May::Of(actor.sees) } else { May::Not })
}

/// Which columns are written over, and in which rows.
pub fn writes(actor: &Actor, table: &Table) -> (Columns, May) {
    match (actor.role, table.kind.as_str()) {
        // An owner manages.
        ("authenticated", "public.sites") => {
            (Columns::Only(&["name", "domain", "origins", "region"]), May::Of(actor.manages))
        }
        ("authenticated", "public.site_members") => (Columns::Only(&["role"]), May::Of(actor.manages)),
        // An editor reviews.
        ("authenticated", "public.calls") => (
            Columns::Only(&["review", "sale_amount", "sale_currency", "reviewed_at", "reviewed_by"]),
            May::Of(actor.reviews),
        ),
        ("opsmantik_service", "public.sessions") => (Columns::But(&["site_id", "created_month", "id"]), May::Of(ALL)),
        ("opsmantik_service", "public.calls") => {
            (Columns::But(&["site_id", "id", "provider", "provider_call_id", "created_at", "updated_at"]), May::Of(ALL))
        }
        ("opsmantik_service", "public.dead_letters") => {
            (Columns::Only(&["tries", "last_error", "replayed_at"]), May::Of(ALL))
        }
        ("opsmantik_service", "public.api_tokens") => (Columns::Only(&["last_used_at"]), May::Of(ALL)),
        ("opsmantik_service", "opsmantik.late_followers") => {
            (Columns::But(&["site_id", "fingerprint", "noted_at"]), May::Of(ALL))
        }
        ("opsmantik_operator", "public.sites") => (Columns::But(&["id", "public_id", "created_at"]), May::Of(ALL)),
        ("opsmantik_operator", "public.site_members") => (Columns::Only(&["role"]), May::Of(ALL)),
        ("opsmantik_operator", "public.api_tokens") => {
            (Columns::Only(&["expires_at", "revoked_at", "rotated_at"]), May::Of(ALL))
        }
        ("opsmantik_operator", "public.dead_letters") => {
            (Columns::Only(&["tries", "last_error", "replayed_at"]), May::Of(ALL))
        }
        ("service_role", _) => (Columns::ALL, key(actor, table)),
        _ => (Columns::None, May::Not),
    }
}

/// For which sites a row is added.
pub fn adds(actor: &Actor, table: &Table) -> May {
    match (actor.role, table.kind.as_str()) {
        ("authenticated", "public.site_members") => May::Of(actor.manages),
        (
            "opsmantik_service",
            "public.sessions"
            | "public.events"
            | "public.calls"
            | "public.dead_letters"
            | "opsmantik.call_rematches"
            | "opsmantik.late_followers",
        ) => May::Of(ALL),
        ("opsmantik_operator", "public.sites" | "public.site_members" | "public.api_tokens") => May::Of(ALL),
        ("service_role", _) => key(actor, table),
        _ => May::Not,
    }
}

/// Of which sites rows are taken away.
pub fn removes(actor: &Actor, table: &Table) -> May {
    match (actor.role, table.kind.as_str()) {
        ("authenticated", "public.site_members") => May::Of(actor.manages),
        ("opsmantik_service", "opsmantik.call_rematches" | "opsmantik.late_followers") => May::Of(ALL),
        ("service_role", _) => key(actor, table),
        _ => May::Not,
    }
}
