"""Idioms with discrete latents: enumerated, drawn, observed; and labels in the guide."""

import pyro
import pyro.distributions as dist
import torch
from idiom import (
    NO_LOCAL,
    PARTS,
    SHARED,
    STEPS,
    UNREFINED,
    Batch,
    Idiom,
    Refusal,
    integral,
    rows,
)
from pairs_local import LINE, STEP
from pyro.infer import TraceEnum_ELBO, config_enumerate
from pyro.infer.autoguide import AutoDelta
from torch import Tensor, nn
from torch.nn.functional import one_hot, softplus

K = 3


class SemiSupervised(nn.Module):
    """M2: a class, enumerated by the guide, and a normal code given the class."""

    def __init__(self) -> None:
        super().__init__()
        self.classes, self.encoder = nn.Linear(3, K), nn.Linear(3 + K, 2)
        self.decoder = nn.Linear(1 + K, 3)

    def observation(self, z: Tensor, y: Tensor) -> dist.Distribution:
        shape = torch.broadcast_shapes(z.shape, y.shape)
        parts = [z.expand(shape)[..., None], one_hot(y.long(), K).to(z).expand(*shape, K)]
        return dist.Normal(self.decoder(torch.cat(parts, -1)), 0.7).to_event(1)

    def code(self, x: Tensor, y: Tensor) -> dist.Distribution:
        shape = torch.broadcast_shapes(x.shape[:-1], y.shape)
        parts = [x.expand(*shape, 3), one_hot(y.long(), K).to(x).expand(*shape, K)]
        loc, raw = (0.5 * self.encoder(torch.cat(parts, -1))).unbind(-1)
        return dist.Normal(loc, softplus(raw + 0.5))

    def model(self, x: Tensor) -> None:
        pyro.module("pair", self)
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.Categorical(logits=x.new_zeros(K)))
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", self.observation(z, y), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            own = dist.Categorical(logits=self.classes(x))
            y = pyro.sample("y", own, infer={"enumerate": "parallel"})
            pyro.sample("z", self.code(x, y))

    def template(self, n: int) -> Batch:
        return (torch.zeros(n, 3),)

    def joint(self, x: Tensor) -> Tensor:
        """log p(x, y) of each class, of shape (classes, n)."""
        z, y = LINE.to(x)[:, None, None], torch.arange(K)[:, None]
        each = self.observation(z, y).log_prob(x)
        return integral(dist.Normal(0.0, 1.0).log_prob(z) + each, STEP) - torch.tensor(K).log()

    def log_p(self, x: Tensor) -> Tensor:
        return self.joint(x).logsumexp(0)


class Labeled(SemiSupervised):
    """scANVI: labels are observed, and the guide's classifier is a factor of the loss."""

    def model(self, x: Tensor, y: Tensor) -> None:
        pyro.module("pair", self)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Categorical(logits=x.new_zeros(K)), obs=y)
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", self.observation(z, y), obs=x)

    def guide(self, x: Tensor, y: Tensor) -> None:
        with pyro.plate("data", len(x)):
            loss = -dist.Categorical(logits=self.classes(x)).log_prob(y)
            pyro.factor("classification", -2.0 * loss, has_rsample=False)
            pyro.sample("z", self.code(x, y))

    def template(self, n: int) -> Batch:
        return torch.zeros(n, 3), torch.zeros(n, dtype=torch.long)

    def log_p(self, x: Tensor, y: Tensor) -> Tensor:
        return self.joint(x).gather(0, y[None])[0]


class Auxiliary(Labeled):
    """The classifier of the guide observes the labels at a site of its own name."""

    def guide(self, x: Tensor, y: Tensor) -> None:
        with pyro.plate("data", len(x)):
            own = dist.Categorical(logits=self.classes(x))
            pyro.sample("y_loss", own, obs=y, infer={"is_auxiliary": True})
            pyro.sample("z", self.code(x, y))


