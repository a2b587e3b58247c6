"""Figures of the results of diagnostics; each function returns a matplotlib ``Figure``."""

from collections.abc import Mapping
from math import ceil
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from pyro_vae.diagnostics.calibration import INTERVALS, Calibration
from pyro_vae.diagnostics.gaps import Gaps
from pyro_vae.diagnostics.outliers import OutlierScores
from pyro_vae.diagnostics.predictive import PredictiveCheck
from pyro_vae.diagnostics.uncertainty import Uncertainty
from pyro_vae.inference.annealing import Sandwich
from pyro_vae.inference.generation import hidden, reconstruct
from pyro_vae.inference.importance import LogLikelihood
from pyro_vae.inference.nuts import Moments, Posterior
from pyro_vae.pairs.figures import BLUE, FONT, GRAY, ORANGE, literal, new_figure
from pyro_vae.plots.canvas import _strip, alike, grid, intensity, is_picture

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def reliability(
    estimate: LogLikelihood, x: Tensor, number: int = 8, rows: Tensor | None = None
) -> "Figure":
    """Plot Pareto k of each datum's weights, and the data with the least reliable estimates.

    Arguments:
        estimate: the result of `pyro_vae.log_likelihood`, with at least 21 samples.
        x: the data of this result, of shape (n, *data_shape).
        number: how many of the worst data are shown.
        rows: the row numbers of the data; from 0 by default.
    """
    worst = estimate.worst(min(number, len(x)))
    figure = new_figure(8, 4.4)
    panels = figure.subfigures(2, 1, squeeze=False, height_ratios=[2.4, 1])
    above, below = panels[:, 0]
    axis = above.subplots()
    k = estimate.pareto_k[torch.isfinite(estimate.pareto_k)].numpy()
    bins = np.linspace(min(-0.2, k.min(initial=0)), max(1.2, k.max(initial=0)), 50)
    axis.hist(k, bins=bins, color=BLUE)
    axis.axvline(estimate.k_threshold, color=ORANGE, linewidth=1, linestyle="--")
    axis.axvline(1, color=GRAY, linewidth=1, linestyle=":")
    over = int((estimate.pareto_k > estimate.k_threshold).sum())
    infinite = len(estimate.pareto_k) - len(k)
    axis.set_title(
        f"{over} of {len(x)} data over {estimate.k_threshold:.2f}, {infinite} infinite",
        fontsize=FONT,
    )
    axis.set_xlabel("Pareto k of the weights", fontsize=FONT)
    axis.set_ylabel("number of data", fontsize=FONT)
    axis.tick_params(labelsize=FONT)
    shown = intensity(x[worst])
    axes = below.subplots(1, len(worst), squeeze=False)[0]
    numbers = torch.arange(len(x)) if rows is None else rows
    for axis, row, image in zip(axes, worst.tolist(), shown, strict=True):
        axis.set_axis_off()
        if is_picture(shown):
            axis.imshow(_strip(image[None], 1), vmin=0, vmax=1, interpolation="nearest")
        else:
            axis.plot(image.detach().cpu().float().flatten(), color=BLUE, linewidth=0.8)
        axis.set_title(f"row {numbers[row]}\nk {estimate.pareto_k[row]:.2f}", fontsize=FONT)
    below.suptitle("least reliable", fontsize=FONT)
    return figure


