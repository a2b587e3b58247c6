"""The record of the parts of the ELBO."""

from types import SimpleNamespace

import pyro
import pyro.distributions as dist
import pytest
import torch
from objectives_helpers import PAIRS, around, by_hand, linear, plated, run, watched
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO

import pyro_vae as pv
from pyro_vae.training.recording import ELBOParts, recorded

OBJECTIVES = {
    "one": Trace_ELBO(),
    "three": Trace_ELBO(num_particles=3),
    "four-vectorised": Trace_ELBO(num_particles=4, vectorize_particles=True, max_plate_nesting=1),
    "closed-kl": TraceMeanField_ELBO(),
    "importance": pv.ImportanceWeightedELBO(5),
    "free-bits": pv.FreeBitsELBO(0.2),
}


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("beta", [1.0, 0.3, 0.0])
@pytest.mark.parametrize("kind", PAIRS)
def test_recorded_parts_are_those_of_the_draws(name, beta, kind):
    pair, x = PAIRS[kind]()
    weighted, parts = around(pv.KLWeight(beta), pair), ELBOParts()
    loss, seen = watched(weighted, x, recorded(OBJECTIVES[name], parts))
    z = torch.cat([z.reshape(-1, *z.shape[-2:]) for (z,) in seen])
    assert len(z) == OBJECTIVES[name].num_particles
    reconstruction, log_ratio = by_hand(pair, x, z)
    assert parts.reconstruction.keys() == {"x"}
    assert parts.kl.keys() == {"z"}
    expected = reconstruction.mean(0).sum().detach(), log_ratio.mean(0).sum().detach()
    torch.testing.assert_close((parts.reconstruction["x"], parts.kl["z"]), expected)
    # Recording changes neither the loss nor the original objective.
    torch.testing.assert_close(loss, run(weighted, x, OBJECTIVES[name]))
    torch.testing.assert_close(parts.kl["z"], expected[1])


@pytest.mark.parametrize("particles", [1, 3])
def test_recorded_parts_leave_scales_out_and_keep_masks(particles):
    pair, x = linear()
    mask = torch.tensor([True, False, True, True, False, False])
    changed = around(poutine.scale(scale=3.0), around(poutine.mask(mask=mask), pair))
    parts = ELBOParts()
    _, seen = watched(changed, x, recorded(Trace_ELBO(num_particles=particles), parts))
    reconstruction, log_ratio = by_hand(pair, x, torch.stack([z for (z,) in seen]))
    expected = [(part.detach() * mask).mean(0).sum() for part in (reconstruction, log_ratio)]
    torch.testing.assert_close([parts.reconstruction["x"], parts.kl["z"]], expected)


def test_recorded_parts_of_two_latents_make_the_loss():
    pair, x = plated()
    parts = ELBOParts()
    loss, [[z, w]] = watched(pair, x, recorded(Trace_ELBO(), parts), ("z", "w"))
    kl_z = dist.Normal(pair.loc, 1.3).log_prob(z) - dist.Normal(0.0, 1.0).log_prob(z)
    kl_w = dist.Normal(pair.loc + z, 0.7).log_prob(w) - dist.Normal(z, 1.0).log_prob(w)
    torch.testing.assert_close(parts.kl["z"], kl_z.sum().detach())
    torch.testing.assert_close(parts.kl["w"], kl_w.sum().detach())
    elbo = parts.reconstruction["x"] - parts.kl["z"] - parts.kl["w"]
    torch.testing.assert_close(elbo, -loss.detach())


def test_recorded_parts_make_the_loss_of_a_guide_with_an_auxiliary_latent():
    pair, x = linear()

    def guide(x):
        with pyro.plate("data", len(x), dim=-1):
            auxiliary = dist.Normal(pair.offset, 1.0).to_event(1)
            u = pyro.sample("u", auxiliary, infer={"is_auxiliary": True})
            pyro.sample("z", dist.Normal(u, 0.7).to_event(1))

    parts = ELBOParts()
    loss = run(SimpleNamespace(model=pair.model, guide=guide), x, recorded(Trace_ELBO(), parts))
    reconstruction, kl = parts.per_example(len(x))
    assert reconstruction - sum(kl.values()) == pytest.approx(-loss.item() / len(x))


def test_parts_add_up_over_minibatches():
    pair, x = linear()
    parts = ELBOParts()
    measured = recorded(Trace_ELBO(), parts)
    total = sum(run(pair, rows, measured, i).item() for i, rows in enumerate((x[:4], x[4:])))
    reconstruction, kl = parts.per_example(len(x))
    assert (reconstruction - sum(kl.values())) * len(x) == pytest.approx(-total)
    parts.clear()
    assert parts.per_example(len(x)) == (0, {})
