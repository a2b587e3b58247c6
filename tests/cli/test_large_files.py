"""`train` with a large .npy file, which stays on disk, and commands under torchrun."""

import json

import numpy as np
import pytest
import torch

import pyro_vae as pv
from pyro_vae.cli.main import main
from pyro_vae.data import disk
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


@pytest.mark.parametrize("words", ["sample run", "score run", "report run"])
def test_other_commands_refuse_several_processes(words, tmp_path, monkeypatch, capsys):
    (tmp_path / "run").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit):
        main(words.split())
    assert "runs in one process, so start it without torchrun" in capsys.readouterr().err
