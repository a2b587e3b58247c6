"""Enumerated latents, compared with sums by hand and with stock Pyro."""

import warnings
from math import log

import pyro
import pyro.distributions as dist
import pytest
import torch
from pairs import ENUMERATED, make, rows
from pyro.infer import (
    RenyiELBO,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceMeanField_ELBO,
    config_enumerate,
)
from torch import nn
from torch.nn.functional import one_hot

import pyro_vae as pv
from pyro_vae.diagnostics.labels import calibration_error, clustering_accuracy
from pyro_vae.pairs.rng import seeded
from pyro_vae.pairs.scope import registered, scope
from pyro_vae.pairs.weights import log_weights
from pyro_vae.training.check import check
from pyro_vae.training.engine import Engine
from pyro_vae.training.recording import ELBOParts, recorded

MARKED = {"enumerate": "parallel"}
every_pair = pytest.mark.parametrize("name", ENUMERATED)


def taken(pair, batch, objective, beta=1.0, seed=3):
    """The loss, the gradients and the parts of the ELBO of one step."""
    pair.zero_grad()
    parts, weight = ELBOParts(), pv.KLWeight(beta)
    with scope(pair), seeded(seed):
        measured = recorded(objective, parts)
        model = registered(pair, pair.model)
        loss = measured.loss_and_grads(weight(model), weight(pair.guide), *batch)
    grads = {name: p.grad for name, p in pair.named_parameters() if p.grad is not None}
    return loss, grads, parts


def numbers(sums):
    return {name: float(value) for name, value in sums.items()}


def assert_close(a, b, tolerance=1e-10):
    for name, gradient in a.items():
        torch.testing.assert_close(b[name], gradient, rtol=tolerance, atol=tolerance)


@every_pair
@pytest.mark.parametrize(("particles", "side_by_side"), [(1, False), (3, False), (3, True)])
def test_loss_and_gradients_are_those_of_stock_pyro(name, particles, side_by_side):
    pair, batch = make(name), rows(name, 12)
    options = {"vectorize_particles": side_by_side, "max_plate_nesting": 1}
    ours = taken(pair, batch, pv.EnumeratedELBO(particles, **options))
    stock = taken(pair, batch, TraceEnum_ELBO(num_particles=particles, **options))
    assert ours[0] == pytest.approx(stock[0], rel=1e-10)
    assert set(ours[1]) == set(stock[1])
    assert_close(ours[1], stock[1])
    assert numbers(ours[2].reconstruction) == pytest.approx(numbers(stock[2].reconstruction))
    assert numbers(ours[2].kl) == pytest.approx(numbers(stock[2].kl))


def semi_supervised_by_hand(pair, x, labels, beta):
    """The bound as an explicit sum over labels, with the guide's draws of z."""
    with seeded(3):
        noise = torch.randn(3, len(x), 2, dtype=x.dtype)
    total, n = 0.0, len(x)
    log_q = pair.classifier(x).logits.log_softmax(-1)
    for i in range(n):
        known = [int(labels[i])] if labels[i] >= 0 else range(3)
        for y in known:
            vector = one_hot(torch.tensor(y), 3).to(x)
            q = pair.encoder(x[i], vector).base_dist
            z = q.loc + q.scale * noise[y, i]
            q_y = log_q[i, y].exp() if labels[i] < 0 else torch.ones((), dtype=x.dtype)
            kl = q_y.log() + log(3)
            kl = kl + (q.log_prob(z) - dist.Normal(0.0, 1.0).log_prob(z)).sum()
            total = total + q_y * (pair.decoder(z, vector).log_prob(x[i]) - beta * kl)
        if labels[i] >= 0:
            total = total + pair.classification_weight * log_q[i, labels[i]]
    return -total


