-- Months go as they came: whole, and without standing in anybody's way. And each leaf is published by its own name.
--
-- A month is detached, concurrently, then dropped. Foreign keys beyond the month do not allow that quietly: to detach a month of sessions
-- PostgreSQL locks writers of events out and looks for references in every month there is; to drop a month of events it locks readers of all
-- sessions out, and to drop a month of sessions those of sites, which is everybody. So no key of a leaf leads out of its month any more:
--
-- * An event has the month of its session, so each month of events refers to the same month of sessions: as strong as before.
-- * That the site of a session exists is checked by a trigger, and so is, when somebody deletes a site, that it has no sessions.
-- * A call outlives the month of its visit and keeps what it knows of it: its match is checked when it is made, and not when the visit goes.
--
-- What a dropped, emptied or returned month means to a watcher is said by the marks in `opsmantik.vanished`; here they are made for all
-- of these, whoever does it and with whatever hand, cost little when many rows go at once, and are cleared away when a newer one says the
-- same. The triggers that leave them fire always; what fires no trigger is found by whoever looks next (`note_leaves`).

CREATE OR REPLACE FUNCTION opsmantik.note_truncated() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    emptied date;
BEGIN
    IF TG_ARGV[0] <> 'calls' AND TG_RELID <> format('public.%I', TG_ARGV[0])::regclass THEN
        SELECT l.month INTO emptied FROM opsmantik.leaves() l WHERE l.leaf = TG_RELID;
        IF NOT FOUND THEN
            RETURN NULL; -- detached: nobody sees its rows
        END IF;
    END IF;
    PERFORM opsmantik.note_vanished(TG_ARGV[0], emptied, NULL, 'truncate');
    RETURN NULL;
END
$$;
COMMENT ON FUNCTION opsmantik.note_truncated() IS
    'After a table was emptied: a mark for its month, or for every month if it was the parent.';

CREATE OR REPLACE FUNCTION opsmantik.notes_loss(rel regclass, tab name) RETURNS boolean
LANGUAGE sql STABLE
SET search_path = pg_catalog, pg_temp
AS $$
    SELECT count(*) = 3
    FROM pg_trigger
    WHERE tgrelid = rel AND tgenabled = 'A'
      AND (tgname IN (tab || '_deleted', tab || '_moved') AND tgfoid = 'opsmantik.note_deleted()'::regprocedure
           OR tgname = 'opsmantik_truncated' AND tgfoid = 'opsmantik.note_truncated()'::regprocedure)
$$;
COMMENT ON FUNCTION opsmantik.notes_loss(regclass, name) IS
    'Whether sessions, events, calls or a leaf of theirs has the three triggers that note when rows go, and they fire whoever writes.';

CREATE OR REPLACE FUNCTION opsmantik.keep_marks(rel regclass, tab name) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    item record;
BEGIN
    IF opsmantik.notes_loss(rel, tab) THEN
        RETURN;
    END IF;
    FOR item IN
        SELECT * FROM (VALUES
            (tab || '_deleted', 'DELETE', 'ROW', 'note_deleted'),
            -- A row whose key changes within its month is gone where it was. (Moved to another month it is deleted there.)
            (tab || '_moved', 'UPDATE OF site_id, id', 'ROW WHEN (OLD.site_id <> NEW.site_id OR OLD.id <> NEW.id)', 'note_deleted'),
            ('opsmantik_truncated', 'TRUNCATE', 'STATEMENT', 'note_truncated')
        ) AS t (name, event, each, func)
        -- A trigger for rows reaches the leaves by itself, one for TRUNCATE does not.
        WHERE (rel = format('public.%I', tab)::regclass OR t.event = 'TRUNCATE')
          AND NOT EXISTS (
              SELECT FROM pg_trigger
              WHERE tgrelid = rel AND tgname = t.name AND tgfoid = format('opsmantik.%I()', t.func)::regprocedure)
    LOOP
        EXECUTE format('CREATE OR REPLACE TRIGGER %I AFTER %s ON %s FOR EACH %s EXECUTE FUNCTION opsmantik.%I(%L)',
                       item.name, item.event, rel, item.each, item.func, tab);
    END LOOP;
    -- Also for a session_replication_role that lets triggers rest: what is written then is shown as well.
    FOR item IN
        SELECT tgname AS name FROM pg_trigger
        WHERE tgrelid = rel AND tgenabled <> 'A'
          AND tgfoid IN ('opsmantik.note_deleted()'::regprocedure, 'opsmantik.note_truncated()'::regprocedure)
    LOOP
        EXECUTE format('ALTER TABLE %s ENABLE ALWAYS TRIGGER %I', rel, item.name);
    END LOOP;
END
$$;
COMMENT ON FUNCTION opsmantik.keep_marks(regclass, name) IS
    'Gives sessions, events, calls or a leaf of theirs the triggers that note when rows go, as far as they are missing or do not always fire.';

DO $$
BEGIN
    PERFORM opsmantik.keep_marks(format('public.%I', t.tab)::regclass, t.tab)
    FROM (VALUES ('sessions'::name), ('events'), ('calls')) AS t (tab);
END
$$;

