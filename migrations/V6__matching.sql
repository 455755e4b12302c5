-- Calls find their visits, and find them again when something late arrives.
--
-- A matched call raises the primary conversion of its session; what calls raise is kept apart from what events raise, so that it can be
-- taken back. Matching looks for the clicks on a number in a window of time, hence the index. And a call whose window was touched by
-- something late waits in `opsmantik.call_rematches`, written in the transaction that touched it, until it has been matched again:
-- nothing that happens to a server in between is able to forget it.

ALTER TABLE public.sessions ADD COLUMN IF NOT EXISTS call_signals integer NOT NULL DEFAULT 0;
COMMENT ON COLUMN public.sessions.call_signals IS
    'Bit mask: what its matched calls raise. Part of `signals`, and taken back when the last of them is matched elsewhere.';
COMMENT ON COLUMN public.sessions.signals IS
    'Bit mask: the union of the signals of its events, of its matched calls and of its history. lead_score is a function of it.';

-- Bit 0 is the primary conversion: a call or WhatsApp click, or another conversion. Few events have it.
CREATE INDEX IF NOT EXISTS events_conversions ON public.events (site_id, session_month, occurred_at) WHERE signals & 1 = 1;

CREATE TABLE IF NOT EXISTS opsmantik.call_rematches (
    site_id uuid NOT NULL,
    call_id uuid NOT NULL REFERENCES public.calls (id) ON DELETE CASCADE,
    PRIMARY KEY (site_id, call_id)
);
COMMENT ON TABLE opsmantik.call_rematches IS
    'Calls whose window was touched by a late event, a late fingerprint or a hand, and that are to be matched again.';
ALTER TABLE opsmantik.call_rematches ENABLE ROW LEVEL SECURITY;
ALTER TABLE opsmantik.call_rematches FORCE ROW LEVEL SECURITY;
REVOKE ALL ON opsmantik.call_rematches FROM PUBLIC, anon, authenticated, service_role;
GRANT SELECT, INSERT, DELETE ON opsmantik.call_rematches TO opsmantik_service;
DROP POLICY IF EXISTS opsmantik_service ON opsmantik.call_rematches;
CREATE POLICY opsmantik_service ON opsmantik.call_rematches FOR ALL TO opsmantik_service USING (true) WITH CHECK (true);
-- The trigger below runs as the owner, who is bound by FORCE as well.
DO $$
BEGIN
    DROP POLICY IF EXISTS table_owner ON opsmantik.call_rematches;
    EXECUTE format('CREATE POLICY table_owner ON opsmantik.call_rematches FOR ALL TO %I USING (true) WITH CHECK (true)', current_user);
END
$$;

-- A dashboard opens a call again by changing its row. Then it is matched again, as if the server had been asked.
CREATE OR REPLACE FUNCTION opsmantik.reopen_call() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    INSERT INTO opsmantik.call_rematches (site_id, call_id) VALUES (NEW.site_id, NEW.id) ON CONFLICT DO NOTHING;
    RETURN NULL;
END
$$;
REVOKE ALL ON FUNCTION opsmantik.reopen_call() FROM PUBLIC, anon, authenticated, service_role;
CREATE OR REPLACE TRIGGER calls_reopen AFTER UPDATE OF review ON public.calls
    FOR EACH ROW WHEN (OLD.review <> 'OPEN' AND NEW.review = 'OPEN') EXECUTE FUNCTION opsmantik.reopen_call();

-- As before, and what calls need.
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
        ('public.calls', 'SELECT'), ('public.calls', 'INSERT'), ('public.calls', 'UPDATE'),
        ('opsmantik.call_rematches', 'SELECT'), ('opsmantik.call_rematches', 'INSERT'), ('opsmantik.call_rematches', 'DELETE'),
        ('public.api_tokens', 'SELECT'),
        ('public.dead_letters', 'SELECT'), ('public.dead_letters', 'INSERT'), ('public.dead_letters', 'UPDATE')
    ) AS need (rel, privilege)
    WHERE NOT has_table_privilege(need.rel, need.privilege)
$$;
