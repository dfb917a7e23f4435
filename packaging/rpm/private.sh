#!/bin/sh
# The part of a package that is Python: the wheel of this tree, and all that it needs beside it, in a folder of its own where
# nothing else looks. Both specs run this in the unpacked source, where `wheels` is what sources.sh put there, without a network.
#   private.sh build
#   private.sh install ROOT FOLDER COMMAND      FOLDER as it will be called, below ROOT; COMMAND: cortex or neuron
# $PYTHON: the interpreter that will run it (python3).
set -eu
python="${PYTHON:-python3}"
# Ignores the builder's own pip configuration.
export PIP_CONFIG_FILE=/dev/null PIP_NO_INDEX=1 PIP_FIND_LINKS="wheels built" PIP_ONLY_BINARY=:all: PIP_DISABLE_PIP_VERSION_CHECK=1

case "$1" in
build)
    mkdir built
    "$python" -m venv --without-pip build-env
    "$python" -m pip --python build-env/bin/python install --quiet meson-python Cython meson ninja
    PATH="$PWD/build-env/bin:$PATH" "$python" -m pip --python build-env/bin/python wheel \
        --no-deps --no-build-isolation --wheel-dir built .
    ;;
install)
    root="$2" folder="$3" command="$4" tree="$2$3"
    "$python" -m pip install --quiet --no-compile --target "$tree" "helexa-cortex[$(cat wheels/extras)]"
    rm -r "$tree/bin"
    if [ "$command" = cortex ]; then rm -r "$tree/neuron"; fi
    # Third-party wheels mark many modules executable. Ours have symbols that are not needed.
    find "$tree" -type f -perm /111 ! -name '*.so*' ! -path '*/bin/*' -exec chmod a-x {} +
    compile="$python -m compileall -q --invalidation-mode unchecked-hash -s $root"
    for ours in cortex neuron; do
        [ -d "$tree/$ours" ] || continue
        find "$tree/$ours" -name '*.so' -exec strip --strip-unneeded {} +
        $compile "$tree/$ours"
    done
    # All modules, now: the service cannot write here. Some third-party files are for later Pythons.
    $compile "$tree" || true
    mkdir -p "$root/usr/bin"
    cat > "$root/usr/bin/$command" <<LAUNCHER
#!/bin/sh
export PYTHONPATH="$folder" PYTHONNOUSERSITE=1
exec $python -P -m $command.cli "\$@"
LAUNCHER
    chmod 0755 "$root/usr/bin/$command"
    ;;
*) echo "private.sh: build or install" >&2; exit 2 ;;
esac
