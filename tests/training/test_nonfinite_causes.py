"""Many causes of numbers that are not finite: each error names a site, a parameter or rows."""

import re
import warnings

import numpy as np
import pyro
import pytest
import torch
from bad_input_helpers import NORMAL, binary, plate, refused, small
from bad_input_helpers import Pair as Bare
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import pyro_vae as pv
from pyro_vae.training.stopping import NonFiniteError

pytestmark = pytest.mark.filterwarnings("ignore:.*range:UserWarning")

FAST = {"epochs": 3, "batch_size": 4, "engine": "eager", "progress": False}

X = torch.randn(16, 4, generator=torch.Generator().manual_seed(3))


CONTEXT = torch.arange(16.0)[:, None]


class Pair(Bare):
    """A pair that may have a context, and does not use it."""

    def model(self, x, c=None):
        super().model(x)

    def guide(self, x, c=None):
        super().guide(x)


def loose(loc, scale):
    return NORMAL(loc, scale, validate_args=False).to_event(1)


def model_of(mean=lambda pair, z: pair.decoder(z), scale=lambda pair, z: 1.0, prior=lambda x: 1.0):
    """A model with other means, scales or scales of the prior."""

    def model(pair, x):
        with plate(x):
            z = pyro.sample("z", loose(torch.zeros(2), prior(x)))
            pyro.sample("x", loose(mean(pair, z), scale(pair, z)), obs=x)

    return model


def guide_of(scale):
    def guide(pair, x):
        with plate(x):
            loc, _ = pair.encoder(x).chunk(2, -1)
            pyro.sample("z", loose(loc, scale(pair, x)))

    return guide


def in_training(good, bad):
    """A function that takes other values after the checks of `fit`, from the third call on."""

    def value(pair, *given):
        pair.calls = getattr(pair, "calls", 0) + pair.training
        return (bad if pair.calls > 2 else good)(pair, *given)

    return value


def saved_rows(path):
    with np.load(path, allow_pickle=False) as arrays:
        return dict(arrays)


def extreme(row, value=1e30, x=X):
    x = x.clone()
    x[row, -1] = value
    return x


def with_weight(name, value, pair=None):
    pair = pair or Pair()
    with torch.no_grad():
        dict(pair.named_parameters())[name].view(-1)[0] = value
    return pair


class Contextual(nn.Module):
    """A pair with a context that its decoder sees."""

    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = nn.Linear(4, 4), nn.Linear(3, 4)

    def model(self, x, c):
        with plate(x):
            z = pyro.sample("z", loose(torch.zeros(2), 1.0))
            pyro.sample("x", loose(self.decoder(torch.cat([z, c], -1)), 1.0), obs=x)

    def guide(self, x, c):
        with plate(x):
            loc, scale = self.encoder(x).chunk(2, -1)
            pyro.sample("z", loose(loc, scale.exp()))


def one(pair, z):
    return pair.decoder(z)


CAUSES = {
    "an extreme cell": lambda: (Pair(), extreme(5), {}),
    "an extreme negative cell": lambda: (Pair(), extreme(11, -3e29), {}),
    "two extreme cells": lambda: (Pair(), extreme(2, 1e25, extreme(9)), {}),
    "a learning rate": lambda: (Pair(), X, {"learning_rate": 1e38}),
    "a learning rate of a library's pair": lambda: (small(), binary(), {"learning_rate": 1e39}),
    "a gradient that explodes": lambda: (Pair(), 1e12 * X, {"learning_rate": 1e30}),
    "a scale of 0": lambda: (
        Pair(model_of(scale=in_training(lambda p, z: 1.0, lambda p, z: 0.0 * z[:, :1]))), X, {}
    ),
    "a scale that is NaN": lambda: (
        Pair(model_of(scale=in_training(lambda p, z: 1.0, lambda p, z: z[:, :1] * torch.nan))),
        *(X, {}),
    ),
    "the log of 0": lambda: (
        Pair(model_of(in_training(one, lambda p, z: one(p, z) + (0.0 * z[:, :1]).log()))), X, {}
    ),
    "the root of a negative number": lambda: (
        Pair(model_of(in_training(one, lambda p, z: one(p, z) + (z[:, :1].abs() - 99).sqrt()))),
        *(X, {}),
    ),
    "0 over 0": lambda: (
        Pair(model_of(in_training(one, lambda p, z: one(p, z) * (0 * z[:, :1] / (0 * z[:, :1]))))),
        *(X, {}),
    ),
    "a gradient of NaN": lambda: (
        Pair(model_of(in_training(one, lambda p, z: one(p, z) + 0 * (p.decoder.bias * 0).sqrt()))),
        *(X, {}),
    ),
    "a guide whose scale is 0": lambda: (
        Pair(guide=guide_of(in_training(lambda p, x: 1.0, lambda p, x: 0.0 * x[:, :1]))), X, {}
    ),
    "a guide whose scale overflows": lambda: (
        Pair(guide=guide_of(in_training(lambda p, x: 1.0, lambda p, x: (1e6 + x[:, :2]).exp()))),
        *(X, {}),
    ),
    "a prior whose scale is 0": lambda: (
        Pair(model_of(prior=lambda x: torch.where(x[:, :1] == X[7, 0], 0.0, 1.0))), X, {}
    ),
    "a NaN in a weight": lambda: (with_weight("decoder.weight", torch.nan), X, {}),
    "an infinite bias": lambda: (with_weight("encoder.bias", torch.inf), X, {}),
    "a huge context": lambda: (Contextual(), X, {"context": extreme(3, 1e30, CONTEXT)}),
    "an infinite context": lambda: (Contextual(), X, {"context": extreme(3, torch.inf, CONTEXT)}),
    "an infinite cell": lambda: (Pair(), extreme(4, torch.inf), {}),
    "a loader with an extreme cell": lambda: (Pair(), DataLoader(extreme(6), batch_size=4), {}),
    "a traced engine": lambda: (Pair(), extreme(5), {"engine": "traced"}),
    "an importance-weighted bound": lambda: (
        Pair(), extreme(5), {"objective": pv.ImportanceWeightedELBO(2)}
    ),
    "two particles": lambda: (
        Pair(), extreme(5), {"objective": pyro.infer.Trace_ELBO(num_particles=2)}
    ),
}  # fmt: skip

