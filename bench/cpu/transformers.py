"""Measure transformers in bfloat16 on the same weights, dequantised, and print the figures as JSON, for ``run.py``."""

import json
import pathlib
import sys
import time

import numpy as np
import torch
import transformers
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from neuron.device.probe import usable_cores

REPEATS, TOKENS = 2, 32


def load(path: pathlib.Path) -> transformers.PreTrainedModel:
    """Return the model in bfloat16, as from_pretrained without its check for accelerate."""
    config = transformers.AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    model.load_state_dict(load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=model)["tensors"], False)
    model.tie_weights()
    return model


def main() -> None:
    """Measure and print."""
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(usable_cores())
    start = time.perf_counter()
    model = load(pathlib.Path(sys.argv[1]))
    found = {"load_s": time.perf_counter() - start}
    ids = torch.from_numpy(np.random.default_rng(0).integers(100, 49000, (1, 512)))
    with torch.inference_mode():
        best = 0.0
        for _ in range(REPEATS):
            start = time.perf_counter()
            model(ids, use_cache=True)
            best = max(best, 512 / (time.perf_counter() - start))
        found["prompt_512"] = best
        for streams in (1, 8):
            times = []
            for count in (1, 1 + TOKENS):
                batch = ids[:, :64].expand(streams, -1)
                start = time.perf_counter()
                settings = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False, "pad_token_id": 0}
                model.generate(batch, attention_mask=torch.ones_like(batch), **settings)
                times.append(time.perf_counter() - start)
            found[f"generate_{streams}"] = streams * TOKENS / (times[1] - times[0])
    print(json.dumps(found))


if __name__ == "__main__":
    main()
