-- What checks a call's match is planned anew for each call, since a plan for any month would lock every month. Planning was most of its work:
-- now only what is run is planned, and the second question is asked only of a call whose session is not there.

CREATE OR REPLACE FUNCTION opsmantik.check_match() RETURNS trigger
LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_custom_plan
AS $$
BEGIN
    PERFORM FROM public.sessions s
    WHERE s.site_id = NEW.site_id AND s.created_month = NEW.matched_session_month AND s.id = NEW.matched_session_id;
    IF FOUND THEN
        RETURN NULL;
    END IF;
    -- Deferred, it may have been matched elsewhere since.
    PERFORM FROM public.calls c
    WHERE c.id = NEW.id AND c.site_id = NEW.site_id AND c.matched_session_month = NEW.matched_session_month
      AND c.matched_session_id = NEW.matched_session_id;
    IF FOUND THEN
        RAISE EXCEPTION 'a call cannot be matched to a session that there is not'
            USING ERRCODE = 'foreign_key_violation', SCHEMA = 'public', TABLE = 'calls', CONSTRAINT = 'calls_session';
    END IF;
    RETURN NULL;
END
$$;
