"""Packing of a checkpoint for the CPU kernels: from the mapped file, matrix by matrix, on all threads.

Kinds that can be packed from their own blocks are not dequantised; others pass through float32 one matrix at a time.
"""

import dataclasses
import mmap
from collections.abc import Generator
from typing import Any, Final

import numpy as np
import torch

from neuron.cpu_kernels import native
from neuron.models import packed
from neuron.models.config import ModelConfig
from neuron.models.gguf import TensorKind
from neuron.models.packed import Format
from neuron.models.rope import inverse_frequencies
from neuron.models.weights import PackedBytes, WeightSource

Vector = np.ndarray[Any, np.dtype[np.float32]]

HUGE_PAGE_BYTES: Final = 2 << 20


@dataclasses.dataclass(frozen=True, slots=True)
class PackedLayer:
    """Packed weights of a layer. Vectors are float32, padded to whole registers."""

    input_norm: Vector
    qkv: tuple[native.Matrix, native.Matrix, native.Matrix]
    qk_norm: Vector | None
    """``[(H + K) D]``: the query norm's weights for each query head, then the key norm's for each key head."""
    output: native.Matrix
    post_norm: Vector
    attention_out_norm: Vector | None
    mlp_out_norm: Vector | None
    gate_up: native.Matrix
    """Alternating blocks of 16 rows of gate and up."""
    down: native.Matrix


@dataclasses.dataclass(frozen=True, slots=True)
class PackedWeights:
    """Packed weights of a model, in one region of memory."""

    region: PackedBytes
    embedding: native.Matrix
    head: native.Matrix
    norm: Vector
    frequencies: Vector
    window_frequencies: Vector | None
    layers: tuple[PackedLayer, ...]


