"""Scores of labels use only rows with a label; a missing score has a reason."""

import json
import math

import numpy as np
import pytest
import torch

import pyro_vae as pv
from pyro_vae.cli.main import main
from pyro_vae.errors import UsageError

FAST = {"epochs": 1, "batch_size": 20, "engine": "eager", "progress": False}
FEW = {"num_samples": 2, "engine": "eager"}
GENERATOR = torch.Generator().manual_seed(0)
Y = torch.arange(60) % 3
X = torch.randn(60, 5, generator=GENERATOR) + 4 * Y[:, None]
HALF = torch.where(torch.arange(60) % 2 == 0, -1, Y)
KNOWN = HALF >= 0


def semisupervised():
    torch.manual_seed(0)
    pair = pv.SemiSupervisedVAE.mlp((5,), num_classes=3, hidden=(8,), likelihood=pv.Gaussian)
    return pair.eval()


def mixture():
    torch.manual_seed(0)
    return pv.MixtureVAE.mlp((5,), components=4, hidden=(8,), likelihood=pv.Gaussian).eval()


def plain():
    torch.manual_seed(0)
    return pv.VAE.mlp((5,), latent_dim=2, hidden=(8,), likelihood=pv.Gaussian).eval()


def scores(found):
    names = ("accuracy", "calibration_error", "clustering_accuracy", "mutual_information")
    return {name: getattr(found, name) for name in (*names, "probe_accuracy")}


KINDS = {
    "int64": lambda y: y,
    "int16": lambda y: y.to(torch.int16),
    "int8": lambda y: y.to(torch.int8),
    "numpy": lambda y: y.numpy().astype(np.int32),
    "list": lambda y: y.tolist(),
    "float": lambda y: y.double(),
    "NaN where missing": lambda y: torch.where(y < 0, torch.nan, y.double()),
    "a column": lambda y: y[:, None],
}


@pytest.mark.sample(4)
@pytest.mark.parametrize("make", [semisupervised, mixture, plain])
@pytest.mark.parametrize("kind", KINDS)
def test_rows_without_a_label_count_in_no_score(make, kind):
    """The scores equal those of only the rows with a label."""
    pair, convert = make(), KINDS[kind]
    found = pv.evaluate(pair, X, labels=convert(HALF), train=(X,), train_labels=Y, **FEW)
    alone = pv.evaluate(pair, X[KNOWN], labels=Y[KNOWN], train=(X,), train_labels=Y, **FEW)
    for name, value in scores(alone).items():
        # The draws of the other latents differ from row to row.
        tolerance = 0.07 if make is mixture else 1e-6
        assert scores(found)[name] == (
            None if value is None else pytest.approx(value, abs=tolerance)
        )
    assert found.not_computed == {}
    assert found.num_examples == 60


@pytest.mark.parametrize("kind", KINDS)
def test_the_probe_learns_from_the_rows_with_a_label(kind):
    pair, hidden = plain(), KINDS[kind](HALF)
    found = pv.evaluate(pair, X, labels=Y, train=(X,), train_labels=hidden, **FEW)
    alone = pv.evaluate(pair, X, labels=Y, train=(X[KNOWN],), train_labels=Y[KNOWN], **FEW)
    assert found.probe_accuracy == alone.probe_accuracy


@pytest.mark.parametrize("kind", ["uint8", "uint16", "bool"])
def test_unsigned_labels_are_labels(kind):
    y = (Y > 0).numpy().astype(kind)
    found = pv.evaluate(plain(), X, labels=y, train=X, train_labels=y, **FEW)
    want = pv.evaluate(plain(), X, labels=Y > 0, train=X, train_labels=(Y > 0).long(), **FEW)
    assert found.probe_accuracy == want.probe_accuracy
    assert found.probe_accuracy > 0.9


MISSING, ONE = torch.full_like(Y, -1), torch.zeros_like(Y)


@pytest.mark.parametrize(
    ("make", "labels", "train_labels", "why"),
    [
        (plain, Y, ONE, {"probe_accuracy": "every label of train is 0"}),
        (plain, Y, MISSING, {"probe_accuracy": "every label of train is missing"}),
        (plain, MISSING, Y, {"probe_accuracy": "every label of x is missing"}),
        (plain, ONE, Y, {}),  # accuracy is defined for test data of one class
        (mixture, ONE, None, {"mutual_information": "every label of x is 0"}),
        (
            mixture,
            MISSING,
            None,
            {"mutual_information": "is missing", "clustering_accuracy": "is missing"},
        ),
        (semisupervised, MISSING, None, {"accuracy": "is missing", "calibration_error": "missing"}),
        (semisupervised, ONE, None, {}),
        (
            semisupervised,
            Y + 1,
            None,
            {"accuracy": "between 0 and 2", "calibration_error": "the classes of the pair, got 3"},
        ),
    ],
)
def test_a_score_that_cannot_be_had_is_missing_with_its_reason(make, labels, train_labels, why):
    train = None if train_labels is None else (X,)
    pair = make()
    found = pv.evaluate(pair, X, labels=labels, train=train, train_labels=train_labels, **FEW)
    assert set(found.not_computed) == set(why)
    for name, words in why.items():
        assert words in found.not_computed[name]
        assert scores(found)[name] is None
    # All other results are the same as without labels.
    assert found.elbo == pv.evaluate(pair, X, **FEW).elbo
    assert all(f"not computed: {words}" in str(found) for words in found.not_computed.values())


