//! The keys of a command besides its first, in the body of the command's outcome: `FORMAT.md` §6.

use crate::event::{Key, Version};
use crate::log::format::LOW_47;
use crate::storage::framed::u64_at;

/// Bytes of one key in the body of an outcome.
pub(crate) const OTHER_KEY_BYTES: usize = 16;

/// The keys that a command named besides its first, at least one, with their versions after the command.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct OtherKeys(Vec<(Key, Version)>);

impl OtherKeys {
    /// Returns `None` for no keys.
    pub(crate) fn new(keys: impl Iterator<Item = (Key, Version)>) -> Option<Box<Self>> {
        let keys: Vec<_> = keys.collect();
        (!keys.is_empty()).then(|| Box::new(Self(keys)))
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (Key, Version)> + '_ {
        self.0.iter().copied()
    }

    /// Returns the number of keys, as an [`Ending`](crate::log::format::Ending) holds it.
    pub(crate) fn count(others: Option<&Self>) -> u8 {
        others.map_or(0, |others| others.0.len() as u8)
    }

    /// Returns the body of an outcome.
    pub(crate) fn encode(others: Option<&Self>) -> Vec<u8> {
        let keys = others.into_iter().flat_map(Self::iter);
        keys.flat_map(|(key, version)| [key.0.to_le_bytes(), version.0.to_le_bytes()].concat()).collect()
    }

    /// Reads the body of an outcome with `count` other keys. The error is the reason why the body is invalid.
    pub(crate) fn decode(count: u8, body: &[u8]) -> Result<Option<Box<Self>>, &'static str> {
        if body.len() != usize::from(count) * OTHER_KEY_BYTES {
            return Err("an outcome does not hold the keys of its command");
        }
        let keys = body.chunks_exact(OTHER_KEY_BYTES).map(|one| (Key(u64_at(one, 0)), Version(u64_at(one, 8))));
        if keys.clone().any(|(_, version)| version.0 > LOW_47) {
            return Err("an outcome has a version that no key can have");
        }
        Ok(Self::new(keys))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::Time;
    use crate::log::format::tests::{assert_golden, sealed};
    use crate::log::format::{Ending, RECORD_HEADER_BYTES, RecordAt, RecordHeader, record_at};

    #[test]
    fn the_outcome_of_a_command_for_several_keys_is_frozen() {
        let keys = [(Key(0xfedc_ba98_7654_3210), Version(0x0000_2abb_ccdd_eeff)), (Key(9), Version(0))];
        let others = OtherKeys::new(keys.into_iter()).expect("two keys");
        let ending = Ending::Done { events: 5, others: OtherKeys::count(Some(&others)) };
        let outcome =
            RecordHeader::outcome(Key(42), 0x5555_6666_7777_8888, Version(7), ending, Time(1_700_000_000_123_456_789));
        let bytes = sealed(&outcome, &OtherKeys::encode(Some(&others)), 0x0bad_cafe);
        assert_golden("outcome-keys.bin", &bytes);
        assert_eq!(record_at(&bytes, 0x0bad_cafe), RecordAt::Record(80));
        let read = RecordHeader::decode(&bytes);
        assert!(read == outcome && read.is_outcome() && read.ending() == Some(ending));
        let body = &bytes[RECORD_HEADER_BYTES..80];
        assert_eq!(OtherKeys::decode(2, body), Ok(Some(others)));
        assert_eq!(OtherKeys::decode(0, &[]), Ok(None));
        for (count, body) in [(1, body), (3, body), (2, &body[..31]), (0, &body[..16])] {
            assert!(OtherKeys::decode(count, body).is_err(), "{count} keys in {} bytes", body.len());
        }
        let mut beyond = body.to_vec();
        beyond[14] = 0x80;
        assert!(OtherKeys::decode(2, &beyond).is_err(), "version 2^47");
    }
}
