"""`evaluate --part` measures the rows that it names, of the run's data or of others."""

import numpy as np
import pytest
from cli_helpers import QUICK, command, read

import pyro_vae as pv


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("parts")
    draw = np.random.default_rng(0)
    lines = [
        f"{a:.3f},{a + b:.3f},{'xy'[i % 2]}" for i, (a, b) in enumerate(draw.normal(size=(40, 2)))
    ]
    (path / "all.csv").write_text("\n".join(["a,b,kind", *lines]) + "\n")
    (path / "few.csv").write_text("a,b,kind\n0.12,0.2,x\n-1.55,,y\n0.4,0.31,x\n")
    (path / "columns.toml").write_text('[columns.kind]\nrole = "label"\n')
    command(
        f"train {{data}} --columns {{toml}} --out {{run}} {QUICK} --no-report",
        data=path / "all.csv",
        toml=path / "columns.toml",
        run=path / "run",
    )
    return path


def test_every_row_of_another_table_counts(folder):
    run = folder / "run"
    command(
        "evaluate {run} --data {few} --part all --num-samples 21", run=run, few=folder / "few.csv"
    )
    found = read(run / "metrics.json")
    x = pv.read_table(
        folder / "few.csv",
        pv.Schema(pv.load_data(folder / "all.csv", columns={"kind": "label"}).schema.columns),
    ).x
    want = pv.evaluate(pv.load(run), x, num_samples=21)
    assert (found["num_examples"], found["part"]) == (3, "all")
    assert found["log_likelihood"] == pytest.approx(want.log_likelihood)


@pytest.mark.parametrize(("part", "rows"), [("train", 28), ("validation", 4), ("all", 40)])
def test_each_part_of_the_run_counts(part, rows, folder):
    command(f"evaluate {{run}} --part {part} --num-samples 2", run=folder / "run")
    found = read(folder / "run" / "metrics.json")
    assert (found["num_examples"], found["part"]) == (rows, part)
    # The probe is fitted to training rows.
    assert (found["probe_accuracy"] is None) == (part != "validation")


def test_the_test_part_is_the_default(folder, capsys):
    command("evaluate {run} --num-samples 2", run=folder / "run")
    found = read(folder / "run" / "metrics.json")
    assert (found["num_examples"], "part" in found) == (8, False)
    with pytest.raises(SystemExit):
        command("evaluate {run} --part half", run=folder / "run")
    assert "--part must be train, validation, test or all, got 'half'" in capsys.readouterr().err
