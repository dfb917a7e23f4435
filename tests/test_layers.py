"""The import graph of the project is the one declared here: layers without cycles, read from every source file.

A unit is a module or a package. It belongs to the layer directly above the highest layer that it imports, so the table
allows no import that does not exist. ``python tests/test_layers.py`` prints the table of the source as it is.
"""

import ast
import graphlib
import pathlib
import re
import subprocess
import sys
import textwrap
from collections.abc import Mapping

import pytest

ROOT = pathlib.Path(__file__).parents[1]
Graph = Mapping[str, set[str]]

LAYERS = tuple(
    """
cortex._fast cortex._fast.buffer cortex._fast.clock cortex._fast.in_flight cortex._fast.prefix_index
cortex._fast.scheduling cortex._fast.watches cortex.build_identity cortex.console cortex.dialects.schema cortex.extras
cortex.fleet.policies cortex.loop_lag cortex.memory cortex.settings cortex.supervise cortex.systemd cortex.wire
neuron.cpu_kernels neuron.device.channel neuron.device.driver neuron.formats neuron.text.gguf_rules neuron.text.pieces
neuron.text.token_bytes

cortex cortex._fast.event_fields cortex._fast.log_fields cortex._fast.peek cortex._fast.response_writer
cortex._fast.sse cortex.access.keys cortex.body_encoding cortex.dialects.chat.chunks cortex.dialects.openai_errors
cortex.dialects.responses.sealed cortex.errors cortex.fleet.state cortex.guard cortex.owned_file cortex.report
cortex.request_body cortex.tracing neuron neuron.device.jobs neuron.errors neuron.text.plain neuron.triton_kernels

cortex._fast.chat_events cortex._fast.chat_stream cortex._fast.http_client cortex._fast.responses_stream
cortex._fast.usage_scanner cortex.access cortex.dialects.envelope cortex.http_io cortex.logs neuron.device
neuron.harness neuron.layers neuron.text.matcher

cortex.dialects.messages.errors cortex.event_stream cortex.server neuron.batch neuron.engine_settings neuron.metrics

cortex._fast.messages_stream neuron.config neuron.models

cortex.dialects neuron.load neuron.text.tekken

cortex._fast.record cortex.config neuron.api_description neuron.call_headers neuron.text.tokenizer

cortex.gateway_client cortex.known_models cortex.metrics cortex.store cortex.upstream neuron.engine neuron.text

cortex.agents cortex.chat_client cortex.fleet cortex.load_watch cortex.local_daemons cortex.preflight
cortex.request_log cortex.responses neuron.generation

cortex.admin cortex.capture cortex.chat cortex.endpoints cortex.launch cortex.operate cortex.pipeline
cortex.preparation cortex.reload cortex.usage_recorder neuron.torch_model

cortex.admin_keys cortex.admin_models cortex.admin_usage cortex.capture_commands cortex.catalogue_commands
cortex.dashboard cortex.demo cortex.inference cortex.key_commands cortex.run neuron.torch_harness

cortex.api_description cortex.cli neuron.service

cortex.gateway neuron.node_api

cortex.worker neuron.api

cortex.asgi neuron.cli
""".strip().split("\n\n")
)
"""Units by layer, the lowest first. A module belongs to the unit with the longest matching name."""
NEURON_USES = (
    "cortex._fast.scheduling",
    "cortex.build_identity",
    "cortex.dialects",
    "cortex.dialects.schema",
    "cortex.extras",
    "cortex.guard",
    "cortex.event_stream",
    "cortex.http_io",
    "cortex.logs",
    "cortex.loop_lag",
    "cortex.request_body",
    "cortex.settings",
    "cortex.supervise",
    "cortex.systemd",
    "cortex.tracing",
    "cortex.wire",
)
"""Units of cortex that neuron imports."""

_CYTHON = re.compile(r"^[ \t]*(?:from\s+([\w.]+)\s+c?import\s+(\([^)]*\)|[^#\n]+)|c?import\s+([\w., ]+))", re.MULTILINE)


def imported(path: pathlib.Path) -> set[str]:
    """Return the names that a source file imports; ``from package import name`` is ``package.name``."""
    text = path.read_text()
    found: set[str] = set()
    if path.suffix in {".py", ".pyi"}:
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert not node.level, f"{path}: relative import"
                found |= {f"{node.module}.{alias.name}" for alias in node.names}
        return found
    for package, names, modules in _CYTHON.findall(text):
        prefix = f"{package}." if package else ""
        found |= {prefix + name.split()[0] for name in (names or modules).strip("()").split(",") if name.strip()}
    return found


