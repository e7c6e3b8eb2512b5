#!/usr/bin/env bash
# Counts the instructions per event of the hot path, a command and a reader. Fails if they exceed the limits.
#
#   perf/callgrind.sh              compares with perf/instructions.txt; exit 1 if a figure exceeds its limit by more than 5 %
#   perf/callgrind.sh --within P   allows P percent instead of 5 (readers: four times that)
#   perf/callgrind.sh --save       writes the counts to perf/instructions.txt
#   perf/callgrind.sh --top        also lists the instructions of a batch by function
#
# To compare with an older commit on this machine: check it out in another folder, run its own script there with --save, and copy
# its perf/instructions.txt here.
#
# The program hotpath (perf/src/bin/hotpath.rs) runs with N and with 2N events for each figure. The difference, divided by N, is the
# cost of one event: starting, opening and recovering cancel out. Only these functions and their callees count:
#
#   batch       Producer::publish_batch and the Shard::turn that it feeds
#   publish     Producer::publish, one event a call
#   command     Client::send(…).ticket(), the Shard::turn that it feeds, and Client::answer(…).wait()
#   read        Reader::next over events that this process wrote
#   recovered   Reader::next over events written before the store was reopened
#
# exit: 0 within the limits   1 above a limit   2 counting failed
set -euo pipefail
cd "$(dirname "$0")/.."

EVENTS=524288
LIMIT=perf/instructions.txt
PROFILE=${PROFILE:-release} # PROFILE=profiling adds lines to the .out files for kcachegrind

fail() { echo "callgrind.sh: $*" >&2; exit 2; }

save=0 top=0 allowed=5
while [ $# -gt 0 ]; do
    case $1 in
        --save) save=1 ;;
        --top) top=1 ;;
        --within) allowed=${2:?--within needs a number}; shift ;;
        *) fail "unknown argument $1 (known: --save, --top, --within PERCENT)" ;;
    esac
    shift
done

if ! command -v valgrind >/dev/null; then
    as_root=$([ "$(id -u)" = 0 ] || echo sudo)
    $as_root apt-get update -q >&2 && $as_root apt-get install -qy valgrind >&2 || fail "valgrind is missing and could not be installed"
fi

cargo build --quiet --profile "$PROFILE" -p perf --bin hotpath || fail "hotpath does not build"
program=${CARGO_TARGET_DIR:-target}/$PROFILE/hotpath
out=perf/out
mkdir -p "$out"

# Runs hotpath in mode $1 with $2 events and counts the functions in the remaining arguments.
run() {
    local mode=$1 events=$2 toggles=() name
    shift 2
    for name in "$@"; do toggles+=("--toggle-collect=*$name"); done
    rm -f "$out/callgrind.$mode.$events.out"
    valgrind --tool=callgrind --callgrind-out-file="$out/callgrind.$mode.$events.out" "${toggles[@]}" \
        "$program" "$events" $([ "$mode" = batch ] || echo "$mode") >"$out/callgrind.$mode.log" 2>&1 ||
        { cat "$out/callgrind.$mode.log" >&2; fail "the run \"$mode\" with $events events failed"; }
}

# Prints the inclusive count of the function whose name contains $3, in the run of mode $1 with $2 events.
inclusive() {
    callgrind_annotate --inclusive=yes --threshold=100 "$out/callgrind.$1.$2.out" 2>/dev/null |
        awk -v name="$3" '!found && index($0, name) { gsub(",", "", $1); print $1; found = 1 }'
}

figures=()
# Counts the functions in the remaining arguments in mode $2 and records their sum as figure $1.
count() {
    local figure=$1 mode=$2 function once twice parts=() sum=0
    shift 2
    run "$mode" $EVENTS "${@//Shard<A>::turn/Shard*turn}"
    run "$mode" $((2 * EVENTS)) "${@//Shard<A>::turn/Shard*turn}"
    for function in "$@"; do
        once=$(inclusive "$mode" $EVENTS "$function") twice=$(inclusive "$mode" $((2 * EVENTS)) "$function")
        # A renamed or inlined function would silently count as zero.
        [ -n "$once" ] && [ -n "$twice" ] || fail "$function is not in the profile: it was inlined or renamed (add #[inline(never)])"
        sum=$((sum + twice - once))
        parts+=("$function $(awk -v a=$((twice - once)) -v n=$EVENTS 'BEGIN { printf "%.1f", a / n }')")
    done
    figures+=("$figure $(awk -v a=$sum -v n=$EVENTS 'BEGIN { printf "%.1f", a / n }')")
    printf '  %s (%s)\n' "${figures[-1]}" "$(IFS=,; echo "${parts[*]}")"
}

echo "instructions per event:"
count batch batch 'Shard<A>::turn' publish_batch_counted
count publish publish publish_counted
count command command 'Shard<A>::turn' send_counted claim_counted
count read read read_counted
count recovered recovered read_counted
echo "measured with: $(rustc --version), $(valgrind --version), profile $PROFILE, OsCache, 1 shard, 48-byte events, 10,000 users"

if [ $top = 1 ]; then
    echo
    callgrind_annotate --threshold=98 "$out/callgrind.batch.$((2 * EVENTS)).out" 2>/dev/null |
        awk -v n=$((2 * EVENTS)) '/file:function/ { on = 1; print "per event  function"; next }
            on && $1 ~ /^[0-9,]+$/ && $0 !~ /PROGRAM TOTALS/ { c = $1; gsub(",", "", c); sub(/^[^)]*\) */, ""); sub(/ \[.*/, ""); printf "%9.1f  %s\n", c / n, $0 }'
    echo
fi

if [ $save = 1 ]; then
    {
        echo "# Limits of perf/callgrind.sh: instructions per event; written by --save."
        echo "# $(rustc --version), $(valgrind --version), $(uname -m), $(date -u +%F), commit $(git rev-parse --short=12 HEAD 2>/dev/null || echo unknown)"
        printf '%s\n' "${figures[@]}"
    } >$LIMIT
    echo "saved to $LIMIT"
    exit 0
fi

printf '%s\n' "${figures[@]}" | awk -v allowed="$allowed" '
    NR == FNR { if ($1 !~ /^#/ && NF == 2) limit[$1] = $2; next }
    !($1 in limit) { print $1 ": no limit; write one with --save"; missing = 1; next }
    {
        change = 100 * ($2 / limit[$1] - 1)
        most = $1 == "read" || $1 == "recovered" ? 4 * allowed : allowed
        printf "%-14s %7.1f, limit %7.1f, change %+.2f %% (allowed: +%g %%)\n", $1, $2, limit[$1], change, most
        if (change < -most) print "  below the limit: set the new limit with perf/callgrind.sh --save"
        if (change > most) over = 1
    }
    END { exit missing ? 2 : over }' $LIMIT - || {
    status=$?
    [ $status = 1 ] && echo "FAILED: an event costs more instructions than the limit. Find them with perf/callgrind.sh --top; if they are needed, run --save and give the reason in the commit." >&2
    exit $status
}
