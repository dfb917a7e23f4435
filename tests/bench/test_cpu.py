"""The CPU benchmark continues where a side fails, and names the side and the reason."""

import argparse
import json
import pathlib
import sys

import pytest
from cpu import run

FIGURES = {
    "generate_1": 100.0,
    "prompt_512": 5.0,
    "bandwidth_gb_s": 1.0,
    "bytes_per_token": 2.0,
    "bandwidth_fraction": 0.5,
    "load_s": 0.1,
    "load_to_first_token_s": 0.2,
    "imported_bytes": 1,
    "resident_bytes": 2,
}


def write_peer(folder: pathlib.Path, script: str) -> pathlib.Path:
    """Write an environment whose Python is ``script``."""
    program = folder / "bin" / "python"
    program.parent.mkdir(parents=True)
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    (folder / "done").touch()
    return folder


@pytest.fixture
def options(tmp_path: pathlib.Path) -> argparse.Namespace:
    return argparse.Namespace(model=tmp_path / "m.gguf", build_peer=False, rounds=2, repeats=1, tokens=4)


def ours(model: pathlib.Path, *arguments: object) -> list[object]:
    return [sys.executable, "-c", f"print('a line'); print({json.dumps(json.dumps(FIGURES))})"]


def test_a_peer_that_dies_is_named_and_another_build_takes_its_place(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, options: argparse.Namespace
) -> None:
    monkeypatch.setattr(run, "engine", ours)
    monkeypatch.setattr(run, "PEER", write_peer(tmp_path / "llama", "kill -ILL $$"))
    theirs = json.dumps({"generate_1": 50.0, "prompt_512": 10.0, "load_s": 0.3})
    monkeypatch.setattr(run, "PEER_NO_AMX", write_peer(tmp_path / "llama-no-amx", f"echo '{theirs}'"))
    bench = run.Bench(options)
    bench.peer()
    probe = "python -P llama.py m.gguf --streams 1 --tokens 1 --repeats 1 --prompt"
    assert bench.notes == [f"FAILED llama.cpp: {probe} ended with SIGILL"]
    assert (bench.table.ratios["generate_1"], bench.table.ratios["prompt_512"]) == (2.0, 0.5)


def test_without_any_peer_our_own_figures_are_measured(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, options: argparse.Namespace
) -> None:
    monkeypatch.setattr(run, "engine", ours)
    monkeypatch.setattr(run, "PEER", write_peer(tmp_path / "llama", "exit 132"))
    monkeypatch.setattr(run, "PEER_NO_AMX", write_peer(tmp_path / "llama-no-amx", "echo nothing"))
    bench = run.Bench(options)
    bench.peer()
    bench.formats()
    assert [note.rpartition(" ended ")[2] for note in bench.notes[:1]] == ["with SIGILL"]
    assert bench.notes[1].endswith("printed no figures")
    assert [row["ours"] for row in bench.table.rows if row["what"] == "generate_1"] == [100.0]
    assert "generate_1" not in bench.table.ratios


def test_a_failing_peer_costs_one_measurement_only(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, options: argparse.Namespace
) -> None:
    monkeypatch.setattr(run, "engine", ours)
    theirs = json.dumps({"generate_1": 50.0})
    script = f"case \"$*\" in *--kind*) exit 3;; *) echo '{theirs}';; esac"
    monkeypatch.setattr(run, "PEER", write_peer(tmp_path / "llama", script))
    bench = run.Bench(options)
    bench.formats()
    bench.drawn()
    assert [note.rpartition(" ended ")[2] for note in bench.notes] == ["with status 3"] * 3
    assert bench.table.ratios["drawn_over_likeliest_generate_1"] == 1.0
