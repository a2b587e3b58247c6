"""The short diagnosis at the end of `train`: its price, its verdict, its place in the report."""

import json
import math

import numpy as np
import pytest
import torch
from cli_helpers import command, only_smallest, read

import pyro_vae as pv
from pyro_vae.cli.diagnosis import verdict_lines
from pyro_vae.cli.main import main
from pyro_vae.diagnostics import diagnosis, guide_studies, model_studies
from pyro_vae.diagnostics.attribution import PARTS, Blame
from pyro_vae.diagnostics.diagnosis import Diagnosis
from pyro_vae.diagnostics.study import Finding

TRAIN = (
    "train {data} --out {run} --likelihood gaussian --epochs 1 --batch-size 200 --latent-dim 2 "
    "--hidden 4 --num-eval-samples 2 --engine eager"
)


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """A file whose test part has more than 1,000 rows."""
    path = tmp_path_factory.mktemp("data") / "table.npz"
    x = np.random.default_rng(0).normal(size=(1600, 3)).astype("float32")
    np.savez(path, x_train=x[:400], x_test=x[400:])
    return path


@pytest.fixture
def small(monkeypatch):
    few = model_studies.latents_study, model_studies.train_gap_study
    only_smallest(monkeypatch, *few, guide_studies.reliability_study)


def between(out, first, last):
    """The printed lines between two titles."""
    lines = out.splitlines()
    titles = [line[:20].strip() for line in lines]
    return lines[titles.index(first) + 1 : titles.index(last)]


@pytest.mark.thorough
@pytest.mark.usefixtures("small")
def test_train_diagnoses_the_held_out_rows_for_ten_seconds(table, tmp_path, capsys):
    run = tmp_path / "run"
    command(TRAIN, data=table, run=run)
    out = capsys.readouterr().out
    data = pv.load_data(table)
    assert len(data.test.x) == 1200
    found = pv.diagnose(
        pv.load(run), data.test.x[:1000], train=data.train.x, budget=5, engine="eager"
    )
    expected = json.loads(json.dumps(found.as_dict()))
    written = read(run / "metrics.json")["diagnostics"]
    assert written["budget"] == 10
    for key in ("results", "summary", "blamed", "findings", "num_examples"):
        assert written[key] == expected[key], key
    assert written["num_examples"] == 1000
    assert set(written["results"]) == {"latents", "train_gap", "log_likelihood"}
    assert (run / "figures" / "diagnosis-reliability.png").exists()
    # The price comes before the verdict, and the verdict before the path of the report.
    assert "diagnosis           about 10 s; --diagnosis-seconds 0 turns it off\n" in out
    assert between(out, "diagnosis", "report") == verdict_lines(found)
    page = (run / "report.html").read_text()
    assert page.index("Can the inference be believed?") < page.index("<h2>Numbers</h2>")


@pytest.mark.sample(2)
@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(
    ("options", "budget"),
    [
        ("--diagnosis-seconds 0", None),
        ("--no-report", None),
        ("--no-report --diagnosis-seconds 3", 3),
        ("--no-report --config {file}", 4.5),
        ("--no-report --config {file} --diagnosis-seconds 0", None),
    ],
)
def test_one_option_sets_the_seconds(options, budget, table, tmp_path, capsys):
    (tmp_path / "options.json").write_text('{"diagnosis_seconds": 4.5}')
    paths = {"data": table, "run": tmp_path / "run", "file": tmp_path / "options.json"}
    command(f"{TRAIN} {options}", **paths)
    found = read(tmp_path / "run" / "metrics.json").get("diagnostics")
    assert (found and found["budget"]) == budget
    assert ("diagnosis  " in capsys.readouterr().out) is (budget is not None)
    assert (tmp_path / "run" / "report.html").exists() is ("--no-report" not in options)


