-- History that was imported keeps two times: when it happened, by which it is placed, and when we received it.
--
-- The column reaches every leaf that is attached now, and `ensure_month` makes new leaves like their parent. A leaf that
-- was detached gets it here, so that it can be attached again.

ALTER TABLE public.events ADD COLUMN IF NOT EXISTS received_at timestamptz;

DO $$
DECLARE
    leaf regclass;
BEGIN
    FOR leaf IN
        SELECT oid::regclass FROM pg_class
        WHERE relnamespace = 'public'::regnamespace AND relkind = 'r' AND NOT relispartition
          AND relname ~ '^events_\d{4}_\d\d$'
    LOOP
        EXECUTE format('ALTER TABLE %s ADD COLUMN IF NOT EXISTS received_at timestamptz', leaf);
    END LOOP;
END
$$;

COMMENT ON COLUMN public.events.received_at IS
    'Arrival of imported history at the edge. NULL: the event was not imported, and created_at is its arrival.';
COMMENT ON COLUMN public.events.created_at IS
    'Arrival at the edge, not at this table; of imported history when it happened.';
COMMENT ON COLUMN public.events.occurred_at IS
    'Time by the client''s clock, at most 24 hours before created_at. Used for order only.';
COMMENT ON COLUMN public.sessions.created_at IS 'The earliest created_at of its events.';
COMMENT ON COLUMN public.sessions.last_seen_at IS 'The latest created_at of its events.';