def test_classes_that_training_did_not_have_count_as_wrong():
    with pytest.warns(
        UserWarning, match="counts 20 rows as errors, because train lacks their labels: 2"
    ):
        found = pv.evaluate(plain(), X, labels=Y, train=X[Y < 2], train_labels=Y[Y < 2], **FEW)
    assert found.probe_accuracy <= 40 / 60


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (["a"] * 60, "numpy.unique"),
        (np.array(["a"] * 60), "numpy.unique"),
        (Y + 0.5, "got 0.5 in row 0"),
        (Y - 2, "got -2 in row 0"),
        (torch.full((60,), math.inf), "got inf in row 0"),
        (np.ma.array(Y.numpy(), mask=Y.numpy() > 1), "masked values"),
        (torch.eye(3)[Y], "argmax"),
        (Y[:7], "got 7 labels but 60 rows of x"),
    ],
)
def test_what_are_no_labels_are_refused(labels, words):
    with pytest.raises(UsageError, match=words):
        pv.evaluate(plain(), X, labels=labels, **FEW)


def test_one_class_on_the_command_line(tmp_path, monkeypatch, capsys):
    """Metrics and the report name missing scores."""
    monkeypatch.chdir(tmp_path)
    np.savez("one.npz", x=X.numpy(), y=np.zeros(60, np.int64))
    options = "--likelihood gaussian --epochs 1 --batch-size 20 --num-eval-samples 2"
    options += " --diagnosis-seconds 0"
    main(["train", "one.npz", *options.split()])
    why = "every label of train is 0, but this score needs two classes"
    metrics = json.loads((tmp_path / "runs/one/metrics.json").read_text())
    assert metrics["not_computed"] == {"probe_accuracy": why}
    assert metrics["probe_accuracy"] is None
    assert math.isfinite(metrics["log_likelihood"])
    assert why in (tmp_path / "runs/one/report.html").read_text()
    assert why in capsys.readouterr().out


def test_rows_without_a_factor_count_in_no_score_of_disentanglement():
    factors = torch.cartesian_prod(torch.arange(5), torch.arange(4), torch.arange(6))
    codes = factors.double() + torch.randn(120, 3, generator=torch.Generator().manual_seed(0))
    hidden = factors.clone()
    hidden[::3, 1] = -1
    known = (hidden >= 0).all(1)
    found = pv.disentanglement_scores(codes, hidden)
    assert found == pv.disentanglement_scores(codes[known], factors[known])
    with pytest.raises(UsageError, match=r"factors must be known .* in at least 6 rows, got 0"):
        pv.disentanglement_scores(codes, torch.full_like(factors, -1))


def test_one_hot_takes_whole_numbers_alone():
    torch.testing.assert_close(pv.one_hot([1.0, 0.0], 2), torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
    for labels in ([0.5], [float("nan")], ["a"]):
        with pytest.raises(UsageError):
            pv.one_hot(labels, 2)


@pytest.mark.parametrize("kind", [torch.int8, torch.int16, torch.int32, torch.uint8])
def test_labels_that_the_model_observes_are_of_any_whole_type(kind):
    """8-bit labels are indices and not a mask."""
    fitted = []
    for labels in (Y, Y.to(kind)):
        fitted.append(semisupervised())
        pv.fit(fitted[-1], X, labels, **FAST)
    torch.testing.assert_close(pv.predict(fitted[1], X), pv.predict(fitted[0], X))
    torch.testing.assert_close(
        pv.log_likelihood(fitted[1], X, Y.to(kind), **FEW).per_datum,
        pv.log_likelihood(fitted[0], X, Y, **FEW).per_datum,
    )


@pytest.mark.parametrize("labels", [Y.double(), torch.eye(3)[Y]])
def test_labels_that_the_model_observes_must_not_be_floats(labels):
    with pytest.raises(UsageError, match="labels must be integers, or -1 for a missing label"):
        pv.fit(semisupervised(), X, labels, **FAST)
