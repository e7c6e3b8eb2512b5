//! Whose fault each error is, variant by variant.

use std::io;
use std::sync::Arc;

use super::fault::Fault;
use super::*;
use crate::command::{CommandError, ExpectedVersion};
use crate::consumer::{ConsumerError, LettersError};
use crate::engine::PublishSyncError;
use crate::event::{EventTypeId, Key, Offset, ShardId, Version};

const REQUEST: Fault = Fault::Request;
const PASSING: Fault = Fault::Passing;
const NEITHER: Fault = Fault::Neither;

/// Checks the public answers of an error.
macro_rules! check {
    ($($error:expr => $fault:expr),+ $(,)?) => {
        $(
            let error = $error;
            let said = (error.is_client_error(), error.is_retryable());
            assert_eq!(said, ($fault == REQUEST, $fault == PASSING), "{}: {error:?}", stringify!($error));
        )+
    };
}

fn shard_failure() -> ShardFailure {
    ShardFailure { shard: ShardId(0), cause: FailureCause::Sync(Arc::new(io::Error::other("medium"))) }
}

fn corruption() -> Corruption {
    Corruption { shard: ShardId(0), segment: 0, offset: Offset(0), why: "checksum" }
}

fn panicked() -> CodePanic {
    CodePanic { code: "evolve", shard: ShardId(0), event: None, message: String::new() }
}

fn no_space() -> io::Error {
    io::ErrorKind::StorageFull.into()
}

fn bad_medium() -> io::Error {
    io::Error::other("medium")
}

fn open_io(source: io::Error) -> OpenError {
    OpenError::Io { action: "writing", path: "a".into(), source }
}

fn read_io(source: io::Error) -> ReadError {
    ReadError::Io { action: "reading", path: "a".into(), source }
}

fn beyond_retention() -> ReadError {
    ReadError::BeyondRetention { shard: ShardId(0), asked: Offset(1), earliest: Offset(2) }
}

#[test]
fn every_error_of_publishing_says_whose_fault_it_is() {
    check! {
        RejectedReason::Full => PASSING,
        RejectedReason::StorageFull => PASSING,
        RejectedReason::OnEngineThread => NEITHER,
        RejectedReason::Closed => NEITHER,
        RejectedReason::ShardFailed(shard_failure()) => NEITHER,
        RejectedReason::TooLarge { bytes_max: 1 } => REQUEST,
        RejectedReason::Keys(KeysError::Twice { key: Key(1) }) => REQUEST,
        RejectedReason::UndeclaredType { event_type: EventTypeId(9) } => NEITHER,
        Rejected::Full(()) => PASSING,
        Rejected::StorageFull(()) => PASSING,
        Rejected::OnEngineThread(()) => NEITHER,
        Rejected::Closed(()) => NEITHER,
        Rejected::ShardFailed((), shard_failure()) => NEITHER,
        Rejected::TooLarge { event: (), bytes_max: 1 } => REQUEST,
        Rejected::Keys((), KeysError::None) => REQUEST,
        Rejected::UndeclaredType { event: (), event_type: EventTypeId(9) } => NEITHER,
        PublishSyncError::Rejected(Rejected::Full(())) => PASSING,
        PublishSyncError::Rejected(Rejected::TooLarge { event: (), bytes_max: 1 }) => REQUEST,
        PublishSyncError::<()>::Wait(WaitError::TimedOut) => NEITHER,
        PublishSyncError::<()>::Consumer { consumer: "a".into(), error: ConsumerError::NoTypes } => NEITHER,
        PublishSyncError::<()>::Unknown { consumer: "a".into() } => NEITHER,
        PublishSyncError::<()>::Recorded { consumer: "a".into() } => NEITHER,
        GateError::Publish(RejectedReason::Full) => PASSING,
        GateError::Publish(RejectedReason::TooLarge { bytes_max: 1 }) => REQUEST,
        GateError::GapRecord { path: "a".into(), source: Arc::new(no_space()) } => NEITHER,
        GateError::Positions(open_io(no_space())) => PASSING,
        GateError::Read(beyond_retention()) => REQUEST,
        GateError::Wait(WaitError::TimedOut) => PASSING,
    }
}

