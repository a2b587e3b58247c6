"""The engines against stock Pyro: the same losses, gradients, parameters; and what is refused."""

import copy
import random
import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pyro.optim
import pytest
import torch
from pairs import ALL, ENUMERATED, GLOBAL, LIKELIHOODS, make, rows
from pyro.infer import SVI, RenyiELBO, Trace_ELBO, TraceMeanField_ELBO
from torch import nn

import pyro_vae as pv
from pyro_vae.data import Preparation
from pyro_vae.engine import Engine, Step
from pyro_vae.optim import Optimizer
from pyro_vae.pairs import registered, scope
from pyro_vae.preflight import require
from pyro_vae.rng import seeded

OBJECTIVES = {
    "elbo": Trace_ELBO,
    "particles": lambda: Trace_ELBO(num_particles=3),
    "vectorized": lambda: Trace_ELBO(3, vectorize_particles=True, max_plate_nesting=1),
    "analytic": TraceMeanField_ELBO,
    "importance-weighted": lambda: pv.ImportanceWeightedELBO(4),
    "free-bits": lambda: pv.FreeBitsELBO(0.3),
    "sticking": pv.StickingTheLandingELBO,
    "doubly": lambda: pv.ImportanceWeightedELBO(4, gradient=pv.Gradient.DOUBLY_REPARAMETRIZED),
    "total-correlation": lambda: pv.TotalCorrelationELBO(19, 3.0, 0.5),
    "enumerated": pv.EnumeratedELBO,
    "enumerated-particles": lambda: pv.EnumeratedELBO(3),
    "enumerated-vectorized": lambda: pv.EnumeratedELBO(3, vectorize_particles=True),
}


class Normalized(nn.Module):
    """Batch normalisation and dropout: buffers that change, and a mode that matters."""

    def __init__(self):
        super().__init__()
        layers = (nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, 4))
        self.encoder, self.decoder = nn.Sequential(*layers), nn.Linear(2, 6)
        self.center = torch.full((6,), 0.5, dtype=torch.float64)

    def model(self, x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=self.decoder(z)).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x), dim=-1):
            loc, raw = self.encoder(x - self.center).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, nn.functional.softplus(raw)).to_event(1))


class Tied(nn.Module):
    """One weight in two places, one parameter that is fixed, and one that has no effect."""

    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = nn.Linear(6, 2), nn.Linear(2, 6)
        self.copied = nn.Linear(6, 2)
        self.copied.weight = self.encoder.weight
        self.encoder.bias.requires_grad_(False)
        self.unused = nn.Parameter(torch.ones(3))

    def model(self, x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), 0.7).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x), dim=-1):
            loc = self.encoder(x) + self.copied(x).tanh()
            pyro.sample("z", dist.Normal(loc, 0.5).to_event(1))


class Discrete(nn.Module):
    """A latent that is not reparametrised: the score-function terms of Trace_ELBO."""

    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = nn.Linear(6, 3), nn.Linear(3, 6)

    def model(self, x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Bernoulli(x.new_full((3,), 0.4)).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), 0.7).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Bernoulli(logits=self.encoder(x)).to_event(1))


MORE = {"normalized": Normalized, "tied": Tied, "discrete": Discrete}


def pair_of(name):
    if name not in MORE:
        return make(name)
    with seeded(0):
        return MORE[name]().double()


FEW = {
    "sticking": ("gaussian-learned", "deep-markov", "normalized"),
    "doubly": ("flows", "params", "tied"),
    "total-correlation": ("gaussian-learned", "conditional", "normalized"),
}
"""Objectives that meet a few pairs of each kind, to save time."""
SHARED = {
    "bayesian": ("elbo", "analytic", "free-bits", "sticking"),
    "bayesian-mixture": ("enumerated",),
    "weights": ("elbo", "vectorized"),
}
"""Objectives of pairs with latents outside the data plate."""
NUM_DATA = 25
"""How many data these are told that there are."""


def served(name, objective):
    """Whether an objective is one for this pair."""
    if name in GLOBAL:
        return objective in SHARED.get(name, ())
    if name == "bottom-up" and objective == "analytic":
        return False  # its guide draws from the data up, the model from the top down
    if objective in FEW:
        return name in FEW[objective]
    if name in ENUMERATED or objective.startswith("enumerated"):
        one = objective == "enumerated" or name == "semi-supervised"  # of particles one pair tells
        return name in ENUMERATED and objective.startswith("enumerated") and one
    if name == "discrete":
        return objective in ("elbo", "particles", "vectorized")
    if name in LIKELIHOODS:  # an objective looks at no likelihood: one, and a plate of samples
        return objective in ("elbo", "vectorized")
    if name in ("text", "deep-markov"):  # long graphs: plain, and with a plate of samples
        return objective in ("elbo", "importance-weighted")
    # Running means would be taken of the samples, too.
    return name != "normalized" or objective not in ("vectorized", "importance-weighted")


