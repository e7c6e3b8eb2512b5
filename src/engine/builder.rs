//! An engine that is not open yet: its configuration, its inline handlers and its views.

use std::sync::Arc;

use super::Engine;
use super::start::{Code, start};
use super::store_lock::open_files;
use super::threads::Threads;
use crate::config::Config;
use crate::error::OpenError;
use crate::event::ShardId;
use crate::shard::handler::{Handler, OnError, Registered};
use crate::state::aggregate::Aggregate;
use crate::state::view::View;
use crate::storage::Storage;

/// An engine about to be opened, with its inline handlers and views.
///
/// ```
/// use corelane::envelope::Envelope;
/// use corelane::{Config, Deadline, EventLog, HandlerError, Key, Meta, OnError};
///
/// # let dir = tempfile::tempdir()?;
/// let engine = EventLog::<Envelope>::builder(Config::new(dir.path()))
///     .handler("audit", OnError::Quarantine, |_shard| {
///         |_event: &_, meta: &Meta| -> Result<(), HandlerError> {
///             assert_eq!(meta.key, Key(42));
///             Ok(())
///         }
///     })
///     .open()?;
/// engine.shutdown(Deadline::NEVER)?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct Builder<A: Aggregate> {
    config: Config,
    code: Code<A>,
    /// Replaces the file system.
    storage: Option<Arc<dyn Storage>>,
    threads_max: usize,
}

impl<A: Aggregate> std::fmt::Debug for Builder<A> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Builder")
            .field("config", &self.config)
            .field("handlers", &self.code.handlers.len())
            .field("views", &self.code.views.len())
            .finish_non_exhaustive()
    }
}

impl<A: Aggregate> Builder<A> {
    /// Adds an inline handler. The engine calls `make` once per shard when it opens, and runs handlers in the order in
    /// which they were added.
    #[must_use]
    pub fn handler<H: Handler<A::Event> + 'static>(
        mut self,
        name: &str,
        on_error: OnError,
        make: impl Fn(ShardId) -> H + 'static,
    ) -> Self {
        let name = name.to_owned();
        self.code.handlers.push(Box::new(move |shard| Registered {
            name: name.clone(),
            on_error,
            handler: Box::new(make(shard)),
        }));
        self
    }

    /// Adds a view. The engine fills it from the states when it opens and keeps it up to date afterwards.
    #[must_use]
    pub fn view(mut self, view: &(impl View<A> + Clone + 'static)) -> Self {
        self.code.views.push(Box::new(view.clone()));
        self
    }

    /// Simulates a system that starts at most `threads_max` threads.
    #[cfg(any(test, feature = "test-util"))]
    #[must_use]
    pub fn threads_max(mut self, threads_max: usize) -> Self {
        self.threads_max = threads_max;
        self
    }

    /// Puts the store on `storage` instead of the file system.
    #[cfg(any(test, feature = "test-util"))]
    pub(crate) fn storage(mut self, storage: Arc<dyn Storage>) -> Self {
        self.storage = Some(storage);
        self
    }

    /// Opens the store, recovers what it holds and starts the engine.
    ///
    /// # Errors
    /// [`OpenError`], with the reason why the store could not be opened.
    pub fn open(self) -> Result<Engine<A>, OpenError> {
        let mut config = self.config.validate()?;
        let storage: Arc<dyn Storage> = match self.storage {
            Some(storage) => storage,
            None => Arc::new(open_files(&mut config)?),
        };
        start(config, &self.code, storage, Threads { left: self.threads_max })
    }
}

impl<A: Aggregate> Engine<A> {
    /// Opens the store that `config` names, or creates it. [`Engine::recovery`] reports what it found.
    ///
    /// # Errors
    /// [`OpenError`], with the reason why the store could not be opened. The store is then unchanged, with one
    /// exception: an error during the repairs of a sound store (a full disk, for example) may leave some of them done.
    pub fn open(config: Config) -> Result<Self, OpenError> {
        Self::builder(config).open()
    }

    /// Returns a builder, to add inline handlers and views before opening.
    pub fn builder(config: Config) -> Builder<A> {
        Builder { config, code: Code::default(), storage: None, threads_max: usize::MAX }
    }
}