-- What a hand attaches, detaches or drops fires no trigger that we could make. So what hangs on the parents is compared with what did.
CREATE TABLE IF NOT EXISTS opsmantik.attached (
    leaf  oid  PRIMARY KEY,
    tab   text NOT NULL CHECK (tab IN ('sessions', 'events')),
    month date,
    link  text NOT NULL
);
COMMENT ON TABLE opsmantik.attached IS
    'The leaves for which no mark has to be left any more. Kept by `note_leaves`, and no business of anybody else.';
COMMENT ON COLUMN opsmantik.attached.month IS 'NULL for a leaf that does not hold exactly one month.';
COMMENT ON COLUMN opsmantik.attached.link IS
    'Which transaction attached it, or began to detach it: the same table that comes back comes with another.';
ALTER TABLE opsmantik.attached ENABLE ROW LEVEL SECURITY;
ALTER TABLE opsmantik.attached FORCE ROW LEVEL SECURITY;
REVOKE ALL ON opsmantik.attached FROM PUBLIC, anon, authenticated, service_role;
-- The function below runs as the owner, who is bound by FORCE as well.
DO $$
BEGIN
    DROP POLICY IF EXISTS table_owner ON opsmantik.attached;
    EXECUTE format('CREATE POLICY table_owner ON opsmantik.attached FOR ALL TO %I USING (true) WITH CHECK (true)', current_user);
END
$$;

CREATE OR REPLACE FUNCTION opsmantik.link_changes()
RETURNS TABLE (leaf oid, old_tab text, old_month date, tab text, link text, pending boolean)
LANGUAGE sql STABLE
SET search_path = pg_catalog, pg_temp
AS $$
    SELECT coalesce(i.inhrelid, a.leaf), a.tab, a.month,
           CASE i.inhparent WHEN 'public.sessions'::regclass THEN 'sessions' ELSE 'events' END, i.xmin::text, i.inhdetachpending
    FROM opsmantik.attached a
    FULL JOIN (
        SELECT inhrelid, inhparent, inhdetachpending, xmin FROM pg_inherits
        WHERE inhparent IN ('public.sessions'::regclass, 'public.events'::regclass)
    ) AS i ON i.inhrelid = a.leaf
    WHERE a.link IS DISTINCT FROM i.xmin::text
$$;
COMMENT ON FUNCTION opsmantik.link_changes() IS
    'How the leaves differ from those in `attached`: what was there (old_tab), and what is (link).';

CREATE OR REPLACE FUNCTION opsmantik.note_leaves() RETURNS void
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
-- To ask for the size of a leaf that somebody works on.
SET lock_timeout = '200ms'
AS $$
DECLARE
    item record;
    new_month date;
    filled boolean;
BEGIN
    -- Mostly there is nothing. Whoever notes at this moment does it for all; what comes later than their look, the next look finds.
    IF NOT EXISTS (SELECT FROM opsmantik.link_changes())
       OR NOT pg_try_advisory_xact_lock(hashtextextended('opsmantik.note_leaves', 0)) THEN
        RETURN;
    END IF;
    FOR item IN SELECT * FROM opsmantik.link_changes() LOOP
        new_month := NULL;
        filled := false;
        IF item.link IS NOT NULL AND NOT item.pending THEN
            SELECT l.month INTO new_month FROM opsmantik.leaves() l WHERE l.leaf = item.leaf;
            BEGIN
                -- By its size: the policies would hide its rows from us.
                SELECT c.relkind <> 'r' OR pg_relation_size(c.oid) > 0 INTO filled FROM pg_class c WHERE c.oid = item.leaf;
            EXCEPTION WHEN lock_not_available THEN
                CONTINUE;
            END;
        END IF;
        -- One that is being detached is noted twice: its rows are gone now, and who began to write before may still add some.
        IF item.old_tab IS NOT NULL THEN
            PERFORM opsmantik.note_vanished(item.old_tab, item.old_month, NULL, 'detach');
        END IF;
        IF filled THEN
            PERFORM opsmantik.note_vanished(item.tab, new_month, NULL, 'attach');
        END IF;
        IF item.link IS NULL THEN
            DELETE FROM opsmantik.attached a WHERE a.leaf = item.leaf;
        ELSE
            INSERT INTO opsmantik.attached AS a (leaf, tab, month, link)
            VALUES (item.leaf, item.tab, CASE WHEN item.pending THEN item.old_month ELSE new_month END, item.link)
            ON CONFLICT ON CONSTRAINT attached_pkey DO UPDATE SET tab = excluded.tab, month = excluded.month, link = excluded.link;
        END IF;
    END LOOP;
END
$$;
COMMENT ON FUNCTION opsmantik.note_leaves() IS
    'Leaves a mark for every leaf that was detached, dropped, or attached with rows since the last look, whoever did it. Cheap when there is none.';

CREATE OR REPLACE FUNCTION opsmantik.prune_vanished() RETURNS bigint
LANGUAGE sql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
    WITH pruned AS (
        DELETE FROM opsmantik.vanished old
        WHERE EXISTS (
            SELECT FROM opsmantik.vanished new
            WHERE new.tab = old.tab AND new.month = old.month AND new.site_id = old.site_id AND new.xid > old.xid
              -- Ended, so its mark stays. That of this transaction, or of another history's future, is not.
              AND pg_visible_in_snapshot(new.xid, pg_current_snapshot()))
        RETURNING 1
    )
    SELECT count(*) FROM pruned