def modules_of(root: pathlib.Path) -> dict[str, set[str]]:
    """Return the modules under ``root`` that each module imports, in its source or its stub."""
    paths: dict[str, list[pathlib.Path]] = {}
    for package in ("cortex", "neuron"):
        for path in sorted((root / package).rglob("*")):
            if path.suffix in {".py", ".pyi", ".pyx", ".pxd"}:
                name = ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
                paths.setdefault(name, []).append(path)

    def module_of(name: str) -> str:
        while name and name not in paths:
            name = name.rpartition(".")[0]
        return name

    return {
        module: {module_of(name) for path in files for name in imported(path)} - {module, ""}
        for module, files in paths.items()
    }


def units_of(modules: Graph, layers: tuple[str, ...]) -> dict[str, set[str]]:
    """Return the units that each unit imports."""
    units = " ".join(layers).split()

    def unit_of(module: str) -> str:
        found = max((unit for unit in units if module == unit or module.startswith(f"{unit}.")), key=len, default="")
        # A package's own __init__ is no unit for modules that have none.
        return "" if found in {"cortex", "neuron"} and module != found else found

    missing = [module for module in modules if not unit_of(module)]
    assert not missing, f"{missing} belong to no unit"
    unknown = [unit for unit in units if unit not in modules]
    assert not unknown, f"{unknown} are no modules"
    graph: dict[str, set[str]] = {unit: set() for unit in units}
    for module, targets in modules.items():
        graph[unit_of(module)] |= {unit_of(target) for target in targets} - {unit_of(module)}
    return graph


def levels_of(units: Graph) -> dict[str, int]:
    """Return the layer of each unit: directly above the highest that it imports. Raises ``CycleError``."""
    levels: dict[str, int] = {}
    for unit in graphlib.TopologicalSorter(units).static_order():
        levels[unit] = 1 + max((levels[target] for target in units[unit]), default=-1)
    return levels


def problems(modules: Graph, layers: tuple[str, ...]) -> list[str]:
    """Return the differences between the declared layers and the import graph."""
    graphlib.TopologicalSorter(modules).prepare()
    units = units_of(modules, layers)
    levels = levels_of(units)
    declared = {unit: number for number, layer in enumerate(layers) for unit in layer.split()}
    return [
        f"{unit} is declared in layer {declared[unit]} and belongs to {levels[unit]}: it imports {sorted(units[unit])}"
        for unit in declared
        if declared[unit] != levels[unit]
    ]


MODULES = modules_of(ROOT)


def test_the_layers_match_the_import_graph() -> None:
    assert problems(MODULES, LAYERS) == []


def test_neuron_uses_the_declared_units_of_cortex_and_cortex_none_of_neuron() -> None:
    units = units_of(MODULES, LAYERS)
    uses = {target for unit in units if unit.startswith("neuron") for target in units[unit] if target[:6] == "cortex"}
    assert uses == set(NEURON_USES)
    assert not [unit for unit in units if unit.startswith("cortex") and any(t[:6] == "neuron" for t in units[unit])]


@pytest.mark.parametrize("entry", ["cortex.asgi", "neuron.cli"])
def test_no_tensor_library_is_imported_before_it_is_needed(entry: str) -> None:
    code = f"import {entry}, sys; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert not {"torch", "triton", "transformers"} & set(loaded.split())


# ------------------------------------------------------------------ planted faults

PLANTED = ("cortex.low", "cortex.middle", "cortex.high")


@pytest.mark.parametrize(
    ("file", "text", "is_wrong"),
    [
        ("low.py", "", False),
        ("low.py", "from cortex import high\n", True),
        ("low.py", "def late():\n    import cortex.high\n", True),
        ("low.pyi", "from cortex.high import High\n", True),
        ("low.pyx", "from cortex.high cimport High\n", True),
        ("low.pxd", "from cortex cimport (\n    high,\n)\n", True),
        ("high.py", "import cortex.low\n", True),  # an import of the layer below is gone
    ],
)
def test_a_planted_fault_is_found(tmp_path: pathlib.Path, file: str, text: str, is_wrong: bool) -> None:
    folder = tmp_path / "cortex"
    folder.mkdir()
    (folder / "low.py").touch()
    (folder / "middle.py").write_text("import cortex.low\n")
    (folder / "high.py").write_text("from cortex import middle\n")
    (folder / file).write_text(text)
    modules = modules_of(tmp_path)
    if "high" in text:
        with pytest.raises(graphlib.CycleError):
            problems(modules, PLANTED)
    else:
        assert bool(problems(modules, PLANTED)) == is_wrong


def test_a_module_without_a_unit_is_found() -> None:
    with pytest.raises(AssertionError, match="belong to no unit"):
        problems({"cortex.new": set()}, ("cortex",))


def table() -> str:
    """Return the layers of the source in the form above."""
    levels = levels_of(units_of(MODULES, LAYERS))
    layers = [" ".join(sorted(u for u in levels if levels[u] == n)) for n in range(max(levels.values()) + 1)]
    return "\n\n".join(textwrap.fill(layer, 118) for layer in layers)


if __name__ == "__main__":
    sys.stdout.write(table() + "\n")
