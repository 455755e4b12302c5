-- A month's partitions, whole.
--
-- PostgreSQL hands almost nothing down from a partitioned table to a leaf: not the replica identity, not row level
-- security, not policies, not grants; and a leaf that is read by its own name answers by its own rules. So a leaf is
-- made in one place, here: created, dressed like its parent, attached. It is attached, rather than created as a
-- partition, because that would lock readers of the parent out. The server's keeper calls `ensure_month` ahead of time;
-- the readiness check asks `leaf_faults` and `missing_months`.
--
-- The functions run as their owner, who owns the tables, with a search path that nobody can put anything into. Dates
-- are literal: no time zone setting moves a bound.

CREATE OR REPLACE FUNCTION opsmantik.policies_of(rel regclass)
RETURNS TABLE (name name, command text, kind text, roles text, using_expr text, check_expr text)
LANGUAGE sql STABLE
SET search_path = pg_catalog, pg_temp
AS $$
    SELECT polname,
           CASE polcmd WHEN 'r' THEN 'SELECT' WHEN 'a' THEN 'INSERT' WHEN 'w' THEN 'UPDATE' WHEN 'd' THEN 'DELETE'
                       ELSE 'ALL' END,
           CASE WHEN polpermissive THEN 'PERMISSIVE' ELSE 'RESTRICTIVE' END,
           (SELECT string_agg(CASE r WHEN 0 THEN 'PUBLIC' ELSE quote_ident(pg_get_userbyid(r)) END, ', ' ORDER BY r)
            FROM unnest(polroles) AS r),
           pg_get_expr(polqual, polrelid),
           pg_get_expr(polwithcheck, polrelid)
    FROM pg_policy
    WHERE polrelid = rel
$$;
COMMENT ON FUNCTION opsmantik.policies_of(regclass) IS 'A table''s policies as text, fit to be compared and made again.';

CREATE OR REPLACE FUNCTION opsmantik.grants_of(rel regclass)
RETURNS TABLE (grantee text, privilege text, col name, grantable boolean)
LANGUAGE sql STABLE
SET search_path = pg_catalog, pg_temp
AS $$
    SELECT CASE a.grantee WHEN 0 THEN 'PUBLIC' ELSE quote_ident(pg_get_userbyid(a.grantee)) END,
           a.privilege_type, g.col, bool_or(a.is_grantable)
    FROM pg_class c
    CROSS JOIN LATERAL (
        SELECT NULL::name AS col, c.relacl AS acl
        UNION ALL
        SELECT attname, attacl FROM pg_attribute WHERE attrelid = c.oid AND attacl IS NOT NULL AND NOT attisdropped
    ) AS g
    CROSS JOIN LATERAL aclexplode(g.acl) AS a
    WHERE c.oid = rel AND a.grantee <> c.relowner
    GROUP BY a.grantee, a.privilege_type, g.col
$$;
COMMENT ON FUNCTION opsmantik.grants_of(regclass) IS
    'Who besides its owner may do what with a table; with `col`, with that column only.';

CREATE OR REPLACE FUNCTION opsmantik.dress_leaf(parent regclass, leaf regclass) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    here pg_class%ROWTYPE;
    boss oid;
    item record;
BEGIN
    SELECT * INTO STRICT here FROM pg_class WHERE oid = leaf;
    SELECT relowner INTO STRICT boss FROM pg_class WHERE oid = parent;
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

    FOR item IN
        SELECT * FROM opsmantik.grants_of(leaf) EXCEPT SELECT * FROM opsmantik.grants_of(parent)
    LOOP
        EXECUTE format('REVOKE %s%s ON %s FROM %s CASCADE',
                       item.privilege, coalesce(' (' || quote_ident(item.col) || ')', ''), leaf, item.grantee);
    END LOOP;
    FOR item IN
        SELECT * FROM opsmantik.grants_of(parent) EXCEPT SELECT * FROM opsmantik.grants_of(leaf)
    LOOP
        EXECUTE format('GRANT %s%s ON %s TO %s%s', item.privilege, coalesce(' (' || quote_ident(item.col) || ')', ''), leaf,
                       item.grantee, CASE WHEN item.grantable THEN ' WITH GRANT OPTION' ELSE '' END);
    END LOOP;