$$;
COMMENT ON FUNCTION opsmantik.prune_vanished() IS
    'Clears away the marks for whose scope a newer one is there: whoever has to see the older sees the newer. How many.';

-- What refers to sessions.

CREATE OR REPLACE FUNCTION opsmantik.is_tied(events_leaf regclass, sessions_leaf regclass) RETURNS boolean
LANGUAGE sql STABLE
SET search_path = pg_catalog, pg_temp
AS $$
    SELECT EXISTS (
        SELECT FROM pg_constraint
        WHERE conrelid = events_leaf AND confrelid = sessions_leaf AND contype = 'f' AND conname = 'events_session_of_month'
          AND convalidated)
$$;
COMMENT ON FUNCTION opsmantik.is_tied(regclass, regclass) IS 'Whether a leaf of events refers to this leaf of sessions.';

CREATE OR REPLACE FUNCTION opsmantik.tie_leaf(events_leaf regclass, sessions_leaf regclass) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    other name;
BEGIN
    IF opsmantik.is_tied(events_leaf, sessions_leaf) THEN
        RETURN;
    END IF;
    -- What it was tied to before it was detached, or before its sessions were made anew.
    FOR other IN
        SELECT conname FROM pg_constraint
        WHERE conrelid = events_leaf AND contype = 'f' AND conname = 'events_session_of_month' AND conparentid = 0
    LOOP
        EXECUTE format('ALTER TABLE %s DROP CONSTRAINT %I', events_leaf, other);
    END LOOP;
    -- Deferrable: the writer learns from the insert which events are new, and only then merges them into sessions.
    EXECUTE format('ALTER TABLE %s ADD CONSTRAINT events_session_of_month FOREIGN KEY (site_id, session_month, session_id) '
                   'REFERENCES %s (site_id, created_month, id) DEFERRABLE INITIALLY IMMEDIATE', events_leaf, sessions_leaf);
END
$$;
COMMENT ON FUNCTION opsmantik.tie_leaf(regclass, regclass) IS
    'Makes a month of events refer to the same month of sessions. Locks these two leaves and nothing else.';

CREATE OR REPLACE FUNCTION opsmantik.check_site() RETURNS trigger
LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF NOT EXISTS (SELECT FROM public.sites WHERE id = NEW.site_id) THEN
        RAISE EXCEPTION 'a session cannot belong to a site that there is not'
            USING ERRCODE = 'foreign_key_violation', SCHEMA = 'public', TABLE = 'sessions', CONSTRAINT = 'sessions_site_id_fkey';
    END IF;
    RETURN NULL;
END
$$;
COMMENT ON FUNCTION opsmantik.check_site() IS 'The site of a session exists. As the caller, who sees the sites whose sessions they may write.';

CREATE OR REPLACE FUNCTION opsmantik.keep_site() RETURNS trigger
LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp
-- Writers wait behind the lock below: not for long.
SET lock_timeout = '1s'
AS $$
BEGIN
    IF current_setting('transaction_isolation') NOT IN ('read committed', 'read uncommitted') THEN
        RAISE EXCEPTION 'a site is deleted, or gets another id, in a READ COMMITTED transaction: this one may not see its sessions'
            USING ERRCODE = 'feature_not_supported';
    END IF;
    -- Whoever is writing sessions is waited for, and whoever comes later finds the site gone. A site is deleted by hand, if ever.
    LOCK TABLE public.sessions IN SHARE ROW EXCLUSIVE MODE;
    IF EXISTS (SELECT FROM public.sessions WHERE site_id = OLD.id) THEN
        RAISE EXCEPTION 'a site that has sessions cannot be deleted, nor get another id'
            USING ERRCODE = 'foreign_key_violation', SCHEMA = 'public', TABLE = 'sessions', CONSTRAINT = 'sessions_site_id_fkey';
    END IF;
    RETURN NULL;
END
$$;
COMMENT ON FUNCTION opsmantik.keep_site() IS
    'A site that has sessions stays. As the caller: who may delete a site passes by its policies, and by those of sessions.';

CREATE OR REPLACE FUNCTION opsmantik.check_match() RETURNS trigger
LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp
-- A plan for any month would lock every month.
SET plan_cache_mode = force_custom_plan
AS $$
BEGIN
    IF NOT EXISTS (
        SELECT FROM public.sessions s
        WHERE s.site_id = NEW.site_id AND s.created_month = NEW.matched_session_month AND s.id = NEW.matched_session_id)
    -- Deferred, it may have been matched elsewhere since.
    AND EXISTS (
        SELECT FROM public.calls c
        WHERE c.id = NEW.id AND c.site_id = NEW.site_id AND c.matched_session_month = NEW.matched_session_month
          AND c.matched_session_id = NEW.matched_session_id)
    THEN
        RAISE EXCEPTION 'a call cannot be matched to a session that there is not'
            USING ERRCODE = 'foreign_key_violation', SCHEMA = 'public', TABLE = 'calls', CONSTRAINT = 'calls_session';
    END IF;
    RETURN NULL;
END
$$;
COMMENT ON FUNCTION opsmantik.check_match() IS
    'A match names a session that is there. As the caller, who sees the sessions of the calls that they may write.';

