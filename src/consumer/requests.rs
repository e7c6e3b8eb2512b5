//! Requests to a consumer from outside, each a small file in its folder: `FORMAT.md` §18 has the bytes.
//!
//! Two writers, one after the other. The requester creates the file, whole or not at all. From then on the file belongs
//! to the driver, which removes it when the request is carried out. So a crash may repeat a request, but loses none.

use std::io::{self, ErrorKind};
use std::path::Path;
use std::time::Duration;

use super::dead_letter::selector::LetterSelector;
use crate::event::{Key, Time};
use crate::storage::framed::{Frame, FrameError, Reader};
use crate::storage::{Storage, replace};
use crate::sync::{AtomicU64, Ordering};

const FRAME: Frame = Frame { magic: *b"corerqst", bytes_min: 36 };
const PREFIX: &str = "request-";
const SUFFIX: &str = ".req";
/// The prefix of an invalid request that was put aside.
const ASIDE: &str = "refused-";
/// The number of requests that a driver holds at once; the others wait in their files.
const TAKEN_MAX: usize = 256;
/// The interval at which a driver looks for new requests.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// A request to a consumer from outside the program that runs it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Request {
    /// Handle dead letters again; see [`super::Consumer::reprocess`].
    Reprocess(LetterSelector),
    /// Remove dead letters; see [`super::Consumer::discard`].
    Discard(LetterSelector),
}

impl Request {
    fn encode(self, at: Time) -> Vec<u8> {
        let (action, which) = match self {
            Self::Reprocess(which) => (1, which),
            Self::Discard(which) => (2, which),
        };
        let (is_one, key) = match which {
            LetterSelector::All => (0, 0),
            LetterSelector::Of(key) => (1, key.0),
        };
        let mut out = FRAME.begin();
        out.u16(action);
        out.u16(is_one);
        out.u64(key);
        out.u64(at.0);
        out.seal()
    }

    fn decode(bytes: &[u8]) -> Result<Self, &'static str> {
        FRAME.open(bytes).and_then(Self::read).map_err(FrameError::why)
    }

    fn read(mut fields: Reader<'_>) -> Result<Self, FrameError> {
        let (action, is_one, key, _at) = (fields.u16()?, fields.u16()?, fields.u64()?, fields.u64()?);
        fields.end()?;
        let which = match (is_one, key) {
            (0, 0) => LetterSelector::All,
            (1, key) => LetterSelector::Of(Key(key)),
            _ => return Err("this build does not know its selection of letters".into()),
        };
        match action {
            1 => Ok(Self::Reprocess(which)),
            2 => Ok(Self::Discard(which)),
            _ => Err("this build does not know its action".into()),
        }
    }
}

/// Leaves a request in a consumer's folder; durable when it returns.
pub(crate) fn leave(storage: &dyn Storage, dir: &Path, request: Request, at: Time) -> io::Result<()> {
    static LEFT: AtomicU64 = AtomicU64::new(0);
    // Names rise even if the clock was set back, so a driver takes requests in the order in which they were left.
    let newest = waiting(storage, dir)?.iter().filter_map(|name| left_at(name)).max();
    let at = at.max(newest.map_or(Time(0), |newest| Time(newest.0.saturating_add(1))));
    let (process, count) = (std::process::id(), LEFT.fetch_add(1, Ordering::Relaxed));
    let name = format!("{PREFIX}{:020}-{process}-{count}{SUFFIX}", at.0);
    replace(storage, dir, &name, &request.encode(at))
}

/// Returns the time in the name of a request.
fn left_at(name: &str) -> Option<Time> {
    name.strip_prefix(PREFIX)?.get(..20)?.parse().ok().map(Time)
}

/// Returns the names of the requests in a consumer's folder, oldest first.
pub(crate) fn waiting(storage: &dyn Storage, dir: &Path) -> io::Result<Vec<String>> {
    let mut names = storage.list(dir)?;
    names.retain(|name| name.starts_with(PREFIX) && name.ends_with(SUFFIX));
    Ok(names)
}

