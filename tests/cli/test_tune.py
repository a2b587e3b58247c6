"""The search for options, and the export of a run."""

import sys

import numpy as np
import optuna
import pytest
from cli_helpers import command

from pyro_vae.cli import tune
from pyro_vae.cli.input import Input
from pyro_vae.cli.job import make_job
from pyro_vae.cli.main import main
from pyro_vae.cli.options import Model, Objective
from pyro_vae.data.datasets import load_data
from pyro_vae.training.settings import Settings

OPTIONS = "--epochs 2 --engine eager --likelihood gaussian --no-linear"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "rows.npy"
    np.save(path, np.random.default_rng(0).normal(5.0, 2.0, (60, 3)).astype(np.float32))
    return path


def refusal(capsys, line, **paths):
    with pytest.raises(SystemExit) as ended:
        command(line, **paths)
    assert ended.value.code == 2
    (said,) = capsys.readouterr().err.strip().splitlines()[-1:]
    return said


def bounds(shown):
    """The bounds in the table, best first."""
    lines = shown[shown.index("validation bound") :].splitlines()[1:]
    return [float(line.split()[1]) for line in lines if not line.startswith("best")]


def test_a_search_goes_on_where_it_stopped_and_shows_its_best_options(data, tmp_path, capsys):
    paths = {"data": data, "file": tmp_path / "trials"}
    command(f"tune {{data}} --trials 2 --storage {{file}} {OPTIONS}", **paths)
    first = capsys.readouterr().out
    command(f"tune {{data}} --trials 3 --storage {{file}} {OPTIONS}", **paths)
    both = capsys.readouterr().out
    assert "2 trials" in first
    assert "3 trials" in both
    assert set(bounds(first)) < set(bounds(both))
    assert bounds(both) == sorted(bounds(both), reverse=True)
    command("tune {data} --report --storage {file}", **paths)
    shown = capsys.readouterr().out
    assert shown in both
    # The last line is a command that reaches the bound of its trial.
    words = shown.splitlines()[-1].partition(": pyro-vae ")[2].split()
    run = tmp_path / "run"
    main([*words, *OPTIONS.split(), "--out", str(run), "--no-report", "--num-eval-samples", "2"])
    history = np.genfromtxt(run / "history.csv", delimiter=",", names=True)
    assert history["validation_bound"].max() == pytest.approx(bounds(shown)[0], abs=6e-4)


RECURRENT = "--epochs 1 --engine eager --trials 3"


@pytest.mark.parametrize(
    ("file", "options"),
    [
        ("steps.npy", "--model deep-markov --likelihood gaussian"),
        ("lines.txt", "--length 8"),
        ("steps.npy", "--model hierarchical --latent-dim 32 16 8 --likelihood gaussian"),
    ],
)
def test_each_model_gets_options_that_it_takes(tmp_path, capsys, monkeypatch, file, options):
    monkeypatch.setattr(tune, "WIDTHS", (32,))
    np.save(tmp_path / "steps.npy", np.random.default_rng(0).normal(size=(20, 3, 2)))
    (tmp_path / "lines.txt").write_text("\n".join(f"line {i}" for i in range(20)))
    paths = {"data": tmp_path / file, "storage": tmp_path / "trials"}
    command(f"tune {{data}} --storage {{storage}} {RECURRENT} {options}", **paths)
    words = capsys.readouterr().out.splitlines()[-1].split()
    at, then = words.index("--latent-dim"), words.index("--hidden")
    dims = list(map(int, words[at + 1 : then]))
    assert dims == [max(1, dims[0] // 2**i) for i in range(len(dims))]
    assert len(dims) == (3 if "hierarchical" in options else 1)
    if "hierarchical" not in options:
        assert words.index("--learning-rate") == then + 2


def test_a_trial_that_the_pruner_stops_ends_after_its_epoch(data):
    job = make_job(
        str(data),
        load_data(data),
        Model(likelihood="gaussian", hidden=(4,)),
        Objective(),
        Input(),
        Settings(epochs=5, engine="eager"),
    )
    never = optuna.pruners.ThresholdPruner(lower=1e9, n_warmup_steps=2)
    study = optuna.create_study(direction="maximize", pruner=never)
    study.optimize(lambda trial: tune._bound(optuna, trial, job), n_trials=1)
    (trial,) = study.trials
    assert trial.state.name == "PRUNED"
    assert list(trial.intermediate_values) == [1, 2]


def test_trials_of_other_options_are_not_mixed(data, tmp_path, capsys):
    paths = {"data": data, "file": tmp_path / "trials"}
    command(f"tune {{data}} --trials 1 --storage {{file}} {OPTIONS}", **paths)
    line = f"tune {{data}} --trials 2 --storage {{file}} {OPTIONS} --batch-size 16"
    assert "holds trials with other data or options" in refusal(capsys, line, **paths)


def test_trials_of_rows_that_have_changed_are_not_mixed(tmp_path, capsys):
    rows = np.random.default_rng(0).normal(5.0, 2.0, (60, 3)).astype(np.float32)
    paths = {"data": tmp_path / "rows.npy", "file": tmp_path / "trials"}
    line = f"tune {{data}} --trials {{n}} --search latent_dim --storage {{file}} {OPTIONS}"
    np.save(paths["data"], rows)
    command(line, n=1, **paths)
    np.save(paths["data"], 100 * rows)
    assert "its rows or columns have changed" in refusal(capsys, line, n=2, **paths)
    np.save(paths["data"], rows)
    command(line, n=2, **paths)
    assert "2 trials" in capsys.readouterr().out


def test_wrong_use_and_a_missing_library_are_named_in_one_line(data, tmp_path, capsys, monkeypatch):
    paths = {"data": data, "file": tmp_path / "trials"}
    line = "tune {data} --report --storage {file}"
    assert "--storage must have trials" in refusal(capsys, line, **paths)
    other = tmp_path / "mine.txt"
    other.write_text("my notes")
    line = "tune {data} --trials 1 --storage {file}"
    assert "must be a new file or a file of trials" in refusal(capsys, line, data=data, file=other)
    assert other.read_text() == "my notes"
    monkeypatch.chdir(tmp_path)
    assert "unknown data set" in refusal(capsys, "tune mnits")
    assert "only with --likelihood gaussian" in refusal(capsys, "tune digits --search scale")
    assert not (tmp_path / "runs").exists()
    assert "--trials must be at least 1" in refusal(capsys, "tune {data} --trials 0", **paths)
    monkeypatch.setitem(sys.modules, "optuna", None)
    assert "pip install 'pyro-vae[tune]'" in refusal(capsys, "tune {data}", **paths)
