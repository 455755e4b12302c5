//! Lengths of time, as people write them on the command line: `90d`, `12h`, `30m`.

use std::time::Duration;

/// Nobody means a longer one: a hundred years.
pub(super) const LONGEST: Duration = Duration::from_secs(100 * 366 * 86_400);

/// A whole number of seconds, minutes, hours, days or weeks, more than none.
pub(super) fn read(text: &str) -> Option<Duration> {
    let text = text.trim();
    let (number, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    let unit = match unit {
        "s" => 1,
        "m" => 60,
        "h" => 3_600,
        "d" => 86_400,
        "w" => 7 * 86_400,
        _ => return None,
    };
    let number = number.bytes().all(|byte| byte.is_ascii_digit()).then(|| number.parse::<u64>().ok())??;
    let time = Duration::from_secs(number.checked_mul(unit)?);
    (!time.is_zero() && time <= LONGEST).then_some(time)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_read_as_people_write_them() {
        for (text, seconds) in [("90d", 7_776_000), ("12h", 43_200), (" 30m ", 1800), ("2w", 1_209_600), ("1s", 1)] {
            assert_eq!(read(text), Some(Duration::from_secs(seconds)), "{text}");
        }
        for bad in ["", "d", "0d", "-1d", "+1d", "1.5h", "1", "1y", "d1", "\u{fc}", "99999999999999999999d", "4000000w"]
        {
            assert_eq!(read(bad), None, "{bad}");
        }
    }
}
