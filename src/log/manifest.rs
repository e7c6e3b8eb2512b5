//! The manifest of a store (the properties that are fixed when it is created, and its event types) and the span of a
//! shard (the segments that must exist): `FORMAT.md` §3 and §4. Also the names of a store's files and folders.

use std::hash::{BuildHasher as _, Hasher as _, RandomState};
use std::path::{Path, PathBuf};

use crate::clock::wall_now;
use crate::config::{SEGMENT_BYTES, SHARDS_MAX};
use crate::error::{ConfigError, OpenError};
use crate::event::{Event, EventType, EventTypeId, PLACEMENT_NAME_BYTES_MAX, PlacementId, Root, ShardId};
use crate::log::format::{OFFSETS_END, archive_fingerprint};
use crate::storage::framed::{Frame, FrameError, Reader};
use crate::storage::{Storage, replace};

/// The manifest's file name.
pub(crate) const MANIFEST: &str = "manifest";
/// The span's file name.
pub(crate) const SPAN: &str = "span";
/// The frame of the manifest. The shortest one has no event types.
const MANIFEST_FRAME: Frame = Frame { magic: *b"corelman", bytes_min: 52 };
const SPAN_FRAME: Frame = Frame { magic: *b"corelspn", bytes_min: 32 };
/// A name's length is stored in two bytes.
const NAME_BYTES_MAX: usize = u16::MAX as usize;

/// The properties of a store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Manifest {
    /// Drawn at random when the store is created, never 0. Distinguishes this store from every other.
    pub(crate) store_id: u64,
    pub(crate) shards: u16,
    pub(crate) segment_bytes: u64,
    /// Size and alignment of an archived event's root; zeros if unknown.
    pub(crate) root: Root,
    /// How keys are placed; `None`: by their own hashes.
    pub(crate) placement: Option<PlacementId>,
    /// Every layout ever declared for the store. The versions of each type are in the order of their declaration.
    pub(crate) types: Vec<StoredType>,
}

/// An event type in the manifest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct StoredType {
    pub(crate) id: EventTypeId,
    pub(crate) schema_version: u16,
    pub(crate) name: String,
}

impl Manifest {
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut out = MANIFEST_FRAME.begin();
        out.u32(archive_fingerprint());
        out.u16(self.shards);
        out.u16(self.root.align);
        let (name, version) = self.placement.as_ref().map_or(("", 0), |id| (&id.name, id.version));
        out.u16(name.len() as u16);
        out.u16(version);
        out.u64(self.segment_bytes);
        out.u32(self.types.len() as u32);
        out.u32(self.root.bytes);
        out.u64(self.store_id);
        out.bytes(name.as_bytes());
        for t in &self.types {
            out.u16(t.id.0);
            out.u16(t.schema_version);
            out.u16(t.name.len() as u16);
            out.bytes(t.name.as_bytes());
        }
        out.seal()
    }

    pub(crate) fn decode(path: &Path, bytes: &[u8]) -> Result<Self, OpenError> {
        let of_file = |error: FrameError| error.of_file(path);
        let mut fields = MANIFEST_FRAME.open(bytes).map_err(of_file)?;
        let (found, known) = (fields.u32().map_err(of_file)?, archive_fingerprint());
        if found != known {
            return Err(OpenError::ArchiveFormat { path: path.to_owned(), found, known });
        }
        Self::read(fields).map_err(of_file)
    }

    /// Reads the fields after the archive fingerprint.
    fn read(mut fields: Reader<'_>) -> Result<Self, FrameError> {
        let (shards, align) = (fields.u16()?, fields.u16()?);
        let (name_bytes, placement_version) = (fields.u16()?, fields.u16()?);
        let (segment_bytes, types) = (fields.u64()?, fields.u32()?);
        let root = Root { bytes: fields.u32()?, align };
        let store_id = fields.u64()?;
        let placement = std::str::from_utf8(fields.bytes(usize::from(name_bytes))?);
        let placement = placement.map_err(|_| "the placement's name in the manifest is not UTF-8")?.to_owned();
        if usize::from(name_bytes) > PLACEMENT_NAME_BYTES_MAX || (placement.is_empty() && placement_version > 0) {
            return Err("the manifest's placement has a name that no build writes".into());
        }
        let placement = (!placement.is_empty()).then(|| PlacementId::new(placement, placement_version));
        let read_type = |fields: &mut Reader<'_>| {
            let (id, schema_version) = (EventTypeId(fields.u16()?), fields.u16()?);
            let name_bytes = fields.u16()?;
            let name = std::str::from_utf8(fields.bytes(usize::from(name_bytes))?);
            let name = name.map_err(|_| "a type name in the manifest is not UTF-8")?.to_owned();
            Ok(StoredType { id, schema_version, name })
        };
        let types = (0..types).map(|_| read_type(&mut fields)).collect::<Result<_, FrameError>>()?;
        fields.end()?;
        let manifest = Self { store_id, shards, segment_bytes, root, placement, types };
        manifest.impossible().map_or(Ok(manifest), |why| Err(why.into()))
    }

    /// Returns the first property that no build writes. (A matching CRC alone does not make a number valid.)
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
            return Some("in the manifest, the size of an event is not a multiple of its alignment");
        }
        for (i, t) in self.types.iter().enumerate() {
            let mut before = self.types[..i].iter();
            if t.id.0 == 0 || before.any(|o| (o.id, o.schema_version) == (t.id, t.schema_version)) {
                return Some("the manifest lists a layout twice, or the event type id 0");
            }
            if self.types[..i].iter().any(|o| (o.id == t.id) != (o.name == t.name)) {
                return Some("the manifest lists two names of one event type id, or two ids of one name");
            }
        }
        None
    }

    /// Loads the manifest of the store in `dir`, or `None` if there is no store yet.
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

    /// Adds the types that a program declares. Returns `true` if the manifest has changed and must be saved.
    pub(crate) fn declare<E: Event>(&mut self) -> Result<bool, OpenError> {
        let root = Root::of::<E>();
        let mut changed = self.root != root;
        // The stored size is that of the newest layouts. An older program is refused later, because of the records in
        // the log.
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
            if let Some(stored) = self.types.iter().find(|t| t.id == declared.id && t.name != declared.name) {
                return Err(OpenError::EventTypeRenamed {
                    event_type: declared.id,
                    stored: stored.name.clone(),
                    declared: declared.name.to_owned(),
                });
            }
            let (id, schema_version) = (declared.id, declared.schema_version);
            if !self.types.iter().any(|t| (t.id, t.schema_version) == (id, schema_version)) {
                changed = true;
                self.types.push(StoredType { id, schema_version, name: declared.name.to_owned() });
            }
        }
        check_upcasters::<E>()?;
        Ok(changed)
    }

    /// Returns the name of an event type, or `?` if the manifest does not list it.
    pub(crate) fn type_name(&self, id: EventTypeId) -> &str {
        self.types.iter().find(|t| t.id == id).map_or("?", |t| &t.name)
    }
}

