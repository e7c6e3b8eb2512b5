//! Decisions on commands for several keys.

use std::cell::LazyCell;
use std::panic::{AssertUnwindSafe, catch_unwind};

use super::batch::Batch;
use super::commands::{DecisionOf, ReplyOf, panicked, repeat};
use super::targets::Each;
use crate::command::{NamedKey, Reply, WrongVersion};
use crate::event::Version;
use crate::state::aggregate::{Aggregate, Emit};
use crate::state::outcomes::Outcomes;
use crate::state::states::{KEYS_MAX, StateOf, States};

impl<A: Aggregate> Batch<'_, A> {
    /// Decides a command for several keys. Returns `Ok` if there is nothing to append, and `Err` with a decision that
    /// must be appended.
    #[inline(never)]
    pub(super) fn decide_many(
        &mut self,
        mut decision: DecisionOf<A, Each>,
        command: A::Command,
        emit: &mut Emit<A::Event>,
        outcomes: &Outcomes<A::Rejection>,
    ) -> Result<ReplyOf<A>, DecisionOf<A, Each>> {
        let named = &mut decision.targets.named.keys;
        let key = named[0].key;
        if let Some(idempotency) = decision.idempotency
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
        let mut states = [look(&named[0]); KEYS_MAX];
        for (at, one) in named.iter_mut().enumerate() {
            if at > 0 {
                states[at] = look(one);
            }
            one.version = states[at].version;
        }
        if let Some(wrong) = named.iter().find(|named| !named.expected.holds(named.version)) {
            let &NamedKey { key, expected, version: found, .. } = wrong;
            return Ok(Reply::WrongVersion(Box::new(WrongVersion { key, expected, found })));
        }
        let version = named[0].version;
        emit.begin_many(named.iter().map(|named| named.key), key, version, now);
        let states = States::new(&states[..named.len()]);
        let decided = catch_unwind(AssertUnwindSafe(|| A::decide_many(&states, command, emit)));
        emit.end_many();
        match decided {
            Ok(decided) => self.judge(decision, decided, version, emit),
            Err(panic) => Ok(panicked::<A>(emit, &*panic)),
        }
    }
}
