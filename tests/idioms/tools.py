"""The tools of pyro_vae on an idiom; each function asserts that its result is right."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from tempfile import TemporaryDirectory
from unittest import mock

import torch
from idiom import UNRANKED, Batch, Idiom
from pyro import poutine
from pyro.infer import Trace_ELBO, infer_discrete
from pyro.poutine import Trace
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn
from torch.distributions import VonMises

import pyro_vae as pv
from pyro_vae.diagnostics import diagnosis, sizing
from pyro_vae.diagnostics.evaluation import PARTICLES
from pyro_vae.pairs.scope import scope

RUNS = 24
"""Runs of the stock programs with which draws are compared."""

DIAGNOSTICS = {
    "calibration_study": "calibration",
    "gaps_study": "gaps",
    "annealing_study": "anneal",
    "sandwich_study": "anneal",
    "nuts_study": "nuts",
    "global_nuts_study": "nuts",
    "outliers_study": "refine",
    "reliability_study": "log_likelihood",
}
"""The studies of `diagnose` that run another tool of this list."""

TILES = 24
"""Draws for each row by one call of a tool."""

PARTS_OF_SAMPLE = 100
"""Draws of global latents by one call of `sample`."""

SOME = 61
"""Rows of a run of the stock model without data; no other plate has this size."""

QUIET = {"progress": False, "engine": "eager"}


def fitted(idiom: Idiom) -> tuple[nn.Module, Batch]:
    """Return a pair after two epochs of `fit`."""
    pair, batch = idiom.seeded()
    n = len(batch[0])
    history = pv.fit(pair, *batch, epochs=2, batch_size=n // 2, learning_rate=1e-3, **QUIET)
    assert all(torch.tensor(history["elbo"]).isfinite())
    return pair, batch


def close(found: Tensor, truth: Tensor, errors: Tensor, slack: float = 0.02) -> None:
    """Assert that numbers are within five standard errors of the truth."""
    off = (found.double() - truth.double()).abs() - 5 * errors.double() - slack
    assert bool((off < 0).all()), (found, truth, errors)


def truth_of(pair: nn.Module, batch: Batch) -> Tensor:
    with torch.no_grad():
        return pair.log_p(*batch)


def check(idiom: Idiom, pair: nn.Module, batch: Batch) -> None:
    report = pv.check(pair, batch)
    if report.errors:
        raise pv.UsageError(report.errors[0])


def fit(idiom: Idiom, pair: nn.Module, batch: Batch) -> None:
    """A second pair gets the same parameters."""
    for name, value in fitted(idiom)[0].state_dict().items():
        assert torch.equal(value, pair.state_dict()[name]), name


def log_likelihood(idiom: Idiom, pair: nn.Module, batch: Batch) -> None:
    found = pv.log_likelihood(pair, *batch, num_samples=400, engine="eager")
    close(found.per_datum, truth_of(pair, batch), found.standard_errors)


def evaluate(idiom: Idiom, pair: nn.Module, batch: Batch) -> None:
    found = pv.evaluate(pair, *batch, num_samples=100, engine="eager")
    truth = truth_of(pair, batch).mean()
    error = torch.tensor(found.log_likelihood_standard_error)
    close(torch.tensor(found.log_likelihood), truth, error, 0.1)
    assert abs(found.elbo - (found.reconstruction - found.kl)) < 1e-3
    assert found.elbo < truth + 0.1
    if idiom.stock is Trace_ELBO:
        mean, deviation = stock_elbo(idiom, pair, batch)
        error = deviation * (1 / RUNS + 1 / PARTICLES) ** 0.5
        close(torch.tensor(found.elbo), mean, error)


def refine(idiom: Idiom, pair: nn.Module, batch: Batch) -> None:
    few = tuple(part[:6] for part in batch)
    found = pv.refine(pair, *few, steps=10, num_samples=300, **QUIET)
    close(found.after.per_datum, truth_of(pair, few), found.after.standard_errors)
    assert bool((found.gain > -5 * found.after.elbo_standard_errors - 0.1).all())


def gaps(idiom: Idiom, pair: nn.Module, batch: Batch) -> None:
    few = tuple(part[:6] for part in batch)
    found = pv.gaps(pair, *few, steps=5, num_samples=300, **QUIET)
    estimate = found.log_likelihood
    if not shares(idiom):  # otherwise the gaps are those given one draw of the global latents
        close(estimate.per_datum, truth_of(pair, few), estimate.standard_errors)
    both = found.approximation.value + found.amortization.value
    assert abs(found.inference.value - both) < 1e-6


def anneal(idiom: Idiom, pair: nn.Module, batch: Batch) -> None:
    few = tuple(part[:6] for part in batch)
    found = pv.anneal(pair, *few, num_temperatures=8, num_chains=40, leapfrog_steps=2, **QUIET)
    close(found.per_datum, truth_of(pair, few), found.standard_errors, 0.05)


def nuts(idiom: Idiom, pair: nn.Module, batch: Batch) -> None:
    datum = batch if shares(idiom) else tuple(part[:1] for part in batch)
    found = pv.nuts(pair, *datum, num_draws=4, warmup=4, num_chains=2, **QUIET)
    with stock(pair):
        model = poutine.trace(pair.model).get_trace(*datum)
    of = [found.shared, *([found.local] if found.local else [])] if shares(idiom) else [found]
    for name, draws in [item for part in of for item in part.draws.items()]:
        fn = model.nodes[name]["fn"]
        inside = fn.support.check(draws.reshape(-1, *fn.event_shape))
        assert bool(inside.all()), name
        if isinstance(fn, VonMises):  # its support is the whole line for torch
            assert draws.abs().max() <= torch.pi


def encode(idiom: Idiom, pair: nn.Module, batch: Batch) -> None:
    names = set(pv.encode(pair, *batch))
    runs = stock_runs(idiom, pair, batch)

    def drawn(seed: int, *batch: Tensor) -> dict[str, Tensor]:
        return pv.encode(pair, *batch, what="draw", seed=seed)

    found = repeated(idiom, drawn, batch)
    assert set(found) == names
    for name, value in found.items():
        if name in runs:
            agree(idiom, value, runs[name])


def reconstruct(idiom: Idiom, pair: nn.Module, batch: Batch) -> None:
    def drawn(seed: int, *batch: Tensor) -> dict[str, Tensor]:
        return {"x": pv.reconstruct(pair, *batch, means=False, site=idiom.site, seed=seed)}

    found = repeated(idiom, drawn, batch)["x"]
    agree(idiom, found, replicates(idiom, pair, batch))
    assert pv.reconstruct(pair, *batch, site=idiom.site).shape == found.shape[1:]


def sample(idiom: Idiom, pair: nn.Module, batch: Batch) -> None:
    number, some = 2400, some_rows(idiom)
    made = pv.sample(pair, number, *(part[:1] for part in batch[1:]), site=idiom.site, seed=3)
    context = [part[:1].expand(some, *part.shape[1:]) for part in batch[1:]]
    with stock(pair):
        x = pair.template(some)[0].to(batch[0].dtype)
    found = prior_draws(idiom, pair, (x, *context)).double().reshape(RUNS, some, -1)
    flat, between = made.reshape(number, -1).double(), found.mean(1).var(0)
    spread = (flat.var(0) / number + between * (1 / RUNS + 1 / PARTS_OF_SAMPLE)).sqrt()
    close(flat.mean(0), found.mean((0, 1)), spread)


def predictive_check(idiom: Idiom, pair: nn.Module, batch: Batch) -> None:
    statistics = {
        "total": lambda x: x.reshape(len(x), -1).nan_to_num(0.0).sum(1),
        "holes": lambda x: x.reshape(len(x), -1).isnan().double().sum(1),
    }
    found = pv.predictive_check(
        pair, *batch, statistics=statistics, num_replicates=30, latents="guide", progress=False
    )
    live = ~found.observed[:, 0].isnan()
    assert bool(((found.p_values > 0) & (found.p_values < 1))[live].all())
    if not found.observed[live][:, 1].any():
        runs = replicates(idiom, pair, batch)
        totals = runs.double().reshape(RUNS, len(runs[0]), -1).sum(-1)[:, live]
        errors = totals.std(0) * (1 / RUNS + 1 / 30) ** 0.5
        close(found.replicated_mean[live, 0], totals.mean(0), errors, 0.3)


def calibration(idiom: Idiom, pair: nn.Module, batch: Batch) -> None:
    options = {"num_simulations": 100, "num_draws": 19, "level": 1e-6, "progress": False}
    found = pv.calibration(pair, *batch[1:], **options)
    assert bool((found.ranks <= 19).all())
    assert bool((found.counts >= 100).all())


def diagnose(idiom: Idiom, pair: nn.Module, batch: Batch) -> None:
    """Diagnostics run at their smallest size; those that are tools above, only if they refuse."""
    served = [study for study, tool in DIAGNOSTICS.items() if tool not in idiom.refuses]
    studies = [study for study in diagnosis.STUDIES if study.__name__ not in served]
    with (
        mock.patch.object(diagnosis, "STUDIES", studies),
        mock.patch.object(sizing.Climb, "fits", lambda self, left: [] if self.known else [0]),
    ):
        found = pv.diagnose(pair, *batch, budget=60, **QUIET)
    assert found.failed == {}
    assert found.results or "check" in idiom.refuses
    refused = {tool for tool in DIAGNOSTICS.values() if tool in idiom.refuses}
    for tool in refused - {"refine"}:  # outliers have scores without a refinement, too
        assert any(idiom.refuses[tool].says in why for why in found.not_applicable.values()), tool


def save_and_load(idiom: Idiom, pair: nn.Module, batch: Batch) -> None:
    with TemporaryDirectory() as folder:
        pv.save(pair, folder)
        loaded = pv.load(folder, type(pair))
    same = [
        pv.log_likelihood(one, *batch, num_samples=5, engine="eager").value
        for one in (pair, loaded)
    ]
    assert same[0] == same[1]


@contextmanager
def stock(pair: nn.Module) -> Iterator[None]:
    """A run of stock Pyro, in a parameter store that holds the parameters of the pair."""
    with scope(pair), torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(5)
        yield


def data_of(idiom: Idiom, trace: Trace) -> str:
    """Return the name of the site that observes x."""
    names = [idiom.site, "x_observed", "x", "y"]  # obs_mask makes x of two sites
    return next(name for name in names if name in trace.nodes)


def data_dim(trace: Trace, name: str, n: int) -> int | None:
    """Return the dimension of a site's value that belongs to the data; None outside their plate."""
    site = trace.nodes[name]
    if site["type"] != "sample" or site_is_subsample(site):
        return None
    for frame in site["cond_indep_stack"]:
        if frame.vectorized and frame.size in (n, -1):
            return frame.dim - site["fn"].event_dim
    return None


