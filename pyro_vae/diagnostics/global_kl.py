"""The KL of global and group latents, which the bound of held-out data leaves out."""

from torch import nn

from pyro_vae.pairs import enumeration, fold_plan, folds
from pyro_vae.pairs.data_plate import is_local
from pyro_vae.pairs.pair import Batch
from pyro_vae.pairs.scope import using
from pyro_vae.pairs.sites import data_plates, latents
from pyro_vae.training.recording import ELBOParts

DRAWS = 100
"""Draws of the guide."""


def global_kl(pair: nn.Module, batch: Batch, seed: int) -> dict[str, float]:
    r"""The mean of :math:`\log q(w) - \log p(w)` of each latent outside the data plate, in nats.

    Such a latent is drawn once for all data, so its KL is not a mean over examples. Point estimates
    have none, and discrete latents of all data that must be summed out are left out.
    """
    found, outside = ELBOParts(), set[str]()
    points = fold_plan.plan(pair, batch).points
    nesting = enumeration.nesting(pair, batch)
    with using(pair, seed):
        for _ in range(DRAWS):
            model, guide = enumeration.traces(pair, batch, nesting)
            plates = data_plates(model, guide)
            sites = latents(model) | latents(guide)
            outside = {
                folds.joint_name(site)
                for name, site in sites.items()
                if not is_local(site, plates) and name not in points
            }
            if not outside or enumeration.drawn(model, guide):
                return {}
            found.add(model, guide, 1 / DRAWS)
    return {name: float(value) for name, value in found.kl.items() if name in outside}
