//! The store's manifest (what is fixed when a store is created, and the event types it has seen) and
//! each shard's span (which segments must exist). Small binary files with a CRC; see `FORMAT.md`.

use std::hash::{BuildHasher as _, Hasher as _, RandomState};
use std::path::{Path, PathBuf};

use crate::clock::wall_now;
use crate::config::{SEGMENT_BYTES, SHARDS_MAX};
use crate::error::{ConfigError, OpenError};
use crate::event::{Event, EventType, EventTypeId, Root, ShardId};
use crate::log::format::{FORMAT_VERSION, OFFSETS_END, archive_fingerprint};
use crate::storage::framed::{u16_at, u32_at, u64_at};
use crate::storage::{Storage, replace};

const MANIFEST_MAGIC: [u8; 8] = *b"corelman";
const SPAN_MAGIC: [u8; 8] = *b"corelspn";
/// The manifest's file name.
pub(crate) const MANIFEST: &str = "manifest";
/// The span's file name.
pub(crate) const SPAN: &str = "span";
const MANIFEST_FIXED_BYTES: usize = 48;
const SPAN_BYTES: usize = 32;
/// A name's length is stored in two bytes.
const NAME_BYTES_MAX: usize = u16::MAX as usize;

/// What a store is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Manifest {
    /// Drawn at random when the store is created, never 0: tells this store from every other.
    pub(crate) store_id: u64,
    pub(crate) shards: u16,
    pub(crate) segment_bytes: u64,
    /// Size and alignment of an archived event's root; zeros where that is not known.
    pub(crate) root: Root,
    /// Every layout ever declared for the store: id, schema version, name; several versions of one type in the order they came.
    pub(crate) types: Vec<StoredType>,
}

/// An event type as the manifest has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct StoredType {
    pub(crate) id: EventTypeId,
    pub(crate) schema_version: u16,
    pub(crate) name: String,
}

