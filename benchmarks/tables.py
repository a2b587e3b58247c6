"""Tables: densities, and imputations, beside the methods that people use today.

    python benchmarks/tables.py [density mcar mnar distribution] [--seeds 5] [--epochs-scale 1]

density       `pyro-vae train FILE.csv` without options, on wine, diabetes, breast cancer, iris and
              penguins. It prints log p(x) of the held-out rows, and that of a Gaussian with full
              covariance that is fitted to the training rows. Categories of the Gaussian's table are
              independent, with their frequencies.
mcar          Half of the entries of the standardized breast-cancer table are removed completely at
              random, as in MIWAE (Mattei & Frellsen, 2019). It prints the mean squared error of the
              imputed entries, beside those of scikit-learn's imputers.
mnar          In the first half of the columns, the values above the mean are removed, as in
              not-MIWAE (Ipsen, Mattei & Frellsen, 2021). It prints the root mean squared error.
distribution  30 % of the numbers are removed at random (and those of penguins also have their own
              holes). It prints the energy score of 19 draws in standard units (lower is better) and
              how often the truth is between the smallest and the largest of them, which is 90 % for
              exact draws, beside ``IterativeImputer(sample_posterior=True)``. The guide is
              refined for each row.

The results of each seed are kept in ``--out``, and a later call does not run this seed again.
"""

import argparse
import json
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from sklearn import datasets
from sklearn.ensemble import RandomForestRegressor
from sklearn.experimental import enable_iterative_imputer  # noqa: F401
from sklearn.impute import IterativeImputer, KNNImputer, SimpleImputer
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae.cli.main import main as command

DRAWS = 19  # the smallest and the largest of 19 draws contain the truth with probability 18/20


def frames() -> Iterator[tuple[str, pd.DataFrame]]:
    for name in ("wine", "diabetes", "breast_cancer", "iris"):
        options = {"scaled": False} if name == "diabetes" else {}
        yield name, getattr(datasets, f"load_{name}")(as_frame=True, **options).data
    import palmerpenguins

    yield "penguins", palmerpenguins.load_penguins()


def gaussian(data: Any) -> float:
    """log p(x) of the test rows under a full-covariance Gaussian and frequencies of categories."""
    columns = data.table.schema.data
    numeric = [j for j, column in enumerate(columns) if not column.coded]
    train, test = data.train.x[:, numeric], data.test.x[:, numeric]
    whole = train[~train.isnan().any(1)]
    loc, covariance = whole.mean(0), whole.T.cov(correction=0)
    total = torch.zeros(len(test), dtype=torch.double)
    for i, row in enumerate(test):
        seen = ~row.isnan()
        if bool(seen.any()):
            part = torch.distributions.MultivariateNormal(loc[seen], covariance[seen][:, seen])
            total[i] = part.log_prob(row[seen])
    for j, column in enumerate(columns):
        if column.coded:
            codes = data.train.x[:, j]
            shares = torch.bincount(codes[~codes.isnan()].long(), minlength=len(column.categories))
            logs = (shares / shares.sum()).log()
            known = ~data.test.x[:, j].isnan()
            total[known] += logs[data.test.x[known, j].long()]
    return total.mean().item()


def density(folder: Path) -> dict[str, dict[str, float]]:
    found = {}
    for name, frame in frames():
        path = folder / f"{name}.csv"
        frame.to_csv(path, index=False)
        began, worked = time.perf_counter(), time.process_time()
        command(["train", str(path), "--out", str(folder / name)])
        seconds, worked = time.perf_counter() - began, time.process_time() - worked
        ours = json.loads((folder / name / "metrics.json").read_text())["log_likelihood"]
        found[name] = {
            "pair": ours,
            "gaussian": gaussian(pv.load_data(path)),
            "seconds": seconds,
            "processor seconds": worked,
        }
        print("density", name, found[name], flush=True)
    return found


def standardized() -> Tensor:
    x = datasets.load_breast_cancer().data
    return torch.from_numpy((x - x.mean(0)) / x.std(0))


def removed_at_random(x: Tensor, share: float, seed: int) -> Tensor:
    state, mask = np.random.RandomState(seed), np.zeros(x.numel(), bool)
    mask[state.choice(x.numel(), int(share * x.numel()), replace=False)] = True
    return torch.from_numpy(mask.reshape(x.shape))


