//! Every SQL statement of the program, named, typed and declared with the partition key that it binds.
//!
//! [`statement!`](crate::store::statement) registers a statement in [`STATEMENTS`] at link time, and [`super::transaction::Transaction`] runs
//! nothing else. So the test that explains every statement over three years of partitions finds a new one by itself, and a statement that
//! touches a partition outside its declared [`Months`] fails it.

use bytes::BytesMut;
use chrono::NaiveDate;
use linkme::distributed_slice;
use tokio_postgres::types::{FromSql, IsNull, ToSql, Type};

use super::rows::RowType;

/// All statements of the program.
#[distributed_slice]
pub static STATEMENTS: [Statement];

/// How a statement binds the partition key. Numbers are parameter positions, from 1.
#[derive(Debug, Clone, Copy)]
pub enum Months {
    /// Touches neither `sessions` nor `events`.
    None,
    /// Each parameter is one month; nothing outside of them is touched.
    In(&'static [usize]),
    /// The parameter is an array of months; nothing outside of them is touched.
    Of(usize),
    /// Two parameters are the first and the last month.
    Between(usize, usize),
    /// Each row that is inserted tells its month.
    Rows,
}

/// A statement. Run only through [`super::transaction::Transaction`].
#[derive(Debug)]
pub struct Statement {
    /// For logs, metrics and errors.
    pub name: &'static str,
    pub sql: fn() -> &'static str,
    pub params: &'static [Type],
    /// Of what the one parameter is an array, where there are no others. In the text it stands with its type, so that PostgreSQL knows it, too.
    pub rows: Option<&'static RowType>,
    pub months: Months,
}

impl Statement {
    /// How many parameters it has.
    pub fn arity(&self) -> usize {
        self.params.len() + usize::from(self.rows.is_some())
    }

    /// The months that these parameters bind, as SQL: a literal each, in the order of [`Months`]. None if one is no day and no array of days.
    pub fn months_of(&self, params: &[&(dyn ToSql + Sync)]) -> Option<Vec<String>> {
        let literal = |position: &usize| {
            let at = position.checked_sub(1)?;
            literal(*params.get(at)?, self.params.get(at)?)
        };
        self.months.positions().iter().map(literal).collect()
    }

    /// The statement with months in the places of their parameters. These stay declared, so it is called as ever.
    pub fn with_months(&self, months: &[String]) -> String {
        let positions = self.months.positions();
        let mut pieces = (self.sql)().split('$');
        let mut written = pieces.next().unwrap_or_default().to_owned();
        for piece in pieces {
            let digits = piece.len() - piece.trim_start_matches(|c: char| c.is_ascii_digit()).len();
            let (number, rest) = piece.split_at(digits);
            let at = positions.iter().position(|position| number.parse() == Ok(*position));
            match at.and_then(|at| months.get(at)) {
                Some(month) => written.push_str(month),
                None => written.extend(["$", number]),
            }
            written.push_str(rest);
        }
        written
    }
}

impl Months {
    /// The parameters that are months, from 1. Rows that are inserted find their leaves by themselves.
    fn positions(self) -> Vec<usize> {
        match self {
            Self::None | Self::Rows => Vec::new(),
            Self::In(positions) => positions.to_vec(),
            Self::Of(position) => vec![position],
            Self::Between(first, last) => vec![first, last],
        }
    }
}

/// Two statements are the same if they are declared in the same place.
impl PartialEq for Statement {
    fn eq(&self, other: &Self) -> bool {
        std::ptr::eq(self, other)
    }
}

impl Eq for Statement {}

impl std::hash::Hash for Statement {
    fn hash<H: std::hash::Hasher>(&self, state: &mut H) {
        std::ptr::from_ref(self).hash(state);
    }
}

/// A day or an array of days as SQL.
fn literal(param: &(dyn ToSql + Sync), kind: &Type) -> Option<String> {
    let mut bytes = BytesMut::with_capacity(64);
    match param.to_sql_checked(kind, &mut bytes) {
        Ok(IsNull::No) => {}
        Ok(IsNull::Yes) | Err(_) => return None,
    }
    if *kind == Type::DATE {
        return Some(format!("DATE '{}'", NaiveDate::from_sql(kind, &bytes).ok()?));
    }
    let days = Vec::<NaiveDate>::from_sql(kind, &bytes).ok()?;
    let days: Vec<String> = days.iter().map(NaiveDate::to_string).collect();
    Some(format!("'{{{}}}'::date[]", days.join(",")))
}

/// Declares a statement and registers it.
#[macro_export]
macro_rules! statement {
    ($(#[$doc:meta])* $name:ident, $months:expr, [rows $rows:ident], $sql:expr) => {
        $crate::statement!(@ $(#[$doc])* $name, $months, &[], Some(&$rows), $sql);
    };
    ($(#[$doc:meta])* $name:ident, $months:expr, [$($param:ident),* $(,)?], $sql:expr) => {
        $crate::statement!(@ $(#[$doc])* $name, $months, &[$(tokio_postgres::types::Type::$param),*], None, $sql);
    };
    (@ $(#[$doc:meta])* $name:ident, $months:expr, $params:expr, $rows:expr, $sql:expr) => {
        $(#[$doc])*
        #[linkme::distributed_slice($crate::store::statement::STATEMENTS)]
        static $name: $crate::store::statement::Statement = $crate::store::statement::Statement {
            name: stringify!($name),
            sql: || {
                static SQL: std::sync::LazyLock<String> = std::sync::LazyLock::new(|| String::from($sql));
                &SQL
            },
            params: $params,
            rows: $rows,
            months: $months,
        };
    };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn months_are_written_into_the_places_of_their_parameters_and_nowhere_else() {
        let statement = Statement {
            name: "TEST",
            sql: || "SELECT $1, $2, $12 WHERE a IN ($2,$1) AND b = $10",
            params: &[Type::DATE, Type::DATE_ARRAY],
            rows: None,
            months: Months::In(&[1, 2]),
        };
        let day: NaiveDate = "2026-11-01".parse().expect("a day");
        let months = statement.months_of(&[&day, &vec![day, day]]).expect("days");
        assert_eq!(
            statement.with_months(&months),
            "SELECT DATE '2026-11-01', '{2026-11-01,2026-11-01}'::date[], $12 \
             WHERE a IN ('{2026-11-01,2026-11-01}'::date[],DATE '2026-11-01') AND b = $10"
        );
        assert_eq!(statement.months_of(&[&day, &"2026-11-01"]), None, "no days");
        assert_eq!(statement.months_of(&[&Some(day), &None::<Vec<NaiveDate>>]), None, "NULL");
    }
}
