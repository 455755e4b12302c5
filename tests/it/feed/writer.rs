//! Whoever writes by plain SQL, in every way that SQL has: batches, COPY, transactions of many statements, savepoints that are kept and that are
//! not, rollbacks, rows that move to another month or site, and transactions that commit long after they wrote.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::SinkExt;
use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};
use tokio_postgres::{Client, Error};
use uuid::Uuid;

use super::seed::{INSERT_CALLS, INSERT_EVENTS, SHARED, insert_visits, shared_visit};
use super::work::{SITES, Work};

/// Subtransactions of one transaction, more than PostgreSQL keeps in a snapshot.
const MANY_SAVEPOINTS: usize = 70;

/// A visit of a writer's own, and its events.
#[derive(Debug, Clone)]
struct Visit {
    site: usize,
    month: usize,
    id: Uuid,
    events: Vec<Uuid>,
}

pub struct Writer {
    work: Arc<Work>,
    /// Tells its rows from those of other writers.
    number: u16,
    next: u64,
    random: StdRng,
    visits: Vec<Visit>,
    /// By site.
    calls: [Vec<Uuid>; 2],
}

/// How one transaction ended: row changes, or none if it was rolled back.
type Outcome = Result<u64, Error>;

impl Writer {
    pub fn new(work: Arc<Work>, number: u16) -> Self {
        let random = StdRng::seed_from_u64(work.seed ^ (u64::from(number) << 32));
        Self { work, number, next: 0, random, visits: Vec::new(), calls: Default::default() }
    }

    /// Writes until enough has been written by all.
    pub async fn run(mut self) {
        let mut client = self.work.connect().await;
        while !self.work.is_over() {
            self.work.pace().await;
            match self.once(&client).await {
                Ok(changes) => self.work.add(changes),
                // A statement was refused: two writers met. Anything else is a mistake of the test.
                Err(error) if error.code().is_some_and(|code| ["40P01", "40001", "55P03"].contains(&code.code())) => {
                    client.batch_execute("ROLLBACK").await.ok();
                    self.reload(&client).await.ok();
                }
                Err(error) => {
                    let away = error.is_closed()
                        || error
                            .code()
                            .is_none_or(|code| code.code().starts_with("57P") || code.code().starts_with("08"));
                    assert!(away, "writer {}: {error:?}", self.number);
                    // Whether the last transaction was committed is in the tables.
                    loop {
                        client = self.work.connect().await;
                        if self.reload(&client).await.is_ok() {
                            break;
                        }
                    }
                }
            }
        }
    }

    fn id(&mut self) -> Uuid {
        self.next += 1;
        Uuid::from_u128((u128::from(self.number) << 112) | (0x8 << 60) | u128::from(self.next))
    }

    fn ids(&mut self, count: usize) -> Vec<Uuid> {
        (0..count).map(|_| self.id()).collect()
    }

    /// What it has by what the tables say.
    async fn reload(&mut self, client: &Client) -> Result<(), Error> {
        let (from, to) = (u128::from(self.number) << 112, (u128::from(self.number) + 1) << 112);
        let bounds = [Uuid::from_u128(from), Uuid::from_u128(to)];
        let of_mine = "SELECT s.site_id, s.created_month, s.id, array_remove(array_agg(e.id), NULL) FROM sessions s \
            LEFT JOIN events e ON (e.site_id, e.session_month, e.session_id) = (s.site_id, s.created_month, s.id) \
            WHERE s.id >= $1 AND s.id < $2 GROUP BY 1, 2, 3 ORDER BY 3";
        let rows = client.query(of_mine, &[&bounds[0], &bounds[1]]).await?;
        self.visits = rows
            .iter()
            .map(|row| Visit {
                site: SITES.iter().position(|site| *site == row.get::<_, Uuid>(0)).expect("a site of the test"),
                month: self
                    .work
                    .months
                    .iter()
                    .position(|month| *month == row.get::<_, chrono::NaiveDate>(1))
                    .expect("a month of the test"),
                id: row.get(2),
                events: row.get(3),
            })
            .collect();
        for (at, site) in SITES.iter().enumerate() {
            let of_mine = "SELECT id FROM calls WHERE site_id = $3 AND id >= $1 AND id < $2 ORDER BY 1";
            let rows = client.query(of_mine, &[&bounds[0], &bounds[1], site]).await?;
            self.calls[at] = rows.iter().map(|row| row.get(0)).collect();
        }
        Ok(())
    }

