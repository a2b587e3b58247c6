"""The estimators: the contract of scikit-learn, and values of closed forms."""

import pickle
from functools import partial

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.decomposition import PCA
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import MinMaxScaler
from sklearn.utils.estimator_checks import check_estimator

import pyro_vae as pv
from pyro_vae.estimators import density

SMALL = {"hidden": (8,), "epochs": 1, "random_state": 0}


def correlated(n=200, seed=0):
    """Rows with two factors behind four columns of different units."""
    generator = np.random.default_rng(seed)
    factors = generator.normal(size=(n, 2)) @ [[1, 1, 1, 0.3], [0.3, 1, -1, 1]]
    return (factors + 0.3 * generator.normal(size=(n, 4))) * [1, 10, 0.1, 5] + [0, 50, 3, -20]


@pytest.fixture(scope="module")
def linear():
    """A linear VAE, fitted until it is probabilistic PCA of the standardized columns."""
    x = correlated()
    vae = pv.VAEEstimator(2, hidden=(), epochs=400, batch_size=50, learning_rate=2e-2)
    return vae.set_params(random_state=0).fit(x), x


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    "estimator", [pv.VAEEstimator(**SMALL, num_samples=5), pv.VAEImputer(**SMALL, num_samples=25)]
)
def test_the_estimators_keep_the_contract_of_scikit_learn(estimator, monkeypatch):
    fit = partial(density.fit_pair, engine="eager")  # a fit takes one step here, and a trace longer
    monkeypatch.setattr(density, "fit_pair", fit)
    check_estimator(estimator, on_skip=None)


def test_a_linear_vae_scores_like_probabilistic_pca(linear):
    vae, x = linear
    standard = (x - x.mean(0)) / x.std(0)
    exact = PCA(2).fit(standard).score(standard) - np.log(x.std(0)).sum()
    assert vae.score(x) == pytest.approx(exact, abs=0.06)
    assert vae.score(x) == pytest.approx(vae.score_samples(x).mean())


def test_codes_and_reconstructions_are_those_of_the_pair(linear):
    vae, x = linear
    codes = vae.transform(x)
    assert codes == pytest.approx(pv.encode(vae.pair_, x.astype(np.float32))["z"].numpy())
    back = vae.inverse_transform(codes)
    assert np.mean(((back - x) / x.std(0)) ** 2) < 0.1  # two factors carry over 90 %
    draws = vae.sample(4000)
    assert np.cov(draws.T / x.std(0)[:, None]) == pytest.approx(
        np.cov(x.T / x.std(0)[:, None]), abs=0.15
    )


def test_other_units_change_densities_by_their_jacobian_only():
    x = correlated(60)
    one = pv.VAEEstimator(**SMALL).fit(x)
    two = pv.VAEEstimator(**SMALL).fit(1000 * x + 7)
    assert two.transform(1000 * x + 7) == pytest.approx(one.transform(x), abs=1e-3)
    expected = one.score_samples(x) - 4 * np.log(1000)
    assert two.score_samples(1000 * x + 7) == pytest.approx(expected, abs=1e-2)


def test_pipelines_and_grid_searches_work():
    x = correlated(60)
    steps = make_pipeline(MinMaxScaler(), pv.VAEEstimator(**SMALL, num_samples=5))
    search = GridSearchCV(steps, {"vaeestimator__latent_dim": [1, 2]}, cv=2).fit(x)
    assert np.isfinite(search.cv_results_["mean_test_score"]).all()
    assert search.transform(x).shape == (60, search.best_params_["vaeestimator__latent_dim"])


def test_a_seed_repeats_and_a_fitted_estimator_can_be_pickled():
    x = correlated(60)
    one = pv.VAEEstimator(**SMALL).fit(x)
    two = clone(one).fit(x)
    three = pickle.loads(pickle.dumps(one))
    for other in (two, three):
        assert np.array_equal(one.transform(x), other.transform(x))
        assert np.array_equal(one.score_samples(x), other.score_samples(x))


# Imputation


def with_holes(x, share=0.2, seed=1):
    holes = np.random.default_rng(seed).random(x.shape) < share
    return np.where(holes, np.nan, x), holes


def normal_imputation(x, holes):
    """The conditional means of a normal distribution with the moments of complete rows."""
    mean, cov, filled = x.mean(0), np.cov(x.T), x.copy()
    for row, hole in zip(filled, holes, strict=True):
        if hole.any() and not hole.all():
            weights = np.linalg.solve(cov[np.ix_(~hole, ~hole)], (row - mean)[~hole])
            row[hole] = mean[hole] + cov[np.ix_(hole, ~hole)] @ weights
        elif hole.all():
            row[:] = mean
    return filled


