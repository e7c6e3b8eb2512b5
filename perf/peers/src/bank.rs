//! The work, the same for all contestants: the deposits, and the rule that checks them.

/// The greatest balance of an account.
pub(crate) const LIMIT_CENTS: u64 = 1_000_000_000;

/// The greatest deposit.
pub(crate) const DEPOSIT_CENTS_MAX: u64 = 1000;

/// The reason for rejecting a deposit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Refused {
    #[error("a deposit of nothing")]
    Nothing,
    #[error("{over_cents} cents above the limit")]
    OverLimit { over_cents: u64 },
}

/// Checks a deposit. Every library calls this function with the account's balance.
pub(crate) fn check(balance_cents: u64, deposit_cents: u64) -> Result<(), Refused> {
    if deposit_cents == 0 {
        return Err(Refused::Nothing);
    }
    match balance_cents.saturating_add(deposit_cents).checked_sub(LIMIT_CENTS) {
        None | Some(0) => Ok(()),
        Some(over_cents) => Err(Refused::OverLimit { over_cents }),
    }
}

/// Returns the amount of an account's deposit number `deposit`. Amounts differ between accounts and deposits, so that a
/// lost, duplicated or misplaced deposit changes a balance.
pub(crate) fn deposit_cents(account: u64, deposit: u64) -> u64 {
    1 + (account * 31 + deposit * 17) % DEPOSIT_CENTS_MAX
}

/// Returns the balance of an account after its first `deposits` deposits.
pub(crate) fn balance_cents(account: u64, deposits: u64) -> u64 {
    (0..deposits).map(|deposit| deposit_cents(account, deposit)).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_limit_can_be_reached_and_not_passed() {
        assert_eq!(check(LIMIT_CENTS - 5, 5), Ok(()));
        assert_eq!(check(LIMIT_CENTS - 5, 6), Err(Refused::OverLimit { over_cents: 1 }));
        assert_eq!(check(5, 0), Err(Refused::Nothing));
    }
}
