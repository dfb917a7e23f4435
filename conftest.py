"""``pytest --benchmark``: the benchmarks, and nothing else. Otherwise they are left out (pyproject.toml)."""

import os
import pathlib
import sys

import pytest

# The editable build and the commands of tests find their tools beside this Python, with or without activation.
os.environ["PATH"] = os.pathsep.join([str(pathlib.Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option."""
    group = parser.getgroup("benchmark")
    group.addoption("--benchmark", action="store_true", help="Run the benchmarks and no tests.")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Tell the plugin that measures."""
    if config.option.benchmark:
        config.option.benchmark_only, config.option.benchmark_skip = True, False
        if config.args_source is pytest.Config.ArgsSource.TESTPATHS:
            config.args = [str(config.rootpath / "bench")]
