//! From `pgoutput`'s messages to entries.
//!
//! A row comes with both its values complete: what an update left unchanged and PostgreSQL did not send again is taken from the row before.
//! What cannot be told as a row (no old value, no site) ends nothing: it becomes the news that the place has to be read anew.
//! Values are copied out of the connection's buffer, a piece of memory a row, so that an entry holds what it is accounted for.

use std::collections::HashMap;
use std::sync::Arc;

use bytes::Bytes;
use chrono::{DateTime, NaiveDate, TimeDelta, Utc};
use pg_walstream::{ColumnInfo, LogicalReplicationMessage, LogicalReplicationParser, ReplicationError, TupleData};
use tokio_postgres::types::{Kind, Type};
use uuid::Uuid;

use super::{Entry, What};
use crate::domain::change::{Change, Place, Position, Table, full_xid};
use crate::domain::id::SiteId;
use crate::domain::month::Month;
use crate::store::columns::{Columns, Relation, Tuple};

/// Seconds from 1970 to 2000, from where PostgreSQL counts.
const EPOCH: i64 = 946_684_800;
/// What an entry takes beside its values.
const ENTRY_BYTES: usize = 320;
/// What a value takes beside its bytes.
const VALUE_BYTES: usize = 40;

/// What a message says.
#[derive(Debug)]
pub(super) enum Said {
    Begun {
        xid: u64,
        lsn: u64,
    },
    Entry {
        table: Table,
        entry: Entry,
        bytes: usize,
    },
    /// Everything before this place was told.
    Committed {
        end: u64,
    },
}

/// Reads messages in their order.
pub(super) struct Decoder {
    parser: LogicalReplicationParser,
    relations: HashMap<u32, Known>,
    transaction: Option<Transaction>,
    /// The last full id, to complete the next by.
    near: u64,
}

#[derive(Clone)]
enum Known {
    Rows(Rows),
    /// Marks of what no log tells row by row.
    Vanished(Arc<Relation>),
}

#[derive(Clone)]
struct Rows {
    table: Table,
    relation: Arc<Relation>,
    /// Whether the row's key holds its place, so that the key alone tells it, and a key that did not change the same one.
    place_in_key: bool,
}

#[derive(Clone, Copy)]
struct Transaction {
    xid: u64,
    at: Position,
    committed_at: DateTime<Utc>,
}

impl Decoder {
    /// `near` is the full id of some transaction of these days.
    pub fn new(near: u64) -> Self {
        let parser = LogicalReplicationParser::with_protocol_version(1);
        Self { parser, relations: HashMap::new(), transaction: None, near }
    }

    /// Reads one message.
    pub fn read(&mut self, message: Bytes, say: &mut impl FnMut(Said)) -> Result<(), ReplicationError> {
        use LogicalReplicationMessage as Message;
        match self.parser.parse_wal_message_bytes(message)?.message {
            Message::Begin { final_lsn, timestamp, xid } => {
                self.near = full_xid(xid, self.near);
                let at = Position { lsn: final_lsn, seq: 0 };
                self.transaction = Some(Transaction { xid: self.near, at, committed_at: time(timestamp) });
                say(Said::Begun { xid: self.near, lsn: final_lsn });
            }
            Message::Commit { end_lsn, .. } => {
                self.transaction = None;
                say(Said::Committed { end: end_lsn });
            }
            Message::Relation { relation_id, namespace, relation_name, columns, .. } => {
                match known(&namespace, &relation_name, &columns) {
                    Some(known) => self.relations.insert(relation_id, known),
                    None => self.relations.remove(&relation_id),
                };
            }
            Message::Insert { relation_id, tuple } => match self.relations.get(&relation_id).cloned() {
                Some(Known::Rows(rows)) => {
                    let new = complete(&rows, tuple, None);
                    let change = new.and_then(|new| Some(Change::Insert { new: placed(rows.table, new)? }));
                    self.tell(&rows, change, &[], say)?;
                }
                Some(Known::Vanished(relation)) => self.vanished(&relation, tuple, say)?,
                None => {}
            },
            Message::Update { relation_id, old_tuple, new_tuple, key_type } => {
                let Some(Known::Rows(rows)) = self.relations.get(&relation_id).cloned() else { return Ok(()) };
                self.update(&rows, old_tuple, new_tuple, key_type, say)?;
            }
            Message::Delete { relation_id, old_tuple, key_type } => {
                let Some(Known::Rows(rows)) = self.relations.get(&relation_id).cloned() else { return Ok(()) };
                let old = complete(&rows, old_tuple, None);
                let at = old.as_ref().and_then(|old| place(rows.table, old)).filter(|_| rows.place_in_key);
                let whole = old.filter(|_| key_type == 'O');
                let change = whole.and_then(|old| Some(Change::Delete { old: placed(rows.table, old)? }));
                self.tell(&rows, change, &[at], say)?;
            }
            Message::Truncate { relation_ids, .. } => {
                for id in relation_ids {
                    if let Some(Known::Rows(rows)) = self.relations.get(&id).cloned() {
                        self.anew(rows.table, None, None, say)?;
                    }
                }
            }
            _ => {}
        }
        Ok(())
    }

