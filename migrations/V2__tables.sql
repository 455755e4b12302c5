-- The tables: tenants, their traffic, their calls, what could not be stored, and the tokens that open the door.
--
-- `site_id` leads every key, so one tenant's rows sit together and row level security is one index look-up. Traffic is
-- split by month, and the month is part of its keys: without it a row cannot be written, and an event cannot have
-- another month than its session. There is no DEFAULT partition, on purpose: rows in it would block the making of the
-- month that they belong to. Row level security is on and forced before the first row; grants and policies follow in
-- the next migration. All times are UTC instants.

CREATE TABLE IF NOT EXISTS public.sites (
    id         uuid        NOT NULL DEFAULT gen_random_uuid() PRIMARY KEY,
    public_id  text        NOT NULL UNIQUE CHECK (btrim(public_id) <> ''),
    user_id    uuid,
    name       text        NOT NULL,
    domain     text        NOT NULL CHECK (domain = lower(domain) AND btrim(domain) <> ''),
    origins    text[]      NOT NULL DEFAULT '{}' CHECK (array_position(origins, NULL) IS NULL),
    region     text        CHECK (region ~ '^[A-Z]{2}$'),
    created_at timestamptz NOT NULL DEFAULT now()
);
COMMENT ON TABLE public.sites IS 'A tenant: one web site of one advertiser.';
COMMENT ON COLUMN public.sites.public_id IS 'Names the site in the tracker snippet. No secret.';
COMMENT ON COLUMN public.sites.user_id IS 'The owner: a user of Supabase Auth. NULL: nobody but members sees the site.';
COMMENT ON COLUMN public.sites.domain IS 'Host in lower case. It and its subdomains may send events.';
COMMENT ON COLUMN public.sites.origins IS 'Further origins that may send events. `*` allows any.';
COMMENT ON COLUMN public.sites.region IS 'ISO 3166 country in which a national telephone number is read, such as TR.';
CREATE INDEX IF NOT EXISTS sites_user ON public.sites (user_id);
CREATE INDEX IF NOT EXISTS sites_domain ON public.sites (domain);
CREATE INDEX IF NOT EXISTS sites_origins ON public.sites USING gin (origins);

CREATE TABLE IF NOT EXISTS public.site_members (
    site_id    uuid        NOT NULL REFERENCES public.sites (id) ON DELETE CASCADE,
    user_id    uuid        NOT NULL,
    role       text        NOT NULL CHECK (role IN ('viewer', 'editor', 'owner')),
    created_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (site_id, user_id)
);
COMMENT ON TABLE public.site_members IS 'Who sees a site besides its owner.';
COMMENT ON COLUMN public.site_members.role IS 'viewer: reads. editor, owner: reads, and reviews calls.';
CREATE INDEX IF NOT EXISTS site_members_user ON public.site_members (user_id);

CREATE TABLE IF NOT EXISTS public.sessions (
    site_id        uuid        NOT NULL REFERENCES public.sites (id),
    created_month  date        NOT NULL CHECK (extract(day FROM created_month) = 1),
    id             uuid        NOT NULL,
    created_at     timestamptz NOT NULL,
    last_seen_at   timestamptz NOT NULL,
    event_count    bigint      NOT NULL CHECK (event_count >= 0),
    fingerprint    text,
    entry_page     text        NOT NULL,
    exit_page      text,
    referrer       text,
    gclid          text,
    wbraid         text,
    gbraid         text,
    click_ids      jsonb       NOT NULL DEFAULT '{}',
    attribution    text        NOT NULL CHECK (attribution IN ('Direct-to-Ads', 'Ads-Assisted', 'Organic/Referral')),
    traffic_source text        NOT NULL,
    traffic_medium text        NOT NULL,
    utm_source     text,
    utm_medium     text,
    utm_campaign   text,
    utm_term       text,
    utm_content    text,
    matchtype      text,
    ads_device     text,
    ads_network    text,
    ads_placement  text,
    signals        integer     NOT NULL DEFAULT 0,
    lead_score     smallint    NOT NULL CHECK (lead_score BETWEEN 0 AND 100),
    device_type    text,
    device_os      text,
    browser        text,
    city           text,
    district       text,
    country        text,
    timezone       text,
    ip_truncated   text,
    language       text,
    duration_sec   integer,
    scroll_pct     integer,
    cta_hovers     integer,
    focus_dur      integer,
    active_sec     integer,
    provenance     jsonb       NOT NULL DEFAULT '[]',
    PRIMARY KEY (site_id, created_month, id)
) PARTITION BY RANGE (created_month);
COMMENT ON TABLE public.sessions IS
    'A visit: the merge of its events, whatever their order and however often each was delivered.';
