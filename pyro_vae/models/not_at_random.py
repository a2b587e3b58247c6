"""A VAE whose entries are missing not at random: a model of the mask given the data."""

from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from torch import Tensor, nn

from pyro_vae.compat import UNOBSERVED_PART
from pyro_vae.errors import UsageError
from pyro_vae.models.vae import VAE


class NotAtRandomVAE(PyroModule):
    r"""A VAE of rows, and of which of their entries are missing given their values (not-MIWAE).

    :math:`z \sim p(z),\ x \sim p(x|z),\ s_d \sim \mathrm{Bernoulli}(\sigma(a_d u_d + b_d))`, where
    s marks observed entries and :math:`u_d` is the value of entry d in standard units
    ("self-masking"). The missing entries are a latent site, ``x_unobserved``. The guide draws it
    from :math:`p(x|z)`, :math:`z \sim q(z|x_{obs})`; its densities in model and guide cancel.

    Arguments:
        vae: the VAE of the data, whose likelihood leaves out missing entries: `pyro_vae.Missing` or
            `pyro_vae.Columns`, with continuous entries, because gradients pass through their draws.
        known_sign: whether :math:`a_d < 0`, so that larger values are missing more often; False
            leaves the sign free.

    Train with `pyro_vae.ImportanceWeightedELBO`. Bounds and log p(x) are those of x and s together.
    The model of the mask is an assumption: data cannot tell whether it is right, because they never
    show the values that are missing.

    Raises `UsageError` if the likelihood has entries without reparametrized draws.
    Ipsen, Mattei & Frellsen, not-MIWAE, 2021 (https://arxiv.org/abs/2006.12871).

    >>> import torch, pyro_vae as pv
    >>> vae = pv.VAE.mlp((3,), latent_dim=2, likelihood=pv.Missing(pv.Gaussian))
    >>> pair = NotAtRandomVAE(vae)
    >>> x = torch.tensor([[0.5, torch.nan, 1.0]])
    >>> pv.impute(pair, x, draws=2, num_samples=50).draws.shape
    torch.Size([2, 1, 3])
    """

    center: Tensor
    spread: Tensor

    def __init__(self, vae: VAE, known_sign: bool = False) -> None:
        super().__init__()
        self.vae, self.known_sign = vae, known_sign
        shape = vae.decoder.shape
        if not _likelihood(vae, 1).has_rsample:
            raise UsageError(
                "NotAtRandomVAE needs a likelihood whose draws are reparametrized: continuous and "
                "positive columns, or Gaussian or StudentT entries"
            )
        self.slope, self.offset = nn.Parameter(torch.zeros(shape)), nn.Parameter(torch.zeros(shape))
        self.register_buffer("center", torch.zeros(shape))
        self.register_buffer("spread", torch.ones(shape))

    def standardize(self, x: Tensor) -> "NotAtRandomVAE":
        """Set the standard units of the mask's model from rows (n, *data_shape).

        Returns the pair.
        """
        center = x.double().nanmean(0)
        self.center.copy_(center)
        self.spread.copy_((x - center).square().nanmean(0).sqrt().clamp(min=1e-12))
        return self

    def model(self, x: Tensor, *context: Tensor) -> None:
        seen = ~x.isnan()
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", self.vae.prior(*context))
            fn = self.vae.decoder(z, *context)
            hidden = pyro.sample(f"x{UNOBSERVED_PART}", fn)
            pyro.sample("x", fn, obs=x)
            logits = self._logits(torch.where(seen, x, hidden))
            mask = dist.Bernoulli(logits=logits, validate_args=False).to_event(seen.dim() - 1)
            pyro.sample("seen", mask, obs=seen.to(x.dtype))

    def guide(self, x: Tensor, *context: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", self.vae.encoder(x, *context))
            pyro.sample(f"x{UNOBSERVED_PART}", self.vae.decoder(z, *context))

    def template(self, n: int) -> tuple[Tensor, ...]:
        """A batch of n rows of the right shapes; the values have no meaning."""
        return self.vae.template(n)

    def _logits(self, x: Tensor) -> Tensor:
        slope = -nn.functional.softplus(self.slope) if self.known_sign else self.slope
        return slope * (x - self.center) / self.spread + self.offset


def _likelihood(vae: VAE, n: int) -> Any:
    """The likelihood of n rows at the draws of the prior."""
    with torch.no_grad():
        batch = vae.template(n)
        z = vae.prior(*batch[1:]).expand((n,)).sample()
        return vae.decoder(z, *batch[1:])
