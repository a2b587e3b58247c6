"""`fit`: resuming, schedules, early stopping, precision, and what it does not change."""

import json
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from pairs import make, rows
from torch.utils.data import DataLoader, TensorDataset

import pyro_vae as pv
from pyro_vae.data.order import Place
from pyro_vae.data.sources import Arrays
from pyro_vae.runs import files as run_files
from pyro_vae.runs import folder as run_folder

PROGRAM = """
import sys, torch, pyro_vae as pv
torch.set_num_threads(1)
x = (torch.rand(200, 6, generator=torch.Generator().manual_seed(0)) * 255).to(torch.uint8)
torch.manual_seed(2)
vae = pv.VAE.mlp((6,), latent_dim=2, hidden=(5,))
pv.fit(vae, x[:150], validation=x[150:], out=sys.argv[1], resume="resume" in sys.argv,
       epochs=int(sys.argv[2]), batch_size=20, patience=500, progress=False, clip_norm=50.0,
       beta=pv.CyclicalSchedule(7), learning_rate_schedule=pv.CosineSchedule(60),
       checkpoint_seconds=0)
"""


def program(tmp_path):
    path = tmp_path / "program.py"
    path.write_text(PROGRAM)
    return [sys.executable, str(path)]


def same_run(a: Path, b: Path):
    assert (a / run_files.MODEL).read_bytes() == (b / run_files.MODEL).read_bytes()
    left, right = run_files.read_checkpoint(a), run_files.read_checkpoint(b)
    for name, value in left["pair"].items():
        assert torch.equal(value, right["pair"][name])
    assert torch.equal(left["generators"]["torch"], right["generators"]["torch"])
    assert [e[:9] for e in left["epochs"]] == [e[:9] for e in right["epochs"]]


def stop(run, folder, number):
    """Start or resume a run, and send it a signal when some epochs are done."""
    before = len(run_files.read_checkpoint(folder)["epochs"]) if folder.exists() else 0
    words = [*run, folder, "40", *(["resume"] if folder.exists() else [])]
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
    history = folder / run_files.HISTORY
    while not history.exists() or len(history.read_text().splitlines()) < before + 4:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    assert process.returncode != 0
    assert before < len(run_files.read_checkpoint(folder)["epochs"]) < 40
    return error


@pytest.mark.thorough
def test_a_run_that_was_stopped_and_killed_ends_bit_identical(tmp_path):
    run, folder = program(tmp_path), tmp_path / "stopped"
    subprocess.run([*run, tmp_path / "whole", "40"], check=True)
    assert "resume with --resume" in stop(run, folder, signal.SIGTERM)
    assert "resume with --resume" in stop(run, folder, signal.SIGINT)
    stop(run, folder, signal.SIGKILL)
    subprocess.run([*run, folder, "40", "resume"], check=True)
    same_run(folder, tmp_path / "whole")


class StopAt:
    """A schedule that interrupts training within an epoch, like Ctrl-C."""

    def __init__(self, epoch):
        self.epoch = epoch

    def __call__(self, epoch):
        if self.epoch is not None and epoch >= self.epoch:
            self.epoch = None
            signal.raise_signal(signal.SIGINT)
        return 1.0


@pytest.mark.sample(6)
@pytest.mark.parametrize("source", ["tensor", "dataset", "loader"])
@pytest.mark.parametrize("epoch", [0.1, 1.0, 1.5, 2.7])
def test_resuming_within_an_epoch_is_bit_identical(tmp_path, source, epoch):
    (x,) = rows("bernoulli", 60)
    data = {
        "tensor": x,
        "dataset": TensorDataset(x),
        "loader": DataLoader(TensorDataset(x), batch_size=16, shuffle=True),
    }[source]
    options = {"epochs": 3, "batch_size": 16, "validation": x[:20], "engine": "eager"}
    options["progress"] = False
    whole = make("bernoulli")
    pv.fit(whole, data, out=tmp_path / "whole", **options)
    with pytest.raises(KeyboardInterrupt, match="resume"):
        pv.fit(make("bernoulli"), data, out=tmp_path / "part", beta=StopAt(epoch), **options)
    resumed = make("bernoulli", seed=8)
    history = pv.fit(resumed, data, out=tmp_path / "part", resume=True, **options)
    same_run(tmp_path / "part", tmp_path / "whole")
    assert len(history) == 3
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name])


def test_random_numbers_of_numpy_and_python_are_resumed_too(tmp_path):
    class Noisy(type(make("plain"))):
        def guide(self, x):
            import random

            super().guide(x + float(np.random.rand()) * random.random())

    (x,) = rows("plain", 60)
    options = {"epochs": 3, "batch_size": 16, "progress": False, "engine": "eager"}
    torch.manual_seed(0)
    start = Noisy().double().state_dict()

    def noisy():
        pair = Noisy().double()
        pair.load_state_dict(start)
        return pair

    pv.fit(noisy(), x, out=tmp_path / "whole", **options)
    with pytest.raises(KeyboardInterrupt):
        pv.fit(noisy(), x, out=tmp_path / "part", beta=StopAt(1.5), **options)
    pv.fit(noisy(), x, out=tmp_path / "part", resume=True, **options)
    same_run(tmp_path / "part", tmp_path / "whole")


