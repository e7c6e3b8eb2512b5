//! Conversions of times: milliseconds, system times, and RFC 3339.
//!
//! A [`Time`] counts nanoseconds; most other systems count milliseconds. A millisecond spans a million of them, so
//! there are two conversions, one to its beginning and one to its end.

use std::time::{Duration, SystemTime};

use super::Time;
use crate::error::TimeError;

const NS_PER_MS: u64 = 1_000_000;

impl Time {
    /// The latest time. A span that ends with this time has no end: it includes even an event at this time.
    pub const END: Self = Self(u64::MAX);

    /// Returns the beginning of the millisecond `ms` after 1970. Saturates at [`Time::END`], in the year 2554.
    ///
    /// To include the events of that millisecond, use [`Time::end_of_ms`].
    #[must_use]
    pub const fn unix_ms(ms: u64) -> Self {
        Self(ms.saturating_mul(NS_PER_MS))
    }

    /// Returns the end of the millisecond `ms` after 1970: its last nanosecond. Saturates at [`Time::END`].
    ///
    /// This is the time for questions such as "the state at `ms`": an event of that millisecond is not later.
    ///
    /// ```
    /// # use corelane::Time;
    /// let event = Time::new(1_280_526_901_009_333_333);
    /// let ms = event.as_ms();
    /// assert!(Time::unix_ms(ms) < event && event <= Time::end_of_ms(ms));
    /// assert_eq!(Time::end_of_ms(ms).as_ms(), ms);
    /// ```
    #[must_use]
    pub const fn end_of_ms(ms: u64) -> Self {
        Self(ms.saturating_mul(NS_PER_MS).saturating_add(NS_PER_MS - 1))
    }

    /// Returns the whole milliseconds since 1970: the millisecond that contains this time.
    #[must_use]
    pub const fn as_ms(self) -> u64 {
        self.0 / NS_PER_MS
    }
}

impl From<Time> for SystemTime {
    fn from(time: Time) -> Self {
        // Every `Time` is in the range of the system's clock, which has 64 bits of seconds.
        SystemTime::UNIX_EPOCH + Duration::from_nanos(time.0)
    }
}

impl TryFrom<SystemTime> for Time {
    type Error = TimeError;

    /// Converts a system time.
    ///
    /// # Errors
    /// `OutOfRange` for a time before 1970 or after the year 2554.
    fn try_from(time: SystemTime) -> Result<Self, TimeError> {
        let since_1970 = time.duration_since(SystemTime::UNIX_EPOCH).map_err(|_| TimeError::OutOfRange)?;
        u64::try_from(since_1970.as_nanos()).map(Self).map_err(|_| TimeError::OutOfRange)
    }
}

#[cfg(feature = "rfc3339")]
impl Time {
    /// Reads an RFC 3339 time: `2026-11-30T07:40:51.123456789Z`, or with an offset, `2026-11-30T08:40:51+01:00`.
    ///
    /// The fraction has up to nine digits. `t`, `z`, and a space instead of `T` are accepted, as the RFC allows. A text
    /// without an offset is refused, because its time would depend on the machine.
    ///
    /// # Errors
    /// `Malformed` for any other text, a date that does not exist, and a leap second, which Unix time cannot name;
    /// `OutOfRange` for a time before 1970 or after the year 2554.
    ///
    /// ```
    /// # use corelane::Time;
    /// let time = Time::from_rfc3339("2010-07-30T23:55:01.009+02:00")?;
    /// assert_eq!(time, Time::unix_ms(1_280_526_901_009));
    /// assert_eq!(time.to_rfc3339(), "2010-07-30T21:55:01.009Z");
    /// # Ok::<(), corelane::error::TimeError>(())
    /// ```
    pub fn from_rfc3339(text: &str) -> Result<Self, TimeError> {
        let malformed = |why: String| TimeError::Malformed { text: text.chars().take(64).collect(), why };
        if let Some(why) = fault_in_shape(text.as_bytes()) {
            return Err(malformed(why.to_owned()));
        }
        let time: jiff::Timestamp = text.parse().map_err(|error: jiff::Error| malformed(error.to_string()))?;
        u64::try_from(time.as_nanosecond()).map(Self).map_err(|_| TimeError::OutOfRange)
    }

