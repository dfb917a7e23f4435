"""The sampler where there are kernels: one launch for all rows, with every setting.

A captured step has the kernel in it for rows that draw plainly (:meth:`DeviceSampler.draws_plainly`); all others, and
all steps that are not captured, come here. A seed gives the same tokens either way, but others than :class:`Sampler`.
"""

import dataclasses
from collections.abc import Callable

import numpy as np
import torch

from neuron.engine.sampler import Sampler
from neuron.engine.sequence import Float32Array, Int32Array
from neuron.engine.staging import Array, to_device, together
from neuron.triton_kernels.sampling_rows import SamplingRows

Draw = Callable[[torch.Tensor, SamplingRows], tuple[torch.Tensor, torch.Tensor]]


class DeviceSampler(Sampler):
    """The sampling state of one model's running sequences; ``draw`` is the kernel."""

    def __init__(self, max_sequences: int, vocab_size: int, device: torch.device, draw: Draw) -> None:
        super().__init__(max_sequences, vocab_size, device)
        self._draw = draw

    def sample(self, logits: torch.Tensor, slots: Int32Array, num_output: Int32Array) -> torch.Tensor:
        """See :meth:`Sampler.sample`; ``logits`` are left as they are."""
        ids, _ = self._draw(logits, self._rows(slots, num_output))
        reported = np.flatnonzero(self._top_logprobs[slots] >= 0)
        self.report = None
        if len(reported):
            raw = logits[to_device(reported, self._device)]
            # A row that is not finite has no id, and its report is never read.
            self.report = self._report(raw, ids.clamp(min=0).to(torch.int64), reported, slots)
        return ids

    def _rows(self, slots: Int32Array, num_output: Int32Array) -> SamplingRows:
        draws = self.draws(slots, num_output)
        arrays: list[Array] = [
            draws.temperature.astype(np.float32),
            draws.top_k,
            draws.top_p.astype(np.float32),
            draws.min_p.astype(np.float32),
            draws.seeds.view(np.int64),
            draws.num_output,
        ]
        chosen = slots.tolist()
        if not (self._penalised[slots].any() or any(slot in self._bias or slot in self._masks for slot in chosen)):
            return SamplingRows(*together(arrays, self._device))
        # All three for all rows, so that there are two kernels and not eight: other rows get neutral values.
        arrays += [slots, self._penalties[slots].astype(np.float32), *self._biases(chosen), self._allowed(chosen)]
        there = together(arrays, self._device)
        counts, in_prompt = self._tables()
        *plain, rows, penalties, tokens, values, allowed = there
        return dataclasses.replace(
            SamplingRows(*plain),
            slots=rows,
            penalties=penalties,
            counts=counts,
            in_prompt=in_prompt,
            bias_tokens=tokens,
            bias_values=values,
            allowed=allowed,
        )

    def _biases(self, slots: list[int]) -> tuple[Int32Array, Float32Array]:
        width = max([1, *(len(self._bias[slot][0]) for slot in slots if slot in self._bias)])
        tokens: Int32Array = np.full((len(slots), width), -1, np.int32)
        values: Float32Array = np.zeros((len(slots), width), np.float32)
        for row, slot in enumerate(slots):
            if slot in self._bias:
                own_tokens, own_values = self._bias[slot]
                tokens[row, : len(own_tokens)] = own_tokens
                values[row, : len(own_values)] = own_values
        return tokens, values

    def _allowed(self, slots: list[int]) -> Int32Array:
        allowed: Int32Array = np.full((len(slots), -(-self._vocab_size // 32)), -1, np.int32)
        for row, slot in enumerate(slots):
            if slot in self._masks:
                allowed[row] = self._masks[slot]
        return allowed