COMMENT ON COLUMN public.sessions.created_month IS
    'First day of the UTC month in which the visit began. A visit that runs past midnight on the 31st stays in it.';
COMMENT ON COLUMN public.sessions.created_at IS 'The earliest arrival of its events at the edge.';
COMMENT ON COLUMN public.sessions.last_seen_at IS 'The latest arrival of its events at the edge.';
COMMENT ON COLUMN public.sessions.event_count IS 'Distinct events.';
COMMENT ON COLUMN public.sessions.fingerprint IS
    'The browser, as the tracker hashed it. Holds nothing that can be turned back into its parts.';
COMMENT ON COLUMN public.sessions.entry_page IS 'URL of the first event, by time and then by event id.';
COMMENT ON COLUMN public.sessions.exit_page IS 'URL of the last event, by time and then by event id.';
COMMENT ON COLUMN public.sessions.click_ids IS
    'Click ids by kind, those without a column of their own among them: {"fbclid": "…"}.';
COMMENT ON COLUMN public.sessions.attribution IS
    'The maximum over its evidence: Direct-to-Ads, then Ads-Assisted, then Organic/Referral. It only moves up.';
COMMENT ON COLUMN public.sessions.matchtype IS 'ValueTrack: the match type of the keyword.';
COMMENT ON COLUMN public.sessions.ads_device IS 'ValueTrack `device`: what the ad was clicked on.';
COMMENT ON COLUMN public.sessions.ads_network IS 'ValueTrack `network`: where the ad was shown.';
COMMENT ON COLUMN public.sessions.ads_placement IS 'ValueTrack `placement`: the page that showed the ad.';
COMMENT ON COLUMN public.sessions.signals IS
    'Bit mask: the union of the signals of its events and of its own. lead_score is a function of it.';
COMMENT ON COLUMN public.sessions.lead_score IS '0 to 100: the points of its distinct signals, summed and capped.';
COMMENT ON COLUMN public.sessions.country IS 'ISO 3166, two letters.';
COMMENT ON COLUMN public.sessions.timezone IS 'IANA name, such as Europe/Istanbul.';
COMMENT ON COLUMN public.sessions.ip_truncated IS 'The network of the client: IPv4 /24, IPv6 /48. Never the address.';
COMMENT ON COLUMN public.sessions.duration_sec IS 'Seconds from the first to the last sign of life. A gauge: the maximum.';
COMMENT ON COLUMN public.sessions.scroll_pct IS 'Deepest scroll, per cent of the page. A gauge: the maximum.';
COMMENT ON COLUMN public.sessions.cta_hovers IS 'Times the pointer rested on a call to action. A gauge: the maximum.';
COMMENT ON COLUMN public.sessions.focus_dur IS 'Seconds with the page in focus. A gauge: the maximum.';
COMMENT ON COLUMN public.sessions.active_sec IS 'Seconds with input. A gauge: the maximum.';
COMMENT ON COLUMN public.sessions.provenance IS
    'Which event gave each first and last field, by time and event id, so that the next merge can compare.';
-- Ads history: did this browser come by an ad before?
CREATE INDEX IF NOT EXISTS sessions_ads_history ON public.sessions (site_id, fingerprint, created_at)
    WHERE attribution = 'Direct-to-Ads' AND fingerprint IS NOT NULL;
-- The way back: an ad visit that arrives late corrects the later visits of its browser; calls look for theirs.
CREATE INDEX IF NOT EXISTS sessions_fingerprint ON public.sessions (site_id, fingerprint, created_at)
    WHERE fingerprint IS NOT NULL;

