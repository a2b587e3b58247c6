"""Run folders that are damaged, foreign or already used give an error that names the file."""

import json
import os
import pickle
import sys

import numpy as np
import pytest
import safetensors.torch
import torch
from bad_input_helpers import (
    FAST,
    SCALES,
    Marker,
    Pair,
    Parameterless,
    binary,
    refused,
    small,
    snapshot,
)
from pyro.infer import TraceMeanField_ELBO

import pyro_vae as pv
from pyro_vae.runs import files as run_files

# Output folders


def test_another_run_is_rejected_and_unchanged(run):
    before = snapshot(run)
    words = [str(run), "already holds a run", "overwrite", "resume"]
    refused(lambda: pv.fit(small(), binary(), out=run, **FAST), *words)
    assert snapshot(run) == before


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "checkpoint.pt"])
def test_each_file_of_a_run_marks_a_run(run, name):
    for path in run.iterdir():
        if path.name != name:
            path.unlink()
    before = snapshot(run)
    refused(lambda: pv.fit(small(), binary(), out=run, **FAST), "already holds a run", name)
    assert snapshot(run) == before


def test_overwrite_removes_only_the_files_of_a_run(run):
    figures = run / "figures"
    figures.mkdir()
    (figures / "samples.png").write_bytes(b"old")
    (run / "metrics.json").write_text("{}")
    (run / "report.html").write_text("old")
    mine = [run / "notes.txt", run / "data" / "x.csv", figures / "mine.svg"]
    for path in mine:
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
    before = snapshot(run)
    pv.fit(small(), binary(), out=run, overwrite=True, **FAST | {"seed": 1})
    after = snapshot(run)
    for name in ("metrics.json", "report.html", os.path.join("figures", "samples.png")):
        assert name not in after
    for name in ("config.json", "model.safetensors", "checkpoint.pt"):
        assert after[name] != before[name]
    assert [path.read_text() for path in mine] == ["mine"] * 3


