"""The daemon's text processes: what a job does to one is that job's error, and no other's."""

import asyncio
import os
import pathlib
import shutil
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
import psutil
import pytest

from cortex.wire.errors import ApiError, ErrorInfo
from cortex.wire.request import FormatKind, InferenceRequest, Message, OutputFormat, Role
from neuron.text.jobs import Limits
from neuron.text.pool import COSTLY_NICENESS, QueueName, TextModel, TextPool

EOS = (2,)
CONTEXT = 2048
CHAT = InferenceRequest("m", messages=(Message(Role.USER, "hello"),))
TEMPLATE = "{% for message in messages %}{{ message.content }}\n{% endfor %}"
BIG = 9223372036854775808


def with_template(folder: pathlib.Path, template: str, into: pathlib.Path) -> str:
    """Return a copy of a model's text files with another template."""
    into.mkdir()
    shutil.copy(folder / "tokenizer.json", into)
    (into / "chat_template.jinja").write_text(template)
    return str(into)


def in_pool(story: Callable[[TextPool], Awaitable[Any]]) -> Any:
    async def whole() -> Any:
        pool = TextPool()
        try:
            return await story(pool)
        finally:
            await pool.stop()

    before = set(psutil.Process().children())
    try:
        return asyncio.run(whole())
    finally:
        assert set(psutil.Process().children()) <= before, "a pool that has stopped leaves no process"


def with_model(
    folder: pathlib.Path, story: Callable[[TextPool, TextModel], Awaitable[Any]], num_tokens: int = 300
) -> Any:
    async def opened(pool: TextPool) -> Any:
        return await story(pool, await pool.open(str(folder), num_tokens, EOS))

    return in_pool(opened)


def asks(source: str, kind: FormatKind = FormatKind.JSON_SCHEMA) -> InferenceRequest:
    return msgspec.structs.replace(CHAT, output_format=OutputFormat(kind, source))


async def refusal(work: Awaitable[object]) -> ErrorInfo:
    """Return the error of ``work``, which must be the client's."""
    with pytest.raises(ApiError) as caught:
        await work
    found = caught.value.info()
    assert 400 <= found.status < 500, found
    return found