CASES = [(name, o) for name in (*ALL, *MORE, *GLOBAL) for o in OBJECTIVES if served(name, o)]


class Run:
    """A pair and what steps it; stock Pyro where ``engine`` is None."""

    def __init__(self, name, objective="elbo", engine=None, beta=0.7, **options):
        self.pair = pair = pair_of(name)
        self.batches = [rows(name, 12), rows(name, 7, seed=2)]
        objective = OBJECTIVES[objective]()
        require(pair, self.batches[0], objective)
        self.num_data = NUM_DATA if name in GLOBAL else None
        options |= {"num_data": self.num_data}
        self.engine = Engine(pair, objective, engine or "eager", declare=False, **options)
        self.engine.beta = beta
        self.parameters = {k: p for k, p in pair.named_parameters() if p.requires_grad}
        self.optimizer = Optimizer(torch.optim.Adam, self.parameters, 1e-2)
        model = registered(pair, pair.model)
        if engine is None:
            weight = self.weight = pv.KLWeight(beta)
            self.svi = SVI(weight(model), weight(pair.guide), self.optimizer, objective)
        else:
            self.svi = Step(model, pair.guide, self.optimizer, self.engine)

    def step(self, number, mode=True):
        """The loss and the gradients of one step, under a seed of its own."""
        kept = {}
        self.pair.train(mode)
        hooks = [
            p.register_post_accumulate_grad_hook(lambda p, k=k: kept.__setitem__(k, p.grad.clone()))
            for k, p in self.parameters.items()
            if p.requires_grad
        ]
        batch = self.batches[number % 3 == 2]
        if self.num_data and hasattr(self, "weight"):
            self.weight.global_weight = len(batch[0]) / self.num_data
        with scope(self.pair), seeded(number):
            loss = float(self.svi.step(*batch))
        for hook in hooks:
            hook.remove()
        grads = kept or {k: p.grad for k, p in self.parameters.items() if p.grad is not None}
        return loss, grads

    def state(self):
        return {k: v.clone() for k, v in self.pair.state_dict().items()}


def assert_same(a, b, tolerance=1e-8):
    (loss, grads), (other, others) = a, b
    assert loss == pytest.approx(other, rel=tolerance)
    for name, gradient in grads.items():
        close = max(tolerance, 1e-6) if gradient.dtype == torch.float32 else tolerance
        torch.testing.assert_close(others[name], gradient, rtol=close, atol=close)
    assert all(name in grads for name in others)


def assert_state(a, b, tolerance=1e-8):
    for name, value in a.state().items():
        torch.testing.assert_close(b.state()[name], value, rtol=tolerance, atol=tolerance, msg=name)


LONG = ("bernoulli", "params", "normalized")
"""Pairs that take 50 steps in both modes under every objective; the others do under the ELBO."""


@pytest.mark.parametrize(("name", "objective"), CASES)
def test_a_traced_step_is_that_of_stock_pyro(name, objective):
    """Two shapes, both modes, losses and every gradient; parameters and buffers at the end."""
    stock, traced = Run(name, objective), Run(name, objective, "traced")
    thorough = name in LONG or objective in ("elbo", "enumerated")
    for number in range(10):
        mode = number % 4 != 3 or not thorough
        assert_same(stock.step(number, mode), traced.step(number, mode))
    last = 50 if thorough else 12
    for number in range(10, last):
        stock.step(number), traced.step(number)
    assert_same(stock.step(last), traced.step(last), 1e-6)
    assert_state(stock, traced, 1e-6)
    assert traced.engine.engine == "traced"


COMPILED = [("bernoulli", "elbo"), ("normalized", "elbo"), ("params", "analytic")]
COMPILED += [("conditional", "importance-weighted"), ("tied", "particles")]
COMPILED += [("params", "doubly")]
COMPILED += [("semi-supervised", "enumerated")]


