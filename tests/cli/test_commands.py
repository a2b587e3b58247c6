"""The command line, from data to report."""

import base64
import csv
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
from cli_helpers import PNG, QUICK, command, is_png, read, train

import pyro_vae
from pyro_vae.cli.app import app
from pyro_vae.cli.main import main
from pyro_vae.data.datasets import load_data

COMMANDS = [name for name in app if not name.startswith("-")]


@pytest.fixture
def run(digits, tmp_path):
    return shutil.copytree(digits, tmp_path / "digits")


@pytest.fixture
def labeled(conditional, tmp_path):
    return shutil.copytree(conditional, tmp_path / "conditional")


# Help


def test_help_answers_at_once():
    words = [str(Path(sysconfig.get_path("scripts")) / "pyro-vae"), "--help"]
    seconds = []
    for _ in range(3):
        before = os.times()
        done = subprocess.run(words, capture_output=True, text=True, check=True)
        after = os.times()  # CPU time: other tests run at the same time
        seconds.append(sum(after[2:4]) - sum(before[2:4]))
    assert 0 < statistics.median(seconds) < 1.5
    assert all(name in done.stdout for name in COMMANDS)


def test_help_imports_nothing_heavy():
    program = (
        "import sys, pyro_vae\n"
        "from pyro_vae.cli.app import app\nfrom pyro_vae.cli.main import main\n"
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
        "score",
        "impute",
        "encode",
        "info",
        "compare",
        "repeat",
        "sample",
        "reconstruct",
        "interpolate",
        "traverse",
        "report",
        "check",
        "selftest",
        "export",
        "tune",
        "explore",
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
    assert config["versions"]["pyro-vae"] == pyro_vae.__version__


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
    options += " --engine eager --diagnosis-seconds 0"
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


@pytest.mark.sample(5)
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
    run = train(tmp_path / "run", f"--no-report {options}")
    given = read(run / "config.json")["train"]
    for option, value in re.findall(r"--([a-z-]+) ([^-\s]\S*)", options):
        assert str(given[option.replace("-", "_")]) in (value, f"{value}.0")
    assert np.isfinite(read(run / "metrics.json")["log_likelihood"])


@pytest.mark.sample(1)
@pytest.mark.parametrize(("rows", "options"), [(10, ""), (20, "--condition label")])
def test_a_small_table_goes_all_the_way(rows, options, tmp_path):
    x = np.random.default_rng(0).normal(size=(rows, 5))
    np.savez(tmp_path / "table.npz", x=x, y=np.arange(rows) % 2)
    command(
        "train {data} --out {run} --epochs 1 --batch-size 2 --latent-dim 1 --hidden 4 "
        f"--num-eval-samples 2 --likelihood gaussian --diagnosis-seconds 0 {options}",
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


def test_evaluate_a_conditional_run_on_data_of_fewer_classes(labeled, tmp_path):
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    few = labels < 3
    x = (images[few] * 255 / 16).astype(np.uint8).reshape(-1, 8, 8)
    np.savez(tmp_path / "few.npz", x=x, y=labels[few])
    command("evaluate {run} --data {data} --num-samples 2", run=labeled, data=tmp_path / "few.npz")
    assert read(labeled / "metrics.json")["num_examples"] == len(x) - len(x) * 8 // 10


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


def test_arrays_go_where_out_says(run, tmp_path, capsys):
    (run / "samples.npy").unlink(missing_ok=True)
    command("sample {run} --num 5 --seed 3 --out {out}", run=run, out=tmp_path / "s.npy")
    command("reconstruct {run} --num 4 --out {out}", run=run, out=tmp_path / "r.npy")
    assert np.load(tmp_path / "s.npy").shape == (5, 1, 8, 8)
    assert np.load(tmp_path / "r.npy").shape == (4, 1, 8, 8)
    assert not (run / "samples.npy").exists()
    for line in ("sample {run} --out {out}", "reconstruct {run} --out {out}"):
        with pytest.raises(SystemExit):
            command(line, run=run, out=tmp_path / "s.csv")
        assert "--out must end in .npy for data that are not a table" in capsys.readouterr().err


def test_rows_of_the_context_are_beside_the_samples(tmp_path):
    x = np.random.default_rng(0).random((40, 4)).astype(np.float32)
    np.savez(tmp_path / "x.npz", x=x, context=x[:, :1])
    command(
        "train {data} --out {run} --likelihood gaussian --condition context --epochs 1 "
        "--latent-dim 2 --hidden 8 --engine eager --no-report --num-eval-samples 2",
        data=tmp_path / "x.npz",
        run=tmp_path / "run",
    )
    command("sample {run} --num 3 --out {out}", run=tmp_path / "run", out=tmp_path / "s.npy")
    with np.load(tmp_path / "s_parents.npz") as found:
        assert found["sample"].tolist() == [0, 1, 2]
        assert set(found["parent"].tolist()) <= set(range(40))


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
    # Apart from zero inflation, the means have the totals of the test rows in turn.
    assert np.corrcoef(means, np.tile(test, 2))[0, 1] > 0.9
    command("encode {run}", run=run)
    assert np.load(run / "codes.npz")["z_mean"].shape == (12, 2)
    np.savez(tmp_path / "empty.npz", x=np.zeros((20, 6)))
    with pytest.raises(SystemExit):
        command("evaluate {run} --data {data}", run=run, data=tmp_path / "empty.npz")


def test_images_of_a_file_as_context(tmp_path):
    """The context is the label and a corner of the image."""
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


def test_sample_by_label(labeled):
    made = {}
    for label in (0, 1):
        command(f"sample {{run}} --num 12 --means --label {label}", run=labeled)
        made[label] = np.load(labeled / "samples.npy")
    command("sample {run} --num 12 --means", run=labeled)
    each = np.load(labeled / "samples.npy")
    assert each.shape == made[0].shape == (12, 1, 8, 8)
    # The seed fixes the latents, so only the label makes a difference.
    assert not np.allclose(made[0], made[1])
    assert np.allclose(each[[0, 1, 10, 11]], [made[i % 2][i] for i in (0, 1, 10, 11)], atol=1e-6)


@pytest.mark.parametrize("folder", ["run", "labeled"])
def test_reconstruct(folder, request):
    run = request.getfixturevalue(folder)
    command("reconstruct {run} --num 5", run=run)
    images = np.load(run / "reconstructions.npy")
    assert images.shape == (5, 1, 8, 8)
    assert 0 < images.min() < images.max() < 1
    assert is_png(run / "figures" / "reconstructions.png")


@pytest.mark.parametrize("folder", ["run", "labeled"])
@pytest.mark.parametrize(("part", "n"), [("test", 360), ("validation", 180), ("train", 1257)])
def test_encode(folder, part, n, request):
    from pyro_vae.data.datasets import load_data

    run = request.getfixturevalue(folder)
    command(f"encode {{run}} --part {part}", run=run)
    with np.load(run / "codes.npz") as codes:
        assert set(codes) == {"z_mean", "z_scale", "labels", "rows"}
        assert (codes["rows"] == getattr(load_data("digits"), part).rows.numpy()).all()
        assert codes["z_mean"].shape == codes["z_scale"].shape == (n, 2)
        assert (codes["z_scale"] > 0).all()
        assert (codes["labels"] == getattr(load_data("digits"), part).labels.numpy()).all()


@pytest.mark.parametrize("folder", ["run", "labeled"])
def test_interpolate(folder, request):
    run = request.getfixturevalue(folder)
    command("interpolate {run} --num 2 --steps 3", run=run)
    assert np.load(run / "interpolations.npy").shape == (2, 3, 1, 8, 8)
    assert is_png(run / "figures" / "interpolations.png")


@pytest.mark.parametrize("folder", ["run", "labeled"])
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