@pytest.mark.parametrize("beta", [1.0, 0.3, 0.0])
def test_the_semi_supervised_bound_is_the_sum_by_hand(beta):
    """One batch has rows with and without labels; the labeled term is the one of Kingma et al."""
    pair, (x, labels) = make("semi-supervised"), rows("semi-supervised", 12)
    assert {-1, 0, 1, 2} == set(labels.tolist())
    loss, grads, parts = taken(pair, (x, labels), pv.EnumeratedELBO(), beta)
    pair.zero_grad()
    by_hand = semi_supervised_by_hand(pair, x, labels, beta)
    by_hand.backward()
    assert loss == pytest.approx(by_hand.item(), rel=1e-10)
    assert_close({name: p.grad for name, p in pair.named_parameters()}, grads)
    known = labels >= 0
    classification = pair.classifier(x).log_prob(labels.clamp(min=0))[known].sum()
    elbo = -loss - pair.classification_weight * classification.item()
    reconstruction = sum(float(v) for v in parts.reconstruction.values())
    assert set(parts.kl) == {"y", "z"}
    assert reconstruction - beta * sum(float(v) for v in parts.kl.values()) == pytest.approx(elbo)


def twin(pair):
    """The same parts in a pair whose prior sums out the component."""
    other = make("mixture-prior")
    other.load_state_dict(pair.state_dict())
    return other


def test_the_mixture_is_the_vae_with_a_mixture_prior():
    pair, batch = make("mixture"), rows("mixture")
    ours, other = taken(pair, batch, pv.EnumeratedELBO()), taken(twin(pair), batch, Trace_ELBO())
    assert ours[0] == pytest.approx(other[0], rel=1e-12)
    assert_close(ours[1], other[1])
    kl = sum(float(value) for value in ours[2].kl.values())
    assert kl == pytest.approx(float(other[2].kl["z"]))
    weights = []
    for each in (pair, twin(pair)):
        with seeded(1), torch.no_grad():
            weights.append(log_weights(each, batch, 20))
    torch.testing.assert_close(*weights)


def test_beta_weighs_every_kl_of_the_mixture_and_nothing_else():
    """By hand: the posterior of the component is exact for any weight."""
    pair, (x,) = make("mixture"), rows("mixture", 12)
    loss, grads, parts = taken(pair, (x,), pv.EnumeratedELBO(), beta=0.3)
    pair.zero_grad()
    with seeded(3):
        q = pair.encoder(x)
        z = q.rsample()
    prior = pair.prior()
    joint = prior.component_distribution.log_prob(z[:, None]) + prior.mixture_distribution.logits
    r = joint.softmax(-1)
    kl = (r * (q.log_prob(z)[:, None] + r.log() - joint)).sum()
    by_hand = 0.3 * kl - pair.decoder(z).log_prob(x).sum()
    by_hand.backward()
    assert loss == pytest.approx(by_hand.item(), rel=1e-10)
    assert_close({name: p.grad for name, p in pair.named_parameters()}, grads)
    assert sum(float(value) for value in parts.kl.values()) == pytest.approx(kl.item())


@every_pair
def test_parts_make_up_the_bound(name):
    """The parts do not depend on the weight, because the draws are the same."""
    pair, batch = make(name), rows(name, 12)
    bounds = []
    for beta in (1.0, 0.4):
        loss, _, parts = taken(pair, batch, pv.EnumeratedELBO(2), beta)
        if name == "semi-supervised":
            labels, guess = batch[1], pair.classifier(batch[0])
            right = guess.log_prob(labels.clamp(min=0))[labels >= 0].sum().item()
            loss += pair.classification_weight * right
        kl = sum(float(value) for value in parts.kl.values())
        reconstruction = sum(float(value) for value in parts.reconstruction.values())
        assert reconstruction - beta * kl == pytest.approx(-loss, rel=1e-10)
        bounds.append(reconstruction - kl)
    assert bounds[0] == pytest.approx(bounds[1], rel=1e-12)


