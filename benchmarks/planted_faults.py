"""Faults planted into pairs with a known posterior: does `diagnose` blame the right part?

    python benchmarks/planted_faults.py --out runs/planted --seeds 20 --budget 10
    python benchmarks/planted_faults.py --out runs/planted --table

Each run draws data, plants one fault, and lets `diagnose` look for it. Two pairs are used: one is
linear-Gaussian, the other is nonlinear and its posterior comes from a grid. Both have two latents
z, a rotation of two coordinates w = R z, and six features; each coordinate generates three of them:

    z ~ N(0, I),  x ~ N(f(R z), noise^2).

So the posterior of z is a rotation of two posteriors of one coordinate, and a grid over each
coordinate gives posterior and log p(x). Results are kept by run; a second start goes on.
"""

import argparse
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import AffineTransform, Transform, constraints

import pyro_vae as pv
from pyro_vae.diagnostics import sizing
from pyro_vae.pairs.rng import seeded

ROWS = 1000
GRID = torch.linspace(-6, 6, 241, dtype=torch.float64)
ANGLE = math.pi / 4
ROTATION = torch.tensor([[math.cos(ANGLE), -math.sin(ANGLE)], [math.sin(ANGLE), math.cos(ANGLE)]])
STRENGTH = (0.9, 0.45)
"""How strongly each coordinate of w moves its features."""
NOISE = 0.35
DIRECTIONS = torch.tensor([1.0, -0.7, 0.5])


def linear(w: Tensor) -> Tensor:
    return w[..., None] * DIRECTIONS


def curved(w: Tensor) -> Tensor:
    return torch.stack([1.4 * torch.tanh(w), 0.25 * w.square() - 0.6 * w, 0.7 * torch.sin(w)], -1)


def features(shape: Callable[[Tensor], Tensor], w: Tensor, folded: bool) -> Tensor:
    """Return the means of the six features for w (..., 2)."""
    first = w[..., 0].abs() if folded else w[..., 0]
    parts = [STRENGTH[0] * shape(first), STRENGTH[1] * shape(w[..., 1])]
    return torch.cat(parts, -1)


class Quantiles(Transform):
    """Maps a standard normal to a distribution over a grid, for each row and coordinate.

    The map is linear between the points of the grid and beyond them.
    """

    domain = constraints.real_vector
    codomain = constraints.real_vector
    bijective = True

    def __init__(self, log_density: Tensor) -> None:
        super().__init__(cache_size=1)
        p = log_density.softmax(-1)
        low = (p.cumsum(-1) - p / 2).clamp(1e-300, 1)
        high = (p.flip(-1).cumsum(-1).flip(-1) - p / 2).clamp(1e-300, 1)
        scores = torch.where(low < 0.5, torch.special.ndtri(low), -torch.special.ndtri(high))
        inside = scores.abs() < 7
        first, last = inside.long().argmax(-1), inside.shape[-1] - 1
        last = last - inside.flip(-1).long().argmax(-1)
        index = torch.arange(inside.shape[-1])
        step = GRID[1] - GRID[0]
        # Outside, the map goes on with the slope of the whole.
        slope = scores.gather(-1, last[..., None]) - scores.gather(-1, first[..., None])
        slope = slope / (step * (last - first)[..., None])
        left = scores.gather(-1, first[..., None]) + slope * step * (index - first[..., None])
        right = scores.gather(-1, last[..., None]) + slope * step * (index - last[..., None])
        scores = torch.where(index < first[..., None], left, scores)
        self.scores = torch.where(index > last[..., None], right, scores)

    def _call(self, e: Tensor) -> Tensor:
        return self._interpolated(e.double(), self.scores, GRID.expand_as(self.scores)).to(e.dtype)

    def _inverse(self, w: Tensor) -> Tensor:
        return self._interpolated(w.double(), GRID.expand_as(self.scores), self.scores).to(w.dtype)

    def _interpolated(self, value: Tensor, start: Tensor, end: Tensor) -> Tensor:
        flat, start, end, back = _aligned(value, start, end)
        j = torch.searchsorted(start, flat.detach()).clamp(1, start.shape[-1] - 1)
        x0, x1, y0, y1 = (p.gather(-1, i) for p in (start, end) for i in (j - 1, j))
        return back(y0 + (flat - x0) * (y1 - y0) / (x1 - x0))

    def log_abs_det_jacobian(self, e: Tensor, w: Tensor) -> Tensor:
        flat, scores, _, back = _aligned(e.detach().double(), self.scores, self.scores)
        j = torch.searchsorted(scores, flat).clamp(1, scores.shape[-1] - 1)
        width = scores.gather(-1, j) - scores.gather(-1, j - 1)
        return back((GRID[1] - GRID[0]).log() - width.log()).sum(-1).to(e.dtype)


