//! Formats tables, numbers and texts, and reads times.

use std::fmt;
use std::str::FromStr;

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

/// A time on the command line: milliseconds since 1970, which name a millisecond, or an RFC 3339 time.
#[derive(Debug, Clone)]
pub(super) enum Moment {
    Ms(u64),
    Exact(Time),
}

impl Moment {
    /// Returns the first time that the argument names.
    pub(super) fn first(&self) -> Time {
        match *self {
            Self::Ms(ms) => Time::unix_ms(ms),
            Self::Exact(time) => time,
        }
    }

    /// Returns the last time that the argument names.
    pub(super) fn last(&self) -> Time {
        match *self {
            Self::Ms(ms) => Time::end_of_ms(ms),
            Self::Exact(time) => time,
        }
    }
}

impl FromStr for Moment {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.parse() {
            Ok(ms) => Ok(Self::Ms(ms)),
            Err(_) => {
                let time =
                    Time::from_rfc3339(text).map_err(|error| format!("neither milliseconds nor a time: {error}"));
                time.map(Self::Exact)
            }
        }
    }
}

impl fmt::Display for Moment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ms(ms) => ms.fmt(f),
            Self::Exact(time) => f.write_str(&time.to_rfc3339()),
        }
    }
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
    fn a_moment_in_milliseconds_is_a_whole_millisecond() {
        let ms: Moment = "7".parse().expect("a number");
        assert_eq!((ms.first(), ms.last()), (Time(7_000_000), Time(7_999_999)));
        let exact: Moment = "1970-01-01T00:00:00.007000001Z".parse().expect("a time");
        assert_eq!((exact.first(), exact.last()), (Time(7_000_001), Time(7_000_001)));
        assert_eq!(exact.to_string(), "1970-01-01T00:00:00.007000001Z");
        for text in ["-1", "7.5", "yesterday", "1970-01-01T00:00:00"] {
            let error = text.parse::<Moment>().expect_err(text);
            assert!(error.starts_with("neither milliseconds nor a time"), "{error}");
        }
    }

    #[test]
    fn printed_texts_and_numbers_cannot_move_the_cursor() {
        assert_eq!(printable("a\u{1b}[2J\u{9b}é"), "a\\u{1b}[2J\\u{9b}é");
        assert_eq!((grouped(0), grouped(999), grouped(1_234_567)), ("0".into(), "999".into(), "1,234,567".into()));
    }
}