@pytest.mark.parametrize("seconds", ["-1", "nan", "inf"])
def test_a_wrong_number_of_seconds_is_refused_before_training(seconds, table, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        command(f"{TRAIN} --diagnosis-seconds={seconds}", data=table, run=tmp_path / "run")
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(
        f"pyro-vae: --diagnosis-seconds must be at least 0 seconds, got {seconds}"
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.filterwarnings("always:the diagnosis failed")
def test_a_failure_of_the_diagnosis_does_not_lose_the_run(table, tmp_path, monkeypatch, capsys):
    def broken(bench):
        raise RuntimeError("no memory\nat all")

    monkeypatch.setattr(diagnosis, "STUDIES", [broken])
    run = tmp_path / "run"
    command(TRAIN, data=table, run=run)  # ends with status 0
    out, err = capsys.readouterr()
    (line,) = [line for line in err.splitlines() if "diagnosis failed" in line]
    assert "(RuntimeError: no memory)" in line
    assert f"pyro-vae diagnose {run} repeats it" in line
    assert "diagnostics" not in read(run / "metrics.json")
    assert math.isfinite(read(run / "metrics.json")["elbo"])
    assert "Can the inference" not in (run / "report.html").read_text()
    assert str(run / "report.html") in out


@pytest.mark.usefixtures("small")
def test_a_new_diagnosis_replaces_the_figures_of_an_earlier_one(table, tmp_path):
    run = tmp_path / "run"
    command(f"{TRAIN} --no-report --diagnosis-seconds 0", data=table, run=run)
    (run / "figures").mkdir()
    old, other = run / "figures" / "diagnosis-gaps.png", run / "figures" / "samples.png"
    for path in (old, other):
        path.write_bytes(b"earlier")
    command("diagnose {run} --no-report --budget 5", run=run)
    assert not old.exists()
    assert other.read_bytes() == b"earlier"
    assert (run / "figures" / "diagnosis-reliability.png").exists()


@pytest.mark.usefixtures("small")
def test_diagnose_tells_its_price_first(table, tmp_path, capsys):
    command(f"{TRAIN} --no-report", data=table, run=tmp_path / "run")
    capsys.readouterr()
    command("diagnose {run} --no-report --num 20", run=tmp_path / "run")
    out = capsys.readouterr().out
    assert out.startswith("diagnosis           about 200 s (--budget)\n")
    with pytest.raises(SystemExit):
        main(["diagnose", str(tmp_path / "run"), "--budget", "nan"])
    assert "--budget must be above 0 seconds, got nan" in capsys.readouterr().err


# The verdict in the terminal

EVERY = [
    Finding(kind, f"{kind} {i}, a finding of many words that would fill the terminal", about)
    for kind in ("trust", "doubt", "unchecked", "next")
    for i, about in enumerate(["log p(x)", "ELBO", ""])
]


def test_the_verdict_has_at_most_five_lines():
    found = Diagnosis(torch.arange(3), 10.0, {"latents": None}, findings=EVERY)
    found.blamed = [Blame("encoder", 0.714, ()), Blame("prior", None, ())]
    lines = verdict_lines(found)
    assert lines[:2] == [
        "at fault            the encoder (0.71 nats); the prior",
        f"try next            {PARTS['encoder'][1]}",
    ]
    assert lines[2] == (
        "reliable            log p(x); ELBO; "
        "trust 2, a finding of many words that would fill the ..."
    )
    assert [line[:20].strip() for line in lines[2:]] == ["reliable", "not reliable", "not checked"]


def test_a_verdict_without_a_fault_or_without_any_result():
    found = Diagnosis(torch.arange(3), 10.0, {"latents": None}, findings=EVERY[:1])
    assert verdict_lines(found) == [
        "at fault            no part, as far as the diagnostics have checked",
        "reliable            log p(x)",
    ]
    nothing = verdict_lines(Diagnosis(torch.arange(3), 10.0))
    assert nothing == ["diagnosis           no diagnostic gave a result"]
