"""docs/configuration.md has every key of the four files and every environment variable, as the code has them.

A row of a key has its type with its bounds, its default, and whether a running gateway takes a change; a row of a
variable has its name. Both are compared both ways.
"""

import ast
import enum
import pathlib
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import msgspec
import pytest

import cortex.config
import neuron.config
from cortex import reload
from cortex.access.keys import KeysFile
from cortex.config import Timeouts
from cortex.wire.node import ModelSpec, SamplingDefaults

ROOT = pathlib.Path(__file__).parents[1]
DOCUMENT = (ROOT / "docs" / "configuration.md").read_text()
FILES = {
    "cortex.toml": cortex.config.Config,
    "models.toml": cortex.config.ModelsFile,
    "keys.toml": KeysFile,
    "neuron.toml": neuron.config.Config,
}


SHARED = {
    ("neuron.toml", "[[models]]"): ModelSpec,
    ("neuron.toml", "[models.sampling]"): SamplingDefaults,
    ("cortex.toml", "[neurons.timeouts]"): Timeouts,
}
"""Tables whose keys are those of another table: the document refers to it."""
HUGE = 1e9


class Row(NamedTuple):
    """Row of a key: type, default, whether a reload applies it, and allowed values."""

    type: str
    default: str
    is_reloaded: str
    values: tuple[str, ...] = ()


# ------------------------------------------------------------------ the keys of the code


def inner(kind: Any) -> Any:
    """Return a type without ``| None`` and without its metadata."""
    if isinstance(kind, msgspec.inspect.Metadata):
        return inner(kind.type)
    if isinstance(kind, msgspec.inspect.UnionType):
        (found,) = (each for each in kind.types if not isinstance(each, msgspec.inspect.NoneType))
        return inner(found)
    return kind


def bounds(kind: Any) -> str:
    """Return the bounds of a number; those of a billion and beyond only mean that a value is finite."""
    least, above, most = (
        value if value is not None and abs(value) < HUGE else None for value in (kind.ge, kind.gt, kind.le)
    )
    if least is not None and most is not None:
        return f", {least:g} to {most:g}"
    named = (("at least", least), ("above", above), ("at most", most))
    parts = [f"{word} {value:g}" for word, value in named if value is not None]
    return f", {' and '.join(parts)}" if parts else ""


def type_name(kind: Any) -> str:
    match kind:
        case msgspec.inspect.BoolType():
            return "boolean"
        case msgspec.inspect.IntType():
            return f"integer{bounds(kind)}"
        case msgspec.inspect.FloatType():
            return f"number{bounds(kind)}"
        case msgspec.inspect.StrType() | msgspec.inspect.EnumType():
            return "string"
        case msgspec.inspect.DateTimeType():
            return "time"
        case msgspec.inspect.VarTupleType():
            return "list of strings"
        case msgspec.inspect.DictType():
            return "table of strings"
    raise AssertionError(kind)


def default_name(field: Any) -> str:
    if field.required:
        return "required"
    value = field.default
    if value is msgspec.NODEFAULT:
        return "" if callable(field.default_factory) and field.default_factory not in (dict, list) else "`{}`"
    if isinstance(value, enum.Enum):
        value = value.value
    match value:
        case None:
            return ""
        case bool():
            return f"`{str(value).lower()}`"
        case str():
            return f'`"{value}"`'
        case int():
            return f"`{value}`"
        case float():
            return f"`{value:.1f}`" if value == int(value) else f"`{value}`"
        case tuple():
            return f"`{msgspec.json.encode(value).decode()}`"
        case dict():
            return "`{}`"
    raise AssertionError(value)


def is_reloaded(file: str, table: str, key: str) -> str:
    if file != "cortex.toml":
        return ""  # stated once for the whole file
    is_fixed = table == "[store]" or (table == "[gateway]" and key in reload.FIXED)
    return "no" if is_fixed or (table == "[access]" and key in {"counters", "url"}) else "yes"


