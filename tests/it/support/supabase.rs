//! A database as a new Supabase project is: its roles, its default privileges, an `auth` schema with functions that raise, an empty
//! publication for Realtime, and an owner who is no superuser but passes by row level security. Migrations run there as that owner.

use opsmantik::store::Store;
use tokio::sync::OnceCell;

use super::cluster::cluster;
use super::database::{Database, database, empty};

/// The part of Supabase's `postgres`.
pub const OWNER: &str = "supabase_owner";

/// Belongs to the cluster, so it is done once. `service_role` and the others may be there already, made by a migration elsewhere.
const ROLES: &str = "
    DO $$ BEGIN
      CREATE ROLE anon NOLOGIN NOINHERIT; EXCEPTION WHEN duplicate_object THEN NULL; END $$;
    DO $$ BEGIN
      CREATE ROLE authenticated NOLOGIN NOINHERIT; EXCEPTION WHEN duplicate_object THEN NULL; END $$;
    DO $$ BEGIN
      CREATE ROLE service_role NOLOGIN NOINHERIT BYPASSRLS; EXCEPTION WHEN duplicate_object THEN NULL; END $$;
    CREATE ROLE supabase_owner LOGIN CREATEROLE CREATEDB BYPASSRLS REPLICATION PASSWORD 'owner';
    GRANT anon, authenticated, service_role, opsmantik_service, opsmantik_operator, opsmantik_tenant
      TO supabase_owner WITH ADMIN OPTION;
";

/// The functions are Supabase's own words. Default privileges are given in `public`, as there, and everywhere, which is worse.
const DATABASE: &str = "
    CREATE SCHEMA auth;
    CREATE FUNCTION auth.uid() RETURNS uuid LANGUAGE sql STABLE AS $$
      select coalesce(
        nullif(current_setting('request.jwt.claim.sub', true), ''),
        (nullif(current_setting('request.jwt.claims', true), '')::jsonb ->> 'sub'))::uuid $$;
    CREATE FUNCTION auth.role() RETURNS text LANGUAGE sql STABLE AS $$
      select coalesce(
        nullif(current_setting('request.jwt.claim.role', true), ''),
        (nullif(current_setting('request.jwt.claims', true), '')::jsonb ->> 'role'))::text $$;
    CREATE FUNCTION auth.jwt() RETURNS jsonb LANGUAGE sql STABLE AS $$
      select coalesce(
        nullif(current_setting('request.jwt.claim', true), ''),
        nullif(current_setting('request.jwt.claims', true), ''))::jsonb $$;
    GRANT USAGE ON SCHEMA auth TO anon, authenticated, service_role, supabase_owner;
    GRANT ALL ON SCHEMA public TO supabase_owner;
    GRANT USAGE ON SCHEMA public TO anon, authenticated, service_role;
    ALTER DEFAULT PRIVILEGES FOR ROLE supabase_owner IN SCHEMA public GRANT ALL ON TABLES TO anon, authenticated, service_role;
    ALTER DEFAULT PRIVILEGES FOR ROLE supabase_owner IN SCHEMA public GRANT ALL ON FUNCTIONS TO anon, authenticated, service_role;
    ALTER DEFAULT PRIVILEGES FOR ROLE supabase_owner IN SCHEMA public GRANT ALL ON SEQUENCES TO anon, authenticated, service_role;
    ALTER DEFAULT PRIVILEGES FOR ROLE supabase_owner GRANT ALL ON TABLES TO anon, authenticated, service_role;
    ALTER DEFAULT PRIVILEGES FOR ROLE supabase_owner GRANT ALL ON FUNCTIONS TO anon, authenticated, service_role;
    SET ROLE supabase_owner; CREATE PUBLICATION supabase_realtime; RESET ROLE;
";

/// Such a database, with no migration of ours in it. Its store logs in as the owner; `admin` is the superuser.
pub async fn like_supabase(name: &str) -> Database {
    static ROLES_MADE: OnceCell<()> = OnceCell::const_new();
    ROLES_MADE
        .get_or_init(|| async {
            // Our own roles: let the template's migration make them first, so that this owner is given them.
            let migrated = database().await;
            migrated.admin.batch_execute(ROLES).await.expect("roles like Supabase's");
        })
        .await;
    let admin = empty(name).await;
    admin.batch_execute(&format!("GRANT CREATE ON DATABASE {name} TO {OWNER}")).await.expect("as there");
    admin.batch_execute(DATABASE).await.expect("a database like Supabase's");
    let url = cluster().await.url(name);
    let (_, place) = url.split_once('@').expect("user@host");
    let url = format!("postgres://{OWNER}:owner@{place}");
    Database { store: Store::new(&url, 4).await.expect("a URL"), name: name.to_owned(), admin, url }
}

/// Such a database, migrated by its owner.
pub async fn migrated_like_supabase(name: &str) -> Database {
    let database = like_supabase(name).await;
    database.store.migrate().await.expect("the migrations run as an owner who is no superuser");
    database
}
