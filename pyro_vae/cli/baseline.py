"""The baseline that `train` and `evaluate` show beside log p(x)."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pyro_vae.data.split import Data, Split
    from pyro_vae.diagnostics.baseline import Baseline


def baseline_of(data: "Data", split: "Split", given: dict[str, Any]) -> "Baseline | None":
    """The baseline that fits the kind of these data; None if they have no simple one.

    Rows with context, groups, text and counts have none.
    """
    from pyro_vae.diagnostics import baseline

    train, held = data.train, split
    conditional = bool(given.get("condition") or given.get("library_size"))
    if conditional or train.lengths is not None or data.vocabulary is not None:
        return None
    dim = sum(given.get("latent_dim", (1,)))
    if data.table is not None:
        return baseline.of_table(data.schema, train.x, held.x, dim)
    likelihood = given.get("likelihood")
    if likelihood in ("gaussian", "student-t") and not bool(_holes(train.x) or _holes(held.x)):
        x, rows = (_intensity(part.x).flatten(1) for part in (train, held))
        value = baseline.ppca(x, rows, dim)
        return None if value is None else baseline.Baseline("probabilistic PCA", value)
    if likelihood == "bernoulli" and given.get("binarize") != "none":
        x, rows = (_intensity(part.x) for part in (train, held))
        value = baseline.independent_bits(x, rows) if not (_holes(x) or _holes(rows)) else None
        return None if value is None else baseline.Baseline("independent pixels", value)
    return None


def in_words(found: "Baseline", log_likelihood: float | None) -> str:
    """The baseline, and whether the pair is better than it."""
    words = f"{found.log_likelihood:.3f}, {found.name}"
    if log_likelihood is None or not log_likelihood < found.log_likelihood:
        return words
    gap = found.log_likelihood - log_likelihood
    return (
        f"{words}. It is better than the pair by {gap:.3f} nats: train longer (--epochs), or use a "
        "smaller network or another likelihood"
    )


def _holes(x: Any) -> bool:
    return bool(x.isnan().any())


def _intensity(x: Any) -> Any:
    from pyro_vae.plots.canvas import intensity

    return intensity(x)