@pytest.fixture
def chatty(talking_llama: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    return pathlib.Path(with_template(talking_llama, TEMPLATE, tmp_path / "chatty"))


@pytest.mark.parametrize(
    ("source", "kind"),
    [
        (f'{{"enum": [-{BIG}]}}', FormatKind.JSON_SCHEMA),
        (f'{{"const": -{BIG - 1}}}', FormatKind.JSON_SCHEMA),
        (f'{{"anyOf": [{{"type": "string"}}, {{"items": {{"const": -{BIG}}}}}]}}', FormatKind.JSON_SCHEMA),
        ('{"type": "integer", "multipleOf": 999983}', FormatKind.JSON_SCHEMA),
        ('{"type": "string", "pattern": "^(a{1000}){1000}$"}', FormatKind.JSON_SCHEMA),
        ('{"$ref": "#"}', FormatKind.JSON_SCHEMA),
        ('{"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}',
         FormatKind.JSON_SCHEMA),
        ("(((a{1000}){1000}){1000})", FormatKind.REGEX),
        ("(" * 5000 + "a" + ")" * 5000, FormatKind.REGEX),
        ("root ::= " + "(" * 3000 + '"x"' + ")" * 3000, FormatKind.GRAMMAR),
        ("start: " + "(" * 20000 + '"a"' + ")" * 20000, FormatKind.GRAMMAR),
        ("start: " + " | ".join(f"r{i}" for i in range(4000)) + "\n"
         + "".join(f'r{i}: "a" r{(i * 7 + 1) % 4000} | "b"\n' for i in range(4000)), FormatKind.GRAMMAR),
    ],
)  # fmt: skip
def test_a_grammar_that_ends_its_process_or_takes_too_much_is_an_error_of_its_request(
    chatty: pathlib.Path, source: str, kind: FormatKind
) -> None:
    async def story(pool: TextPool, model: TextModel) -> None:
        error = await refusal(model.grammar(asks(source, kind)))
        assert (error.code, error.param) == ("invalid_schema", "response_format")
        assert (await model.build(CHAT, CONTEXT)).ids
        assert await model.grammar(asks('{"type": "object"}')), "the next one is compiled by another process"

    with_model(chatty, story)


def test_a_death_takes_no_other_request_with_it(chatty: pathlib.Path) -> None:
    async def story(pool: TextPool, model: TextModel) -> None:
        work: list[Awaitable[object]] = []
        for index in range(12):
            work.append(refusal(model.grammar(asks(f'{{"enum": [-{BIG}, {index}]}}'))))
            work.append(model.grammar(asks(f'{{"enum": [{index}]}}')))
            work.append(model.build(CHAT, CONTEXT))
        await asyncio.gather(*work)

    with_model(chatty, story)


def test_a_template_that_never_ends_is_an_error_of_the_request_that_makes_it_so(
    talking_llama: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    spins = "{% for m in messages if m.content == 'spin' %}{% for a in range(99999) %}{% for b in range(99999) %}"
    grows = "{% for m in messages if m.content == 'grow' %}{{ 'a' * 10 ** 10 }}{% endfor %}"
    template = spins + "{% endfor %}{% endfor %}{% endfor %}" + grows + TEMPLATE
    folder = pathlib.Path(with_template(talking_llama, template, tmp_path / "m"))

    async def story(pool: TextPool, model: TextModel) -> None:
        for content in ("spin", "grow"):
            bad = InferenceRequest("m", messages=(Message(Role.USER, content),))
            error = await refusal(model.build(bad, CONTEXT))
            assert error.code in {"chat_template_failed", "invalid_value"}, error
            assert (await model.build(CHAT, CONTEXT)).ids

    with_model(folder, story)


@pytest.mark.parametrize(
    "template",
    [
        "{% for a in range(99999) %}" * 3 + "{% endfor %}" * 3,
        "{% set ns = namespace(t='a') %}{% for a in range(99999) %}{% set ns.t = ns.t + ns.t %}{% endfor %}",
        "{{ 9 ** 9 ** 9 ** 9 }}",
        "{% for a in b %}" * 30 + "{% endfor %}" * 30,
        "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "x" * (1 << 21),
    ],
)
def test_a_model_whose_template_cannot_be_used_is_refused_or_harmless(
    talking_llama: pathlib.Path, tmp_path: pathlib.Path, template: str
) -> None:
    path = with_template(talking_llama, template, tmp_path / "bad")

    async def story(pool: TextPool) -> None:
        try:
            await pool.open(path, 300, EOS)
        except ApiError as error:
            assert error.status == 422, error
            assert error.code == "chat_template_failed"
        good = await pool.open(str(talking_llama), 300, EOS)
        assert (await good.build(InferenceRequest("m", prompt="hello"), CONTEXT)).ids

    in_pool(story)


def test_a_killed_process_costs_no_request(chatty: pathlib.Path) -> None:
    async def story(pool: TextPool, model: TextModel) -> None:
        for _ in range(3):
            (child,) = [child for child in psutil.Process().children() if "neuron.text" in child.cmdline()]
            os.kill(child.pid, signal.SIGSTOP)
            answer = asyncio.ensure_future(model.build(CHAT, CONTEXT))
            await asyncio.sleep(0)
            os.kill(child.pid, signal.SIGKILL)
            assert (await answer).ids

    with_model(chatty, story)


def test_work_running_at_two_deaths_is_not_retried(tmp_path: pathlib.Path) -> None:
    tries = tmp_path / "tries"
    program = tmp_path / "dies.py"
    program.write_text(
        "import sys, os, msgspec\n"
        "from neuron.device.channel import Channel\n"
        "from neuron.text.jobs import Ready\n"
        "channel = Channel(int(sys.argv[sys.argv.index('--channel-fd') + 1]))\n"
        "channel.send(msgspec.msgpack.encode(Ready()))\n"
        "channel.recv()\n"
        f"open({str(tries)!r}, 'a').write('x')\n"
        "os._exit(3)\n"
    )

    async def story() -> None:
        pool = TextPool([sys.executable, "-P", str(program)])
        try:
            error = await refusal(pool.open("/", 300, EOS))
            assert error.code == "unsupported_tokenizer"
        finally:
            await pool.stop()

    asyncio.run(story())
    assert tries.read_text() == "xx"


def test_costly_jobs_give_way_to_the_daemon(chatty: pathlib.Path) -> None:
    async def story(pool: TextPool, model: TextModel) -> None:
        await model.left_out(asks('{"type": "object"}'))
        own = os.nice(0)
        niceness = sorted(
            child.nice() - own
            for child in psutil.Process().children()
            if any(word.startswith("text:") for word in child.cmdline())
        )
        assert niceness[0] == 0
        assert niceness[-1] == COSTLY_NICENESS

    with_model(chatty, story)


def test_unenforced_keywords_are_found_in_a_text_process(chatty: pathlib.Path) -> None:
    async def story(pool: TextPool, model: TextModel) -> None:
        assert await model.left_out(asks('{"uniqueItems": true}')) == ("response_format.uniqueItems",)
        assert await model.left_out(asks('{"type": 5, "format": []}')) == ()
        assert await model.left_out(CHAT) == ()

    with_model(chatty, story)


def test_principals_are_served_round_robin(chatty: pathlib.Path) -> None:
    async def story(pool: TextPool, model: TextModel) -> None:
        done: list[str] = []

        async def ask(principal: str) -> None:
            await model.build(msgspec.structs.replace(CHAT, principal=principal), CONTEXT)
            done.append(principal)

        await asyncio.gather(*(ask("many") for _ in range(20)), ask("one"))
        assert done.index("one") <= 2, done

    with_model(chatty, story)


def test_requests_beyond_the_queue_are_refused(chatty: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("neuron.text.pool.MAX_WAITING", 4)

    async def story(pool: TextPool, model: TextModel) -> None:
        results = await asyncio.gather(*(model.build(CHAT, CONTEXT) for _ in range(12)), return_exceptions=True)
        refused = [result for result in results if isinstance(result, ApiError)]
        assert 0 < len(refused) < 12
        assert {error.code for error in refused} == {"rate_limit_exceeded"}
        assert (await model.build(CHAT, CONTEXT)).ids

    with_model(chatty, story)


def test_one_principal_takes_no_more_than_its_share_of_the_queue(
    chatty: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("neuron.text.pool.MAX_WAITING", 16)

    async def story(pool: TextPool, model: TextModel) -> None:
        def ask(principal: str) -> Awaitable[object]:
            return model.build(msgspec.structs.replace(CHAT, principal=principal), CONTEXT)

        many = asyncio.gather(*(ask("many") for _ in range(40)), return_exceptions=True)
        await asyncio.sleep(0)
        await asyncio.gather(*(ask(f"other {index}") for index in range(3)))
        results = await many
        refused = [result for result in results if isinstance(result, ApiError)]
        assert 20 < len(refused) < 40
        assert {error.code for error in refused} == {"rate_limit_exceeded"}

    with_model(chatty, story)


def test_the_queue_is_bounded_in_bytes(chatty: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("neuron.text.pool.MAX_WAITING_BYTES", 400_000)

    async def story(pool: TextPool, model: TextModel) -> None:
        big = [
            InferenceRequest("m", prompt="x" * 90_000, principal=principal)
            for principal in ("a", "a", "b", "c", "d", "e")
        ]
        asked = (model.build(request, 1 << 20) for request in big)
        results = await asyncio.gather(*asked, return_exceptions=True)
        assert [isinstance(result, ApiError) for result in results] == [False, True, False, False, False, True]
        assert (await model.build(CHAT, CONTEXT)).ids

    with_model(chatty, story)


def opened_in(pool: TextPool) -> set[int]:
    return {model for queue in pool._queues_by_name.values() for process in queue.processes for model in process.opened}


def test_a_load_that_is_cancelled_leaves_nothing_open(chatty: pathlib.Path) -> None:
    async def story(pool: TextPool, model: TextModel) -> None:
        held = opened_in(pool)
        for rounds in (1, 50):
            opening = asyncio.ensure_future(pool.open(str(chatty), 300, EOS))
            for _ in range(rounds):
                await asyncio.sleep(0)
            opening.cancel()
            with pytest.raises(asyncio.CancelledError):
                await opening
        other = await pool.open(str(chatty), 300, EOS)  # which is read after those
        other.close()
        assert opened_in(pool) == held

    with_model(chatty, story)


def test_a_decoder_that_cannot_be_read_leaves_nothing_open(
    chatty: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def story(pool: TextPool, model: TextModel) -> None:
        held = opened_in(pool)
        monkeypatch.setattr("neuron.text.pool._read_decoder", lambda decoder: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            await pool.open(str(chatty), 300, EOS)
        assert (opened_in(pool), pool._open) == (held, held)

    with_model(chatty, story)


def test_jobs_of_a_model_that_is_unloaded_are_refused_and_do_not_open_it_again(chatty: pathlib.Path) -> None:
    async def story(pool: TextPool, model: TextModel) -> None:
        work: list[Awaitable[object]] = [model.build(CHAT, CONTEXT) for _ in range(6)]
        work += [model.grammar(asks('{"type": "object"}')) for _ in range(2)]
        waiting = asyncio.gather(*work, return_exceptions=True)
        await asyncio.sleep(0)
        model.close()
        results = await waiting
        refused = [result for result in results if isinstance(result, ApiError)]
        assert len(refused) >= 6
        assert {(error.status, error.code) for error in refused} == {(503, "service_unavailable")}
        assert not opened_in(pool)

    with_model(chatty, story)


def test_a_load_keeps_no_chat_waiting(
    chatty: pathlib.Path, talking_llama: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    spins = "{% for a in range(99999) %}" * 3 + "{% endfor %}" * 3
    hostile = with_template(talking_llama, spins, tmp_path / "hostile")

    async def story(pool: TextPool, model: TextModel) -> None:
        opening = asyncio.ensure_future(pool.open(hostile, 300, EOS))
        for _ in range(3):
            assert (await model.build(CHAT, CONTEXT)).ids
        assert not opening.done()
        with pytest.raises(ApiError):
            await opening

    with_model(chatty, story)


def test_text_processes_have_no_torch_and_one_thread(chatty: pathlib.Path) -> None:
    code = "import sys, neuron.text.__main__; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-P", "-c", code], check=True)

    async def story(pool: TextPool, model: TextModel) -> None:
        await model.grammar(asks('{"type": "object"}'))
        await model.build(InferenceRequest("m", prompt="x" * 40_000), 1 << 20)
        children = [child for child in psutil.Process().children() if "neuron.text" in child.cmdline()]
        assert len(children) == 3
        assert {child.num_threads() for child in children} == {1}

    with_model(chatty, story)


def test_text_processes_end_with_a_daemon_that_is_killed(chatty: pathlib.Path) -> None:
    code = (
        "import asyncio, sys\n"
        "from neuron.text.pool import TextPool\n"
        "async def main():\n"
        "    pool = TextPool()\n"
        "    await pool.open(sys.argv[1], 300, (2,))\n"
        "    print('open', flush=True)\n"
        "    await asyncio.sleep(600)\n"
        "asyncio.run(main())\n"
    )
    daemon = subprocess.Popen([sys.executable, "-P", "-c", code, str(chatty)], stdout=subprocess.PIPE)
    assert daemon.stdout is not None
    with daemon.stdout:
        assert daemon.stdout.readline() == b"open\n"
        children = psutil.Process(daemon.pid).children()
        assert children
        daemon.kill()
        daemon.wait()
    _, alive = psutil.wait_procs(children, timeout=20)
    assert not alive


def test_an_abandoned_request_is_not_begun(chatty: pathlib.Path) -> None:
    async def story(pool: TextPool, model: TextModel) -> None:
        first = asyncio.ensure_future(model.build(CHAT, CONTEXT))
        others = [asyncio.ensure_future(model.build(CHAT, CONTEXT)) for _ in range(5)]
        await asyncio.sleep(0)
        for other in others:
            other.cancel()
        assert (await first).ids
        assert (await model.build(CHAT, CONTEXT)).ids

    with_model(chatty, story)


def test_memory_of_a_job_is_bounded(chatty: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("neuron.text.pool.LONG_LIMITS", Limits(5.0, 8 << 20))

    async def story(pool: TextPool, model: TextModel) -> None:
        big = InferenceRequest("m", prompt="x " * 500_000)
        error = await refusal(model.build(big, 1 << 30))
        assert error.code in {"prompt_too_costly", "invalid_value"}
        assert pool._queues_by_name[QueueName.LONG].processes
        assert (await model.build(CHAT, CONTEXT)).ids

    with_model(chatty, story)
