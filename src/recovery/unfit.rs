//! Why a checkpoint is not used when a log is opened: data for recovery.

use crate::error::Corruption;
use crate::state::snapshot::format::Unusable;

/// Why a checkpoint is not used.
pub(crate) struct Unfit {
    pub(crate) why: Unusable,
    /// There is nothing wrong with it: it is of a log that went on further, or had not begun.
    pub(crate) is_sound: bool,
    /// What it would be if the checkpoint is right: damage to the log.
    pub(crate) damage: Option<Corruption>,
}

impl Unfit {
    pub(crate) fn of(why: impl Into<Unusable>) -> Self {
        Self { why: why.into(), is_sound: false, damage: None }
    }
}

/// Of a checkpoint that an empty log has nothing to do with.
pub(crate) const EMPTY: Unfit = Unfit { why: Unusable::Damaged("the log had not begun"), is_sound: true, damage: None };
