"""Batches as tuples and dictionaries, integers of every width, and integer data."""

import numpy as np
import pyro
import pyro.distributions as dist
import pyro.optim
import pytest
import torch
from pyro.infer import Trace_ELBO
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import pyro_vae as pv
from pyro_vae.errors import UsageError

N, CLASSES = 12, 3


class Conditional(nn.Module):
    """x is N(table[label], 2) after z is summed out; the label indexes the table."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.tensor([-1.0, 0.5, 2.0]))

    def model(self, x: Tensor, label: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(self.table[label], 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(self, x: Tensor, label: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal((x + self.table[label]) / 2, 0.5**0.5))


class Words(nn.Module):
    """Three words for each datum, which index an embedding; it has no template."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.logits = nn.Embedding(CLASSES, 2), nn.Linear(1, CLASSES)

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            logits = self.logits(z[..., None])[..., None, :].expand(*z.shape, 3, CLASSES)
            pyro.sample("x", dist.Categorical(logits=logits).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        loc = self.embedding(x).mean((-2, -1)) / 2
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, 1.5))

    def log_p(self, x: Tensor) -> Tensor:
        """log p(x) by quadrature."""
        z = torch.linspace(-8, 8, 4001)
        scores = torch.log_softmax(self.logits(z[:, None]), -1)
        joint = scores[:, x].sum(-1) + dist.Normal(0.0, 1.0).log_prob(z)[:, None]
        return (joint.logsumexp(0) + torch.log(z[1] - z[0])).detach()


class Templated(Words):
    def template(self, n: int) -> tuple[Tensor]:
        return (torch.zeros(n, 3, dtype=torch.long),)


class Named(Dataset):
    """Items that are dictionaries."""

    def __init__(self, x: Tensor, label: Tensor) -> None:
        self.x, self.label = x, label

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"label": self.label[i], "x": self.x[i]}


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(N, generator=generator), torch.arange(N) % CLASSES


def fitted(*batch: object, **options: object) -> nn.Module:
    pair = Conditional()
    settings = {"epochs": 2, "batch_size": 5, "learning_rate": 0.1, "engine": "eager"}
    pv.fit(pair, *batch, progress=False, **settings, **options)
    return pair


WIDTHS = [torch.int8, torch.int16, torch.int32, torch.uint8, torch.uint16]


@pytest.mark.parametrize("dtype", WIDTHS)
def test_labels_of_every_width_index_as_int64(dtype):
    x, label = data()
    # With as many rows as classes, an index of type uint8 would be a mask without an error.
    exact = dist.Normal(Conditional().table[label], 2**0.5).log_prob(x).detach()[:3]
    found = pv.log_likelihood(Conditional(), x[:3], label[:3].to(dtype), num_samples=30)
    assert torch.allclose(found.per_datum.float(), exact, atol=1e-4)
    assert pv.check(Conditional(), (x, label.to(dtype))).errors == ()
    table = fitted(x, label.to(dtype)).table
    assert torch.equal(table, fitted(x, label).table)


def test_a_dictionary_and_a_tuple_are_x_and_context_in_every_tool(tmp_path):
    x, label = data()
    wanted = fitted(x, label).table
    assert torch.equal(fitted({"label": label, "x": x}, out=tmp_path / "run").table, wanted)
    assert torch.equal(fitted((x, label), validation={"x": x, "label": label}).table, wanted)
    assert torch.equal(fitted((x.numpy(), label.numpy())).table, wanted)
    assert (tmp_path / "run" / "rows.safetensors").exists()
    pair, named = Conditional(), {"label": label, "x": x}
    assert str(pv.check(pair, named)) == "the pair is sound"
    assert str(pv.check(pair, (x.numpy(), label.numpy()))) == "the pair is sound"
    for tool in (pv.encode, pv.reconstruct, pv.log_likelihood, pv.evaluate):
        options = {"num_samples": 5} if tool in (pv.log_likelihood, pv.evaluate) else {}
        assert str(tool(pair, named, **options)) == str(tool(pair, x, label, **options))
        assert str(tool(pair, (x, label), **options)) == str(tool(pair, x, label, **options))


