"""neuron.toml: the shipped example loads, layers lay over each other, and a wrong setting is named."""

import pathlib

import pytest

from cortex.settings import ConfigError
from neuron.config import Config, load

EXAMPLE = pathlib.Path(__file__).parents[2] / "packaging" / "examples" / "neuron.toml"


def written(folder: pathlib.Path, text: str) -> pathlib.Path:
    path = folder / "neuron.toml"
    path.write_text(text)
    return path


def test_the_example_loads_and_names_every_setting() -> None:
    config = load(EXAMPLE, environment={})
    assert config.models[0].id == "SmolLM2-135M-Instruct"
    text = EXAMPLE.read_text()
    assert [name for name in config.daemon.__struct_fields__ if f"{name} = " not in text] == ["harnesses"]
    # A packaged file must not have the values of one host.
    assert (config.daemon.listen, config.daemon.name) == (Config().daemon.listen, Config().daemon.name)


def test_a_flag_goes_before_the_environment_and_that_before_the_file(tmp_path: pathlib.Path) -> None:
    path = written(tmp_path, '[daemon]\nlisten = "127.0.0.1:1"\nname = "a"\ndevices = "0"\n')
    environment = {"NEURON_DAEMON__LISTEN": "127.0.0.1:2", "NEURON_DAEMON__DRAIN_TIMEOUT_S": "5", "NEURON_OTHER": "/x"}
    daemon = load(path, {"daemon.listen": "127.0.0.1:3", "daemon.name": None}, environment).daemon
    assert (daemon.listen, daemon.name, daemon.devices, daemon.drain_timeout_s) == ("127.0.0.1:3", "a", "0", 5.0)


def test_the_environment_names_the_file(tmp_path: pathlib.Path) -> None:
    path = written(tmp_path, '[daemon]\nname = "b"\n')
    assert load(None, environment={"NEURON_CONFIG": str(path)}).daemon.name == "b"


@pytest.mark.parametrize(
    ("text", "key", "reason"),
    [
        ("[daemon", "", "is not TOML"),
        ("[daemon]\nlissten = 1", "daemon.lissten", "unknown key"),
        ("[daemon]\nmax_waiting = 'x'", "daemon.max_waiting", "Expected `int`"),
        ("[daemon]\nmax_waiting = -1", "daemon.max_waiting", ">= 0"),
        ("[daemon]\nlisten = 'here'", "daemon.listen", "not host:port"),
        ("[daemon]\nsecret_file = '/no/such'", "daemon.secret_file", "/no/such cannot be read"),
        ("[daemon]\nsecret_file = '/dev/null'", "daemon.secret_file", "is empty"),
        ("[daemon]\ntls_key = '/dev/null'", "daemon.tls_key", "go together"),
        ("[daemon]\ntls_key = '/no'\ntls_certificate = '/dev/null'", "daemon.tls_key", "/no cannot be read"),
        ("[[models]]\nid = 'm'", "models[0].source", "is missing"),
        ("[[models]]\nid = 'm'\nsource = '/x'\n[[models]]\nid = 'm'\nsource = '/y'", "models[1].id", "twice"),
    ],
)
def test_a_wrong_file_is_named_with_key_and_reason(tmp_path: pathlib.Path, text: str, key: str, reason: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        load(path, environment={})
    assert (caught.value.source, caught.value.key) == (str(path), key)
    assert reason in caught.value.reason


def test_a_wrong_variable_is_named(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load(written(tmp_path, ""), environment={"NEURON_DAEMON__MAX_WAITING": "many"})
    assert caught.value.source == "NEURON_DAEMON__MAX_WAITING"


def test_a_missing_file_is_named() -> None:
    with pytest.raises(ConfigError, match=r"/no/such\.toml"):
        load(pathlib.Path("/no/such.toml"), environment={})
