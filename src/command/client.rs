//! The client: the commands of one thread.

use super::lane::{ClientLane, Ticket};
use crate::clock::Clock;
use crate::event::{Key, Router};
use crate::state::aggregate::Aggregate;
use crate::sync::Wait;

/// Sends the commands of one thread, through one lane to every shard and back.
///
/// [`Engine::client`](crate::Engine::client) returns a client. A client may outlive the engine; it then refuses every
/// command.
///
/// The lane to each shard holds up to `ring_capacity` commands that are in flight or have an unclaimed answer. An
/// unclaimed answer takes one slot until it is claimed or forgotten, no matter how many commands are sent and answered
/// meanwhile.
///
/// ```
/// # use corelane::{
/// #     Aggregate, Bounded, CommandError, Config, Deadline, Emit, Engine, Event, EventType, EventTypeId, Key, Meta,
/// # };
/// # use rkyv::{Archive, Deserialize, Serialize};
/// # #[derive(Archive, Serialize, Deserialize, Bounded)]
/// # struct Deposited { cents: u64 }
/// # impl Event for Deposited {
/// #     const TYPES: &'static [EventType] = &[EventType::new(1, "deposited", 1)];
/// #     fn event_type(&self) -> EventTypeId { EventTypeId(1) }
/// # }
/// # #[derive(Archive, Serialize, Deserialize, Bounded, Clone, Default)]
/// # struct Account { cents: u64 }
/// # struct Deposit(u64);
/// # #[derive(Archive, Serialize, Deserialize, Bounded, Clone, Debug, PartialEq)]
/// # struct Nothing;
/// # impl Aggregate for Account {
/// #     type Event = Deposited;
/// #     type Command = Deposit;
/// #     type Rejection = Nothing;
/// #     fn evolve(&mut self, event: &ArchivedDeposited, _meta: &Meta) { self.cents += event.cents.to_native(); }
/// #     fn decide(&self, deposit: Deposit, emit: &mut Emit<Deposited>) -> Result<(), Nothing> {
/// #         if deposit.0 == 0 { return Err(Nothing) }
/// #         emit.event(Deposited { cents: deposit.0 });
/// #         Ok(())
/// #     }
/// # }
/// # let dir = std::env::temp_dir().join(format!("corelane-client-{}", std::process::id()));
/// let engine = Engine::<Account>::open(Config::new(&dir))?;
/// let mut client = engine.client();
/// let account = Key::new(42);
///
/// // One at a time: sends, and waits for the answer.
/// let outcome = client.send(account, Deposit(100)).wait()?;
/// assert_eq!((outcome.version.0, outcome.events), (1, 1));
/// assert!(matches!(client.send(account, Deposit(0)).wait(), Err(CommandError::Rejected(Nothing))));
///
/// // Pipelined: sends now, and claims the answer later.
/// let ticket = client.send(account, Deposit(5)).once("payment-17").ticket().map_err(|refused| refused.reason())?;
/// let outcome = client.answer(ticket).wait()?;
/// outcome.receipt().durable().wait()?;
/// # engine.shutdown(Deadline::NEVER)?;
/// # std::fs::remove_dir_all(&dir)?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct Client<A: Aggregate> {
    pub(super) lanes: Vec<ClientLane<A>>,
    pub(super) clock: Clock,
    pub(super) wait: Wait,
    pub(super) router: Router,
}

impl<A: Aggregate> std::fmt::Debug for Client<A> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Client").field("shards", &self.lanes.len()).finish_non_exhaustive()
    }
}

impl<A: Aggregate> Client<A> {
    pub(crate) fn new(lanes: Vec<ClientLane<A>>, clock: Clock, wait: Wait, router: Router) -> Self {
        Self { lanes, clock, wait, router }
    }

    /// Returns the index of the lane to the shard of `key`.
    #[inline]
    pub(super) fn lane_of(&self, key: Key) -> usize {
        // A single shard needs no routing.
        if let [_] = &self.lanes[..] { 0 } else { self.router.index(key) }
    }

    /// Returns `true` if this client issued the ticket.
    pub(super) fn is_mine(&self, ticket: &Ticket) -> bool {
        self.lanes.get(ticket.lane).is_some_and(|lane| lane.id() == ticket.client)
    }

    /// Discards an answer, and frees its slot in the lane.
    pub fn forget(&mut self, ticket: Ticket) {
        if self.is_mine(&ticket) {
            self.lanes[ticket.lane].forget(ticket.number);
        }
    }

    /// Returns the number of commands in flight: sent, but not answered yet.
    #[must_use]
    pub fn on_their_way(&self) -> u64 {
        self.lanes.iter().map(|lane| lane.sent - lane.shared.appended_count()).sum()
    }
}
