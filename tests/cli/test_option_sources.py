"""Options from words and files, and errors that name them."""

import json

import pytest
import torch

import pyro_vae as pv
from pyro_vae.cli.app import app
from pyro_vae.cli.main import main


def values(line, **paths):
    """The values that `train` would get."""
    words = [word.format(**paths) for word in line.split()]
    return app.parse_args(words, exit_on_error=False, print_error=False)[1].arguments


def complaint(line, capsys, **paths):
    """The one line that a command prints before it exits with status 2."""
    with pytest.raises(SystemExit) as stopped:
        main([word.format(**paths) for word in line.split()])
    assert stopped.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    return err


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run folder runs/digits with nothing but the options of training."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "runs" / "digits"
    folder.mkdir(parents=True)
    options = {"data": "digits", "epochs": 7, "hidden": [8, 6], "num_classes": 10}
    (folder / "config.json").write_text(json.dumps({"train": options, "split": {}}))
    return folder


@pytest.mark.parametrize(
    "line",
    [
        "train --config {run}/config.json",
        "train --config={run}/config.json",
        "train digits --config {run}/config.json",
        "train --resume --out {run}",
        "train --out={run} --resume",
        "train digits --resume",
        "train --data digits --resume",
        "train --data=digits --resume=true",
    ],
)
def test_options_are_read_from_a_file(line, run):
    given = values(line, run=run)
    assert given["data"] == "digits"
    assert given["settings"].epochs == 7
    assert given["model"].hidden == (8, 6)
    assert given["model"].latent_dim == (20,)


@pytest.mark.parametrize("line", ["train digits", "train digits --no-resume"])
def test_a_run_is_not_read_without_resume(line, run):
    assert "settings" not in values(line)


def test_typed_options_override_a_file(run):
    given = values("train shapes --resume --out {run} --hidden 5 --epochs 3", run=run)
    assert given["data"] == "shapes"
    assert given["settings"].epochs == 3
    assert given["model"].hidden == (5,)


@pytest.mark.parametrize(
    ("words", "report"), [("", False), ("--report", True), ("--no-report", False)]
)
def test_a_file_may_switch_off_the_report_of_the_same_name_as_a_command(words, report, tmp_path):
    (tmp_path / "options.json").write_text('{"data": "digits", "report": false}')
    given = values(f"train --config {{file}} {words}", file=tmp_path / "options.json")
    assert given["report"] is report


def test_a_file_of_options_may_name_the_folder_but_a_resumed_run_may_not(run, capsys):
    options = json.loads((run / "config.json").read_text())
    options["train"]["out"] = "elsewhere"
    (run / "config.json").write_text(json.dumps(options))
    assert values("train --config {run}/config.json", run=run)["out"].name == "elsewhere"
    assert "unknown option 'out'" in complaint("train digits --resume", capsys)


def test_a_file_cannot_name_a_class(run, capsys):
    (run / "options.json").write_text('{"data": "digits", "model": "own:Sound"}')
    line = "train --config {run}/options.json"
    assert "type --model own:Sound" in complaint(line, capsys, run=run)
    given = values(f"{line} --model own:Sound", run=run)
    assert given["model"].model == "own:Sound"


ERRORS = {
    "train digits --hidden 8 wide": "--hidden must be whole numbers or none, got 8 wide",
    "train digits --hidden 8 0": "--hidden must be at least 1, got 8 0",
    "train digits --num-samples 0": "--num-samples must be at least 1, got 0",
    "train digits --beta -1": "--beta must be at least 0, got -1",
    "train digits --num-eval-samples 0": "--num-eval-samples must be at least 1, got 0",
    "train digits --likelihood gaussian --scale wide": "--scale must be 'predicted', 'learned' or",
    "train digits --model semi-supervised --num-labels 50 --objective analytic": (
        "use --objective elbo\n"
    ),
    "train digits --config a --config b": "--config",
    "check own": "a pair of your own has the form module:Class, got 'own'",
}


@pytest.mark.parametrize(("line", "words"), ERRORS.items(), ids=ERRORS)
def test_an_error_spells_the_options_of_its_command(line, words, run, capsys):
    assert words in complaint(line, capsys)


def test_a_name_that_is_not_an_option_of_the_command_stays_plain():
    from pyro_vae.cli.main import _spell

    error = pv.UsageError("needs `num_samples` and `pair`; use `Trace_ELBO`", argument="prior")
    trained = error.spelled(_spell(["train", "digits"]))
    assert trained == "--prior needs --num-samples and pair; use --objective elbo"
    evaluated = error.spelled(_spell(["evaluate", "run"]))
    assert evaluated == "prior needs --num-samples and pair; use Trace_ELBO"
    assert str(error) == "prior needs num_samples and pair; use Trace_ELBO"


def test_python_reads_names_of_python():
    """`check` and `fit` name the objective as Python does."""
    pair = pv.VAE.mlp((4,), latent_dim=2, hidden=(8,), posterior=pv.FullRankNormal())
    x = torch.rand(8, 4).round()
    objective = pv.TotalCorrelationELBO(8)
    (error,) = pv.check(pair, x, objective=objective).errors
    assert error.endswith("use Trace_ELBO")
    with pytest.raises(pv.UsageError) as caught:
        pv.fit(pair, x, objective=objective, epochs=1, batch_size=4, progress=False)
    assert str(caught.value) == error
    assert caught.value.spelled(str.lower).endswith("use trace_elbo")
