"""Shapes that are measured; a rehearsal has all of them, small."""

import dataclasses
import json
import pathlib
from typing import Any, Final

KERNELS: Final = pathlib.Path(__file__).parents[2] / "packaging" / "kernels"
"""Folder of models' configurations, by their authors."""


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes of all measurements."""

    gemv: tuple[tuple[int, int], ...] = ((1024, 1024), (4096, 4096), (24576, 4096), (4096, 12288), (151936, 4096))
    """Output and input width of projections of few rows."""
    skinny_rows: tuple[int, ...] = (1, 8, 64)
    weights_bytes: int = 1 << 30
    """Bytes of weights that calls read one after another, so that none are in the cache; up to eight sets."""
    matmul: tuple[tuple[int, int], ...] = ((6144, 4096), (24576, 4096), (4096, 12288))
    matmul_rows: tuple[int, ...] = (16, 128, 256, 512, 2048, 8192)
    heads: tuple[tuple[int, int, int], ...] = ((32, 8, 128), (16, 8, 128), (9, 3, 64))
    """Query heads, key-value heads, width of a head."""
    prompts: tuple[int, ...] = (1024, 8192)
    contexts: tuple[tuple[int, int], ...] = ((1, 4096), (1, 32768), (32, 4096), (128, 1024))
    """Sequences and the tokens of each."""
    quantized: tuple[int, int] = (12288, 4096)
    quantized_rows: tuple[int, ...] = (1, 8, 64, 2048)
    pointwise: tuple[int, int, int] = (8192, 4096, 12288)
    """Rows, width, width of the MLP."""
    experts: tuple[int, int, int, int] = (128, 8, 768, 2048)
    """Number of experts, experts per token, their width, the model's width."""
    expert_tokens: tuple[int, ...] = (1, 32, 512)
    vocab: int = 151936
    sampled_rows: tuple[int, ...] = (1, 64)
    copy_bytes: int = 1 << 30
    models: tuple[str, ...] = ("Qwen3-0.6B", "Qwen3-1.7B", "Qwen3-8B")
    quants: tuple[tuple[str, str], ...] = (("Qwen3-8B", "int8"), ("Qwen3-8B", "int4"))
    batches: tuple[int, ...] = (1, 8, 32, 128)
    context: int = 512
    output: int = 96
    """Tokens of each sequence that are timed."""
    prefilled: tuple[str, ...] = ("Qwen3-1.7B", "Qwen3-8B")
    prefill_tokens: tuple[int, ...] = (512, 2048, 8192)
    loaded: tuple[str, ...] = ("Qwen3-0.6B", "Qwen3-1.7B")
    changes: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Changes to a model's ``config.json``."""

    def write_config(self, name: str, folder: pathlib.Path) -> None:
        """Write the ``config.json`` of a model into ``folder``."""
        values = json.loads((KERNELS / name / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**values, **self.changes}))


SMALL: Final = Sizes(
    gemv=((48, 64), (64, 48)),
    skinny_rows=(1, 3),
    weights_bytes=1 << 14,
    matmul=((64, 64),),
    matmul_rows=(70,),
    heads=((4, 2, 32),),
    prompts=(40,),
    contexts=((1, 40), (3, 20)),
    quantized=(64, 256),
    quantized_rows=(1, 3),
    pointwise=(3, 64, 48),
    experts=(4, 2, 48, 64),
    expert_tokens=(3,),
    vocab=300,
    sampled_rows=(2,),
    copy_bytes=1 << 16,
    models=("Qwen3-0.6B", "Qwen3-8B"),
    quants=(("Qwen3-8B", "int8"),),
    batches=(2,),
    context=20,
    output=4,
    prefilled=("Qwen3-8B",),
    prefill_tokens=(20,),
    loaded=("Qwen3-0.6B",),
    changes={
        "vocab_size": 300,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "max_window_layers": 2,
    },
)
"""Sizes for the interpreter, and for a first look at a GPU."""