impl Manifest {
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut out = Vec::new();
        out.extend(MANIFEST_MAGIC);
        out.extend(FORMAT_VERSION.to_le_bytes());
        out.extend(archive_fingerprint().to_le_bytes());
        out.extend(self.shards.to_le_bytes());
        out.extend(self.root.align.to_le_bytes());
        out.extend([0; 4]);
        out.extend(self.segment_bytes.to_le_bytes());
        out.extend((self.types.len() as u32).to_le_bytes());
        out.extend(self.root.bytes.to_le_bytes());
        out.extend(self.store_id.to_le_bytes());
        debug_assert_eq!(out.len(), MANIFEST_FIXED_BYTES);
        for t in &self.types {
            out.extend(t.id.0.to_le_bytes());
            out.extend(t.schema_version.to_le_bytes());
            out.extend((t.name.len() as u16).to_le_bytes());
            out.extend(t.name.as_bytes());
        }
        let crc = crc32c::crc32c(&out);
        out.extend(crc.to_le_bytes());
        out
    }

    pub(crate) fn decode(path: &Path, bytes: &[u8]) -> Result<Self, OpenError> {
        let foreign = |why| OpenError::ForeignFile { path: path.to_owned(), why };
        let body = checked(path, bytes, MANIFEST_MAGIC, MANIFEST_FIXED_BYTES)?;
        let archive = u32_at(body, 12);
        if archive != archive_fingerprint() {
            return Err(OpenError::ArchiveFormat {
                path: path.to_owned(),
                found: archive,
                known: archive_fingerprint(),
            });
        }
        let mut types = Vec::new();
        let mut rest = &body[MANIFEST_FIXED_BYTES..];
        for _ in 0..u32_at(body, 32) {
            if rest.len() < 6 || rest.len() < 6 + usize::from(u16_at(rest, 4)) {
                return Err(foreign("the manifest's type list is cut short"));
            }
            let (name, after) = rest[6..].split_at(usize::from(u16_at(rest, 4)));
            let name = std::str::from_utf8(name).map_err(|_| foreign("a type name in the manifest is not UTF-8"))?;
            types.push(StoredType {
                id: EventTypeId(u16_at(rest, 0)),
                schema_version: u16_at(rest, 2),
                name: name.to_owned(),
            });
            rest = after;
        }
        let root = Root { bytes: u32_at(body, 36), align: u16_at(body, 18) };
        let manifest =
            Self { store_id: u64_at(body, 40), shards: u16_at(body, 16), segment_bytes: u64_at(body, 24), root, types };
        if !rest.is_empty() {
            return Err(foreign("the manifest goes on behind its type list"));
        }
        manifest.impossible().map_or(Ok(manifest), |why| Err(foreign(why)))
    }

    /// What no program writes, if it says such a thing: a CRC that holds makes no number right.
    fn impossible(&self) -> Option<&'static str> {
        if !(1..=SHARDS_MAX).contains(&self.shards) {
            return Some("the manifest's number of shards is out of range");
        }
        if !SEGMENT_BYTES.contains(&self.segment_bytes) || !self.segment_bytes.is_power_of_two() {
            return Some("the manifest's segment size is out of range");
        }
        if self.store_id == 0 {
            return Some("the manifest has no store id");
        }
        let Root { bytes, align } = self.root;
        let is_known = align.is_power_of_two() && bytes.is_multiple_of(u32::from(align));
        if self.root != Root::default() && !is_known {
            return Some("the manifest's size and alignment of an event do not fit");
        }
        for (i, t) in self.types.iter().enumerate() {
            let mut before = self.types[..i].iter();
            if t.id.0 == 0 || before.any(|o| (o.id, o.schema_version) == (t.id, t.schema_version)) {
                return Some("the manifest's type list has an id twice, or the id 0");
            }
            if self.types[..i].iter().any(|o| (o.id == t.id) != (o.name == t.name)) {
                return Some("the manifest's type list has two names of one id, or two ids of one name");
            }
        }
        None
    }

    /// The store's manifest, or `None` where there is no store yet.
    pub(crate) fn load(storage: &dyn Storage, dir: &Path) -> Result<Option<Self>, OpenError> {
        let path = dir.join(MANIFEST);
        match storage.read(&path) {
            Ok(bytes) => Self::decode(&path, &bytes).map(Some),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(source) => Err(OpenError::Io { action: "reading", path, source }),
        }
    }

    pub(crate) fn save(&self, storage: &dyn Storage, dir: &Path) -> Result<(), OpenError> {
        replace(storage, dir, MANIFEST, &self.encode()).map_err(|source| OpenError::Io {
            action: "writing",
            path: dir.join(MANIFEST),
            source,
        })
    }

    /// Takes in the types a program declares. `true` when something is new and the manifest must be saved.
    pub(crate) fn declare<E: Event>(&mut self) -> Result<bool, OpenError> {
        let root = Root::of::<E>();
        let mut changed = self.root != root;
        // The size is that of the newest layouts; an older program is refused for what it finds.
        let newest = |id| self.types.iter().filter(|t| t.id == id).map(|t| t.schema_version).max();
        let is_as_stored = |declared: &&EventType| newest(declared.id) == Some(declared.schema_version);
        if changed
            && self.root != Root::default()
            && let Some(declared) = E::TYPES.iter().find(is_as_stored)
        {
            return Err(OpenError::ArchiveSize {
                event_type: declared.id,
                stored: self.root.bytes,
                stored_align: self.root.align,
                declared: root.bytes,
                declared_align: root.align,
            });
        }
        self.root = root;
        for (i, declared) in E::TYPES.iter().enumerate() {
            if declared.id.0 == 0 || E::TYPES[..i].iter().any(|t| t.id == declared.id) {
                return Err(ConfigError::DuplicateEventType { id: declared.id }.into());
            }
            if let Some(first) = E::TYPES[..i].iter().find(|t| t.name == declared.name) {
                let (name, first, second) = (declared.name.to_owned(), first.id, declared.id);
                return Err(ConfigError::DuplicateEventName { name, first, second }.into());
            }
            if declared.name.len() > NAME_BYTES_MAX {
                let (id, bytes) = (declared.id, declared.name.len());
                return Err(ConfigError::EventNameTooLong { id, bytes, bytes_max: NAME_BYTES_MAX }.into());
            }
            if let Some(stored) = self.types.iter().find(|t| t.name == declared.name && t.id != declared.id) {
                let (name, stored) = (declared.name.to_owned(), stored.id);
                return Err(OpenError::EventTypeRenumbered { name, stored, declared: declared.id });
            }
            match self.types.iter().find(|t| t.id == declared.id) {
                Some(stored) if stored.name != declared.name => {
                    return Err(OpenError::EventTypeRenamed {
                        event_type: declared.id,
                        stored: stored.name.clone(),
                        declared: declared.name.to_owned(),
                    });
                }
                Some(_)
                    if self
                        .types
                        .iter()
                        .any(|t| t.id == declared.id && t.schema_version == declared.schema_version) => {}
                _ => {
                    changed = true;
                    self.types.push(StoredType {
                        id: declared.id,
                        schema_version: declared.schema_version,
                        name: declared.name.to_owned(),
                    });
                }
            }
        }
        for (i, upcaster) in E::UPCASTERS.iter().enumerate() {
            let (event_type, schema_version) = (upcaster.event_type, upcaster.schema_version);
            let older = E::TYPES.iter().any(|t| t.id == event_type && schema_version < t.schema_version);
            let mut before = E::UPCASTERS[..i].iter();
            if !older || before.any(|u| (u.event_type, u.schema_version) == (event_type, schema_version)) {
                return Err(ConfigError::UselessUpcaster { event_type, schema_version }.into());
            }
        }
        Ok(changed)
    }

    /// A type's name, or `?` for one the manifest does not know.
    pub(crate) fn type_name(&self, id: EventTypeId) -> &str {
        self.types.iter().find(|t| t.id == id).map_or("?", |t| &t.name)
    }
}