class Observing(Labeled):
    """The guide observes a site that the model observes too."""

    def guide(self, x: Tensor, y: Tensor) -> None:
        with pyro.plate("data", len(x)):
            own = dist.Categorical(logits=self.classes(x))
            pyro.sample("y", own, obs=y, infer={"is_auxiliary": True})
            pyro.sample("z", self.code(x, y))


class Cevae(nn.Module):
    """CEVAE: a confounder z of x, of a treatment t and of an outcome y."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder, self.treated = nn.Linear(1, 3), nn.Linear(1, 1)
        self.outcome, self.encoder = nn.Linear(2, 1), nn.Linear(5, 2)
        self.guess_t, self.guess_y = nn.Linear(3, 1), nn.Linear(4, 1)

    def densities(self, z: Tensor, t: Tensor) -> tuple[dist.Distribution, ...]:
        wide = torch.stack(torch.broadcast_tensors(z, t), -1)
        return (
            dist.Normal(self.decoder(z[..., None]), 1.0).to_event(1),
            dist.Bernoulli(logits=self.treated(z[..., None])[..., 0]),
            dist.Normal(self.outcome(wide)[..., 0], 0.5),
        )

    def model(self, x: Tensor, t: Tensor, y: Tensor) -> None:
        pyro.module("pair", self)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", self.densities(z, t)[0], obs=x)
            t = pyro.sample("t", self.densities(z, t)[1], obs=t)
            pyro.sample("y", self.densities(z, t)[2], obs=y)

    def guide(self, x: Tensor, t: Tensor, y: Tensor) -> None:
        with pyro.plate("data", len(x)):
            mark = {"is_auxiliary": True}
            own = dist.Bernoulli(logits=self.guess_t(x)[..., 0])
            t = pyro.sample("t", own, obs=t, infer=mark)
            loc = self.guess_y(torch.cat([x, t[:, None]], -1))[..., 0]
            y = pyro.sample("y", dist.Normal(loc, 1.0), obs=y, infer=mark)
            seen = torch.cat([x, t[:, None], y[:, None]], -1)
            loc, raw = (0.5 * self.encoder(seen)).unbind(-1)
            pyro.sample("z", dist.Normal(loc, softplus(raw + 0.5)))

    def template(self, n: int) -> Batch:
        return torch.zeros(n, 3), torch.zeros(n), torch.zeros(n)

    def log_p(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        z = LINE.to(x)[:, None]
        each = zip(self.densities(z, t), (x, t, y), strict=True)
        terms = sum(fn.log_prob(value) for fn, value in each)
        return integral(dist.Normal(0.0, 1.0).log_prob(z) + terms, STEP)


class Mixture(nn.Module):
    """A mixture whose component only the model has; it is summed out."""

    def __init__(self) -> None:
        super().__init__()
        self.weights, self.locs = nn.Parameter(torch.zeros(K)), nn.Parameter(torch.randn(K, 2))

    def model(self, x: Tensor) -> None:
        pyro.module("pair", self)
        with pyro.plate("data", len(x)):
            weights = dist.Categorical(logits=self.weights)
            k = pyro.sample("k", weights, infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(self.locs[k], 1.0).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        pass

    def template(self, n: int) -> Batch:
        return (torch.zeros(n, 2),)

    def log_p(self, x: Tensor) -> Tensor:
        each = dist.Normal(self.locs[:, None], 1.0).log_prob(x).sum(-1)
        return (self.weights.log_softmax(0)[:, None] + each).logsumexp(0)


class BayesianMixture(nn.Module):
    """The mixture of Pyro's tutorial: global weights and means under ``AutoDelta``."""

    def __init__(self) -> None:
        super().__init__()
        hidden = pyro.poutine.block(self.model, expose=["weights", "locs"])
        self.guide = AutoDelta(hidden)

    @config_enumerate
    def model(self, x: Tensor) -> None:
        weights = pyro.sample("weights", dist.Dirichlet(x.new_full((K,), 0.5)))
        with pyro.plate("components", K):
            locs = pyro.sample("locs", dist.Normal(0.0, 3.0))
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Categorical(weights))
            pyro.sample("x", dist.Normal(locs[k], 1.0), obs=x)

    def template(self, n: int) -> Batch:
        return (torch.zeros(n),)

    def log_p(self, x: Tensor) -> Tensor:
        found = self.guide.median()
        each = dist.Normal(found["locs"][:, None], 1.0).log_prob(x)
        return (found["weights"].log()[:, None] + each).logsumexp(0)


