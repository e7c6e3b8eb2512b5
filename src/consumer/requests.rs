//! What is asked of a consumer from outside, each a small file in its folder: `FORMAT.md` §18 has the bytes.
//!
//! Writers: who asks makes the file, whole or not at all; from then on it is the driver's, which removes it when everything asked is done.
//! So a crash repeats a request and loses none.

use std::io::{self, ErrorKind};
use std::path::Path;
use std::time::Duration;

use super::dead_letter::selector::LetterSelector;
use crate::event::{Key, Time};
use crate::log::format::FORMAT_VERSION;
use crate::storage::framed::{u16_at, u32_at, u64_at};
use crate::storage::{Storage, replace};
use crate::sync::{AtomicU64, Ordering};

const MAGIC: [u8; 8] = *b"corerqst";
const BYTES: usize = 36;
const PREFIX: &str = "request-";
const SUFFIX: &str = ".req";
/// What the name of one begins with that does not hold.
const ASIDE: &str = "refused-";
/// How many a driver has in hand at once; the others wait in their files.
const TAKEN_MAX: usize = 256;
/// How often a driver looks.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// Something asked of a consumer by who does not run it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Request {
    /// Let dead letters be handled again; see [`super::Consumer::reprocess`].
    Reprocess(LetterSelector),
    /// Take dead letters away; see [`super::Consumer::discard`].
    Discard(LetterSelector),
}

impl Request {
    fn encode(self, at: Time) -> Vec<u8> {
        let (action, which) = match self {
            Self::Reprocess(which) => (1_u16, which),
            Self::Discard(which) => (2, which),
        };
        let (is_one, key) = match which {
            LetterSelector::All => (0_u16, 0),
            LetterSelector::Of(key) => (1, key.0),
        };
        let mut out = Vec::with_capacity(BYTES);
        out.extend(MAGIC);
        out.extend(FORMAT_VERSION.to_le_bytes());
        out.extend(action.to_le_bytes());
        out.extend(is_one.to_le_bytes());
        out.extend(key.to_le_bytes());
        out.extend(at.0.to_le_bytes());
        let crc = crc32c::crc32c(&out);
        out.extend(crc.to_le_bytes());
        assert_eq!(out.len(), BYTES);
        out
    }

    fn decode(bytes: &[u8]) -> Result<Self, &'static str> {
        let whole = bytes.split_last_chunk::<4>().filter(|_| bytes.len() == BYTES);
        let (body, crc) = whole.ok_or("the file has another length")?;
        if body[..8] != MAGIC {
            return Err("wrong magic");
        }
        if crc32c::crc32c(body) != u32::from_le_bytes(*crc) {
            return Err("its CRC does not hold");
        }
        if u32_at(body, 8) != FORMAT_VERSION {
            return Err("it is of a format version this build does not know");
        }
        let which = match (u16_at(body, 14), u64_at(body, 16)) {
            (0, 0) => LetterSelector::All,
            (1, key) => LetterSelector::Of(Key(key)),
            _ => return Err("it asks for letters this build does not know"),
        };
        match u16_at(body, 12) {
            1 => Ok(Self::Reprocess(which)),
            2 => Ok(Self::Discard(which)),
            _ => Err("it asks for something this build does not know"),
        }
    }
}

/// Leaves a request in a consumer's folder; durable when it returns.
pub(crate) fn leave(storage: &dyn Storage, dir: &Path, request: Request, at: Time) -> io::Result<()> {
    static LEFT: AtomicU64 = AtomicU64::new(0);
    // Names rise with time, so that requests are taken up in the order in which they were left; also when the clock was set back.
    let newest = waiting(storage, dir)?.iter().filter_map(|name| left_at(name)).max();
    let at = at.max(newest.map_or(Time(0), |newest| Time(newest.0.saturating_add(1))));
    let (process, count) = (std::process::id(), LEFT.fetch_add(1, Ordering::Relaxed));
    let name = format!("{PREFIX}{:020}-{process}-{count}{SUFFIX}", at.0);
    replace(storage, dir, &name, &request.encode(at))
}

/// The time in the name of a request.
fn left_at(name: &str) -> Option<Time> {
    name.strip_prefix(PREFIX)?.get(..20)?.parse().ok().map(Time)
}

/// The requests in a consumer's folder, by the time they were left.
pub(crate) fn waiting(storage: &dyn Storage, dir: &Path) -> io::Result<Vec<String>> {
    let mut names = storage.list(dir)?;
    names.retain(|name| name.starts_with(PREFIX) && name.ends_with(SUFFIX));
    Ok(names)
}