def test_generators_of_the_caller_are_given_back():
    torch.manual_seed(7)
    np.random.seed(7)
    want = (torch.rand(3), np.random.rand())
    torch.manual_seed(7)
    np.random.seed(7)
    pair = make("bernoulli")
    torch.manual_seed(7)
    pv.fit(pair, *rows("bernoulli"), epochs=1, batch_size=16, progress=False, engine="eager")
    assert torch.equal(torch.rand(3), want[0])
    assert np.random.rand() == want[1]


def test_the_same_seed_gives_the_same_run_and_another_seed_another():
    results = []
    for seed in (1, 1, 2):
        pair = make("bernoulli")
        history = pv.fit(
            pair,
            *rows("bernoulli"),
            epochs=2,
            batch_size=16,
            seed=seed,
            progress=False,
            engine="eager",
        )
        results.append(history["elbo"])
    assert results[0] == results[1] != results[2]


def test_validation_does_not_change_training():
    histories = []
    for validation in (None, rows("bernoulli", 10, seed=3)):
        pair = make("bernoulli")
        batch = rows("bernoulli")
        histories.append(
            pv.fit(
                pair,
                *batch,
                validation=validation,
                epochs=3,
                batch_size=16,
                progress=False,
                engine="eager",
            )
        )
    assert histories[0]["elbo"] == histories[1]["elbo"]


def test_every_example_counts_with_a_smaller_last_minibatch():
    class Counting(Arrays):
        seen = 0

        def epoch(self, batch_size, place):
            for batch in super().epoch(batch_size, place):
                Counting.seen += len(batch[0])
                yield batch

    (x,) = rows("bernoulli", 37)
    source = Counting([x])
    assert sum(len(batch[0]) for batch in source.epoch(16, Place(0, 0))) == 37
    # One epoch at a tiny learning rate: the training ELBO is that of all 37 rows.
    pair = make("bernoulli")
    history = pv.fit(
        pair,
        x,
        validation=x,
        epochs=1,
        batch_size=16,
        learning_rate=1e-12,
        progress=False,
        engine="eager",
    )
    draws = [pv.evaluate(pair, x, num_samples=1, seed=seed).elbo for seed in range(3)]
    assert history["elbo"][0] == pytest.approx(np.mean(draws), abs=0.5)
    assert history["objective"][0] == pytest.approx(history["elbo"][0])


def test_early_stopping_keeps_the_best_epoch(tmp_path):
    (x,) = rows("bernoulli", 30)
    pair = make("bernoulli")
    history = pv.fit(
        pair,
        x,
        validation=rows("bernoulli", 30, seed=9),
        epochs=400,
        batch_size=30,
        learning_rate=0.1,
        patience=15,
        out=tmp_path / "run",
        progress=False,
    )
    assert history.stopped_early
    assert len(history) == history.best_epoch + 15
    bounds = history["validation_bound"]
    assert bounds[history.best_epoch - 1] == max(bounds)
    measured = pv.load(tmp_path / "run")
    for name, value in pair.state_dict().items():
        assert torch.equal(value, measured.state_dict()[name])


def test_clipping_is_by_the_global_norm():
    from pyro_vae.training.optimizer import Optimizer

    values = [torch.nn.Parameter(torch.zeros(2)) for _ in range(2)]
    optimizer = Optimizer(torch.optim.SGD, {"a": values[0], "b": values[1]}, 1.0, clip_norm=1.0)
    values[0].grad, values[1].grad = torch.tensor([3.0, 0.0]), torch.tensor([0.0, 4.0])
    optimizer(values)
    assert optimizer.gradient_norm == pytest.approx(5.0)
    assert torch.cat(list(values)).tolist() == pytest.approx([-0.6, 0, 0, -0.8], abs=1e-5)


def test_learning_rate_schedule_and_history_columns():
    pair = make("bernoulli")
    history = pv.fit(
        pair,
        *rows("bernoulli", 40),
        epochs=4,
        batch_size=40,
        learning_rate=0.1,
        learning_rate_schedule=pv.LinearSchedule(4, start=1.0, end=0.0),
        beta=pv.LinearSchedule(2),
        progress=False,
        engine="eager",
    )
    assert history["learning_rate"] == pytest.approx([0.1, 0.075, 0.05, 0.025])
    assert history["beta"] == [0.0, 0.5, 1.0, 1.0]
    assert history["objective"][0] == pytest.approx(history["reconstruction"][0])
    assert history["objective"][3] == pytest.approx(history["elbo"][3])
    assert history["elbo"][0] == pytest.approx(history["objective"][0] - history["kl"][0])


