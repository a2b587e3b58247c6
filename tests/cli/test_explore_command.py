"""explore on runs of images, vectors, a table and groups: right pages, and nothing written."""

import asyncio
import csv
import re
import signal
import socket
import sys
import webbrowser

import numpy as np
import pytest
import torch
from bokeh.document import Document
from cli_helpers import SHORT, command

import pyro_vae as pv
from pyro_vae.cli.explore import serve
from pyro_vae.cli.main import main
from pyro_vae.explore.page import Session

OPTIONS = f"{SHORT} --hidden 8 --no-report"


def numbers(path, n=40):
    generator = np.random.default_rng(0)
    groups = np.concatenate([np.arange(12), generator.integers(0, 12, n - 12)])
    labels = generator.integers(0, 3, n)
    x = generator.normal(size=(n, 3)).astype(np.float32)
    np.savez(path, x=x, patient=groups, y=labels)
    return path


def cells(path, n=40):
    generator = np.random.default_rng(0)
    with open(path, "w", newline="") as file:
        out = csv.writer(file)
        out.writerow(["patient", "age", "city"])
        for i in range(n):
            age = "" if i % 7 == 3 else round(generator.normal(50, 9), 1)
            out.writerow([f"p{i:02d}", age, generator.choice(["<Bern>", "Lyon"])])
    return path


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("explored")
    data = numbers(folder / "numbers.npz")
    lines = {
        "images": "digits --latent-dim 3",
        "vectors": f"{data} --latent-dim 2 --likelihood gaussian",
        "table": f"{cells(folder / 'people.csv')} --latent-dim 2",
        "groups": f"{data} --model multilevel --group patient --latent-dim 2 1 "
        "--likelihood gaussian",
    }
    for name, line in lines.items():
        command(f"train {line} --out {{run}} {OPTIONS}", run=folder / name)
    return folder


def opened(run, *, data=None, part=None, num=2000):
    """The page of a run; its server is closed again."""
    server = serve(run, data, part, num, 30, 0, None)
    page = server.page
    server.stop()
    return page


def state(folder):
    """The files of a folder, with what says whether they were touched."""
    return {
        path: (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else None)
        for path in sorted(folder.rglob("*"))
    }


@pytest.mark.parametrize("name", ["images", "vectors", "table", "groups"])
def test_the_page_of_a_run_shows_its_test_part_and_writes_nothing(runs, name):
    before = state(runs)
    page = opened(runs / name)
    session = Session(page, Document())
    session.chosen.value = str(len(page.view.levels) - 1)
    assert page.card(0, 0).startswith("<svg")
    assert "decoded" in session.moved.text
    source = {"images": "digits", "table": runs / "people.csv"}.get(name, runs / "numbers.npz")
    data = pv.load_data(source, group="patient" if name == "groups" else None)
    context = [data.test.lengths] if name == "groups" else []
    codes = pv.encode(pv.load(runs / name), data.test.x, *context)
    assert set(codes) == set(page.view.means)
    for site, code in page.view.means.items():
        assert code.shape == codes[site].shape
        assert torch.allclose(code.flatten(1).sum(), codes[site].flatten(1).sum(), atol=1e-4)
    assert state(runs) == before


def test_the_table_has_the_columns_of_the_data(runs):
    session = Session(opened(runs / "table"), Document())
    titles = [column.title for column in session.table.columns]
    assert titles[:5] == ["id", "log p(x)", "Pareto k", "age", "city"]
    with open(runs / "people.csv", newline="") as file:
        rows = {row["patient"]: row for row in csv.DictReader(file)}
    shown = session.source.data
    for i, patient in enumerate(shown["column0"]):
        assert shown["column4"][i] == rows[patient]["city"]
        age = rows[patient]["age"]
        assert shown["column3"][i] == (f"{float(age):.4g}" if age else "missing")


def test_labels_ids_and_the_members_of_groups(runs):
    stored = np.load(runs / "numbers.npz")
    page = opened(runs / "vectors", part="all")
    assert page.view.ids == [str(i) for i in range(40)]
    assert page.view.held.labels == [str(label) for label in stored["y"]]
    z = next(
        level for level in opened(runs / "groups", part="all").view.levels if level.site == "z"
    )
    assert len(z.rows) == 40
    assert torch.bincount(z.rows).tolist() == np.bincount(stored["patient"]).tolist()


def test_rows_are_thinned(runs):
    page = opened(runs / "vectors", part="all", num=7)
    assert len(page.view.ids) == 7
    stored = np.load(runs / "numbers.npz")
    rows = [int(one) for one in page.view.ids]
    assert rows == sorted(rows)
    assert torch.equal(page.view.held.x, torch.from_numpy(stored["x"][rows]))


@pytest.fixture
def interrupted():
    """An event loop in which Ctrl-C is pressed once it runs, also if the tests ignore Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    loop.call_later(0.05, signal.raise_signal, signal.SIGINT)
    yield
    loop.close()
    asyncio.set_event_loop(None)
    signal.signal(signal.SIGINT, before)


def test_an_interrupt_ends_the_page_with_one_line(runs, interrupted, capsys):
    before = state(runs)
    command("explore {run} --no-browser --num-samples 30", run=runs / "vectors")
    out, err = capsys.readouterr()
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+/[\w-]{43}\nCtrl-C ends the page\.\n", out)
    assert err.splitlines()[-1] == "The page has ended."
    port = int(out.split(":")[2].split("/")[0])
    with socket.socket() as one:
        assert one.connect_ex(("127.0.0.1", port)) != 0
    assert state(runs) == before


def test_the_page_opens_in_a_browser(runs, interrupted, monkeypatch, capsys):
    opened = []
    monkeypatch.setattr(webbrowser, "open", opened.append)
    command("explore {run} --num-samples 30", run=runs / "vectors")
    assert opened == [capsys.readouterr().out.splitlines()[0]]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("explore {run} --num 0", "--num must be at least 1, got 0"),
        ("explore {run} --num-samples 0", "--num-samples must be at least 1, got 0"),
        ("explore {run} --port 70000", "--port must be from 0 to 65535, got 70000"),
        ("explore {run} --part tset", "--part must be train, validation, test or all"),
        ("explore {run}/none", "none"),
    ],
)
def test_wrong_options_in_one_line(runs, line, message, capsys):
    with pytest.raises(SystemExit) as caught:
        main(line.format(run=runs / "vectors").split())
    assert caught.value.code == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.strip().count("\n") == 0


def test_without_bokeh_the_command_says_what_to_install(runs, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "bokeh", None)
    with pytest.raises(SystemExit) as caught:
        main(["explore", str(runs / "vectors")])
    assert caught.value.code == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "pip install 'pyro-vae[explore]'" in said
