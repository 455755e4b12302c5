-- Everything in our schemas that decides who may do what, one sentence a fact. The first column names the relation that a fact is about,
-- so that a leaf can be told from its parent; the owner of our tables is called OWNER, whoever migrated. Run with no schema in the search
-- path, so that every name is a full one.
WITH boss AS (
    SELECT relowner AS oid FROM pg_class WHERE oid = 'public.sites'::regclass
), who AS (
    SELECT 0::oid AS oid, 'PUBLIC' AS name
    UNION ALL
    SELECT r.oid, CASE WHEN r.oid = boss.oid THEN 'OWNER' ELSE r.rolname::text END FROM pg_roles r, boss
), space AS (
    SELECT oid, nspname::text AS name, nspacl, nspowner FROM pg_namespace WHERE nspname = ANY ($1)
), rel AS (
    SELECT c.*, s.name || '.' || c.relname AS name, o.name AS owner
    FROM pg_class c JOIN space s ON s.oid = c.relnamespace JOIN who o ON o.oid = c.relowner
    WHERE c.relkind NOT IN ('i', 'I')
), col AS (
    SELECT attrelid AS rel, attname::text AS name, attacl AS acl FROM pg_attribute JOIN rel ON rel.oid = attrelid
    WHERE attnum > 0 AND NOT attisdropped
), col_grant AS (
    SELECT c.rel, a.grantee, a.privilege_type || CASE WHEN a.is_grantable THEN ' WITH GRANT OPTION' ELSE '' END AS privilege,
           array_agg(c.name ORDER BY c.name) AS cols
    FROM col c CROSS JOIN LATERAL aclexplode(c.acl) AS a
    GROUP BY 1, 2, 3
), privilege AS (
    SELECT r.oid AS rel, a.grantee,
           a.privilege_type || CASE WHEN a.is_grantable THEN ' WITH GRANT OPTION' ELSE '' END AS privilege
    FROM rel r CROSS JOIN LATERAL aclexplode(r.relacl) AS a WHERE a.grantee <> r.relowner
    UNION ALL
    -- Whichever is shorter: the columns, or all but the others.
    SELECT g.rel, g.grantee, g.privilege || ' (' || CASE
               WHEN 2 * cardinality(g.cols) <= (SELECT count(*) FROM col c WHERE c.rel = g.rel) THEN array_to_string(g.cols, ', ')
               ELSE 'all but ' || (SELECT coalesce(string_agg(c.name, ', ' ORDER BY c.name), 'none') FROM col c
                                   WHERE c.rel = g.rel AND c.name <> ALL (g.cols))
           END || ')'
    FROM col_grant g JOIN rel r ON r.oid = g.rel WHERE g.grantee <> r.relowner
), fact (rel, fact) AS (
    SELECT name, name || ': ' || CASE relkind
               WHEN 'r' THEN 'table' WHEN 'p' THEN 'partitioned table' WHEN 'v' THEN 'view' WHEN 'm' THEN 'materialized view'
               WHEN 'S' THEN 'sequence' WHEN 'f' THEN 'foreign table' WHEN 'c' THEN 'composite type' ELSE relkind::text END
           || CASE WHEN relkind NOT IN ('r', 'p') THEN ''
              ELSE ', row security ' || CASE WHEN relrowsecurity AND relforcerowsecurity THEN 'forced'
                                             WHEN relrowsecurity THEN 'on' ELSE 'off' END
                   || ', identity ' || CASE relreplident WHEN 'd' THEN 'key' WHEN 'f' THEN 'full' ELSE relreplident::text END END
           || CASE owner WHEN 'OWNER' THEN '' ELSE ', owned by ' || owner END
    FROM rel
    UNION ALL
    SELECT r.name, r.name || ': ' || w.name || ' may ' || string_agg(p.privilege, ', ' ORDER BY p.privilege)
    FROM privilege p JOIN rel r ON r.oid = p.rel JOIN who w ON w.oid = p.grantee
    GROUP BY r.name, w.name
    UNION ALL
    SELECT r.name, r.name || ': policy ' || p.polname || CASE WHEN p.polpermissive THEN '' ELSE ' (restrictive)' END || ', '
           || CASE p.polcmd WHEN 'r' THEN 'SELECT' WHEN 'a' THEN 'INSERT' WHEN 'w' THEN 'UPDATE' WHEN 'd' THEN 'DELETE' ELSE 'ALL' END
           || ' to ' || (SELECT string_agg(w.name, ', ' ORDER BY w.name) FROM who w WHERE w.oid = ANY (p.polroles))
           || coalesce(' using ' || pg_get_expr(p.polqual, p.polrelid), '')
           || coalesce(' check ' || pg_get_expr(p.polwithcheck, p.polrelid), '')
    FROM pg_policy p JOIN rel r ON r.oid = p.polrelid
    UNION ALL
    SELECT r.name, r.name || ': ' || regexp_replace(pg_get_triggerdef(t.oid), '^CREATE ', '')
           || CASE t.tgenabled WHEN 'O' THEN '' ELSE ' (fires: ' || t.tgenabled::text || ')' END
    FROM pg_trigger t JOIN rel r ON r.oid = t.tgrelid WHERE NOT t.tgisinternal
    UNION ALL
    SELECT r.name, r.name || ': rule ' || w.rulename
    FROM pg_rewrite w JOIN rel r ON r.oid = w.ev_class WHERE r.relkind NOT IN ('v', 'm')
    UNION ALL
    SELECT r.name, r.name || ': inherits ' || i.inhparent::regclass
    FROM pg_inherits i JOIN rel r ON r.oid = i.inhrelid WHERE NOT r.relispartition
    UNION ALL
    SELECT '', format('%s.%s(%s): %s%s, %s, %s%s; for %s', s.name, p.proname, pg_get_function_identity_arguments(p.oid),
                      CASE p.prokind WHEN 'f' THEN '' WHEN 'p' THEN 'procedure ' WHEN 'a' THEN 'aggregate ' ELSE 'window ' END, l.lanname,
                      CASE p.provolatile WHEN 'i' THEN 'immutable' WHEN 's' THEN 'stable' ELSE 'volatile' END,
                      CASE WHEN p.prosecdef THEN 'definer' ELSE 'invoker' END
                          || CASE WHEN o.name = 'OWNER' THEN '' ELSE ', owned by ' || o.name END
                          || CASE WHEN p.proleakproof THEN ', leakproof' ELSE '' END,
                      -- Pinned, the rule, is not worth a word; anything else is.
                      CASE WHEN 'search_path=pg_catalog, pg_temp' = ANY (p.proconfig) THEN '' ELSE ', search_path NOT PINNED' END
                          || coalesce((SELECT string_agg(', ' || c, '' ORDER BY c) FROM unnest(p.proconfig) AS c
                                       WHERE c <> 'search_path=pg_catalog, pg_temp'), ''),
                      coalesce((SELECT string_agg(w.name, ', ' ORDER BY w.name)
                                FROM aclexplode(coalesce(p.proacl, acldefault('f', p.proowner))) AS a JOIN who w ON w.oid = a.grantee
                                WHERE a.grantee <> p.proowner), 'nobody'))
    FROM pg_proc p JOIN space s ON s.oid = p.pronamespace JOIN pg_language l ON l.oid = p.prolang JOIN who o ON o.oid = p.proowner
    UNION ALL
    SELECT '', 'schema ' || s.name || ': ' || w.name || ' may ' || string_agg(a.privilege_type, ', ' ORDER BY a.privilege_type)
    FROM space s CROSS JOIN LATERAL aclexplode(coalesce(s.nspacl, acldefault('n', s.nspowner))) AS a JOIN who w ON w.oid = a.grantee
    WHERE a.grantee <> s.nspowner
    GROUP BY s.name, w.name
    UNION ALL
    SELECT '', 'type ' || s.name || '.' || t.typname
    FROM pg_type t JOIN space s ON s.oid = t.typnamespace WHERE t.typtype IN ('d', 'e', 'r')
    UNION ALL
    -- Of a schema of ours, or of all schemas: what is made next would get these.
    SELECT '', 'default privileges ' || coalesce('in ' || s.name, 'everywhere') || ' on '
           || CASE d.defaclobjtype WHEN 'r' THEN 'tables' WHEN 'f' THEN 'functions' WHEN 'S' THEN 'sequences' ELSE d.defaclobjtype::text END
           || ' that ' || o.name || ' makes: ' || w.name || ' may ' || string_agg(a.privilege_type, ', ' ORDER BY a.privilege_type)
    FROM pg_default_acl d LEFT JOIN space s ON s.oid = d.defaclnamespace JOIN who o ON o.oid = d.defaclrole
    CROSS JOIN LATERAL aclexplode(d.defaclacl) AS a JOIN who w ON w.oid = a.grantee
    WHERE (d.defaclnamespace = 0 OR s.oid IS NOT NULL) AND a.grantee <> d.defaclrole
    GROUP BY s.name, d.defaclobjtype, o.name, w.name
    UNION ALL
    SELECT '', 'publication ' || p.pubname || ':' || CASE WHEN p.pubinsert THEN ' insert' ELSE '' END
           || CASE WHEN p.pubupdate THEN ' update' ELSE '' END || CASE WHEN p.pubdelete THEN ' delete' ELSE '' END
           || CASE WHEN p.pubtruncate THEN ' truncate' ELSE '' END || CASE WHEN p.pubviaroot THEN ', by the root' ELSE ', by the leaf' END
           || CASE WHEN p.puballtables THEN ', ALL TABLES' ELSE '' END
           || CASE WHEN o.name = 'OWNER' THEN '' ELSE ', owned by ' || o.name END
    FROM pg_publication p JOIN who o ON o.oid = p.pubowner
    UNION ALL
    SELECT coalesce(r.name, ''), m.prrelid::regclass || ': in publication ' || p.pubname
           || CASE WHEN m.prqual IS NULL AND m.prattrs IS NULL THEN '' ELSE ', not all of it' END
    FROM pg_publication_rel m JOIN pg_publication p ON p.oid = m.prpubid LEFT JOIN rel r ON r.oid = m.prrelid
    UNION ALL
    SELECT '', 'publication ' || p.pubname || ' lists the schema ' || m.pnnspid::regnamespace
    FROM pg_publication_namespace m JOIN pg_publication p ON p.oid = m.pnpubid
    UNION ALL
    SELECT '', 'event trigger ' || e.evtname || ' on ' || e.evtevent || ': ' || e.evtfoid::regprocedure
    FROM pg_event_trigger e
    UNION ALL
    SELECT '', format('role %s:%s%s%s%s%s%s', rolname, CASE WHEN rolcanlogin THEN ' LOGIN' ELSE '' END,
                      CASE WHEN rolsuper THEN ' SUPERUSER' ELSE '' END, CASE WHEN rolbypassrls THEN ' BYPASSRLS' ELSE '' END,
                      CASE WHEN rolcreaterole THEN ' CREATEROLE' ELSE '' END, CASE WHEN rolcreatedb THEN ' CREATEDB' ELSE '' END,
                      CASE WHEN rolreplication THEN ' REPLICATION' ELSE '' END)
           || coalesce((SELECT string_agg(' member of ' || m.roleid::regrole, ',' ORDER BY m.roleid::regrole::text)
                        FROM pg_auth_members m WHERE m.member = r.oid), '')
    FROM pg_roles r WHERE rolname IN ('anon', 'authenticated', 'service_role') OR rolname LIKE 'opsmantik\_%'
)
SELECT f.rel, leaf.parent, regexp_replace(replace(f.fact, '( SELECT', '(SELECT'), '\) AS \w+', ')', 'g') AS fact
FROM fact f
LEFT JOIN (
    SELECT r.name, i.inhparent::regclass::text AS parent FROM rel r JOIN pg_inherits i ON i.inhrelid = r.oid WHERE r.relispartition
) AS leaf ON leaf.name = f.rel
ORDER BY f.fact