class Table(nn.Module):
    """The only latent is discrete, so log p(x) is a finite sum."""

    def __init__(self, guided):
        super().__init__()
        self.guided = guided
        self.logits, self.table = nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(4, 6))
        self.classifier = nn.Linear(6, 4)

    def model(self, x):
        with pyro.plate("data", len(x), dim=-1):
            k = pyro.sample("k", dist.Categorical(logits=self.logits), infer=MARKED)
            pyro.sample("x", dist.Bernoulli(logits=self.table[k]).to_event(1), obs=x)

    def guide(self, x):
        if self.guided:
            with pyro.plate("data", len(x), dim=-1):
                pyro.sample("k", dist.Categorical(logits=self.classifier(x)), infer=MARKED)

    def template(self, n):
        return (torch.zeros(n, 6),)

    def joint(self, x):
        """log p(x, k), of shape (n, 4)."""
        densities = dist.Bernoulli(logits=self.table).to_event(1).log_prob(x[:, None])
        return self.logits.log_softmax(-1) + densities


@pytest.mark.parametrize("guided", [False, True])
def test_log_likelihood_is_exact_where_every_latent_is_summed_out(guided):
    with seeded(0):
        pair = Table(guided).double()
    (x,) = rows("plain", 15)
    found = pv.log_likelihood(pair, x, num_samples=4)
    exact = pair.joint(x).logsumexp(-1)
    torch.testing.assert_close(found.per_datum, exact.detach())
    assert found.standard_error < 1e-6
    # If only the model has the latent, the bound is log p(x) and the posterior is exact.
    loss, _, parts = taken(pair, (x,), pv.EnumeratedELBO())
    if not guided:
        assert -loss == pytest.approx(exact.sum().item())
        torch.testing.assert_close(pv.predict(pair, x), pair.joint(x).softmax(-1).detach())
        modes = pair.joint(x).argmax(-1)
        assert torch.equal(pv.encode(pair, x)["k"], modes)
        torch.testing.assert_close(pv.reconstruct(pair, x), pair.table[modes].sigmoid().detach())
    else:
        q = pair.classifier(x).log_softmax(-1)
        by_hand = (q.exp() * (pair.joint(x) - q)).sum()
        assert -loss == pytest.approx(by_hand.item())
        assert float(parts.kl["k"]) == pytest.approx(
            (q.exp() * (q - pair.logits.log_softmax(-1))).sum().item()
        )


def test_draws_of_a_summed_out_latent_follow_its_posterior():
    with seeded(0):
        pair = Table(False).double()
    x = rows("plain", 3)[0].repeat(4000, 1)
    drawn = pv.encode(pair, x, what="draw")["k"].reshape(4000, 3)
    shares = torch.stack([(drawn == k).double().mean(0) for k in range(4)], -1)
    exact = pair.joint(x[:3]).softmax(-1).detach()
    assert ((shares - exact).abs() < 5 * (exact * (1 - exact) / 4000).sqrt() + 1e-9).all()


@every_pair
def test_log_likelihood_is_that_of_weights_one_by_one(name):
    """Compare with an estimate from draws of the prior, without enumeration."""
    pair, batch = make(name), rows(name, 4)
    found = pv.log_likelihood(pair, *batch, num_samples=3000)
    n = 20000
    wide = [part.repeat_interleave(n, 0) for part in batch]
    with torch.no_grad(), seeded(1):
        traced = pyro.poutine.trace(pair.model).get_trace(*wide)
    label = traced.nodes["label"] if name == "semi-supervised" else None
    weights = traced.nodes["x"]["fn"].log_prob(wide[0])
    if label is not None:
        weights = weights + torch.where(
            wide[1] >= 0, label["fn"].log_prob(wide[1].clamp(min=0)), torch.zeros(())
        )
    weights = weights.reshape(4, n).exp()
    error = weights.std(1) / weights.mean(1) / n**0.5
    gap = (weights.mean(1).log() - found.per_datum).abs()
    reliable = found.pareto_k < 0.7  # above it, the standard error says nothing
    assert reliable.any()
    assert (gap < 5 * (error + found.standard_errors))[reliable].all()


@every_pair
def test_graphs_give_the_weights_of_the_eager_engine(name):
    pair, batch = make(name), rows(name, 6)
    a, b = (pv.log_likelihood(pair, *batch, num_samples=40, engine=e) for e in ("eager", "traced"))
    torch.testing.assert_close(a.per_datum, b.per_datum)


