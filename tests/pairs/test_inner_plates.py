"""`data_plate_at`: the data plate is to the left of plates within the datum."""

import inspect
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from torch import Tensor, nn
from torch.distributions import MultivariateNormal

import pyro_vae as pv
from pyro_vae.compat import free_plate_dims
from pyro_vae.pairs.rng import seeded
from pyro_vae.pairs.scope import scope, using
from pyro_vae.pairs.weights import structure


class Plain(nn.Module):
    """Visits of patients at -1, with patients at -2; ragged by a mask. Not decorated."""

    def __init__(self) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(0.4))

    def model(self, x: Tensor, here: Tensor) -> None:
        with pyro.plate("patients", len(x), dim=-2):
            u = pyro.sample("u", dist.Normal(0.0, 1.0))
            with pyro.plate("visits", 3, dim=-1), pyro.poutine.mask(mask=here):
                z = pyro.sample("z", dist.Normal(u, 0.6))
                pyro.sample("x", dist.Normal(z + 0 * self.slope, 0.7), obs=x)

    def guide(self, x: Tensor, here: Tensor) -> None:
        seen = torch.where(here, x, 0.0)
        with pyro.plate("patients", len(x), dim=-2):
            u = pyro.sample("u", dist.Normal(self.slope * seen.sum(-1, keepdim=True), 0.7))
            with pyro.plate("visits", 3, dim=-1), pyro.poutine.mask(mask=here):
                pyro.sample("z", dist.Normal(0.5 * (u + seen), 0.5))

    def template(self, n: int) -> tuple[Tensor, ...]:
        return torch.zeros(n, 3), torch.ones(n, 3, dtype=torch.bool)

    def log_p(self, x: Tensor, here: Tensor) -> Tensor:
        found = []
        for row, seen in zip(x, here, strict=True):
            number = int(seen.sum())
            cov = torch.ones(number, number, dtype=x.dtype) + 0.85 * torch.eye(number).to(x)
            found.append(MultivariateNormal(row.new_zeros(number), cov).log_prob(row[seen]))
        return torch.stack(found)


class Decorated(Plain):
    model = pv.data_plate_at(-2)(Plain.model)
    guide = pv.data_plate_at(-2)(Plain.guide)


def visits(n: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n)
    x = torch.randn(n, 3, generator=generator, dtype=torch.float64)
    lengths = torch.randint(1, 4, (n,), generator=generator)
    return x, torch.arange(3) < lengths[:, None]


def loss_of(pair: nn.Module, batch: tuple[Tensor, ...], objective: Trace_ELBO) -> Tensor:
    with scope(pair), seeded(2):
        loss = objective.differentiable_loss(pair.model, pair.guide, *batch)
        return torch.stack([loss, *torch.autograd.grad(loss, list(pair.parameters()))])


@pytest.mark.parametrize("particles", [1, 4])
def test_loss_and_gradients_are_those_without_the_decorator(particles: int):
    found = []
    for kind, nesting in ((Plain, 2), (Decorated, 1)):
        options = {"vectorize_particles": particles > 1, "max_plate_nesting": nesting}
        objective = Trace_ELBO(num_particles=particles, **options)
        found.append(loss_of(kind().double(), visits(5), objective))
    torch.testing.assert_close(found[1], found[0])


@pytest.mark.parametrize("n", [1, 3, 6])
def test_log_likelihood_is_the_closed_form(n: int):
    """With as many rows as visits, dimensions could be mistaken for each other."""
    pair, batch = Decorated().double(), visits(n)
    assert not pv.check(pair, batch).errors
    with using(pair, 0):
        assert structure(pair, batch)[:2] == (1, True)
    found = pv.log_likelihood(pair, *batch, num_samples=3000)
    off = (found.per_datum - pair.log_p(*batch)) / found.standard_errors
    assert off.abs().max() < 5
    bound = pv.ImportanceWeightedELBO(300).loss(pair.model, pair.guide, *batch)
    assert abs(-bound - pair.log_p(*batch).sum().item()) < 0.4 * n


def test_hidden_entries_count_for_nothing():
    pair, (x, here) = Decorated().double(), visits(6)
    holes = torch.where(here, x, torch.nan)
    found = [pv.evaluate(pair, part, here, num_samples=20) for part in (x, holes)]
    assert found[0].elbo == found[1].elbo
    assert found[0].log_likelihood == found[1].log_likelihood


