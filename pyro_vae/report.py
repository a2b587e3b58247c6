"""`write_report`: the figures of a run, and one HTML file that shows them and opens anywhere."""

import base64
import csv
import html
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pyro_vae import enumeration, plots, runs
from pyro_vae.errors import UsageError
from pyro_vae.inference import interpolate, reconstruct, sample
from pyro_vae.pairs import missing_context, template

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KINDS = {"trust": "Can be trusted", "doubt": "Cannot be trusted", "next": "To try next"}
"""The kinds of findings of `pyro_vae.diagnose`, as a reader sees them."""

REASONS = {
    "does not apply": "not_applicable",
    "failed": "failed",
    "is cut short for lack of time": "left_out",
}
"""Why a diagnostic is missing or small, and where `pyro_vae.diagnose` keeps the reasons."""

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem;
       color: #222; background: #fff }
h1 { font-size: 1.5rem } h2 { font-size: 1.1rem; margin-top: 2rem }
table { border-collapse: collapse } td { padding: .15rem 1.2rem .15rem 0; vertical-align: top }
td + td { font-variant-numeric: tabular-nums } img { max-width: 100% } pre { white-space: pre-wrap }
p { color: #555 }
"""

_WORDS = {
    "curves": "The ELBO is the true bound, also where training weighed the KL otherwise.",
    "reconstructions": "Test data above, the means of their reconstructions beneath.",
    "samples": "Latents drawn from the prior, and the mean of the data given them.",
    "classes": "A row for each value of a discrete latent, a class or a cluster; the other latents "
    "are drawn.",
    "traversals": "One test datum's code, with one latent unit at a time set to values from -3 to "
    "3; the units with the greatest KL first.",
    "interpolations": "Straight lines between the codes of two test data.",
    "latent": "The posterior means of the test data.",
    "kl": "What each unit tells about the data. A unit whose KL is near zero has collapsed.",
}


_TEXT_WORDS = {
    "reconstructions": "Test data, and the likeliest text given their codes beneath.",
    "samples": "Latents drawn from the prior, and text drawn given them.",
    "interpolations": "The likeliest text on straight lines between the codes of two test data, "
    "which are the first and the last line.",
}

_TITLES = {
    "curves": "Training",
    "reconstructions": "Reconstructions",
    "samples": "Samples",
    "classes": "Samples by class",
    "traversals": "Traversals",
    "interpolations": "Interpolations",
    "latent": "Latent space",
    "kl": "KL of each latent unit",
}

_NUMBERS = {
    "num_examples": "test examples",
    "elbo": "ELBO",
    "log_likelihood": "log p(x), a lower bound by importance sampling",
    "log_likelihood_standard_error": "its Monte Carlo standard error",
    "num_samples": "importance samples for each example",
    "log_joint": "log p(x, z) at a point estimate, not a bound on log p(x)",
    "reconstruction": "reconstruction, E log p(x | z)",
    "kl": "KL",
    "bits_per_dim": "bits per dimension",
    "probe_accuracy": "accuracy of a linear probe of the codes",
    "accuracy": "accuracy of the most probable class",
    "calibration_error": "expected calibration error of its probability",
    "clustering_accuracy": "accuracy of the most probable cluster, each matched to a label",
    "mutual_information": "normalised mutual information of cluster and label",
}


def write_report(
    run: str | Path,
    pair: nn.Module,
    x: Tensor,
    *context: Tensor,
    labels: Tensor | None = None,
    seed: int = 0,
) -> Path:
    """Draw a run's figures from held-out data, and write report.html with them inside it.

    Arguments:
        run: a run folder; its config.json, history.csv and metrics.json are shown where they are.
        pair: the pair of the run.
        x, context: held-out data.
        labels: integer classes of x, for colours.

    Text, of which config.json records the vocabulary, is shown in words.
    Returns the path of report.html. Figures are also written as figures/NAME.png.
    """
    run = Path(run)
    metrics = runs.read_json(run / runs.METRICS) if (run / runs.METRICS).exists() else {}
    config = runs.read_config(run)
    vocabulary = config.get("train", {}).get("vocabulary")
    figures = {
        name: made if isinstance(made, str) else plots.png(made)
        for name, made in _figures(run, pair, x, context, labels, metrics, vocabulary, seed)
    }
    for name, made in figures.items():
        if isinstance(made, bytes):
            with runs.atomic(run / runs.FIGURES / f"{name}.png") as file:
                file.write(made)
    believed = _diagnostics(run, metrics.get("diagnostics"))
    page = _page(run.resolve().name, config, metrics, figures, believed)
    with runs.atomic(run / runs.REPORT) as file:
        file.write(page.encode())
    return run / runs.REPORT


def _figures(
    run: Path,
    pair: nn.Module,
    x: Tensor,
    context: Sequence[Tensor],
    labels: Tensor | None,
    metrics: dict[str, Any],
    vocabulary: str | None,
    seed: int,
) -> list[tuple[str, "Figure | str"]]:
    made: list[tuple[str, Figure | str]] = []
    history = _history(run / runs.HISTORY)
    if history and history["epoch"]:
        made.append(("curves", plots.curves(history)))
    if vocabulary is not None:
        return [*made, *_texts(pair, x, context, metrics, vocabulary, seed)]
    few = [part[:12] for part in context]
    made.append(("reconstructions", plots.reconstructions(pair, x[:12], few)))
    if hasattr(pair, "template"):
        shown = [] if missing_context(pair, 1) else _contexts(context, labels)
        made.append(("samples", plots.samples(pair, x, shown, seed)))
        found = enumeration.values(pair, template(pair, 2, [part[:1] for part in shown]))
        for name, values in list(found.items())[:1]:
            made.append(("classes", plots.by_value(pair, x, shown, name, values[:20], seed)))
    site, codes = plots.codes(pair, x, context)
    kl = metrics.get("kl_by_unit") or {}
    if codes.is_floating_point():
        order = torch.tensor(kl.get(site) or codes.reshape(len(codes), -1).var(0).tolist()).argsort(
            descending=True
        )
        one = [part[:1] for part in context]
        used = max(3, sum(value > 0.01 for value in kl.get(site, [])))
        units = order[: min(8, used)].tolist()
        made.append(("traversals", plots.traversals(pair, x[:1], one, units, site)))
        n = min(4, len(x) // 2)
        if n:
            ends = [part[:n] for part in context]
            lines = plots.interpolations(pair, x[:n], x[n : 2 * n], ends)
            made.append(("interpolations", lines))
        made.append(("latent", plots.latent_plane(codes.cpu(), labels, site)))
    if kl:
        made.append(("kl", plots.kl_by_unit(kl)))
    return made


def _texts(
    pair: nn.Module,
    x: Tensor,
    context: Sequence[Tensor],
    metrics: dict[str, Any],
    vocabulary: str,
    seed: int,
) -> list[tuple[str, "Figure | str"]]:
    few, half = [part[:8] for part in context], min(4, len(x) // 2)
    rows = [("data", x[:8]), ("reconstruction", reconstruct(pair, x[:8], *few))]
    drawn = sample(pair, 20, [part[:1] for part in context], seed=seed)
    ends = [part[:half] for part in context]
    between = interpolate(pair, x[:half], x[half : 2 * half], *ends, steps=7)
    made: list[tuple[str, Figure | str]] = [
        ("samples", plots.lines([("", drawn)], vocabulary)),
        ("reconstructions", plots.lines(rows, vocabulary, across=True)),
        ("interpolations", plots.lines([("", line) for line in between], vocabulary)),
    ]
    site, codes = plots.codes(pair, x, context)
    made.append(("latent", plots.latent_plane(codes.cpu(), None, site)))
    if kl := metrics.get("kl_by_unit"):
        made.append(("kl", plots.kl_by_unit(kl)))
    return made


def _contexts(context: Sequence[Tensor], labels: Tensor | None) -> list[Tensor]:
    """A row of context for each label, or a few rows of it."""
    if not context:
        return []
    if labels is None:
        return [part[:6] for part in context]
    rows = [int((labels == label).nonzero()[0]) for label in labels.unique()[:10]]
    return [part[rows] for part in context]


def _history(path: Path) -> dict[str, list[float]]:
    if not path.exists():
        return {}
    try:
        with open(path, newline="") as file:
            rows = list(csv.DictReader(file))
        return {name: [float(row[name]) for row in rows] for name in rows[0]} if rows else {}
    except (ValueError, TypeError, csv.Error) as error:
        raise UsageError(f"{path} is cut short or no table of numbers") from error


def _diagnostics(run: Path, found: dict[str, Any] | None) -> str:
    """What `diagnose` found, as a part of the page: the summary first."""
    if found is None:
        return ""
    lines = ["<h2>Whether the inference can be believed</h2>"]
    for kind, title in KINDS.items():
        words = [part["words"] for part in found["findings"] if part["kind"] == kind]
        if words:
            told = html.escape("; ".join(dict.fromkeys(words)))
            lines.append(f"<p><b>{title}:</b> {told}.</p>")
    if found.get("worst_data"):
        lines.append("<p>The data whose log p(x) is least to be trusted:</p>")
        lines.append(f"<pre>{html.escape(found['worst_data'])}</pre>")
    for name, table in found["tables"].items():
        paths = {
            picture: run / runs.FIGURES / f"{runs.DIAGNOSIS}{picture}.png"
            for picture in found["pictures"].get(name, [])
        }
        picture = "".join(
            _picture(what, path.read_bytes()) for what, path in paths.items() if path.exists()
        )
        notes = "".join(f"\nnote: {note}" for note in found["notes"].get(name, []))
        lines.append(
            f"<details{' open' if picture else ''}><summary>{html.escape(name)}</summary>"
            f"{picture}<pre>{html.escape(table + notes)}</pre></details>"
        )
    for title, reasons in REASONS.items():
        for name, why in found[reasons].items():
            lines.append(f"<p>{html.escape(f'{name} {title}: {why}')}</p>")
    return "".join(lines)


def _page(
    title: str,
    config: dict[str, Any],
    metrics: dict[str, Any],
    figures: dict[str, bytes | str],
    believed: str,
) -> str:
    numbers = "".join(
        f"<tr><td>{label}</td><td>{_number(metrics[name])}</td></tr>"
        for name, label in _NUMBERS.items()
        if metrics.get(name) is not None
    )
    for name, value in (metrics.get("active_units") or {}).items():
        numbers += f"<tr><td>active units of {html.escape(name)}</td><td>{value}</td></tr>"
    pictures = "".join(
        f"<h2>{_TITLES[name]}</h2>{_shown(name, made)}" for name, made in figures.items()
    )
    settings = html.escape(json.dumps(config, indent=2))
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}'
        f"</title><style>{_STYLE}</style></head><body><h1>{html.escape(title)}</h1>"
        f"<p>{html.escape(config['pair']['class'].rpartition(':')[2])} on "
        f"{html.escape(str(config.get('train', {}).get('data', 'data of its own')))}. "
        "Bounds, likelihoods and KL in nats per example, on test data.</p>"
        f"<table>{numbers}</table>{believed}{pictures}"
        f"<h2>configuration</h2><details><summary>config.json</summary><pre>{settings}</pre>"
        f"</details></body></html>\n"
    )


def _shown(name: str, made: bytes | str) -> str:
    if isinstance(made, str):
        return f"<p>{_TEXT_WORDS[name]}</p><pre>{html.escape(made)}</pre>"
    return f"<p>{_WORDS[name]}</p>{_picture(name, made)}"


def _picture(name: str, made: bytes) -> str:
    data = base64.b64encode(made).decode()
    return f'<img alt="{html.escape(name)}" src="data:image/png;base64,{data}">'


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else html.escape(str(value))