@every_pair
def test_kl_by_unit_adds_up_to_the_kl_of_its_site(name):
    pair, batch = make(name), [part.repeat(200, *[1] * (part.dim() - 1)) for part in rows(name, 20)]
    result = pv.evaluate(pair, *batch, num_samples=1)
    assert set(result.kl_by_unit) == {"z"}
    for site, units in result.kl_by_unit.items():
        assert sum(units) == pytest.approx(result.kl_by_site[site], abs=0.1)


def test_weight_zero_takes_no_part():
    """A value that the guide rules out may be impossible under the model."""

    class Impossible(Table):
        def model(self, x):
            allowed = torch.tensor([0.0, -torch.inf, 0.0, -torch.inf], dtype=x.dtype)
            with pyro.plate("data", len(x), dim=-1):
                logits = self.logits + allowed
                k = pyro.sample("k", dist.Categorical(logits=logits), infer=MARKED)
                probs = dist.Bernoulli(logits=self.table[k]).to_event(1)
                pyro.sample("x", probs, obs=x)

        def guide(self, x):
            ruled_out = torch.tensor([False, True, False, True])
            with pyro.plate("data", len(x), dim=-1):
                logits = self.classifier(x).masked_fill(ruled_out, -torch.inf)
                pyro.sample("k", dist.Categorical(logits=logits), infer=MARKED)

    with seeded(0):
        pair = Impossible(True).double()
    (x,) = rows("plain", 9)
    loss, grads, _ = taken(pair, (x,), pv.EnumeratedELBO())
    q = pair.classifier(x)[:, ::2].log_softmax(-1)
    p = pair.logits[::2].log_softmax(-1)
    densities = dist.Bernoulli(logits=pair.table[::2]).to_event(1).log_prob(x[:, None])
    pair.zero_grad()
    by_hand = -(q.exp() * (p + densities - q)).sum()
    by_hand.backward()
    assert loss == pytest.approx(by_hand.item())
    assert_close({name: p.grad for name, p in pair.named_parameters()}, grads)


class Counts(nn.Module):
    """A plate of five items within a datum; all items share the component of the datum."""

    def __init__(self):
        super().__init__()
        self.rates = nn.Parameter(torch.tensor([1.0, 4.0, 9.0]))

    def model(self, x):
        with pyro.plate("data", len(x), dim=-1):
            k = pyro.sample("k", dist.Categorical(self.rates.new_ones(3) / 3), infer=MARKED)
            with pyro.plate("items", 5, dim=-2):
                pyro.sample("x", dist.Poisson(self.rates[k]), obs=x.T)

    def guide(self, x):
        pass


def test_plates_within_a_datum_are_summed_before_the_values():
    pair = Counts().double()
    x = torch.poisson(torch.tensor([1.0, 9.0, 4.0, 1.0]).repeat(5, 1).T).double()
    joint = dist.Poisson(pair.rates).log_prob(x[..., None]).sum(1) + torch.tensor(1 / 3).log()
    exact = joint.logsumexp(-1).detach()
    loss, _, _ = taken(pair, (x,), pv.EnumeratedELBO(max_plate_nesting=2))
    assert -loss == pytest.approx(exact.sum().item(), rel=1e-6)
    found = pv.log_likelihood(pair, x, num_samples=2)
    torch.testing.assert_close(found.per_datum, exact, rtol=1e-6, atol=1e-6)
    assert pv.evaluate(pair, x, num_samples=2).elbo == pytest.approx(exact.mean().item(), rel=1e-6)