    /// One transaction of some kind.
    async fn once(&mut self, client: &Client) -> Outcome {
        let kind = if self.visits.len() < 10 { 0 } else { self.random.random_range(0..100) };
        match kind {
            0..14 => self.enter(client).await,
            14..22 => self.copy(client).await,
            22..48 => self.rewrite_events(client).await,
            48..60 => self.rewrite_visits(client).await,
            60..67 => self.remove_events(client).await,
            67..71 => self.remove_visits(client).await,
            71..76 => self.move_visits(client).await,
            76..82 => self.savepoints(client).await,
            82..85 => self.think_better_of_it(client).await,
            85..86 => self.linger(client).await,
            86..88 => self.contend(client).await,
            _ => self.ring(client).await,
        }
    }

    /// New visits with their events.
    async fn enter(&mut self, client: &Client) -> Outcome {
        client.batch_execute("BEGIN").await?;
        let (changes, visits) = self.add_visits(client, 12, 10).await?;
        client.batch_execute("COMMIT").await?;
        self.visits.extend(visits);
        Ok(changes)
    }

    /// In the transaction that the caller has begun.
    async fn add_visits(&mut self, client: &Client, count: usize, each: usize) -> Result<(u64, Vec<Visit>), Error> {
        let (site, month) = (self.random.random_range(0..2), self.random.random_range(0..4));
        let ids = self.ids(count);
        let mut changes = insert_visits(client, SITES[site], &self.work, month, &ids).await?;
        let mut visits = Vec::new();
        let mut pairs: (Vec<Uuid>, Vec<Uuid>) = Default::default();
        for id in ids {
            let events = self.ids(each);
            pairs.0.extend(events.iter().copied());
            pairs.1.extend(events.iter().map(|_| id));
            visits.push(Visit { site, month, id, events });
        }
        changes += client.execute(INSERT_EVENTS, &[&SITES[site], &self.work.months[month], &pairs.0, &pairs.1]).await?;
        Ok((changes, visits))
    }

    /// More events of visits that there are, by COPY.
    async fn copy(&mut self, client: &Client) -> Outcome {
        let mut lines = String::new();
        let mut added = Vec::new();
        for at in self.some_visits(8) {
            let events = self.ids(12);
            let visit = &self.visits[at];
            for event in &events {
                let (site, month, session) = (SITES[visit.site], self.work.months[visit.month], visit.id);
                lines.push_str(&format!(
                    "{site}\t{month}\t{event}\t{session}\t2026-03-01 10:00:00.000001+00\t2026-03-01 09:59:59+00\thttps://shop.example/copied\t\
                     \\N\tinteraction\tview\tby \\\\COPY\\ta tab\t{}\t2\t10\t{{\"n\": {}}}\n",
                    added.len(),
                    event.as_u128() & 0xfff,
                ));
            }
            added.push((at, events));
        }
        let copy = "COPY events (site_id, session_month, id, session_id, created_at, occurred_at, url, referrer, event_category, event_action, \
            event_label, event_value, signals, lead_score, metadata) FROM STDIN";
        let sink = client.copy_in::<_, Bytes>(copy).await?;
        let mut sink = std::pin::pin!(sink);
        sink.send(Bytes::from(lines)).await?;
        let copied = sink.finish().await?;
        for (at, events) in added {
            self.visits[at].events.extend(events);
        }
        Ok(copied)
    }

    fn some_visits(&mut self, most: usize) -> Vec<usize> {
        let mut all: Vec<usize> = (0..self.visits.len()).collect();
        all.partial_shuffle(&mut self.random, most).0.to_vec()
    }

