"""Which ELBO a pair gets, and where a weight on the KL is refused."""

import pytest
from pairs import ENUMERATED, make, rows
from pyro.infer import Trace_ELBO, TraceEnum_ELBO

import pyro_vae as pv
from pyro_vae.training.elbo import EnumeratedELBO, elbo, require_weighable


@pytest.mark.parametrize("name", ["bernoulli", "params", *ENUMERATED])
def test_a_pair_that_sums_latents_out_has_the_enumerated_elbo(name):
    found = elbo(make(name), rows(name, 2))
    assert type(found) is (EnumeratedELBO if name in ENUMERATED else Trace_ELBO)
    assert found.num_particles == 1
    assert not found.vectorize_particles
    assert elbo(make(name), rows(name, 2), 3).num_particles == 3


def half(epoch):
    return 0.5


@pytest.mark.parametrize("beta", [1, 1.0, 0.0, 0.5, 2.0, half])
@pytest.mark.parametrize("kind", [None, Trace_ELBO, EnumeratedELBO, TraceEnum_ELBO])
def test_stock_enumeration_alone_takes_no_weight_on_the_kl(kind, beta):
    objective = None if kind is None else kind()
    if kind is TraceEnum_ELBO and beta != 1:
        with pytest.raises(pv.UsageError):
            require_weighable(objective, beta)
    else:
        require_weighable(objective, beta)
