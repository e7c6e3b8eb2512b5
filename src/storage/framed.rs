//! The frame that all files of a store share: magic, format version, fields, CRC-32C. Pure functions.
//!
//! ```text
//! 0 magic 8   8 format version u32   12 fields   end − 4 crc u32, over everything before it
//! ```
//!
//! A small file is one frame. A large file begins with a frame as its header, followed by a layout of its own. Integers
//! are little-endian. Records and entries are not framed; their readers use `u32_at` and its siblings.

use std::path::Path;

use crate::error::OpenError;

/// The format version that this build writes, and the only one that it reads.
pub(crate) const FORMAT_VERSION: u32 = 3;

const VERSION_AT: usize = 8;
const FIELDS_AT: usize = 12;
/// Bytes of a frame's CRC.
pub(crate) const CRC_BYTES: usize = 4;

/// A kind of frame.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Frame {
    pub(crate) magic: [u8; 8],
    /// Length of the shortest frame of this kind, with its CRC.
    pub(crate) bytes_min: usize,
}

/// The reason why bytes are not a frame of the expected kind, or hold no valid fields.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum FrameError {
    /// The CRC does not match the bytes.
    Checksum,
    /// The CRC matches, but the frame has this other format version.
    Version(u32),
    /// A wrong magic, a wrong length, or values that no build writes.
    Foreign(&'static str),
}

impl Frame {
    /// Begins a frame with its magic and the format version.
    pub(crate) fn begin(&self) -> Writer {
        let mut out = Writer::default();
        out.bytes(&self.magic);
        out.u32(FORMAT_VERSION);
        out
    }

    /// Checks length, magic, CRC and format version, in this order. Returns a cursor at the first field.
    pub(crate) fn open<'a>(&self, bytes: &'a [u8]) -> Result<Reader<'a>, FrameError> {
        let whole = bytes.split_last_chunk::<CRC_BYTES>().filter(|_| bytes.len() >= self.bytes_min);
        let (body, crc) = whole.ok_or(CUT_SHORT)?;
        if !body.starts_with(&self.magic) {
            return Err(FrameError::Foreign("wrong magic"));
        }
        if crc32c::crc32c(body) != u32::from_le_bytes(*crc) {
            return Err(FrameError::Checksum);
        }
        match u32_at(body, VERSION_AT) {
            FORMAT_VERSION => Ok(Reader::new(&body[FIELDS_AT..])),
            version => Err(FrameError::Version(version)),
        }
    }
}

/// Returns the version that a header with a wrong CRC states, if a newer build may have written the header.
///
/// A newer format may store its CRC elsewhere, so the stated version counts even without a matching CRC. A damaged
/// version field of this format is recognized: the CRC matches once [`FORMAT_VERSION`] replaces the field, and the
/// result is `None`.
pub(crate) fn stated_version(header: &[u8]) -> Option<u32> {
    let (body, crc) = header.split_at(header.len() - CRC_BYTES);
    let stated = u32_at(body, VERSION_AT);
    let repaired = crc32c::crc32c_append(crc32c::crc32c(&body[..VERSION_AT]), &FORMAT_VERSION.to_le_bytes());
    let is_damaged = crc32c::crc32c_append(repaired, &body[FIELDS_AT..]) == u32_at(crc, 0);
    (stated != FORMAT_VERSION && !is_damaged).then_some(stated)
}

impl FrameError {
    /// Returns the error as a text that names no file.
    pub(crate) fn why(self) -> &'static str {
        match self {
            Self::Checksum => "checksum mismatch",
            Self::Version(_) => "this build does not know its format version",
            Self::Foreign(why) => why,
        }
    }

    /// Returns the error of opening a store that contains this file.
    pub(crate) fn of_file(self, path: &Path) -> OpenError {
        let path = path.to_owned();
        match self {
            Self::Version(found) => OpenError::UnknownFormat { path, found, known: FORMAT_VERSION },
            Self::Checksum | Self::Foreign(_) => OpenError::ForeignFile { path, why: self.why() },
        }
    }
}

impl From<&'static str> for FrameError {
    fn from(why: &'static str) -> Self {
        Self::Foreign(why)
    }
}

/// Appends integers and bytes.
#[derive(Debug, Default)]
pub(crate) struct Writer(Vec<u8>);

impl Writer {
    pub(crate) fn u16(&mut self, value: u16) {
        self.0.extend(value.to_le_bytes());
    }

    pub(crate) fn u32(&mut self, value: u32) {
        self.0.extend(value.to_le_bytes());
    }

    pub(crate) fn u64(&mut self, value: u64) {
        self.0.extend(value.to_le_bytes());
    }

    pub(crate) fn bytes(&mut self, bytes: &[u8]) {
        self.0.extend_from_slice(bytes);
    }

    pub(crate) fn zeros(&mut self, count: usize) {
        self.0.resize(self.0.len() + count, 0);
    }

    /// Appends the CRC and returns the bytes.
    pub(crate) fn seal(self) -> Vec<u8> {
        self.seal_after(0)
    }

