//! Telephone numbers: whatever a provider, a page or a WhatsApp link writes, as E.164.
//!
//! Numbers are compared as text, so one number must have one text. The text is read here, strictly: digits, a leading
//! plus, the usual separators, the schemes and parameters of RFC 3966, and nothing else; a letter is never a digit.
//! Only clean digits reach the library that knows the countries' numbering plans, which is asked for three things: the
//! country code, the prefix for dialling abroad, and the trunk prefix to drop.
//!
//! A number is accepted when its country code exists and it has a plausible length, 4 to 15 digits in all. Whether it
//! is in service is not asked: numbers reserved for fiction, and plans younger than the library, are numbers as well.

use std::panic::catch_unwind;
use std::str::FromStr;

use percent_encoding::percent_decode_str;
use phonenumber::metadata::DATABASE;
use phonenumber::{Metadata, country};
use serde::{Deserialize, Serialize};
use url::Url;

/// Longest text that is looked at, in bytes: room for any number with its parameters.
const MAX_TEXT: usize = 256;
/// Digits of a number with the longest prefixes that one dials before it.
const MAX_DIALLED: usize = 22;
/// Digits of a number with its country code. E.164 allows 15; below 4 it is a short code of nobody's country.
const DIGITS: std::ops::RangeInclusive<usize> = 4..=15;
/// Digits behind the country code: emergency and service numbers have three.
const MIN_NATIONAL: usize = 3;

/// Words that a telephone's keys spell where a caller hides: some providers send `+266696687` for "anonymous".
const SPELLED: [(&str, &str); 5] = [
    ("anonymous", "+266696687"),
    ("blocked", "+2562533"),
    ("restricted", "+7378742833"),
    ("unavailable", "+86282452253"),
    ("unknown", "+8656696"),
];

/// A telephone number in E.164: a plus, the country code and the rest, digits only.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct E164(String);

/// The text is not E.164.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not a telephone number in E.164")]
pub struct NotE164;

impl E164 {
    /// Reads a number as people and providers write it. A national number is one of `region` (ISO 3166), and none
    /// without it. What was read once reads as itself in every region.
    pub fn read(text: &str, region: Option<&str>) -> Option<Self> {
        let number = Written::of(text)?;
        // The library has panicked on odd input before; a number that it cannot read is no number.
        catch_unwind(|| if number.international { settle(&number.digits) } else { national(&number.digits, region?) })
            .ok()?
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The last two digits: enough for a person who listens back, too few to find anybody.
    pub fn last_digits(&self) -> &str {
        &self.0[self.0.len() - 2..]
    }
}

/// Reads strict E.164, as it is stored; see [`E164::read`] for everything else.
impl FromStr for E164 {
    type Err = NotE164;

    fn from_str(text: &str) -> Result<Self, NotE164> {
        let digits = text.strip_prefix('+').filter(|digits| !digits.starts_with('0')).ok_or(NotE164)?;
        let whole = (2..=*DIGITS.end()).contains(&digits.len()) && digits.bytes().all(|b| b.is_ascii_digit());
        if whole { Ok(Self(text.to_owned())) } else { Err(NotE164) }
    }
}

impl TryFrom<String> for E164 {
    type Error = NotE164;

