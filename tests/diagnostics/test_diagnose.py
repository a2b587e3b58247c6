"""The findings of `diagnose` for pairs with known faults, and its time budget."""

import json
import math
import warnings
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from exact import CORRELATED, LinearGaussian, Spoiled, linear_gaussian
from pairs import make, rows

import pyro_vae as pv
from pyro_vae.cli.main import main
from pyro_vae.diagnostics import diagnosis, guide_studies, model_studies, sizing, studies
from pyro_vae.diagnostics.study import Bench, Rung, Study


def data(pair, n=60):
    torch.manual_seed(0)
    return pair.marginal().sample((n,)).detach()


CLASSES = make("semi-supervised"), rows("semi-supervised", 200)
BENCH = Bench(*CLASSES, torch.arange(200), 0, "eager", 1e-3, 1e-6, 1e-6)
FULL = BENCH._replace(other=BENCH.batch, train=BENCH.batch)
SHARED = FULL._replace(shared=("w",))
NAMES = [(make(FULL) or make(SHARED)).name for make in studies.STUDIES]


def found_at(monkeypatch, pair, batch, other=None, **rungs):
    """Run these studies at these sizes, without a time limit."""

    def at(make, rung):
        def made(bench):
            if (study := make(bench)) is None:
                return None
            size = study.rungs[min(rung, len(study.rungs) - 1)]
            return study._replace(rungs=[size._replace(cost=0.0)])

        return made

    chosen = [
        at(make, rungs[name])
        for make, name in zip(studies.STUDIES, NAMES, strict=True)
        if name in rungs
    ]
    assert len(chosen) == len(rungs)
    monkeypatch.setattr(diagnosis, "STUDIES", chosen)
    return pv.diagnose(pair, *batch, other=other, budget=1e6, progress=False)


def words(found, kind):
    return "; ".join(finding.words for finding in found.findings if finding.kind == kind)


# Findings


def test_an_exact_guide_is_trusted(monkeypatch):
    pair = linear_gaussian()
    rungs = {
        "latents": 1,
        "information": 0,
        "predictive": 1,
        "calibration": 1,
        "local_calibration": 0,
        "model_check": 0,
        "log_likelihood": 2,
        "gaps": 0,
        "annealing": 0,
        "sandwich": 0,
        "nuts": 0,
    }
    found = found_at(monkeypatch, pair, [data(pair)], **rungs)
    assert not found.failed | found.not_applicable | found.left_out
    assert not found.blamed
    assert not words(found, "doubt")
    assert found.summary.startswith("At fault: no part, as far as the diagnostics have checked.")
    truth = pair.marginal().log_prob(data(pair)).mean().item()
    for part in (
        f"log p(x) = {truth:.3f} ± 0.000",
        "the ELBO is 0.00 nats per example below log p(x)",
        "the guide of local latents: no fault found by calibration, local_calibration, gaps",
        "the model uses 'z' (2 of 2 units active, KL ",
        "annealing agrees",
    ):
        assert part in found.summary
    assert set(found.results) == set(rungs)
    json.dumps(found.as_dict(), allow_nan=False)


def test_a_guide_that_is_too_narrow_is_doubted(monkeypatch):
    pair = LinearGaussian(linear_gaussian(20, 12).weight.detach(), 0.5, spread=0.5)
    rungs = {"calibration": 1, "log_likelihood": 1, "gaps": 1, "annealing": 1}
    found = found_at(monkeypatch, pair, [data(pair)], **rungs)
    assert found.blamed[0].part == "encoder"
    assert "log p(x) by importance weights" in words(found, "doubt")
    assert "too narrow" in found.blamed[0].words
    assert "the ELBO as log p(x): at least " in words(found, "doubt")
    assert "a larger encoder" in found.blamed[0].next
    assert "pyro_vae.anneal" in words(found, "next")
    assert set(found.figures) == {"reliability", "calibration", "gaps"}


def test_the_gap_is_attributed_to_the_family(monkeypatch):
    pair = Spoiled("diagonal", weight=torch.block_diag(*[CORRELATED] * 4))
    x = data(pair, 20)
    least = pair.kl(x, pair.q(x)).mean().item()
    found = found_at(monkeypatch, pair, [x], gaps=0)
    assert 1.5 < least < 4
    assert found.blamed[0].part == "family"
    assert least / 2 < found.blamed[0].nats < 2 * least
    assert "a richer posterior family" in words(found, "fault")


class Ignored(LinearGaussian):
    """A model that ignores its latents, and a guide that equals the prior."""

    def __init__(self):
        super().__init__(torch.zeros(6, 2), noise=0.5)