def test_several_latents_of_the_model_alone_share_their_kl_by_the_chain_rule():
    pair, (x,) = make("bags"), rows("bags", 10)
    _, _, parts = taken(pair, (x,), pv.EnumeratedELBO())
    assert list(parts.kl) == ["y", "z", "m", "k"] or set(parts.kl) == {"y", "z", "k", "m"}
    # The KL of the first site is that of its own posterior, with the other site summed out.
    seen = {}

    class Watch(pyro.poutine.messenger.Messenger):
        def _pyro_post_sample(self, msg):
            seen.setdefault(msg["name"], msg)

    with seeded(3), torch.no_grad(), Watch():
        pv.EnumeratedELBO().differentiable_loss(pair.model, pair.guide, x)
    y, z = seen["y"], seen["z"]["value"]
    total = 0.0
    for value in range(3):
        q = y["fn"].log_prob(y["value"][value]).exp()
        prior = dist.Bernoulli(logits=pair.switch(z[value])[..., 0])
        joint = []
        for k in (0.0, 1.0):
            weights = torch.tensor([k, 1 - 2 * k]).double().log_softmax(-1)
            each = []
            for m in range(2):
                parts_of = [z[value], y["value"][value].expand(10, 3)]
                parts_of.append(torch.tensor([k, float(m)]).double().expand(10, 2))
                logits = pair.decoder(torch.cat(parts_of, -1))
                each.append(weights[m] + dist.Bernoulli(logits=logits).to_event(1).log_prob(x))
            joint.append(prior.log_prob(torch.tensor(k).double()) + torch.stack(each).logsumexp(0))
        r = torch.stack(joint).log_softmax(0)
        log_p = torch.stack([prior.log_prob(torch.tensor(k).double()) for k in (0.0, 1.0)])
        total += (q * (r.exp() * (r - log_p)).sum(0)).sum().item()
    assert float(parts.kl["k"]) == pytest.approx(total)


@every_pair
def test_other_objectives_are_refused_in_one_line(name):
    pair, batch = make(name), rows(name, 6)
    others = [Trace_ELBO(), TraceMeanField_ELBO(), RenyiELBO(0.5, num_particles=2)]
    others += [pv.ImportanceWeightedELBO(2), pv.FreeBitsELBO(0.1)]
    for objective in others:
        kind = type(objective).__name__
        with pytest.raises(pv.UsageError, match=f"{kind} does not enumerate; use"):
            pv.fit(pair, *batch, objective=objective, batch_size=3, progress=False)
    engine = Engine(pair, engine="eager")
    with warnings.catch_warnings(), scope(pair):
        warnings.simplefilter("ignore")
        with pytest.raises(pv.UsageError, match="does not sum it out"):
            engine.loss_and_grads(pair.model, pair.guide, *batch)


def test_stock_enumeration_takes_no_weight_on_the_kl():
    pair, batch = make("mixture"), rows("mixture", 6)
    stock = TraceEnum_ELBO(max_plate_nesting=1)
    for beta in (0.5, pv.LinearSchedule(3)):
        with pytest.raises(pv.UsageError, match="EnumeratedELBO"):
            pv.fit(pair, *batch, objective=stock, beta=beta, batch_size=3, progress=False)
    with pytest.warns(UserWarning, match="eager engine, because TraceEnum_ELBO defines its own"):
        pv.fit(pair, *batch, objective=stock, batch_size=3, epochs=1, progress=False, engine="auto")


@pytest.mark.sample(1)
@every_pair
def test_the_default_is_the_enumerated_bound_in_a_graph(name):
    ours, other = make(name), make(name)
    batch = rows(name)
    settings = {"epochs": 2, "batch_size": 20, "progress": False, "beta": 0.5}
    ours_history = pv.fit(ours, *batch, engine="traced", **settings)
    other_history = pv.fit(other, *batch, engine="eager", objective=pv.EnumeratedELBO(), **settings)
    assert ours_history["objective"] == pytest.approx(other_history["objective"])
    with seeded(0), scope(ours):
        engine = Engine(ours, pv.EnumeratedELBO(), "traced")
        engine.loss_and_grads(ours.model, ours.guide, *batch)
    assert engine.engine == "traced"


