"""Read and write metrics.json, and record the weights that numbers and report describe."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from pyro_vae.errors import UsageError
from pyro_vae.runs import checksums
from pyro_vae.runs.files import FORMAT, METRICS, REPORT, atomic, read_json, write_json
from pyro_vae.runs.tensors import state_dict


def fingerprint(pair: nn.Module) -> str:
    """SHA-256 of the parameters and buffers of a pair, which identifies the measured weights."""
    return checksums.fingerprint(state_dict(pair))


def write_metrics(run: str | Path, pair: nn.Module, metrics: Mapping[str, Any]) -> None:
    """Write metrics.json with the fingerprint of the measured weights."""
    write_json(Path(run) / METRICS, {**metrics, "model": fingerprint(pair)})


_KINDS: dict[str, Any] = {
    **dict.fromkeys(("kl_by_site", "kl_by_unit", "global_kl", "active_units", "num_units"), dict),
    **dict.fromkeys(("baseline", "not_computed", "diagnostics"), dict),
    "model": str,
}
"""The types of the entries that commands and the report read; the report escapes all others."""


def read_metrics(run: Path) -> dict[str, Any]:
    """Read metrics.json. The result is empty if the file does not exist.

    Raises `UsageError` for an entry of another type than evaluate and diagnose write.
    """
    path = run / METRICS
    metrics = read_json(path) if path.exists() else {}
    if not isinstance(metrics, dict):
        raise UsageError(f"{path} must be a JSON object, got a {type(metrics).__name__}")
    metrics.pop(FORMAT, None)
    for name, kind in _KINDS.items():
        value = metrics.get(name)
        if not (value is None or isinstance(value, kind)):
            raise UsageError(
                f"{path} does not have the format that evaluate and diagnose write: {name!r} must "
                f"not be {value!r}"
            )
    return metrics


_STALE = (
    '<p class="stale"><b>The model of this run has changed since this report was written. The '
    "numbers and pictures describe earlier weights. Run <code>pyro-vae report</code> to update "
    "them.</b></p>"
)


def mark_report(run: Path, model: str) -> None:
    """Add a notice to report.html if it describes other weights than these."""
    path = run / REPORT
    if not path.is_file():
        return
    page = path.read_text(errors="replace")
    if _STALE not in page and model_mark(model) not in page:
        with atomic(path) as file:
            file.write(page.replace("<body>", f"<body>{_STALE}", 1).encode())


def model_mark(model: str) -> str:
    """The element of report.html that names the weights that it describes."""
    return f'<meta name="model" content="{model}">'