NAMED = re.compile(r"site '\w+'|parameter '[\w.]+'|rows? \d|context 1|x is not finite|x has")


@pytest.mark.parametrize("cause", CAUSES.values(), ids=CAUSES.keys())
def test_each_cause_is_named(cause, tmp_path):
    pair, x, options = cause()
    context = [options.pop("context")] if "context" in options else []
    options = FAST | options
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        message = refused(lambda: pv.fit(pair, x, *context, out=tmp_path / "run", **options))
    assert NAMED.search(message), message


ROWS = {
    "one": ({5: 1e30}, {}),
    "two in different minibatches": ({2: 1e30, 13: 1e30}, {}),
    "in a traced engine": ({10: -1e30}, {"engine": "traced"}),
    "with one minibatch": ({0: 1e30}, {"batch_size": 16}),
    "in a ragged minibatch": ({7: 1e30}, {"batch_size": 5}),
}


@pytest.mark.parametrize(("cells", "options"), ROWS.values(), ids=ROWS.keys())
def test_the_rows_are_those_of_the_data(cells, options, tmp_path):
    x = X.clone()
    for row, value in cells.items():
        x[row, 1] = value
    with pytest.raises(NonFiniteError) as caught:
        pv.fit(Pair(), x, CONTEXT, out=tmp_path / "run", **FAST | options)
    saved = saved_rows(tmp_path / "run" / "nonfinite.npz")
    bad = saved["row"][saved["bad"]].tolist()
    assert set(bad) <= set(cells)
    assert bad
    assert caught.value.rows == tuple(bad)
    assert f"row{'s' * (len(bad) > 1)} {', '.join(map(str, bad))} of the training data" in str(
        caught.value
    )
    np.testing.assert_array_equal(saved["x"], x[saved["row"]])
    np.testing.assert_array_equal(saved["context_1"], CONTEXT[saved["row"]])
    assert str(tmp_path / "run" / "nonfinite.npz") in str(caught.value)


def test_rows_of_a_stream_have_their_place_in_the_epoch(tmp_path):
    loader = DataLoader(TensorDataset(extreme(6)), batch_size=4)
    message = refused(lambda: pv.fit(Pair(), loader, out=tmp_path / "run", **FAST), "row 6 of the")
    assert "step 2" in message
    assert saved_rows(tmp_path / "run" / "nonfinite.npz")["bad"].tolist() == [
        False,
        False,
        True,
        False,
    ]


def test_the_last_checkpoint_stays_as_it_was(tmp_path):
    run = tmp_path / "run"
    pv.fit(Pair(), X, out=run, **FAST | {"epochs": 1})
    before = [(run / name).read_bytes() for name in ("checkpoint.pt", "checkpoint-older.pt")]
    broken = Pair(model_of(lambda pair, z: pair.decoder(z) * torch.nan))
    refused(lambda: pv.fit(broken, X, out=run, resume=True, **FAST), "site 'x'")
    after = [(run / name).read_bytes() for name in ("checkpoint.pt", "checkpoint-older.pt")]
    assert after == before


# Leaving minibatches out


SKIP = FAST | {"on_nonfinite": "skip"}