@pytest.mark.parametrize(("name", "objective"), COMPILED)
def test_a_compiled_step_is_that_of_stock_pyro(name, objective):
    stock, compiled = Run(name, objective), Run(name, objective, "compiled", batch_size=12)
    for number in range(6):
        assert_same(stock.step(number), compiled.step(number), 1e-6)
    for number in range(6, 200):
        stock.step(number), compiled.step(number)
    assert_state(stock, compiled, 1e-5)
    assert compiled.engine.engine == "compiled"


@pytest.mark.parametrize("name", ["bernoulli", "gaussian-learned", "full-rank", "params"])
def test_parameters_agree_after_200_steps(name):
    stock, traced = Run(name), Run(name, engine="traced")
    for number in range(200):
        stock.step(number), traced.step(number)
    assert_state(stock, traced, 1e-6)


def change_rate(run):
    run.optimizer.learning_rate = 0.2


def change_beta(run):
    run.engine.beta = 0.1
    if hasattr(run, "weight"):
        run.weight.weight = 0.1


def change_beta_to_a_tensor(run):
    run.engine.beta = torch.tensor(0.4)
    if hasattr(run, "weight"):
        run.weight.weight = torch.tensor(0.4)


def change_parameter(run):
    with torch.no_grad():
        run.pair.decoder.weight.mul_(1.5)


def change_buffer(run):
    run.pair.encoder[1].running_mean.add_(3.0)
    run.pair.eval()


def change_attribute(run):
    run.pair.center = torch.zeros(6, dtype=torch.float64)


def change_setting(run):
    run.pair.encoder[3].p = 0.9


def freeze(run):
    run.pair.decoder.bias.requires_grad_(False)
    run.pair.decoder.bias.grad = None


CHANGES = [change_rate, change_beta, change_beta_to_a_tensor, change_parameter, change_buffer]
CHANGES += [change_attribute, change_setting, freeze]


@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_between_steps_takes_effect(change):
    stock, traced, unchanged = (Run("normalized", engine=e) for e in (None, "traced", "traced"))
    for number in range(4):
        for run in (stock, traced, unchanged):
            run.step(number)
    change(stock), change(traced)
    mode = change is not change_buffer
    assert_same(stock.step(4, mode), traced.step(4, mode))
    stock.step(5), traced.step(5)
    assert_state(stock, traced)
    unchanged.step(4), unchanged.step(5)
    with pytest.raises(AssertionError):
        assert_state(unchanged, traced)


def test_no_graph_is_made_anew_while_the_weight_on_the_kl_rises():
    run = Run("bernoulli", engine="traced")
    for number in range(9):
        run.engine.beta = number / 9
        run.step(number)
    assert len(run.engine._graphs.graphs) == 2  # one for each shape


def test_two_pairs_in_turns_do_not_mix():
    alone, first, other = (Run("registered", engine="traced") for _ in range(3))
    with torch.no_grad():
        other.pair.decoder.weight.mul_(2)
    for number in range(20):
        alone.step(number)
    for number in range(20):
        first.step(number)
        other.step(number + 100)
    assert_state(alone, first, 0.0)


def test_the_optimizers_short_way_is_torchs_own():
    with seeded(3):
        values = [torch.randn(5, 4), torch.randn(3), torch.randn(())]
        gradients = [[torch.randn_like(v) for v in values] for _ in range(20)]
    ours, theirs = ([nn.Parameter(v.clone()) for v in values] for _ in range(2))
    options = {"betas": (0.8, 0.99), "eps": 1e-6, "weight_decay": 0.1}
    optimizer = Optimizer(
        lambda params, lr, fused: torch.optim.Adam(params, lr=lr, fused=fused, **options),
        dict(zip("abc", ours, strict=True)),
        0.05,
    )
    reference = torch.optim.Adam(theirs, lr=0.05, fused=True, **options)
    for number, grads in enumerate(gradients):
        optimizer.learning_rate = reference.param_groups[0]["lr"] = 0.05 / (1 + number)
        for p, q, gradient in zip(ours, theirs, grads, strict=True):
            p.grad, q.grad = gradient.clone(), gradient.clone()
            if number == 7 and p is ours[1]:
                p.grad = q.grad = None  # a parameter left out for once
        optimizer(ours)
        reference.step()
        if number == 12:  # as a checkpoint does
            optimizer.set_state(copy.deepcopy(optimizer.get_state()))
    for p, q in zip(ours, theirs, strict=True):
        assert torch.equal(p, q)


