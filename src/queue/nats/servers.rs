//! `NATS_URL`: which servers, and who logs in there.
//!
//! The login is taken out of the addresses at once: an address is logged by whoever tries to reach it, a login by nobody.

use async_nats::{ConnectOptions, ServerAddr};
use percent_encoding::percent_decode_str;
use url::Url;

use crate::secret::Secret;

/// The servers of one NATS, and the login for all of them.
#[derive(Debug, Clone, PartialEq)]
pub struct Servers {
    addresses: Vec<ServerAddr>,
    login: Login,
    tls: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Login {
    None,
    Token(Secret),
    User(Secret, Secret),
}

impl Servers {
    /// Reads a list of `nats://` or `tls://` addresses. No value in the complaint: it may hold a password.
    pub fn parse(text: &str) -> Result<Self, &'static str> {
        let (mut addresses, mut schemes, mut login) = (Vec::new(), Vec::new(), Login::None);
        for part in text.split(',').map(str::trim).filter(|part| !part.is_empty()) {
            let mut url = Url::parse(part).map_err(|_| "it is no URL; it begins with nats:// or tls://")?;
            if !matches!(url.scheme(), "nats" | "tls") {
                return Err("it begins with neither nats:// nor tls://");
            }
            if url.host_str().is_none_or(str::is_empty) {
                return Err("it names no host");
            }
            if !matches!(url.path(), "" | "/") || url.query().is_some() || url.fragment().is_some() {
                return Err("it has more than scheme, login, host and port");
            }
            let its = Login::of(&url)?;
            if its != Login::None && login != Login::None && its != login {
                return Err("its servers have different logins; one NATS has one login");
            }
            if its != Login::None {
                login = its;
            }
            let cleared = url.set_username("").and_then(|()| url.set_password(None));
            cleared.map_err(|()| "it names no host")?;
            schemes.push(url.scheme() == "tls");
            addresses.push(ServerAddr::from_url(url).map_err(|_| "it begins with neither nats:// nor tls://")?);
        }
        let tls = schemes.contains(&true);
        match schemes.first() {
            None => Err("it names no server"),
            // What one server of a cluster says of the others has no scheme, so it is all or nothing.
            Some(first) if schemes.iter().any(|scheme| scheme != first) => Err("it mixes nats:// and tls://"),
            Some(_) => Ok(Self { addresses, login, tls }),
        }
    }

    /// Whether a login is part of it.
    pub fn have_login(&self) -> bool {
        self.login != Login::None
    }

    pub(super) fn addresses(&self) -> Vec<ServerAddr> {
        self.addresses.clone()
    }

    pub(super) fn log_in(&self, options: ConnectOptions) -> ConnectOptions {
        let options = options.require_tls(self.tls);
        match &self.login {
            Login::None => options,
            Login::Token(token) => options.token(token.reveal().to_owned()),
            Login::User(user, password) => {
                options.user_and_password(user.reveal().to_owned(), password.reveal().to_owned())
            }
        }
    }
}

impl Login {
    fn of(url: &Url) -> Result<Self, &'static str> {
        let decoded = |text: &str| -> Result<Secret, &'static str> {
            let text = percent_decode_str(text).decode_utf8().map_err(|_| "its login is not UTF-8")?;
            text.parse().map_err(|_| "its login cannot be read")
        };
        match (url.username(), url.password()) {
            ("", None) => Ok(Self::None),
            ("", Some(_)) => Err("it has a password and no user"),
            (token, None) => Ok(Self::Token(decoded(token)?)),
            (user, Some(password)) => Ok(Self::User(decoded(user)?, decoded(password)?)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_login_is_taken_out_of_the_addresses_and_shown_nowhere() {
        let servers = Servers::parse("tls://u:p%40ss@a.example:4222, tls://b.example").expect("two servers");
        assert_eq!(servers.login, Login::User("u".parse().expect("any text"), "p@ss".parse().expect("any text")));
        assert!(servers.tls);
        let shown = format!("{servers:?}");
        assert!(shown.contains("a.example") && shown.contains("b.example"), "{shown}");
        assert!(!shown.contains("ss@") && !shown.contains("p%40"), "{shown}");
        let token = Servers::parse("nats://t0ken@a.example").expect("a server");
        assert!(token.have_login() && !token.tls && !format!("{token:?}").contains("t0ken"));
    }

    #[test]
    fn what_is_wrong_is_named_without_its_value() {
        for (text, complaint) in [
            ("", "names no server"),
            ("a.example:4222", "nats://"),
            ("http://a.example", "neither nats:// nor tls://"),
            ("nats://u:secret@a, nats://u:other@b", "different logins"),
            ("nats://a, tls://b", "mixes"),
            ("nats://:secret@a", "no user"),
            ("nats://u:secret@a/stream", "more than"),
        ] {
            let error = Servers::parse(text).expect_err(text);
            assert!(error.contains(complaint) && !error.contains("secret"), "{text}: {error}");
        }
    }
}