def drawn_by_guide(idiom: Idiom, pair: nn.Module, batch: Batch) -> Trace:
    """Return stock Pyro's draws of all latents, those that only the model enumerates too."""
    guide = poutine.trace(pair.guide).get_trace(*batch)
    replayed = poutine.replay(pair.model, trace=guide)
    plain = poutine.trace(replayed).get_trace(*batch)
    if any(
        plain.nodes[n]["infer"].get("enumerate") for n in plain.stochastic_nodes if n not in guide
    ):
        nesting = idiom.stock().max_plate_nesting
        known = infer_discrete(replayed, first_available_dim=-1 - nesting, temperature=1)
        for name, site in poutine.trace(known).get_trace(*batch).nodes.items():
            if site["type"] == "sample" and not site["is_observed"] and name not in guide:
                guide.add_node(name, **site)
    return guide


@cache
def stock_runs(idiom: Idiom, pair: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """Return draws of the guide, and of the model given them, by stock Pyro: (runs, n, ...)."""
    found: dict[str, list[Tensor]] = {}
    with stock(pair):
        for _ in range(RUNS):
            guide = drawn_by_guide(idiom, pair, batch)
            model = poutine.uncondition(poutine.replay(pair.model, trace=guide))
            drawn = poutine.trace(model).get_trace(*batch)
            for name in {*(n for n in guide.nodes if n in drawn), data_of(idiom, drawn)}:
                if (dim := data_dim(drawn, name, len(batch[0]))) is not None:
                    value = drawn.nodes[name]["value"].movedim(dim, 0)
                    found.setdefault(name, []).append(value)
    return {name: torch.stack(values) for name, values in found.items()}


def replicates(idiom: Idiom, pair: nn.Module, batch: Batch) -> Tensor:
    """Return data that stock Pyro draws given draws of the guide."""
    runs = stock_runs(idiom, pair, batch)
    return next(runs[name] for name in (idiom.site, "x_observed", "x", "y") if name in runs)


def stock_elbo(idiom: Idiom, pair: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return mean and deviation over runs of the ELBO given global latents, by stock Pyro."""
    n, found = len(batch[0]), []
    with stock(pair):
        for _ in range(RUNS):
            guide = poutine.trace(pair.guide).get_trace(*batch)
            model = poutine.trace(poutine.replay(pair.model, trace=guide)).get_trace(*batch)
            terms = []
            for trace, sign in ((model, 1), (guide, -1)):
                trace.compute_log_prob()
                for name, site in trace.nodes.items():
                    counts = sign == 1 or not site.get("is_observed")  # not a term of the loss
                    if counts and data_dim(trace, name, n) is not None:
                        terms.append(sign * site["log_prob_sum"] / site["scale"] / n)
            found.append(sum(terms))
    values = torch.stack(found)
    return values.mean(), values.std()


def prior_draws(idiom: Idiom, pair: nn.Module, batch: Batch) -> Tensor:
    """Return data that stock Pyro draws from the model; global latents are those of the guide."""
    found = []
    with stock(pair):
        for _ in range(RUNS):
            guide = poutine.trace(pair.guide).get_trace(*batch)
            for name in list(guide.nodes):
                if data_dim(guide, name, len(batch[0])) is not None:
                    guide.remove_node(name)
            model = poutine.uncondition(poutine.replay(pair.model, trace=guide))
            drawn = poutine.trace(model).get_trace(*batch)
            name = data_of(idiom, drawn)
            found.append(
                drawn.nodes[name]["value"].movedim(data_dim(drawn, name, len(batch[0])), 0)
            )
    return torch.stack(found)


def shares(idiom: Idiom) -> bool:
    """Whether data share latents, so that draws of one call depend on each other."""
    return idiom.refuses.get("calibration") is UNRANKED


def repeated(
    idiom: Idiom, draw: Callable[..., dict[str, Tensor]], batch: Batch
) -> dict[str, Tensor]:
    """Return many draws for each row, (draws, n, ...): in several calls if data share latents."""
    if shares(idiom):
        calls = [draw(seed, *batch) for seed in range(12)]
        return {name: torch.stack([call[name] for call in calls]) for name in calls[0]}
    tiled = draw(3, *(part.repeat(TILES, *[1] * (part.dim() - 1)) for part in batch))
    return {name: value.unflatten(0, (TILES, len(batch[0]))) for name, value in tiled.items()}


def some_rows(idiom: Idiom) -> int:
    """Return a number of rows that is the size of no other plate."""
    return SOME if idiom.share == 1 else 7


def agree(idiom: Idiom, drawn: Tensor, runs: Tensor) -> None:
    """Assert that draws (draws, n, ...) have the means and variances of those of stock Pyro."""
    drawn, runs = drawn.double().flatten(1), runs.double().flatten(1)
    variances = drawn.var(0) / len(drawn), runs.var(0) / len(runs)
    moves = (variances[0] > 1e-9) & (variances[1] > 1e-9)
    apart, error = drawn.mean(0) - runs.mean(0), sum(variances).sqrt()
    # A rare value of a discrete latent may be in one of the two sets of draws only.
    assert (apart.abs() < torch.maximum(6 * error, torch.tensor(0.3)))[~moves].all()
    off = (apart / error)[moves]
    assert not len(off) or off.abs().max() < 6
    if shares(idiom) or not len(off):
        return
    assert abs(off.mean()) < 5 / len(off) ** 0.5
    assert off.square().mean() < 1 + 7 * (2 / len(off)) ** 0.5
    ratio = variances[0] * len(drawn) / (variances[1] * len(runs))
    assert 0.6 < ratio[moves].median() < 1.6


RUN: dict[str, Callable[[Idiom, nn.Module, Batch], None]] = {
    "check": check,
    "fit": fit,
    "evaluate": evaluate,
    "log_likelihood": log_likelihood,
    "encode": encode,
    "reconstruct": reconstruct,
    "sample": sample,
    "refine": refine,
    "gaps": gaps,
    "nuts": nuts,
    "anneal": anneal,
    "predictive_check": predictive_check,
    "calibration": calibration,
    "diagnose": diagnose,
    "save and load": save_and_load,
}
