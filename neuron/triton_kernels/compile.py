"""Compile variants ahead of time, and keep them on disk.

No GPU is needed: the compiler's wheel carries ptxas. A compiled kernel is a cubin and its launch parameters
(:class:`Metadata`). The cache is keyed by kernel sources, compiler version, compute capability and variant, so that an
entry of any machine is right or not found: an installed package may carry entries (``make kernels wheel``), which are
used where the user's own folder has none. Each entry carries a digest of its cubin: a damaged entry is compiled again,
with a warning.
"""

import concurrent.futures
import dataclasses
import functools
import hashlib
import json
import logging
import multiprocessing
import os
import pathlib
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterable
from typing import Any, Final

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from neuron.triton_kernels.launch import Variant

logger = logging.getLogger(__name__)

_TOOLS: Final = pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_SOURCES: Final = pathlib.Path(__file__).parent
PREBUILT: Final = _SOURCES / "prebuilt"
"""Folder of the entries in the package."""


class KernelCompileError(RuntimeError):
    """The compiler refused a kernel."""

    code = "kernel_compile_failed"


@dataclasses.dataclass(frozen=True, slots=True)
class Metadata:
    """Metadata of a cubin for launchers and for the check of machine code."""

    name: str
    """Symbol of the kernel in the cubin."""
    capability: int
    num_warps: int
    registers: int
    stack_bytes: int
    """Stack of a thread; over 0 means spills."""
    shared_bytes: int
    """Dynamic shared memory of a block."""
    scratch_bytes: int
    """Global memory of a program for tensor descriptors made on the device."""
    dependent_launch: bool
    parameters: tuple[str, ...]
    """Types of the arguments in order; two scratch pointers follow them."""
    cuda_version: str
    """CUDA version of the assembler: a driver of an older major version cannot load the cubin."""
    cubin_sha256: str


@dataclasses.dataclass(frozen=True, slots=True)
class Compiled:
    """Kernel compiled for one compute capability."""

    metadata: Metadata
    cubin: bytes
    triton_metadata: dict[str, Any]
    """Metadata for Triton's own launcher."""


@functools.cache
def source_digest() -> str:
    """Return a digest of all files of the package: kernels call each other, and a spurious miss costs a second."""
    digest = hashlib.sha256()
    for path in sorted(_SOURCES.glob("*.py")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def cache_key(variant: Variant, capability: int) -> str:
    """Return the name of an entry: 32 hexadecimal digits of a digest over all that determines its bytes."""
    parts = (source_digest(), triton.__version__, str(capability), repr(variant))
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


def compile_variant(variant: Variant, capability: int) -> Compiled:
    """Compile one variant. Raises :class:`KernelCompileError`."""
    kernel = variant.function()
    if not isinstance(kernel, triton.JITFunction):
        raise KernelCompileError("TRITON_INTERPRET is set: kernels are interpreted in this process, not compiled")
    index = {name: i for i, name in enumerate(kernel.arg_names)}
    signature = {parameter.name: parameter.kind for parameter in variant.parameters}
    source = ASTSource(
        fn=kernel,
        signature={name: signature.get(name, "constexpr") for name in kernel.arg_names},
        constexprs={(index[name],): value for name, value in variant.constants},
        attrs={(index[p.name],): [["tt.divisibility", 16]] for p in variant.parameters if p.aligned},
    )
    try:
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=variant.options())
        cubin: bytes = compiled.asm["cubin"]
        registers, stack_bytes = resource_usage(cubin)
    except Exception as error:
        raise KernelCompileError(f"{variant.kernel} for sm_{capability}: {error}") from error
    found = compiled.metadata
    return Compiled(
        Metadata(
            name=found.name,
            capability=capability,
            num_warps=found.num_warps,
            registers=registers,
            stack_bytes=stack_bytes,
            shared_bytes=found.shared,
            scratch_bytes=found.global_scratch_size,
            dependent_launch=variant.dependent_launch,
            parameters=tuple(parameter.kind for parameter in variant.parameters),
            cuda_version=get_ptxas(capability).version,
            cubin_sha256=hashlib.sha256(cubin).hexdigest(),
        ),
        cubin,
        json.loads(json.dumps(found._asdict(), default=vars)),
    )


def _on_file(tool: str, cubin: bytes, *options: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        run = subprocess.run([_TOOLS / tool, *options, file.name], capture_output=True, text=True, check=True)
    return run.stdout


def resource_usage(cubin: bytes) -> tuple[int, int]:
    """Return registers and bytes of stack of a thread; stack means spills or arrays in memory."""
    found = re.search(r"REG:(\d+) STACK:(\d+)", _on_file("cuobjdump", cubin, "--dump-resource-usage"))
    if found is None:
        raise KernelCompileError("cuobjdump names no resources")
    return int(found[1]), int(found[2])


def machine_code(cubin: bytes) -> list[str]:
    """Return the machine instructions in order, with their modifiers: ``LDG.E.128``."""
    listing = _on_file("nvdisasm", cubin)
    return re.findall(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]+)", listing, re.M)


