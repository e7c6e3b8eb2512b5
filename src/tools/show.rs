//! Formats tables, numbers, times and texts.

use std::fmt;

use comfy_table::{CellAlignment, Table, TableComponent, presets};
use corelane::Time;

/// Returns a table whose columns are right-aligned numbers, except those listed in `texts`.
pub(super) fn table(columns: &[&str], texts: &[usize]) -> Table {
    let mut table = Table::new();
    table.load_preset(presets::NOTHING).set_style(TableComponent::HeaderLines, '─').set_header(columns);
    for (i, column) in table.column_iter_mut().enumerate() {
        column.set_cell_alignment(if texts.contains(&i) { CellAlignment::Left } else { CellAlignment::Right });
    }
    table
}

/// Returns a text from the store with its control characters escaped, so that it cannot control the terminal.
pub(super) fn printable(text: &str) -> String {
    let mut shown = String::with_capacity(text.len());
    for c in text.chars() {
        if c.is_control() {
            shown.extend(c.escape_default());
        } else {
            shown.push(c);
        }
    }
    shown
}

pub(super) fn range<T: fmt::Display>(ends: Option<(T, T)>) -> String {
    ends.map_or(String::new(), |(first, last)| format!("{first}..={last}"))
}

/// Formats a rate per second, hour or day.
pub(super) fn rate(per_second: Option<f64>) -> String {
    match per_second {
        None => String::new(),
        Some(rate) if rate >= 100.0 => format!("{}/s", grouped(rate as u64)),
        Some(rate) if rate >= 1.0 => format!("{rate:.1}/s"),
        Some(rate) if rate * 3600.0 >= 1.0 => format!("{:.1}/h", rate * 3600.0),
        Some(rate) => format!("{:.2}/day", rate * 86_400.0),
    }
}

/// Formats a time as `2010-07-30 21:55:01.009`.
pub(super) fn utc(time: Time) -> String {
    let ms = time.as_ms();
    let (days, in_day) = (ms / 86_400_000, ms % 86_400_000);
    // Counting years from March puts the leap day last (Hinnant, "civil_from_days").
    let shifted = days + 719_468;
    let (era, day_of_era) = (shifted / 146_097, shifted % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 { shifted_month + 3 } else { shifted_month - 9 };
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    let (hour, minute, second) = (in_day / 3_600_000, in_day / 60_000 % 60, in_day / 1000 % 60);
    format!("{year:04}-{month:02}-{day:02} {hour:02}:{minute:02}:{second:02}.{:03}", ms % 1000)
}

/// Formats 1234567 as `1,234,567`.
pub(super) fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut shown = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            shown.push(',');
        }
        shown.push(digit);
    }
    shown
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_shown_as_utc() {
        for (ms, shown) in [
            (0, "1970-01-01 00:00:00.000"),
            (951_782_400_000, "2000-02-29 00:00:00.000"),
            (1_280_526_901_009, "2010-07-30 21:55:01.009"),
            (4_107_542_399_999, "2100-02-28 23:59:59.999"),
            (4_107_542_400_000, "2100-03-01 00:00:00.000"),
        ] {
            assert_eq!(utc(Time::unix_ms(ms)), shown);
        }
    }

    #[test]
    fn printed_texts_and_numbers_cannot_move_the_cursor() {
        assert_eq!(printable("a\u{1b}[2J\u{9b}é"), "a\\u{1b}[2J\\u{9b}é");
        assert_eq!((grouped(0), grouped(999), grouped(1_234_567)), ("0".into(), "999".into(), "1,234,567".into()));
    }
}
