"""Joint draws of all latents of a pair: global, group and local."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pyro_vae.data.preparation import Preparation, held_rows, joined
from pyro_vae.data.sources import Rows, Source
from pyro_vae.errors import UsageError, nearest
from pyro_vae.inference.inference_data import (
    converted,
    installed_arviz,
    unit_names,
)
from pyro_vae.inference.passes import ROWS_AT_ONCE, in_chunks, summed_out
from pyro_vae.pairs import enumeration
from pyro_vae.pairs.data_plate import is_local
from pyro_vae.pairs.frames import installed_pandas
from pyro_vae.pairs.given_globals import draw_globals, pools, spread_rows
from pyro_vae.pairs.guide import trace_guide
from pyro_vae.pairs.model import global_latents, unconditioned
from pyro_vae.pairs.pair import Batch
from pyro_vae.pairs.progress import bar
from pyro_vae.pairs.scope import using
from pyro_vae.pairs.showing import shown_html
from pyro_vae.pairs.sites import data_first, latents
from pyro_vae.pairs.threads import alone
from pyro_vae.pairs.traces import Given, trace


@dataclass(frozen=True)
class JointDraws(Mapping[str, Tensor]):
    """Joint draws of all latents: the s-th entries of all tensors belong together.

    A mapping from the name of a site to its draws.
    """

    local: dict[str, Tensor] = field(default_factory=dict)
    """Draws of each local latent, of shape (draws, n, *event_shape)."""
    shared: dict[str, Tensor] = field(default_factory=dict)
    """Draws of each global latent, of shape (draws, *event_shape), and of each group latent, of
    shape (draws, groups, *event_shape)."""

    def __getitem__(self, name: str) -> Tensor:
        return (self.shared | self.local)[name]

    def __iter__(self) -> Any:
        return iter(self.shared | self.local)

    def __len__(self) -> int:
        return len(self.shared) + len(self.local)

    @property
    def num_draws(self) -> int:
        """The number of joint draws."""
        return len(next(iter(self.values())))

    def to_pandas(self) -> Any:
        """Return a ``DataFrame`` with a row for each draw and a column for each unit.

        Columns are named as ArviZ and the R package posterior name them, from 0 on: "w", "u[1]" for
        group 1, "z[3, 0]" for unit 0 of row 3. Raises `UsageError` if pandas is missing.
        """
        pandas = installed_pandas("to_pandas")
        columns: dict[str, Any] = {}
        for name, value in self.items():
            flat = value.reshape(len(value), -1).cpu().numpy().T
            columns |= dict(zip(unit_names(name, value.shape[1:]), flat, strict=True))
        return pandas.DataFrame(columns, index=pandas.RangeIndex(self.num_draws, name="draw"))

    def to_arviz(self) -> Any:
        """Return an ArviZ ``InferenceData`` (a ``DataTree`` from version 1.0) of one chain.

        Its group ``posterior`` has dimensions (chain, draw, data, ...) for local latents and
        (chain, draw, ...) for the others. `pyro_vae.to_arviz` also exports predictions and
        log p(x). Raises `UsageError` if ArviZ is missing.
        """
        return converted(installed_arviz(), {"posterior": self.local}, self.shared)

    _repr_html_ = shown_html

    def __str__(self) -> str:
        kinds = {"global or group": self.shared, "local": self.local}
        width = max(map(len, self)) + 2
        lines = [
            f"{name:<{width}}{kind:<17}{tuple(value.shape)}"
            for kind, sites in kinds.items()
            for name, value in sites.items()
        ]
        return "\n".join([f"{self.num_draws} joint draws of {len(self)} latents", *lines])


@alone()
def posterior(
    pair: nn.Module,
    x: Rows,
    *context: Any,
    draws: int = 100,
    from_prior: Sequence[str] = (),
    binarize: str = "dynamic",
    seed: int = 0,
    progress: bool = True,
) -> JointDraws:
    r"""Draw all latents of new data jointly from the guide: global, group and local latents.

    For each draw, :math:`w \sim q(w)`, and then :math:`z_i \sim q(z_i \mid x_i, w)` for every row,
    all given the same w. A guide without this dependence draws :math:`z_i \sim q(z_i \mid x_i)`.
    Latents that only the model has (enumerated ones) are drawn from their posterior given the rest.

    Arguments:
        pair: any pair.
        x, context: the data, as `pyro_vae.evaluate` takes them.
        draws: number of joint draws.
        from_prior: global or group latents that are drawn from their prior, given the other global
            latents, instead of from the guide.
        binarize, seed: as in `pyro_vae.evaluate`.
        progress: show a bar if the run takes over two seconds.

    The draws are those of the guide: `pyro_vae.diagnose` and `pyro_vae.nuts` tell how far they are
    from the exact posterior. If the guide computes a group latent from the rows of its group
    (amortization), new groups need nothing more. If it keeps a table of parameters for the groups
    of the training data, the context must use the numbers of these groups. For new groups, number
    them from 0 and name the latent in ``from_prior``.

    Raises `UsageError` if ``draws`` is below 1, if ``from_prior`` names another site, and if the
    context has a group that the pair does not know.

    >>> import torch, pyro_vae as pv
    >>> pair = pv.BayesianDecoder(pv.VAE.mlp((4,), latent_dim=2, hidden=()))
    >>> found = pv.posterior(pair, torch.ones(3, 4), draws=5)
    >>> found["z"].shape, found["decoder.network.layers.0.bias"].shape
    (torch.Size([5, 3, 2]), torch.Size([5, 4]))
    """
    if draws < 1:
        raise UsageError(f"must be at least 1, got {draws}", argument="draws")
    try:
        rows, prepare = held_rows(pair, x, context, binarize)
        return _drawn(pair, rows, prepare, draws, from_prior, seed, progress)
    except UsageError as error:
        if isinstance(error.__cause__, IndexError) and "out of" in error.template:
            raise UsageError(f"{error.template}; {NEW_GROUP}") from error
        raise


NEW_GROUP = (
    "if the index is the number of a new group, number the new groups from 0 and draw their "
    "latents from the prior: from_prior=[SITE]"
)


def _drawn(
    pair: nn.Module,
    rows: Source,
    prepare: Preparation,
    draws: int,
    from_prior: Sequence[str],
    seed: int,
    progress: bool,
) -> JointDraws:
    few = prepare(rows.first(4))
    names = global_latents(pair, few)
    for name in from_prior:
        if name not in names:
            raise UsageError(
                f"must name global or group latents, got '{name}'; {nearest(name, names)}",
                argument="from_prior",
            )
    batch = joined(rows, prepare)
    with using(pair, seed), bar(progress, draws, "posterior", delay=2) as shown:
        return joint_draws(pair, batch, draws, from_prior, shown.update)


def joint_draws(
    pair: nn.Module,
    batch: Batch,
    number: int,
    from_prior: Sequence[str] = (),
    done: Callable[[], Any] = lambda: None,
) -> JointDraws:
    """Draw as `posterior` does, for a prepared batch. Call this function within `using`."""
    few = tuple(part[:4] for part in batch)
    names = global_latents(pair, few)
    of = batch if pools(pair, spread_rows(batch), names) else few
    summed = enumeration.enumerates(pair, few)
    local: list[dict[str, Tensor]] = []
    shared: list[dict[str, Tensor]] = []
    for _ in range(number):
        shared.append(_shared(pair, of, names, from_prior))
        local.append(_local(pair, batch, shared[-1], summed))
        done()
    return JointDraws(_stacked(local), _stacked(shared))


def _shared(
    pair: nn.Module, batch: Batch, names: Sequence[str], from_prior: Sequence[str]
) -> dict[str, Tensor]:
    """Return one draw of the global and group latents."""
    drawn = draw_globals(pair, batch, names)
    if from_prior:
        kept = {name: value for name, value in drawn.items() if name not in from_prior}
        with Given(kept):
            prior = latents(trace(unconditioned(pair), batch))
        drawn |= {name: prior[name]["value"] for name in from_prior}
    return drawn


def _local(
    pair: nn.Module, batch: Batch, shared: dict[str, Tensor], summed: bool
) -> dict[str, Tensor]:
    """Return one draw of the local latents of all rows, given the others."""
    found: dict[str, list[Tensor]] = {}
    for part in in_chunks(batch, ROWS_AT_ONCE):
        with Given(shared):
            guide = trace_guide(pair, part)
        values = {
            name: data_first(site["value"], site)
            for name, site in latents(guide).items()
            if is_local(site)
        }
        if summed:
            values |= summed_out(pair, part, guide, means=False)
        for name, value in values.items():
            found.setdefault(name, []).append(value)
    return {name: torch.cat(values) for name, values in found.items()}


def _stacked(draws: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([one[name] for one in draws]) for name in draws[0]}
