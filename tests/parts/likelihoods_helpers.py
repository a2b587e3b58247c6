"""Families, data and helpers that the tests of likelihoods share."""

import pyro_vae as pv

DISCRETE = {
    "bernoulli": (pv.Bernoulli, 2),
    "categorical": (lambda: pv.Categorical(5), 5),
    "categorical-2": (lambda: pv.Categorical(2), 2),
    "discretized-logistic": (lambda: pv.DiscretizedLogistic(5), 5),
    "discretized-logistic-2": (lambda: pv.DiscretizedLogistic(2), 2),
    "logistic-mixture": (lambda: pv.DiscretizedLogistic(5, components=3), 5),
    "logistic-mixture-2": (lambda: pv.DiscretizedLogistic(2, components=2), 2),
}

CONTINUOUS = {
    "continuous-bernoulli": pv.ContinuousBernoulli,
    "gaussian": pv.Gaussian,
    "gaussian-bounded": lambda: pv.Gaussian(bounds=(0.1, 2.0)),
    "gaussian-fixed": lambda: pv.Gaussian(scale=0.3),
    "gaussian-learned": lambda: pv.Gaussian(scale=0.3, learned=True).double(),
}

FAMILIES = {name: make for name, (make, _) in DISCRETE.items() if name[-2:] != "-2"} | CONTINUOUS

# test_counts.py compares these with independent references; this file has general checks.
EVERY = FAMILIES | {
    "tokens": lambda: pv.Categorical(5, tokens=True),
    "student-t": pv.StudentT,
    "student-t-learned": lambda: pv.StudentT(3.0, learned=True).double(),
    "poisson": pv.Poisson,
    "negative-binomial": pv.NegativeBinomial,
    "zero-inflated": lambda: pv.NegativeBinomial(zero_inflated=True),
}
