#!/usr/bin/env bash
# Build with a sanitizer and run the tests of the native code under it: sanitize.sh {address|thread} [pytest options]
#
# Needs the tools of building and testing in the active environment (meson, cython, ninja, pytest, psutil, msgspec). The
# build goes to build/KIND and is installed into a small environment of its own there, which sees the packages of the
# active one but runs none of its .pth hooks, so that an editable install cannot shadow what is under test. Seeded
# faults must be reported first; then any report, of the tests' process or of one they started, fails the run.
set -euo pipefail

kind=${1:-}
case $kind in
    address) sanitize=address,undefined optimization=1 libraries="libasan.so libubsan.so" seeds="overrun() overflow(1)" ;;
    # An optimizer makes one write of many, and hides races.
    thread) sanitize=thread optimization=0 libraries=libtsan.so seeds="race" ;;
    *) echo "usage: $0 {address|thread} [pytest options]" >&2; exit 2 ;;
esac
shift

cd "$(dirname "$0")/../.."
build=$PWD/build/$kind
venv=$build/venv
reports=$build/reports

quietly() {
    "$@" > "$build/log" 2>&1 || { cat "$build/log" >&2; exit 1; }
}

mkdir -p "$build"
[ -x "$venv/bin/python" ] || python -m venv --without-pip "$venv"
# Python runs the .pth files of an environment's own folder and not those of the folders they name.
python -P - > "$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/active.pth" <<'EOP'
import pathlib, sys, sysconfig
library = pathlib.Path(sysconfig.get_path("stdlib"))
for path in map(pathlib.Path, sys.path):
    if path.is_dir() and (path.name in {"site-packages", "dist-packages"} or not path.is_relative_to(library)):
        print(path)
EOP
if [ ! -f "$build/native/build.ninja" ]; then
    printf "[binaries]\npython = '%s'\n" "$venv/bin/python" > "$build/native.ini"
    quietly meson setup "$build/native" --native-file "$build/native.ini" --prefix "$venv" \
        -Dpython.install_env=prefix -Dchecks=true -Dbuildtype=debug -Doptimization=$optimization -Db_sanitize="$sanitize" -Db_lundef=false
fi
quietly meson compile -C "$build/native"
quietly meson install -C "$build/native" --no-rebuild --tags runtime,python-runtime,tests

preload=
for library in $libraries; do
    preload+=" $("${CC:-cc}" -print-file-name="$library")"
done
# Leaks are counted by the modules' own counts of live objects (detect_leaks=0): CPython frees little at its end.
run() {
    env LD_PRELOAD="${preload# }" PYTHONSAFEPATH=1 PYTHONMALLOC=malloc \
        ASAN_OPTIONS="detect_leaks=0:log_path=$reports/address" \
        UBSAN_OPTIONS="print_stacktrace=1:halt_on_error=1:log_path=$reports/undefined" \
        TSAN_OPTIONS="log_path=$reports/thread" \
        "$venv/bin/python" "$@"
}
forget() {
    rm -rf "$reports"
    mkdir "$reports"
}

race='
import threading
threads = [threading.Thread(target=_seeded_faults.race, args=(20_000_000,)) for _ in range(2)]
for thread in threads: thread.start()
for thread in threads: thread.join()'
for seed in $seeds; do
    forget
    call="_seeded_faults.$seed"
    [ "$seed" != race ] || call=$race
    run -c "from neuron.device import _seeded_faults; $call" 2> "$reports/stderr" || true
    if ! grep -Eq "AddressSanitizer|runtime error|ThreadSanitizer" "$reports"/*; then
        cat "$reports"/* >&2
        echo "$kind sanitizer: it did not report the seeded fault '$seed', so its silence means nothing" >&2
        exit 1
    fi
done

forget
tests=(tests/neuron/device tests/neuron/cpu_kernels/test_matmul.py tests/neuron/cpu_kernels/test_pool.py)
tests+=(tests/neuron/cpu_kernels/test_draw.py tests/neuron/cpu_kernels/test_step.py)
if [ "$kind" = thread ]; then
    # Where threads of ours meet: a loop beside its daemon, the watchdog, channels between threads.
    tests=(tests/neuron/device/test_loop.py tests/neuron/device/test_channel.py)
    # The pool that all kernels run on.
    tests+=(tests/neuron/cpu_kernels/test_pool.py tests/neuron/cpu_kernels/test_step.py)
    # All levels share out their work by the same code.
    tests+=(-k "not avx")
    # The runtime holds signals back until a thread comes by, so waits are not interrupted; nothing there is shared.
    tests+=(--deselect tests/neuron/device/test_channel.py::test_an_interrupted_wait_goes_on)
elif [ -d tests/cortex/_fast ]; then
    tests+=(tests/cortex/_fast)
fi
# Tens of thousands of steps, which compare results and reach no code that other tests do not.
tests+=(--deselect tests/neuron/cpu_kernels/test_step.py::test_cuts_threads_and_company_change_no_bit)
status=0
run -m pytest -p no:cacheprovider -q --timeout 300 "$@" "${tests[@]}" || status=$?
if [ -n "$(ls "$reports")" ]; then
    cat "$reports"/* >&2
    echo "$kind sanitizer: reports of $(find "$reports" -type f | wc -l) process(es)" >&2
    exit 1
fi
exit "$status"
