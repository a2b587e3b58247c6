"""Sums over latents in ``pyro.markov`` and in inner plates: by hand, and as in stock Pyro."""

import warnings
from unittest import mock

import pyro
import pyro.distributions as dist
import pytest
import torch
from factored_pairs import MARKED, PAIRS, WORDS, Hmm, K, Tones, made
from pairs import ENUMERATED, make, rows
from pyro.infer import TraceEnum_ELBO
from pyro.infer.autoguide import AutoDiscreteParallel
from torch import nn

import pyro_vae as pv
from pyro_vae.inference.joint import Joint
from pyro_vae.inference.weighted import weighted
from pyro_vae.pairs import factored_sums
from pyro_vae.pairs.enumeration import traces
from pyro_vae.pairs.rng import seeded
from pyro_vae.pairs.scope import registered, scope, using
from pyro_vae.pairs.summing import log_ratio
from pyro_vae.pairs.weights import log_weights, structure
from pyro_vae.training import elbo
from pyro_vae.training.recording import ELBOParts, recorded

every_pair = pytest.mark.parametrize("name", PAIRS)


def taken(pair, batch, objective, beta=1.0):
    """The loss, the gradients and the parts of the ELBO of one step."""
    pair.zero_grad()
    parts, weight = ELBOParts(), pv.KLWeight(beta)
    with scope(pair), seeded(3):
        measured = recorded(objective, parts)
        model = registered(pair, pair.model)
        loss = measured.loss_and_grads(weight(model), weight(pair.guide), *batch)
    return loss, {name: p.grad for name, p in pair.named_parameters()}, parts


def total(sums):
    return sum(float(value) for value in sums.values())


def exact(pair, batch):
    with torch.no_grad():
        return pair.log_p(*batch)


@every_pair
@pytest.mark.parametrize(("particles", "side_by_side"), [(1, False), (2, True)])
def test_loss_and_gradients_are_those_of_stock_pyro(name, particles, side_by_side):
    pair, batch = made(name)
    options = {
        "num_particles": particles,
        "vectorize_particles": side_by_side,
        "max_plate_nesting": 2,
    }
    ours = taken(pair, batch, pv.EnumeratedELBO(**options))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pyro warns of plates that the guide does not enter
        stock = taken(pair, batch, TraceEnum_ELBO(**options))
    assert ours[0] == pytest.approx(stock[0], rel=1e-10)
    for parameter, gradient in stock[1].items():
        torch.testing.assert_close(ours[1][parameter], gradient, rtol=1e-9, atol=1e-9)
    assert total(ours[2].reconstruction) - total(ours[2].kl) == pytest.approx(-ours[0])


@every_pair
def test_log_likelihood_is_the_sum_by_hand(name):
    pair, batch = made(name)
    assert not pv.check(pair, batch).errors
    found = pv.log_likelihood(pair, *batch, num_samples=3000 if name == "Tones" else 3)
    with using(pair, 0):
        assert structure(pair, batch)[1]
    if name == "Tones":  # the code is drawn
        off = (found.per_datum - exact(pair, batch)) / found.standard_errors
        assert off.abs().max() < 5
        return
    torch.testing.assert_close(found.per_datum, exact(pair, batch))
    assert found.standard_errors.max() < 1e-6
    single = tuple(part[:1] for part in batch)  # a data plate of size 1
    torch.testing.assert_close(pv.log_likelihood(pair, *single).per_datum, exact(pair, single))


@pytest.mark.parametrize("name", ENUMERATED)
@pytest.mark.parametrize("beta", [1.0, 0.3, 0.0])
def test_the_two_ways_to_sum_agree(name, beta):
    """Sums over a list of values and factored sums, on pairs that allow both."""
    pair, batch = make(name), rows(name, 8)

    def both():
        with seeded(1), torch.no_grad():
            weights = log_weights(pair, batch, 4)
        options = {"num_particles": 2, "vectorize_particles": True}
        return weights, *taken(pair, batch, pv.EnumeratedELBO(**options), beta)

    listed = both()
    with (
        mock.patch.object(factored_sums, "is_factored", return_value=True),
        mock.patch.object(elbo, "is_factored", return_value=True),
    ):
        factored = both()
    torch.testing.assert_close(factored[0], listed[0])
    assert factored[1] == pytest.approx(listed[1], rel=1e-10)
    for parameter, gradient in listed[2].items():
        torch.testing.assert_close(factored[2][parameter], gradient, rtol=1e-9, atol=1e-9)
    for part in ("reconstruction", "kl"):
        sums = [getattr(found[3], part) for found in (listed, factored)]
        assert total(sums[0]) == pytest.approx(total(sums[1]))


