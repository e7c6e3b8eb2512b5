#!/usr/bin/env bash
# Draws a flame graph of the load generator: perf/out/flamegraph.svg, for a browser.
#
#   perf/flamegraph.sh                                   10 million events, 1 producer, 1 shard, OsCache
#   perf/flamegraph.sh --events 5000000 --durability group --users 1000000     takes loadgen's flags
#
# Samples the clock, not a hardware counter, so that it also works in virtual machines.
set -euo pipefail
cd "$(dirname "$0")/.."

HERTZ=${HERTZ:-1999}
out=perf/out
mkdir -p "$out"

if ! command -v perf >/dev/null; then
    as_root=$([ "$(id -u)" = 0 ] || echo sudo)
    $as_root apt-get update -q && $as_root apt-get install -qy linux-perf
fi
export PATH=$PATH:${CARGO_HOME:-$HOME/.cargo}/bin
command -v inferno-flamegraph >/dev/null || cargo install --locked --quiet inferno

[ $# -gt 0 ] || set -- --events 10000000 --durability os
cargo build --profile profiling --example loadgen
program=${CARGO_TARGET_DIR:-target}/profiling/examples/loadgen

# Call stacks by DWARF (the binary has unwind tables but no frame pointers), 8 KiB of stack per sample.
# Samples user code only if the kernel allows no more (perf_event_paranoid > 1).
event=cpu-clock
[ "$(id -u)" = 0 ] || [ "$(cat /proc/sys/kernel/perf_event_paranoid)" -le 1 ] || event=cpu-clock:u
perf record -e "$event" -F "$HERTZ" --call-graph dwarf,8192 -o "$out/perf.data" -- "$program" "$@"
# Without inlined frames, which take perf minutes to resolve.
perf script --no-inline -i "$out/perf.data" 2>/dev/null | inferno-collapse-perf >"$out/stacks.txt"
[ -s "$out/stacks.txt" ] || { echo "flamegraph.sh: perf took no sample" >&2; exit 1; }
inferno-flamegraph --title "corelane loadgen $*" --subtitle "$(git rev-parse --short=12 HEAD), cpu-clock" "$out/stacks.txt" >"$out/flamegraph.svg"
rm -f "$out/perf.data"
echo "$out/flamegraph.svg"
