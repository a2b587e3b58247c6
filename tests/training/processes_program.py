"""What each of several processes runs in `test_processes.py`; it writes its results to a file."""

import gc
import sys
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from torch import distributed, nn
from torch.utils.data import DataLoader, TensorDataset

import pyro_vae as pv
from pyro_vae.data.order import order
from pyro_vae.pairs.processes import here

OPTIONS = {"engine": "eager", "progress": False, "batch_size": 8, "learning_rate": 1e-2}

X = (torch.arange(17 * 4).reshape(17, 4) * 0.37).sin()
NOISE = (torch.arange(17 * 2).reshape(17, 2) * 0.91).cos()


class FixedNoise(dist.Normal):
    """A Gaussian whose draws use noise that belongs to the rows."""

    def __init__(self, loc, scale, noise):
        super().__init__(loc, scale)
        self.noise = noise

    def expand(self, shape, _instance=None):
        return self

    def rsample(self, sample_shape=()):
        return self.loc + self.scale * self.noise


class Fixed(nn.Module):
    """A pair with weights that all rows share, and whose gradient depends only on its rows."""

    def __init__(self, shared=True):
        super().__init__()
        torch.manual_seed(0)
        self.encoder, self.decoder = nn.Linear(4, 4), nn.Linear(2, 4)
        self.loc, self.shared = nn.Parameter(torch.ones(4)), shared

    def model(self, x, noise):
        shift = pyro.sample("w", dist.Normal(torch.zeros(4), 1.0).to_event(1))
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x), 2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z) + shift, 1.0).to_event(1), obs=x)

    def guide(self, x, noise):
        pyro.sample("w", FixedNoise(self.loc, torch.ones(4), torch.full((4,), 0.3)).to_event(1))
        with pyro.plate("data", len(x), dim=-1):
            loc, scale = self.encoder(x).chunk(2, -1)
            q = FixedNoise(loc, scale.exp(), noise)
            pyro.sample("z", q.to_event(1))


class Recorder(torch.optim.SGD):
    """Keeps the gradient of each step."""

    gradients: list

    def step(self, closure=None):
        parameters = [p for group in self.param_groups for p in group["params"]]
        self.gradients.append(torch.cat([p.grad.flatten() for p in parameters]))
        return super().step(closure)


def recorded(rows=(X, NOISE), engine="eager"):
    """The gradients of two epochs, and the history."""
    found = []

    def made(parameters, lr):
        optimizer = Recorder(parameters, lr)
        optimizer.gradients = found
        return optimizer

    options = OPTIONS | {"engine": engine}
    validation = (X[:7], NOISE[:7])
    history = pv.fit(Fixed(), *rows, validation=validation, optimizer=made, epochs=2, **options)
    plain = [[e.elbo, e.validation.elbo, e.gradient_norm, e.kl["w"]] for e in history.epochs]
    return torch.stack(found), torch.tensor(plain, dtype=torch.float64)


class Items(TensorDataset):
    """A data set that keeps which rows were read."""

    def __init__(self, *tensors):
        super().__init__(*tensors)
        self.read = []

    def __getitem__(self, index):
        self.read.append(int(index))
        return super().__getitem__(index)


class Fails(nn.Module):
    """A pair that fails in one process in training."""

    def __init__(self, bad):
        super().__init__()
        self.vae, self.bad = pv.VAE.mlp((4,), latent_dim=2, likelihood=pv.Gaussian), bad

    def model(self, x):
        if self.training and len(x) and here_rank() == self.bad:
            raise ValueError("the model has an error")
        return self.vae.model(x)

    def guide(self, x):
        return self.vae.guide(x)


def here_rank():
    return distributed.get_rank() if distributed.is_initialized() else 0


def message(call):
    try:
        call()
    except pv.UsageError as error:
        return f"{type(error).__name__}: {error}"
    return ""


def make():
    torch.manual_seed(1)
    return pv.VAE.mlp((4,), latent_dim=2, hidden=(8,), likelihood=pv.Gaussian)


class Normalized(nn.Module):
    """A pair with running means, which belong to each process."""

    def __init__(self):
        super().__init__()
        self.vae, self.norm = make(), nn.BatchNorm1d(4)

    def model(self, x):
        return self.vae.model(x)

    def guide(self, x):
        return self.vae.guide(self.norm(x))


def weights(pair):
    return torch.cat([value.flatten().float() for value in pair.state_dict().values()])


def failures():
    """The errors of runs that cannot go on; the next run works again."""
    rank, extreme = here_rank(), X.clone()
    extreme[order(0, 0, len(X))[7]] = 1e30  # the second process has this row in its first step
    return {
        "model": message(lambda: pv.fit(Fails(1), X, epochs=1, **OPTIONS)),
        "data": message(lambda: pv.fit(make(), X + rank, epochs=1, **OPTIONS)),
        "small": message(lambda: pv.fit(make(), X, epochs=1, **OPTIONS | {"batch_size": 1})),
        "nan": message(lambda: pv.fit(make(), extreme, epochs=1, **OPTIONS)),
        "callback": message(lambda: pv.fit(make(), X, epochs=1, on_epoch=[broken], **OPTIONS)),
    }


def broken(epoch):
    raise pv.UsageError("the callback fails")


def interrupted(folder):
    """A run that stops after an epoch and is resumed, and the same run without a stop."""
    whole, parts = make(), make()
    pv.fit(whole, X, epochs=3, out=folder / "whole", **OPTIONS)
    pv.fit(parts, X, epochs=1, out=folder / "parts", **OPTIONS)
    pv.fit(parts, X, epochs=3, out=folder / "parts", resume=True, **OPTIONS)
    return torch.stack([weights(whole), weights(parts)])


def kept_memory():
    """How often the memory that processes share is still in this process."""
    gc.collect()
    maps = Path("/proc/self/maps")  # of Linux
    return maps.exists() and maps.read_text().count("memfd:pyro_vae")


def everything(folder: Path):
    """All results of one process."""
    items, pair = Items(X, NOISE), Normalized()
    loader = DataLoader(TensorDataset(X, NOISE), batch_size=8, shuffle=True)
    pv.fit(pair, X[:16], epochs=1, **OPTIONS)
    shared = {
        "gradients": recorded(),
        "traced": recorded(engine="traced")[0],
        "items": recorded((items,))[0],
        "loader": recorded((loader,))[0],
        "read": torch.tensor(items.read),
        "resumed": interrupted(folder),
        "failures": failures(),
        "normalized": weights(pair),
        "kept": kept_memory(),
    }
    fitted = make()
    fitted.eval()
    found = pv.log_likelihood(fitted, X.repeat(30, 1), num_samples=300, engine="eager")
    shared["log_likelihood"] = found.per_datum
    shared["encoded"] = pv.encode(fitted, X.repeat(100, 1))["z"]
    shared["evaluated"] = pv.evaluate(fitted, X, num_samples=50, engine="eager").elbo
    return shared


def main(folder: Path) -> None:
    distributed.init_process_group("gloo")
    torch.save(everything(folder), folder / f"{here().rank}.pt")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