/// Which segments of a shard must exist: `first..=last` (the last may not have been used yet).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Span {
    pub(crate) first: u64,
    pub(crate) last: u64,
}

impl Span {
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut out = Vec::new();
        out.extend(SPAN_MAGIC);
        out.extend(FORMAT_VERSION.to_le_bytes());
        out.extend(self.first.to_le_bytes());
        out.extend(self.last.to_le_bytes());
        let crc = crc32c::crc32c(&out);
        out.extend(crc.to_le_bytes());
        debug_assert_eq!(out.len(), SPAN_BYTES);
        out
    }

    /// The span of a shard whose segments have this size.
    pub(crate) fn decode(path: &Path, bytes: &[u8], segment_bytes: u64) -> Result<Self, OpenError> {
        let foreign = |why| OpenError::ForeignFile { path: path.to_owned(), why };
        let body = checked(path, bytes, SPAN_MAGIC, SPAN_BYTES - 4)?;
        if body.len() != SPAN_BYTES - 4 {
            return Err(foreign("the span has another length"));
        }
        let span = Self { first: u64_at(body, 12), last: u64_at(body, 20) };
        if span.first > span.last {
            return Err(foreign("the span ends before it begins"));
        }
        if span.last >= OFFSETS_END / segment_bytes {
            return Err(foreign("the span lies beyond the last offset"));
        }
        Ok(span)
    }

    pub(crate) fn load(storage: &dyn Storage, shard_dir: &Path, segment_bytes: u64) -> Result<Option<Self>, OpenError> {
        let path = shard_dir.join(SPAN);
        match storage.read(&path) {
            Ok(bytes) => Self::decode(&path, &bytes, segment_bytes).map(Some),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(source) => Err(OpenError::Io { action: "reading", path, source }),
        }
    }

    pub(crate) fn save(&self, storage: &dyn Storage, shard_dir: &Path) -> std::io::Result<()> {
        replace(storage, shard_dir, SPAN, &self.encode())
    }
}