class Noisy(nn.Module):
    """What a graph would freeze, of several kinds."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.calls, self.seen = kind, 0, []
        self.encoder, self.decoder = nn.Linear(6, 2), nn.Linear(2, 6)
        self.own = random.Random(0)

    def shift(self, x):
        if self.kind == "python":
            return random.random()
        if self.kind == "numpy":
            return float(np.random.rand())
        if self.kind == "own generator":
            return self.own.random()
        if self.kind == "branch":
            return 1.0 if x.sum() > 3 else 0.0
        if self.kind == "number":
            return x.mean().item()
        if self.kind == "array":
            return float(x.numpy().mean())
        if self.kind == "counter":
            self.calls += 1
            return 1.0 / self.calls
        if self.kind == "list":
            self.seen.append(x)
        if self.kind == "shape":
            return float(len(x[x[:, 0] > 0.5]))
        return 0.0

    def model(self, x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), 1.0).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(self.encoder(x) + self.shift(x), 1.0).to_event(1))


REASONS = {
    "python": "generators, not from torch's",
    "numpy": "generators, not from torch's",
    "own generator": "a graph of it gives other values",
    "branch": "depends on the values of tensors",
    "array": "cannot be traced",
    "counter": "it changes its attribute 'calls'",
    "list": "it changes its attribute 'seen'",
    "shape": "depends on the values of tensors",
}


@pytest.mark.parametrize(
    ("kind", "engine"),
    [*((kind, "auto") for kind in REASONS), ("branch", "compiled"), ("python", "traced")],
)
def test_what_a_graph_would_freeze_is_run_eagerly_and_said(kind, engine):
    x = rows("plain", 32)[0]
    with seeded(0):
        start = Noisy(kind).double()
    stock, pair = copy.deepcopy(start), copy.deepcopy(start)
    options = {"epochs": 3, "batch_size": 16, "progress": False}
    with pytest.warns(UserWarning, match="Noisy is trained by the eager engine, because") as said:
        history = pv.fit(pair, x, engine=engine, **options)
    assert len(said) == 1
    assert REASONS[kind] in str(said[0].message)
    reference = pv.fit(stock, x, engine="eager", **options)
    if kind != "own generator":  # the run on trial has drawn from it
        assert history["elbo"] == reference["elbo"]
    assert not any(isinstance(v, torch._subclasses.FakeTensor) for v in pair.seen)
    assert len(pair.seen) == len(stock.seen)


def test_a_number_read_from_a_tensor_is_read_anew_at_each_step():
    x = rows("plain", 32)[0]
    histories = []
    for engine in ("eager", "traced"):
        with seeded(0), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch before 2.9 or so cannot trace it
            pair = Noisy("number").double()
            history = pv.fit(pair, x, engine=engine, epochs=3, batch_size=16, progress=False)
        histories.append(history["elbo"])
    assert histories[0] == pytest.approx(histories[1], rel=1e-6)  # torch reads it as float32


def test_an_objective_with_its_own_gradients_is_run_eagerly():
    x = rows("bernoulli", 32)[0]
    with pytest.warns(UserWarning, match="RenyiELBO has a loss_and_grads of its own"):
        pv.fit(
            make("bernoulli"),
            x,
            objective=RenyiELBO(alpha=0.5, num_particles=2),
            epochs=1,
            batch_size=16,
            progress=False,
        )


def test_a_pair_whose_settings_keep_changing_is_run_eagerly(monkeypatch):
    monkeypatch.setattr("pyro_vae.graphs.MOST_GRAPHS", 4)
    stock, run = Run("normalized"), Run("normalized", engine="traced")
    for number in range(4):
        run.pair.encoder[3].p = stock.pair.encoder[3].p = number / 20
        assert_same(stock.step(number), run.step(number))
    run.pair.encoder[3].p = stock.pair.encoder[3].p = 0.9
    with pytest.warns(UserWarning, match="keeps changing"):
        found = run.step(6)
    assert_same(stock.step(6), found)
    assert_same(stock.step(7), run.step(7))
    assert_state(stock, run)
    assert run.engine.engine == "eager"


def test_an_engine_serves_another_model_and_guide_too():
    """Those of the pair inside a handler, say."""
    x = rows("plain", 8)[0]
    pair = make("plain")
    engine = Engine(pair, engine="traced", declare=False)
    heavy = pyro.poutine.scale(scale=3.0)
    with scope(pair):
        losses = []
        for model, guide in ((pair.model, pair.guide), (heavy(pair.model), heavy(pair.guide))):
            with seeded(0):
                losses.append(float(engine.loss_and_grads(model, guide, x)))
    assert losses[1] == pytest.approx(3 * losses[0])


def test_particles_in_a_plate_need_no_word_about_plates():
    pair, x = make("bernoulli"), rows("bernoulli", 32)[0]
    objective = Trace_ELBO(num_particles=3, vectorize_particles=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pv.fit(
            pair, x, objective=objective, engine="traced", epochs=1, batch_size=16, progress=False
        )


def test_parameters_that_only_the_store_knows_are_not_frozen():
    pair, x = make("params"), rows("params")[0]
    engine = Engine(pair, engine="traced")
    with pytest.warns(UserWarning, match=r"pyro_vae\.check adopts it"), scope(pair):
        engine.loss_and_grads(pair.model, pair.guide, x)


def test_any_svi_takes_an_engine():
    """With an optimiser for each parameter, which has to see them as sites."""
    x = rows("plain", 16)[0]
    ends = []
    for engine in ("eager", "traced"):
        pair = make("plain")
        svi = SVI(
            registered(pair, pair.model) if engine == "eager" else pair.model,
            pair.guide,
            pyro.optim.Adam({"lr": 0.05}),
            Engine(pair, engine=engine),
        )
        with pyro.get_param_store().scope():
            for number in range(20):
                with seeded(number):
                    loss = svi.step(x)
        assert isinstance(loss, float)
        ends.append((loss, *pair.state_dict().values()))
    for a, b in zip(*ends, strict=True):
        torch.testing.assert_close(a, b)


def test_auto_compiles_where_the_steps_repay_it(monkeypatch):
    run = Run("bernoulli", engine="auto", batch_size=12, steps=100)
    run.step(0)
    assert run.engine.engine == "traced"
    monkeypatch.setattr("pyro_vae.engine.COMPILE_SECONDS", 0.01)
    run = Run("bernoulli", engine="auto", batch_size=12, steps=100)
    run.step(0)
    assert run.engine.engine == "compiled"


def test_without_a_compiler_the_graph_is_replayed(monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("no compiler was found")

    monkeypatch.setattr("pyro_vae.graphs._compile", broken)
    stock, run = Run("bernoulli"), Run("bernoulli", engine="compiled")
    with pytest.warns(UserWarning, match="replayed, not compiled: RuntimeError: no compiler"):
        assert_same(stock.step(0), run.step(0))
    assert_same(stock.step(1), run.step(1))


def test_a_graph_whose_draws_the_compiler_would_change_is_replayed():
    stock, run = Run("discrete"), Run("discrete", engine="compiled")
    with pytest.warns(UserWarning, match="replayed, not compiled: its draws or values"):
        assert_same(stock.step(0), run.step(0))


@pytest.mark.parametrize("graph", ["traced", "compiled"])
def test_preparation_is_part_of_the_graph(graph):
    """8-bit intensities become binary pixels within it, by the draws of the eager step."""
    x = (torch.rand(16, 6) * 255).to(torch.uint8)
    losses = []
    for engine in ("eager", graph):
        pair = make("bernoulli")
        prepare = Preparation(torch.device("cpu"), torch.float64, binarize=True)
        runner = Engine(pair, engine=engine, prepare=prepare)
        with scope(pair):
            for number in range(3):
                with seeded(number):
                    losses.append(float(runner.loss_and_grads(pair.model, pair.guide, x)))
        assert runner.engine == engine
    assert losses[:3] == pytest.approx(losses[3:], rel=1e-10)
    assert len(set(losses[:3])) == 3


def test_losses_read_seldom_are_the_same(monkeypatch):
    x = rows("bernoulli", 40)[0]
    histories = []
    for waiting in (1, 7):
        monkeypatch.setattr("pyro_vae.training.UNREAD", {"cpu": waiting})
        histories.append(
            pv.fit(make("bernoulli"), x, epochs=5, batch_size=4, progress=False).epochs
        )
    for a, b in zip(*histories, strict=True):
        assert a.row().items() - {("seconds", a.seconds)} == b.row().items() - {
            ("seconds", b.seconds)
        }


def test_the_history_is_the_same_norms_and_parts_and_clipping_too():
    x = rows("params", 40)[0]
    histories = []
    for engine in ("eager", "traced"):
        pair = make("params")
        found = pv.fit(
            pair,
            x,
            epochs=3,
            batch_size=16,
            clip_norm=2.0,
            beta=0.5,
            engine=engine,
            learning_rate=0.02,
            progress=False,
        )
        histories.append(
            [{k: v for k, v in e.row().items() if k != "seconds"} for e in found.epochs]
        )
    for eager, traced in zip(*histories, strict=True):
        assert traced == pytest.approx(eager, rel=1e-6)
    assert histories[0][0]["gradient_norm"] > 2.0  # so that there was something to clip


@pytest.mark.parametrize("engine", ["traced", "compiled"])
def test_resuming_is_bit_identical_under_each_engine(tmp_path, engine):
    x = rows("bernoulli", 60)[0]
    options = {"batch_size": 16, "progress": False, "engine": engine}
    whole, part = make("bernoulli"), make("bernoulli")
    pv.fit(whole, x, epochs=4, **options)
    pv.fit(part, x, epochs=2, out=tmp_path, **options)
    pv.fit(part, x, epochs=4, out=tmp_path, resume=True, **options)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, part.state_dict()[name])


def test_a_resumed_run_goes_on_with_the_engine_that_it_had(tmp_path, monkeypatch):
    x = rows("bernoulli", 32)[0]
    options = {"batch_size": 16, "progress": False, "out": tmp_path}
    pv.fit(make("bernoulli"), x, epochs=2, **options)
    seen = []
    compiles = Engine._compiles
    monkeypatch.setattr("pyro_vae.engine.COMPILE_SECONDS", 0.0)
    monkeypatch.setattr(
        Engine, "_compiles", lambda self, *a: seen.append(self.engine) or compiles(self, *a)
    )
    pv.fit(make("bernoulli"), x, epochs=3, resume=True, **options)
    assert seen == ["traced"]


@pytest.mark.parametrize(
    ("name", "engine"),
    [("params", "traced"), ("conditional", "traced"), ("bernoulli", "compiled")],
)
def test_log_likelihood_is_that_of_the_eager_engine(name, engine, monkeypatch):
    monkeypatch.setattr("pyro_vae.importance.CELLS", 6 * 8 * 70)  # 3 batches, 5 chunks each
    pair, batch = make(name), rows(name, 20)
    require(pair, batch)
    eager = pv.log_likelihood(pair, *batch, num_samples=300, engine="eager")
    graph = pv.log_likelihood(pair, *batch, num_samples=300, engine=engine)
    torch.testing.assert_close(graph.per_datum, eager.per_datum)
    torch.testing.assert_close(graph.standard_errors, eager.standard_errors)


def test_log_likelihood_of_what_cannot_be_traced_is_eager(monkeypatch):
    monkeypatch.setattr("pyro_vae.importance.CELLS", 6 * 8 * 20)
    pair, x = Noisy("branch").double(), rows("plain", 20)[0]
    with pytest.warns(UserWarning, match="weighed by the eager engine, because a branch"):
        found = pv.log_likelihood(pair, x, num_samples=50, engine="traced")
    eager = pv.log_likelihood(pair, x, num_samples=50, engine="eager")
    assert torch.equal(found.per_datum, eager.per_datum)


def test_bfloat16_ends_where_float32_does():
    """Over three seeds, on digits; the graph runs the networks in bfloat16, as autocast does."""
    x = pv.load_data("digits").train.x
    gaps = []
    for seed in range(3):
        ends = []
        for precision in ("float32", "bfloat16"):
            torch.manual_seed(seed)
            vae = pv.VAE.mlp((1, 8, 8), latent_dim=8, hidden=(64,))
            options = {"epochs": 12, "batch_size": 50, "seed": seed, "progress": False}
            pv.fit(vae, x, precision=precision, engine="traced", **options)
            ends.append(pv.evaluate(vae, x, num_samples=1).elbo)
        gaps.append(ends[0] - ends[1])
    assert abs(sum(gaps) / len(gaps)) < 0.1
    assert any(gap != 0 for gap in gaps)


def test_an_unknown_engine_is_refused():
    with pytest.raises(pv.UsageError, match=r"engine is 'trced'; did you mean 'traced'\?"):
        pv.fit(make("bernoulli"), *rows("bernoulli"), engine="trced")
    with pytest.raises(pv.UsageError, match="engine is 'fast'"):
        pv.log_likelihood(make("bernoulli"), *rows("bernoulli"), engine="fast")


def test_nothing_is_said_about_a_pair_that_is_traced():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run = Run("convolutional", engine="traced")
        run.step(0)
    assert run.engine.engine == "traced"
