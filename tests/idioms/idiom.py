"""What an idiom of Pyro is for the tests: a small pair, its data, and what the tools must do."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from pyro.infer import ELBO, Trace_ELBO
from torch import Tensor, nn

Batch = tuple[Tensor, ...]

TOOLS = (
    "check",
    "fit",
    "evaluate",
    "log_likelihood",
    "encode",
    "reconstruct",
    "sample",
    "refine",
    "gaps",
    "nuts",
    "anneal",
    "predictive_check",
    "calibration",
    "diagnose",
    "save and load",
)
"""The tools that every idiom goes through, in the order of the page."""


@dataclass(frozen=True)
class Refusal:
    """A refusal: what the error says, and the reason in the words of the page."""

    says: str
    reason: str


@dataclass(frozen=True, eq=False)
class Idiom:
    """A way of writing a model in Pyro, and what the tools do with it."""

    name: str
    """The first cell of its row in docs/models/idioms.md."""
    make: Callable[[], nn.Module]
    """Makes the pair. Its method ``log_p(*batch)`` is log p(x) of each datum, computed without
    pyro_vae: in closed form, by a sum, or by quadrature. A pair without it has no log p(x)."""
    batch: Callable[[], Batch]
    """Makes the data."""
    stock: Callable[[], ELBO] = Trace_ELBO
    """The objective under stock Pyro."""
    site: str | None = None
    """The observed site to name to `reconstruct` and `sample`, if no single site observes x."""
    share: float = 1.0
    """The share of the data that the plate counts, for stock Pyro's loss of a part of the data."""
    needs: str = ""
    """What the user must do so that the idiom works, for the page."""
    refuses: Mapping[str, Refusal] = field(default_factory=dict)
    """The refusal of each tool that refuses the idiom."""

    def seeded(self) -> tuple[nn.Module, Batch]:
        """Return a new pair and its data, always the same."""
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return self.make(), self.batch()


def rows(number: int, *shape: int, seed: int = 1) -> Tensor:
    """Return standard normal data."""
    return torch.randn(number, *shape, generator=torch.Generator().manual_seed(seed))


def integral(terms: Tensor, spacing: float) -> Tensor:
    """Return the logarithm of the integral over dimension 0 of exponentiated terms."""
    return terms.logsumexp(0) + torch.tensor(spacing).log()


UNREFINED = Refusal(
    "the guide has no latent whose parameters can be refined",
    "no local latent has parameters of a reparametrized distribution",
)
SHARED_LATENT = Refusal(
    "is not local, but this tool needs latents of one datum", "a latent is shared by data"
)
UNRANKED = Refusal(
    "is not local, but calibration ranks only local latents", "it ranks only local latents"
)
PARTS = Refusal("parts of x at several sites", "each site observes only a part of x")
NO_LOCAL = {"refine": UNREFINED, "gaps": UNREFINED}
"""Refusals if no local latent has parameters that could be refined."""

SHARED = {
    "anneal": SHARED_LATENT,
    "calibration": UNRANKED,
}
"""Refusals of global and group latents."""

STEPS: dict[str, Any] = {
    "site": "x0",
    "needs": "you name a site to `reconstruct` and `sample`, because each step has its own",
    "refuses": {"predictive_check": PARTS, "calibration": PARTS},
}
"""What idioms share that have an observed site for each step."""


def everywhere(refusal: Refusal, *, except_for: tuple[str, ...] = ()) -> dict[str, Refusal]:
    """Return the same refusal for each tool except some."""
    return {tool: refusal for tool in TOOLS if tool not in except_for}
