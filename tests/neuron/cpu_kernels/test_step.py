"""Steps of the executor on a small model: its errors, and results that do not depend on threads and chunks.

Over 450 lines: all tests share one random model and its plans.
"""

import dataclasses
import itertools
import os
import pathlib
import re
from typing import Any

import numpy as np
import pytest
from cpu_levels import FLOAT32_LEVELS

from neuron.cpu_kernels import native
from neuron.models.packed import Format, whole_registers
from neuron.models.packed_weights import huge_pages

HIDDEN, HEADS, KV_HEADS, DIM, WIDTH, VOCAB = 40, 6, 2, 10, 37, 77
KEY_HEADS, KEY_DIM, VALUE_DIM = 2, 12, 20
MAX_ROWS, MAX_SEQUENCES, MAX_SAMPLED, NUM_PAGES = 200, 5, 8, 80
NONE = np.empty(0, np.int32)
WINDOW, MAX_DRAFTS = 21, 5


@dataclasses.dataclass(frozen=True)
class Form:
    """Differences of a model: of its attention, its norms, the kinds of its layers."""

    window: int = 0
    """Window of its first attention."""
    tables: tuple[int, ...] = ()
    is_gemma: bool = False
    is_hybrid: bool = False
    is_tiled: bool = False


# Windows so long that the context of one sequence is cut into parts, within the window too.
FORMS = {
    "plain": Form(),
    "gemma": Form(WINDOW, (WINDOW,), is_gemma=True),
    "gemma-wide-window": Form(150, is_gemma=True),
    "hybrid": Form(is_hybrid=True),
    "hybrid-tiled": Form(is_hybrid=True, is_tiled=True),
}


class Rig:
    """Random model with its states, of which a step continues those of ``slots``."""

    def __init__(
        self,
        threads: int,
        level: str,
        kv_dtype: str = "float32",
        form: Form = FORMS["plain"],
        poisoned: int | None = None,
    ) -> None:
        """The embedding of the token ``poisoned`` is no number."""
        self.random, self.form, self.pool = np.random.default_rng(0), form, native.Pool(threads)
        self.model = native.Model(
            self.pool, level, hidden=HIDDEN, vocab=VOCAB, eps=1e-5, kv_dtype=kv_dtype, max_rows=MAX_ROWS,
            max_sequences=MAX_SEQUENCES, max_sampled=MAX_SAMPLED, windows=form.tables,
            embedding_scale=3.0 if form.is_gemma else 1.0,
        )  # fmt: skip
        with pytest.raises(ValueError, match="layers are missing"):
            self.model.attach((huge_pages(1 << 16),), None, huge_pages(1 << 24))
        self.model.set_ends(self.matrix(VOCAB, HIDDEN, poisoned), self.matrix(VOCAB, HIDDEN), self.vector(HIDDEN))
        self.add_blocks()
        self.states = huge_pages(12 * max(1, self.model.state_bytes)).reshape(12, -1)
        states = self.states.reshape(-1) if form.is_hybrid else None
        caches = tuple(huge_pages(NUM_PAGES * page_bytes) for page_bytes in self.model.page_bytes)
        self.model.attach(caches, states, huge_pages(self.model.arena_bytes))
        self.slots = NONE

    def matrix(self, rows: int, columns: int, poisoned: int | None = None, scale: float = 0.3) -> native.Matrix:
        values = (self.random.standard_normal((rows, columns)) * scale).astype(np.float32)
        if poisoned is not None:
            values[poisoned] = np.nan
        packed = np.zeros(native.packed_bytes(Format.W32, rows, columns), np.uint8)
        native.pack(self.pool, values.view(np.uint8).reshape(-1), 0, rows, columns, packed, Format.W32)
        return native.Matrix(packed, Format.W32, rows, columns)

    def vector(self, length: int) -> np.ndarray[Any, Any]:
        return whole_registers(self.random.random(length).tolist())

    def ends(self) -> dict[str, Any]:
        """Return the norms of a layer."""
        out_norm = self.vector(HIDDEN) if self.form.is_gemma else None
        return {"norm": self.vector(HIDDEN), "out_norm": out_norm, "eps": 1e-5}

    def add_blocks(self) -> None:
        for base, window in ((0.49, self.form.window), (0.7, 0)):
            if self.form.is_hybrid:
                self.add_delta()
                self.add_mlp()
            self.add_attention(base, window)
            self.add_mlp()

    def add_attention(self, base: float, window: int) -> None:
        queries, keys = HEADS * DIM, KV_HEADS * DIM
        is_gated = self.form.is_hybrid
        self.model.add_attention(
            **self.ends(), num_heads=HEADS, num_kv_heads=KV_HEADS, head_dim=DIM, window_tokens=window, gated=is_gated,
            scale=0.2 if self.form.is_gemma else DIM**-0.5, qk_norm=self.vector((HEADS + KV_HEADS) * DIM),
            qkv=tuple(self.matrix(rows, HIDDEN) for rows in (queries * (1 + is_gated), keys, keys)),
            output=self.matrix(HIDDEN, queries), rope=whole_registers([*(base ** np.arange(5)), *[1.0] * 5]),
        )  # fmt: skip

    def add_mlp(self) -> None:
        gate_up, down = self.matrix(96, HIDDEN), self.matrix(HIDDEN, WIDTH)
        self.model.add_mlp(**self.ends(), gate_up=gate_up, down=down, width=WIDTH, gelu=self.form.is_gemma)

    def add_delta(self) -> None:
        rows = KEY_HEADS * KEY_DIM, KEY_HEADS * KEY_DIM, HEADS * VALUE_DIM
        self.model.add_gated_delta(
            **self.ends(), num_key_heads=KEY_HEADS, num_value_heads=HEADS, key_dim=KEY_DIM, value_dim=VALUE_DIM,
            width=4, max_drafts=MAX_DRAFTS, tiled=self.form.is_tiled,
            qkv=tuple(self.matrix(each, HIDDEN) for each in rows),
            z=(self.matrix(rows[2], HIDDEN),), gates=(self.matrix(HEADS, HIDDEN), self.matrix(HEADS, HIDDEN)),
            convolution=tuple(self.matrix(each, 4, scale=0.5) for each in rows), decay=-self.vector(HEADS) / 50,
            bias=self.vector(HEADS), head_norm=self.vector(VALUE_DIM), output=self.matrix(HIDDEN, rows[2]),
        )  # fmt: skip

    def run(self, *arrays: Any, **how: Any) -> int:
        return self.model.run(*arrays, **how, state_slots=self.slots if self.form.is_hybrid else None)


