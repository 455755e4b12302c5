//! An amount of money: decimal, so that no cent is lost, in a currency of ISO 4217.
//!
//! What comes in is checked against the currency: a yen has no parts and a dinar has a thousand. What comes from the table
//! is taken as it is, to a billionth: a dashboard may have written it.

use iso_currency::Currency;

use super::refusal::Refusal;

/// Most whole units.
const MAX_UNITS: i64 = 999_999_999_999;
const NANOS_PER_UNIT: i32 = 1_000_000_000;
/// Decimals of a billionth.
const NANO_DECIMALS: usize = 9;

/// An amount, not negative.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Money {
    currency: String,
    units: i64,
    nanos: i32,
}

impl Money {
    /// Checks an amount that a client sent in `field`: `units` and billionths of one. A currency without coins, such as
    /// gold, is counted in whole units.
    pub fn accept(field: &str, currency: &str, units: i64, nanos: i32) -> Result<Self, Refusal> {
        let path = |name: &str| format!("{field}.{name}");
        if currency.is_empty() {
            return Err(Refusal::missing(path("currency_code"), "three letters such as `TRY`"));
        }
        let known = is_code(currency).then(|| Currency::from_code(currency)).flatten();
        let known = known.ok_or_else(|| {
            Refusal::invalid(path("currency_code"), "it is no currency of ISO 4217 in three upper-case letters")
        })?;
        if !(0..=MAX_UNITS).contains(&units) {
            return Err(Refusal::out_of_range(path("units"), "it may be 0 to 999999999999"));
        }
        if !(0..NANOS_PER_UNIT).contains(&nanos) {
            return Err(Refusal::out_of_range(path("nanos"), "it may be 0 to 999999999"));
        }
        let smallest_coin = NANOS_PER_UNIT / 10_i32.pow(decimals(known).into());
        if nanos % smallest_coin != 0 {
            return Err(Refusal::invalid(path("nanos"), "it is finer than the currency's smallest coin"));
        }
        Ok(Self { currency: currency.to_owned(), units, nanos })
    }

    /// Reads a stored amount: `numeric` as PostgreSQL prints it, of any scale, and a code of three letters. What is finer
    /// than a billionth is dropped. None for what is no amount.
    pub fn from_decimal_text(text: &str, currency: &str) -> Option<Self> {
        let (whole, fraction) = text.split_once('.').unwrap_or((text, ""));
        let digits = |text: &str| text.bytes().all(|b| b.is_ascii_digit());
        if !is_code(currency) || whole.is_empty() || !digits(whole) || !digits(fraction) {
            return None;
        }
        let nanos: String = fraction.chars().chain(std::iter::repeat('0')).take(NANO_DECIMALS).collect();
        Some(Self { currency: currency.to_owned(), units: whole.parse().ok()?, nanos: nanos.parse().ok()? })
    }

    /// The amount with the decimals of its currency, and more only if it has them: `12.30`.
    pub fn as_decimal_text(&self) -> String {
        let nanos = format!("{:09}", self.nanos);
        let usual = Currency::from_code(&self.currency).map_or(0, |currency| decimals(currency).into());
        let decimals = nanos.trim_end_matches('0').len().max(usual);
        match &nanos[..decimals] {
            "" => self.units.to_string(),
            fraction => format!("{}.{fraction}", self.units),
        }
    }

    /// Three upper-case letters.
    pub fn currency(&self) -> &str {
        &self.currency
    }

    pub fn units(&self) -> i64 {
        self.units
    }

    /// Billionths of a unit.
    pub fn nanos(&self) -> i32 {
        self.nanos
    }
}

fn is_code(text: &str) -> bool {
    text.len() == 3 && text.bytes().all(|b| b.is_ascii_uppercase())
}

