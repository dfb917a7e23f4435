"""The page pool: allocation, references and its integrity check."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from neuron.engine.pages import PagePool


@given(st.lists(st.integers(1, 9), max_size=40), st.randoms(use_true_random=False))
def test_pages_return_to_where_they_came_from(sizes: list[int], random: object) -> None:
    pool = PagePool(64)
    held = []
    for size in sizes:
        if size <= pool.num_free:
            held.append(pool.allocate(size))
            assert 0 not in held[-1]
        elif held:
            pool.release(held.pop(random.randrange(len(held))))  # type: ignore[attr-defined]
        pool.check_integrity(held)
    for pages in held:
        pool.release(pages)
    pool.check_integrity([])
    assert pool.num_free == 64


def test_a_newer_page_replaces_an_idle_one_of_its_key() -> None:
    pool = PagePool(4)
    first, second, third = (pool.allocate(1) for _ in range(3))
    pool.publish(int(first[0]), b"key")
    pool.publish(int(second[0]), b"key")
    assert pool.find([b"key"]) == first, "it is held, and stays"
    pool.release(first)
    pool.publish(int(third[0]), b"key")
    assert pool.find([b"key"]) == third
    assert (pool.idle_keys(), pool.num_free) == ([], 2)
    pool.check_integrity([second, third])


def test_misuse_of_pages_is_loud() -> None:
    pool = PagePool(4)
    with pytest.raises(RuntimeError, match="5 pages wanted, 4 free"):
        pool.allocate(5)
    pages = pool.allocate(2)
    with pytest.raises(RuntimeError, match="differ"):
        pool.check_integrity([])
    pool.publish(int(pages[0]), b"key")
    with pytest.raises(RuntimeError, match="published twice"):
        pool.publish(int(pages[0]), b"other")
    pool.release(pages)
    assert len(pool.idle_keys()) == 1
    with pytest.raises(RuntimeError, match="has no references"):
        pool.publish(int(pages[1]), b"other")
    with pytest.raises(RuntimeError, match="has no references"):
        pool.release(pages)
    with pytest.raises(RuntimeError, match="differ"):
        pool.check_integrity([pages])
