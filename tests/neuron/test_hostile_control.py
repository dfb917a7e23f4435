"""The control plane of a neuron against bodies that mean harm: never a 500, and nothing that grows."""

import json
import os
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any

import daemons
import httpx
import pytest
from daemons import Daemon
from model_files import CONFIG, HOSTILE, gguf_file

from cortex.wire.node import LoadRequest

PATHS = ("/models/load", "/models/fit", "/models/pull", "/models/unload", "/models/forget", "/models/pin", "/drain")
NAMES = ("", "..", "../m", "a/../b", "a//b", "a/", "/a", "a b", "a\n", "a\0b", "\u202ea", "x" * 129, "x" * 900_000)
SOURCES = ("", "\0", "a\nb", "x" * 5000, "hf:../x", "hf:a/b:../../etc/passwd", "pypi:..==1", "~nobody-here/x",
           "/dev/zero", "/dev/stdin", "/proc/self/mem", "/", "/etc", "/etc/shadow", "/no/such")  # fmt: skip
FIELDS: dict[str, Any] = dict.fromkeys(LoadRequest.__struct_fields__)


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """The real daemon, with a model that plays scenarios."""
    with daemons.scripted_neuron(tmp_path_factory.mktemp("neuron")) as found:
        yield found


@pytest.fixture(scope="module", autouse=True)
def client() -> Iterator[httpx.Client]:
    """Share a client among thousands of small requests."""
    with httpx.Client(timeout=20, headers={"content-type": "application/json"}) as found:
        Received.client = found
        yield found


class Received:
    client: httpx.Client


def ask(node: Daemon, path: str, body: bytes) -> httpx.Response:
    return Received.client.post(node.url + path, content=body)


def check(reply: httpx.Response) -> None:
    assert reply.status_code < 500 or reply.status_code == 503, reply.text[:500]
    if reply.status_code >= 400:
        error = reply.json()["error"]
        assert error["code"], error
        assert len(reply.content) < 4000


def test_any_field_may_hold_anything(node: Daemon) -> None:
    base = {"id": "other", "source": "/no/such/model"}
    bodies = [b"", b"null", b"[]", b"{", b"\xff", b'{"id":"m","id":"n"}', b"[" * 100_000, b'{"x":' * 50_000]
    for name in FIELDS:
        fields = "".join(f',"{key}":{json.dumps(value)}' for key, value in base.items() if key != name)
        bodies += [f'{{"{name}":{value}{fields}}}'.encode() for value in HOSTILE if len(value) < 1 << 18]
    for body in bodies:
        check(ask(node, "/models/load", body))
    for path, names in {
        "/models/unload": ("id", "drain_timeout_s", "generation"),
        "/models/forget": ("id",),
        "/models/pin": ("id", "pinned", "priority", "idle_ttl_s"),
        "/drain": ("draining", "x"),
    }.items():
        for name in names:
            for value in (value for value in HOSTILE if len(value) < 1 << 18):
                given = "" if name == "id" or path == "/drain" else ',"id":"other"'
                check(ask(node, path, f'{{"{name}":{value}{given}}}'.encode()))
    assert ask(node, "/drain", b'{"draining":false}').status_code == 200
    assert len(json.dumps(node.get("/models"))) < 100_000
    assert [model["state"] for model in node.get("/models")["models"] if model["id"] == "m"] == ["ready"]


@pytest.mark.parametrize("name", NAMES, ids=lambda name: ascii(name[:12]))
def test_a_name_is_a_name(node: Daemon, name: str) -> None:
    before = node.get("/models")["models"]
    for path in PATHS[:3]:
        reply = ask(node, path, json.dumps({"id": name, **({"source": "x"} if path == PATHS[0] else {})}).encode())
        assert reply.status_code == 400, reply.text
        assert reply.json()["error"]["param"] == "id"
        assert len(reply.content) < 4000
    assert node.get("/models")["models"] == before


def test_half_characters_are_not_json(node: Daemon) -> None:
    for path in PATHS[:3]:
        check(ask(node, path, b'{"id":"a\\ud800","source":"x"}'))


