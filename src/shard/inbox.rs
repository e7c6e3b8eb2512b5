//! The inbox: the sources of a shard's events, commands and questions.
//!
//! The inbox does not know what the core does with them.

use std::sync::Arc;

use crate::command::{ClientEnd, Question};
use crate::lane::counts::LaneShared;
use crate::lane::ring::Slot;
use crate::lane::shared::{SharedLane, SharedSlot};
use crate::state::aggregate::Aggregate;
use crate::sync::{Arrivals, thread};

/// The shard's end of a producer's lane.
#[derive(Debug)]
pub(crate) struct LaneEnd<E> {
    pub(crate) ring: rtrb::Consumer<Slot<E>>,
    pub(crate) shared: Arc<LaneShared>,
    /// Events of this lane that are appended.
    pub(crate) appended: u64,
}

/// The lanes of one shard, and the mailboxes through which new ones arrive.
pub(super) struct Inbox<A: Aggregate> {
    /// The largest number of events or commands that one batch takes from one lane.
    pub(super) batch_max: usize,
    arriving: Arc<Arrivals<LaneEnd<A::Event>>>,
    pub(super) lanes: Vec<LaneEnd<A::Event>>,
    /// The lane that the next turn drains first.
    pub(super) lane_next: usize,
    pub(super) shared_lane: Arc<SharedLane<A::Event>>,
    /// Events taken out of the shared lane and not yet appended.
    pub(super) taken: Vec<SharedSlot<A::Event>>,
    /// Events of the shared lane that are appended.
    pub(super) shared_appended: u64,
    arriving_clients: Arc<Arrivals<ClientEnd<A>>>,
    pub(super) clients: Vec<ClientEnd<A>>,
    /// The client that the next turn drains first.
    pub(super) client_next: usize,
    questions: Arc<Arrivals<Question<A>>>,
}

impl<A: Aggregate> Inbox<A> {
    /// An inbox without lanes; new ones arrive through the mailboxes.
    pub(super) fn new(
        batch_max: usize,
        arriving: Arc<Arrivals<LaneEnd<A::Event>>>,
        shared_lane: Arc<SharedLane<A::Event>>,
        arriving_clients: Arc<Arrivals<ClientEnd<A>>>,
        questions: Arc<Arrivals<Question<A>>>,
    ) -> Self {
        Self {
            batch_max,
            arriving,
            lanes: Vec::new(),
            lane_next: 0,
            shared_lane,
            taken: Vec::with_capacity(batch_max),
            shared_appended: 0,
            arriving_clients,
            clients: Vec::new(),
            client_next: 0,
            questions,
        }
    }

    /// Adopts the lanes of new producers and clients.
    pub(super) fn adopt(&mut self) {
        if !self.arriving.is_empty() {
            self.lanes.extend(self.arriving.take());
        }
        if !self.arriving_clients.is_empty() {
            self.clients.extend(self.arriving_clients.take());
        }
    }

    /// Returns `true` if new lanes or questions have arrived.
    pub(super) fn has_arrivals(&self) -> bool {
        !self.arriving.is_empty() || !self.arriving_clients.is_empty() || !self.questions.is_empty()
    }

    /// Returns `true` if any lane holds an event or a command.
    pub(super) fn has_events(&self) -> bool {
        !self.taken.is_empty()
            || !self.shared_lane.queue.is_empty()
            || self.lanes.iter().any(|lane| !lane.ring.is_empty())
            || self.clients.iter().any(|client| !client.commands.is_empty())
    }

    /// Takes events out of the shared lane until a batch is complete or the lane is empty.
    pub(super) fn fill_taken(&mut self) {
        while self.taken.len() < self.batch_max {
            let Some(slot) = self.shared_lane.queue.pop() else { break };
            self.taken.push(slot);
        }
    }

    /// Takes the questions that have arrived.
    pub(super) fn take_questions(&mut self) -> Vec<Question<A>> {
        if self.questions.is_empty() { Vec::new() } else { self.questions.take() }
    }

    /// Removes empty lanes whose producers are gone.
    pub(super) fn retire_lanes(&mut self) {
        self.lanes.retain(|lane| {
            // In this order: everything in an abandoned ring was pushed before it was abandoned.
            let is_over = lane.ring.is_abandoned() && lane.ring.is_empty();
            if is_over {
                lane.shared.retire();
            }
            !is_over
        });
    }

    /// Removes empty lanes whose clients are gone.
    pub(super) fn retire_clients(&mut self) {
        self.clients.retain(|client| {
            // In this order, as for producers.
            let is_over = client.commands.is_abandoned() && client.commands.is_empty();
            if is_over {
                client.shared.retire();
            }
            !is_over
        });
    }

    /// Closes every lane, and waits for the publishers that have entered one. Afterwards the lanes hold every accepted
    /// event and command.
    pub(super) fn close(&mut self) {
        self.lanes.extend(self.arriving.close());
        self.clients.extend(self.arriving_clients.close());
        // A dropped question breaks its promise, which tells the asker.
        drop(self.questions.close());
        let lanes = || self.lanes.iter().map(|lane| &lane.shared);
        let clients = || self.clients.iter().map(|client| &client.shared);
        let all = || lanes().chain(clients()).chain([&self.shared_lane.shared]);
        all().for_each(|lane| lane.close_gate.close());
        for lane in all() {
            // A publisher inside the gate is in the middle of a push, where it never waits.
            while !lane.close_gate.is_empty() {
                thread::yield_now();
            }
            lane.space.notify();
        }
    }
}
