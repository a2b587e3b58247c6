"""Every tool works for every pair: the library's models, and user pairs of each style."""

import copy
import warnings

import pyro
import pyro.optim
import pytest
import torch
from pairs import ALL, ENUMERATED, GLOBAL, LIKELIHOODS, OURS, UNORDERED, Params, make, rows
from pyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO

import pyro_vae as pv
from pyro_vae.data.order import Place
from pyro_vae.data.preparation import Preparation
from pyro_vae.data.sources import Arrays
from pyro_vae.pairs.model import global_latents
from pyro_vae.pairs.noise import CounterDraws, SiteNoise, new_key
from pyro_vae.pairs.rng import seeded
from pyro_vae.training.check import check
from pyro_vae.training.validation import bound

every_pair = pytest.mark.parametrize("name", [*ALL, *GLOBAL])
# The store and the generators do not depend on the likelihood.
every_style = pytest.mark.parametrize(
    "name", [name for name in (*ALL, *GLOBAL) if name == "bernoulli" or name not in LIKELIHOODS]
)
our_pairs = pytest.mark.parametrize("name", OURS)


def parameters(pair):
    return {name: p.detach().clone() for name, p in pair.named_parameters()}


def train(pair, batch, **settings):
    """A short run without a graph, because tracing costs more; test_engine compares the engines."""
    settings = {"epochs": 3, "batch_size": 16, "progress": False, "engine": "eager"} | settings
    settings = {"learning_rate": 0.01} | settings
    return pv.fit(pair, *batch, **settings)


@pytest.mark.sample(15)
@every_pair
def test_is_sound_and_every_parameter_is_trained(name):
    pair, batch = make(name), rows(name)
    report = check(pair, batch)
    assert str(report) == "the pair is sound"
    before = parameters(pair)
    history = train(pair, batch)
    after = parameters(pair)
    assert set(before) == set(after)
    for key in before:
        assert not torch.equal(before[key], after[key]), key
    assert history.epochs[-1].elbo == pytest.approx(
        history.epochs[-1].reconstruction - sum(history.epochs[-1].kl.values())
    )


@pytest.mark.sample(10)
@every_pair
def test_shapes_of_every_tool(name):
    pair, batch = make(name), rows(name, 7)
    x, context = batch[0], batch[1:]
    one = [part[:1] for part in context]
    assert pv.sample(pair, 5, *one).shape == (5, *x.shape[1:])
    assert pv.reconstruct(pair, *batch).shape == x.shape
    codes = pv.encode(pair, *batch)
    shared = global_latents(pair, batch)
    assert all(len(code) == 7 for site, code in codes.items() if site not in shared)
    assert set(shared) <= set(codes)
    decoded = pv.decode(pair, codes, *context)
    assert torch.allclose(decoded, pv.reconstruct(pair, *batch))
    lines = pv.interpolate(pair, x[:3], x[3:6], *[part[:3] for part in context], steps=4)
    assert lines.shape == (3, 4, *x.shape[1:])
    assert torch.allclose(lines[:, 0], decoded[:3])
    # Codes that only the model of "bags" has are modes of averages over draws, and other rows have
    # other draws: the last codes are those of all rows by chance only.
    if not context and name != "bags":
        assert torch.allclose(lines[:, -1], decoded[3:6])
    # In "bags" the site y is a float but one-hot, so it is not a real-valued code.
    real = [code for site, code in codes.items() if code.is_floating_point() and site != "y"]
    first = real[0]
    moved = pv.traverse(pair, x[:1], *one, values=[first[0].flatten()[0].item(), 2.0])
    assert moved.shape == (first[0].numel(), 2, *x.shape[1:])
    assert torch.allclose(moved[0, 0], decoded[0])
    result = pv.evaluate(pair, *batch, num_samples=3)
    assert result.num_examples == 7
    assert set(result.kl_by_site) == set(codes) - set(shared)


@pytest.mark.sample(14)
@pytest.mark.parametrize("name", [name for name in (*ALL, *GLOBAL) if name not in UNORDERED])
def test_sampling_is_that_of_the_prior_and_the_likelihood(name):
    pair, batch = make(name), rows(name, 7)
    one = [part[:1] for part in batch[1:]]
    draws = pv.sample(pair, 3000, *one, seed=1)
    means = pv.sample(pair, 3000, *one, means=True, seed=1)
    error = (draws - means).double()
    assert (error.mean(0).abs() < 5 * error.std(0) / 3000**0.5 + 1e-9).all()
    assert torch.equal(draws, pv.sample(pair, 3000, *one, seed=1))