CREATE TABLE IF NOT EXISTS public.events (
    site_id        uuid             NOT NULL,
    session_month  date             NOT NULL CHECK (extract(day FROM session_month) = 1),
    id             uuid             NOT NULL,
    session_id     uuid             NOT NULL,
    created_at     timestamptz      NOT NULL,
    occurred_at    timestamptz      NOT NULL,
    url            text             NOT NULL,
    referrer       text,
    event_category text             NOT NULL,
    event_action   text             NOT NULL,
    event_label    text,
    event_value    double precision,
    signals        integer          NOT NULL DEFAULT 0,
    lead_score     smallint         NOT NULL CHECK (lead_score BETWEEN 0 AND 100),
    metadata       jsonb            NOT NULL DEFAULT '{}',
    PRIMARY KEY (site_id, session_month, id),
    -- Deferrable: the writer learns from the insert which events are new, and only then merges them into sessions.
    CONSTRAINT events_session FOREIGN KEY (site_id, session_month, session_id)
        REFERENCES public.sessions (site_id, created_month, id) DEFERRABLE INITIALLY IMMEDIATE
) PARTITION BY RANGE (session_month);
COMMENT ON TABLE public.events IS 'What a visitor did. Written once, never changed.';
COMMENT ON COLUMN public.events.session_month IS 'The created_month of its session, whenever the event itself arrived.';
COMMENT ON COLUMN public.events.id IS 'The idempotency key: made by the tracker, sent with every retry.';
COMMENT ON COLUMN public.events.created_at IS 'Arrival at the edge, not at this table.';
COMMENT ON COLUMN public.events.occurred_at IS 'Time by the client''s clock, at most 24 hours before arrival. Used for order only.';
COMMENT ON COLUMN public.events.signals IS 'Bit mask of the signals that this event alone raises.';
COMMENT ON COLUMN public.events.lead_score IS '0 to 100: the points of its own signals, summed and capped.';
COMMENT ON COLUMN public.events.metadata IS 'What the tracker sent besides: behaviour, screen, and any key that we do not know.';
CREATE INDEX IF NOT EXISTS events_of_session ON public.events (site_id, session_month, session_id, created_at);

CREATE TABLE IF NOT EXISTS public.calls (
    id                       uuid             NOT NULL DEFAULT gen_random_uuid() PRIMARY KEY,
    site_id                  uuid             NOT NULL REFERENCES public.sites (id),
    provider                 text             NOT NULL CHECK (provider <> ''),
    provider_call_id         text             NOT NULL CHECK (provider_call_id <> ''),
    channel                  text             NOT NULL CHECK (channel IN ('PHONE', 'WHATSAPP')),
    direction                text             NOT NULL CHECK (direction IN ('INBOUND', 'OUTBOUND')),
    dialled_number           text             NOT NULL CHECK (dialled_number ~ '^\+[1-9][0-9]{1,14}$'),
    caller_hmac              bytea            CHECK (octet_length(caller_hmac) = 32),
    caller_last_digits       text             CHECK (caller_last_digits ~ '^[0-9]{1,4}$'),
    started_at               timestamptz      NOT NULL,
    duration_sec             integer          CHECK (duration_sec >= 0),
    status                   text             CHECK (status IN (
        'RINGING', 'IN_PROGRESS', 'FAILED', 'BUSY', 'NO_ANSWER', 'VOICEMAIL', 'COMPLETED')),
    recording_ref            text,
    fingerprint              text,
    click_id_kind            text,
    click_id                 text,
    match_method             text             NOT NULL DEFAULT 'UNMATCHED'
        CHECK (match_method IN ('UNMATCHED', 'AMBIGUOUS', 'CLICK', 'FINGERPRINT')),
    match_confidence         double precision NOT NULL DEFAULT 0 CHECK (match_confidence BETWEEN 0 AND 1),
    match_candidates         jsonb            NOT NULL DEFAULT '[]',
    match_evidence           jsonb,
    matched_fingerprint      text,
    matched_session_id       uuid,
    matched_session_month    date,
    matched_at               timestamptz,
    lead_score_at_match      smallint         CHECK (lead_score_at_match BETWEEN 0 AND 100),
    score_breakdown_at_match jsonb,
    review                   text             NOT NULL DEFAULT 'OPEN' CHECK (review IN ('OPEN', 'CONFIRMED', 'JUNK')),
    sale_amount              numeric          CHECK (sale_amount >= 0 AND sale_amount < 'Infinity'),
    sale_currency            char(3)          CHECK (sale_currency ~ '^[A-Z]{3}$'),
    reviewed_at              timestamptz,
    reviewed_by              text             CHECK (reviewed_by <> ''),
    created_at               timestamptz      NOT NULL DEFAULT now(),
    updated_at               timestamptz      NOT NULL DEFAULT now(),
    CONSTRAINT calls_provider_call UNIQUE (site_id, provider, provider_call_id),
    CONSTRAINT calls_caller_whole CHECK (caller_last_digits IS NULL OR caller_hmac IS NOT NULL),
    CONSTRAINT calls_click_id_whole CHECK ((click_id IS NULL) = (click_id_kind IS NULL)),
    CONSTRAINT calls_match_whole CHECK (
        CASE WHEN match_method IN ('CLICK', 'FINGERPRINT') THEN
            num_nulls(matched_session_id, matched_session_month, match_evidence, lead_score_at_match,
                      score_breakdown_at_match) = 0
            AND (match_method = 'CLICK' OR matched_fingerprint IS NOT NULL)
        ELSE
            num_nonnulls(matched_session_id, matched_session_month, match_evidence, lead_score_at_match,
                         score_breakdown_at_match, matched_fingerprint) = 0
        END),
    CONSTRAINT calls_sale_whole CHECK ((sale_amount IS NULL) = (sale_currency IS NULL)),
    CONSTRAINT calls_sale_confirmed CHECK (sale_amount IS NULL OR review = 'CONFIRMED'),
    CONSTRAINT calls_session FOREIGN KEY (site_id, matched_session_month, matched_session_id)
        REFERENCES public.sessions (site_id, created_month, id) DEFERRABLE INITIALLY IMMEDIATE
);
COMMENT ON TABLE public.calls IS 'A call as its provider told it, matched to a visit, and judged by a person.';
COMMENT ON COLUMN public.calls.provider_call_id IS
    'The provider''s own id. With site and provider the idempotency key: pushed once or five times, it is one call.';
