"""`info`, `compare` and `repeat`, the groups of the help, and shell completion."""

import os
import re
import shutil

import numpy as np
import pytest
import torch
from cli_helpers import command, only_smallest, read

import pyro_vae as pv
from pyro_vae.cli.app import app
from pyro_vae.cli.main import main

TRAIN = (
    "train {data} --out {run} --likelihood gaussian --epochs 2 --batch-size 20 --latent-dim 2 "
    "--hidden none --num-eval-samples 2 --engine eager --no-report --seed "
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two runs of the same data with other seeds, and one of other data."""
    folder = tmp_path_factory.mktemp("about")
    x = np.random.default_rng(0).normal(size=(60, 3)).astype("float32")
    np.save(folder / "x.npy", x)
    np.save(folder / "other.npy", x[::-1])
    for run, data, seed in (("a", "x", 0), ("b", "x", 1), ("other", "other", 0)):
        command(f"{TRAIN}{seed}", data=folder / f"{data}.npy", run=folder / run)
    return folder


def test_info_says_what_a_run_is(folder, capsys):
    command("info {run}", run=folder / "a")
    told = dict(re.split("  +", line, maxsplit=1) for line in capsys.readouterr().out.splitlines())
    measured = read(folder / "a" / "metrics.json")
    count = sum(p.numel() for p in pv.load(folder / "a").parameters())
    assert told["data"] == str(folder / "x.npy")
    assert told["pair"] == f"VAE, {count:,} parameters"
    options = "--latent-dim 2 --hidden none --activation silu --linear --likelihood gaussian"
    assert told["options"].startswith(options)
    assert told["epochs"].startswith("2, best ")
    assert told["bound"].startswith(f"ELBO {measured['elbo']:.3f} nats per example, log p(x) ≥ ")
    assert told["bound"].endswith(f" ± {measured['log_likelihood_total_error']:.3f}")
    assert told["verdict"] == "not diagnosed"


def test_compare_pairs_the_rows(folder, capsys):
    command("compare {a} {b} --num-samples 30", a=folder / "a", b=folder / "b")
    out = capsys.readouterr().out
    table = {cells[0]: cells[1:] for cells in (re.split("  +", line) for line in out.splitlines())}
    x = pv.load_data(folder / "x.npy").test.x
    found = [pv.log_likelihood(pv.load(folder / run), x, num_samples=30) for run in "ab"]
    low, high = sorted(found, key=lambda one: one.value)
    differences = (low.per_datum - high.per_datum).double()
    wanted = f"{differences.mean():.3f} ± {differences.std() / len(x) ** 0.5:.3f}"
    assert sorted([table[str(folder / run)][2] for run in "ab"]) == sorted(["best", wanted])
    assert table[str(folder / "a")][0] == f"{found[0].elbo:.3f}"


def test_compare_does_not_subtract_log_p_of_other_rows(folder, capsys):
    command("compare {a} {o} --num-samples 30", a=folder / "a", o=folder / "other")
    out = capsys.readouterr().out
    assert "log p(x) is not comparable" in out
    assert "best" not in out.replace("difference to the best", "")


def test_compare_needs_two_runs(folder, capsys):
    with pytest.raises(SystemExit):
        command("compare {a}", a=folder / "a")
    assert "needs at least two runs" in capsys.readouterr().err


def test_repeat_gives_the_same_weights(folder, capsys, tmp_path, monkeypatch):
    only_smallest(monkeypatch)  # it writes a report, whose diagnosis would take ten seconds
    command("repeat {a} --out {new}", a=folder / "a", new=tmp_path / "new")
    assert f"weights             equal those of {folder / 'a'}" in capsys.readouterr().out
    for name, value in pv.load(tmp_path / "new").state_dict().items():
        assert torch.equal(value, pv.load(folder / "a").state_dict()[name])


def test_repeat_refuses_changed_data(folder, tmp_path, capsys):
    np.save(tmp_path / "x.npy", np.ones((60, 3), "float32") * np.arange(60)[:, None] / 60)
    command(f"{TRAIN}0", data=tmp_path / "x.npy", run=tmp_path / "run")
    np.save(tmp_path / "x.npy", np.random.default_rng(1).normal(size=(60, 3)).astype("float32"))
    capsys.readouterr()
    with pytest.raises(SystemExit):
        command("repeat {run}", run=tmp_path / "run")
    assert "Traceback" not in capsys.readouterr().err
    assert not (tmp_path / "run-repeat").exists()


def test_a_table_is_repeated_with_the_columns_of_the_run(tmp_path, capsys, monkeypatch):
    only_smallest(monkeypatch)
    numbers = np.random.default_rng(0).integers(1, 6, (40, 2))
    rows = "".join(f"{a},{b},{a / 4 + b}\n" for a, b in numbers)
    (tmp_path / "t.csv").write_text("a,b,c\n" + rows)
    changes = tmp_path / "columns.toml"
    changes.write_text('[columns.a]\nkind = "categorical"\n')
    command(
        "train {data} --out {run} --columns {columns} --epochs 2 --latent-dim 1 --hidden none "
        "--num-eval-samples 2 --engine eager --no-report",
        data=tmp_path / "t.csv",
        run=tmp_path / "run",
        columns=changes,
    )
    command("info {run}", run=tmp_path / "run")
    assert "--likelihood" not in capsys.readouterr().out
    changes.write_text('[columns.a]\nrole = "ignored"\n')
    command("repeat {run}", run=tmp_path / "run")
    assert f"weights             equal those of {tmp_path / 'run'}" in capsys.readouterr().out


def test_help_of_train_has_groups_without_noise(capsys):
    main(["train", "--help"])
    out = capsys.readouterr().out
    found = re.findall(r"╭─ (\w+) ", out)
    assert found == ["Data", "Model", "Likelihood", "Inference", "Training", "Output"]
    assert "--empty" not in out
    assert "default: False" not in out


def test_a_list_of_a_file_may_be_empty_only_where_that_means_something(tmp_path, capsys):
    (tmp_path / "options.json").write_text('{"data": "digits", "latent_dim": []}')
    with pytest.raises(SystemExit):
        command("train --config {file}", file=tmp_path / "options.json")
    assert "--latent-dim must have at least one number, got none" in capsys.readouterr().err


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shell_completes_commands_and_options(shell):
    script = app.generate_completion(shell=shell)
    assert "compare" in script
    assert "latent-dim" in script


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes")
def test_info_does_not_wait_for_a_pipe_and_names_a_damaged_history(folder, tmp_path, capsys):
    copied = shutil.copytree(folder / "a", tmp_path / "run")
    history = copied / "history.csv"
    history.write_bytes(history.read_bytes()[:-3])
    for words in ("is cut short, damaged", "must be a plain file"):
        with pytest.raises(SystemExit):
            main(["info", str(copied)])
        assert words in capsys.readouterr().err
        history.unlink()
        os.mkfifo(history)