@pytest.mark.parametrize("beta", [0.4, 0.0])
def test_beta_weighs_the_joint_kl_of_the_states(beta):
    pair, (x,) = made("Hmm")
    loss, gradients, parts = taken(pair, (x,), pv.EnumeratedELBO(), beta)
    pair.zero_grad()
    prior, seen = pair.paths(x)
    log_r = (prior + seen).log_softmax(0)
    kl = (log_r.exp() * (log_r - prior)).sum()
    by_hand = beta * kl - (log_r.exp() * seen).sum()
    by_hand.backward()
    assert loss == pytest.approx(by_hand.item())
    for name, parameter in pair.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad)
    assert set(parts.kl) == {"s0 + s1 + s2 + s3"}
    assert total(parts.kl) == pytest.approx(kl.item())
    assert set(parts.reconstruction) == {"x0", "x1", "x2", "x3"}


class LeftToRight(Hmm):
    """States that never go back: some moves have probability 0."""

    def forbidden(self, x):
        return torch.tril(x.new_full((K, K), -torch.inf), -1)

    def model(self, x):
        with pyro.plate("data", len(x)):
            state = torch.zeros((), dtype=torch.long)
            for t in pyro.markov(range(self.steps)):
                move = dist.Categorical(logits=(self.moves + self.forbidden(x))[state])
                state = pyro.sample(f"s{t}", move, infer=MARKED)
                pyro.sample(f"x{t}", dist.Normal(self.locs[state], 1.0), obs=x[:, t])

    def log_p(self, x):
        emit = dist.Normal(self.locs, 1.0).log_prob(x[..., None])
        moves = (self.moves + self.forbidden(x)).log_softmax(-1)
        forward = moves[0] + emit[:, 0]
        for t in range(1, self.steps):
            parts = [(forward[:, : k + 1] + moves[: k + 1, k]).logsumexp(-1) for k in range(K)]
            forward = torch.stack(parts, -1) + emit[:, t]
        return forward.logsumexp(-1)


def test_impossible_values_take_no_part():
    with seeded(0):
        pair, x = LeftToRight().double(), torch.randn(6, 4).double()
    loss, gradients, parts = taken(pair, (x,), pv.EnumeratedELBO())
    pair.zero_grad()
    by_hand = -pair.log_p(x).sum()
    by_hand.backward()
    assert loss == pytest.approx(by_hand.item())
    for name, parameter in pair.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad)
    assert total(parts.reconstruction) - total(parts.kl) == pytest.approx(-loss)
    states = torch.stack(list(pv.encode(pair, x, what="draw").values()), -1)
    assert (states.diff(dim=-1) >= 0).all()


def test_a_joint_kl_of_many_latents_has_a_short_name():
    pair, (x,) = made("Factorial")
    assert list(pv.evaluate(pair, x, num_samples=1).kl_by_site) == ["a0 + ... + b2"]


def test_draws_are_joint_draws_of_the_posterior_and_modes_are_its_modes():
    pair, (x,) = made("Hmm", 2)
    number = 4000
    with torch.no_grad():
        posterior = sum(pair.paths(x)).softmax(0)
    drawn = pv.encode(pair, x.repeat(number, 1), what="draw")
    place = torch.tensor([27, 9, 3, 1])
    states = torch.stack([drawn[f"s{t}"] for t in range(4)], -1).reshape(number, 2, 4)
    path = (states * place).sum(-1)
    shares = torch.stack([(path == i).double().mean(0) for i in range(81)])
    error = (posterior * (1 - posterior) / number).sqrt()
    assert ((shares - posterior).abs() < 5 * error + 2 / number).all()
    modes = pv.encode(pair, x)
    for t in range(4):
        value = torch.arange(81) // place[t] % K
        marginal = torch.stack([posterior[value == k].sum(0) for k in range(K)], -1)
        torch.testing.assert_close(pv.predict(pair, x, site=f"s{t}"), marginal)
        assert torch.equal(modes[f"s{t}"], marginal.argmax(-1))


