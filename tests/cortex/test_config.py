"""Configuration: the shipped examples, the layers, and every way to be wrong."""

import pathlib

import pytest

from cortex import config
from cortex.access import keys
from cortex.config import EvictionStrategy
from cortex.fleet import catalogue
from cortex.logs import LogFormat
from cortex.settings import ConfigError

EXAMPLES = pathlib.Path(__file__).parents[2] / "packaging" / "examples"
NODE = '[[neurons]]\nname = "a"\nendpoint = "http://127.0.0.1:1"\n'


def test_the_shipped_examples_load_and_show_every_key() -> None:
    found = config.load(EXAMPLES / "cortex.toml", {})
    models = catalogue.load(config.models_path(found, EXAMPLES / "cortex.toml"), {node.name for node in found.neurons})
    assert found.gateway == config.GatewaySettings(), "the example shows the defaults"
    assert found.eviction == config.EvictionSettings()
    assert models.resolve("gpt-4o-mini") == "SmolLM2-135M-Instruct"
    text = (EXAMPLES / "cortex.toml").read_text()
    for kind in (
        config.GatewaySettings,
        config.AccessSettings,
        config.BreakerSettings,
        config.EvictionSettings,
        config.Timeouts,
        config.Polling,
        config.NodeSettings,
    ):
        for key in kind.__struct_fields__:
            assert f"{key} = " in text or f".{key}]" in text, key
    text = (EXAMPLES / "models.toml").read_text()
    for key in config.ModelProfile.__struct_fields__:
        assert f"{key} = " in text, key


def test_the_example_of_keys_shows_every_key() -> None:
    (principal,) = keys.load(EXAMPLES / "keys.toml").by_name()
    assert (principal.name, principal.is_admin, principal.limits) == ("alice", True, keys.NO_LIMITS)
    text = (EXAMPLES / "keys.toml").read_text()
    for key in keys.KeySettings.__struct_fields__:
        assert f"{key} = " in text, key


def test_the_comments_of_the_example_have_the_true_defaults(tmp_path: pathlib.Path) -> None:
    """A setting that is commented out has its default: uncommented, nothing changes."""
    text = (EXAMPLES / "cortex.toml").read_text()
    lines = []
    for line in text.splitlines():
        body = line.removeprefix("# ")
        key = body.partition(" = ")[0]
        is_setting = (
            " = " in body
            and key.isidentifier()
            and key not in {"name", "endpoint", "type", "models", "secret_file", "ca_file", "dialects", "timeouts"}
        )
        lines.append(body if is_setting else line)
    path = tmp_path / "cortex.toml"
    path.write_text("\n".join(lines))
    assert config.load(path, {}) == config.load(EXAMPLES / "cortex.toml", {})
    assert path.read_text() != text


@pytest.fixture
def write(tmp_path: pathlib.Path) -> object:
    def write(text: str, name: str = "cortex.toml") -> pathlib.Path:
        path = tmp_path / name
        path.write_text(text)
        return path

    return write


def test_file_then_environment_then_flag(write: object) -> None:
    path = write('[gateway]\nlisten = "127.0.0.1:1"\nlog_format = "json"\n' + NODE)  # type: ignore[operator]
    assert config.load(path, {}).gateway.listen == "127.0.0.1:1"
    environment = {
        "CORTEX_CONFIG": "elsewhere",
        "CORTEX_GATEWAY__LISTEN": "127.0.0.1:2",
        "CORTEX_GATEWAY__TIMEOUTS__STALL_S": "7",
        "CORTEX_GATEWAY__MAX_BODY_BYTES": "2048",
        "CORTEX_EVICTION__STRATEGY": "priority",
        "CORTEX_NEURONS": '[{"name": "b", "endpoint": "http://b:1"}]',
        "CORTEX_HOME": "another program's",
    }
    found = config.load(path, environment)
    assert found.gateway.listen == "127.0.0.1:2"
    assert found.gateway.log_format is LogFormat.JSON
    assert found.gateway.timeouts.stall_s == 7.0
    assert found.gateway.max_body_bytes == 2048
    assert found.eviction.strategy is EvictionStrategy.PRIORITY
    assert [node.name for node in found.neurons] == ["b"]
    flags = {"gateway.listen": "127.0.0.1:3", "gateway.workers": None}
    assert config.load(path, environment, flags).gateway.listen == "127.0.0.1:3"


