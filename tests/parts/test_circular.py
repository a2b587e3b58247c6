"""Circular columns: densities, draws, means, the way of a table there and back."""

import csv
from math import log, pi

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from apart import Apart
from cli_helpers import command
from scipy import stats

import pyro_vae as pv
from pyro_vae.parts.circular import Circular

HOURS = torch.tensor(24.0)


def circular(loc, concentration, start=0.0):
    values = torch.tensor(loc), torch.tensor(concentration), torch.tensor(start)
    return Circular(*(value.double() for value in values), HOURS.double())


@pytest.mark.parametrize("concentration", [1e-2, 1.0, 30.0, 1e4])
def test_the_density_is_von_mises_and_integrates_to_one_over_a_period(concentration):
    fn = circular(23.5, concentration)
    grid = torch.arange(0, 24, 24 / 40_000).double()
    assert float(fn.log_prob(grid).exp().mean() * 24) == pytest.approx(1, abs=1e-6)
    x = torch.tensor([-0.3, 0.3, 12.0, 47.5]).double()
    want = stats.vonmises.logpdf((x.numpy() - 23.5) * 2 * pi / 24, concentration) + log(2 * pi / 24)
    np.testing.assert_allclose(fn.log_prob(x).numpy(), want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("start", [0.0, -12.0])
def test_draws_are_within_a_period_and_have_the_resultant(start):
    fn = circular(23.5, 3.0, start)
    torch.manual_seed(0)
    drawn = fn.sample((20_000,))
    assert bool(((drawn >= start) & (drawn < start + 24)).all())
    angle = (drawn - 23.5) * 2 * pi / 24
    # E[cos] = I_1(k) / I_0(k)
    assert float(angle.cos().mean()) == pytest.approx(0.80999, abs=0.01)
    assert float(angle.sin().mean()) == pytest.approx(0, abs=0.015)
    assert float(fn.mode) == pytest.approx(23.5 if start == 0 else -0.5)
    assert bool(fn.mean.isnan())


def likelihood():
    x = torch.tensor([[23.0, 1.0], [1.0, 2.0], [torch.nan, 4.0]])
    kinds = ["circular", "continuous"]
    return pv.Columns(kinds, [0, 0], periods=(24.0, 0.0)).standardize(x)


def test_the_part_of_a_row_is_the_circular_density_with_gradients_at_zero():
    family, raw = likelihood(), torch.zeros(4, 6, requires_grad=True)
    x = torch.tensor([[3.0, 1.0], [27.0, 1.0], [-21.0, 1.0], [torch.nan, 1.0]])
    density = family(raw, (2,)).base_dist.log_prob(x)
    want = stats.vonmises.logpdf(3 * 2 * pi / 24, 1.0) + log(2 * pi / 24)
    assert density[:, 0].tolist() == pytest.approx([want] * 3 + [0.0], abs=1e-5)
    density.sum().backward()
    assert bool(raw.grad.isfinite().all())


def test_the_encoder_does_not_see_the_end_of_the_circle():
    view = likelihood().view((2,))
    seen = view(torch.tensor([[0.0, 1.0], [24.0, 1.0], [6.0, 1.0], [torch.nan, 1.0]]))
    torch.testing.assert_close(seen[0], seen[1], atol=1e-6, rtol=0)
    torch.testing.assert_close(seen[2, 1:3], torch.tensor([1.0, 0.0]), atol=1e-6, rtol=0)
    assert seen[3, 1:3].tolist() == [0.0, 0.0]


class Midnight(torch.nn.Module):
    """The decoder of a pair whose circular column is near midnight, whatever z is."""

    def forward(self, z):
        raw = z.new_zeros(*z.shape[:-1], 6)
        raw[..., 3] = 2.0  # the columns' own outputs come first: cos, sin, concentration
        return raw


def test_an_imputation_near_the_end_of_the_circle_is_not_at_its_middle():
    family = likelihood()
    vae = pv.VAE.mlp((2,), 1, (4,), family)
    vae = pv.VAE(vae.encoder, pv.Factor(Midnight(), family, (2,)), vae.prior)
    found = pv.impute(vae, torch.tensor([[torch.nan, 2.0]]), draws=50, num_samples=16_000)
    assert min(float(found.mean[0, 0]), 24 - float(found.mean[0, 0])) < 0.2
    assert bool(((found.draws[..., 0] >= 0) & (found.draws[..., 0] < 24)).all())
    width = stats.vonmises.ppf(0.95, 1.0) * 24 / (2 * pi)  # the concentration of an output of 0
    low, high = (float(end[0, 0] - found.mean[0, 0]) for end in (found.low, found.high))
    assert (low, high) == (pytest.approx(-width, abs=0.5), pytest.approx(width, abs=0.5))


@pytest.fixture
def table(tmp_path):
    draw = np.random.default_rng(0)
    rows = [
        [f"r{i}", round(draw.normal(0, 2) % 24, 3) if i % 9 else "", round(draw.normal(), 3)]
        for i in range(50)
    ]
    with open(tmp_path / "events.csv", "w", newline="") as file:
        csv.writer(file).writerows([["id", "hour", "size"], *rows])
    (tmp_path / "c.toml").write_text('[columns.hour]\nkind = "circular"\nperiod = 24\n')
    return tmp_path


def test_a_table_with_hours_goes_there_and_back(table, capsys):
    read = pv.read_table(table / "events.csv", {"hour": {"kind": "circular", "period": 24}})
    assert read.schema.data[0].period == 24
    assert "period 24" in str(read.schema)
    assert pv.read_table(table / "events.csv").schema.data[0].kind != "circular"  # never inferred
    paths = {"t": table / "events.csv", "c": table / "c.toml", "run": table / "run"}
    command(
        "train {t} --columns {c} --out {run} --epochs 2 --num-eval-samples 21 --latent-dim 1 "
        "--diagnosis-seconds 0 "
        "--hidden 4 --engine eager",
        **paths,
    )
    pair = pv.load(table / "run")
    again = pv.read_table(table / "events.csv", table / "run" / "schema.toml")
    assert again.schema == read.schema
    family = next(m for m in pair.modules() if isinstance(m, pv.Columns))
    assert family.periods == (24.0, 0.0)
    command("impute {run} {t} --draws 2 --num-samples 30 --out {o}", o=table / "f.csv", **paths)
    command("sample {run} --num 20 --out {o}", o=table / "s.csv", **paths)
    for name in ("f.csv", "s.csv"):
        with open(table / name, newline="") as file:
            assert all(0 <= float(row["hour"]) < 24 for row in csv.DictReader(file))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"kind": "circular", "period": 0}, "period of column 'a' must be a number above 0, got 0"),
        ({"kind": "circular", "period": "day"}, "must be a number above 0, got 'day'"),
        ({"kind": "continuous", "period": 3}, "only circular columns have a period"),
    ],
)
def test_wrong_periods_are_one_line(change, words):
    with pytest.raises(pv.UsageError, match=words):
        pv.read_table({"a": [1.5, 2.5, 3.25], "b": [0.5, 2.0, 1.0]}, {"a": change})


