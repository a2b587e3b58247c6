"""The baseline that `train` and `evaluate` show beside log p(x)."""

from typing import TYPE_CHECKING, Any

from pyro_vae.cli.options import COUNTS

if TYPE_CHECKING:
    from pyro_vae.data.split import Data, Split
    from pyro_vae.diagnostics.baseline import Baseline

NONE = "none: these data have no simple model in closed form"


def baseline_of(data: "Data", split: "Split", given: dict[str, Any]) -> "Baseline | None":
    """The baseline that fits the kind of these data; None if they have no simple one.

    Rows with context, groups, missing entries of arrays, and arrays on disk have none.
    """
    from torch import Tensor

    from pyro_vae.diagnostics import baseline

    train, held = data.train, split
    if not isinstance(train.x, Tensor) or given.get("condition") or train.lengths is not None:
        return None
    dim = sum(given.get("latent_dim", (1,)))
    if data.table is not None:
        return baseline.of_table(data.schema, train.x, held.x, dim)
    if train.x.isnan().any() or held.x.isnan().any():
        return None
    if data.vocabulary is not None:
        value = baseline.pairs_of_characters(train.x, held.x, len(data.vocabulary))
        return baseline.Baseline("pairs of characters", value)
    return _of_arrays(train.x, held.x, given, dim)


def _of_arrays(train: Any, held: Any, given: dict[str, Any], dim: int) -> "Baseline | None":
    """The baseline of arrays, by the likelihood of the run."""
    from pyro_vae.diagnostics import baseline

    likelihood = given.get("likelihood")
    if likelihood in COUNTS:
        value = baseline.independent_counts(train, held, bool(given.get("library_size")))
        return baseline.Baseline("independent counts", value)
    train, held = _intensity(train), _intensity(held)
    if likelihood in ("gaussian", "student-t"):
        found = baseline.ppca(train.flatten(1), held.flatten(1), dim)
        return None if found is None else baseline.Baseline("probabilistic PCA", found)
    if likelihood == "bernoulli" and given.get("binarize") != "none":
        return baseline.Baseline("independent pixels", baseline.independent_bits(train, held))
    if likelihood in ("discretized-logistic", "discretized-logistic-mixture"):
        value = baseline.independent_levels(train * 255, held * 255, 256)
        return baseline.Baseline("independent pixels", value)
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


def _intensity(x: Any) -> Any:
    from pyro_vae.plots.canvas import intensity

    return intensity(x)
