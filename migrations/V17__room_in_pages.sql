-- A session is written again with each of its events, some five times within minutes. With room left in its page the new row lies beside the
-- old one, and where no indexed column changed no index is touched; without room each row moved to another page, and every index followed. The
-- old rows filled as much space as is left free now.
--
-- Leaves get it as they are dressed: new months when they are made, those that are kept when the keeper looks after them. Who has chosen another
-- fillfactor keeps it.

DO $$
DECLARE
    stands text := pg_get_functiondef('opsmantik.dress_leaf(regclass,regclass)'::regprocedure);
    before text := '    IF NOT here.relrowsecurity THEN';
BEGIN
    IF strpos(stands, 'fillfactor') > 0 THEN
        RETURN;
    END IF;
    IF strpos(stands, before) = 0 THEN
        RAISE EXCEPTION 'opsmantik.dress_leaf() is not as the migrations have left it';
    END IF;
    EXECUTE replace(stands, before, E'    IF tab = ''sessions'' AND strpos(coalesce(here.reloptions::text, ''''), ''fillfactor'') = 0 THEN\n'
        || E'        EXECUTE format(''ALTER TABLE %s SET (fillfactor = 60)'', leaf);\n    END IF;\n' || before);
END
$$;
