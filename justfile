# The recipes CI runs, and the longer ones it does not.

test:
    cargo test

lint:
    cargo fmt --all --check
    cargo clippy --all-targets --all-features -- -D warnings
    RUSTDOCFLAGS="-D warnings" cargo doc --no-deps --all-features

# The protocols between threads, every interleaving.
loom:
    RUSTFLAGS="--cfg loom" cargo test --release --no-default-features --test loom --target-dir target/loom

# kill -9 at random points; CI runs 500.
kill rounds="500":
    CORELANE_KILL_ROUNDS={{rounds}} cargo test --release --test kill -- --nocapture

# Counted instructions per event against the committed limit.
instructions:
    perf/callgrind.sh

# A slow, failing, hanging and restarted consumer for ten minutes.
soak seconds="600":
    cargo run --release -p perf --bin services -- soak --seconds {{seconds}}

ci:
    .ci/run
