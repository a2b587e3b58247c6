"""`score` and `impute` in a group of processes: each takes some rows, and all have all results."""

import torch
from test_globals_in_rows import SPREAD, Pooled, Shared

import pyro_vae as pv
from pyro_vae.models.exact import linear_gaussian
from pyro_vae.pairs.processes import single

HOLES = torch.linspace(-2, 2, 62).reshape(31, 2).sin()
HOLES[::3, 1] = torch.nan


def said(call):
    try:
        return call()
    except pv.UsageError as error:
        return str(error)


def equal(some, others):
    names = vars(some)
    tensors = [(getattr(some, n), getattr(others, n)) for n in names]
    return all(
        torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)) if torch.is_tensor(a) else a == b
        for a, b in tensors
    )


def test_scores_are_those_of_the_marginal_in_the_order_of_the_rows(in_two):
    """Also of fewer rows than processes. The guide is exact, so log p(x) has no error."""
    pair = linear_gaussian()
    x = pair.marginal().sample((31,))

    def work(rank):
        return [pv.score(pair, x[:n], num_samples=100) for n in (31, 1)]

    first, second = in_two(work)
    wanted = pair.marginal().log_prob(x)
    for one, other in zip(first, second, strict=True):
        assert equal(one, other)
        found = one.log_likelihood
        torch.testing.assert_close(found, wanted[: len(found)].double(), rtol=1e-4, atol=1e-4)
        assert one.by_entry.shape == x[: len(found)].shape
        assert bool(one.by_entry.isfinite().all())


def test_imputations_are_shared(in_two):
    """Rows without holes stay as they are; of a pair with a global latent, too."""

    def work(rank):
        return [pv.impute(Shared(), HOLES[:n], num_samples=2000, draws=4) for n in (31, 2, 1)]

    first, second = in_two(work)
    missing = HOLES.isnan()
    for one, other in zip(first, second, strict=True):
        assert equal(one, other)
        n = len(one.mean)
        assert torch.equal(one.missing, missing[:n])
        assert torch.equal(one.mean[~missing[:n]], HOLES[:n][~missing[:n]])
        assert one.draws.shape == (4, n, 2)
        # The missing entry is w plus noise, w has its prior as its posterior, and 95 draws.
        assert one.mean[missing[:n]].abs().max() < 5 / 95**0.5
        assert bool((one.high - one.low)[missing[:n]].min() > 2 * SPREAD)
    alone = pv.impute(Shared(), HOLES[:1], num_samples=2000, draws=4)
    assert equal(one, alone)  # the first process has the seed


def test_what_cannot_be_shared_is_refused_by_all(in_two):
    """A guide that pools rows would pool those of each process: here a single row."""

    def work(rank):
        other, bad = HOLES[: 20 - rank], HOLES.clone()
        if rank:
            bad[5] = torch.nan
        return [
            said(lambda: pv.score(Pooled(), HOLES[:2], num_samples=50)),
            said(lambda: pv.impute(Pooled(), HOLES[:2], num_samples=50)),
            said(lambda: pv.score(Shared(), other, num_samples=50)),
            said(lambda: pv.log_likelihood(Shared(), other, num_samples=50)),
            said(lambda: pv.evaluate(Shared(), HOLES + 0.1 * rank, num_samples=5)),
            said(lambda: pv.impute(Shared(), bad, num_samples=50)),
            said(lambda: pv.impute(Shared(), HOLES[1:3], num_samples=50)),
        ]

    for rank, found in enumerate(in_two(work)):
        pooled, also, *others, bad, whole = found
        assert "computes 'w' from the rows that it is given" in pooled
        assert "computes 'w' from the rows that it is given" in also
        assert all(words.startswith("process 1 has other data than process 0") for words in others)
        assert bad.startswith("x has no observed entry in row 5" if rank else "process 1 of 2 stop")
        assert whole == "x has no missing entry, so nothing is to be imputed"


def test_within_single_a_process_scores_and_imputes_alone(in_two):
    """As in a function of `on_epoch`, which the other process does not call."""

    def work(rank):
        with single():
            if rank == 0:
                return [
                    pv.score(Shared(), HOLES, num_samples=50),
                    pv.impute(Shared(), HOLES, num_samples=50),
                ]
        return None

    found, nothing = in_two(work)
    assert nothing is None
    assert equal(found[0], pv.score(Shared(), HOLES, num_samples=50))
    assert equal(found[1], pv.impute(Shared(), HOLES, num_samples=50))