    /// As [`Writer::seal`], with a CRC that continues from `seed`.
    pub(crate) fn seal_after(mut self, seed: u32) -> Vec<u8> {
        self.u32(crc32c::crc32c_append(seed, &self.0));
        self.0
    }
}

const CUT_SHORT: FrameError = FrameError::Foreign("the file is cut short");

/// A cursor over fields. Every method returns the next field, or an error if too few bytes are left.
#[derive(Debug)]
pub(crate) struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    pub(crate) fn new(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }

    pub(crate) fn u16(&mut self) -> Result<u16, FrameError> {
        self.array().map(u16::from_le_bytes)
    }

    pub(crate) fn u32(&mut self) -> Result<u32, FrameError> {
        self.array().map(u32::from_le_bytes)
    }

    pub(crate) fn u64(&mut self) -> Result<u64, FrameError> {
        self.array().map(u64::from_le_bytes)
    }

    pub(crate) fn array<const BYTES: usize>(&mut self) -> Result<[u8; BYTES], FrameError> {
        let (field, rest) = self.0.split_first_chunk().ok_or(CUT_SHORT)?;
        self.0 = rest;
        Ok(*field)
    }

    pub(crate) fn bytes(&mut self, count: usize) -> Result<&'a [u8], FrameError> {
        let (field, rest) = self.0.split_at_checked(count).ok_or(CUT_SHORT)?;
        self.0 = rest;
        Ok(field)
    }

    /// Checks that no field is left.
    pub(crate) fn end(&self) -> Result<(), FrameError> {
        if self.0.is_empty() { Ok(()) } else { Err(FrameError::Foreign("the file continues after its last field")) }
    }
}

pub(crate) fn u16_at(bytes: &[u8], at: usize) -> u16 {
    let mut raw = [0; 2];
    raw.copy_from_slice(&bytes[at..at + 2]);
    u16::from_le_bytes(raw)
}

#[inline]
pub(crate) fn u32_at(bytes: &[u8], at: usize) -> u32 {
    let mut raw = [0; 4];
    raw.copy_from_slice(&bytes[at..at + 4]);
    u32::from_le_bytes(raw)
}

#[inline]
pub(crate) fn u64_at(bytes: &[u8], at: usize) -> u64 {
    let mut raw = [0; 8];
    raw.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(raw)
}

pub(crate) fn put_u16(bytes: &mut [u8], at: usize, value: u16) {
    bytes[at..at + 2].copy_from_slice(&value.to_le_bytes());
}

#[inline]
pub(crate) fn put_u32(bytes: &mut [u8], at: usize, value: u32) {
    bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
}

#[inline]
pub(crate) fn put_u64(bytes: &mut [u8], at: usize, value: u64) {
    bytes[at..at + 8].copy_from_slice(&value.to_le_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    const FRAME: Frame = Frame { magic: *b"corelxyz", bytes_min: 30 };

    fn example() -> Vec<u8> {
        let mut out = FRAME.begin();
        out.u16(0x0102);
        out.u64(3);
        out.bytes(b"text");
        out.zeros(2);
        out.seal()
    }

    #[test]
    fn a_frame_reads_back_as_written() {
        let bytes = example();
        assert_eq!(bytes.len(), 12 + 16 + 4);
        let mut fields = FRAME.open(&bytes).expect("a whole frame");
        assert_eq!((fields.u16(), fields.u64(), fields.bytes(4)), (Ok(0x0102), Ok(3), Ok(&b"text"[..])));
        assert!(fields.end().is_err(), "two bytes are left");
        assert_eq!((fields.array::<2>(), fields.end()), (Ok([0; 2]), Ok(())));
        assert_eq!(fields.u16(), Err(CUT_SHORT));
    }

    #[test]
    fn every_flipped_bit_and_every_cut_of_a_frame_shows() {
        let whole = example();
        for bit in 0..whole.len() * 8 {
            let mut bytes = whole.clone();
            bytes[bit / 8] ^= 1 << (bit % 8);
            assert!(FRAME.open(&bytes).is_err(), "bit {bit}");
        }
        for len in 0..whole.len() {
            assert!(FRAME.open(&whole[..len]).is_err(), "{len} bytes");
        }
    }

    #[test]
    fn another_version_is_named_only_if_its_checksum_matches() {
        let mut newer = example();
        put_u32(&mut newer, VERSION_AT, FORMAT_VERSION + 1);
        assert_eq!(FRAME.open(&newer).err(), Some(FrameError::Checksum));
        assert_eq!(stated_version(&newer), None, "the version field is damaged");
        newer[20] ^= 1;
        assert_eq!(stated_version(&newer), Some(FORMAT_VERSION + 1), "a newer format may store its checksum elsewhere");
        let end = newer.len() - CRC_BYTES;
        let crc = crc32c::crc32c(&newer[..end]);
        put_u32(&mut newer, end, crc);
        assert_eq!(FRAME.open(&newer).err(), Some(FrameError::Version(FORMAT_VERSION + 1)));
    }
}