COMMENT ON COLUMN public.calls.dialled_number IS 'Number of the business, E.164.';
COMMENT ON COLUMN public.calls.caller_hmac IS
    'Keyed hash of the caller''s number. The number itself is stored nowhere. NULL: the caller is anonymous.';
COMMENT ON COLUMN public.calls.caller_last_digits IS 'The last digits of the caller''s number, for people who listen back.';
COMMENT ON COLUMN public.calls.duration_sec IS 'Seconds. NULL: not known yet, which is not 0.';
COMMENT ON COLUMN public.calls.status IS 'How far the call has come; it only moves forward. NULL: no push has told.';
COMMENT ON COLUMN public.calls.recording_ref IS 'Where the provider keeps the recording. Never fetched.';
COMMENT ON COLUMN public.calls.fingerprint IS 'The fingerprint that was pushed with the call.';
COMMENT ON COLUMN public.calls.click_id IS 'The click id that was pushed with the call; click_id_kind says which, such as gclid.';
COMMENT ON COLUMN public.calls.match_method IS
    'How the call found its visit. UNMATCHED and AMBIGUOUS credit none, and every matched_… column is NULL.';
COMMENT ON COLUMN public.calls.match_confidence IS 'How sure the rule is, 0 to 1.';
COMMENT ON COLUMN public.calls.match_candidates IS 'The sessions that were considered, the nearest first.';
COMMENT ON COLUMN public.calls.match_evidence IS 'The event that speaks for the credited session.';
COMMENT ON COLUMN public.calls.lead_score_at_match IS 'The session''s score when it was matched, frozen. 0 to 100.';
COMMENT ON COLUMN public.calls.score_breakdown_at_match IS 'Where lead_score_at_match comes from, frozen with it.';
COMMENT ON COLUMN public.calls.sale_currency IS 'ISO 4217, such as TRY.';
COMMENT ON COLUMN public.calls.reviewed_by IS '`user:` and a user''s id, or `token:` and an API token''s id.';
COMMENT ON COLUMN public.calls.updated_at IS 'Last change by a push, a match or a review. Kept by a trigger.';
CREATE INDEX IF NOT EXISTS calls_by_time ON public.calls (site_id, started_at, id);
CREATE INDEX IF NOT EXISTS calls_fingerprint ON public.calls (site_id, fingerprint, started_at)
    WHERE fingerprint IS NOT NULL;
CREATE INDEX IF NOT EXISTS calls_of_session ON public.calls (site_id, matched_session_month, matched_session_id)
    WHERE matched_session_id IS NOT NULL;

-- A review may come straight from a dashboard, which may not set updated_at itself.
CREATE OR REPLACE FUNCTION opsmantik.touch_call() RETURNS trigger
LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    NEW.updated_at := now();
    RETURN NEW;
END
$$;
REVOKE ALL ON FUNCTION opsmantik.touch_call() FROM PUBLIC, anon, authenticated, service_role;
CREATE OR REPLACE TRIGGER calls_touch BEFORE UPDATE ON public.calls
    FOR EACH ROW WHEN (OLD.* IS DISTINCT FROM NEW.*) EXECUTE FUNCTION opsmantik.touch_call();