def test_latents_in_an_inner_plate_have_the_data_first():
    pair, (x,) = made("Classes")
    found = pv.encode(pair, x)
    assert {name: tuple(value.shape) for name, value in found.items()} == {"y": (6,), "k": (6, 4)}
    with torch.no_grad():  # the guide gives the class, and the words are independent given it
        logits = pair.mixed[found["y"]][:, None] + pair.topics.log_softmax(-1).mT[x]
    sure = pv.predict(pair, x).amax(1) > 0.95
    assert sure.any()
    assert torch.equal(found["k"][sure], logits.argmax(-1)[sure])


def test_a_graph_of_the_step_gives_the_same_fit_without_a_warning():
    fits = []
    for engine in ("eager", "traced"):
        pair, (x,) = made("Hmm")
        pair.steps, batch = 2, (x[:, :2],)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            pv.fit(pair, *batch, epochs=2, engine=engine, progress=False)
        fits.append(pair.state_dict())
    for parameter, value in fits[0].items():
        torch.testing.assert_close(value, fits[1][parameter])


def test_the_joint_density_sums_over_the_states_at_given_codes():
    pair, batch = made("Tones")
    assert isinstance(pair, Tones)
    joint = Joint(pair, tuple(part[:2] for part in batch))
    z = torch.linspace(-2, 2, 5, dtype=torch.float64)[:, None, None].expand(5, 6, 1)
    with using(pair, 0):
        found = joint.log_joint(z, *batch)
    prior = dist.Normal(0.0, 1.0).log_prob(z[..., 0])
    torch.testing.assert_close(found, prior + pair.given(z[:, :1, 0], *batch))


def test_a_sum_of_very_different_densities_is_exact():
    """In single precision, sums of exponentials without a shift of each term would underflow."""
    pair, (x,) = made("Hmm")
    pair, x = pair.float(), 300 * x.float()
    with torch.no_grad():
        pair.moves.mul_(100)
    found = pv.log_likelihood(pair, x, num_samples=1)
    truth = exact(pair.double(), (x.double(),))
    torch.testing.assert_close(found.per_datum, truth, rtol=1e-5, atol=0.0)


class Shared(nn.Module):
    """A choice for all data, which ``AutoDiscreteParallel`` enumerates."""

    def __init__(self):
        super().__init__()
        self.guide = AutoDiscreteParallel(self.model)

    def model(self, x):
        k = pyro.sample("k", dist.Categorical(torch.tensor([0.5, 0.5])))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(4.0 * k, 1.0), obs=x)

    def template(self, n):
        return (torch.zeros(n),)


class Words(nn.Module):
    """A topic for each word, which only the model has; words are independent."""

    def __init__(self):
        super().__init__()
        self.mixed, self.topics = nn.Parameter(torch.randn(K)), nn.Parameter(torch.randn(K, WORDS))

    def model(self, x):
        with pyro.plate("documents", len(x), dim=-1), pyro.plate("words", 4, dim=-2):
            k = pyro.sample("k", dist.Categorical(logits=self.mixed), infer=MARKED)
            pyro.sample("x", dist.Categorical(logits=self.topics[k]), obs=x.mT)

    def guide(self, x):
        pass

    def log_p_of_words(self, x):
        each = self.mixed.log_softmax(0)[:, None] + self.topics.log_softmax(-1)
        return each.logsumexp(0)[x]


def test_scores_of_words_are_those_by_hand():
    with seeded(0):
        pair, x = Words(), torch.randint(0, WORDS, (5, 4))
    found = pv.score(pair, x, num_samples=2000)
    with torch.no_grad():
        truth = pair.log_p_of_words(x)
    torch.testing.assert_close(found.log_likelihood.float(), truth.sum(1))
    torch.testing.assert_close(found.by_entry.float(), truth, atol=0.15, rtol=0.0)


