"""GGUF file read by transformers, as the reference of the engine."""

import pathlib

import torch
import transformers
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint


def transformers_model(path: pathlib.Path) -> transformers.PreTrainedModel:
    """Return the model, its weights in float32: ``from_pretrained(gguf_file=...)`` less its check for accelerate."""
    config = transformers.AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    tensors = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=model)["tensors"]
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}
    model.tie_weights()
    return model
