-- Who may manage, and what nobody may.
--
-- A viewer reads, an editor reviews calls as well, an owner manages: the site's name, domain, origins and region, and its members. All by plain
-- SQL as `authenticated`; what may be written is said by columns, so that no row changes its site, its person or its public name. A site's
-- own owner (sites.user_id) stands in no row of site_members, so no member can take the site away from them.
--
-- The server's roles lose what no statement of theirs needs. Nobody but Supabase's service_role moves a row to another site or month any more.

-- Whatever a host's auth.uid() raises, a policy shows nothing. As before, and for every error but a cancelled query.
CREATE OR REPLACE FUNCTION opsmantik.caller_id() RETURNS uuid
LANGUAGE plpgsql STABLE SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN (SELECT auth.uid());
EXCEPTION WHEN OTHERS THEN
    RETURN NULL;
END
$$;

CREATE OR REPLACE FUNCTION opsmantik.owned_site_ids() RETURNS uuid[]
LANGUAGE sql STABLE SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
    SELECT coalesce(array_agg(id), '{}')
    FROM (
        SELECT s.id FROM public.sites s WHERE s.user_id = (SELECT opsmantik.caller_id())
        UNION
        SELECT m.site_id FROM public.site_members m
        WHERE m.user_id = (SELECT opsmantik.caller_id()) AND m.role = 'owner'
    ) AS owned (id)
$$;
COMMENT ON FUNCTION opsmantik.owned_site_ids() IS 'The sites that the user of this transaction may manage.';
REVOKE ALL ON FUNCTION opsmantik.owned_site_ids() FROM PUBLIC, anon, authenticated, service_role;
GRANT EXECUTE ON FUNCTION opsmantik.owned_site_ids() TO authenticated;

COMMENT ON COLUMN public.site_members.role IS
    'viewer: reads. editor: reviews calls as well. owner: manages the site and its members as well.';

DROP POLICY IF EXISTS authenticated_manage ON public.sites;
CREATE POLICY authenticated_manage ON public.sites FOR UPDATE TO authenticated
    USING (id = ANY ((SELECT opsmantik.owned_site_ids())::uuid[]))
    WITH CHECK (id = ANY ((SELECT opsmantik.owned_site_ids())::uuid[]));
DROP POLICY IF EXISTS authenticated_add ON public.site_members;
CREATE POLICY authenticated_add ON public.site_members FOR INSERT TO authenticated
    WITH CHECK (site_id = ANY ((SELECT opsmantik.owned_site_ids())::uuid[]));
DROP POLICY IF EXISTS authenticated_change ON public.site_members;
CREATE POLICY authenticated_change ON public.site_members FOR UPDATE TO authenticated
    USING (site_id = ANY ((SELECT opsmantik.owned_site_ids())::uuid[]))
    WITH CHECK (site_id = ANY ((SELECT opsmantik.owned_site_ids())::uuid[]));
DROP POLICY IF EXISTS authenticated_remove ON public.site_members;
CREATE POLICY authenticated_remove ON public.site_members FOR DELETE TO authenticated
    USING (site_id = ANY ((SELECT opsmantik.owned_site_ids())::uuid[]));

GRANT UPDATE (name, domain, origins, region) ON public.sites TO authenticated;
GRANT INSERT (site_id, user_id, role), UPDATE (role), DELETE ON public.site_members TO authenticated;

-- What the command line checks when it adds a site holds for a hand as well. One label alone would let in a whole top-level domain, and an
-- origin that is not spelled like a browser's would be taken by some answers and refused by others.
ALTER TABLE public.sites DROP CONSTRAINT IF EXISTS sites_name_bounded;
ALTER TABLE public.sites ADD CONSTRAINT sites_name_bounded
    CHECK (btrim(name) <> '' AND length(name) <= 200 AND name !~ '[[:cntrl:]]') NOT VALID;
ALTER TABLE public.sites DROP CONSTRAINT IF EXISTS sites_domain_host;
ALTER TABLE public.sites ADD CONSTRAINT sites_domain_host
    CHECK (octet_length(domain) <= 253
           AND (domain = 'localhost' OR domain ~ '^\[[0-9a-f:.]+\]$' OR domain ~ '^[^\s/:@?#*.\[\]\\]+(\.[^\s/:@?#*.\[\]\\]+)+$')) NOT VALID;
ALTER TABLE public.sites DROP CONSTRAINT IF EXISTS sites_origins_spelled;
ALTER TABLE public.sites ADD CONSTRAINT sites_origins_spelled
    CHECK (cardinality(origins) <= 100 AND octet_length(array_to_string(origins, ' ')) <= 20000
           AND array_to_string(origins, ' ') = lower(array_to_string(origins, ' '))
           AND (cardinality(origins) = 0
                OR (array_to_string(origins, ' ') ~ '^(\*|https?://[^\s/@?#*]+)( (\*|https?://[^\s/@?#*]+))*$'
                    AND cardinality(string_to_array(array_to_string(origins, ' '), ' ')) = cardinality(origins)))) NOT VALID;

-- When a call was judged is a time that a calendar has: one that no message can show would hide the call.
ALTER TABLE public.calls DROP CONSTRAINT IF EXISTS calls_reviewed_at_bounded;
ALTER TABLE public.calls ADD CONSTRAINT calls_reviewed_at_bounded
    CHECK (reviewed_at >= '1970-01-01 00:00:00+00' AND reviewed_at < '10000-01-01 00:00:00+00') NOT VALID;

