//! Lanes: the SPSC rings that carry events from producers to shards, and the counts that both ends share.
//!
//! | file | contents |
//! |---|---|
//! | `ring` | the slots of a lane, in chunks |
//! | `counts` | the numbers of events of a lane that were accepted, appended and made durable |
//! | `registry` | the lanes of one shard, for other threads |
//! | `door` | the state that producers and clients share with a shard |
//! | `receipt` | proof that an event was accepted, and waits for the event |
//! | `shared` | the queue of many producers to one shard |
//! | `shared_receipt` | receipts of that queue |
//! | `requests` | the mailboxes through which threads ask each other for work |
//! | `flush` | a wait until accepted events are durable |

pub(crate) mod counts;
pub(crate) mod door;
pub(crate) mod flush;
pub(crate) mod receipt;
pub(crate) mod registry;
pub(crate) mod requests;
pub(crate) mod ring;
pub(crate) mod shared;
pub(crate) mod shared_receipt;
