"""The deep Markov model: a trajectory of latent vectors for each sequence."""

from math import prod

import pyro
import torch
from pyro.nn import PyroModule
from torch import Tensor, nn

from pyro_vae.compat import has_values
from pyro_vae.errors import UsageError
from pyro_vae.parts.factors import Factor, Family, made, viewed
from pyro_vae.parts.likelihoods import Bernoulli
from pyro_vae.parts.networks import MLP
from pyro_vae.parts.posteriors import DiagonalNormal
from pyro_vae.parts.recurrent import BackwardLSTM, GatedTransition
from pyro_vae.parts.sequences import MarkovChain


class DeepMarkovModel(PyroModule):
    r"""A deep Markov model: each sequence has a Markov chain of latent vectors.

    :math:`z_t \sim p(z_t|z_{t-1}),\ x_t \sim p(x_t|z_t)`. The guide factorizes like the exact
    posterior, :math:`q(z_t | z_{t-1}, x_{t:T})`, where a network reads the sequence backward. The
    trajectory is one latent site "z" with event shape ``(steps, latent_dim)``. :math:`z_0` is a
    parameter.

    Arguments:
        transition: a factor that returns p(z_t | z_{t-1}).
        emission: a factor that returns p(x_t | z_t).
        smoother: a factor that returns q(z_t | z_{t-1}, h_t).
        reader: a network that returns h of shape (..., steps, width), given x and its lengths.
        steps: the number of steps in a row of data.
        ragged: whether a second tensor of each batch gives the length of each row in steps. Later
            steps are ignored.

    Rows of data have shape ``(steps, *emission.shape)``, or another shape of the same size.
    Raises `UsageError` if lengths are missing or not expected, or are not whole numbers from 0 to
    ``steps``.
    Krishnan, Shalit & Sontag, Structured inference networks for nonlinear state space models, 2017
    (https://arxiv.org/abs/1609.09869).

    >>> import torch, pyro_vae as pv
    >>> pair = pv.DeepMarkovModel.usual(steps=5, data_dim=3, latent_dim=2, hidden=8)
    >>> pv.encode(pair, torch.ones(4, 5, 3))["z"].shape
    torch.Size([4, 5, 2])
    """

    def __init__(
        self,
        transition: Factor,
        emission: Factor,
        smoother: Factor,
        reader: nn.Module,
        steps: int,
        ragged: bool = False,
    ) -> None:
        super().__init__()
        self.transition, self.emission, self.smoother = transition, emission, smoother
        self.reader, self.steps, self.ragged = reader, steps, ragged
        self.start = nn.Parameter(torch.zeros(transition.shape))

    def model(self, x: Tensor, *lengths: Tensor) -> None:
        # The density of the transition is computed after the model has run. Stock SVI sees only
        # the parameters that are declared during the run.
        pyro.module("pair", self)
        x, inside = self._rows(x, *lengths)
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", MarkovChain(self.transition, self.start, inside))
            pyro.sample("x", self.emission(z).mask(inside).to_event(1), obs=x)

    def guide(self, x: Tensor, *lengths: Tensor) -> None:
        x, inside = self._rows(x, *lengths)
        read = self.reader(x.flatten(2), inside.sum(-1))
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", MarkovChain(self.smoother, self.start, inside, read))

    def template(self, n: int) -> tuple[Tensor, ...]:
        """A batch of n rows of the right shapes and of full length; the values have no meaning."""
        lengths = (torch.full((n,), self.steps),) if self.ragged else ()
        return (torch.zeros(n, self.steps, *self.emission.shape), *lengths)

    def _rows(self, x: Tensor, *lengths: Tensor) -> tuple[Tensor, Tensor]:
        """The data of shape (n, steps, *emission.shape), and which steps count, (n, steps)."""
        if len(lengths) != self.ragged:
            raise UsageError(
                f"the model needs x and {'the lengths' if self.ragged else 'no other tensors'}, "
                f"got {len(lengths)} tensors after x"
            )
        places = torch.arange(self.steps, device=x.device)
        each = lengths[0] if lengths else torch.full((len(x),), self.steps, device=x.device)
        _require_lengths(each, self.steps)
        return x.reshape(len(x), self.steps, *self.emission.shape), places < each[:, None]

    @classmethod
    def usual(
        cls,
        steps: int,
        data_dim: int,
        latent_dim: int = 20,
        hidden: int = 64,
        likelihood: Family | type[Family] = Bernoulli,
        posterior: Family | type[Family] = DiagonalNormal,
        ragged: bool = False,
    ) -> "DeepMarkovModel":
        """A deep Markov model with a gated transition, an LSTM and one-layer perceptrons.

        Arguments:
            steps: the number of steps in a row of data.
            data_dim: the width of each step.
            latent_dim: the dimension of each z_t.
            hidden: the units of the LSTM and of each perceptron.
            likelihood, posterior: the families of x_t and z_t, or their classes.
            ragged: whether each batch also contains the lengths of its rows.
        """
        likelihood, posterior, latents = made(likelihood), made(posterior), (latent_dim,)
        outputs = posterior.outputs(latents)
        emission = MLP(latent_dim, (hidden,), likelihood.outputs((data_dim,)))
        smoother = MLP([latent_dim, hidden], (hidden,), outputs, nn.Tanh)
        reader = viewed(lambda seen: BackwardLSTM(prod(seen), hidden), likelihood, (data_dim,))
        return cls(
            Factor(GatedTransition(latent_dim, hidden), DiagonalNormal(), latents),
            Factor(emission, likelihood, (data_dim,)),
            Factor(smoother, posterior, latents),
            reader,
            steps,
            ragged,
        )


def _require_lengths(lengths: Tensor, steps: int) -> None:
    if lengths.dim() != 1:
        raise UsageError(
            "the lengths must be one number for each row, got rows of shape "
            f"{tuple(lengths.shape[1:])}"
        )
    known = (lengths >= 0) & (lengths <= steps) & (lengths == lengths.floor())
    if has_values(known) and not bool(known.all()):
        raise UsageError(
            f"the lengths must be whole numbers from 0 to {steps}, the steps of the model, got "
            f"{lengths[~known][0].item():g}"
        )
