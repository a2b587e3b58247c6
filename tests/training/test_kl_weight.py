"""The weight on the KL."""

import pytest
import torch
from objectives_helpers import (
    PAIRS,
    around,
    assert_same,
    by_hand,
    closed_kl,
    linear,
    plated,
    run,
    watched,
)
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO

import pyro_vae as pv

BETAS = [0, 0.5, 1.0, 2.5, torch.tensor(0.3), torch.tensor(0.0)]


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("beta", BETAS)
def test_kl_weight_scales_the_kl_alone(name, beta):
    pair, x = PAIRS[name]()
    loss, [[z]] = watched(around(pv.KLWeight(beta), pair), x, Trace_ELBO())
    reconstruction, log_ratio = by_hand(pair, x, z)
    assert_same(loss, -(reconstruction - beta * log_ratio).sum(), pair)


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("beta", BETAS)
def test_kl_weight_scales_the_closed_kl_alone(name, beta):
    pair, x = PAIRS[name]()
    loss, [[z]] = watched(around(pv.KLWeight(beta), pair), x, TraceMeanField_ELBO())
    reconstruction, _ = by_hand(pair, x, z)
    assert_same(loss, -(reconstruction - beta * closed_kl(pair, x).sum(1)).sum(), pair)


def test_kl_weight_can_change_between_steps_and_meets_every_latent():
    pair, x = plated()
    weight = pv.KLWeight()
    weighted = around(weight, pair)
    losses = []
    for beta in (1.0, 0.0, 3.0):
        weight.weight = beta
        losses.append(run(weighted, x, Trace_ELBO()))
    full, reconstruction, heavy = losses
    assert_same(heavy, reconstruction + 3 * (full - reconstruction), pair)
    assert_same(full, run(pair, x, Trace_ELBO()), pair)


@pytest.mark.parametrize("outermost", ["weight", "scale"])
def test_kl_weight_joins_other_scales(outermost):
    pair, x = linear()
    weight, scale = pv.KLWeight(0.5), poutine.scale(scale=4.0)
    inner, outer = (scale, weight) if outermost == "weight" else (weight, scale)
    weighted = around(outer, around(inner, pair))
    loss, [[z]] = watched(weighted, x, Trace_ELBO())
    reconstruction, log_ratio = by_hand(pair, x, z)
    assert_same(loss, -4 * (reconstruction - 0.5 * log_ratio).sum(), pair)
