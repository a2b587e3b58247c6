"""JSON of great depth, damaged arrays, and folders that cannot be written: one line each."""

import json
import os
import random

import numpy as np
import pytest
from bad_input_helpers import binary, refused, small, snapshot

import pyro_vae as pv
from pyro_vae.cli.main import main
from pyro_vae.runs import files as run_files

FAST = {"epochs": 1, "batch_size": 4, "engine": "eager", "progress": False}


def complaint(call):
    """The message of a call that is refused, else None."""
    try:
        call()
    except pv.UsageError as error:
        return str(error)
    return None


def nested(depth, opening="[", closing="]"):
    return opening * depth + "1" + closing * depth


@pytest.mark.parametrize(("opening", "closing"), [("[", "]"), ('{"a":', "}")])
def test_deep_json_is_read_or_refused(opening, closing, tmp_path):
    path = tmp_path / "a.json"
    for depth in (100, 300, 700, 900, 990, 5000, 10**6):
        path.write_text(nested(depth, opening, closing))
        message = complaint(lambda: run_files.read_json(path))
        if depth == 100:
            assert json.dumps(run_files.read_json(path)).count(opening[0]) == depth
        if message is not None:
            assert message.startswith(str(path))
            assert "\n" not in message
        assert depth < 5000 or message is not None


@pytest.mark.parametrize("depth", [300, 700, 5000])
@pytest.mark.parametrize("key", ["pair", "adopted_batch", "uint8_divisor", "train", "split"])
def test_a_configuration_of_great_depth(key, depth, tmp_path, capsys):
    """A key that nobody needs is ignored, if the file can be read."""
    pv.save(small(), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {key: "@"}
    (tmp_path / "config.json").write_text(json.dumps(config).replace('"@"', nested(depth)))
    for command in ("encode", "evaluate", "report"):  # they need data, which are not recorded
        with pytest.raises(SystemExit) as caught:
            main([command, str(tmp_path)])
        error = capsys.readouterr().err
        assert caught.value.code == 2
        assert error.startswith("pyro-vae: ")
        assert error.count("\n") == 1


@pytest.mark.parametrize("value", [None, [], "x", 3])
def test_recorded_options_that_are_no_object(value, tmp_path, capsys):
    pv.save(small(), tmp_path, {"train": value})
    for words in (f"sample {tmp_path}", f"evaluate {tmp_path}", f"report {tmp_path}"):
        with pytest.raises(SystemExit) as caught:
            main(words.split())
        error = capsys.readouterr().err
        assert caught.value.code == 2
        assert "'train' must be a JSON object of options" in error
        assert error.count("\n") == 1


@pytest.mark.parametrize("name", ["x.npy", "plain.npz", "packed.npz"])
def test_damaged_arrays(name, tmp_path):
    """Random bytes in the header: the file is refused in one line, or is another sound array."""
    path, x = tmp_path / name, binary(10).numpy()
    if name == "x.npy":
        np.save(path, x)
    else:
        (np.savez if name == "plain.npz" else np.savez_compressed)(path, x=x)
    content, generator = path.read_bytes(), random.Random(0)
    refusals = 0
    for _ in range(120):
        damaged = bytearray(content)
        for _ in range(generator.choice((1, 3))):
            byte = generator.choice((generator.randrange(256), *b"()[]{},:'0123456789\n L"))
            damaged[generator.randrange(130)] = byte
        path.write_bytes(damaged)
        message = complaint(lambda: pv.load_data(path))
        if message is not None:
            refusals += 1
            assert message.startswith(str(path))
            assert "\n" not in message
    assert refusals > 80


READ_ONLY = pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write"
)

WRITERS = {
    "overwrite": lambda run: pv.fit(small(), binary(), out=run, overwrite=True, **FAST),
    "resume": lambda run: pv.fit(small(), binary(), out=run, resume=True, **FAST | {"epochs": 2}),
    "save": lambda run: pv.save(small(), run),
}


@READ_ONLY
@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS.keys())
def test_a_read_only_run_can_be_read_but_not_written(write, run):
    before = snapshot(run)
    run.chmod(0o500)
    try:
        refused(lambda: write(run), str(run), "Permission denied")
        assert snapshot(run) == before
        pv.load(run)
    finally:
        run.chmod(0o700)


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS.keys())
def test_a_read_only_disk(write, run, monkeypatch):
    """Root may write into a read-only folder, but nobody into a read-only disk."""
    honest = os.open

    def read_only(path, flags, *rest, **more):
        if flags & (os.O_WRONLY | os.O_RDWR) and str(path).startswith(str(run)):
            raise OSError(30, "Read-only file system", str(path))
        return honest(path, flags, *rest, **more)

    before = snapshot(run)
    monkeypatch.setattr(os, "open", read_only)
    refused(lambda: write(run), str(run), "Read-only file system")
    assert snapshot(run) == before
    pv.load(run)
