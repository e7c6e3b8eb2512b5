//! Decisions on commands for several keys.

use std::cell::LazyCell;
use std::panic::{AssertUnwindSafe, catch_unwind};

use super::batch::Batch;
use super::commands::{Decision, DecisionOf, ReplyOf, faulty, repeat};
use crate::command::{NamedKey, NamedKeys, Reply};
use crate::error::panic_text;
use crate::event::Version;
use crate::state::aggregate::{Aggregate, Emit};
use crate::state::outcomes::Outcomes;
use crate::state::states::{KEYS_MAX, StateOf, States};

impl<A: Aggregate> Batch<'_, A> {
    /// Decides a command for several keys, as [`Batch::decide`] does for one.
    #[inline(never)]
    pub(super) fn decide_many(
        &mut self,
        mut named: Box<NamedKeys>,
        published: u64,
        idempotency: Option<u64>,
        command: A::Command,
        emit: &mut Emit<A::Event>,
        outcomes: &Outcomes<A::Rejection>,
    ) -> Result<ReplyOf<A>, DecisionOf<A>> {
        let NamedKey { key, hash, .. } = named.keys[0];
        if let Some(idempotency) = idempotency
            && let Some(outcome) = outcomes.find(key, idempotency)
        {
            return Ok(repeat::<A>(key, outcome));
        }
        let now = self.time();
        let fresh = LazyCell::new(A::default);
        let look = |named: &NamedKey| match self.keys.get_hashed(named.key, named.hash) {
            Some(known) => StateOf { key: named.key, version: known.version, state: &known.state },
            None => StateOf { key: named.key, version: Version(0), state: &*fresh },
        };
        let mut states = [look(&named.keys[0]); KEYS_MAX];
        for (at, one) in named.keys.iter_mut().enumerate() {
            if at > 0 {
                states[at] = look(one);
            }
            one.version = states[at].version;
        }
        if let Some(at) = named.keys.iter().position(|named| !named.expected.holds(named.version)) {
            return Ok(Reply::WrongVersionOf(at, named));
        }
        emit.begin_many(named.keys.iter().map(|named| named.key), key, named.keys[0].version, now);
        let states = States::new(&states[..named.keys.len()]);
        let decided = match catch_unwind(AssertUnwindSafe(|| A::decide_many(&states, command, emit))) {
            Ok(decided) => decided,
            Err(panic) => return Ok(Reply::Panicked(panic_text(&*panic))),
        };
        if let Some(fault) = emit.fault {
            return Ok(faulty::<A>(fault));
        }
        let decision = |rejection, named| Decision { key, hash, published, idempotency, rejection, named: Some(named) };
        match decided {
            Err(rejection) if idempotency.is_none() => Ok(Reply::Rejected(rejection)),
            Err(rejection) => {
                emit.events.clear();
                Err(decision(Some(rejection), named))
            }
            Ok(()) if emit.events.is_empty() && idempotency.is_none() => Ok(Reply::DoneEach(named)),
            Ok(()) => match self.undeclared(emit) {
                Some(reply) => Ok(reply),
                None => Err(decision(None, named)),
            },
        }
    }
}