CREATE OR REPLACE FUNCTION opsmantik.dress_leaf(parent regclass, leaf regclass) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    here pg_class%ROWTYPE;
    boss oid;
    tab name;
    item record;
BEGIN
    SELECT * INTO STRICT here FROM pg_class WHERE oid = leaf;
    SELECT relowner, relname INTO STRICT boss, tab FROM pg_class WHERE oid = parent;
    IF here.relowner <> boss THEN
        EXECUTE format('ALTER TABLE %s OWNER TO %I', leaf, pg_get_userbyid(boss));
    END IF;
    IF here.relreplident <> 'f' THEN
        EXECUTE format('ALTER TABLE %s REPLICA IDENTITY FULL', leaf);
    END IF;
    IF NOT here.relrowsecurity THEN
        EXECUTE format('ALTER TABLE %s ENABLE ROW LEVEL SECURITY', leaf);
    END IF;
    IF NOT here.relforcerowsecurity THEN
        EXECUTE format('ALTER TABLE %s FORCE ROW LEVEL SECURITY', leaf);
    END IF;

    -- What the leaf has too much of goes first: a policy that differs has to make room for the right one, and revoking
    -- a privilege on a table takes the same privilege on its columns along.
    FOR item IN
        SELECT * FROM opsmantik.policies_of(leaf) EXCEPT SELECT * FROM opsmantik.policies_of(parent)
    LOOP
        EXECUTE format('DROP POLICY %I ON %s', item.name, leaf);
    END LOOP;
    FOR item IN
        SELECT * FROM opsmantik.policies_of(parent) EXCEPT SELECT * FROM opsmantik.policies_of(leaf)
    LOOP
        EXECUTE format('CREATE POLICY %I ON %s AS %s FOR %s TO %s', item.name, leaf, item.kind, item.command, item.roles)
            || coalesce(' USING (' || item.using_expr || ')', '')
            || coalesce(' WITH CHECK (' || item.check_expr || ')', '');
    END LOOP;

    -- One command for all columns of a privilege: a table has dozens.
    FOR item IN
        SELECT g.privilege, g.grantee, coalesce(' (' || string_agg(quote_ident(g.col), ', ') || ')', '') AS cols
        FROM (SELECT * FROM opsmantik.grants_of(leaf) EXCEPT SELECT * FROM opsmantik.grants_of(parent)) AS g
        GROUP BY g.privilege, g.grantee, g.col IS NULL
    LOOP
        EXECUTE format('REVOKE %s%s ON %s FROM %s CASCADE', item.privilege, item.cols, leaf, item.grantee);
    END LOOP;
    FOR item IN
        SELECT g.privilege, g.grantee, g.grantable, coalesce(' (' || string_agg(quote_ident(g.col), ', ') || ')', '') AS cols
        FROM (SELECT * FROM opsmantik.grants_of(parent) EXCEPT SELECT * FROM opsmantik.grants_of(leaf)) AS g
        GROUP BY g.privilege, g.grantee, g.grantable, g.col IS NULL
    LOOP
        EXECUTE format('GRANT %s%s ON %s TO %s%s', item.privilege, item.cols, leaf, item.grantee,
                       CASE WHEN item.grantable THEN ' WITH GRANT OPTION' ELSE '' END);
    END LOOP;

    PERFORM opsmantik.keep_marks(leaf, tab);
END
$$;
COMMENT ON FUNCTION opsmantik.dress_leaf(regclass, regclass) IS
    'Gives a leaf what it does not inherit: owner, identity FULL, row level security on and forced, exactly the policies '
    'and grants of its parent, triggers that note when rows go. Touches only what differs, so a leaf that is right is not locked.';


CREATE OR REPLACE FUNCTION opsmantik.is_ours(rel regclass) RETURNS boolean
LANGUAGE sql STABLE
SET search_path = pg_catalog, pg_temp
AS $$
    SELECT coalesce((
        SELECT c.relkind = 'r' AND c.relowner = p.relowner
            AND NOT EXISTS (
                SELECT FROM pg_attribute a
                WHERE a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped AND NOT EXISTS (
                    SELECT FROM pg_attribute b
                    WHERE b.attrelid = p.oid AND b.attname = a.attname AND b.atttypid = a.atttypid AND NOT b.attisdropped))
            AND EXISTS (
                SELECT FROM pg_index x
                WHERE x.indrelid = c.oid AND x.indisprimary
                  AND (SELECT array_agg(a.attname ORDER BY k.place)
                       FROM unnest(x.indkey::int2[]) WITH ORDINALITY AS k (num, place)
                       JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum = k.num)
                      = ARRAY['site_id', CASE p.relname WHEN 'sessions' THEN 'created_month' ELSE 'session_month' END, 'id']::name[])
        FROM pg_class c
        JOIN pg_class p ON p.oid = format('public.%I', substring(c.relname FROM '^(sessions|events)_'))::regclass
        WHERE c.oid = rel AND c.relname ~ '^(sessions|events)_'), false)
$$;
COMMENT ON FUNCTION opsmantik.is_ours(regclass) IS
    'Whether a table with a leaf''s name was made like a leaf, by who owns the leaves. Somebody else''s would bring its owner''s triggers.';

-- Supabase Realtime.

