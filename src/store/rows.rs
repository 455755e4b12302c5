//! Rows as one parameter: an array of a composite type, a row an element.
//!
//! `unnest` of one array a column has PostgreSQL keep each column apart and put the rows together again, column by column: for a session's 44
//! columns that took a third of the time that writing it takes. A composite type has a number of its own in each database, so a
//! connection asks for it once.

use std::collections::HashMap;

use bytes::{BufMut, BytesMut};
use tokio_postgres::Client;
use tokio_postgres::types::{Field, IsNull, Kind, ToSql, Type, to_sql_checked};

use super::columns::Unreadable;
use super::statement::STATEMENTS;

/// A composite type of a migration. A column that is added later asks for another type: a server that is older than the database has to find
/// the one that it knows.
#[derive(Debug)]
pub struct RowType {
    /// With its schema.
    pub name: &'static str,
    /// Its columns, in the order of the type.
    pub columns: fn() -> &'static [(&'static str, Type)],
}

impl RowType {
    /// How the type is asked for: its number and that of its array. No rows: there is no such type. By the catalog alone, which everybody may
    /// read: the schema is open to the server's roles, and not to each login that may take them.
    pub fn question(&self) -> String {
        let (schema, name) = self.place();
        format!(
            "SELECT t.oid, t.typarray FROM pg_catalog.pg_type t JOIN pg_catalog.pg_namespace n ON n.oid = t.typnamespace \
             WHERE n.nspname = '{schema}' AND t.typname = '{name}'"
        )
    }

    fn place(&self) -> (&'static str, &'static str) {
        self.name.split_once('.').unwrap_or(("public", self.name))
    }

    /// The type of an array of such rows, by the numbers that the database gave.
    pub fn array(&self, oid: u32, array: u32) -> Type {
        let (schema, name) = self.place();
        let fields = (self.columns)().iter().map(|(name, kind)| Field::new((*name).to_owned(), kind.clone())).collect();
        let row = Type::new(name.to_owned(), oid, Kind::Composite(fields), schema.to_owned());
        Type::new(format!("_{name}"), array, Kind::Array(row), schema.to_owned())
    }
}

/// The types of arrays of all rows that statements take, by the names of the rows. None if one is missing: the database is older than this program,
/// and what needs the type says that it lacks.
#[allow(clippy::disallowed_methods)] // beside every transaction
pub(super) async fn arrays(client: &Client) -> Result<Option<HashMap<&'static str, Type>>, tokio_postgres::Error> {
    let mut arrays = HashMap::new();
    for rows in STATEMENTS.iter().filter_map(|statement| statement.rows) {
        let told = client.query_typed(&rows.question(), &[]).await?;
        let Some(row) = told.first() else { return Ok(None) };
        arrays.insert(rows.name, rows.array(row.try_get(0)?, row.try_get(1)?));
    }
    Ok(Some(arrays))
}

/// Something that is written as a row.
pub trait Record: std::fmt::Debug + Sync {
    /// Puts every column, in the order of its [`RowType`].
    fn put(&self, row: &mut RowWriter<'_>) -> Result<(), Unreadable>;
}

/// Takes the columns of one row, in their order.
#[derive(Debug)]
pub struct RowWriter<'r> {
    fields: std::slice::Iter<'r, Field>,
    out: &'r mut BytesMut,
}

impl RowWriter<'_> {
    /// The next column.
    pub fn put<T: ToSql>(&mut self, value: &T) -> Result<(), Unreadable> {
        let Some(field) = self.fields.next() else { return Err("the row has more columns than its type".into()) };
        debug_assert!(T::accepts(field.type_()), "{} is of type {}", field.name(), field.type_());
        self.out.put_u32(field.type_().oid());
        sized(self.out, |out| value.to_sql(field.type_(), out))
    }
}

/// An array of rows, as a parameter.
#[derive(Debug)]
pub struct Rows<'a, R>(pub &'a [R]);

impl<R: Record> ToSql for Rows<'_, R> {
    fn to_sql(&self, kind: &Type, out: &mut BytesMut) -> Result<IsNull, Unreadable> {
        let Kind::Array(row) = kind.kind() else { return Err("no array".into()) };
        let Kind::Composite(fields) = row.kind() else { return Err("no array of rows".into()) };
        let (width, length) = (i32::try_from(fields.len())?, i32::try_from(self.0.len())?);
        // Dimensions, no NULL, the element's type; the one dimension with its first index.
        out.put_i32(1);
        out.put_i32(0);
        out.put_u32(row.oid());
        out.put_i32(length);
        out.put_i32(1);
        for record in self.0 {
            sized(out, |out| {
                out.put_i32(width);
                let mut writer = RowWriter { fields: fields.iter(), out };
                record.put(&mut writer)?;
                match writer.fields.next() {
                    Some(field) => Err(format!("the row lacks {}", field.name()).into()),
                    None => Ok(IsNull::No),
                }
            })?;
        }
        Ok(IsNull::No)
    }

    fn accepts(kind: &Type) -> bool {
        matches!(kind.kind(), Kind::Array(row) if matches!(row.kind(), Kind::Composite(_)))
    }

    to_sql_checked!();
}

/// What `write` writes, after its length; -1 for NULL.
fn sized(
    out: &mut BytesMut,
    write: impl FnOnce(&mut BytesMut) -> Result<IsNull, Unreadable>,
) -> Result<(), Unreadable> {
    let at = out.len();
    out.put_i32(-1);
    if let IsNull::No = write(out)? {
        let length = i32::try_from(out.len() - at - 4)?;
        out[at..at + 4].copy_from_slice(&length.to_be_bytes());
    }
    Ok(())
}
