"""Check the form of ``docs/decisions``, and that its index and its files agree."""

import pathlib
import re

ROOT = pathlib.Path(__file__).parent.parent
FOLDER = ROOT / "docs" / "decisions"
MAX_LINES = 12
PARTS = [["Decision"], ["Decision", "Cost"], ["Decision", "Measured"], ["Decision", "Cost", "Measured"]]
INDEX_ROW = re.compile(r"\| \[(.+)\]\((\S+)\) \| .+ \| (?:in force|open) \| \d{4}-\d\d-\d\d \|")


def anchor(title: str) -> str:
    """Return the anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


def faults_of(text: str) -> list[str]:
    """Return the faults of the entries of a file: each has a context, a decision, and perhaps its cost and figures."""
    faults = []
    for entry in text.split("\n## ")[1:]:
        title, *lines = [line for line in entry.splitlines() if line.strip()]
        if 1 + len(lines) > MAX_LINES:
            faults.append(f"{title}: {1 + len(lines)} lines")
        context, *parts = re.split(r"\*\*(\w+)\*\*: ", " ".join(lines))
        if not context or parts[::2] not in PARTS or not all(part.strip() for part in parts[1::2]):
            faults.append(f"{title}: has the parts {parts[::2]}")
    return faults


def index_faults(index: str, files: dict[str, str]) -> list[str]:
    """Return the differences between an index and the entries of files."""
    titles = [(name, entry.partition("\n")[0]) for name, text in files.items() for entry in text.split("\n## ")[1:]]
    entries = {(title, f"{name}#{anchor(title)}") for name, title in titles}
    rows = set(INDEX_ROW.findall(index))
    return [f"not in the index: {entry}" for entry in sorted(entries - rows)] + [
        f"only in the index: {row}" for row in sorted(rows - entries)
    ]


def files() -> dict[str, str]:
    return {path.name: path.read_text() for path in sorted(FOLDER.glob("*.md")) if path.name != "README.md"}


def test_every_entry_has_its_parts_and_is_short() -> None:
    found = {name: faults for name, text in files().items() if (faults := faults_of(text))}
    assert not found


def test_the_index_and_the_entries_agree() -> None:
    assert set(files()) == {f"{name}.md" for name in ("gateway", "engine", "kernels", "cpu", "operations")}
    assert not index_faults((FOLDER / "README.md").read_text(), files())


def test_faults_are_found() -> None:
    text = "# F\n\n## T\n\nSo it was. **Decision**: x.\n**Cost**: y.\n"
    assert not faults_of(text)
    assert faults_of(text.replace("So it was. ", ""))
    assert faults_of(text.replace("**Decision**: x.", ""))
    assert faults_of(text.replace("y.", ""))
    assert faults_of(text + "more\n" * 10)
    index = "| [T](f.md#t) | a | in force | 2026-01-02 |"
    assert not index_faults(index, {"f.md": text})
    assert index_faults("", {"f.md": text})
    assert index_faults(index, {"f.md": ""})
    assert index_faults(index.replace("in force", "dropped"), {"f.md": text})


def test_every_result_has_a_line_in_the_readme_with_a_target_that_exists() -> None:
    results = ROOT / "bench" / "results"
    readme = (results / "README.md").read_text()
    targets = re.findall(r"^([a-z][a-z0-9-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(re.findall(r"`make ([a-z0-9-]+)`", readme)) <= set(targets)
    listed = re.findall(r"^\| \[(\S+)\]\((\S+)\) \|", readme, re.MULTILINE)
    assert all(name == link for name, link in listed)
    assert sorted(name for name, _ in listed) == sorted({path.name for path in results.iterdir()} - {"README.md"})
