-- Ready means that an event sent now would be stored. The leaves alone do not tell: after a failover the server may stand before a
-- read-only standby, and somebody may have revoked a grant on parents and leaves alike. So the server asks, as the role that stores.

CREATE OR REPLACE FUNCTION opsmantik.storage_faults() RETURNS SETOF text
LANGUAGE sql STABLE
SET search_path = pg_catalog, pg_temp
AS $$
    SELECT 'the database is read-only' WHERE current_setting('transaction_read_only') = 'on'
    UNION ALL
    SELECT format('%s may not %s on %s', current_user, need.privilege, need.rel)
    FROM (VALUES
        ('public.sites', 'SELECT'),
        ('public.sessions', 'SELECT'), ('public.sessions', 'INSERT'), ('public.sessions', 'UPDATE'),
        ('public.events', 'SELECT'), ('public.events', 'INSERT'),
        ('public.dead_letters', 'SELECT'), ('public.dead_letters', 'INSERT'), ('public.dead_letters', 'UPDATE')
    ) AS need (rel, privilege)
    WHERE NOT has_table_privilege(need.rel, need.privilege)
$$;
COMMENT ON FUNCTION opsmantik.storage_faults() IS
    'Why the calling role could not store an event now; nothing if it could. As the caller: its rights are what is asked.';

REVOKE ALL ON FUNCTION opsmantik.storage_faults() FROM PUBLIC, anon, authenticated, service_role;
GRANT EXECUTE ON FUNCTION opsmantik.storage_faults() TO opsmantik_service, opsmantik_operator;
