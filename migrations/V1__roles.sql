-- Who may come in, before there is anything to see.
--
-- Tenancy is decided by PostgreSQL, so the roles come first: those of Supabase, made where they are missing, so that
-- the same policies hold on a plain PostgreSQL; and three of our own, which own nothing and bypass nothing. The schema
-- `opsmantik` keeps our functions out of `public`, which Supabase publishes as an API.
--
-- Roles belong to the cluster and not to the database. Another database may have made them already, may be making them
-- at this moment, and may have been migrated by somebody with more rights than we have: all three are fine.

DO $$
DECLARE
    wanted text;
BEGIN
    FOREACH wanted IN ARRAY ARRAY[
        'anon', 'authenticated', 'service_role', 'opsmantik_service', 'opsmantik_operator', 'opsmantik_tenant'
    ] LOOP
        CONTINUE WHEN EXISTS (SELECT FROM pg_catalog.pg_roles WHERE rolname = wanted);
        BEGIN
            EXECUTE format('CREATE ROLE %I NOLOGIN', wanted);
            IF wanted = 'service_role' THEN
                -- On Supabase this role passes by every policy. Only some migrators may give that away; without it
                -- the role sees nothing, which harms nobody, because the server does not use it.
                BEGIN
                    ALTER ROLE service_role BYPASSRLS;
                EXCEPTION WHEN insufficient_privilege THEN
                    RAISE NOTICE 'service_role was made without BYPASSRLS: % may not grant it', current_user;
                END;
            END IF;
        EXCEPTION WHEN duplicate_object OR unique_violation THEN
            NULL; -- another database of this cluster was faster
        END;
    END LOOP;

    SELECT string_agg(rolname, ', ') INTO wanted
    FROM pg_catalog.pg_roles
    WHERE rolname IN ('opsmantik_service', 'opsmantik_operator', 'opsmantik_tenant') AND (rolsuper OR rolbypassrls);
    IF wanted IS NOT NULL THEN
        RAISE EXCEPTION 'role % passes by row level security, which is all that keeps tenants apart', wanted
            USING HINT = 'ALTER ROLE … NOSUPERUSER NOBYPASSRLS';
    END IF;
END
$$;

-- The login role takes the role that fits what it does (SET ROLE), so it has to be a member. Membership that somebody
-- else has given is as good as ours. PostgreSQL 16 tells membership from the right to SET ROLE.
DO $$
DECLARE
    wanted text;
    right_to_set text := CASE WHEN current_setting('server_version_num')::int >= 160000 THEN 'SET' ELSE 'MEMBER' END;
BEGIN
    FOREACH wanted IN ARRAY ARRAY['opsmantik_service', 'opsmantik_operator', 'opsmantik_tenant', 'authenticated'] LOOP
        CONTINUE WHEN pg_has_role(current_user, wanted, right_to_set);
        BEGIN
            EXECUTE format('GRANT %I TO CURRENT_USER', wanted);
        EXCEPTION
            WHEN insufficient_privilege THEN
                RAISE EXCEPTION '% is no member of role % and may not make itself one', current_user, wanted
                    USING HINT = format('As an administrator: GRANT %I TO %I', wanted, current_user);
            WHEN unique_violation THEN
                NULL; -- another database of this cluster was faster
        END;
    END LOOP;
END
$$;

CREATE SCHEMA IF NOT EXISTS opsmantik;
COMMENT ON SCHEMA opsmantik IS 'Functions of OpsMantik: partitions, and the questions that policies ask.';
REVOKE ALL ON SCHEMA opsmantik FROM PUBLIC, anon, authenticated, service_role;
-- Policies find their functions without it; these two call some by name.
GRANT USAGE ON SCHEMA opsmantik TO opsmantik_service, opsmantik_operator;

-- PUBLIC may look into `public` unless somebody has taken that away.
DO $$
DECLARE
    reader text;
BEGIN
    FOREACH reader IN ARRAY ARRAY[
        'authenticated', 'service_role', 'opsmantik_service', 'opsmantik_operator', 'opsmantik_tenant'
    ] LOOP
        IF NOT has_schema_privilege(reader, 'public', 'USAGE') THEN
            EXECUTE format('GRANT USAGE ON SCHEMA public TO %I', reader);
        END IF;
    END LOOP;
END
$$;

-- Supabase brings `auth.uid()`; elsewhere the same question gets the same answer. A token that makes no sense is
-- nobody's: it must not raise, because a policy that raises tells its reader more than one that shows nothing.
DO $$
BEGIN
    IF NOT EXISTS (SELECT FROM pg_catalog.pg_namespace WHERE nspname = 'auth') THEN
        CREATE SCHEMA auth;
        GRANT USAGE ON SCHEMA auth TO anon, authenticated, service_role;
    END IF;
    IF NOT EXISTS (
        SELECT FROM pg_catalog.pg_proc p JOIN pg_catalog.pg_namespace n ON n.oid = p.pronamespace
        WHERE n.nspname = 'auth' AND p.proname = 'uid' AND p.pronargs = 0
    ) THEN
        CREATE FUNCTION auth.uid() RETURNS uuid
        LANGUAGE plpgsql STABLE
        SET search_path = pg_catalog, pg_temp
        AS $uid$
        BEGIN
            RETURN (nullif(current_setting('request.jwt.claims', true), '')::jsonb ->> 'sub')::uuid;
        EXCEPTION WHEN data_exception OR program_limit_exceeded THEN
            RETURN NULL;
        END
        $uid$;
        COMMENT ON FUNCTION auth.uid() IS
            'The user of this transaction: `sub` of the setting request.jwt.claims. NULL when there is none, or when '
            'it is no UUID.';
    END IF;
END
$$;
