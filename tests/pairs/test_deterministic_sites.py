"""Sites that only name a value."""

import pyro
import torch
from pyro.infer.reparam import LocScaleReparam

from pyro_vae.pairs.sites import is_deterministic


def test_only_observed_deltas_that_are_masked_out_are_deterministic():
    """``poutine.reparam`` leaves such a site; other masked sites are data or latents."""
    one = torch.zeros(3)
    sites = {
        "named": lambda: pyro.deterministic("a", one),
        "reparametrized": lambda: pyro.poutine.reparam(
            lambda: pyro.sample("a", pyro.distributions.Normal(one, 1.0)),
            config={"a": LocScaleReparam(0.0)},
        )(),
        "data": lambda: pyro.sample("a", pyro.distributions.Normal(one, 1.0).mask(False), obs=one),
        "part of the data": lambda: pyro.sample(
            "a", pyro.distributions.Delta(one).mask(torch.tensor(False)), obs=one
        ),
        "equality": lambda: pyro.sample("a", pyro.distributions.Delta(one), obs=one),
        "latent": lambda: pyro.sample("a", pyro.distributions.Delta(one).mask(False)),
    }
    found = {
        name: is_deterministic(pyro.poutine.trace(run).get_trace().nodes["a"])
        for name, run in sites.items()
    }
    assert [name for name, is_it in found.items() if is_it] == ["named", "reparametrized"]
