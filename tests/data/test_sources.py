"""Tensors, data sets and loaders as sources of minibatches."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from data_helpers import LOOKING, Recorder, flat_images, small
from pairs import make
from pyro.infer import SVI, Trace_ELBO
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import pyro_vae as pv
from pyro_vae.data.order import Place
from pyro_vae.data.sources import Arrays, source
from pyro_vae.errors import UsageError

# Rows in memory


def test_rows_keep_their_type_and_memory():
    array = flat_images(8, 4)
    (tensor,) = source(array).tensors
    assert tensor.dtype == torch.uint8
    assert tensor.data_ptr() == array.ctypes.data
    assert source(array > 3).tensors[0].dtype == torch.bool


@pytest.mark.parametrize(
    "array",
    [
        np.ones((8, 4))[::-1],
        np.broadcast_to(np.ones(4), (8, 4)),
        np.ones((8, 4), np.float16),
        np.ones((8, 4), np.uint16),
        np.asfortranarray(np.ones((8, 4))),
    ],
    ids=["reversed", "read-only", "float16", "uint16", "fortran"],
)
def test_any_array_of_numbers_is_accepted(array):
    pv.fit(small(), array, epochs=1, batch_size=4, progress=False, engine="eager")


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize(("n", "size"), [(10, 5), (10, 4), (10, 10), (10, 16), (7, 1)])
@pytest.mark.parametrize("kind", ["arrays", "dataset", "loader"])
def test_batches_hold_each_row_once(kind, n, size, shuffle):
    tensors = torch.arange(n)[:, None] * torch.ones(3), torch.arange(n)
    if kind == "arrays":
        given = source(tensors[0], tensors[1:])
    else:
        dataset = TensorDataset(*tensors)
        loader = DataLoader(dataset, batch_size=size, shuffle=shuffle)
        given = source(dataset if kind == "dataset" else loader)
    assert len(given) == n
    batches = list(given.epoch(size, Place(0, 0)) if shuffle else given.batches(size))
    assert [len(x) for x, _ in batches] == [size] * (n // size) + [n % size] * (n % size > 0)
    index = torch.cat([i for _, i in batches])
    assert index.sort().values.tolist() == list(range(n))
    assert all(torch.equal(x[:, 0].long(), i) for x, i in batches)
    if not shuffle:
        assert index.tolist() == list(range(n))


def test_shuffling_differs_by_epoch_and_follows_the_seed():
    arrays = Arrays([torch.arange(50)])

    def order(seed):
        places = [Place(seed, epoch) for epoch in range(2)]
        return [torch.cat([x for (x,) in arrays.epoch(7, place)]) for place in places]

    (first, second), (again, _), (other, _) = order(0), order(0), order(1)
    assert torch.equal(first, again)
    assert not torch.equal(first, second)
    assert not torch.equal(first, other)


# Data sets and loaders


class Certain(nn.Module):
    """A pair whose guide is a point, so that results depend only on the rows."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.encoder, self.decoder = nn.Linear(4, 2), nn.Linear(2, 4)

    def model(self, x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), 1.0).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Delta(self.encoder(x), event_dim=1))

    def template(self, n):
        return (torch.zeros(n, 4),)


def table(n, seed=1):
    return torch.randn(n, 4, generator=torch.Generator().manual_seed(seed))


def fitted(x, **options):
    pair = Certain()
    options = {"epochs": 3, "batch_size": 4, "learning_rate": 0.01, "progress": False} | options
    return pair, pv.fit(pair, x, **options)


