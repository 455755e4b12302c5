-- The best sessions of a site's month, a page at a time: without it every page would read the whole month to sort it.

CREATE INDEX IF NOT EXISTS sessions_top ON public.sessions (site_id, lead_score DESC, id);
