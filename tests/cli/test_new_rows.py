"""Commands on a run take another table of any number of rows, such as a single new row."""

import csv

import numpy as np
import pytest
import torch
from cli_helpers import command

import pyro_vae as pv

SHORT = "--epochs 1 --num-eval-samples 21 --latent-dim 2 1 --hidden 8 --engine eager --no-report"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("rows")
    draw = np.random.default_rng(0)
    with open(path / "all.csv", "w") as file:
        rows = [
            [f"g{i // 3}", round(draw.normal(50, 9), 2), round(np.exp(2 * draw.normal()), 3)]
            for i in range(60)
        ]
        rows[4][1] = ""
        csv.writer(file).writerows([["group", "age", "dose"], *rows])
    (path / "one.csv").write_text("group,age,dose\ng1,,3.5\n")
    return path


def table(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_one_new_row_is_scored_encoded_and_imputed(folder, tmp_path, capsys):
    run, one = tmp_path / "run", folder / "one.csv"
    options = SHORT.replace("2 1", "2")
    (tmp_path / "c.toml").write_text('[columns.group]\nrole = "group"\n')
    command(
        f"train {{data}} --columns {{columns}} --out {{run}} {options}",
        data=folder / "all.csv",
        columns=tmp_path / "c.toml",
        run=run,
    )
    command("score {run} --data {one} --out {out}", run=run, one=one, out=tmp_path / "s.csv")
    (row,) = table(tmp_path / "s.csv")
    expected = pv.score(pv.load(run), torch.tensor([[torch.nan, 3.5]])).log_likelihood
    assert float(row["log_likelihood"]) == pytest.approx(expected.item(), abs=1e-6)
    command(
        "impute {run} {one} --draws 2 --num-samples 21 --out {out}",
        run=run,
        one=one,
        out=tmp_path / "i.csv",
    )
    (row,) = table(tmp_path / "i.csv")
    assert (row["group"], float(row["dose"]), float(row["age"]) > 0) == ("g1", 3.5, True)
    (tmp_path / "c.toml").write_text('[columns.dose]\nkind = "continuous"\n')
    with pytest.raises(SystemExit):
        command(
            f"train {{data}} --columns {{columns}} --out {{run}} --resume {options}",
            data=folder / "all.csv",
            columns=tmp_path / "c.toml",
            run=run,
        )
    assert "--columns cannot change the schema" in capsys.readouterr().err
    for name in ("encode", "reconstruct"):
        command(
            f"{name} {{run}} --data {{one}} --out {{out}}", run=run, one=one, out=tmp_path / "c.csv"
        )
        assert len(table(tmp_path / "c.csv")) == 1


def test_groups_with_a_positive_column_train_and_get_a_report(folder, tmp_path, capsys):
    run = tmp_path / "run"
    command(
        "train {data} --model multilevel --group group --out {run} "
        + SHORT.replace("--no-report", "--diagnosis-seconds 0"),
        data=folder / "all.csv",
        run=run,
    )
    assert "positive" in capsys.readouterr().out
    assert (run / "report.html").is_file()
