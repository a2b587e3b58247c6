"""`diagnose` in a group of processes: they share the diagnostics, and have the same results."""

import torch

import pyro_vae as pv
from pyro_vae.diagnostics import diagnosis
from pyro_vae.diagnostics.further_studies import tarp_study
from pyro_vae.diagnostics.guide_studies import local_calibration_study, reliability_study
from pyro_vae.diagnostics.model_studies import latents_study
from pyro_vae.diagnostics.sharing import shares
from pyro_vae.diagnostics.study import Rung, Study
from pyro_vae.models.exact import linear_gaussian
from pyro_vae.pairs.processes import Team, here, single

KEPT = [latents_study, reliability_study, local_calibration_study, tarp_study]


def counted(study, ran):
    """A study at its smallest size, which notes its runs."""

    def make(bench):
        found = study(bench)
        first = found.rungs[0]

        def run():
            ran.append(found.name)
            return first.run()

        return found._replace(rungs=[first._replace(cost=0.0, run=run)])

    return make


def test_processes_share_the_diagnostics_and_have_equal_results(in_two, monkeypatch):
    pair = linear_gaussian(spread=1.3)
    x = pair.marginal().sample((40,))
    ran = []
    monkeypatch.setattr(diagnosis, "STUDIES", [counted(study, ran) for study in KEPT])

    def work(rank):
        assert here().count == 2
        ran.clear()
        # Budgets by the clock may differ; each process has its own.
        found = pv.diagnose(pair, x, budget=(20.0, 30.0)[rank], progress=False)
        assert here().count == 2
        return ran, found.as_dict() | {"budget": 0.0}, found.worst(), sorted(found.figures)

    whole = pv.diagnose(pair, x, progress=False)
    first, second = in_two(work)
    assert sorted(first[0] + second[0]) == sorted(whole.results)
    assert 1 <= len(first[0]) <= 3  # no process runs all of them
    assert str(first[1:]) == str(second[1:])
    alone = whole.as_dict()
    for name in ("results", "tables", "findings", "worst_rows", "notes"):
        assert str(first[1][name]) == str(alone[name]), name
    assert first[3] == sorted(whole.figures)


def test_an_error_of_one_process_is_told_by_all(in_two, monkeypatch):
    pair = linear_gaussian()
    x = pair.marginal().sample((40,))

    def fails(bench):
        return Study("fails", 1, [Rung(0, lambda: 1 / 0)], lambda result: [])

    monkeypatch.setattr(diagnosis, "STUDIES", [counted(latents_study, []), fails])

    def said(call):
        try:
            return call()
        except pv.UsageError as error:
            return str(error)

    def work(rank):
        other = x[: 40 - rank]
        bad = torch.full((4, 6), torch.nan) if rank else x
        return [
            said(lambda: pv.diagnose(pair, x, progress=False).failed),
            said(lambda: pv.diagnose(pair, other, progress=False).failed),
            said(lambda: pv.diagnose(pair, bad, progress=False).failed),
        ]

    first, second = in_two(work)
    failed = {"fails": "ZeroDivisionError: division by zero"}
    assert first[0] == second[0] == failed
    assert first[1].startswith("process 1 has other data than process 0")
    assert "process 1 has other data" in second[1]
    assert first[2].startswith("process 1 of 2 stopped")
    assert "NaN" in second[2]


def test_within_single_a_process_is_alone(in_two, monkeypatch):
    monkeypatch.setattr(diagnosis, "STUDIES", [counted(reliability_study, [])])
    pair = linear_gaussian(spread=1.3)
    x = pair.marginal().sample((40,))

    def work(rank):
        with single():  # as in a function of on_epoch; the other process does not call it
            return rank or pv.diagnose(pair, x, progress=False).results["log_likelihood"].value

    whole = pv.diagnose(pair, x, progress=False).results["log_likelihood"].value
    assert in_two(work) == [whole, 1]


def test_each_diagnostic_has_one_owner_and_loads_are_even():
    weights = [1, 4, 2, 2, 2, 3, 1, 1, 1, 3, 3, 3, 1, 1, 1]
    for count in (1, 2, 3, 40):
        owners = shares(weights, Team(0, count))
        loads = [
            sum(w for w, o in zip(weights, owners, strict=True) if o == rank)
            for rank in range(count)
        ]
        assert sum(loads) == sum(weights)
        assert max(loads) <= sum(weights) / count + max(weights)
