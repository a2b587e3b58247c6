"""`train` with a large .npy file, which stays on disk, and commands under torchrun."""

import json

import numpy as np
import pandas as pd
import pytest
import torch

import pyro_vae as pv
from pyro_vae.cli.main import main
from pyro_vae.data import disk, table_streams
from pyro_vae.data.datasets import load_data
from pyro_vae.data.disk import DiskArray
from pyro_vae.errors import UsageError

RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(disk, "LEAST_BYTES", 1)
    monkeypatch.setattr(disk, "BLOCK_BYTES", 64)


def test_train_reads_a_large_file_by_index_and_notices_its_change(tmp_path, capsys):
    x = RNG.standard_normal((203, 4)).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    line = f"train {tmp_path}/x.npy --out {tmp_path}/run --likelihood gaussian --epochs 1"
    main(f"{line} --batch-size 16 --engine eager --num-eval-samples 2 --no-report".split())
    # 51 blocks of 4 rows, of which the test part has 11; the last block has 3 rows.
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["num_examples"] in (43, 44)
    main(f"encode {tmp_path}/run --out {tmp_path}/codes.npz".split())
    data = load_data(tmp_path / "x.npy")
    codes = pv.encode(pv.load(tmp_path / "run"), data.test.x[:])["z"].numpy()
    assert np.array_equal(np.load(tmp_path / "codes.npz")["z_mean"], codes)
    np.save(tmp_path / "x.npy", x + 1)
    with pytest.raises(SystemExit):
        main(f"evaluate {tmp_path}/run --num-samples 2".split())
    assert "has changed since" in capsys.readouterr().err


def test_train_chooses_the_likelihood_of_a_large_file(tmp_path):
    np.save(tmp_path / "x.npy", RNG.standard_normal((203, 4)).astype(np.float32))
    line = f"train {tmp_path}/x.npy --out {tmp_path}/run --epochs 1 --batch-size 16 --engine eager"
    main(f"{line} --num-eval-samples 2 --no-report".split())
    given = json.loads((tmp_path / "run" / "config.json").read_text())["train"]
    assert given["likelihood"] == "gaussian"


@pytest.mark.parametrize(
    ("shape", "wanted"),
    [((160, 5), (5,)), ((60, 4, 4), (1, 4, 4)), ((60, 3, 4, 4), (3, 4, 4)), ((60, 5, 6, 3), None)],
)
def test_the_parts_of_a_file_hold_each_row_once(shape, wanted, tmp_path):
    x = RNG.integers(0, 256, shape).astype(np.uint8)
    np.save(tmp_path / "x.npy", x)
    data = load_data(tmp_path / "x.npy")
    parts = (data.train.x, data.validation.x, data.test.x)
    assert all(isinstance(part, DiskArray) for part in parts)
    whole = x.transpose(0, 3, 1, 2) if wanted is None else x.reshape(len(x), *wanted)
    found = torch.cat([part[:] for part in parts])
    assert data.shape == whole.shape[1:] == found.shape[1:]
    order = np.lexsort(found.reshape(len(x), -1).numpy().T)
    expected = np.lexsort(whole.reshape(len(x), -1).T)
    assert np.array_equal(found.numpy()[order], whole[expected])
    assert len(parts[0]) > 3 * len(parts[1])


def test_a_file_with_too_few_blocks_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(disk, "BLOCK_BYTES", 2**18)
    np.save(tmp_path / "x.npy", np.zeros((100, 4), np.float32))
    with pytest.raises(UsageError, match="1 blocks of rows, but needs at least 10"):
        load_data(tmp_path / "x.npy")


@pytest.mark.parametrize("words", ["sample run", "reconstruct run", "report run"])
def test_other_commands_refuse_several_processes(words, tmp_path, monkeypatch, capsys):
    (tmp_path / "run").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit):
        main(words.split())
    assert "runs in one process, so start it without torchrun" in capsys.readouterr().err


def table(n):
    sex, site = RNG.integers(0, 2, n), RNG.integers(0, 3, n)
    height = 170 + 8 * RNG.standard_normal(n) + 6 * sex
    found = pd.DataFrame({"person": [f"p{i}" for i in range(n)], "height": height})
    found["weight"] = height - 100 + 5 * RNG.standard_normal(n)
    found["sex"], found["site"] = np.array(["f", "m"])[sex], np.array(["a", "b", "c"])[site]
    found.loc[::7, "weight"] = np.nan
    return found


def test_commands_take_a_large_table(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PYRO_VAE_DATA", str(tmp_path / "cache"))
    monkeypatch.setattr(table_streams, "ROWS_AT_ONCE", 50)
    table(200).to_parquet(tmp_path / "t.parquet")
    (tmp_path / "columns.toml").write_text('[columns.site]\nrole = "label"\n')
    run = tmp_path / "run"
    line = f"train {tmp_path}/t.parquet --out {run} --columns {tmp_path}/columns.toml --epochs 2"
    main(
        f"{line} --batch-size 16 --engine eager --num-eval-samples 5 --diagnosis-seconds 1".split()
    )
    assert (run / "report.html").is_file()
    whole = pv.read_table(tmp_path / "t.parquet", {"site": "label"})
    test = whole.split().test.rows.sort().values.tolist()
    made = tmp_path / "made.csv"
    main(f"encode {run} --out {made}".split())
    codes = pd.read_csv(made)
    assert codes["person"].tolist() == [f"p{row}" for row in test]
    assert codes["labels"].tolist() == whole.labels[test].tolist()
    for command in ("score", "reconstruct"):
        main(f"{command} {run} --out {made}".split())
        assert pd.read_csv(made)["person"].tolist() == codes["person"].tolist()
    main(f"impute {run} --part test --draws 2 --num-samples 25 --out {made}".split())
    filled = pd.read_csv(made)
    assert list(filled) == list(table(10))
    known = whole.source.to_pandas().iloc[test]["weight"].to_numpy()
    held = ~np.isnan(known)
    assert np.allclose(filled["weight"][held], known[held])
    assert not filled["weight"].isna().any()
    main(f"evaluate {run} --num-samples 3".split())
    table(300).to_parquet(tmp_path / "new.parquet")  # all rows of another table are served
    main(f"encode {run} --data {tmp_path}/new.parquet --out {made}".split())
    assert pd.read_csv(made)["person"].tolist() == [f"p{row}" for row in range(300)]
    main(f"encode {run} --part all --out {made}".split())  # all parts, in the order of the file
    assert pd.read_csv(made)["person"].tolist() == [f"p{row}" for row in range(len(whole))]


def test_a_large_table_changes_between_train_and_resume(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PYRO_VAE_DATA", str(tmp_path / "cache"))
    held = table(200)
    held.to_parquet(tmp_path / "t.parquet")
    line = f"train {tmp_path}/t.parquet --out {tmp_path}/run --engine eager --num-eval-samples 5"
    main(f"{line} --epochs 1 --no-report --batch-size 16".split())
    main(f"{line} --epochs 2 --no-report --batch-size 16 --resume".split())
    held.assign(height=held.height + 1).to_parquet(tmp_path / "t.parquet")
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main(f"{line} --epochs 3 --no-report --batch-size 16 --resume".split())
    assert "has changed since" in capsys.readouterr().err
