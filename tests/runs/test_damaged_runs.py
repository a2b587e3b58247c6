"""Damage to any file of a run is detected; a run that was killed can start again or resume."""

import json
import os
import random
import shutil
import subprocess
import sys

import numpy as np
import pytest
import safetensors.torch
import torch

import pyro_vae as pv
from pyro_vae.errors import UsageError
from pyro_vae.runs import files as run_files
from pyro_vae.runs import folder as run_folder

FAST = {"epochs": 1, "batch_size": 4, "engine": "eager", "progress": False}


def small():
    torch.manual_seed(0)
    return pv.VAE.mlp((4,), latent_dim=2, hidden=(8,))


def binary(n=8):
    return torch.rand(n, 4, generator=torch.Generator().manual_seed(0)).round()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    run = tmp_path_factory.mktemp("trained") / "run"
    pv.fit(small(), binary(), validation=binary(), out=run, **FAST)
    (run / "checkpoint-older.pt").unlink()  # reading would fall back to it
    return run


@pytest.fixture
def run(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "run")


READERS = {
    "model.safetensors": run_folder.read_model,
    "checkpoint.pt": run_files.read_checkpoint,
    "rows.safetensors": lambda run: run_folder.read_tensors(run / "rows.safetensors"),
}


def refused(read, run, name):
    with pytest.raises(UsageError) as caught:
        read(run)
    message = str(caught.value)
    assert "\n" not in message
    assert str(run / name) in message


@pytest.mark.sample(1)
@pytest.mark.parametrize(("name", "read"), READERS.items())
def test_a_flipped_bit_is_detected_everywhere(name, read, run):
    """Flip all bits of both ends, which have headers and checksums, and a sample of other bits."""
    content = (run / name).read_bytes()
    size = len(content)
    ends = [*range(min(size, 150)), *range(max(0, size - 150), size)]
    header = 8 + int.from_bytes(content[:8], "little") if name.endswith("safetensors") else 0
    bits = {(at, bit) for at in ends for bit in range(8)}
    bits |= {(at, bit) for at in range(0, header, 3) for bit in (0, 1, 5, 7)}
    generator = random.Random(0)
    bits |= {(generator.randrange(size), generator.randrange(8)) for _ in range(600)}
    for at, bit in sorted(bits):
        damaged = bytearray(content)
        damaged[at] ^= 1 << bit
        (run / name).write_bytes(damaged)
        refused(read, run, name)
    (run / name).write_bytes(content)
    read(run)


