"""Keys: the file, authentication, and the secrecy of keys."""

import hashlib
import logging
import pathlib

import pytest
from fake_node import FakeNode
from gateway_rig import rig
from key_rig import KEY, ring

from cortex._fast.peek import peek
from cortex.access import keys
from cortex.access.authenticator import need_of
from cortex.access.keys import KeyRing, Principal
from cortex.settings import ConfigError
from cortex.wire.errors import UnauthorizedError

HASH = hashlib.sha256(KEY.encode()).hexdigest()
ROW = f'[[keys]]\nname = "alice"\nsha256 = "{HASH}"\n'


@pytest.mark.parametrize(
    ("text", "key", "reason"),
    [
        ("[[keys", "", "is not TOML"),
        (ROW, "keys[0].models", "may use no model"),
        (ROW + 'model = ["*"]', "keys[0].model", "unknown key"),
        (ROW + 'models = ["*"]\n' + ROW + 'models = ["*"]', "keys[1].name", "'alice' is taken"),
        (ROW + 'models = ["*"]\n' + ROW.replace("alice", "bob") + 'models = ["*"]', "keys[1].sha256", "also 'alice'"),
        (ROW.replace("alice", "anonymous") + 'models = ["*"]', "keys[0].name", "is taken"),
        (ROW.replace(HASH, KEY), "keys[0].sha256", "regex"),
        (ROW + 'models = ["*"]\nmax_concurrent = -1', "keys[0].max_concurrent", ">= 0"),
    ],
)
def test_a_wrong_file_is_named_with_its_key(tmp_path: pathlib.Path, text: str, key: str, reason: str) -> None:
    path = tmp_path / "keys.toml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        keys.load(path)
    assert (caught.value.source, caught.value.key.replace("[...]", "[0]")) == (str(path), key)
    assert reason in caught.value.reason


def test_a_key_identifies_its_principal() -> None:
    alice = Principal("alice")
    found = ring((KEY, alice))
    assert found.identify(KEY.encode()) is alice
    for wrong in (None, b"", b"sk-cortex-abd", KEY.encode() + b"x"):
        with pytest.raises(UnauthorizedError) as caught:
            found.identify(wrong)
        assert "abd" not in str(caught.value)
    assert KeyRing().identify(b"any") is keys.EVERYBODY, "without keys any will do"
    assert ring((KEY, alice), anonymous=Principal("anonymous")).identify(None).name == "anonymous"


def test_models_of_a_key() -> None:
    principal = Principal("p", ("qwen*", "m"))
    assert [principal.may_use(model) for model in ("qwen3", "m", "m2", "")] == [True, True, False, False]


def test_a_new_key_matches_its_hash() -> None:
    key, sha256 = keys.new_key()
    assert key.startswith("sk-cortex-")
    assert hashlib.sha256(key.encode()).hexdigest() == sha256
    assert keys.new_key()[0] != key


@pytest.mark.parametrize(
    ("body", "tokens"),
    [
        (b'{"max_tokens": 7}', 7),
        (b'{"max_completion_tokens":8}', 8),
        (b'{"max_output_tokens" : 9}', 9),
        (b'{"content": "\\"max_tokens\\": 5"}', 100),
        (b"{}", 100),
        (b'{"metadata": {"max_tokens": 1}, "messages": []}', 100),
        (b'{"metadata": {"max_tokens": 1}, "max_tokens": 500}', 500),
        (b'{"max_tokens": 1, "messages": [], "max_tokens": 500}', 500),
        (b'{"max_tokens": 1, "max_completion_tokens": 500}', 500),
        (b'{"max_tokens": null, "n": null}', 100),
        (b'{"max_tokens": 7, "n": 5}', 35),
        (b'{"n": 3}', 300),
        (b'{"max_tokens": 7, "n": 2, "best_of": 4}', 28),
        (b'{"max_tokens": 7, "prompt": ["a", "b", "c"]}', 21),
        (b'{"max_tokens": 7, "prompt": [[1, 2], [3]], "n": 2}', 28),
        (b'{"max_tokens": 7, "prompt": [1, 2, 3]}', 7),
        (b'{"max_tokens": "7", "n": {"n": 9}}', 100),
        (b'{"max_tokens": 7.0}', 7),
        (b'{"tools": [{"parameters": {"properties": {"n": 9, "max_tokens": 9}}}], "max_tokens": 7}', 7),
    ],
)
def test_the_need_of_a_request(body: bytes, tokens: int) -> None:
    bounds = peek(body).bounds
    need = need_of(len(body), bounds, 100)
    assert (need.output_tokens, need.prompt_tokens) == (tokens, len(body) // 4)
    assert need_of(len(body), bounds, 100, generates=False).output_tokens == 0


async def test_requests_without_a_key_are_refused_and_no_log_has_a_key(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    neuron = FakeNode().ready("m", "other")
    async with rig(neuron, keys=ring((KEY, Principal("alice", ("m",), priority=3)))) as gateway:
        for method, path in (
            ("POST", "/v1/chat/completions"),
            ("POST", "/v1/messages"),
            ("GET", "/v1/models"),
            ("GET", "/v1/models/m"),
            ("GET", "/v1/responses/resp_1"),
            ("GET", "/v1/nothing"),
        ):
            call = await gateway.call(method, path, b"{}" if method == "POST" else b"").end()
            assert call.status == 401, path
        call = await gateway.call("POST", "/v1/chat/completions", b"{}", {"authorization": "Bearer nonsense"}).end()
        assert (call.status, call.json()["error"]["code"]) == (401, "invalid_api_key")
        assert not neuron.requests
        for given in ({"authorization": f"Bearer {KEY}"}, {"x-api-key": KEY}):
            body = {"model": "m", "messages": []}
            assert (await gateway.call("POST", "/v1/chat/completions", body, given).end()).status == 200
            refused = await gateway.call("POST", "/v1/chat/completions", body | {"model": "other"}, given).end()
            assert (refused.status, refused.json()["error"]["code"]) == (403, "permission_denied")
            listed = (await gateway.call("GET", "/v1/models", b"", given).end()).json()["data"]
            assert [model["id"] for model in listed] == ["m"]
            assert (await gateway.call("GET", "/v1/models/other", b"", given).end()).status == 404
        assert (await gateway.call("GET", "/health").end()).status == 200
    assert {received.headers["x-cortex-principal"] for received in neuron.requests} == {"alice"}
    assert {received.headers.get("x-cortex-priority") for received in neuron.requests} == {"3"}
    assert not any(KEY in value for received in neuron.requests for value in received.headers.values())
    text = caplog.text + "".join(str(record.__dict__) for record in caplog.records)
    assert "alice" in text
    assert KEY not in text
    assert "nonsense" not in text
