"""The comparison of several diagnoses: its numbers against closed forms, its verdict in words."""

import math
import re

import pyro
import pyro.distributions as dist
import pytest
import torch
from exact import linear_gaussian
from torch import nn

import pyro_vae as pv
from pyro_vae.diagnostics.comparison import Diagnosed, compare, scored
from pyro_vae.diagnostics.diagnosis import Diagnosis
from pyro_vae.diagnostics.study import Finding
from pyro_vae.diagnostics.verdict import Blame

X = torch.randn(60, 6, generator=torch.Generator().manual_seed(0)).double()

TRUST = [Finding("trust", "log p(x) = ...", "log p(x)")]


def shifted(by):
    """A linear-Gaussian pair with this bias. Its guide is exact, so its weights are constant."""
    pair = linear_gaussian()
    with torch.no_grad():
        pair.bias += by
    return pair


def diagnosed(name, pair, batch=(X,), used=None, parts=(), trusted=True, num_samples=30):
    """A run whose log p(x) was weighed on ``used`` rows, which are in a random order."""
    order = torch.randperm(len(batch[0]), generator=torch.Generator().manual_seed(len(name)))
    some = [part[order[:used]] for part in batch]
    weighed = pv.log_likelihood(pair, *some, num_samples=num_samples, engine="eager")
    found = Diagnosis(order, 10.0, {"log_likelihood": weighed})
    found.blamed = [Blame(part, nats, ()) for part, nats in parts]
    found.findings = TRUST if trusted else []
    return Diagnosed(name, found, scored(pair, *batch))


def test_the_spread_is_that_of_the_exact_log_likelihoods():
    """Rows are paired by their number: each run has its own order, and weighs its own number."""
    pairs = {"a": shifted(0.0), "bb": shifted(0.3), "ccc": shifted(-0.2)}
    exact = {name: pair.marginal().log_prob(X).detach() for name, pair in pairs.items()}
    used = {"a": 60, "bb": 30, "ccc": 45}
    runs = [diagnosed(name, pair, used=used[name]) for name, pair in pairs.items()]
    weighed = [set(run.found.rows[: used[run.name]].tolist()) for run in runs]
    common = sorted(set.intersection(*weighed))
    assert 5 < len(common) < 30
    found = compare(runs).spread
    means = {name: values[common].mean().item() for name, values in exact.items()}
    assert found.num_examples == len(common)
    assert found.between == pytest.approx(torch.tensor(list(means.values())).std().item(), rel=1e-4)
    assert found.highest == max(means, key=means.get)
    assert found.lowest == min(means, key=means.get)
    differences = (exact[found.highest] - exact[found.lowest])[common]
    assert found.difference == pytest.approx(differences.mean().item(), rel=1e-4)
    error = differences.std().item() / math.sqrt(len(common))
    assert found.error == pytest.approx(error, rel=1e-4)


def test_the_reported_error_is_the_root_mean_square_of_the_runs():
    runs = [
        diagnosed("a", linear_gaussian(spread=1.3)),
        diagnosed("bb", linear_gaussian(spread=1.3), num_samples=200),
    ]
    errors = [run.found.results["log_likelihood"].total_error for run in runs]
    assert errors[0] > 1.5 * errors[1] > 0
    found = compare(runs)
    assert [row.error for row in found.rows] == errors
    assert found.spread.reported == pytest.approx(math.hypot(*errors) / math.sqrt(2))
    # Both runs have the same weights: their difference is Monte Carlo error.
    assert found.spread.between < 3 * found.spread.reported
    assert abs(found.spread.difference) < 4 * found.spread.error
    assert "does not contain this spread" not in str(found)


def test_a_worse_run_is_told_apart():
    runs = [diagnosed("good", shifted(0.0)), diagnosed("worse", shifted(1.0))]
    found = compare(runs)
    assert (found.spread.highest, found.spread.lowest) == ("good", "worse")
    assert found.spread.difference > 4 * found.spread.error > 0
    assert "which does not contain this spread" in str(found)
    assert f"good is higher than worse by {found.spread.difference:.3f} ±" in str(found)


def test_equal_runs_have_no_spread():
    found = compare([diagnosed("a", shifted(0.0)), diagnosed("b", shifted(0.0))])
    assert found.agree
    assert found.spread.difference == found.spread.error == found.spread.between == 0
    assert "between runs; a run reports an error of 0.000." in str(found)


def test_a_row_shows_the_numbers_of_its_diagnosis():
    run = diagnosed("a", linear_gaussian(spread=1.3), parts=[("family", 0.25), ("prior", None)])
    run.found.results["latents"] = pv.evaluate(linear_gaussian(), X, num_samples=1)
    other = diagnosed("b", shifted(0.0), trusted=False)
    found = compare([run, other])
    weighed = run.found.results["log_likelihood"]
    row = found.rows[0]
    assert (row.log_likelihood, row.elbo) == (weighed.value, weighed.elbo)
    assert row.gap == weighed.value - weighed.elbo > 0
    assert row.active_units == {"z": "2 of 2"}
    lines = str(found).splitlines()
    assert re.split("  +", lines[1]) == [
        "a",
        "family (0.25), prior",
        f"{weighed.value:.3f} ± {weighed.total_error:.3f}",
        f"{weighed.elbo:.3f}",
        f"{row.gap:.2f}",
        "z 2 of 2",
    ]
    # Only the number that the diagnosis does not trust is marked.
    assert "*" not in lines[1]
    assert "*" in lines[2]
    assert "b lacks latents." in lines


