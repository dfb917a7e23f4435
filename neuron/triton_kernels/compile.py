"""Compile variants ahead of time, and keep them on disk.

No GPU is needed: the compiler's wheel carries ptxas. The cache is keyed by kernel sources, compiler version, compute
capability and variant, so that an entry of any machine is right or not found: an installed package may carry entries
(``make kernels wheel``), which are used where the user's own folder has none. A damaged entry is compiled again, with a
warning.
"""

import concurrent.futures
import functools
import hashlib
import json
import logging
import multiprocessing
import os
import pathlib
import tempfile
from collections.abc import Callable, Iterable
from typing import Any, Final

import msgspec
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from neuron.triton_kernels.launch import Variant

logger = logging.getLogger(__name__)

_SOURCES: Final = pathlib.Path(__file__).parent
PREBUILT: Final = _SOURCES / "prebuilt"
"""Folder of the entries in the package."""
DIGEST_BYTES: Final = 32
"""Length of the digest that an entry begins with, of its key and of the rest."""


class KernelCompileError(RuntimeError):
    """The compiler refused a kernel."""

    code = "kernel_compile_failed"


class Compiled(msgspec.Struct, frozen=True):
    """Kernel compiled for one compute capability."""

    capability: int
    cuda_version: str
    """CUDA version of the assembler: a driver of an older major version cannot load the cubin."""
    metadata: dict[str, Any]
    """Metadata for Triton's own launcher."""
    cubin: bytes


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
    except Exception as error:
        raise KernelCompileError(f"{variant.kernel} for sm_{capability}: {error}") from error
    metadata = json.loads(json.dumps(compiled.metadata._asdict(), default=vars))
    return Compiled(capability, get_ptxas(capability).version, metadata, compiled.asm["cubin"])


class KernelCache:
    """Compiled kernels in a folder: ``KEY.kernel`` each. Processes may share a folder.

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

    def keep(self, variant: Variant, compiled: Compiled) -> None:
        """Write an entry atomically: a reader finds the old entry, the new one or none.

        A folder that cannot be written is no error: it is logged.
        """
        key = cache_key(variant, compiled.capability)
        entry = msgspec.msgpack.encode(compiled)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            descriptor, temporary = tempfile.mkstemp(dir=self.folder)
            try:
                with os.fdopen(descriptor, "wb") as file:
                    file.write(_digest(key, entry) + entry)
                pathlib.Path(temporary).replace(self.folder / f"{key}.kernel")
            except BaseException:
                pathlib.Path(temporary).unlink(missing_ok=True)
                raise
        except OSError as error:
            logger.warning("kernel cache: cannot write to %s: %s", self.folder, error)


def _digest(key: str, entry: bytes) -> bytes:
    return hashlib.sha256(key.encode() + entry).digest()


def _load(folder: pathlib.Path, variant: Variant, capability: int) -> Compiled | None:
    key = cache_key(variant, capability)
    try:
        data = (folder / f"{key}.kernel").read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        logger.warning("kernel cache: %s of %s cannot be read: %s", key, variant.kernel, error)
        return None
    digest, entry = data[:DIGEST_BYTES], data[DIGEST_BYTES:]
    if digest != _digest(key, entry):
        logger.warning("kernel cache: %s of %s does not match its digest; compiling again", key, variant.kernel)
        return None
    return msgspec.msgpack.decode(entry, type=Compiled)


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