CREATE OR REPLACE FUNCTION opsmantik.unpublished() RETURNS SETOF regclass
LANGUAGE sql STABLE SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
    -- Where a publication is somebody else's, or shows parents in the place of leaves, there is nothing that we could mend.
    SELECT t.rel
    FROM pg_publication p
    CROSS JOIN LATERAL (
        SELECT l.leaf FROM opsmantik.leaves() l
        UNION ALL
        SELECT 'public.calls'::regclass
    ) AS t (rel)
    WHERE p.pubname = 'supabase_realtime' AND NOT p.puballtables AND NOT p.pubviaroot
      AND pg_has_role(current_user, p.pubowner, 'USAGE')
      AND NOT EXISTS (SELECT FROM pg_get_publication_tables('supabase_realtime') AS g WHERE g.relid = t.rel)
    ORDER BY 1
$$;
COMMENT ON FUNCTION opsmantik.unpublished() IS
    'The leaves of sessions and events, and calls, as far as they are missing in the publication supabase_realtime and we may add them.';

CREATE OR REPLACE FUNCTION opsmantik.publish_leaves() RETURNS void
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    rel regclass;
BEGIN
    IF NOT EXISTS (SELECT FROM pg_publication WHERE pubname = 'supabase_realtime') THEN
        IF NOT has_database_privilege(current_database(), 'CREATE') THEN
            RETURN;
        END IF;
        CREATE PUBLICATION supabase_realtime WITH (publish_via_partition_root = false);
    END IF;
    FOR rel IN SELECT u FROM opsmantik.unpublished() AS u LOOP
        EXECUTE format('ALTER PUBLICATION supabase_realtime ADD TABLE %s', rel);
    END LOOP;
    -- What was a leaf and is none any more. Only what was listed by its own name can be taken out.
    FOR rel IN
        SELECT r.prrelid::regclass
        FROM pg_publication p
        JOIN pg_publication_rel r ON r.prpubid = p.oid
        JOIN pg_class c ON c.oid = r.prrelid
        WHERE p.pubname = 'supabase_realtime' AND pg_has_role(current_user, p.pubowner, 'USAGE')
          AND c.relnamespace = 'public'::regnamespace AND c.relkind = 'r' AND NOT c.relispartition
          AND c.relname ~ '^(sessions|events)_\d{4}_(0[1-9]|1[0-2])$'
          AND opsmantik.is_ours(c.oid)
    LOOP
        EXECUTE format('ALTER PUBLICATION supabase_realtime DROP TABLE %s', rel);
    END LOOP;
EXCEPTION WHEN OTHERS THEN
    -- A month that is not published is better than none. leaf_faults names what is missing.
    RAISE WARNING 'the publication supabase_realtime cannot be kept: %', SQLERRM;
END
$$;
COMMENT ON FUNCTION opsmantik.publish_leaves() IS
    'Keeps the leaves of sessions and events, and calls, in the publication supabase_realtime, which it makes if it is missing. One that '
    'belongs to somebody else, or that publishes parents, is left alone.';

CREATE OR REPLACE FUNCTION opsmantik.ensure_month(month date) RETURNS text[]
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
SET datestyle = 'ISO, YMD'
-- Attaching lets readers and writers pass. What it may have to wait for, such as another change of the parent or a use of a leaf that was
-- detached, somebody else would wait behind: rather give up and be called again.
SET lock_timeout = '2s'
AS $$
DECLARE
    today date := (now() AT TIME ZONE 'UTC')::date;
    lower_bound date;
    upper_bound date;
    root regclass;
    leaf regclass;
    visits regclass;
    part record;
    leaf_name text;
    item record;
    made text[] := '{}';
