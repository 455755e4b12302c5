//! Two tenants with rows in every table and in every leaf, on three kinds of database, and all who come to look.

use std::collections::BTreeMap;

use tokio_postgres::Client;
use uuid::Uuid;

use crate::support::cluster::cluster;
use crate::support::database::{Database, database, empty};
use crate::support::supabase::migrated_like_supabase;

pub const A: Uuid = Uuid::from_u128(0xa0000000_0000_4000_8000_000000000001);
pub const B: Uuid = Uuid::from_u128(0xb0000000_0000_4000_8000_000000000002);
pub const OWNER_A: Uuid = Uuid::from_u128(0xa0000000_0000_4000_8000_00000000000a);
pub const MEMBER_OWNER_A: Uuid = Uuid::from_u128(0xa0000000_0000_4000_8000_00000000000b);
pub const EDITOR_A: Uuid = Uuid::from_u128(0xa0000000_0000_4000_8000_00000000000c);
pub const VIEWER_A: Uuid = Uuid::from_u128(0xa0000000_0000_4000_8000_00000000000d);
pub const OWNER_B: Uuid = Uuid::from_u128(0xb0000000_0000_4000_8000_00000000000a);
pub const STRANGER: Uuid = Uuid::from_u128(0xc0000000_0000_4000_8000_00000000000a);

pub const NOBODYS: &[Uuid] = &[];
pub const ONLY_A: &[Uuid] = &[A];
pub const ONLY_B: &[Uuid] = &[B];
/// Rows of both, and those that are no site's.
pub const ALL: &[Uuid] = &[A, B];

/// Who looks.
#[derive(Debug, Clone)]
pub struct Actor {
    pub name: String,
    pub role: &'static str,
    /// Settings of the transaction.
    pub settings: Vec<(&'static str, String)>,
    /// What the rule goes by: the sites they see, those whose calls they review, those they manage.
    pub sees: &'static [Uuid],
    pub reviews: &'static [Uuid],
    pub manages: &'static [Uuid],
    /// `service_role` only: it passes by row level security.
    pub bypasses: bool,
}

impl Actor {
    pub fn of(role: &'static str, name: &str) -> Self {
        Self {
            name: format!("{role} {name}"),
            role,
            settings: Vec::new(),
            sees: NOBODYS,
            reviews: NOBODYS,
            manages: NOBODYS,
            bypasses: false,
        }
    }

    pub fn with(mut self, setting: &'static str, value: &str) -> Self {
        self.settings.push((setting, value.to_owned()));
        self
    }

