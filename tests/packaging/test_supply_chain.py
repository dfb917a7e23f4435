"""All that is installed and run to build this project is named exactly: packages by hash, actions by commit."""

import pathlib
import re
import tomllib
from typing import Any

import pytest

ROOT = pathlib.Path(__file__).parents[2]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
LOCKS = ROOT / "packaging" / "lock"
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))

EXTRAS: dict[str, list[str]] = PROJECT["project"]["optional-dependencies"]
GROUPS: dict[str, list[str]] = PROJECT["dependency-groups"]
BASE: list[str] = PROJECT["project"]["dependencies"]
NEEDED = {
    "build": GROUPS["build"],
    "gateway": [*BASE, *EXTRAS["valkey"], *EXTRAS["otel"]],
    "neuron": [*BASE, *EXTRAS["neuron"], *EXTRAS["otel"]],
    "gpu": [*BASE, *EXTRAS["neuron"], *EXTRAS["gpu"], *EXTRAS["otel"]],
    "ci": [*BASE, *EXTRAS["neuron"], *GROUPS["build"], *GROUPS["test"], *GROUPS["lint"], *GROUPS["fuzz"]],
    "release": GROUPS["release"],
}


def name_of(requirement: str) -> str:
    found = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert found is not None
    return re.sub(r"[-_.]+", "-", found[0]).lower()


def entries(lock: str) -> dict[str, str]:
    """Return the text of each package's entry, by its name; one that is there for several systems has several."""
    text = (LOCKS / f"{lock}.txt").read_text()
    found: dict[str, str] = {}
    for entry in re.split(r"^(?=[a-z0-9])", text, flags=re.MULTILINE)[1:]:
        found[name_of(entry)] = found.get(name_of(entry), "") + entry
    return found


@pytest.mark.parametrize("lock", NEEDED)
def test_a_lock_names_all_that_is_needed_each_with_a_version_and_hashes(lock: str) -> None:
    locked = entries(lock)
    assert {name_of(needed) for needed in NEEDED[lock]} - {"helexa-cortex"} <= set(locked)
    for entry in locked.values():
        assert re.match(r"[a-z0-9-]+(\[[a-z,-]+\])?==[^ ]+ ", entry), entry
        assert re.search(r"--hash=sha256:[0-9a-f]{64}", entry), entry


def test_every_lock_has_a_purpose() -> None:
    assert {path.stem for path in LOCKS.glob("*.txt")} == set(NEEDED)


def test_images_install_nothing_else() -> None:
    for path in (ROOT / "packaging" / "container").glob("*.Containerfile"):
        installs = re.findall(r"pip install ([^&\n]*)", path.read_text())
        assert installs
        assert all("--require-hashes" in each or "--no-deps" in each for each in installs), installs


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_names_actions_by_commit_and_may_do_no_more_than_it_must(path: pathlib.Path) -> None:
    text = path.read_text()
    used = re.findall(r"uses: (.+)", text)
    assert used
    for action in used:
        assert re.fullmatch(r"[a-z-]+/[a-z-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", action), action
    default = re.search(r"^permissions:\n((?:  .+\n)+)", text, re.MULTILINE)
    assert default is not None
    assert default[1] == "  contents: read\n"
    for permission in re.findall(r"^      ([a-z-]+: write.*)$", text, re.MULTILINE):
        assert " # " in permission, f"it has no reason: {permission}"
    assert "pull_request_target" not in text
    checkouts = text.count("actions/checkout@")
    assert text.count("persist-credentials: false") == checkouts


def test_a_release_has_an_sbom_and_build_provenance() -> None:
    text = (ROOT / ".github" / "workflows" / "release.yml").read_text()
    assert "make sbom" in text
    assert "actions/attest-build-provenance@" in text