def keys_of(file: str, kind: Any, path: str = "", *, is_list: bool = False) -> Iterator[tuple[tuple[str, str], Row]]:
    """Yield the table, the key and the row of each key of a struct and of the structs within it."""
    for field in msgspec.inspect.type_info(kind).fields:  # type: ignore[attr-defined]
        found = inner(field.type)
        below = f"{path}.{field.encode_name}".lstrip(".")
        if isinstance(found, msgspec.inspect.StructType):
            yield from keys_of(file, found.cls, below)
        elif isinstance(found, msgspec.inspect.VarTupleType) and isinstance(
            item := inner(found.item_type), msgspec.inspect.StructType
        ):
            yield from keys_of(file, item.cls, below, is_list=True)
        else:
            table = f"[[{path}]]" if is_list else f"[{path}]" if path else f"[{field.encode_name}]"
            if field.encode_name in getattr(SHARED.get((file, table)), "__struct_fields__", ()):
                continue
            values = tuple(each.value for each in found.cls) if isinstance(found, msgspec.inspect.EnumType) else ()
            row = Row(type_name(found), default_name(field), is_reloaded(file, table, field.encode_name), values)
            yield (table, field.encode_name if path else "NAME"), row


# ------------------------------------------------------------------ the rows of the document


def section(title: str, document: str) -> str:
    found = re.search(rf"^## {re.escape(title)}$(.*?)(?=^## |\Z)", document, re.MULTILINE | re.DOTALL)
    assert found is not None, f"no section {title}"
    return found[1]


def rows_of(text: str) -> Iterator[list[str]]:
    """Yield the cells of each row of the tables in ``text``, without the heads of tables."""
    for line in text.splitlines():
        if line.startswith("| `"):
            yield [cell.strip() for cell in line.strip("|").split("|")]


def documented(file: str, document: str) -> Iterator[tuple[tuple[str, str], Row]]:
    for part in re.split(r"^### ", section(f"`{file}`", document), flags=re.MULTILINE)[1:]:
        table = part.partition("\n")[0].strip("`")
        for key, kind, default, *applied, meaning in rows_of(part):
            values = tuple(re.findall(r'`"([a-z]+)"`', meaning))
            yield (table, key.strip("`")), Row(kind, default, "".join(applied), values)


def differences(document: str, file: str) -> list[str]:
    """Return what the document and the structs have different of a file."""
    wanted, found = dict(keys_of(file, FILES[file])), {}
    problems = []
    for key, row in documented(file, document):
        if key in found:
            problems.append(f"{key} has two rows")
        found[key] = row
    problems += [f"{key} has no row" for key in wanted if key not in found]
    problems += [f"{key} is no key" for key in found if key not in wanted]
    for key in wanted.keys() & found.keys():
        if wanted[key][:3] != found[key][:3]:
            problems.append(f"{key}: {found[key][:3]} is {wanted[key][:3]}")
        if missing := set(wanted[key].values) - set(found[key].values):
            problems.append(f"{key}: the values {missing} are not explained")
    return problems


@pytest.mark.parametrize("file", FILES)
def test_every_key_of_a_file_has_its_row(file: str) -> None:
    assert differences(DOCUMENT, file) == []


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("cortex.toml", "| `workers` | integer, 1 to 256 |", "| `processes` | integer, 1 to 256 |"),
        ("cortex.toml", "| `workers` | integer, 1 to 256 |", "| `workers` | integer, 1 to 255 |"),
        ("cortex.toml", "| `failures` | integer, at least 1 | `5` |", "| `failures` | integer, at least 1 | `6` |"),
        ("cortex.toml", '`"lru"`', "the oldest"),
        ("cortex.toml", "| `discover` | boolean | `true` | yes |", "| `discover` | boolean | `true` | no |"),
        ("keys.toml", "| `admin` | boolean |", "| `admin` | string |"),
        ("models.toml", "### `[aliases]`", "### `[names]`"),
        ("neuron.toml", "| `listen` |", "| `address` |"),
    ],
)
def test_a_planted_fault_of_a_key_is_found(file: str, old: str, new: str) -> None:
    assert DOCUMENT.count(old) >= 1
    assert differences(DOCUMENT.replace(old, new), file)


