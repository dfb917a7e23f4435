"""Sampling in eager torch: the reference of the kernels, and the sampler of a CPU.

:func:`sample_rows` has the signature and the draws of the kernel; :func:`sample` draws by inverting the distribution,
many rows at once, where there is no kernel.
"""

from typing import Any, Final

import numpy as np
import torch

from neuron.triton_kernels.sampling_rows import SamplingRows

Int32Array = np.ndarray[Any, np.dtype[np.int32]]
Float64Array = np.ndarray[Any, np.dtype[np.float64]]

TOP_P_CANDIDATES: Final = 512
"""Number of tokens that top-p tries before it sorts the whole vocabulary: 90 us against 3.2 ms a row at V = 49,152."""


def philox(seed: int, first: np.ndarray[Any, Any], second: int) -> np.ndarray[Any, np.dtype[np.uint32]]:
    """Return the first word of Philox 4x32-10 (Salmon et al., SC 2011) at the counters (first, second, 0, 0)."""
    low = np.uint64(0xFFFF_FFFF)
    c = [first.astype(np.uint64), np.full(len(first), second, np.uint64), *np.zeros((2, len(first)), np.uint64)]
    key = [np.uint64(seed & 0xFFFF_FFFF), np.uint64(seed >> 32 & 0xFFFF_FFFF)]
    for _ in range(10):
        product_0, product_2 = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        c = [
            (product_2 >> np.uint64(32)) ^ c[1] ^ key[0],
            product_2 & low,
            (product_0 >> np.uint64(32)) ^ c[3] ^ key[1],
            product_0 & low,
        ]
        key = [(key[0] + np.uint64(0x9E3779B9)) & low, (key[1] + np.uint64(0xBB67AE85)) & low]
    word: np.ndarray[Any, np.dtype[np.uint32]] = c[0].astype(np.uint32)
    return word