def _aligned(value: Tensor, start: Tensor, end: Tensor) -> tuple[Tensor, Tensor, Tensor, Any]:
    """Move draws of the same row and coordinate beside each other, (rows, 2, draws)."""
    if value.dim() >= start.dim() - 1 and value.shape[-2:] == start.shape[:-1]:
        shape = value.shape
        flat = value.reshape(-1, *shape[-2:]).movedim(0, -1).contiguous()
        return flat, start.contiguous(), end.contiguous(), lambda x: x.movedim(-1, 0).reshape(shape)
    shape = torch.broadcast_shapes(value.shape, start.shape[:-1])
    grid = start.shape[-1]
    wide = (part.expand(*shape, grid).contiguous() for part in (start, end))
    return value.expand(shape)[..., None].contiguous(), *wide, lambda x: x[..., 0]


class Rotation(Transform):
    """z = R^T w, over the last dimension."""

    domain = constraints.real_vector
    codomain = constraints.real_vector
    bijective = True

    def _call(self, w: Tensor) -> Tensor:
        return w @ ROTATION

    def _inverse(self, z: Tensor) -> Tensor:
        return z @ ROTATION.T

    def log_abs_det_jacobian(self, w: Tensor, z: Tensor) -> Tensor:
        return w.new_zeros(w.shape[:-1])


class LightTails(Transform):
    """sinh(asinh(e) * 0.6), scaled to a standard deviation of 1: lighter tails than a normal."""

    domain = constraints.real_vector
    codomain = constraints.real_vector
    bijective = True
    power, scale = 0.5, 2.08

    def _call(self, e: Tensor) -> Tensor:
        return self.scale * torch.sinh(self.power * torch.asinh(e))

    def _inverse(self, y: Tensor) -> Tensor:
        return torch.sinh(torch.asinh(y / self.scale) / self.power)

    def log_abs_det_jacobian(self, e: Tensor, y: Tensor) -> Tensor:
        grown = torch.cosh(self.power * torch.asinh(e)).log() + math.log(self.scale * self.power)
        return (grown - 0.5 * (1 + e.square()).log()).sum(-1)


@dataclass(frozen=True)
class Plan:
    """What a run does: the pair, its fault in the model, and its fault in the guide."""

    shape: Callable[[Tensor], Tensor] = linear
    noise: float = NOISE
    folded: bool = False
    uses_z: bool = True
    scale: float = 1.0
    shift: float = 0.0
    diagonal: bool = False
    one_mode: bool = False
    ignored: int = 0
    light_tails: bool = False
    other_seed: bool = False
    rows: str = ""
    """Rows on which the guide is wrong: "" is none, "some" is 5 %, "real" is all real rows."""


