"""Train the small models of gated delta nets that tests run: ``python tests/support/train_hybrid.py qwen3_5``.

Random weights hide faults: their logits are flat, their states are soon forgotten, and no draft of theirs is right.
These models have read this project's documents and short conversations, whose answers repeat what was said before, in
transformers' own modules, with a head that drafts tokens (its loss is of the token after the next). ``tests/data`` has
them as they are published: weights in bfloat16, with the record of the training among the file's metadata, tokenizer,
and a chat template with reasoning. One thread is several times as quick as two where other processes run.
"""

import argparse
import functools
import hashlib
import importlib
import json
import math
import pathlib
import random
import re
import time
from collections.abc import Iterator
from typing import Any

import jinja2
import tokenizers
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import decoders, models, pre_tokenizers, trainers
from torch.nn import functional
from transformers.modeling_layers import MtpLayer

ROOT = pathlib.Path(__file__).parents[2]
FOLDER = ROOT / "tests" / "data"
SEED, STEPS, BATCH, LENGTH = 1, 560, 4, 256
LEARNING_RATE, DRAFT_WEIGHT, BALANCE_WEIGHT = 3e-3, 0.3, 0.01

SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
MARKS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>")
NUM_TOKENS = 1000  # fewer than rows of the embedding, as in published models

CONFIG: dict[str, Any] = {
    "vocab_size": 1024, "hidden_size": 128, "num_hidden_layers": 4, "full_attention_interval": 4,
    "layer_types": [*["linear_attention"] * 3, "full_attention"], "num_attention_heads": 6, "num_key_value_heads": 2,
    "head_dim": 32, "linear_num_key_heads": 2, "linear_key_head_dim": 32, "linear_value_head_dim": 32,
    "linear_conv_kernel_dim": 4, "hidden_act": "silu", "rms_norm_eps": 1e-6, "attention_bias": False,
    "attn_output_gate": True, "max_position_embeddings": 4096, "mtp_num_hidden_layers": 1,
    "mtp_use_dedicated_embeddings": False, "mamba_ssm_dtype": "float32", "dtype": "bfloat16",
    "bos_token_id": None, "eos_token_id": NUM_TOKENS - len(MARKS) - len(SPECIAL),
    "rope_parameters": {
        "rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25, "mrope_section": [2, 1, 1],
        "mrope_interleaved": True,
    },
}  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {
    "qwen3_5": {
        **CONFIG, "architectures": ["Qwen3_5ForCausalLM"], "model_type": "qwen3_5_text", "intermediate_size": 384,
        "linear_num_value_heads": 6, "tie_word_embeddings": True,
    },
    "qwen3_5_moe": {
        **CONFIG, "architectures": ["Qwen3_5MoeForCausalLM"], "model_type": "qwen3_5_moe_text", "num_experts": 8,
        "num_experts_per_tok": 2, "moe_intermediate_size": 64, "shared_expert_intermediate_size": 64,
        "linear_num_value_heads": 4, "tie_word_embeddings": False,
    },
}  # fmt: skip

TEMPLATE = """\
{%- macro text_of(content) %}
    {%- if content is string %}{{ content }}
    {%- elif content is iterable and content is not mapping %}{% for part in content %}{{ part.text }}{% endfor %}
    {%- endif %}
{%- endmacro %}
{%- set last = namespace(query=-1) %}
{%- for message in messages if message.role == 'user' %}{% set last.query = messages.index(message) %}{% endfor %}
{%- if last.query < 0 %}{{ raise_exception('No user query found in messages.') }}{% endif %}
{%- if tools %}
    {{- '<|im_start|>system\\n# Tools\\n\\n<tools>' }}
    {%- for tool in tools %}{{ '\\n' + tool | tojson }}{% endfor %}
    {{- '\\n</tools>\\n\\n<tool_call>\\n<function=name>\\n<parameter=name>\\nvalue\\n</parameter>\\n</function>' }}
    {{- '\\n</tool_call>' }}
    {%- if messages[0].role == 'system' %}{{ '\\n\\n' + text_of(messages[0].content) | trim }}{% endif %}
    {{- '<|im_end|>\\n' }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + text_of(messages[0].content) | trim + '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- set content = text_of(message.content) | trim %}
    {%- if message.role == 'system' %}
        {%- if not loop.first %}{{ raise_exception('System message must be at the beginning.') }}{% endif %}
    {%- elif message.role == 'tool' %}
        {{- '<|im_start|>user' if loop.previtem.role != 'tool' }}
        {{- '\\n<tool_response>\\n' + content + '\\n</tool_response>' }}
        {{- '<|im_end|>\\n' if loop.last or loop.nextitem.role != 'tool' }}
    {%- elif message.role == 'assistant' %}
        {{- '<|im_start|>assistant\\n' }}
        {%- if loop.index0 > last.query or preserve_thinking %}
            {{- '<think>\\n' + message.reasoning_content | default('', true) | trim + '\\n</think>\\n\\n' }}
        {%- endif %}
        {{- content }}
        {%- for call in message.tool_calls or [] %}
            {{- ('\\n\\n' if loop.first and content else '\\n' if not loop.first else '') }}
            {{- '<tool_call>\\n<function=' + call.function.name + '>\\n' }}
            {%- for name, value in call.function.arguments | items %}
                {{- '<parameter=' + name + '>\\n' }}
                {{- value | tojson if value is mapping or value is iterable and value is not string else value }}
                {{- '\\n</parameter>\\n' }}
            {%- endfor %}
            {{- '</function>\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n<think>\\n' }}
    {%- if enable_thinking is defined and not enable_thinking %}{{ '\\n</think>\\n\\n' }}{% endif %}
{%- endif %}
"""