@pytest.mark.parametrize(("name", "read"), READERS.items())
def test_a_file_cut_anywhere_is_detected(name, read, run):
    content = (run / name).read_bytes()
    size = len(content)
    lengths = {*range(30), *range(size - 120, size), *range(0, size, max(1, size // 60))}
    for length in sorted(lengths):
        (run / name).write_bytes(content[:length])
        refused(read, run, name)
    for more in (b"\0", b"PK\x05\x06" + b"\0" * 18, content):
        (run / name).write_bytes(content + more)
        refused(read, run, name)


@pytest.mark.parametrize("name", ["model.safetensors", "checkpoint.pt"])
def test_a_block_that_was_never_written_is_detected(name, run):
    content = (run / name).read_bytes()
    for start in range(0, len(content) - 64, len(content) // 20):
        block = b"\0" * 64
        if content[start : start + 64] != block:
            (run / name).write_bytes(content[:start] + block + content[start + 64 :])
            refused(READERS[name], run, name)


def test_other_programs_read_the_files(run):
    """The checksums are in places that each format allows."""
    state = torch.load(run / "checkpoint.pt", weights_only=True)
    plain = safetensors.torch.load_file(run / "model.safetensors")
    for name, value in pv.load(run).state_dict().items():
        assert torch.equal(plain[name], value)
        assert state["best"][name].dtype == value.dtype


def test_the_checksum_of_other_tensors_is_rejected(run):
    """Replace tensors by other valid tensors."""
    other = safetensors.torch.load_file(run / "model.safetensors")
    with open(run / "model.safetensors", "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        seal = json.loads(file.read(size))["__metadata__"]
    for name in other:
        changed = {k: v.double() if k == name else v for k, v in other.items()}
        safetensors.torch.save_file(changed, run / "model.safetensors", seal)
        refused(pv.load, run, "model.safetensors")


def test_a_configuration_that_no_longer_fits_the_weights_is_rejected(tmp_path):
    """Only config.json has the scale of the likelihood, which changes every number."""
    pair = pv.VAE.mlp((4,), latent_dim=2, likelihood=pv.Gaussian(0.5))
    pv.save(pair, tmp_path)
    pv.load(tmp_path)
    config = run_folder.read_config(tmp_path)
    text = json.dumps(config)
    assert text.count("0.5") == 1
    edited = json.loads(text.replace("0.5", "0.7"))
    run_files.write_json(tmp_path / "config.json", edited)  # an edit with a right checksum
    with pytest.raises(UsageError, match="describes another pair"):
        pv.load(tmp_path)


def test_each_file_is_valid_on_its_own(run):
    """After a crash between two writes, the old file and the new file are both valid."""
    before = {name: (run / name).read_bytes() for name in ("model.safetensors", "checkpoint.pt")}
    pv.fit(small(), binary(), validation=binary(), out=run, resume=True, **FAST | {"epochs": 3})
    after = {name: (run / name).read_bytes() for name in before}
    for first in (before, after):
        for second in (before, after):
            (run / "model.safetensors").write_bytes(first["model.safetensors"])
            (run / "checkpoint.pt").write_bytes(second["checkpoint.pt"])
            pv.load(run)
            options = FAST | {"epochs": 4, "out": run, "resume": True}
            pv.fit(small(), binary(), validation=binary(), **options)


@pytest.mark.parametrize("part", ["pair", "best"])
def test_types_are_compared(part, run):
    state = torch.load(run / "checkpoint.pt", weights_only=True)
    name = next(iter(state[part]))
    state[part][name] = state[part][name].double()
    torch.save(state, run / "checkpoint.pt")
    with pytest.raises(
        UsageError, match=f"'{name}' .*torch.float64 but the pair expects torch.float32"
    ):
        pv.fit(small(), binary(), validation=binary(), out=run, resume=True, **FAST | {"epochs": 2})


def test_resuming_in_another_precision_is_rejected(run):
    options = FAST | {"epochs": 2, "out": run, "resume": True}
    with pytest.raises(UsageError, match=r"torch.float32 but the pair expects torch.float64"):
        pv.fit(small().double(), binary(), validation=binary(), **options)


def test_integer_weights_are_rejected(run):
    state = safetensors.torch.load_file(run / "model.safetensors")
    name = next(iter(state))
    state[name] = state[name].long()
    safetensors.torch.save_file(state, run / "model.safetensors")
    with pytest.raises(
        UsageError, match=f"'{name}' .*torch.int64 but the pair expects torch.float32"
    ):
        pv.load(run)


# Runs that are killed before each write

PROGRAM = """
import os, sys
from pathlib import Path

import torch

import pyro_vae as pv
from pyro_vae.runs import folder

torch.set_num_threads(1)
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
X = torch.rand(16, 4, generator=torch.Generator().manual_seed(0)).round()


def train(folder, **options):
    torch.manual_seed(0)
    pair = pv.VAE.mlp((4,), latent_dim=2, hidden=(8,))
    settings = dict(epochs=1, batch_size=8, engine="eager", checkpoint_seconds=0, progress=False)
    pv.fit(pair, X, validation=X, out=folder, **settings, **options)


def stop_before(n, folder):
    \"\"\"Exit, as after SIGKILL, before the n-th change in the folder.\"\"\"
    count = 0

    def heard(event, arguments):
        nonlocal count
        changes = event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir")
        changes |= event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITES
        if changes and str(arguments[0]).startswith(str(folder)):
            count += 1
            if count == n:
                os._exit(9)

    sys.addaudithook(heard)


def child(work):
    process = os.fork()
    if process == 0:
        status = 1
        try:
            work()
            status = 0
        except pv.UsageError as error:
            print(error, flush=True)
            status = 2
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def killed(n, folder, **options):
    stop_before(n, folder)
    train(folder, **options)


root, kind = Path(sys.argv[1]), sys.argv[2]
train(root / "whole")  # import everything before the forks
for n in range(1, 100, 5):  # every fifth write, for time
    folder = root / f"{kind}-{n}"
    if kind == "overwrite":
        assert child(lambda: train(folder, learning_rate=0.1)) == 0
    if kind == "restart":  # killed again while it starts again
        folder.mkdir()
        assert child(lambda: killed(5, folder)) == 9
        assert (folder / "config.json").exists()
        assert not (folder / "checkpoint.pt").exists()
        status = child(lambda: killed(n, folder, resume=True))
    else:
        status = child(lambda: killed(n, folder, overwrite=kind == "overwrite"))
    if status == 0:
        break
    assert status == 9, status
    again = [child(lambda: train(folder)), child(lambda: train(folder, resume=True))]
    if kind == "overwrite" and 0 not in again:
        again.append(child(lambda: train(folder, overwrite=True)))
    assert 0 in again, (n, sorted(path.name for path in folder.iterdir()))
    if not (kind == "overwrite" and n == 1):  # nothing had changed, so the old run was resumed
        assert (folder / "model.safetensors").read_bytes() == (
            root / "whole" / "model.safetensors"
        ).read_bytes(), n
assert n > 20, n
"""


@pytest.mark.sample(1)
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("kind", ["begin", "restart", "overwrite"])
def test_a_run_killed_at_any_write_can_be_trained_or_resumed(kind, tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    words = [sys.executable, str(tmp_path / "program.py"), str(tmp_path), kind]
    # A fork works only if autograd has started no thread for a GPU.
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(words, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_run_without_a_checkpoint_uses_its_options_again(tmp_path, monkeypatch, capsys):
    """The command line reads the options from config.json."""
    from pyro_vae.cli.main import main

    monkeypatch.chdir(tmp_path)
    np.save("x.npy", np.random.default_rng(0).normal(size=(30, 4)).astype("float32"))
    options = "--likelihood gaussian --latent-dim 3 --hidden 5 --epochs 1 --engine eager"
    end = "--num-eval-samples 2 --no-report"
    main(f"train x.npy --out whole {options} {end}".split())
    (tmp_path / "run").mkdir()
    shutil.copy("whole/config.json", "run/config.json")
    with pytest.raises(SystemExit):
        main(f"train x.npy --out run {options} {end}".split())
    assert "--resume" in capsys.readouterr().err
    main(f"train x.npy --out run --resume {end}".split())
    for name in ("config.json", "model.safetensors", "metrics.json"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_saved_pair_is_not_a_run_without_a_checkpoint(tmp_path):
    """A missing checkpoint does not delete the weights."""
    pv.save(small(), tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    with pytest.raises(UsageError, match=r"checkpoint\.pt is missing"):
        pv.fit(small(), binary(), out=tmp_path, resume=True, **FAST)
    assert (tmp_path / "model.safetensors").read_bytes() == before
