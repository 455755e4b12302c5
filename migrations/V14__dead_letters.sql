-- A million dead letters: listed by pages, counted by reason, replayed in order, each without looking at all of them.
--
-- Many letters of one moment are the rule (a batch that died, a site that was away), so a page ends within a moment, and every order ends with
-- the id. What is counted or skipped is read from the index alone: a letter's payload makes its row heavy. Those that are not replayed, mostly few
-- and always looked for, have an index of their own.

DROP INDEX IF EXISTS public.dead_letters_by_time;
DROP INDEX IF EXISTS public.dead_letters_by_reason;
DROP INDEX IF EXISTS public.dead_letters_by_site;
CREATE INDEX IF NOT EXISTS dead_letters_in_order ON public.dead_letters (created_at, id)
    INCLUDE (reason, site_id, source, replayed_at);
CREATE INDEX IF NOT EXISTS dead_letters_of_reason ON public.dead_letters (reason, created_at, id);
CREATE INDEX IF NOT EXISTS dead_letters_of_site ON public.dead_letters (site_id, created_at, id);
CREATE INDEX IF NOT EXISTS dead_letters_to_replay ON public.dead_letters (created_at, id)
    INCLUDE (reason, site_id, source) WHERE replayed_at IS NULL;

-- What dies again after its replay is dead again, and the server that buries it says so.
GRANT UPDATE (replayed_at) ON public.dead_letters TO opsmantik_service;
DO $$
BEGIN
    -- As it stands, whoever wrote it last, with one column more.
    EXECUTE replace(pg_get_functiondef('opsmantik.storage_faults()'::regprocedure),
                    '{tries, last_error}', '{tries, last_error, replayed_at}');
END
$$;

COMMENT ON COLUMN public.dead_letters.source IS
    'Where it died: worker (a delivery as it came), pipeline (an accepted event), calls (a pushed call: its key only).';
COMMENT ON COLUMN public.dead_letters.tries IS
    'How often it was tried: the first time, each time that it came and died again, each replay.';
COMMENT ON COLUMN public.dead_letters.last_error IS 'How the last try that failed after the first one failed. A replay that stores it keeps it.';
COMMENT ON COLUMN public.dead_letters.replayed_at IS 'When a replay stored it last. NULL: it is still dead, or dead again.';
