"""Means in columns of whole numbers keep their fractions."""

import pyarrow as pa
import pytest
import torch

import pyro_vae as pv


@pytest.fixture
def table():
    """A count and whole numbers that are continuous, with a hole in each."""
    n = 40
    ages = pa.array([None if i == 3 else 100 + 7 * i for i in range(n)], pa.int32())
    visits = pa.array([None if i == 5 else (i * i) % 29 for i in range(n)], pa.int64())
    return pv.read_table(pa.table({"age": ages, "visits": visits}))


def test_means_are_not_cut_to_whole_numbers(table):
    assert [column.kind for column in table.schema.data] == ["continuous", "count"]
    means = table.x.nan_to_num(0.0) + 0.75
    frame = table.frame(means)
    assert frame["age"].to_pylist() == means[:, 0].tolist()
    assert frame["visits"].to_pylist() == means[:, 1].tolist()
    filled = table.filled(torch.full_like(table.x, 6.25))
    assert filled["age"].to_pylist()[2:5] == [114, 6.25, 128]
    assert filled["visits"].to_pylist()[4:7] == [16, 6.25, 7]


def test_whole_numbers_keep_their_type(table):
    whole = table.frame(table.x.nan_to_num(2.0))
    assert whole.schema.types == [pa.int32(), pa.int64()]
    assert table.filled(torch.full_like(table.x, 6.0)).schema.types == [pa.int32(), pa.int64()]