def baselines(x: Tensor, removed: Tensor, seed: int) -> dict[str, float]:
    """Mean squared errors of scikit-learn's imputers."""
    holes = torch.where(removed, torch.nan, x).numpy()
    forest = RandomForestRegressor(100, max_features="sqrt", n_jobs=1, random_state=seed)
    imputers = {
        "mean": SimpleImputer(),
        "knn": KNNImputer(n_neighbors=10),
        "iterative": IterativeImputer(max_iter=20, random_state=seed),
        "random forest": IterativeImputer(forest, max_iter=5, random_state=seed),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {
            name: float(((one.fit_transform(holes) - x.numpy())[removed.numpy()] ** 2).mean())
            for name, one in imputers.items()
        }


def mcar(seed: int, scale: float) -> dict[str, float]:
    x = standardized()
    removed = removed_at_random(x, 0.5, 1234 + seed)
    holes = torch.where(removed, torch.nan, x)
    likelihood = pv.Columns(["continuous"] * 30, [0] * 30).standardize(holes)
    torch.manual_seed(seed)
    pair = pv.VAE.mlp((30,), latent_dim=10, hidden=(128, 128), likelihood=likelihood)
    pv.fit(
        pair,
        holes,
        objective=pv.ImportanceWeightedELBO(20),
        epochs=max(2, int(1001 * scale)),
        batch_size=32,
        learning_rate=2e-4,
        seed=seed,
        engine="traced",
        progress=False,
    )
    made = pv.impute(pair, holes, draws=1, num_samples=5000)
    errors = {"pair": float((made.mean - x)[removed].square().mean())}
    return errors | baselines(x, removed, seed)


def mnar(seed: int, scale: float) -> dict[str, float]:
    x = standardized()
    removed = torch.zeros_like(x, dtype=torch.bool)
    removed[:, :15] = x[:, :15] > 0
    holes = torch.where(removed, torch.nan, x)
    torch.manual_seed(seed)
    family = pv.Missing(pv.Gaussian(1.0, learned=True))
    usual = pv.VAE.mlp((30,), 29, (128, 128), family, activation=nn.Tanh)
    linear = pv.Factor(pv.MLP(29, (), 30), family, (30,))
    pair = pv.NotAtRandomVAE(pv.VAE(usual.encoder, linear, usual.prior), known_sign=True)
    pv.fit(
        pair,
        holes,
        objective=pv.ImportanceWeightedELBO(20),
        epochs=max(2, int(300 * scale)),
        batch_size=16,
        seed=seed,
        engine="traced",
        progress=False,
    )
    made = pv.impute(pair, holes, draws=1, num_samples=5000)
    errors = {"pair": float((made.mean - x)[removed].square().mean())}
    if seed == 0:  # the mask is the same for each seed
        errors |= baselines(x, removed, seed)
    return {name: error**0.5 for name, error in errors.items()}


def energy(draws: Tensor, truth: Tensor, removed: Tensor) -> float:
    """The mean over rows of E|X - y| - E|X - X'| / 2, over the removed entries of a row."""
    rows = removed.any(1)
    draws, truth = (draws * removed)[:, rows], (truth * removed)[rows]
    apart = (draws - truth).norm(dim=-1).mean(0)
    m = len(draws)
    between = (draws[:, None] - draws[None]).norm(dim=-1).sum((0, 1)) / (m * (m - 1))
    return float((apart - between / 2).mean())


def coverage(draws: Tensor, truth: Tensor, removed: Tensor) -> float:
    inside = (draws.amin(0) <= truth) & (truth <= draws.amax(0))
    return float(inside[removed].double().mean())


def distribution(seed: int, scale: float) -> dict[str, dict[str, float]]:
    return {
        name: scores(pv.read_table(frame), seed, scale)
        for name, frame in frames()
        if name != "iris"
    }


def scores(table: pv.Table, seed: int, scale: float) -> dict[str, float]:
    """Energy score and coverage of the pair and of the iterative imputer."""
    numeric = torch.tensor([not column.coded for column in table.schema.data])
    center = table.x.nanmean(0)
    spread = (table.x - center).square().nanmean(0).sqrt()
    removed = removed_at_random(table.x, 0.3, seed) & numeric & ~table.x.isnan()
    holes = torch.where(removed, torch.nan, table.x)
    kept = ~holes.isnan().all(1)
    truth = ((table.x - center) / spread)[kept].nan_to_num(0.0)
    found = {}
    for who, draws in (
        ("pair", imputed(table.schema, holes[kept], seed, scale)),
        ("iterative", iterative(holes[kept], seed)),
    ):
        units = (draws - center) / spread
        found[f"{who} energy"] = energy(units, truth, removed[kept])
        found[f"{who} coverage"] = coverage(units, truth, removed[kept])
    return found


def imputed(schema: pv.Schema, holes: Tensor, seed: int, scale: float) -> Tensor:
    """Draws (19, n, columns) of a pair with the defaults; a tenth of the rows validate."""
    order = torch.randperm(len(holes), generator=torch.Generator().manual_seed(seed))
    held, train = holes[order[: len(order) // 10]], holes[order[len(order) // 10 :]]
    torch.manual_seed(seed)
    pair = pv.VAE.mlp((holes.shape[1],), 8, (64,), schema.likelihood(train), activation=nn.SiLU)
    pv.fit(
        pair,
        train,
        validation=held,
        objective=pv.ImportanceWeightedELBO(20),
        epochs=max(2, int(400 * scale)),
        batch_size=32,
        seed=seed,
        engine="traced",
        progress=False,
    )
    found = pv.impute(pair, holes, method="refine", draws=DRAWS, num_samples=5000, seed=seed)
    return found.draws


def iterative(holes: Tensor, seed: int) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        draws = [
            IterativeImputer(sample_posterior=True, random_state=100 * seed + k).fit_transform(
                holes
            )
            for k in range(DRAWS)
        ]
    return torch.from_numpy(np.stack(draws))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parts = ("density", "mcar", "mnar", "distribution")
    parser.add_argument("parts", nargs="*", default=parts, choices=parts)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs-scale", type=float, default=1.0)
    parser.add_argument("--out", type=Path, default=Path("runs/tables"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    if "density" in options.parts:
        keep(options.out / "density.json", lambda: density(Path(tempfile.mkdtemp())))
    by_seed: dict[str, Callable[[int, float], object]] = {
        "mcar": mcar,
        "mnar": mnar,
        "distribution": distribution,
    }
    for seed in range(options.seeds):
        for name in [name for name in by_seed if name in options.parts]:
            run = partial(by_seed[name], seed, options.epochs_scale)
            keep(options.out / f"{name}-{seed}.json", run)


def keep(path: Path, run: Callable[[], object]) -> None:
    """Print what ``run`` returns and write it, or print what an earlier call has written."""
    if not path.exists():
        path.write_text(json.dumps(run(), indent=2) + "\n")
    print(path.name, path.read_text(), flush=True)


if __name__ == "__main__":
    main()