def gap_bars(found: Gaps) -> "Figure":
    """Plot approximation and amortization gaps: stacked by datum, and as histograms.

    Arguments:
        found: the result of `pyro_vae.gaps`. Data with gaps that are not finite are left out.
    """
    kept = torch.isfinite(found.inference.per_datum)
    order = found.inference.per_datum[kept].argsort(descending=True)
    parts = [
        ("approximation gap", found.approximation, BLUE),
        ("amortization gap", found.amortization, ORANGE),
    ]
    figure = new_figure(8, 3.2)
    left, right = figure.subplots(1, 2, width_ratios=[1.6, 1])
    base = np.zeros(len(order))
    for name, gap, color in parts:
        values = gap.per_datum[kept].numpy()
        height = values[order.numpy()].clip(min=0)  # negative noise cannot be stacked
        left.fill_between(np.arange(len(order)), base, base + height, step="mid", color=color)
        label = f"{name}: {gap.value:.2f} ± {gap.standard_error:.2f}"
        right.hist(values, bins=40, histtype="step", color=color, label=label)
        base = base + height
    left.set_xlabel("data, sorted by the sum", fontsize=FONT)
    left.set_ylabel("nats", fontsize=FONT)
    left.set_title("log p(x) - ELBO", fontsize=FONT)
    right.set_xlabel("nats", fontsize=FONT)
    right.set_ylabel("number of data", fontsize=FONT)
    right.legend(fontsize=FONT, frameon=False, loc="upper center", bbox_to_anchor=(0.5, 1.25))
    for axis in (left, right):
        axis.tick_params(labelsize=FONT)
    return figure


def calibration_bands(found: Calibration, number: int = 5) -> "Figure":
    """Plot distribution functions of ranks minus the uniform one, with their bands, and coverage.

    Arguments:
        found: the result of `pyro_vae.calibration`.
        number: how many quantities are shown, those farthest outside their bands first.
    """
    low, high = found.band
    excess = (found.differences - (low + high) / 2).abs() / (high - low)
    shown = excess.amax(0).argsort(descending=True)[:number].tolist()
    columns = min(3, len(shown) + 1)
    lines = ceil((len(shown) + 1) / columns)
    figure = new_figure(2.5 * columns, 2.4 * lines)
    axes = list(figure.subplots(lines, columns, squeeze=False).flat)
    failures = found.failures
    for axis, which in zip(axes, shown, strict=False):
        name = found.names[which]
        color = ORANGE if name in failures else BLUE
        axis.fill_between(
            found.points, low[:, which], high[:, which], color=GRAY, alpha=0.3, linewidth=0
        )
        axis.plot(found.points, found.differences[:, which], color=color, linewidth=1.2)
        words = failures.get(name, "uniform").removeprefix("draws are ").replace(" and ", ",\n")
        axis.set_title(f"{literal(name)}\n{words}", fontsize=FONT)
        axis.set_xlabel("rank / (draws + 1)", fontsize=FONT)
        axis.tick_params(labelsize=FONT)
    _coverage(axes[len(shown)], found)
    for axis in axes[len(shown) + 1 :]:
        axis.remove()
    return figure


def _coverage(axis: Any, found: Calibration) -> None:
    """Plot the coverage of central intervals against their probabilities, by quantity."""
    nominal, failures = np.array(INTERVALS), found.failures
    error = 2 * np.sqrt(nominal * (1 - nominal) / found.num_simulations)
    axis.fill_between(nominal, nominal - error, nominal + error, color=GRAY, alpha=0.3, linewidth=0)
    for name, shares in zip(found.names, found.coverage.numpy(), strict=True):
        color = ORANGE if name in failures else BLUE
        axis.plot(nominal, shares, color=color, linewidth=0.8, marker=".", markersize=4)
    axis.set_title("coverage", fontsize=FONT)
    axis.set_xlabel("central interval", fontsize=FONT)
    axis.tick_params(labelsize=FONT)


def bounds(found: Sandwich) -> "Figure":
    """Plot the gap between upper and lower bound on log p(x) of each simulated datum, sorted.

    Arguments:
        found: the result of `pyro_vae.sandwich`. Bars are two standard errors of the chains.
    """
    gaps = found.upper.per_datum - found.lower.per_datum
    errors = (found.upper.standard_errors**2 + found.lower.standard_errors**2).sqrt()
    order = gaps.argsort()
    figure = new_figure(6, 3)
    axis = figure.subplots()
    places = np.arange(len(gaps))
    axis.errorbar(
        places,
        gaps[order],
        2 * errors[order].nan_to_num(0.0),
        fmt=".",
        color=BLUE,
        ecolor=GRAY,
        elinewidth=0.8,
        markersize=4,
    )
    axis.axhline(0, color="black", linewidth=0.8)
    axis.axhline(found.gap, color=ORANGE, linewidth=1, linestyle="--", label="mean")
    axis.set_xlabel("simulated data, sorted by gap", fontsize=FONT)
    axis.set_ylabel("upper minus lower bound, nats", fontsize=FONT)
    axis.tick_params(labelsize=FONT)
    axis.legend(fontsize=FONT, frameon=False)
    lower = found.lower
    axis.set_title(
        f"{lower.num_temperatures} temperatures, {lower.num_chains} chains: mean gap "
        f"{found.gap:.3f} ± {found.gap_standard_error:.3f} nats",
        fontsize=FONT,
    )
    return figure


