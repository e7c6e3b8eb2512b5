//! The server answers, and is killed under load: every acknowledged payment is there after the restart, each once.
#![expect(clippy::unwrap_used, reason = "a test may unwrap")]

use std::io::{self, BufRead as _, BufReader, Read as _, Write as _};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::thread::{scope, sleep};
use std::time::{Duration, Instant, SystemTime};

use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

/// Connections that send payments at the same time, each to a player of its own.
const CONNECTIONS: u64 = 24;
/// Much longer than the server allows itself: five seconds for requests in progress, and five for the engine.
const PATIENCE: Duration = Duration::from_secs(60);

struct Server {
    child: Child,
    address: String,
}

impl Server {
    /// Starts a process, which may be killed before it listens.
    fn spawn(dir: &Path) -> Child {
        let mut command = Command::new(env!("CARGO_BIN_EXE_corelane-axum"));
        command.arg(dir).arg("127.0.0.1:0").stderr(Stdio::piped()).spawn().unwrap()
    }

    fn start(dir: &Path) -> Self {
        let mut child = Self::spawn(dir);
        let mut said = String::new();
        let mut stderr = BufReader::new(child.stderr.take().unwrap());
        let listening = loop {
            assert!(stderr.read_line(&mut said).unwrap() > 0, "the server ended: {said}");
            if let Some((_, address)) = said.trim_end().split_once("listening on ") {
                break address.to_owned();
            }
        };
        // Reads the rest, so that the server never waits for its output to be read.
        std::thread::spawn(move || drop(io::copy(&mut stderr, &mut io::stderr())));
        Self { child, address: listening }
    }

    fn connect(&self) -> io::Result<Http> {
        let stream = TcpStream::connect(&self.address)?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        Ok(Http(BufReader::new(stream)))
    }

    fn terminate(&self) {
        kill_process(Pid::from_child(&self.child), Signal::TERM).unwrap();
    }

