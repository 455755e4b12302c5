//! What the catalog holds, one line a fact, in the words of `facts.sql`. `in visible_site_ids()` stands for the sub-select that asks it.

/// By table: its kind, its grants, its policies, its triggers, the publications that list it. Leaves are as their parent.
pub const TABLES: &[(&str, &[&str])] = &[
    // Tenants and their people.
    (
        "public.sites",
        &[
            "table, row security forced, identity key",
            // A person sees their sites; an owner manages.
            "authenticated may SELECT, UPDATE (domain, name, origins, region)",
            "policy authenticated, SELECT to authenticated using (id in visible_site_ids())",
            "policy authenticated_manage, UPDATE to authenticated using (id in owned_site_ids()) check (id in owned_site_ids())",
            // A site token sees its site.
            "opsmantik_tenant may SELECT",
            "policy opsmantik_tenant, SELECT to opsmantik_tenant using (id = (SELECT opsmantik.tenant_site_id()))",
            // The server and the command line.
            "opsmantik_service may SELECT (all but created_at, name, user_id)",
            "policy opsmantik_service, ALL to opsmantik_service using true check true",
            "opsmantik_operator may INSERT, SELECT, UPDATE (all but created_at, id, public_id)",
            "policy opsmantik_operator, ALL to opsmantik_operator using true check true",
            // What a policy asks is read as the owner.
            "policy table_owner, SELECT to OWNER using true",
            // Sessions have no key to it that would lock it when their month goes.
            "TRIGGER sites_kept AFTER DELETE ON public.sites FOR EACH ROW EXECUTE FUNCTION opsmantik.keep_site()",
            "TRIGGER sites_same AFTER UPDATE OF id ON public.sites FOR EACH ROW WHEN ((old.id <> new.id)) EXECUTE FUNCTION opsmantik.keep_site()",
            SUPABASES_KEY,
        ],
    ),
    (
        "public.site_members",
        &[
            "table, row security forced, identity key",
            "authenticated may DELETE, INSERT (all but created_at), SELECT, UPDATE (role)",
            "policy authenticated, SELECT to authenticated using (site_id in visible_site_ids())",
            "policy authenticated_add, INSERT to authenticated check (site_id in owned_site_ids())",
            "policy authenticated_change, UPDATE to authenticated using (site_id in owned_site_ids()) check (site_id in owned_site_ids())",
            "policy authenticated_remove, DELETE to authenticated using (site_id in owned_site_ids())",
            "opsmantik_operator may INSERT, SELECT, UPDATE (role)",
            "policy opsmantik_operator, ALL to opsmantik_operator using true check true",
            "policy table_owner, SELECT to OWNER using true",
            SUPABASES_KEY,
        ],
    ),
    // Their traffic.
    (
        "public.sessions",
        &[
            "partitioned table, row security forced, identity full",
            "authenticated may SELECT",
            "policy authenticated, SELECT to authenticated using (site_id in visible_site_ids())",
            "opsmantik_tenant may SELECT",
            "policy opsmantik_tenant, SELECT to opsmantik_tenant using (site_id = (SELECT opsmantik.tenant_site_id()))",
            // It merges, and moves no row.
            "opsmantik_service may INSERT, SELECT, UPDATE (all but created_month, id, site_id)",
            "policy opsmantik_service, ALL to opsmantik_service using true check true",
            "TRIGGER sessions_deleted AFTER DELETE ON public.sessions FOR EACH ROW EXECUTE FUNCTION opsmantik.note_deleted('sessions') (fires: A)",
            "TRIGGER sessions_moved AFTER UPDATE OF site_id, id ON public.sessions FOR EACH ROW WHEN (((old.site_id <> new.site_id) OR (old.id <> new.id))) \
             EXECUTE FUNCTION opsmantik.note_deleted('sessions') (fires: A)",
            "TRIGGER sessions_site AFTER INSERT OR UPDATE OF site_id ON public.sessions FOR EACH ROW EXECUTE FUNCTION opsmantik.check_site()",
            "TRIGGER opsmantik_truncated AFTER TRUNCATE ON public.sessions FOR EACH STATEMENT EXECUTE FUNCTION opsmantik.note_truncated('sessions') (fires: A)",
            "in publication opsmantik_feed",
            SUPABASES_KEY,
        ],
    ),
    (
        "public.events",
        &[
            "partitioned table, row security forced, identity full",
            "authenticated may SELECT",
            "policy authenticated, SELECT to authenticated using (site_id in visible_site_ids())",
            "opsmantik_tenant may SELECT",
            "policy opsmantik_tenant, SELECT to opsmantik_tenant using (site_id = (SELECT opsmantik.tenant_site_id()))",
            // An event is never changed.
            "opsmantik_service may INSERT, SELECT",
            "policy opsmantik_service, ALL to opsmantik_service using true check true",
            "TRIGGER events_deleted AFTER DELETE ON public.events FOR EACH ROW EXECUTE FUNCTION opsmantik.note_deleted('events') (fires: A)",
            "TRIGGER events_moved AFTER UPDATE OF site_id, id ON public.events FOR EACH ROW WHEN (((old.site_id <> new.site_id) OR (old.id <> new.id))) \
             EXECUTE FUNCTION opsmantik.note_deleted('events') (fires: A)",
            "TRIGGER opsmantik_truncated AFTER TRUNCATE ON public.events FOR EACH STATEMENT EXECUTE FUNCTION opsmantik.note_truncated('events') (fires: A)",
            "in publication opsmantik_feed",
            SUPABASES_KEY,
        ],
    ),
    // Their calls.
    (
        "public.calls",
        &[
            "table, row security forced, identity full",
            "authenticated may SELECT, UPDATE (review, reviewed_at, reviewed_by, sale_amount, sale_currency)",
            "policy authenticated, SELECT to authenticated using (site_id in visible_site_ids())",
            // Who reviews signs with their own name, or not at all.
            "policy authenticated_review, UPDATE to authenticated using (site_id in editable_site_ids()) \
             check ((site_id in editable_site_ids()) AND ((reviewed_by IS NULL) OR (reviewed_by = ('user:'::text || ((SELECT opsmantik.caller_id()))::text))))",
            "opsmantik_tenant may SELECT",
            "policy opsmantik_tenant, SELECT to opsmantik_tenant using (site_id = (SELECT opsmantik.tenant_site_id()))",
            "opsmantik_service may INSERT, SELECT, UPDATE (all but created_at, id, provider, provider_call_id, site_id, updated_at)",
            "policy opsmantik_service, ALL to opsmantik_service using true check true",
            "TRIGGER calls_touch BEFORE UPDATE ON public.calls FOR EACH ROW WHEN ((old.* IS DISTINCT FROM new.*)) EXECUTE FUNCTION opsmantik.touch_call()",
            "TRIGGER calls_reopen AFTER UPDATE OF review ON public.calls FOR EACH ROW WHEN (((old.review <> 'OPEN'::text) \
             AND (new.review = 'OPEN'::text))) EXECUTE FUNCTION opsmantik.reopen_call()",
            "TRIGGER calls_deleted AFTER DELETE ON public.calls FOR EACH ROW EXECUTE FUNCTION opsmantik.note_deleted('calls') (fires: A)",
            "TRIGGER calls_moved AFTER UPDATE OF site_id, id ON public.calls FOR EACH ROW WHEN (((old.site_id <> new.site_id) OR (old.id <> new.id))) \
             EXECUTE FUNCTION opsmantik.note_deleted('calls') (fires: A)",
            "TRIGGER opsmantik_truncated AFTER TRUNCATE ON public.calls FOR EACH STATEMENT EXECUTE FUNCTION opsmantik.note_truncated('calls') (fires: A)",
            // The visit of a match is there when the match is made.
            "CONSTRAINT TRIGGER calls_session_new AFTER INSERT ON public.calls DEFERRABLE INITIALLY IMMEDIATE FOR EACH ROW \
             WHEN ((new.matched_session_id IS NOT NULL)) EXECUTE FUNCTION opsmantik.check_match()",
            "CONSTRAINT TRIGGER calls_session_moved AFTER UPDATE OF site_id, matched_session_id, matched_session_month ON public.calls \
             DEFERRABLE INITIALLY IMMEDIATE FOR EACH ROW WHEN (((new.matched_session_id IS NOT NULL) AND (((new.site_id IS DISTINCT FROM \
             old.site_id) OR (new.matched_session_month IS DISTINCT FROM old.matched_session_month)) OR (new.matched_session_id IS DISTINCT \
             FROM old.matched_session_id)))) EXECUTE FUNCTION opsmantik.check_match()",
            "in publication supabase_realtime",
            "in publication opsmantik_feed",
            SUPABASES_KEY,
        ],
    ),
    // What no tenant reads.
    (
        "public.dead_letters",
        &[
            "table, row security forced, identity key",
            "opsmantik_service may INSERT, SELECT, UPDATE (last_error, replayed_at, tries)",
            "policy opsmantik_service, ALL to opsmantik_service using true check true",
            "opsmantik_operator may SELECT, UPDATE (last_error, replayed_at, tries)",
            "policy opsmantik_operator, ALL to opsmantik_operator using true check true",
            SUPABASES_KEY,
        ],
    ),
    (
        "public.api_tokens",
        &[
            "table, row security forced, identity key",
            "opsmantik_service may SELECT (all but all_sites, created_at, name, rotated_at), UPDATE (last_used_at)",
            "policy opsmantik_service, ALL to opsmantik_service using true check true",
            "opsmantik_operator may INSERT, SELECT, UPDATE (expires_at, revoked_at, rotated_at)",
            "policy opsmantik_operator, ALL to opsmantik_operator using true check true",
            SUPABASES_KEY,
        ],
    ),
    // The server's own notes.
    (
        "opsmantik.call_rematches",
        &[
            "table, row security forced, identity key",
            "opsmantik_service may DELETE, INSERT, SELECT",
            "policy opsmantik_service, ALL to opsmantik_service using true check true",
            // A trigger writes as the owner.
            "policy table_owner, ALL to OWNER using true check true",
        ],
    ),
    (
        "opsmantik.late_followers",
        &[
            "table, row security forced, identity key",
            // The note of a fingerprint moves ahead, or back; what was noted when stays.
            "opsmantik_service may DELETE, INSERT, SELECT, UPDATE (all but fingerprint, noted_at, site_id)",
            "policy opsmantik_service, ALL to opsmantik_service using true check true",
        ],
    ),
    ("opsmantik.session_row", &["composite type"]),
    ("opsmantik.event_row", &["composite type"]),
    (
        "opsmantik.vanished",
        &[
            "table, row security forced, identity key",
            "opsmantik_service may SELECT",
            "policy opsmantik_service, SELECT to opsmantik_service using true",
            "policy table_owner, ALL to OWNER using true check true",
            "in publication opsmantik_feed",
        ],
    ),
    (
        // What note_leaves has seen; nobody's but its own.
        "opsmantik.attached",
        &["table, row security forced, identity key", "policy table_owner, ALL to OWNER using true check true"],
    ),
    ("opsmantik.schema_history", &["table, row security on, identity key"]),
];