class KernelCache:
    """Compiled kernels in a folder: ``KEY.cubin`` and ``KEY.json`` each. Processes may share a folder.

    Entries that it lacks are read from the folder ``prebuilt``.
    """

    def __init__(self, folder: pathlib.Path, prebuilt: pathlib.Path | None = None) -> None:
        self.folder = folder
        self.prebuilt = prebuilt

    def load(self, variant: Variant, capability: int) -> Compiled | None:
        """Return an entry, or None if there is none or it is damaged, which is logged."""
        for folder in (self.folder, self.prebuilt):
            found = None if folder is None else _load(folder, variant, capability)
            if found is not None:
                return found
        return None

    def store(self, variant: Variant, compiled: Compiled) -> None:
        """Write an entry atomically: a reader finds the old entry, the new one or none; metadata come last."""
        key = cache_key(variant, compiled.metadata.capability)
        self.folder.mkdir(parents=True, exist_ok=True)
        fields = {**dataclasses.asdict(compiled.metadata), "triton": compiled.triton_metadata}
        text = json.dumps(fields, indent=1)
        for name, content in ((f"{key}.cubin", compiled.cubin), (f"{key}.json", text.encode())):
            descriptor, temporary = tempfile.mkstemp(dir=self.folder)
            try:
                with os.fdopen(descriptor, "wb") as file:
                    file.write(content)
                pathlib.Path(temporary).replace(self.folder / name)
            except BaseException:
                pathlib.Path(temporary).unlink(missing_ok=True)
                raise

    def get(self, variant: Variant, capability: int) -> Compiled:
        """Return an entry, compiled and stored first if need be. A folder that cannot be written is not an error."""
        found = self.load(variant, capability)
        if found is None:
            found = compile_variant(variant, capability)
            self.keep(variant, found)
        return found

    def keep(self, variant: Variant, compiled: Compiled) -> None:
        """Write an entry; log a warning where the folder cannot be written."""
        try:
            self.store(variant, compiled)
        except OSError as error:
            logger.warning("kernel cache: cannot write to %s: %s", self.folder, error)


def _load(folder: pathlib.Path, variant: Variant, capability: int) -> Compiled | None:
    key = cache_key(variant, capability)
    try:
        cubin = (folder / f"{key}.cubin").read_bytes()
        text = (folder / f"{key}.json").read_text()
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        logger.warning("kernel cache: %s of %s cannot be read: %s", key, variant.kernel, error)
        return None
    try:
        fields = json.loads(text)
        launcher = fields.pop("triton")
        metadata = Metadata(**{**fields, "parameters": tuple(fields["parameters"])})
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        logger.warning("kernel cache: %s of %s is corrupt (%r); compiling again", key, variant.kernel, error)
        return None
    if hashlib.sha256(cubin).hexdigest() != metadata.cubin_sha256 or metadata.capability != capability:
        logger.warning("kernel cache: %s of %s does not match its digest; compiling again", key, variant.kernel)
        return None
    return Compiled(metadata, cubin, launcher)


class Compilation:
    """Compilation of variants that ``cache`` lacks, by other processes, which begin at once.

    A variant takes a second or two, most of it under the GIL; this process may go on serving meanwhile.
    ``initializer`` is called in each of up to ``num_processes``. The caller closes it.
    """

    def __init__(
        self,
        wanted: Iterable[Variant],
        capability: int,
        cache: KernelCache,
        num_processes: int,
        initializer: Callable[[], None] | None = None,
    ) -> None:
        self._cache = cache
        self._found = {variant: cache.load(variant, capability) for variant in wanted}
        missing = [variant for variant, found in self._found.items() if found is None]
        self._pool: concurrent.futures.ProcessPoolExecutor | None = None
        self._under_way: dict[concurrent.futures.Future[Compiled], Variant] = {}
        if missing:
            # A process that has started Triton's threads, or CUDA, is not forked.
            context = multiprocessing.get_context("spawn")
            num_processes = min(num_processes, len(missing))
            self._pool = concurrent.futures.ProcessPoolExecutor(num_processes, context, initializer)
            self._under_way = {self._pool.submit(compile_variant, each, capability): each for each in missing}

    def poll(self, timeout_s: float) -> bool:
        """Store the variants compiled by now, or within ``timeout_s``; return whether these are all.

        Raises :class:`KernelCompileError`.
        """
        done, _ = concurrent.futures.wait(self._under_way, timeout_s, return_when=concurrent.futures.FIRST_COMPLETED)
        for future in done:
            variant = self._under_way.pop(future)
            try:
                compiled = future.result()
            except concurrent.futures.process.BrokenProcessPool as error:
                raise KernelCompileError(f"{variant.kernel}: the compiler's process has died: {error}") from error
            self._found[variant] = compiled
            self._cache.keep(variant, compiled)
        return not self._under_way

    def results(self) -> dict[Variant, Compiled]:
        """Return all variants' kernels; :meth:`poll` has returned true."""
        while not self.poll(60.0):
            pass
        return {variant: compiled for variant, compiled in self._found.items() if compiled is not None}

    def close(self) -> None:
        """Start no further variant."""
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