def test_a_folder_without_a_run_is_used(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    pv.fit(small(), binary(), out=tmp_path, **FAST)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    pv.load(tmp_path)


@pytest.mark.parametrize("where", ["file", "file/run", "x" * 300])
@pytest.mark.parametrize(
    "write",
    [
        lambda run: pv.fit(small(), binary(), out=run, **FAST),
        lambda run: pv.fit(small(), binary(), out=run, overwrite=True, **FAST),
        lambda run: pv.save(small(), run),
    ],
    ids=["fit", "overwrite", "save"],
)
def test_a_folder_that_cannot_be_written(write, where, tmp_path):
    (tmp_path / "file").write_text("mine")
    message = refused(lambda: write(tmp_path / where))
    assert str(tmp_path) in message
    assert snapshot(tmp_path) == {"file": b"mine"}


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write")
def test_a_folder_without_permission(tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    refused(lambda: pv.fit(small(), binary(), out=tmp_path / "locked" / "run", **FAST), "locked")


def test_a_write_that_fails_leaves_the_old_file(run, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    before = snapshot(run)
    monkeypatch.setattr(os, "fsync", full)
    refused(lambda: pv.save(small(), run), str(run), "No space left on device")
    assert snapshot(run) == before


# Damaged run folders


def resume(run, pair=small, x=None):
    options = FAST | {"epochs": 2, "out": run, "resume": True}
    return pv.fit(pair(), binary() if x is None else x, validation=binary(), **options)


READERS = {"config.json": pv.load, "model.safetensors": pv.load, "checkpoint.pt": resume}


@pytest.mark.parametrize(("name", "read"), READERS.items())
def test_a_missing_file_is_named(name, read, run):
    (run / name).unlink()
    message = refused(lambda: read(run), str(run / name), "missing")
    assert "cut short" not in message


def test_resume_needs_the_configuration(run):
    (run / "config.json").unlink()
    before = snapshot(run)
    refused(lambda: resume(run), str(run / "config.json"), "missing")
    assert snapshot(run) == before


@pytest.mark.parametrize("share", [0, 1e-9, 0.01, 0.25, 0.5, 0.9, 0.995])
@pytest.mark.parametrize(("name", "read"), READERS.items())
def test_a_file_that_is_cut_short_is_named(name, read, share, run):
    content = (run / name).read_bytes()
    (run / name).write_bytes(content[: int(np.ceil(share * len(content)))])
    before = snapshot(run)
    refused(lambda: read(run), str(run / name), "cut short")
    assert snapshot(run) == before


@pytest.mark.parametrize("content", [b"[]", b"3", b"null", b"{}", b"\xff\xfe\x00", b"\x00" * 99])
@pytest.mark.parametrize(("name", "read"), READERS.items())
def test_a_file_with_other_content_is_named(name, read, content, run):
    (run / name).write_bytes(content)
    refused(lambda: read(run), str(run / name))


def edit_tensors(path, edit):
    tensors = safetensors.torch.load_file(path)
    edit(tensors)
    safetensors.torch.save_file(tensors, path)


NAME = "decoder.network.layers.0.weight"

TENSORS = {
    "other shape": (
        lambda state: state.update({NAME: torch.ones(3, 5)}),
        [f"'{NAME}'", "(3, 5)", "(8, 2)"],
    ),
    "extra": (lambda state: state.update(surplus=torch.ones(2)), ["'surplus'", "does not have"]),
    "missing": (lambda state: state.pop(NAME), [f"'{NAME}'", "lacks"]),
}


@pytest.mark.parametrize(("edit", "words"), TENSORS.values(), ids=TENSORS)
def test_a_tensor_that_does_not_fit_is_named_with_its_file(edit, words, run):
    path = run / "model.safetensors"
    edit_tensors(path, edit)
    refused(lambda: pv.load(run), str(path), *words)


@pytest.mark.parametrize(("edit", "words"), TENSORS.values(), ids=TENSORS)
@pytest.mark.parametrize("part", ["pair", "best"])
def test_a_checkpoint_tensor_that_does_not_fit_is_named_with_its_file(part, edit, words, run):
    path = run / "checkpoint.pt"
    state = torch.load(path, weights_only=True)
    edit(state[part])
    torch.save(state, path)
    before = snapshot(run)
    refused(lambda: resume(run), str(path), *words)
    assert snapshot(run) == before


@pytest.mark.parametrize("key", ["job", "pair", "best", "optimizer", "epochs", "generators"])
def test_a_checkpoint_without_a_part_is_rejected(key, run):
    path = run / "checkpoint.pt"
    state = torch.load(path, weights_only=True)
    del state[key]
    torch.save(state, path)
    before = snapshot(run)
    refused(lambda: resume(run), str(path), f"'{key}'")
    assert snapshot(run) == before


@pytest.mark.parametrize("content", [torch.ones(3), {"weights": torch.ones(3)}, [1, 2]])
def test_the_checkpoint_of_another_program_is_rejected(content, run):
    path = run / "checkpoint.pt"
    torch.save(content, path)
    refused(lambda: resume(run), str(path))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"learning_rate": 0.1}, ["learning_rate = 0.001", "got 0.1"]),
        ({"batch_size": 8}, ["batch_size = 4", "got 8"]),
        ({"seed": 5}, ["seed = 0", "got 5"]),
        ({"objective": TraceMeanField_ELBO()}, ["objective"]),
        ({"binarize": "fixed"}, ["binarize"]),
    ],
)
def test_resume_needs_the_same_settings(options, words, run):
    before = snapshot(run)
    options = FAST | {"epochs": 2, "out": run, "resume": True} | options
    refused(lambda: pv.fit(small(), binary(), **options), str(run / "checkpoint.pt"), *words)
    assert snapshot(run) == before


def test_resume_with_other_data_or_another_pair(run):
    before = snapshot(run)
    path = str(run / "checkpoint.pt")
    refused(lambda: resume(run, x=1 - binary()), path, "data")
    refused(lambda: resume(run, lambda: pv.VAE.mlp((4,), latent_dim=3, hidden=(8,))), path, "shape")
    assert snapshot(run) == before


def test_the_error_of_an_unknown_run_names_the_nearest_run(run):
    (run.parent / "data").mkdir()
    refused(lambda: pv.load(run.parent / "rum"), "no run", "did you mean 'run'?")
    message = refused(lambda: pv.load(run.parent / "zzzzzz"), "no run", "run")
    assert "data" not in message  # the folder data has no run
    message = refused(lambda: pv.load(run / "none"), "no run")
    assert "known: " not in message  # there is no other run to name


