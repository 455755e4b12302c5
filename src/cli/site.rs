//! `opsmantik site`: the tenants.

use anyhow::{Context, bail};
use clap::Subcommand;
use serde_json::json;
use uuid::Uuid;

use super::Database;
use super::output::print_json;
use crate::domain::origin::{parse_domain, parse_extra_origin};
use crate::domain::site::Site as StoredSite;
use crate::domain::telephone;
use crate::store::sites::NewSite;

/// Add and list sites.
#[derive(Debug, Subcommand)]
pub(super) enum Site {
    /// Add a site; prints its id and the public id for the tracker snippet
    Add {
        #[command(flatten)]
        database: Database,
        /// What people call it
        #[arg(long)]
        name: String,
        /// Its host, `example.com`; the domain and its subdomains may send events
        #[arg(long)]
        domain: String,
        /// A further origin that may send events, `https://shop.example.net`; may be given more than once. `*` allows every origin
        #[arg(long = "origin", value_name = "ORIGIN")]
        origins: Vec<String>,
        /// The id in the tracker snippet: 1–64 letters, digits, `-` or `_`. Made up if not given
        #[arg(long)]
        public_id: Option<String>,
        /// The user who owns it (UUID of the Supabase user)
        #[arg(long)]
        owner: Option<Uuid>,
        /// Country in which a national telephone number of its calls is read: two letters of ISO 3166, `TR`
        #[arg(long)]
        region: Option<String>,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// List all sites
    List {
        #[command(flatten)]
        database: Database,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
}

impl Site {
    pub(super) async fn run(self) -> anyhow::Result<()> {
        match self {
            Self::Add { database, name, domain, origins, public_id, owner, region, json } => {
                let new = NewSite {
                    public_id: public_id.map_or_else(|| Ok(made_up()), checked)?,
                    owner,
                    name: named(&name)?,
                    domain: parse_domain(&domain).with_context(|| format!("--domain `{domain}` is no host name"))?,
                    origins: origins
                        .iter()
                        .map(|origin| {
                            parse_extra_origin(origin)
                                .with_context(|| format!("--origin `{origin}` is neither scheme://host[:port] nor *"))
                        })
                        .collect::<Result<_, _>>()?,
                    region: region.map(country).transpose()?,
                };
                let added = database.store().await?.add_site(&new).await?;
                let Some(site) = added else { bail!("--public-id `{}` is taken by another site", new.public_id) };
                if json { print_json(&shown(&site, &new.name)) } else { print_site(&site, &new.name) }
            }
            Self::List { database, json } => {
                let sites = database.store().await?.list_sites().await?;
                if json {
                    return print_json(&sites.iter().map(|(site, name)| shown(site, name)).collect::<Vec<_>>());
                }
                sites.iter().try_for_each(|(site, name)| print_site(site, name))
            }
        }
    }
}

fn shown(site: &StoredSite, name: &str) -> serde_json::Value {
    json!({"id": site.id, "public_id": site.public_id, "name": name, "domain": site.domain, "origins": site.origins, "region": site.region})
}

fn print_site(site: &StoredSite, name: &str) -> anyhow::Result<()> {
    say!("{}  {}  {}  {}  {}", site.id, site.public_id, site.domain, name, site.origins.join(" "))
}

fn named(name: &str) -> anyhow::Result<String> {
    match crate::domain::text::clean_line(name, 200) {
        Some(name) => Ok(name),
        None => bail!("--name is empty"),
    }
}

fn country(region: String) -> anyhow::Result<String> {
    let region = region.trim().to_ascii_uppercase();
    if !telephone::is_region(&region) {
        bail!("--region `{region}` is no country of ISO 3166 with telephone numbers, in two letters, such as TR");
    }
    Ok(region)
}

fn checked(public_id: String) -> anyhow::Result<String> {
    let fits = public_id.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_".contains(&b));
    if !fits || !(1..=64).contains(&public_id.len()) {
        bail!("--public-id `{public_id}` is not 1–64 letters, digits, `-` or `_`");
    }
    if Uuid::try_parse(&public_id).is_ok() {
        bail!("--public-id must not look like a UUID: sites are addressed by those, too");
    }
    Ok(public_id)
}

/// Ten letters and digits without lookalikes: 32^10, so a stranger does not guess one by trying.
fn made_up() -> String {
    const LETTERS: [u8; 32] = *b"abcdefghijkmnpqrstuvwxyz23456789";
    (0..10).map(|_| char::from(LETTERS[rand::random_range(0..LETTERS.len())])).collect()
}