def test_a_collapsed_latent_is_named(monkeypatch):
    found = found_at(monkeypatch, Ignored(), [data(Ignored())], latents=0, information=0)
    assert [blame.part for blame in found.blamed] == ["decoder"]
    assert "'z' has collapsed" in words(found, "fault")
    assert "free bits" in found.blamed[0].next
    assert "uses 'z'" not in found.summary


class Shifted(LinearGaussian):
    """Codes that are outside the region of the prior."""

    def guide(self, x):
        loc, _ = self.posterior(x)
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(loc + 3, 1.0).to_event(1))


def test_codes_beside_the_prior_are_reported(monkeypatch):
    pair = Shifted(linear_gaussian().weight.detach(), 0.5)
    found = found_at(monkeypatch, pair, [data(pair, 300)], information=1)
    assert [blame.part for blame in found.blamed] == ["prior"]
    assert "nats from the prior of 'z'" in words(found, "fault")


# Any pair


def test_other_data_are_distinguished_from_these(monkeypatch):
    pair = linear_gaussian()
    other = (data(pair) + 10,)
    found = found_at(monkeypatch, pair, [data(pair)], other, outliers=0)
    assert "-log p(x) as a score of out-of-distribution data: AUROC 1.00" in words(found, "trust")
    assert "outliers" in found.figures


def test_a_model_that_makes_other_data_is_doubted(monkeypatch):
    pair = linear_gaussian()
    found = found_at(monkeypatch, pair, [2 * data(pair) + 1], predictive=0)
    assert [blame.part for blame in found.blamed] == ["decoder"]
    assert "the model's replicates differ from the data in mean" in words(found, "fault")


QUICK = ("latents", "information", "calibration", "log_likelihood")


ALL_BUT_TWO = [make(BENCH).name for make in studies.STUDIES if make(BENCH) is not None][:-2]


@pytest.mark.parametrize(
    ("name", "which"),
    [
        pytest.param("bags", ALL_BUT_TWO, marks=pytest.mark.thorough),
        ("conditional", QUICK),
        ("deep-markov", QUICK),
        ("text", QUICK),
    ],
)
def test_any_pair(name, which, monkeypatch):
    found = found_at(monkeypatch, make(name), rows(name, 6), **dict.fromkeys(which, 0))
    assert ("uncertainty" in found.results) == (name == "weights")
    assert not found.failed | found.left_out
    assert {"latents", "log_likelihood"} <= set(found.results)
    assert set(found.results) | set(found.not_applicable) | {"outliers"} == {*which, "outliers"}
    json.dumps(found.as_dict(), allow_nan=False)
    for place, why in found.not_applicable.items():
        assert f"{place} does not apply: {why}" in str(found)


def test_it_changes_nothing_and_repeats_itself(monkeypatch):
    pair, batch = make("bernoulli"), rows("bernoulli", 12)
    state, before = torch.get_rng_state(), [p.clone() for p in pair.parameters()]
    first = found_at(monkeypatch, pair, batch, latents=0, log_likelihood=0)
    again = found_at(monkeypatch, pair, batch, latents=0, log_likelihood=0)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(before, pair.parameters(), strict=True))
    for name, result in first.results.items():
        assert result.as_dict() == again.results[name].as_dict()


# Time budget


class Clock:
    """A clock that only the studies advance, by the time that they claim."""

    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def run(monkeypatch):
    """Diagnose with these studies; each has a name, costs, and seconds."""
    clock = Clock()
    monkeypatch.setattr(sizing, "now", clock)

    def ran(budget, **ladders):
        def made(name, ladder):
            def pretend(cost, seconds):
                clock.now += seconds
                return cost

            rungs = [Rung(cost, partial(pretend, cost, s)) for cost, s in ladder.items()]
            return lambda bench: Study(name, 1, rungs, lambda result: [])

        chosen = [made(name, ladder) for name, ladder in ladders.items()]
        monkeypatch.setattr(diagnosis, "STUDIES", chosen)
        found = pv.diagnose(linear_gaussian(), torch.zeros(4, 6), budget=budget, progress=False)
        return found, clock.now

    return ran


def test_the_greatest_size_that_fits_is_run(run):
    found, seconds = run(10, slow={1: 1, 2: 2, 4: 4, 20: 20})
    assert found.results == {"slow": 4}
    assert seconds == 5  # the second size is not needed
    assert found.left_out == {"slow": "it ran at size 3 of 4"}
    assert found.seconds == {"slow": 5}