def test_a_pair_of_a_user_must_be_passed(tmp_path, run):
    pv.fit(Pair(), SCALES["real"], out=tmp_path / "own", **FAST)
    refused(lambda: pv.load(tmp_path / "own"), ":Pair", "load(run, MyPair)")
    refused(lambda: pv.load(tmp_path / "own", Pair), ":Pair", "instance")
    refused(lambda: pv.load(tmp_path / "own", Parameterless()), "model.safetensors", "tensor")
    refused(lambda: pv.load(run, Pair), "Pair", "encoder")


PICKLES = {
    "pickle": lambda evil, path: path.write_bytes(pickle.dumps(evil)),
    "old pickle": lambda evil, path: path.write_bytes(pickle.dumps(evil, protocol=2)),
    "nested pickle": lambda evil, path: path.write_bytes(pickle.dumps({"pair": [evil]})),
    "torch": lambda evil, path: torch.save({"pair": evil}, path),
    "old torch": lambda evil, path: torch.save(
        {"pair": evil}, path, _use_new_zipfile_serialization=False
    ),
}


@pytest.mark.parametrize("write", PICKLES.values(), ids=PICKLES)
@pytest.mark.parametrize(("name", "read"), READERS.items())
def test_a_pickle_is_rejected_and_never_executed(name, read, write, run, tmp_path):
    write(Marker(tmp_path / "marker"), run / name)
    before = snapshot(run)
    refused(lambda: read(run), str(run / name))
    assert not (tmp_path / "marker").exists()
    assert snapshot(run) == before


def edit_config(run, edit):
    content = json.loads((run / "config.json").read_text())
    edit(content)
    run_files.write_json(run / "config.json", content)


def arguments(config):
    return config["pair"]["arguments"]


PLACES = {
    "the pair": lambda config, name: config["pair"].update({"class": name}),
    "a part": lambda config, name: arguments(config)["decoder"]["arguments"]["family"].update(
        {"class": name}
    ),
    "a type": lambda config, name: arguments(config)["encoder"]["arguments"]["network"][
        "arguments"
    ].update(activation={"type": name}),
    "a call": lambda config, name: arguments(config).update(
        prior={"class": name, "arguments": {"command": "touch marker"}}
    ),
}


@pytest.mark.parametrize(
    ("place", "kind"),
    [*((place, None) for place in PLACES), *((p, pv.VAE) for p in PLACES if p != "the pair")],
)
@pytest.mark.parametrize(
    "name", ["os:system", "builtins:eval", "subprocess:Popen", "spy:Spy", "spy.sub:Spy"]
)
def test_a_foreign_class_is_rejected_and_not_imported(
    name, place, kind, run, tmp_path, monkeypatch
):
    (tmp_path / "spy").mkdir()
    for module in ("__init__", "sub"):
        path = tmp_path / "spy" / f"{module}.py"
        path.write_text(f"open({str(tmp_path / 'marker')!r}, 'w')\nclass Spy: pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    edit_config(run, lambda config: PLACES[place](config, name))
    refused(lambda: pv.load(run, kind), name)
    assert not (tmp_path / "marker").exists()
    assert "spy" not in sys.modules


CONFIGS = {
    "no pair": lambda config: config.pop("pair"),
    "a pair of nothing": lambda config: config.update(pair=None),
    "a class that is not text": lambda config: config["pair"].update({"class": 3}),
    "no arguments": lambda config: config["pair"].pop("arguments"),
    "an argument missing": lambda config: arguments(config).pop("prior"),
    "an argument too many": lambda config: arguments(config).update(more=1),
    "an argument that cannot be": lambda config: arguments(config)["prior"]["arguments"].update(
        latent_dim=-1
    ),
    "no such module": lambda config: config["pair"].update({"class": "pyro_vae.nothing:VAE"}),
    "no such class": lambda config: config["pair"].update({"class": "pyro_vae.models.vae:VEA"}),
    "no class": lambda config: config["pair"].update({"class": "pyro_vae.cli:main"}),
    "an impossible batch": lambda config: config.update(adopted_batch=[[[4], "system"]]),
}


@pytest.mark.parametrize("edit", CONFIGS.values(), ids=CONFIGS)
def test_an_invalid_configuration_is_named(edit, run):
    edit_config(run, edit)
    refused(lambda: pv.load(run), "config.json")


def test_another_format_is_named(run):
    text = (run / "config.json").read_text()
    (run / "config.json").write_text(text.replace('"format": 2', '"format": 3'))
    refused(lambda: pv.load(run), "config.json", "format 3", "later version")
