"""A layer with a latent cache, made for the test: its pages are those of all layers without a window."""

import pathlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cached_layers import FAMILY, WIDTH, make_model
from graph_rig import ByDefinition, Recorded

from neuron.device import jobs
from neuron.models.registry import FAMILIES
from neuron.models.sizing import PAGE_TOKENS
from neuron.triton_kernels import dispatch

PROMPT = [1 + 7 * i % 60 for i in range(70)]


@pytest.fixture
def latent(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> pathlib.Path:
    monkeypatch.setitem(FAMILIES, "latent", FAMILY)
    return make_model(tmp_path)


@pytest.mark.parametrize("with_graphs", [False, True], ids=["eager", "graphs"])
def test_latents_are_paged_counted_shared_and_cleared(
    latent: pathlib.Path, harness: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, with_graphs: bool
) -> None:
    if with_graphs:
        operations = ByDefinition()
        monkeypatch.setattr(dispatch, "operations_for", lambda *_, **__: operations)

    def load(**spec: object) -> Any:
        driver = harness()
        if with_graphs:
            driver.engine._graphs = lambda: Recorded(late=True)
        assert isinstance(driver.load(latent, max_sequences=5, **spec), jobs.Done)
        driver.model().executor.overlaps = with_graphs
        return driver

    driver = load()
    model = driver.model()
    # Keys and values of 2 heads of 8, and the latents, in each of 2 blocks.
    assert model.plan.kv_cache_bytes == model.plan.num_pages * PAGE_TOKENS * 4 * 2 * (2 * 2 * 8 + WIDTH)
    caches = getattr(model.executor, "_eager", model.executor).caches
    tensors = [tensor for cache in caches.layers for tensor in cache or () if tensor is not None]
    assert sum(tensor[1:-1].nbytes for tensor in tensors) == model.plan.kv_cache_bytes
    alone = driver.output_alone(PROMPT, 20)
    driver.generate(1, PROMPT, 20)
    for number in range(2, 6):
        driver.generate(number, [*PROMPT[: 9 * number], 5], 30)
    driver.run()
    assert driver.outputs()[1] == alone
    assert driver.rows[0].prompt_cached == 64
    plain = load(prefix_cache=False)
    for number in range(2, 6):
        assert plain.output_alone([*PROMPT[: 9 * number], 5], 30) == driver.outputs()[number]
    pages = torch.arange(1, 4, dtype=torch.int32).numpy()
    model.executor.clear((pages,))
    assert not any(tensor[1:4].any() for tensor in tensors)