#[test]
fn every_error_of_a_command_says_whose_fault_it_is() {
    check! {
        CommandError::Rejected("no") => REQUEST,
        CommandError::<()>::WrongVersion { key: Key(1), expected: ExpectedVersion::Exists, found: Version(0) } => REQUEST,
        CommandError::<()>::ForeignKey { key: Key(1) } => NEITHER,
        CommandError::<()>::NotSupported => NEITHER,
        CommandError::<()>::NotSent(RejectedReason::Keys(KeysError::None)) => REQUEST,
        CommandError::<()>::TooLarge { bytes_max: 1 } => REQUEST,
        CommandError::<()>::UndeclaredType { event_type: EventTypeId(9) } => NEITHER,
        CommandError::<()>::Panicked("no".into()) => NEITHER,
        CommandError::<()>::NotSent(RejectedReason::Full) => PASSING,
        CommandError::<()>::NotSent(RejectedReason::TooLarge { bytes_max: 1 }) => REQUEST,
        CommandError::<()>::NotSent(RejectedReason::Closed) => NEITHER,
        CommandError::<()>::Unanswered(WaitError::TimedOut) => NEITHER,
        CommandError::<()>::Claimed => NEITHER,
        CommandError::<()>::NotDurable(WaitError::TimedOut) => NEITHER,
    }
    assert!(CommandError::<()>::Unanswered(WaitError::TimedOut).is_outcome_unknown());
    assert!(!CommandError::<()>::NotDurable(WaitError::TimedOut).is_outcome_unknown(), "it was carried out");
}

#[test]
fn every_error_of_waiting_and_reading_says_whose_fault_it_is() {
    let (shard, offset) = (ShardId(0), Offset(1));
    check! {
        WaitError::ShardFailed(shard_failure()) => NEITHER,
        WaitError::TimedOut => PASSING,
        WaitError::CheckpointFailed => PASSING,
        WaitError::Closed => NEITHER,
        WaitError::QuestionPanicked(String::new()) => NEITHER,
        WaitError::OnEngineThread => NEITHER,
        WaitError::NeverDurable => NEITHER,
        LiveError::Lagged { shard, missed: 1 } => PASSING,
        LiveError::UnknownType { name: "a".into() } => REQUEST,
        LiveError::NoTypes => REQUEST,
        LiveError::Read(beyond_retention()) => REQUEST,
        LiveError::Wait(WaitError::TimedOut) => PASSING,
        PositionError::Malformed { why: "length" } => REQUEST,
        PositionError::OtherStore { shard, position: 1, store: 2 } => REQUEST,
        PositionError::OtherShard { shard, position: ShardId(1) } => REQUEST,
        PositionError::AheadOfLog { shard, position: offset, end: offset } => REQUEST,
        PositionError::OtherHistory { shard, position: offset, why: "checksum" } => REQUEST,
        beyond_retention() => REQUEST,
        ReadError::NotARecord { shard, offset } => REQUEST,
        ReadError::Position(PositionError::Malformed { why: "length" }) => REQUEST,
        ReadError::Corruption(corruption()) => NEITHER,
        read_io(no_space()) => PASSING,
        read_io(bad_medium()) => NEITHER,
        HistoryError::BeyondRetention { key: Key(1), earliest: Version(2) } => REQUEST,
        HistoryError::NotYet { key: Key(1), newest: Version(2) } => REQUEST,
        HistoryError::Read(beyond_retention()) => REQUEST,
        HistoryError::Panicked(panicked()) => NEITHER,
        HistoryError::Wait(WaitError::TimedOut) => PASSING,
        HistoryError::Wait(WaitError::Closed) => NEITHER,
    }
}

