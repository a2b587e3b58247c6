"""What `diagnose` says about global and group latents, and calibration by new fits."""

import json
from types import SimpleNamespace

import pytest
import torch
from exact import linear_gaussian
from global_pairs import Amortized, Means, Nested, data

import pyro_vae as pv
from pyro_vae.cli.main import main
from pyro_vae.diagnostics import diagnosis, global_calibration, global_studies, model_studies
from pyro_vae.diagnostics.global_studies import GlobalEvidence, judge_globals
from pyro_vae.diagnostics.study import Bench, Rung, Study


def diagnosed(monkeypatch, pair, batch, *studies, **settings):
    """Run these studies at their smallest size, whatever they cost."""

    def first(make):
        def made(bench):
            study = make(bench)
            return study._replace(rungs=[study.rungs[0]._replace(cost=0.0)])

        return made

    monkeypatch.setattr(diagnosis, "STUDIES", list(map(first, studies)))
    settings = {"budget": 1e6, "progress": False} | settings
    return pv.diagnose(pair, *batch, **settings)


def words(found, *kinds):
    return "; ".join(finding.words for finding in found.findings if finding.kind in kinds)


# Judgment


def evidence(shift=0.0, ratio=1.0, draws=500.0, sound=True, units=("w", "u[0]")):
    n = len(units)
    one = torch.ones(n).double()
    return GlobalEvidence(
        "NUTS", units, one, one, one + shift, one * ratio, draws * one, int(draws), sound
    )


@pytest.mark.parametrize(
    ("shift", "ratio", "draws", "faulty"),
    [
        (0.0, 1.0, 500, 0),
        (0.2, 1.2, 500, 0),
        (-0.6, 1.0, 500, 2),
        (0.0, 0.5, 500, 2),
        (0.0, 2.0, 500, 2),
        (0.6, 1.0, 20, 0),  # the error of 20 draws is larger
        (0.0, 0.6, 10, 0),
        (10.0, 1.0, 20, 2),
    ],
)
def test_a_fault_is_larger_than_its_limit_and_its_error(shift, ratio, draws, faulty):
    assert len(evidence(shift, ratio, draws).faulty) == faulty


def test_few_draws_or_chains_that_disagree_never_show_that_a_guide_is_right():
    assert evidence().enough
    assert not evidence(draws=399).enough
    assert not evidence(sound=False).enough


def judged(monkeypatch, weights=None, chains=None, reasons=None):
    """The verdict from these results, of evidence that is made here."""
    monkeypatch.setattr(global_studies, "of_weights", lambda found: found.evidence)
    monkeypatch.setattr(global_studies, "of_nuts", lambda found: found.evidence)
    results = {"global_weights": weights, "global_nuts": chains}
    results = {name: result for name, result in results.items() if result is not None}
    return judge_globals(["w", "u"], results, reasons or {})


def by_weights(k=0.1, **of):
    found = {"pareto_k": k, "reliable": k < 0.5, "num_examples": 300, "evidence": evidence(**of)}
    found |= {"noise": 0.1, "log_weights": torch.arange(3.0)}
    return SimpleNamespace(**found)


def by_chains(r_hat=1.0, **of):
    shared = SimpleNamespace(r_hat=torch.tensor([[r_hat, 1.0]]))
    return SimpleNamespace(shared=shared, evidence=evidence(**of))


def test_the_verdict_is_that_of_the_tool_that_can_tell(monkeypatch):
    def kinds(**results):
        return [finding.kind for finding in judged(monkeypatch, **results)]

    assert kinds(weights=by_weights()) == ["trust"]
    assert kinds(chains=by_chains()) == ["trust"]
    assert kinds(weights=by_weights(ratio=0.5)) == ["doubt", "next"]
    assert kinds(weights=by_weights(), chains=by_chains(shift=2.0)) == ["doubt", "next"]
    assert kinds(weights=by_weights(k=0.9)) == ["doubt", "next"]
    assert kinds(weights=by_weights(k=0.6)) == ["unchecked"]
    assert kinds(weights=by_weights(draws=100)) == ["unchecked"]
    assert kinds(chains=by_chains(draws=100)) == ["unchecked"]
    assert kinds(chains=by_chains(r_hat=1.3, shift=5.0)) == ["unchecked"]
    assert kinds(weights=by_weights(k=0.9), chains=by_chains()) == ["trust"]
    assert kinds() == ["unchecked"]


