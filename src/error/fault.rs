//! Whose fault an error is: the request's, a passing condition's, or neither. Each error says it in one exhaustive
//! match, so a new variant must be classified.

use std::io;

use rustix::io::Errno;

use super::{
    GateError, HistoryError, LiveError, OpenError, PositionError, ReadError, Rejected, RejectedReason, WaitError,
};

/// Whose fault an error is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fault {
    /// The request itself: repeated unchanged, it fails again.
    Request,
    /// A passing condition: the same call may succeed later, and repeating it does no harm.
    Passing,
    /// The engine, the store or the program: repeating the call does not help, or might do its work twice.
    Neither,
}

/// The two questions that say [whose fault](corelane::error#whose-fault) an error is, for code that treats the errors of
/// several calls alike. Each of these errors also has the two functions as its own.
///
/// ```
/// use corelane::error::{HistoryError, WaitError, WhoseFault};
///
/// /// The HTTP status for an error.
/// fn status(error: &impl WhoseFault) -> u16 {
///     match (error.is_client_error(), error.is_retryable()) {
///         (true, _) => 422,
///         (_, true) => 503,
///         _ => 500,
///     }
/// }
///
/// assert_eq!(status(&WaitError::TimedOut), 503);
/// assert_eq!(status(&HistoryError::Wait(WaitError::Closed)), 500);
/// ```
pub trait WhoseFault {
    /// Returns `true` if the request itself is at fault, which an HTTP server answers with a 4xx status.
    fn is_client_error(&self) -> bool;
    /// Returns `true` if a passing condition is at fault, which an HTTP server answers with 503: the same call may
    /// succeed later, and repeating it does no harm.
    fn is_retryable(&self) -> bool;
}

/// Gives an error the two public questions, answered by its `fault`.
macro_rules! says_whose_fault {
    ($name:ident $(<$generic:ident>)?) => {
        impl $(<$generic>)? $name $(<$generic>)? {
            /// Returns `true` if the request itself is at fault, which an HTTP server answers with a 4xx status. The same
            /// request fails again until the data it refers to has changed. [The table](corelane::error#whose-fault)
            /// lists all errors.
            #[must_use]
            pub fn is_client_error(&self) -> bool {
                self.fault() == $crate::error::fault::Fault::Request
            }

            /// Returns `true` if a passing condition is at fault, which an HTTP server answers with 503: the same call
            /// may succeed later, and repeating it does no harm. [The table](corelane::error#whose-fault) lists all
            /// errors.
            #[must_use]
            pub fn is_retryable(&self) -> bool {
                self.fault() == $crate::error::fault::Fault::Passing
            }
        }

        impl $(<$generic>)? $crate::error::WhoseFault for $name $(<$generic>)? {
            fn is_client_error(&self) -> bool {
                self.is_client_error()
            }

            fn is_retryable(&self) -> bool {
                self.is_retryable()
            }
        }
    };
}
pub(crate) use says_whose_fault;

/// Returns `true` for the error of an operation, other than a sync, that was interrupted or lacked a resource that may
/// become available again (space, quota, descriptors, memory). The operation then changed nothing and may be retried.
pub(crate) fn is_exhausted(error: &io::Error) -> bool {
    use io::ErrorKind::{Interrupted, OutOfMemory, QuotaExceeded, StorageFull, WouldBlock};
    let kinds = [StorageFull, QuotaExceeded, OutOfMemory, Interrupted, WouldBlock];
    let descriptors = [Errno::MFILE, Errno::NFILE].map(|errno| Some(errno.raw_os_error()));
    kinds.contains(&error.kind()) || descriptors.contains(&error.raw_os_error())
}

/// The fault of a failed operation of the file system.
pub(crate) fn fault_of_io(error: &io::Error) -> Fault {
    if is_exhausted(error) { Fault::Passing } else { Fault::Neither }
}

says_whose_fault!(Rejected<E>);

impl<E> Rejected<E> {
    fn fault(&self) -> Fault {
        self.reason().fault()
    }
}

says_whose_fault!(RejectedReason);

impl RejectedReason {
    pub(crate) fn fault(&self) -> Fault {
        match self {
            Self::TooLarge { .. } | Self::Keys(_) => Fault::Request,
            Self::Full | Self::StorageFull => Fault::Passing,
            Self::OnEngineThread | Self::Closed | Self::ShardFailed(_) | Self::UndeclaredType { .. } => Fault::Neither,
        }
    }
}

says_whose_fault!(WaitError);

impl WaitError {
    pub(crate) fn fault(&self) -> Fault {
        match self {
            Self::TimedOut | Self::CheckpointFailed => Fault::Passing,
            Self::ShardFailed(_)
            | Self::Closed
            | Self::QuestionPanicked(_)
            | Self::OnEngineThread
            | Self::NeverDurable => Fault::Neither,
        }
    }
}

says_whose_fault!(PositionError);

impl PositionError {
    fn fault(&self) -> Fault {
        match self {
            Self::Malformed { .. }
            | Self::OtherStore { .. }
            | Self::OtherShard { .. }
            | Self::AheadOfLog { .. }
            | Self::OtherHistory { .. } => Fault::Request,
        }
    }
}

says_whose_fault!(ReadError);

impl ReadError {
    pub(crate) fn fault(&self) -> Fault {
        match self {
            Self::BeyondRetention { .. } | Self::NotARecord { .. } => Fault::Request,
            Self::Position(error) => error.fault(),
            Self::Corruption(_) => Fault::Neither,
            Self::Io { source, .. } => fault_of_io(source),
        }
    }
}

says_whose_fault!(LiveError);

impl LiveError {
    fn fault(&self) -> Fault {
        match self {
            // The next call continues behind the events that were missed.
            Self::Lagged { .. } => Fault::Passing,
            Self::UnknownType { .. } | Self::NoTypes => Fault::Request,
            Self::Read(error) => error.fault(),
            Self::Wait(error) => error.fault(),
        }
    }
}

says_whose_fault!(HistoryError);

impl HistoryError {
    fn fault(&self) -> Fault {
        match self {
            Self::BeyondRetention { .. } | Self::NotYet { .. } => Fault::Request,
            Self::Read(error) => error.fault(),
            Self::Panicked(_) => Fault::Neither,
            Self::Wait(error) => error.fault(),
        }
    }
}

says_whose_fault!(OpenError);

impl OpenError {
    pub(crate) fn fault(&self) -> Fault {
        match self {
            Self::Locked { .. } => Fault::Passing,
            Self::Io { source, .. } => fault_of_io(source),
            Self::Config(_)
            | Self::ShardCount { .. }
            | Self::SegmentBytes { .. }
            | Self::UnknownFormat { .. }
            | Self::ArchiveFormat { .. }
            | Self::ArchiveSize { .. }
            | Self::ForeignFile { .. }
            | Self::UnknownEventType { .. }
            | Self::EventTypeRenamed { .. }
            | Self::EventTypeRenumbered { .. }
            | Self::StatesLost { .. }
            | Self::StateLayout { .. }
            | Self::Placement { .. }
            | Self::KeyMoved { .. }
            | Self::RejectionLayout { .. }
            | Self::Corruption(_)
            | Self::Panicked(_)
            | Self::DamagedFile { .. } => Fault::Neither,
        }
    }
}

says_whose_fault!(GateError);

impl GateError {
    fn fault(&self) -> Fault {
        match self {
            Self::Publish(reason) => reason.fault(),
            Self::GapRecord { .. } => Fault::Neither,
            Self::Positions(error) => error.fault(),
            Self::Read(error) => error.fault(),
            Self::Wait(error) => error.fault(),
        }
    }
}
