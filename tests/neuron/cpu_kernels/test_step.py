"""Steps of the executor on a small model: its errors, and results that do not depend on threads and chunks.

Over 450 lines: all tests share one random model and its plans.
"""

import os
import pathlib
import re
from typing import Any

import numpy as np
import pytest

from neuron.cpu_kernels import native
from neuron.models.packed import Format, padded
from neuron.models.packed_weights import huge_pages

SIZES = {"num_layers": 2, "hidden": 40, "num_heads": 6, "num_kv_heads": 2, "head_dim": 10, "intermediate": 37,
         "vocab": 77, "eps": 1e-5}  # fmt: skip
MAX_ROWS, MAX_SEQUENCES, MAX_SAMPLED, NUM_PAGES = 200, 5, 8, 80
NONE = np.empty(0, np.int32)
PLAIN: dict[str, Any] = {}
WINDOW = 21
GEMMA: dict[str, Any] = {"windows": (0, WINDOW), "gelu": True, "embedding_scale": 3.0, "attention_scale": 0.2}
# Long enough for the context of one sequence to be cut into parts, within the window too.
FORMS = {
    "plain": PLAIN,
    "gemma": {**GEMMA, "has_window_table": True},
    "gemma-wide-window": {**GEMMA, "windows": (0, 150)},
}


def make_model(
    threads: int,
    level: str,
    kv_dtype: str = "float32",
    seed: int = 0,
    form: dict[str, Any] = PLAIN,
    poisoned: int | None = None,
) -> native.Model:
    """Return a random model; with a ``GEMMA`` form, norms behind its blocks and a window in its first layer.

    The embedding of the token ``poisoned`` is no number.
    """
    random = np.random.default_rng(seed)
    pool = native.Pool(threads)

    def matrix(rows: int, columns: int, poisoned: int | None = None) -> native.Matrix:
        values = (random.standard_normal((rows, columns)) * 0.3).astype(np.float32)
        if poisoned is not None:
            values[poisoned] = np.nan
        packed = np.zeros(native.packed_bytes(Format.W32, rows, columns), np.uint8)
        native.pack(pool, values.view(np.uint8).reshape(-1), 0, rows, columns, packed, Format.W32)
        return native.Matrix(packed, Format.W32, rows, columns)

    def vector(length: int) -> np.ndarray[Any, Any]:
        return np.concatenate((random.random(length), np.zeros(padded(length) - length))).astype(np.float32)

    model = native.Model(
        pool, level, **SIZES, **form, kv_dtype=kv_dtype, max_rows=MAX_ROWS, max_sequences=MAX_SEQUENCES,
        max_sampled=MAX_SAMPLED,
    )  # fmt: skip
    with pytest.raises(ValueError, match="weights are missing"):
        model.attach((huge_pages(1 << 16),), huge_pages(1 << 24))
    ropes = [
        np.concatenate((angles, np.ones(5))).astype(np.float32)
        for angles in (0.7 ** np.arange(5), 0.49 ** np.arange(5))
    ]
    model.set_ends(matrix(77, 40, poisoned), matrix(77, 40), vector(40), tuple(ropes[: 2 if form else 1]))
    for number in range(2):
        model.set_layer(
            number, input_norm=vector(40), post_norm=vector(40), qk_norm=random.random(80).astype(np.float32),
            query=matrix(60, 40), key=matrix(20, 40), value=matrix(20, 40), output=matrix(40, 60),
            gate_up=matrix(96, 40), down=matrix(40, 37),
            attention_out_norm=vector(40) if form else None, mlp_out_norm=vector(40) if form else None,
            kind=int(bool(form) and number == 0),
        )  # fmt: skip
    caches = tuple(huge_pages(NUM_PAGES * page_bytes) for page_bytes in model.page_bytes)
    model.attach(caches, huge_pages(model.arena_bytes))
    return model


