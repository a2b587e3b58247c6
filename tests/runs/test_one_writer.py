"""A run folder has one writer at a time; readers need no lock."""

import os
import signal
import time

import pytest
import torch
from bad_input_helpers import binary, refused, small, snapshot

import pyro_vae as pv
from pyro_vae.data import temporary
from pyro_vae.runs import lock

pytestmark = pytest.mark.skipif(temporary.fcntl is None, reason="needs fcntl")

OPTIONS = {"epochs": 1, "batch_size": 4, "engine": "eager", "progress": False}


def train(out, **options):
    torch.manual_seed(0)
    return pv.fit(small(), binary(), out=out, **OPTIONS | options)


@pytest.fixture
def run(tmp_path):
    train(tmp_path / "run")
    return tmp_path / "run"


WRITERS = {
    "new": train,
    "overwrite": lambda run: train(run, overwrite=True),
    "resume": lambda run: train(run, resume=True, epochs=3),
    "save": lambda run: pv.save(small(), run),
}


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS.keys())
def test_a_second_writer_is_refused_and_changes_nothing(write, run):
    with lock.writing(run):
        before = snapshot(run)
        refused(lambda: write(run), str(run), f"process {os.getpid()} on ", "is writing")
        assert snapshot(run) == before
    assert ".lock" not in snapshot(run)


def test_a_running_fit_holds_the_lock_and_readers_do_not_need_it(run):
    found = []

    def look(epoch):
        found.append(refused(lambda: train(run, overwrite=True), str(os.getpid())))
        pv.load(run)

    train(run, overwrite=True, on_epoch=[look])
    assert len(found) == 1
    assert ".lock" not in snapshot(run)
    train(run, resume=True, epochs=2)


def hold_with_a_worker(run, out):
    """Hold the lock of a run, and have a worker that outlives this process."""
    with lock.writing(run):
        worker = os.fork()
        if worker == 0:
            os.write(out, b"worker\n")
            time.sleep(60)
            os._exit(0)
        os.write(out, b"%d\n" % worker)
        time.sleep(60)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_another_process_is_named_and_its_death_releases_the_lock(run):
    read, out = os.pipe()
    holder = os.fork()
    if holder == 0:
        try:
            hold_with_a_worker(run, out)
        finally:
            os._exit(1)
    os.close(out)
    with os.fdopen(read) as lines:
        (worker,) = {
            int(line) for line in (lines.readline(), lines.readline()) if line[0].isdigit()
        }
    try:
        refused(lambda: train(run, overwrite=True), f"process {holder} on ")
        os.kill(holder, signal.SIGKILL)
        os.waitpid(holder, 0)
        os.kill(worker, 0)  # it lives
        train(run, resume=True, epochs=2)
    finally:
        os.kill(worker, signal.SIGKILL)
    assert ".lock" not in snapshot(run)


def test_a_lock_file_without_a_holder_is_no_obstacle(run):
    (run / ".lock").write_text("process 1 on elsewhere")
    train(run, resume=True, epochs=2)
    assert ".lock" not in snapshot(run)


def test_a_lock_that_is_a_link_is_not_followed(run, tmp_path):
    (tmp_path / "mine").write_text("mine")
    (run / ".lock").symlink_to(tmp_path / "mine")
    refused(lambda: train(run, overwrite=True), str(run))
    assert (tmp_path / "mine").read_text() == "mine"


def test_a_refused_fit_leaves_no_empty_folder(tmp_path):
    refused(lambda: pv.fit(small(), binary()[:, :3], out=tmp_path / "new", **OPTIONS))
    assert snapshot(tmp_path) == {}


def test_a_system_without_locks_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "fcntl", None)
    with pytest.warns(UserWarning, match="do not write into it from two processes"):
        train(tmp_path / "run")
    pv.load(tmp_path / "run")


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_one_of_many_processes_gets_the_lock(tmp_path):
    """Each of many forks takes and releases the lock many times; two never hold it together."""
    (tmp_path / "run").mkdir()
    children = []
    for _ in range(3):
        child = os.fork()
        if child == 0:
            os._exit(_contend(tmp_path / "run", tmp_path / "inside"))
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    assert codes == [0, 0, 0]


def _contend(run, inside):
    until = time.monotonic() + 0.4
    while time.monotonic() < until:
        try:
            with lock.writing(run):
                os.close(os.open(inside, os.O_CREAT | os.O_EXCL))
                os.unlink(inside)
        except pv.UsageError:
            pass
        except FileExistsError:
            return 3
    return 0
