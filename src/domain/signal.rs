//! Signals and the score: how good a lead is, 0–100.
//!
//! A signal is a fact that an event (or the session's history) raises. A set of signals is a bit mask and union is OR,
//! so a score never depends on order or repetition. The score is the sum of the points of the distinct signals, capped.

use std::fmt;

/// The highest score.
pub const MAX_SCORE: u8 = 100;

/// A fact that speaks for a lead. The discriminant is its bit in `signals` columns: never renumber.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum Signal {
    /// A call or WhatsApp message was begun, or a telephone call was matched.
    PrimaryConversion = 0,
    /// Any event of category `interaction`.
    Interaction = 1,
    /// Half of a page was scrolled.
    Scroll50 = 2,
    /// Nine tenths of a page were scrolled; raises [`Signal::Scroll50`] as well.
    Scroll90 = 3,
    /// The pointer rested on a call to action.
    HoverIntent = 4,
    /// The visitor came from a Google search page.
    GoogleReferrer = 5,
    /// The session is Ads-Assisted: a returning visitor whose earlier visit was paid for.
    ReturningAdsAssisted = 6,
}

impl Signal {
    /// Every signal, in the order of its bit.
    pub const ALL: [Self; 7] = [
        Self::PrimaryConversion,
        Self::Interaction,
        Self::Scroll50,
        Self::Scroll90,
        Self::HoverIntent,
        Self::GoogleReferrer,
        Self::ReturningAdsAssisted,
    ];

    /// What it adds to the score.
    pub const fn points(self) -> u8 {
        match self {
            Self::PrimaryConversion => 50,
            Self::Interaction | Self::Scroll50 => 10,
            Self::Scroll90 => 20,
            Self::HoverIntent => 15,
            Self::GoogleReferrer => 5,
            Self::ReturningAdsAssisted => 25,
        }
    }

    /// Its name in JSON, logs and `provenance`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::PrimaryConversion => "primary_conversion",
            Self::Interaction => "interaction",
            Self::Scroll50 => "scroll_50",
            Self::Scroll90 => "scroll_90",
            Self::HoverIntent => "hover_intent",
            Self::GoogleReferrer => "google_referrer",
            Self::ReturningAdsAssisted => "returning_ads_assisted",
        }
    }

    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|signal| signal.name() == name)
    }

    const fn bit(self) -> i32 {
        1 << self as u8
    }
}

/// A set of signals. Union is the merge.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct SignalSet(i32);

impl SignalSet {
    pub const EMPTY: Self = Self(0);

    /// The set in a `signals` column; bits that mean nothing are dropped.
    pub fn from_bits(bits: i32) -> Self {
        let known = Signal::ALL.iter().fold(0, |mask, signal| mask | signal.bit());
        Self(bits & known)
    }

    pub const fn bits(self) -> i32 {
        self.0
    }

    /// This set and `signal`; nine tenths scrolled are also one half scrolled.
    #[must_use]
    pub const fn with(self, signal: Signal) -> Self {
        let implied = match signal {
            Signal::Scroll90 => Signal::Scroll50.bit(),
            _ => 0,
        };
        Self(self.0 | signal.bit() | implied)
    }

    #[must_use]
    pub const fn without(self, signal: Signal) -> Self {
        Self(self.0 & !signal.bit())
    }

    #[must_use]
    pub const fn union(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    pub const fn contains(self, signal: Signal) -> bool {
        self.0 & signal.bit() != 0
    }

    pub fn iter(self) -> impl Iterator<Item = Signal> {
        Signal::ALL.into_iter().filter(move |signal| self.contains(*signal))
    }

    /// As it is kept beside a frozen score: `[{"signal": name, "points": n}, …]`.
    pub fn breakdown(self) -> serde_json::Value {
        self.iter().map(|signal| serde_json::json!({"signal": signal.name(), "points": signal.points()})).collect()
    }

    /// The set that such a breakdown shows; what it does not know counts as absent.
    pub fn from_breakdown(breakdown: &serde_json::Value) -> Self {
        let lines = breakdown.as_array().map(Vec::as_slice).unwrap_or_default();
        lines.iter().filter_map(|line| Signal::from_name(line.get("signal")?.as_str()?)).collect()
    }

    pub fn score(self) -> Score {
        let sum: u16 = self.iter().map(|signal| u16::from(signal.points())).sum();
        Score(u8::try_from(sum).unwrap_or(MAX_SCORE).min(MAX_SCORE))
    }
}

impl FromIterator<Signal> for SignalSet {
    fn from_iter<I: IntoIterator<Item = Signal>>(signals: I) -> Self {
        signals.into_iter().fold(Self::EMPTY, Self::with)
    }
}

impl fmt::Debug for SignalSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.iter()).finish()
    }
}

impl serde::Serialize for SignalSet {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_i32(self.0)
    }
}

impl<'de> serde::Deserialize<'de> for SignalSet {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        i32::deserialize(deserializer).map(Self::from_bits)
    }
}

/// 0–100. Only a [`SignalSet`] makes one, so a score always has a breakdown.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct Score(u8);

impl Score {
    pub const fn get(self) -> u8 {
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn points_are_those_of_the_design() {
        let score = |signals: &[Signal]| signals.iter().copied().collect::<SignalSet>().score().get();
        assert_eq!(score(&[]), 0);
        assert_eq!(score(&[Signal::PrimaryConversion]), 50);
        assert_eq!(score(&[Signal::Scroll90]), 30, "90 % raises 50 % as well");
        assert_eq!(score(&[Signal::Scroll90, Signal::Scroll50]), 30);
        assert_eq!(score(&[Signal::HoverIntent, Signal::GoogleReferrer, Signal::ReturningAdsAssisted]), 45);
        assert_eq!(score(&Signal::ALL), 100, "the sum is 135, the cap 100");
    }

    proptest! {
        #[test]
        fn union_is_a_merge_and_the_score_only_grows(a: i32, b: i32, c: i32) {
            let [a, b, c] = [a, b, c].map(SignalSet::from_bits);
            prop_assert_eq!(a.union(b), b.union(a));
            prop_assert_eq!(a.union(b).union(c), a.union(b.union(c)));
            prop_assert_eq!(a.union(a), a);
            prop_assert!(a.union(b).score() >= a.score());
            let whole: SignalSet = a.iter().collect();
            prop_assert_eq!(whole.union(a), whole);
            prop_assert_eq!(SignalSet::from_breakdown(&whole.breakdown()), whole);
        }
    }
}
