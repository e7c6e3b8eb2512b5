//! The thread of a shard: pinning, waiting, ending. It does not know what the shard does in a turn.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use crate::config::Pin;
use crate::error::FailureCause;
use crate::error::panic_text;
use crate::lane::door::ShardDoor;
use crate::shard::Shard;
use crate::state::aggregate::Aggregate;
use crate::sync::Wait;
use crate::sync::{AtomicBool, Idle, Ordering};

/// Requests to a runner.
#[derive(Debug, Default)]
pub(crate) struct RunnerRequests {
    /// Set when the engine is dropped: the runner then gives up events that cannot be appended because the disk is
    /// full.
    pub(crate) abandon: AtomicBool,
}

/// Runs a shard until the engine closes or the shard fails.
pub(crate) fn run<A: Aggregate>(
    mut shard: Shard<A>,
    door: &ShardDoor,
    requests: &RunnerRequests,
    wait: Wait,
    core: Option<usize>,
) {
    if let Some(core) = core {
        pin_current(core);
    }
    // After a panic in the application's code, publishers must still get their answers.
    let outcome = catch_unwind(AssertUnwindSafe(|| turn_until_closed(&mut shard, door, requests, wait)));
    door.turns_ended.store(true, Ordering::SeqCst);
    let cause = match outcome {
        Ok(Ok(())) => None,
        Ok(Err(cause)) => Some(cause),
        Err(panic) => Some(FailureCause::Panic(panic_text(&*panic))),
    };
    if let Some(cause) = cause {
        shard.fail(cause);
    }
    shard.close();
    shard.end(&door.lanes);
}

fn turn_until_closed<A: Aggregate>(
    shard: &mut Shard<A>,
    door: &ShardDoor,
    requests: &RunnerRequests,
    wait: Wait,
) -> Result<(), FailureCause> {
    let mut idle = Idle::new(wait);
    while !door.closing.load(Ordering::SeqCst) {
        if let Some(failure) = door.log.failure() {
            return Err(failure.cause.clone());
        }
        if shard.turn()? > 0 {
            idle.reset();
        } else {
            idle.step(&door.signal, shard.wake_at(), || {
                shard.has_work() || door.closing.load(Ordering::SeqCst) || door.log.failure().is_some()
            });
        }
    }
    shard.close();
    // Every accepted event is in the lanes now; append them all.
    idle.reset();
    while shard.has_events() {
        if let Some(failure) = door.log.failure() {
            return Err(failure.cause.clone());
        }
        if shard.turn()? > 0 {
            idle.reset();
        } else if shard.is_stalled() && requests.abandon.load(Ordering::SeqCst) {
            let full = std::io::Error::from(std::io::ErrorKind::StorageFull);
            return Err(FailureCause::Storage { action: "appending accepted events", error: Arc::new(full) });
        } else {
            idle.step(&door.signal, shard.wake_at(), || {
                shard.has_work_to_finish() || door.log.failure().is_some() || requests.abandon.load(Ordering::SeqCst)
            });
        }
    }
    door.turns_ended.store(true, Ordering::SeqCst);
    send_last_snapshots(shard, &mut idle);
    shard.finish(&door.lanes)
}

/// Hands the last states over to the snapshotter, which ends after the shards and makes room until then.
fn send_last_snapshots<A: Aggregate>(shard: &mut Shard<A>, idle: &mut Idle) {
    idle.reset();
    while !shard.send_last_snapshots() {
        idle.poll(None);
    }
}

/// Cores that pinned shards leave free: for a producer, and for the threads that sync, prepare and save. With fewer
/// free cores, one of these threads ends up on a pinned shard's core, and the shard waits although another core may be
/// free (docs/decisions/0013).
const CORES_LEFT: usize = 2;

/// Returns the core that each shard is pinned to.
pub(crate) fn assign_cores(pin: &Pin, shards: u16) -> Vec<Option<usize>> {
    // Read before anything is pinned: a pinned thread sees only its own core.
    let allowed: Vec<usize> =
        core_affinity::get_core_ids().unwrap_or_default().into_iter().map(|core| core.id).collect();
    assign(pin, shards, &allowed)
}

fn assign(pin: &Pin, shards: u16, allowed: &[usize]) -> Vec<Option<usize>> {
    let none = vec![None; usize::from(shards)];
    match pin {
        Pin::None => none,
        Pin::Auto if allowed.len() < usize::from(shards) + CORES_LEFT => none,
        // The last cores: the first one, on which the system does its own work, is left for producers.
        Pin::Auto => allowed.iter().rev().copied().take(usize::from(shards)).map(Some).collect(),
        Pin::Cores(asked) if asked.is_empty() => none,
        Pin::Cores(asked) => {
            let checked = |&core: &usize| {
                let usable = core < CORE_ID_END && allowed.contains(&core);
                if !usable {
                    tracing::warn!(core, ?allowed, "a core of `Pin::Cores` is not allowed; the shard runs unpinned");
                }
                usable.then_some(core)
            };
            asked.iter().cycle().take(usize::from(shards)).map(checked).collect()
        }
    }
}

/// The affinity call accepts ids below this and aborts the process on others.
const CORE_ID_END: usize = 1024;

fn pin_current(core: usize) {
    if !core_affinity::set_for_current(core_affinity::CoreId { id: core }) {
        tracing::warn!(core, "the shard's thread could not be pinned and runs unpinned");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shards_are_pinned_if_enough_cores_are_left_for_other_threads() {
        let of = |pin: &Pin, shards, allowed: &[usize]| assign(pin, shards, allowed);
        assert_eq!(of(&Pin::Auto, 2, &[0, 1, 4, 5]), [Some(5), Some(4)], "the last cores");
        assert_eq!(of(&Pin::Auto, 1, &[0, 1]), [None], "other threads would have to share the shard's core");
        assert_eq!(of(&Pin::Auto, 3, &[0, 1, 2, 3]), [None; 3]);
        assert_eq!(of(&Pin::None, 1, &[0, 1, 2, 3]), [None]);
        assert_eq!(
            of(&Pin::Cores(vec![1, 7]), 3, &[0, 1]),
            [Some(1), None, Some(1)],
            "a core that is not allowed is not used"
        );
        assert_eq!(of(&Pin::Cores(vec![]), 1, &[0, 1]), [None]);
    }
}
