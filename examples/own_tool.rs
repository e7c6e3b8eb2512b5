//! A tool for the store of the example `hello` that shows its events as JSON, as the stock `corelane` cannot:
//!
//! ```text
//! cargo run --example hello
//! cargo run --example own_tool --features cli -- dump target/hello --from 2026-11-30T07:40:00Z
//! ```
use std::process::ExitCode;

use corelane::{Bounded, Event};
use rkyv::{Archive, Deserialize, Serialize};

#[derive(Archive, Serialize, Deserialize, Bounded, Event, serde::Serialize)]
#[event(id = 1, name = "deposited")]
struct Deposited(u64);

fn main() -> ExitCode {
    corelane::tools::main::<Deposited>()
}
