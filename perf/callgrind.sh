#!/usr/bin/env bash
# Counts the instructions one event costs on the hot path, and fails when they have become more.
#
#   perf/callgrind.sh            compares with perf/instructions.txt; exit 1 above it by more than 5 %
#   perf/callgrind.sh --save     writes what was counted into perf/instructions.txt
#   perf/callgrind.sh --top      also shows where they go, function by function
#
# Counted are `Shard::turn` and the producer's `publish_batch`, whatever they call included, of
# examples/hotpath.rs. The difference of two runs, N and 2N events, is divided by N, so that starting,
# opening and recovering do not count. Everything else does not count anyway.
#
# exit: 0 within the limit   1 above it   2 the counting itself failed
set -euo pipefail
cd "$(dirname "$0")/.."

EVENTS=524288
ALLOWED_PERCENT=5
LIMIT=perf/instructions.txt
PROFILE=${PROFILE:-release} # PROFILE=profiling adds lines to the .out files for kcachegrind

fail() { echo "callgrind.sh: $*" >&2; exit 2; }

save=0 top=0
for arg in "$@"; do
    case $arg in
        --save) save=1 ;;
        --top) top=1 ;;
        *) fail "unknown argument $arg (known: --save, --top)" ;;
    esac
done

if ! command -v valgrind >/dev/null; then
    as_root=$([ "$(id -u)" = 0 ] || echo sudo)
    $as_root apt-get update -q >&2 && $as_root apt-get install -qy valgrind >&2 || fail "valgrind is missing and could not be installed"
fi

cargo build --quiet --profile "$PROFILE" --example hotpath || fail "the example does not build"
program=${CARGO_TARGET_DIR:-target}/$PROFILE/examples/hotpath
out=perf/out
mkdir -p "$out"

# Prints what a run with $1 events counted.
count() {
    local file=$out/callgrind.$1.out log=$out/callgrind.$1.log
    rm -f "$file"
    valgrind --tool=callgrind --callgrind-out-file="$file" \
        --toggle-collect='*Shard*turn' --toggle-collect='*publish_batch_counted' \
        "$program" "$1" >"$log" 2>&1 || { cat "$log" >&2; fail "the run with $1 events failed"; }
    sed -n 's/^totals: *//p' "$file"
}

# Prints the inclusive count of the function whose name has $2 in it, in the run with $1 events.
inclusive() {
    callgrind_annotate --inclusive=yes --threshold=100 "$out/callgrind.$1.out" 2>/dev/null |
        awk -v name="$2" '!found && index($0, name) { gsub(",", "", $1); print $1; found = 1 }'
}

once=$(count $EVENTS)
twice=$(count $((2 * EVENTS)))
[ -n "$once" ] && [ -n "$twice" ] || fail "nothing was counted"

# A function that was renamed, or inlined into its caller, would silently count as nothing.
per_event() { awk -v a="$1" -v b="$2" -v n=$EVENTS 'BEGIN { printf "%.1f", (b - a) / n }'; }
declare -A part
for name in 'Shard<A>::turn' publish_batch_counted; do
    a=$(inclusive $EVENTS "$name") b=$(inclusive $((2 * EVENTS)) "$name")
    [ -n "$a" ] && [ -n "$b" ] || fail "$name is not in the profile: inlined or renamed? Give it #[inline(never)]"
    part[$name]=$(per_event "$a" "$b")
done
total=$(per_event "$once" "$twice")

echo "instructions per event: $total (shard's turn ${part['Shard<A>::turn']}, publish_batch ${part[publish_batch_counted]})"
echo "measured with: $(rustc --version), $(valgrind --version), profile $PROFILE, OsCache, 1 producer, 1 shard, 48-byte events, 10,000 users"

if [ $top = 1 ]; then
    echo
    callgrind_annotate --threshold=98 "$out/callgrind.$((2 * EVENTS)).out" 2>/dev/null |
        awk -v n=$((2 * EVENTS)) '/file:function/ { on = 1; print "per event  function"; next }
            on && $1 ~ /^[0-9,]+$/ && $0 !~ /PROGRAM TOTALS/ { c = $1; gsub(",", "", c); sub(/^[^)]*\) */, ""); sub(/ \[.*/, ""); printf "%9.1f  %s\n", c / n, $0 }'
    echo
fi

if [ $save = 1 ]; then
    {
        echo "# Instructions per event that perf/callgrind.sh compares with; written by its --save."
        echo "# $(rustc --version), $(valgrind --version), $(uname -m), $(date -u +%F), commit $(git rev-parse --short=12 HEAD 2>/dev/null || echo unknown)"
        echo "$total"
    } >$LIMIT
    echo "saved to $LIMIT"
    exit 0
fi

limit=$(grep -v '^#' $LIMIT 2>/dev/null | head -n 1) || true
[ -n "$limit" ] || fail "$LIMIT holds no number; write one with --save"
awk -v got="$total" -v limit="$limit" -v allowed=$ALLOWED_PERCENT 'BEGIN {
    change = 100 * (got / limit - 1)
    printf "limit %s, change %+.1f %% (allowed: +%d %%)\n", limit, change, allowed
    if (change < -allowed) print "it has become less: keep that with perf/callgrind.sh --save"
    exit change > allowed
}' || { echo "FAILED: the hot path costs more than it did. perf/callgrind.sh --top shows where; if it must be, say why and --save." >&2; exit 1; }
