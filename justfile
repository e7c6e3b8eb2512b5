# The recipes that CI runs, and longer ones.

test:
    cargo test

lint:
    cargo fmt --all --check
    cargo clippy --workspace --all-targets --all-features -- -D warnings
    RUSTDOCFLAGS="-D warnings" cargo doc -p corelane --no-deps
    RUSTDOCFLAGS="-D warnings" cargo doc -p corelane --no-deps --all-features

# Builds the library with each feature alone; the default must compile no tool and no JSON.
features:
    .ci/features

# Checks dependencies against the RustSec advisories (offline where ../shared/advisory-db is present) and deny.toml.
audit:
    .ci/audit

# Packages what would be published, without building it again.
package:
    cargo package -p corelane-derive -p corelane --no-verify

# Explores every interleaving of the protocols between threads.
loom:
    RUSTFLAGS="--cfg loom" cargo test -p corelane --release --no-default-features --test loom --target-dir target/loom

# Kills the process at random points; CI runs 500 rounds.
kill rounds="500":
    CORELANE_KILL_ROUNDS={{rounds}} cargo test --release --test kill -- --nocapture

# Compares the instructions per event with the committed limit.
instructions:
    perf/callgrind.sh

# Runs a consumer that is slow, fails, hangs and is restarted, for ten minutes.
soak seconds="600":
    cargo run --release -p perf --bin services -- soak --seconds {{seconds}}

ci:
    .ci/run