def sample_rows(logits: torch.Tensor, rows: SamplingRows) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a token id int32 ``[R]`` and its log-probability ``[R]`` for each row of ``logits`` ``[R, V]`` float32.

    As :mod:`neuron.triton_kernels.sampling`, by sorting; a row with a NaN or an infinity, or with no token allowed,
    gets -1.
    """
    num_rows, vocab_size = logits.shape
    ids = torch.full((num_rows,), -1, dtype=torch.int32, device=logits.device)
    logprobs = torch.full((num_rows,), torch.nan, device=logits.device)
    for row in range(num_rows):
        x = logits[row].double()
        if not x.isfinite().all():
            continue
        own = x.log_softmax(-1)
        slot = int(rows.slots[row]) if rows.slots is not None else 0
        if rows.penalties is not None and rows.counts is not None and rows.in_prompt is not None:
            repetition, presence, frequency = rows.penalties[row].tolist()
            counts = rows.counts[slot]
            seen = (counts > 0) | rows.in_prompt[slot]
            x = torch.where(seen, torch.where(x > 0, x / repetition, x * repetition), x)
            x = x - frequency * counts - presence * (counts > 0)
        if rows.allowed is not None:
            bits = rows.allowed[row].repeat_interleave(32)[:vocab_size] >> (
                torch.arange(vocab_size, device=logits.device, dtype=torch.int32) % 32
            )
            x = x.masked_fill(bits & 1 == 0, -torch.inf)
        if rows.bias_tokens is not None and rows.bias_values is not None:
            used = rows.bias_tokens[row] >= 0
            x = x.index_add(0, rows.bias_tokens[row][used].long(), rows.bias_values[row][used].double())
        if x.max() == -torch.inf:
            continue
        temperature = float(rows.temperature[row])
        if temperature > 0:
            x = x / temperature
            top_k = int(rows.top_k[row])
            if 0 < top_k < vocab_size:
                x = x.masked_fill(x < x.topk(top_k).values[-1], -torch.inf)
            descending, order = x.sort(descending=True)
            chances = descending.softmax(-1)
            above = chances.cumsum(-1) - chances
            dropped = above >= max(float(rows.top_p[row]), 1e-30) if rows.top_p[row] < 1 else above < -1
            dropped |= chances < float(rows.min_p[row]) * chances[0]
            x = x.masked_fill(torch.zeros_like(dropped).index_put((order,), dropped), -torch.inf)
            drawn = philox(int(rows.seeds[row]), np.arange(vocab_size), int(rows.counters[row]))
            u = torch.from_numpy(((drawn >> np.uint32(8)).astype(np.float64) + 0.5) * 2.0**-24).to(x.device)
            x = x - (-u.log()).log()
        token = int(x.argmax())
        ids[row] = token
        logprobs[row] = own[token]
        if rows.penalties is not None and rows.counts is not None:
            rows.counts[slot, token] += 1
    return ids, logprobs


def sample(
    logits: torch.Tensor,
    temperature: Float64Array,
    top_k: Int32Array,
    top_p: Float64Array,
    min_p: Float64Array,
    uniform: Float64Array,
) -> torch.Tensor:
    """Return a token id int64 ``[R]`` for each row of ``logits`` ``[R, V]`` float32; the other arrays are ``[R]``.

    Temperature 0 is greedy. The filters apply in the order top-k (0: off), top-p of what that leaves (1: off), min-p
    relative to the likeliest. A token is drawn by inverting the distribution at ``uniform``, one number in [0, 1) a
    row, so a row's draw depends only on its own logits and number. Gumbel noise from a generator per row would
    do the same at 770 us a row; the running sum takes 33.
    """
    greedy = temperature == 0
    if greedy.all():
        return logits.argmax(-1)
    filtered = ~greedy & ((top_k > 0) | (top_p < 1))
    ids = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
    for which in (greedy, ~greedy & ~filtered, filtered):
        if not which.any():
            continue
        everything = bool(which.all())
        rows = torch.from_numpy(np.flatnonzero(which)).to(logits.device)
        x = logits if everything else logits.index_select(0, rows)
        if which is greedy:
            drawn = x.argmax(-1)
        else:
            scaled = x / _column(temperature[which], x)
            number, floor = _column(uniform[which], x, torch.float64), _column(min_p[which], x)
            if which is filtered:
                drawn = _sample_filtered(scaled, top_k[which], top_p[which], floor, number)
            else:
                drawn = _invert(scaled.softmax(-1), floor, number)
        ids = drawn if everything else ids.index_copy_(0, rows, drawn)
    return ids


def _sample_filtered(
    logits: torch.Tensor, top_k: Int32Array, top_p: Float64Array, min_p: torch.Tensor, uniform: torch.Tensor
) -> torch.Tensor:
    vocab_size = logits.shape[-1]
    whole = top_k == 0
    width = min(vocab_size, max(int(top_k.max()), TOP_P_CANDIDATES if whole.any() else 1))
    mass = logits.logsumexp(-1, keepdim=True)
    limit = _column(top_p, logits, torch.float64)
    while True:
        values, candidates = logits.topk(width)
        if not whole.all():
            kept = _column(np.where(whole, width, top_k), logits, torch.int32)
            beyond = torch.arange(width, device=logits.device) >= kept
            values = values.masked_fill(beyond, -torch.inf)
            mass = torch.where(_column(whole, logits, torch.bool), mass, values.logsumexp(-1, keepdim=True))
        probabilities = (values - mass).exp()
        running = probabilities.cumsum(-1, dtype=torch.float64)
        # Rare: a flat distribution, or top_p close to 1. A row that top_k bounds has all its candidates already.
        if width == vocab_size or not bool(((running[:, -1:] < limit)[torch.from_numpy(whole).to(limit.device)]).any()):
            break
        width = vocab_size
    dropped = running - probabilities >= limit
    dropped[:, 0] = False
    drawn = _invert(probabilities.masked_fill_(dropped, 0.0), min_p, uniform)
    return candidates.gather(-1, drawn.unsqueeze(-1)).squeeze(-1)


def _invert(probabilities: torch.Tensor, min_p: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Return the first index whose running sum exceeds ``uniform`` of the total; the sum is in float64."""
    probabilities.masked_fill_(probabilities < min_p * probabilities.amax(-1, keepdim=True), 0.0)
    running = probabilities.cumsum(-1, dtype=torch.float64)
    index = torch.searchsorted(running, uniform * running[:, -1:], right=True).squeeze(-1)
    return index.clamp_(max=probabilities.shape[-1] - 1)  # only a row of NaN gets that far


def _column(values: np.ndarray[Any, Any], like: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.from_numpy(values).to(like.device, dtype).unsqueeze(-1)
