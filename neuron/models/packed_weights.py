"""Packing of a checkpoint for the CPU kernels: from the mapped file, matrix by matrix, on all threads.

Kinds that can be packed from their own blocks are not dequantised; others pass through float32 one matrix at a time.
"""

import dataclasses
import itertools
import mmap
from collections.abc import Generator
from typing import Any, Final

import numpy as np
import torch

from neuron.cpu_kernels import native
from neuron.formats.scheme import Scheme
from neuron.layers.attention import Attention
from neuron.layers.parameters import Constant, Matrix, Parameters, Tensor, Vector
from neuron.models import packed
from neuron.models.gguf import TensorKind
from neuron.models.model import ModelConfig
from neuron.models.packed import Format
from neuron.models.weights import PackedBytes, WeightSource

Floats = np.ndarray[Any, np.dtype[np.float32]]
PackedParameters = dict[str, Any]
"""Packed parameters of a layer by name: float32 of whole registers, or the tuple of a matrix's native matrices."""

HUGE_PAGE_BYTES: Final = 2 << 20


@dataclasses.dataclass(frozen=True, slots=True)
class PackedWeights:
    """Packed weights of a model, in one region of memory."""

    region: PackedBytes
    embedding: PackedParameters
    blocks: tuple[tuple[PackedParameters, ...], ...]
    head: PackedParameters


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
        self.region = huge_pages(packed.weights_bytes(self.config, dtype))
        self._used = 0
        self._constants: dict[Constant, Floats] = {}

    def pack(self, parameters: Parameters) -> PackedParameters:
        """Return the packed parameters of a layer."""
        return {name: self._packed(parameter) for name, parameter in parameters.items()}

    def _packed(self, parameter: Vector | Matrix | Constant) -> Floats | tuple[native.Matrix, ...]:
        match parameter:
            case Vector():
                repeats = parameter.repeats or (1,) * len(parameter.tensors)
                return self._floats(
                    [
                        each
                        for tensor, n in zip(parameter.tensors, repeats, strict=True)
                        for each in [self._read(tensor)] * n
                    ]
                )
            case Matrix():
                formats = packed.formats(parameter, self.config.tensor_kinds, self.dtype)
                if parameter.gated:
                    return (self._alternating(parameter.tensors, formats[0]),)
                biases = [self._floats([self._read(bias)]) for bias in parameter.biases]
                each = itertools.zip_longest(parameter.tensors, formats, biases)
                return tuple(self._matrix(*matrix) for matrix in each)
            case Constant():
                if parameter not in self._constants:
                    self._constants[parameter] = self._floats([np.array(parameter.values, np.float32)])
                return self._constants[parameter]

    def _take(self, num_bytes: int) -> PackedBytes:
        start = self._used
        self._used += num_bytes
        if self._used > len(self.region):
            raise RuntimeError(f"the plan counted {len(self.region)} bytes of weights, {self._used} are needed")
        return self.region[start : self._used]

    def _read(self, tensor: Tensor) -> Floats:
        values = torch.empty(tensor.shape, dtype=torch.float32)
        self.source.read_into(tensor.name, values)
        found: Floats = values.numpy()
        return found

    def _floats(self, parts: list[Floats]) -> Floats:
        """Return a copy of vectors in the region, concatenated and padded with zeros."""
        values = np.concatenate(parts)
        kept = self._take(4 * packed.padded(len(values))).view(np.float32)
        kept[: len(values)] = values
        return kept

    def _matrix(self, tensor: Tensor, format: Format, bias: Floats | None) -> native.Matrix:
        rows, columns = tensor.shape
        to = self._take(native.packed_bytes(format, rows, columns))
        self._pack(tensor, to, format)
        return native.Matrix(to, format, rows, columns, bias)

    def _alternating(self, tensors: tuple[Tensor, ...], format: Format) -> native.Matrix:
        """Pack two matrices of one shape with alternating blocks."""
        rows, columns = tensors[0].shape
        to = self._take(2 * native.packed_bytes(format, rows, columns))
        for first, tensor in enumerate(tensors):
            self._pack(tensor, to, format, first_block=first, block_step=2)
        return native.Matrix(to, format, 2 * packed.padded(rows), columns)

    def _pack(
        self, tensor: Tensor, to: PackedBytes, format: Format, *, first_block: int = 0, block_step: int = 1
    ) -> None:
        rows, columns = tensor.shape
        # A scheme's scales are rounded for GGUF's blocks, which is for the formats of integers alone.
        rounds = isinstance(self.config.tensor_kinds.get(tensor.name), Scheme)
        stored = None if rounds and format >= Format.W16 else self.source.read_stored(tensor.name)
        if stored is not None and native.can_pack(stored.kind, format):
            kind, values = stored.kind, stored.rows(rows, 0, rows).reshape(-1)
        else:
            kind, values = TensorKind.F32, self._read(tensor).reshape(-1).view(np.uint8)
        native.pack(
            self.pool,
            values,
            kind,
            rows,
            columns,
            to,
            format,
            first_block=first_block,
            block_step=block_step,
        )