    fn update(
        &mut self,
        rows: &Rows,
        old: Option<TupleData>,
        new: TupleData,
        key_type: Option<char>,
        say: &mut impl FnMut(Said),
    ) -> Result<(), ReplicationError> {
        let old = old.and_then(|old| complete(rows, old, None));
        let whole = old.clone().filter(|_| key_type == Some('O'));
        let new_place = shallow_place(rows, &new);
        if let Some(before) = whole {
            let after = complete(rows, new, Some(&before));
            let after = after.and_then(|after| placed(rows.table, after));
            let before_place = place(rows.table, &before);
            let change = placed(rows.table, before).zip(after).map(|(old, new)| Change::Update { old, new });
            return self.tell(rows, change, &[before_place, new_place], say);
        }
        // Somebody took the identity away. The old key tells the old place if it is part of it.
        let old_place = match &old {
            _ if !rows.place_in_key => None,
            Some(key) => place(rows.table, key),
            None => new_place,
        };
        self.tell(rows, None, &[old_place, new_place], say)
    }

    /// Tells a change; if there is none to tell, that these places are to be read anew, or all if one of them is not known.
    fn tell(
        &mut self,
        rows: &Rows,
        change: Option<Change<(Place, Tuple)>>,
        places: &[Option<Place>],
        say: &mut impl FnMut(Said),
    ) -> Result<(), ReplicationError> {
        if let Some(change) = change {
            let size = |row: Option<&(Place, Tuple)>| row.map_or(0, |(_, tuple)| bytes_of(tuple));
            let bytes = ENTRY_BYTES + size(change.before()) + size(change.after());
            return self.entry(rows.table, What::Row(change), bytes, say);
        }
        match places.iter().copied().collect::<Option<Vec<Place>>>() {
            Some(mut known) if !known.is_empty() => {
                known.dedup();
                for place in known {
                    self.anew(rows.table, Some(place.site), place.month, say)?;
                }
                Ok(())
            }
            _ => self.anew(rows.table, None, None, say),
        }
    }

    fn vanished(
        &mut self,
        relation: &Arc<Relation>,
        tuple: TupleData,
        say: &mut impl FnMut(Said),
    ) -> Result<(), ReplicationError> {
        let mark = copied(relation, tuple, None);
        let text = |name: &str| mark.as_ref().and_then(|mark| mark.column::<String>(name).ok());
        if text("cause").as_deref() == Some("delete") {
            return Ok(());
        }
        let tables = [Table::Sessions, Table::Events, Table::Calls];
        let named = text("tab").and_then(|tab| tables.into_iter().find(|table| table.name() == tab));
        let site = mark.as_ref().and_then(|mark| mark.column::<Uuid>("site_id").ok()).filter(|id| !id.is_nil());
        // `-infinity` is no date to anybody but PostgreSQL, and means that there is no month.
        let month = mark.as_ref().and_then(|mark| mark.column::<NaiveDate>("month").ok()).map(Month::containing);
        for table in named.map_or(tables.to_vec(), |table| vec![table]) {
            self.anew(table, site.map(SiteId::from_uuid), month, say)?;
        }
        Ok(())
    }

    fn anew(
        &mut self,
        table: Table,
        site: Option<SiteId>,
        month: Option<Month>,
        say: &mut impl FnMut(Said),
    ) -> Result<(), ReplicationError> {
        self.entry(table, What::Anew { site, month }, ENTRY_BYTES, say)
    }

