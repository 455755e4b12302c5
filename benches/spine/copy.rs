//! The reference of `ingest` and `stream`: `COPY` of the very rows that the server stored, into a database that is made alike.
//!
//! The rows are read out of the tables in PostgreSQL's own binary form and written as they are, by one connection, sessions first, one
//! transaction for ten thousand rows. What is timed is the writing alone.

use std::pin::pin;
use std::time::Instant;

use anyhow::{Context, ensure};
use bytes::{Bytes, BytesMut};
use futures::{SinkExt, StreamExt};
use tokio_postgres::Client;

use crate::ground::Database;
use crate::processes::{Meter, Spent};

/// Rows of one transaction.
const ROWS: usize = 10_000;
/// Bytes of one message.
const MESSAGE: usize = 64 << 10;
/// The signature, the flags and the length of the extension, with which binary `COPY` begins.
const HEADER: &[u8] = b"PGCOPY\n\xff\r\n\0\0\0\0\0\0\0\0\0";
/// With which it ends.
const TRAILER: &[u8] = &[0xff, 0xff];

/// The rows of a table, cut into transactions.
struct Rows {
    table: &'static str,
    columns: String,
    parts: Vec<Vec<Bytes>>,
    count: usize,
}

/// What writing took.
pub struct Copied {
    pub events: usize,
    pub seconds: f64,
    pub spent: Spent,
}

/// Copies the traffic of one database into another, an empty one.
pub async fn copy(from: &Database, to: &Database, meter: Meter) -> anyhow::Result<Copied> {
    let (source, target) = (from.admin().await?, to.admin().await?);
    let tables = [read(&source, "sessions").await?, read(&source, "events").await?];
    to.checkpoint().await?;
    let before = meter.read()?;
    let began = Instant::now();
    for rows in &tables {
        for part in &rows.parts {
            write(&target, rows, part).await?;
        }
    }
    let seconds = began.elapsed().as_secs_f64();
    let spent = meter.read()?.since(before);
    for rows in &tables {
        let stored = to.count(rows.table).await?;
        ensure!(stored == rows.count, "COPY stored {stored} of {} rows of {}", rows.count, rows.table);
    }
    Ok(Copied { events: tables[1].count, seconds, spent })
}

async fn read(source: &Client, table: &'static str) -> anyhow::Result<Rows> {
    let columns = "SELECT string_agg(quote_ident(column_name), ', ' ORDER BY ordinal_position) FROM information_schema.columns \
                   WHERE table_schema = 'public' AND table_name = $1 AND is_generated = 'NEVER'";
    let columns: String = source.query_one(columns, &[&table]).await?.get(0);
    let out =
        source.copy_out(&format!("COPY (SELECT {columns} FROM public.{table}) TO STDOUT (FORMAT binary)")).await?;
    let mut out = pin!(out);
    let (mut parts, mut part, mut count) = (Vec::new(), BytesMut::new(), 0);
    // The server sends each row as a message of its own, the header with the first, the trailer alone.
    let mut first = true;
    while let Some(row) = out.next().await {
        let mut row = row?;
        if std::mem::take(&mut first) {
            ensure!(row.starts_with(HEADER), "COPY begins in another way");
            row = row.slice(HEADER.len()..);
        }
        if row.is_empty() || row == TRAILER {
            continue;
        }
        if part.is_empty() {
            part.extend_from_slice(HEADER);
        }
        part.extend_from_slice(&row);
        count += 1;
        if count % ROWS == 0 {
            parts.push(cut(std::mem::take(&mut part)));
        }
    }
    if !part.is_empty() {
        parts.push(cut(part));
    }
    Ok(Rows { table, columns, parts, count })
}

fn cut(mut part: BytesMut) -> Vec<Bytes> {
    part.extend_from_slice(TRAILER);
    let part = part.freeze();
    (0..part.len()).step_by(MESSAGE).map(|at| part.slice(at..part.len().min(at + MESSAGE))).collect()
}

/// One statement, which is one transaction.
async fn write(target: &Client, rows: &Rows, part: &[Bytes]) -> anyhow::Result<()> {
    let copy = format!("COPY public.{} ({}) FROM STDIN (FORMAT binary)", rows.table, rows.columns);
    let mut sink = pin!(target.copy_in::<_, Bytes>(&copy).await.context("COPY")?);
    for message in part {
        sink.feed(message.clone()).await?;
    }
    sink.finish().await?;
    Ok(())
}
