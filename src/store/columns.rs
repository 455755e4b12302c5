//! A row by the names of its columns, whoever read it: a query, or the change feed. So one reader serves both, and they cannot drift apart.

use std::cell::Cell;
use std::sync::Arc;

use bytes::Bytes;
use tokio_postgres::Row;
use tokio_postgres::types::{FromSql, Type};

/// A value that is missing, of another type, or not to be understood.
pub type Unreadable = Box<dyn std::error::Error + Send + Sync>;

/// A table whose columns are not those that this program knows: somebody is changing the schema.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct OtherColumns(String);

/// Columns that can be read by name.
pub trait Columns {
    /// The value of a column, or why there is none to be had.
    fn column<'r, T: FromSql<'r>>(&'r self, name: &str) -> Result<T, Unreadable>;
}

impl Columns for Row {
    fn column<'r, T: FromSql<'r>>(&'r self, name: &str) -> Result<T, Unreadable> {
        Ok(self.try_get(name)?)
    }
}

/// A row that is read nearly in the order of its columns: each is looked for where the one before was found. A wide row would else compare
/// a thousand names.
pub struct Ordered<'r> {
    row: &'r Row,
    next: Cell<usize>,
}

impl<'r> From<&'r Row> for Ordered<'r> {
    fn from(row: &'r Row) -> Self {
        Self { row, next: Cell::new(0) }
    }
}

impl Columns for Ordered<'_> {
    fn column<'r, T: FromSql<'r>>(&'r self, name: &str) -> Result<T, Unreadable> {
        let columns = self.row.columns();
        let next = self.next.get();
        let at = (next..columns.len()).chain(0..next).find(|at| columns[*at].name() == name);
        let Some(at) = at else { return self.row.column(name) };
        self.next.set(at + 1);
        Ok(self.row.try_get(at)?)
    }
}

/// The columns of a published table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Relation {
    pub columns: Vec<(String, Type)>,
}

/// A row as the change feed tells it: values in PostgreSQL's binary format, `None` for NULL.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tuple {
    pub relation: Arc<Relation>,
    pub values: Vec<Option<Bytes>>,
}

impl Columns for Tuple {
    fn column<'r, T: FromSql<'r>>(&'r self, name: &str) -> Result<T, Unreadable> {
        let at = self.relation.columns.iter().position(|(column, _)| column == name);
        let at = at.ok_or_else(|| OtherColumns(format!("there is no column {name}")))?;
        let kind = &self.relation.columns[at].1;
        if !T::accepts(kind) {
            return Err(OtherColumns(format!("column {name} is of type {kind}")).into());
        }
        T::from_sql_nullable(kind, self.values.get(at).and_then(Option::as_deref))
    }
}

/// A `jsonb` that a hand may have written: what does not read as `T` is its default. `NULL` is an error: where it may
/// be, ask for `Option<Lenient<T>>`.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Lenient<T>(pub T);

impl<'r, T: serde::de::DeserializeOwned + Default> FromSql<'r> for Lenient<T> {
    fn from_sql(_: &Type, raw: &'r [u8]) -> Result<Self, Unreadable> {
        match raw {
            [1, text @ ..] => Ok(Self(serde_json::from_slice(text).unwrap_or_default())),
            _ => Err("no jsonb of the version that we know".into()),
        }
    }

    fn accepts(kind: &Type) -> bool {
        *kind == Type::JSONB
    }
}

/// A `numeric` as PostgreSQL prints it, digit for digit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Decimal(pub String);

/// Decimal digits of one digit of PostgreSQL's, which counts by ten thousand.
const DIGITS: usize = 4;

impl<'r> FromSql<'r> for Decimal {
    fn from_sql(_: &Type, raw: &'r [u8]) -> Result<Self, Unreadable> {
        let words: Vec<u16> = raw.chunks_exact(2).map(|pair| u16::from_be_bytes([pair[0], pair[1]])).collect();
        let [count, weight, sign, scale, digits @ ..] = words.as_slice() else { return Err("no numeric".into()) };
        let sign = match *sign {
            0x0000 => "",
            0x4000 => "-",
            _ => return Err("a numeric that is no number".into()),
        };
        if usize::from(*count) != digits.len()
            || !raw.len().is_multiple_of(2)
            || digits.iter().any(|digit| *digit > 9999)
        {
            return Err("no numeric".into());
        }
        // The weight says which power of ten thousand the first digit has.
        let (weight, scale) = (i32::from(weight.cast_signed()), usize::from(*scale));
        let digit = |power: i32| {
            let at = usize::try_from(weight - power).ok().and_then(|at| digits.get(at));
            format!("{:04}", at.copied().unwrap_or_default())
        };
        let whole: String = (0..=weight.max(0)).rev().map(digit).collect();
        let powers = i32::try_from(scale.div_ceil(DIGITS))?;
        let mut fraction: String = (1..=powers).map(|power| digit(-power)).collect();
        fraction.truncate(scale);
        let whole = match whole.trim_start_matches('0') {
            "" => "0",
            whole => whole,
        };
        let point = if fraction.is_empty() { "" } else { "." };
        Ok(Self(format!("{sign}{whole}{point}{fraction}")))
    }

    fn accepts(kind: &Type) -> bool {
        *kind == Type::NUMERIC
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_numeric_is_read_as_postgresql_prints_it() {
        let read = |words: &[u16]| {
            let raw: Vec<u8> = words.iter().flat_map(|word| word.to_be_bytes()).collect();
            Decimal::from_sql(&Type::NUMERIC, &raw).map(|decimal| decimal.0).map_err(drop)
        };
        let minus = |weight: i16| weight.cast_unsigned();
        for (words, text) in [
            (&[0, 0, 0, 0][..], "0"),
            (&[0, 0, 0, 2], "0.00"),
            (&[2, 0, 0, 2, 12, 3000], "12.30"),
            (&[1, 0, 0x4000, 0, 7], "-7"),
            (&[1, 2, 0, 0, 1], "100000000"),
            (&[3, 2, 0, 4, 9999, 9999, 9999], "999999999999.0000"),
            (&[1, minus(-1), 0, 3, 50], "0.005"),
            (&[1, minus(-2), 0, 8, 5], "0.00000005"),
            (&[2, 1, 0, 1, 1, 2], "10002.0"),
        ] {
            assert_eq!(read(words).as_deref(), Ok(text), "{words:?}");
        }
        for odd in [&[0, 0, 0xC000, 0][..], &[2, 0, 0, 0, 1], &[1, 0, 0, 0, 10_000], &[]] {
            assert_eq!(read(odd), Err(()), "{odd:?}");
        }
    }

    #[test]
    fn a_tuple_is_read_by_name_and_type() {
        let relation = Arc::new(Relation {
            columns: vec![("n".to_owned(), Type::INT4), ("t".to_owned(), Type::TEXT), ("u".to_owned(), Type::UUID)],
        });
        let values = vec![Some(Bytes::from_static(&[0, 0, 0, 7])), None, Some(Bytes::from_static(b"short"))];
        let tuple = Tuple { relation, values };
        assert_eq!(tuple.column::<i32>("n").ok(), Some(7));
        assert_eq!(tuple.column::<Option<String>>("t").ok(), Some(None));
        assert!(tuple.column::<String>("t").is_err(), "NULL");
        assert!(tuple.column::<i64>("n").is_err(), "another type");
        assert!(tuple.column::<uuid::Uuid>("u").is_err(), "damaged");
        assert!(tuple.column::<i32>("x").is_err(), "no such column");
    }
}
