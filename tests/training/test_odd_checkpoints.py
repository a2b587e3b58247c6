"""A checkpoint with another content than training writes is refused in one line."""

import json
import os
import shutil
import subprocess
import sys
from functools import partial

import pytest
import torch
from bad_input_helpers import binary, refused, small

import pyro_vae as pv
from pyro_vae.pairs import rng
from pyro_vae.runs import files as run_files
from pyro_vae.training.optimizer import Optimizer

OPTIONS = {"batch_size": 4, "engine": "eager", "progress": False, "validation": binary()}

ODD = [None, {}, [], "x", 7.5, -3, torch.zeros(3), [[1, 2]], {"a": None}]

SOUND = {
    "best": [None],
    "epochs": [[]],
    "more_generators": [[]],
    "seconds": [7.5, -3],
}
"""Odd values that are possible: no validation data, epoch or other process, and any number."""


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    run = tmp_path_factory.mktemp("trained") / "run"
    pv.fit(small(), binary(), out=run, epochs=1, **OPTIONS)
    (run / "checkpoint-older.pt").unlink()
    return run


def resume(run):
    return pv.fit(small(), binary(), out=run, epochs=2, resume=True, **OPTIONS)


def odd(run, **changes):
    state = run_files.read_checkpoint(run)
    (run / "checkpoint.pt").unlink()
    run_files.write_checkpoint(run, state | changes)


KEYS = [
    *("job", "pair", "optimizer", "engine", "generators", "more_generators", "epochs"),
    *("best", "best_epoch", "batches", "examples", "sums", "seconds"),
]


def test_all_keys_are_tested(trained):
    assert sorted(KEYS) == sorted(run_files.read_checkpoint(trained))


@pytest.mark.sample(6)
@pytest.mark.parametrize("key", KEYS)
def test_odd_values_are_refused(key, trained, tmp_path):
    run = shutil.copytree(trained, tmp_path / "run")
    for value in ODD:
        if not any(value is each or str(value) == str(each) for each in SOUND.get(key, [])):
            odd(run, **{key: value})
            refused(lambda: resume(run), str(run / "checkpoint.pt"))


def test_odd_fields_of_an_epoch_are_refused(trained, tmp_path):
    run = shutil.copytree(trained, tmp_path / "run")
    (epoch,) = run_files.read_checkpoint(run)["epochs"]
    assert len(epoch) == 12
    for at in range(len(epoch)):
        for value in ("x", [1.0], {"z": "x"}):
            odd(run, epochs=[[*epoch[:at], value, *epoch[at + 1 :]]])
            refused(lambda: resume(run), str(run / "checkpoint.pt"), "epochs")
    for length in (9, 11):
        odd(run, epochs=[epoch[:length]])
        refused(lambda: resume(run), str(run / "checkpoint.pt"), "epochs")


def test_odd_values_in_the_state_of_the_optimizer_are_refused(trained, tmp_path):
    """torch loads them without an error, and the next step would fail."""
    run = shutil.copytree(trained, tmp_path / "run")
    saved = run_files.read_checkpoint(run)["optimizer"]
    first, words = saved["state"][0], "has the state of another optimizer"
    for name in first:
        for value in ("x", [1.0, 2.0], None, {"a": None}):
            state = saved["state"] | {0: first | {name: value}}
            odd(run, optimizer=saved | {"state": state})
            refused(lambda: resume(run), str(run / "checkpoint.pt"), words, name)
    (group,) = saved["param_groups"]
    for name, value in (("lr", "x"), ("betas", 0.9), ("eps", None), ("weight_decay", [0.0])):
        odd(run, optimizer=saved | {"param_groups": [group | {name: value}]})
        refused(lambda: resume(run), str(run / "checkpoint.pt"), words, name)
    shorter = {name: torch.zeros(1) for name in first}
    swapped = saved["state"] | {0: saved["state"][1], 1: saved["state"][0]}
    for state in (saved["state"] | {0: shorter}, swapped, saved["state"] | {0: {}}):
        odd(run, optimizer=saved | {"state": state})
        refused(lambda: resume(run), str(run / "checkpoint.pt"), words, "of parameter 0")
    odd(run, optimizer=saved | {"param_groups": [group, group]})
    refused(lambda: resume(run), str(run / "checkpoint.pt"), words, "2 groups instead of 1")
    odd(run, optimizer=saved)
    resume(run)


@pytest.mark.parametrize(
    "kind",
    [
        torch.optim.AdamW,
        partial(torch.optim.Adam, amsgrad=True),
        torch.optim.NAdam,
        torch.optim.Adafactor,
        partial(torch.optim.SGD, momentum=0.9),
        torch.optim.SGD,
        torch.optim.Rprop,
        torch.optim.RMSprop,
        torch.optim.Adagrad,
        partial(torch.optim.ASGD, foreach=False),
    ],
    ids=str,
)
def test_the_state_of_each_optimizer_is_taken_back(kind):
    def made():
        weights = {
            "a": torch.nn.Parameter(torch.ones(2, 3)),
            "b": torch.nn.Parameter(torch.ones(3)),
        }
        return Optimizer(kind, weights, 0.1)

    optimizer = made()
    for _ in range(2):
        for weight in optimizer.parameters.values():
            weight.grad = torch.ones_like(weight)
        optimizer(list(optimizer.parameters.values()))
    other = made()
    other.set_state(optimizer.get_state())
    assert str(other.get_state()) == str(optimizer.get_state())