    /// Returns the time in RFC 3339, in UTC, with as many digits of the fraction as it needs:
    /// `2026-11-30T07:40:51.123456789Z`. [`Time::from_rfc3339`] reads the same time again.
    #[must_use]
    pub fn to_rfc3339(self) -> String {
        let time = jiff::Timestamp::from_nanosecond(self.0.into());
        time.expect("every `Time` is before the year 9999").to_string()
    }
}

/// Returns why a text does not have the shape of an RFC 3339 time. jiff reads more shapes than the RFC has: years of six
/// digits, dates without separators, time zones in brackets, and second 60, which it takes for 59.
#[cfg(feature = "rfc3339")]
fn fault_in_shape(text: &[u8]) -> Option<&'static str> {
    const SHAPE: &[u8] = b"0000-00-00T00:00:00";
    let matches = |shape: &[u8], text: &[u8]| {
        shape.len() == text.len()
            && shape.iter().zip(text).all(|(shape, byte)| match shape {
                b'0' => byte.is_ascii_digit(),
                b'T' => matches!(byte, b'T' | b't' | b' '),
                b'+' => matches!(byte, b'+' | b'-'),
                _ => shape == byte,
            })
    };
    let Some((local, rest)) = text.split_at_checked(SHAPE.len()).filter(|(local, _)| matches(SHAPE, local)) else {
        return Some("it does not begin with a date and a time of day");
    };
    if &local[17..] == b"60" {
        return Some("Unix time has no leap seconds");
    }
    let offset = match rest.strip_prefix(b".") {
        Some(fraction) => {
            let digits = fraction.iter().take_while(|byte| byte.is_ascii_digit()).count();
            if !(1..=9).contains(&digits) {
                return Some("the fraction of a second must have 1 to 9 digits");
            }
            &fraction[digits..]
        }
        None => rest,
    };
    match offset {
        b"Z" | b"z" => None,
        b"" => Some("the offset from UTC (Z or +00:00) is missing"),
        _ if matches(b"+00:00", offset) => None,
        _ => Some("the offset from UTC must be Z or like +00:00"),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::{any, prop_assert, prop_assert_eq, proptest};

    use super::*;

    /// The latest millisecond that a `Time` can name as a whole.
    const LAST_WHOLE_MS: u64 = u64::MAX / NS_PER_MS - 1;

    #[test]
    fn a_millisecond_contains_exactly_its_million_times() {
        for ms in [0, 1, 1_280_526_901_009, LAST_WHOLE_MS] {
            let (first, last) = (Time::unix_ms(ms), Time::end_of_ms(ms));
            assert_eq!(last.0 - first.0, NS_PER_MS - 1);
            assert_eq!((first.as_ms(), last.as_ms(), Time(last.0 + 1).as_ms()), (ms, ms, ms + 1));
        }
    }

    #[test]
    fn milliseconds_beyond_the_range_are_the_latest_time() {
        let cut = LAST_WHOLE_MS + 1;
        assert_eq!((Time::unix_ms(cut).as_ms(), Time::end_of_ms(cut)), (cut, Time::END), "the last one is cut");
        for ms in [cut + 1, u64::MAX] {
            assert_eq!((Time::unix_ms(ms), Time::end_of_ms(ms)), (Time::END, Time::END));
        }
    }

    #[test]
    fn system_times_out_of_range_are_refused() {
        let before = SystemTime::UNIX_EPOCH - Duration::from_nanos(1);
        assert_eq!(Time::try_from(before), Err(TimeError::OutOfRange));
        let last = SystemTime::from(Time::END);
        assert_eq!(Time::try_from(last), Ok(Time::END));
        assert_eq!(Time::try_from(last + Duration::from_nanos(1)), Err(TimeError::OutOfRange));
    }

    proptest! {
        #[test]
        fn every_time_survives_a_system_time(ns in any::<u64>()) {
            prop_assert_eq!(Time::try_from(SystemTime::from(Time(ns))), Ok(Time(ns)));
        }

        #[test]
        fn no_event_of_a_millisecond_is_later_than_its_end(ns in any::<u64>()) {
            let ms = Time(ns).as_ms();
            prop_assert!(Time::unix_ms(ms) <= Time(ns) && Time(ns) <= Time::end_of_ms(ms));
        }
    }

    #[cfg(feature = "rfc3339")]
    mod rfc3339 {
        use super::*;

        proptest! {
            #[test]
            fn every_time_survives_its_text(ns in any::<u64>()) {
                let text = Time(ns).to_rfc3339();
                prop_assert_eq!(Time::from_rfc3339(&text), Ok(Time(ns)), "{}", text);
            }

            #[test]
            fn no_text_panics(text in "[0-9TtZz:.+ -]{0,40}") {
                let _read = Time::from_rfc3339(&text);
            }
        }

        #[test]
        fn times_are_written_in_utc_with_the_digits_they_need() {
            for (ns, text) in [
                (0, "1970-01-01T00:00:00Z"),
                (951_782_400_000_000_000, "2000-02-29T00:00:00Z"),
                (1_280_526_901_009_000_000, "2010-07-30T21:55:01.009Z"),
                (1_796_024_451_123_456_789, "2026-11-30T07:40:51.123456789Z"),
                (4_107_542_400_000_000_000, "2100-03-01T00:00:00Z"),
                (u64::MAX, "2554-07-21T23:34:33.709551615Z"),
            ] {
                assert_eq!(Time(ns).to_rfc3339(), text);
                assert_eq!(Time::from_rfc3339(text), Ok(Time(ns)));
            }
        }

        #[test]
        fn all_forms_of_the_rfc_are_read() {
            let time = Ok(Time::unix_ms(1_280_526_901_009));
            for text in [
                "2010-07-30T21:55:01.009Z",
                "2010-07-30t21:55:01.009z",
                "2010-07-30 21:55:01.009Z",
                "2010-07-30T21:55:01.009000000Z",
                "2010-07-30T23:55:01.009+02:00",
                "2010-07-31T03:25:01.009+05:30",
                "2010-07-30T14:55:01.009-07:00",
                "2010-07-30T21:55:01.009+00:00",
                "2010-07-30T21:55:01.009-00:00",
            ] {
                assert_eq!(Time::from_rfc3339(text), time, "{text}");
            }
            assert_eq!(Time::from_rfc3339("1969-12-31T23:59:59-00:01"), Ok(Time(59_000_000_000)));
        }

        #[test]
        fn times_out_of_range_are_refused() {
            for text in [
                "1969-12-31T23:59:59.999999999Z",
                "1970-01-01T00:00:00+00:01",
                "0000-01-01T00:00:00Z",
                "2554-07-21T23:34:33.709551616Z",
                "9999-01-01T00:00:00Z",
            ] {
                assert_eq!(Time::from_rfc3339(text), Err(TimeError::OutOfRange), "{text}");
            }
        }

        #[test]
        fn every_other_text_is_malformed_and_the_error_says_why() {
            for (text, said) in [
                ("", "does not begin"),
                ("now", "does not begin"),
                ("1280526901009", "does not begin"),
                ("2010-07-30", "does not begin"),
                ("2010-07-30T21:55Z", "does not begin"),
                ("20100730T215501Z", "does not begin"),
                ("+002010-07-30T21:55:01Z", "does not begin"),
                ("2010-07-30_21:55:01Z", "does not begin"),
                ("２010-07-30T21:55:01Z", "does not begin"),
                ("2010-07-30T21:55:01", "is missing"),
                ("2010-07-30T21:55:01.009", "is missing"),
                ("2010-07-30T21:55:01+02", "must be Z"),
                ("2010-07-30T21:55:01+0200", "must be Z"),
                ("2010-07-30T21:55:01Z[Europe/Berlin]", "must be Z"),
                ("2010-07-30T21:55:01Z ", "must be Z"),
                ("2010-07-30T21:55:01.Z", "1 to 9 digits"),
                ("2010-07-30T21:55:01.0123456789Z", "1 to 9 digits"),
                ("2016-12-31T23:59:60Z", "leap seconds"),
                ("2010-02-30T21:55:01Z", "day"),
                ("2010-13-30T21:55:01Z", "month"),
                ("2010-07-30T24:55:01Z", "hour"),
                ("2010-07-30T21:60:01Z", "minute"),
                ("2010-07-30T21:55:61Z", "second"),
            ] {
                let error = Time::from_rfc3339(text).expect_err(text);
                assert!(matches!(error, TimeError::Malformed { .. }), "{text}: {error:?}");
                assert!(error.to_string().contains(said), "{text}: {error}");
            }
        }
    }
}
