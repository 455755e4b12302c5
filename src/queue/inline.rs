//! No queue: the edge awaits the group commit.

use async_trait::async_trait;

use super::{Transport, Verdict};
use crate::domain::event::Event;
use crate::pipeline::{Pipeline, Pressure, Wanted};

#[async_trait]
impl Transport for Pipeline {
    async fn hand_over(&self, events: Vec<Event>) -> Vec<Verdict> {
        self.submit(events).await.into_iter().map(Verdict::Final).collect()
    }

    fn pressure(&self) -> Pressure {
        Pipeline::pressure(self)
    }

    fn refuses(&self, wanted: Wanted) -> bool {
        Pipeline::refuses(self, &[wanted])
    }
}