/// Decimals down to the smallest coin; ISO 4217 has none for what is not minted, and none with more than four.
fn decimals(currency: Currency) -> u8 {
    currency.exponent().and_then(|exponent| u8::try_from(exponent).ok()).unwrap_or(0).min(NANO_DECIMALS as u8)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::refusal::RefusalReason::{self, InvalidField, MissingField, OutOfRange};
    use proptest::prelude::*;

    fn accept(currency: &str, units: i64, nanos: i32) -> Result<Money, (RefusalReason, String)> {
        let accepted = Money::accept("confirm.sale_amount", currency, units, nanos);
        accepted.map_err(|refusal| (refusal.reason, refusal.field.into_owned()))
    }

    #[test]
    fn an_amount_is_as_fine_as_its_currency() {
        for (currency, units, nanos, text) in [
            ("TRY", 12, 300_000_000, "12.30"),
            ("EUR", 0, 0, "0.00"),
            ("USD", 999_999_999_999, 990_000_000, "999999999999.99"),
            ("JPY", 1200, 0, "1200"),
            ("KWD", 1, 5_000_000, "1.005"),
            ("CLF", 1, 100_000, "1.0001"),
            ("XAU", 3, 0, "3"),
        ] {
            let money = accept(currency, units, nanos).expect("it is an amount");
            assert_eq!((money.as_decimal_text().as_str(), money.currency()), (text, currency));
            assert_eq!(Money::from_decimal_text(text, currency), Some(money));
        }
    }

    #[test]
    fn what_is_no_amount_is_refused_by_its_field() {
        for (currency, units, nanos, reason, field) in [
            ("", 1, 0, MissingField, "currency_code"),
            ("ABC", 1, 0, InvalidField, "currency_code"),
            ("try", 1, 0, InvalidField, "currency_code"),
            ("TRY ", 1, 0, InvalidField, "currency_code"),
            ("₺₺₺", 1, 0, InvalidField, "currency_code"),
            ("TRY", -1, 0, OutOfRange, "units"),
            ("TRY", 1_000_000_000_000, 0, OutOfRange, "units"),
            ("TRY", 0, -1, OutOfRange, "nanos"),
            ("TRY", 0, 1_000_000_000, OutOfRange, "nanos"),
            ("TRY", 0, 1_000_000, InvalidField, "nanos"),
            ("JPY", 0, 500_000_000, InvalidField, "nanos"),
            ("KWD", 0, 500_000, InvalidField, "nanos"),
            ("XAU", 0, 1, InvalidField, "nanos"),
        ] {
            let expected = Err((reason, format!("confirm.sale_amount.{field}")));
            assert_eq!(accept(currency, units, nanos), expected, "{currency} {units} {nanos}");
        }
    }

    #[test]
    fn a_stored_amount_is_read_in_any_scale() {
        for (text, read) in [
            ("12.3", Some((12, 300_000_000))),
            ("12", Some((12, 0))),
            ("12.300000000000000000", Some((12, 300_000_000))),
            ("0.0000000019", Some((0, 1))),
            ("12.345", Some((12, 345_000_000))),
            ("-1", None),
            ("NaN", None),
            ("Infinity", None),
            ("", None),
            (".5", None),
            ("1e5", None),
            ("99999999999999999999", None),
        ] {
            let money = Money::from_decimal_text(text, "TRY");
            assert_eq!(money.map(|money| (money.units(), money.nanos())), read, "{text}");
        }
        assert_eq!(Money::from_decimal_text("1", "try"), None);
        let unknown = Money::from_decimal_text("1.50", "QQQ").map(|money| money.as_decimal_text());
        assert_eq!(unknown.as_deref(), Some("1.5"));
    }

    proptest! {
        #[test]
        fn text_and_amount_are_the_same(units in 0..=MAX_UNITS, nanos in 0..NANOS_PER_UNIT, zeros in 0..5usize) {
            let coins = |smallest: i32| nanos - nanos % smallest;
            for (currency, nanos) in [("TRY", coins(10_000_000)), ("JPY", 0), ("KWD", coins(1_000_000))] {
                let money = accept(currency, units, nanos).expect("it is an amount");
                let mut text = money.as_decimal_text();
                prop_assert_eq!(Money::from_decimal_text(&text, currency), Some(money.clone()));
                if text.contains('.') {
                    text.push_str(&"0".repeat(zeros));
                }
                prop_assert_eq!(Money::from_decimal_text(&text, currency), Some(money));
            }
            let stored = Money { currency: "TRY".to_owned(), units, nanos };
            prop_assert_eq!(Money::from_decimal_text(&stored.as_decimal_text(), "TRY"), Some(stored));
        }

        #[test]
        fn no_text_panics(text in any::<String>(), currency in any::<String>(), units in any::<i64>(), nanos in any::<i32>()) {
            let _ = Money::from_decimal_text(&text, "TRY");
            let _ = Money::accept("m", &currency, units, nanos);
            let _ = Money::accept("m", "TRY", units, nanos);
        }
    }
}
