"""The baselines of counts, gray levels and text, against SciPy and by hand."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import optimize, special, stats

import pyro_vae as pv
from pyro_vae.cli.baseline import baseline_of
from pyro_vae.data.split import Split
from pyro_vae.diagnostics.baseline import (
    independent_angles,
    independent_counts,
    independent_levels,
    of_table,
    pairs_of_characters,
)

GENERATOR = np.random.default_rng(0)
LEVELS = torch.arange(240, dtype=torch.uint8).view(60, 4)
COUNTS = torch.from_numpy(GENERATOR.negative_binomial(2, [0.1, 0.5], size=(4000, 2))).float()


def test_counts_have_the_density_of_their_negative_binomial():
    train, held = COUNTS[:3000], COUNTS[3000:]
    found = independent_counts(train, held)
    truth = stats.nbinom.logpmf(held.numpy(), 2, [0.1, 0.5]).sum(1).mean()
    assert found == pytest.approx(truth, abs=0.02)


def test_counts_by_hand():
    train = torch.tensor([[0.0], [0.0], [8.0]])
    mean = (8 + 1) / (3 + 1)
    r = 3 * mean**2 / sum((x - mean) ** 2 - mean for x in (0, 0, 8))
    wanted = stats.nbinom.logpmf(5, r, r / (r + mean))
    assert independent_counts(train, torch.tensor([[5.0]])) == pytest.approx(wanted)


def test_given_its_total_a_row_has_the_shares_of_the_training_rows():
    x = torch.tensor([[1.0, 2.0], [10.0, 20.0], [2.0, 4.0]])
    shares = np.array([13 + 1, 26 + 1]) / (39 + 2)
    wanted = stats.poisson.logpmf([[6, 3]], 9 * shares).sum()
    assert independent_counts(x, torch.tensor([[6.0, 3.0]]), by_total=True) == pytest.approx(wanted)


def test_a_count_that_the_training_rows_lack_has_a_density():
    train, held = torch.zeros(9, 1), torch.tensor([[2.0]])
    assert independent_counts(train, held) == pytest.approx(stats.poisson.logpmf(2, 0.1))


def test_levels_sum_to_one_and_follow_a_rounded_normal():
    train = torch.from_numpy(GENERATOR.normal(100, 20, size=(5000, 1))).round().clamp(0, 255)
    each = [np.exp(independent_levels(train, torch.tensor([[k]]), 256)) for k in range(256)]
    assert sum(each) == pytest.approx(1)
    assert each[110] == pytest.approx(stats.norm.pdf(110, 100, 20), rel=0.03)


def test_a_level_that_never_varies_costs_little():
    train = torch.zeros(99, 3)
    held = torch.tensor([[0.0, 0.0, 255.0]])
    seen, unseen = (99 + 1 / 256) / 100, 1 / 256 / 100
    wanted = 2 * np.log(seen) + np.log(unseen)
    assert independent_levels(train, held, 256) == pytest.approx(wanted)


def test_rows_of_characters_sum_to_one():
    train = torch.tensor([[1, 2, 0], [1, 1, 2]])
    rows = [[0, 0, 0]] + [[a, 0, 0] for a in (1, 2)]
    rows += [[a, b, c] for a in (1, 2) for b in (1, 2) for c in (0, 1, 2)]
    each = [np.exp(pairs_of_characters(train, torch.tensor([row]), 3)) for row in rows]
    assert sum(each) == pytest.approx(1)
    # After the start, 1 has both of 2 rows, and each token has one row more.
    assert each[0] == pytest.approx(1 / 5)


def test_what_follows_the_end_of_a_row_does_not_count():
    train = torch.tensor([[1, 2, 0, 0], [2, 0, 1, 1]])
    one, other = torch.tensor([[2, 0, 0, 0]]), torch.tensor([[2, 0, 2, 1]])
    assert pairs_of_characters(train, one, 3) == pairs_of_characters(train, other, 3)


KINDS = {
    "negative-binomial": (COUNTS[:60].to(torch.uint8), "independent counts"),
    "poisson": (COUNTS[:60], "independent counts"),
    "discretized-logistic": (
        torch.arange(240, dtype=torch.uint8).view(60, 4),
        "independent pixels",
    ),
    "bernoulli": ((COUNTS[:60] > 3).float(), "independent pixels"),
    "student-t": (torch.randn(60, 3), "probabilistic PCA"),
    "continuous-bernoulli": (torch.rand(60, 3), None),
}


@pytest.mark.parametrize("likelihood", KINDS)
def test_each_kind_of_array_gets_the_baseline_of_its_likelihood(likelihood):
    x, name = KINDS[likelihood]
    data = SimpleNamespace(train=Split(x), vocabulary=None, table=None)
    found = baseline_of(data, Split(x), {"likelihood": likelihood, "latent_dim": (1,)})
    assert (found and found.name) == name


def test_counts_of_8_bits_are_whole_numbers():
    x = COUNTS[:60].to(torch.uint8)
    data = SimpleNamespace(train=Split(x), vocabulary=None, table=None)
    found = baseline_of(data, Split(x), {"likelihood": "poisson"})
    assert found.log_likelihood == pytest.approx(independent_counts(x.float(), x.float()))


def test_text_gets_pairs_of_characters():
    x = torch.tensor([[1, 2, 0], [1, 1, 2]])
    data = SimpleNamespace(train=Split(x), vocabulary="\nab", table=None)
    found = baseline_of(data, Split(x), {})
    assert found == ("pairs of characters", pairs_of_characters(x, x, 3))


@pytest.mark.parametrize("given", [{"condition": ("label",)}, {"likelihood": "poisson"}])
def test_context_and_missing_entries_have_no_baseline(given):
    x = COUNTS[:60] if "condition" in given else COUNTS[:60].where(COUNTS[:60] > 0, torch.nan)
    data = SimpleNamespace(train=Split(x), vocabulary=None, table=None)
    assert baseline_of(data, Split(x), {"likelihood": "poisson"} | given) is None


HOURS = GENERATOR.vonmises(0.0, 2.0, 500) * 12 / np.pi
OF_COLUMNS = {
    "hour": {"kind": "circular", "period": 24.0},
    "rare": "count",
    "level": "continuous",
    "word": "categorical",
}


def mixed_table(turns=0, holes=False):
    """Hours around midnight, counts that are nearly always 0, numbers and words."""
    rng = np.random.default_rng(3)
    frame = pd.DataFrame(
        {
            "hour": HOURS + 24 * turns * (np.arange(500) % 2),
            "rare": rng.poisson(0.02, 500).astype(float),
            "level": rng.normal(5, 2, 500),
            "word": rng.choice(["a", "b"], 500),
        }
    )
    if holes:
        frame.loc[::7, "rare"] = np.nan
        frame.loc[::5, "hour"] = np.nan
    return pv.read_table(frame, OF_COLUMNS).split()


def von_mises(train, held, period=24.0):
    """Log densities whose concentration k has I_1(k) / I_0(k) = the length of the mean vector."""
    scale = 2 * np.pi / period
    mean = np.exp(1j * train * scale).mean()
    k = optimize.brentq(lambda k: special.i1e(k) / special.i0e(k) - abs(mean), 1e-6, 1e6)
    logs = k * np.cos(held * scale - np.angle(mean)) - np.log(2 * np.pi * special.i0e(k)) - k
    return logs + np.log(scale)


def test_equal_angles_have_a_finite_baseline():
    train, held = torch.full((20,), 6.0), torch.tensor([6.0, 18.0, torch.nan])
    at, opposite, missing = independent_angles(train, held, 24.0).tolist()
    wanted = -np.log(2 * np.pi * special.i0e(1e4)) + np.log(2 * np.pi / 24)
    assert at == pytest.approx(wanted, abs=1e-5)
    assert opposite == pytest.approx(wanted - 2e4, abs=1e-3)
    assert missing == 0


def test_counts_and_circular_columns_of_a_table_have_their_own_distributions():
    data = mixed_table()
    train, held = data.train.x.double().numpy(), data.test.x.double().numpy()
    found = of_table(data.schema, data.train.x, data.test.x, 1)
    assert found.name == "probabilistic PCA and independent columns"
    wanted = von_mises(train[:, 0], held[:, 0]).mean()
    wanted += independent_counts(data.train.x[:, 1:2], data.test.x[:, 1:2])
    wanted += stats.norm.logpdf(held[:, 2], train[:, 2].mean(), train[:, 2].std()).mean()
    ones = train[:, 3].sum()
    shares = np.log(np.array([len(train) - ones + 1, ones + 1]) / (len(train) + 2))
    wanted += shares[held[:, 3].astype(int)].mean()
    assert found.log_likelihood == pytest.approx(wanted, abs=1e-3)
    # A normal density of a column of zeros is above 1, which no probability is.
    assert independent_counts(data.train.x[:, 1:2], data.test.x[:, 1:2]) < 0


def test_full_turns_of_some_rows_do_not_change_the_baseline_of_a_circular_column():
    one, other = mixed_table(), mixed_table(turns=3)
    values = [of_table(d.schema, d.train.x, d.test.x, 1).log_likelihood for d in (one, other)]
    assert values[0] == pytest.approx(values[1], abs=1e-4)


def test_missing_counts_and_angles_add_nothing():
    data = mixed_table(holes=True)
    found = of_table(data.schema, data.train.x, data.test.x, 1).log_likelihood
    known, held = (part.x.double().numpy()[:, 0] for part in (data.train, data.test))
    wanted = np.nansum(von_mises(known[~np.isnan(known)], held)) / len(held)
    counts = [x[:, 1:2][~x[:, 1].isnan()] for x in (data.train.x, data.test.x)]
    wanted += independent_counts(*counts) * len(counts[1]) / len(held)
    rest = [x[:, 2:] for x in (data.train.x, data.test.x)]
    few = data.schema.changed({"hour": "ignored", "rare": "ignored"})
    wanted += of_table(few, *rest, 1).log_likelihood
    assert found == pytest.approx(wanted, abs=1e-3)
