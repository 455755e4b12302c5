//! Every SQL statement of the program, named, typed and declared with the partition key that it binds.
//!
//! [`statement!`](crate::store::statement) registers a statement in [`STATEMENTS`] at link time, and [`super::transaction::Transaction`] runs
//! nothing else. So the test that explains every statement over three years of partitions finds a new one by itself, and a statement that
//! touches a partition outside its declared [`Months`] fails it.

use linkme::distributed_slice;
use tokio_postgres::types::Type;

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
    /// Two parameters are the first and the last month.
    Between(usize, usize),
    /// The parameter is an array, a month a row that is inserted.
    Rows(usize),
}

/// A statement. Run only through [`super::transaction::Transaction`].
#[derive(Debug)]
pub struct Statement {
    /// For logs, metrics and errors.
    pub name: &'static str,
    pub sql: fn() -> &'static str,
    pub params: &'static [Type],
    pub months: Months,
}

/// Declares a statement and registers it.
#[macro_export]
macro_rules! statement {
    ($(#[$doc:meta])* $name:ident, $months:expr, [$($param:ident),* $(,)?], $sql:expr) => {
        $(#[$doc])*
        #[linkme::distributed_slice($crate::store::statement::STATEMENTS)]
        static $name: $crate::store::statement::Statement = $crate::store::statement::Statement {
            name: stringify!($name),
            sql: || {
                static SQL: std::sync::LazyLock<String> = std::sync::LazyLock::new(|| String::from($sql));
                &SQL
            },
            params: &[$(tokio_postgres::types::Type::$param),*],
            months: $months,
        };
    };
}
