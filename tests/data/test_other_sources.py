"""Data frames of polars."""

import pytest
import torch

import pyro_vae as pv


def test_a_frame_of_polars_is_the_table_of_its_file(tmp_path):
    """Nulls, NaN, words, enumerations and booleans; the table returns with the same columns."""
    polars = pytest.importorskip("polars")
    frame = polars.DataFrame(
        {
            "id": [f"p{i}" for i in range(12)],
            "age": [None if i == 3 else 30.5 + i for i in range(12)],
            "weight": [float("nan") if i == 4 else 60.0 + i / 7 for i in range(12)],
            "town": ["Bern", "Lyon", "Graz"] * 4,
            "size": polars.Series(["S", "M", "L"] * 4, dtype=polars.Enum(["S", "M", "L"])),
            "smoker": [i % 2 == 0 for i in range(12)],
        }
    )
    table = pv.read_table(frame)
    kinds = {column.name: column.kind for column in table.schema.data}
    assert list(kinds) == ["age", "weight", "town", "size", "smoker"]
    assert (kinds["town"], kinds["smoker"]) == ("categorical", "binary")
    assert table.schema.data[3].categories == ("S", "M", "L")
    assert table.ids[:2] == ("p0", "p1")
    assert torch.equal(table.x.isnan().nonzero(), torch.tensor([[3, 0], [4, 1]]))
    frame.write_parquet(tmp_path / "rows.parquet")
    torch.testing.assert_close(
        pv.read_table(tmp_path / "rows.parquet").x, table.x, equal_nan=True, atol=0, rtol=0
    )
    back = polars.from_arrow(table.frame(table.x, table.ids))
    assert back.columns == frame.columns
    assert back["town"].to_list() == frame["town"].to_list()
    assert back["age"].to_list() == frame["age"].to_list()