def close(pair, other, **tolerance):
    for (name, value), expected in zip(
        pair.state_dict().items(), other.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(value, expected, msg=name, **tolerance)


@pytest.mark.parametrize("n", [8, 10])
def test_the_last_smaller_batch_is_counted(n):
    pair, history = fitted(table(n), learning_rate=1e-30, epochs=1)
    truth = pv.evaluate(pair, table(n), num_samples=1)
    assert history["elbo"][0] == pytest.approx(truth.log_joint, rel=1e-5)
    assert history["objective"][0] == pytest.approx(truth.log_joint, rel=1e-5)


@pytest.mark.sample(3)
@pytest.mark.parametrize(
    "wrap",
    [
        lambda x: x.numpy(),
        lambda x: TensorDataset(x),
        lambda x: TensorDataset(x, torch.arange(len(x))),
        lambda x: DataLoader(TensorDataset(x), batch_size=len(x)),
        lambda x: DataLoader(x, batch_size=len(x), shuffle=True),
    ],
    ids=["numpy", "dataset", "labeled dataset", "loader", "shuffling loader"],
)
def test_every_source_trains_as_the_tensor_does(wrap):
    x = table(12)
    pair, history = fitted(x, batch_size=12, validation=x)
    other, same = fitted(wrap(x), batch_size=12, validation=wrap(x))
    close(other, pair, rtol=1e-4, atol=1e-6)
    for column in ("elbo", "validation_elbo", "gradient_norm"):
        assert same[column] == pytest.approx(history[column], rel=1e-4)
    for number in ("log_joint", "reconstruction", "kl"):
        measured = getattr(pv.evaluate(other, wrap(x), num_samples=2), number)
        assert measured == pytest.approx(
            getattr(pv.evaluate(pair, x, num_samples=2), number), rel=1e-4
        )
    torch.testing.assert_close(
        pv.encode(other, wrap(x))["z"].sort(0).values, pv.encode(pair, x)["z"].sort(0).values
    )


def test_a_loader_keeps_its_order_and_batch_size():
    x = table(10)
    pair, _ = fitted(DataLoader(TensorDataset(x), batch_size=4), batch_size=1)
    other = Certain()
    with pyro.get_param_store().scope():
        program = pyro.optim.Adam({"lr": 0.01})

        def model(batch):
            pyro.module("pair", other)
            other.model(batch)

        svi = SVI(model, other.guide, program, Trace_ELBO())
        for _ in range(3):
            for batch in x.split(4):
                svi.step(batch)
    close(pair, other, rtol=1e-5, atol=1e-6)


def test_a_pair_without_context_ignores_the_labels_of_a_data_set():
    dataset = TensorDataset(torch.rand(8, 4).round(), torch.arange(8))
    pair = small()
    history = pv.fit(
        pair, dataset, validation=dataset, epochs=2, batch_size=4, progress=False, engine="eager"
    )
    assert np.isfinite(history["validation_elbo"]).all()
    assert pv.reconstruct(pair, dataset).shape == (8, 4)


def test_a_data_set_gives_context_to_a_conditional_pair():
    x, context = torch.rand(8, 4).round(), torch.rand(8, 2)
    pair = small(context_shapes=[(2,)])
    pv.fit(pair, TensorDataset(x, context), epochs=1, batch_size=4, progress=False, engine="eager")
    torch.testing.assert_close(
        pv.encode(pair, TensorDataset(x, context))["z"], pv.encode(pair, x, context)["z"]
    )


@pytest.mark.parametrize("wrap", [TensorDataset, lambda *x: DataLoader(TensorDataset(*x), 8)])
def test_gray_rows_of_a_data_set_are_binarized_like_those_of_a_tensor(wrap):
    pair, x = Recorder(), torch.full((8, 50), 127, dtype=torch.uint8)
    pv.fit(pair, wrap(x, torch.arange(8)), epochs=2, batch_size=8, **LOOKING)
    first, second = pair.seen
    assert first.unique().tolist() == [0, 1]
    assert not torch.equal(first, second)


@pytest.mark.parametrize("wrap", [lambda x: x, TensorDataset, lambda x: DataLoader(x, 4)])
def test_fit_restores_the_generator_of_the_caller(wrap):
    pair, before = small(), torch.get_rng_state()
    pv.fit(pair, wrap(table(8) > 0), epochs=1, batch_size=4, progress=False, engine="eager")
    assert torch.equal(torch.get_rng_state(), before)


def test_data_that_a_pair_cannot_use_give_an_error_in_one_line():
    pair = make("plain")
    for call in (pv.evaluate, pv.log_likelihood, pv.gaps, pv.anneal, pv.predictive_check):
        with pytest.raises(UsageError, match=r"fails on a batch of shapes \(5, 7\): Runtime") as e:
            call(pair, torch.ones(5, 7))
        assert "\n" not in str(e.value)


def test_a_guide_outside_the_support_is_named():
    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def model(self, x):
            with pyro.plate("data", len(x), dim=-1):
                tau = pyro.sample("tau", dist.HalfNormal(x.new_ones(len(x))))
                pyro.sample("x", dist.Normal(tau[..., None], 1.0).to_event(1), obs=x)

        def guide(self, x):
            with pyro.plate("data", len(x), dim=-1):
                pyro.sample("tau", dist.Normal(x.new_zeros(len(x)), self.scale))

    with pytest.raises(UsageError, match=r"of site 'tau' cannot be computed: .*HalfNormal") as e:
        pv.log_likelihood(Half(), torch.ones(9, 2), num_samples=30)
    assert "\n" not in str(e.value)