def test_codes_have_the_shapes_of_the_program():
    pair, batch = Decorated().double(), visits(6)
    shapes = {name: tuple(value.shape) for name, value in pv.encode(pair, *batch).items()}
    assert shapes == {"u": (6, 1), "z": (6, 3)}
    assert pv.reconstruct(pair, *batch).shape == (6, 3)
    assert pv.sample(pair, 6, *batch[1:]).shape == (6, 3)


def test_the_engine_traces_a_decorated_pair():
    pair, batch, found = Decorated().double(), visits(8), []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for engine in ("eager", "traced"):
            found.append(pv.log_likelihood(pair, *batch, num_samples=3, engine=engine).per_datum)
    torch.testing.assert_close(*found)


class Nested(nn.Module):
    """Data at -3, visits at -2, tests of a visit at -1, and devices to the left, at -4."""

    def __init__(self) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(0.2))

    @pv.data_plate_at(-3)
    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-3):
            u = pyro.sample("u", dist.Normal(0.0, 1.0))
            with pyro.plate("visits", 2, dim=-2):
                z = pyro.sample("z", dist.Normal(u, 0.5))
                pyro.deterministic("twice", 2 * z)
                pyro.factor("half", u.new_tensor(-0.5))
                with pyro.plate("devices", 3, dim=-4), pyro.plate("tests", 2, dim=-1):
                    loc = z + 0 * self.slope
                    pyro.sample("x", dist.Normal(loc, 1.0), obs=x.movedim(1, 0))

    @pv.data_plate_at(-3)
    def guide(self, x: Tensor) -> None:
        seen = x.mean(1).mean(-1, keepdim=True)
        with pyro.plate("data", len(x), dim=-3):
            u = pyro.sample("u", dist.Normal(self.slope * seen.sum(-2, keepdim=True), 0.6))
            with pyro.plate("visits", 2, dim=-2):
                pyro.sample("z", dist.Normal(0.5 * u + 0.5 * seen, 0.4))

    def log_p(self, x: Tensor) -> Tensor:
        """In closed form; x has the shape (n, devices, visits, tests)."""
        visit = torch.arange(2)[None, :, None].expand(3, 2, 2).flatten()
        same = (visit[:, None] == visit).to(x)
        cov = 1 + 0.25 * same + torch.eye(12).to(x)
        return MultivariateNormal(x.new_zeros(12), cov).log_prob(x.flatten(1)) - 0.5 * 2


def test_plates_to_the_right_and_to_the_left():
    generator = torch.Generator().manual_seed(0)
    pair, x = Nested().double(), torch.randn(4, 3, 2, 2, generator=generator, dtype=torch.float64)
    with using(pair, 0):
        assert structure(pair, (x,))[:2] == (2, True)
    found = pv.log_likelihood(pair, x, num_samples=4000)
    assert ((found.per_datum - pair.log_p(x)) / found.standard_errors).abs().max() < 5


class Counted(Plain):
    """The plate has the number of all data."""

    @pv.data_plate_at(-2)
    def model(self, x: Tensor, here: Tensor) -> None:
        with pyro.plate("patients", 60, subsample_size=len(x), dim=-2):
            u = pyro.sample("u", dist.Normal(0.0, 1.0))
            with pyro.plate("visits", 3, dim=-1):
                pyro.sample("x", dist.Normal(u + 0 * self.slope, 0.7), obs=x)

    @pv.data_plate_at(-2)
    def guide(self, x: Tensor, here: Tensor) -> None:
        with pyro.plate("patients", 60, subsample_size=len(x), dim=-2):
            pyro.sample("u", dist.Normal(self.slope * x.sum(-1, keepdim=True), 0.4))


class Bare(Counted):
    """The same without the decorator."""

    model = inspect.unwrap(Counted.model)
    guide = inspect.unwrap(Counted.guide)


def test_a_subsampled_plate_counts_all_data():
    pair, (x, here) = Counted().double(), visits(6)
    found = pv.log_likelihood(pair, x, here, num_samples=2000)
    cov = torch.ones(3, 3, dtype=x.dtype) + 0.49 * torch.eye(3)
    truth = MultivariateNormal(x.new_zeros(3), cov).log_prob(x)
    assert ((found.per_datum - truth) / found.standard_errors).abs().max() < 5
    losses = [loss_of(kind().double(), (x, here), Trace_ELBO()) for kind in (Counted, Bare)]
    torch.testing.assert_close(*losses)
    elbo = pv.evaluate(pair, x, here, num_samples=2).elbo
    assert losses[0][0].item() / 60 == pytest.approx(-elbo, abs=0.6)


