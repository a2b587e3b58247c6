"""`diagnose` of several runs: a table of what each run's own diagnosis says, and their spread."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from cli_helpers import command, only_smallest, read

import pyro_vae as pv
from pyro_vae.cli.main import main
from pyro_vae.diagnostics import guide_studies, model_studies
from pyro_vae.runs import folder as run_folder
from pyro_vae.runs.tensors import state_dict

TRAIN = (
    "train {data} --out {run} --likelihood gaussian --epochs 1 --batch-size 40 --latent-dim 2 "
    "--hidden 4 --num-eval-samples 2 --engine eager --no-report"
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run, a copy of it, one whose decoder is wrong by a constant, and one of other data."""
    folder = tmp_path_factory.mktemp("runs")
    x = np.random.default_rng(0).normal(size=(300, 3)).astype("float32")
    np.save(folder / "x.npy", x)
    np.save(folder / "other.npy", x[::-1])
    np.save(folder / "new.npy", x + 0.1)
    command(TRAIN, data=folder / "x.npy", run=folder / "a")
    command(TRAIN, data=folder / "other.npy", run=folder / "other")
    shutil.copytree(folder / "a", folder / "copy")
    shutil.copytree(folder / "a", folder / "worse")
    worse = pv.load(folder / "worse")
    with torch.no_grad():
        for name, bias in worse.named_parameters():
            if name.startswith("decoder") and name.endswith("bias"):
                bias += 1.0
    run_folder.write_model(folder / "worse", state_dict(worse))
    return folder


@pytest.fixture
def runs(trained, tmp_path, monkeypatch):
    only_smallest(monkeypatch, model_studies.latents_study, guide_studies.reliability_study)
    monkeypatch.chdir(shutil.copytree(trained, tmp_path / "runs"))


def table(out):
    """The rows of the table, by the name of the run."""
    lines = out.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("run "))
    rows = lines[start + 1 : lines.index("", start)]
    return {cells[0]: cells[1:] for cells in (re.split("  +", row) for row in rows)}


@pytest.mark.thorough
@pytest.mark.usefixtures("runs")
def test_the_table_repeats_the_single_diagnoses(capsys):
    single = {}
    for run in ("a", "worse"):
        main(["diagnose", run, "--no-report"])
        single[run] = read(Path(run) / "metrics.json")["diagnostics"]
    capsys.readouterr()
    main(["diagnose", "a", "worse", "--no-report"])
    out = capsys.readouterr().out
    assert "about 200 s for each run (--budget)" in out
    rows = table(out)
    assert list(rows) == ["a", "worse"]
    for run, found in single.items():
        now = read(Path(run) / "metrics.json")["diagnostics"]
        assert now["results"] == found["results"]
        assert now["findings"] == found["findings"]
        weighed, latents = found["results"]["log_likelihood"], found["results"]["latents"]
        faults, value, elbo, gap, units = rows[run]
        assert value.startswith(f"{weighed['log_likelihood']:.3f} ± ")
        assert elbo == f"{weighed['elbo']:.3f}"
        assert gap == f"{weighed['log_likelihood'] - weighed['elbo']:.2f}"
        assert units == f"z {latents['active_units']['z']} of 2"
        assert [word.split(" (")[0] for word in faults.split(", ")] == (
            [blame["part"] for blame in found["blamed"]] or ["no part"]
        )


@pytest.mark.thorough
@pytest.mark.usefixtures("runs")
def test_copies_agree_and_each_keeps_its_own_report(capsys):
    main(["diagnose", "a", "copy"])
    out = capsys.readouterr().out
    for run in ("a", "copy"):
        page = (Path(run) / "report.html").read_text()
        assert f"report              {run}/report.html\n" in out
        assert f"<h1>{run}</h1>" in page
        assert "Can the inference be believed?" in page
    assert "The verdicts agree" in out
    assert "by 0.000 ± 0.000, paired by row." in out
    assert table(out)["a"] == table(out)["copy"]


@pytest.mark.usefixtures("runs")
def test_a_worse_run_is_told_apart(capsys):
    main(["diagnose", "copy", "worse", "a", "--no-report"])
    out = capsys.readouterr().out
    pattern = r"on the same 50 rows .* (copy|a) is higher than worse by (\S+) ± (\S+), paired"
    difference, error = map(float, re.search(pattern, out).groups()[1:])
    assert difference > 4 * error > 0
    assert "which does not contain this spread" in out


@pytest.mark.usefixtures("runs")
def test_runs_of_other_data_are_not_compared(capsys):
    main(["diagnose", "a", "other", "--no-report"])
    out = capsys.readouterr().out
    assert "log p(x) is not comparable: a and other have different test rows." in out
    assert "paired" not in out
    main(["diagnose", "a", "other", "--data", "new.npy", "--no-report"])
    assert "paired by row" in capsys.readouterr().out  # both on the same data


@pytest.mark.usefixtures("runs")
@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("a nowhere", "no run 'nowhere'"),
        ("a copy a", "a is given twice; give each run once"),
        ("a copy ../runs/a", "../runs/a is given twice (as a and ../runs/a)"),
        ("a copy --budget 0", "--budget must be above 0 seconds, got 0"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_it_starts(words, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["diagnose", *words.split(), "--no-report"])
    assert stopped.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert message in err
    assert "diagnostics" not in read(Path("a") / "metrics.json")
