"""Tables that stay on disk have the rows, the parts and the schema of those in memory."""

import contextlib
import datetime
import multiprocessing
import os
import random

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch

import pyro_vae as pv
from pyro_vae.data import disk, large_tables, table_streams
from pyro_vae.data.disk import DiskArray
from pyro_vae.data.large_tables import LargeTable, load_table
from pyro_vae.data.table_values import PARTS

N = 400
RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Every table counts as large; its file has many parts, and its arrays many blocks."""
    monkeypatch.setattr(disk, "LEAST_BYTES", 1)
    monkeypatch.setattr(disk, "BLOCK_BYTES", 200)
    monkeypatch.setattr(table_streams, "ROWS_AT_ONCE", 37)
    monkeypatch.setattr(table_streams, "CSV_BYTES", 700)
    monkeypatch.setattr(large_tables, "SAMPLED", 200)


def frame():
    sex = np.array(["f", "m", None], object)[RNG.choice(3, N, p=[0.5, 0.4, 0.1])]
    found = pd.DataFrame(
        {
            "id": [f"p{i:03d}" for i in range(N)],
            "weight": RNG.normal(70, 10, N),
            "income": np.exp(RNG.normal(0, 1.5, N)),
            "visits": RNG.poisson(4, N).astype(float),
            "sex": sex,
            "grade": RNG.integers(1, 6, N),
            "site": np.array(["a", "b", "c"])[RNG.integers(0, 3, N)],
            "dose": RNG.integers(0, 3, N) * 1.5,
            "class": np.array(["x", "y"])[RNG.integers(0, 2, N)],
        }
    )
    found.loc[RNG.choice(N, 30), "weight"] = np.nan
    found.loc[RNG.choice(N, 30), "visits"] = np.nan
    return found


CHANGES = {
    "site": {"role": "context", "kind": "categorical"},
    "dose": "context",
    "class": {"role": "label", "kind": "categorical"},
}


def save(table, path):
    write = {
        ".parquet": lambda: table.to_parquet(path, row_group_size=90),
        ".feather": lambda: table.to_feather(path),
        ".csv": lambda: table.to_csv(path, index=False),
        ".tsv": lambda: table.to_csv(path, index=False, sep="\t"),
    }
    write[path.suffix]()
    return path


def assert_same_parts(large, small):
    assert large.schema == small.schema
    for name in PARTS:
        found, truth = getattr(large, name), getattr(small, name)
        at = truth.rows.argsort()
        assert torch.equal(found.rows, truth.rows[at]), name
        assert torch.equal(found.x[:].nan_to_num(-9), truth.x[at].nan_to_num(-9))
        for one, other in zip(found[1:], truth[1:], strict=True):
            assert (one is None) == (other is None)
            assert one is None or (torch.equal(one, other[at]) and one.dtype == other.dtype)


@pytest.mark.parametrize("ending", ["csv", "tsv", "parquet", "feather"])
def test_the_parts_are_those_of_a_table_in_memory(ending, tmp_path):
    path = save(frame(), tmp_path / f"t.{ending}")
    found = pv.load_data(path, tmp_path / "cache", columns=CHANGES)
    table = pv.read_table(path, CHANGES)
    assert isinstance(found.table, LargeTable)
    assert isinstance(found.train.x, DiskArray)
    assert_same_parts(found, table.split())
    assert list(found.table.ids) == list(table.ids)
    assert (len(found.table), found.table.id_name) == (N, "id")
    rows = torch.tensor([399, 3, 3, 200])
    few, same = found.table.rows(rows), table.rows(rows)
    assert few.source.to_pylist() == same.source.to_pylist()
    assert torch.equal(few.x.nan_to_num(-9), same.x.nan_to_num(-9))
    assert found.table.frame(few.x, few.ids).equals(table.frame(same.x, same.ids))
    told = repr(found)
    assert "280 training rows" in told
    assert "missing entries in a sample" in told


@pytest.mark.parametrize("role", ["split", "group"])
def test_a_column_determines_the_parts(role, tmp_path):
    table = frame()
    words = np.array(["train", "Valid", "test"])[RNG.integers(0, 3, N)]
    table["of"] = words if role == "split" else RNG.integers(0, 40, N) // 2 * 7
    path = save(table, tmp_path / "t.parquet")
    changes = {**CHANGES, "of": role}
    large = pv.load_data(path, tmp_path / "cache", columns=changes)
    assert_same_parts(large, pv.read_table(path, changes).split())


LATE = {
    "a fraction": ([*range(300), 0.5], "continuous"),
    "a word": ([0, 1] * 100 + ["two"] * 250, "categorical"),
    "a category": (["a", "b"] * 150 + ["c"], "categorical"),
    "a hole": ([*([3.5, 4.5, 7.25] * 100), None], "continuous"),
    "a hole among integers": ([*([3, 4, 7] * 100), None], "ordinal"),
    "a number below 0": ([*np.exp(RNG.normal(0, 2, 300)), -1.0], "continuous"),
    "a large number": ([*([1] * 150 + [2] * 150), 7], "ordinal"),
}


@pytest.mark.parametrize("ending", ["csv", "parquet"])
@pytest.mark.parametrize("late", LATE)
def test_what_only_the_last_row_shows_is_seen(late, ending, tmp_path):
    values, kind = LATE[late]
    if late == "a word" and ending == "parquet":
        values = list(map(str, values))
    table = pd.DataFrame({"x": values, "other": RNG.normal(size=len(values))})
    path = save(table, tmp_path / f"t.{ending}")
    found = load_table(path, None, tmp_path / "cache")
    whole = pv.read_table(path)
    assert found.schema == whole.schema
    assert found.schema.data[0].kind == kind
    assert_same_parts(found, whole.split())


@pytest.mark.parametrize(
    "values",
    [
        [datetime.date(2020, 1, 1 + i % 28) for i in range(300)],
        [True, False, None] * 100,
        ["yes, no", 'say "so"', "a\nb"] * 100,
        [2**53 + 1 - i for i in range(300)],
        ["1e5", "nan", "7"] * 100,
    ],
)
def test_unusual_values_are_read_alike(values, tmp_path):
    table = pd.DataFrame({"x": values, "other": RNG.normal(size=len(values))})
    path = save(table, tmp_path / "t.csv")
    assert_same_parts(load_table(path, None, tmp_path / "cache"), pv.read_table(path).split())


def test_times_that_follow_dates_are_times_and_ignored(tmp_path):
    days = [datetime.date(2020, 1, 1 + i % 28).isoformat() for i in range(300)]
    table = pd.DataFrame({"x": [*days, "2020-02-01 10:30:00"], "other": RNG.normal(size=301)})
    path = save(table, tmp_path / "t.csv")
    found = load_table(path, None, tmp_path / "cache")
    assert found.schema == pv.read_table(path).schema
    assert found.schema.columns[0].why == "holds values of type datetime"


def test_a_group_of_a_pandas_category_is_that_of_its_words(tmp_path):
    table = frame()
    table["of"] = [f"g{i}" for i in RNG.integers(0, 30, N)]
    words = pv.read_table(save(table, tmp_path / "w.parquet"), {**CHANGES, "of": "group"})
    table["of"] = pd.Categorical(table["of"], [f"g{i}" for i in range(50)])  # 20 are unused
    path, changes = save(table, tmp_path / "t.parquet"), {**CHANGES, "of": "group"}
    small, large = pv.read_table(path, changes), load_table(path, changes, tmp_path / "cache")
    assert_same_parts(large, small.split())
    for one, other in zip(small.split().test, words.split().test, strict=True):
        assert one is None or torch.equal(one.nan_to_num(-9.0), other.nan_to_num(-9.0))


def test_a_pandas_category_keeps_its_order(tmp_path):
    table = pd.DataFrame({"x": ["low", "mid", "high"] * 100, "other": RNG.normal(size=300)})
    table["x"] = pd.Categorical(table["x"], ["low", "mid", "high"], ordered=True)
    for ending in ("parquet", "feather"):
        path = save(table, tmp_path / f"t.{ending}")
        found = load_table(path, None, tmp_path / "cache")
        assert found.schema.data[0].categories == ("low", "mid", "high")
        assert_same_parts(found, pv.read_table(path).split())


def marks(cache):
    """The identity of each converted table, which changes if it is made again."""
    return {p.parent.name: p.stat().st_ino for p in cache.glob("tables/*/about.json")}


def test_a_table_is_converted_once_for_each_state_and_schema(tmp_path):
    cache, table = tmp_path / "cache", frame()
    path = save(table, tmp_path / "t.parquet")
    first = load_table(path, CHANGES, cache)
    made = marks(cache)
    assert_same_parts(load_table(path, CHANGES, cache), pv.read_table(path, CHANGES).split())
    assert load_table(path, first.schema, cache).schema == first.schema  # as a command on a run
    assert marks(cache) == made
    load_table(path, {**CHANGES, "grade": "ignored"}, cache)
    assert made.items() < marks(cache).items()
    table["weight"] += 1
    save(table, path)
    again = load_table(path, CHANGES, cache)
    assert_same_parts(again, pv.read_table(path, CHANGES).split())


def test_a_damaged_conversion_is_made_again(tmp_path):
    cache, path = tmp_path / "cache", save(frame(), tmp_path / "t.parquet")
    load_table(path, CHANGES, cache)
    for file in cache.glob("tables/*/*"):
        kept = file.read_bytes()
        os.truncate(file, len(kept) // 2)
        found = load_table(path, CHANGES, cache)
        assert_same_parts(found, pv.read_table(path, CHANGES).split())


def test_an_interrupted_conversion_leaves_nothing_behind(tmp_path, monkeypatch):
    cache, path = tmp_path / "cache", save(frame(), tmp_path / "t.parquet")
    whole = table_streams.TableStream.parts

    def cut(self):
        for first, part in whole(self):
            if first > 200 and list(cache.glob("tables/.*.part/x-train.npy")):
                raise KeyboardInterrupt
            yield first, part

    monkeypatch.setattr(table_streams.TableStream, "parts", cut)
    with pytest.raises(KeyboardInterrupt):
        load_table(path, CHANGES, cache)
    assert not list(cache.glob("tables/.*.part"))
    monkeypatch.setattr(table_streams.TableStream, "parts", whole)
    assert_same_parts(load_table(path, CHANGES, cache), pv.read_table(path, CHANGES).split())


def _load(path, cache, found):
    disk.LEAST_BYTES = 1
    data = load_table(path, CHANGES, cache)
    found.put(float(data.train.x[:].nansum()))


def test_processes_that_convert_the_same_table_wait_for_each_other(tmp_path):
    path = save(frame(), tmp_path / "t.parquet")
    spawn = multiprocessing.get_context("spawn")
    found = spawn.Queue()
    some = [spawn.Process(target=_load, args=(path, tmp_path / "c", found)) for _ in range(2)]
    for one in some:
        one.start()
    sums = {found.get(timeout=120) for _ in some}
    for one in some:
        one.join()
    truth = float(pv.read_table(path, CHANGES).split().train.x.nansum())
    assert len(sums) == 1
    assert sums.pop() == pytest.approx(truth)


def refused(path, cache, columns=None, words=""):
    with pytest.raises(pv.UsageError, match=words) as error:
        load_table(path, columns, cache)
    assert "\n" not in str(error.value)
    assert not list(cache.glob("tables/.*.part"))


def test_values_that_cannot_be_modeled_are_refused_with_their_row(tmp_path):
    cache, good = tmp_path / "cache", pd.DataFrame({"x": RNG.normal(size=N), "y": ["a", "b"] * 200})
    schema = load_table(save(good, tmp_path / "t.parquet"), None, cache).schema

    def with_value(column, row, value):
        table = good.astype({column: object})
        table.loc[row, column] = value
        return save(table.infer_objects(), tmp_path / "bad.parquet")

    refused(with_value("y", 311, "c"), cache, schema, "holds 'c' in row 311, which is not one")
    refused(with_value("x", 311, np.inf), cache, schema, "holds inf in row 311")
    refused(with_value("x", 311, np.inf), cache, None, "'x' holds an infinite number")
    low = good.assign(x=good.x.abs())
    low.loc[311, "x"] = -1.0
    low = save(low, tmp_path / "low.parquet")
    refused(low, cache, {"x": "positive"}, "needs numbers above 0, but holds -1 in row 311")
    empty = good.copy()
    empty.loc[311] = [np.nan, None]
    refused(save(empty, tmp_path / "empty.parquet"), cache, None, "row 311 of empty has no obs")
    hole = with_value("y", 311, None)
    refused(hole, cache, {"y": {"role": "context", "kind": "binary"}}, "'y' is empty in row 311")


def test_files_and_folders_that_do_not_serve_are_refused_in_one_line(tmp_path, monkeypatch):
    cache, path = tmp_path / "cache", save(frame(), tmp_path / "t.parquet")
    refused(path, cache, {"weigth2": "count"}, "names a column 'weigth2'")
    refused(path, cache, dict.fromkeys(frame(), "ignored"), "no column with the role 'data'")
    (tmp_path / "cut.parquet").write_bytes(path.read_bytes()[:-9])
    refused(tmp_path / "cut.parquet", cache, None, "cannot be read as a .parquet table")
    (tmp_path / "odd.csv").write_text("a,b\n" + "1,2\n" * 500 + "1,2,3\n" * 9)
    refused(tmp_path / "odd.csv", cache, None, "cannot be read as a .csv table")
    (tmp_path / "semi.csv").write_text("a;b\n" + "1;2\n" * 500)
    refused(tmp_path / "semi.csv", cache, None, "its delimiter is probably ';'")
    (tmp_path / "latin.csv").write_bytes(b"a,b\n" + "ö,2\n".encode("latin1") * 50)
    refused(tmp_path / "latin.csv", cache, None, "UTF-?8|UTF8")
    (tmp_path / "twice.csv").write_text("a,a\n" + "1,2\n" * 500)
    refused(tmp_path / "twice.csv", cache, None, "2 columns of the name 'a'")
    (tmp_path / "file").write_text("")
    refused(path, tmp_path / "file", CHANGES, "name a folder on another disk with --data-dir")
    monkeypatch.setattr("shutil.disk_usage", lambda _: Full)
    refused(path, tmp_path / "new", CHANGES, r"need 0\.0 GiB in .*, whose disk has 0\.0 GiB left")


class Full:
    free = 100


@pytest.mark.thorough
def test_training_on_disk_reaches_the_same_bound(tmp_path):
    cause = RNG.normal(size=(N, 1))
    table = pd.DataFrame(cause + 0.3 * RNG.normal(size=(N, 4)), columns=list("abcd"))
    path, bounds = save(table, tmp_path / "t.parquet"), []
    for data in (load_table(path, None, tmp_path / "cache"), pv.read_table(path).split()):
        torch.manual_seed(0)
        likelihood = data.schema.likelihood(disk.sampled(data.train.x), robust=False)
        pair = pv.VAE.mlp((4,), latent_dim=1, hidden=(16,), likelihood=likelihood)
        options = {"epochs": 30, "batch_size": 40, "learning_rate": 1e-2, "engine": "eager"}
        valid = data.validation.x
        history = pv.fit(pair, data.train.x, validation=valid, progress=False, **options)
        bounds.append(history["validation_elbo"][-1])
    assert bounds[0] == pytest.approx(bounds[1], abs=0.3)


@pytest.mark.parametrize("large", [False, True])
def test_a_feather_file_that_leads_out_of_its_buffers_is_refused(large, tmp_path):
    offsets = pa.array([0, 1, 2**30, 3] * 80, pa.int32()).buffers()[1]
    words = pa.StringArray.from_buffers(319, offsets, pa.py_buffer(b"abc"))
    table = pa.table({"x": words, "other": np.arange(319.0)})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    path = tmp_path / "t.feather"
    path.write_bytes(sink.getvalue())
    with pytest.raises(pv.UsageError, match=r"cannot be read as a \.feather table"):
        load_table(path, None, tmp_path / "cache") if large else pv.read_table(path)


@pytest.mark.sample(2)
@pytest.mark.parametrize("ending", ["parquet", "csv", "feather"])
def test_damaged_files_are_read_or_refused_in_one_line(ending, tmp_path):
    whole = save(frame(), tmp_path / f"t.{ending}").read_bytes()
    rng, found = random.Random(0), []
    for _ in range(40):
        content = bytearray(whole)
        at = rng.choice([rng.randrange(len(whole)), len(whole) - 1 - rng.randrange(900)])
        content[at] ^= 1 << rng.randrange(8)
        path = tmp_path / f"bad.{ending}"
        path.write_bytes(content if rng.random() < 0.8 else content[:at])
        with contextlib.suppress(pv.UsageError):
            found.append(load_table(path, CHANGES, tmp_path / "cache").train.x[:])
    assert len(found) < 38


def test_a_table_with_other_rows_than_it_declares_is_refused(tmp_path, monkeypatch):
    path = save(frame(), tmp_path / "t.parquet")
    load_table(path, CHANGES, tmp_path / "cache")
    for rows in (N - 1, N + 1, 2**50):
        words = "GiB of memory" if rows > N + 1 else f"declares {rows} rows, but holds {N}"
        other = table_streams.TableStream(path, rows, table_streams.streamed(path).types)
        monkeypatch.setattr(large_tables, "_opened", lambda *_, other=other: other)
        refused(path, tmp_path / f"cache{rows}", CHANGES, words)
