"""Functions that see each epoch: loggers, and a user's own."""

import json
import sys

import pytest
import torch

import pyro_vae as pv
from pyro_vae.training import loggers

X = torch.rand(40, 4, generator=torch.Generator().manual_seed(0)).round()

OPTIONS = {"epochs": 3, "batch_size": 16, "engine": "eager", "progress": False}


def made():
    torch.manual_seed(0)
    return pv.VAE.mlp((4,), latent_dim=2, hidden=(8,))


def fitted(**options):
    pair = made()
    return pair, pv.fit(pair, X, validation=X[:8], **(OPTIONS | options))


def test_each_function_sees_each_epoch_in_order():
    seen, again = [], []
    _, history = fitted(on_epoch=[seen.append, again.append])
    assert seen == again == list(history.epochs)


def test_a_function_may_use_the_pair_and_draw_without_a_change_of_training():
    pair = made()

    def look(epoch):
        torch.manual_seed(epoch.epoch)
        pair.eval()
        assert pv.encode(pair, X)["z"].isfinite().all()
        assert pv.log_likelihood(pair, X, num_samples=5).value < 0

    watched = pv.fit(pair, X, validation=X[:8], on_epoch=[look], **OPTIONS)
    plain, history = fitted()
    assert [e._replace(seconds=0) for e in watched.epochs] == [
        e._replace(seconds=0) for e in history.epochs
    ]
    for name, value in plain.state_dict().items():
        assert torch.equal(value, pair.state_dict()[name])


class Enough(Exception):
    pass


def test_an_error_ends_training_and_keeps_the_epoch(tmp_path):
    def stop(epoch):
        if epoch.epoch == 2:
            raise Enough

    with pytest.raises(Enough):
        fitted(on_epoch=[stop], out=tmp_path / "run", checkpoint_seconds=1e6)
    pair = made()
    resumed = pv.fit(pair, X, validation=X[:8], out=tmp_path / "run", resume=True, **OPTIONS)
    plain, history = fitted()
    assert resumed["elbo"] == history["elbo"]
    for name, value in plain.state_dict().items():
        assert torch.equal(value, pair.state_dict()[name])


def test_tensorboard_gets_the_rows(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with loggers.TensorBoard(tmp_path) as board:
        _, history = fitted(on_epoch=[board])
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [event.value for event in events.Scalars("elbo")] == pytest.approx(history["elbo"])


def test_mlflow_gets_the_rows(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not part of the test extra")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    uri = f"file://{tmp_path}/store"
    mine = mlflow.MlflowClient(tracking_uri=uri).create_experiment("mine")
    with loggers.MLflow(tracking_uri=uri, experiment_id=mine) as board:
        _, history = fitted(on_epoch=[board])
    client = mlflow.MlflowClient(tracking_uri=uri)
    values = client.get_metric_history(board.run.info.run_id, "elbo")
    assert [(v.step, v.value) for v in values] == list(enumerate(history["elbo"], 1))


def test_weights_and_biases_gets_the_rows(tmp_path):
    pytest.importorskip("wandb", reason="wandb is not part of the test extra")
    with loggers.WeightsAndBiases(mode="offline", dir=tmp_path, project="test") as board:
        _, history = fitted(on_epoch=[board])
    (file,) = tmp_path.rglob("*.wandb")
    content = file.read_bytes()
    assert all(json.dumps(value).encode() in content for value in history["elbo"])


@pytest.mark.parametrize(
    ("make", "module"),
    [(loggers.WeightsAndBiases, "wandb"), (loggers.MLflow, "mlflow")],
)
def test_a_logger_that_is_not_installed_is_named_in_one_line(make, module, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(pv.UsageError, match=f"pip install {module}"):
        make()