    /// Such as may go away: of the first site only. What goes leaves a mark, after which nobody is told only what was written since; so the
    /// other site shows whether that is told well.
    fn some_mortals(&mut self, most: usize) -> Vec<usize> {
        let mut all: Vec<usize> = (0..self.visits.len()).filter(|at| self.visits[*at].site == 0).collect();
        all.partial_shuffle(&mut self.random, most).0.to_vec()
    }

    /// Ids of up to `most` events, each with the place of its visit.
    fn some_events(&mut self, most: usize) -> Vec<Uuid> {
        let visits = self.some_visits(most / 4);
        let events = visits.into_iter().flat_map(|at| self.visits[at].events.clone());
        events.take(most).collect()
    }

    /// Changes events: often a value only, so that a large `metadata` is not written again, and sometimes that.
    async fn rewrite_events(&mut self, client: &Client) -> Outcome {
        let events = self.some_events(150);
        let more =
            if self.random.random_bool(0.3) { ", metadata = metadata || '{\"again\": [1, null, \"ü\"]}'" } else { "" };
        let update = format!(
            "UPDATE events SET event_value = coalesce(event_value, 0) + 1, event_label = md5(event_label || id){more} WHERE id = ANY($1)"
        );
        client.execute(&update, &[&events]).await
    }

    async fn rewrite_visits(&mut self, client: &Client) -> Outcome {
        let visits: Vec<Uuid> = self.some_visits(40).into_iter().map(|at| self.visits[at].id).collect();
        let update = "UPDATE sessions SET event_count = event_count + 1, last_seen_at = last_seen_at + interval '1 second', \
            scroll_pct = (coalesce(scroll_pct, 0) + 7) % 101, exit_page = '/exit-' || event_count, signals = 31, lead_score = 100 \
            WHERE id = ANY($1)";
        client.execute(update, &[&visits]).await
    }

    async fn remove_events(&mut self, client: &Client) -> Outcome {
        let mut gone = Vec::new();
        for at in self.some_mortals(6) {
            let keep = self.visits[at].events.len() / 2;
            gone.extend(self.visits[at].events.drain(keep..));
        }
        client.execute("DELETE FROM events WHERE id = ANY($1)", &[&gone]).await
    }

    async fn remove_visits(&mut self, client: &Client) -> Outcome {
        let places = self.some_mortals(3);
        let ids: Vec<Uuid> = places.iter().map(|at| self.visits[*at].id).collect();
        client.batch_execute("BEGIN").await?;
        let mut changes = client.execute("DELETE FROM events WHERE session_id = ANY($1)", &[&ids]).await?;
        changes += client.execute("DELETE FROM sessions WHERE id = ANY($1)", &[&ids]).await?;
        client.batch_execute("COMMIT").await?;
        self.visits.retain(|visit| !ids.contains(&visit.id));
        Ok(changes)
    }

    /// Visits and their events go to the other site, or to another month.
    async fn move_visits(&mut self, client: &Client) -> Outcome {
        let places = self.some_mortals(4);
        let ids: Vec<Uuid> = places.iter().map(|at| self.visits[*at].id).collect();
        let to_site = self.random.random_bool(0.5);
        let (site, month) = (self.random.random_range(0..2), self.random.random_range(0..4));
        client.batch_execute("BEGIN; SET CONSTRAINTS ALL DEFERRED").await?;
        let mut changes = 0;
        for (table, key, column) in [("sessions", "id", "created_month"), ("events", "session_id", "session_month")] {
            changes += if to_site {
                let update = format!("UPDATE {table} SET site_id = $1 WHERE {key} = ANY($2)");
                client.execute(&update, &[&SITES[site], &ids]).await?
            } else {
                let update = format!("UPDATE {table} SET {column} = $1 WHERE {key} = ANY($2)");
                client.execute(&update, &[&self.work.months[month], &ids]).await?
            };
        }
        client.batch_execute("COMMIT").await?;
        for at in places {
            let visit = &mut self.visits[at];
            (visit.site, visit.month) = if to_site { (site, visit.month) } else { (visit.site, month) };
        }
        Ok(changes)
    }