class Marginal(nn.Module):
    """A mixture without a discrete site, by ``MixtureSameFamily``, and a normal code."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.locs = nn.Linear(2, 2), nn.Parameter(torch.randn(K, 2))

    def observation(self, z: Tensor) -> dist.Distribution:
        parts = dist.Normal(self.locs + z[..., None, None], 1.0).to_event(1)
        return dist.MixtureSameFamily(dist.Categorical(logits=self.locs.sum(-1)), parts)

    def model(self, x: Tensor) -> None:
        pyro.module("pair", self)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", self.observation(z), obs=x)

    def guide(self, x: Tensor) -> None:
        loc, raw = (0.5 * self.encoder(x)).unbind(-1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, softplus(raw + 0.5)))

    def template(self, n: int) -> Batch:
        return (torch.zeros(n, 2),)

    def log_p(self, x: Tensor) -> Tensor:
        z = LINE.to(x)[:, None]
        each = self.observation(z).log_prob(x)
        return integral(dist.Normal(0.0, 1.0).log_prob(z) + each, STEP)


class Hmm(nn.Module):
    """A hidden Markov model: enumerated states in ``pyro.markov``."""

    steps = 4

    def __init__(self) -> None:
        super().__init__()
        self.moves, self.locs = nn.Parameter(torch.randn(K, K)), nn.Parameter(torch.randn(K))

    def model(self, x: Tensor) -> None:
        pyro.module("pair", self)
        with pyro.plate("data", len(x)):
            state = torch.zeros((), dtype=torch.long)
            for t in pyro.markov(range(self.steps)):
                move = dist.Categorical(logits=self.moves[state])
                state = pyro.sample(f"s{t}", move, infer={"enumerate": "parallel"})
                pyro.sample(f"x{t}", dist.Normal(self.locs[state], 1.0), obs=x[:, t])

    def guide(self, x: Tensor) -> None:
        pass

    def template(self, n: int) -> Batch:
        return (torch.zeros(n, self.steps),)

    def log_p(self, x: Tensor) -> Tensor:
        emit = dist.Normal(self.locs, 1.0).log_prob(x[..., None])
        moves = self.moves.log_softmax(-1)
        forward = moves[0] + emit[:, 0]
        for t in range(1, self.steps):
            forward = (forward[..., None] + moves).logsumexp(-2) + emit[:, t]
        return forward.logsumexp(-1)


class Lda(nn.Module):
    """LDA: a Dirichlet for each document, and an enumerated topic for each of its words."""

    words, vocabulary = 4, 5

    def __init__(self) -> None:
        super().__init__()
        self.topics = nn.Parameter(torch.randn(2, self.vocabulary))
        self.encoder = nn.Linear(self.vocabulary, 2)

    def model(self, x: Tensor) -> None:
        pyro.module("pair", self)
        with pyro.plate("documents", len(x), dim=-1):
            theta = pyro.sample("theta", dist.Dirichlet(self.topics.new_ones(2)))
            with pyro.plate("words", self.words, dim=-2):
                own = dist.Categorical(theta)
                k = pyro.sample("topic", own, infer={"enumerate": "parallel"})
                pyro.sample("x", dist.Categorical(logits=self.topics[k]), obs=x.mT.long())

    def guide(self, x: Tensor) -> None:
        counts = one_hot(x.long(), self.vocabulary).sum(-2).to(self.topics)
        with pyro.plate("documents", len(x), dim=-1):
            pyro.sample("theta", dist.Dirichlet(softplus(0.3 * self.encoder(counts) + 1)))

    def template(self, n: int) -> Batch:
        return (torch.zeros(n, self.words, dtype=torch.long),)

    def log_p(self, x: Tensor) -> Tensor:
        ticks = (torch.arange(400, dtype=self.topics.dtype) + 0.5) / 400
        word = torch.stack([ticks, 1 - ticks], -1) @ self.topics.softmax(-1)
        return integral(word.log()[:, x.long()].sum(-1), 1 / 400)


class Collapsed(Lda):
    """The same, with the topic of each word summed out by hand."""

    def model(self, x: Tensor) -> None:
        pyro.module("pair", self)
        with pyro.plate("documents", len(x), dim=-1):
            theta = pyro.sample("theta", dist.Dirichlet(self.topics.new_ones(2)))
            word = theta @ self.topics.softmax(-1)
            wide = dist.Categorical(word[..., None, :]).expand((*word.shape[:-1], self.words))
            pyro.sample("x", wide.to_event(1), obs=x.long())


class Air(nn.Module):
    """AIR: up to two objects, each present or not; absent objects are masked."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.looks = nn.Linear(2, 6), nn.Parameter(torch.randn(2, 2))

    def model(self, x: Tensor) -> None:
        pyro.module("pair", self)
        with pyro.plate("data", len(x)):
            loc, present = x.new_zeros(2), x.new_ones(())
            for t in range(2):
                present = pyro.sample(f"present{t}", dist.Bernoulli(0.6 * present))
                what = dist.Normal(0.0, 1.0).mask(present.bool())
                what = pyro.sample(f"what{t}", what)
                loc = loc + (present * what)[..., None] * self.looks[t]
            pyro.sample("x", dist.Normal(loc, 0.8).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        numbers = 0.5 * self.encoder(x)
        with pyro.plate("data", len(x)):
            present = x.new_ones(())
            for t in range(2):
                own = present * numbers[..., t].sigmoid()
                present = pyro.sample(f"present{t}", dist.Bernoulli(own))
                what = dist.Normal(numbers[..., 2 + t], softplus(numbers[..., 4 + t] + 0.5))
                pyro.sample(f"what{t}", what.mask(present.bool()))

    def template(self, n: int) -> Batch:
        return (torch.zeros(n, 2),)

    def log_p(self, x: Tensor) -> Tensor:
        noise, terms = 0.64 * torch.eye(2, dtype=x.dtype), []
        for number, weight in enumerate((0.4, 0.24, 0.36)):
            looks = self.looks[:number]
            fn = dist.MultivariateNormal(x.new_zeros(2), noise + looks.mT @ looks)
            terms.append(fn.log_prob(x) + torch.tensor(weight).log())
        return torch.stack(terms).logsumexp(0)


class Growing(nn.Module):
    """A site for each step of the longest sequence, so that minibatches have other sites."""

    def __init__(self) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(0.4))

    def model(self, x: Tensor, lengths: Tensor) -> None:
        pyro.module("pair", self)
        with pyro.plate("data", len(x)):
            for t in range(int(lengths.max())):
                with pyro.poutine.mask(mask=lengths > t):
                    z = pyro.sample(f"z{t}", dist.Normal(0.0, 1.0))
                    pyro.sample(f"x{t}", dist.Normal(z, 0.8), obs=x[:, t])

    def guide(self, x: Tensor, lengths: Tensor) -> None:
        with pyro.plate("data", len(x)):
            for t in range(int(lengths.max())):
                with pyro.poutine.mask(mask=lengths > t):
                    pyro.sample(f"z{t}", dist.Normal(self.slope * x[:, t], 0.8))

    def template(self, n: int) -> Batch:
        return torch.zeros(n, 3), torch.full((n,), 3)

    def log_p(self, x: Tensor, lengths: Tensor) -> Tensor:
        each = dist.Normal(0.0, 1.64**0.5).log_prob(x)
        return torch.where(torch.arange(3) < lengths[:, None], each, 0.0).sum(-1)