def test_imputations_are_near_the_conditional_means_of_the_true_moments():
    x = correlated(400)
    damaged, holes = with_holes(x)
    imputer = pv.VAEImputer(
        2, hidden=(32,), epochs=150, batch_size=50, learning_rate=5e-3, random_state=0
    ).fit(damaged)
    filled = imputer.transform(damaged)
    assert np.array_equal(filled[~holes], x[~holes])
    scale = np.broadcast_to(x.std(0), x.shape)[holes]
    best = normal_imputation(x, holes)[holes]
    error = np.sqrt(np.mean(((filled[holes] - x[holes]) / scale) ** 2))
    least = np.sqrt(np.mean(((best - x[holes]) / scale) ** 2))
    assert 0.9 * least < error < 1.15 * least < 0.8  # column means have an error of 1
    found = imputer.impute(damaged, draws=30)
    inside = (found.low.numpy()[holes] <= x[holes]) & (x[holes] <= found.high.numpy()[holes])
    assert 0.8 < inside.mean() < 0.97


@pytest.mark.thorough
def test_draws_of_the_posterior_differ_from_call_to_call_and_means_do_not():
    damaged, holes = with_holes(correlated(60))
    means = pv.VAEImputer(**SMALL).fit(damaged)
    assert np.array_equal(means.transform(damaged), means.transform(damaged))
    draws = pv.VAEImputer(**SMALL, sample_posterior=True).fit(damaged)
    one, two = draws.transform(damaged), draws.transform(damaged)
    assert not (one[holes] == two[holes]).any()
    assert np.array_equal(one[~holes], two[~holes])
    assert np.array_equal(clone(draws).fit(damaged).transform(damaged), one)


def test_complete_rows_stay_and_empty_columns_are_refused():
    x = correlated(60)
    imputer = pv.VAEImputer(**SMALL).fit(x)
    assert np.array_equal(imputer.transform(x), x)
    with pytest.raises(pv.UsageError, match="no missing entry"):
        imputer.impute(x)
    x[:, 2] = np.nan
    with pytest.raises(pv.UsageError, match="column 2 of X has no observed entry"):
        pv.VAEImputer(**SMALL).fit(x)


def test_a_fit_does_not_change_the_likelihood_that_it_was_given():
    x = correlated(60)
    vae = pv.VAEEstimator(
        **SMALL | {"epochs": 5}, likelihood=pv.Gaussian(learned=True), num_samples=5
    )
    before = pickle.dumps(vae.likelihood.state_dict())
    scores = vae.fit(x).score_samples(x)
    assert pickle.dumps(vae.likelihood.state_dict()) == before
    assert np.array_equal(vae.fit(x).score_samples(x), scores)


@pytest.mark.parametrize("kind", [pv.VAEEstimator, pv.VAEImputer])
def test_numbers_that_single_precision_cannot_tell_apart_are_refused(kind):
    x = correlated(60)
    with pytest.raises(pv.UsageError, match=r"standard deviation .* cannot represent"):
        kind(**SMALL).fit(0.01 * x + 1e9)  # equal numbers after rounding


def test_a_grid_search_may_give_integers_and_floats_of_numpy(tmp_path):
    """`numpy.arange` is the usual grid, and its integers are not integers of Python."""
    grid = {"latent_dim": np.arange(1, 3), "epochs": np.array([1]), "hidden": [np.array([8])]}
    grid["learning_rate"] = np.array([1e-3], "float32")
    search = GridSearchCV(pv.VAEEstimator(random_state=0, num_samples=25), grid, cv=2)
    best = search.fit(correlated(40)).best_estimator_
    pv.save(best.pair_, tmp_path / "run")
    loaded = pv.load(tmp_path / "run")
    assert loaded.decoder.network.shapes == [(best.latent_dim,)]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"latent_dim": 2.0}, "sizes must be whole numbers, got 2.0"),
        ({"hidden": 8}, "hidden must be a tuple of integers, got 8"),
    ],
)
def test_sizes_that_are_not_whole_numbers_are_refused(options, words):
    with pytest.raises(pv.UsageError, match=words):
        pv.VAEEstimator(**SMALL | options).fit(correlated(20))


def test_codes_that_are_not_numbers_are_refused_as_by_scikit_learn(linear):
    vae, _ = linear
    for codes in (["ab", "cd"], [0.0, 1.0], [[np.nan, 0.0]]):
        with pytest.raises(ValueError):  # noqa: PT011 - the words are those of scikit-learn
            vae.inverse_transform(codes)
    read_only = np.zeros((2, 2))
    read_only.flags.writeable = False  # as the array of a data frame may be
    assert vae.inverse_transform(read_only).shape == (2, 4)
