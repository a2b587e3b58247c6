"""`write_report`: the figures of a run, and one HTML file that shows them and opens anywhere."""

import csv
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pyro_vae.errors import UsageError, first_line
from pyro_vae.inference.generation import interpolate, reconstruct, sample
from pyro_vae.pairs import enumeration
from pyro_vae.pairs.template import missing_context, template
from pyro_vae.pairs.threads import alone
from pyro_vae.plots import canvas, pictures
from pyro_vae.report.page import shown_diagnostics, whole_page
from pyro_vae.runs import files as run_files
from pyro_vae.runs import folder as run_folder
from pyro_vae.runs import metrics as run_metrics

if TYPE_CHECKING:
    from matplotlib.figure import Figure


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
    config, model = run_folder.read_config(run), run_metrics.fingerprint(pair)
    metrics, remarks = _current(run_metrics.read_metrics(run), model)
    with _well_formed(run):
        vocabulary = (config.get("train") or {}).get("vocabulary")
        believed = shown_diagnostics(run, metrics.get("diagnostics"))
    figures = {
        name: made if isinstance(made, str) else canvas.png(made)
        for name, made in _figures(run, pair, x, context, labels, metrics, vocabulary, seed)
    }
    for name, made in figures.items():
        if isinstance(made, bytes):
            with run_files.atomic(run / run_files.FIGURES / f"{name}.png") as file:
                file.write(made)
    with _well_formed(run):
        page = whole_page(run.resolve().name, config, metrics, remarks, model, figures, believed)
    with run_files.atomic(run / run_files.REPORT) as file:
        file.write(page.encode(errors="xmlcharrefreplace"))
    return run / run_files.REPORT


@contextmanager
def _well_formed(run: Path) -> Iterator[None]:
    """Say in one line that a file has another form than it is written in."""
    try:
        yield
    except (KeyError, TypeError, AttributeError) as error:
        raise UsageError(
            f"{run / run_files.METRICS} or {run_files.CONFIG} is not what pyro_vae writes: "
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
    history = _history(run / run_files.HISTORY)
    if history:
        made.append(("curves", pictures.curves(history)))
    if vocabulary is not None:
        return [*made, *_texts(pair, x, context, metrics, vocabulary, seed)]
    few = [part[:12] for part in context]
    made.append(("reconstructions", pictures.reconstructions(pair, x[:12], few)))
    if hasattr(pair, "template"):
        shown = [] if missing_context(pair, 1) else _contexts(context, labels)
        made.append(("samples", pictures.samples(pair, x, shown, seed)))
        found = enumeration.values(pair, template(pair, 2, [part[:1] for part in shown]))
        for name, values in list(found.items())[:1]:
            made.append(("classes", pictures.by_value(pair, x, shown, name, values[:20], seed)))
    site, codes = pictures.codes(pair, x, context)
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
        made.append(("traversals", pictures.traversals(pair, x[:1], one, units, site)))
        n = min(4, len(x) // 2)
        if n:
            ends = [part[:n] for part in context]
            lines = pictures.interpolations(pair, x[:n], x[n : 2 * n], ends)
            made.append(("interpolations", lines))
        made.append(("latent", pictures.latent_plane(codes.cpu(), labels, site)))
    if kl:
        made.append(("kl", pictures.kl_by_unit(kl)))
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
        ("samples", canvas.lines([("", drawn)], vocabulary)),
        ("reconstructions", canvas.lines(rows, vocabulary, across=True)),
        ("interpolations", canvas.lines([("", line) for line in between], vocabulary)),
    ]
    site, codes = pictures.codes(pair, x, context)
    made.append(("latent", pictures.latent_plane(codes.cpu(), None, site)))
    if kl := _kl_by_unit(metrics):
        made.append(("kl", pictures.kl_by_unit(kl)))
    return made


def _kl_by_unit(metrics: dict[str, Any]) -> dict[str, list[float]]:
    """The KL of each unit by site, where metrics.json has numbers of it."""
    kl = metrics.get("kl_by_unit") or {}
    numbers = [v for values in kl.values() for v in (values if isinstance(values, list) else [""])]
    if not all(isinstance(value, (int, float)) for value in numbers):
        raise UsageError(f"'kl_by_unit' of {run_files.METRICS} must be lists of numbers")
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
