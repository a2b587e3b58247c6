"""Results of the tools with chosen numbers, of their own classes, as `diagnose` collects them."""

from math import exp

import torch

from pyro_vae.diagnostics.calibration import JOINT, LIKELIHOOD, Calibration
from pyro_vae.diagnostics.gaps import Gaps, PerDatum
from pyro_vae.diagnostics.local_calibration import LocalCalibration
from pyro_vae.diagnostics.model_check import ModelCheck
from pyro_vae.diagnostics.model_studies import TrainGap
from pyro_vae.diagnostics.two_samples import Difference, Separation
from pyro_vae.inference.annealing import Annealing
from pyro_vae.inference.chains import compared
from pyro_vae.inference.importance import LogLikelihood

N = 200


def normals(n):
    """Quantiles of the standard normal in a fixed random order: their moments are exact."""
    values = torch.special.ndtri((torch.arange(n, dtype=torch.float64) + 0.5) / n)
    return values[torch.randperm(n, generator=torch.Generator().manual_seed(0))]


def ranks(mean=0.0, spread=1.0, joint=0.0, n=20_000):
    """Ranks of a unit whose normal scores have this mean and deviation, and of the densities."""
    scores = torch.stack([mean + spread * normals(n), joint + normals(n), normals(n)], 1)
    found = (torch.special.ndtr(scores) * 100).long().clamp(0, 99)
    return Calibration(("z[0]", JOINT, LIKELIHOOD), found, 99, 0.05, {})


def moments(shift=0.0, scatter=0.0, ratio=1.0, correlation=0.0, unreliable=0, error=0.0):
    """Moments of two units at each row: a shared shift, one that averages to 0, a scale ratio."""
    signs = torch.tensor([1.0, -1.0]).double().repeat(N // 2)[:, None]
    k = torch.zeros(N).double()
    k[:unreliable] = 2.0
    rows, one = torch.zeros(N, 2).double(), torch.ones(N, 1).double()
    return LocalCalibration(
        names=("z[0]", "z[1]"),
        shift=rows + shift + scatter * signs,
        shift_errors=rows + error,
        log_scale=(rows + ratio).log(),
        log_scale_errors=rows + error,
        pairs=((0, 1),),
        correlation=one * correlation,
        correlation_errors=one * error,
        guide_k=k,
        pareto_k=k,
        num_samples=1000,
        left_out={},
    )


def weights(unreliable=0, gap=0.0, error=0.1, value=-10.0, n=N, infinite=0):
    """log p(x) of each datum, of which some are unreliable."""
    k, ones = torch.zeros(n).double(), torch.ones(n).double()
    k[:unreliable] = 0.9
    bad = torch.zeros(n).long()
    bad[:infinite] = 1
    return LogLikelihood(
        value=value,
        standard_error=error / n**0.5,
        num_samples=1000,
        per_datum=value * ones,
        standard_errors=error * ones,
        effective_sample_size=500 * ones,
        elbo=value - gap,
        elbo_standard_error=error / n**0.5,
        elbo_per_datum=(value - gap) * ones,
        elbo_standard_errors=error * ones,
        pareto_k=k,
        infinite_weights=bad,
    )


def gaps(encoder=0.0, family=0.0, n=N, error=0.0):
    def each(value):
        return PerDatum(torch.full((n,), value).double(), torch.full((n,), error * n**0.5).double())

    return Gaps(
        log_likelihood=each(-10.0),
        refined=each(-10.0 - family),
        amortized=each(-10.0 - family - encoder),
        approximation=each(family),
        amortization=each(encoder),
        inference=each(encoder + family),
        from_refined=torch.ones(n).bool(),
        pareto_k=torch.zeros(n).double(),
        num_samples=500,
        steps=300,
        refinement=None,
    )


def annealed(by=0.0, error=0.0, value=-10.0, n=20):
    """Annealing whose log p(x) exceeds ``value`` by this much."""
    ones = torch.ones(n).double()
    each = (value + by) * ones
    return Annealing(
        value + by, error, each, error * n**0.5 * ones, ones, ones, ones.long() * 0, 8, 100, 5
    )


def bridge(missed=0.0, error=0.0, bias=0.0, n=N):
    """Numbers of own data by which log p(x) is too low by ``missed`` nats, with this error."""
    spread = 0.5 * error * (n - 1) ** 0.5 * torch.tensor([1.0, -1.0]).double().repeat(n)[:n]
    draws, truth = 0.5 + 0 * spread, 0.5 * exp(-missed) + 0 * spread
    return torch.stack([draws + spread - spread.mean(), truth, 0 * spread + bias], 1)


def checked(
    codes=0.0,
    auc=0.5,
    scale=None,
    row=None,
    column=None,
    dependence=None,
    regression=None,
    p=0.5,
    deviations=10.0,
    scores=None,
    more=0,
    elements=6.0,
    missed=0.0,
    missed_error=0.0,
    bias=0.0,
    bridged=N,
):
    """A comparison of data and own data; numbers are in nats, or of a logarithm for the scale."""

    def off(value):
        return Difference(0.0, 0.0) if value is None else Difference(value, deviations)

    flat = torch.zeros(N).double()
    bad = torch.zeros(N).bool()
    bad[:more] = True
    scores = normals(2000)[:, None] if scores is None else scores
    return ModelCheck(
        log_likelihood=flat,
        own_log_likelihood=flat,
        unreliable=bad,
        own_unreliable=torch.zeros(N).bool(),
        marginal_p=p,
        codes={"z": Separation(auc, deviations if codes else 0.0, codes)},
        scale=Difference(0.0, 0.0)
        if scale is None
        else Difference(scale, deviations if scale > 0 else -deviations),
        row_scale=off(row),
        column_scale=off(column),
        dependence=off(dependence),
        regression=off(regression),
        num_elements=elements,
        units=("z[0]",),
        weighted_scores=scores,
        bridge=bridge(missed, missed_error, bias, bridged),
        left_out=more > 0,
        num_samples=200,
    )


def trained(by=0.0, error=0.01):
    return TrainGap(by, error, N)


def chains(shift=0.0, ratio=1.0, correlation=0.0, draws=1000, data=2):
    """Independent draws of a standard normal of two units, and a guide with other moments."""
    generator = torch.Generator().manual_seed(1)
    z = torch.randn(4, draws, data, 2, generator=generator).double()
    q = torch.randn(4 * draws, data, 2, generator=generator).double()
    second = correlation * q[..., 0] + (1 - correlation**2) ** 0.5 * q[..., 1]
    q = shift + ratio * torch.stack([q[..., 0], second], -1)
    return compared({"z": z}, {"z": q}, torch.zeros(data))