    fn try_from(text: String) -> Result<Self, NotE164> {
        text.parse()
    }
}

impl From<E164> for String {
    fn from(number: E164) -> Self {
        number.0
    }
}

/// Whether numbers can be read in this region: two capital letters of ISO 3166 whose numbering plan is known.
pub fn is_region(region: &str) -> bool {
    region.len() == 2 && region.parse::<country::Id>().is_ok_and(|id| DATABASE.by_id(id.as_ref()).is_some())
}

/// The caller's number. None for a caller who hides it, in words or on the keys, and for text that is no number.
pub fn caller(text: &str, region: Option<&str>) -> Option<E164> {
    let spelled = |number: &E164| SPELLED.iter().any(|(_, digits)| *digits == number.as_str());
    E164::read(text, region).filter(|number| !spelled(number))
}

/// The number that a click names: a `tel:` link, a bare number, or a WhatsApp link, whose numbers are international
/// with or without a plus.
pub fn clicked(label: &str, region: Option<&str>) -> Option<E164> {
    match whatsapp_link(label) {
        Some(link) => {
            let number = Written::of(&whatsapp_number(&link)?)?;
            let digits = number.digits.strip_prefix("00").unwrap_or(&number.digits);
            catch_unwind(|| settle(digits)).ok()?
        }
        None => E164::read(label, region),
    }
}

/// Whether a label is a link to a WhatsApp chat, with a number in it or without.
pub fn is_whatsapp_link(label: &str) -> bool {
    whatsapp_link(label).is_some()
}

fn whatsapp_link(label: &str) -> Option<Url> {
    let label = label.trim();
    let link = Url::parse(label).ok().filter(Url::has_host).or_else(|| Url::parse(&format!("https://{label}")).ok())?;
    let host = link.host_str()?.trim_start_matches("www.").to_owned();
    match link.scheme() {
        "whatsapp" => Some(link),
        "http" | "https" if matches!(host.as_str(), "wa.me" | "whatsapp.com") => Some(link),
        "http" | "https" if matches!(host.as_str(), "api.whatsapp.com" | "web.whatsapp.com") => Some(link),
        _ => None,
    }
}

fn whatsapp_number(link: &Url) -> Option<String> {
    let named = link.query_pairs().find(|(key, _)| key.eq_ignore_ascii_case("phone"));
    named.map(|(_, number)| number.into_owned()).or_else(|| {
        let path = link.path().trim_matches('/');
        Some(percent_decode_str(path).decode_utf8().ok()?.into_owned())
    })
}

/// What was written, as digits: nothing is known of them yet but whether a plus stood before them.
struct Written {
    international: bool,
    digits: String,
}

impl Written {
    fn of(text: &str) -> Option<Self> {
        let text = text.trim();
        if text.len() > MAX_TEXT {
            return None;
        }
        let decoded = match text.split_once(':') {
            Some((scheme, rest)) if ["tel", "callto", "whatsapp"].iter().any(|s| s.eq_ignore_ascii_case(scheme)) => {
                let rest = percent_decode_str(rest).decode_utf8().ok()?.into_owned();
                // Behind a comma stands what is to be dialled once somebody has answered.
                rest.trim_start_matches('/').split([',', '?']).next().unwrap_or_default().to_owned()
            }
            _ => text.to_owned(),
        };
        let mut parts = decoded.split(';');
        let mut number = Self::normalised(parts.next()?)?;
        // A local number names what it is local to: `tel:331-6005;phone-context=+64-3`.
        let context = parts.find_map(|part| {
            let (key, value) = part.split_once('=')?;
            key.trim().eq_ignore_ascii_case("phone-context").then(|| Self::normalised(value))?
        });
        if let Some(context) = context.filter(|context| context.international && !number.international) {
            number = Self { international: true, digits: context.digits + &number.digits };
        }
        (DIGITS.start()..=&MAX_DIALLED).contains(&&number.digits.len()).then_some(number)
    }