    /// Waits for the end of the process.
    fn ended(&mut self) -> ExitStatus {
        let end = Instant::now() + PATIENCE;
        while Instant::now() < end {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            sleep(Duration::from_millis(5));
        }
        panic!("the server does not end");
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // Fails if the process has ended.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

/// A connection that is kept alive.
struct Http(BufReader<TcpStream>);

impl Http {
    fn send(&mut self, method: &str, path: &str, headers: &str, body: &str) -> io::Result<()> {
        let request = format!(
            "{method} {path} HTTP/1.1\r\nhost: game\r\ncontent-type: application/json\r\ncontent-length: {}\r\n{headers}\r\n{body}",
            body.len()
        );
        self.0.get_mut().write_all(request.as_bytes())
    }

    /// Reads the status and the headers, and returns the status and the length of the body.
    fn head(&mut self) -> io::Result<(u16, usize)> {
        let (mut status, mut length) = (0, 0);
        loop {
            let mut line = String::new();
            if self.0.read_line(&mut line)? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            match line.trim_end().to_lowercase().split_once(' ') {
                None => return Ok((status, length)),
                Some(("http/1.1", rest)) => status = rest[..3].parse().unwrap(),
                Some(("content-length:", bytes)) => length = bytes.parse().unwrap(),
                Some(_) => {}
            }
        }
    }

    fn request(&mut self, method: &str, path: &str, headers: &str, body: &str) -> io::Result<(u16, String)> {
        self.send(method, path, headers, body)?;
        let (status, length) = self.head()?;
        let mut body = vec![0; length];
        self.0.read_exact(&mut body)?;
        Ok((status, String::from_utf8(body).unwrap()))
    }

    fn get(&mut self, path: &str) -> Value {
        let (status, body) = self.request("GET", path, "", "").unwrap();
        assert_eq!(status, 200, "{path}: {body}");
        serde_json::from_str(&body).unwrap()
    }

    /// Pays coins under an idempotency key.
    fn pay(&mut self, player: u64, coins: u64, once: &str) -> io::Result<(u16, Value)> {
        let path = format!("/players/{player}");
        let headers = format!("idempotency-key: {once}\r\n");
        let (status, body) = self.request("POST", &path, &headers, &coins.to_string())?;
        Ok((status, serde_json::from_str(&body).unwrap_or(Value::Null)))
    }

    /// Turns the connection into a WebSocket.
    fn live(mut self, player: u64) -> Self {
        let upgrade = "connection: upgrade\r\nupgrade: websocket\r\nsec-websocket-version: 13\r\n\
                       sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n";
        self.send("GET", &format!("/players/{player}/live"), upgrade, "").unwrap();
        assert_eq!(self.head().unwrap().0, 101);
        self
    }

    /// Reads a short frame of a WebSocket: its first byte, and its payload.
    fn frame(&mut self) -> (u8, String) {
        let mut head = [0; 2];
        self.0.read_exact(&mut head).unwrap();
        assert!(head[1] < 126, "a short frame of a server");
        let mut payload = vec![0; head[1].into()];
        self.0.read_exact(&mut payload).unwrap();
        (head[0], String::from_utf8(payload).unwrap())
    }
}

const TEXT: u8 = 0x81;
const CLOSE: u8 = 0x88;

fn now_ms() -> u128 {
    SystemTime::UNIX_EPOCH.elapsed().unwrap().as_millis()
}

#[test]
fn the_server_answers_as_its_readme_says() {
    let dir = tempfile::tempdir().unwrap();
    let mut server = Server::start(dir.path());
    let mut http = server.connect().unwrap();
    let mut live = server.connect().unwrap().live(42);

    let (status, paid) = http.pay(42, 100, "a").unwrap();
    assert_eq!((status, paid), (200, json!({ "version": 1, "repeated": false })));
    let (status, paid) = http.pay(42, 100, "a").unwrap();
    assert_eq!((status, paid), (200, json!({ "version": 1, "repeated": true })));
    let (status, refused) = http.request("POST", "/players/42", "", "-101").unwrap();
    assert_eq!((status, refused.as_str()), (409, r#"{"refused":100}"#));
    assert_eq!(http.request("POST", "/players/42", "", "{}").unwrap().0, 422, "not a number");
    // Sleeps, so that the two events are certainly in different milliseconds.
    sleep(Duration::from_millis(50));
    let between = now_ms();
    sleep(Duration::from_millis(50));
    assert_eq!(http.request("PUT", "/players/42/position", "", "[1.5, 2.5]").unwrap().0, 200);
    let moved = json!({ "player": { "coins": 100, "position": [1.5, 2.5] }, "version": 2 });
    assert_eq!(http.get("/players/42"), moved, "a client reads its own writes");
    let then = json!({ "player": { "coins": 100, "position": [0.0, 0.0] }, "version": 1 });
    assert_eq!(http.get(&format!("/players/42?at={between}")), then);
    assert_eq!(http.get(&format!("/players/42?at={}", now_ms() + 1000)), moved);
    assert_eq!(http.get("/players/42?at=0")["version"], 0);
    assert_eq!(http.get("/players/7")["version"], 0);
    assert_eq!(live.frame(), (TEXT, r#"{"Paid":100}"#.into()));
    assert_eq!(live.frame(), (TEXT, r#"{"Moved":[1.5,2.5]}"#.into()));
    let (status, metrics) = http.request("GET", "/metrics", "", "").unwrap();
    assert!(status == 200 && metrics.contains("\ncorelane_appended_total{shard="), "{metrics}");

    server.terminate();
    assert_eq!(live.frame().0, CLOSE);
    assert!(server.ended().success());
}

/// One connection's player. The n-th payment is of n coins, so the sum says which payments were carried out.
#[derive(Default)]
struct Payer {
    acknowledged: u64,
}

impl Payer {
    /// Pays until the connection breaks. A payment without an answer is sent again in the next round.
    fn pay(&mut self, player: u64, server: &Server, answers: &AtomicU64) {
        let Ok(mut http) = server.connect() else { return };
        loop {
            let n = self.acknowledged + 1;
            match http.pay(player, n, &n.to_string()) {
                Ok((200, answer)) => {
                    assert_eq!(answer["version"], n, "player {player}: carried out once, in order");
                    self.acknowledged = n;
                    answers.fetch_add(1, SeqCst);
                }
                Ok((503 | 504, _)) | Err(_) => return,
                Ok(other) => panic!("player {player}: {other:?}"),
            }
        }
    }

    /// Checks that the acknowledged payments are there, each once, and at most the unanswered one beside them.
    fn check(&self, player: u64, http: &mut Http) {
        let found = http.get(&format!("/players/{player}"));
        let version = found["version"].as_u64().unwrap();
        let acknowledged = self.acknowledged;
        assert!((acknowledged..=acknowledged + 1).contains(&version), "player {player}: {acknowledged}, {found}");
        assert_eq!(found["player"]["coins"], version * (version + 1) / 2, "player {player}: each payment once");
        if acknowledged > 0 {
            let repeated = http.pay(player, acknowledged, &acknowledged.to_string()).unwrap();
            assert_eq!(repeated, (200, json!({ "version": acknowledged, "repeated": true })), "player {player}");
        }
    }
}

/// Puts the server under load, lets `end` end it, and waits for the payers.
fn under_load(server: &Server, payers: &mut [Payer], end: impl FnOnce(&Server, &AtomicU64)) {
    let answers = &AtomicU64::new(0);
    scope(|scope| {
        for (player, payer) in (0..).zip(payers.iter_mut()) {
            scope.spawn(move || payer.pay(player, server, answers));
        }
        end(server, answers);
    });
}

fn check_all(server: &Server, payers: &[Payer]) {
    let mut http = server.connect().unwrap();
    (0..).zip(payers).for_each(|(player, payer)| payer.check(player, &mut http));
}

fn wait_for(answers: &AtomicU64, count: u64) {
    let end = Instant::now() + PATIENCE;
    while answers.load(SeqCst) < count {
        assert!(Instant::now() < end, "the server does not answer");
        sleep(Duration::from_millis(1));
    }
}

#[test]
fn every_acknowledged_payment_survives_kills_under_load() {
    let rounds = std::env::var("CORELANE_AXUM_ROUNDS").map_or(10, |rounds| rounds.parse().unwrap());
    let dir = tempfile::tempdir().unwrap();
    let mut payers: Vec<Payer> = (0..CONNECTIONS).map(|_| Payer::default()).collect();
    let mut random = StdRng::seed_from_u64(15);
    for round in 0..rounds {
        if round % 3 == 2 {
            // Killed while it starts.
            let mut child = Server::spawn(dir.path());
            sleep(Duration::from_micros(random.random_range(0..40_000)));
            child.kill().unwrap();
            child.wait().unwrap();
        }
        let mut server = Server::start(dir.path());
        check_all(&server, &payers);
        let (delay, pid) = (random.random_range(0..300_000), Pid::from_child(&server.child));
        under_load(&server, &mut payers, |_, answers| {
            wait_for(answers, CONNECTIONS);
            sleep(Duration::from_micros(delay));
            kill_process(pid, Signal::KILL).unwrap();
        });
        assert!(!server.child.wait().unwrap().success());
    }
    let mut server = Server::start(dir.path());
    check_all(&server, &payers);
    let paid: u64 = payers.iter().map(|payer| payer.acknowledged).sum();
    eprintln!("{paid} payments acknowledged in {rounds} rounds");
    server.terminate();
    assert!(server.ended().success());
}

#[test]
fn a_terminated_server_answers_what_it_has_accepted_and_exits_with_0() {
    let dir = tempfile::tempdir().unwrap();
    let mut payers: Vec<Payer> = (0..CONNECTIONS).map(|_| Payer::default()).collect();
    let mut server = Server::start(dir.path());
    let mut live = server.connect().unwrap().live(0);
    // These would keep the server for ever: a connection at rest, a request that never ends, and a feed never read.
    let mut at_rest = server.connect().unwrap();
    at_rest.get("/players/1");
    let mut stalled = server.connect().unwrap();
    stalled.0.get_mut().write_all(b"POST /players/1 HTTP/1.1\r\ncontent-le").unwrap();
    let unread = server.connect().unwrap().live(1);
    under_load(&server, &mut payers, |server, answers| {
        wait_for(answers, 10 * CONNECTIONS);
        server.terminate();
    });
    while live.frame().0 != CLOSE {}
    assert!(server.ended().success());
    drop((at_rest, stalled, unread));

    let mut server = Server::start(dir.path());
    check_all(&server, &payers);
    server.terminate();
    assert!(server.ended().success());
}