def test_periods_must_fit_the_kinds():
    for periods, words in (((1.0,), "2 kinds but 1 periods"), ((0.0, 0.0), "must be above 0")):
        with pytest.raises(pv.UsageError, match=words):
            pv.Columns(["circular", "count"], [0, 0], periods=periods)
    with pytest.raises(pv.UsageError, match=r"is count, so it cannot have the period 2\.0"):
        pv.Columns(["circular", "count"], [0, 0], periods=(1.0, 2.0))
    assert pv.Columns(["circular", "count"], [0, 0]).periods == (pytest.approx(2 * pi), 0.0)


ANGLES = {
    "hours": (Circular(torch.tensor(23.5), torch.tensor(3.0), torch.tensor(0.0), HOURS), 24.0),
    "angles": (dist.VonMises(torch.tensor(3.0), torch.tensor(3.0)), 2 * pi),
}


@pytest.mark.parametrize("name", ANGLES)
@pytest.mark.parametrize("turns", [-1, 1, 10])
def test_other_turns_of_the_circle_do_not_change_checks(name, turns):
    fn, period = ANGLES[name]
    pair = Apart(fn)
    x = pv.sample(pair, 60, seed=0)
    moved = x + turns * period
    one, two = (pv.loo_pit(pair, part, num_samples=50, progress=False) for part in (x, moved))
    torch.testing.assert_close(one.pit, two.pit, atol=0.05, rtol=0)  # a draw may be a tie
    assert 0.3 < float(two.pit.mean()) < 0.7
    one, two = (
        pv.predictive_check(pair, part, num_replicates=20, progress=False) for part in (x, moved)
    )
    torch.testing.assert_close(one.observed, two.observed, atol=1e-3, rtol=1e-3)


def test_an_imputed_angle_of_a_von_mises_is_not_at_the_other_side_of_the_circle():
    pair = Apart(ANGLES["angles"][0])
    found = pv.impute(pair, torch.tensor([[torch.nan, 1.0]]), num_samples=4000)
    mean, low, high = (float(part[0, 0]) for part in (found.mean, found.low, found.high))
    width = stats.vonmises.ppf(0.95, 3.0)
    assert (mean - 3.0 + pi) % (2 * pi) - pi == pytest.approx(0.0, abs=0.05)
    assert (low - mean, high - mean) == (
        pytest.approx(-width, abs=0.1),
        pytest.approx(width, abs=0.1),
    )