@pytest.mark.sample(8)
@every_pair
def test_save_and_load_score_the_same_batch_to_the_last_bit(name, tmp_path):
    pair, batch = make(name), rows(name)
    train(pair, batch, out=tmp_path / "run")
    kind = None if name in OURS or name.startswith("bayesian") else type(pair)
    loaded = pv.load(tmp_path / "run", kind)
    want = pv.evaluate(pair, *batch, num_samples=4)
    assert pv.evaluate(loaded, *batch, num_samples=4) == want
    again = make(name, seed=9)
    pv.load(tmp_path / "run", again)
    assert pv.evaluate(again, *batch, num_samples=4) == want


@pytest.mark.sample(6)
@every_style
def test_evaluating_changes_nothing(name):
    pair, batch = make(name), rows(name)
    train(pair, batch, epochs=1)
    pyro.param("mine", torch.ones(()))
    torch.manual_seed(5)
    state, before = torch.get_rng_state(), copy.deepcopy(pair.state_dict())
    first = pv.evaluate(pair, *batch, num_samples=4)
    second = pv.evaluate(pair, *batch, num_samples=4)
    assert first == second
    assert torch.equal(torch.get_rng_state(), state)
    assert list(pyro.get_param_store()) == ["mine"]
    for key, value in pair.state_dict().items():
        assert torch.equal(value, before[key])


@pytest.mark.sample(8)
@every_style
def test_two_pairs_of_one_class_train_side_by_side(name):
    batch = rows(name)
    alone = make(name)
    train(alone, batch, epochs=2)
    left, right = make(name), make(name, seed=4)
    untouched = parameters(right)
    train(left, batch, epochs=2)
    for key, value in parameters(right).items():
        if key in untouched:
            assert torch.equal(value, untouched[key])
    train(right, batch, epochs=2)
    for key, value in parameters(left).items():
        assert torch.equal(value, parameters(alone)[key]), key
    assert len(pyro.get_param_store()) == 0


def stock_training(pair, batch, steps_seed, objective, epochs=3, batch_size=16):
    """Train with stock SVI on the same minibatches and draws as `fit`; one Adam per parameter."""
    pyro.clear_param_store()
    svi = SVI(pair.model, pair.guide, pyro.optim.Adam({"lr": 0.01}), loss=objective)
    losses = []
    with seeded(steps_seed):
        for epoch in range(epochs):
            total = 0.0
            for part in Arrays(batch).epoch(batch_size, Place(steps_seed, epoch)):
                with SiteNoise(CounterDraws(new_key())):
                    total += svi.step(*part)
            losses.append(-total / len(batch[0]))
    return losses


@pytest.mark.sample(10)
@pytest.mark.parametrize("name", [*OURS, "registered"])
def test_stock_svi_trains_the_same_step_for_step(name):
    batch = rows(name)
    ours, stock = make(name), make(name)
    fitted = None if name in ENUMERATED else Trace_ELBO()
    history = train(ours, batch, seed=3, beta=1.0, objective=fitted)
    objective = TraceEnum_ELBO(max_plate_nesting=1) if name in ENUMERATED else Trace_ELBO()
    losses = stock_training(stock, batch, 3, objective)
    assert history["objective"] == pytest.approx(losses, rel=1e-10)
    for key, value in parameters(stock).items():
        torch.testing.assert_close(value, parameters(ours)[key], rtol=1e-8, atol=1e-10)


def test_stock_svi_would_leave_plain_attributes_untrained():
    """This is why `fit` registers every parameter itself."""
    pair, batch = make("plain"), rows("plain")
    before = parameters(pair)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        stock_training(pair, batch, 3, Trace_ELBO())
    assert all(torch.equal(value, before[key]) for key, value in parameters(pair).items())