def test_weighted_draws_keep_a_shared_choice():
    pair, x = Shared(), torch.linspace(-1, 5, 7)
    pv.check(pair, x)  # the guide makes its parameters
    for seed in range(6):
        with using(pair, seed):
            found = weighted(pair, (x,), 2, 1)
        truth = dist.Normal(4.0 * found.values["k"], 1.0).log_prob(x)
        torch.testing.assert_close(found.log_weights.float(), truth.expand(2, 7))


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.locs, self.logits = nn.Parameter(torch.randn(K)), nn.Parameter(torch.randn(K))

    def guide(self, x):
        pass

    def template(self, n):
        return (torch.zeros(n, 2),)

    def choice(self, name):
        return pyro.sample(name, dist.Categorical(logits=self.logits), infer=MARKED)


class Common(Base):
    def model(self, x):
        k = self.choice("k")
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(self.locs[k], 1.0).expand([2]).to_event(1), obs=x)


class Crossed(Base):
    def model(self, x):
        one, other = pyro.plate("one", 2, dim=-2), pyro.plate("other", 4, dim=-3)
        with pyro.plate("data", len(x)):
            with one:
                a = self.choice("a")
            with other:
                b = self.choice("b")
            with one, other:
                loc = self.locs[a] * self.locs[b]
                pyro.sample("x", dist.Normal(loc, 1.0), obs=x.mT.expand(4, 2, len(x)))


class Escaping(Base):
    def model(self, x):
        with pyro.plate("data", len(x)):
            with pyro.plate("words", 4, dim=-2):
                k = self.choice("k")
            loc = self.locs[k] if k.dim() > 2 else self.locs[k][0]
            loc = loc[..., None].expand(*loc.shape, 2)
            pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)


class Pooled(Base):
    def model(self, x):
        with pyro.plate("data", len(x)):
            with pyro.plate("words", 4, dim=-2):
                k = self.choice("k")
            loc = self.locs[k].sum(-2)[..., None]
            pyro.sample("x", dist.Normal(loc.expand(*loc.shape[:-1], 2), 1.0).to_event(1), obs=x)


class Named(Base):
    def model(self, x):
        with pyro.plate("data", len(x)), pyro.plate("particles", 2, dim=-2):
            pyro.sample("x", dist.Normal(self.locs[self.choice("k")], 1.0), obs=x.mT)


class Extra(Base):
    def model(self, x):
        with pyro.plate("data", len(x)), pyro.plate("words", 2, dim=-2):
            loc = self.locs[self.choice("k")]
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x.mT)
            mark = {"is_auxiliary": True}
            pyro.sample("extra", dist.Normal(loc, 2.0), obs=x.mT, infer=mark)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (Common, "latent site 'k' is outside the data plate and only the model has it"),
        (Crossed, "enumerated sites of plates that are not nested (data, one, other)"),
        (Escaping, "depends on an enumerated site in plate 'words' but is outside this plate"),
        (Pooled, "belongs neither to a plate nor to an enumerated site"),
        (Named, "plate 'particles' has a name that the tools use themselves: rename it"),
        (Extra, "auxiliary site 'extra' depends on an enumerated site"),
    ],
)
def test_sums_that_would_be_wrong_are_refused_in_one_line(kind, words):
    pair, x = kind(), torch.randn(6, 2)
    for tool in (
        lambda: pv.fit(pair, x, epochs=1, progress=False),
        lambda: pv.evaluate(pair, x, num_samples=2),
    ):
        with pytest.raises(pv.UsageError) as said:
            tool()
        assert words in str(said.value)
        assert "\n" not in str(said.value)


def test_a_shared_latent_that_the_guide_lacks_is_refused_by_sample():
    with pytest.raises(pv.UsageError, match="the guide does not have it: add it to the guide"):
        pv.sample(Common(), 3)


def test_tools_that_list_values_say_what_to_use_instead():
    pair, batch = made("Hmm")
    with using(pair, 0), pytest.raises(pv.UsageError, match="cannot list the combinations"):
        log_ratio(*traces(pair, batch, 1))
