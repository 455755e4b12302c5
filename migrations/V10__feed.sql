-- The change feed: what is published to our own servers, and what a log that is gone can no longer tell.
--
-- Our publication speaks of the parents, so a month that is made later is in it at once. A watcher who comes back after the log is gone
-- asks the tables which rows were written since. What was deleted meanwhile is in no table, so every transaction that took rows away
-- leaves a mark, which holds nothing of them: then the watcher is shown everything anew. Marks are few: the server never deletes.

CREATE TABLE IF NOT EXISTS opsmantik.vanished (
    tab     text        NOT NULL CHECK (tab IN ('sessions', 'events', 'calls')),
    month   date        NOT NULL,
    site_id uuid        NOT NULL,
    xid     xid8        NOT NULL,
    cause   text        NOT NULL CHECK (cause IN ('delete', 'truncate', 'detach', 'attach')),
    at      timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (tab, month, site_id, xid, cause)
);
COMMENT ON TABLE opsmantik.vanished IS
    'Which transactions took rows away, or brought some that no log tells of. Read by watchers who resume, and by the feed.';
COMMENT ON COLUMN opsmantik.vanished.month IS 'The partition; -infinity for calls, which have none.';
COMMENT ON COLUMN opsmantik.vanished.site_id IS 'Whose rows; the UUID of zeros for every site''s.';
COMMENT ON COLUMN opsmantik.vanished.cause IS 'A `delete` is told row by row by the log as well; the others by this mark alone.';
ALTER TABLE opsmantik.vanished ENABLE ROW LEVEL SECURITY;
ALTER TABLE opsmantik.vanished FORCE ROW LEVEL SECURITY;
REVOKE ALL ON opsmantik.vanished FROM PUBLIC, anon, authenticated, service_role;
GRANT SELECT ON opsmantik.vanished TO opsmantik_service;
DROP POLICY IF EXISTS opsmantik_service ON opsmantik.vanished;
CREATE POLICY opsmantik_service ON opsmantik.vanished FOR SELECT TO opsmantik_service USING (true);
-- The functions below run as the owner, who is bound by FORCE as well.
DO $$
BEGIN
    DROP POLICY IF EXISTS table_owner ON opsmantik.vanished;
    EXECUTE format('CREATE POLICY table_owner ON opsmantik.vanished FOR ALL TO %I USING (true) WITH CHECK (true)', current_user);
END
$$;

CREATE OR REPLACE FUNCTION opsmantik.note_vanished(tab text, month date, site_id uuid, cause text) RETURNS void
LANGUAGE sql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
    INSERT INTO opsmantik.vanished (tab, month, site_id, xid, cause)
    VALUES (tab, coalesce(month, '-infinity'), coalesce(site_id, '00000000-0000-0000-0000-000000000000'), pg_current_xact_id(), cause)
    ON CONFLICT DO NOTHING
$$;
COMMENT ON FUNCTION opsmantik.note_vanished(text, date, uuid, text) IS
    'Leaves the mark of this transaction. Without a site: every site''s.';

-- A mark a transaction and scope is enough, so all but the first row only look: many rows go at once now and then.
CREATE OR REPLACE FUNCTION opsmantik.note_deleted() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    gone date := '-infinity';
    noted text;
BEGIN
    -- The leaf has its own name; the trigger is told its parent's.
    IF TG_ARGV[0] = 'events' THEN
        gone := OLD.session_month;
    ELSIF TG_ARGV[0] = 'sessions' THEN
        gone := OLD.created_month;
    END IF;
    -- Rows go mostly site by site. The setting ends with the transaction, and is undone together with the mark.
    noted := TG_ARGV[0] || ' ' || gone || ' ' || OLD.site_id || ' ' || pg_current_xact_id();
    IF current_setting('opsmantik.noted', true) IS DISTINCT FROM noted THEN
        INSERT INTO opsmantik.vanished (tab, month, site_id, xid, cause)
        VALUES (TG_ARGV[0], gone, OLD.site_id, pg_current_xact_id(), 'delete')
        ON CONFLICT DO NOTHING;
        PERFORM set_config('opsmantik.noted', noted, true);
    END IF;
    RETURN NULL;
END
$$;
COMMENT ON FUNCTION opsmantik.note_deleted() IS 'After a row was deleted, or moved to another key or month.';
REVOKE ALL ON FUNCTION opsmantik.note_vanished(text, date, uuid, text), opsmantik.note_deleted()
    FROM PUBLIC, anon, authenticated, service_role;

-- A watcher of calls reads them in this order, a page at a time.
CREATE INDEX IF NOT EXISTS calls_of_site ON public.calls (site_id, id);

DO $$
BEGIN
    IF NOT EXISTS (SELECT FROM pg_catalog.pg_publication WHERE pubname = 'opsmantik_feed') THEN
        CREATE PUBLICATION opsmantik_feed
            FOR TABLE public.sessions, public.events, public.calls, opsmantik.vanished
            WITH (publish = 'insert, update, delete, truncate', publish_via_partition_root = true);
    END IF;
END
$$;
