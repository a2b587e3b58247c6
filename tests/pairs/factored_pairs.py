"""Pairs whose enumerated latents are in ``pyro.markov`` or in a plate within the datum.

Each has ``log_p``, by the forward algorithm or by a sum over all paths.
"""

from itertools import product

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

MARKED = {"enumerate": "parallel"}
K, WORDS = 3, 5


def at_start() -> Tensor:
    return torch.zeros((), dtype=torch.long)


def normal(loc: Tensor) -> dist.Distribution:
    return dist.Normal(loc, 1.0)


class Hmm(nn.Module):
    """States that only the model has."""

    steps = 4

    def __init__(self) -> None:
        super().__init__()
        self.moves, self.locs = nn.Parameter(torch.randn(K, K)), nn.Parameter(torch.randn(K))

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            state = at_start()
            for t in pyro.markov(range(self.steps)):
                move = dist.Categorical(logits=self.moves[state])
                state = pyro.sample(f"s{t}", move, infer=MARKED)
                pyro.sample(f"x{t}", normal(self.locs[state]), obs=x[:, t])

    def guide(self, x: Tensor) -> None:
        pass

    def template(self, n: int) -> tuple[Tensor, ...]:
        return (torch.zeros(n, self.steps),)

    def paths(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """log p(path) and log p(x | path) of all paths, of shape (paths, n)."""
        prior, seen = [], []
        for path in product(range(K), repeat=self.steps):
            states = torch.tensor(path)
            before = torch.cat([torch.zeros(1, dtype=torch.long), states[:-1]])
            prior.append(self.moves.log_softmax(-1)[before, states].sum().expand(len(x)))
            seen.append(normal(self.locs[states]).log_prob(x).sum(-1))
        return torch.stack(prior), torch.stack(seen)

    def log_p(self, x: Tensor) -> Tensor:
        return sum(self.paths(x)).logsumexp(0)


class GuidedHmm(Hmm):
    """The guide enumerates the states."""

    def __init__(self) -> None:
        super().__init__()
        self.rows, self.slopes = nn.Parameter(torch.randn(K, K)), nn.Parameter(torch.randn(K))

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            state = at_start()
            for t in pyro.markov(range(self.steps)):
                own = dist.Categorical(logits=self.rows[state] + x[:, t, None] * self.slopes)
                state = pyro.sample(f"s{t}", own, infer=MARKED)


class SecondOrder(Hmm):
    """Each state depends on the two states before it."""

    def __init__(self) -> None:
        super().__init__()
        self.moves = nn.Parameter(torch.randn(K, K, K))

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            one = two = at_start()
            for t in pyro.markov(range(self.steps), history=2):
                move = dist.Categorical(logits=self.moves[one, two])
                state = pyro.sample(f"s{t}", move, infer=MARKED)
                pyro.sample(f"x{t}", normal(self.locs[state]), obs=x[:, t])
                one, two = two, state

    def log_p(self, x: Tensor) -> Tensor:
        found = []
        for path in product(range(K), repeat=self.steps):
            s = torch.tensor((0, 0, *path))
            prior = self.moves.log_softmax(-1)[s[:-2], s[1:-1], s[2:]].sum()
            found.append(prior + normal(self.locs[s[2:]]).log_prob(x).sum(-1))
        return torch.stack(found).logsumexp(0)


class Factorial(Hmm):
    """Two chains of states."""

    steps = 3

    def __init__(self) -> None:
        super().__init__()
        self.others, self.locs = nn.Parameter(torch.randn(2, 2)), nn.Parameter(torch.randn(2, K))

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            a = b = at_start()
            for t in pyro.markov(range(self.steps)):
                a = pyro.sample(f"a{t}", dist.Categorical(logits=self.others[a]), infer=MARKED)
                b = pyro.sample(f"b{t}", dist.Categorical(logits=self.moves[b]), infer=MARKED)
                pyro.sample(f"x{t}", normal(self.locs[a, b]), obs=x[:, t])

    def log_p(self, x: Tensor) -> Tensor:
        pairs = self.others.log_softmax(-1)[:, None, :, None] + self.moves.log_softmax(-1)[:, None]
        moves = pairs.reshape(2 * K, 2 * K)
        emit = normal(self.locs.flatten()).log_prob(x[..., None])
        forward = moves[0] + emit[:, 0]
        for t in range(1, self.steps):
            forward = (forward[..., None] + moves).logsumexp(-2) + emit[:, t]
        return forward.logsumexp(-1)


class Tones(nn.Module):
    """A code of the sequence, ragged states given the code, and a plate of tones at each step."""

    def __init__(self) -> None:
        super().__init__()
        self.moves, self.tones = nn.Parameter(torch.randn(K, K)), nn.Parameter(torch.randn(K))
        self.spread = nn.Parameter(torch.tensor(0.6))

    def model(self, x: Tensor, lengths: Tensor) -> None:
        tones = pyro.plate("tones", 2, dim=-2)
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            state = at_start()
            for t in pyro.markov(range(3)):
                with pyro.poutine.mask(mask=lengths > t):
                    logits = self.moves[state] + z[..., None] * torch.arange(K).to(z)
                    state = pyro.sample(f"s{t}", dist.Categorical(logits=logits), infer=MARKED)
                    with tones:
                        own = dist.Bernoulli(logits=self.tones[state])
                        pyro.sample(f"x{t}", own, obs=x[:, t].mT)

    def guide(self, x: Tensor, lengths: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(0 * x[:, 0, 0], softplus(self.spread)))

    def template(self, n: int) -> tuple[Tensor, ...]:
        return torch.zeros(n, 3, 2), torch.full((n,), 3)

    def given(self, z: Tensor, x: Tensor, lengths: Tensor) -> Tensor:
        """log p(x | z) at codes (codes, 1)."""
        emit = dist.Bernoulli(logits=self.tones).log_prob(x[..., None]).sum(2)
        logits = self.moves + z[..., None, None] * torch.arange(K).to(z)
        moves = logits.log_softmax(-1)
        forward = moves[:, :, 0] + emit[:, 0]
        for t in (1, 2):
            ahead = (forward[..., None] + moves).logsumexp(-2) + emit[:, t]
            forward = torch.where((lengths > t)[:, None], ahead, forward)
        return forward.logsumexp(-1)

    def log_p(self, x: Tensor, lengths: Tensor) -> Tensor:
        z = torch.linspace(-8, 8, 801, dtype=x.dtype)[:, None]
        terms = dist.Normal(0.0, 1.0).log_prob(z) + self.given(z, x, lengths)
        return terms.logsumexp(0) + torch.tensor(16 / 800).log()


class Classes(nn.Module):
    """A class of the document, enumerated by the guide, and topics of words, by the model."""

    def __init__(self) -> None:
        super().__init__()
        self.classifier, self.prior = nn.Linear(4, 2), nn.Parameter(torch.randn(2))
        self.mixed = nn.Parameter(torch.randn(2, K))
        self.topics = nn.Parameter(torch.randn(K, WORDS))

    def model(self, x: Tensor) -> None:
        with pyro.plate("documents", len(x), dim=-1):
            y = pyro.sample("y", dist.Categorical(logits=self.prior))
            with pyro.plate("words", 4, dim=-2):
                k = pyro.sample("k", dist.Categorical(logits=self.mixed[y]), infer=MARKED)
                pyro.sample("x", dist.Categorical(logits=self.topics[k]), obs=x.mT)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("documents", len(x), dim=-1):
            logits = self.classifier(x.to(self.prior))
            pyro.sample("y", dist.Categorical(logits=logits), infer=MARKED)

    def template(self, n: int) -> tuple[Tensor, ...]:
        return (torch.zeros(n, 4, dtype=torch.long),)

    def log_p(self, x: Tensor) -> Tensor:
        each = self.mixed.log_softmax(-1)[..., None] + self.topics.log_softmax(-1)
        words = each.logsumexp(1)[:, x].sum(-1)
        return (self.prior.log_softmax(-1)[:, None] + words).logsumexp(0)


class GuidedClasses(Classes):
    """The guide enumerates the topics too."""

    def __init__(self) -> None:
        super().__init__()
        self.guess = nn.Parameter(torch.randn(2, WORDS, K))

    def guide(self, x: Tensor) -> None:
        with pyro.plate("documents", len(x), dim=-1):
            logits = self.classifier(x.to(self.prior))
            y = pyro.sample("y", dist.Categorical(logits=logits), infer=MARKED)
            with pyro.plate("words", 4, dim=-2):
                pyro.sample("k", dist.Categorical(logits=self.guess[y, x.mT]), infer=MARKED)


PAIRS: dict[str, type[nn.Module]] = {
    kind.__name__: kind
    for kind in (Hmm, GuidedHmm, SecondOrder, Factorial, Tones, Classes, GuidedClasses)
}


def made(name: str, n: int = 6) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """A pair in float64 and its data, always the same."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pair = PAIRS[name]().double()
        if isinstance(pair, Hmm):
            return pair, (torch.randn(n, pair.steps, dtype=torch.float64),)
        if isinstance(pair, Tones):
            return pair, (torch.randint(0, 2, (n, 3, 2)).double(), torch.randint(1, 4, (n,)))
        return pair, (torch.randint(0, WORDS, (n, 4)),)
