"""The counter-based generator: its reference, its quality, and what it replaces."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import stats

from pyro_vae import compat
from pyro_vae.pairs.noise import COUNTED_BITS, CounterDraws, SiteNoise, bits, new_key
from pyro_vae.pairs.rng import seeded

N = 200_000


def squares64(counter: int, key: int) -> int:
    """Widynski's algorithm with whole numbers of Python."""
    mask = 2**64 - 1

    def swapped(x: int) -> int:
        return (x >> 32 | x << 32) & mask

    y = counter * key & mask
    z = (y + key) & mask
    x = swapped((y * y + y) & mask)
    x = swapped((x * x + z) & mask)
    x = swapped((x * x + y) & mask)
    last = (x * x + z) & mask
    x = swapped(last)
    return last ^ ((x * x + y) & mask) >> 32


def keys(number: int) -> list[torch.Tensor]:
    with seeded(3):
        return [new_key() for _ in range(number)]


def test_bits_are_those_of_the_published_algorithm():
    counters = [1, 2, 3, 10**6, 2**40 + 5, 7 * 2**40 + 12345]
    for key in keys(5):
        found = bits(key, torch.tensor(counters))
        assert [int(b) % 2**64 for b in found] == [squares64(c, int(key)) for c in counters]


@pytest.mark.parametrize("first", [1, 7 * 2**40 + 12345])
def test_the_operation_for_many_counters_gives_these_bits(first):
    for key in keys(3):
        found = COUNTED_BITS(key, first, 5)
        assert [int(b) % 2**64 for b in found] == [squares64(first + i, int(key)) for i in range(5)]
    assert COUNTED_BITS(key, first, 0).shape == (0,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_uniform_draws_are_uniform(dtype):
    for key in keys(3):
        u = CounterDraws(key).uniform((N,), dtype)
        assert u.min() >= 0
        assert u.max() < 1
        assert stats.kstest(u.double().numpy(), "uniform").pvalue > 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_normal_draws_are_normal(dtype):
    for key in keys(3):
        z = CounterDraws(key).normal((N,), dtype).double()
        assert stats.kstest(z.numpy(), "norm").pvalue > 1e-4
        for power, moment in ((1, 0), (2, 1), (3, 0), (4, 3), (6, 15)):
            spread = math.sqrt(math.prod(range(1, 2 * power, 2)) / N)
            assert abs(float((z**power).mean()) - moment) < 5 * spread


def test_each_bit_is_fair_and_uncorrelated_with_the_next_draw():
    found = bits(keys(1)[0], torch.arange(1, N + 1))
    ones = torch.stack([(found >> b) & 1 for b in range(64)]).double()
    assert (ones.mean(1) - 0.5).abs().max() < 5 * 0.5 / math.sqrt(N)
    spins = 2 * ones - 1
    for lag in (1, 2, 64, 784):
        correlation = spins[:, lag:] @ spins[:, :-lag].t() / N
        assert correlation.abs().max() < 6 / math.sqrt(N)


def test_neighboring_pairs_fill_the_square_evenly():
    u = CounterDraws(keys(1)[0]).uniform((2 * N,), torch.float32).view(N, 2)
    cells = (u * 32).long()
    counts = torch.bincount(cells[:, 0] * 32 + cells[:, 1], minlength=1024)
    assert stats.chisquare(counts.numpy()).pvalue > 1e-4


def test_birthday_spacings():
    """Marsaglia's test: repeated spacings of m sorted birthdays in n days are Poisson(m^3 / 4n)."""
    total, days, m = 0, 2**32, 4096
    for key in keys(20):
        birthdays = (bits(key, torch.arange(1, m + 1)) >> 32).sort().values
        spacings = birthdays.diff().sort().values
        total += int((spacings.diff() == 0).sum())
    expected = 20 * m**3 / (4 * days)
    assert 1e-4 < stats.poisson.cdf(total, expected) < 1 - 1e-4


def test_keys_steps_and_sites_are_independent():
    draws = [CounterDraws(key) for key in keys(2)]
    rows = torch.stack([d.normal((N,), torch.float32) for d in draws for _ in range(2)])
    correlation = torch.corrcoef(rows) - torch.eye(4)
    assert correlation.abs().max() < 5 / math.sqrt(N)
    assert len(set(map(int, keys(1000)))) == 1000


def test_torchs_generator_determines_the_keys():
    with seeded(7):
        first = new_key()
    with seeded(7):
        assert new_key() == first


FAMILIES = [
    dist.Normal(1.0, 2.0),
    dist.LogNormal(0.0, 0.5),
    dist.Uniform(2.0, 5.0),
    dist.Exponential(3.0),
    dist.Laplace(1.0, 2.0),
    dist.Gumbel(0.0, 1.0),
    dist.Cauchy(0.0, 1.0),
    dist.Weibull(2.0, 1.5),
    dist.Logistic(0.0, 1.0),
]


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: type(f).__name__)
def test_distributions_draw_from_their_law_without_torchs_generator(family):
    before = torch.get_rng_state()
    with CounterDraws(torch.tensor(987654321987654321)):
        x = family.sample((20_000,))
    assert torch.equal(torch.get_rng_state(), before)
    assert stats.kstest(family.cdf(x).double().numpy(), "uniform").pvalue > 1e-4


def test_bernoulli_draws_have_their_probability():
    p = torch.full((N,), 0.3)
    with CounterDraws(torch.tensor(77777777777777777)):
        drawn = [torch.bernoulli(p), dist.Bernoulli(p).sample(), torch.empty(N).bernoulli_(0.3)]
    for x in drawn:
        assert set(x.unique().tolist()) == {0.0, 1.0}
        assert abs(float(x.mean()) - 0.3) < 5 * math.sqrt(0.21 / N)


def test_other_draws_keep_torchs_generator():
    with seeded(1):
        expected = dist.Gamma(2.0, 1.0).sample((5,)), torch.randperm(9)
    with seeded(1), CounterDraws(torch.tensor(5)):
        found = dist.Gamma(2.0, 1.0).sample((5,)), torch.randperm(9)
    assert all(map(torch.equal, expected, found))
    own = torch.Generator().manual_seed(4)
    with CounterDraws(torch.tensor(5)):
        drawn = torch.randn(4, generator=own)
    assert torch.equal(drawn, torch.randn(4, generator=torch.Generator().manual_seed(4)))


def test_only_the_sites_of_a_program_draw_from_the_key():
    def program() -> torch.Tensor:
        return torch.stack([pyro.sample("z", dist.Normal(0.0, 1.0)), torch.randn(())])

    found = []
    for seed in (1, 2):
        with seeded(seed), SiteNoise(CounterDraws(torch.tensor(5))):
            found.append(program())
    assert found[0][0] == found[1][0]
    assert found[0][1] != found[1][1]


def test_an_observed_site_keeps_its_value():
    with SiteNoise(CounterDraws(torch.tensor(5))):
        assert pyro.sample("x", dist.Normal(0.0, 1.0), obs=torch.tensor(2.5)) == 2.5


def test_no_operand_is_used_twice_in_one_operation():
    """Inductor writes it out twice. With x * x, a step took 50 seconds to compile instead of 10."""
    graph = compat.make_graph(lambda key, n: [bits(key, n)], [new_key(), torch.arange(1, 9)])
    nodes = [node for node in graph.graph.nodes if node.op == "call_function"]
    assert len(nodes) > 20
    for node in nodes:
        assert len(node.all_input_nodes) == sum(isinstance(a, torch.fx.Node) for a in node.args)