    fn normalised(text: &str) -> Option<Self> {
        let mut number = Self { international: false, digits: String::new() };
        for character in text.chars() {
            match character {
                '+' | '\u{FF0B}' if !number.international && number.digits.is_empty() => number.international = true,
                '.' | '/' | '(' | ')' | '[' | ']' | '~' | '-' | '\u{AD}' | '\u{2212}' | '\u{FEFF}' => {}
                // Dashes, marks of no width and of direction, full-width punctuation.
                '\u{2010}'..='\u{2015}'
                | '\u{200B}'..='\u{200F}'
                | '\u{202A}'..='\u{202E}'
                | '\u{2060}'..='\u{2069}' => {}
                '\u{FF08}' | '\u{FF09}' | '\u{FF0D}'..='\u{FF0F}' | '\u{30FC}' => {}
                _ if character.is_whitespace() => {}
                _ => number.digits.push(digit(character)?),
            }
        }
        Some(number)
    }
}

/// A decimal digit of the scripts in which telephone numbers are written.
fn digit(character: char) -> Option<char> {
    let zero = match character {
        '0'..='9' => '0',
        '\u{0660}'..='\u{0669}' => '\u{0660}',
        '\u{06F0}'..='\u{06F9}' => '\u{06F0}',
        '\u{0966}'..='\u{096F}' => '\u{0966}',
        '\u{FF10}'..='\u{FF19}' => '\u{FF10}',
        _ => return None,
    };
    char::from_digit(u32::from(character) - u32::from(zero), 10)
}

/// Digits dialled within a region.
fn national(digits: &str, region: &str) -> Option<E164> {
    let region: country::Id = region.trim().to_ascii_uppercase().parse().ok()?;
    let plan = DATABASE.by_id(region.as_ref())?;
    if let Some(abroad) = plan.international_prefix().and_then(|prefix| prefix.find(digits)).filter(|m| m.start() == 0)
        && !digits[abroad.end()..].starts_with('0')
    {
        return settle(&digits[abroad.end()..]);
    }
    // The prefix that the ITU recommends, and that providers write wherever they are. No national number begins with it.
    if let Some(abroad) = digits.strip_prefix("00").filter(|rest| !rest.starts_with('0')) {
        return settle(abroad);
    }
    // One trunk prefix, and only where the number does not need it: the library may drop the same digit twice.
    let fits = |rest: &str| fits(plan, rest);
    let trunk = plan.national_prefix().and_then(|prefix| digits.strip_prefix(prefix));
    let rest = match trunk.filter(|rest| fits(rest) && !fits(digits)) {
        Some(rest) => rest.to_owned(),
        None => {
            let read = phonenumber::parse(Some(region), digits).ok()?.national().to_string();
            if fits(digits) && !fits(&read) { digits.to_owned() } else { read }
        }
    };
    settle(&format!("{}{rest}", plan.country_code()))
}

/// Digits that begin with a country code, brought to the form that stays as it is.
fn settle(digits: &str) -> Option<E164> {
    let mut digits = digits.to_owned();
    for _ in 0..4 {
        let next = without_trunk_prefix(&digits)?;
        if next == digits {
            return DIGITS.contains(&digits.len()).then(|| E164(format!("+{digits}")));
        }
        digits = next;
    }
    None
}

/// `+44 (0)20 …` without its zero; a number that fits its country's plan is left alone.
fn without_trunk_prefix(digits: &str) -> Option<String> {
    let (plans, national) = (1..=3.min(digits.len())).find_map(|at| {
        let (code, national) = digits.split_at(at);
        let code = code.parse().ok().filter(|_| !code.starts_with('0'))?;
        Some((DATABASE.by_code::<u16>(&code)?, national))
    })?;
    if national.len() < MIN_NATIONAL {
        return None;
    }
    if plans.iter().any(|plan| fits(plan, national)) {
        return Some(digits.to_owned());
    }
    // Without a region: with one, the library looks for that region's prefixes behind the plus.
    let read = phonenumber::parse(None, format!("+{digits}")).ok()?;
    Some(format!("{}{}", read.code().value(), read.national()))
}

/// Whether digits behind a country code have a beginning and a length that the country's plan knows. The library's own
/// check looks at the beginning only.
fn fits(plan: &Metadata, national: &str) -> bool {
    let kinds = plan.descriptors();
    let known = [
        kinds.fixed_line(),
        kinds.mobile(),
        kinds.toll_free(),
        kinds.premium_rate(),
        kinds.shared_cost(),
        kinds.personal_number(),
        kinds.voip(),
        kinds.pager(),
        kinds.uan(),
        kinds.voicemail(),
    ];
    let long = |length: &u16| usize::from(*length) == national.len();
    known.into_iter().flatten().any(|kind| kind.possible_length().iter().any(long))
        && kinds.general().is_match(national)
}

#[cfg(test)]
#[path = "telephone_tests.rs"]
mod tests;
