"""The program of test_out_of_memory.py: each scenario with little address space left.

It prints a line of JSON for each scenario: its name, the type of the error, and its message.
"""

import contextlib
import io
import json
import resource
import sys
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch import nn

import pyro_vae as pv
from pyro_vae.cli.main import main

ROOM = 100 * 2**20
"""The bytes of address space that a scenario may still ask for."""

X = torch.zeros(256, 4)


class Wide(nn.Module):
    """A pair whose model needs 2 MiB for each row when it is armed."""

    def __init__(self, data_shape=(4,), latent_dim=1, hidden=()):
        super().__init__()
        self.loc, self.armed = nn.Parameter(torch.zeros(4)), False

    def template(self, n):
        return (torch.zeros(n, 4),)

    def model(self, x):
        wide = 0.0
        if self.armed or Path("armed").exists():
            wide = torch.ones(len(x), 2**19).mean(1, keepdim=True) - 1
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x), 1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z + self.loc + wide, 1.0).to_event(1), obs=x.float())

    def guide(self, x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(torch.zeros(len(x), 1), 1.0).to_event(1))


def armed_after(pair, epochs):
    def see(epoch):
        pair.armed = epoch.epoch == epochs

    return see


def fit(**options):
    pair = Wide()
    seen = [armed_after(pair, 2)]
    pv.fit(pair, X, epochs=3, engine="eager", progress=False, on_epoch=seen, **options)


def armed():
    pair = Wide()
    pair.armed = True
    return pair


SCENARIOS = {
    "fit": lambda: fit(),
    "fit folder": lambda: fit(out="run", checkpoint_seconds=0.0),
    "fit small": lambda: fit(batch_size=16),
    "validation": lambda: fit(batch_size=20, validation=X),
    "evaluate": lambda: pv.evaluate(armed(), X, num_samples=4),
    "evaluate small": lambda: pv.evaluate(armed(), X[:40], num_samples=4, batch_size=8),
    "log_likelihood": lambda: pv.log_likelihood(armed(), X, num_samples=4, batch_size=200),
    "log_likelihood one": lambda: pv.log_likelihood(armed(), X[:2], num_samples=99, batch_size=1),
    "train": lambda: main(f"{TRAIN} --out cli --batch-size 256 --model here:Wide".split()),
    "evaluate command": lambda: main(EVALUATE),
    "evaluate command small": lambda: main([*EVALUATE, "--batch-size", "10"]),
    "sample command": lambda: main(["sample", "cli", "--model", "here:Wide", "--num", "900"]),
}

EVALUATE = ["evaluate", "cli", "--model", "here:Wide", "--num-samples", "2", "--engine", "eager"]

TRAIN = "train x.npy --epochs 1 --engine eager --no-report --num-eval-samples 2"


@contextlib.contextmanager
def little_room():
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + ROOM, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def outcome(work):
    errors = io.StringIO()
    try:
        with little_room(), contextlib.redirect_stderr(errors):
            work()
    except SystemExit:
        return "SystemExit", errors.getvalue().splitlines()[-1]
    except Exception as error:
        return type(error).__name__, str(error)
    return "", ""


def run():
    torch.set_num_threads(1)
    sys.path.insert(0, ".")
    Path("here.py").write_text("from __main__ import Wide\n")
    np.save("x.npy", np.zeros((400, 4), np.float32))
    for name, work in SCENARIOS.items():
        Path("armed").unlink(missing_ok=True)
        if "command" in name and not Path("cli/model.safetensors").exists():
            main(f"{TRAIN} --out cli --overwrite --model here:Wide".split())
        if "command" in name or name == "train":
            Path("armed").touch()
        print(json.dumps([name, *outcome(work)]), flush=True)


if __name__ == "__main__":
    run()
