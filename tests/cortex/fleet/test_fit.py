"""The fit over a fleet: the best of what nodes say fits, whatever the order in which they say it."""

import dataclasses
import functools
import json
import pathlib
import tempfile

from hypothesis import given, settings
from hypothesis import strategies as st

from cortex.fleet.fit import choose
from cortex.wire.errors import ApiError, UnavailableError
from cortex.wire.node import WANTED_TOKENS, ChosenWeights, Fit, ModelSpec, PassedOver
from neuron.load.choices import Choice, RepositoryFile
from neuron.load.fit import Candidate, fit
from neuron.models.config import read_config
from neuron.models.errors import DoesNotFitError
from neuron.models.gguf import TensorKind
from neuron.models.sizing import plan_memory

GIB = 1 << 30
SPEC = ModelSpec("m", "hf:o/n")
LLAMA = {
    "model_type": "llama",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "vocab_size": 32000,
    "max_position_embeddings": 16384,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}
BITS = {"Q2_K": 2.6, "Q4_K": 4.5, "Q8_0": 8.5, "BF16": 16.0}


@functools.cache
def candidates() -> tuple[Candidate, ...]:
    """Return a choice of each kind, the largest first."""
    with tempfile.TemporaryDirectory() as folder:
        pathlib.Path(folder, "config.json").write_text(json.dumps(LLAMA))
        config = read_config(pathlib.Path(folder))
    found = []
    for tag, bits in reversed(BITS.items()):
        kinds = {name: TensorKind[tag] if len(t.shape) > 1 else TensorKind.F32 for name, t in config.tensors().items()}
        file = RepositoryFile(f"m-{tag}.gguf", int(config.num_parameters() * bits / 8))
        found.append(Candidate(Choice(tag, (file,), tag), dataclasses.replace(config, tensor_kinds=kinds)))
    return tuple(found)


def weights(choice: str = "Q4_0", size_bytes: int = GIB, **fields: object) -> ChosenWeights:
    more = {"devices": ("cuda:0",), "context_tokens": 8192, "required_bytes": GIB, "held_bytes": size_bytes, **fields}
    return ChosenWeights(choice, size_bytes, **more)  # type: ignore[arg-type]


memories = st.dictionaries(
    st.sampled_from("abc"),
    st.dictionaries(st.sampled_from(["cuda:0", "cpu:0"]), st.integers(0, 2 * GIB), min_size=1),
    min_size=1,
)


@given(memories, st.sampled_from([0, 3000]))
@settings(max_examples=40, deadline=None)
def test_no_weights_that_a_load_refuses_and_none_smaller_than_fit_elsewhere(
    fleet: dict[str, dict[str, int]], context_tokens: int
) -> None:
    spec = ModelSpec("m", "hf:o/n", context_tokens=context_tokens)
    found = choose({node: fit(candidates(), free, spec) for node, free in fleet.items()}, context_tokens)
    reached = {}
    for node, free in fleet.items():
        for candidate in candidates():
            for device, free_bytes in free.items():
                try:
                    plan = plan_memory(candidate.config, spec, device, free_bytes)  # type: ignore[arg-type]
                except DoesNotFitError:
                    continue
                context = min(plan.context_tokens, context_tokens or WANTED_TOKENS)
                reach = (
                    device[:4] == "cuda",
                    context,
                    candidate.choice.size_bytes,
                )
                reached[node, device, candidate.choice.name] = reach
    if found.weights is None:
        assert not reached
        return
    chosen = found.weights
    assert len(chosen.devices) == 1
    assert reached[found.node, chosen.devices[0], chosen.choice] == max(reached.values())


@given(memories, st.sampled_from("abc"), st.integers(0, GIB))
@settings(max_examples=40, deadline=None)
def test_more_memory_anywhere_never_means_less(fleet: dict[str, dict[str, int]], node: str, more: int) -> None:
    larger = {**fleet, node: {device: free + more for device, free in fleet.get(node, {"cuda:0": 0}).items()}}
    before, after = (
        choose({name: fit(candidates(), free, SPEC) for name, free in each.items()}).weights for each in (fleet, larger)
    )
    if before is not None:
        assert after is not None
        assert after.rank(0)[:3] >= before.rank(0)[:3]


def test_the_order_of_the_nodes_decides_nothing() -> None:
    answers: dict[str, Fit | ApiError] = {name: Fit(weights()) for name in "bca"}
    assert choose(answers).node == "a"
    assert choose(dict(reversed(answers.items()))) == choose(answers)


def test_all_that_was_passed_over_has_its_node_and_a_reason() -> None:
    answers: dict[str, Fit | ApiError] = {
        "big": Fit(weights("Q8_0", 2 * GIB), (PassedOver("BF16", 4 * GIB, "cuda:0: needs 5 GiB, free 4 GiB"),)),
        "cpu": Fit(weights("BF16", 4 * GIB, devices=("cpu:0",))),
        "evicting": Fit(weights("Q8_0", 2 * GIB, evicts=True)),
        "full": Fit(None, (PassedOver("Q8_0", 2 * GIB, "no device takes loads"),)),
        "lost": UnavailableError("lost cannot be reached."),
        "short": Fit(weights("Q8_0", 2 * GIB, context_tokens=4096)),
        "small": Fit(weights("Q4_0", GIB)),
        "twin": Fit(weights("Q8_0", 2 * GIB)),
    }
    found = choose(answers)
    assert (found.node, found.weights) == ("big", weights("Q8_0", 2 * GIB))
    assert {(passed.node, passed.choice): passed.reason for passed in found.passed_over} == {
        ("big", "BF16"): "cuda:0: needs 5 GiB, free 4 GiB",
        ("cpu", "BF16"): "on a CPU; big has it on cuda:0",
        ("evicting", "Q8_0"): "needs evictions, and big does not",
        ("full", "Q8_0"): "no device takes loads",
        ("lost", ""): "lost cannot be reached.",
        ("short", "Q8_0"): "leaves room for 4096 tokens; big for 8192",
        ("small", "Q4_0"): "fits, and big has room for Q8_0",
        ("twin", "Q8_0"): "fits as well as on big",
    }


def test_nothing_fits_where_no_node_can_say_so() -> None:
    found = choose({"a": Fit(None), "b": UnavailableError("no")})
    assert (found.node, found.weights, len(found.passed_over)) == ("", None, 1)