/// The waiting requests that do not hold, and why.
pub(crate) fn broken(storage: &dyn Storage, dir: &Path) -> io::Result<Vec<(String, &'static str)>> {
    let mut broken = Vec::new();
    for name in waiting(storage, dir)? {
        match storage.read(&dir.join(&name)) {
            Ok(bytes) => broken.extend(Request::decode(&bytes).err().map(|why| (name, why))),
            // It was taken up meanwhile.
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            Err(error) if error.kind() == ErrorKind::IsADirectory => broken.push((name, "it is a folder")),
            Err(error) => return Err(error),
        }
    }
    Ok(broken)
}

/// A request that was taken up.
#[derive(Debug)]
pub(super) struct Taken {
    name: String,
    /// `None`: it does not hold, and is to be put aside.
    pub(super) request: Option<Request>,
    /// The keys it is still about.
    pub(super) keys: Vec<Key>,
}

/// What a driver has taken up and not yet removed.
#[derive(Debug, Default)]
pub(super) struct Requests {
    pub(super) look_at: Duration,
    pub(super) taken: Vec<Taken>,
    is_failing: bool,
}

impl Requests {
    /// Looks for requests that are new. They are the last ones in `taken` then; returns how many.
    pub(super) fn look(&mut self, storage: &dyn Storage, dir: &Path, consumer: &str, now: Duration) -> usize {
        self.look_at = now + LOOK_EVERY;
        let before = self.taken.len();
        let looked = waiting(storage, dir).and_then(|names| {
            names.into_iter().try_for_each(|name| {
                if self.taken.len() < TAKEN_MAX && self.taken.iter().all(|taken| taken.name != name) {
                    self.take(storage, dir, consumer, name)?;
                }
                Ok(())
            })
        });
        self.note(consumer, "requests cannot be read; they are looked for again", looked);
        self.taken.len() - before
    }

    fn take(&mut self, storage: &dyn Storage, dir: &Path, consumer: &str, name: String) -> io::Result<()> {
        let decoded = match storage.read(&dir.join(&name)) {
            Ok(bytes) => Request::decode(&bytes),
            // It was withdrawn.
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
            Err(error) if error.kind() == ErrorKind::IsADirectory => Err("it is a folder"),
            Err(error) => return Err(error),
        };
        match decoded {
            Ok(request) => tracing::info!(consumer, name, ?request, "a request is taken up"),
            Err(why) => tracing::warn!(consumer, name, why, "a request does not hold and is put aside"),
        }
        self.taken.push(Taken { name, request: decoded.ok(), keys: Vec::new() });
        Ok(())
    }

    /// Removes a request that is carried out, or puts one aside that does not hold; durably. `false`: it is to be tried again.
    pub(super) fn end(&mut self, storage: &dyn Storage, dir: &Path, consumer: &str, taken: &Taken) -> bool {
        let path = dir.join(&taken.name);
        let ended = match taken.request {
            Some(_) => storage.remove(&path),
            None => storage.rename(&path, &dir.join(format!("{ASIDE}{}", &taken.name[PREFIX.len()..]))),
        };
        let ended = match ended {
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
            ended => ended,
        };
        let ended = ended.and_then(|()| storage.sync_dir(dir));
        let is_ended = ended.is_ok();
        self.note(consumer, "a request that is done cannot be removed; that is tried again", ended);
        is_ended
    }

