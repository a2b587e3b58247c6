"""The checks of kinds, errors and sample sizes in the self-test fail if an estimator is wrong."""

from importlib import import_module

import pytest

from pyro_vae.diagnostics import selftest
from pyro_vae.pairs.rng import seeded


def run(group):
    with seeded(0):
        return list(selftest.CHECKS[group]())


def failed(group):
    return [check.name for check in run(group) if not check.passed]


def changed(monkeypatch, module, name, by):
    """Replace a function by one whose result is changed."""
    holder = import_module(module)
    original = getattr(holder, name)
    monkeypatch.setattr(holder, name, lambda *a, **k: by(original(*a, **k)))


SPOILED = [
    # the module, its function, the change, the group, and the check that must fail
    (
        "pyro_vae.inference.datum_weights",
        "relative_error",
        lambda error: error / 2,
        "errors of data",
        "errors hold: log p(x) of a datum",
    ),
    (
        "pyro_vae.diagnostics.local_moments",
        "_jackknife",
        lambda both: (both[0], both[1] / 2),
        "errors of data",
        "errors hold: shift of the guide",
    ),
    (
        "pyro_vae.inference.importance",
        "_error_of_mean",
        lambda error: error / 2.5,
        "errors of means",
        "errors hold: log p(x)",
    ),
    (
        "pyro_vae.inference.chains",
        "_effective",
        lambda size: size * 1.2,
        "effective sample sizes",
        "effective sample size, autocorrelation 0.5",
    ),
    (
        "pyro_vae.inference.joint",
        "_log_det",
        lambda term: term * 0,
        "a constrained latent",
        "annealing, a positive latent",
    ),
    (
        "pyro_vae.inference.weighted",
        "by_datum",
        lambda term: term + 0.1,
        "a class and a place",
        "log p(x) of score, a class and a place",
    ),
    (
        "pyro_vae.inference.datum_weights",
        "_shapes",
        lambda shapes: shapes - 0.3,
        "a heavy tail",
        "a normal guide of a heavy tail is named",
    ),
]


@pytest.mark.sample(3)
@pytest.mark.parametrize(("module", "name", "by", "group", "seen"), SPOILED)
def test_a_wrong_estimator_or_error_is_seen(monkeypatch, module, name, by, group, seen):
    changed(monkeypatch, module, name, by)
    assert seen in failed(group)
