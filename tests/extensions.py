"""Print the names of this project's compiled modules, for stubtest."""

import pathlib

ROOT = pathlib.Path(__file__).parents[1]


def extensions() -> list[str]:
    """Return the dotted name of every ``.pyx`` of the packages."""
    return sorted(
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for package in ("cortex", "neuron")
        for path in (ROOT / package).rglob("*.pyx")
    )


if __name__ == "__main__":
    print(*extensions())