/// Supabase's key to everything. Where it does not pass by row level security, no policy shows it anything.
const SUPABASES_KEY: &str = "service_role may DELETE, INSERT, SELECT, UPDATE";

/// What a leaf has and its parent has not.
pub const LEAVES_ONLY: &[&str] = &["in publication supabase_realtime"];

/// Each function: what it is, and who besides its owner may call it. All have their search path pinned.
pub const FUNCTIONS: &[(&str, &str)] = &[
    // What policies ask.
    ("opsmantik.caller_id()", "plpgsql, stable, definer; for authenticated"),
    ("opsmantik.visible_site_ids()", "sql, stable, definer; for authenticated"),
    ("opsmantik.editable_site_ids()", "sql, stable, definer; for authenticated"),
    ("opsmantik.owned_site_ids()", "sql, stable, definer; for authenticated"),
    ("opsmantik.tenant_site_id()", "sql, stable, invoker; for opsmantik_tenant"),
    // Months.
    (
        "opsmantik.ensure_month(month date)",
        "plpgsql, volatile, definer, DateStyle=ISO, YMD, lock_timeout=2s; for opsmantik_operator, opsmantik_service",
    ),
    ("opsmantik.dress_leaf(parent regclass, leaf regclass)", "plpgsql, volatile, definer; for nobody"),
    ("opsmantik.leaf_faults()", "sql, stable, definer, jit=off; for opsmantik_operator, opsmantik_service"),
    (
        "opsmantik.missing_months(from_month date, ahead integer)",
        "sql, stable, definer; for opsmantik_operator, opsmantik_service",
    ),
    ("opsmantik.leaf_states()", "sql, stable, definer; for opsmantik_operator"),
    ("opsmantik.is_tied(events_leaf regclass, sessions_leaf regclass)", "sql, stable, invoker; for nobody"),
    ("opsmantik.tie_leaf(events_leaf regclass, sessions_leaf regclass)", "plpgsql, volatile, definer; for nobody"),
    ("opsmantik.is_ours(rel regclass)", "sql, stable, invoker; for nobody"),
    ("opsmantik.unpublished()", "sql, stable, definer; for nobody"),
    ("opsmantik.publish_leaves()", "plpgsql, volatile, definer; for nobody"),
    ("opsmantik.leaves()", "sql, stable, invoker, DateStyle=ISO, YMD; for nobody"),
    ("opsmantik.policies_of(rel regclass)", "sql, stable, invoker; for nobody"),
    ("opsmantik.grants_of(rel regclass)", "sql, stable, invoker; for nobody"),
    ("opsmantik.storage_faults()", "sql, stable, invoker; for opsmantik_operator, opsmantik_service"),
    // Triggers.
    ("opsmantik.touch_call()", "plpgsql, volatile, invoker; for nobody"),
    ("opsmantik.reopen_call()", "plpgsql, volatile, definer; for nobody"),
    ("opsmantik.check_site()", "plpgsql, volatile, invoker; for nobody"),
    ("opsmantik.keep_site()", "plpgsql, volatile, invoker, lock_timeout=1s; for nobody"),
    ("opsmantik.check_match()", "plpgsql, volatile, invoker, plan_cache_mode=force_custom_plan; for nobody"),
    // What a log that is gone cannot tell.
    ("opsmantik.note_deleted()", "plpgsql, volatile, definer; for nobody"),
    ("opsmantik.note_truncated()", "plpgsql, volatile, definer; for nobody"),
    ("opsmantik.note_vanished(tab text, month date, site_id uuid, cause text)", "sql, volatile, definer; for nobody"),
    ("opsmantik.notes_loss(rel regclass, tab name)", "sql, stable, invoker; for nobody"),
    ("opsmantik.keep_marks(rel regclass, tab name)", "plpgsql, volatile, definer; for nobody"),
    ("opsmantik.link_changes()", "sql, stable, invoker; for nobody"),
    (
        "opsmantik.note_leaves()",
        "plpgsql, volatile, definer, lock_timeout=200ms; for opsmantik_operator, opsmantik_service",
    ),
    ("opsmantik.prune_vanished()", "sql, volatile, definer; for opsmantik_service"),
];

