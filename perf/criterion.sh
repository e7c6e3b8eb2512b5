#!/usr/bin/env bash
# Runs the benches. Reports: target/criterion/report/index.html.
#
#   perf/criterion.sh                        all benches
#   perf/criterion.sh keys                   the benches whose id contains `keys`
#   perf/criterion.sh keys --quick           a rough result
#   perf/criterion.sh --save main            saves the figures under the name `main`
#   perf/criterion.sh --against main         compares with saved figures
#   perf/criterion.sh append/writer --profile 10   samples the bench for 10 s instead of measuring it: perf/out/criterion.svg
set -euo pipefail
cd "$(dirname "$0")/.."

filter=() options=() seconds=0
while [ $# -gt 0 ]; do
    case $1 in
        --save) options+=(--save-baseline "$2"); shift ;;
        --against) options+=(--baseline "$2"); shift ;;
        --profile) seconds=$2; shift ;;
        -*) options+=("$1") ;;
        *) filter+=("$1") ;;
    esac
    shift
done

if [ "$seconds" = 0 ]; then
    exec cargo bench -p benches --bench hot_path -- "${filter[@]}" "${options[@]}"
fi

for tool in perf inferno-flamegraph; do
    PATH=$PATH:${CARGO_HOME:-$HOME/.cargo}/bin command -v $tool >/dev/null || { echo "criterion.sh: $tool is missing; perf/flamegraph.sh installs it" >&2; exit 1; }
done
export PATH=$PATH:${CARGO_HOME:-$HOME/.cargo}/bin
mkdir -p perf/out
program=$(cargo bench --profile profiling -p benches --bench hot_path --no-run --message-format=json |
    sed -n 's/.*"executable":"\([^"]*hot_path[^"]*\)".*/\1/p' | tail -n 1)
perf record -e cpu-clock:u -F 1999 --call-graph dwarf,8192 -o perf/out/criterion.data -- "$program" --bench --profile-time "$seconds" "${filter[@]}"
perf script --no-inline -i perf/out/criterion.data 2>/dev/null | inferno-collapse-perf | inferno-flamegraph --title "benches ${filter[*]}" >perf/out/criterion.svg
rm -f perf/out/criterion.data
echo perf/out/criterion.svg
