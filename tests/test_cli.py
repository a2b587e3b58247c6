"""The command line, from data to report, in a folder of its own."""

import base64
import csv
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch

from pyro_vae.cli import app, main
from pyro_vae.datasets import load_data

COMMANDS = [name for name in app if not name.startswith("-")]
PNG = b"\x89PNG\r\n\x1a\n"
SHORT = "--epochs 2 --num-eval-samples 5"
QUICK = f"{SHORT} --latent-dim 2 --hidden 16"


def command(line, **paths):
    """Run a command, with paths for the names in braces."""
    main([word.format(**paths) for word in line.split()])


def train(folder, options=""):
    command(f"train digits --out {{run}} {QUICK} {options}", run=folder)
    return folder


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """A run with its report, left as it is."""
    return train(tmp_path_factory.mktemp("runs") / "digits")


@pytest.fixture(scope="module")
def conditional(tmp_path_factory):
    """A run conditional on the label, left as it is."""
    folder = tmp_path_factory.mktemp("runs") / "conditional"
    return train(folder, "--condition label --no-report")


@pytest.fixture
def run(digits, tmp_path):
    return shutil.copytree(digits, tmp_path / "digits")


@pytest.fixture
def labelled(conditional, tmp_path):
    return shutil.copytree(conditional, tmp_path / "conditional")


def read(path):
    return json.loads(path.read_text())


def is_png(path):
    return path.read_bytes().startswith(PNG)


# Help


def test_help_answers_at_once():
    words = [str(Path(sysconfig.get_path("scripts")) / "pyro-vae"), "--help"]
    seconds = []
    for _ in range(3):
        before = os.times()
        done = subprocess.run(words, capture_output=True, text=True, check=True)
        after = os.times()  # the processor's: tests beside this one take the clock's
        seconds.append(sum(after[2:4]) - sum(before[2:4]))
    assert 0 < statistics.median(seconds) < 1.5
    assert all(name in done.stdout for name in COMMANDS)


def test_help_imports_nothing_heavy():
    program = (
        "import sys, pyro_vae\n"
        "from pyro_vae.cli import app, main\n"
        "for name in app:\n"
        "    main([name, '--help'] if name[0] != '-' else ['--help'])\n"
        "heavy = {'torch', 'torchvision', 'pyro', 'numpy', 'sklearn', 'matplotlib', 'tqdm'}\n"
        "print(sorted(heavy & set(sys.modules)), file=sys.stderr)\n"
    )
    words = [sys.executable, "-c", program]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"


def test_the_commands():
    assert COMMANDS == [
        "train",
        "evaluate",
        "diagnose",
        "sample",
        "reconstruct",
        "encode",
        "interpolate",
        "traverse",
        "report",
        "check",
        "selftest",
    ]


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_has_help(name, capsys):
    main([name, "--help"])
    out, err = capsys.readouterr()
    assert f"pyro-vae {name}" in out
    assert not re.search(r"\bNone\b|\(\)|,\)", out), "a default as Python has it"
    assert err == ""


def test_help_of_train_names_the_options_of_python(capsys):
    main(["train", "--help"])
    out = capsys.readouterr().out
    for option in ("--latent-dim", "--learning-rate", "--beta", "--data-dir", "--resume"):
        assert option in out
    assert "--config" in out
    assert "discretized-logistic" in out


def test_version(capsys):
    import pyro_vae

    main(["--version"])
    assert capsys.readouterr().out.strip() == pyro_vae.__version__


# Train and what it writes


