#!/bin/sh
# Print the commit that this tree is of: from the source archive, else from git, else nothing.
# As `commit.sh --archive` (meson dist) write it into the archive that is being made.
set -eu
tree="${MESON_SOURCE_ROOT:-$(cd "$(dirname "$0")/.." && pwd)}"

if [ "${1:-}" = --archive ]; then
    "$0" > "$MESON_DIST_ROOT/COMMIT"
elif [ -s "$tree/COMMIT" ]; then
    cat "$tree/COMMIT"
elif [ -e "$tree/.git" ]; then
    git -C "$tree" rev-parse HEAD 2>/dev/null || true
fi