def test_thousands_of_names_leave_a_short_list(tmp_path: pathlib.Path) -> None:
    """A whole daemon, as it ships but for its harness: each load fails, and none is kept beyond the bound."""
    with daemons.scripted_neuron(tmp_path) as node:
        for number in range(400):
            reply = load(node, f"{number:0>120}", "/no/such")
            assert reply.status_code == 422, reply.text
            assert reply.json()["error"]["code"] == "source_not_found"
        models = Received.client.get(node.url + "/models")
        assert len(models.json()["models"]) == 256
        assert len(models.content) < 256 * 1000
        assert node.get("/health")


@pytest.fixture(scope="module")
def real_node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """The real daemon with the harness that ships, and no model."""
    folder, port = tmp_path_factory.mktemp("real_neuron"), daemons.free_port()
    config = folder / "neuron.toml"
    config.write_text(f'[daemon]\nlisten = "127.0.0.1:{port}"\ndevices = "cpu"\nmax_models = 8\n')
    with daemons.daemon("neuron", "--config", str(config), port=port, log=folder / "neuron.log") as found:
        daemons.until(lambda: found.get("/health")["workers"][0]["state"] == "ready", 60, "the worker is ready")
        yield found


def load(node: Daemon, name: str, source: object, **more: object) -> httpx.Response:
    reply = ask(node, "/models/load", json.dumps({"id": name, "source": str(source), **more}).encode())
    check(reply)
    return reply


def test_sources_of_every_kind(real_node: Daemon, tmp_path: pathlib.Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    deep = tmp_path
    for _ in range(50):
        deep = deep / ("d" * 40)
        deep.mkdir()
    (tmp_path / "loop").symlink_to(tmp_path)
    for source in (*SOURCES, tmp_path / "pipe", deep, tmp_path / "loop", tmp_path):
        for more in ({}, {"sha256": "0" * 64}, {"draft": str(source)}, {"devices": ["cpu:0", "cpu:0"]}):
            assert load(real_node, "m", source, **more).status_code in {400, 422, 503}
    health = real_node.get("/health")
    assert health["workers"][0]["restarts"] == 0


def test_files_that_mean_harm_are_refused_and_the_next_load_is_served(
    real_node: Daemon, talking_llama: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    broken = {
        "config.json": b"[" * 1_000_000,
        "tokenizer.json": b"{}",
        "chat_template.jinja": b"{% for %}",
        "generation_config.json": b'{"top_k":1e300}',
        "model.safetensors": b"\xff" * 100,
        "model.safetensors.index.json": b'{"weight_map":{"x":"../../etc/passwd"}}',
    }
    for name, data in broken.items():
        folder = shutil.copytree(talking_llama, tmp_path / name)
        (folder / name).write_bytes(data)
        reply = load(real_node, "m", folder)
        assert reply.status_code == 422, (name, reply.text)
        (folder / name).unlink()
        os.mkfifo(folder / name)
        assert load(real_node, "m", folder).status_code == 422, name
    for key, value in {"num_hidden_layers": 1000, "num_attention_heads": 1 << 19, "vocab_size": 1 << 24}.items():
        folder = shutil.copytree(talking_llama, tmp_path / key)
        values = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**values, key: value}))
        assert load(real_node, "m", folder).status_code == 422, key
    (tmp_path / "cut.gguf").write_bytes(gguf_file()[:-40])
    assert load(real_node, "m", tmp_path / "cut.gguf").status_code == 422
    (tmp_path / "no-text.gguf").write_bytes(gguf_file())
    assert load(real_node, "m", tmp_path / "no-text.gguf").status_code == 422
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_text(json.dumps(CONFIG))
    assert load(real_node, "m", tmp_path / "bare").status_code == 422
    for more in ({"max_sequences": 4096, "context_tokens": 2048}, {"kv_cache_bytes": 1 << 62}, {"dtype": "x"},
                 {"tensor_parallel": 1024}, {"devices": ["cpu:9"]}, {"draft": "/etc"}):  # fmt: skip
        assert load(real_node, "m", talking_llama, **more).status_code in {200, 400, 422, 503}
        ask(real_node, "/models/unload", b'{"id":"m"}')
    assert load(real_node, "m", talking_llama).json()["state"] == "ready"
    assert real_node.get("/health")["workers"][0]["restarts"] == 0
    assert len(real_node.get("/models")["models"]) == 1