def test_a_fault_is_said_with_its_size(monkeypatch):
    (told, advice) = judged(monkeypatch, chains=by_chains(shift=-2.1, ratio=0.18))
    assert told.words.startswith(
        "the guide of 'w': its scale is 0.18 times the posterior's and its mean is 2.1 posterior "
        "standard deviations too low (posterior 1 ± 1, guide -1.1 ± 0.18)"
    )
    assert "q(w) q(z | x, w)" in advice.words


def test_what_did_not_run_is_said_with_its_reason(monkeypatch):
    reasons = {"global_weights": "it did not run", "global_nuts": "it did not run"}
    (told,) = judged(monkeypatch, reasons=reasons)
    assert told.words == (
        "the guide of 'w', 'u': global_weights and global_nuts: it did not run; a larger budget, "
        "pyro_vae.nuts or pyro_vae.global_weights checks it"
    )


# Diagnoses


def test_a_guide_ten_posterior_sds_off_is_never_reliable(monkeypatch):
    x, g = data()
    pair = Nested().set(x, g, shift=10.0)
    latents, weights = model_studies.latents_study, global_studies.global_weights_study
    found = diagnosed(monkeypatch, pair, (x, g), latents, weights, train=(x, g))
    told = "the guide of 'w', 'u': Pareto k of its weights given all 12 rows is"
    assert told in words(found, "fault")
    assert "given the guide of 'w', 'u', the model uses 'z'" in words(found, "fault", "doubt")
    assert not words(found, "trust")
    assert "\nReliable:" not in found.summary
    assert found.blamed[0].part == "globals"


@pytest.mark.thorough
def test_a_guide_that_is_too_narrow_is_named_by_nuts(monkeypatch):
    """The mean-field fault: the scale of q(w) is a fifth of that of the posterior."""
    x, g = data(3)
    pair = Nested().set(x, g, shift=-2.0, stretch=0.2)
    study = global_studies.global_nuts_study
    found = diagnosed(monkeypatch, pair, (x, g), study, train=(x, g))
    told = words(found, "fault", "doubt")
    assert "the guide of '" in told
    assert "its scale is 0." in told
    assert "posterior standard deviations too low" in told
    assert "by NUTS on all 3 rows" in told
    assert set(found.figures) == {"global-nuts"}
    assert not words(found, "trust")
    json.dumps(found.as_dict(), allow_nan=False)


def test_global_latents_are_not_checked_on_rows_that_may_be_others(monkeypatch):
    x, g = data()
    pair = Nested().set(x, g)
    latents, weights = model_studies.latents_study, global_studies.global_weights_study
    found = diagnosed(monkeypatch, pair, (x, g), latents, weights)
    assert "belongs to the data to which it was fitted" in words(found, "unchecked")
    assert "pass them as train" in words(found, "unchecked")
    assert "given the guide of 'w', 'u', the model uses 'z'" in words(found, "unchecked")
    assert "Not checked:\n- the guide of 'w', 'u'" in found.summary
    assert not words(found, "trust")
    pv.fit(pair, x, g, epochs=1, batch_size=12, learning_rate=1e-9, engine="eager", progress=False)
    known = diagnosed(monkeypatch, pair, (x, g), weights)
    assert "global_weights" in known.results  # fit remembers these rows
    others = diagnosed(monkeypatch, pair, (x[:6], g[:6]), weights)
    assert "global_weights" in others.not_applicable


