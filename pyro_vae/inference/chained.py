"""Draws of the latents of rows by NUTS, in the form of weighted draws."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pyro_vae.errors import UsageError
from pyro_vae.inference.nuts import nuts
from pyro_vae.inference.passes import summed_out
from pyro_vae.inference.weighted import repeated, rows_at_once
from pyro_vae.pairs.guide import trace_guide
from pyro_vae.pairs.model import global_latents
from pyro_vae.pairs.pair import Batch
from pyro_vae.pairs.scope import using
from pyro_vae.pairs.sites import latents
from pyro_vae.pairs.traces import DataFirst

CHAINS = 4
"""The number of chains of each row."""


class Chained(NamedTuple):
    """K draws of the latents of n rows by NUTS, of all chains together, with equal weights."""

    batch: Batch
    """The rows, repeated: row i of draw k is row k n + i."""
    values: dict[str, Tensor]
    """The draws by latent site, with the K n rows first."""
    shares: Tensor
    """1 / K, (K, n)."""
    effective_sample_size: Tensor
    """The smallest of the units of each row, (n,)."""
    r_hat: Tensor
    """The largest of the units of each row, (n,)."""
    reliable: Tensor
    """Whether the chains of each row agree, none diverged, and 400 draws are effective, (n,)."""

    @property
    def passes(self) -> tuple["Chained", ...]:
        """The model runs once for all draws."""
        return (self,)

    @property
    def pareto_k(self) -> Tensor:
        """NaN, (n,): draws of chains have no weights."""
        return torch.full_like(self.r_hat, torch.nan)


def chained_parts(pair: nn.Module, batch: Batch, num_samples: int, seed: int) -> Iterator[Chained]:
    """Draws of a prepared batch by NUTS, some rows at a time.

    Each of the 4 chains has as many transitions of warm-up as draws. Raises `UsageError` for pairs
    with global latents, or with latents that the guide enumerates.
    """
    _require_served(pair, batch)
    each = -(-num_samples // CHAINS)
    lengths: dict[str, Any] = {"num_draws": each, "warmup": each, "num_chains": CHAINS}
    found: Any = nuts(pair, batch[0], *batch[1:], **lengths, seed=seed, progress=False)
    number = CHAINS * each
    with using(pair):
        size = rows_at_once(pair, batch, number)
    least = found.effective_sample_size.nan_to_num(torch.inf).amin(1).clamp(max=number)
    for rows in torch.arange(len(batch[0])).split(size):
        many = repeated(tuple(tensor[rows] for tensor in batch), number)
        values = {
            name: draws.flatten(0, 1)[:, rows].flatten(0, 1).to(batch[0].device)
            for name, draws in found.draws.items()
        }
        yield Chained(
            many,
            values | _summed_out(pair, many, values),
            batch[0].new_full((number, len(rows)), 1 / number, dtype=torch.double),
            least[rows].double(),
            found.r_hat.nan_to_num(1.0).amax(1)[rows].double(),
            (found.agrees & ~found.too_few_draws)[rows],
        )


def _summed_out(pair: nn.Module, batch: Batch, values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Draws of the latents that only the model enumerates, given the others."""
    with using(pair), DataFirst(values):
        guide = trace_guide(pair, batch)
    with using(pair):
        return summed_out(pair, batch, guide, means=False)


def _require_served(pair: nn.Module, batch: Batch) -> None:
    few = tuple(tensor[:2] for tensor in batch)
    with using(pair, 0):
        if shared := global_latents(pair, few):
            raise UsageError(
                f"'nuts' needs a pair whose latents are local, but '{next(iter(shared))}' is "
                "shared by all rows: use 'importance' or 'refine'",
                argument="method",
            )
        for name, site in latents(trace_guide(pair, few)).items():
            if site["infer"].get("enumerate"):
                raise UsageError(
                    f"'nuts' does not draw latent site '{name}', which is enumerated: use "
                    "'importance' or 'refine'",
                    argument="method",
                )