def test_the_run_folder(digits):
    names = {str(path.relative_to(digits)) for path in digits.rglob("*") if path.is_file()}
    assert names >= {
        "config.json",
        "model.safetensors",
        "checkpoint.pt",
        "history.csv",
        "metrics.json",
        "report.html",
        "figures/samples.png",
        "figures/reconstructions.png",
    }
    assert not [name for name in names if name.endswith(".part")]
    with open(digits / "history.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert float(rows[1]["validation_elbo"]) > float(rows[0]["validation_elbo"])
    config = read(digits / "config.json")
    assert config["train"]["data"] == "digits"
    assert config["train"]["hidden"] == [16]
    assert config["versions"]["torch"]


def test_the_table_in_the_end(tmp_path, capsys):
    train(tmp_path / "run", "--no-report")
    out = capsys.readouterr().out
    for word in ("ELBO", "log p(x)", "±", "reconstruction", "KL", "active units", "of 2", "probe"):
        assert word in out
    metrics = read(tmp_path / "run" / "metrics.json")
    assert f"{metrics['elbo']:.3f}" in out
    assert f"{metrics['log_likelihood']:.3f}" in out
    assert metrics["num_examples"] == 360
    assert metrics["log_likelihood"] >= metrics["elbo"]
    assert not (tmp_path / "run" / "report.html").exists()


def test_the_report_carries_its_pictures(digits):
    page = (digits / "report.html").read_text()
    sources = re.findall(r"src=[\"']?([^\"'> ]+)", page)
    assert len(sources) >= 5
    head = "data:image/png;base64,"
    assert all(source.startswith(head) for source in sources)
    pictures = [base64.b64decode(source.removeprefix(head)) for source in sources]
    assert all(picture.startswith(PNG) for picture in pictures)
    assert pictures[0] == (digits / "figures" / "curves.png").read_bytes()
    assert not re.search(r"https?:|href|<link|<script|url\(|@import", page)
    assert f"{read(digits / 'metrics.json')['elbo']:.4g}" in page


def test_the_default_folder_is_runs_and_the_name_of_the_data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command(f"train digits {QUICK} --no-report")
    assert (tmp_path / "runs" / "digits" / "metrics.json").exists()


def test_levels(tmp_path):
    options = "--model hierarchical --latent-dim 3 2 --hidden 16 --epochs 2 --num-eval-samples 5"
    command(f"train digits --out {{run}} {options} --prior vamp", run=tmp_path / "run")
    metrics = read(tmp_path / "run" / "metrics.json")
    assert list(metrics["active_units"]) == ["z2", "z1"]
    page = (tmp_path / "run" / "report.html").read_text()
    assert "active units of z2" in page
    assert (tmp_path / "run" / "figures" / "kl.png").exists()
    header = (tmp_path / "run" / "history.csv").read_text().splitlines()[0]
    assert "kl_z1" in header
    command("sample {run} --num 3", run=tmp_path / "run")
    other = "--network conv --channels 4 8 --guide bottom-up --no-normalize --no-report"
    command(f"train digits --out {{run}} {options} {other}", run=tmp_path / "other")
    assert np.isfinite(read(tmp_path / "other" / "metrics.json")["elbo"])


def test_convolutions(tmp_path):
    run = train(tmp_path / "run", "--network conv --channels 4 8 --no-report")
    assert read(run / "config.json")["train"]["channels"] == [4, 8]
    state = safetensors.torch.load_file(run / "model.safetensors")
    assert state["encoder.network.layers.images.0.0.weight"].shape == (4, 1, 3, 3)
    command("sample {run} --num 3", run=run)
    assert np.load(run / "samples.npy").shape == (3, 1, 8, 8)


@pytest.mark.parametrize(
    "options",
    [
        "--likelihood gaussian --scale 0.5 --posterior diagonal-normal --activation tanh",
        "--likelihood gaussian --scale learned --objective analytic",
        "--likelihood continuous-bernoulli --objective importance-weighted --num-samples 3",
        "--likelihood discretized-logistic --objective free-bits --free-bits 0.2",
        "--objective importance-weighted --num-samples 3 --gradient doubly-reparametrized",
        "--objective elbo --num-samples 2 --gradient sticking-the-landing",
        "--objective total-correlation --total-correlation 3 --dimension-kl 2",
        "--prior vamp --components 30 --activation glu",
        "--binarize fixed --warm-up linear --warm-up-epochs 2 --beta 2",
        "--warm-up cyclical --learning-rate-schedule cosine --clip-norm 5 --patience 3",
    ],
)
def test_options_reach_training(options, tmp_path):
    run = train(tmp_path / "run", f"--no-report --engine eager {options}")
    given = read(run / "config.json")["train"]
    for option, value in re.findall(r"--([a-z-]+) ([^-\s]\S*)", options):
        assert str(given[option.replace("-", "_")]) in (value, f"{value}.0")
    assert np.isfinite(read(run / "metrics.json")["log_likelihood"])


@pytest.mark.parametrize(("rows", "options"), [(10, ""), (20, "--condition label")])
def test_a_small_table_goes_all_the_way(rows, options, tmp_path):
    x = np.random.default_rng(0).normal(size=(rows, 5))
    np.savez(tmp_path / "table.npz", x=x, y=np.arange(rows) % 2)
    command(
        "train {data} --out {run} --epochs 1 --batch-size 2 --latent-dim 1 --hidden 4 "
        f"--num-eval-samples 2 --likelihood gaussian {options}",
        data=tmp_path / "table.npz",
        run=tmp_path / "run",
    )
    assert "data:image/png;base64," in (tmp_path / "run" / "report.html").read_text()


# Use


def test_evaluate_again_gives_the_same_numbers(run, capsys):
    before = (run / "metrics.json").read_text()
    (run / "metrics.json").unlink()
    command("evaluate {run} --num-samples 5", run=run)
    assert (run / "metrics.json").read_text() == before
    assert "ELBO" in capsys.readouterr().out


def test_evaluate_on_other_data(run, tmp_path):
    x = np.random.default_rng(0).integers(0, 256, (40, 8, 8), dtype=np.uint8)
    np.save(tmp_path / "noise.npy", x)
    before = read(run / "metrics.json")
    command("evaluate {run} --data {data} --num-samples 5", run=run, data=tmp_path / "noise.npy")
    after = read(run / "metrics.json")
    assert after["num_examples"] == 8
    assert after["elbo"] < before["elbo"]
    assert after["probe_accuracy"] is None


def test_evaluate_a_conditional_run_on_data_of_fewer_classes(labelled, tmp_path):
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    few = labels < 3
    x = (images[few] * 255 / 16).astype(np.uint8).reshape(-1, 8, 8)
    np.savez(tmp_path / "few.npz", x=x, y=labels[few])
    command("evaluate {run} --data {data} --num-samples 2", run=labelled, data=tmp_path / "few.npz")
    assert read(labelled / "metrics.json")["num_examples"] == len(x) - len(x) * 8 // 10


def test_sample(run, capsys):
    command("sample {run} --num 5 --seed 3", run=run)
    drawn = np.load(run / "samples.npy")
    assert drawn.shape == (5, 1, 8, 8)
    assert set(np.unique(drawn)) == {0, 1}
    assert is_png(run / "figures" / "samples.png")
    printed = capsys.readouterr().out.split()
    assert printed == [str(run / "samples.npy"), str(run / "figures" / "samples.png")]
    command("sample {run} --num 5 --seed 3", run=run)
    assert np.array_equal(np.load(run / "samples.npy"), drawn)
    command("sample {run} --num 5 --seed 4 --means", run=run)
    means = np.load(run / "samples.npy")
    assert 0 < means.min() < means.max() < 1


def test_counts_with_their_library_size(tmp_path):
    generator = np.random.default_rng(0)
    depth = generator.integers(50, 500, (60, 1))
    counts = generator.poisson(depth * generator.dirichlet(np.ones(6), 60)).clip(0, 255)
    counts[:, 0] = 1
    np.savez(tmp_path / "cells.npz", x=counts.astype(np.uint8), y=np.arange(60) % 3)
    run = tmp_path / "run"
    command(
        f"train {{data}} --out {{run}} --likelihood zero-inflated-negative-binomial "
        f"--batch-size 16 --library-size {QUICK}",
        data=tmp_path / "cells.npz",
        run=run,
    )
    assert read(run / "config.json")["pair"]["arguments"]["context_shapes"] == [[1]]
    command("sample {run} --num 24 --means", run=run)
    means = np.load(run / "samples.npy").sum(1)
    test = load_data(tmp_path / "cells.npz").test.x.double().sum(1).numpy()
    # Zero inflation aside, the total of the means is that of the test rows in turn.
    assert np.corrcoef(means, np.tile(test, 2))[0, 1] > 0.9
    command("encode {run}", run=run)
    assert np.load(run / "codes.npz")["z_mean"].shape == (12, 2)
    np.savez(tmp_path / "empty.npz", x=np.zeros((20, 6)))
    with pytest.raises(SystemExit):
        command("evaluate {run} --data {data}", run=run, data=tmp_path / "empty.npz")


def test_images_of_a_file_as_context(tmp_path):
    """The context is a corner of the image, beside its label."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    x = (images[:150] * 255 / 16).astype(np.uint8).reshape(-1, 8, 8)
    np.savez(tmp_path / "corners.npz", x=x, y=labels[:150], context=x[:, :4, :4])
    run = tmp_path / "run"
    command(
        "train {data} --out {run} --condition label context --prior conditional --network conv "
        "--channels 4 --blocks 1 --likelihood discretized-logistic-mixture --logistics 2 "
        f"--batch-size 32 --no-report {QUICK}",
        data=tmp_path / "corners.npz",
        run=run,
    )
    config = read(run / "config.json")["pair"]["arguments"]
    assert config["context_shapes"] == [[10], [1, 4, 4]]
    assert config["prior"]["arguments"]["network"]["class"].endswith("ConvEncoder")
    made = {}
    for label in (0, 1):
        command(f"sample {{run}} --num 40 --means --label {label}", run=run)
        made[label] = np.load(run / "samples.npy")
    assert not np.allclose(made[0], made[1])
    with pytest.raises(SystemExit):
        command("evaluate {run} --data digits", run=run)


def test_sample_by_label(labelled):
    made = {}
    for label in (0, 1):
        command(f"sample {{run}} --num 12 --means --label {label}", run=labelled)
        made[label] = np.load(labelled / "samples.npy")
    command("sample {run} --num 12 --means", run=labelled)
    each = np.load(labelled / "samples.npy")
    assert each.shape == made[0].shape == (12, 1, 8, 8)
    # The latents are those of the seed: only the label tells the two apart.
    assert not np.allclose(made[0], made[1])
    assert np.allclose(each[[0, 1, 10, 11]], [made[i % 2][i] for i in (0, 1, 10, 11)], atol=1e-6)


@pytest.mark.parametrize("folder", ["run", "labelled"])
def test_reconstruct(folder, request):
    run = request.getfixturevalue(folder)
    command("reconstruct {run} --num 5", run=run)
    images = np.load(run / "reconstructions.npy")
    assert images.shape == (5, 1, 8, 8)
    assert 0 < images.min() < images.max() < 1
    assert is_png(run / "figures" / "reconstructions.png")


@pytest.mark.parametrize("folder", ["run", "labelled"])
@pytest.mark.parametrize(("part", "n"), [("test", 360), ("validation", 180), ("train", 1257)])
def test_encode(folder, part, n, request):
    from pyro_vae.datasets import load_data

    run = request.getfixturevalue(folder)
    command(f"encode {{run}} --part {part}", run=run)
    with np.load(run / "codes.npz") as codes:
        assert set(codes) == {"z_mean", "z_scale", "labels"}
        assert codes["z_mean"].shape == codes["z_scale"].shape == (n, 2)
        assert (codes["z_scale"] > 0).all()
        assert (codes["labels"] == getattr(load_data("digits"), part).labels.numpy()).all()


@pytest.mark.parametrize("folder", ["run", "labelled"])
def test_interpolate(folder, request):
    run = request.getfixturevalue(folder)
    command("interpolate {run} --num 2 --steps 3", run=run)
    assert np.load(run / "interpolations.npy").shape == (2, 3, 1, 8, 8)
    assert is_png(run / "figures" / "interpolations.png")


@pytest.mark.parametrize("folder", ["run", "labelled"])
def test_traverse(folder, request):
    run = request.getfixturevalue(folder)
    command("traverse {run} --steps 3 --span 2 --index 7", run=run)
    assert np.load(run / "traversals.npy").shape == (2, 3, 1, 8, 8)
    assert is_png(run / "figures" / "traversals.png")


def test_a_report_is_written_anew(run, capsys):
    before = (run / "report.html").read_text()
    (run / "report.html").unlink()
    shutil.rmtree(run / "figures")
    command("report {run}", run=run)
    assert capsys.readouterr().out.strip() == str(run / "report.html")
    assert (run / "report.html").read_text() == before
    assert is_png(run / "figures" / "latent.png")


def test_use_leaves_the_model_as_it_is(run):
    files = ("model.safetensors", "checkpoint.pt", "config.json", "history.csv")
    before = [(run / name).read_bytes() for name in files]
    for name in ("evaluate {run} --num-samples 2", "sample {run} --num 2", "encode {run}"):
        command(name, run=run)
    assert [(run / name).read_bytes() for name in files] == before


# Configuration files


def test_a_run_is_repeated_from_its_configuration(digits, tmp_path):
    command(
        "train --config {config} --out {run} --num-eval-samples 5 --no-report",
        config=digits / "config.json",
        run=tmp_path / "again",
    )
    for name in ("model.safetensors", "metrics.json"):
        assert (tmp_path / "again" / name).read_bytes() == (digits / name).read_bytes()
    assert read(tmp_path / "again" / "config.json") == read(digits / "config.json")


def test_a_conditional_run_is_repeated_from_its_configuration(conditional, tmp_path):
    command(
        "train --config={config} --out {run} --num-eval-samples 5 --no-report",
        config=conditional / "config.json",
        run=tmp_path / "again",
    )
    weights = (tmp_path / "again" / "model.safetensors").read_bytes()
    assert weights == (conditional / "model.safetensors").read_bytes()


def test_the_command_line_overrides_the_configuration(digits, tmp_path):
    command(
        "train --config {config} --out {run} --epochs 1 --hidden 8 6 --no-report "
        "--num-eval-samples 2",
        config=digits / "config.json",
        run=tmp_path / "run",
    )
    given, before = (read(path / "config.json")["train"] for path in (tmp_path / "run", digits))
    assert given == before | {"epochs": 1, "hidden": [8, 6]}
    assert len((tmp_path / "run" / "history.csv").read_text().splitlines()) == 2


def test_a_configuration_of_ones_own(tmp_path):
    options = {
        "data": "digits",
        "epochs": 1,
        "hidden": [8],
        "latent_dim": 3,
        "binarize": "fixed",
        "num_eval_samples": 2,
        "report": False,
        "out": str(tmp_path / "run"),
    }
    (tmp_path / "mine.json").write_text(json.dumps(options))
    command("train --config {config}", config=tmp_path / "mine.json")
    given = read(tmp_path / "run" / "config.json")["train"]
    assert given["latent_dim"] == [3]
    assert given["binarize"] == "fixed"
    assert read(tmp_path / "run" / "metrics.json")["num_samples"] == 2
    assert not (tmp_path / "run" / "report.html").exists()


def test_resume_goes_on_for_more_epochs(digits, tmp_path):
    words = QUICK.replace("--epochs 2", "--epochs 3")
    command(f"train digits --out {{run}} {words} --no-report", run=tmp_path / "whole")
    shutil.copytree(digits, tmp_path / "parts")
    command(f"train digits --out {{run}} {words} --no-report --resume", run=tmp_path / "parts")
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "parts")]
    assert weights[0] == weights[1]


# A pair of one's own

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
def test_a_pair_of_ones_own_is_trained_evaluated_and_used(kind, own):
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


def test_the_report_of_a_pair_of_ones_own(own):
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
    command("train digits --model scalar:Scalar --epochs 1 --num-eval-samples 5 --out run")
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
    assert "label is 0 to 9, 10 came" in capsys.readouterr().err


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
        ("--model mixture --num-labels 20", "--num-labels are for --model semi-supervised"),
        ("--model semi-supervised --num-labels 5000", "of each class; class 0 has"),
        ("--model mixture --prior flow", "has a prior of its own"),
        ("--model mixture --condition label", "takes no condition"),
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
