-- Who sees which rows. A forgotten WHERE shows nothing instead of everything.
--
-- Every policy names the role that it is for. Those of people and of site tokens ask a function for the site ids that
-- may be seen: once a statement, as a sub-select, so that the look-up by `site_id` stays an index look-up. The
-- functions cannot raise, and a policy that asks them does not read other tables, so policies cannot recurse.
--
-- Policies and grants of `sessions` and `events` are copied to every leaf, word for word. An expression of theirs must
-- therefore name columns without their table. A later migration that changes them ends with
--     SELECT opsmantik.dress_leaf(inhparent, inhrelid) FROM pg_inherits
--     WHERE inhparent IN ('public.sessions'::regclass, 'public.events'::regclass);

-- Supabase's auth.uid() raises on claims that make no sense; this does not.
CREATE OR REPLACE FUNCTION opsmantik.caller_id() RETURNS uuid
LANGUAGE plpgsql STABLE SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN (SELECT auth.uid());
EXCEPTION WHEN data_exception OR program_limit_exceeded THEN
    RETURN NULL;
END
$$;
COMMENT ON FUNCTION opsmantik.caller_id() IS 'The user of this transaction, NULL when there is none. Never raises.';

CREATE OR REPLACE FUNCTION opsmantik.visible_site_ids() RETURNS uuid[]
LANGUAGE sql STABLE SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
    SELECT coalesce(array_agg(id), '{}')
    FROM (
        SELECT s.id FROM public.sites s WHERE s.user_id = (SELECT opsmantik.caller_id())
        UNION
        SELECT m.site_id FROM public.site_members m WHERE m.user_id = (SELECT opsmantik.caller_id())
    ) AS visible (id)
$$;
COMMENT ON FUNCTION opsmantik.visible_site_ids() IS 'The sites that the user of this transaction owns or is a member of.';

CREATE OR REPLACE FUNCTION opsmantik.editable_site_ids() RETURNS uuid[]
LANGUAGE sql STABLE SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
    SELECT coalesce(array_agg(id), '{}')
    FROM (
        SELECT s.id FROM public.sites s WHERE s.user_id = (SELECT opsmantik.caller_id())
        UNION
        SELECT m.site_id FROM public.site_members m
        WHERE m.user_id = (SELECT opsmantik.caller_id()) AND m.role IN ('editor', 'owner')
    ) AS editable (id)
$$;
COMMENT ON FUNCTION opsmantik.editable_site_ids() IS 'The sites whose calls the user of this transaction may review.';

-- The pattern is checked before the cast, so text that is no UUID is no site instead of an error.
CREATE OR REPLACE FUNCTION opsmantik.tenant_site_id() RETURNS uuid
LANGUAGE sql STABLE
SET search_path = pg_catalog, pg_temp
AS $$
    SELECT CASE
        WHEN current_setting('opsmantik.site_id', true) ~ '^[0-9A-Fa-f]{8}(-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12}$'
        THEN current_setting('opsmantik.site_id', true)::uuid
    END
$$;
COMMENT ON FUNCTION opsmantik.tenant_site_id() IS
    'The site of this transaction: its setting opsmantik.site_id. NULL when unset or no UUID. Never raises.';

REVOKE ALL ON FUNCTION opsmantik.caller_id(), opsmantik.visible_site_ids(), opsmantik.editable_site_ids(),
    opsmantik.tenant_site_id() FROM PUBLIC, anon, authenticated, service_role;
GRANT EXECUTE ON FUNCTION opsmantik.caller_id(), opsmantik.visible_site_ids(), opsmantik.editable_site_ids()
    TO authenticated;
GRANT EXECUTE ON FUNCTION opsmantik.tenant_site_id() TO opsmantik_tenant;

-- The policies are the whole of this list: what is not in it is dropped, so the file may run again.
DO $$
DECLARE
    old record;
    new record;