BEGIN
    IF month IS NULL OR month < DATE '2015-01-01' OR month > (today + interval '24 months')::date THEN
        RAISE EXCEPTION 'no partitions for %: a month lies between 2015-01 and 24 months from today',
                        coalesce(month::text, 'NULL')
            USING ERRCODE = 'invalid_parameter_value';
    END IF;
    -- As a timestamp without time zone: a date alone would be truncated in the time zone of the session.
    lower_bound := date_trunc('month', month::timestamp)::date;
    upper_bound := (lower_bound + interval '1 month')::date;

    PERFORM pg_advisory_xact_lock(hashtextextended('opsmantik.ensure_month', 0));
    PERFORM opsmantik.keep_marks('public.calls', 'calls');

    -- Sessions first: events refer to them.
    FOR part IN SELECT * FROM (VALUES (1, 'sessions', 'created_month'), (2, 'events', 'session_month'))
                AS t (place, tab, key) ORDER BY place
    LOOP
        root := format('public.%I', part.tab)::regclass;
        leaf_name := part.tab || to_char(lower_bound::timestamp, '_YYYY_MM');
        -- Before its leaves: they get theirs from it.
        PERFORM opsmantik.keep_marks(root, part.tab);

        SELECT l.leaf INTO leaf FROM opsmantik.leaves() l WHERE l.parent = root AND l.month = lower_bound;
        IF FOUND THEN
            PERFORM opsmantik.dress_leaf(root, leaf);
            IF part.tab = 'events' THEN
                PERFORM opsmantik.tie_leaf(leaf, visits);
            ELSE
                visits := leaf;
            END IF;
            CONTINUE;
        END IF;

        leaf := to_regclass(format('public.%I', leaf_name));
        IF leaf IS NULL THEN
            EXECUTE format('CREATE TABLE public.%I (LIKE %s INCLUDING ALL)', leaf_name, root);
            leaf := format('public.%I', leaf_name)::regclass;
        ELSE
            -- It was detached, or somebody stopped half way. What it lacks for being attached, it gets.
            IF EXISTS (SELECT FROM pg_inherits WHERE inhrelid = leaf AND inhparent = root AND inhdetachpending) THEN
                EXECUTE format('ALTER TABLE %s DETACH PARTITION %s FINALIZE', root, leaf);
            END IF;
            IF NOT opsmantik.is_ours(leaf) OR EXISTS (SELECT FROM pg_class WHERE oid = leaf AND relispartition) THEN
                RAISE EXCEPTION '% is in the way: it is no table of ours that could become the partition for %', leaf, lower_bound
                    USING ERRCODE = 'wrong_object_type';
            END IF;
            IF EXISTS (SELECT FROM pg_constraint WHERE conrelid = leaf AND conname = 'opsmantik_bound') THEN
                EXECUTE format('ALTER TABLE %s DROP CONSTRAINT opsmantik_bound', leaf);
            END IF;
            FOR item IN
                SELECT conname, pg_get_constraintdef(oid) AS def FROM pg_constraint p
                WHERE conrelid = root AND contype = 'c' AND NOT EXISTS (
                    SELECT FROM pg_constraint c WHERE c.conrelid = leaf AND c.conname = p.conname)
            LOOP
                EXECUTE format('ALTER TABLE %s ADD CONSTRAINT %I %s', leaf, item.conname, item.def);
            END LOOP;
        END IF;

        PERFORM opsmantik.dress_leaf(root, leaf);
        IF part.tab = 'events' THEN
            PERFORM opsmantik.tie_leaf(leaf, visits);
        ELSE
            visits := leaf;
        END IF;
        -- With this constraint the leaf's rows are checked before the parent is locked instead of after.
        EXECUTE format('ALTER TABLE %1$s ADD CONSTRAINT opsmantik_bound '
                       'CHECK (%2$I IS NOT NULL AND %2$I >= %3$L AND %2$I < %4$L)', leaf, part.key, lower_bound, upper_bound);
        EXECUTE format('ALTER TABLE %s ATTACH PARTITION %s FOR VALUES FROM (%L) TO (%L)',
                       root, leaf, lower_bound, upper_bound);
        EXECUTE format('ALTER TABLE %s DROP CONSTRAINT opsmantik_bound', leaf);
        PERFORM opsmantik.keep_marks(leaf, part.tab);
        made := made || leaf_name;
    END LOOP;
    PERFORM opsmantik.publish_leaves();
    IF made <> '{}' THEN
        -- Waited for: a new month that is noted while it is empty brings nothing, later it would seem to come with rows.
        PERFORM pg_advisory_xact_lock(hashtextextended('opsmantik.note_leaves', 0));
    END IF;
    PERFORM opsmantik.note_leaves();
    RETURN made;
END
$$;
COMMENT ON FUNCTION opsmantik.ensure_month(date) IS
    'Makes the partitions of the month of a date, or mends them; returns the names of those that it made or attached '
    'again. May be called any number of times, by several servers at once. Waits for no reader and no writer of other '
    'months; what it waits for it gives up after two seconds (55P03): call it again.';

-- Without compiling the query: the planner guesses thousands of rows where there are a dozen.
CREATE OR REPLACE FUNCTION opsmantik.leaf_faults() RETURNS TABLE (leaf text, fault text)
LANGUAGE sql STABLE SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
SET jit = off
AS $$
    WITH leaf AS MATERIALIZED (
        SELECT * FROM opsmantik.leaves()
    ), is_policy AS MATERIALIZED (
        SELECT l.leaf, p.* FROM leaf l CROSS JOIN LATERAL opsmantik.policies_of(l.leaf) AS p
    ), should_policy AS MATERIALIZED (
        SELECT l.leaf, p.*
        FROM (SELECT DISTINCT parent FROM leaf) AS r CROSS JOIN LATERAL opsmantik.policies_of(r.parent) AS p
        JOIN leaf l ON l.parent = r.parent
    ), is_grant AS MATERIALIZED (
        SELECT l.leaf, g.* FROM leaf l CROSS JOIN LATERAL opsmantik.grants_of(l.leaf) AS g
    ), should_grant AS MATERIALIZED (
        SELECT l.leaf, g.*
        FROM (SELECT DISTINCT parent FROM leaf) AS r CROSS JOIN LATERAL opsmantik.grants_of(r.parent) AS g
        JOIN leaf l ON l.parent = r.parent
    ), fault AS (
        SELECT l.leaf, f.fault
        FROM leaf l
        JOIN pg_class c ON c.oid = l.leaf
        JOIN pg_class p ON p.oid = l.parent
        CROSS JOIN LATERAL (VALUES
            (c.relreplident <> 'f', 'replica identity is not FULL'),
            (NOT c.relrowsecurity, 'row level security is off'),
            (NOT c.relforcerowsecurity, 'row level security is not forced'),
            (c.relowner <> p.relowner, 'owner is not the parent''s'),
            (NOT opsmantik.notes_loss(l.leaf, p.relname), 'leaves no mark when rows go'),
            (l.month IS NULL, 'does not hold exactly one month')
        ) AS f (holds, fault)
        WHERE f.holds
        UNION ALL
        SELECT d.leaf, 'policies differ from the parent''s: ' || string_agg(DISTINCT d.name, ', ')
        FROM (
            (TABLE is_policy EXCEPT TABLE should_policy) UNION ALL (TABLE should_policy EXCEPT TABLE is_policy)
        ) AS d
        GROUP BY d.leaf
        UNION ALL
        SELECT d.leaf, 'grants differ from the parent''s: ' || string_agg(DISTINCT d.privilege || ' of ' || d.grantee, ', ')
        FROM (
            (TABLE is_grant EXCEPT TABLE should_grant) UNION ALL (TABLE should_grant EXCEPT TABLE is_grant)
        ) AS d
        GROUP BY d.leaf
        UNION ALL
        SELECT e.leaf, 'is not tied to the sessions of its month'
        FROM leaf e JOIN leaf s ON s.month = e.month AND s.parent = 'public.sessions'::regclass
        WHERE e.parent = 'public.events'::regclass AND NOT opsmantik.is_tied(e.leaf, s.leaf)
    )
    SELECT l.name, f.fault FROM fault f JOIN leaf l ON l.leaf = f.leaf
    UNION ALL
    SELECT c.relname::text, 'is not in the publication supabase_realtime'
    FROM opsmantik.unpublished() AS u (rel) JOIN pg_class c ON c.oid = u.rel
    UNION ALL
    SELECT t.tab, 'leaves no mark when rows go'
    FROM (VALUES ('sessions'), ('events'), ('calls')) AS t (tab)
    WHERE NOT opsmantik.notes_loss(format('public.%I', t.tab)::regclass, t.tab)
    ORDER BY 1, 2