@pytest.mark.parametrize("engine", ["eager", "traced"])
def test_a_minibatch_that_is_left_out_moves_nothing(engine, tmp_path):
    """One of four steps is left out, so the optimizer counts three in each epoch."""
    pair, options = Pair(), SKIP | {"engine": engine, "batch_size": 4, "epochs": 2}
    with pytest.warns(UserWarning, match=r"left out the minibatch .* row 5 of the training data"):
        history = pv.fit(pair, extreme(5), out=tmp_path / "run", **options)
    assert history["skipped"] == [1, 1]
    assert all(np.isfinite(history["elbo"]))
    state = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert {int(one["step"]) for one in state["optimizer"]["state"].values()} == {6}
    assert all(bool(torch.isfinite(p).all()) for p in pair.parameters())


def test_left_out_minibatches_do_not_count(tmp_path):
    """If q(z) = p(z) and x does not depend on z, the ELBO is the density of the rows that count."""

    def prior(pair, x):
        with plate(x):
            pyro.sample("z", loose(0 * x[:, :2] + 0 * pair.encoder.bias[:2], 1.0))

    pair, x = Pair(model_of(lambda p, z: p.decoder.bias + 0 * z[:, :1]), prior), extreme(9)
    mean = pair.decoder.bias.detach().clone()
    options = SKIP | {"epochs": 1, "learning_rate": 1e-30, "out": tmp_path / "run"}
    with pytest.warns(UserWarning, match="row 9 of"):
        history = pv.fit(pair, x, **options)
    left_out = saved_rows(tmp_path / "run" / "nonfinite.npz")["row"]
    assert len(left_out) == 4
    kept = np.setdiff1d(np.arange(16), left_out)
    expected = NORMAL(mean, 1.0).log_prob(x[kept]).sum() / 12
    assert history["elbo"] == pytest.approx([float(expected)], rel=1e-5)
    assert history["kl"] == pytest.approx([0.0], abs=1e-5)


def test_batch_normalization_forgets_a_minibatch_that_is_left_out():
    class Normalized(Pair):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(4)

        def posterior(self, x):
            return super().posterior(self.norm(x))

    pair = Normalized()
    with pytest.warns(UserWarning, match="left out the minibatch"):
        pv.fit(pair, extreme(5), **SKIP | {"epochs": 1, "batch_size": 4})
    assert float(pair.norm.running_mean.abs().max()) < 5
    assert float(pair.norm.running_var.max()) < 10


def test_more_than_the_limit_stops_training(tmp_path):
    x = extreme(1, 1e30, extreme(5, 1e30, extreme(9, 1e30)))
    options = SKIP | {"batch_size": 1, "skip_limit": 2, "out": tmp_path / "run"}
    with pytest.warns(UserWarning, match="left out"):
        message = refused(lambda: pv.fit(Pair(), x, **options))
    assert "more than 2 minibatches" in message
    with pytest.warns(UserWarning, match="left out"):
        history = pv.fit(Pair(), x, overwrite=True, **options | {"skip_limit": 3})
    assert history["skipped"] == [3, 3, 3]


def test_an_epoch_without_a_finite_minibatch_stops_training():
    pair = with_weight("decoder.weight", torch.nan)
    with pytest.warns(UserWarning, match="left out"):
        refused(lambda: pv.fit(pair, X, **SKIP | {"skip_limit": 99}), "'decoder.weight'")


def test_skipping_a_run_without_bad_numbers_changes_nothing(tmp_path):
    made = []
    for name, how in (("a", "stop"), ("b", "skip")):
        torch.manual_seed(0)
        pv.fit(Pair(), X, out=tmp_path / name, **FAST | {"on_nonfinite": how})
        made.append((tmp_path / name / "model.safetensors").read_bytes())
    assert made[0] == made[1]


def test_a_stopped_run_is_resumed_with_another_choice(tmp_path):
    run, x = tmp_path / "run", extreme(5)
    refused(lambda: pv.fit(Pair(), x, out=run, **FAST), "row 5")
    with pytest.warns(UserWarning, match="left out"):
        history = pv.fit(Pair(), x, out=run, resume=True, **SKIP)
    assert history["skipped"] == [1, 1, 1]
    pv.fit(Pair(), X, out=run, overwrite=True, **FAST)
    assert not (run / "nonfinite.npz").exists()


@pytest.mark.parametrize("options", [{"on_nonfinite": "ignore"}, {"skip_limit": 0}])
def test_choices_that_do_not_exist(options):
    (name,) = options
    refused(lambda: pv.fit(Pair(), X, **FAST | options), name)


def test_the_greatest_gradient_is_in_the_history(tmp_path):
    """A row that is 1,000 times as large makes one step in four explode."""
    x, pair = X.clone(), Pair(guide=guide_of(lambda pair, x: 1.0))
    x[3] *= 1000
    history = pv.fit(pair, x, out=tmp_path / "run", **FAST | {"learning_rate": 1e-9})
    for mean, greatest in zip(history["gradient_norm"], history["gradient_norm_max"], strict=True):
        assert 3.5 < greatest / mean <= 4.0
    rows = np.genfromtxt(tmp_path / "run" / "history.csv", delimiter=",", names=True)
    np.testing.assert_allclose(rows["gradient_norm_max"], history["gradient_norm_max"])
