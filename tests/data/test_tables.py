"""Tables: what is inferred, the way there and back, and what is refused in one line."""

import numpy as np
import pandas as pd
import pytest
import torch

import pyro_vae as pv
from pyro_vae.data.schema import stored_schema


def frame(n=60, seed=0):
    """A table with a column of each kind, ids, and holes."""
    draw = np.random.default_rng(seed)
    table = pd.DataFrame(
        {
            "id": [f"p{i:03d}" for i in range(n)],
            "age": draw.normal(50, 9, n).round(1),
            "income": draw.lognormal(8, 1.2, n),
            "visits": draw.poisson(6, n) + draw.integers(0, 20, n),
            "smoker": draw.choice(["no", "yes"], n),
            "city": draw.choice(["Bern", "Lyon", "Graz"], n),
            "grade": draw.integers(1, 5, n),
        }
    )
    for name in ("age", "city"):
        table.loc[draw.choice(n, 9, replace=False), name] = None
    return table


KINDS = {
    "age": "continuous",
    "income": "positive",
    "visits": "count",
    "smoker": "binary",
    "city": "categorical",
    "grade": "ordinal",
}


def test_kinds_and_roles_are_inferred():
    table = pv.read_table(frame())
    assert {column.name: column.kind for column in table.schema.data} == KINDS
    assert table.id_name == "id"
    assert table.ids[:2] == ("p000", "p001")
    assert table.schema.data[4].categories == ("Bern", "Graz", "Lyon")
    assert table.x.isnan().sum(0).tolist() == [9, 0, 0, 0, 9, 0]
    assert "city    categorical  data    Bern, Graz, Lyon" in str(table.schema)


@pytest.mark.parametrize("ending", [".csv", ".tsv", ".parquet", ".feather", "frame", "protocol"])
def test_every_source_gives_the_same_rows(ending, tmp_path):
    pa, made = pytest.importorskip("pyarrow"), frame()
    path = tmp_path / f"rows{ending}"
    writers = {
        ".csv": lambda: made.to_csv(path, index=False),
        ".tsv": lambda: made.to_csv(path, index=False, sep="\t"),
        ".parquet": lambda: made.to_parquet(path),
        ".feather": lambda: made.to_feather(path),
    }
    source = made if ending == "frame" else path

    class Other:  # a frame of another library, which only has the protocol
        def __arrow_c_stream__(self, requested_schema=None):
            return pa.Table.from_pandas(made).__arrow_c_stream__(requested_schema)

    if ending == "protocol":
        source = Other()
    elif ending != "frame":
        writers[ending]()
    found, want = pv.read_table(source), pv.read_table(made)
    torch.testing.assert_close(found.x, want.x, equal_nan=True)
    assert found.schema == want.schema


def test_a_table_out_is_the_table_in():
    made = frame()
    table = pv.read_table(made)
    again = table.frame(table.x, table.ids).to_pandas()
    pd.testing.assert_frame_equal(again, made, check_dtype=False)
    assert [str(t) for t in table.frame(table.x).schema.types[1:]] == [
        *("double", "int64", "large_string", "large_string", "int64"),
    ]


def test_only_holes_are_filled():
    made = frame()
    table = pv.read_table(made)
    filled = table.filled(torch.zeros_like(table.x)).to_pandas()
    assert list(filled.columns) == list(made.columns)
    for name in made:
        seen = made[name].notna()
        assert (filled[name][seen] == made[name][seen]).all()
    assert set(filled["city"][made["city"].isna()]) == {"Bern"}
    assert set(filled["age"][made["age"].isna()]) == {0.0}


def test_draws_have_the_long_form():
    table = pv.read_table(frame())
    long = table.long(torch.stack([torch.zeros_like(table.x), torch.ones_like(table.x)]))
    whole = long.to_pandas()
    assert whole[".imp"].tolist() == [0] * 60 + [1] * 60 + [2] * 60
    assert whole[".id"].tolist() == list(range(1, 61)) * 3
    assert whole.groupby(".imp")["age"].apply(lambda one: int(one.isna().sum())).tolist() == [
        9,
        0,
        0,
    ]