$$;
COMMENT ON FUNCTION opsmantik.leaf_faults() IS
    'Everything that is wrong with an attached leaf of sessions or events. Empty is good. ensure_month of its month '
    'mends it (and the publication supabase_realtime and the parents, whatever the month); a leaf with other bounds than one month, such as a DEFAULT partition, is for a person to look at.';


CREATE OR REPLACE FUNCTION opsmantik.leaf_states()
RETURNS TABLE (tab text, leaf text, month date, state text, ours boolean, estimate bigint, bytes bigint)
LANGUAGE sql STABLE SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
    WITH found AS (
        SELECT p.relname::text AS tab, l.parent, l.leaf, l.month, 'attached' AS state
        FROM opsmantik.leaves() l JOIN pg_class p ON p.oid = l.parent
        WHERE l.month IS NOT NULL
        UNION ALL
        SELECT n.part[1], format('public.%I', n.part[1])::regclass, c.oid, make_date(n.part[2]::int, n.part[3]::int, 1),
               CASE WHEN i.inhdetachpending THEN 'pending' ELSE 'detached' END
        FROM pg_class c
        LEFT JOIN pg_inherits i ON i.inhrelid = c.oid
        CROSS JOIN LATERAL (SELECT regexp_match(c.relname, '^(sessions|events)_([12]\d{3})_(0[1-9]|1[0-2])$')) AS n (part)
        WHERE c.relnamespace = 'public'::regnamespace AND c.relkind = 'r' AND n.part IS NOT NULL
          AND (i.inhrelid IS NULL OR i.inhdetachpending)
    )
    SELECT f.tab, c.relname::text, f.month, f.state,
           -- A table of this name that is not one of ours has other columns, another key or another owner.
           f.state <> 'detached' OR opsmantik.is_ours(c.oid),
           CASE WHEN c.reltuples >= 0 THEN c.reltuples::bigint ELSE pg_stat_get_live_tuples(c.oid) END,
           pg_total_relation_size(c.oid)
    FROM found f
    JOIN pg_class c ON c.oid = f.leaf
    JOIN pg_class p ON p.oid = f.parent
    ORDER BY f.month, f.tab DESC
$$;
COMMENT ON FUNCTION opsmantik.leaf_states() IS
    'The leaves of all months: attached; `pending`, which a detaching that was interrupted has left; or detached and still there by their '
    'name, with `ours` if they are made like ours. Rows are estimates.';

-- What `leaf_states` tells in its place.
DROP FUNCTION IF EXISTS opsmantik.months();

REVOKE ALL ON FUNCTION opsmantik.note_truncated(), opsmantik.notes_loss(regclass, name), opsmantik.keep_marks(regclass, name),
    opsmantik.link_changes(), opsmantik.note_leaves(), opsmantik.prune_vanished(),
    opsmantik.is_tied(regclass, regclass), opsmantik.tie_leaf(regclass, regclass), opsmantik.check_match(),
    opsmantik.check_site(), opsmantik.keep_site(), opsmantik.is_ours(regclass), opsmantik.unpublished(), opsmantik.publish_leaves(), opsmantik.leaf_states()
    FROM PUBLIC, anon, authenticated, service_role;
GRANT EXECUTE ON FUNCTION opsmantik.prune_vanished() TO opsmantik_service;
GRANT EXECUTE ON FUNCTION opsmantik.note_leaves() TO opsmantik_service, opsmantik_operator;
GRANT EXECUTE ON FUNCTION opsmantik.leaf_states() TO opsmantik_operator;

