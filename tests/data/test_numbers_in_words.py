"""Numbers that a file writes in another way, and values that are not numbers: no silent guess."""

import datetime

import numpy as np
import pandas as pd
import pytest

import pyro_vae as pv

N = 60
OTHER = np.linspace(0.0, 1.0, N)


def whole(kind):
    """Whole numbers with holes, as pandas holds and writes them: floats."""
    return [None if i % 9 == 0 else float(i % kind) for i in range(N)]


@pytest.mark.parametrize(("values", "kind"), [(5, "ordinal"), (17, "count"), (2, "binary")])
def test_whole_floats_with_holes_are_whole_numbers(values, kind, tmp_path):
    frame = pd.DataFrame({"item": whole(values), "other": OTHER})
    frame.to_csv(tmp_path / "rows.csv", index=False)
    assert "1.0" in (tmp_path / "rows.csv").read_text()
    known = pv.read_table(frame.astype({"item": "Int64"}))
    for source in (frame, tmp_path / "rows.csv"):
        table = pv.read_table(source)
        assert table.schema == known.schema
        assert table.schema.data[0].kind == kind
        assert table.x.nan_to_num(-1.0).equal(known.x.nan_to_num(-1.0))


def test_floats_without_holes_stay_continuous():
    table = pv.read_table({"item": [float(i % 5) for i in range(N)], "other": OTHER})
    assert table.schema.data[0].kind == "continuous"


@pytest.mark.parametrize(
    "word",
    ["{0},5", "1.{0:03},25", "-{0},5", "1,{0:03}", "1 {0:03}", "{0} %", "{0}.5%", "1'{0:03}"],
)
@pytest.mark.parametrize("different", [9, N])
def test_numbers_in_words_are_refused_unless_they_are_named_words(word, different):
    frame = {"size": [word.format(i % different) for i in range(N)], "other": OTHER}
    with pytest.raises(pv.UsageError, match="'size' holds numbers that are written as words") as e:
        pv.read_table(frame)
    assert "with a decimal point" in str(e.value)
    assert "\n" not in str(e.value)
    assert pv.read_table(frame, {"size": "categorical"}).schema.columns[0].role == "data"
    assert pv.read_table(frame, {"size": "row id"}).schema.columns[0].role == "row id"


@pytest.mark.parametrize(
    "word", ["2024-01-{0:02}", "{0:02}:30", "1/{0}", "A{0}", "{0}-{0}", "1.{0}.2"]
)
def test_other_words_with_digits_stay_words(word):
    frame = {"word": [word.format(i % 9) for i in range(N)], "other": OTHER}
    assert pv.read_table(frame).schema.data[0].kind == "categorical"


@pytest.mark.parametrize("kind", ["continuous", "positive", "count", "circular"])
@pytest.mark.parametrize(
    ("value", "words"),
    [
        (datetime.date(2024, 1, 3), "values of type date into numbers"),
        (datetime.timedelta(3), "values of type timedelta into numbers"),
        ([1.0, 2.0], "values of type list into numbers"),
        ({"a": 1}, "values of type dict into numbers"),
        ("1,5", "with a decimal point"),
        ("tall", "leave its cell empty"),
    ],
)
def test_a_kind_of_numbers_refuses_other_values(kind, value, words):
    schema = pv.read_table({"a": 1 + np.arange(20), "b": OTHER[:20]}, {"a": kind}).schema
    with pytest.raises(
        pv.UsageError, match=rf"column 'a' is {kind} but holds .* in row 0: .*{words}"
    ):
        pv.read_table({"a": [value] * 20, "b": OTHER[:20]}, schema)


@pytest.mark.parametrize("change", ["categorical", "binary", "ordinal", "label", "group"])
@pytest.mark.parametrize("value", [[1, 2], {"a": 1}])
def test_lists_cannot_be_categories_or_groups(change, value):
    with pytest.raises(pv.UsageError, match=r"column 'a' holds values of type (list|dict)"):
        pv.read_table({"a": [value] * N, "b": OTHER}, {"a": change}).split()


def test_a_list_in_a_column_of_known_categories():
    schema = pv.read_table({"a": ["x", "y"] * 10, "b": OTHER[:20]}).schema
    with pytest.raises(pv.UsageError, match=r"'a' holds \['x'\] in row 0, which is not one of"):
        pv.read_table({"a": [["x"]] * 20, "b": OTHER[:20]}, schema)


def test_unknown_categories_say_how_many_and_what_to_do():
    regions = [f"R{i % 12:02}" for i in range(N)]
    table = pv.read_table({"region": regions, "b": OTHER})
    new = {"region": ["R01", "R99", "R98", "R02"], "b": OTHER[:4]}
    with pytest.raises(pv.UsageError, match=r"'R99' in row 1, .*R07, ...; 2 rows .*empty cells"):
        pv.read_table(new, table.schema)
    emptied = {**new, "region": ["R01", None, None, "R02"]}
    assert pv.read_table(emptied, table.schema).x[:, 0].isnan().sum() == 2
    context = pv.read_table({"region": regions, "b": OTHER}, {"region": "context"})
    with pytest.raises(pv.UsageError, match=r"write known categories$"):
        _ = pv.read_table(new, context.schema).context


def test_a_file_with_semicolons_and_decimal_commas_names_its_delimiter(tmp_path):
    (tmp_path / "rows.csv").write_text("a;b\n1,5;2\n2,5;3\n")
    with pytest.raises(pv.UsageError, match="starts with 'a;b', so its delimiter is probably ';'"):
        pv.read_table(tmp_path / "rows.csv")
    (tmp_path / "rows.csv").write_text("a,b\n1,5\n", encoding="utf-16")
    with pytest.raises(pv.UsageError, match="it is not UTF-8; convert it with iconv -f UTF-16"):
        pv.read_table(tmp_path / "rows.csv")


def test_ids_that_repeat_show_the_number_of_rows():
    words = [f"p{i}" for i in range(70)]
    (column, _) = pv.read_table({"who": [*words, "p1"], "b": np.linspace(0, 1, 71)}).schema.columns
    assert column.why == "70 different words in 71 rows"