END
$$;
COMMENT ON FUNCTION opsmantik.dress_leaf(regclass, regclass) IS
    'Gives a leaf what it does not inherit: owner, identity FULL, row level security on and forced, exactly the policies '
    'and grants of its parent. Touches only what differs, so a leaf that is right is not locked.';

CREATE OR REPLACE FUNCTION opsmantik.leaves()
RETURNS TABLE (parent regclass, leaf regclass, name text, month date)
LANGUAGE sql STABLE
SET search_path = pg_catalog, pg_temp
SET datestyle = 'ISO, YMD'
AS $$
    SELECT i.inhparent::regclass, c.oid::regclass, c.relname::text,
           -- Only bounds that are one whole month count as a month.
           (SELECT d.first FROM (SELECT (regexp_match(b.bound, '^FOR VALUES FROM \(''(\d{4}-\d\d-01)''\)'))[1]::date) AS d (first)
            WHERE b.bound = format('FOR VALUES FROM (%L) TO (%L)', d.first, (d.first + interval '1 month')::date))
    FROM pg_inherits i
    JOIN pg_class c ON c.oid = i.inhrelid
    CROSS JOIN LATERAL (SELECT pg_get_expr(c.relpartbound, c.oid)) AS b (bound)
    WHERE i.inhparent IN ('public.sessions'::regclass, 'public.events'::regclass) AND NOT i.inhdetachpending
$$;
COMMENT ON FUNCTION opsmantik.leaves() IS
    'The attached leaves of sessions and events. `month` is NULL for one that does not hold exactly one month.';

CREATE OR REPLACE FUNCTION opsmantik.ensure_month(month date) RETURNS text[]
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
SET datestyle = 'ISO, YMD'
-- Attaching lets readers pass. But the foreign keys make it wait for transactions that write to sessions, and later
-- writers wait behind it: rather give up and be called again.
SET lock_timeout = '2s'
AS $$
DECLARE
    today date := (now() AT TIME ZONE 'UTC')::date;
    lower_bound date;
    upper_bound date;
    root regclass;
    leaf regclass;
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

    -- Sessions first: events refer to them.
    FOR part IN SELECT * FROM (VALUES (1, 'sessions', 'created_month'), (2, 'events', 'session_month'))
                AS t (place, tab, key) ORDER BY place
    LOOP
        root := format('public.%I', part.tab)::regclass;
        leaf_name := part.tab || to_char(lower_bound::timestamp, '_YYYY_MM');

        SELECT l.leaf INTO leaf FROM opsmantik.leaves() l WHERE l.parent = root AND l.month = lower_bound;
        IF FOUND THEN
            PERFORM opsmantik.dress_leaf(root, leaf);
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
            IF EXISTS (SELECT FROM pg_class WHERE oid = leaf AND (relkind <> 'r' OR relispartition)) THEN
                RAISE EXCEPTION '% is in the way: it is no table that could become the partition for %', leaf, lower_bound
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
        -- With this constraint the leaf's rows are checked before the parent is locked instead of after.
        EXECUTE format('ALTER TABLE %1$s ADD CONSTRAINT opsmantik_bound '
                       'CHECK (%2$I IS NOT NULL AND %2$I >= %3$L AND %2$I < %4$L)', leaf, part.key, lower_bound, upper_bound);
        EXECUTE format('ALTER TABLE %s ATTACH PARTITION %s FOR VALUES FROM (%L) TO (%L)',
                       root, leaf, lower_bound, upper_bound);
        EXECUTE format('ALTER TABLE %s DROP CONSTRAINT opsmantik_bound', leaf);
        made := made || leaf_name;
    END LOOP;
    RETURN made;