/// Returns the names of the invalid requests in a consumer's folder, each with the reason why it is invalid.
pub(crate) fn broken(storage: &dyn Storage, dir: &Path) -> io::Result<Vec<(String, &'static str)>> {
    let mut broken = Vec::new();
    for name in waiting(storage, dir)? {
        match storage.read(&dir.join(&name)) {
            Ok(bytes) => broken.extend(Request::decode(&bytes).err().map(|why| (name, why))),
            // The consumer has removed it meanwhile.
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            Err(error) if error.kind() == ErrorKind::IsADirectory => broken.push((name, "it is a folder")),
            Err(error) => return Err(error),
        }
    }
    Ok(broken)
}

/// A request that a driver has taken.
#[derive(Debug)]
pub(super) struct Taken {
    name: String,
    /// `None`: the file is invalid and must be put aside.
    pub(super) request: Option<Request>,
    /// The keys with letters that the request still has to handle or discard.
    pub(super) keys: Vec<Key>,
}

/// The requests that a driver has taken and not yet removed.
#[derive(Debug, Default)]
pub(super) struct Requests {
    pub(super) look_at: Duration,
    pub(super) taken: Vec<Taken>,
    is_failing: bool,
}

impl Requests {
    /// Looks for new requests and appends them to `taken`. Returns their number.
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
        self.note(consumer, "requests cannot be read; the consumer tries again", looked);
        self.taken.len() - before
    }

    fn take(&mut self, storage: &dyn Storage, dir: &Path, consumer: &str, name: String) -> io::Result<()> {
        let decoded = match storage.read(&dir.join(&name)) {
            Ok(bytes) => Request::decode(&bytes),
            // It was removed meanwhile.
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
            Err(error) if error.kind() == ErrorKind::IsADirectory => Err("it is a folder"),
            Err(error) => return Err(error),
        };
        match decoded {
            Ok(request) => tracing::info!(consumer, name, ?request, "took a request"),
            Err(why) => tracing::warn!(consumer, name, why, "a request is invalid and is put aside"),
        }
        self.taken.push(Taken { name, request: decoded.ok(), keys: Vec::new() });
        Ok(())
    }

    /// Removes a request that is carried out, or puts an invalid one aside, durably. Returns `false` if the caller must
    /// try again.
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
        self.note(consumer, "a finished request cannot be removed; the consumer tries again", ended);
        is_ended
    }

    /// Logs the first of several failures in a row.
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
    fn a_driver_holds_a_bounded_number_of_requests_and_misses_none() {
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
    fn requests_are_taken_once_and_in_the_order_left() {
        let (storage, dir) = (storage(), Path::new(DIR));
        for (i, request) in ALL.into_iter().enumerate() {
            leave(&storage, dir, request, Time(9 + i as u64)).expect("left");
        }
        let mut requests = Requests::default();
        assert_eq!(requests.look(&storage, dir, "a", Duration::ZERO), 4);
        assert!(requests.taken.iter().map(|taken| taken.request).eq(ALL.map(Some)));
        assert_eq!(requests.look_at, LOOK_EVERY);
        assert_eq!(requests.look(&storage, dir, "a", LOOK_EVERY), 0, "the driver holds them already");
        for taken in std::mem::take(&mut requests.taken) {
            assert!(requests.end(&storage, dir, "a", &taken));
        }
        storage.crash(Unsynced::Lost);
        assert_eq!(storage.list(dir).expect("listed"), [""; 0], "durably");
    }

    #[test]
    fn requests_are_taken_in_the_order_left_when_the_clock_is_set_back() {
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
    fn a_crash_while_leaving_a_request_leaves_all_of_it_or_nothing() {
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
    fn a_failed_read_or_removal_is_tried_again() {
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