def test_local_latents_that_no_tool_reached_are_not_checked(monkeypatch):
    pair = linear_gaussian()
    x = torch.zeros(4, 6).double()
    found = diagnosed(monkeypatch, pair, (x,), model_studies.latents_study)
    assert "the guide of 'z': no tool that checks local latents has run" in words(
        found, "unchecked"
    )
    assert "uses 'z'" not in words(found, "trust")


@pytest.mark.parametrize(
    ("weights", "said"), [(-0.01, "less than 1 %"), (0.004, "less than 1 %"), (0.2, "17 %")]
)
def test_a_share_of_the_variance_is_not_negative(weights, said):
    bench = Bench(pv.VAE.mlp((4,)), (torch.zeros(3, 4),), torch.arange(3), 0, "eager", 1, 1, 1)
    bench = bench._replace(shared=("w",))
    found = SimpleNamespace(epistemic=torch.tensor(weights), total=torch.tensor(1 + weights))
    (told, *_) = model_studies.uncertainty_study(bench).judge(found)
    assert told.words.startswith(f"{said} of the variance of predictions is due to the global")


# Calibration by new fits


def test_an_exact_amortized_guide_is_calibrated_and_needs_no_fit(monkeypatch):
    monkeypatch.setattr(global_calibration, "LEAST_SIMULATIONS", 1)
    g = torch.arange(4) % 2
    few = {"num_draws": 19, "progress": False}
    found = pv.global_calibration(Amortized(), g, num_simulations=60, **few)
    assert found.names == ("w", "u[0]", "u[1]")
    assert found.calibrated
    narrow = pv.global_calibration(Amortized(spread=0.3), g, num_simulations=30, **few)
    assert "too narrow" in narrow.failures["w"]


def test_a_table_is_fitted_again_to_each_simulation(monkeypatch, capsys):
    monkeypatch.setattr(global_calibration, "LEAST_SIMULATIONS", 2)
    pair, g = Nested(), torch.arange(8) % 2
    before = [p.clone() for p in pair.parameters()]
    settings = {"epochs": 2, "batch_size": 8}
    found = pv.global_calibration(pair, g, num_simulations=2, num_draws=19, **settings)
    assert found.ranks.shape == (2, 3)
    assert "global_calibration: 2 fits, about " in capsys.readouterr().err
    assert all(map(torch.equal, before, pair.parameters()))


def test_each_fit_finds_the_posterior_mean_of_its_simulation():
    g = torch.arange(8) % 2
    settings = {"epochs": 150, "batch_size": 8, "learning_rate": 0.05, "engine": "eager"}
    run = global_calibration._Simulations(Nested(), (g,), 8, ["w", "u"], 19, settings)
    assert run.refits
    assert run.fitted == ["loc", "log_scale"]
    batch, _ = run._simulate(3)
    mean, covariance, _ = run.pair.exact(*batch)
    fitted = run._fit(batch, 0)
    off = (fitted.loc.detach() - mean) / covariance.diagonal().sqrt()
    assert off.abs().max() < 0.35


def test_parameters_of_the_model_stay_fixed():
    class Leveled(Nested):
        """Model and guide share the level of x."""

        def __init__(self):
            super().__init__()
            self.level = torch.nn.Parameter(torch.zeros(()).double())

        def model(self, x, g):
            super().model(x - self.level, g)

        def guide(self, x, g):
            super().guide(x - self.level, g)

    assert global_calibration.guide_parameters(Leveled(), data(4)) == ["loc", "log_scale"]


def test_pairs_without_global_latents_are_sent_to_calibration():
    with pytest.raises(pv.UsageError, match=r"has no global latent; use pyro_vae\.calibration"):
        pv.global_calibration(linear_gaussian())
    with pytest.raises(pv.UsageError, match=r"use pyro_vae\.global_calibration"):
        pv.calibration(Nested(), torch.arange(4) % 2, num_simulations=100, num_draws=19)