class Driver:
    """Sequences with scattered pages, and the plans of their steps.

    A windowed table has other pages, and none behind the window.
    """

    def __init__(self, rig: Rig) -> None:
        self.rig = rig
        self.tables = np.random.default_rng(4).permutation(np.arange(1, NUM_PAGES, dtype=np.int32))[:75].reshape(5, 15)
        self.starts = [0] * 5

    def plan(self, chunks: dict[int, list[int]]) -> list[np.ndarray[Any, Any]]:
        tokens, positions, ends, contexts = [], [], [0], []
        self.rig.slots = np.array([11 - 2 * number for number in chunks], np.int32)
        page_tables = np.stack([self.tables, NUM_PAGES - self.tables])[: len(self.rig.model.page_bytes)]
        slots: list[list[int]] = [[] for _ in page_tables]
        for number, chunk in chunks.items():
            if len(page_tables) > 1:
                page_tables[1, number, : max(0, self.starts[number] - WINDOW + 1) // 16] = 0
            for token in chunk:
                position = self.starts[number]
                tokens.append(token)
                positions.append(position)
                for own, table in zip(slots, page_tables, strict=True):
                    own.append(table[number, position // 16] * 16 + position % 16)
                self.starts[number] += 1
            ends.append(len(tokens))
            contexts.append(self.starts[number])
        arrays = [np.array(values, np.int32) for values in (tokens, positions, slots, ends)]
        return [*arrays, np.ascontiguousarray(page_tables[:, list(chunks)]), np.array(contexts, np.int32)]

    def step(self, chunks: dict[int, list[int]]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """Return ids and logits of one step, of the last row of each sequence."""
        return self.sample(chunks, self.last_rows(chunks))

    def last_rows(self, chunks: dict[int, list[int]]) -> list[int]:
        return (np.cumsum([len(chunk) for chunk in chunks.values()]) - 1).tolist()

    def sample(
        self, chunks: dict[int, list[int]], rows: list[int], hidden_rows: list[int] | None = None
    ) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """Return ids and logits of ``rows``; the ids are from the step run again, which writes the same."""
        arrays = self.plan(chunks)
        states = self.rig.states.copy()
        sampled, wanted = np.array(rows, np.int32), np.array(hidden_rows or [], np.int32)
        self.hidden = np.full((len(wanted), 40), np.nan, np.float32) if len(wanted) else None
        logits, ids = np.zeros((len(rows), 80), np.float32), np.full(len(rows), -7, np.int32)
        finite = np.full(len(chunks), -7, np.int32)
        self.rig.run(*arrays, sampled, wanted, logits, ids, finite, self.hidden)
        assert (ids == -7).all()
        assert (finite == 1).all()
        self.rig.states[:] = states
        self.rig.run(*arrays, sampled, NONE, None, ids, finite, None)
        np.testing.assert_array_equal(ids, logits[:, :77].argmax(-1))
        return ids, logits[:, :77]


def conversation(rig: Rig, chunk: int) -> list[np.ndarray[Any, Any]]:
    """Five sequences of up to 190 tokens, prompts in chunks, then decoding together with a prompt."""
    random = np.random.default_rng(9)
    driver = Driver(rig)
    prompts = [random.integers(0, 77, size).tolist() for size in (190, 33, 1, 16, 70)]
    last = {}
    for number, prompt in enumerate(prompts[:4]):
        for start in range(0, len(prompt), chunk):
            last[number] = driver.step({number: prompt[start : start + chunk]})[1][0]
    decodes = {number: [int(last[number].argmax())] for number in (0, 1, 3, 2)}
    found = [*last.values()]
    ids, logits = driver.step({**decodes, 4: prompts[4][:20]})
    found += [*logits]
    ids, logits = driver.step({0: [int(ids[0])], 4: prompts[4][20:]})
    found += [*logits]
    return found


@pytest.mark.parametrize(("kv_dtype", "tolerance"), [("float32", 2e-4), ("bfloat16", 0.05), ("int8", 0.05)])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("level", FLOAT32_LEVELS)
def test_threads_and_chunks_change_nothing(level: str, form: str, kv_dtype: str, tolerance: float) -> None:
    plain = conversation(Rig(1, "portable", form=FORMS[form]), 200)
    for threads, chunk in ((1, 200), (2, 7), (5, 31), (3, 5)):
        found = conversation(Rig(threads, level, kv_dtype, FORMS[form]), chunk)
        for row, expected in zip(found, plain, strict=True):
            assert np.abs(row - expected).max() < tolerance * np.abs(expected).max()


PAGES = 150
"""Tokens of each of three sequences: enough for the longer segments of a context, which begin at 1,921 tokens."""


class LongDriver(Driver):
    """Three sequences of up to 2,400 tokens."""

    def __init__(self, rig: Rig) -> None:
        self.rig = rig
        pages = np.random.default_rng(4).permutation(np.arange(1, 3 * PAGES + 1, dtype=np.int32))
        self.tables = pages.reshape(3, PAGES)
        self.starts = [0] * 3


@pytest.fixture
def large_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the cache of the models made here hold three such sequences."""
    monkeypatch.setitem(globals(), "NUM_PAGES", 3 * PAGES + 1)
    monkeypatch.setitem(globals(), "MAX_ROWS", 700)


@pytest.mark.parametrize(
    ("form", "kv_dtype"),
    [
        ("plain", "float32"),
        ("plain", "bfloat16"),
        ("plain", "int8"),
        ("gemma", "bfloat16"),
        ("gemma-wide-window", "int8"),
    ],
)
@pytest.mark.parametrize("level", FLOAT32_LEVELS)
def test_cuts_threads_and_company_change_no_bit(level: str, form: str, kv_dtype: str, large_cache: None) -> None:
    """A row's result depends on the row alone, not on how a prompt was cut or on the other rows of the step."""
    random = np.random.default_rng(11)
    tokens = random.integers(0, 77, 2000).tolist()
    places = [1, 16, 100, 127, 128, 129, 130, 255, 256, 300, 700, 1919, 1920, 1921, 1922, 1999]

    def logits(threads: int, largest: int, company: int) -> dict[int, bytes]:
        """Run the sequence in random pieces of up to ``largest``; return the results of its rows at ``places``."""
        cut = np.random.default_rng(threads * 1000 + largest)
        driver = LongDriver(Rig(threads, level, kv_dtype, FORMS[form]))
        found, start = {}, 0
        while start < len(tokens):
            piece = int(cut.integers(1, largest + 1)) if largest > 1 else 1
            if start > 128 and largest == 1:
                piece = 1 if start in places or start + 1 in places else 40  # each token alone takes too long
            end = min([start + piece, len(tokens), *(place + 1 for place in places if place >= start)])
            chunks = {1: tokens[start:end]}
            for other in (0, 2)[:company]:
                if driver.starts[other] < 2000:
                    chunks[other] = random.integers(0, 77, int(cut.integers(1, 20))).tolist()
            chunks = dict(sorted(chunks.items()))
            row = driver.last_rows(chunks)[list(chunks).index(1)]
            found[end - 1] = driver.sample(chunks, [row])[1].tobytes()
            start = end
        return {place: found[place] for place in places}

    plain = logits(1, 600, 0)
    for threads, largest, company in ((1, 1, 0), (3, 77, 2)):
        found = logits(threads, largest, company)
        assert [place for place in places if found[place] != plain[place]] == [], (threads, largest, company)


@pytest.mark.parametrize("level", FLOAT32_LEVELS)
def test_states_agree_to_the_bit_however_a_prompt_is_cut_at_whole_chunks(level: str) -> None:
    """Threads and the other sequences of a step change nothing either; a chunk of one token is a decode."""
    random = np.random.default_rng(12)
    tokens = random.integers(0, VOCAB, 200).tolist()

    def outcome(threads: int, cuts: tuple[int, ...], company: tuple[int, ...]) -> list[bytes]:
        driver = Driver(Rig(threads, level, form=FORMS["hybrid-tiled"]))
        rows = []
        for start, end in itertools.pairwise((0, *cuts)):
            others = {number: random.integers(0, VOCAB, 3).tolist() for number in company}
            row = list({1: 0, **others}).index(1)
            rows.append(driver.step({1: tokens[start:end], **others})[1][row].tobytes())
        return [rows[-1], rows[-2], driver.rig.states[9].tobytes()]

    expected = outcome(1, (128, 193), ())
    assert outcome(1, (128, 192, 193), ())[0::2] == expected[0::2]
    assert outcome(3, (64, 128, 193), (0, 4)) == expected
    assert outcome(5, (128, 193), (2,)) == expected


def test_states_do_not_mix() -> None:
    """Each sequence has the logits that it has alone, in slots that others used before."""
    level, random = native.levels()[0], np.random.default_rng(13)
    prompts = {number: random.integers(0, VOCAB, size).tolist() for number, size in enumerate((1, 64, 2, 70, 30))}
    alone = {}
    for number, prompt in prompts.items():
        driver = Driver(Rig(1, level, form=FORMS["hybrid"]))
        alone[number] = [driver.step({number: tokens})[1][0] for tokens in (prompt, [5], [6])]
    together = Driver(Rig(3, level, form=FORMS["hybrid"]))
    for index, chunks in enumerate((prompts, *({number: [token] for number in prompts} for token in (5, 6)))):
        for number, row in enumerate(together.step(chunks)[1]):
            np.testing.assert_allclose(row, alone[number][index], rtol=1e-4, atol=1e-4)
    assert (together.rig.states[[0, 1, 2, 4, 6, 8, 10]] == 0).all()


@pytest.mark.parametrize("level", FLOAT32_LEVELS)
@pytest.mark.parametrize("form", ["hybrid", "hybrid-tiled"])
def test_accepted_drafts_leave_the_state_of_decodes_to_the_bit(level: str, form: str) -> None:
    """Of two sequences with drafts, beside a decode and a prompt; some of the drafts are accepted, and some are not."""
    tokens = np.random.default_rng(14).integers(0, VOCAB, (4, 60)).tolist()
    replays, finite = np.array([0, 3, 1, 0], np.int32), np.zeros(4, np.int32)

    def run(driver: Driver, ends: dict[int, int], **how: Any) -> np.ndarray[Any, Any]:
        """Run up to ``ends``; return the logits of the last rows, four at most, of sequences 1 and 2."""
        chunks = {number: tokens[number][driver.starts[number] : end] for number, end in ends.items()}
        arrays = driver.plan(chunks)
        rows = np.concatenate([np.arange(max(arrays[3][n], arrays[3][n + 1] - 4), arrays[3][n + 1]) for n in (1, 2)])
        logits = np.zeros((len(rows), 80), np.float32)
        driver.rig.run(*arrays, rows.astype(np.int32), NONE, logits, np.zeros(len(rows), np.int32), finite, None, **how)
        return logits

    apart, together = (Driver(Rig(threads, level, form=FORMS[form])) for threads in (1, 3))
    for driver in (apart, together):
        run(driver, {0: 9, 1: 20, 2: 30, 3: 10})
    expected = [run(apart, {0: 10 + i, 1: 21 + i, 2: 31 + i, 3: 15 + 5 * i}) for i in range(4)]
    found = run(together, {0: 10, 1: 24, 2: 34, 3: 15}, num_decodes=1, num_drafting=2)
    for i in range(4):
        np.testing.assert_array_equal(found[[i, 4 + i]], expected[i])
    # All drafts of one are accepted, and one of the other's.
    together.starts[1:3] = [24, 32]
    state = together.rig.states.copy()
    after = run(together, {0: 11, 1: 25, 2: 33, 3: 20}, num_decodes=3, replays=replays)
    np.testing.assert_array_equal(after[1], expected[2][1])
    assert (state != together.rig.states).any()
    np.testing.assert_array_equal(run(together, {0: 12, 1: 26, 2: 34, 3: 25}, num_decodes=3)[1], expected[3][1])
    # The other one's first decode is behind its fourth token.
    np.testing.assert_array_equal(run(apart, {0: 14, 1: 25, 2: 35, 3: 35})[0], after[0])


def test_states_out_of_bounds_are_refused() -> None:
    rig = Rig(1, native.levels()[0], form=FORMS["hybrid"])
    arrays = Driver(rig).plan({0: [1, 2], 1: [3]})
    both, ids, finite = np.array([1, 2], np.int32), np.zeros(2, np.int32), np.zeros(2, np.int32)

    def run(slots: Any, **how: Any) -> None:
        rig.model.run(*arrays, both, NONE, None, ids, finite, None, state_slots=slots, **how)

    sound = np.array([3, 11], np.int32)
    run(sound)
    run(sound, num_drafting=1)
    for wrong in ([0, MAX_DRAFTS + 1], [-1, 0], [0]):
        with pytest.raises(ValueError, match="draft tokens"):
            run(sound, replays=np.array(wrong, np.int32))
    for counts in ({"num_decodes": -1}, {"num_drafting": -1}):
        with pytest.raises(ValueError, match="draft tokens"):
            run(sound, **counts)
    wide = Driver(rig).plan({0: [1] * (MAX_DRAFTS + 2)})
    with pytest.raises(ValueError, match="more than 5 draft tokens"):
        rig.model.run(*wide, NONE, NONE, None, ids[:0], finite[:1], None, state_slots=sound[:1], num_drafting=1)
    for slots, message in (
        (None, "no states"), ([3], "no states"), ([0, 3], "slot 0 is out"), ([3, 12], "slot 12 is out"),
        ([-1, 3], "out of range"), ([7, 7], "one state"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            run(None if slots is None else np.array(slots, np.int32))
    caches, arena = (huge_pages(rig.model.page_bytes[0]),), huge_pages(rig.model.arena_bytes)
    for num_bytes in (0, rig.model.state_bytes - 64, rig.model.state_bytes + 64):
        with pytest.raises(ValueError, match="no states of"):
            rig.model.attach(caches, np.zeros(num_bytes, np.uint8), arena)
    with pytest.raises(ValueError, match="no states of"):
        Rig(1, native.levels()[0]).model.attach(caches, np.zeros(64, np.uint8), arena)


def test_layers_that_do_not_fit_are_refused() -> None:
    rig = Rig(1, native.levels()[0], form=FORMS["hybrid"])
    before = rig.model.state_bytes, rig.model.page_bytes, rig.model.arena_bytes
    shape, output = (native.Matrix(None, Format.W32, *sizes) for sizes in ((16, HIDDEN), (HIDDEN, 16)))
    attention: dict[str, Any] = {
        "norm": rig.vector(HIDDEN), "eps": 1e-5, "qkv": (shape,) * 3, "output": output, "rope": rig.vector(16),
        "num_heads": 1, "num_kv_heads": 1, "head_dim": 16, "scale": 1.0,
    }  # fmt: skip
    delta: dict[str, Any] = {
        "norm": rig.vector(HIDDEN), "eps": 1e-5, "qkv": (shape,) * 3, "z": (shape,), "gates": (shape,) * 2,
        "convolution": (native.Matrix(None, Format.W32, 16, 4),) * 3, "decay": rig.vector(1), "bias": rig.vector(1),
        "head_norm": rig.vector(16), "output": output, "num_key_heads": 1,
        "num_value_heads": 1, "key_dim": 16, "value_dim": 16, "width": 4,
    }  # fmt: skip
    for change, message in (
        ({"head_dim": 1026}, "heads of 1026 dimensions"),
        ({"out_norm": rig.vector(HIDDEN)}, "some layers normalise their outputs"),
    ):
        with pytest.raises(native.UnsupportedError, match=message):
            rig.model.add_attention(**{**attention, **change})
    with pytest.raises(native.UnsupportedError, match="a convolution of 5 tokens; at most 4"):
        rig.model.add_gated_delta(**{**delta, "width": 5})
    wide = native.Matrix(None, Format.W8, 16, HIDDEN // 40 * 64)
    for change in (
        {"num_kv_heads": 2},
        {"head_dim": 15},
        {"qkv": (shape,) * 2},
        {"qkv": (shape, shape, wide)},
        {"norm": None},
    ):
        with pytest.raises(ValueError):
            rig.model.add_attention(**{**attention, **change})
    for change in (
        {"num_key_heads": 2},
        {"z": ()},
        {"convolution": (shape,) * 3},
        {"decay": rig.vector(17)},
        {"width": 1},
    ):
        with pytest.raises(ValueError):
            rig.model.add_gated_delta(**{**delta, **change})
    for window in range(1, 7):
        rig.model.add_attention(**{**attention, "window_tokens": window})
    with pytest.raises(native.UnsupportedError, match="more than 8 kinds of attention"):
        rig.model.add_attention(**{**attention, "window_tokens": 7})
    unloaded = Rig(1, native.levels()[0], form=FORMS["hybrid"])
    assert (unloaded.model.state_bytes, unloaded.model.page_bytes, unloaded.model.arena_bytes) == before
    unloaded.model.add_gated_delta(**delta)
    with pytest.raises(ValueError, match="weights are missing"):
        unloaded.model.attach((huge_pages(1 << 16),), huge_pages(1 << 20), huge_pages(1 << 24))
    with pytest.raises(ValueError, match="no page tables"):
        native.Model(None, native.levels()[0], hidden=1, vocab=1, eps=1, kv_dtype="int8", max_rows=1, max_sequences=1,
                     max_sampled=1, threads=1, windows=(5, 5))  # fmt: skip


def test_memory_lies_on_huge_pages_where_there_are_any() -> None:
    switch = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not switch.exists() or "[never]" in switch.read_text():
        pytest.skip("this kernel gives no huge pages")
    memory = huge_pages(64 << 20)
    memory[:] = 1
    address = memory.ctypes.data
    found = pathlib.Path("/proc/self/smaps").read_text()
    for mapping in re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", found, flags=re.MULTILINE)[1:]:
        start, end = (int(bound, 16) for bound in mapping.split(maxsplit=1)[0].split("-"))
        if start <= address < end:
            # Not all of it: a kernel short of whole ones gives small ones.
            assert re.search(r"^AnonHugePages: +[1-9]", mapping, re.MULTILINE), mapping
            return
    raise AssertionError("the memory is not mapped")


def test_a_step_out_of_bounds_is_refused() -> None:
    model = Rig(1, native.levels()[0])
    driver = Driver(model)
    driver.step({0: [1, 2, 3]})
    good = driver.plan({0: [4, 5], 1: [6]})
    sampled, ids, finite = np.array([1, 2], np.int32), np.zeros(2, np.int32), np.zeros(2, np.int32)

    def run(arrays: Any, sampled: Any = sampled, wanted: Any = NONE, logits: Any = None, hidden: Any = None) -> None:
        model.run(*arrays, sampled, wanted, logits, ids, finite, hidden)

    run(good)
    changes: list[tuple[int, int, int]] = [
        (0, 0, 77), (0, 0, -1), (1, 1, 9), (3, 0, 1), (3, 1, 3), (3, 2, 2),
        (5, 0, 0), (5, 1, 200),
    ]  # fmt: skip
    for which, index, value in changes:
        arrays = [array.copy() for array in good]
        arrays[which][index] = value
        with pytest.raises(ValueError):
            run(arrays)
    for index, place, value in ((2, (0, 0), NUM_PAGES * 16), (2, (0, 0), -1), (4, (0, 0, 0), NUM_PAGES)):
        arrays = [array.copy() for array in good]
        arrays[index][place] = value
        with pytest.raises(ValueError, match="out of range"):
            run(arrays)
    with pytest.raises(ValueError, match="2 page tables, 1 wanted"):
        run([*good[:2], good[2].repeat(2, 0), good[3], good[4].repeat(2, 0), good[5]])
    for wrong in ([1, 0], [0, 0], [0, 3], [-1, 0]):
        with pytest.raises(ValueError):
            run(good, np.array(wrong, np.int32))
    one, two = np.zeros((1, 40), np.float32), np.zeros((2, 40), np.float32)
    for rows, hidden in (([1, 0], two), ([3], one), ([0], two), ([0], None), ([], one), ([0], np.zeros((1, 39), "f4"))):
        with pytest.raises(ValueError):
            run(good, wanted=np.array(rows, np.int32), hidden=hidden)
    with pytest.raises(ValueError):
        run(good, logits=np.zeros((2, 77), np.float32))
    with pytest.raises(ValueError):
        model.run(*good, sampled, NONE, None, ids[:1], finite, None)
    with pytest.raises(ValueError):
        model.run(*good, sampled, NONE, None, ids, finite[:1], None)
    nine = driver.plan({0: [1] * 9})
    with pytest.raises(ValueError, match="9 sampled"):
        model.run(*nine, np.arange(9, dtype=np.int32), NONE, None, np.zeros(9, np.int32), finite[:1], None)
    run(good)


def test_rows_in_the_middle_are_sampled_and_shown_as_the_last_of_shorter_steps() -> None:
    model = Rig(3, native.levels()[0])
    chunk, other = [3, 1, 4, 1, 5, 9], [2, 6, 5]
    apart, together = Driver(model), Driver(model)
    expected = []
    for token in chunk:
        expected += [*apart.sample({0: [token]}, [0], [0])[1]]
        hidden = apart.hidden
    _, found = together.sample({0: chunk, 1: other}, [1, 2, 5, 8], [5, 6])
    for row, index in enumerate((1, 2, 5)):
        np.testing.assert_allclose(found[row], expected[index], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(together.hidden[0], hidden[0], rtol=1e-4, atol=1e-4)
    assert np.isfinite(together.hidden).all()


# ------------------------------------------------------------------ multi-step decode


class MultiStep:
    """Three sequences that decode together, several steps a call."""

    def __init__(
        self,
        threads: int,
        level: str,
        form: Form = FORMS["plain"],
        poisoned: int | None = None,
        draws: tuple[np.ndarray[Any, Any], ...] = (),
    ) -> None:
        self.draws, self.num_output, self.scratch = draws, 0, np.zeros((threads, 80), np.float32)
        self.rig = Rig(threads, level, form=form, poisoned=poisoned)
        self.driver = Driver(self.rig)
        prompts = {0: list(range(20)) * 3, 1: [5] * 15, 2: [7, 8]}
        self.next = {n: [int(self.driver.step({n: prompt})[0][0])] for n, prompt in prompts.items()}
        self.finite = np.zeros(3, np.int32)

    def run(self, num_steps: int, stops: tuple[int, ...] = (), channel_fd: int = -1) -> np.ndarray[Any, Any]:
        """Return ``[steps, 3]`` of one call."""
        arrays = self.driver.plan(self.next)
        sampled, ids = np.arange(3, dtype=np.int32), np.full(3, -7, np.int32)
        later = np.full((num_steps - 1, 3), -7, np.int32)
        how: Any = (*self.draws, np.full(3, self.num_output, np.int32), self.scratch) if self.draws else None
        done = self.rig.run(
            *arrays, sampled, NONE, np.zeros((3, 80), np.float32) if how else None, ids, self.finite, None, draws=how,
            later=later, stops=np.array(stops, np.int32), channel_fd=channel_fd,
        )  # fmt: skip
        self.num_output += done
        assert (later[done - 1 :] == -7).all()
        found = np.concatenate((ids[None], later[: done - 1]))
        self.driver.starts = [start + (done - 1 if n < 3 else 0) for n, start in enumerate(self.driver.starts)]
        self.next = {n: [int(found[-1][n])] for n in range(3)}
        return found


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("level", FLOAT32_LEVELS)
def test_multi_step_equals_single_steps(level: str, form: str) -> None:
    for threads in (1, 3):
        apart, together = MultiStep(threads, level, FORMS[form]), MultiStep(threads, level, FORMS[form])
        expected = np.concatenate([apart.run(1) for _ in range(40)])
        found = np.concatenate([together.run(count) for count in (17, 1, 2, 20)])
        np.testing.assert_array_equal(found, expected)
        assert (together.finite == 1).all()


DRAWS = (
    np.array([0.9, 0.0, 1.3]), np.array([0.8, 1.0, 1.0]), np.array([0.0, 0.0, 0.02]), np.array([0, 0, 20], np.int32),
    np.array([5, 6, 1 << 63], np.uint64),
)  # fmt: skip


def test_rows_are_drawn_by_their_own_numbers_in_multi_step_too() -> None:
    level = native.levels()[0]
    for threads in (1, 3):
        apart, together = MultiStep(threads, level, draws=DRAWS), MultiStep(threads, level, draws=DRAWS)
        expected = np.concatenate([apart.run(1) for _ in range(30)])
        np.testing.assert_array_equal(np.concatenate([together.run(count) for count in (17, 1, 12)]), expected)
    # From the logits of each step, as a sampler that has the seed and the count of tokens draws.
    driver = Driver(Rig(2, level))
    prompts = {0: list(range(20)) * 3, 1: [5] * 15, 2: [7, 8]}
    tokens = {n: [int(driver.step({n: prompt})[0][0])] for n, prompt in prompts.items()}
    for step, row in enumerate(expected[:10]):
        _, logits = driver.step(tokens)
        for n in range(3):
            padded_row = np.zeros(80, np.float32)
            padded_row[:77] = logits[n]
            temperature, top_p, min_p, top_k = (values[n] for values in DRAWS[:4])
            token = native.draw(
                level, padded_row, 77, np.zeros(80, np.float32), temperature=temperature, top_p=top_p, min_p=min_p,
                top_k=top_k, uniform=native.uniform(int(DRAWS[4][n]), step),
            )  # fmt: skip
            assert token == row[n]
        tokens = {n: [int(row[n])] for n in range(3)}


def test_a_row_that_is_left_keeps_its_logits_and_ends_there() -> None:
    temperature = np.array([0.9, -1.0, 1.3])
    multi = MultiStep(2, native.levels()[0], draws=(temperature, *DRAWS[1:]))
    with pytest.raises(ValueError, match="row 1 is left"):
        multi.run(2)
    apart, beside = MultiStep(2, native.levels()[0]), MultiStep(2, native.levels()[0], draws=DRAWS)
    arrays = apart.driver.plan(apart.next)
    rows, ids, found = np.arange(3, dtype=np.int32), np.full(3, -7, np.int32), np.zeros((3, 80), np.float32)
    how = (temperature, *DRAWS[1:], np.zeros(3, np.int32), apart.scratch)
    apart.rig.run(*arrays, rows, NONE, found, ids, apart.finite, None, draws=how)
    expected = beside.run(1)[0]
    assert ids.tolist() == [expected[0], -7, expected[2]]
    assert int(found[1, :77].argmax()) == expected[1]


def test_draws_without_scratch_space_or_of_another_length_are_refused() -> None:
    model = Rig(2, native.levels()[0])
    arrays = Driver(model).plan({0: [1, 2], 1: [3], 2: [4]})
    rows, ids, finite = np.array([1, 2, 3], np.int32), np.zeros(3, np.int32), np.zeros(3, np.int32)
    logits, scratch, counters = np.zeros((3, 80), np.float32), np.zeros((2, 80), np.float32), np.zeros(3, np.int32)

    def run(given: Any, logits: Any = logits) -> None:
        model.run(*arrays, rows, NONE, logits, ids, finite, None, draws=given)

    run((*DRAWS, counters, scratch))
    for index in range(5):
        with pytest.raises(ValueError):
            run((*DRAWS[:index], DRAWS[index][:2], *DRAWS[index + 1 :], counters, scratch))
    for given in (
        (*DRAWS, counters[:1], scratch),
        (*DRAWS, counters, scratch[:1]),
        (*DRAWS, counters, scratch[:, :79].copy()),
    ):
        with pytest.raises(ValueError):
            run(given)
    with pytest.raises(ValueError):
        run((*DRAWS, counters, scratch), None)


def test_a_stop_and_a_message_end_multi_step() -> None:
    level = native.levels()[0]
    expected = MultiStep(2, level).run(20)
    stop = int(expected[6, 1])
    first = int(np.argmax((expected == stop).any(1)))
    np.testing.assert_array_equal(MultiStep(2, level).run(20, (76, stop)), expected[: first + 1])
    reader, writer = os.pipe()
    try:
        np.testing.assert_array_equal(MultiStep(2, level).run(20, channel_fd=reader), expected)
        os.write(writer, b"x")
        np.testing.assert_array_equal(MultiStep(2, level).run(20, channel_fd=reader), expected[:1])
        os.read(reader, 1)
        os.close(writer)
        writer = -1
        np.testing.assert_array_equal(MultiStep(2, level).run(20, channel_fd=reader), expected[:1])  # the peer is gone
    finally:
        os.close(reader)
        if writer >= 0:
            os.close(writer)


def test_a_nan_ends_multi_step() -> None:
    level = native.levels()[0]
    expected = MultiStep(2, level).run(20)
    # A token that no prompt has and that is not sampled at once.
    at, row = next(
        (at, row) for at, row in np.argwhere(expected >= 20).tolist() if at and expected[at, row] not in expected[:at]
    )
    poisoned = int(expected[at, row])
    multi = MultiStep(2, level, poisoned=poisoned)
    found = multi.run(20)
    np.testing.assert_array_equal(found[: at + 1], expected[: at + 1])
    assert len(found) == at + 2, "the step that reads it is the last"
    assert (found[-1] == -1).tolist() == (expected[at] == poisoned).tolist()
    assert (multi.finite == 0).tolist() == (expected[at] == poisoned).tolist()


def test_multi_step_out_of_bounds_is_refused() -> None:
    model = Rig(1, native.levels()[0])
    driver = Driver(model)
    driver.step({0: [1, 2, 3], 1: [4]})
    good = driver.plan({0: [4], 1: [6]})
    both, ids, finite = np.arange(2, dtype=np.int32), np.zeros(2, np.int32), np.zeros(2, np.int32)

    def run(arrays: Any = good, num_steps: int = 5, width: int = 2, sampled: Any = both, logits: Any = None) -> None:
        later = np.zeros((num_steps - 1, width), np.int32)
        model.run(*arrays, sampled, NONE, logits, ids[: len(sampled)], finite, None, later=later)

    run()
    run(num_steps=15 * 16 - 3)
    with pytest.raises(ValueError):
        run(num_steps=15 * 16 - 2)
    with pytest.raises(ValueError):
        run(width=1)
    with pytest.raises(ValueError):
        run(sampled=both[:1], width=1)
    with pytest.raises(ValueError):
        run(logits=np.zeros((2, 80), np.float32))
    arrays = [array.copy() for array in good]
    arrays[4][0, 1, 1] = NUM_PAGES
    run(arrays, num_steps=15)
    with pytest.raises(ValueError):
        run(arrays, num_steps=16)
    with pytest.raises(ValueError):
        run(driver.plan({0: [4, 5], 1: [6]}))
