"""Results in notebooks: HTML by one helper, data as a paragraph, a history as frame and plot."""

import inspect
import pkgutil
from enum import Enum
from importlib import import_module
from xml.etree import ElementTree

import pytest
import torch

import pyro_vae as pv
from pyro_vae.pairs.showing import shown_html
from pyro_vae.training.history import History

RESULTS = {
    thing
    for module in pkgutil.walk_packages(pv.__path__, "pyro_vae.")
    if ".cli" not in module.name and not module.name.endswith("__main__")
    for thing in vars(import_module(module.name)).values()
    if inspect.isclass(thing)
    and thing.__module__.startswith("pyro_vae")
    and "__str__" in vars(thing)
    and not issubclass(thing, Enum)
}


@pytest.fixture(scope="module")
def history():
    pair, x = pv.VAE.mlp((4,), latent_dim=2, hidden=(4,)), torch.ones(12, 4)
    options = {"epochs": 3, "engine": "eager", "progress": False, "validation": x}
    return pv.fit(pair, x, **options)


@pytest.mark.parametrize("kind", [*sorted(RESULTS, key=lambda kind: kind.__name__), History])
def test_a_result_that_prints_itself_also_shows_itself_in_a_notebook(kind):
    assert "_repr_html_" in dir(kind)


def cells(shown):
    tree = ElementTree.fromstring(f"<div>{shown}</div>")
    return [[cell.text or "" for cell in row] for row in tree.iter("tr")]


def test_lines_become_a_table_and_words_keep_their_form():
    shown = shown_html("log p(x) >= 3   -1.50\nKL             2\n\na <b> remark\n  of two lines")
    assert cells(shown) == [["log p(x) >= 3", "-1.50"], ["KL", "2"]]
    assert "<pre>a &lt;b&gt; remark\n  of two lines</pre>" in shown


def test_lines_with_different_numbers_of_cells_stay_as_they_are():
    assert shown_html("a   b   c\nd   e") == "<pre>a   b   c\nd   e</pre>"


def test_an_evaluation_is_a_table_of_its_lines():
    found = pv.evaluate(pv.VAE.mlp((4,), latent_dim=2), torch.ones(6, 4), num_samples=3)
    lines = [line.split("  ", 1) for line in str(found).splitlines()]
    assert cells(found._repr_html_()) == [[title, words.strip()] for title, words in lines]


def test_data_print_one_paragraph():
    assert repr(pv.load_data("digits")) == (
        "digits: 1,257 training rows, 180 validation rows, 360 test rows, each of shape "
        "(1, 8, 8), uint8 from 0 to 255; 10 classes"
    )


def test_data_of_a_table_tell_their_holes():
    table = pv.read_table(
        {"a": [0.5, None, *map(float, range(18))], "b": [x / 7 for x in range(20)]}
    )
    told = repr(table.split())
    assert "1 missing entries" in told
    assert "\n" not in told


def test_a_history_becomes_a_frame_with_the_columns_of_history_csv(history):
    frame = history.to_frame()
    assert list(frame.index) == [1, 2, 3]
    assert list(frame.columns) == [name for name in history.epochs[0].row() if name != "epoch"]
    for name in ("elbo", "kl_z", "validation_bound"):
        assert frame[name].tolist() == history[name]


def test_a_history_becomes_a_plot_of_its_columns(history):
    figure = history.plot()
    drawn = {tuple(line.get_ydata()) for axis in figure.axes for line in axis.lines}
    for name in ("elbo", "validation_elbo", "reconstruction", "kl", "gradient_norm"):
        assert tuple(history[name]) in drawn
