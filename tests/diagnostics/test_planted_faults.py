"""The pairs of benchmarks/planted_faults.py are what they claim, and their faults are blamed."""

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import pyro_vae as pv
from pyro_vae.diagnostics import diagnosis, guide_studies, model_studies, signs

PATH = Path(__file__).parents[2] / "benchmarks" / "planted_faults.py"


@pytest.fixture(scope="module")
def planted():
    spec = importlib.util.spec_from_file_location("planted_faults", PATH)
    module = importlib.util.module_from_spec(spec)
    sys.modules["planted_faults"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["planted_faults"]


@pytest.mark.parametrize("shape", ["linear", "curved"])
def test_the_exact_pair_is_exact(planted, shape):
    pair, x = planted.made("none", shape, 0)
    found = pv.log_likelihood(pair, x[:100], num_samples=50, engine="eager")
    torch.testing.assert_close(found.per_datum, pair.log_likelihood(x[:100]), atol=6e-3, rtol=0)
    torch.testing.assert_close(found.elbo_per_datum, found.per_datum, atol=6e-3, rtol=0)


def test_log_p_of_the_grid_is_that_of_the_linear_gaussian(planted):
    pair, x = planted.made("none", "linear", 0)
    slopes = torch.zeros(6, 2)
    for i in range(2):
        slopes[3 * i : 3 * i + 3, i] = planted.STRENGTH[i] * planted.DIRECTIONS
    covariance = slopes @ slopes.T + planted.NOISE**2 * torch.eye(6)
    exact = torch.distributions.MultivariateNormal(torch.zeros(6), covariance).log_prob(x)
    torch.testing.assert_close(pair.log_likelihood(x), exact.double(), atol=1e-4, rtol=0)


def smallest(make):
    """A study at its second size, whatever it costs."""

    def made(bench):
        study = make(bench)
        return study._replace(rungs=[study.rungs[1]._replace(cost=0.0)])

    return made


STUDIES = [
    model_studies.latents_study,
    guide_studies.reliability_study,
    guide_studies.calibration_study,
    guide_studies.local_calibration_study,
    model_studies.model_check_study,
]


@pytest.mark.sample(4)
@pytest.mark.parametrize(
    "fault",
    [
        "none",
        "scale of the guide 0.6",
        "mean of the guide 0.2 sd off",
        "one mode of two",
        "decoder ignores z",
        "noise times 2",
        "codes off the prior",
        "heterogeneous noise",
    ],
)
def test_the_right_part_is_blamed(planted, fault, monkeypatch):
    monkeypatch.setattr(diagnosis, "STUDIES", list(map(smallest, STUDIES)))
    pair, x = planted.made(fault, "linear", 3)
    found = pv.diagnose(pair, x, budget=1e6, progress=False, engine="eager")
    parts, _ = planted.FAULTS[fault]
    assert not found.failed
    assert [blame.part for blame in found.blamed][:1] == list(parts)
    assert not planted.contradictions(found)
    exact = pair.log_likelihood(x)[found.rows]
    assert all(off < 4 for off in planted.trusted_errors(found, exact))


@pytest.mark.parametrize(
    ("fault", "scale", "kind"),
    [
        ("one mode of two", 1.0, "mass"),
        ("scale of the guide 0.6", 0.6, None),
        ("scale of the guide 0.6", 0.5, None),
        ("scale of the guide 0.6", 0.3, None),
    ],
)
def test_a_missed_mode_is_told_from_a_narrow_guide_though_most_rows_are_unreliable(
    planted, fault, scale, kind
):
    pair, x = planted.made(fault, "linear", 0)
    pair.plan = replace(pair.plan, scale=scale)
    found = pv.model_check(pair, x[:300], progress=False)
    assert found.own_unreliable.double().mean() > 0.5
    sign = signs.missing_mass({"model_check": found})
    assert (sign and sign.kind) == kind
