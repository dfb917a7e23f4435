"""The daemon on a GPU, with a real model whose weights stay quantised: found, loaded, asked, unloaded."""

import pathlib

import daemons
import pytest

pytestmark = pytest.mark.stub_cuda


def test_a_gpu_serves(environment: dict[str, str], smollm2_gguf: pathlib.Path, tmp_path: pathlib.Path) -> None:
    port, log = daemons.free_port(), tmp_path / "device"
    variables = {**environment, "STUB_CUDA_LOG": str(log), "NEURON_DAEMON__LISTEN": f"127.0.0.1:{port}"}
    with daemons.daemon("neuron", "--devices", "0", port=port, log=tmp_path / "log", **variables) as neuron:
        daemons.until(lambda: (neuron.get("/health") or {}).get("state") == "ready", 60)
        with neuron.client() as client:
            spec = {"id": "smollm2", "source": str(smollm2_gguf)}
            loaded = client.post(f"{neuron.url}/models/load", json=spec, timeout=200).json()
            assert (loaded.get("state"), loaded.get("devices")) == ("ready", ["cuda:0"]), loaded
            request = {"model": "smollm2", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 40}
            answer = client.post(f"{neuron.url}/v1/chat/completions", json=request).json()
            assert answer["usage"]["completion_tokens"] == 40
            assert client.post(f"{neuron.url}/models/unload", json={"id": "smollm2"}).status_code == 200
        assert neuron.get("/health")["workers"][0]["restarts"] == 0
    lines = log.read_text().splitlines()
    assert not [line for line in lines if "FORBIDDEN" in line]
    assert [line for line in lines if line.startswith("kernel _quantized") and line.endswith(" captured")]