/// Checks that every upcaster reads an older version of a declared type, and that no two read the same one.
fn check_upcasters<E: Event>() -> Result<(), ConfigError> {
    for (i, upcaster) in E::UPCASTERS.iter().enumerate() {
        let (event_type, schema_version) = (upcaster.event_type, upcaster.schema_version);
        let is_older = E::TYPES.iter().any(|t| t.id == event_type && schema_version < t.schema_version);
        let mut before = E::UPCASTERS[..i].iter();
        if !is_older || before.any(|u| (u.event_type, u.schema_version) == (event_type, schema_version)) {
            return Err(ConfigError::UselessUpcaster { event_type, schema_version });
        }
    }
    Ok(())
}

/// The segments of a shard that must exist: `first..=last`. The last ones may be prepared and not yet begun.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Span {
    pub(crate) first: u64,
    pub(crate) last: u64,
}

impl Span {
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut out = SPAN_FRAME.begin();
        out.u64(self.first);
        out.u64(self.last);
        out.seal()
    }

    /// Reads the span of a shard with segments of `segment_bytes`.
    pub(crate) fn decode(path: &Path, bytes: &[u8], segment_bytes: u64) -> Result<Self, OpenError> {
        let read = |mut fields: Reader<'_>| {
            let span = Self { first: fields.u64()?, last: fields.u64()? };
            fields.end()?;
            if span.first > span.last {
                return Err("the span's last segment is before its first".into());
            }
            if span.last >= OFFSETS_END / segment_bytes {
                return Err("the span reaches beyond the last offset".into());
            }
            Ok(span)
        };
        SPAN_FRAME.open(bytes).and_then(read).map_err(|error| error.of_file(path))
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

/// Returns the folder of one shard.
pub(crate) fn shard_dir(dir: &Path, shard: ShardId) -> PathBuf {
    dir.join(format!("shard-{:04}", shard.0))
}

/// Returns the file name of segment `index`.
pub(crate) fn segment_name(index: u64) -> String {
    format!("{index:012}.seg")
}

/// Returns the index of the segment with this file name, or `None` if it is not the name of a segment.
pub(crate) fn segment_index(name: &str) -> Option<u64> {
    let digits = name.strip_suffix(".seg")?;
    if digits.len() != 12 || !digits.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    digits.parse().ok()
}

/// Returns `true` if a consumer or a gate may have this name, which is also the name of its folder.
pub(crate) fn is_folder_name(text: &str) -> bool {
    let fits = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || b"._-".contains(&byte);
    (1..=64).contains(&text.len()) && !text.starts_with('.') && text.bytes().all(fits)
}

/// The name of a new segment until it is prepared.
pub(crate) const FRESH: &str = "fresh.tmp";

/// Returns a new salt for segment `index`: random, never 0. An earlier use of the file had the same salt with
/// probability 2⁻³².
pub(crate) fn fresh_salt(index: u64) -> u32 {
    (random(index) as u32).max(1)
}

/// Returns a random id for a new store, never 0.
pub(crate) fn fresh_id() -> u64 {
    random(0).max(1)
}

fn random(seed: u64) -> u64 {
    let mut hasher = RandomState::new().build_hasher();
    hasher.write_u64(seed);
    hasher.write_u64(wall_now().0);
    hasher.finish()
}

/// Returns the number of the spare with this file name, or `None` if it is not the name of a spare.
pub(crate) fn spare_number(name: &str) -> Option<u64> {
    let digits = name.strip_prefix("spare-")?.strip_suffix(".seg")?;
    if !digits.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    // New spares are numbered from the highest one. No store ever reaches this bound, so the file is not a spare.
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
            placement: Some(PlacementId::new("zone".into(), 0x0203)),
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
    fn only_short_lower_case_names_without_a_leading_dot_are_folder_names() {
        for name in ["a", "mail-2.x_y", &"x".repeat(64)] {
            assert!(is_folder_name(name), "{name}");
        }
        for name in ["", ".hidden", "..", "A", "a/b", "ä", "a b", &"x".repeat(65)] {
            assert!(!is_folder_name(name), "{name}");
        }
    }
}