def test_what_a_study_leaves_goes_to_the_others(run):
    found, _ = run(12, quick={1: 1}, slow={1: 1, 8: 8, 100: 100})
    assert found.results == {"quick": 1, "slow": 8}
    assert run(12, other={1: 6}, slow={1: 1, 8: 8, 100: 100})[0].results["slow"] == 1


def test_time_that_is_left_in_the_end_is_used(run):
    found, seconds = run(20, slow={1: 1, 12: 12}, quick={1: 1})
    assert found.results == {"slow": 12, "quick": 1}
    assert seconds == 14
    assert found.seconds == {"slow": 13, "quick": 1}
    late, _ = run(20, slow={12: 12}, quick={1: 1})
    assert late.results == {"slow": 12, "quick": 1}


def test_a_study_that_does_not_fit_is_left_out_and_listed(run):
    found, seconds = run(10, first={1: 1}, slow={50: 50}, last={2: 2})
    assert found.left_out == {"slow": "it did not run"}
    assert "slow lacked time: it did not run" in str(found)
    with pytest.raises(pv.UsageError, match="no result: it did not run; if it lacked time"):
        found.worst()
    assert found.results == {"first": 1, "last": 2}
    assert seconds == 3


def test_a_time_that_was_underestimated_is_not_spent_twice(run):
    found, _ = run(10, slow={1: 9, 2: 18}, last={2: 2})
    assert found.results == {"slow": 1}
    assert found.left_out == {"slow": "it ran at size 1 of 2", "last": "it did not run"}


def test_a_cost_that_does_not_grow_is_learned():
    assert sizing.predicted([(1, 3.0)], 10) == pytest.approx(12)
    assert sizing.predicted([(1, 0.2)], 10) == pytest.approx(2)
    assert sizing.predicted([(1, 2.0), (3, 2.2)], 10) == pytest.approx(3.25)
    # A second run that is shorter does not show how time grows; at most all of it grows.
    assert sizing.predicted([(1, 2.0), (3, 1.9)], 10) == pytest.approx(19 / 3)
    assert sizing.predicted([(1, 2.0), (1, 2.5)], 1) == pytest.approx(2.5)


def test_an_error_of_any_kind_is_reported_and_the_rest_runs(monkeypatch):
    def fails(bench):
        return Study("fails", 1, [Rung(0, lambda: 1 / 0)], lambda result: [])

    def warns(bench):
        def run():
            warnings.warn("mind the gap", stacklevel=1)
            return 3

        return Study("warns", 1, [Rung(0, run)], lambda result: [])

    monkeypatch.setattr(diagnosis, "STUDIES", [fails, warns])
    found = pv.diagnose(linear_gaussian(), torch.zeros(4, 6), progress=False)
    assert found.failed == {"fails": "ZeroDivisionError: division by zero"}
    assert "fails failed: ZeroDivisionError" in str(found)
    assert found.results == {"warns": 3}
    assert "note: mind the gap" in str(found)


def test_a_figure_that_cannot_be_drawn_is_a_note(monkeypatch):
    def drawn(result):
        raise ValueError("autodetected range is not finite")

    def made(bench):
        return Study("one", 1, [Rung(0, lambda: 3)], figures={"bars": drawn})

    monkeypatch.setattr(diagnosis, "STUDIES", [made])
    found = pv.diagnose(linear_gaussian(), torch.zeros(4, 6), progress=False)
    assert found.results == {"one": 3}
    assert not found.figures
    assert found.notes["one"] == ["'bars' cannot be drawn: autodetected range is not finite"]


def test_rows_are_reported_by_their_own_numbers(monkeypatch):
    pair = LinearGaussian(linear_gaussian(20, 12).weight.detach(), 0.5, spread=0.5)
    x = data(pair, 40)
    found = found_at(monkeypatch, pair, [x], log_likelihood=1)
    estimate = found.results["log_likelihood"]
    direct = pv.log_likelihood(pair, x[found.rows], num_samples=estimate.num_samples)
    assert torch.equal(estimate.per_datum, direct.per_datum)
    assert found.worst(1).item() == found.rows[direct.worst(1)].item()
    assert found.as_dict()["worst_rows"][0] == found.worst(1).item()


def test_one_row_has_what_one_row_can_have(monkeypatch):
    pair = linear_gaussian()
    found = found_at(monkeypatch, pair, [data(pair, 1)], information=0, annealing=0, sandwich=0)
    assert set(found.results) == {"annealing"}
    assert "at least 2 rows of data, got 1" in found.not_applicable["information"]
    assert "num_examples must be at least 2, got 1" in found.not_applicable["sandwich"]