def test_a_schema_is_changed_by_name_and_by_file(tmp_path):
    made = frame()
    changes = {"visits": "continuous", "grade": "label", "income": {"role": "ignored"}}
    table = pv.read_table(made, changes)
    assert table.schema.names == ("age", "visits", "smoker", "city")
    assert table.schema.data[1].kind == "continuous"
    assert torch.equal(table.labels, torch.tensor(made["grade"].to_numpy() - 1))
    path = tmp_path / "schema.toml"
    path.write_text('[columns.visits]\nkind = "continuous"\n[columns.grade]\nrole = "label"\n')
    assert pv.read_table(made, path).schema.names == ("age", "income", "visits", "smoker", "city")
    order = pv.read_table(
        made, {"city": {"kind": "ordinal", "categories": ["Lyon", "Graz", "Bern"]}}
    )
    codes = order.x[:, 4]
    assert codes[made["city"] == "Lyon"].unique().tolist() == [0.0]


def test_a_stored_schema_reads_other_tables_alike(tmp_path):
    from pyro_vae.data.schema import stored_schema

    table = pv.read_table(frame())
    (tmp_path / "schema.toml").write_text(table.schema.to_toml())
    schema = stored_schema(tmp_path / "schema.toml")
    assert schema == table.schema
    few = frame().iloc[[5]]
    torch.testing.assert_close(pv.read_table(few, schema).x, table.x[5:6], equal_nan=True)


def test_pandas_categories_keep_their_order():
    sizes = pd.Categorical(["S", "L", "M", "S"] * 5, categories=["S", "M", "L"], ordered=True)
    table = pv.read_table(pd.DataFrame({"size": sizes, "weight": np.arange(20) * 1.5}))
    assert table.schema.data[0].kind == "ordinal"
    assert table.x[:3, 0].tolist() == [0.0, 2.0, 1.0]


def test_a_split_keeps_groups_together_and_obeys_its_column():
    made = frame(200)
    made["family"] = np.repeat(np.arange(50), 4)
    data = pv.read_table(made, {"family": "group"}).split()
    parts = [
        set(made["family"][part.rows.numpy()]) for part in (data.train, data.validation, data.test)
    ]
    assert sum(map(len, parts)) == 50
    assert sorted(
        torch.cat([data.train.rows, data.validation.rows, data.test.rows]).tolist()
    ) == list(range(200))
    assert 30 <= len(data.test.x) <= 60
    made["part"] = np.array(["train", "val", "test", "train"] * 50)
    data = pv.read_table(made, {"part": "split", "family": "ignored"}).split()
    assert data.validation.rows.tolist() == list(range(1, 200, 4))
    torch.testing.assert_close(data.test.x, pv.read_table(made).x[2::4, :6], equal_nan=True)


def test_context_columns_are_context():
    made = frame().assign(city=lambda t: t["city"].fillna("Bern"))
    data = pv.read_table(made, {"city": "context"}).split()
    assert data.train.context.shape == (42, 3)
    assert bool((data.train.context.sum(1) == 1).all())
    assert "city" not in data.table.schema.names


def changed(**columns):
    return frame().assign(**columns)


BAD = {
    "column 'age' is empty in all rows: remove it": lambda: changed(age=[None] * 60),
    "column 'age' is 3.0 in all rows: remove it": lambda: changed(age=3.0),
    "column 'city' is 'Bern' in all rows": lambda: changed(city="Bern"),
    "column 'age' mixes numbers and words, such as 'old'": lambda: changed(
        age=[*map(str, range(7)), "old", *map(str, range(52))]
    ),
    "column 'age' holds an infinite number": lambda: changed(age=[np.inf, *range(59)]),
    "the table has no rows": lambda: frame().iloc[:0],
}


@pytest.mark.parametrize("words", BAD)
def test_a_bad_table_is_one_line(words):
    with pytest.raises(pv.UsageError, match=words) as error:
        pv.read_table(BAD[words]())
    assert "\n" not in str(error.value)


