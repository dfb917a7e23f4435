from typing import Any, Literal, Self, TypeAlias, final

import numpy as np

_Bytes: TypeAlias = np.ndarray[Any, np.dtype[np.uint8]]
_Floats: TypeAlias = np.ndarray[Any, np.dtype[np.float32]]
_Ints: TypeAlias = np.ndarray[Any, np.dtype[np.int32]]
_Doubles: TypeAlias = np.ndarray[Any, np.dtype[np.float64]]
_Seeds: TypeAlias = np.ndarray[Any, np.dtype[np.uint64]]

class UnsupportedError(ValueError): ...

def levels() -> tuple[str, ...]: ...
def packed_bytes(format: int, rows: int, columns: int) -> int: ...
def can_pack(kind: int, format: int) -> bool: ...
def pack(
    pool: Pool,
    stored: _Bytes,
    kind: int,
    rows: int,
    columns: int,
    packed: _Bytes,
    format: int,
    *,
    first_block: int = 0,
    block_step: int = 1,
) -> None: ...
def linear(
    level: str,
    matrix: Matrix,
    x: _Floats,
    y: _Floats,
    mode: Literal["store", "add", "swiglu", "geglu"] = "store",
    *,
    into_l2: bool = False,
) -> None: ...
def rms_norm(level: str, x: _Floats, weight: _Floats, eps: float, count: int, out: _Floats) -> None: ...
def draw(
    level: str,
    logits: _Floats,
    count: int,
    scratch: _Floats,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    uniform: float = 0.5,
    cap: float = 0.0,
) -> int: ...
def uniform(seed: int, counter: int) -> float: ...

@final
class Pool:
    def __new__(cls, num_threads: int) -> Self: ...
    @property
    def num_threads(self) -> int: ...

@final
class Matrix:
    def __new__(
        cls, packed: _Bytes | None, format: int, rows: int, columns: int, bias: _Floats | None = None
    ) -> Self: ...
    def unpack_row(self, row: int, out: _Floats) -> None: ...

def kv_page_bytes(kv_dtype: str, head_dim: int) -> int: ...

@final
class Model:
    def __new__(
        cls,
        pool: Pool | None,
        level: str,
        *,
        hidden: int,
        vocab: int,
        eps: float,
        kv_dtype: Literal["bfloat16", "float32", "int8"] | str,
        max_rows: int,
        max_sequences: int,
        max_sampled: int,
        embedding_scale: float = 1.0,
        logit_cap: float = 0.0,
        windows: tuple[int, ...] = (),
        threads: int = 0,
    ) -> Self: ...
    def add_attention(
        self,
        *,
        norm: _Floats,
        eps: float,
        qkv: tuple[Matrix, ...],
        output: Matrix,
        rope: _Floats,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        scale: float,
        window_tokens: int = 0,
        gated: bool = False,
        query_growth: float = 0.0,
        query_tokens: int = 1,
        qk_norm: _Floats | None = None,
        out_norm: _Floats | None = None,
    ) -> None: ...
    def add_mlp(
        self,
        *,
        norm: _Floats,
        eps: float,
        gate_up: Matrix,
        down: Matrix,
        width: int,
        gelu: bool = False,
        out_norm: _Floats | None = None,
    ) -> None: ...
    def add_gated_delta(
        self,
        *,
        norm: _Floats,
        eps: float,
        qkv: tuple[Matrix, ...],
        z: tuple[Matrix, ...],
        gates: tuple[Matrix, ...],
        convolution: tuple[Matrix, ...],
        decay: _Floats,
        bias: _Floats,
        head_norm: _Floats,
        output: Matrix,
        num_key_heads: int,
        num_value_heads: int,
        key_dim: int,
        value_dim: int,
        width: int,
        max_drafts: int = 0,
        tiled: bool = False,
        out_norm: _Floats | None = None,
    ) -> None: ...
    def set_ends(self, embedding: Matrix, head: Matrix, norm: _Floats) -> None: ...
    @property
    def page_bytes(self) -> tuple[int, ...]: ...
    @property
    def state_bytes(self) -> int: ...
    @property
    def arena_bytes(self) -> int: ...
    def attach(self, caches: tuple[_Bytes, ...], states: _Bytes | None, arena: _Bytes) -> None: ...
    def run(
        self,
        token_ids: _Ints,
        positions: _Ints,
        slot_mappings: _Ints,
        cu_seqlens: _Ints,
        page_tables: _Ints,
        context_lens: _Ints,
        sampled: _Ints,
        hidden_rows: _Ints,
        logits: _Floats | None,
        ids: _Ints,
        finite: _Ints,
        hidden: _Floats | None,
        *,
        draws: tuple[_Doubles, _Doubles, _Doubles, _Ints, _Seeds, _Ints, _Floats] | None = None,
        later: _Ints | None = None,
        stops: _Ints | None = None,
        channel_fd: int = -1,
        state_slots: _Ints | None = None,
        replays: _Ints | None = None,
        num_decodes: int = 0,
        num_drafting: int = 0,
    ) -> int: ...
