"""Text as rows of tokens, from the command line to the report."""

import json

import numpy as np
import pytest
import torch

import pyro_vae as pv
from pyro_vae.cli.main import main
from pyro_vae.data.datasets import load_data
from pyro_vae.data.split import part_of
from pyro_vae.data.text import docstrings

LINES = [f"{who} {what} {how}." for who in "ABC" for what in ("runs", "eats") for how in "xyzw"]


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "lines.txt"
    path.write_text("\n".join(["", LINES[0], f"  {LINES[1]} ", *LINES]), encoding="utf-8")
    return path


def test_lines_become_tokens_and_lines_again(file):
    data = load_data(file, length=30)
    assert data.shape == (len(LINES[0]) + 1,)
    parts = (data.train, data.validation, data.test)
    found = [line for part in parts for line in pv.as_text(part.x, data.vocabulary)]
    assert sorted(found) == sorted(LINES)  # each line occurs once
    assert data.vocabulary[0] == "\n"
    assert set(data.vocabulary[1:]) == set("".join(LINES))


def test_a_line_that_is_too_long_is_cut_and_has_no_end(file):
    data = load_data(file, length=8)
    assert data.shape == (8,)
    assert bool((data.train.x > 0).all())
    assert set(pv.as_text(data.train.x, data.vocabulary)) <= {line[:8] for line in LINES}


def test_lines_that_are_equal_up_to_the_cut_are_kept_once(tmp_path):
    """Otherwise the test data would contain rows of the training data."""
    path = tmp_path / "log.txt"
    path.write_text("\n".join(f"line {i} of a log, {end}" for i in range(30) for end in "abc"))
    data = load_data(path, length=9)
    rows = [
        pv.as_text(part.x, data.vocabulary) for part in (data.train, data.validation, data.test)
    ]
    assert sorted(line for part in rows for line in part) == sorted(
        {f"line {i} of"[:9] for i in range(30)}
    )


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([[1, -1]], "rows must hold tokens from 0 to 2, got -1"),
        ([[1, 3]], "got 3"),
        ([[1.0, 0.5]], "got 0.5"),
        ([[1.0, float("nan")]], "got nan"),
        ([1, 2], r"must have shape \(n, length\), got \(2,\)"),
    ],
)
def test_tokens_outside_the_vocabulary_are_refused(rows, words):
    with pytest.raises(pv.UsageError, match=words):
        pv.as_text(torch.tensor(rows), "\nab")


@pytest.mark.parametrize(
    ("lines", "vocabulary", "length", "words"),
    [
        ("ab", "\nab", 3, "lines must be a list of strings"),
        ([3], "\nab", 3, "lines must be a list of strings"),
        (["ab"], "\nab", -1, "length must be a whole number of at least 1, got -1"),
        (
            ["ab"],
            "xab",
            3,
            "vocabulary must be different characters, of which the first is",
        ),
        (["ab"], "\naba", 3, "vocabulary must be different characters"),
    ],
)
def test_lines_that_have_no_tokens_are_refused(lines, vocabulary, length, words):
    with pytest.raises(pv.UsageError, match=words):
        pv.as_tokens(lines, vocabulary, length)


def test_the_vocabulary_of_a_run_gives_the_same_tokens_and_width(file):
    data = load_data(
        file, length=20, vocabulary="\nzyxw" + "".join(sorted(set("".join(LINES)) - set("zyxw")))
    )
    assert data.shape == (20,)
    assert int(data.train.x.max()) < len(data.vocabulary)
    with pytest.raises(pv.UsageError, match="vocabulary of 2 characters lacks"):
        load_data(file, vocabulary="\nab")


def test_sentences_of_the_standard_library():
    lines = docstrings(40)
    assert len(lines) > 1000
    assert sum(line.startswith("Return") for line in lines) > 100
    assert all(10 <= len(line) < 40 and line.endswith(".") and line.isascii() for line in lines)
    assert len(set(lines)) == len(lines)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "has 0 rows, but a split .* needs at least 10"),
        ("a\nb\n", "has 2 rows"),
        (b"\xff\xfe\xfa", "cannot be read as UTF-8"),
    ],
)
def test_a_file_without_lines_is_rejected(tmp_path, content, message):
    path = tmp_path / "bad.txt"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(pv.UsageError, match=message):
        load_data(path)


def run(*words):
    main([str(word) for word in words])


TRAIN = (
    "--epochs",
    2,
    "--hidden",
    8,
    "--latent-dim",
    2,
    "--embedding-dim",
    4,
    "--engine",
    "eager",
    "--batch-size",
    8,
    "--diagnosis-seconds",
    0,
)


def test_the_command_line_works_with_text(file, tmp_path, capsys):
    out = tmp_path / "run"
    run("train", file, "--out", out, *TRAIN, "--word-dropout", 0.3, "--num-eval-samples", 3)
    config = json.loads((out / "config.json").read_text())["train"]
    assert config["vocabulary"] == load_data(file).vocabulary
    page = (out / "report.html").read_text()
    assert page.count("<pre") == 4  # three texts and the configuration
    for words in (("sample", "--num", 4), ("reconstruct",), ("interpolate", "--num", 2)):
        capsys.readouterr()
        run(words[0], out, *words[1:])
        name = {"sample": "samples", "reconstruct": "reconstructions"}.get(
            words[0], "interpolations"
        )
        text = (out / f"{name}.txt").read_text()
        assert text.strip() in capsys.readouterr().out
        rows = torch.from_numpy(np.load(out / f"{name}.npy")).flatten(0, -2)
        for line in pv.as_text(rows, config["vocabulary"]):
            assert line.strip() in text
    run("evaluate", out, "--num-samples", 2)
    run("traverse", out, "--steps", 2)
    run("score", out, "--num-samples", 30)
    scores, test = np.load(out / "scores.npz"), part_of(load_data(file), "test")
    x, rows = test.x, test.rows.tolist()
    wanted = pv.log_likelihood(pv.load(out), x, num_samples=30, progress=False).per_datum
    assert scores["log_likelihood"].tolist() == pytest.approx(wanted.tolist())
    assert scores["row"].tolist() == rows
    assert scores["text"].tolist() == pv.as_text(x, config["vocabulary"])
    other = tmp_path / "other.txt"
    other.write_text("\n".join(line[::-1] for line in LINES))
    run("evaluate", out, "--data", other, "--num-samples", 2)
    loaded = pv.load(out)
    assert pv.sample(loaded, 2).shape == (2, *config["data_shape"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--network", "conv"), "--network must be recurrent for text, got conv"),
        (("--likelihood", "gaussian"), "--likelihood does not apply to text; got gaussian"),
        (("--length", 1), "length must be at least 2, got 1"),
        (("--word-dropout", 2), "--word-dropout must be a rate from 0 to 1, got 2.0"),
    ],
)
def test_options_that_do_not_fit_text_are_rejected(file, words, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        run("train", file, *words)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_recurrent_networks_are_for_text(capsys):
    with pytest.raises(SystemExit):
        run("train", "digits", "--network", "recurrent")
    assert "--network recurrent applies only to text; digits is not text" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run("train", "digits", "--word-dropout", 0.5)
    words = "--word-dropout does not apply to digits, which is not text; got 0.5"
    assert words in capsys.readouterr().err
