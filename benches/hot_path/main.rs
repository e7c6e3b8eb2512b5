//! What each part of an event's way costs, alone and together.
//!
//! ```text
//! cargo bench -p benches                     everything; reports in target/criterion/report
//! cargo bench -p benches -- keys             the key table only
//! cargo bench -p benches -- --quick          a first look
//! ```
//!
//! All use one 48-byte event, so that figures of parts can be added up. `perf/README.md` says how to compare.

mod append;
mod area;
mod codec;
mod end_to_end;
mod game;
mod gate;
mod keys;
mod lanes;
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
    lanes::benches,
    area::benches,
    views::benches
);
criterion_main!(benches);
