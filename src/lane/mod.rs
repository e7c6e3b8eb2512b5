//! Lanes: what carries an event from a producer to its shard, and what both ends tell each other about it.
//!
//! | file | contents |
//! |---|---|
//! | `ring` | the slots of a lane, in chunks |
//! | `counts` | how many events of a lane were accepted, appended and made durable |
//! | `registry` | the lanes of one shard |
//! | `door` | what a producer needs of a shard |
//! | `receipt` | proof that an event was accepted |
//! | `requests` | the mailboxes through which threads ask each other for work |
//! | `flush` | waits until everything accepted is durable |

pub(crate) mod counts;
pub(crate) mod door;
pub(crate) mod flush;
pub(crate) mod receipt;
pub(crate) mod registry;
pub(crate) mod requests;
pub(crate) mod ring;
