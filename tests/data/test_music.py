"""Sequences from files, with the deep Markov model of the command line."""

import json

import numpy as np
import pytest

import pyro_vae as pv
from pyro_vae.cli.main import main


def run(*words):
    main([str(word) for word in words])


def refused(capsys, *words):
    with pytest.raises(SystemExit) as stopped:
        run("train", *words)
    assert stopped.value.code == 2
    return capsys.readouterr().err


@pytest.fixture
def chorales(tmp_path):
    """Pieces of one to four steps, in the format of the JSB chorales."""
    path = tmp_path / "chorales.json"
    pieces = [[[60 + i % 5, 64, -1], [62, 65], [64], []][: 1 + i % 4] for i in range(12)]
    path.write_text(json.dumps({"train": pieces, "valid": pieces[:3], "test": pieces[3:6]}))
    return path


def test_music_is_a_piano_roll_with_lengths(chorales):
    data = pv.load_data(chorales)
    assert data.shape == (4, 88)
    assert data.train.lengths.tolist() == [1, 2, 3, 4] * 3
    assert data.validation.lengths.tolist() == [1, 2, 3]
    first = data.train.x[3]
    assert first.nonzero().tolist() == [[0, 42], [0, 43], [1, 41], [1, 44], [2, 43]]


@pytest.mark.parametrize("content", ["[1]", '{"train": []}', "{", '{"train": [[1]], "test": 2}'])
def test_a_file_that_is_not_music_is_rejected(tmp_path, content):
    path = tmp_path / "bad.json"
    path.write_text(content)
    with pytest.raises(pv.UsageError, match=r"bad.json (cannot be read as JSON|must be an object)"):
        pv.load_data(path)


TRAIN = ("--model", "deep-markov", "--epochs", 1, "--hidden", 4, "--latent-dim", 2)
TRAIN += ("--engine", "eager", "--num-eval-samples", 2, "--diagnosis-seconds", 0)


@pytest.mark.thorough
def test_the_command_line_works_with_music(chorales, tmp_path):
    out = tmp_path / "run"
    run("train", chorales, "--out", out, *TRAIN, "--batch-size", 4, "--no-report")
    run("sample", out, "--num", 5)
    assert np.load(out / "samples.npy").shape == (5, 4, 88)
    run("encode", out)
    assert np.load(out / "codes.npz")["z_mean"].shape == (3, 4, 2)
    run("reconstruct", out)
    run("report", out)


def test_images_are_sequences_of_rows(tmp_path):
    x = np.random.default_rng(0).random((20, 4, 3)) < 0.5
    np.savez(tmp_path / "x.npz", x=x.astype(np.float32))
    run("train", tmp_path / "x.npz", "--out", tmp_path / "run", *TRAIN, "--batch-size", 4)
    run("sample", tmp_path / "run", "--num", 5)
    assert np.load(tmp_path / "run" / "samples.npy").shape == (5, 1, 4, 3)


def test_a_file_of_arrays_may_have_lengths(tmp_path, capsys):
    x, path = np.zeros((20, 4, 3), np.float32), tmp_path / "x.npz"
    np.savez(path, x=x, lengths=np.arange(20) % 4 + 1)
    data = pv.load_data(path)
    assert sorted([*data.train.lengths, *data.validation.lengths, *data.test.lengths]) == sorted(
        np.arange(20) % 4 + 1
    )
    assert "unequal lengths need --model deep-markov" in refused(capsys, path)
    np.savez(path, x=x, lengths=np.arange(20) - 1.0)
    with pytest.raises(pv.UsageError, match=r"lengths must be whole numbers from 0 .*, got -1"):
        pv.load_data(path)
    np.savez(path, x=x, lengths=np.arange(20))
    with pytest.raises(pv.UsageError, match="lengths must be from 1 to 4, got 0 to 19"):
        pv.load_data(path)


@pytest.mark.parametrize("where", ["within", "after the end"])
def test_only_missing_entries_within_a_sequence_change_the_pair(tmp_path, where):
    x, path = np.random.default_rng(0).normal(size=(20, 4, 3)), tmp_path / "x.npz"
    lengths = np.arange(20) % 3 + 1
    x[np.arange(20), 0 if where == "within" else lengths, 1] = np.nan
    np.savez(path, x=x.astype(np.float32), lengths=lengths)
    words = ("--model", "deep-markov", "--likelihood", "gaussian", "--epochs", 1, "--hidden", 4)
    run("train", path, "--out", tmp_path / "run", *words, "--no-report", "--num-eval-samples", 2)
    masked = isinstance(pv.load(tmp_path / "run").emission.family, pv.Missing)
    assert masked == (where == "within")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("docstrings",), "needs sequences (n, steps, d), or images with one channel; got text"),
        (
            ("digits", "--network", "conv"),
            "--network does not apply to --model deep-markov; got conv",
        ),
        (("digits", "--condition", "label"), "--condition does not apply to --model deep-markov"),
        (
            ("digits", "--prior", "gaussian-mixture"),
            "--prior does not apply to --model deep-markov",
        ),
    ],
)
def test_options_that_do_not_fit_a_deep_markov_model_are_rejected(capsys, words, message):
    assert message in refused(capsys, *words, "--model", "deep-markov")