#[test]
fn every_error_of_a_consumer_says_whose_fault_it_is() {
    let (shard, offset) = (ShardId(0), Offset(1));
    let name = || "a".to_owned();
    let config = ConfigError::NotPowerOfTwo { name: "a", value: 3 };
    check! {
        ConsumerError::Config(config) => NEITHER,
        ConsumerError::Name { name: name() } => REQUEST,
        ConsumerError::UnknownType { name: name() } => REQUEST,
        ConsumerError::NoTypes => REQUEST,
        ConsumerError::AlreadyRunning { name: name() } => REQUEST,
        ConsumerError::NotRegistered { name: name() } => REQUEST,
        ConsumerError::Closed => NEITHER,
        ConsumerError::Ended { failure: None } => NEITHER,
        ConsumerError::Busy { name: name() } => PASSING,
        ConsumerError::TooManyKeys => NEITHER,
        ConsumerError::Position(PositionError::Malformed { why: "length" }) => NEITHER,
        ConsumerError::PositionGone { shard, delivered: offset } => NEITHER,
        ConsumerError::BeginningGone { shard, began: offset, earliest: offset } => NEITHER,
        ConsumerError::NotStarted { why: name() } => NEITHER,
        ConsumerError::Panicked { text: name() } => NEITHER,
        ConsumerError::Files(open_io(no_space())) => PASSING,
        ConsumerError::Files(open_io(bad_medium())) => NEITHER,
        ConsumerError::Letters(LettersError::Io { action: "a", path: "a".into(), source: no_space() }) => PASSING,
        ConsumerError::Letters(LettersError::Damaged { path: "a".into(), at: 0, why: "checksum" }) => NEITHER,
        ConsumerError::Read(beyond_retention()) => REQUEST,
        ConsumerError::Wait(WaitError::TimedOut) => PASSING,
    }
}

#[test]
fn opening_again_helps_where_the_store_is_locked_or_a_resource_is_missing() {
    let (shard, path, event_type) = (ShardId(0), || "a".into(), EventTypeId(1));
    let (stored, stored_align, declared, declared_align) = (1, 1, 2, 2);
    check! {
        OpenError::Locked { dir: path() } => PASSING,
        open_io(no_space()) => PASSING,
        open_io(bad_medium()) => NEITHER,
        OpenError::Config(ConfigError::NotPowerOfTwo { name: "a", value: 3 }) => NEITHER,
        OpenError::ShardCount { stored: 1, asked: 2 } => NEITHER,
        OpenError::SegmentBytes { stored: 1, asked: 2 } => NEITHER,
        OpenError::UnknownFormat { path: path(), found: 9, known: 2 } => NEITHER,
        OpenError::ArchiveFormat { path: path(), found: 9, known: 2 } => NEITHER,
        OpenError::ArchiveSize { event_type, stored, stored_align, declared, declared_align } => NEITHER,
        OpenError::ForeignFile { path: path(), why: "name" } => NEITHER,
        OpenError::UnknownEventType { shard, event_type, name: "a".into(), schema_version: 1 } => NEITHER,
        OpenError::EventTypeRenamed { event_type, stored: "a".into(), declared: "b".into() } => NEITHER,
        OpenError::EventTypeRenumbered { name: "a".into(), stored: event_type, declared: EventTypeId(2) } => NEITHER,
        OpenError::StatesLost { shard, earliest: Offset(1) } => NEITHER,
        OpenError::StateLayout { shard, stored, stored_align, declared, declared_align } => NEITHER,
        OpenError::RejectionLayout { shard, stored, stored_align, declared, declared_align } => NEITHER,
        OpenError::Corruption(corruption()) => NEITHER,
        OpenError::Panicked(panicked()) => NEITHER,
        OpenError::DamagedFile { path: path(), at: 0, why: "checksum" } => NEITHER,
    }
}