class Broken(Plain):
    @pv.data_plate_at(-2)
    def guide(self, x: Tensor, here: Tensor) -> None:
        Plain.guide(self, x, here)


class Global(Decorated):
    @pv.data_plate_at(-2)
    def model(self, x: Tensor, here: Tensor) -> None:
        pyro.sample("w", dist.Normal(0.0, 1.0))
        Plain.model(self, x, here)


class Marked(Decorated):
    @pv.data_plate_at(-2)
    def model(self, x: Tensor, here: Tensor) -> None:
        with pyro.plate("patients", len(x), dim=-2):
            infer = {"enumerate": "parallel"}
            k = pyro.sample("k", dist.Bernoulli(0.5), infer=infer)
            with pyro.plate("visits", 3, dim=-1):
                pyro.sample("x", dist.Normal(k + self.slope, 0.7), obs=x)

    def guide(self, x: Tensor, here: Tensor) -> None:
        pass


class Elsewhere(Plain):
    model = pv.data_plate_at(-3)(Plain.model)
    guide = pv.data_plate_at(-3)(Plain.guide)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (Plain, "must have dim=-1: decorate model and guide with @pyro_vae.data_plate_at(-2)"),
        (Broken, "must have dim=-1: decorate model and guide with @pyro_vae.data_plate_at(-2)"),
        (Global, "latent site 'w' is outside the data plate at dim=-2"),
        (Elsewhere, "latent site 'u' is outside the data plate at dim=-3"),
        (Marked, "site 'k' is marked for enumeration, which `pyro_vae.data_plate_at` does not"),
    ],
)
def test_other_pairs_are_refused_in_one_line(kind: type[nn.Module], words: str):
    pair, batch = kind().double(), visits(6)
    for tool in (
        lambda: pv.fit(pair, *batch, epochs=1, progress=False),
        lambda: pv.evaluate(pair, *batch, num_samples=2),
        lambda: pv.encode(pair, *batch),
        lambda: pv.log_likelihood(pair, *batch),
    ):
        with pytest.raises(pv.UsageError) as said:
            tool()
        assert words.replace("`", "") in str(said.value)
        assert "\n" not in str(said.value)


class Exchanged(nn.Module):
    """Visits at -2, with patients at -1."""

    def __init__(self) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(0.5))

    def model(self, x: Tensor) -> None:
        with pyro.plate("patients", len(x), dim=-1), pyro.plate("visits", 3, dim=-2):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 0.7), obs=x.mT)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("patients", len(x), dim=-1), pyro.plate("visits", 3, dim=-2):
            pyro.sample("z", dist.Normal(self.slope * x.mT, 0.5))


class Straight(Exchanged):
    @pv.data_plate_at(-2)
    def model(self, x: Tensor) -> None:
        with pyro.plate("patients", len(x), dim=-2), pyro.plate("visits", 3, dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 0.7), obs=x)

    @pv.data_plate_at(-2)
    def guide(self, x: Tensor) -> None:
        with pyro.plate("patients", len(x), dim=-2), pyro.plate("visits", 3, dim=-1):
            pyro.sample("z", dist.Normal(self.slope * x, 0.5))


@pytest.mark.parametrize("kind", [Exchanged, Straight])
def test_units_of_an_inner_plate_are_those_of_a_datum(kind: type[nn.Module]):
    """Only the first visit varies, so only its unit is active."""
    x = torch.randn(100, 3, generator=torch.Generator().manual_seed(0))
    x[:, 1:] *= 0.05
    found = pv.evaluate(kind(), x, num_samples=2)
    assert (found.active_units, found.num_units) == ({"z": 1}, {"z": 3})


@pytest.mark.parametrize("dim", [-1, 0, 1, True, "x"])
def test_a_dimension_that_needs_no_decorator_is_refused(dim: int):
    with pytest.raises(pv.UsageError, match="dim must be -2 or less, got"):
        pv.data_plate_at(dim)


def test_plates_outside_keep_their_dimensions():
    with pyro.plate("outer", 2, dim=-1):
        with free_plate_dims(), pyro.plate("inner", 3, dim=-1):
            pass
        with pytest.raises(ValueError, match="collide"), pyro.plate("other", 2, dim=-1):
            pass
    with pyro.plate("outer", 2, dim=-1):
        pass
