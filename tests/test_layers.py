"""Every import points down: the floors of ARCHITECTURE.md, checked against the source."""

import ast
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]

# A room is named by its longest prefix here. Each may import rooms on a lower floor, itself, and what ALSO lists.
FLOORS = {
    "cortex.wire": -2,
    "cortex.config": 0,
    "cortex.errors": 0,
    "cortex.logs": -1,
    "cortex.systemd": -1,
    "cortex.tracing": -1,
    "cortex.build_identity": -1,
    "cortex.metrics": 0,
    "cortex.body_encoding": -1,
    "cortex.guard": -1,
    "cortex.http_io": 0,
    "cortex.settings": -2,
    "cortex._fast": 1,
    "cortex._fast.buffer": -3,
    "cortex._fast.clock": -3,
    "cortex._fast.log_fields": -2,
    "cortex._fast.record": -2,
    "cortex._fast.scheduling": -2,
    "cortex._fast.response_writer": -2,
    "cortex._fast.in_flight": -2,
    "cortex._fast.watches": -2,
    "cortex._fast.fast_path": 3,
    "cortex.dialects": 1,
    "cortex.request_log": 2,
    "cortex.report": 0,
    # how an error is written down, which the projectors need too
    "cortex.dialects.openai_errors": 0,
    "cortex.dialects.anthropic_errors": 0,
    "cortex.dialects.openai_sealed": 0,
    # what chat chunks say, which the reader of their stream needs
    "cortex.dialects.openai_chunks": 0,
    "cortex.upstream": 2,
    "cortex.fleet": 3,
    "cortex.access": 3,
    "cortex.store": 3,
    "cortex.ending": 0,
    "cortex.memory": 0,
    "cortex.supervise": -1,
    "cortex.loop_lag": -1,
    "cortex.request_body": -1,
    "cortex.stream_forwarding": 4,
    "cortex.inference": 5,
    "cortex.fast_path": 7,
    "cortex.endpoints": 4,
    "cortex.stored_endpoints": 4,
    "cortex.responses_socket": 4,
    "cortex.background": 4,
    "cortex.api_description": 5,
    "cortex.conversation_endpoints": 4,
    "cortex.admin": 4,
    "cortex.dashboard": 4,
    "cortex.gateway": 6,
    "cortex.preflight": 5,
    "cortex.reload": 5,
    "cortex.worker": 7,
    "cortex.asgi": 8,
    "cortex.asgi_io": 5,
    "cortex.send_window": 1,
    "cortex.rsgi_io": 5,
    "cortex.console": -1,
    "cortex.extras": -2,
    "cortex.demo": 6,
    "cortex.operate": 6,
    "cortex.cli": 9,
    "cortex": 10,
    "neuron.config": 0,
    "neuron.errors": 0,
    "neuron.metrics": 0,
    "neuron.device.jobs": 0,
    "neuron.device.driver": 0,
    "neuron.device.channel": 0,
    "neuron.device": 2,
    "neuron.cpu_kernels": 0,
    "neuron.triton_kernels": 0,
    "neuron.models": 1,
    "neuron.engine": 3,
    "neuron.text": 3,
    # what a worker reads too, for its grammars
    "neuron.text.matcher": 2,
    "neuron.text.pieces": 1,
    "neuron.text.gguf_rules": 1,
    "neuron.text.plain": 2,
    "neuron.text.token_bytes": 2,
    "neuron.text.tokenizer": 2,
    "neuron.load": 3,
    "neuron.harness": 1,
    "neuron.batch": 2,
    "neuron.torch_harness": 4,
    "neuron.service": 5,
    "neuron.api": 6,
    "neuron.api_description": 5,
    "neuron.cli": 7,
    "neuron": 9,
}
ALSO = {
    # grammars over a vocabulary, of what its tokens are
    ("neuron.text.matcher", "neuron.text.token_bytes"),
    ("neuron.text.matcher", "neuron.text.plain"),
    ("cortex.gateway", "cortex.api_description"),
    # responses made in the background, which are told of by their id
    ("cortex.stored_endpoints", "cortex.background"),
    # the project's version, read where a command or a page prints it
    ("cortex", "cortex.wire"),
    # a dialect's SSE events are made by its compiled projector, which is of the same floor
    ("cortex.dialects", "cortex._fast"),
}
NEURON_MAY_USE_OF_CORTEX = (
    "cortex.extras",
    "cortex.wire",
    "cortex.settings",
    "cortex.http_io",
    "cortex.request_body",
    "cortex.dialects",
    "cortex._fast",
    # what both daemons tell those who run them
    "cortex.logs",
    "cortex.tracing",
    "cortex.guard",
    "cortex.supervise",
    "cortex.loop_lag",
    "cortex.systemd",
    "cortex.build_identity",
)
CIMPORT = re.compile(r"^\s*(?:from\s+([\w.]+)\s+c?import|c?import\s+([\w.]+))", re.MULTILINE)


def room_of(module: str) -> str | None:
    return max((r for r in FLOORS if module == r or module.startswith(r + ".")), key=len, default=None)


def imports(path: pathlib.Path) -> set[str]:
    """Return the modules a source file imports; ``from package import module`` counts as ``package.module``."""
    text = path.read_text()
    if path.suffix != ".py":
        return {a or b for a, b in CIMPORT.findall(text)}
    found: set[str] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative import"
            assert node.module is not None
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def sources() -> list[pathlib.Path]:
    return [
        path
        for package in ("cortex", "neuron")
        for path in sorted((ROOT / package).rglob("*"))
        if path.suffix in {".py", ".pyx", ".pxd"}
    ]


def may_import(here: str, there: str) -> bool:
    if here.startswith("neuron") and there.startswith("cortex"):
        return there.startswith(NEURON_MAY_USE_OF_CORTEX)
    if here.startswith("cortex") and there.startswith("neuron"):
        return False
    return here == there or FLOORS[there] < FLOORS[here] or (here, there) in ALSO


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_down(path: pathlib.Path) -> None:
    module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    here = room_of(module)
    assert here is not None
    assert here not in {"cortex", "neuron"} or path.name == "__init__.py", f"{module} has no floor in {__file__}"
    for target in imports(path):
        there = room_of(target)
        if there in {"cortex", "neuron"} and target.endswith("__version__"):
            there = "cortex.wire"
        assert there is None or may_import(here, there), f"{module} imports {target}"


@pytest.mark.parametrize("entry", ["cortex.asgi", "neuron.cli"])
def test_no_tensor_library_before_it_is_needed(entry: str) -> None:
    code = f"import {entry}, sys; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert not {"torch", "triton", "transformers"} & set(loaded.split())


def test_the_check_sees_an_upward_import() -> None:
    assert may_import("cortex.fleet", "cortex.upstream")
    assert not may_import("cortex.upstream", "cortex.fleet")
    assert not may_import("neuron.api", "cortex.fleet")
    assert not may_import("cortex.wire", "cortex._fast")