BEGIN
    FOR old IN
        SELECT polrelid::regclass AS tab, polname FROM pg_policy
        WHERE polrelid IN (
            'public.sites'::regclass, 'public.site_members'::regclass, 'public.sessions'::regclass,
            'public.events'::regclass, 'public.calls'::regclass, 'public.dead_letters'::regclass,
            'public.api_tokens'::regclass)
    LOOP
        EXECUTE format('DROP POLICY %I ON %s', old.polname, old.tab);
    END LOOP;

    FOR new IN
        -- The server: every row. Its grants say what it may do with them.
        SELECT tab, 'opsmantik_service' AS name, 'opsmantik_service' AS grantee, 'ALL' AS command,
               'USING (true) WITH CHECK (true)' AS rule
        FROM unnest(ARRAY['sites', 'site_members', 'sessions', 'events', 'calls', 'dead_letters', 'api_tokens']) AS tab
        UNION ALL
        -- The command line: every row of what it administers.
        SELECT tab, 'opsmantik_operator', 'opsmantik_operator', 'ALL', 'USING (true) WITH CHECK (true)'
        FROM unnest(ARRAY['sites', 'site_members', 'api_tokens', 'dead_letters']) AS tab
        UNION ALL
        -- The owner of the tables is bound by FORCE as well, and the functions above read as the owner.
        SELECT tab, 'table_owner', 'CURRENT_USER', 'SELECT', 'USING (true)'
        FROM unnest(ARRAY['sites', 'site_members']) AS tab
        UNION ALL
        -- A person: the sites that they own or are a member of, and what belongs to these.
        VALUES ('sites', 'authenticated', 'authenticated', 'SELECT',
                'USING (id = ANY ((SELECT opsmantik.visible_site_ids())::uuid[]))')
        UNION ALL
        SELECT tab, 'authenticated', 'authenticated', 'SELECT',
               'USING (site_id = ANY ((SELECT opsmantik.visible_site_ids())::uuid[]))'
        FROM unnest(ARRAY['site_members', 'sessions', 'events', 'calls']) AS tab
        UNION ALL
        -- Who reviews a call signs with their own name, or not at all.
        VALUES ('calls', 'authenticated_review', 'authenticated', 'UPDATE',
                'USING (site_id = ANY ((SELECT opsmantik.editable_site_ids())::uuid[]))
                 WITH CHECK (site_id = ANY ((SELECT opsmantik.editable_site_ids())::uuid[])
                     AND (reviewed_by IS NULL OR reviewed_by = ''user:'' || (SELECT opsmantik.caller_id())::text))')
        UNION ALL
        -- A site token: the site that the transaction names.
        VALUES ('sites', 'opsmantik_tenant', 'opsmantik_tenant', 'SELECT',
                'USING (id = (SELECT opsmantik.tenant_site_id()))')
        UNION ALL
        SELECT tab, 'opsmantik_tenant', 'opsmantik_tenant', 'SELECT',
               'USING (site_id = (SELECT opsmantik.tenant_site_id()))'
        FROM unnest(ARRAY['sessions', 'events', 'calls']) AS tab
    LOOP
        EXECUTE format('CREATE POLICY %I ON public.%I FOR %s TO %s %s',
                       new.name, new.tab, new.command, new.grantee, new.rule);
    END LOOP;
END
$$;

-- The server: what its statements need. It never deletes, and an event is never changed.
GRANT SELECT ON public.sites, public.site_members, public.api_tokens TO opsmantik_service;
GRANT UPDATE (last_used_at) ON public.api_tokens TO opsmantik_service;
GRANT SELECT, INSERT ON public.events TO opsmantik_service;
GRANT SELECT, INSERT, UPDATE ON public.sessions, public.calls, public.dead_letters TO opsmantik_service;

GRANT SELECT, INSERT, UPDATE ON public.sites, public.site_members, public.api_tokens TO opsmantik_operator;
GRANT SELECT, UPDATE ON public.dead_letters TO opsmantik_operator;

GRANT SELECT ON public.sites, public.sessions, public.events, public.calls TO opsmantik_tenant;

GRANT SELECT ON public.sites, public.site_members, public.sessions, public.events, public.calls TO authenticated;
GRANT UPDATE (review, sale_amount, sale_currency, reviewed_at, reviewed_by) ON public.calls TO authenticated;

-- Supabase's own key to everything. Where it does not bypass the policies, it sees nothing.
GRANT SELECT, INSERT, UPDATE, DELETE ON public.sites, public.site_members, public.sessions, public.events,
    public.calls, public.dead_letters, public.api_tokens TO service_role;

-- The migration runner keeps its list in `public`, where default privileges may let anybody rewrite it.
DO $$
BEGIN
    IF to_regclass('public.refinery_schema_history') IS NOT NULL THEN
        REVOKE ALL ON public.refinery_schema_history FROM PUBLIC, anon, authenticated, service_role;
        ALTER TABLE public.refinery_schema_history ENABLE ROW LEVEL SECURITY;
    END IF;
END
$$;
