"""A table that the memory cannot hold is refused before it is read."""

import numpy as np
import pandas as pd
import pytest

import pyro_vae as pv
from pyro_vae.data import sizes


@pytest.fixture
def frame():
    # Parquet packs equal numbers, so the file is much smaller than the table.
    return pd.DataFrame({"a": np.repeat([0.5, 1.5], 20_000), "b": np.repeat([2.5, 1.5], 20_000)})


def save(frame, path):
    write = {".parquet": frame.to_parquet, ".feather": frame.to_feather, ".csv": frame.to_csv}
    write[path.suffix](path)
    return path


@pytest.mark.parametrize("ending", ["parquet", "feather", "csv"])
def test_a_table_larger_than_the_memory_is_refused(ending, frame, tmp_path, monkeypatch):
    path = save(frame, tmp_path / f"t.{ending}")
    least = 4 * 2 * 40_000 if ending == "parquet" else path.stat().st_size
    monkeypatch.setattr(sizes, "available_memory", lambda: least - 1)
    with pytest.raises(pv.UsageError, match=r"needs 0\.0 GiB of memory") as refused:
        pv.read_table(path)
    assert str(path) in str(refused.value)
    assert "\n" not in str(refused.value)


def test_the_file_of_the_packed_table_is_small(frame, tmp_path):
    path = save(frame, tmp_path / "t.parquet")
    assert path.stat().st_size < 4 * 2 * 40_000 / 10
    assert len(pv.read_table(path).x) == 40_000