    /// A transaction of many subtransactions, some of which are taken back.
    async fn savepoints(&mut self, client: &Client) -> Outcome {
        client.batch_execute("BEGIN").await?;
        let (mut changes, mut kept) = (0, Vec::new());
        let many = self.random.random_bool(0.2);
        for n in 0..if many { MANY_SAVEPOINTS } else { 4 } {
            client.batch_execute("SAVEPOINT one").await?;
            let (count, each) = if many { (1, 1) } else { (4, 6) };
            let (added, visits) = self.add_visits(client, count, each).await?;
            if n % 3 == 1 {
                client.batch_execute("ROLLBACK TO one").await?;
            } else {
                let ids: Vec<Uuid> = visits.iter().map(|visit| visit.id).collect();
                // Written twice in one transaction: told twice, in this order.
                changes += client.execute("UPDATE sessions SET city = 'İzmir' WHERE id = ANY($1)", &[&ids]).await?;
                client.batch_execute("RELEASE one").await?;
                changes += added;
                kept.extend(visits);
            }
        }
        let slow = self.random.random_bool(0.1);
        if slow {
            // Its subtransactions are long over when it commits.
            tokio::time::sleep(Duration::from_millis(700)).await;
        }
        client.batch_execute("COMMIT").await?;
        self.visits.extend(kept);
        Ok(changes)
    }

    /// Nothing of it is ever told.
    async fn think_better_of_it(&mut self, client: &Client) -> Outcome {
        let events = self.some_events(60);
        client.batch_execute("BEGIN").await?;
        self.add_visits(client, 5, 5).await?;
        client.execute("UPDATE events SET event_value = -1 WHERE id = ANY($1)", &[&events]).await?;
        client.execute("DELETE FROM events WHERE id = ANY($1)", &[&events]).await?;
        client.batch_execute("ROLLBACK").await?;
        Ok(0)
    }

    /// Writes, and commits when others have come and gone.
    async fn linger(&mut self, client: &Client) -> Outcome {
        client.batch_execute("BEGIN").await?;
        let (mut changes, visits) = self.add_visits(client, 10, 8).await?;
        let events = self.some_events(60);
        changes += client.execute("UPDATE events SET event_action = 'late' WHERE id = ANY($1)", &[&events]).await?;
        let pause = self.random.random_range(300..1_500);
        tokio::time::sleep(Duration::from_millis(pause)).await;
        client.batch_execute("COMMIT").await?;
        self.visits.extend(visits);
        Ok(changes)
    }

    /// All writers write these few rows.
    async fn contend(&mut self, client: &Client) -> Outcome {
        let mut changes = 0;
        for _ in 0..5 {
            let one = shared_visit(self.random.random_range(0..SHARED));
            let update = "UPDATE sessions SET event_count = event_count + 1, cta_hovers = $2 WHERE id = $1";
            changes += client.execute(update, &[&one, &i32::from(self.number)]).await?;
        }
        Ok(changes)
    }

    /// Calls come and change; those of the first site move to the other, and those of the other go.
    async fn ring(&mut self, client: &Client) -> Outcome {
        let new = self.ids(20);
        let site = self.random.random_range(0..2);
        client.batch_execute("BEGIN").await?;
        let mut changes = client.execute(INSERT_CALLS, &[&SITES[site], &new]).await?;
        let [changed, moved, gone] = [(site, 8), (0, 3), (1, 3)].map(|(site, most)| {
            let mut calls = self.calls[site].clone();
            calls.partial_shuffle(&mut self.random, most).0.to_vec()
        });
        let update = "UPDATE calls SET duration_sec = coalesce(duration_sec, 0) + 3, status = 'COMPLETED', recording_ref = md5(id::text) \
            WHERE id = ANY($1)";
        changes += client.execute(update, &[&changed]).await?;
        changes += client.execute("UPDATE calls SET site_id = $2 WHERE id = ANY($1)", &[&moved, &SITES[1]]).await?;
        changes += client.execute("DELETE FROM calls WHERE id = ANY($1)", &[&gone]).await?;
        client.batch_execute("COMMIT").await?;
        self.calls[0].retain(|call| !moved.contains(call));
        self.calls[1].retain(|call| !gone.contains(call));
        self.calls[1].extend(moved);
        self.calls[site].extend(new);
        Ok(changes)
    }
}