def test_a_budget_of_zero_is_refused():
    with pytest.raises(pv.UsageError, match="budget must be above 0 seconds, got 0"):
        pv.diagnose(linear_gaussian(), torch.zeros(4, 6), budget=0)


# The command


@pytest.fixture
def cheap(monkeypatch):
    """Two studies at their smallest size, whatever they cost, and one without time."""

    def first(make):
        def made(bench):
            study = make(bench)
            return study._replace(rungs=[study.rungs[0]._replace(cost=-math.inf)])

        return made

    kept = [
        first(model_studies.latents_study),
        first(guide_studies.reliability_study),
        guide_studies.gaps_study,
    ]
    monkeypatch.setattr(diagnosis, "STUDIES", kept)


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "digits"
    words = f"train digits --out {run} --epochs 2 --latent-dim 2 --hidden 8 --diagnosis-seconds 0"
    main([*words.split(), "--num-eval-samples", "2", "--engine", "eager"])
    return run


@pytest.mark.usefixtures("cheap")
def test_the_command(digits, capsys):
    before = json.loads((digits / "metrics.json").read_bytes())
    main(["diagnose", str(digits), "--num", "40", "--budget", "0.01"])
    shown = capsys.readouterr().out
    metrics = json.loads((digits / "metrics.json").read_bytes())
    found = metrics.pop("diagnostics")
    assert metrics.pop("sha256") != before.pop("sha256")
    assert metrics == before
    assert " ".join(found["summary"].split()) in " ".join(shown.split())
    assert found["num_examples"] == 40
    assert found["results"]["log_likelihood"]["num_samples"] == 100
    assert (digits / "figures" / "diagnosis-reliability.png").read_bytes()[:4] == b"\x89PNG"
    page = (digits / "report.html").read_text()
    assert "Can the inference be believed?" in page
    assert page.index("<b>Not reliable") < page.index("<h2>Training</h2>")
    assert page.count('alt="reliability"') == 1
    assert "lacked time" in page
    # The findings stay in the run, also after other commands.
    main(["evaluate", str(digits), "--num-samples", "2"])
    assert json.loads((digits / "metrics.json").read_bytes())["diagnostics"] == found
    main(["report", str(digits)])
    assert "Not reliable" in (digits / "report.html").read_text()


def test_the_command_on_a_users_pair_and_other_data(tmp_path, monkeypatch):
    (tmp_path / "own.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    import numpy as np

    x = np.random.default_rng(0).normal(size=(60, 3)).astype("float32")
    np.save("table.npy", x)
    np.save("other.npy", x + 1)
    train = "train table.npy --model own:Own --out run --epochs 1 --num-eval-samples 2 --no-report"
    main(train.split())
    line = "diagnose run --model own:Own --data other.npy --budget 0.1 --no-report"
    main(line.split())
    found = json.loads((tmp_path / "run" / "metrics.json").read_bytes())["diagnostics"]
    assert found["data"] == "other"
    assert not found["failed"]
    assert not (tmp_path / "run" / "report.html").exists()


OWN = """
import pyro, pyro.distributions as dist, torch

class Own(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = torch.nn.Linear(3, 2), torch.nn.Linear(2, 3)

    def model(self, x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), 1.0).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(self.encoder(x), 0.5).to_event(1))
"""


@pytest.mark.thorough
@pytest.mark.usefixtures("cheap")
def test_text_is_shown_in_words(tmp_path):
    run = tmp_path / "run"
    (tmp_path / "lines.txt").write_text("\n".join(f"line {i} of text" for i in range(60)))
    train = f"train {tmp_path / 'lines.txt'} --out {run} --network recurrent --hidden 4"
    main(f"{train} --epochs 1 --latent-dim 2 --num-eval-samples 2 --no-report".split())
    main(["diagnose", str(run), "--budget", "0.01"])
    page = (run / "report.html").read_text()
    found = json.loads((run / "metrics.json").read_bytes())["diagnostics"]
    assert "of text" in found["worst_data"]
    assert "least reliable log p(x)" in page


@pytest.mark.parametrize(
    ("options", "expected"),
    [("--budget 0", "budget must be above 0"), ("--num 0", "--num must be at least 1")],
)
def test_the_command_refuses_in_one_line(digits, options, expected, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["diagnose", str(digits), *options.split()])
    assert ended.value.code == 2
    assert expected in capsys.readouterr().err