END
$$;
COMMENT ON FUNCTION opsmantik.ensure_month(date) IS
    'Makes the partitions of the month of a date, or mends them; returns the names of those that it made or attached '
    'again. May be called any number of times, by several servers at once. Attaching waits for open transactions that '
    'wrote to sessions, not for readers, and gives up after two seconds (55P03): call it again.';

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
    )
    SELECT l.name, f.fault FROM fault f JOIN leaf l ON l.leaf = f.leaf
    ORDER BY l.name, f.fault
$$;
COMMENT ON FUNCTION opsmantik.leaf_faults() IS
    'Everything that is wrong with an attached leaf of sessions or events. Empty is good. ensure_month of its month '
    'mends it; a leaf with other bounds than one month, such as a DEFAULT partition, is for a person to look at.';

CREATE OR REPLACE FUNCTION opsmantik.missing_months(from_month date, ahead int) RETURNS SETOF date
LANGUAGE sql STABLE SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
    SELECT m.month
    FROM (
        SELECT (date_trunc('month', from_month::timestamp) + make_interval(months => n))::date
        FROM generate_series(0, ahead) AS n
    ) AS m (month)
    WHERE (SELECT count(DISTINCT l.parent) FROM opsmantik.leaves() l WHERE l.month = m.month) < 2
    ORDER BY m.month
$$;
COMMENT ON FUNCTION opsmantik.missing_months(date, int) IS
    'Of the month of a date and the `ahead` months after it, those that sessions or events have no leaf for.';

CREATE OR REPLACE FUNCTION opsmantik.months()
RETURNS TABLE (month date, sessions_leaf text, events_leaf text, sessions_rows bigint, events_rows bigint, bytes bigint)
LANGUAGE sql STABLE SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
    SELECT l.month,
           max(l.name) FILTER (WHERE l.parent = 'public.sessions'::regclass),
           max(l.name) FILTER (WHERE l.parent = 'public.events'::regclass),
           coalesce(sum(e.estimate) FILTER (WHERE l.parent = 'public.sessions'::regclass), 0)::bigint,
           coalesce(sum(e.estimate) FILTER (WHERE l.parent = 'public.events'::regclass), 0)::bigint,
           sum(pg_total_relation_size(l.leaf))::bigint
    FROM opsmantik.leaves() l
    JOIN pg_class c ON c.oid = l.leaf
    -- A table that was never analyzed says -1; then the live count of the statistics is all there is.
    CROSS JOIN LATERAL (
        SELECT CASE WHEN c.reltuples >= 0 THEN c.reltuples::bigint ELSE pg_stat_get_live_tuples(c.oid) END
    ) AS e (estimate)
    WHERE l.month IS NOT NULL
    GROUP BY l.month
    ORDER BY l.month
$$;
COMMENT ON FUNCTION opsmantik.months() IS
    'The months that there are: the names of their leaves, estimated rows, and bytes with indexes and TOAST.';

REVOKE ALL ON FUNCTION opsmantik.policies_of(regclass), opsmantik.grants_of(regclass), opsmantik.leaves(),
    opsmantik.dress_leaf(regclass, regclass), opsmantik.ensure_month(date), opsmantik.leaf_faults(),
    opsmantik.missing_months(date, int), opsmantik.months()
    FROM PUBLIC, anon, authenticated, service_role;
GRANT EXECUTE ON FUNCTION opsmantik.ensure_month(date), opsmantik.leaf_faults(), opsmantik.missing_months(date, int),
    opsmantik.months() TO opsmantik_service, opsmantik_operator;

-- The month before this one, for late deliveries and for visits over midnight; this one; and three ahead. The last line
-- dresses what an earlier run of this file has made.
DO $$
DECLARE
    this_month timestamp := date_trunc('month', now() AT TIME ZONE 'UTC');
BEGIN
    FOR n IN -1..3 LOOP
        PERFORM opsmantik.ensure_month((this_month + make_interval(months => n))::date);
    END LOOP;
    PERFORM opsmantik.dress_leaf(l.parent, l.leaf) FROM opsmantik.leaves() l;
END
$$;
