"""Check the form of ``docs/decisions``, and that its index and its files agree."""

import pathlib
import re

ROOT = pathlib.Path(__file__).parent.parent
FOLDER = ROOT / "docs" / "decisions"
MAX_LINES = 12
PARTS = ["Context", "Decision", "Cost", "Measured"]
STATUS_LINE = re.compile(r"(\d{4}-\d\d-\d\d) · (in force|open|superseded by \[.+?\]\((\S+)\)) · (\S.*)")
INDEX_ROW = re.compile(r"\| (\d{4}-\d\d-\d\d) \| \[(.+?)\]\((\S+)\) \| (.+) \| (.+) \|")


def anchor(title: str) -> str:
    """Return the anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


def faults_of(text: str) -> list[str]:
    """Return the faults of the entries of a file."""
    faults = []
    for entry in text.split("\n## ")[1:]:
        title, *lines = [line for line in entry.splitlines() if line.strip()]
        if 1 + len(lines) > MAX_LINES:
            faults.append(f"{title}: {1 + len(lines)} lines")
        status = STATUS_LINE.fullmatch(lines[0]) if lines else None
        if status is None:
            faults.append(f"{title}: no status line")
        elif not status[2].startswith("superseded"):
            parts = re.findall(r"^- \*\*(\w+)\*\*: \S", "\n".join(lines[1:]), re.MULTILINE)
            if parts != PARTS:
                faults.append(f"{title}: has the parts {parts}")
    return faults


def index_faults(index: str, files: dict[str, str]) -> list[str]:
    """Return the differences between an index and the entries of files, and the dead links between entries."""
    entries, targets = set(), set()
    for name, text in files.items():
        for entry in text.split("\n## ")[1:]:
            title, *lines = [line for line in entry.splitlines() if line.strip()]
            link = f"{name}#{anchor(title)}"
            targets.add(link)
            if status := STATUS_LINE.fullmatch(lines[0]):
                place = status[3] if status[3] is None or not status[3].startswith("#") else name + status[3]
                entries.add((status[1], title, link, place or status[2], status[4]))
    rows = set()
    for date, title, link, status, topic in INDEX_ROW.findall(index):
        superseded = re.fullmatch(r"superseded by \[.+\]\((\S+)\)", status)
        rows.add((date, title, link, superseded[1] if superseded else status, topic))
    faults = [f"not in the index: {entry}" for entry in sorted(entries - rows)]
    faults += [f"only in the index: {row}" for row in sorted(rows - entries)]
    faults += [f"no such entry: {row[3]}" for row in sorted(entries | rows) if "#" in row[3] and row[3] not in targets]
    return faults


def files() -> dict[str, str]:
    return {path.name: path.read_text() for path in sorted(FOLDER.glob("*.md")) if path.name != "README.md"}


def test_every_entry_has_four_parts_or_is_superseded_and_is_short() -> None:
    found = {name: faults for name, text in files().items() if (faults := faults_of(text))}
    assert not found


def test_the_index_and_the_entries_agree() -> None:
    assert set(files()) == {f"{name}.md" for name in ("gateway", "engine", "kernels", "cpu", "operations")}
    assert not index_faults((FOLDER / "README.md").read_text(), files())


def test_faults_are_found() -> None:
    parts = "".join(f"- **{part}**: x\n" for part in PARTS)
    text = f"# F\n\n## T\n\n2026-01-02 · in force · a\n\n{parts}"
    assert not faults_of(text)
    assert faults_of(text.replace("- **Cost**: x\n", ""))
    assert faults_of(text.replace("in force", "dropped"))
    assert faults_of(text + "more\n" * 7)
    index = "| 2026-01-02 | [T](f.md#t) | in force | a |"
    assert not index_faults(index, {"f.md": text})
    assert index_faults("", {"f.md": text})
    assert index_faults(index, {"f.md": ""})
    assert index_faults(index.replace("in force", "open"), {"f.md": text})
    gone = text.replace("in force", "superseded by [U](#u)")
    assert index_faults(index.replace("in force", "superseded by [U](f.md#u)"), {"f.md": gone})


def test_every_result_has_a_line_in_the_readme_with_a_target_that_exists() -> None:
    results = ROOT / "bench" / "results"
    readme = (results / "README.md").read_text()
    targets = re.findall(r"^([a-z][a-z0-9-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(re.findall(r"`make ([a-z0-9-]+)`", readme)) <= set(targets)
    listed = re.findall(r"^\| \[(\S+)\]\((\S+)\) \|", readme, re.MULTILINE)
    assert all(name == link for name, link in listed)
    assert sorted(name for name, _ in listed) == sorted({path.name for path in results.iterdir()} - {"README.md"})