HEAD_NAMES = {
    "mtp_block": "mtp.layers.0", "enorm": "mtp.pre_fc_norm_embedding", "hnorm": "mtp.pre_fc_norm_hidden",
    "eh_proj": "mtp.fc", "post_norm": "mtp.norm",
}  # fmt: skip
THINGS = (
    "lamp", "door", "boat", "chair", "clock", "apple", "cup", "book", "hat", "key", "ring", "bell", "cart", "tree",
    "wall", "shoe",
)  # fmt: skip
COLOURS = ("red", "blue", "green", "white", "black", "brown", "grey", "pink")


def documents() -> list[str]:
    """Return what the models read: the project's documents but its decisions and figures."""
    paths = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
    return [path.read_text() for path in paths if path.name != "CHANGELOG.md"]


def conversations(generator: random.Random) -> Iterator[list[dict[str, str]]]:
    """Yield conversations without end: colours of things, which an answer repeats, and words of the glossary."""
    glossary = re.findall(r"^\| ([a-z][a-z ,]+) \| ([^|]+) \|", (ROOT / "ARCHITECTURE.md").read_text(), re.MULTILINE)
    while True:
        if generator.random() < 0.25:
            word, meaning = generator.choice(glossary)
            yield [
                {"role": "user", "content": f"What does {word} mean?"},
                {"role": "assistant", "content": f"It means {meaning}.", "reasoning_content": f"The word is {word}."},
            ]
            continue
        things, colours = generator.sample(THINGS, 3), generator.sample(COLOURS, 3)
        facts = [f"the {thing} is {colour}" for thing, colour in zip(things, colours, strict=True)]
        said = ", ".join(facts)
        messages = [{"role": "system", "content": "Answer in a few words."}] if generator.random() < 0.3 else []
        for turn in generator.sample(range(3), generator.choice((1, 1, 2))):
            question = f"What colour is the {things[turn]}?"
            answer = f"The {things[turn]} is {colours[turn]}."
            messages.append({"role": "user", "content": question if len(messages) > 1 else f"Now {said}. {question}"})
            thought = f"It was said that {facts[turn]}."
            messages.append({"role": "assistant", "content": answer, "reasoning_content": thought})
        yield messages


def prompt_of(messages: list[dict[str, str]], *, think: bool) -> str:
    """Return the prompt for an answer to messages, with or without reasoning."""
    template = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).from_string(TEMPLATE)
    return template.render(messages=messages, add_generation_prompt=True, enable_thinking=think)


def render(messages: list[dict[str, str]], *, think: bool) -> str:
    """Return a conversation as the chat template writes it for the last answer, and this answer."""
    *history, answer = messages
    thought = answer["reasoning_content"] + "\n</think>\n\n" if think else ""
    return f"{prompt_of(history, think=think)}{thought}{answer['content']}<|im_end|>\n"


