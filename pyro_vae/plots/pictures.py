"""Draw the training, reconstructions, samples and latent space of a pair."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from pyro_vae.inference.encoding import encode_parts
from pyro_vae.inference.generation import decode, hidden, interpolate, reconstruct, sample, traverse
from pyro_vae.pairs.figures import BLUE, FONT, GRAY, literal, new_figure
from pyro_vae.plots.canvas import alike, grid, intensity

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def kl_by_unit(kl: Mapping[str, Sequence[float]]) -> "Figure":
    """The mean KL of each unit of each latent site, in descending order."""
    figure = new_figure(7, 2.6 * len(kl))
    for axis, (site, values) in zip(
        figure.subplots(len(kl), 1, squeeze=False)[:, 0], kl.items(), strict=True
    ):
        heights = np.asarray(values, float)
        heights = np.where(np.isfinite(heights), heights, 0.0)  # a bar has a finite height
        order = np.argsort(heights)[::-1]
        axis.bar(range(len(order)), heights[order], color=BLUE)
        axis.set_xticks(range(len(order)), [str(unit) for unit in order], fontsize=FONT)
        axis.set_xlabel(f"unit of {literal(site)}", fontsize=FONT)
        axis.set_ylabel("KL, nats per example", fontsize=FONT)
        axis.tick_params(labelsize=FONT)
    return figure


WITH_ERRORS = 60
"""The largest number of codes whose posterior standard deviations are drawn."""


def latent_plane(
    codes: Tensor, labels: Tensor | None, site: str, scales: Tensor | None = None
) -> "Figure":
    """Codes (n, d) in the plane of their first two principal components, colored by label.

    Bars show one posterior standard deviation of the units, ``scales`` (n, d), along each axis.
    """
    figure = new_figure(6.6, 5)
    axis = figure.subplots()
    points, directions, words = _plane(codes.reshape(len(codes), -1).double().numpy(), site)
    if scales is not None:
        squares = scales.reshape(len(scales), -1).double().numpy() ** 2
        errors = np.sqrt(squares @ (directions**2).T)
        some = np.linspace(0, len(points) - 1, min(len(points), WITH_ERRORS)).astype(int)
        axis.errorbar(
            points[some, 0],
            points[some, 1],
            xerr=errors[some, 0],
            yerr=errors[some, 1],
            fmt="none",
            ecolor=GRAY,
            elinewidth=0.6,
            zorder=0,
        )
    shown = axis.scatter(
        points[:, 0],
        points[:, 1],
        c=GRAY if labels is None else labels.numpy(),
        cmap=None if labels is None else "tab10" if int(labels.max()) < 10 else "viridis",
        s=10,
        linewidths=0,
    )
    if labels is not None and int(labels.max()) < 10:
        handles, names = shown.legend_elements()
        axis.legend(
            handles, names, fontsize=FONT, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5)
        )
    axis.set_xlabel(words[0], fontsize=FONT)
    axis.set_ylabel(words[1], fontsize=FONT)
    axis.tick_params(labelsize=FONT)
    return figure


def _plane(codes: np.ndarray, site: str) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Codes as points (n, 2), the two directions (2, d) of the plane, and what they are."""
    from sklearn.decomposition import PCA

    d = codes.shape[1]
    if d == 1:
        points = np.column_stack([codes, np.zeros(len(codes))])
        return points, np.array([[1.0], [0.0]]), [literal(site), ""]
    if d == 2:
        return codes, np.eye(2), [f"{literal(site)}[0]", f"{literal(site)}[1]"]
    pca = PCA(2).fit(codes)
    words = [
        f"principal component {i + 1} of {literal(site)} ({100 * share:.0f} % of variance)"
        for i, share in enumerate(pca.explained_variance_ratio_)
    ]
    return pca.transform(codes), pca.components_, words


def reconstructions(pair: nn.Module, x: Tensor, context: Sequence[Tensor] = ()) -> "Figure":
    """Data without the entries that the model masks, and their reconstructions below."""
    again = alike(reconstruct(pair, x, *context), x)
    data = torch.where(hidden(pair, x, *context), torch.nan, intensity(x))
    return grid([("data", data), ("reconstruction", again)])


def samples(pair: nn.Module, x: Tensor, context: Sequence[Tensor] = (), seed: int = 0) -> "Figure":
    """Means of data drawn from the model; with context, one row of pictures for each row of it."""
    if context:
        rows = [
            (
                f"context {i}",
                alike(
                    sample(pair, 10, *(part[i : i + 1] for part in context), means=True, seed=seed),
                    x,
                ),
            )
            for i in range(len(context[0]))
        ]
        return grid(rows)
    images = alike(sample(pair, 48, means=True, seed=seed), x)
    rows = [("", part) for part in images.split(12)]
    return grid(rows)


def by_value(
    pair: nn.Module,
    x: Tensor,
    context: Sequence[Tensor],
    latent: str,
    values: Tensor,
    seed: int = 0,
) -> "Figure":
    """Means of data for each value of a discrete latent, with draws of the other latents.

    A column shares one draw of the latents that do not depend on the discrete latent.
    """
    one = [part[:1] for part in context]
    rows = [
        (
            f"{latent} = {i}",
            alike(decode(pair, {latent: value.expand(10, *value.shape)}, *one, seed=seed), x),
        )
        for i, value in enumerate(values)
    ]
    return grid(rows)


def traversals(
    pair: nn.Module, x: Tensor, context: Sequence[Tensor], units: Sequence[int], latent: str
) -> "Figure":
    """The code of one datum, with one unit at a time moved from -3 to 3."""
    values = np.linspace(-3, 3, 11).tolist()
    images = alike(traverse(pair, x, *context, values=values, units=units, latent=latent), x)
    rows = [(f"{latent}[{unit}]", line) for unit, line in zip(units, images, strict=True)]
    return grid(rows)


def interpolated(
    pair: nn.Module, x: Tensor, context: Sequence[Tensor], n: int, steps: int
) -> Tensor:
    """Straight lines between the codes of the first n data and the next n."""
    starts, ends = ([part[i : i + n] for part in context] for i in (0, n))
    return interpolate(pair, x[:n], x[n : 2 * n], *starts, end_context=ends, steps=steps)


def interpolations(pair: nn.Module, x: Tensor, context: Sequence[Tensor], n: int) -> "Figure":
    """Lines of `interpolated`, with the data at both ends."""
    start, end = x[:n], x[n : 2 * n]
    lines = alike(interpolated(pair, x, context, n, steps=9), start)
    rows = [
        ("", torch.cat([intensity(a)[None].to(line), line, intensity(b)[None].to(line)]))
        for a, line, b in zip(start, lines, end, strict=True)
    ]
    return grid(rows)


def codes(pair: nn.Module, x: Tensor, context: Sequence[Tensor]) -> tuple[str, Tensor] | None:
    """The local latent with the most units and its codes; a continuous site comes first.

    None for a pair that has only global and group latents.
    """
    found, _ = encode_parts(pair, x, context)
    return max(
        found.items(),
        key=lambda item: (item[1].is_floating_point(), item[1][0].numel()),
        default=None,
    )


def scales(pair: nn.Module, x: Tensor, context: Sequence[Tensor], site: str) -> Tensor | None:
    """The posterior standard deviations of the codes of a site, if it is continuous."""
    found = encode_parts(pair, x, context, "scale")[0].get(site)
    return None if found is None else found.cpu()
