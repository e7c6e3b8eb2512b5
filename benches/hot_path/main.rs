//! Benches of each part of the hot path, alone and together.
//!
//! ```text
//! cargo bench -p benches                     all benches; reports in target/criterion/report
//! cargo bench -p benches -- keys             the benches of the key table
//! cargo bench -p benches -- --quick          a rough result
//! ```
//!
//! All use the same 48-byte event, so that the figures of parts add up. `perf/README.md` explains how to compare
//! results.

mod append;
mod area;
mod codec;
mod end_to_end;
mod game;
mod gate;
mod key_queues;
mod keys;
mod replay;
mod ring;
mod views;

use criterion::{criterion_group, criterion_main};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

criterion_group!(
    benches,
    codec::benches,
    ring::benches,
    keys::benches,
    append::benches,
    replay::benches,
    end_to_end::benches,
    gate::benches,
    key_queues::benches,
    area::benches,
    views::benches
);
criterion_main!(benches);
