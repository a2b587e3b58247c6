"""Write the report of a run: its figures, and one HTML file that contains them."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pyro_vae.data.schema import SCHEMA, stored_schema
from pyro_vae.errors import UsageError, first_line
from pyro_vae.inference.generation import observes_x, reconstruct, sample
from pyro_vae.pairs import enumeration
from pyro_vae.pairs.figures import png
from pyro_vae.pairs.processes import single
from pyro_vae.pairs.template import missing_context, template
from pyro_vae.pairs.threads import alone
from pyro_vae.plots import canvas, pictures
from pyro_vae.report.page import shown_diagnostics, shown_verdict, whole_page
from pyro_vae.report.tables import table_parts
from pyro_vae.runs import files as run_files
from pyro_vae.runs import folder as run_folder
from pyro_vae.runs import metrics as run_metrics
from pyro_vae.runs.history_file import read_history
from pyro_vae.training.curves import curves

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@alone()
@single()
def write_report(
    pair: nn.Module,
    x: Tensor,
    *context: Tensor,
    run: str | Path,
    labels: Tensor | None = None,
    ids: Sequence[Any] | None = None,
    seed: int = 0,
) -> Path:
    """Draw the figures of a run from held-out data, and write them into report.html.

    Arguments:
        pair: the pair of the run.
        x: held-out data (n, *data_shape).
        context: held-out context tensors, each with n rows.
        run: a run folder. The report also shows its config.json, and its history.csv and
            metrics.json if they exist.
        labels: integer labels (n,) of x, for the colors.
        ids: a name for each row of x; the default is its number.
        seed: the random seed of the samples.

    The report shows text in words, if config.json records a vocabulary, and columns, if the run has
    a schema.toml. The figures are also
    written as figures/NAME.png. Returns the path of report.html.

    Raises `UsageError` if a file of the run is missing or has another format.

    >>> import tempfile, pyro_vae as pv
    >>> x = pv.load_data("digits").test.x[:20] / 255
    >>> vae = pv.VAE.mlp((1, 8, 8), latent_dim=2, hidden=(8,), likelihood=pv.Gaussian)
    >>> with tempfile.TemporaryDirectory() as run:
    ...     pv.write_report(vae, x, run=pv.save(vae, run)).name
    'report.html'
    """
    run = Path(run)
    config, model = run_folder.read_config(run), run_metrics.fingerprint(pair)
    metrics, remarks = _current(run_metrics.read_metrics(run), model)
    with _well_formed(run):
        vocabulary = (config.get("train") or {}).get("vocabulary")
        verdict = shown_verdict(metrics.get("diagnostics"))
        diagnostics = shown_diagnostics(run, metrics.get("diagnostics"))
    figures = {
        name: made if isinstance(made, str) else png(made)
        for name, made in _figures(run, pair, x, context, labels, metrics, vocabulary, ids, seed)
    }
    for name, made in figures.items():
        if isinstance(made, bytes):
            with run_files.atomic(run / run_files.FIGURES / f"{name}.png") as file:
                file.write(made)
    with _well_formed(run):
        page = whole_page(
            run.resolve().name, config, metrics, remarks, model, figures, verdict, diagnostics
        )
    with run_files.atomic(run / run_files.REPORT) as file:
        file.write(page.encode(errors="xmlcharrefreplace"))
    return run / run_files.REPORT


@contextmanager
def _well_formed(run: Path) -> Iterator[None]:
    """Raise `UsageError` if a file of the run does not have its format."""
    try:
        yield
    except UsageError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UsageError(
            f"{run / run_files.METRICS} or {run_files.CONFIG} does not have its format: "
            f"{type(error).__name__}: {first_line(error)}"
        ) from error


def _current(metrics: dict[str, Any], model: str) -> tuple[dict[str, Any], list[str]]:
    """The numbers of these weights, and remarks about numbers of other weights."""
    found = metrics.get("diagnostics")
    numbers = {name: value for name, value in metrics.items() if name != "diagnostics"}
    kept: dict[str, Any] = {}
    remarks: list[str] = []
    for what, part, command in (
        ("The numbers", numbers, "evaluate"),
        ("The findings of diagnose", {} if found is None else found, "diagnose"),
    ):
        of = part.get("model")
        if of not in (None, model):
            remarks.append(
                f"{what} in metrics.json describe other weights (model {of[:12]}), so the report "
                f"does not show them. Run pyro-vae {command} again."
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
    ids: Sequence[Any] | None,
    seed: int,
) -> list[tuple[str, "Figure | str"]]:
    made: list[tuple[str, Figure | str]] = []
    path = run / run_files.HISTORY
    history = read_history(path) if path.exists() else {}
    if history:
        made.append(("curves", curves(history)))
    if vocabulary is not None:
        return [*made, *_texts(pair, x, context, metrics, vocabulary, seed)]
    coded, table = pictures.codes(pair, x, context), (run / SCHEMA).is_file()
    if table and x.dim() == 2:  # not for groups of rows
        made += table_parts(pair, stored_schema(run / SCHEMA), x, context, ids, seed)
    elif not table and observes_x(pair, x, *context):
        made += _images(pair, x, context, labels, metrics, coded, seed)
    if coded is not None and (table or coded[1].is_floating_point()):
        made.append(("latent", _plane(pair, x, context, labels, *coded)))
    kl = _kl_by_unit(metrics)
    return [*made, ("kl", pictures.kl_by_unit(kl))] if kl else made


def _images(
    pair: nn.Module,
    x: Tensor,
    context: Sequence[Tensor],
    labels: Tensor | None,
    metrics: dict[str, Any],
    coded: tuple[str, Tensor] | None,
    seed: int,
) -> "list[tuple[str, Figure | str]]":
    """Figures of data that the model reconstructs, draws or decodes."""
    few = [part[:12] for part in context]
    made: list[tuple[str, Figure | str]] = [
        ("reconstructions", pictures.reconstructions(pair, x[:12], few))
    ]
    if hasattr(pair, "template"):
        shown = [] if missing_context(pair, 1) else _contexts(context, labels)
        made.append(("samples", pictures.samples(pair, x, shown, seed)))
        found = enumeration.values(pair, template(pair, 2, [part[:1] for part in shown]))
        for name, values in list(found.items())[:1]:
            made.append(("classes", pictures.by_value(pair, x, shown, name, values[:20], seed)))
    if coded is not None and coded[1].is_floating_point():
        site, codes = coded
        kl = _kl_by_unit(metrics).get(site, [])
        spread = codes.reshape(len(codes), -1).var(0).tolist()
        order = torch.tensor(kl if len(kl) == len(spread) else spread).argsort(descending=True)
        one = [part[:1] for part in context]
        units = order[: min(8, max(3, sum(value > 0.01 for value in kl)))].tolist()
        made.append(("traversals", pictures.traversals(pair, x[:1], one, units, site)))
        n = min(4, len(x) // 2)
        if n:
            made.append(("interpolations", pictures.interpolations(pair, x, context, n)))
    return made


def _plane(
    pair: nn.Module,
    x: Tensor,
    context: Sequence[Tensor],
    labels: Tensor | None,
    site: str,
    codes: Tensor,
) -> "Figure":
    scales = pictures.scales(pair, x, context, site) if codes.is_floating_point() else None
    same = scales is not None and scales.shape == codes.shape
    return pictures.latent_plane(codes.cpu(), labels, site, scales if same else None)


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
    drawn = sample(pair, 20, *(part[:1] for part in context), seed=seed)
    between = pictures.interpolated(pair, x, context, half, steps=7)
    made: list[tuple[str, Figure | str]] = [
        ("samples", canvas.lines([("", drawn)], vocabulary)),
        ("reconstructions", canvas.lines(rows, vocabulary, across=True)),
        ("interpolations", canvas.lines([("", line) for line in between], vocabulary)),
    ]
    if (coded := pictures.codes(pair, x, context)) is not None:
        made.append(("latent", _plane(pair, x, context, None, *coded)))
    if kl := _kl_by_unit(metrics):
        made.append(("kl", pictures.kl_by_unit(kl)))
    return made


def _kl_by_unit(metrics: dict[str, Any]) -> dict[str, list[float]]:
    """The KL of each unit by site, if metrics.json has it."""
    kl = metrics.get("kl_by_unit") or {}
    numbers = [v for values in kl.values() for v in (values if isinstance(values, list) else [""])]
    if not all(isinstance(value, (int, float)) for value in numbers):
        raise UsageError(f"'kl_by_unit' of {run_files.METRICS} must be lists of numbers")
    return {site: values for site, values in kl.items() if values}


def _contexts(context: Sequence[Tensor], labels: Tensor | None) -> list[Tensor]:
    """One row of context for each label, or a few rows without labels."""
    if not context:
        return []
    if labels is None:
        return [part[:6] for part in context]
    rows = [int((labels == label).nonzero()[0]) for label in labels.unique()[:10]]
    return [part[rows] for part in context]