/// Schemas, publications, roles; event triggers and types, if there were any.
pub const ALSO: &[&str] = &[
    "schema opsmantik: opsmantik_service may USAGE",
    "schema opsmantik: opsmantik_operator may USAGE",
    "schema public: PUBLIC may USAGE",
    "publication opsmantik_feed: insert update delete truncate, by the root",
    "publication supabase_realtime: insert update delete truncate, by the leaf",
    "role anon:",
    "role authenticated:",
    "role service_role: BYPASSRLS",
    "role opsmantik_service:",
    "role opsmantik_operator:",
    "role opsmantik_tenant:",
];

/// Where there was no `auth`, we made it, as Supabase has it.
pub const ON_VANILLA: &[&str] = &[
    "schema auth: anon may USAGE",
    "schema auth: authenticated may USAGE",
    "schema auth: service_role may USAGE",
    "auth.uid(): plpgsql, stable, invoker; for PUBLIC",
];

/// What `support/supabase.rs` prepared, and what nothing of ours has changed.
pub const ON_SUPABASE: &[&str] = &[
    "schema public: OWNER may CREATE, USAGE",
    "schema public: anon may USAGE",
    "schema public: authenticated may USAGE",
    "schema public: service_role may USAGE",
    "default privileges everywhere on functions that OWNER makes: PUBLIC may EXECUTE",
];

/// What a table that is made carelessly there gets at once.
pub fn default_privileges_on_supabase() -> Vec<String> {
    let table = "tables that OWNER makes: ROLE may DELETE, INSERT, REFERENCES, SELECT, TRIGGER, TRUNCATE, UPDATE";
    let function = "functions that OWNER makes: ROLE may EXECUTE";
    let sequence = "sequences that OWNER makes: ROLE may SELECT, UPDATE, USAGE";
    let of = |role: &str| {
        [
            ("everywhere", table),
            ("everywhere", function),
            ("in public", table),
            ("in public", function),
            ("in public", sequence),
        ]
        .map(|(place, what)| format!("default privileges {place} on {}", what.replace("ROLE", role)))
    };
    ["anon", "authenticated", "service_role"].into_iter().flat_map(of).collect()
}
