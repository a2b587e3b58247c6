"""The diagnostics of a VAE on MNIST, and the effect of a richer posterior.

    python benchmarks/published.py --data-dir DIR vae-standard     # trains the pair, for hours
    python benchmarks/diagnostics.py --data-dir DIR [--run runs/published/vae-standard]

The pair is fixed. Its guide is first the trained, diagonal guide, then a full-rank normal, then an
inverse autoregressive flow. The last two start as the trained guide and are fitted to the same
decoder. For each guide the program measures importance weights of test images, the gaps, and
calibration on simulated data. For the trained guide it also runs NUTS, and estimates log p(x) by
annealing: for test images from below, and for simulated images from both sides.

Each stage writes a file into the folder. A stage whose file exists does not run again. The program
prints the table from these files, and writes pictures to --figures.
"""

import argparse
import copy
import json
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from flow_posterior import widened
from torch import nn

import pyro_vae as pv
from pyro_vae.data.split import Data
from pyro_vae.diagnostics import figures as diagnostic_figures
from pyro_vae.pairs.rng import seeded
from pyro_vae.plots import canvas

IMAGES = {"weights": 1000, "gaps": 200, "sandwich": 50, "nuts": 2}
SAMPLES = 5000
CHAINS, TEMPERATURES = 16, 300
EPOCHS = 15


def refitted(pair: pv.VAE, posterior: pv.Family, data: Data, run: Path) -> nn.Module:
    """Return the pair with a richer posterior, which starts as its diagonal posterior."""
    network = copy.deepcopy(pair.encoder.network)
    last = network.layers[-1]
    shape, wider = (last.out_features // 2,), widened(last, posterior)
    network.layers[-1], network.outputs = wider, wider.out_features
    return pv.refit_guide(
        pair,
        data.train.x,
        posterior=pv.Factor(network, posterior, shape),
        validation=data.validation.x,
        epochs=EPOCHS,
        batch_size=100,
        learning_rate=3e-4,
        learning_rate_schedule=pv.CosineSchedule(EPOCHS),
        precision="bfloat16",
        out=run,
        resume=run.exists(),
    )


def flow() -> pv.FlowPosterior:
    with seeded(0):
        return pv.FlowPosterior(40, hidden=(320,), context_dim=64)


def measured(path: Path, found: Callable[[], tuple[dict[str, Any], Any]], figures: Path) -> Any:
    """Return the result of a stage, from its file or from a run, and save its picture."""
    if not path.exists():
        began = time.perf_counter()
        numbers, picture = found()
        numbers["seconds"] = time.perf_counter() - began
        if picture is not None:
            figures.mkdir(parents=True, exist_ok=True)
            (figures / f"mnist-{path.stem}.png").write_bytes(canvas.png(picture))
        path.write_text(json.dumps(numbers, indent=2) + "\n")
    return json.loads(path.read_text())


def weights(pair: nn.Module, x: torch.Tensor) -> tuple[dict[str, Any], Any]:
    result = pv.log_likelihood(pair, x, num_samples=SAMPLES, progress=True)
    print(result)
    return result.as_dict(), diagnostic_figures.reliability(result, x)


def annealed(pair: nn.Module, x: torch.Tensor, path: Path) -> Any:
    """log p(x) by annealing from the trained guide; all guides share the model and this value."""
    if not path.exists():
        found = pv.anneal(pair, x, num_chains=CHAINS, num_temperatures=TEMPERATURES)
        weighed = pv.log_likelihood(pair, x, num_samples=SAMPLES)
        print(found, f"by importance weights {weighed.value:.3f}", sep="\n")
        torch.save(found.per_datum, path)
        torch.save(found.standard_errors, path.with_suffix(".errors.pt"))
    errors = torch.load(path.with_suffix(".errors.pt"), weights_only=True)
    return SimpleNamespace(per_datum=torch.load(path, weights_only=True), standard_errors=errors)


def gaps(pair: nn.Module, x: torch.Tensor, best: Any) -> tuple[dict[str, Any], Any]:
    result = pv.gaps(pair, x, num_samples=1000, log_likelihood=best)
    print(result)
    return result.as_dict(), diagnostic_figures.gap_bars(result)


def calibration(pair: nn.Module) -> tuple[dict[str, Any], Any]:
    result = pv.calibration(pair)
    print(result)
    coverage = result.coverage[:-2].mean(0).tolist()  # of the units, without the densities
    more = {"mean_coverage_of_units": coverage}
    return result.as_dict() | more, diagnostic_figures.calibration_bands(result)


def sandwich(pair: nn.Module) -> tuple[dict[str, Any], Any]:
    result = pv.sandwich(
        pair,
        num_examples=IMAGES["sandwich"],
        num_chains=CHAINS,
        num_temperatures=TEMPERATURES,
    )
    print(result)
    return result.as_dict(), None


def nuts(pair: nn.Module, x: torch.Tensor) -> tuple[dict[str, Any], Any]:
    result = pv.nuts(pair, x)
    print(result)
    return result.as_dict(), diagnostic_figures.posteriors(result)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--run", type=Path, default=Path("runs/published/vae-standard"))
    parser.add_argument("--out", type=Path, default=Path("runs/diagnostics"))
    parser.add_argument("--figures", type=Path, default=Path("docs/figures"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    data, pair = pv.load_data("mnist", options.data_dir), pv.load(options.run)
    x = data.test.x
    families = {"full-rank": pv.FullRankNormal, "flow": flow}
    pairs: dict[str, Callable[[], nn.Module]] = {"diagonal": lambda: pair} | {
        name: lambda name=name, make=make: refitted(pair, make(), data, options.out / name)
        for name, make in families.items()
    }
    few = x[: IMAGES["gaps"]]
    best = annealed(pair, few, options.out / "annealed.pt")
    for name, make in pairs.items():
        guided = make()
        for stage, found in {
            "weights": lambda p: weights(p, x[: IMAGES["weights"]]),
            "gaps": lambda p: gaps(p, few, best),
            "calibration": calibration,
        }.items():
            path = options.out / f"{stage}-{name}.json"
            print(path.stem, measured(path, lambda f=found, p=guided: f(p), options.figures))
    once = {"sandwich": sandwich, "nuts": lambda p: nuts(p, x[: IMAGES["nuts"]])}
    for stage, found in once.items():
        path = options.out / f"{stage}.json"
        print(path.stem, measured(path, lambda f=found: f(pair), options.figures))


if __name__ == "__main__":
    main()
