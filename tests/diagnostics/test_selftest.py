"""The self-test passes, and fails if an estimator is wrong."""

import json
import re
from importlib import import_module

import pytest
import torch

import pyro_vae as pv
from pyro_vae.cli.main import main
from pyro_vae.diagnostics import selftest, selftest_checks
from pyro_vae.pairs.rng import seeded
from pyro_vae.training import engine


def run(group):
    with seeded(0):
        return list(selftest.CHECKS[group]())


@pytest.mark.thorough
def test_everything_is_right_here(capsys):
    state = torch.get_rng_state()
    main(["selftest"])
    shown = capsys.readouterr().out
    assert torch.equal(state, torch.get_rng_state())
    assert f"torch {torch.__version__}" in shown
    assert "FAILED" not in shown
    (right, of) = map(int, re.search(r"(\d+) of (\d+) passed", shown).groups())
    assert right == of > 25


def shifted(function, by):
    return lambda *arguments, **keywords: function(*arguments, **keywords) + by


SPOILED = [
    # the changed function, the added error, the group, and the check that must fail
    ("pyro_vae.inference.datum_weights.log", 0.05, "log p(x)", "log p(x), exact guide"),
    (
        "pyro_vae.inference.pareto._generalized_pareto",
        0.2,
        "log p(x)",
        "Pareto k of weights of shape 0.3",
    ),
    ("pyro_vae.pairs.summing.evidence", 0.01, "enumeration", "log p(x), a class summed"),
    ("pyro_vae.inference.encoding._scale", 0.01, "use", "encode, scales"),
    ("pyro_vae.inference.passes.typical", 0.01, "use", "reconstruct, means"),
    ("pyro_vae.diagnostics.information.log", 0.5, "information", "mutual information"),
    (
        "pyro_vae.parts.distributions.LevelLogistic.log_prob",
        0.01,
        "densities",
        "sum of a discretized",
    ),
    ("pyro_vae.parts.flows.Flow.log_prob", 0.01, "densities", "integral of a flow"),
]


@pytest.mark.parametrize(("where", "by", "group", "seen"), SPOILED)
def test_sees_what_is_off_by_a_constant(monkeypatch, where, by, group, seen):
    *path, name = where.split(".")
    holder = import_module(".".join(path[:2]))
    for part in path[2:]:
        holder = getattr(holder, part)
    monkeypatch.setattr(holder, name, shifted(getattr(holder, name), by))
    failed = [check.name for check in run(group) if not check.passed]
    assert any(name.startswith(seen) for name in failed), failed


def test_a_wrong_gradient_is_seen(monkeypatch):
    original = engine.Engine._replay

    def wrong(self, *arguments):
        loss = original(self, *arguments)
        self.pair.weight.grad *= 1.001
        return loss

    monkeypatch.setattr(engine.Engine, "_replay", wrong)
    assert [check.name for check in run("gradients") if not check.passed] == [
        "gradient of the ELBO, traced"
    ]


def test_a_failure_is_shown_and_ends_with_status_1(monkeypatch, capsys):
    def fails():
        raise ValueError("no such luck\nand more")
        yield

    def wrong():
        yield selftest_checks.check_of("a number", [1.0, 2.0], [1.0, 2.5], [0.1, 0.2])
        yield selftest_checks.check_of("nothing", torch.nan, 0.0, 1.0)

    monkeypatch.setattr(selftest, "CHECKS", {"wrong": wrong, "fails": fails})
    with pytest.raises(SystemExit) as ended:
        main(["selftest"])
    assert ended.value.code == 1
    shown = capsys.readouterr().out
    assert re.search(r"a number +1.5000 +1.7500 +5.0e-01 +2.0e-01 +FAILED", shown)
    assert re.search(r"nothing .* FAILED", shown)
    assert re.search(r"fails +FAILED: ValueError: no such luck\n", shown)
    assert "0 of 3 passed" in shown
    found = pv.selftest(progress=False)
    assert not found.passed
    assert json.loads(json.dumps(found.as_dict()))["faults"]
