-- A paid visit has as many followers as it likes, and no event waits for them.
--
-- When a paid visit appears or moves, the later visits of its browser are judged again. Browsers share a fingerprint now and then, bots by
-- the thousand: corrected all at once, they took longer than a batch of events may, and the events of that batch were never stored. So a batch
-- corrects a few hundred at most. Where there are more it notes the fingerprint here, in its own transaction, and servers correct them
-- behind it, some at a time.
--
-- One row a fingerprint. What is noted twice is one span that covers both: to judge a visit again that is right changes nothing.

CREATE TABLE IF NOT EXISTS opsmantik.late_followers (
    site_id     uuid        NOT NULL,
    fingerprint text        NOT NULL,
    after       timestamptz NOT NULL,
    until       timestamptz NOT NULL,
    month       date        NOT NULL,
    since       timestamptz NOT NULL,
    since_id    uuid        NOT NULL,
    noted_at    timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (site_id, fingerprint)
);
COMMENT ON TABLE opsmantik.late_followers IS
    'Fingerprints of which sessions wait to be judged again, because a paid visit of theirs appeared or moved.';
COMMENT ON COLUMN opsmantik.late_followers.after IS 'The sessions that were created later than this ...';
COMMENT ON COLUMN opsmantik.late_followers.until IS '... up to and including this.';
COMMENT ON COLUMN opsmantik.late_followers.month IS
    'They are judged in the order of (created_month, created_at, id): from (month, since, since_id) on they still wait.';
ALTER TABLE opsmantik.late_followers ENABLE ROW LEVEL SECURITY;
ALTER TABLE opsmantik.late_followers FORCE ROW LEVEL SECURITY;
REVOKE ALL ON opsmantik.late_followers FROM PUBLIC, anon, authenticated, service_role;
GRANT SELECT, INSERT, DELETE, UPDATE (after, until, month, since, since_id) ON opsmantik.late_followers TO opsmantik_service;
DROP POLICY IF EXISTS opsmantik_service ON opsmantik.late_followers;
CREATE POLICY opsmantik_service ON opsmantik.late_followers FOR ALL TO opsmantik_service USING (true) WITH CHECK (true);

-- They are read in this order, which without the id would have to be sorted out of all that are left, each time. Whoever writes sessions
-- waits while the index is built: some seconds for a million rows.
DROP INDEX IF EXISTS public.sessions_fingerprint;
CREATE INDEX IF NOT EXISTS sessions_fingerprint ON public.sessions (site_id, fingerprint, created_at, id)
    WHERE fingerprint IS NOT NULL;

-- As it stands, whoever wrote it last, with what a batch needs now.
DO $$
DECLARE
    stands text := pg_get_functiondef('opsmantik.storage_faults()'::regprocedure);
    tables text := '(''opsmantik.call_rematches'', ''SELECT''),';
    cols text := '(''public.dead_letters'', ''UPDATE'', ';
BEGIN
    IF strpos(stands, 'late_followers') > 0 THEN
        RETURN;
    END IF;
    IF strpos(stands, tables) = 0 OR strpos(stands, cols) = 0 THEN
        RAISE EXCEPTION 'opsmantik.storage_faults() is not as the migrations have left it';
    END IF;
    stands := replace(stands, tables, '(''opsmantik.late_followers'', ''SELECT''), (''opsmantik.late_followers'', ''INSERT''), '
                                      '(''opsmantik.late_followers'', ''DELETE''),' || E'\n        ' || tables);
    stands := replace(stands, cols, '(''opsmantik.late_followers'', ''UPDATE'', ''{after, until, month, since, since_id}'', ''{}''),'
                                    || E'\n        ' || cols);
    EXECUTE stands;
END
$$;