@pytest.mark.parametrize(
    ("text", "key", "reason"),
    [
        ("[gateway", "", "is not TOML"),
        ("listen = 1\n" + NODE, "listen", "unknown key"),
        ("[gateway]\nlissten = 'x'\n" + NODE, "gateway.lissten", "unknown key"),
        ("[gateway.timeouts]\ntotal_s = 5\n" + NODE, "gateway.timeouts.total_s", "unknown key"),
        ("[gateway.polling]\nstrikes = 5\n" + NODE, "gateway.polling.strikes", "is called failure_threshold now"),
        ("[gateway]\nlisten = 5\n" + NODE, "gateway.listen", "Expected `str`, got `int`"),
        ("[gateway]\nmax_body_bytes = '5'\n" + NODE, "gateway.max_body_bytes", "Expected `int`, got `str`"),
        ("[gateway]\nmax_body_bytes = 5\n" + NODE, "gateway.max_body_bytes", ">= 1024"),
        ("[gateway.timeouts]\nstall_s = 0\n" + NODE, "gateway.timeouts.stall_s", "> 0"),
        ("[gateway]\nlog_format = 'xml'\n" + NODE, "gateway.log_format", "xml"),
        ("[gateway]\nrouting_policy = 'best'\n" + NODE, "gateway.routing_policy", "least_outstanding"),
        ("[gateway]\nrouting_policy = ''\n" + NODE, "gateway.routing_policy", "prefix_affine"),
        ("[gateway]\naffinity_slack = -1\n" + NODE, "gateway.affinity_slack", ">= 0"),
        ("[gateway]\nlisten = 'here'\n" + NODE, "gateway.listen", "is not host:port"),
        ("[gateway]\nlisten = '127.0.0.1:99999'\n" + NODE, "gateway.listen", "1..65535"),
        ("[gateway]\nlisten = ''\n" + NODE, "gateway.listen", "is not host:port"),
        ("[gateway]\nmetrics_listen = '::1:80'\n" + NODE, "gateway.metrics_listen", "is not host:port"),
        ("[gateway]\nmetrics_listen = '127.0.0.1:31313'\n" + NODE, "gateway.metrics_listen", "as gateway.listen is"),
        ("[gateway]\nmodels = ''\n" + NODE, "gateway.models", "is empty"),
        ("[eviction]\nstrategy = 'random'\n" + NODE, "eviction.strategy", "random"),
        ("", "neurons", "names no node"),
        ("[[neurons]]\nname = 'a'\n", "neurons[0].endpoint", "is missing"),
        ("[[neurons]]\nname = 'a b'\nendpoint = 'http://a:1'\n", "neurons[0].name", "regex"),
        ("[[neurons]]\nname = 'a'\nendpoint = 'a:1'\n", "neurons[0].endpoint", "is not http[s]://"),
        ("[[neurons]]\nname = 'a'\nendpoint = 'ftp://a:1'\n", "neurons[0].endpoint", "is not http[s]://"),
        (NODE + "type = 'vllm'\n", "neurons[0].type", "Invalid enum value"),
        (NODE + "models = {x = 'y'}\n", "neurons[0].models", "is for nodes of type"),
        (NODE + "dialects = ['latin']\n", "neurons[0].dialects", "'latin' is none of"),
        (NODE + "secret_file = '/no'\n", "neurons[0].secret_file", "/no cannot be read"),
        (NODE + "ca_file = '/no'\n", "neurons[0].ca_file", "/no"),
        (NODE + "[neurons.timeouts]\nstall_s = 0\n", "neurons[0].timeouts.stall_s", "> 0"),
        ("[gateway]\nsecret_file = '/no'\n" + NODE, "gateway.secret_file", "/no cannot be read"),
        ("[gateway]\ntls_key = '/dev/null'\n" + NODE, "gateway.tls_key", "go together"),
        ("[gateway.breaker]\nfailures = 0\n" + NODE, "gateway.breaker.failures", ">= 1"),
        ("[[neurons]]\nname = 'a'\nendpoint = 'http://a:x'\n", "neurons[0].endpoint", "is not http[s]://"),
        ("[[neurons]]\nname = 'a'\nendpoint = 'http://u@a:1'\n", "neurons[0].endpoint", "is not http[s]://"),
        ("[[neurons]]\nname = 'a'\nendpoint = 'http://a:1/?q'\n", "neurons[0].endpoint", "is not http[s]://"),
        (NODE + NODE, "neurons[1].name", "used twice"),
        (NODE + NODE.replace('"a"', '"b"'), "neurons[1].endpoint", "is also 'a'"),
    ],
)
def test_a_wrong_file_is_named_with_its_key(write: object, text: str, key: str, reason: str) -> None:
    path = write(text)  # type: ignore[operator]
    with pytest.raises(ConfigError) as caught:
        config.load(path, {})
    assert caught.value.source == str(path)
    assert caught.value.key.replace("[...]", "[0]") == key
    assert reason in caught.value.reason
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("variable", "value", "reason"),
    [
        ("CORTEX_GATEWAY__LISSTEN", "x", "unknown key"),
        ("CORTEX_GATEWAY__TIMEOUTS__STALL_S", "soon", "Expected `float`"),
        ("CORTEX_GATEWAY__TIMEOUTS__STALL_S", "-1", "> 0"),
        ("CORTEX_NOTHING__AT_ALL", "x", "unknown key"),
        ("CORTEX_ACCESS__LEFTOVER_WAIT_S", "5", "is called spare_capacity_wait_s now"),
        ("CORTEX_NEURONS", "[{]", "malformed"),
        ("CORTEX_NEURONS", '[{"name": "a"}]', "endpoint"),
    ],
)
def test_a_wrong_variable_is_named(write: object, variable: str, value: str, reason: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config.load(write(NODE), {variable: value})  # type: ignore[operator]
    assert caught.value.source == variable
    assert reason in caught.value.reason


def test_a_missing_file_is_an_error(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        config.load(tmp_path / "none.toml", {})
    monkeypatch.chdir(tmp_path)
    if not pathlib.Path("/etc/cortex/cortex.toml").exists():
        assert config.find({}) is None
    (tmp_path / "cortex.toml").write_text("")
    assert config.find({}) == pathlib.Path("cortex.toml")
    assert config.find({"CORTEX_CONFIG": "/x/y.toml"}) == pathlib.Path("/x/y.toml")


def test_without_a_file_the_node_is_this_hosts_neuron() -> None:
    assert [(node.name, node.endpoint) for node in config.load(None, {}).neurons] == [
        ("local", "http://127.0.0.1:13131")
    ]
    named = {"CORTEX_NEURONS": '[{"name": "a", "endpoint": "http://192.0.2.1:1"}]', "CORTEX_GATEWAY__WORKERS": "2"}
    found = config.load(None, named)
    assert ([node.name for node in found.neurons], found.gateway.workers) == (["a"], 2)
    with pytest.raises(ConfigError, match=r"^no cortex\.toml: gateway\.metrics_listen: is "):
        config.load(None, {}, {"gateway.metrics_listen": "127.0.0.1:31313"})


# ------------------------------------------------------------------ models.toml

MODEL = '[[models]]\nid = "m"\nsource = "/w"\n'


@pytest.mark.parametrize(
    ("text", "key", "reason"),
    [
        ("[[model]]\nid = 'm'\n", "model", "unknown key"),
        ("[[models]]\nid = 'm'\n", "models[0].source", "is missing"),
        ("[[models]]\nid = 'm'\nsource = ''\n", "models[0].source", "is empty"),
        ("[[models]]\nid = 'm'\nsource = '/w'\nctx = 5\n", "models[0].ctx", "unknown key"),
        ("[[models]]\nid = 'm'\nsource = '/w'\ntensor_parallel = 'all'\n", "models[0].tensor_parallel", "`int`"),
        ("[[models]]\nid = 'a b'\nsource = '/w'\n", "models[0].id", "regex"),
        (MODEL + MODEL, "models[1].id", "used twice"),
        (MODEL + "pinned = ['z']\n", "models[0].pinned", "not one of [[neurons]]"),
        (MODEL + "preferred_nodes = ['a', 'z']\n", "models[0].preferred_nodes", "not one of [[neurons]]"),
        (MODEL + "routing_policy = 'best'\n", "models[0].routing_policy", "least_outstanding"),
        (MODEL + "aliases = ['m']\n", "models[0].aliases", "is the id of a model"),
        (MODEL + "aliases = ['x', 'x']\n", "models[0].aliases", "already an alias"),
        (MODEL + "aliases = ['x']\n[aliases]\nx = 'm'\n", "aliases.x", "already an alias of 'm'"),
        (MODEL + "[aliases]\nx = 'y'\n", "aliases.x", "neither a model nor an alias"),
        (MODEL + "[aliases]\nx = 'x'\n", "aliases.x", "loop: x -> x"),
        (MODEL + "[aliases]\nx = 'y'\ny = 'z'\nz = 'x'\n", "aliases.x", "loop: x -> y -> z -> x"),
        (MODEL + "[aliases]\nm = 'm'\n", "aliases.m", "is the id of a model"),
        (MODEL + "[aliases]\n'x*' = 'y'\n", "aliases.x*", "neither a model nor an alias"),
        (MODEL + "[aliases]\n'*x' = 'm'\n", "aliases", "regex"),
        (MODEL + "[aliases]\nx = 5\n", "aliases[...]", "Expected `str`"),
    ],
)
def test_a_wrong_catalogue_is_named_with_its_key(write: object, text: str, key: str, reason: str) -> None:
    path = write(text, "models.toml")  # type: ignore[operator]
    with pytest.raises(ConfigError) as caught:
        catalogue.load(path, {"a"})
    assert caught.value.source == str(path)
    assert caught.value.key == key
    assert reason in caught.value.reason


def test_a_missing_catalogue_is_an_error_and_an_empty_one_is_a_choice(write: object, tmp_path: pathlib.Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        catalogue.load(tmp_path / "none.toml", {"a"})
    assert not catalogue.load(write("", "models.toml"), {"a"}).profiles  # type: ignore[operator]


def test_aliases_follow_aliases(write: object) -> None:
    text = MODEL + 'aliases = ["x"]\npinned = ["a"]\ndtype = "bf16"\n[aliases]\ny = "x"\nz = "y"\n'
    found = catalogue.load(write(text, "models.toml"), {"a"})  # type: ignore[operator]
    assert {name: found.resolve(name) for name in "mxyzq"} == {"m": "m", "x": "m", "y": "m", "z": "m", "q": "q"}
    assert found.profiles["m"].spec().dtype == "bf16"


@pytest.mark.parametrize("value", ["inf", "nan", "0", "-1", "1e10"])
def test_a_time_that_no_clock_reaches_is_refused_at_start(tmp_path: pathlib.Path, value: str) -> None:
    path = tmp_path / "cortex.toml"
    path.write_text(
        f'[gateway.timeouts]\nanswer_s = {value}\n[[neurons]]\nname = "a"\nendpoint = "http://127.0.0.1:1"\n'
    )
    with pytest.raises(ConfigError, match="answer_s"):
        config.load(path, {})