    /// Says once that something fails.
    fn note(&mut self, consumer: &str, what: &'static str, result: io::Result<()>) {
        match result {
            Ok(()) => self.is_failing = false,
            Err(error) if !std::mem::replace(&mut self.is_failing, true) => {
                tracing::error!(consumer, %error, "{what}");
            }
            Err(_) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::log::format::tests::assert_golden;
    use crate::testing::{FaultyStorage, Unsynced};

    const DIR: &str = "/s/consumers/a";
    const ALL: [Request; 4] = [
        Request::Reprocess(LetterSelector::All),
        Request::Reprocess(LetterSelector::Of(Key(0))),
        Request::Discard(LetterSelector::All),
        Request::Discard(LetterSelector::Of(Key(0x0102_0304_0506_0708))),
    ];

    fn storage() -> FaultyStorage {
        let storage = FaultyStorage::new();
        storage.create_dir(Path::new(DIR)).expect("created");
        storage
    }

    #[test]
    fn of_many_requests_a_bounded_number_is_in_hand_and_none_is_left_out() {
        let storage = storage();
        let count = 3 * TAKEN_MAX as u64 + 1;
        (0..count).for_each(|i| {
            leave(&storage, Path::new(DIR), Request::Discard(LetterSelector::Of(Key(i))), Time(i)).expect("left");
        });
        let (mut requests, mut keys) = (Requests::default(), Vec::new());
        for _ in 0..4 {
            requests.look(&storage, Path::new(DIR), "a", Duration::ZERO);
            assert!(requests.taken.len() <= TAKEN_MAX);
            for taken in std::mem::take(&mut requests.taken) {
                assert!(requests.end(&storage, Path::new(DIR), "a", &taken));
                keys.extend(taken.request);
            }
        }
        assert_eq!(
            keys,
            (0..count).map(|i| Request::Discard(LetterSelector::Of(Key(i)))).collect::<Vec<_>>(),
            "in order"
        );
    }

    #[test]
    fn the_bytes_are_frozen() {
        assert_golden("consumer-request.bin", &ALL[3].encode(Time(0x1112_1314_1516_1718)));
        for request in ALL {
            assert_eq!(Request::decode(&request.encode(Time(5))), Ok(request));
        }
    }

    #[test]
    fn requests_are_taken_up_once_and_in_the_order_left() {
        let (storage, dir) = (storage(), Path::new(DIR));
        for (i, request) in ALL.into_iter().enumerate() {
            leave(&storage, dir, request, Time(9 + i as u64)).expect("left");
        }
        let mut requests = Requests::default();
        assert_eq!(requests.look(&storage, dir, "a", Duration::ZERO), 4);
        assert!(requests.taken.iter().map(|taken| taken.request).eq(ALL.map(Some)));
        assert_eq!(requests.look_at, LOOK_EVERY);
        assert_eq!(requests.look(&storage, dir, "a", LOOK_EVERY), 0, "they are in hand");
        for taken in std::mem::take(&mut requests.taken) {
            assert!(requests.end(&storage, dir, "a", &taken));
        }
        storage.crash(Unsynced::Lost);
        assert_eq!(storage.list(dir).expect("listed"), [""; 0], "durably");
    }

    #[test]
    fn requests_are_taken_up_in_the_order_left_also_when_the_clock_is_set_back() {
        let (storage, dir) = (storage(), Path::new(DIR));
        for (request, at) in ALL.into_iter().zip([5000, 7, 6000, 0]) {
            leave(&storage, dir, request, Time(at)).expect("left");
        }
        let mut requests = Requests::default();
        assert_eq!(requests.look(&storage, dir, "a", Duration::ZERO), 4);
        assert!(requests.taken.iter().map(|taken| taken.request).eq(ALL.map(Some)));
    }

    #[test]
    fn a_request_torn_at_any_length_or_with_any_bit_flipped_is_put_aside() {
        let (storage, dir) = (storage(), Path::new(DIR));
        let whole = ALL[3].encode(Time(1));
        let mut broken: Vec<Vec<u8>> = (0..whole.len()).map(|len| whole[..len].to_vec()).collect();
        broken.push([&whole[..], &[0]].concat());
        for bit in 0..whole.len() * 8 {
            let mut flipped = whole.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            broken.push(flipped);
        }
        let mut requests = Requests::default();
        for bytes in broken {
            storage.write(&dir.join("request-1.req"), &bytes).expect("written");
            assert_eq!(requests.look(&storage, dir, "a", Duration::ZERO), 1);
            let taken = requests.taken.pop().expect("one");
            assert_eq!(taken.request, None, "{bytes:?}");
            assert!(requests.end(&storage, dir, "a", &taken));
            assert_eq!(storage.list(dir).expect("listed"), ["refused-1.req"]);
            assert_eq!(storage.read(&dir.join("refused-1.req")).expect("kept"), bytes);
            assert_eq!(requests.look(&storage, dir, "a", Duration::ZERO), 0);
        }
    }

    #[test]
    fn a_crash_while_leaving_one_leaves_it_whole_or_not_at_all() {
        let dir = Path::new(DIR);
        for n in 1.. {
            let storage = storage();
            storage.fail_operation(n);
            let is_left = leave(&storage, dir, ALL[0], Time(1)).is_ok();
            storage.fail_operation(1_000_000);
            storage.crash(Unsynced::Random(n));
            let mut requests = Requests::default();
            let found = requests.look(&storage, dir, "a", Duration::ZERO);
            assert!(requests.taken.iter().all(|taken| taken.request == Some(ALL[0])), "operation {n}");
            assert!(found == 1 || !is_left, "operation {n}");
            if is_left {
                break;
            }
        }
    }

    #[test]
    fn what_fails_is_tried_again() {
        let (storage, dir) = (storage(), Path::new(DIR));
        leave(&storage, dir, ALL[1], Time(1)).expect("left");
        let mut requests = Requests::default();
        storage.fail_operation(1);
        let found = requests.look(&storage, dir, "a", Duration::ZERO);
        storage.fail_operation(1_000_000);
        assert_eq!(found + requests.look(&storage, dir, "a", LOOK_EVERY), 1);
        let taken = requests.taken.pop().expect("one");
        storage.fail_operation(1);
        assert!(!requests.end(&storage, dir, "a", &taken));
        storage.fail_operation(1_000_000);
        assert!(requests.end(&storage, dir, "a", &taken));
        assert_eq!(waiting(&storage, dir).expect("listed"), [""; 0]);
    }
}