def posteriors(result: Posterior, number: int = 4, rows: Tensor | None = None) -> "Figure":
    """Plot posteriors by NUTS and by the guide, for the data on which they disagree most.

    Each panel shows the two units with the largest disagreement: draws of NUTS, and ellipses of two
    standard deviations.

    Arguments:
        result: the result of `pyro_vae.nuts`.
        number: how many data are shown.
        rows: the row numbers of the data; from 0 by default.
    """
    apart = result.disagreement.nan_to_num(0.0)
    numbers = torch.arange(len(apart)) if rows is None else rows
    shown = apart.sum(1).argsort(descending=True)[:number].tolist()
    figure = new_figure(2.7 * len(shown) + 0.3, 3)
    draws = torch.cat(
        [v.reshape(-1, len(apart), v[0, 0, 0].numel()) for v in result.draws.values()], 2
    )
    for axis, row in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
        first, second = (apart[row].argsort(descending=True).tolist() * 2)[:2]
        few = draws[:: max(1, len(draws) // 1000), row]
        axis.scatter(few[:, first], few[:, second], s=3, color=GRAY, alpha=0.4, linewidths=0)
        for name, color, moments in (
            ("NUTS", "black", result.moments),
            ("guide", ORANGE, result.guide_moments),
        ):
            axis.plot(*_ellipse(moments, row, [first, second]), color, linewidth=1.2, label=name)
        axis.set_xlabel(literal(result.units[first]), fontsize=FONT)
        axis.set_ylabel(literal(result.units[second]), fontsize=FONT)
        axis.set_title(f"row {numbers[row]}: {apart[row, first]:.2f} nats", fontsize=FONT)
        axis.tick_params(labelsize=FONT)
    figure.axes[0].legend(fontsize=FONT, frameon=False)
    return figure


def _ellipse(moments: Moments, row: int, units: list[int]) -> Tensor:
    """Return points (2, points) two standard deviations from the mean of two units."""
    turn = torch.linspace(0, 2 * torch.pi, 100, dtype=torch.float64)
    rho = moments.correlation[row, units[0], units[1]].clamp(-1, 1)
    circle = torch.stack([turn.cos(), rho * turn.cos() + (1 - rho**2).sqrt() * turn.sin()])
    scale = moments.standard_deviation[row, units, None]
    return moments.mean[row, units, None] + 2 * scale * circle


def predictive_statistics(found: PredictiveCheck) -> "Figure":
    """Plot the mean statistics of the data and those of the replicated data sets.

    Arguments:
        found: the result of `pyro_vae.predictive_check`.
    """
    figure = new_figure(2.4 * len(found.names), 2.2)
    for i, axis in enumerate(figure.subplots(1, len(found.names), squeeze=False)[0]):
        name = found.names[i]
        p = "no reliable data"
        if bool(found.reliable.any()):
            axis.hist(found.whole[:, i].numpy(), bins=20, color=BLUE)
            axis.axvline(found.whole_observed[i].item(), color=ORANGE, linewidth=1.5)
            p = f"p {found.whole_p_values[name]:.3f}"
        axis.set_title(f"{literal(name)}\n{p}", fontsize=FONT)
        axis.locator_params(axis="x", nbins=4)
        axis.tick_params(labelsize=FONT)
    return figure


def predictive_worst(
    pair: nn.Module,
    found: PredictiveCheck,
    x: Tensor,
    *context: Tensor,
    statistic: str | None = None,
    number: int = 5,
    replicates: int = 8,
    rows: Tensor | None = None,
) -> "Figure":
    """Show the data that are farthest from their replicates, with some replicates on the right.

    Arguments:
        pair, x, context: the arguments of `pyro_vae.predictive_check`.
        found: its result.
        statistic: the statistic that selects the data; any of them by default.
        number: number of data.
        replicates: number of replicates of each datum.
        rows: the row numbers of the data; from 0 by default.
    """
    worst = found.worst(statistic, number)
    numbers = torch.arange(len(x)) if rows is None else rows
    data, given = x[worst], [part[worst] for part in context]
    made = [
        alike(reconstruct(pair, data, *given, means=False, seed=seed), data)
        for seed in range(replicates)
    ]
    shown = torch.stack([intensity(data).to(made[0]), *made], 1)
    masked = hidden(pair, data, *given)[:, None]
    shown = torch.where(masked, torch.nan, shown) if masked.any() else shown
    off = found.distances[worst].nan_to_num(0.0).abs()
    which = off.argmax(1).tolist() if statistic is None else [found.names.index(statistic)] * number
    labels = [
        f"row {numbers[row]}\n{found.names[i]}\np {found.p_values[row, i]:.3f}"
        for row, i in zip(worst.tolist(), which, strict=False)
    ]
    return grid(list(zip(labels, shown, strict=True)), "data, with replicates on the right")


def outlier_histograms(found: OutlierScores) -> "Figure":
    """Plot each outlier score of the data, and of the out-of-distribution data if you passed some.

    Arguments:
        found: the result of `pyro_vae.outlier_scores`. Scores that are not finite are left out.
    """
    inside = found.inside.as_outlying()
    other = {} if found.other is None else found.other.as_outlying()
    figure = new_figure(2.8 * len(inside), 2.4)
    for axis, name in zip(figure.subplots(1, len(inside), squeeze=False)[0], inside, strict=True):
        kept = [scores[name][torch.isfinite(scores[name])] for scores in (inside, other) if scores]
        low, high = torch.cat(kept).aminmax()
        wide = 0.5 * float(low == high)  # equal scores still get bins of some width
        bins = np.linspace(low - wide, high + wide, 40)
        for scores, color, label in zip(kept, (BLUE, ORANGE), ("x", "other"), strict=False):
            axis.hist(scores.numpy(), bins=bins, color=color, alpha=0.6, label=label, density=True)
        area = "" if found.auroc is None else f"\nAUROC {found.auroc[name]:.3f}"
        axis.set_title(name + area, fontsize=FONT)
        axis.set_xlabel("nats", fontsize=FONT)
        axis.set_yticks([])
        axis.tick_params(labelsize=FONT)
    axis.legend(fontsize=FONT, frameon=False)
    return figure


def uncertainty(found: Mapping[str, Uncertainty], x: Tensor, number: int = 12) -> "Figure":
    """Show some data, their predictions, and the spread due to codes and weights.

    Arguments:
        found: the results of `pyro_vae.uncertainty` for the same rows, by the name of each pair.
        x: these rows, of shape (n, *data_shape).
        number: how many rows are shown, the first ones.

    White is the largest standard deviation in the figure.
    """
    rows = [("data", intensity(x[:number]))]
    spreads = {
        (name, kind): getattr(one, kind)[:number].clamp(min=0).sqrt()
        for name, one in found.items()
        for kind in ("latent", "weights")
    }
    greatest = max(spread.max().item() for spread in spreads.values())
    for name, one in found.items():
        rows.append((f"{name}:\nmean", alike(one.mean[:number], x)))
        for kind, words in (("latent", "codes,\naleatoric"), ("weights", "weights,\nepistemic")):
            rows.append((words, alike(spreads[name, kind] / greatest, x)))
    return grid(rows, f"standard deviations by source, white is {greatest:.2g}")