def enum() -> TraceEnum_ELBO:
    return TraceEnum_ELBO(max_plate_nesting=1)


def enum_of_words() -> TraceEnum_ELBO:
    return TraceEnum_ELBO(max_plate_nesting=2)


def labels(n: int = 24) -> Tensor:
    return torch.randint(0, K, (n,), generator=torch.Generator().manual_seed(5))


def text() -> Batch:
    return (torch.randint(0, 5, (24, 4), generator=torch.Generator().manual_seed(6)),)


def growing() -> Batch:
    lengths = torch.randint(1, 4, (24,), generator=torch.Generator().manual_seed(7))
    return rows(24, 3), lengths


def treated() -> Batch:
    return rows(24, 3), (rows(24, seed=8) > 0).to(torch.get_default_dtype()), rows(24, seed=9)


def three() -> Batch:
    return (rows(24, 3),)


def labeled() -> Batch:
    return rows(24, 3), labels()


def pairs_of() -> Batch:
    return (rows(24, 2),)


EXACT = Refusal(
    "all latents are summed out (enumerated), so log p(x) from log_likelihood is exact",
    "all latents are summed out, so `log_likelihood` is exact",
)
UNDRAWN = Refusal(
    "needs a latent of the model that the guide draws", "the guide does not draw a latent"
)
DRAWN = Refusal(
    "is discrete, so it must be enumerated", "a discrete latent is drawn; it must be enumerated"
)

