"""The pictures of data: images, curves, cells and text, as SVG."""

import base64
import io
import re
import xml.dom.minidom

import numpy as np
import pytest
import torch
from matplotlib.image import imread

from pyro_vae.data.schema import Column, Schema
from pyro_vae.explore import colors
from pyro_vae.explore.cards import MOST_ENTRIES, MOST_LINES, Cards, part_of


def texts(svg):
    """The words of a picture, which must be well-formed XML."""
    found = xml.dom.minidom.parseString(svg).getElementsByTagName("text")
    return [one.firstChild.data for one in found]


def test_an_image_is_drawn_pixel_by_pixel():
    image = torch.tensor([[[0, 255, 51], [102, 153, 204]]], dtype=torch.uint8)
    again = torch.tensor([[[0.0, 1.0, torch.nan], [2.0, -1.0, 0.2]]])
    svg = Cards().draw([("datum", image), ("reconstruction", again)])
    assert texts(svg) == ["datum", "reconstruction"]
    found = [
        imread(io.BytesIO(base64.b64decode(one)))[..., :3]
        for one in re.findall(r"base64,([^\"]+)", svg)
    ]
    expected = [[[0, 1, 0.2], [0.4, 0.6, 0.8]], [[0, 1, 0.5], [1, 0, 0.2]]]
    for one, values in zip(found, expected, strict=True):
        assert np.allclose(one, np.array(values)[..., None].repeat(3, 2), atol=1 / 255)


def test_a_color_image_keeps_its_channels():
    image = torch.rand(3, 4, 5)
    svg = Cards().draw([("datum", image)])
    (one,) = re.findall(r"base64,([^\"]+)", svg)
    found = imread(io.BytesIO(base64.b64decode(one)))[..., :3]
    assert np.allclose(found, image.permute(1, 2, 0).numpy(), atol=1 / 255)


def test_a_curve_has_a_gap_where_an_entry_is_missing():
    x = torch.arange(20.0)
    x[5] = torch.nan
    svg = Cards().draw([("datum", x), ("reconstruction", torch.full((20,), 10.0))])
    assert texts(svg) == ["datum", "reconstruction", "19", "0"]
    lines = re.findall(r'<polyline points="([^"]*)"', svg)
    assert [len(line.split()) for line in lines] == [5, 14, 20]
    assert "nan" not in svg


def test_a_long_curve_says_what_it_leaves_out():
    svg = Cards().draw([("datum", torch.zeros(MOST_ENTRIES + 500))])
    assert texts(svg)[-1] == f"the first {MOST_ENTRIES} of {MOST_ENTRIES + 500} entries"


def test_a_short_vector_is_shown_as_numbers():
    x = torch.tensor([[1.0, 2.5], [torch.nan, -3.0]])
    found = texts(Cards().draw([("datum", x), ("decoded", torch.zeros(2, 2))]))
    assert found[:5] == ["datum", "decoded", "[0, 0]", "1", "0"]
    assert found[8:11] == ["[1, 0]", "missing", "0"]


@pytest.fixture
def schema():
    return Schema(
        (
            Column("age <b>"),
            Column("city", "categorical", categories=("Bern & co", "Lyon")),
        )
    )


def test_cells_have_the_names_of_their_columns(schema):
    x, made = torch.tensor([torch.nan, 0.0]), torch.tensor([40.125, 1.0])
    found = texts(Cards(schema).draw([("datum", x), ("reconstruction", made)]))
    assert found[2:] == ["age <b>", "missing", "40.12", "city", "Bern & co", "Lyon"]


def test_the_members_of_a_group_follow_each_other(schema):
    x = torch.zeros(20, 2)
    found = texts(Cards(schema).draw([("datum", part_of(x, None, 2))]))
    assert [word for word in found if "member" in word] == [
        "age <b> of member 0",
        "city of member 0",
        "age <b> of member 1",
        "city of member 1",
    ]
    assert texts(Cards(schema).draw([("datum", x)]))[-1] == f"and {40 - MOST_LINES} more"
    assert part_of(x, 3, 2).shape == (2,)
    assert part_of(x, None, -1).shape == (20, 2)


def test_tokens_are_shown_as_text():
    found = texts(Cards(vocabulary="\nab<").draw([("datum", torch.tensor([1, 3, 2, 0, 1]))]))
    assert found == ["datum", "a<b"]


def test_colors_of_pareto_k():
    k = torch.tensor([0.2, 0.5, 0.6, 0.65, 0.71, torch.inf, torch.nan])
    blue, yellow, red, gray = colors.SURE, colors.UNSURE, colors.OVER, colors.GRAY
    made, legend = colors.by_pareto_k(k, 0.63)
    assert made == [blue, blue, yellow, red, red, red, gray]
    words = ["up to 0.5", "0.5 to 0.63", "over 0.63: not reliable", "not known"]
    assert re.findall(r"</span>([^<]+)</span>", legend) == words
    made, legend = colors.by_pareto_k(k, 0.7)
    assert made == [blue, blue, yellow, yellow, red, red, gray]
    made, legend = colors.by_pareto_k(k, 0.4)  # of 46 samples
    assert made == [blue, red, red, red, red, red, gray]
    words = ["up to 0.4", "over 0.4: not reliable", "not known"]
    assert re.findall(r"</span>([^<]+)</span>", legend) == words


def test_colors_of_labels_and_numbers():
    made, legend = colors.by_label(["10", "9", "<i>", "9"])
    assert made[1] == made[3] == colors.PALETTE[0]
    assert len(set(made)) == 3
    assert re.findall(r"</span>([^<]+)</span>", legend) == ["9", "10", "&lt;i&gt;"]
    made, legend = colors.by_number(torch.tensor([1.0, 3.0, -torch.inf, torch.nan]), "log p(x)")
    low, high = made[0], made[1]
    assert made == [low, high, low, colors.GRAY]
    assert legend.startswith("log p(x): 1 ")
    assert legend.endswith(" 3")
