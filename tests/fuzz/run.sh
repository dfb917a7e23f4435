#!/usr/bin/env bash
# Run fuzz targets, each for so many seconds: tests/fuzz/run.sh SECONDS RUNS [TARGET...], by default all of them.
# A target begins with its kept inputs, tests/fuzz/corpus/TARGET, where an input that fails is added; commit it with the
# fix. New inputs are kept in build/fuzz. All targets run, whatever fails; the last lines name those that failed.
set -uo pipefail
cd "$(dirname "$0")/../.."
seconds=$1 runs=$2
shift 2
if [ $# -eq 0 ]; then
    for path in tests/fuzz/fuzz_*.py; do
        name=${path##*/fuzz_}
        set -- "$@" "${name%.py}"
    done
fi
failed=()
for target in "$@"; do
    kept=tests/fuzz/corpus/$target learned=build/fuzz/$target
    mkdir -p "$kept" "$learned"
    echo "--- fuzz $target: $(find "$kept" -type f | wc -l) kept inputs, $seconds s"
    # libFuzzer ends by itself; a process that hangs is ended half a minute later.
    timeout --kill-after=10 $((seconds + 30)) python -P "tests/fuzz/fuzz_$target.py" -max_total_time="$seconds" \
        -runs="$runs" -timeout=20 -rss_limit_mb=3072 -print_final_stats=0 -verbosity=0 -artifact_prefix="$kept/" "$learned" "$kept" ||
        failed+=("$target")
    rmdir "$kept" 2>/dev/null
done
if [ ${#failed[@]} -gt 0 ]; then
    echo "fuzz: failed: ${failed[*]}; what failed is in tests/fuzz/corpus"
    exit 1
fi
echo "fuzz: $# targets held"