def broken(**changes):
    """A pair with one discrete latent that is marked for enumeration, and with this fault."""
    marked = changes.get("infer", MARKED)
    categorical = dist.Categorical(torch.ones(3) / 3)

    class Broken(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3, 6))

        def model(self, x):
            with pyro.plate("data", len(x), dim=-1):
                k = pyro.sample("k", changes.get("fn", categorical))
                logits = changes.get("logits", lambda weight, k, x: weight[k.long()])
                fn = dist.Bernoulli(logits=logits(self.weight, k, x)).to_event(1)
                pyro.sample("x", fn, obs=x)
                if "plate" in changes:
                    with pyro.plate("inner", 2, dim=-2):
                        pyro.sample("inside", categorical)
            if "outside" in changes:
                pyro.sample("outside", categorical, infer=MARKED)

        def guide(self, x):
            with pyro.plate("data", len(x), dim=-1):
                pyro.sample("k", changes.get("fn", categorical), infer=marked)
                if "plate" in changes:
                    with pyro.plate("inner", 2, dim=-2):
                        pyro.sample("inside", categorical, infer=marked)

    return Broken()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"infer": {"enumerate": "sequential"}}, 'only infer={"enumerate": "parallel"}'),
        ({"infer": MARKED | {"num_samples": 4}}, 'only infer={"enumerate": "parallel"}'),
        ({"fn": dist.Geometric(0.999)}, "(Geometric) does not have a finite list of values"),
        ({"outside": True}, "is outside the data plate and only the model has it"),
        (
            {"logits": lambda weight, k, x: weight[k].reshape(len(x), 6)},
            "with all values of 'k' in an extra dimension to the left of the plates, the pair",
        ),
    ],
)
def test_check_explains_why_a_site_cannot_be_summed_out(changes, words):
    (error, *_) = check(broken(**changes), torch.ones(4, 6)).errors
    assert words in error
    assert "\n" not in error


@pytest.mark.parametrize("tool", [pv.log_likelihood, pv.predict, pv.evaluate])
def test_a_site_that_all_data_share_is_refused_by_every_tool(tool):
    with pytest.raises(pv.UsageError) as caught:
        tool(broken(outside=True), torch.ones(4, 6))
    (error, *_) = check(broken(outside=True), torch.ones(4, 6)).errors
    assert str(caught.value) == error


def test_predict_names_what_a_pair_lacks():
    x = torch.ones(4, 6)
    inner, given = broken(plate=True, infer={}), make("mixture").float()
    assert pv.predict(inner, x, num_samples=1).shape == (4, 3)
    for pair, site, words in (
        (make("bernoulli").float(), None, "VAE has no such latent; use encode for other latents"),
        (inner, "inside", "of Broken, got 'inside'; known: k"),
        (given, "z", "of MixtureVAE, got 'z'; known: k"),
    ):
        with pytest.raises(pv.UsageError) as caught:
            pv.predict(pair, x, site=site)
        assert str(caught.value).endswith(words)


def test_a_latent_that_is_neither_enumerated_nor_reparametrised_is_refused():
    class Drawn(Table):
        def guide(self, x):
            with pyro.plate("data", len(x), dim=-1):
                pyro.sample("k", dist.Categorical(logits=self.classifier(x)), infer=MARKED)
                pyro.sample("b", dist.Bernoulli(self.table[0, 0].sigmoid()))

        def model(self, x):
            with pyro.plate("data", len(x), dim=-1):
                pyro.sample("b", dist.Bernoulli(0.5))
                k = pyro.sample("k", dist.Categorical(logits=self.logits))
                pyro.sample("x", dist.Bernoulli(logits=self.table[k]).to_event(1), obs=x)

    (error,) = check(Drawn(True), rows("plain", 4)[0].float()).errors
    assert "'b' is neither enumerated nor reparametrized (Bernoulli)" in error


def test_labels_that_are_no_class_are_refused_in_one_line():
    pair, (x, labels) = make("semi-supervised"), rows("semi-supervised", 40)
    labels[33] = 3
    with pytest.raises(pv.UsageError, match="index 3 is out of bounds"):
        pv.fit(pair, x, labels, batch_size=8, progress=False)
    with pytest.raises(pv.UsageError, match="index 3 is out of bounds"):
        pv.encode(pair, x, labels)