/// Checks magic, version and CRC; returns the content without its CRC.
pub(crate) fn checked<'a>(
    path: &Path,
    bytes: &'a [u8],
    magic: [u8; 8],
    bytes_min: usize,
) -> Result<&'a [u8], OpenError> {
    let foreign = |why| OpenError::ForeignFile { path: path.to_owned(), why };
    if bytes.len() < bytes_min + 4 {
        return Err(foreign("the file is cut short"));
    }
    if bytes[..8] != magic {
        return Err(foreign("wrong magic"));
    }
    let (body, crc) = bytes.split_at(bytes.len() - 4);
    let version = u32_at(body, 8);
    if crc32c::crc32c(body) == u32_at(crc, 0) {
        if version == FORMAT_VERSION {
            return Ok(body);
        }
        return Err(OpenError::UnknownFormat { path: path.to_owned(), found: version, known: FORMAT_VERSION });
    }
    Err(foreign("its CRC does not hold"))
}

/// The folder of one shard.
pub(crate) fn shard_dir(dir: &Path, shard: ShardId) -> PathBuf {
    dir.join(format!("shard-{:04}", shard.0))
}

/// The name of segment `index`.
pub(crate) fn segment_name(index: u64) -> String {
    format!("{index:012}.seg")
}

/// The number of a segment's file name, if it is one.
pub(crate) fn segment_index(name: &str) -> Option<u64> {
    let digits = name.strip_suffix(".seg")?;
    if digits.len() != 12 || !digits.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    digits.parse().ok()
}

/// Whether a text may be the name of a consumer or a gate, which is that of its folder.
pub(crate) fn is_folder_name(text: &str) -> bool {
    let fits = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || b"._-".contains(&byte);
    (1..=64).contains(&text.len()) && !text.starts_with('.') && text.bytes().all(fits)
}

/// Where a new segment is made before it gets its name.
pub(crate) const FRESH: &str = "fresh.tmp";

/// A salt that no earlier life of the file had: random per process, different per segment.
pub(crate) fn fresh_salt(index: u64) -> u32 {
    (random(index) as u32).max(1)
}

/// A number for a new store, never 0.
pub(crate) fn fresh_id() -> u64 {
    random(0).max(1)
}

fn random(seed: u64) -> u64 {
    let mut hasher = RandomState::new().build_hasher();
    hasher.write_u64(seed);
    hasher.write_u64(wall_now().0);
    hasher.finish()
}

/// The number of a file that waits to be written again, if the name is that of one.
pub(crate) fn spare_number(name: &str) -> Option<u64> {
    let digits = name.strip_prefix("spare-")?.strip_suffix(".seg")?;
    if !digits.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    // Counted on from the highest: a name beyond what is ever counted to is not of a spare.
    digits.parse().ok().filter(|&number| number < 1 << 48)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::log::format::tests::assert_golden;

    #[test]
    fn manifest_is_frozen() {
        let manifest = Manifest {
            store_id: 0x0102_0304_0506_0708,
            shards: 12,
            segment_bytes: 256 << 20,
            root: Root::default(),
            types: vec![
                StoredType { id: EventTypeId(1), schema_version: 2, name: "player_moved".into() },
                StoredType { id: EventTypeId(300), schema_version: 1, name: "größe".into() },
            ],
        };
        let bytes = manifest.encode();
        assert_golden("manifest.bin", &bytes);
        assert_eq!(Manifest::decode(Path::new("manifest"), &bytes).expect("decodes"), manifest);
    }

    #[test]
    fn span_is_frozen() {
        let span = Span { first: 3, last: 0x0102_0304_0506 };
        let bytes = span.encode();
        assert_golden("span.bin", &bytes);
        assert_eq!(Span::decode(Path::new("span"), &bytes, 1).expect("decodes"), span);
    }

    #[test]
    fn names_are_those_of_plain_folders() {
        for name in ["a", "mail-2.x_y", &"x".repeat(64)] {
            assert!(is_folder_name(name), "{name}");
        }
        for name in ["", ".hidden", "..", "A", "a/b", "ä", "a b", &"x".repeat(65)] {
            assert!(!is_folder_name(name), "{name}");
        }
    }
}
