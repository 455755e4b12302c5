-- No index holds what the events of a session change, so that a session that is written again touches none.
--
-- The score changes with most of a visit's events, and with it in one index the new row had to be entered into all of them: two thirds of the
-- time, and a tenth of what an event cost PostgreSQL. It was read by one list, for which a site's sessions of one month are sorted now.

DROP INDEX IF EXISTS public.sessions_top;
