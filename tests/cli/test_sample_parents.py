"""Samples whose context comes from test rows name these rows."""

import csv

import numpy as np
from cli_helpers import QUICK, command

import pyro_vae as pv


def test_samples_of_a_table_name_the_rows_of_their_context(tmp_path):
    draw = np.random.default_rng(0)
    lines = [
        f"p{i},{v:.3f},{(i % 4) * 10 + v:.3f},{i % 4}.5" for i, v in enumerate(draw.normal(size=40))
    ]
    (tmp_path / "rows.csv").write_text("\n".join(["id,a,b,dose", *lines]) + "\n")
    (tmp_path / "c.toml").write_text('[columns.dose]\nrole = "context"\nkind = "continuous"\n')
    paths = {"t": tmp_path / "rows.csv", "c": tmp_path / "c.toml", "run": tmp_path / "run"}
    command("train {t} --columns {c} --condition context --out {run} --no-report " + QUICK, **paths)
    command("sample {run} --num 11 --out {s}", s=tmp_path / "s.csv", **paths)
    with open(tmp_path / "s.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    data = pv.load_data(tmp_path / "rows.csv", columns=tmp_path / "c.toml")
    ids = [data.table.ids[row] for row in data.test.rows.tolist()]
    assert [row["parent"] for row in rows] == [ids[i % len(ids)] for i in range(11)]
    assert list(rows[0]) == ["parent", "a", "b"]


def test_samples_of_arrays_name_the_rows_of_their_context(tmp_path):
    x = np.random.default_rng(0).normal(size=(30, 3)).astype(np.float32)
    np.savez(tmp_path / "rows.npz", x=x, context=x[:, :1])
    paths = {"x": tmp_path / "rows.npz", "run": tmp_path / "run"}
    command(
        "train {x} --out {run} --condition context --likelihood gaussian --no-report " + QUICK,
        **paths,
    )
    command("sample {run} --num 8", **paths)
    rows = pv.load_data(tmp_path / "rows.npz").test.rows.tolist()
    with np.load(tmp_path / "run" / "samples_parents.npz") as found:
        assert found["parent"].tolist() == [rows[i % len(rows)] for i in range(8)]
