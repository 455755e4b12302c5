-- The index of a site's best sessions answers that one question and no other.
--
-- Of a month that is new the planner knows nothing, and (site_id, lead_score, id) looks to it as good a way to one session as the primary key.
-- The check of an event's foreign key is planned once a connection: one that began early in a month read every session of the site, for each
-- event, as long as it lived. The condition below holds for every row, and only who states it can use the index.
--
-- Whoever writes sessions waits while the index is built: some seconds for a million rows.

DROP INDEX IF EXISTS public.sessions_top;
CREATE INDEX IF NOT EXISTS sessions_top ON public.sessions (site_id, lead_score DESC, id) WHERE lead_score >= 0;
