//! A calendar month in UTC: the partition key of `sessions` and `events`.
//!
//! A month is written as its first day, `YYYY-MM-01`, on the wire, in SQL and in names. No other day can be put
//! into a [`Month`], so a partition key is right by construction.

use std::fmt;
use std::str::FromStr;

use chrono::{DateTime, Datelike, Days, Months, NaiveDate, TimeZone, Utc};
use serde::{Deserialize, Serialize};

/// The first day of a calendar month, UTC.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Month(NaiveDate);

/// The text is not a month (`YYYY-MM-01`, or a longer ISO date or time in it).
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("not a month, expected YYYY-MM-01")]
pub struct NotAMonth;

impl Month {
    /// The month in which an instant falls, in UTC.
    pub fn of(instant: DateTime<Utc>) -> Self {
        Self::containing(instant.date_naive())
    }

    /// The month to which a day belongs.
    pub fn containing(day: NaiveDate) -> Self {
        Self(day.with_day(1).unwrap_or(day))
    }

    /// Its first day.
    pub fn first_day(self) -> NaiveDate {
        self.0
    }

    /// Its first instant.
    pub fn start(self) -> DateTime<Utc> {
        Utc.from_utc_datetime(&self.0.and_time(chrono::NaiveTime::MIN))
    }

    /// The month `n` later (earlier for a negative `n`); it stays at the calendar's end when there is none.
    pub fn plus(self, n: i32) -> Self {
        let moved = match u32::try_from(n) {
            Ok(ahead) => self.0.checked_add_months(Months::new(ahead)),
            Err(_) => self.0.checked_sub_months(Months::new(n.unsigned_abs())),
        };
        Self(moved.unwrap_or(self.0))
    }

    pub fn next(self) -> Self {
        self.plus(1)
    }

    pub fn previous(self) -> Self {
        self.plus(-1)
    }

    /// The months in which a session may live that an event of `arrival` belongs to, ascending: the month of
    /// arrival and its two neighbours.
    pub fn neighbourhood(arrival: Self) -> [Self; 3] {
        [arrival.previous(), arrival, arrival.next()]
    }

    /// The month for a session that is not stored yet, from the tracker's hint `sm` and the arrival.
    ///
    /// The hint holds if it is the month of arrival, the one before, or (for a clock that runs ahead) the one after
    /// when the arrival is within a day of the boundary. Any other hint is ignored.
    pub fn for_new_session(hint: Option<Self>, received_at: DateTime<Utc>) -> Self {
        let arrival = Self::of(received_at);
        match hint {
            Some(month) if month == arrival || month == arrival.previous() => month,
            Some(month) if month == arrival.next() && Self::of(received_at + Days::new(1)) == month => month,
            _ => arrival,
        }
    }
}

impl fmt::Display for Month {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0.format("%Y-%m-%d"))
    }
}

impl fmt::Debug for Month {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Month({self})")
    }
}

impl FromStr for Month {
    type Err = NotAMonth;

    /// Reads `YYYY-MM-01`; also any day or ISO time of the month, and `YYYY-MM`, as older trackers send them.
    fn from_str(text: &str) -> Result<Self, NotAMonth> {
        let text = text.trim();
        let day = match (text.len(), text.get(..10)) {
            (7, _) => NaiveDate::parse_from_str(&format!("{text}-01"), "%Y-%m-%d"),
            (_, Some(day)) => NaiveDate::parse_from_str(day, "%Y-%m-%d"),
            _ => return Err(NotAMonth),
        }
        .map_err(|_| NotAMonth)?;
        if (1970..=9999).contains(&day.year()) { Ok(Self::containing(day)) } else { Err(NotAMonth) }
    }
}

impl Serialize for Month {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Month {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = std::borrow::Cow::<'de, str>::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(text: &str) -> DateTime<Utc> {
        text.parse().expect("a test's own instant")
    }

    fn month(text: &str) -> Month {
        text.parse().expect("a test's own month")
    }

    #[test]
    fn a_month_is_its_first_day_in_utc() {
        assert_eq!(Month::of(at("2026-01-31T23:59:59.999Z")).to_string(), "2026-01-01");
        assert_eq!(Month::of(at("2026-02-01T02:00:00+03:00")).to_string(), "2026-01-01");
        assert_eq!(month("2026-12-01").next().to_string(), "2027-01-01");
        assert_eq!(month("2026-01").previous().to_string(), "2025-12-01");
        assert_eq!(month("2026-01-17T10:00:00Z"), month("2026-01-01"));
        for bad in ["", "2026", "2026-13-01", "yesterday", "2026-1-1", "é-01-01-01-", "0000-01-01"] {
            assert!(bad.parse::<Month>().is_err(), "{bad}");
        }
    }

    #[test]
    fn a_hint_is_a_hint_and_never_the_truth() {
        let new = |hint: &str, received: &str| Month::for_new_session(hint.parse().ok(), at(received)).to_string();
        assert_eq!(new("2026-02-01", "2026-02-14T00:00:00Z"), "2026-02-01");
        assert_eq!(new("2026-01-01", "2026-02-28T23:00:00Z"), "2026-01-01", "the month before holds");
        assert_eq!(new("2026-03-01", "2026-02-28T23:00:00Z"), "2026-03-01", "the next, within a day");
        assert_eq!(new("2026-03-01", "2026-02-26T23:00:00Z"), "2026-02-01", "the next, too early");
        assert_eq!(new("2025-12-01", "2026-02-01T00:00:00Z"), "2026-02-01", "two months back");
        assert_eq!(new("2030-01-01", "2026-02-01T00:00:00Z"), "2026-02-01");
        assert_eq!(new("rubbish", "2026-02-01T00:00:00Z"), "2026-02-01");
    }
}
