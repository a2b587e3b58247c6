"""metrics.json, and the weights that its numbers and the report belong to."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from pyro_vae.errors import UsageError
from pyro_vae.runs import seals
from pyro_vae.runs.files import METRICS, REPORT, atomic, read_json, write_json
from pyro_vae.runs.tensors import state_dict


def fingerprint(pair: nn.Module) -> str:
    """SHA-256 of a pair's parameters and buffers: which weights a number was measured on."""
    return seals.fingerprint(state_dict(pair))


def write_metrics(run: str | Path, pair: nn.Module, metrics: Mapping[str, Any]) -> None:
    """Write metrics.json, with the fingerprint of the weights that were measured."""
    write_json(Path(run) / METRICS, {**metrics, "model": fingerprint(pair)})


def read_metrics(run: Path) -> dict[str, Any]:
    """What metrics.json holds, nothing where there is no such file."""
    metrics = read_json(run / METRICS) if (run / METRICS).exists() else {}
    kinds = {"kl_by_unit": dict, "active_units": dict, "diagnostics": dict, "model": str}
    sound = isinstance(metrics, dict) and all(
        isinstance(metrics.get(name), (kind, type(None))) for name, kind in kinds.items()
    )
    if not sound:
        raise UsageError(f"{run / METRICS} is not what evaluate and diagnose write")
    return metrics


_STALE = (
    '<p class="stale"><b>The model of this run has been written anew since this report: numbers '
    "and pictures are of earlier weights. <code>pyro-vae report</code> draws them again.</b></p>"
)


def mark_report(run: Path, model: str) -> None:
    """Say in report.html that it is of earlier weights, unless it is of these."""
    path = run / REPORT
    if not path.is_file():
        return
    page = path.read_text(errors="replace")
    if _STALE not in page and model_mark(model) not in page:
        with atomic(path) as file:
            file.write(page.replace("<body>", f"<body>{_STALE}", 1).encode())


def model_mark(model: str) -> str:
    """How report.html names the weights that it describes."""
    return f'<meta name="model" content="{model}">'