class Planted(nn.Module):
    """A pair whose posterior is known, with the faults of a plan."""

    def __init__(self, plan: Plan, real: Tensor) -> None:
        super().__init__()
        self.plan = plan
        marks = real[: len(real) // 20] if plan.rows == "some" else real
        self.register_buffer("marked", marks[:, 0].sort().values if plan.rows else real[:0, 0])
        self.register_buffer("swapped", torch.randperm(6))

    def model(self, x: Tensor) -> None:
        plan = self.plan
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            if plan.uses_z:
                loc, scale = features(plan.shape, z @ ROTATION.T, plan.folded), plan.noise
            else:
                loc, scale = self.loc.expand(*z.shape[:-1], 6), self.scale
            pyro.sample("x", dist.Normal(loc, scale).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", self.posterior(x))

    def template(self, n: int) -> tuple[Tensor]:
        return (torch.zeros(n, 6),)

    def posterior(self, x: Tensor) -> Any:
        """Return q(z | x): the posterior, with the faults of the plan."""
        plan = self.plan
        if not plan.uses_z:
            return dist.Normal(x.new_zeros(len(x), 2), 1.0).to_event(1)
        seen, shift = x, torch.zeros(len(x), 1)
        marked = torch.isin(x[:, 0], self.marked)
        if plan.rows == "some":
            seen = torch.where(marked[:, None], x[:, self.swapped], x)
        if plan.rows == "real":
            shift = torch.where(marked[:, None], 0.5, 0.0)
        if plan.other_seed:
            seen = x[:, self.swapped] * torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0, -1.0])
        loc = torch.zeros(len(x), 2) + plan.shift + shift
        base = dist.Normal(loc, torch.full((len(x), 2), plan.scale)).to_event(1)
        tails = [LightTails()] if plan.light_tails else []
        if plan.shape is linear and not plan.folded and not plan.diagonal:
            mean, deviation = self.conjugate(seen)
            affine = AffineTransform(mean, deviation, event_dim=1)
            return dist.TransformedDistribution(base, [*tails, affine, Rotation()])
        grids = self.grids(seen)
        if plan.diagonal:
            p = grids.softmax(-1)
            mean = (p * GRID).sum(-1)
            variance = (p * GRID.square()).sum(-1) - mean.square()
            # The best normal without correlations: its precisions are those of the posterior.
            precision = (1 / variance) @ ROTATION.double().square()
            loc, scale = mean @ ROTATION.double(), precision.rsqrt()
            return dist.Normal(loc.float(), scale.float()).to_event(1)
        return dist.TransformedDistribution(base, [*tails, Quantiles(grids), Rotation()])

    def conjugate(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return means and standard deviations of w given x for the linear model, (n, 2)."""
        used = torch.ones(2, 3)
        used[0, : self.plan.ignored] = 0
        slopes = torch.tensor(STRENGTH)[:, None] * DIRECTIONS * used
        precision = 1 + (slopes / self.plan.noise).square().sum(-1)
        mean = (x.unflatten(-1, (2, 3)) * slopes).sum(-1) / self.plan.noise**2 / precision
        return mean, precision.rsqrt().expand_as(mean)

    def grids(self, x: Tensor) -> Tensor:
        """Return unnormalized log posteriors of w over the grid, (n, 2, grid), in float64."""
        plan, x = self.plan, x.double()
        prior = -0.5 * GRID.square()
        found = []
        for i in range(2):
            points = GRID.abs() if i == 0 and plan.folded else GRID
            loc = STRENGTH[i] * plan.shape(points)
            used = torch.ones(3, dtype=torch.float64)
            if plan.ignored and i == 0:
                used[: plan.ignored] = 0
            off = (x[:, None, 3 * i : 3 * i + 3] - loc) / plan.noise
            density = prior - 0.5 * (off.square() * used).sum(-1)
            if plan.one_mode and i == 0:
                density = torch.where(GRID > 0, density, -torch.inf)
            found.append(density)
        return torch.stack(found, 1)

    def log_likelihood(self, x: Tensor) -> Tensor:
        """Return log p(x) of each row: in closed form, or from sums over the grid."""
        if not self.plan.uses_z:
            return dist.Normal(self.loc, self.scale).log_prob(x).sum(-1).double()
        if self.plan.shape is linear and not self.plan.folded:  # a grid has an end, data do not
            return self.marginal().log_prob(x.double())
        plan = replace(self.plan, ignored=0, one_mode=False)
        clean = Planted(plan, x[:0])
        step = (GRID[1] - GRID[0]).log()
        terms = clean.grids(x).logsumexp(-1) + step - 0.5 * math.log(2 * math.pi)
        return terms.sum(-1) - 6 * math.log(plan.noise * math.sqrt(2 * math.pi))

    def marginal(self) -> dist.MultivariateNormal:
        """Return p(x) of the linear pair. A rotation of z does not change it."""
        loadings = torch.block_diag(*(s * DIRECTIONS.double()[:, None] for s in STRENGTH))
        noise = self.plan.noise**2 * torch.eye(6, dtype=torch.float64)
        return dist.MultivariateNormal(loadings.new_zeros(6), loadings @ loadings.T + noise)


FAULTS: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "none": ((), {}),
    "scale of the guide 0.6": (("encoder",), {"scale": 0.6}),
    "scale of the guide 1.5": (("encoder",), {"scale": 1.5}),
    "mean of the guide 0.2 sd off": (("encoder",), {"shift": 0.2}),
    "correlation dropped": (("family",), {"diagonal": True}),
    "one mode of two": (("family",), {"folded": True, "one_mode": True}),
    "5 % of rows permuted": (("encoder",), {"rows": "some"}),
    "two features ignored": (("encoder",), {"ignored": 2}),
    "tails too light": (("family",), {"light_tails": True}),
    "guide wrong on real data only": (("encoder",), {"rows": "real"}),
    "decoder ignores z": (("decoder",), {"uses_z": False}),
    "noise times 2": (("likelihood scale",), {"noise": 2 * NOISE}),
    "noise times 0.5": (("likelihood scale",), {"noise": 0.5 * NOISE}),
    "codes off the prior": (("prior",), {}),
    "heterogeneous noise": (("likelihood scale",), {}),
    "encoder of another seed": (("encoder",), {"other_seed": True}),
}
"""The right part of each fault, and its plan. The first is the exact pair."""


def drawn(plan: Plan, fault: str, rows: int) -> Tensor:
    """Return data of the true model, or of the world that the fault describes."""
    z = torch.randn(rows, 2)
    if fault == "codes off the prior":
        z = 0.5 * z + torch.where(torch.rand(rows, 1) < 0.5, 1.5, -1.5)
    noise = torch.full((rows, 1), NOISE)
    if fault == "heterogeneous noise":
        level = torch.exp(0.5 * torch.randn(rows, 1))
        noise = NOISE * level / level.square().mean().sqrt()
    loc = features(plan.shape, z @ ROTATION.T, plan.folded)
    return loc + noise * torch.randn(rows, 6)


def made(fault: str, shape: str, seed: int) -> tuple[Planted, Tensor]:
    """Return the pair and its held-out data."""
    with seeded(1000 + seed):
        plan = Plan(linear if shape == "linear" else curved, **FAULTS[fault][1])
        x = drawn(plan, fault, ROWS)
        pair = Planted(plan, x)
        if not plan.uses_z:
            more = drawn(plan, fault, 20_000)
            pair.register_buffer("loc", more.mean(0))
            pair.register_buffer("scale", more.std(0))
    return pair, x


def run(fault: str, shape: str, seed: int, budget: float) -> dict[str, Any]:
    """Diagnose one pair, and return the verdict beside the truth."""
    pair, x = made(fault, shape, seed)
    began = time.perf_counter()
    found = pv.diagnose(pair, x, budget=budget, seed=seed, progress=False)
    seconds = time.perf_counter() - began
    exact = pair.log_likelihood(x)[found.rows]
    return {
        "fault": fault,
        "pair": shape,
        "seed": seed,
        "budget": budget,
        "seconds": seconds,
        "blamed": [blame.part for blame in found.blamed],
        "nats": [blame.nats for blame in found.blamed],
        "words": [blame.words for blame in found.blamed],
        "findings": [finding._asdict() for finding in found.findings],
        "off": trusted_errors(found, exact),
        "contradictions": contradictions(found),
        "failed": found.failed,
        "left_out": found.left_out,
    }


def trusted_errors(found: Any, exact: Tensor) -> list[float]:
    """Return how many of its errors each trusted number is from the exact one."""
    trusted = {finding.about for finding in found.findings if finding.kind == "trust"}
    weighed, off = found.results.get("log_likelihood"), []
    if weighed is None:
        return []
    truth = exact[: len(weighed.per_datum)].mean().item()
    rounding = 1e-4
    if "log p(x)" in trusted:
        off.append(abs(weighed.value - truth) / (weighed.total_error + rounding))
    if "ELBO" in trusted:
        off.append(abs(weighed.value - truth) / (weighed.total_error + rounding))
    return off


def contradictions(found: Any) -> list[str]:
    """Return the quantities about which findings of two kinds exist."""
    kinds: dict[str, set[str]] = {}
    for finding in found.findings:
        if finding.kind in ("trust", "doubt") and finding.about:
            kinds.setdefault(finding.about, set()).add(finding.kind)
    return [about for about, both in kinds.items() if len(both) > 1]


def table(results: list[dict[str, Any]]) -> str:
    """Return a row for each fault: how often the right part is blamed first."""
    lines = [
        f"{'fault':<30}{'pair':<10}{'budget':>7}{'runs':>6}{'right first':>13}{'any fault':>11}"
        f"{'worst error':>13}"
    ]
    for fault, (parts, _) in FAULTS.items():
        for shape in ("linear", "curved"):
            for budget in sorted({r["budget"] for r in results}):
                own = [
                    r
                    for r in results
                    if (r["fault"], r["pair"], r["budget"]) == (fault, shape, budget)
                ]
                if not own:
                    continue
                first = sum(bool(r["blamed"]) and r["blamed"][0] in parts for r in own)
                any_fault = sum(bool(r["blamed"]) for r in own)
                off = max((value for r in own for value in r["off"]), default=0.0)
                right = f"{first}" if parts else "-"
                lines.append(
                    f"{fault:<30}{shape:<10}{budget:>7.0f}{len(own):>6}{right:>13}{any_fault:>11}"
                    f"{off:>13.1f}"
                )
    lines.append(f"contradictions: {sum(bool(r['contradictions']) for r in results)}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/planted"))
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--budget", type=float, default=10.0)
    parser.add_argument("--pairs", nargs="+", default=["linear", "curved"])
    parser.add_argument("--faults", nargs="+", default=list(FAULTS))
    parser.add_argument(
        "--clock",
        choices=["wall", "cpu"],
        default="wall",
        help="what the budget counts: seconds, or seconds of this process on a shared machine",
    )
    parser.add_argument("--table", action="store_true", help="only print the table")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    if options.clock == "cpu":
        sizing.now = time.process_time
    for seed in range(options.first_seed, options.first_seed + options.seeds):
        for shape in options.pairs:
            for i, fault in enumerate(FAULTS):
                path = options.out / f"{shape}-{i}-{seed}-{options.budget:.0f}.json"
                if options.table or path.exists() or fault not in options.faults:
                    continue
                found = run(fault, shape, seed, options.budget)
                path.write_text(json.dumps(found, indent=1))
                print(f"{shape} {fault} seed {seed}: {found['blamed']} {found['words'][:1]}")
    print(table([json.loads(path.read_text()) for path in sorted(options.out.glob("*.json"))]))


if __name__ == "__main__":
    main()
