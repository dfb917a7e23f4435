#!/usr/bin/env bash
# Write the lock files of this folder anew from pyproject.toml: every package that CI and the images install, with its
# version and the hashes of its files. Run by `make locks`, with uv's program as the argument; needs the package index.
set -euo pipefail
uv=$1
cd "$(dirname "$0")/../.."
export UV_CUSTOM_COMPILE_COMMAND="make locks"
compile=("$uv" pip compile --quiet --universal --python-version 3.11 --generate-hashes --upgrade)

"${compile[@]}" --group build -o packaging/lock/build.txt
"${compile[@]}" pyproject.toml --extra valkey --extra otel -o packaging/lock/gateway.txt
"${compile[@]}" pyproject.toml --extra neuron --extra otel -o packaging/lock/neuron.txt
"${compile[@]}" pyproject.toml --extra gpu --extra otel -o packaging/lock/gpu.txt
"${compile[@]}" --group release -o packaging/lock/release.txt
# CI tests with the CPU build of torch, which each runner gets from elsewhere, so that its files have other hashes: torch
# is installed by its version alone, and what it needs is here.
without_torch=$(mktemp)
trap 'rm -f "$without_torch"' EXIT
echo "torch ; sys_platform == 'none'" > "$without_torch"
printf '%s\n' sympy networkx filelock fsspec jinja2 setuptools typing-extensions | "${compile[@]}" pyproject.toml - \
    --extra neuron --group build --group test --group lint --group fuzz --overrides "$without_torch" -o packaging/lock/ci.txt
