//! Text and JSON from outside, made fit for PostgreSQL once, at the door.
//!
//! PostgreSQL refuses NUL in `text` and `\u0000` in `jsonb`; an index entry and a page have limits. So text is *cleaned*
//! (NUL removed, surrounding white space trimmed) and *cut* at a character boundary, never refused: a visitor's click is worth more than
//! the tail of a label.

use std::borrow::Cow;

use serde_json::{Map, Value};

/// Longest page URL, in bytes. The wire contract of `/api/sync`.
pub const MAX_URL: usize = 4096;
/// Longest referrer, in bytes.
pub const MAX_REFERRER: usize = 2048;
/// Longest label, in bytes.
pub const MAX_LABEL: usize = 1024;
/// Longest short text (category, action, click id, UTM value, city …), in bytes. Well below the 2,700 bytes that a
/// B-tree entry may have.
pub const MAX_SHORT: usize = 512;

/// `text` without NUL and surrounding white space, at most `max` bytes, cut at a character boundary.
pub fn clean(text: &str, max: usize) -> String {
    let whole = if text.contains('\0') { Cow::Owned(text.replace('\0', "")) } else { Cow::Borrowed(text) };
    let end = (0..=max.min(whole.len())).rev().find(|at| whole.is_char_boundary(*at)).unwrap_or(0);
    whole[..end].trim().to_owned()
}

/// As [`clean_some`], on one line and without characters that steer a terminal: for names that a command prints.
pub fn clean_line(text: &str, max: usize) -> Option<String> {
    let line: String = text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    clean_some(&line, max)
}

/// As [`clean`], but nothing at all when nothing is left.
pub fn clean_some(text: &str, max: usize) -> Option<String> {
    let cleaned = clean(text, max);
    (!cleaned.is_empty()).then_some(cleaned)
}

/// Deepest nesting of kept JSON. Below it a value is kept as the text that it was, so that what was accepted here can be read again wherever it
/// travels: a job and a dead letter wrap it in a few more levels, and parsers stop at 128.
const MAX_DEPTH: usize = 64;

/// JSON that PostgreSQL takes as `jsonb`: no NUL in any key or string, and nested no deeper than 64 levels.
pub fn clean_json(value: Value) -> Value {
    clean_below(value, MAX_DEPTH)
}

fn clean_below(value: Value, depth: usize) -> Value {
    match value {
        Value::String(text) if text.contains('\0') => Value::String(text.replace('\0', "")),
        // Cleaned before it is printed: in its text a backslash stands for itself, too.
        Value::Array(_) | Value::Object(_) if depth == 0 => Value::String(clean_below(value, usize::MAX).to_string()),
        Value::Array(items) => Value::Array(items.into_iter().map(|item| clean_below(item, depth - 1)).collect()),
        Value::Object(map) => Value::Object(clean_map_below(map, depth)),
        other => other,
    }
}

/// Whether [`clean_below`] would leave it as it is, as far as that can be told without going down.
fn is_clean(value: &Value, depth: usize) -> bool {
    match value {
        Value::String(text) => !text.contains('\0'),
        Value::Array(items) => items.is_empty() && depth > 0,
        Value::Object(map) => map.is_empty() && depth > 0,
        Value::Null | Value::Bool(_) | Value::Number(_) => true,
    }
}

fn clean_map_below(map: Map<String, Value>, depth: usize) -> Map<String, Value> {
    if map.iter().all(|(key, value)| !key.contains('\0') && is_clean(value, depth - 1)) {
        return map;
    }
    map.into_iter().map(|(key, value)| (key.replace('\0', ""), clean_below(value, depth - 1))).collect()
}

/// As [`clean_json`], for an object.
pub fn clean_map(map: Map<String, Value>) -> Map<String, Value> {
    clean_map_below(map, MAX_DEPTH)
}

/// A scalar as text: a string as it is, a number or boolean printed; nothing for null, arrays and objects.
pub fn scalar(value: &Value) -> Option<String> {
    match value {
        Value::String(text) => Some(text.clone()),
        Value::Number(number) => Some(number.to_string()),
        Value::Bool(flag) => Some(flag.to_string()),
        Value::Null | Value::Array(_) | Value::Object(_) => None,
    }
}

/// A number, or text that is one (`"42"`, `" 1.5 "`, `"1,5"`); only finite ones.
pub fn number(value: &Value) -> Option<f64> {
    match value {
        Value::Number(number) => number.as_f64(),
        Value::String(text) => text.trim().replace(',', ".").parse().ok(),
        _ => None,
    }
    .filter(|number: &f64| number.is_finite())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn text_is_cleaned_and_cut_at_a_character() {
        assert_eq!(clean(" a\0b ", 10), "ab");
        assert_eq!(clean("ağaç", 2), "a", "ğ has two bytes");
        assert_eq!(clean("ağaç", 3), "ağ");
        assert_eq!(clean_some("\0 \0", 10), None);
        assert_eq!(clean_line(" a\nb\u{1b}[31m\t", 20).as_deref(), Some("a b [31m"));
    }

    #[test]
    fn json_loses_every_nul() {
        let dirty = json!({"a\u{0}": ["x\u{0}y", {"\u{0}": 1.5}], "n": null});
        assert_eq!(clean_json(dirty), json!({"a": ["xy", {"": 1.5}], "n": null}));
    }

    #[test]
    fn what_is_nested_too_deeply_is_kept_as_text() {
        let deep = (0..120).fold(json!("x"), |inner, _| json!([inner]));
        let kept = clean_json(json!({ "a": deep }));
        let depth = kept.to_string().split('"').nth(2).map_or(0, |opening| opening.matches('[').count());
        assert_eq!(depth, MAX_DEPTH - 1);
        assert!(kept.to_string().contains("x"), "nothing is lost");
        assert_eq!(clean_json(kept.clone()), kept);
    }

    #[test]
    fn what_is_kept_as_text_is_the_json_that_it_was() {
        let deep = |text: &str| (0..80).fold(json!({"k\0": text}), |inner, _| json!([inner]));
        let mut kept = clean_json(deep(r"C:\u0000 a\0b"));
        while let Value::Array(mut items) = kept {
            kept = items.remove(0);
        }
        let inner: Value = serde_json::from_str(kept.as_str().unwrap_or_default()).unwrap_or_default();
        assert_eq!(inner.to_string().matches(r"C:\\u0000 a\\0b").count(), 1, "a backslash is no NUL: {kept}");
        let dirty = clean_json(deep("a\0b")).to_string();
        assert!(dirty.contains("ab") && !dirty.contains("u0000"), "{dirty}");
    }

    #[test]
    fn numbers_come_as_numbers_or_text() {
        assert_eq!(number(&json!("1,5")), Some(1.5));
        assert_eq!(number(&json!(50)), Some(50.0));
        assert_eq!(number(&json!("NaN")), None);
        assert_eq!(number(&json!("fifty")), None);
        assert_eq!(number(&json!(true)), None);
    }
}
