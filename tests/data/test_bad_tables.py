"""Tables, groups and constants that cannot be right: one line each, before any training."""

import numpy as np
import pandas as pd
import pytest
import scipy.sparse
import torch

import pyro_vae as pv

NUMBERS = np.linspace(0.0, 1.0, 20)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (np.zeros((3, 2)), "got ndarray"),
        ([1, 2], "got list"),
        (None, "got NoneType"),
        ({"a": [1.0, 2.0], "b": [1.0]}, "expected length 2 but got length 1"),
        ({"a": [1, "x", 2.5, None] * 5, "b": NUMBERS}, "one type each"),
        (pd.DataFrame({"a": [1, "x", 2.5, None] * 5}), "one type each"),
        (pd.DataFrame(np.eye(3), columns=["a", "b", "a"]), "Duplicate column names"),
        (pd.DataFrame({"a": NUMBERS * 1j}), "one type each"),
        (
            pd.DataFrame(scipy.sparse.eye(4).toarray()).astype(pd.SparseDtype("float", 0.0)),
            "Sparse pandas data",
        ),
        ({"a": np.zeros((3, 2))}, "1-dimensional"),
    ],
)
def test_what_is_not_a_table_is_refused_in_a_line(source, words):
    with pytest.raises(pv.UsageError, match=words) as caught:
        pv.read_table(source)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        (["a"], "must be a mapping from the names of columns"),
        ({"a": {"kind": "categorical", "categories": [["x"], ["y"]]}}, "words or numbers"),
    ],
)
def test_bad_changes_of_a_schema(columns, words):
    with pytest.raises(pv.UsageError, match=words):
        pv.read_table({"a": ["x", "y"] * 10, "b": NUMBERS}, columns)


def test_a_column_of_lists_is_ignored():
    table = pv.read_table(pd.DataFrame({"a": [[1, 2]] * 20, "b": NUMBERS}))
    assert [column.role for column in table.schema.columns] == ["ignored", "data"]


def test_a_file_whose_categories_are_all_numbers_has_the_codes_of_the_words():
    table = {"a": ["1", "2", "A"] * 7, "b": [0.0, *NUMBERS]}
    with pytest.raises(pv.UsageError, match="mixes numbers and words"):
        pv.read_table(table)
    schema = pv.read_table(table, {"a": "categorical"}).schema
    assert schema.data[0].categories == ("1", "2", "A")
    assert pv.read_table({"a": [2, 1], "b": [0.0, 1.0]}, schema).x[:, 0].tolist() == [1.0, 0.0]
    with pytest.raises(pv.UsageError, match="holds 3 in row 1"):
        pv.read_table({"a": [2, 3], "b": [0.0, 1.0]}, schema)


@pytest.mark.parametrize(
    ("ids", "words"),
    [
        ([np.nan, "a", "a"], "row 0 is missing"),
        ([1, "a", "1"], "one kind"),
        (np.ma.array([1, 2, 1], mask=[True, False, False]), "masked values"),
        (torch.tensor([1, 2, 1]).to_sparse(), "sparse"),
    ],
)
def test_group_ids_that_numpy_would_change_are_refused(ids, words):
    with pytest.raises(pv.UsageError, match=words):
        pv.by_group(torch.zeros(3, 2), ids)


def test_words_remain_ids():
    assert pv.by_group(torch.zeros(3, 2), ["b", "a", "b"]).ids.tolist() == ["a", "b"]


FAMILIES = [
    lambda n: pv.Columns(["continuous"] * n, [0] * n),
    lambda n: pv.Standardized(pv.Gaussian, (n,)),
]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_column_that_floats_cannot_represent_is_refused(family):
    seconds = torch.stack([1.7e9 + 10 * torch.arange(50).double(), torch.ones(50)], 1)
    with pytest.raises(pv.UsageError, match=r"column 0 of x has mean 1.7e\+09"):
        family(2).standardize(seconds)
    made = family(2).double().standardize(seconds)
    torch.testing.assert_close(made.center, seconds.mean(0))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_constant_column_keeps_its_scale(family):
    assert family(1).standardize(torch.full((7, 1), 0.1, dtype=torch.double)).spread.item() == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_in_groups_are_not_rows_to_standardize(family):
    with pytest.raises(pv.UsageError, match="before by_group"):
        family(2).standardize(torch.zeros(4, 5, 2))


@pytest.mark.parametrize("row", [[-1.0, 1.0], [1.5, 1.0], [1.0, 0.0]])
def test_values_outside_the_support_of_their_column_name_columns(row):
    x = torch.tensor([[2.0, 0.5], [3.0, 4.0], row])
    vae = pv.VAE.mlp((2,), latent_dim=1, likelihood=pv.Columns(["count", "positive"], [0, 0]))
    with pytest.raises(pv.UsageError, match=r"of the Columns likelihood .* whole numbers from 0"):
        pv.score(vae, x, num_samples=30)