# The command line

OWN = """
import pyro, pyro.distributions as dist, torch

class Own(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.mean, self.free = (torch.nn.Parameter(torch.zeros(2)) for _ in range(2))
        self.encoder = torch.nn.Linear(2, 1)

    def model(self, x):
        w = pyro.sample("w", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z * w[..., None, :], 1.0).to_event(1), obs=x)

    def guide(self, x):
        pyro.sample("w", dist.Normal(self.mean, self.free.exp()).to_event(1))
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(self.encoder(x), 0.5).to_event(1))
"""


def test_the_commands_serve_global_latents(tmp_path, monkeypatch, capsys):
    import numpy as np

    (tmp_path / "own_global.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    np.save("table.npy", np.random.default_rng(0).normal(size=(60, 2)).astype("float32"))
    train = "train table.npy --model own_global:Own --out run --epochs 1 --num-eval-samples 2"
    main(f"{train} --no-report".split())
    main(["encode", "run", "--model", "own_global:Own"])
    with np.load("run/codes.npz") as codes:
        n = len(codes["z_mean"])
        assert codes["z_mean"].shape == codes["z_scale"].shape == (n, 1)
        assert codes["w_mean"].shape == codes["w_scale"].shape == (2,)
        assert codes["global_latents"].tolist() == ["w"]

    def first(bench):
        study = global_studies.global_weights_study(bench)
        return study._replace(rungs=[study.rungs[0]._replace(cost=0.0)])

    monkeypatch.setattr(diagnosis, "STUDIES", [first])
    main(["diagnose", "run", "--model", "own_global:Own", "--budget", "60", "--no-report"])
    found = json.loads((tmp_path / "run" / "metrics.json").read_bytes())["diagnostics"]
    result = found["results"]["global_weights"]
    assert result["num_examples"] > n  # the training data of the run, not its test data
    assert set(result["by_unit"]) == {"w[0]", "w[1]"}
    assert "the guide of 'w'" in found["summary"]


def test_a_study_without_a_result_is_not_counted(monkeypatch):
    def fails(bench):
        return Study("global_nuts", 1, [Rung(0, lambda: 1 / 0)], lambda result, _: [])

    monkeypatch.setattr(diagnosis, "STUDIES", [fails])
    x, g = data(3)
    found = pv.diagnose(Nested(), x, g, train=(x, g), progress=False)
    assert "the guide of 'w', 'u'" in words(found, "unchecked")


# Shares of the time, and the words for the model


def test_weights_of_cheap_passes_get_enough_draws_for_a_verdict():
    """They got a tenth of the time of NUTS, and an exact guide of 90 rows was not checked."""
    batch = data(90)
    bench = Bench(Amortized(), batch, torch.arange(90), 0, "eager", 1e-3, 2e-7, 2e-7)
    bench = bench._replace(train=batch, shared=("w", "u"), local=("z",))
    weights = global_studies.global_weights_study(bench)
    chains = global_studies.global_nuts_study(bench)
    trusting = next(rung for rung in weights.rungs if rung.run.args[0] >= global_studies.ENOUGH)
    share = weights.weight / (weights.weight + chains.weight)
    seconds = 2 * trusting.cost
    assert trusting.cost < chains.rungs[1].cost
    assert share * seconds >= trusting.cost


def test_replicates_alone_do_not_charge_the_decoder(monkeypatch):
    """The noise of the model is twice that of the data, and `model_check` does not judge it."""
    torch.manual_seed(0)
    x = torch.randn(100, 6)
    found = diagnosed(monkeypatch, Means(x), (x,), model_studies.predictive_study)
    (blame,) = found.blamed
    assert "differ from the data in variance" in blame.words
    assert blame.words.startswith("the model: its likelihood, its decoder or its prior: ")
    assert blame.next.startswith("a likelihood with another spread, a larger decoder")