    pub fn person(name: &str, id: Uuid) -> Self {
        Self::of("authenticated", name).with("request.jwt.claims", &format!(r#"{{"sub":"{id}"}}"#))
    }

    /// The words that turn the superuser's transaction into this one's.
    pub fn opening(&self) -> String {
        let mut words = String::new();
        if self.role == "service_role" && !self.bypasses {
            // Until the rollback, and seen by this transaction alone.
            words.push_str("ALTER ROLE service_role NOBYPASSRLS; ");
        }
        for (setting, value) in &self.settings {
            words.push_str(&format!("SET LOCAL {setting} = '{}'; ", value.replace('\'', "''")));
        }
        words + &format!("SET LOCAL ROLE {}", self.role)
    }
}

/// Everybody.
pub fn actors() -> Vec<Actor> {
    let claims = "request.jwt.claims";
    let site = "opsmantik.site_id";
    vec![
        Actor::person("as nobody", OWNER_A).with(claims, "").in_role("anon"),
        Actor::person("with the owner's claims", OWNER_A).in_role("anon"),
        Actor { sees: ONLY_A, reviews: ONLY_A, manages: ONLY_A, ..Actor::person("owner of A", OWNER_A) },
        Actor { sees: ONLY_A, reviews: ONLY_A, manages: ONLY_A, ..Actor::person("member owner of A", MEMBER_OWNER_A) },
        Actor { sees: ONLY_A, reviews: ONLY_A, ..Actor::person("editor of A", EDITOR_A) },
        Actor { sees: ONLY_A, ..Actor::person("viewer of A", VIEWER_A) },
        Actor { sees: ONLY_B, reviews: ONLY_B, manages: ONLY_B, ..Actor::person("owner of B", OWNER_B) },
        Actor::person("stranger", STRANGER),
        Actor::of("authenticated", "without claims"),
        Actor::of("authenticated", "with claims that are no JSON").with(claims, "sub"),
        Actor::of("authenticated", "with an array").with(claims, &format!(r#"["sub","{OWNER_A}"]"#)),
        Actor::of("authenticated", "whose sub is no UUID").with(claims, r#"{"sub":"' OR true --"}"#),
        Actor { sees: ONLY_A, ..Actor::of("opsmantik_tenant", "of A").with(site, &A.to_string()) },
        Actor { sees: ONLY_B, ..Actor::of("opsmantik_tenant", "of B").with(site, &B.to_string()) },
        Actor::of("opsmantik_tenant", "of no site"),
        Actor::of("opsmantik_tenant", "of garbage").with(site, &format!("{A} OR true")),
        Actor { sees: ALL, bypasses: true, ..Actor::of("service_role", "as on Supabase") },
        Actor::of("service_role", "that bypasses nothing"),
        Actor { sees: ALL, ..Actor::of("opsmantik_service", "") },
        Actor { sees: ALL, ..Actor::of("opsmantik_operator", "") },
    ]
}

impl Actor {
    fn in_role(mut self, role: &'static str) -> Self {
        self.name = self.name.replacen(self.role, role, 1);
        self.role = role;
        self
    }
}

/// A table, or a leaf by its own name.
#[derive(Debug, Clone)]
pub struct Table {
    pub name: String,
    /// The table, or the leaf's parent, as `public.events`.
    pub kind: String,
    /// The month of a row to be inserted.
    pub month: String,
    pub columns: Vec<String>,
    /// Every row as text, and whose it is.
    pub rows: Vec<(Option<Uuid>, String)>,
}

impl Table {
    /// The column that says whose a row is.
    pub fn site_column(&self) -> &'static str {
        match self.kind.as_str() {
            "public.sites" => "id",
            // Nobody's.
            "opsmantik.attached" | "opsmantik.schema_history" => "NULL::uuid",
            _ => "site_id",
        }
    }

    pub fn is_leaf(&self) -> bool {
        self.name != self.kind
    }

    /// The rows of some sites; `ALL` has those of no site, too.
    pub fn rows_of(&self, sites: &[Uuid]) -> Vec<String> {
        let of = |site: &Option<Uuid>| sites == ALL || site.is_some_and(|site| sites.contains(&site));
        let mut rows: Vec<String> = self.rows.iter().filter(|(site, _)| of(site)).map(|(_, row)| row.clone()).collect();
        rows.sort();
        rows
    }
}

/// A database with both tenants in it.
pub struct World {
    pub database: Database,
    pub tables: Vec<Table>,
}

impl World {
    /// Migrated by a superuser, on a plain PostgreSQL.
    pub async fn vanilla() -> Self {
        Self::fill(database().await).await
    }

    /// Migrated by Supabase's owner.
    pub async fn like_supabase(name: &str) -> Self {
        Self::fill(migrated_like_supabase(name).await).await
    }

    /// Migrated by an owner who is nothing else, so that FORCE binds what runs as the owner.
    pub async fn of_a_plain_owner(name: &str) -> Self {
        drop(database().await); // the roles are there
        let admin = empty(name).await;
        let prepare = format!(
            "CREATE ROLE {name} LOGIN PASSWORD 'plain'; ALTER DATABASE {name} OWNER TO {name}; \
             GRANT authenticated, opsmantik_service, opsmantik_operator, opsmantik_tenant TO {name}"
        );
        admin.batch_execute(&prepare).await.expect("an owner");
        let url = cluster().await.url(name);
        let (_, place) = url.split_once('@').expect("user@host");
        let url = format!("postgres://{name}:plain@{place}");
        let store = opsmantik::store::Store::new(&url, 4).await.expect("a URL");
        store.migrate().await.expect("the migrations need no more than an owner");
        Self::fill(Database { name: name.to_owned(), url, store, admin }).await
    }

    async fn fill(database: Database) -> Self {
        database.ensure_month("2026-03-01").await;
        for (site, letter, owner) in [(A, "a", OWNER_A), (B, "b", OWNER_B)] {
            let fill = FILL
                .replace("$SITE", &format!("'{site}'::uuid"))
                .replace("$OWNER", &format!("'{owner}'::uuid"))
                .replace("$LETTER", letter);
            database.admin.batch_execute(&fill).await.expect("a tenant's rows");
        }
        for (person, role) in [(MEMBER_OWNER_A, "owner"), (EDITOR_A, "editor"), (VIEWER_A, "viewer")] {
            let add = format!("INSERT INTO site_members (site_id, user_id, role) VALUES ('{A}', '{person}', '{role}')");
            database.admin.batch_execute(&add).await.expect("a member");
        }
        let tables = tables(&database.admin).await;
        assert!(tables.len() >= 11 + 12, "eleven tables, and the leaves of six months");
        for table in tables.iter().filter(|table| table.site_column() != "NULL::uuid") {
            for site in [A, B] {
                assert!(!table.rows_of(&[site]).is_empty(), "{} shows something", table.name);
            }
        }
        Self { database, tables }
    }
}

/// One tenant's rows: in every month that has leaves, and in every other table. Marked by the tenant's letter.
const FILL: &str = "
    INSERT INTO sites (id, public_id, user_id, name, domain, region) VALUES ($SITE, '$LETTER', $OWNER, '$LETTER', '$LETTER.example', 'US');
    INSERT INTO site_members (site_id, user_id, role) VALUES ($SITE, md5('$LETTER')::uuid, 'viewer');
    INSERT INTO sessions (site_id, created_month, id, created_at, last_seen_at, event_count, entry_page, attribution, traffic_source,
                          traffic_medium, lead_score, gclid)
    SELECT $SITE, month, md5('s' || month || n)::uuid, month, month, 1, '/$LETTER', 'Direct-to-Ads', 'Google Ads', 'cpc', 0, '$LETTER'
    FROM (SELECT DISTINCT month FROM opsmantik.leaves()) m, generate_series(1, 2) n;
    INSERT INTO events (site_id, session_month, id, session_id, created_at, occurred_at, url, event_category, event_action, lead_score)
    SELECT site_id, created_month, md5('e' || id)::uuid, id, created_at, created_at, '/$LETTER', 'c', 'a', 0
    FROM sessions WHERE site_id = $SITE;
    INSERT INTO calls (id, site_id, provider, provider_call_id, channel, direction, dialled_number, started_at, recording_ref)
    SELECT md5('$LETTER' || n)::uuid, $SITE, 'p', n::text, 'PHONE', 'INBOUND', '+12025550123', '2026-03-02', '$LETTER' FROM generate_series(1, 2) n;
    INSERT INTO dead_letters (site_id, source, reason, detail, payload, received_at)
    VALUES ($SITE, 'sync', 'r', 'd', '$LETTER', now()), (NULL, 'sync', 'r', 'd', 'nobody''s', now());
    INSERT INTO api_tokens (site_id, token_hash, scopes) VALUES ($SITE, sha256('$LETTER'), '{calls:read}');
    INSERT INTO api_tokens (all_sites, token_hash, scopes) VALUES (true, sha256('every $LETTER'), '{calls:read}');
    INSERT INTO opsmantik.call_rematches (site_id, call_id) VALUES ($SITE, md5('$LETTER1')::uuid);
    INSERT INTO opsmantik.late_followers (site_id, fingerprint, after, until, month, since, since_id)
    VALUES ($SITE, '$LETTER', '2026-03-02', '2026-05-31', '2026-03-01', '2026-03-02', $SITE);
    INSERT INTO opsmantik.vanished (tab, month, site_id, xid, cause) VALUES ('calls', '-infinity', $SITE, '1', 'delete');
";

/// Every table of ours, parents and leaves, with its rows as the superuser sees them.
async fn tables(admin: &Client) -> Vec<Table> {
    let found = admin
        .query(
            "SELECT c.relnamespace::regnamespace || '.' || c.relname, \
                 coalesce('public.' || l.parent::text, c.relnamespace::regnamespace || '.' || c.relname), \
                 coalesce(l.month, '2026-03-01')::text, \
                 ARRAY(SELECT attname::text FROM pg_attribute WHERE attrelid = c.oid AND attnum > 0 AND NOT attisdropped) \
             FROM pg_class c LEFT JOIN opsmantik.leaves() l ON l.leaf = c.oid \
             WHERE c.relnamespace IN ('public'::regnamespace, 'opsmantik'::regnamespace) AND c.relkind IN ('r', 'p') ORDER BY 1",
            &[],
        )
        .await
        .expect("the catalog can be read");
    let mut tables = Vec::new();
    for row in &found {
        let mut table =
            Table { name: row.get(0), kind: row.get(1), month: row.get(2), columns: row.get(3), rows: Vec::new() };
        let all = format!("SELECT {}, to_jsonb(t)::text FROM {} t", table.site_column(), table.name);
        let rows = admin.query(&all, &[]).await.expect("the superuser may");
        table.rows = rows.iter().map(|row| (row.get(0), row.get(1))).collect();
        tables.push(table);
    }
    tables
}

/// Whose rows are how, everywhere at once: to be compared before and after.
pub async fn snapshot(admin: &Client, tables: &[Table]) -> BTreeMap<String, Option<Uuid>> {
    let parents: Vec<String> = tables
        .iter()
        .filter(|table| !table.is_leaf())
        .map(|table| {
            format!("SELECT {}, '{} ' || to_jsonb(t)::text FROM {} t", table.site_column(), table.name, table.name)
        })
        .collect();
    let rows = admin.query(&parents.join(" UNION ALL "), &[]).await.expect("the superuser may");
    rows.iter().map(|row| (row.get(1), row.get(0))).collect()
}

impl World {
    /// Whoever owns the database, the superuser looks behind the walls.
    pub async fn url_of_superuser(&self) -> String {
        cluster().await.url(&self.database.name)
    }
}