@pytest.mark.parametrize(
    ("parts", "agree", "words"),
    [
        ((["encoder"], ["encoder"]), True, "The verdicts agree. At fault in all runs: encoder."),
        (([], []), True, "The verdicts agree: no part is at fault"),
        ((["encoder"], []), False, "The verdicts differ. At fault: encoder in 1 of 2 runs."),
        (
            (["encoder", "prior"], ["prior", "encoder"], ["prior"]),
            False,
            "The verdicts differ. At fault: encoder in 2 of 3 runs, prior in 3 of 3 runs.",
        ),
        ((["prior", "encoder"], ["encoder", "prior"]), True, "The verdicts agree. At fault in all"),
    ],
)
def test_whether_the_verdicts_agree(parts, agree, words):
    runs = [
        diagnosed(f"run {i}", shifted(0.0), parts=[(part, None) for part in each])
        for i, each in enumerate(parts)
    ]
    found = compare(runs)
    assert found.agree is agree
    assert found.verdict.startswith(words)


def test_a_run_without_any_result_has_no_verdict():
    empty = Diagnosed("silent", Diagnosis(torch.arange(60), 1.0), scored(shifted(0.0), X))
    found = compare([diagnosed("a", shifted(0.0)), empty])
    assert found.verdict == "No verdict: no diagnostic gave a result for silent."
    assert found.spread is None
    assert found.not_comparable == "silent has no log p(x) by importance weights"
    assert "no part" not in str(found).splitlines()[2]


# What cannot be compared


def conditional(x, context):
    """A conditional pair, and its log p(x | context) on these rows."""
    pair = pv.VAE.mlp((6,), 2, (4,), likelihood=pv.Gaussian, context_shapes=((1,),))
    return diagnosed(f"c {context.sum():.0f}", pair, (x, context))


def plain(likelihood, batch):
    return diagnosed(likelihood.__name__, pv.VAE.mlp((6,), 2, (4,), likelihood=likelihood), batch)


class Factored(nn.Module):
    def model(self, x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            pyro.factor("penalty", -z[..., 0].square())
            pyro.sample("x", dist.Normal(z.expand(*z.shape[:-1], 6), 1.0).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(x[:, :1], 1.0).to_event(1))


BINARY = (X > 0).float()
ONES = torch.ones(60, 1)
EXTREME = torch.cat([X, torch.full((1, 6), 1e25)]).float()

APART = {
    "other rows": (
        lambda: [diagnosed("a", shifted(0.0)), diagnosed("b", shifted(0.0), (X + 1,))],
        "a and b have different test rows",
    ),
    "one row that differs": (
        lambda: [diagnosed("a", shifted(0.0)), diagnosed("b", shifted(0.0), (X[:59],))],
        "a and b have different test rows",
    ),
    "binarized and gray": (
        lambda: [
            plain(pv.Bernoulli, ((BINARY * 200).byte() + 20,)),
            plain(pv.ContinuousBernoulli, ((BINARY * 200).byte() + 20,)),
        ],
        "have different test rows",
    ),
    "other context": (
        lambda: [conditional(X.float(), ONES), conditional(X.float(), 2 * ONES)],
        "c 60 and c 120 receive different context",
    ),
    "context and none": (
        lambda: [conditional(X.float(), ONES), plain(pv.Gaussian, (X.float(),))],
        "receive different context",
    ),
    "a density and a probability": (
        lambda: [plain(pv.Gaussian, (BINARY,)), plain(pv.Bernoulli, (BINARY,))],
        "one of Gaussian and Bernoulli gives a density, the other a probability",
    ),
    "factors": (
        lambda: [
            diagnosed("a", Factored(), (X.float(),)),
            diagnosed("b", Factored(), (X.float(),)),
        ],
        "p(x) of a is not normalized",
    ),
    "infinite": (
        lambda: [plain(pv.Gaussian, (EXTREME,)), plain(pv.Gaussian, (EXTREME,))],
        "log p(x) of Gaussian is not finite",
    ),
    "no common rows": (
        lambda: [diagnosed("a", shifted(0.0), used=1), diagnosed("b", shifted(0.0))],
        "fewer than two common rows",
    ),
}


@pytest.mark.parametrize(("make", "words"), APART.values(), ids=APART)
def test_what_is_not_comparable_is_said_and_not_computed(make, words):
    found = compare(make())
    assert found.spread is None
    assert words in found.not_comparable
    assert f"log p(x) is not comparable: {found.not_comparable}." in str(found).splitlines()


def test_columns_of_a_table_are_densities_or_probabilities():
    """A number may be a count in one schema and a real value in another."""
    x = torch.randint(0, 3, (40, 3), generator=torch.Generator().manual_seed(0)).float()
    kinds = {}
    for kind in ("continuous", "count"):
        columns = pv.Columns([kind, "categorical", "continuous"], [0, 3, 0])
        pair = pv.VAE.mlp((3,), 2, (4,), likelihood=columns)
        kinds[kind] = scored(pair, x).discrete
    assert kinds == {"continuous": (False, True, False), "count": (True, True, False)}


def test_equal_gray_images_are_binarized_alike():
    """Two seeds of one model score the same binary pixels."""
    gray = torch.randint(0, 256, (30, 6), generator=torch.Generator().manual_seed(0)).byte()
    first, second = (plain(pv.Bernoulli, (gray,)) for _ in range(2))
    assert not first.scored.rows.equal(scored(shifted(0.0), gray.double()).rows)
    assert compare([first, second]).spread is not None