    fn entry(
        &mut self,
        table: Table,
        what: What,
        bytes: usize,
        say: &mut impl FnMut(Said),
    ) -> Result<(), ReplicationError> {
        let outside = || ReplicationError::protocol("a change outside of a transaction");
        let transaction = self.transaction.as_mut().ok_or_else(outside)?;
        transaction.at.seq = transaction.at.seq.saturating_add(1);
        let Transaction { xid, at, committed_at } = *transaction;
        say(Said::Entry { table, entry: Entry { position: at, xid, committed_at, what }, bytes });
        Ok(())
    }
}

fn time(microseconds: i64) -> DateTime<Utc> {
    let since = TimeDelta::microseconds(microseconds);
    DateTime::from_timestamp(EPOCH, 0).and_then(|epoch| epoch.checked_add_signed(since)).unwrap_or_default()
}

fn known(schema: &str, name: &str, columns: &[ColumnInfo]) -> Option<Known> {
    let named = |column: &ColumnInfo| {
        let unknown = || Type::new(format!("type {}", column.type_id), column.type_id, Kind::Simple, String::new());
        (column.name.to_string(), Type::from_oid(column.type_id).unwrap_or_else(unknown))
    };
    let relation = Arc::new(Relation { columns: columns.iter().map(named).collect() });
    let table = match (schema, name) {
        ("opsmantik", "vanished") => return Some(Known::Vanished(relation)),
        ("public", "sessions") => Table::Sessions,
        ("public", "events") => Table::Events,
        ("public", "calls") => Table::Calls,
        _ => return None,
    };
    let in_key = |name: &str| columns.iter().any(|column| &*column.name == name && column.is_key());
    let place_in_key = in_key("site_id") && month_column(table).is_none_or(in_key);
    Some(Known::Rows(Rows { table, relation, place_in_key }))
}

fn month_column(table: Table) -> Option<&'static str> {
    match table {
        Table::Sessions => Some("created_month"),
        Table::Events => Some("session_month"),
        Table::Calls => None,
    }
}

fn place(table: Table, row: &Tuple) -> Option<Place> {
    let site = SiteId::from_uuid(row.column::<Uuid>("site_id").ok()?);
    let month = match month_column(table) {
        None => None,
        Some(column) => Some(Month::containing(row.column::<NaiveDate>(column).ok()?)),
    };
    Some(Place { site, month })
}

fn placed(table: Table, row: Tuple) -> Option<(Place, Tuple)> {
    Some((place(table, &row)?, row))
}

/// Where a row is whose other values may not be complete. Neither column is ever stored away from its row.
fn shallow_place(rows: &Rows, tuple: &TupleData) -> Option<Place> {
    let columns = tuple.columns.iter().map(|column| column.is_binary().then(|| column.raw_bytes()));
    place(rows.table, &Tuple { relation: rows.relation.clone(), values: columns.collect() })
}

fn complete(rows: &Rows, tuple: TupleData, before: Option<&Tuple>) -> Option<Tuple> {
    copied(&rows.relation, tuple, before)
}

/// The row in memory of its own. None if a value is not to be had.
fn copied(relation: &Arc<Relation>, tuple: TupleData, before: Option<&Tuple>) -> Option<Tuple> {
    if tuple.columns.len() != relation.columns.len() {
        return None;
    }
    let length = tuple.columns.iter().filter(|column| column.is_binary()).map(|column| column.as_bytes().len()).sum();
    let mut own = Vec::with_capacity(length);
    for column in tuple.columns.iter().filter(|column| column.is_binary()) {
        own.extend_from_slice(column.as_bytes());
    }
    let mut own = Bytes::from(own);
    let mut values = Vec::with_capacity(tuple.columns.len());
    for (at, column) in tuple.columns.iter().enumerate() {
        values.push(match column {
            null if null.is_null() => None,
            binary if binary.is_binary() => Some(own.split_to(binary.as_bytes().len())),
            unchanged if unchanged.is_unchanged() => before?.values.get(at)?.clone(),
            _ => return None,
        });
    }
    Some(Tuple { relation: relation.clone(), values })
}

fn bytes_of(tuple: &Tuple) -> usize {
    tuple.values.iter().map(|value| VALUE_BYTES + value.as_ref().map_or(0, Bytes::len)).sum()
}
