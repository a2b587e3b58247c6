"""The command line on tables: one train, and each command that returns results to a table."""

import csv
import shutil

import numpy as np
import pytest
import torch
from cli_helpers import command, read

import pyro_vae as pv

SHORT = (
    "--epochs 2 --num-eval-samples 21 --latent-dim 2 --hidden 8 --engine eager "
    "--diagnosis-seconds 0"
)


def write(path, n=60, seed=0):
    """A table with ids, holes and three kinds of columns."""
    draw = np.random.default_rng(seed)
    with open(path, "w", newline="") as file:
        out = csv.writer(file)
        out.writerow(["patient", "age", "city", "visits"])
        for i in range(n):
            age = "" if i % 7 == 3 else round(draw.normal(50, 9), 1)
            out.writerow(
                [f"p{i:02d}", age, draw.choice(["Bern", "Lyon", "Graz"]), draw.integers(0, 40)]
            )
    return path


def table(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("table")
    write(folder / "people.csv")
    command(f"train {{data}} --out {{run}} {SHORT}", data=folder / "people.csv", run=folder / "run")
    return folder


@pytest.fixture
def run(trained, tmp_path):
    return shutil.copytree(trained / "run", tmp_path / "run")


def test_train_shows_and_keeps_the_schema(trained, capsys):
    from pyro_vae.data.schema import stored_schema

    data = pv.load_data(trained / "people.csv")
    assert stored_schema(trained / "run" / "schema.toml") == data.table.schema
    recorded = read(trained / "run" / "config.json")["train"]
    assert (recorded["activation"], recorded["batch_size"]) == ("silu", 32)
    pair = pv.load(trained / "run")
    found = pv.evaluate(pair, data.test.x, num_samples=21)
    assert found.elbo == read(trained / "run" / "metrics.json")["elbo"]
    assert "age" in (trained / "run" / "report.html").read_text()


def test_impute_fills_only_the_holes(trained, run, tmp_path, capsys):
    command(
        "impute {run} {data} --out {out} --draws 3 --num-samples 50",
        **{"run": run, "data": trained / "people.csv", "out": tmp_path / "filled.csv"},
    )
    before, after = table(trained / "people.csv"), table(tmp_path / "filled.csv")
    assert [list(row) for row in after] == [list(row) for row in before]
    holes = [i for i, row in enumerate(before) if row["age"] == ""]
    for i, (old, new) in enumerate(zip(before, after, strict=True)):
        assert (old["patient"], old["city"], old["visits"]) == (
            *(new["patient"], new["city"], new["visits"]),
        )
        assert 0 < float(new["age"]) < 100 if i in holes else float(old["age"]) == float(new["age"])
    long = table(tmp_path / "filled_draws.csv")
    assert [row[".imp"] for row in long] == [str(i) for i in range(4) for _ in range(60)]
    cells = table(tmp_path / "filled_cells.csv")
    assert [row["patient"] for row in cells] == [f"p{i:02d}" for i in holes]
    for row in cells:
        assert float(row["low"]) < float(row["value"]) < float(row["high"])
        assert 1 <= float(row["effective_sample_size"]) <= 50
    assert "missing entries     9 in 9 rows" in capsys.readouterr().out


def test_imputations_by_nuts_have_an_r_hat(trained, run, tmp_path):
    lines = (trained / "people.csv").read_text().splitlines()
    hole = next(
        line
        for line, row in zip(lines[1:], table(trained / "people.csv"), strict=True)
        if row["age"] == ""
    )
    (tmp_path / "one.csv").write_text(f"{lines[0]}\n{hole}\n")
    command(
        "impute {run} {data} --out {out} --draws 2 --num-samples 24 --method nuts",
        **{"run": run, "data": tmp_path / "one.csv", "out": tmp_path / "filled.csv"},
    )
    (cell,) = table(tmp_path / "filled_cells.csv")
    assert cell["column"] == "age"
    assert list(cell)[-2:] == ["effective_sample_size", "r_hat"]
    assert 0.5 < float(cell["r_hat"]) < 5
    assert float(cell["low"]) <= float(cell["value"]) <= float(cell["high"])


def test_results_carry_ids_in_the_order_of_the_file(trained, run, tmp_path):
    other = write(tmp_path / "other.csv", 25, seed=5)
    ids = [f"p{i:02d}" for i in range(25)]
    for words in ("score --num-samples 21", "encode", "reconstruct"):
        name = words.split()[0]
        command(
            f"{words} {{run}} --data {{data}} --out {{out}}",
            run=run,
            data=other,
            out=tmp_path / f"{name}.csv",
        )
        assert [row["patient"] for row in table(tmp_path / f"{name}.csv")] == ids
    pair, read_again = pv.load(run), pv.load_data(trained / "people.csv").table.schema
    x = pv.read_table(other, read_again).x
    scores = pv.score(pair, x, num_samples=21)
    written = [float(row["log_likelihood"]) for row in table(tmp_path / "score.csv")]
    assert written == pytest.approx(scores.log_likelihood.tolist())
    codes = [float(row["z_mean_1"]) for row in table(tmp_path / "encode.csv")]
    assert codes == pytest.approx(pv.encode(pair, x)["z"][:, 1].tolist())
    assert {row["city"] for row in table(tmp_path / "reconstruct.csv")} <= {"Bern", "Lyon", "Graz"}
    few = tmp_path / "few.csv"
    command("reconstruct {run} --data {data} --num 3 --out {out}", run=run, data=other, out=few)
    assert table(few) == table(tmp_path / "reconstruct.csv")[:3]
    command("encode {run} --part train", run=run)
    with np.load(run / "codes.npz") as arrays:
        assert list(arrays["rows"]) == sorted(arrays["rows"])
        assert len(arrays["z_mean"]) == 42


def test_samples_are_a_table(run):
    command("sample {run} --num 9", run=run)
    made = table(run / "samples.csv")
    assert len(made) == 9
    assert list(made[0]) == ["age", "city", "visits"]
    assert all(row["visits"] == str(int(row["visits"])) for row in made)


def test_another_run_in_the_folder_leaves_no_schema(run):
    vae, x = pv.VAE.mlp((4,), 2, (8,), pv.Gaussian), torch.rand(20, 4)
    pv.fit(vae, x, epochs=1, engine="eager", progress=False, out=run, overwrite=True)
    assert not (run / "schema.toml").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("train {csv} --likelihood gaussian", "--likelihood does not apply to people, a table"),
        ("train {csv} --standardize", "--standardize does not apply to tables"),
        ("train {csv} --prior vamp", "--prior vamp does not apply to tables"),
        ("train {csv} --columns {none}", "none.toml is missing"),
        ("train digits --columns {none}", "--columns applies only to tables; 'digits' is not"),
        ("train {folder}/absent.csv", "absent.csv: no such file"),
        ("score {run} --part half", "--part must be train, validation, test or all, got 'half'"),
        ("score {run} --out scores.xls", "--out must end in .csv"),
        ("impute {run} {csv} --draws 0", "--draws must be at least 1, got 0"),
        ("impute {run} {csv} --level 2", "--level must be between 0 and 1, got 2.0"),
    ],
)
def test_wrong_words_are_one_line(words, said, trained, run, capsys):
    paths = {"csv": trained / "people.csv", "run": run, "none": "none.toml", "folder": trained}
    with pytest.raises(SystemExit) as left:
        command(words, **paths)
    assert left.value.code == 2
    told = capsys.readouterr().err.strip().splitlines()
    assert said in told[-1]


def test_arrays_are_standardized_and_imputed(tmp_path, capsys):
    torch.manual_seed(0)
    x = torch.randn(60, 3) * 1000 + 5e4
    x[::5, 1] = torch.nan
    np.save(tmp_path / "rows.npy", x.numpy())
    command(
        f"train {{data}} --out {{run}} {SHORT} --likelihood gaussian --no-report",
        data=tmp_path / "rows.npy",
        run=tmp_path / "run",
    )
    told = capsys.readouterr().out
    assert "standardized        inside the pair" in told
    assert "missing entries     12, which the likelihood leaves out" in told
    assert read(tmp_path / "run" / "metrics.json")["elbo"] > -40
    command("impute {run} --num-samples 50 --draws 2", run=tmp_path / "run")
    with np.load(tmp_path / "run" / "filled.npz") as arrays:
        assert arrays["draws"].shape == (2, 60, 3)
        order = arrays["rows"].argsort()
        assert np.array_equal(arrays["missing"][order], np.isnan(x.numpy()))
        assert not np.isnan(arrays["mean"]).any()
        assert abs(arrays["mean"] - 5e4).max() < 1e4
