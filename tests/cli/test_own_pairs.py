"""Pairs of the user's own, and discrete latents, on the command line."""

import sys

import numpy as np
import pytest
from cli_helpers import PNG, SHORT, command, is_png, read, train

# A pair of the user's own

OWN = """
import pyro
import pyro.distributions as dist
import torch
from torch import nn


class Pair(nn.Module):
    def __init__(self, data_shape, latent_dim=2):
        super().__init__()
        self.shape = torch.Size(data_shape)
        self.encoder = nn.Linear(self.shape.numel(), 2 * latent_dim)
        self.decoder = nn.Linear(latent_dim, self.shape.numel())
        self.prior = torch.zeros(latent_dim)

    def model(self, x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(self.prior, 1.0).to_event(1))
            logits = self.decoder(z).reshape(z.shape[:-1] + self.shape)
            pyro.sample("x", dist.Bernoulli(logits=logits).to_event(3), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x), dim=-1):
            loc, scale = self.encoder(x.flatten(1)).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, scale.exp()).to_event(1))

    def template(self, n):
        return (torch.zeros(n, *self.shape),)


class Keeping(Pair):
    def __init__(self, data_shape, latent_dim=2):
        super().__init__(data_shape, latent_dim)
        self.data_shape, self.latent_dim = data_shape, latent_dim


class Fixed(Pair):
    def __init__(self):
        super().__init__((1, 8, 8), 2)


class Flat(Keeping):
    template = property()

    def model(self, x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(self.prior, 1.0).to_event(1))
            likelihood = dist.Bernoulli(logits=self.decoder(z)).to_event(1)
            pyro.sample("x", likelihood, obs=x.flatten(1))
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A folder with a module in it, to run commands in."""
    (tmp_path / "own_pair.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    yield tmp_path
    sys.modules.pop("own_pair", None)


@pytest.mark.parametrize("kind", ["Pair", "Keeping", "Fixed", "Flat"])
def test_a_users_pair_is_trained_evaluated_and_used(kind, own):
    path = f"own_pair:{kind}"
    command(f"check {path}")
    size = "" if kind == "Fixed" else "--latent-dim 2"
    command(f"train digits --out run --model {path} {SHORT} {size} --no-report")
    before = (own / "run" / "metrics.json").read_text()
    assert read(own / "run" / "metrics.json")["active_units"]["z"] <= 2
    command(f"evaluate run --model {path} --num-samples 5")
    assert (own / "run" / "metrics.json").read_text() == before
    command(f"encode run --model {path}")
    with np.load("run/codes.npz") as codes:
        assert codes["z_mean"].shape == (360, 2)
    if kind != "Flat":
        command(f"sample run --model {path} --num 3")
        assert np.load("run/samples.npy").shape == (3, 1, 8, 8)


def test_the_report_of_a_users_pair(own):
    command(f"train digits --out run --model own_pair:Flat {SHORT} --latent-dim 2")
    assert "data:image/png;base64," in (own / "run" / "report.html").read_text()


SCALAR = """
import pyro, torch
import pyro.distributions as dist
from torch import nn


class Scalar(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = nn.Linear(64, 2), nn.Linear(1, 64)

    def model(self, x):
        with pyro.plate("data", len(x), dim=-1):
            b = pyro.sample("b", dist.Normal(0.0, 1.0))
            logits = self.decoder(b[..., None])
            pyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x.reshape(-1, 64))

    def guide(self, x):
        loc, scale = self.encoder(x.reshape(-1, 64)).unbind(-1)
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("b", dist.Normal(loc, scale.exp()))

    def template(self, n):
        return (torch.zeros(n, 1, 8, 8),)
"""


def test_a_scalar_latent_is_one_unit(tmp_path, monkeypatch):
    (tmp_path / "scalar.py").write_text(SCALAR)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    command(
        "train digits --model scalar:Scalar --engine eager --epochs 1 "
        "--num-eval-samples 5 --diagnosis-seconds 0 --out run"
    )
    metrics = read(tmp_path / "run" / "metrics.json")
    assert len(metrics["kl_by_unit"]["b"]) == 1
    assert metrics["kl_by_unit"]["b"][0] == pytest.approx(metrics["kl"], abs=0.2)
    assert is_png(tmp_path / "run" / "figures" / "traversals.png")


def test_a_semi_supervised_run(tmp_path, capsys):
    run = train(tmp_path / "run", "--model semi-supervised --num-labels 20 --beta 0.5")
    assert "classes" in capsys.readouterr().out
    metrics = read(run / "metrics.json")
    assert 0 <= metrics["accuracy"] <= 1
    assert 0 <= metrics["calibration_error"] <= 1
    assert set(metrics["kl_by_site"]) == {"y", "z"}
    assert (run / "figures" / "classes.png").read_bytes().startswith(PNG)
    assert "Samples by class" in (run / "report.html").read_text()
    command("sample {run} --num 4 --label 3", run=run)
    command("sample {run} --num 4", run=run)
    command("encode {run} --part validation", run=run)
    with np.load(run / "codes.npz") as codes:
        assert codes["y_mean"].shape == (180,)
        assert "y_scale" not in codes
    with pytest.raises(SystemExit):
        command("sample {run} --label 10", run=run)
    assert "--label must be from 0 to 9, got 10" in capsys.readouterr().err


def test_a_mixture_run(tmp_path, capsys):
    run = train(tmp_path / "run", "--model mixture --components 4 --num-samples 2")
    assert "clusters" in capsys.readouterr().out
    assert 0 <= read(run / "metrics.json")["mutual_information"] <= 1
    assert (run / "figures" / "classes.png").read_bytes().startswith(PNG)
    command("sample {run} --num 4 --label 3", run=run)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--model semi-supervised", "needs --num-labels"),
        (
            "--model mixture --num-labels 20",
            "--num-labels needs --model semi-supervised or a pair of your own",
        ),
        (
            "--model semi-supervised --num-labels 5000",
            "--num-labels is 5000, which needs 500 labels of class 0",
        ),
        ("--model mixture --prior flow", "has its own prior"),
        ("--model mixture --condition label", "does not support --condition"),
        ("--model mixture --objective free-bits", "use --objective elbo"),
    ],
)
def test_options_that_make_no_sense_together_with_discrete_latents(
    options, words, tmp_path, capsys
):
    with pytest.raises(SystemExit):
        train(tmp_path / "run", options)
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
