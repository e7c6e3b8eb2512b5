//! The thread of a shard: pinning, waiting, ending. It does not know what the shard does in a turn.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use crate::clock::wall_now;
use crate::config::Pin;
use crate::error::panic_text;
use crate::error::{FailureCause, WaitError};
use crate::lane::door::ShardDoor;
use crate::shard::Shard;
use crate::state::aggregate::Aggregate;
use crate::sync::Wait;
use crate::sync::{AtomicBool, Idle, Ordering, thread};

/// Requests to a runner.
#[derive(Debug, Default)]
pub(crate) struct RunnerRequests {
    /// Set when the engine is dropped: give up events that cannot be appended because the disk is full.
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
        shard.log.fail(cause);
    }
    close_gates(&mut shard);
    shard.syncer.ending.store(true, Ordering::SeqCst);
    shard.syncer.signal.notify();
    door.lanes.wake_all();
    shard.taker.end();
}

fn turn_until_closed<A: Aggregate>(
    shard: &mut Shard<A>,
    door: &ShardDoor,
    requests: &RunnerRequests,
    wait: Wait,
) -> Result<(), FailureCause> {
    let mut idle = Idle::new(wait);
    while !door.closing.load(Ordering::SeqCst) {
        if let Some(failure) = shard.log.failure() {
            return Err(failure.cause.clone());
        }
        if shard.turn()? > 0 {
            idle.reset();
        } else {
            idle.step(&door.signal, shard.wake_at(), || {
                shard.has_work() || door.closing.load(Ordering::SeqCst) || shard.log.failure().is_some()
            });
        }
    }
    close_gates(shard);
    // Every accepted event is in the lanes now; append them all.
    idle.reset();
    while shard.has_events() {
        if let Some(failure) = shard.log.failure() {
            return Err(failure.cause.clone());
        }
        if shard.turn()? > 0 {
            idle.reset();
        } else if shard.is_stalled() && requests.abandon.load(Ordering::SeqCst) {
            let full = std::io::Error::from(std::io::ErrorKind::StorageFull);
            return Err(FailureCause::Storage { action: "appending accepted events", error: Arc::new(full) });
        } else {
            idle.step(&door.signal, shard.wake_at(), || {
                // A stalled shard may wait for a segment that retention frees once the states are saved.
                (!shard.is_stalled() && shard.has_events())
                    || shard.taker.has_work()
                    || shard.log.failure().is_some()
                    || requests.abandon.load(Ordering::SeqCst)
            });
        }
    }
    door.turns_ended.store(true, Ordering::SeqCst);
    send_last_snapshots(shard, &mut idle);
    finish(shard, door)
}

/// Hands the last states over to the snapshotter, which ends after the shards and makes room until then.
fn send_last_snapshots<A: Aggregate>(shard: &mut Shard<A>, idle: &mut Idle) {
    idle.reset();
    while !shard.taker.send_last() {
        idle.poll(None);
    }
}

/// Waits until everything is synced, and writes a mark that says so.
fn finish<A: Aggregate>(shard: &mut Shard<A>, door: &ShardDoor) -> Result<(), FailureCause> {
    let end = shard.log.appended.get();
    shard.syncer.flush(end);
    let synced = crate::sync::block_own(
        |waker| door.lanes.waiting_flush().register(end, waker),
        || {
            let failure = shard.log.failure().map(|failure| Err(WaitError::from(failure.clone())));
            if shard.log.durable.get() >= end { Some(Ok(())) } else { failure }
        },
    );
    if synced.is_err() {
        return Err(shard
            .log
            .failure()
            .map_or(FailureCause::Panic("the syncer has ended".into()), |failure| failure.cause.clone()));
    }
    if shard.writer.mark_now(wall_now()) {
        shard.writer.publish();
    }
    Ok(())
}

/// Closes all lanes for publishers, and waits for those that are inside a push.
fn close_gates<A: Aggregate>(shard: &mut Shard<A>) {
    shard.lanes.extend(shard.arriving.close());
    shard.clients.extend(shard.arriving_clients.close());
    // An open question is answered by its dropped promise.
    drop(shard.questions.close());
    let lanes = || shard.lanes.iter().map(|lane| &lane.shared);
    let gates = || lanes().chain(shard.clients.iter().map(|client| &client.shared)).chain([&shard.shared_lane.shared]);
    gates().for_each(|lane| lane.close_gate.close());
    for lane in gates() {
        // A thread inside is between two instructions of a push. It never waits there.
        while !lane.close_gate.is_empty() {
            thread::yield_now();
        }
        lane.space.notify();
    }
}

/// Number of cores that pinned shards leave free: for a producer, and for the threads that sync, prepare and save. With
/// fewer, one of these threads runs on a pinned shard's core, and the shard waits although another core may be free
/// (docs/decisions/0013).
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
