"""Reports of pairs without a local latent, and with parts of x at several sites."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pyro_vae as pv
from pyro_vae.runs.metrics import write_metrics


class Coefficients(nn.Module):
    """A regression: all latents are global."""

    def __init__(self):
        super().__init__()
        self.loc = nn.Parameter(torch.zeros(2))

    def model(self, x, c):
        w = pyro.sample("w", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("x", dist.Normal(w * c, 1.0).to_event(1), obs=x)

    def guide(self, x, c):
        pyro.sample("w", dist.Normal(self.loc, 0.1).to_event(1))


class Steps(nn.Module):
    """A site for each column of x."""

    def __init__(self):
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(0.1))

    def model(self, x, c):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            for t in range(2):
                pyro.sample(f"x{t}", dist.Normal(z + c[:, 0], 1.0), obs=x[:, t])

    def guide(self, x, c):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(self.slope * x.sum(1), 0.5))


FIGURES = {Coefficients: {"curves", "reconstructions"}, Steps: {"curves", "kl", "latent"}}


@pytest.mark.parametrize("kind", FIGURES)
def test_the_report_has_the_figures_that_the_pair_has(kind, tmp_path):
    pair, x, c = kind(), torch.randn(20, 2), torch.randn(20, 1)
    pv.fit(pair, x, c, epochs=1, engine="eager", progress=False, out=tmp_path)
    metrics = pv.evaluate(pair, x, c, num_samples=5).as_dict()
    write_metrics(tmp_path, pair, metrics)
    page = pv.write_report(pair, x, c, run=tmp_path)
    assert "<html" in page.read_text()
    assert {path.stem for path in (tmp_path / "figures").glob("*.png")} == FIGURES[kind]