def load_packed(source: WeightSource, dtype: str, pool: native.Pool) -> Generator[float, None, PackedWeights]:
    """Read a checkpoint; yield the share done before each layer, return the weights."""
    config = source.config
    packer = _Packer(source, dtype, pool)
    loaded = []
    for number, parameters in enumerate(config.parameters()):
        yield (number + 1) / (len(config.layers) + 3)
        loaded.append(packer.pack(parameters))
    embedding, *layers, head = loaded
    rest = iter(layers)
    blocks = tuple(tuple(next(rest) for _ in block) for block in config.blocks)
    return PackedWeights(packer.region, embedding, blocks, {"matrix": embedding["table"], **head})


def embedding_scale(config: ModelConfig, dtype: str) -> float:
    """Return the factor of embeddings: rounded to the dtype, as these models were trained."""
    return float(torch.tensor(config.embedding.scale, dtype=getattr(torch, dtype)))


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
    has_window_table: bool = False,
) -> native.Model:
    """Return the executor's model of ``weights``, without a cache, for steps of at most so many rows and sequences."""
    sizes = packed.sizes(config)
    attention, mlp = sizes.attention, sizes.mlp
    model = native.Model(
        pool,
        level,
        num_layers=len(config.blocks),
        hidden=config.hidden_size,
        num_heads=attention.num_heads,
        num_kv_heads=attention.num_kv_heads,
        head_dim=attention.head_dim,
        intermediate=mlp.width,
        vocab=config.vocab_size,
        eps=attention.norm.eps,
        kv_dtype=kv_dtype,
        max_rows=rows,
        max_sequences=sequences,
        max_sampled=sampled,
        embedding_scale=embedding_scale(config, dtype),
        attention_scale=attention.scale,
        gelu=mlp.activation != "silu",
        windows=tuple(window for _, window in sizes.kinds),
        logit_cap=config.head.logit_cap,
        has_window_table=has_window_table,
        query_growth=attention.query_growth.factor,
        query_tokens=attention.query_growth.context_tokens,
    )
    ropes: dict[packed.Kind, Floats] = {}
    for number, ((layer, _), (own, its_mlp)) in enumerate(zip(config.blocks, weights.blocks, strict=True)):
        assert isinstance(layer, Attention)
        kind = packed.kind_of(layer)
        ropes[kind] = own["rope"][: attention.head_dim]
        query, key, value = own["qkv"]
        qk_norm = own.get("qk_norm")
        model.set_layer(
            number,
            input_norm=own["norm"],
            post_norm=its_mlp["norm"],
            qk_norm=None if qk_norm is None else qk_norm[: (layer.num_heads + layer.num_kv_heads) * layer.head_dim],
            query=query,
            key=key,
            value=value,
            output=own["output"][0],
            gate_up=its_mlp["gate_up"][0],
            down=its_mlp["down"][0],
            attention_out_norm=own.get("out_norm"),
            mlp_out_norm=its_mlp.get("out_norm"),
            kind=sizes.kinds.index(kind),
        )
    each = tuple(ropes[kind] for kind in sizes.kinds)
    model.set_ends(weights.embedding["table"][0], weights.head["matrix"][0], weights.head["norm"], each)
    return model
