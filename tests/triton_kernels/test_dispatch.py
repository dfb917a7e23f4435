"""Which implementation a device gets, and that a whole forward pass by kernels is the eager one."""

import os
import subprocess
import sys

import pytest
import torch

from neuron.triton_kernels import dispatch

CUDA = torch.device("cuda", 0)


def test_the_cpu_and_float32_stay_eager() -> None:
    assert dispatch.operations_for(torch.device("cpu"), torch.bfloat16) is dispatch.EAGER
    assert dispatch.operations_for(CUDA, torch.float32) is dispatch.EAGER


def test_cuda_gets_kernels_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from neuron.triton_kernels.operations import TritonOperations

    monkeypatch.delenv("NEURON_TRITON", raising=False)
    assert isinstance(dispatch.operations_for(CUDA, torch.bfloat16), TritonOperations)
    monkeypatch.setenv("NEURON_TRITON", "off")
    assert dispatch.operations_for(CUDA, torch.bfloat16) is dispatch.EAGER


def test_a_host_without_cuda_imports_no_triton() -> None:
    code = "import neuron.engine.runner, neuron.models.prebuild, sys; print('triton' in sys.modules)"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


FORWARD = """
import dataclasses, torch
from neuron.models import decoder
from neuron.models.config import ModelConfig
from neuron.models.qwen3 import QWEN3
from neuron.triton_kernels import cases, dispatch, reference
from neuron.triton_kernels.interpreter import mend
from neuron.triton_kernels.operations import TritonOperations
mend()
torch.manual_seed(0)
config = ModelConfig(QWEN3, 131, 48, 2, 6, 2, 12, 77, 1e-6, 1e4, None, False, True, 512, (), None, None)
r = lambda *shape: (torch.randn(shape) * shape[-1] ** -0.5).to(torch.float16)
layers = tuple(
    decoder.LayerWeights(r(48), r(120, 48), r(120), 3 * r(8, 12), r(48, 72), None, r(48), r(154, 48), r(48, 77))
    for _ in range(2)
)
weights = decoder.DecoderWeights(r(131, 48), layers, r(48), r(131, 48), torch.rand(6))
for lengths, decodes in (([(1, 20), (1, 3)], 2), ([(1, 33), (70, 70), (5, 21)], 1), ([(4, 4)], 0)):
    batch, pages = cases.random_batch(lengths, torch.device("cpu"))
    arrays = (batch.cu_seqlens.numpy(), batch.page_table.numpy(), batch.context_lens.numpy())
    parts = reference.attention_parts(*arrays, 16, torch.device("cpu"))
    batch = dataclasses.replace(batch, parts=parts, num_decodes=decodes)
    ids = torch.randint(131, (len(batch.positions),))
    results = []
    for operations in (dispatch.EAGER, TritonOperations()):
        torch.manual_seed(1)
        keys, values = (torch.randn(2, pages, 16, 2, 12).to(torch.float16) for _ in range(2))
        hidden = decoder.forward(config, weights, ids, batch, keys, values, operations)
        results.append((hidden, keys, values, decoder.logits(weights, hidden, operations)))
    for expected, found in zip(*results):
        torch.testing.assert_close(found, expected, atol=2e-2, rtol=2e-2)
"""


def test_a_forward_pass_by_kernels_is_the_eager_one() -> None:
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-P", "-c", FORWARD], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