def huge_pages(num_bytes: int) -> PackedBytes:
    """Return zeroed memory on huge pages where the system has them, aligned to them, freed with the array.

    A pass over 97 MB of weights touches 23,600 small pages or 47 huge ones.
    """
    # Private: shared pages, the default, are never huge.
    mapped = mmap.mmap(-1, num_bytes + HUGE_PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        try:
            mapped.madvise(mmap.MADV_HUGEPAGE)
        except OSError:  # a kernel without transparent huge pages
            pass
    array = np.frombuffer(mapped, np.uint8)
    start = -array.ctypes.data % HUGE_PAGE_BYTES
    return array[start : start + num_bytes]


class _Packer:
    """Packer that fills one region from its start."""

    def __init__(self, source: WeightSource, dtype: str, pool: native.Pool) -> None:
        self.source = source
        self.config = source.config
        self.dtype = dtype
        self.pool = pool
        self.shapes = self.config.tensor_shapes()
        self.region = huge_pages(packed.weights_bytes(self.config, dtype))
        self._used = 0

    def take(self, num_bytes: int) -> PackedBytes:
        start = self._used
        self._used += num_bytes
        if self._used > len(self.region):
            raise RuntimeError(f"the plan counted {len(self.region)} bytes of weights, {self._used} are needed")
        return self.region[start : self._used]

    def vector(self, *names: str, repeats: tuple[int, ...] | None = None) -> Vector:
        """Return the vectors ``names`` concatenated, each repeated as in ``repeats``, padded together."""
        parts = []
        for name, count in zip(names, repeats or (1,) * len(names), strict=True):
            values = torch.empty(self.shapes[name], dtype=torch.float32)
            self.source.read_into(name, values)
            parts += [values.numpy()] * count
        return self.constant(np.concatenate(parts))

    def constant(self, values: Vector) -> Vector:
        """Return a copy in the region, padded with zeros."""
        kept = self.take(4 * packed.padded(len(values))).view(np.float32)
        kept[: len(values)] = values
        return kept

    def matrix(self, name: str, format: Format, bias: str | None = None) -> native.Matrix:
        """Pack a matrix."""
        rows, columns = self.shapes[name]
        to = self.take(native.packed_bytes(format, rows, columns))
        self._pack(name, to, format)
        return native.Matrix(to, format, rows, columns, self.vector(bias) if bias is not None else None)

    def alternating(self, names: tuple[str, str], format: Format) -> native.Matrix:
        """Pack two matrices of one shape with alternating blocks."""
        rows, columns = self.shapes[names[0]]
        to = self.take(2 * native.packed_bytes(format, rows, columns))
        for first, name in enumerate(names):
            self._pack(name, to, format, first_block=first, block_step=2)
        return native.Matrix(to, format, 2 * packed.padded(rows), columns)

    def _pack(self, name: str, to: PackedBytes, format: Format, *, first_block: int = 0, block_step: int = 1) -> None:
        rows, columns = self.shapes[name]
        stored = self.source.read_stored(name)
        head = self.config.head_dim if stored is not None and stored.interleaves_heads else 0
        if stored is not None and native.can_pack(stored.kind, format):
            kind, values = stored.kind, stored.packed
        else:
            whole = torch.empty((rows, columns), dtype=torch.float32)
            self.source.read_into(name, whole)
            kind, values, head = TensorKind.F32, whole.view(-1).view(torch.uint8).numpy(), 0
        native.pack(
            self.pool,
            values,
            kind,
            rows,
            columns,
            to,
            format,
            interleaved_head=head,
            first_block=first_block,
            block_step=block_step,
        )


def load_packed(source: WeightSource, dtype: str, pool: native.Pool) -> Generator[float, None, PackedWeights]:
    """Read a checkpoint; yield the share done after each layer, return the weights."""
    config = source.config
    packer = _Packer(source, dtype, pool)
    embedding = packer.matrix("model.embed_tokens.weight", packed.format_of(config, "model.embed_tokens.weight", dtype))
    layers = []
    for number in range(config.num_layers):
        yield (number + 1) / (config.num_layers + 2)
        layers.append(_load_layer(packer, number))
    yield (config.num_layers + 1) / (config.num_layers + 2)
    head = embedding
    if not config.tie_embeddings:
        head = packer.matrix("lm_head.weight", packed.format_of(config, "lm_head.weight", dtype))
    angles = inverse_frequencies(config.rope_theta, config.head_dim, config.rope_scaling)
    window_frequencies = None
    if config.windowed_layers:
        window_angles = inverse_frequencies(config.window_rope_theta, config.head_dim, None)
        window_frequencies = packer.constant(np.array(window_angles, np.float32))
    return PackedWeights(
        region=packer.region,
        embedding=embedding,
        head=head,
        norm=packer.vector("model.norm.weight"),
        frequencies=packer.constant(np.array(angles, np.float32)),
        window_frequencies=window_frequencies,
        layers=tuple(layers),
    )


def _load_layer(packer: _Packer, number: int) -> PackedLayer:
    config = packer.config
    formats = packed.layer_formats(config, number, packer.dtype)
    prefix = f"model.layers.{number}."
    attention, mlp = prefix + "self_attn.", prefix + "mlp."

    def bias_of(which: str) -> str | None:
        name = f"{attention}{which}.bias"
        return name if name in packer.shapes else None

    def projection(which: str) -> native.Matrix:
        return packer.matrix(f"{attention}{which}.weight", formats[which], bias_of(which))

    qk_norm = None
    if config.architecture.qk_norm:
        names = (attention + "q_norm.weight", attention + "k_norm.weight")
        qk_norm = packer.vector(*names, repeats=(config.num_heads, config.num_kv_heads))
    sandwich = config.architecture.sandwich_norms
    return PackedLayer(
        input_norm=packer.vector(prefix + "input_layernorm.weight"),
        qkv=(projection("q_proj"), projection("k_proj"), projection("v_proj")),
        qk_norm=qk_norm,
        output=projection("o_proj"),
        post_norm=packer.vector(prefix + f"{'pre_feedforward' if sandwich else 'post_attention'}_layernorm.weight"),
        attention_out_norm=packer.vector(prefix + "post_attention_layernorm.weight") if sandwich else None,
        mlp_out_norm=packer.vector(prefix + "post_feedforward_layernorm.weight") if sandwich else None,
        gate_up=packer.alternating((mlp + "gate_proj.weight", mlp + "up_proj.weight"), formats["gate_proj"]),
        down=packer.matrix(mlp + "down_proj.weight", formats["down_proj"]),
    )


def embedding_scale(config: ModelConfig, dtype: str) -> float:
    """Return the factor of embeddings: rounded to the dtype, as these models were trained."""
    if not config.architecture.scales_embedding:
        return 1.0
    return float(torch.tensor(config.hidden_size**0.5, dtype=getattr(torch, dtype)))


def make_model(
    config: ModelConfig,
    weights: PackedWeights,
    pool: native.Pool,
    level: str,
    *,
    dtype: str,
    kv_dtype: str,
    rows: int,
    sequences: int,
    sampled: int,
) -> native.Model:
    """Return the executor's model of ``weights``, without a cache, for steps of at most so many rows and sequences."""
    model = native.Model(
        pool,
        level,
        num_layers=config.num_layers,
        hidden=config.hidden_size,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        intermediate=config.intermediate_size,
        vocab=config.vocab_size,
        eps=config.rms_norm_eps,
        kv_dtype=kv_dtype,
        max_rows=rows,
        max_sequences=sequences,
        max_sampled=sampled,
        embedding_scale=embedding_scale(config, dtype),
        attention_scale=config.attention_scale,
        gelu=config.architecture.activation != "silu",
        window_tokens=config.window_tokens if config.windowed_layers else 0,
        logit_cap=config.logit_cap,
    )
    qk_norm_length = (config.num_heads + config.num_kv_heads) * config.head_dim
    half = config.head_dim // 2
    model.set_ends(
        weights.embedding,
        weights.head,
        weights.norm,
        weights.frequencies[:half],
        None if weights.window_frequencies is None else weights.window_frequencies[:half],
    )
    for number, layer in enumerate(weights.layers):
        model.set_layer(
            number,
            input_norm=layer.input_norm,
            post_norm=layer.post_norm,
            qk_norm=None if layer.qk_norm is None else layer.qk_norm[:qk_norm_length],
            query=layer.qkv[0],
            key=layer.qkv[1],
            value=layer.qkv[2],
            output=layer.output,
            gate_up=layer.gate_up,
            down=layer.down,
            attention_out_norm=layer.attention_out_norm,
            mlp_out_norm=layer.mlp_out_norm,
            windowed=number in config.windowed_layers,
        )
    return model