def test_bfloat16_trains_to_the_same_bound():
    x = pv.load_data("digits").train.x[:400]
    elbos = {}
    for precision in ("float32", "bfloat16"):
        torch.manual_seed(0)
        vae = pv.VAE.mlp((1, 8, 8), latent_dim=4, hidden=(32,))
        pv.fit(vae, x, epochs=12, batch_size=50, precision=precision, progress=False)
        assert all(p.dtype == torch.float32 for p in vae.parameters())
        elbos[precision] = pv.evaluate(vae, x, num_samples=1).elbo
    assert elbos["bfloat16"] == pytest.approx(elbos["float32"], abs=0.3)
    assert elbos["bfloat16"] != elbos["float32"]


def test_tensorboard_gets_the_history(tmp_path):
    pair = make("bernoulli")
    pv.fit(
        pair,
        *rows("bernoulli"),
        epochs=2,
        batch_size=20,
        out=tmp_path / "run",
        tensorboard=True,
        progress=False,
        engine="eager",
    )
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "run" / run_files.TENSORBOARD)).Reload()
    assert [event.step for event in events.Scalars("elbo")] == [1, 2]


def test_a_thread_other_than_the_main_one_may_fit():
    found = []

    def work():
        history = pv.fit(
            make("bernoulli"),
            *rows("bernoulli"),
            epochs=1,
            batch_size=20,
            progress=False,
            engine="eager",
        )
        found.append(len(history))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [1]


def test_resuming_under_other_settings_or_data_is_refused(tmp_path):
    (x,) = rows("bernoulli", 40)
    options = {"batch_size": 20, "progress": False, "out": tmp_path / "run", "engine": "eager"}
    pv.fit(make("bernoulli"), x, epochs=1, **options)
    with pytest.raises(pv.UsageError, match=r"learning_rate = 0\.001, got 0\.1"):
        pv.fit(make("bernoulli"), x, epochs=2, learning_rate=0.1, resume=True, **options)
    with pytest.raises(pv.UsageError, match="another data"):
        pv.fit(make("bernoulli"), 1 - x, epochs=2, resume=True, **options)
    with pytest.raises(pv.UsageError, match=r"another beta: 1\.0 then, 2\.0 now"):
        pv.fit(make("bernoulli"), x, epochs=2, beta=2.0, resume=True, **options)
    with pytest.raises(pv.UsageError, match="another optimizer: Adam then, SGD now"):
        pv.fit(make("bernoulli"), x, epochs=2, optimizer=torch.optim.SGD, resume=True, **options)
    objective = pv.ImportanceWeightedELBO(3)
    with pytest.raises(pv.UsageError, match="another objective"):
        pv.fit(make("bernoulli"), x, epochs=2, objective=objective, resume=True, **options)
    history = pv.fit(make("bernoulli"), x, epochs=2, resume=True, **options)
    assert len(history) == 2


def test_a_warning_says_that_gray_targets_have_no_likelihood():
    x = torch.rand(30, 6)
    vae = pv.VAE.mlp((6,), latent_dim=2, hidden=(4,))
    with pytest.warns(UserWarning, match="not log-likelihoods"):
        pv.fit(vae, x, epochs=1, batch_size=10, binarize="none", progress=False, engine="eager")


def test_a_resumed_run_that_overflows_goes_back_to_the_weights_of_its_checkpoint(tmp_path):
    (x,) = rows("bernoulli", 40)
    options = {"batch_size": 20, "progress": False, "out": tmp_path, "engine": "eager"}
    pv.fit(make("bernoulli"), x, epochs=1, **options)
    good = run_files.read_checkpoint(tmp_path)["pair"]
    pair = make("bernoulli", seed=5)

    def overflow(epoch):
        return 1e308 * 1e3 if epoch >= 1 else 1.0

    with pytest.raises(pv.UsageError, match="not finite"):
        pv.fit(pair, x, epochs=2, learning_rate_schedule=overflow, resume=True, **options)
    for name, value in pair.state_dict().items():
        assert torch.equal(value, good[name])
        assert torch.equal(value, run_folder.read_model(tmp_path)[name])


def test_the_default_minibatch_is_at_most_the_data(tmp_path):
    (x,) = rows("bernoulli", 40)
    options = {"progress": False, "out": tmp_path / "run", "engine": "eager"}
    history = pv.fit(make("bernoulli"), x, epochs=1, **options)
    assert json.loads((tmp_path / "run/config.json").read_text())["settings"]["batch_size"] == 40
    assert len(pv.fit(make("bernoulli"), x, epochs=2, resume=True, **options).epochs) == 2
    assert (
        history["elbo"]
        == pv.fit(make("bernoulli"), x, epochs=1, batch_size=40, progress=False, engine="eager")[
            "elbo"
        ]
    )
    with pytest.raises(pv.UsageError, match=r"batch_size must be at most 40, .* got 41"):
        pv.fit(make("bernoulli"), x, epochs=1, batch_size=41, progress=False, engine="eager")
    with pytest.raises(pv.UsageError, match="with batch_size = 40, got 20"):
        pv.fit(make("bernoulli"), x, epochs=3, resume=True, batch_size=20, **options)