-- The server: it reads no member, no name and no owner of a site, and rewrites everything but what a row is found by.
DROP POLICY IF EXISTS opsmantik_service ON public.site_members;
REVOKE ALL ON public.site_members, public.sites, public.api_tokens FROM opsmantik_service;
GRANT SELECT (id, public_id, domain, origins, region) ON public.sites TO opsmantik_service;
GRANT SELECT (id, site_id, token_hash, scopes, expires_at, revoked_at, last_used_at), UPDATE (last_used_at)
    ON public.api_tokens TO opsmantik_service;
REVOKE UPDATE ON public.sessions, public.calls, public.dead_letters FROM opsmantik_service;
GRANT UPDATE (tries, last_error) ON public.dead_letters TO opsmantik_service;
DO $$
DECLARE
    open record;
BEGIN
    FOR open IN
        SELECT t.rel, string_agg(quote_ident(a.attname), ', ' ORDER BY a.attnum) AS cols
        FROM (VALUES ('public.sessions'::regclass, '{site_id, created_month, id}'::name[]),
                     ('public.calls', '{site_id, id, provider, provider_call_id, created_at, updated_at}')) AS t (rel, keys)
        JOIN pg_attribute a ON a.attrelid = t.rel AND a.attnum > 0 AND NOT a.attisdropped AND a.attname <> ALL (t.keys)
        GROUP BY t.rel
    LOOP
        EXECUTE format('GRANT UPDATE (%s) ON %s TO opsmantik_service', open.cols, open.rel);
    END LOOP;
END
$$;

-- The operator: hands a site over and corrects it, ends a token, marks a letter as replayed.
REVOKE UPDATE ON public.sites, public.site_members, public.api_tokens, public.dead_letters FROM opsmantik_operator;
GRANT UPDATE (user_id, name, domain, origins, region) ON public.sites TO opsmantik_operator;
GRANT UPDATE (role) ON public.site_members TO opsmantik_operator;
GRANT UPDATE (expires_at, revoked_at, rotated_at) ON public.api_tokens TO opsmantik_operator;
GRANT UPDATE (tries, last_error, replayed_at) ON public.dead_letters TO opsmantik_operator;

-- As before, by columns: a column that is added and that nobody lets the server write is told of here.
CREATE OR REPLACE FUNCTION opsmantik.storage_faults() RETURNS SETOF text
LANGUAGE sql STABLE
SET search_path = pg_catalog, pg_temp
AS $$
    SELECT 'the database is read-only' WHERE current_setting('transaction_read_only') = 'on'
    UNION ALL
    SELECT format('%s may not %s on %s', current_user, need.privilege, need.rel)
    FROM (VALUES
        ('public.sessions', 'SELECT'), ('public.sessions', 'INSERT'),
        ('public.events', 'SELECT'), ('public.events', 'INSERT'),
        ('public.calls', 'SELECT'), ('public.calls', 'INSERT'),
        ('opsmantik.call_rematches', 'SELECT'), ('opsmantik.call_rematches', 'INSERT'), ('opsmantik.call_rematches', 'DELETE'),
        ('public.dead_letters', 'SELECT'), ('public.dead_letters', 'INSERT')
    ) AS need (rel, privilege)
    WHERE NOT has_table_privilege(need.rel, need.privilege)
    UNION ALL
    SELECT format('%s may not %s (%s) on %s', current_user, need.privilege, string_agg(a.attname, ', ' ORDER BY a.attnum), need.rel)
    FROM (VALUES
        ('public.sites', 'SELECT', '{id, public_id, domain, origins, region}'::name[], '{}'::name[]),
        ('public.sessions', 'UPDATE', NULL, '{site_id, created_month, id}'),
        ('public.calls', 'UPDATE', NULL, '{site_id, id, provider, provider_call_id, created_at, updated_at}'),
        ('public.api_tokens', 'SELECT', '{id, site_id, token_hash, scopes, expires_at, revoked_at, last_used_at}', '{}'),
        ('public.dead_letters', 'UPDATE', '{tries, last_error}', '{}')
    ) AS need (rel, privilege, only_cols, but_cols)
    JOIN pg_attribute a ON a.attrelid = need.rel::regclass AND a.attnum > 0 AND NOT a.attisdropped
     AND (need.only_cols IS NULL OR a.attname = ANY (need.only_cols)) AND a.attname <> ALL (need.but_cols)
    WHERE NOT has_column_privilege(need.rel, a.attnum, need.privilege)
    GROUP BY need.rel, need.privilege
$$;

-- A person's page of a month, the latest first, is read from here instead of being sorted out of all of the site's month.
CREATE INDEX IF NOT EXISTS events_by_time ON public.events (site_id, created_at);

-- The list of what has been migrated is nobody's business but the migrator's, whatever default privileges have given.
DO $$
BEGIN
    IF to_regclass('opsmantik.schema_history') IS NOT NULL THEN
        REVOKE ALL ON opsmantik.schema_history FROM PUBLIC, anon, authenticated, service_role;
        ALTER TABLE opsmantik.schema_history ENABLE ROW LEVEL SECURITY;
    END IF;
END
$$;

-- The leaves follow.
SELECT opsmantik.dress_leaf(inhparent, inhrelid) FROM pg_inherits
WHERE inhparent IN ('public.sessions'::regclass, 'public.events'::regclass);