def test_parameters_of_pyro_param_become_the_pairs_own():
    pair, batch = make("params"), rows("params")
    train(pair, batch, epochs=1)
    names = [name for name, _ in pair.named_parameters()]
    assert "pyro_param.spread" in names
    assert "pyro_param.offsets/shift" in names
    spread = pair.get_parameter("pyro_param.spread").exp().item()
    assert spread != pytest.approx(1.2, abs=1e-6)
    copied = copy.deepcopy(pair)
    assert pv.evaluate(copied, *batch, num_samples=2) == pv.evaluate(pair, *batch, num_samples=2)


def test_constrained_parameters_stay_within_their_constraints():
    pair, batch = make("params"), rows("params")
    train(pair, batch, epochs=40, learning_rate=0.3)
    assert isinstance(pair, Params)
    assert (pair.width > 0).all()


def test_a_pair_without_a_plate_of_samples_is_weighted_sample_by_sample():
    class Flat(type(make("plain"))):
        def model(self, x):
            with pyro.plate("data", len(x), dim=-1):
                z = pyro.sample("z", pyro.distributions.Normal(x.new_zeros(2), 1.0).to_event(1))
                logits = self.decoder(z.reshape(len(x), 2))  # removes any dimension to the left
                pyro.sample("x", pyro.distributions.Bernoulli(logits=logits).to_event(1), obs=x)

    torch.manual_seed(0)
    plain, flat = make("plain"), Flat().double()
    flat.load_state_dict(plain.state_dict())
    (x,) = rows("plain", 10)
    a = pv.log_likelihood(plain, x, num_samples=300)
    b = pv.log_likelihood(flat, x, num_samples=300)
    assert abs(a.value - b.value) < 5 * (a.standard_error + b.standard_error)


def test_a_plate_of_samples_with_silently_wrong_values_is_detected():
    class Indexed(type(make("plain"))):
        def __init__(self, index):
            super().__init__()
            self.index = index

        def model(self, x):
            with pyro.plate("data", len(x), dim=-1):
                z = pyro.sample("z", pyro.distributions.Normal(x.new_zeros(2), 1.0).to_event(1))
                # With a leading dimension of samples, [:, :1] slices the batch and not the latent.
                first = z[..., :1] if self.index == "last" else z[:, :1]
                logits = 3 * first.sum(-1)[..., None] + self.decoder.bias
                likelihood = pyro.distributions.Bernoulli(logits=logits.expand(*z.shape[:-1], 6))
                pyro.sample("x", likelihood.to_event(1), obs=x)

    pairs = [Indexed("last").double(), Indexed("second").double()]
    pairs[1].load_state_dict(pairs[0].state_dict())
    (x,) = rows("plain", 10)
    right, wrong = (pv.log_likelihood(pair, x, num_samples=400) for pair in pairs)
    assert abs(right.value - wrong.value) < 5 * (right.standard_error + wrong.standard_error)


def test_discrete_latents_are_encoded_by_their_mode():
    class Discrete(type(make("plain"))):
        def model(self, x):
            with pyro.plate("data", len(x), dim=-1):
                k = pyro.sample("k", pyro.distributions.Categorical(torch.ones(3) / 3))
                logits = self.decoder(torch.eye(3, 2).double()[k])
                pyro.sample("x", pyro.distributions.Bernoulli(logits=logits).to_event(1), obs=x)

        def guide(self, x):
            with pyro.plate("data", len(x), dim=-1):
                pyro.sample("k", pyro.distributions.Categorical(logits=self.encoder(x)[:, :3]))

    pair, (x,) = Discrete().double(), rows("plain", 10)
    assert torch.equal(pv.encode(pair, x)["k"], pair.encoder(x)[:, :3].argmax(-1))
    assert torch.isfinite(pv.reconstruct(pair, x)).all()


@pytest.mark.sample(10)
@our_pairs
def test_bound_is_below_log_likelihood(name):
    pair, batch = make(name), rows(name)
    train(pair, batch, epochs=5)
    result = pv.evaluate(pair, *batch, num_samples=200)
    assert result.elbo < result.log_likelihood + 5 * 0.6 / (40 * 10) ** 0.5


def test_validation_bound_is_the_same_at_each_call():
    pair, batch = make("bernoulli"), rows("bernoulli")
    prepare = Preparation(torch.device("cpu"), torch.float64)
    args = (pair, Arrays(batch), prepare, Trace_ELBO())
    assert bound(*args) == bound(*args)
