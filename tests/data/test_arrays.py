"""Every tool rejects arrays that are not plain numbers, with an error in one line."""

import json
import math
import warnings

import numpy as np
import pytest
import torch
from scipy import sparse

import pyro_vae as pv
from pyro_vae.cli.main import main
from pyro_vae.errors import UsageError
from pyro_vae.pairs.arrays import as_tensor
from pyro_vae.runs import files as run_files

FAST = {"epochs": 1, "batch_size": 20, "engine": "eager", "progress": False}
FEW = {"num_samples": 2, "engine": "eager"}
X = np.random.default_rng(0).normal(size=(60, 5)).astype("float32")
MASKED = np.ma.array(X, mask=X > 1)


def small(context=0):
    torch.manual_seed(0)
    shapes = [(5,)] if context else []
    return pv.VAE.mlp((5,), 2, (8,), pv.Gaussian, context_shapes=shapes).eval()


ENTRANCES = {
    "fit": lambda x: pv.fit(small(), x, **FAST),
    "validation": lambda x: pv.fit(small(), X, validation=x, **FAST),
    "evaluate": lambda x: pv.evaluate(small(), x, **FEW),
    "train of evaluate": lambda x: pv.evaluate(
        small(), X, labels=X[:, 0] > 0, train=x, train_labels=X[:, 0] > 0, **FEW
    ),
    "encode": lambda x: pv.encode(small(), x),
    "reconstruct": lambda x: pv.reconstruct(small(), x),
    "interpolate": lambda x: pv.interpolate(small(), x, X),
    "interpolate to": lambda x: pv.interpolate(small(), X, x),
    "log_likelihood": lambda x: pv.log_likelihood(small(), x, **FEW),
    "kl_parts": lambda x: pv.kl_parts(small(), x),
    "predictive_check": lambda x: pv.predictive_check(small(), x, progress=False),
    "outlier_scores": lambda x: pv.outlier_scores(
        small(), X, other=x, regret=False, progress=False, **FEW
    ),
    "diagnose": lambda x: pv.diagnose(small(), X, other=x, budget=0.01, progress=False),
    "decode": lambda x: pv.decode(small(), {"z": x[:, :2]}),
    "context of fit": lambda x: pv.fit(small(1), X, x, **FAST),
    "context of encode": lambda x: pv.encode(small(1), X, x),
    "context of sample": lambda x: pv.sample(small(1), 60, x),
    "context of decode": lambda x: pv.decode(small(1), {"z": torch.zeros(60, 2)}, x),
    "pseudo-inputs": lambda x: pv.VampPrior.of_data(small().encoder, x),
    "codes": lambda x: pv.disentanglement_scores(x, torch.arange(60)[:, None] % 2),
}


@pytest.mark.parametrize("name", ENTRANCES)
def test_masked_values_are_refused(name):
    with pytest.raises(UsageError, match="masked values, which are not supported"):
        ENTRANCES[name](MASKED)


@pytest.mark.parametrize("name", ["fit", "encode", "context of sample", "decode", "outlier_scores"])
def test_a_masked_array_without_masked_values_is_accepted(name):
    ENTRANCES[name](np.ma.array(X))


def torch_masked(mask):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.masked.masked_tensor(torch.tensor(X), torch.tensor(mask))


def quantized():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.quantize_per_tensor(torch.tensor(X), 0.1, 0, torch.qint8)


def nested():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])


