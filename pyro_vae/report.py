"""`write_report`: the figures of a run, and one HTML file that shows them and opens anywhere."""

import base64
import csv
import html
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pyro_vae import enumeration, plots, runs
from pyro_vae.errors import UsageError, first_line
from pyro_vae.inference import interpolate, reconstruct, sample
from pyro_vae.pairs import missing_context, template
from pyro_vae.threads import alone

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
    "rows_trained_on": "test examples that equal rows of training or validation",
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


@alone()
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
    config, model = runs.read_config(run), runs.fingerprint(pair)
    metrics, remarks = _current(runs.read_metrics(run), model)
    with _well_formed(run):
        vocabulary = (config.get("train") or {}).get("vocabulary")
        believed = _diagnostics(run, metrics.get("diagnostics"))
    figures = {
        name: made if isinstance(made, str) else plots.png(made)
        for name, made in _figures(run, pair, x, context, labels, metrics, vocabulary, seed)
    }
    for name, made in figures.items():
        if isinstance(made, bytes):
            with runs.atomic(run / runs.FIGURES / f"{name}.png") as file:
                file.write(made)
    with _well_formed(run):
        page = _page(run.resolve().name, config, metrics, remarks, model, figures, believed)
    with runs.atomic(run / runs.REPORT) as file:
        file.write(page.encode(errors="xmlcharrefreplace"))
    return run / runs.REPORT


@contextmanager
def _well_formed(run: Path) -> Iterator[None]:
    """Say in one line that a file has another form than it is written in."""
    try:
        yield
    except (KeyError, TypeError, AttributeError) as error:
        raise UsageError(
            f"{run / runs.METRICS} or {runs.CONFIG} is not what pyro_vae writes: "
            f"{type(error).__name__}: {first_line(error)}"
        ) from error


def _current(metrics: dict[str, Any], model: str) -> tuple[dict[str, Any], list[str]]:
    """What was measured on these weights, and what is to be said of the rest."""
    found = metrics.get("diagnostics")
    numbers = {name: value for name, value in metrics.items() if name != "diagnostics"}
    kept: dict[str, Any] = {}
    remarks: list[str] = []
    for what, part, command in (
        ("Numbers", numbers, "evaluate"),
        ("Findings of diagnose", {} if found is None else found, "diagnose"),
    ):
        of = part.get("model")
        if of not in (None, model):
            remarks.append(
                f"{what} in metrics.json are of other weights (model {of[:12]}) and are not shown: "
                f"run pyro-vae {command} again."
            )
            continue
        if part and of is None:
            remarks.append(f"{what} do not say on which weights they were measured.")
        kept |= part if part is numbers else {"diagnostics": found} if part else {}
    return kept, remarks


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
    if history:
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
    kl = _kl_by_unit(metrics)
    if codes.is_floating_point():
        spread = codes.reshape(len(codes), -1).var(0).tolist()
        known = kl.get(site, [])
        order = torch.tensor(known if len(known) == len(spread) else spread).argsort(
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
    if kl := _kl_by_unit(metrics):
        made.append(("kl", plots.kl_by_unit(kl)))
    return made


def _kl_by_unit(metrics: dict[str, Any]) -> dict[str, list[float]]:
    """The KL of each unit by site, where metrics.json has numbers of it."""
    kl = metrics.get("kl_by_unit") or {}
    numbers = [v for values in kl.values() for v in (values if isinstance(values, list) else [""])]
    if not all(isinstance(value, (int, float)) for value in numbers):
        raise UsageError(f"'kl_by_unit' of {runs.METRICS} must be lists of numbers")
    return {site: values for site, values in kl.items() if values}


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
        if rows and "epoch" not in rows[0]:
            raise ValueError("no epochs")
        return {name: [float(row[name]) for row in rows] for name in rows[0]} if rows else {}
    except (KeyError, ValueError, TypeError, csv.Error) as error:
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
            if Path(picture).name == picture  # a picture of this run
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
    remarks: Sequence[str],
    model: str,
    figures: dict[str, bytes | str],
    believed: str,
) -> str:
    numbers = "".join(
        f"<tr><td>{label}</td><td>{_number(metrics[name])}</td></tr>"
        for name, label in _NUMBERS.items()
        if metrics.get(name) is not None
    )
    for name, value in (metrics.get("active_units") or {}).items():
        numbers += f"<tr><td>active units of {html.escape(name)}</td><td>{_number(value)}</td></tr>"
    for name, why in (metrics.get("not_computed") or {}).items():
        told = html.escape(f"not computed: {why}")
        numbers += f"<tr><td>{_NUMBERS.get(name, html.escape(name))}</td><td>{told}</td></tr>"
    pictures = "".join(
        f"<h2>{_TITLES[name]}</h2>{_shown(name, made)}" for name, made in figures.items()
    )
    trained = str((config.get("train") or {}).get("data", "data of its own"))
    said = "".join(f"<p><b>{html.escape(remark)}</b></p>" for remark in remarks)
    if "data" in metrics:
        said += f"<p>Numbers are of the test part of {html.escape(str(metrics['data']))}.</p>"
    settings = html.escape(json.dumps(config, indent=2))
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f"{runs.model_mark(model)}<title>{html.escape(title)}</title>"
        f"<style>{_STYLE}</style></head><body><h1>{html.escape(title)}</h1>"
        f"<p>{html.escape(config['pair']['class'].rpartition(':')[2])} on "
        f"{html.escape(trained)}, model {model[:12]}. "
        f"Bounds, likelihoods and KL in nats per example, on test data.</p>{said}"
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
