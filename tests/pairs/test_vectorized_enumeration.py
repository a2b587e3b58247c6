"""Importance weights of a latent that depends on an enumerated one are drawn together."""

import pytest
import torch

import pyro_vae as pv
from pyro_vae.pairs.scope import using
from pyro_vae.pairs.weights import structure


@pytest.mark.parametrize("latent_dim", [1, 2])
def test_a_code_that_depends_on_an_enumerated_class_broadcasts(latent_dim):
    pair = pv.SemiSupervisedVAE.mlp((4,), num_classes=3, latent_dim=latent_dim)
    x, missing = torch.rand(2, 4).round(), torch.full((2,), -1)
    with using(pair, 0):
        nesting, vectorized, _ = structure(pair, (x, missing))
    assert (nesting, vectorized) == (1, True)
