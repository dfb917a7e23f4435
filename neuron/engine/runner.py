"""Execute a plan on a model: the one place of the engine where tensors are made.

``run(plan)`` is the whole interface of an executor; this one is eager torch. It owns the KV cache and the sampler's
tables, and knows sequences only by their rows, seats and pages.
"""

import mmap
from typing import Final

import numpy as np
import torch

from neuron.engine.plan import StepPlan
from neuron.engine.sampler import NON_FINITE, Sampler
from neuron.engine.sequence import Int32Array
from neuron.models import decoder
from neuron.models.config import ModelConfig
from neuron.models.sizing import PAGE_TOKENS, MemoryPlan
from neuron.triton_kernels.batch import Batch
from neuron.triton_kernels.reference import attention_parts

NOT_SAMPLED: Final = -2
"""What :meth:`Runner.run` returns for a sequence in the middle of its prompt."""


class Runner:
    """One loaded model on one device."""

    def __init__(
        self, config: ModelConfig, weights: decoder.DecoderWeights, plan: MemoryPlan, device: torch.device
    ) -> None:
        self.config = config
        self.device = device
        self._weights = weights
        # One more page than the pool hands out: page 0 pads page tables.
        shape = (config.num_layers, plan.num_pages + 1, PAGE_TOKENS, config.num_kv_heads, config.head_dim)
        self._keys = zeros(shape, weights.dtype, device)
        self._values = zeros(shape, weights.dtype, device)
        self.sampler = Sampler(plan.max_sequences, config.vocab_size, device)

    @torch.inference_mode()
    def run(self, plan: StepPlan) -> Int32Array:
        """Compute a step; return a token id int32 ``[B]`` per sequence: NOT_SAMPLED or NON_FINITE if it has none.

        A NaN anywhere in a sequence reaches its last row by way of attention, so that row tells of the whole chunk.
        """
        batch = Batch(
            positions=self._to_device(plan.positions),
            slots=self._to_device(plan.slots).to(torch.int64),
            cu_seqlens=self._to_device(plan.cu_seqlens),
            page_table=self._to_device(plan.page_table),
            context_lens=self._to_device(plan.context_lens),
            num_decodes=plan.num_decodes,
            parts=attention_parts(
                plan.cu_seqlens, plan.page_table, plan.context_lens, PAGE_TOKENS, self.device, self.config.window_tokens
            ),
        )
        token_ids = self._to_device(plan.token_ids)
        hidden = decoder.forward(self.config, self._weights, token_ids, batch, self._keys, self._values)
        if len(hidden) != len(plan.sequences):
            hidden = hidden.index_select(0, batch.cu_seqlens[1:] - 1)
        ids = torch.full((len(hidden),), NOT_SAMPLED, dtype=torch.int32, device=self.device)
        ids.masked_fill_(~hidden.sum(-1, dtype=torch.float32).isfinite(), NON_FINITE)
        if len(plan.sampled):
            everyone = len(plan.sampled) == len(hidden)
            rows = self._to_device(plan.sampled).to(torch.int64)
            chosen = hidden if everyone else hidden.index_select(0, rows)
            logits = decoder.logits(self._weights, chosen, cap=self.config.logit_cap)
            sampled = self.sampler.sample(logits, plan.seats[plan.sampled], plan.num_output[plan.sampled])
            ids.index_copy_(0, rows, sampled)
        return ids.cpu().numpy()

    def clear_pages(self, pages: Int32Array) -> None:
        """Zero ``pages``, so that a NaN in them cannot reach the next sequence they are given to.

        What lies beyond a sequence's end in its last page is masked, and zero times NaN is NaN.
        """
        chosen = torch.from_numpy(pages).to(self.device, torch.int64)
        self._keys[:, chosen] = 0
        self._values[:, chosen] = 0

    def _to_device(self, array: Int32Array) -> torch.Tensor:
        return torch.from_numpy(array).to(self.device)


def zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return zeros; on a CPU in memory that is not there until it is used, and that goes when the tensor goes.

    ``torch.zeros`` writes them, 2 GiB in 0.4 s, and takes them from a heap that may keep them.
    """
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    nbytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    return torch.frombuffer(mmap.mmap(-1, nbytes), dtype=dtype).view(shape)
