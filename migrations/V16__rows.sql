-- Rows come as one parameter: an array of these. With an array for each column PostgreSQL keeps every column apart and puts the rows together
-- again, which was a third of the time that writing a session took.
--
-- A type here is never changed: a server that is older than the database writes with the one that it knows. Whoever adds a column
-- to a table adds another type.

DO $$
BEGIN
    IF to_regtype('opsmantik.session_row') IS NULL THEN
        CREATE TYPE opsmantik.session_row AS (
            site_id uuid,
            created_month date,
            id uuid,
            created_at timestamptz,
            last_seen_at timestamptz,
            event_count bigint,
            attribution text,
            signals integer,
            lead_score smallint,
            traffic_source text,
            traffic_medium text,
            exit_page text,
            click_ids jsonb,
            provenance jsonb,
            duration_sec integer,
            scroll_pct integer,
            cta_hovers integer,
            focus_dur integer,
            active_sec integer,
            call_signals integer,
            entry_page text,
            referrer text,
            fingerprint text,
            gclid text,
            wbraid text,
            gbraid text,
            utm_source text,
            utm_medium text,
            utm_campaign text,
            utm_term text,
            utm_content text,
            matchtype text,
            ads_device text,
            ads_network text,
            ads_placement text,
            device_type text,
            device_os text,
            browser text,
            city text,
            district text,
            country text,
            timezone text,
            ip_truncated text,
            language text
        );
    END IF;
    IF to_regtype('opsmantik.event_row') IS NULL THEN
        CREATE TYPE opsmantik.event_row AS (
            site_id uuid,
            session_month date,
            id uuid,
            session_id uuid,
            created_at timestamptz,
            occurred_at timestamptz,
            url text,
            referrer text,
            event_category text,
            event_action text,
            event_label text,
            event_value double precision,
            signals integer,
            lead_score smallint,
            metadata jsonb,
            received_at timestamptz
        );
    END IF;
END
$$;
-- Where the owner's defaults keep types from everybody else.
GRANT USAGE ON TYPE opsmantik.session_row, opsmantik.event_row TO opsmantik_service;
COMMENT ON TYPE opsmantik.session_row IS 'A session as a server writes it.';
COMMENT ON TYPE opsmantik.event_row IS 'An event as a server writes it.';

-- As it stands, whoever wrote it last, with what a batch needs now.
DO $$
DECLARE
    stands text := pg_get_functiondef('opsmantik.storage_faults()'::regprocedure);
    first text := 'SELECT ''the database is read-only''';
BEGIN
    IF strpos(stands, 'session_row') > 0 THEN
        RETURN;
    END IF;
    IF strpos(stands, first) = 0 THEN
        RAISE EXCEPTION 'opsmantik.storage_faults() is not as the migrations have left it';
    END IF;
    EXECUTE replace(stands, first, 'SELECT format(''%s may not USAGE on %s'', current_user, need)'
        || E'\n    FROM unnest(''{opsmantik.session_row, opsmantik.event_row}''::text[]) AS need'
        || E'\n    WHERE NOT has_type_privilege(need, ''USAGE'')\n    UNION ALL\n    ' || first);
END
$$;