def test_a_data_set_may_give_dictionaries():
    x, label = data()
    rows = DataLoader(Named(x, label), batch_size=5)
    plain = DataLoader(torch.utils.data.TensorDataset(x, label), batch_size=5)
    assert torch.equal(fitted(rows).table, fitted(plain).table)
    found = pv.log_likelihood(Conditional(), Named(x, label), num_samples=5)
    wanted = pv.log_likelihood(Conditional(), x, label, num_samples=5)
    assert torch.allclose(found.per_datum, wanted.per_datum)


@pytest.mark.parametrize(
    ("batch", "said"),
    [
        ({"x": 0, "labels": 1}, r"must have the arguments of Conditional.model \(x, label\), got "),
        ({"x": 0}, r"must have the arguments of Conditional.model \(x, label\), got x$"),
        ([0, 1], "x must be an array of numbers, got one of list; pass x and each array"),
        ((0,), "x must be an array of numbers, got one of tuple; pass x and each array"),
    ],
)
def test_other_batches_are_one_line(batch, said):
    x = data()
    some = {k: x[i] for k, i in batch.items()} if isinstance(batch, dict) else batch
    some = some if isinstance(some, dict) else type(batch)(x[i] for i in batch)
    for tool in (pv.fit, pv.encode):
        with pytest.raises(UsageError, match=said):
            tool(Conditional(), some)


def test_a_tuple_of_rows_is_still_x():
    rows = tuple([float(k % 2)] * 3 for k in range(4))
    assert pv.encode(pv.VAE.mlp((3,), latent_dim=2), rows)["z"].shape == (4, 2)


def test_check_takes_context_as_every_tool_does():
    assert pv.check(Conditional(), *data()).errors == ()
    with pytest.raises(UsageError, match="pass the objective by its name: check"):
        pv.check(Conditional(), *data(), Trace_ELBO())


@pytest.mark.sample(3)
@pytest.mark.parametrize("kind", [Words, Templated])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int16, torch.uint8])
def test_integer_data_stay_integers_where_the_pair_takes_them(kind, dtype):
    torch.manual_seed(0)
    pair, x = kind(), torch.randint(0, CLASSES, (6, 3))
    pv.fit(pair, x.to(dtype), validation=x, epochs=1, batch_size=4, engine="eager", progress=False)
    found = pv.log_likelihood(pair, x.to(dtype), num_samples=4000)
    assert torch.allclose(found.per_datum.float(), pair.log_p(x), atol=0.05)
    assert pv.check(pair, x.to(dtype)).errors == ()
    assert pv.encode(pair, x.to(dtype))["z"].shape == (6,)
    refined = pv.refine(pair, x.to(dtype), steps=3, num_samples=20, progress=False)
    assert bool(refined.after.per_datum.isfinite().all())
    if kind is Templated:
        assert pv.sample(pair, 2).dtype == torch.int64


OPTIMIZERS = [
    (pyro.optim.Adam, "but Adam fails"),
    (lambda parameters: None, "got an unexpected keyword argument 'lr'"),
    (lambda parameters, lr: None, "but it makes NoneType"),
    (torch.optim.LBFGS, "but LBFGS evaluates the loss again"),
    (torch.optim.SparseAdam, "cannot take a step: SparseAdam does not support dense gradients"),
]


@pytest.mark.parametrize(("optimizer", "said"), OPTIMIZERS)
def test_an_optimizer_that_does_not_fit_is_one_line(optimizer, said):
    with pytest.raises(UsageError, match=f"^optimizer .*{said}") as caught:
        fitted(*data(), optimizer=optimizer)
    assert "\n" not in str(caught.value)


def test_codes_of_any_kind_decode_alike():
    vae = pv.VAE.mlp((4,), latent_dim=2)
    wanted = pv.decode(vae, {"z": torch.ones(3, 2)})
    for codes in (np.ones((3, 2)), [[1, 1]] * 3, torch.ones(3, 2).double(), np.ones((3, 2), int)):
        assert torch.equal(pv.decode(vae, {"z": codes}), wanted)
    with pytest.raises(UsageError, match=r"^the value of 'z' must have shape \(n, 2\), got"):
        pv.decode(vae, {"z": np.zeros((3, 5))})
    with pytest.raises(UsageError, match=r"^values must be a dictionary .*, got ndarray$"):
        pv.decode(vae, np.zeros((3, 2)))
