"""The documents' links lead somewhere, and the modules and files that they name exist."""

import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[1]
DOCUMENTS = sorted(
    path
    for place in ("*.md", "docs/**/*.md", "packaging/**/*.md", "bench/**/*.md", ".github/**/*.md")
    for path in ROOT.glob(place)
)
MAX_ARCHITECTURE_LINES = 150
UNITS = re.compile(r"\.(toml|socket|service)$")


def is_history(path: pathlib.Path) -> bool:
    """Return whether a document is about what was, so that what it names may be gone."""
    return path.name == "CHANGELOG.md" or "decisions" in path.parts or "results" in path.parts


CURRENT = [path for path in DOCUMENTS if not is_history(path)]


def without_code(text: str) -> str:
    return re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)


def anchors(text: str) -> set[str]:
    """Return the anchors of a document's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ +(.*?) *$", without_code(text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def broken_links(path: pathlib.Path, text: str) -> list[str]:
    found = []
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(text)):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = path.parent / name if name else path
        if not file.exists() or (anchor and anchor not in anchors(text if file == path else file.read_text())):
            found.append(target)
    return found


def exists(name: str) -> bool:
    """Return whether a dotted name is a module, or a name that a module has."""
    path = ROOT.joinpath(*name.split("."))
    if path.is_dir() or path.with_suffix(".py").exists() or path.with_suffix(".pyx").exists():
        return True
    module, _, attribute = name.rpartition(".")
    sources = [ROOT.joinpath(*module.split(".")).with_suffix(suffix) for suffix in (".py", ".pyx")]
    sources.append(ROOT.joinpath(*module.split("."), "__init__.py"))
    return any(re.search(rf"\b{attribute}\b", file.read_text()) for file in sources if file.exists())


def missing_names(text: str) -> list[str]:
    """Return the modules and paths in backticks that do not exist."""
    named = re.findall(r"`([^`\n]+)`", without_code(text))
    modules = [name for name in named if re.fullmatch(r"(cortex|neuron)(\.\w+)+", name) and not UNITS.search(name)]
    paths = [name for name in named if re.fullmatch(r"(cortex|neuron|tests|bench|docs|packaging)/[\w./-]*", name)]
    return [name for name in modules if not exists(name)] + [name for name in paths if not (ROOT / name).exists()]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path: pathlib.Path) -> None:
    assert broken_links(path, path.read_text()) == []


@pytest.mark.parametrize("path", CURRENT, ids=lambda path: str(path.relative_to(ROOT)))
def test_modules_and_files_that_are_named_exist(path: pathlib.Path) -> None:
    assert missing_names(path.read_text()) == []


def test_the_architecture_is_short() -> None:
    assert len((ROOT / "ARCHITECTURE.md").read_text().splitlines()) <= MAX_ARCHITECTURE_LINES


def test_planted_faults_are_found() -> None:
    text = "# A title\n[a](nowhere.md) [b](#a-title) [c](#another) [d](README.md#nothing) [e](README.md)"
    assert broken_links(ROOT / "README.md", text) == ["nowhere.md", "#another", "README.md#nothing"]
    text = "`cortex.fleet.router` `cortex.fleet.gone` `cortex.toml` `neuron.api` `tests/gone.py` `docs/operating.md`"
    assert missing_names(text) == ["cortex.fleet.gone", "tests/gone.py"]
