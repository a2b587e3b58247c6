"""Bad input to the tools that use a pair: each error is one line and names the argument."""

import pytest
import torch
from bad_input_helpers import (
    OUTSIDE,
    SCALES,
    Pair,
    bad,
    binary,
    refused,
    small,
)

import pyro_vae as pv

USES = {
    "encode": pv.encode,
    "reconstruct": pv.reconstruct,
    "evaluate": lambda pair, x: pv.evaluate(pair, x, num_samples=2),
    "log_likelihood": lambda pair, x: pv.log_likelihood(pair, x, num_samples=2),
    "interpolate": lambda pair, x: pv.interpolate(pair, x, x),
    "traverse": lambda pair, x: pv.traverse(pair, x[:1]),
}


@pytest.mark.parametrize("use", USES.values(), ids=USES)
@pytest.mark.parametrize(
    ("x", "words"),
    [
        (torch.rand(8, 3), ["3"]),
        (torch.rand(8, 2, 2), ["2, 2"]),
        (bad(torch.nan, row=0), ["not finite"]),
        (torch.rand(0, 4), ["empty"]),
        (SCALES["whole"] + 1, OUTSIDE),
    ],
    ids=["width", "rank", "nan", "empty", "support"],
)
def test_tools_refuse_what_fit_refuses(use, x, words):
    refused(lambda: use(small(), x), *words)


def test_one_row_can_be_evaluated():
    assert pv.evaluate(small(), binary(1), num_samples=2).num_examples == 1


MISUSES = {
    "sample none": (
        lambda: pv.sample(small(), 0),
        ["n must be a whole number and at least 1, got 0"],
    ),
    "sample a part": (lambda: pv.sample(small(), 2.5), ["a whole number and at least 1, got 2.5"]),
    "sample without template": (lambda: pv.sample(Pair(), 3), ["Pair", "template(n)"]),
    "context too much": (
        lambda: pv.sample(small(), 3, torch.rand(3, 2)),
        ["0 context", "got 1"],
    ),
    "context too little": (
        lambda: pv.sample(small(context_shapes=[(2,)]), 3),
        ["1 context", "got 0"],
    ),
    "context too wide": (
        lambda: pv.sample(small(context_shapes=[(2,)]), 3, torch.rand(3, 5)),
        ["(2,)", "(3, 5)"],
    ),
    "context too long": (
        lambda: pv.sample(small(context_shapes=[(2,)]), 3, torch.rand(4, 2)),
        ["3 rows", "(4, 2)"],
    ),
    "unknown data site": (lambda: pv.sample(small(), 3, site="y"), ["'y'", "x"]),
    "decode nothing": (lambda: pv.decode(small(), {}), ["latent"]),
    "decode an unknown site": (
        lambda: pv.decode(small(), {"y": torch.rand(3, 2)}),
        ["no site 'y'"],
    ),
    "decode another width": (lambda: pv.decode(small(), {"z": torch.rand(3, 5)}), ["(3, 5)"]),
    "encode to what": (lambda: pv.encode(small(), binary(), what="median"), ["'median'", "mean"]),
    "interpolate in one step": (
        lambda: pv.interpolate(small(), binary(), binary(), steps=1),
        ["steps must be at least 2, got 1"],
    ),
    "interpolate unequal ends": (
        lambda: pv.interpolate(small(), binary(), binary(7)),
        ["start has 8 rows but end has 7; they must match"],
    ),
    "traverse from many": (
        lambda: pv.traverse(small(), binary()),
        ["x must contain one datum, got 8"],
    ),
    "traverse an unknown unit": (
        lambda: pv.traverse(small(), binary(1), units=[2]),
        ["between 0 and 1, got [2]"],
    ),
    "traverse an unknown site": (
        lambda: pv.traverse(small(), binary(1), latent="y"),
        ["'y'", "z"],
    ),
    "traverse no values": (lambda: pv.traverse(small(), binary(1), values=[]), ["values"]),
    "weigh no samples": (
        lambda: pv.log_likelihood(small(), binary(), num_samples=0),
        ["num_samples must be at least 1, got 0"],
    ),
    "convolve rows": (lambda: pv.VAE.conv((6,)), ["(channels, height, width)", "(6,)"]),
}


@pytest.mark.parametrize(("call", "words"), MISUSES.values(), ids=MISUSES)
def test_use_names_the_argument(call, words):
    refused(call, *words)