class Driver:
    """Sequences with scattered pages, and the plans of their steps.

    A windowed table has other pages, and none behind the window.
    """

    def __init__(self, model: native.Model) -> None:
        self.model = model
        self.tables = np.random.default_rng(4).permutation(np.arange(1, NUM_PAGES, dtype=np.int32))[:75].reshape(5, 15)
        self.starts = [0] * 5

    def plan(self, chunks: dict[int, list[int]]) -> list[np.ndarray[Any, Any]]:
        tokens, positions, ends, contexts = [], [], [0], []
        page_tables = np.stack([self.tables, NUM_PAGES - self.tables])[: len(self.model.page_bytes)]
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
        sampled, wanted = np.array(rows, np.int32), np.array(hidden_rows or [], np.int32)
        self.hidden = np.full((len(wanted), 40), np.nan, np.float32) if len(wanted) else None
        logits, ids = np.zeros((len(rows), 80), np.float32), np.full(len(rows), -7, np.int32)
        finite = np.full(len(chunks), -7, np.int32)
        self.model.run(*arrays, sampled, wanted, logits, ids, finite, self.hidden)
        assert (ids == -7).all()
        assert (finite == 1).all()
        self.model.run(*arrays, sampled, NONE, None, ids, finite, None)
        np.testing.assert_array_equal(ids, logits[:, :77].argmax(-1))
        return ids, logits[:, :77]


def conversation(model: native.Model, chunk: int) -> list[np.ndarray[Any, Any]]:
    """Five sequences of up to 190 tokens, prompts in chunks, then decoding together with a prompt."""
    random = np.random.default_rng(9)
    driver = Driver(model)
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
@pytest.mark.parametrize("level", native.levels())
def test_threads_and_chunks_change_nothing(level: str, form: str, kv_dtype: str, tolerance: float) -> None:
    plain = conversation(make_model(1, "portable", form=FORMS[form]), 200)
    for threads, chunk in ((1, 200), (2, 7), (5, 31), (3, 5)):
        found = conversation(make_model(threads, level, kv_dtype, form=FORMS[form]), chunk)
        for row, expected in zip(found, plain, strict=True):
            assert np.abs(row - expected).max() < tolerance * np.abs(expected).max()


PAGES = 150
"""Tokens of each of three sequences: enough for the longer segments of a context, which begin at 1,921 tokens."""


class LongDriver(Driver):
    """Three sequences of up to 2,400 tokens."""

    def __init__(self, model: native.Model) -> None:
        self.model = model
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
@pytest.mark.parametrize("level", native.levels())
def test_cuts_threads_and_company_change_no_bit(level: str, form: str, kv_dtype: str, large_cache: None) -> None:
    """A row's result depends on the row alone, not on how a prompt was cut or on the other rows of the step."""
    random = np.random.default_rng(11)
    tokens = random.integers(0, 77, 2000).tolist()
    places = [1, 16, 100, 127, 128, 129, 130, 255, 256, 300, 700, 1919, 1920, 1921, 1922, 1999]

    def logits(threads: int, largest: int, company: int) -> dict[int, bytes]:
        """Run the sequence in random pieces of up to ``largest``; return the results of its rows at ``places``."""
        cut = np.random.default_rng(threads * 1000 + largest)
        driver = LongDriver(make_model(threads, level, kv_dtype, form=FORMS[form]))
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
    model = make_model(1, native.levels()[0])
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
    model = make_model(3, native.levels()[0])
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
        form: dict[str, Any] = PLAIN,
        poisoned: int | None = None,
        draws: tuple[np.ndarray[Any, Any], ...] = (),
    ) -> None:
        self.draws, self.num_output, self.scratch = draws, 0, np.zeros((threads, 80), np.float32)
        self.model = make_model(threads, level, form=form, poisoned=poisoned)
        self.driver = Driver(self.model)
        prompts = {0: list(range(20)) * 3, 1: [5] * 15, 2: [7, 8]}
        self.next = {n: [int(self.driver.step({n: prompt})[0][0])] for n, prompt in prompts.items()}
        self.finite = np.zeros(3, np.int32)

    def run(self, num_steps: int, stops: tuple[int, ...] = (), channel_fd: int = -1) -> np.ndarray[Any, Any]:
        """Return ``[steps, 3]`` of one call."""
        arrays = self.driver.plan(self.next)
        sampled, ids = np.arange(3, dtype=np.int32), np.full(3, -7, np.int32)
        later = np.full((num_steps - 1, 3), -7, np.int32)
        how: Any = (*self.draws, np.full(3, self.num_output, np.int32), self.scratch) if self.draws else None
        done = self.model.run(
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
@pytest.mark.parametrize("level", native.levels())
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
    driver = Driver(make_model(2, level))
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
    apart.model.run(*arrays, rows, NONE, found, ids, apart.finite, None, draws=how)
    expected = beside.run(1)[0]
    assert ids.tolist() == [expected[0], -7, expected[2]]
    assert int(found[1, :77].argmax()) == expected[1]


def test_draws_without_scratch_space_or_of_another_length_are_refused() -> None:
    model = make_model(2, native.levels()[0])
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
    model = make_model(1, native.levels()[0])
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
