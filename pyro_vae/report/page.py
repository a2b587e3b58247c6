"""Build the HTML page of a report."""

import base64
import html
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pyro_vae.diagnostics.attribution import PARTS
from pyro_vae.diagnostics.study import KINDS, REASONS
from pyro_vae.pairs.figures import DPI
from pyro_vae.runs import files as run_files
from pyro_vae.runs import metrics as run_metrics

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem;
       color: #222; background: #fff; overflow-wrap: break-word }
h1 { font-size: 1.5rem } h2 { font-size: 1.1rem; margin-top: 2rem }
table { border-collapse: collapse } td { padding: .15rem 1.2rem .15rem 0; vertical-align: top }
td + td { font-variant-numeric: tabular-nums }
img { max-width: 100%; height: auto }
.picture { display: block; overflow-x: auto }
@media (max-width: 40rem) { .picture img { max-width: none } }
pre { font-size: 13px; overflow-x: auto } pre.text { white-space: pre-wrap }
ul { margin: .2rem 0; padding-left: 1.4rem }
p { color: #555 } p b { color: #222 }
"""

_WORDS = {
    "curves": "The curves show the ELBO without the KL weight that training may use.",
    "reconstructions": "The top row shows test data. The bottom row shows the means of their "
    "reconstructions.",
    "samples": "The latents are drawn from the prior. Each picture is the mean of the data given "
    "the latents.",
    "marginals": "The marginal distribution of each column, of test data and of samples.",
    "pairwise": "Pairs of columns, of test data and of samples.",
    "classes": "Each row shows one value of a discrete latent, which is a class or a cluster. The "
    "other latents are drawn at random.",
    "traversals": "The code of one test datum is changed: each row sets one latent unit to values "
    "from -3 to 3. The units with the largest KL come first.",
    "interpolations": "Each row follows a straight line between the codes of two test data, which "
    "are at its ends.",
    "latent": "Each point is the posterior mean of one test datum. Bars are posterior standard "
    "deviations. Colors show the labels, if there are any.",
    "kl": "The KL of a unit measures how much the unit encodes about the data. A unit with a KL "
    "near zero has collapsed.",
}


_TEXT_WORDS = {
    "imputations": "A fifth of the observed cells of test rows is hidden and imputed. The error is "
    "the root mean squared error, or the share of wrong categories. The next column is the error "
    "of the mean or the most frequent category of the other cells.",
    "strangest": "The test rows with the lowest log p(x), and the columns that make them strange: "
    "those whose log density given the other columns is farthest below the median of the column.",
    "reconstructions": "Each block shows a test datum, and below it the most probable text given "
    "its code.",
    "samples": "The latents are drawn from the prior, and the text is drawn given the latents.",
    "interpolations": "Each block follows a straight line between the codes of two test data, from "
    "the first to the last line. It shows the most probable text at each step.",
}

_TITLES = {
    "curves": "Training",
    "reconstructions": "Reconstructions",
    "samples": "Samples",
    "marginals": "Columns",
    "pairwise": "Pairs of columns",
    "imputations": "Imputations by column",
    "strangest": "Strangest rows",
    "classes": "Samples by class",
    "traversals": "Traversals",
    "interpolations": "Interpolations",
    "latent": "Latent space",
    "kl": "KL of each latent unit",
}

_NUMBERS = {
    "num_examples": "test examples",
    "rows_trained_on": "test examples that are equal to training or validation rows",
    "elbo": "ELBO",
    "elbo_standard_error": "Monte Carlo standard error of the ELBO",
    "log_likelihood": "log p(x), lower bound from importance sampling",
    "log_likelihood_standard_error": "Monte Carlo standard error of log p(x)",
    "log_likelihood_total_error": "error of log p(x) with its bias",
    "num_samples": "importance samples per example",
    "log_joint": "log p(x, z) at a point estimate, which is not a bound on log p(x)",
    "reconstruction": "reconstruction, E log p(x | z)",
    "kl": "KL",
    "bits_per_dim": "bits per dimension",
    "probe_accuracy": "accuracy of a linear probe on the codes",
    "accuracy": "accuracy of the most probable class",
    "calibration_error": "expected calibration error of the class probability",
    "clustering_accuracy": "accuracy of the most probable cluster, clusters matched to labels",
    "mutual_information": "normalized mutual information of cluster and label",
}


def shown_verdict(found: dict[str, Any] | None) -> str:
    """What `diagnose` found, as the first part of the page: the parts at fault, then the rest."""
    if found is None:
        return ""
    lines = ["<h2>Can the inference be believed?</h2>"]
    for kind, title in KINDS.items():
        told = _faults(found) if kind == "fault" else _findings(found, kind)
        if told:
            lines.append(f"<p><b>{title}:</b></p><ul>{''.join(told)}</ul>")
    return f"{''.join(lines)}<p>{html.escape(_price(found))}</p>"


def _findings(found: dict[str, Any], kind: str) -> list[str]:
    words = [part["words"] for part in found["findings"] if part["kind"] == kind]
    return [f"<li>{html.escape(one)}.</li>" for one in dict.fromkeys(words)]


def _faults(found: dict[str, Any]) -> list[str]:
    """Each part at fault, with what to try and its evidence; each sign is told once."""
    faults, before = [], set[str]()
    for blame in found.get("blamed", ()):
        name = html.escape(PARTS.get(blame["part"], (blame["part"],))[0])
        size = "" if blame["nats"] is None else f" ({blame['nats']:.2f} nats per example)"
        signs = {sign["words"]: None for sign in blame["evidence"]}
        new = [html.escape(words) for words in signs if words not in before]
        new += ["the evidence of the parts above"] if len(new) < len(signs) else []
        before |= set(signs)
        evidence = "".join(f"<li>{words}</li>" for words in new)
        advice = html.escape(blame["next"])
        faults.append(f"<li><b>{name}</b>{size}. Try {advice}.<ul>{evidence}</ul></li>")
    if not faults and "blamed" in found and found["tables"]:  # version 0.1.0 blamed no part
        faults = ["<li>no part, as far as the diagnostics have checked</li>"]
    return faults


def _price(found: dict[str, Any]) -> str:
    """How long the diagnosis took, on how many data, and how many diagnostics lacked time."""
    if not {"seconds", "budget", "num_examples"} <= set(found):
        return ""  # written by an earlier version
    took, lacking = sum(found["seconds"].values()), len(found["left_out"])
    words = f"The diagnosis took {took:.0f} s (budget {found['budget']:g} s), with at most "
    words += f"{found['num_examples']} test data."
    if lacking:
        words += f" For lack of time, {lacking} diagnostics did not run or not at full size: "
        words += "pyro-vae diagnose gives them more."
    return words


def shown_diagnostics(run: Path, found: dict[str, Any] | None) -> str:
    """The table and the figures of each diagnostic as a part of the page."""
    if found is None:
        return ""
    lines = ["<h2>Diagnostics</h2>"]
    if found.get("worst_data"):
        lines.append("<p>The data with the least reliable log p(x):</p>")
        lines.append(f"<pre>{html.escape(found['worst_data'])}</pre>")
    for name, table in found["tables"].items():
        paths = {
            picture: run / run_files.FIGURES / f"{run_files.DIAGNOSIS}{picture}.png"
            for picture in found["pictures"].get(name, [])
            if Path(picture).name == picture  # reject pictures outside the folder of the run
        }
        picture = "".join(
            _picture(what, path.read_bytes()) for what, path in paths.items() if path.exists()
        )
        notes = [f"note: {note}" for note in found["notes"].get(name, [])]
        told = "".join(f"<p>{html.escape(note)}</p>" for note in notes)
        lines.append(
            f"<details{' open' if picture else ''}><summary>{html.escape(name)}</summary>"
            f"{picture}<pre>{html.escape(table)}</pre>{told}</details>"
        )
    missing = [
        f"<li>{html.escape(f'{name} {title}: {why}')}</li>"
        for title, reasons in REASONS.items()
        for name, why in found[reasons].items()
    ]
    return "".join([*lines, f"<ul>{''.join(missing)}</ul>" if missing else ""])


def whole_page(
    title: str,
    config: dict[str, Any],
    metrics: dict[str, Any],
    remarks: Sequence[str],
    model: str,
    figures: dict[str, bytes | str],
    verdict: str,
    diagnostics: str,
) -> str:
    """The page of a run: verdict, numbers, figures, diagnostics and configuration."""
    outside = metrics.get("global_kl") or {}
    numbers = "".join(
        f"<tr><td>{label}</td><td>{_number(metrics[name])}</td></tr>"
        for name, label in _NUMBERS.items()
        if metrics.get(name) is not None
        and not (name == "kl" and outside and not metrics.get("kl_by_site"))
    )
    for name, value in outside.items():
        numbers += f"<tr><td>KL of {html.escape(name)}, nats for all data, not in the ELBO</td>"
        numbers += f"<td>{_number(value)}</td></tr>"
    for name, value in (metrics.get("active_units") or {}).items():
        numbers += f"<tr><td>active units of {html.escape(name)}</td><td>{_number(value)}</td></tr>"
    if simple := metrics.get("baseline"):
        numbers += f"<tr><td>baseline log p(x), {html.escape(str(simple['name']))}</td>"
        numbers += f"<td>{_number(simple['log_likelihood'])}</td></tr>"
    for name, why in (metrics.get("not_computed") or {}).items():
        told = html.escape(f"not computed: {why}")
        numbers += f"<tr><td>{_NUMBERS.get(name, html.escape(name))}</td><td>{told}</td></tr>"
    pictures = "".join(
        f"<h2>{_TITLES[name]}</h2>{_shown(name, made)}" for name, made in figures.items()
    )
    trained = str((config.get("train") or {}).get("data", "data from memory"))
    said = "".join(f"<p><b>{html.escape(remark)}</b></p>" for remark in remarks)
    if "data" in metrics:
        said += f"<p>The numbers describe the test part of {html.escape(str(metrics['data']))}.</p>"
    settings = html.escape(json.dumps(config, indent=2))
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"{run_metrics.model_mark(model)}<title>{html.escape(title)}</title>"
        f"<style>{_STYLE}</style></head><body><h1>{html.escape(title)}</h1>"
        f"<p>{html.escape(config['pair']['class'].rpartition(':')[2])} trained on "
        f"{html.escape(trained)}, model {model[:12]}. "
        f"All bounds, likelihoods and KL are in nats per example, on test data.</p>{said}"
        f"{verdict}<h2>Numbers</h2><table>{numbers}</table>{pictures}{diagnostics}"
        f"<h2>Configuration</h2><details><summary>config.json</summary><pre>{settings}</pre>"
        f"</details></body></html>\n"
    )


def _shown(name: str, made: bytes | str) -> str:
    if isinstance(made, str):
        kind = "" if name in ("imputations", "strangest") else ' class="text"'  # a table, or lines
        return f"<p>{_TEXT_WORDS[name]}</p><pre{kind}>{html.escape(made)}</pre>"
    return f"<p>{_WORDS[name]}</p>{_picture(name, made)}"


def _picture(name: str, made: bytes) -> str:
    # All figures have the same scale, so that their text has one size.
    wide = round(int.from_bytes(made[16:20], "big") * 96 / DPI)  # the width in the head of a PNG
    data = base64.b64encode(made).decode()
    # On a phone, a picture keeps its size, so that its text can be read, and scrolls by itself.
    image = f'<img alt="{html.escape(name)}" width="{wide}" src="data:image/png;base64,{data}">'
    return f'<span class="picture">{image}</span>'


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else html.escape(str(value))
