"""EleutherAI's lm-evaluation-harness on the real model: likelihoods are those that transformers computes.

``make test-clients`` installs it. Its tasks are on the network; this one is written here, with the model's tokenizer.
"""

import json
import os
import pathlib
import subprocess
from collections.abc import Iterator
from typing import Any

import daemons
import pytest

from neuron.text import tokenizer

pytestmark = [pytest.mark.clients, pytest.mark.timeout(300)]

CLIENTS = pathlib.Path(os.environ.get("CLIENTS", pathlib.Path(__file__).parents[2] / "build" / "clients"))
DOCUMENTS = [
    ("The capital of France is", " Paris"),
    ("The capital of France is", " banana"),
    ("One, two, three, four,", " five"),
    ("Water freezes at zero degrees", " Celsius, and it boils"),
    ("Grüße aus Köln", ", sagte sie ☃"),
]
TASK = """task: tiny
dataset_path: json
dataset_kwargs: {{data_files: {{test: {documents}}}}}
test_split: test
output_type: loglikelihood
doc_to_text: "{{{{text}}}}"
doc_to_target: "{{{{target}}}}"
metric_list: [{{metric: acc}}]
"""


@pytest.fixture(scope="module")
def serving(tmp_path_factory: pytest.TempPathFactory, smollm2_gguf: pathlib.Path) -> Iterator[daemons.Daemon]:
    """The real model behind a gateway."""
    folders = [tmp_path_factory.mktemp(name) for name in ("real_neuron", "real_cortex")]
    with daemons.neuron(folders[0], smollm2_gguf) as node, daemons.cortex(folders[1], node) as found:
        yield found


@pytest.fixture
def folder(tmp_path: pathlib.Path, smollm2_gguf: pathlib.Path) -> pathlib.Path:
    """A task and the model's tokenizer, as the harness reads them."""
    documents = tmp_path / "documents.jsonl"
    documents.write_text("".join(json.dumps({"text": text, "target": target}) + "\n" for text, target in DOCUMENTS))
    (tmp_path / "tiny.yaml").write_text(TASK.format(documents=documents))
    words = tmp_path / "tokenizer"
    words.mkdir()
    tokenizer.load(smollm2_gguf).tokenizer.save(str(words / "tokenizer.json"))
    kind = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
    (words / "tokenizer_config.json").write_text(json.dumps(kind))
    return tmp_path


def expected(path: pathlib.Path) -> list[tuple[float, bool]]:
    """Return of each document how likely its target is, and whether each token of that is the likeliest."""
    import torch
    from gguf_reference import transformers_model

    model, words = transformers_model(path), tokenizer.load(path).tokenizer
    found = []
    for text, target in DOCUMENTS:
        before = len(words.encode(text, add_special_tokens=False).ids)
        ids = words.encode(text + target, add_special_tokens=False).ids
        with torch.inference_mode():
            table = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        rows = table[before - 1 : -1]
        chosen = torch.tensor(ids[before:])
        likelihood = float(rows.gather(-1, chosen[:, None]).sum())
        found.append((likelihood, bool((rows.argmax(-1) == chosen).all())))
    return found


@pytest.mark.parametrize("batch_size", [1, 4])
def test_likelihoods_equal_those_of_transformers(
    serving: daemons.Daemon, folder: pathlib.Path, smollm2_gguf: pathlib.Path, batch_size: int
) -> None:
    program = CLIENTS / "evaluation" / "bin" / "lm_eval"
    if not program.exists():
        pytest.skip(f"lm_eval is not installed in {CLIENTS}: run make test-clients")
    model: dict[str, Any] = {
        "model": daemons.MODEL, "base_url": f"{serving.url}/v1/completions", "max_retries": 1, "num_concurrent": 1,
        "tokenizer": folder / "tokenizer", "tokenizer_backend": "huggingface",
    }  # fmt: skip
    arguments = ",".join(f"{name}={value}" for name, value in model.items())
    command = [str(program), "--model", "local-completions", "--model_args", arguments, "--tasks", "tiny"]
    command += ["--include_path", str(folder), "--batch_size", str(batch_size)]
    command += ["--output_path", str(folder / "out"), "--log_samples"]
    inherited = {name: os.environ[name] for name in ("PATH", "LANG", "TMPDIR") if name in os.environ}
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OPENAI_API_KEY": "none", "HOME": str(folder)}
    done = subprocess.run(command, env=inherited | offline, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    (written,) = (folder / "out").rglob("samples_tiny_*.jsonl")
    samples = sorted((json.loads(line) for line in written.read_text().splitlines()), key=lambda one: one["doc_id"])
    found = [sample["resps"][0][0] for sample in samples]
    for (likelihood, is_greedy), (wanted, wanted_greedy), (_, target) in zip(
        found, expected(smollm2_gguf), DOCUMENTS, strict=True
    ):
        # Weights of four bits are multiplied with activations of eight here, and with floats there.
        assert float(likelihood) == pytest.approx(wanted, abs=0.05 * abs(wanted) + 0.1), target
        assert str(is_greedy) == str(wanted_greedy), target