def make_tokenizer(texts: list[str]) -> tokenizers.Tokenizer:
    """Return a byte-level BPE tokenizer of ``NUM_TOKENS`` tokens, whose words are split as this line splits them."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.normalizer = tokenizers.normalizers.NFC()
    split = pre_tokenizers.Split(tokenizers.Regex(SPLIT), "isolated")
    bytes_alone = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_alone])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=NUM_TOKENS - len(SPECIAL) - len(MARKS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.add_tokens(list(MARKS))
    assert tokenizer.get_vocab_size() == NUM_TOKENS
    return tokenizer


class Trainee(torch.nn.Module):
    """A model with its head that drafts tokens, and the losses of both."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        name = CONFIGS[kind]["architectures"][0].removesuffix("ForCausalLM")
        config = getattr(transformers, name + "TextConfig")(**{**CONFIGS[kind], "dtype": "float32"})
        config.initializer_range = 0.06
        config._experts_implementation = "eager"  # the grouped product of a CPU takes minutes for a gradient
        self.main = getattr(transformers, name + "ForCausalLM")(config)
        layer = self.main.model.layers[-1]
        self.head = MtpLayer(config, type(layer), type(layer.input_layernorm), config.num_hidden_layers - 1)
        self.head.mtp_block.load_state_dict(layer.state_dict())
        for parameter_name, values in self.main.named_parameters():
            if parameter_name.endswith("A_log"):  # remember for long: as they start, states are forgotten at once
                values.data.uniform_(0.001, 0.1).log_()
            elif parameter_name.endswith("dt_bias"):
                values.data.uniform_(-3, 0)
            elif parameter_name.endswith("conv1d.weight"):
                values.data.normal_(std=0.3)
        self.routed: list[torch.Tensor] = []
        for module_name, module in self.named_modules():
            if module_name.endswith("mlp.gate"):
                module.register_forward_hook(lambda _, __, output: self.routed.append(output[0]))

    def hidden(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the states behind the last norm, ``[B, T, hidden]``, of tokens ``[B, T]``."""
        return self.main.model(tokens, use_cache=False).last_hidden_state

    def drafts(self, hidden: torch.Tensor, following: torch.Tensor) -> torch.Tensor:
        """Return logits ``[B, T, V]`` of the tokens after ``following`` ``[B, T]``, which come after ``hidden``."""
        positions = torch.arange(hidden.shape[1])[None]
        embeddings = self.main.model.embed_tokens(following)
        angles = self.main.model.rotary_emb(hidden, positions.expand(3, 1, -1))
        output = self.head(
            embeddings, hidden, position_embeddings=angles, attention_mask=None, position_ids=positions, cache=None
        )
        return self.main.lm_head(output)

    def losses(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the losses of the next tokens, of drafts, and of experts that are not used alike."""
        self.routed.clear()
        hidden = self.hidden(tokens[:, :-2])
        main = functional.cross_entropy(self.main.lm_head(hidden).flatten(0, 1), tokens[:, 1:-1].flatten())
        drafts = self.drafts(hidden, tokens[:, 1:-1])
        draft = functional.cross_entropy(drafts.flatten(0, 1), tokens[:, 2:].flatten())
        balance = torch.zeros(())
        for logits in self.routed:
            chosen = functional.one_hot(logits.topk(2).indices, logits.shape[-1]).float().mean((0, 1))
            balance = balance + logits.shape[-1] * (chosen * logits.softmax(-1).mean(0)).sum()
        return main, draft, balance

    @torch.inference_mode()
    def acceptance(self, tokens: torch.Tensor) -> float:
        """Return the share of drafts that are what the model itself finds the likeliest."""
        hidden = self.hidden(tokens)
        best = self.main.lm_head(hidden).argmax(-1)
        drafts = self.drafts(hidden[:, :-1], tokens[:, 1:]).argmax(-1)
        return (drafts == best[:, 1:]).float().mean().item()

    def parameters_by_name(self) -> dict[str, torch.Tensor]:
        """Return the weights under the names of published files: experts fused, the head beside the model."""
        found = dict(self.main.state_dict())
        if self.main.config.tie_word_embeddings:
            del found["lm_head.weight"]
        for name, values in self.head.state_dict().items():
            module, _, rest = name.partition(".")
            found[f"{HEAD_NAMES[module]}.{rest}"] = values
        return found

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the weights as published files store them."""
        return {
            name: values.clone().to(torch.float32 if name.endswith("A_log") else torch.bfloat16)
            for name, values in self.parameters_by_name().items()
        }

    def read(self, folder: pathlib.Path) -> None:
        """Take the weights of a folder."""
        stored = load_file(folder / "model.safetensors")
        for name, values in self.parameters_by_name().items():
            values.copy_(stored[name])


def windows(stream: torch.Tensor, generator: torch.Generator, count: int) -> torch.Tensor:
    """Return ``count`` random windows of a stream of tokens, each with the two tokens that follow."""
    starts = torch.randint(0, len(stream) - LENGTH - 2, (count,), generator=generator)
    return torch.stack([stream[start : start + LENGTH + 2] for start in starts.tolist()])


def train(kind: str, steps: int = STEPS) -> None:
    """Train a model and write its folder in ``tests/data``."""
    torch.manual_seed(SEED)
    torch.set_num_threads(1)
    generator, chooser = torch.Generator().manual_seed(SEED), random.Random(SEED)
    texts = documents()
    talk = conversations(chooser)
    talks = [render(next(talk), think=chooser.random() < 0.5) for _ in range(2000)]
    tokenizer = make_tokenizer([*texts, *talks[:300]])
    text = torch.tensor(tokenizer.encode("<|endoftext|>".join(texts)).ids)
    spoken = torch.tensor(tokenizer.encode("".join(talks)).ids)
    print(f"{len(text)} tokens of documents, {len(spoken)} of conversations")

    # Chunks of 16 tokens: the work within a chunk of 64 is most of a step of so small a model.
    modelling: Any = importlib.import_module(f"transformers.models.{kind}.modeling_{kind}")
    modelling.torch_chunk_gated_delta_rule = functools.partial(modelling.torch_chunk_gated_delta_rule, chunk_size=16)
    model = Trainee(kind)
    matrices = [values for values in model.parameters() if values.ndim > 1]
    others = [values for values in model.parameters() if values.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, LEARNING_RATE, betas=(0.9, 0.95))
    began = time.monotonic()
    averages = [7.0, 7.0]
    for step in range(steps):
        rate = LEARNING_RATE * min((step + 1) / 30, 0.5 + 0.5 * math.cos(math.pi * step / steps) + 0.01)
        for group in optimizer.param_groups:
            group["lr"] = rate
        half = BATCH // 2
        tokens = torch.cat([windows(text, generator, half), windows(spoken, generator, BATCH - half)])
        main, draft, balance = model.losses(tokens)
        optimizer.zero_grad()
        (main + DRAFT_WEIGHT * draft + BALANCE_WEIGHT * balance).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        averages = [0.95 * old + 0.05 * new.item() for old, new in zip(averages, (main, draft), strict=True)]
        if step % 20 == 19:
            print(f"step {step + 1}: loss {averages[0]:.3f}, of drafts {averages[1]:.3f}, "
                  f"{time.monotonic() - began:.0f} s", flush=True)  # fmt: skip
    tokens = torch.cat([windows(text, generator, 4), windows(spoken, generator, 4)])
    record = {
        "seed": SEED,
        "steps": steps,
        "text_sha256": hashlib.sha256("".join(texts).encode()).hexdigest(),
        "seconds": round(time.monotonic() - began),
        "loss": round(averages[0], 3),
        "draft_loss": round(averages[1], 3),
        "draft_acceptance": round(model.acceptance(tokens), 3),
    }
    print(record)
    write(kind, model.tensors(), tokenizer, record)


def write(kind: str, tensors: dict[str, torch.Tensor], tokenizer: tokenizers.Tokenizer, record: dict[str, Any]) -> None:
    """Write a model's folder as published ones are."""
    folder = FOLDER / kind
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", {"format": "pt", "training": json.dumps(record)})
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    end, end_of_text = tokenizer.token_to_id("<|im_end|>"), tokenizer.token_to_id("<|endoftext|>")
    assert CONFIG["eos_token_id"] == end_of_text
    settings: dict[str, dict[str, Any]] = {
        "config.json": CONFIGS[kind],
        "generation_config.json": {"eos_token_id": [end, end_of_text], "pad_token_id": end_of_text},
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>",
            "model_max_length": CONFIG["max_position_embeddings"], "clean_up_tokenization_spaces": False,
        },
    }  # fmt: skip
    for name, values in settings.items():
        (folder / name).write_text(json.dumps(values, indent=2) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=CONFIGS)
    parser.add_argument("--steps", type=int, default=STEPS)
    arguments = parser.parse_args()
    train(arguments.kind, arguments.steps)
