"""Temporary files of a run folder: names, links, permissions, and what a dead process leaves."""

import os
import re
import signal
import stat

import pytest
import torch
from bad_input_helpers import binary, refused, small, snapshot

import pyro_vae as pv
from pyro_vae.data import temporary
from pyro_vae.runs import files

pytestmark = pytest.mark.skipif(os.name == "nt", reason="links and permissions")


def write(path, content=b"new"):
    with files.atomic(path) as file:
        file.write(content)


def train(out, **options):
    torch.manual_seed(0)
    options = {"epochs": 1, "batch_size": 4, "engine": "eager", "progress": False} | options
    return pv.fit(small(), binary(), out=out, **options)


def test_temporary_names_are_unpredictable_and_exclusive(tmp_path, monkeypatch):
    names = []
    for _ in range(2):
        with files.atomic(tmp_path / "a.json") as file:
            file.write(b"{}")
            names += [name for name in os.listdir(tmp_path) if name.endswith(".part")]
    assert len(set(names)) == 2
    assert all(re.fullmatch(r"\.a\.json\.[0-9a-f]{16}\.part", name) for name in names)
    # Even if the name were guessed, a link in its place would not be followed.
    monkeypatch.setattr(temporary.secrets, "token_hex", lambda n: "0" * 16)
    (tmp_path / "mine").write_text("mine")
    (tmp_path / f".b.json.{'0' * 16}.part").symlink_to(tmp_path / "mine")
    refused(lambda: write(tmp_path / "b.json"), "b.json cannot be written", "exists")
    assert (tmp_path / "mine").read_text() == "mine"


def test_a_link_in_place_of_a_file_is_replaced(tmp_path):
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "a.json").symlink_to(tmp_path / "mine")
    write(tmp_path / "a.json")
    assert not (tmp_path / "a.json").is_symlink()
    assert snapshot(tmp_path) == {"a.json": b"new", "mine": b"mine"}


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o664])
def test_a_replaced_file_keeps_its_permissions(mode, tmp_path):
    path = tmp_path / "a.json"
    write(path)
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~mask
    path.chmod(mode)
    write(path)
    assert stat.S_IMODE(path.stat().st_mode) == mode


def test_file_and_folder_are_flushed_in_this_order(tmp_path, monkeypatch):
    flushed, honest = [], os.fsync

    def fsync(descriptor):
        flushed.append((os.fstat(descriptor).st_ino, sorted(os.listdir(tmp_path))))
        honest(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    write(tmp_path / "a.json")
    (first, before), (second, after) = flushed
    assert first == (tmp_path / "a.json").stat().st_ino
    assert second == tmp_path.stat().st_ino
    assert before != ["a.json"]
    assert after == ["a.json"]


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_files_of_dead_processes_are_swept_and_those_of_living_ones_stay(tmp_path):
    child = os.fork()
    if child == 0:
        with files.atomic(tmp_path / "report.html") as file:
            file.write(b"half")
            os.kill(os.getpid(), signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    (left,) = os.listdir(tmp_path)
    (tmp_path / ".metrics.json.1234.part").write_bytes(b"of 0.1.0")
    (tmp_path / ".mine.part").write_text("mine")
    with files.atomic(tmp_path / "codes.npz") as file:
        file.write(b"another process still writes this")
        train(tmp_path)
        names = os.listdir(tmp_path)
        assert left not in names
        assert ".metrics.json.1234.part" not in names
        assert ".mine.part" in names
    assert (tmp_path / "codes.npz").read_bytes() == b"another process still writes this"


@pytest.mark.parametrize("name", ["figures", "tensorboard"])
def test_a_folder_that_is_a_link_is_refused(name, tmp_path):
    train(tmp_path / "run")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "mine.png").write_bytes(b"mine")
    (tmp_path / "run" / name).symlink_to(tmp_path / "elsewhere")
    before = snapshot(tmp_path)
    refused(lambda: train(tmp_path / "run", overwrite=True), name, "is a link")
    if name == "figures":
        refused(lambda: write(tmp_path / "run" / "figures" / "a.png"), "figures", "is a link")
    assert snapshot(tmp_path) == before


def test_a_run_folder_may_be_a_link(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "disk")
    train(tmp_path / "run")
    assert (tmp_path / "disk" / "checkpoint.pt").exists()