OTHERS = {
    "torch's masked tensors": (lambda: torch_masked(X < 1), "masked values"),
    "rows that are masked": (lambda: list(MASKED), "masked values"),
    "sparse, scipy": (lambda: sparse.csr_matrix(X), r"sparse \(csr_matrix\): pass its toarray"),
    "sparse, torch": (lambda: torch.tensor(X).to_sparse(), "sparse .*to_dense"),
    "quantized": (quantized, "quantized .*dequantize"),
    "nested": (nested, "nested tensor: pad"),
    "objects": (lambda: X.astype(object), "often the cause is missing values"),
    "None among numbers": (lambda: np.array([[1.0, None]] * 60), "fill them in"),
    "words": (lambda: np.array([["a", "b"]] * 60), "numpy.unique"),
    "complex": (lambda: X.astype(complex), "must be real"),
    "dates": (lambda: np.zeros((60, 5), "datetime64[s]"), "array of numbers"),
    "records": (lambda: np.zeros(60, [("a", float), ("b", float)]), "array of numbers"),
    "nothing": (lambda: None, "array of numbers"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_objects_than_arrays_of_numbers_are_rejected(name):
    make, words = OTHERS[name]
    for call in (ENTRANCES["encode"], ENTRANCES["fit"], ENTRANCES["context of encode"]):
        if name == "nothing" and call is ENTRANCES["context of encode"]:
            continue
        with pytest.raises(UsageError, match=words) as caught:
            call(make())
        assert "\n" not in str(caught.value)


class Column:
    """A column with its own index, like a column of pandas."""

    def __init__(self, values, index):
        self.values, self.index = values, list(index)

    def __len__(self):
        return len(self.values)

    def __getitem__(self, label):
        return self.values[self.index.index(label)]

    def __array__(self, dtype=None, copy=None):
        return np.asarray(self.values, dtype)


def test_a_column_is_read_by_its_positions():
    column = Column([1.0, 2.0, 3.0], index=[2, 1, 0])
    assert as_tensor(column, "x").tolist() == [1.0, 2.0, 3.0]


@pytest.mark.parametrize("name", ["fit", "validation", "evaluate", "encode", "context of encode"])
def test_a_value_beyond_the_type_of_the_pair_is_named_by_its_row(name):
    x = X.astype(float)
    x[7, 2] = 1e300
    with pytest.raises(UsageError, match=r"holds 1e\+300 in row 7, .* too large for torch.float32"):
        ENTRANCES[name](x)
    pv.encode(small().double(), x)  # a pair in double precision can hold it


def test_rows_without_a_likelihood_are_named_and_json_stays_json(tmp_path):
    """The square of 1e25 is infinite, so log p(x) of that row and the mean are infinite."""
    x = X.copy()
    x[11, 3] = 1e25
    with pytest.warns(UserWarning, match=r"in 1 of 60 rows, .* first is row 11, .* up to 1e\+25"):
        found = pv.evaluate(small(), x, **FEW)
    assert found.log_likelihood == -math.inf
    assert json.dumps(found.as_dict(), allow_nan=False)  # any program can write it
    run_files.write_json(tmp_path / "metrics.json", found.as_dict())
    assert "Infinity" in (tmp_path / "metrics.json").read_text()
    strict(tmp_path / "metrics.json")
    assert run_files.read_json(tmp_path / "metrics.json")["log_likelihood"] == -math.inf


def strict(path):
    """Read JSON with a parser that rejects Infinity and NaN."""

    def refuse(token):
        raise AssertionError(f"{token} is not valid JSON")

    return json.loads(path.read_text(), parse_constant=refuse)


def test_json_restores_numbers_that_are_not_finite(tmp_path):
    content = {"a": [math.inf, -math.inf, 1.5], "b": {"c": (math.nan,)}, "d": np.float64("inf")}
    run_files.write_json(tmp_path / "any.json", content)
    assert strict(tmp_path / "any.json")["a"] == ["Infinity", "-Infinity", 1.5]
    again = run_files.read_json(tmp_path / "any.json")
    assert again["a"] == [math.inf, -math.inf, 1.5]
    assert math.isnan(again["b"]["c"][0])
    assert again["d"] == math.inf


@pytest.mark.thorough
def test_a_run_with_an_extreme_test_row_has_metrics_and_a_report(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    x = X.copy()
    x[:, 0] = 0.0
    extreme = x[:20].copy()
    extreme[4, 3] = 1e25
    np.savez("data.npz", x_train=x, x_test=extreme)
    options = "--likelihood gaussian --epochs 1 --batch-size 20 --num-eval-samples 2 "
    options += "--diagnosis-seconds 0"
    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)  # the command line prints the warning
        main(["train", "data.npz", *options.split()])
    assert "The first is row 4, with values up to 1e+25" in capsys.readouterr().err
    strict(tmp_path / "runs/data/metrics.json")
    assert (tmp_path / "runs/data/report.html").exists()