# ------------------------------------------------------------------ environment variables


def constants(tree: ast.Module) -> dict[str, str]:
    """Return the strings that a module gives names."""
    found: dict[str, str] = {}
    for node in tree.body:
        if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(node.value, ast.Constant):
            for target in [node.target] if isinstance(node, ast.AnnAssign) else node.targets:
                if isinstance(target, ast.Name) and isinstance(node.value.value, str):
                    found[target.id] = node.value.value
    return found


def is_environment(node: ast.expr) -> bool:
    if isinstance(node, ast.Attribute):
        return node.attr in {"environ", "_environment"}
    return isinstance(node, ast.Name) and node.id == "environment"


def variables(tree: ast.Module, names: dict[str, str]) -> set[str]:
    """Return the environment variables that a module reads, or sets for its children."""
    loops = {
        node.target.id: [each.value for each in node.iter.elts if isinstance(each, ast.Constant)]
        for node in ast.walk(tree)
        if isinstance(node, ast.For) and isinstance(node.target, ast.Name) and isinstance(node.iter, ast.Tuple)
    }
    asked: list[ast.expr] = []
    found: set[str] = set()
    for node in ast.walk(tree):
        match node:
            case ast.Call(func=ast.Attribute(value=base, attr="get"), args=[first, *_]) if is_environment(base):
                asked.append(first)
            case ast.Call(func=ast.Attribute(attr="getenv"), args=[first, *_]):
                asked.append(first)
            case ast.Subscript(value=base, slice=key) if is_environment(base):
                asked.append(key)
            case (
                ast.Assign(targets=[ast.Name(id=name)], value=ast.Dict(keys=keys))
                | ast.AnnAssign(target=ast.Name(id=name), value=ast.Dict(keys=keys))
            ) if name.endswith("ENVIRONMENT"):
                asked += [key for key in keys if key is not None]
    for node in asked:
        match node:
            case ast.Constant(value=str() as name):
                found.add(name)
            case ast.Name(id=name) if name in loops:
                found.update(loops[name])
            case ast.Name(id=name) | ast.Attribute(attr=name) if name in names:
                found.add(names[name])
    return found


def variables_of_the_code() -> set[str]:
    trees = [ast.parse(path.read_text()) for package in ("cortex", "neuron") for path in (ROOT / package).rglob("*.py")]
    names = {name: value for tree in trees for name, value in constants(tree).items() if name.isupper()}
    return set[str]().union(*(variables(tree, constants(tree) | {**names, **constants(tree)}) for tree in trees))


def variables_of_the_document(document: str) -> set[str]:
    text = section("Environment variables", document)
    return {name for row in rows_of(text) for name in re.findall(r"`([A-Z][A-Z0-9_]+)`", row[0])}


def test_tables_that_refer_to_another_have_its_keys() -> None:
    assert cortex.config.NodeTimeouts.__struct_fields__ == Timeouts.__struct_fields__
    models = {key for (table, key), _ in documented("models.toml", DOCUMENT) if table == "[[models]]"}
    assert {*ModelSpec.__struct_fields__} - {"sampling"} <= models


def test_every_environment_variable_has_its_row() -> None:
    assert variables_of_the_document(DOCUMENT) == variables_of_the_code()


def test_a_planted_variable_is_found() -> None:
    read = (
        'NAME = "CORTEX_NAMED"\nos.environ.get("CORTEX_READ")\nenvironment[NAME]\nX_ENVIRONMENT = {"CORTEX_SET": "1"}\n'
    )
    tree = ast.parse(read)
    assert variables(tree, constants(tree)) == {"CORTEX_READ", "CORTEX_NAMED", "CORTEX_SET"}
    document = DOCUMENT.replace("`CORTEX_KEY`", "`CORTEX_OTHER_KEY`")
    assert variables_of_the_document(document) != variables_of_the_code()
