"""What is computed and said of prior tails, by hand: at and beside each limit."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from test_prior_tail import Prior, tails_at

from pyro_vae.inference import prior_tail
from pyro_vae.inference.prior_tail import (
    CONFLICT,
    DRAWS,
    SINGLE,
    PriorTails,
    in_tail,
    prior_tails,
    resampled,
)
from pyro_vae.pairs.scope import using


def tails(rows, prior_draws=torch.inf, left_out=None):
    """Tails of one element "a", or of "a" and "b", at each draw."""
    table = torch.tensor(rows, dtype=torch.double)
    count = torch.full((table.shape[1],), prior_draws, dtype=torch.double)
    return PriorTails(("a", "b")[: table.shape[1]], table, count, left_out or {})


def test_p_values_are_twice_the_mean_times_the_number_of_elements():
    found = tails([[0.01, 0.4], [0.03, 0.8]])
    assert found.p_values.tolist() == pytest.approx([2 * 2 * 0.02, 1.0])
    few = tails([[0.01], [0.03]], prior_draws=100)
    assert few.p_values.tolist() == pytest.approx([2 * 0.02 + 2 / (2 * 100)])


def test_a_p_value_at_the_limit_is_no_conflict():
    assert tails([[CONFLICT / 2]] * 4).conflicts == {}
    assert tails([[CONFLICT / 2.01]] * 4).conflicts == {"a": pytest.approx(CONFLICT / 1.005)}


def test_an_element_is_unchecked_if_the_least_p_value_is_at_the_limit():
    assert tails([[1.0]] * 2, prior_draws=1000).unchecked == ("a",)
    assert tails([[1.0]] * 2, prior_draws=1001).unchecked == ()


def test_the_words_say_what_conflicts_and_what_is_not_compared():
    found = tails([[1.17e-6, 0.5]] * 4, left_out={"c": "it has no density"})
    assert str(found) == (
        "the posterior of 'a' lies in the tail of the prior (p 5e-06); prior and posterior are "
        "not compared for 'c': it has no density"
    )


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ("a", "'a'"),
        ("ab", "'a' and 'b'"),
        ("abc", "'a', 'b' and 'c'"),
        ("abcd", "'a', 'b', 'c' and 1 more"),
        ("abcdef", "'a', 'b', 'c' and 3 more"),
    ],
)
def test_three_elements_are_named(names, words):
    told = in_tail({name: 10.0 ** (-5 - i) for i, name in enumerate(names)})
    least = f"1e-{4 + len(names):02d}"
    assert told == f"the posterior of {words} lies in the tail of the prior (p {least})"


def normal_tails(values):
    """Tails of draws of w under N(0, 1), and what is exact."""
    pair, w = Prior(dist.Normal(torch.zeros(()), 1.0)), torch.tensor(values).double()
    with using(pair, 0):
        found = prior_tails(pair, (torch.zeros(3, 1),), {"w": w})
    return found.tails[:, 0], torch.erfc(w / 2**0.5)


def test_each_draw_has_a_tail_and_of_many_draws_evenly_spaced_ones_do():
    some, exact = normal_tails([0.5, 1.0, 1.5])
    assert some.tolist() == pytest.approx(exact.tolist())
    many, exact = normal_tails([i / 100 for i in range(2 * DRAWS - 1)])
    assert many.tolist() == pytest.approx(exact[::2].tolist())
    assert len(many) == DRAWS


def test_a_site_of_a_thousand_numbers_is_compared_by_number():
    for size, elements in ((SINGLE, SINGLE), (SINGLE + 1, 1)):
        found = tails_at(dist.Normal(torch.zeros(size), 1.0).to_event(1), torch.ones(size), 2)
        assert len(found.elements) == elements
    assert SINGLE == 1000


class Steps(dist.TorchDistribution):
    """0 or 1, with log densities that differ by ``step``."""

    arg_constraints, support = {}, dist.constraints.real

    def __init__(self, base, step, shape=()):
        self.base, self.step = base, step
        super().__init__(torch.Size(shape), validate_args=False)

    def sample(self, sample_shape=()):
        return torch.rand(*sample_shape, *self.batch_shape).round()

    def log_prob(self, value):
        return (self.base + self.step * value).double()

    def expand(self, batch_shape, _instance=None):
        return Steps(self.base, self.step, batch_shape)


@pytest.mark.parametrize("base", [0.0, -100.0, 100.0])
def test_log_densities_are_equal_within_rounding_of_one_or_of_their_size(base):
    size = max(1.0, abs(base))
    for step, tail in ((0.9e-4, 1.0), (1.1e-4, 0.5)):
        found = tails_at(Steps(base, step * size), torch.zeros(()), 20)
        assert found.tails.mean().item() == pytest.approx(tail, abs=0.02)


def test_masked_elements_of_priors_without_a_closed_form_are_not_in_the_tail():
    class Masked(Prior):
        def model(self, x):
            with pyro.plate("groups", 2, dim=-1), pyro.poutine.mask(mask=self.known):
                pyro.sample("w", self.prior)

    pair = Masked(dist.Gamma(torch.full((2,), 2.0), 1.0))
    pair.known = torch.tensor([True, False])
    with using(pair, 0):
        found = prior_tails(pair, (torch.zeros(3, 1),), {"w": torch.full((5, 2), 60.0)})
    assert found.tails.tolist() == [[0.0, 1.0]] * 5


def test_the_number_of_draws_of_the_prior_fits_into_memory(monkeypatch):
    monkeypatch.setattr(prior_tail, "CELLS", 10)
    for size, number in ((1, 10), (3, 3), (30, 1)):
        prior = dist.Gamma(torch.full((size,), 2.0), 1.0)
        assert tails_at(prior, torch.ones(size), 2).prior_draws.tolist() == [number] * size


def test_systematic_resampling_takes_the_middle_of_each_share():
    """The points 1/8, 3/8, 5/8, 7/8 on the cumulated shares."""
    for total in (1.0, 2.0):
        for shares, chosen in (
            ([0.5, 0.0, 0.25, 0.25], [0, 0, 2, 3]),
            ([0.1, 0.4, 0.5], [1, 1, 2, 2]),
            ([0.2, 0.8], [0, 1, 1, 1]),
        ):
            assert resampled(total * torch.tensor(shares), 4).tolist() == chosen
