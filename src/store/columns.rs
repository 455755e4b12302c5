//! A row by the names of its columns, whoever read it: a query, or the change feed. So one reader serves both, and they cannot drift apart.

use std::sync::Arc;

use bytes::Bytes;
use tokio_postgres::Row;
use tokio_postgres::types::{FromSql, Type};

/// A value that is missing, of another type, or not to be understood.
pub type Unreadable = Box<dyn std::error::Error + Send + Sync>;

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
        let at = at.ok_or_else(|| format!("there is no column {name}"))?;
        let kind = &self.relation.columns[at].1;
        if !T::accepts(kind) {
            return Err(format!("column {name} is of type {kind}").into());
        }
        T::from_sql_nullable(kind, self.values.get(at).and_then(Option::as_deref))
    }
}
