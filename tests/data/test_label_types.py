"""Labels of every integer type, and labels that no 64-bit integer holds."""

import numpy as np
import pytest
import torch

import pyro_vae as pv
from pyro_vae.pairs.arrays import as_labels

KINDS = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")


@pytest.mark.parametrize("kind", KINDS)
def test_integers_of_every_width_are_labels(kind, tmp_path):
    y = np.arange(20).astype(kind) % 3
    assert as_labels(y).tolist() == y.tolist()
    assert as_labels(torch.from_numpy(y)).dtype == torch.int64
    np.savez(tmp_path / "rows.npz", x=np.zeros((20, 2), np.float32), y=y)
    data = pv.load_data(tmp_path / "rows.npz")
    assert sorted(data.train.labels.tolist()) == sorted(y[data.train.rows.numpy()].tolist())


@pytest.mark.parametrize("value", [2**63, 2**64 - 2, 2**64 - 1])
def test_labels_over_63_bits_are_refused(value, tmp_path):
    """2^64 - 1 would become -1, a missing label."""
    y = np.zeros(20, np.uint64)
    y[4] = value
    with pytest.raises(pv.UsageError, match=f"labels must be integers .* got {value} in row 4"):
        as_labels(y)
    np.savez(tmp_path / "rows.npz", x=np.zeros((20, 2), np.float32), y=y)
    with pytest.raises(pv.UsageError, match=f"labels must be whole numbers from 0 .* got {value}"):
        pv.load_data(tmp_path / "rows.npz")


@pytest.mark.parametrize("value", [1e19, np.nan, -1.0, 0.5])
def test_labels_of_a_file_that_are_not_whole_numbers_are_refused(value, tmp_path):
    y = np.zeros(20)
    y[4] = value
    np.savez(tmp_path / "rows.npz", x=np.zeros((20, 2), np.float32), y=y)
    with pytest.raises(pv.UsageError, match="labels must be whole numbers from 0"):
        pv.load_data(tmp_path / "rows.npz")