def test_a_best_epoch_that_does_not_exist_is_refused(trained, tmp_path):
    run = shutil.copytree(trained, tmp_path / "run")
    odd(run, best_epoch=2)
    refused(lambda: resume(run), str(run / "checkpoint.pt"), "best_epoch")


def test_a_step_after_the_end_of_an_epoch_is_refused(trained, tmp_path):
    run = shutil.copytree(trained, tmp_path / "run")
    odd(run, batches=7)
    refused(lambda: resume(run), str(run / "checkpoint.pt"), "step 7 of 2")


def test_odd_generators_leave_those_of_the_caller(trained, tmp_path):
    before = rng.state()
    state = run_files.read_checkpoint(trained)["generators"]
    assert rng.is_state(state)
    assert not rng.is_state(state | {"numpy": None})
    assert not rng.is_state(state | {"torch": state["torch"][:-1]})
    after = rng.state()
    assert torch.equal(before["torch"], after["torch"])
    assert before["python"] == after["python"]


@pytest.mark.parametrize("seed", [2**64, 2**63, -1, 1.5, "1"])
def test_a_seed_that_generators_do_not_take(seed):
    refused(lambda: pv.sample(small(), 2, seed=seed), "seed must be a whole number from 0 to 2^63")
    refused(lambda: pv.diagnose(small(), binary(), seed=seed), "seed must be a whole number")


def test_the_greatest_seed():
    assert pv.sample(small(), 2, seed=2**63 - 1).shape == (2, 4)


@pytest.mark.parametrize("name", ["meta", "lazy", "nonsense", "cpu:-1"])
def test_a_device_without_data(name):
    refused(lambda: pv.fit(small(), binary(), epochs=1, device=name, **OPTIONS), f"'{name}'")


# A disk without space: a limit on the size of files


def limited(size, work):
    """Run in a process whose files have at most this size; return its message of one line."""
    import resource

    read, out = os.pipe()
    child = os.fork()
    if child == 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        try:
            work()
            os.write(out, b"done")
        except pv.UsageError as error:
            os.write(out, str(error).encode())
        except BaseException as error:
            os.write(out, f"traceback {error!r}".encode())
        finally:
            os._exit(0)
    os.close(out)
    os.waitpid(child, 0)
    with os.fdopen(read) as words:
        return words.read()


SIZES = [0, 100, 1700, 5000, 9000]
"""Each is too small for another file, from the lock to the checkpoint."""

PROGRAM = """
import json, sys
import pyro_vae as pv
from bad_input_helpers import binary, small
from test_odd_checkpoints import SIZES, limited, resume

folder = sys.argv[1]
pv.fit(small(), binary(), epochs=1, batch_size=4, engine="eager", progress=False)  # imports
found = {str(size): limited(size, lambda: resume(f"{folder}/{size}")) for size in SIZES}
export = lambda: pv.export(small(), binary(), folder=f"{folder}/e", formats=["torch"])
print(json.dumps(found | {"export": limited(1000, export)}))
"""


@pytest.fixture(scope="module")
def full(trained, tmp_path_factory):
    """A folder with a run for each size, and what the processes on a full disk said.

    They are forks of a fresh process, in which autograd has no threads.
    """
    folder = tmp_path_factory.mktemp("full")
    for size in SIZES:
        shutil.copytree(trained, folder / str(size))
    here = os.path.dirname(__file__)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([here, *sys.path])}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-W", "ignore", "-c", PROGRAM, str(folder)]
    done = subprocess.run(words, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return folder, json.loads(done.stdout)


needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


@pytest.mark.thorough
@needs_fork
@pytest.mark.parametrize("size", SIZES)
def test_a_full_disk_is_one_line_and_the_last_run_loads(size, full, trained):
    folder, messages = full
    run, message = folder / str(size), messages[str(size)]
    assert str(run) in message
    assert "cannot be written" in message
    assert "\n" not in message
    before = pv.load(trained).state_dict()
    for name, value in pv.load(run).state_dict().items():
        assert torch.equal(value, before[name])
    assert len(run_files.read_checkpoint(run)["epochs"]) == 1
    assert len(resume(run)) == 2


@pytest.mark.thorough
@needs_fork
def test_a_full_disk_while_exporting(full):
    folder, messages = full
    assert "cannot be written" in messages["export"]
    assert "\n" not in messages["export"]
    left = os.listdir(folder / "e")
    assert not [name for name in left if name.endswith((".pt2", ".part"))]
