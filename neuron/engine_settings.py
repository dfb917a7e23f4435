"""Settings of the engine: the daemon reads them once and hands them to each worker process that it starts.

No other module of the engine, the models or the kernels reads the environment. Imports no torch.
"""

import os
import pathlib
from typing import Annotated, Final

import msgspec

from cortex.logs import LogFormat

SERVICE_CACHE = "/var/cache/neuron"


def cache_folder(service_name: str, user_name: str) -> pathlib.Path:
    """Return the default folder of a cache.

    ``$CACHE_DIRECTORY/service_name`` where systemd sets it, else ``user_name`` in the user's cache, else
    ``service_name`` in the service's where there is no home.
    """
    if base := os.environ.get("CACHE_DIRECTORY"):
        return pathlib.Path(base) / service_name
    if base := os.environ.get("XDG_CACHE_HOME"):
        return pathlib.Path(base) / user_name
    if home := os.environ.get("HOME"):
        return pathlib.Path(home) / ".cache" / user_name
    return pathlib.Path(SERVICE_CACHE) / service_name


class EngineSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``[engine]``. The defaults are the fastest; each switch is for finding the cause of a fault."""

    speculation: bool = True
    """Whether draft tokens are proposed and verified."""
    overlap_steps: bool = True
    """Whether a GPU's step is launched before the outcome of the previous one is known."""
    cuda_graphs: bool = True
    """Whether decode steps on a GPU run as captured CUDA graphs."""
    device_sampling: bool = True
    """Whether a kernel samples on a GPU, and not eager torch."""
    triton_kernels: bool = True
    """Whether a GPU runs Triton kernels, and not eager torch."""
    kernel_cache: str = msgspec.field(default_factory=lambda: str(cache_folder("kernels", "helexa/kernels")))
    """Folder for compiled GPU kernels."""
    cpu_kernels: bool = True
    """Whether a CPU runs the native kernels, and not eager torch."""
    cpu_level: str = ""
    """Instruction set of the native kernels, such as ``avx2``. Empty: the best of the processor."""


DEFAULTS: Final = EngineSettings()
"""Settings without a configuration."""


class WorkerSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Settings of a worker process, given on its command line as JSON."""

    engine: EngineSettings = DEFAULTS
    step_limit_s: Annotated[float, msgspec.Meta(ge=0)] = 0.0
    """Time after which a step has hung and the process ends. 0: no limit."""
    max_waiting: int = 256
    """Number of sequences of a model that may wait for a slot."""
    log_format: LogFormat = LogFormat.TEXT
