"""The parts of a report about a table: marginals, imputations of hidden cells, strangest rows."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pyro_vae.data.schema import Schema
from pyro_vae.inference.generation import sample
from pyro_vae.inference.imputation import Imputation, impute
from pyro_vae.inference.pareto import threshold
from pyro_vae.inference.scoring import score
from pyro_vae.parts.circular import circular_mean, near
from pyro_vae.plots.columns import marginals, pairwise_plots

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HIDDEN = 0.2
"""The share of the observed cells that are hidden to measure imputations."""

REPORTED_ROWS = 500
"""The largest number of rows that are imputed and scored."""


def table_parts(
    pair: nn.Module,
    schema: Schema,
    x: Tensor,
    context: Sequence[Tensor],
    ids: Sequence[Any] | None,
    seed: int,
) -> list[tuple[str, "Figure | str"]]:
    """The figures and tables of held-out rows (n, columns), by name."""
    made: list[tuple[str, Figure | str]] = []
    some = torch.arange(1000) % len(x)
    drawn = sample(pair, 1000, *(part[some] for part in context), seed=seed)
    made.append(("marginals", marginals(schema, x, drawn)))
    if (pairs := pairwise_plots(schema, x, drawn)) is not None:
        made.append(("pairwise", pairs))
    few, given = x[:REPORTED_ROWS], [part[:REPORTED_ROWS] for part in context]
    made.append(("imputations", _imputations(pair, schema, few, given, seed)))
    made.append(("strangest", _strangest(pair, schema, few, given, ids, seed)))
    return made


def _imputations(
    pair: nn.Module, schema: Schema, x: Tensor, context: Sequence[Tensor], seed: int
) -> str:
    """The error and the coverage of imputations of hidden cells, by column."""
    generator = torch.Generator().manual_seed(seed)
    hidden = (torch.rand(x.shape, generator=generator) < HIDDEN) & ~x.isnan()
    hidden[(hidden | x.isnan()).all(1)] = False  # a row keeps an observed cell
    if not bool(hidden.any()):
        return "too few cells"
    holes = torch.where(hidden, torch.nan, x)
    found = impute(pair, holes, *context, num_samples=500, seed=seed)
    head = f"{'column':<26}{'cells':>6}  {'error':>8}{'without z':>11}{'in 90 % interval':>18}"
    lines = [_line(schema, j, x, holes, hidden, found) for j in range(x.shape[1])]
    limit = threshold(found.num_samples)
    bad = int((found.pareto_k[hidden.any(1)] > limit).sum())
    note = f"Pareto k is over {limit:.2f} for {bad} of {int(hidden.any(1).sum())} rows."
    return "\n".join([head, *lines, note])


def _line(
    schema: Schema, j: int, x: Tensor, holes: Tensor, hidden: Tensor, found: Imputation
) -> str:
    column, at = schema.data[j], hidden[:, j]
    truth, made, known = x[at, j], found.mean[at, j], holes[:, j][~holes[:, j].isnan()]
    name = f"{column.name[:25]:<26}{int(at.sum()):>6}  "
    if not len(truth) or not len(known):
        return name
    if column.coded:
        usual = known.mode().values
        wrong, plain = (made != truth).double().mean(), (usual != truth).double().mean()
        return f"{name}{100 * wrong:>6.1f} %{100 * plain:>9.1f} %{'':>18}"
    usual = known.mean()
    if column.period:  # the guesses as near to the truth as turns allow
        period = torch.tensor(column.period)
        usual = circular_mean(known, torch.ones_like(known), period)
        truth = near(truth, made, period)
        usual = near(usual, truth, period)
    error, plain = ((guess - truth).square().mean().sqrt() for guess in (made, usual))
    inside = (found.low[at, j] <= truth) & (truth <= found.high[at, j])
    return f"{name}{error:>8.4g}{plain:>11.4g}{100 * inside.double().mean():>16.0f} %"


def _strangest(
    pair: nn.Module,
    schema: Schema,
    x: Tensor,
    context: Sequence[Tensor],
    ids: Sequence[Any] | None,
    seed: int,
) -> str:
    """The rows with the lowest log p(x), and the columns that make them strange."""
    found = score(pair, x, *context, num_samples=500, seed=seed)
    lines = [f"{'row':<14}{'log p(x)':>10}{'Pareto k':>10}  columns (nats below the median)"]
    for row in found.strangest(10).tolist():
        words = ", ".join(
            f"{schema.data[j].name} ({found.strangeness[row, j]:.1f})"
            for j in found.entries(row, 3)
            if not x[row, j].isnan()
        )
        name = str(row if ids is None else ids[row])[:13]
        value, k = found.log_likelihood[row], found.pareto_k[row]
        lines.append(f"{name:<14}{value:>10.2f}{k:>10.2f}  {words}")
    return "\n".join(lines)