CREATE TABLE IF NOT EXISTS public.dead_letters (
    id          uuid        NOT NULL DEFAULT gen_random_uuid() PRIMARY KEY,
    site_id     uuid,
    event_id    uuid,
    source      text        NOT NULL,
    reason      text        NOT NULL,
    detail      text        NOT NULL,
    payload     text        NOT NULL,
    received_at timestamptz NOT NULL,
    created_at  timestamptz NOT NULL DEFAULT now(),
    tries       integer     NOT NULL DEFAULT 0,
    last_error  text,
    replayed_at timestamptz
);
COMMENT ON TABLE public.dead_letters IS 'What could not be stored, and why. Nothing is dropped in silence.';
COMMENT ON COLUMN public.dead_letters.site_id IS
    'The site, if it is known. No foreign key: events of sites that do not exist land here, too.';
COMMENT ON COLUMN public.dead_letters.source IS 'The door that it came through: sync, worker, ingest or stream.';
COMMENT ON COLUMN public.dead_letters.reason IS 'Code from a closed list. `detail` is for people.';
COMMENT ON COLUMN public.dead_letters.payload IS 'What was received, as text, complete enough to be replayed.';
COMMENT ON COLUMN public.dead_letters.received_at IS 'Arrival at the edge. A replay keeps it, so the row lands where it belonged.';
COMMENT ON COLUMN public.dead_letters.tries IS 'Replays so far. last_error tells how the last one failed.';
COMMENT ON COLUMN public.dead_letters.replayed_at IS 'When a replay stored it. NULL: it is still dead.';
CREATE INDEX IF NOT EXISTS dead_letters_by_time ON public.dead_letters (created_at);
CREATE INDEX IF NOT EXISTS dead_letters_by_reason ON public.dead_letters (reason, created_at);
CREATE INDEX IF NOT EXISTS dead_letters_by_site ON public.dead_letters (site_id, created_at);

CREATE TABLE IF NOT EXISTS public.api_tokens (
    id           uuid        NOT NULL DEFAULT gen_random_uuid() PRIMARY KEY,
    site_id      uuid        REFERENCES public.sites (id),
    all_sites    boolean     NOT NULL DEFAULT false,
    token_hash   bytea       NOT NULL UNIQUE CHECK (octet_length(token_hash) = 32),
    name         text        NOT NULL DEFAULT '',
    scopes       text[]      NOT NULL CHECK (cardinality(scopes) > 0 AND array_position(scopes, NULL) IS NULL),
    created_at   timestamptz NOT NULL DEFAULT now(),
    expires_at   timestamptz,
    revoked_at   timestamptz,
    last_used_at timestamptz,
    -- A forgotten site must not turn into every site.
    CONSTRAINT api_tokens_reach CHECK (all_sites = (site_id IS NULL))
);
COMMENT ON TABLE public.api_tokens IS 'Bearer tokens of machines.';
COMMENT ON COLUMN public.api_tokens.token_hash IS 'SHA-256 of the token, which itself is stored nowhere.';
COMMENT ON COLUMN public.api_tokens.scopes IS 'What it opens, such as ingest:write or calls:read.';
COMMENT ON COLUMN public.api_tokens.expires_at IS 'NULL: never.';
CREATE INDEX IF NOT EXISTS api_tokens_site ON public.api_tokens (site_id);

-- An old row, seen by logical decoding, must still say whose it was. A leaf does not inherit this: see the partitions.
ALTER TABLE public.sessions REPLICA IDENTITY FULL;
ALTER TABLE public.events REPLICA IDENTITY FULL;
ALTER TABLE public.calls REPLICA IDENTITY FULL;

-- Closed until a policy opens it, and whatever the default privileges of this database have given is taken back.
DO $$
DECLARE
    name text;
BEGIN
    FOREACH name IN ARRAY ARRAY[
        'sites', 'site_members', 'sessions', 'events', 'calls', 'dead_letters', 'api_tokens'
    ] LOOP
        EXECUTE format('ALTER TABLE public.%I ENABLE ROW LEVEL SECURITY', name);
        EXECUTE format('ALTER TABLE public.%I FORCE ROW LEVEL SECURITY', name);
        EXECUTE format('REVOKE ALL ON public.%I FROM PUBLIC, anon, authenticated, service_role', name);
    END LOOP;
END
$$;