def test_labels_may_be_left_out():
    pair, (x, labels) = make("semi-supervised"), rows("semi-supervised", 6)
    hidden = torch.full_like(labels, -1)
    torch.testing.assert_close(pv.predict(pair, x), pv.predict(pair, x, hidden))
    torch.testing.assert_close(pv.predict(pair, x), pair.classifier(x).probs.detach())
    assert pv.sample(pair, 3).shape == (3, 6)
    known = labels >= 0
    believed = pv.predict(pair, x, labels)[known]
    torch.testing.assert_close(believed, one_hot(labels[known], 3).to(believed))
    pv.fit(pair, x, labels, validation=x, batch_size=3, epochs=1, progress=False, engine="eager")


def test_classes_are_named_by_labels_and_clusters_are_matched():
    pair, (x, labels) = make("semi-supervised"), rows("semi-supervised", 60)
    guess = pv.predict(pair, x)
    named = pv.evaluate(pair, x, labels=labels, num_samples=1)
    right = (guess.argmax(1) == labels)[labels >= 0].double()
    assert 0 < len(right) < len(labels)
    assert named.accuracy == pytest.approx(right.mean().item())
    assert named.calibration_error is not None
    assert named.clustering_accuracy is None
    assert "classes" in str(named)
    mixture = make("mixture")
    found = pv.predict(mixture, x).argmax(1)
    labels = (found + 1) % 3  # the same clusters with permuted labels
    assert len(labels.unique()) > 1
    matched = pv.evaluate(mixture, x, labels=labels, num_samples=1)
    assert matched.clustering_accuracy == pytest.approx(1.0)
    assert matched.mutual_information == pytest.approx(1.0)
    assert matched.accuracy is None
    assert "clusters" in str(matched)


def test_calibration_error_and_matching_by_hand():
    sure = torch.tensor([0.95, 0.95, 0.95, 0.95, 0.55, 0.55])
    right = torch.tensor([1.0, 1.0, 1.0, 0.0, 1.0, 0.0])
    by_hand = (4 * abs(0.75 - 0.95) + 2 * abs(0.5 - 0.55)) / 6
    assert calibration_error(sure, right) == pytest.approx(by_hand, abs=1e-6)
    clusters = torch.tensor([2, 2, 2, 0, 0, 1])
    assert clustering_accuracy(clusters, torch.tensor([0, 0, 1, 1, 1, 1])) == pytest.approx(4 / 6)


def test_training_raises_the_likelihood_of_labeled_and_unlabeled_rows():
    """Two blocks of pixels are two classes; six labels are enough to identify them."""
    with seeded(0):
        labels = torch.arange(200) % 2
        probs = torch.where(labels[:, None] == 0, 0.9, 0.1) * torch.ones(6)
        probs[:, 3:] = 1 - probs[:, 3:]
        x = torch.bernoulli(probs)
        pair = pv.SemiSupervisedVAE.mlp((6,), 2, latent_dim=2, hidden=(16,))
    known = torch.where(torch.arange(200) < 6, labels, torch.full_like(labels, -1))
    pv.fit(pair, x, known, epochs=30, batch_size=50, learning_rate=0.01, progress=False)
    result = pv.evaluate(pair, x[6:], labels=labels[6:], num_samples=50)
    assert result.accuracy > 0.95
    assert result.elbo < result.log_likelihood


def test_sums_over_different_plates_are_those_by_hand():
    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            y = pyro.sample("y", dist.Categorical(torch.ones(2) / 2))
            with pyro.plate("inner", 4, dim=-2):
                k = pyro.sample("k", dist.Categorical(torch.ones(3) / 3))
                pyro.sample("x", dist.Normal((y + k).float(), 1.0), obs=x.expand(4, 5))

    x = torch.linspace(-1, 3, 5)
    loc = (torch.arange(2)[:, None] + torch.arange(3)).float()
    each = dist.Normal(loc[..., None], 1.0).log_prob(x).logsumexp(1) - log(3)
    by_hand = -(4 * each).logsumexp(0).sub(log(2)).sum()
    loss = pv.EnumeratedELBO(max_plate_nesting=2).loss(config_enumerate(model), lambda x: None, x)
    assert loss == pytest.approx(by_hand.item())
