"""What a file declares is compared with its size and the memory before anything is allocated."""

import io
import json
import os
import resource
import struct
import zipfile

import numpy as np
import pytest
import safetensors.torch
import torch
from bad_input_helpers import binary, refused, small

import pyro_vae as pv
from pyro_vae.cli.main import main
from pyro_vae.data import sizes
from pyro_vae.runs import checksums, memory
from pyro_vae.runs import files as run_files


@pytest.fixture(autouse=True)
def bounded():
    """No test may add 2 GiB to the memory that the process once used."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2 * 2**20


def edited(run, change):
    config = json.loads((run / "config.json").read_text())
    change(config)
    run_files.write_json(run / "config.json", config)


def wide(config):
    config["pair"]["arguments"]["encoder"]["arguments"]["network"] = {
        "class": "torch.nn:Linear",
        "arguments": {"in_features": 10**6, "out_features": 10**6},
    }


def many(config):
    """Each layer fits into the memory, but not all of them."""
    layer = {"class": "torch.nn:Linear", "arguments": {"in_features": 8000, "out_features": 8000}}
    config["pair"]["arguments"]["encoder"]["arguments"] = {f"a{i}": layer for i in range(9)}


def adopted(config):
    config["adopted_batch"] = [[[10**6, 10**6], "float32"]]


@pytest.mark.parametrize("change", [wide, adopted])
def test_a_configuration_that_asks_for_terabytes_is_refused(change, tmp_path):
    pv.save(small(), tmp_path)
    plain = safetensors.torch.load_file(tmp_path / "model.safetensors")
    safetensors.torch.save_file(plain, tmp_path / "model.safetensors")  # without checksums
    edited(tmp_path, change)
    refused(lambda: pv.load(tmp_path), str(tmp_path / "config.json"), "GiB of memory are free")


def test_the_sum_of_all_tensors_counts(tmp_path, monkeypatch):
    pv.save(small(), tmp_path)
    pv.load(tmp_path)
    edited(tmp_path, many)
    monkeypatch.setattr(memory, "available_memory", lambda: 2**29)
    refused(lambda: pv.load(tmp_path), str(tmp_path / "config.json"), "0.5 GiB of memory are free")


def test_a_limit_at_the_size_of_a_pair(monkeypatch):
    """8,000 x 100 weights and 100 biases in float32."""
    need = 4 * (8000 * 100 + 100)
    for free, fits in ((need, True), (need - 1, False)):
        monkeypatch.setattr(memory, "available_memory", lambda free=free: free)
        with memory.WithinMemory("a test"):
            if fits:
                torch.nn.Linear(8000, 100)
            else:
                refused(lambda: torch.nn.Linear(8000, 100), "a test asks for")


def test_a_command_that_asks_for_terabytes_is_refused(tmp_path, capsys):
    np.save(tmp_path / "x.npy", binary(30).numpy())
    (tmp_path / "options.json").write_text(json.dumps({"hidden": [10**6, 10**6]}))
    words = ["train", str(tmp_path / "x.npy"), "--config", str(tmp_path / "options.json")]
    with pytest.raises(SystemExit) as caught:
        main([*words, "--out", str(tmp_path / "run")])
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "GiB" in error


def test_an_array_whose_header_declares_more_than_the_file_holds(tmp_path):
    path = tmp_path / "x.npy"
    np.save(path, np.zeros((10, 4), "float32"))
    for shape in (b"(96250000, 100)", b"(10, 5)        ", b"(999999999999, 999999999)"):
        content = path.read_bytes()
        start = content.index(b"(")
        end = content.index(b")") + 1
        spare = content.index(b"\n") - len(shape) + (end - start)
        changed = content[:start] + shape + content[end:spare] + b"\n" + content[128:]
        assert len(changed) == len(content)
        (tmp_path / "y.npy").write_bytes(changed)
        refused(lambda: pv.load_data(tmp_path / "y.npy"), "y.npy", "declares", "holds 160")


def header(shape):
    stream = io.BytesIO()
    form = {"descr": "<f4", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(stream, form)
    return stream.getvalue()


def test_an_archive_that_expands_beyond_the_memory(tmp_path, monkeypatch):
    path = tmp_path / "x.npz"
    np.savez_compressed(path, x=np.zeros((1000, 1000), "float32"))
    assert path.stat().st_size < 10_000
    assert pv.load_data(path).shape == (1000,)
    monkeypatch.setattr(sizes, "available_memory", lambda: 4_000_000)
    refused(lambda: pv.load_data(path), "x.npz, unpacked, needs", "are free")


def test_a_member_that_declares_more_than_it_holds(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        archive.writestr("x.npy", header((10**7, 1000)) + b"\0" * 400)
    refused(lambda: pv.load_data(tmp_path / "x.npz"), "x.npz", "declares", "holds 400")


def test_a_checkpoint_that_expands_beyond_the_memory(tmp_path, monkeypatch):
    run_files.write_checkpoint(tmp_path, {"a": torch.zeros(10**6)})
    packed = io.BytesIO()
    with (
        zipfile.ZipFile(tmp_path / "checkpoint.pt") as old,
        zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for name in old.namelist():
            new.writestr(name, old.read(name))
    (tmp_path / "checkpoint.pt").write_bytes(checksums.sealed_archive(packed.getvalue()))
    assert (tmp_path / "checkpoint.pt").stat().st_size < 10_000
    monkeypatch.setattr(sizes, "available_memory", lambda: 4_000_000)
    refused(lambda: run_files.read_checkpoint(tmp_path), "checkpoint.pt needs", "are free")


def test_tensors_whose_header_declares_more_than_the_file_holds(tmp_path):
    pv.save(small(), tmp_path)
    seal = {"w": {"dtype": "F32", "shape": [10**6, 10**6], "data_offsets": [0, 4 * 10**12]}}
    words = json.dumps(seal).encode()
    for content in (struct.pack("<Q", len(words)) + words, struct.pack("<Q", 10**15) + words):
        (tmp_path / "model.safetensors").write_bytes(content)
        refused(lambda: pv.load(tmp_path), "model.safetensors")


# A pipe in place of a file has no writer, so that reading it would not end.


@pytest.fixture
def saved(tmp_path):
    pv.fit(*(small(), binary()), out=tmp_path / "run", epochs=1, engine="eager", progress=False)
    return tmp_path / "run"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes")
@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "checkpoint.pt"])
def test_a_pipe_in_place_of_a_file_of_a_run(name, saved):
    (saved / "checkpoint-older.pt").unlink()
    (saved / name).unlink()
    os.mkfifo(saved / name)
    read = run_files.read_checkpoint if name == "checkpoint.pt" else pv.load
    refused(lambda: read(saved), str(saved / name), "must be a plain file")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes")
@pytest.mark.parametrize("name", ["x.npy", "x.npz", "x.csv", "x.parquet", "x.txt", "x.json"])
def test_a_pipe_in_place_of_data(name, tmp_path):
    os.mkfifo(tmp_path / name)
    refused(lambda: pv.load_data(tmp_path / name), str(tmp_path / name))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes")
@pytest.mark.parametrize("option", ["--config", "--columns"])
def test_a_pipe_in_place_of_options(option, tmp_path, capsys):
    os.mkfifo(tmp_path / "options")
    (tmp_path / "x.csv").write_text("a,b\n1,2\n")
    with pytest.raises(SystemExit):
        main(["train", str(tmp_path / "x.csv"), option, str(tmp_path / "options")])
    assert "must be a plain file" in capsys.readouterr().err