FILES = {
    "has 2 columns of the name 'a'": b"a,a\n1,2\n3,4\n",
    "has no rows": b"a,b\n",
    "its delimiter is probably ';'": b"a;b\n1;2\n",
    "it is not UTF-8; convert it with iconv": "a,b\nZürich,1\n".encode("latin-1"),
    "cannot be read as a .csv table": b"a,b\n1,2,3\n",
    "row 1 of rows has no observed entry": b"a,b\n1.5,2.5\n,\n3.5,4.5\n",
}


@pytest.mark.parametrize("words", FILES)
def test_a_bad_file_is_one_line(words, tmp_path):
    path = tmp_path / "rows.csv"
    path.write_bytes(FILES[words])
    with pytest.raises(pv.UsageError, match=words) as error:
        pv.read_table(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"aeg": "count"}, "names a column 'aeg', which the table does not have; .*'age'"),
        ({"age": "real"}, "column 'age' has an unknown kind 'real'"),
        ({"age": {"rolle": "data"}}, "column 'age' has an unknown entry 'rolle'; .*'role'"),
        ({"age": "count"}, "column 'age' is count, which needs whole numbers from 0"),
        ({"city": "continuous"}, "column 'city' is continuous but holds 'Graz'|'Lyon'|'Bern'"),
        ({"city": "binary"}, "column 'city' has 3 values, so it is not binary"),
        ({"city": "context"}, "context column 'city' is empty in row"),
        ({"smoker": "split"}, "split column 'smoker' must hold train, validation or test"),
        ({"smoker": "group"}, "group column 'smoker' has 2 groups; three parts need 3"),
        ({"smoker": "label", "grade": "label"}, "only one column can have the role 'label'"),
        (dict.fromkeys(KINDS, "ignored"), "has no column with the role 'data'"),
    ],
)
def test_a_bad_schema_is_one_line(changes, words):
    with pytest.raises(pv.UsageError, match=words):
        pv.read_table(frame(), changes).split()


def test_values_that_a_run_does_not_know_are_one_line():
    schema = pv.read_table(frame()).schema
    for column, value, words in (
        ("city", "Oslo", "column 'city' holds 'Oslo' in row 0, which is not one of its categories"),
        ("visits", -1, "column 'visits' is count, which needs whole numbers from 0, but holds -1"),
        ("income", 0.0, "column 'income' is positive, which needs numbers above 0, but holds 0"),
        ("grade", 9, "column 'grade' holds 9 in row 0, which is not one of its categories"),
    ):
        with pytest.raises(pv.UsageError, match=words):
            pv.read_table(changed(**{column: [value] * 60}), schema)
    with pytest.raises(pv.UsageError, match="the table has no column 'age', which the schema has"):
        pv.read_table(frame().drop(columns="age"), schema)


def test_tables_need_arrow(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(pv.UsageError, match=r"run pip install 'pyro-vae\[tables\]'"):
        pv.read_table(frame())


def test_any_word_of_a_schema_is_read_again(tmp_path):
    words = ["😀", "a\x7fb", 'say "x"\n', "Köln\\"]
    table = pv.read_table({"🙂": [*words] * 5, "b": [0.5 * i for i in range(20)]})
    (tmp_path / "schema.toml").write_bytes(table.schema.to_file())
    assert stored_schema(tmp_path / "schema.toml") == table.schema
    assert table.schema.data[0].categories == tuple(sorted(words))


def test_dates_cannot_be_categories():
    frame = pd.DataFrame(
        {"a": np.arange(4) / 2, "day": pd.to_datetime(["2020-01-01", "2021-01-01"] * 2)}
    )
    assert pv.read_table(frame).schema.columns[1].role == "ignored"
    with pytest.raises(
        pv.UsageError, match="must be words or numbers, got values of type datetime"
    ):
        pv.read_table(frame, {"day": "categorical"})


@pytest.mark.parametrize("value", [float("nan"), None])
def test_a_group_without_a_number_is_refused_with_its_row(value):
    table = {"of": [1.5, 2.5, value, *range(9)], "x": [i % 5 * 0.5 for i in range(12)]}
    with pytest.raises(pv.UsageError, match="group column 'of' is empty in row 2"):
        pv.read_table(table, {"of": "group"}).split()
