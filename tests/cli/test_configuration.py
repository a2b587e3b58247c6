"""Runs repeated and resumed from their configuration."""

import json
import shutil

from cli_helpers import QUICK, command, read

# Configuration files


def test_a_run_is_repeated_from_its_configuration(digits, tmp_path):
    command(
        "train --config {config} --out {run} --num-eval-samples 5 --no-report",
        config=digits / "config.json",
        run=tmp_path / "again",
    )
    for name in ("model.safetensors", "metrics.json"):
        assert (tmp_path / "again" / name).read_bytes() == (digits / name).read_bytes()
    assert read(tmp_path / "again" / "config.json") == read(digits / "config.json")


def test_a_conditional_run_is_repeated_from_its_configuration(conditional, tmp_path):
    command(
        "train --config={config} --out {run} --num-eval-samples 5 --no-report",
        config=conditional / "config.json",
        run=tmp_path / "again",
    )
    weights = (tmp_path / "again" / "model.safetensors").read_bytes()
    assert weights == (conditional / "model.safetensors").read_bytes()


def test_the_command_line_overrides_the_configuration(digits, tmp_path):
    command(
        "train --config {config} --out {run} --epochs 1 --hidden 8 6 --no-report "
        "--num-eval-samples 2",
        config=digits / "config.json",
        run=tmp_path / "run",
    )
    given, before = (read(path / "config.json")["train"] for path in (tmp_path / "run", digits))
    assert given == before | {"epochs": 1, "hidden": [8, 6]}
    assert len((tmp_path / "run" / "history.csv").read_text().splitlines()) == 2


def test_a_users_configuration(tmp_path):
    options = {
        "data": "digits",
        "epochs": 1,
        "hidden": [8],
        "latent_dim": 3,
        "binarize": "fixed",
        "num_eval_samples": 2,
        "report": False,
        "out": str(tmp_path / "run"),
    }
    (tmp_path / "mine.json").write_text(json.dumps(options))
    command("train --config {config}", config=tmp_path / "mine.json")
    given = read(tmp_path / "run" / "config.json")["train"]
    assert given["latent_dim"] == [3]
    assert given["binarize"] == "fixed"
    assert read(tmp_path / "run" / "metrics.json")["num_samples"] == 2
    assert not (tmp_path / "run" / "report.html").exists()


def test_resume_goes_on_for_more_epochs(digits, tmp_path):
    words = QUICK.replace("--epochs 2", "--epochs 3")
    command(f"train digits --out {{run}} {words} --no-report", run=tmp_path / "whole")
    shutil.copytree(digits, tmp_path / "parts")
    command(f"train digits --out {{run}} {words} --no-report --resume", run=tmp_path / "parts")
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "parts")]
    assert weights[0] == weights[1]
