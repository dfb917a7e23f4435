"""Implementation for each device, and a whole forward pass by kernels against eager torch."""

import os
import pathlib
import subprocess
import sys

import pytest
import torch

from neuron.triton_kernels import dispatch
from neuron.triton_kernels.operations import EAGER, KERNELS

CUDA = torch.device("cuda", 0)
_PATH = os.pathsep.join([str(pathlib.Path(__file__).parents[2] / "support"), os.environ.get("PYTHONPATH", "")])
WITH_SUPPORT = {**os.environ, "PYTHONPATH": _PATH}


def test_the_cpu_and_float32_stay_eager() -> None:
    assert dispatch.operations_for(torch.device("cpu"), torch.bfloat16) is EAGER
    assert dispatch.operations_for(CUDA, torch.float32) is EAGER


def test_cuda_gets_kernels_unless_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    assert dispatch.operations_for(CUDA, torch.bfloat16) is KERNELS
    assert dispatch.operations_for(CUDA, torch.bfloat16, triton=False) is EAGER


def test_a_host_without_cuda_imports_no_triton() -> None:
    code = "import neuron.engine.eager_executor, neuron.models.prebuild, sys; print('triton' in sys.modules)"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_kernels_are_listed_without_triton() -> None:
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import kernel_cases\n"
        "from neuron.triton_kernels import launch\n"
        "with launch.recording(launch.target_for(90)) as recorded:\n"
        "    kernel_cases.launch_everything()\n"
        "print(len(recorded) > 100)\n"
    )
    command = [sys.executable, "-P", "-c", code]
    done = subprocess.run(command, env=WITH_SUPPORT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True"


FORWARD = """
import dataclasses, sys, torch
from neuron.models import decoder
from model_files import model_of
from neuron.triton_kernels.attention import attention_parts
from triton_interpreter import mend
from neuron.triton_kernels.operations import EAGER, KERNELS
from neuron.triton_kernels.random_batch import random_batch

mend()
torch.manual_seed(2)  # no router's choice hangs on a rounding
name, quant = sys.argv[1:]
more = {
    "gemma3": dict(sliding_window=17, layer_types=["sliding_attention", "full_attention"],
                   final_logit_softcapping=5.0, query_pre_attn_scalar=25),
    "qwen3_moe": dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, norm_topk_prob=True),
}
config = model_of(
    name, vocab_size=131, num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=2, head_dim=16,
    tie_word_embeddings=True, **more.get(name, {}),
)


class Random:
    def __init__(self):
        self.config = config

    def read_into(self, name, destination, **where):
        scale = 1.0 if destination.ndim == 1 else destination.shape[-1] ** -0.5
        destination.copy_(torch.randn(destination.shape) * scale)


loading = decoder.load_decoder(Random(), torch.float16, torch.device("cpu"), quant=quant)
while True:
    try:
        next(loading)
    except StopIteration as finished:
        weights = finished.value
        break
for lengths, decodes in (([(1, 20), (1, 3)], 2), ([(1, 33), (70, 70), (5, 21)], 1), ([(4, 4)], 0)):
    batch, pages = random_batch(lengths, torch.device("cpu"))
    arrays = (batch.cu_seqlens.numpy(), batch.page_table.numpy(), batch.context_lens.numpy())
    parts = attention_parts(*arrays, 16, torch.device("cpu"), 17 if name == "gemma3" else 0)
    batch = dataclasses.replace(batch, parts=parts, num_decodes=decodes)
    ids = torch.randint(131, (len(batch.positions),))
    results = []
    for operations in (EAGER, KERNELS):
        torch.manual_seed(1)
        num_pages = [pages] * len(config.layers)
        caches = decoder.new_caches(
            config, num_pages, 0, torch.float16, lambda shape, dtype: torch.randn(shape).to(dtype)
        ).layers
        forward = decoder.Decoder(config, weights, operations)
        hidden = forward.hidden(ids, [batch] * len(caches), caches)
        found = forward.logits(hidden)
        results.append((hidden, *(tensor for cache in caches for tensor in cache or ()), found))
    for expected, found in zip(*results):
        torch.testing.assert_close(found, expected, atol=3e-2, rtol=3e-2)
"""


@pytest.mark.parametrize(
    ("architecture", "quant"),
    [("qwen3", "none"), ("qwen2", "int8"), ("gemma3", "none"), ("gemma3", "int4"), ("qwen3_moe", "none"),
     ("qwen3_moe", "int4")],
)  # fmt: skip
def test_a_forward_pass_by_kernels_is_the_eager_one(architecture: str, quant: str) -> None:
    pytest.importorskip("triton")
    environment = {**WITH_SUPPORT, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-P", "-c", FORWARD, architecture, quant]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
