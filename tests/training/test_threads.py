"""Threads: each call gives the same result as alone, and leaves nothing in the process."""

import inspect
import multiprocessing
import os
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import pyro
import pytest
import torch
from pairs import ALL, make, rows
from pyro.poutine.messenger import Messenger
from torch.utils.data import DataLoader, Dataset

import pyro_vae as pv
from pyro_vae.diagnostics import global_calibration
from pyro_vae.pairs import rng, threads
from pyro_vae.pairs.threads import alone

SMALL = {"epochs": 2, "batch_size": 8, "engine": "eager", "progress": False}
DRAWN = {"likelihood": pv.Gaussian(0.5)}


def made(seed=0, **parts):
    with rng.seeded(seed):
        return pv.VAE.mlp((6,), 2, (8,), **{**DRAWN, **parts}), torch.rand(24, 6)


def same(one, other):
    """Whether two results are equal to the last bit."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one.nan_to_num(7.0), other.nan_to_num(7.0))
    if isinstance(one, torch.nn.Module):
        return same(one.state_dict(), other.state_dict())
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[k], other[k]) for k in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    if hasattr(one, "__dict__"):
        return same(vars(one), vars(other))
    return one == other or one != one


def holes(x):
    return torch.where(x < 0.3, torch.nan, x)


def fitted(pair, x, **settings):
    """The history of a fit without its seconds, and the final parameters."""
    history = pv.fit(pair, x, **{**SMALL, **settings})
    rows = [{k: v for k, v in e.row().items() if "second" not in k} for e in history.epochs]
    return rows, {k: v.clone() for k, v in pair.state_dict().items()}


@contextmanager
def others(work, number=1):
    """Other threads that repeat this call; their first error is raised here."""
    stop, began, errors = threading.Event(), threading.Barrier(number + 1), []

    def loop():
        began.wait()
        try:
            while not stop.is_set():
                work()
        except BaseException as error:
            errors.append(error)

    running = [threading.Thread(target=loop, daemon=True) for _ in range(number)]
    for thread in running:
        thread.start()
    began.wait()
    try:
        yield
    finally:
        stop.set()
        for thread in running:
            thread.join(60)
    assert not errors, errors[0]
    assert not any(thread.is_alive() for thread in running)


def disturb():
    """What another thread may do to the generators of the process."""
    with alone():
        torch.manual_seed(5)
        random.seed(5)
        np.random.seed(5)


def process_state():
    """The state of the process that a call could change."""
    return {
        "torch": torch.get_rng_state(),
        "numpy": np.random.get_state()[1].tolist(),
        "python": random.getstate(),
        "store": sorted(pyro.get_param_store().keys()),
        "pyro": pyro.infer.util.is_validation_enabled(),
        "distributions": torch.distributions.Distribution._validate_args,
        "handlers": list(pyro.poutine.runtime._PYRO_STACK),
    }


def test_eight_threads_use_pairs_while_a_ninth_trains():
    vae, x = made()
    trained, start = made(1)[0], made(1)[0]
    jobs = {
        "sample": lambda: pv.sample(vae, 20, seed=3),
        "encode": lambda: pv.encode(vae, x, what="draw"),
        "reconstruct": lambda: pv.reconstruct(vae, x, means=False),
        "evaluate": lambda: pv.evaluate(vae, x, num_samples=20),
    }
    want = {name: job() for name, job in jobs.items()}
    want_fit = fitted(start, x, epochs=5)
    pyro.get_param_store()["mine"] = torch.ones(())
    try:
        before = process_state()
        with ThreadPoolExecutor(9) as pool:
            fit = pool.submit(fitted, trained, x, epochs=5)
            found = [(name, pool.submit(jobs[name])) for name in list(jobs) * 12]
            for name, one in found:
                assert same(want[name], one.result(60)), name
            assert same(want_fit, fit.result(60))
        assert same(before, process_state())
    finally:
        pyro.clear_param_store()


def test_two_fits_in_two_threads_are_two_fits():
    settings = [{"seed": 1, "epochs": 4}, {"seed": 2, "epochs": 6, "engine": "traced"}]
    want = [fitted(*made(s["seed"]), **s) for s in settings]
    with ThreadPoolExecutor(2) as pool:
        jobs = [pool.submit(fitted, *made(s["seed"]), **s) for s in settings]
        assert same(want, [job.result(120) for job in jobs])


@pytest.mark.sample(2)
@pytest.mark.parametrize("name", ALL)
def test_a_fit_that_gives_way_is_the_same_fit(name):
    def run():
        with rng.seeded(0):
            pair = make(name)
        x, *context = rows(name, 16)
        history = pv.fit(pair, x, *context, **{**SMALL, "engine": "auto"})
        return history["elbo"], pair

    want = run()
    with others(disturb):
        found = run()
    assert same(want, found)


def test_a_loader_draws_the_same_rows_where_the_fit_gives_way():
    x = made()[1]

    class Noisy(Dataset):
        def __len__(self):
            return len(x)

        def __getitem__(self, i):
            noise = np.random.rand() + random.random() + torch.rand(()).item()
            return x[i] + noise

    def run():
        return fitted(made()[0], DataLoader(Noisy(), batch_size=8, shuffle=True))

    want = run()
    with others(disturb):
        assert same(want, run())


def test_a_sample_does_not_wait_for_the_end_of_a_fit():
    vae, x = made()
    want = pv.sample(vae, 5, seed=0)
    trains, sampled = threading.Event(), threading.Event()

    class Enough(Exception):
        pass

    def rate(epoch):
        trains.set()
        if sampled.is_set():
            raise Enough
        return 1.0

    with ThreadPoolExecutor(1) as pool:
        job = pool.submit(
            pv.fit, made(1)[0], x, learning_rate_schedule=rate, **{**SMALL, "epochs": 100_000}
        )
        assert trains.wait(60)
        assert same(want, pv.sample(vae, 5, seed=0))
        sampled.set()
        assert isinstance(job.exception(60), Enough)


@pytest.mark.thorough
def test_the_pair_in_training_may_be_used_and_each_call_sees_one_state_of_it():
    vae, x = made()
    steps, seen = [0], []

    def rate(epoch):
        steps[0] += 1
        return 1.0

    class Slow(Dataset):
        def __len__(self):
            return len(x)

        def __getitem__(self, i):
            seen.append(steps[0])
            return x[i]

    def use():
        seen.clear()
        assert pv.evaluate(vae, Slow(), num_samples=5).elbo < 0
        assert len(seen) > 2 * len(x), "the data are read more than once"
        assert len(set(seen)) == 1
        met.append(seen[0])

    met = []
    settings = {"epochs": 20, "learning_rate": 0.05, "learning_rate_schedule": rate}
    want = fitted(made()[0], x, **settings)
    steps[0] = 0
    with others(use):
        assert same(want, fitted(vae, x, **settings))
    assert len(set(met)) > 3, met


def test_pairs_may_share_parts_that_hold_no_tensors():
    x = made()[1]

    def pairs():
        drops = torch.nn.Dropout(0.5)
        for seed in (0, 1):
            pair, _ = made(seed)
            pair.encoder.network = torch.nn.Sequential(pair.encoder.network, drops)
            yield pair

    settings = [{"epochs": 3}, {"epochs": 30}]
    want = [fitted(pair, x, **s) for pair, s in zip(pairs(), settings, strict=True)]
    with ThreadPoolExecutor(2) as pool:
        jobs = [pool.submit(fitted, p, x, **s) for p, s in zip(pairs(), settings, strict=True)]
        assert same(want, [job.result(60) for job in jobs])


@pytest.mark.thorough
def test_one_pair_is_not_fitted_by_two_threads_at_once(tmp_path):
    vae, x = made()
    trains, over = threading.Event(), threading.Event()

    def rate(epoch):
        trains.set()
        return 0.0 if over.is_set() else 1.0

    class Wrapped(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.pair = vae
            self.model, self.guide = vae.model, vae.guide

    with ThreadPoolExecutor(1) as pool:
        job = pool.submit(pv.fit, vae, x, learning_rate_schedule=rate, **{**SMALL, "epochs": 400})
        assert trains.wait(60)
        for pair in (vae, Wrapped()):
            with pytest.raises(pv.UsageError, match=r"another thread is fitting this"):
                pv.fit(pair, x, out=tmp_path / "run", **SMALL)
        assert not (tmp_path / "run").exists()
        over.set()
        job.result(120)
    pv.fit(vae, x, **SMALL)


def test_two_guides_are_fitted_to_one_model_in_two_threads():
    vae, x = made()
    before = {k: v.clone() for k, v in vae.state_dict().items()}
    want = refitted(vae, x)
    with ThreadPoolExecutor(2) as pool:
        found = [pool.submit(refitted, vae, x) for _ in range(2)]
        assert all(same(want, job.result(60)) for job in found)
    assert same(before, vae.state_dict())
    assert all(parameter.requires_grad for parameter in vae.parameters())


def test_an_error_in_one_thread_lets_the_others_go_on():
    vae, x = made()
    before = process_state()

    def wrong():
        with pytest.raises(pv.UsageError):
            pv.encode(vae, x[:, :3])
        with pytest.raises(pv.UsageError):
            pv.fit(made(1)[0], x, **{**SMALL, "learning_rate": 1e30, "epochs": 50})

    want = pv.sample(vae, 5, seed=0)
    with ThreadPoolExecutor(4) as pool:
        jobs = [pool.submit(wrong) for _ in range(8)]
        assert all(
            same(want, job.result(60))
            for job in [pool.submit(pv.sample, vae, 5, seed=0) for _ in range(40)]
        )
        for job in jobs:
            job.result(60)
    assert same(before, process_state())
    assert threads._turns.owner is None
    assert not threads._turns.waiting


def test_the_lock_is_fair_and_reentrant():
    order, queued = [], []
    with alone(), alone():
        for i in range(5):
            thread = threading.Thread(target=lambda i=i: _note(order, i))
            thread.start()
            queued.append(thread)
            while len(threads._turns.waiting) <= i:
                pass
        assert threads.waited_for()
        assert order == []
    for thread in queued:
        thread.join(10)
    assert order == list(range(5))
    assert not threads.waited_for()


def _note(order, i):
    with alone():
        order.append(i)


# Forks. ---------------------------------------------------------------------------------------


def in_a_child(work):
    """The result of a forked process, as text, or its error."""
    receiver, sender = multiprocessing.get_context("fork").Pipe(False)

    def run():
        try:
            sender.send(str(work()))
        except BaseException as error:
            sender.send(f"{type(error).__name__}: {error}")

    child = multiprocessing.get_context("fork").Process(target=run)
    child.start()
    answer = receiver.recv() if receiver.poll(60) else "no answer"
    child.join(10)
    if child.is_alive():
        child.kill()
    return answer


forks = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork"),
    pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning"),
]


class Encoded(Dataset):
    """Codes that a worker, a forked process, computes when it reads the rows."""

    def __init__(self, pair, x):
        self.pair, self.x = pair, x

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return pv.encode(self.pair, self.x[i : i + 1])["z"][0]


class TestForks:
    pytestmark = forks

    def test_a_child_of_a_fit_in_another_thread_runs_pairs(self):
        vae, x = made()
        want = str(pv.sample(vae, 3, seed=0))
        trained = made(1)[0]
        with others(lambda: fitted(trained, x, epochs=3)):
            assert in_a_child(lambda: pv.sample(vae, 3, seed=0)) == want

    def test_a_child_of_a_thread_that_does_not_give_way_raises_an_error(self, monkeypatch):
        monkeypatch.setattr(threads, "FORK_SECONDS", 0.1)
        vae, _ = made()
        want = str(pv.sample(vae, 3, seed=0))
        held, done = threading.Event(), threading.Event()

        def hold():
            with alone():
                held.set()
                done.wait(60)

        thread = threading.Thread(target=hold)
        thread.start()
        assert held.wait(10)
        answer = in_a_child(lambda: pv.sample(vae, 3, seed=0))
        done.set()
        thread.join(10)
        assert answer.startswith("UsageError: this process was forked while another thread")
        assert in_a_child(lambda: pv.sample(vae, 3, seed=0)) == want

    def test_a_child_of_the_thread_that_runs_a_pair_is_free(self):
        vae, _ = made()
        want = str(pv.sample(vae, 3, seed=0))

        def in_a_thread():
            with ThreadPoolExecutor(1) as pool:
                return pool.submit(pv.sample, vae, 3, seed=0).result(30)

        with alone():
            assert in_a_child(lambda: pv.sample(vae, 3, seed=0)) == want
            assert in_a_child(in_a_thread) == want

    @pytest.mark.thorough
    def test_workers_of_a_loader_run_pairs_while_other_threads_do(self):
        vae, x = made()
        codes = torch.cat([pv.encode(vae, x[i : i + 1])["z"] for i in range(len(x))])
        second = pv.VAE.mlp((2,), 1, (4,), **DRAWN)
        kept = {k: v.clone() for k, v in second.state_dict().items()}
        want = fitted(second, DataLoader(Encoded(vae, x), batch_size=8))
        second.load_state_dict(kept)
        with others(lambda: pv.sample(vae, 5, seed=0), 2):
            loader = DataLoader(Encoded(vae, x), batch_size=8, num_workers=2)
            assert torch.equal(torch.cat(list(loader)), codes)
            assert same(want[1], fitted(second, loader)[1])


# Every public function. -----------------------------------------------------------------------

NO_PAIR = {"as_text", "as_tokens", "bounds_table", "data_plate_at", "disentanglement_scores"}
NO_PAIR |= {"hide_labels", "load_data", "one_hot", "read_table", "by_group", "join_processes"}
QUIET = {"progress": False}
EAGER = QUIET | {"engine": "eager"}
CALLS = {
    "anneal": lambda p, x, out: pv.anneal(p, x, num_temperatures=3, num_chains=2, **QUIET),
    "calibration": lambda p, x, out: pv.calibration(p, num_simulations=100, num_draws=19, **QUIET),
    "check": lambda p, x, out: pv.check(p, x),
    "class_gap": lambda p, x, out: pv.class_gap(*classes(x), num_samples=3),
    "decode": lambda p, x, out: pv.decode(p, {"z": x[:, :2]}, means=False),
    "diagnose": lambda p, x, out: pv.diagnose(p, x, budget=1e-3, **QUIET).summary.count(":"),
    "encode": lambda p, x, out: pv.encode(p, x, what="draw"),
    "export": lambda p, x, out: [p.name for p in pv.export(p, x, folder=out, formats=["torch"])],
    "evaluate": lambda p, x, out: pv.evaluate(p, x, num_samples=5),
    "fit": lambda p, x, out: fitted(p, x, out=out),
    "gaps": lambda p, x, out: pv.gaps(p, x, num_samples=21, steps=2, **EAGER),
    "global_calibration": lambda p, x, out: calibrated(p),
    "global_weights": lambda p, x, out: pv.global_weights(
        pv.BayesianDecoder(p), x, num_draws=21, num_samples=2, **QUIET
    ),
    "impute": lambda p, x, out: pv.impute(made(likelihood=pv.Missing(pv.Gaussian))[0], holes(x)),
    "interpolate": lambda p, x, out: pv.interpolate(p, x[:2], x[2:4], steps=3),
    "kl_parts": lambda p, x, out: pv.kl_parts(p, x),
    "load": lambda p, x, out: pv.load(pv.save(p, out)),
    "local_c2st": lambda p, x, out: pv.local_c2st(
        p, x, num_simulations=100, num_draws=2, num_null=19, **QUIET
    ),
    "model_check": lambda p, x, out: pv.model_check(
        p, x.repeat(50, 1)[:60] + torch.arange(60)[:, None] / 100, num_samples=21, **QUIET
    ),
    "local_calibration": lambda p, x, out: pv.local_calibration(p, x, num_samples=21, **QUIET),
    "log_likelihood": lambda p, x, out: pv.log_likelihood(p, x, num_samples=5),
    "loo_pit": lambda p, x, out: pv.loo_pit(p, x, num_samples=21, **QUIET),
    "nuts": lambda p, x, out: pv.nuts(p, x[:2], num_draws=4, warmup=4, num_chains=2, **EAGER).draws,
    "outlier_scores": lambda p, x, out: pv.outlier_scores(p, x, num_samples=5, steps=2, **EAGER),
    "posterior": lambda p, x, out: pv.posterior(p, x, draws=2, **QUIET),
    "power_scaling": lambda p, x, out: pv.power_scaling(p, x, num_samples=21, **QUIET),
    "predict": lambda p, x, out: pv.predict(*clusters()),
    "predictive_check": lambda p, x, out: pv.predictive_check(p, x, num_replicates=20, **QUIET),
    "reconstruct": lambda p, x, out: pv.reconstruct(p, x, means=False),
    "refine": lambda p, x, out: pv.refine(p, x, steps=2, num_samples=5, **EAGER).gain,
    "refit_guide": lambda p, x, out: refitted(p, x),
    "sample": lambda p, x, out: pv.sample(p, 5, seed=0),
    "sandwich": lambda p, x, out: (
        pv.sandwich(p, num_examples=4, num_temperatures=3, num_chains=2, **EAGER).gap
    ),
    "save": lambda p, x, out: pv.save(p, out) and None,
    "score": lambda p, x, out: pv.score(p, x, num_samples=21),
    "tarp": lambda p, x, out: pv.tarp(p, num_simulations=100, num_draws=19).ranks,
    "to_arviz": lambda p, x, out: torch.from_numpy(
        pv.to_arviz(p, x, num_samples=4, num_particles=3, **QUIET).posterior["z"].values
    ),
    "traverse": lambda p, x, out: pv.traverse(p, x[:1]),
    "uncertainty": lambda p, x, out: pv.uncertainty(
        pv.BayesianDecoder(p), x, num_weights=2, num_samples=2, **QUIET
    ),
    "write_report": lambda p, x, out: pv.write_report(p, x, run=pv.save(p, out)).name,
}


def clusters():
    with rng.seeded(0):
        return pv.MixtureVAE.mlp((6,), 3, latent_dim=2, hidden=(8,), **DRAWN), torch.rand(8, 6)


def classes(x):
    """A pair that enumerates a class, with some labels."""
    with rng.seeded(0):
        pair = pv.SemiSupervisedVAE.mlp((6,), 3, latent_dim=2, hidden=(8,))
    return pair, x.round(), torch.arange(len(x)) % 4 - 1


def calibrated(pair):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(global_calibration, "LEAST_SIMULATIONS", 1)
        small = {"num_simulations": 1, "num_draws": 19, "num_examples": 4, "epochs": 1}
        return pv.global_calibration(pv.BayesianDecoder(pair), batch_size=4, **small, **QUIET).ranks


def refitted(pair, x):
    with alone():  # the first weights of the new guide
        torch.manual_seed(3)
        return pv.refit_guide(pair, x, posterior=pv.FullRankNormal, **SMALL)


def test_every_public_function_is_called_here():
    functions = {name for name in pv.__all__ if inspect.isfunction(getattr(pv, name))}
    assert functions == set(CALLS) | NO_PAIR | {"selftest"}


@pytest.fixture
def watched(monkeypatch):
    """The names of handlers that threads without the lock enter."""
    enter, loose = Messenger.__enter__, []

    def watch(self):
        if threads._turns.owner != threading.get_ident():
            loose.append(type(self).__name__)
        return enter(self)

    monkeypatch.setattr(Messenger, "__enter__", watch)
    return loose


@pytest.mark.sample(8)
@pytest.mark.parametrize("name", CALLS)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_public_function_gives_the_same_beside_other_threads(name, tmp_path, watched):
    def call(folder):
        pair, x = made()
        return CALLS[name](pair, x, tmp_path / folder)

    want, other = call("alone"), made(1)[0]
    before = process_state()
    with others(lambda: pv.sample(other, 3, seed=1)), others(disturb):
        found = call("beside")
    assert same(want, found)
    after = process_state()
    for generator in ("torch", "numpy", "python"):  # the other threads seed them
        del before[generator], after[generator]
    assert before == after
    assert watched == []


def test_the_self_test_waits_for_other_threads(monkeypatch):
    owned = []

    def group():
        owned.append(threads._turns.owner == threading.get_ident())
        return []

    monkeypatch.setattr("pyro_vae.diagnostics.selftest.CHECKS", {"one": group, "another": group})
    with ThreadPoolExecutor(1) as pool:
        with alone():
            job = pool.submit(pv.selftest, progress=False)
            while not threads.waited_for():
                pass
            assert owned == []
        job.result(60)
    assert owned == [True, True]
