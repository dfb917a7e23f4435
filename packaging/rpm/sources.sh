#!/bin/sh
# Make the sources of a package's SRPM in a folder: the source archive of this tree, and the wheels of what it needs.
#   sources.sh cortex|helexa-neuron FOLDER
# Wheels are for this machine's architecture and Python ($PYTHON, python3), as the package is. NEURON_EXTRA=gpu gives the
# neuron Triton too. Which extras the wheels are for stands beside them: the spec installs these.
set -eu
name="$1" folder="$(mkdir -p "$2" && cd "$2" && pwd)"
tree="$(cd "$(dirname "$0")/../.." && pwd)"
python="${PYTHON:-python3}"
case "$name" in
    cortex) extras=valkey,otel ;;
    helexa-neuron) extras="${NEURON_EXTRA:-neuron},otel" ;;
    *) echo "sources.sh: no package $name" >&2; exit 2 ;;
esac
version="$(sed -n 's/^version = "\(.*\)"/\1/p' "$tree/pyproject.toml")"

"$python" -m build --sdist --no-isolation --outdir "$folder" "$tree"
wheels="$(mktemp -d)"
trap 'rm -rf "$wheels"' EXIT
# The requirements as pip resolves them for this tree, without the tree itself.
"$python" - "$tree/pyproject.toml" "$extras" > "$wheels/requirements" <<'READ'
import sys, tomllib
project = tomllib.load(open(sys.argv[1], "rb"))
wanted = [*project["project"]["dependencies"], *project["build-system"]["requires"], "meson>=1.3", "ninja"]
for extra in sys.argv[2].split(","):
    found = project["project"]["optional-dependencies"][extra]
    for name in found:
        inner = name.partition("[")[2].partition("]")[0]
        wanted += project["project"]["optional-dependencies"][inner] if name.startswith("helexa-cortex") else [name]
# What redis wants of a Python before 3.11.3, as the one that builds the package may be though this one is not.
if "valkey" in sys.argv[2].split(","):
    wanted.append("async-timeout>=4.0.3")
print("\n".join(wanted))
READ
mkdir "$wheels/wheels"
echo "$extras" > "$wheels/wheels/extras"
"$python" -m pip download --quiet --only-binary :all: --dest "$wheels/wheels" --requirement "$wheels/requirements"
tar -C "$wheels" --sort=name --owner=0 --group=0 --mtime=@0 -cf "$folder/$name-wheels-$version.tar" wheels