-- A note is written in the transaction that stores events, of all sites at once. A key to the call would make it wait for whoever has
-- locked that call, as a person may who judges it. A call that is deleted takes its note along when the notes are read.
ALTER TABLE opsmantik.call_rematches DROP CONSTRAINT IF EXISTS call_rematches_call_id_fkey;

-- Who may make tables in `public` could make one with the name of a month to come. PostgreSQL before 15 lets everybody.
DO $$
BEGIN
    IF EXISTS (
        SELECT FROM pg_namespace n, aclexplode(coalesce(n.nspacl, acldefault('n', n.nspowner))) AS a
        WHERE n.nspname = 'public' AND a.grantee = 0 AND a.privilege_type = 'CREATE'
    ) THEN
        REVOKE CREATE ON SCHEMA public FROM PUBLIC;
    END IF;
EXCEPTION WHEN insufficient_privilege THEN
    RAISE WARNING 'everybody may make tables in the schema public: as its owner, REVOKE CREATE ON SCHEMA public FROM PUBLIC';
END
$$;

-- How many calls a month takes its visits from, before it is dropped.
CREATE INDEX IF NOT EXISTS calls_of_month ON public.calls (matched_session_month) WHERE matched_session_id IS NOT NULL;

-- Each month is tied by itself before the keys over all months go: no event is ever without.
DO $$
DECLARE
    old record;
BEGIN
    PERFORM opsmantik.tie_leaf(e.leaf, s.leaf)
    FROM opsmantik.leaves() e JOIN opsmantik.leaves() s ON s.month = e.month AND s.parent = 'public.sessions'::regclass
    WHERE e.parent = 'public.events'::regclass;

    -- A leaf that was detached has kept a key of its own to the parent.
    FOR old IN
        SELECT k.conrelid::regclass AS rel, k.conname
        FROM pg_constraint k JOIN pg_class c ON c.oid = k.conrelid
        WHERE k.contype = 'f' AND k.conparentid = 0 AND c.relnamespace = 'public'::regnamespace
          AND (k.confrelid = 'public.sessions'::regclass AND c.relname ~ '^(calls|events|events_\d{4}_\d\d)$'
               OR k.confrelid = 'public.sites'::regclass AND c.relname ~ '^(sessions|sessions_\d{4}_\d\d)$')
        ORDER BY c.relname
    LOOP
        EXECUTE format('ALTER TABLE %s DROP CONSTRAINT %I', old.rel, old.conname);
    END LOOP;
END
$$;

CREATE OR REPLACE TRIGGER sessions_site AFTER INSERT OR UPDATE OF site_id ON public.sessions
    FOR EACH ROW EXECUTE FUNCTION opsmantik.check_site();
CREATE OR REPLACE TRIGGER sites_kept AFTER DELETE ON public.sites
    FOR EACH ROW EXECUTE FUNCTION opsmantik.keep_site();
CREATE OR REPLACE TRIGGER sites_same AFTER UPDATE OF id ON public.sites
    FOR EACH ROW WHEN (OLD.id <> NEW.id) EXECUTE FUNCTION opsmantik.keep_site();

-- Deferrable as the key was: a batch may match a call before it writes the session. Only a new match is looked at.
DO $$
BEGIN
    DROP TRIGGER IF EXISTS calls_session_new ON public.calls;
    CREATE CONSTRAINT TRIGGER calls_session_new AFTER INSERT ON public.calls
        DEFERRABLE INITIALLY IMMEDIATE FOR EACH ROW
        WHEN (NEW.matched_session_id IS NOT NULL)
        EXECUTE FUNCTION opsmantik.check_match();
    DROP TRIGGER IF EXISTS calls_session_moved ON public.calls;
    CREATE CONSTRAINT TRIGGER calls_session_moved AFTER UPDATE OF site_id, matched_session_id, matched_session_month ON public.calls
        DEFERRABLE INITIALLY IMMEDIATE FOR EACH ROW
        WHEN (NEW.matched_session_id IS NOT NULL
              AND (NEW.site_id, NEW.matched_session_month, NEW.matched_session_id)
                  IS DISTINCT FROM (OLD.site_id, OLD.matched_session_month, OLD.matched_session_id))
        EXECUTE FUNCTION opsmantik.check_match();
END
$$;

-- The months that are there.
DO $$
BEGIN
    PERFORM opsmantik.dress_leaf(l.parent, l.leaf) FROM opsmantik.leaves() l;
    PERFORM opsmantik.publish_leaves();
    PERFORM opsmantik.note_leaves();
    IF EXISTS (
        SELECT FROM pg_publication
        WHERE pubname = 'supabase_realtime'
          AND (pubviaroot OR NOT (puballtables OR pg_has_role(current_user, pubowner, 'USAGE')))
    ) THEN
        RAISE WARNING 'the publication supabase_realtime is not kept by OpsMantik: it belongs to another role, or publishes via the root'
            USING HINT = 'Months are then published by whoever owns it, each leaf by its own name.';
    ELSIF NOT EXISTS (SELECT FROM pg_publication WHERE pubname = 'supabase_realtime') THEN
        RAISE WARNING 'there is no publication supabase_realtime, and % may not make one', current_user
            USING HINT = format('As an administrator: GRANT CREATE ON DATABASE %I TO %I', current_database(), current_user);
    END IF;
END
$$;
