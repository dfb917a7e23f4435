"""The command ``neuron`` as far as it starts nothing."""

import pathlib

import pytest

from neuron import cli


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr("sys.argv", ["neuron", *arguments])
    return cli.main()


def test_a_configuration_can_be_checked_without_serving(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "neuron.toml"
    path.write_text('[[models]]\nid = "m"\nsource = "/w"\n')
    assert run(monkeypatch, "--config", str(path), "--check") == 0
    assert capsys.readouterr().out == "neuron: the configuration is right, models: 1\n"
    path.write_text("[daemon]\nlissten = 1\n")
    assert run(monkeypatch, "--config", str(path), "--check") == 2
    told = capsys.readouterr()
    assert (told.out, told.err) == ("", f"neuron: {path}: daemon.lissten: unknown key\n")