IDIOMS = [
    Idiom("M2: classes enumerated in the guide", SemiSupervised, three, enum),
    Idiom("scANVI: a classifier as a factor of the guide", Labeled, labeled),
    Idiom("A classifier of the guide that observes labels at its own site", Auxiliary, labeled),
    Idiom(
        "scANVI: labels observed in model and guide",
        Observing,
        labeled,
        needs='the site of the guide has `infer={"is_auxiliary": True}`',
    ),
    Idiom(
        "CEVAE: treatment and outcome observed in model and guide",
        Cevae,
        treated,
        needs='the sites of the guide have `infer={"is_auxiliary": True}`',
    ),
    Idiom(
        "Mixture, enumerated in the model",
        Mixture,
        pairs_of,
        enum,
        refuses={
            "refine": UNREFINED,
            "gaps": UNREFINED,
            "nuts": EXACT,
            "anneal": EXACT,
            "calibration": UNDRAWN,
        },
    ),
    Idiom(
        "Bayesian mixture: `AutoDelta` and `config_enumerate`",
        BayesianMixture,
        lambda: (rows(24),),
        enum,
        refuses=NO_LOCAL | SHARED,
    ),
    Idiom("`MixtureSameFamily` as likelihood", Marginal, pairs_of),
    Idiom(
        "HMM: enumerated states in `pyro.markov`",
        Hmm,
        lambda: (rows(24, 4),),
        enum,
        site="x0",
        needs="you name a site to `reconstruct` and `sample`, because each step has its own",
        refuses={
            "refine": UNREFINED,
            "gaps": UNREFINED,
            "nuts": EXACT,
            "anneal": EXACT,
            "predictive_check": PARTS,
            "calibration": PARTS,
        },
    ),
    Idiom(
        "LDA: an enumerated topic for each word of a document",
        Lda,
        text,
        enum_of_words,
    ),
    Idiom("LDA with the topics of words summed out by hand", Collapsed, text),
    Idiom(
        "AIR: a drawn number of objects, absent ones masked",
        Air,
        pairs_of,
        refuses={"nuts": DRAWN, "anneal": DRAWN},
    ),
    Idiom(
        "Sites in a Python loop over the longest sequence of the minibatch",
        Growing,
        growing,
        **STEPS,
    ),
]
