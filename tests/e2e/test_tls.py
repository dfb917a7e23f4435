"""Both daemons behind TLS, with a shared secret between them."""

import functools
import pathlib
from collections.abc import Iterator

import daemons
import httpx
import openai
import pytest
import trustme

SECRET = "a secret that both know"


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A folder with an authority's certificate and one of this host's by it."""
    folder = tmp_path_factory.mktemp("tls")
    made = trustme.CA()
    made.cert_pem.write_to_path(folder / "ca.pem")
    host = made.issue_cert("127.0.0.1", "localhost")
    host.private_key_pem.write_to_path(folder / "key.pem")
    for number, pem in enumerate(host.cert_chain_pems):
        pem.write_to_path(folder / "certificate.pem", append=number > 0)
    (folder / "secret").write_text(SECRET + "\n")
    return folder


@pytest.fixture(scope="module")
def closed_node(authority: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[daemons.Daemon]:
    folder, port = tmp_path_factory.mktemp("neuron"), daemons.free_port()
    (folder / "neuron.toml").write_text(
        f'[daemon]\nname = "test"\nlisten = "127.0.0.1:{port}"\ndevices = "cpu"\nsecret_file = "{authority}/secret"\n'
        f'tls_certificate = "{authority}/certificate.pem"\ntls_key = "{authority}/key.pem"\n'
    )
    arguments = "--config", str(folder / "neuron.toml")
    ca = authority / "ca.pem"
    with daemons.daemon("neuron", *arguments, port=port, log=folder / "neuron.log", ca_file=ca) as found:
        yield found


@pytest.fixture(scope="module")
def closed_gateway(
    authority: pathlib.Path,
    closed_node: daemons.Daemon,
    smollm2_gguf: pathlib.Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[daemons.Daemon]:
    folder, port = tmp_path_factory.mktemp("cortex"), daemons.free_port()
    (folder / "models.toml").write_text(f'[[models]]\nid = "{daemons.MODEL}"\nsource = "{smollm2_gguf}"\n')
    checked = f'ca_file = "{authority}/ca.pem"\n'
    (folder / "cortex.toml").write_text(
        f'[gateway]\nlisten = "127.0.0.1:{port}"\nmetrics_listen = ""\nsecret_file = "{authority}/secret"\n'
        f'tls_certificate = "{authority}/certificate.pem"\ntls_key = "{authority}/key.pem"\n[store]\nkind = "none"\n'
        f'[[neurons]]\nname = "good"\nendpoint = "{closed_node.url}"\n{checked}'
        f'[[neurons]]\nname = "unchecked"\nendpoint = "https://localhost:{closed_node.port}"\n'
        f'[[neurons]]\nname = "unknown"\nendpoint = "https://LOCALHOST:{closed_node.port}"\n{checked}'
        f'secret_file = "{folder}/cortex.toml"\n'
    )
    arguments = "serve", "--config", str(folder / "cortex.toml")
    ca = authority / "ca.pem"
    with daemons.daemon("cortex", *arguments, port=port, log=folder / "cortex.log", ca_file=ca) as found:
        yield found


def test_a_chat_through_both(closed_gateway: daemons.Daemon) -> None:
    with openai.OpenAI(base_url=closed_gateway.url + "/v1", api_key="-", http_client=closed_gateway.client()) as client:
        create = functools.partial(
            client.chat.completions.create,
            model=daemons.MODEL,
            messages=[{"role": "user", "content": "Say hi."}],
            temperature=0,
            max_tokens=8,
        )
        whole = create().choices[0].message.content
        assert whole
        assert "".join(chunk.choices[0].delta.content or "" for chunk in create(stream=True)) == whole


def test_a_node_with_a_wrong_certificate_or_secret_is_down(closed_gateway: daemons.Daemon) -> None:
    nodes = {node["name"]: node for node in closed_gateway.get("/admin/fleet")["nodes"]}
    assert nodes["good"]["up"]
    assert not nodes["unchecked"]["up"]
    assert "certificate" in nodes["unchecked"]["fault"].lower()
    assert not nodes["unknown"]["up"]
    assert "secret" in nodes["unknown"]["fault"]


def test_the_node_answers_no_other_client(closed_node: daemons.Daemon) -> None:
    with closed_node.client() as client:
        for path in ("/models", "/discovery", "/v1/models"):
            assert client.get(closed_node.url + path).status_code == 401
            assert client.get(closed_node.url + path, headers={"authorization": "Bearer x"}).status_code == 401
        assert client.get(closed_node.url + "/health").status_code == 200
    with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
        httpx.get(closed_node.url + "/health")
    with pytest.raises(httpx.HTTPError):
        httpx.get(closed_node.url.replace("https", "http") + "/health")
