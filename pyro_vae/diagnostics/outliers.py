"""`outlier_scores`: scores of out-of-distribution data."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pyro_vae.data.sources import Rows, parts
from pyro_vae.diagnostics.predictive import finite
from pyro_vae.inference.importance import LogLikelihood, log_likelihood
from pyro_vae.inference.refinement import refine
from pyro_vae.pairs.showing import shown_html
from pyro_vae.pairs.threads import alone


class Scores(NamedTuple):
    """Outlier scores of some data in nats, each of shape (n,)."""

    log_likelihood: Tensor
    """The importance-sampled log p(x)."""
    typicality: Tensor
    """The absolute difference between -log p(x) and its mean over the reference."""
    regret: Tensor | None
    """The increase of the ELBO when each datum gets its own q; None if ``regret`` was false."""
    standard_errors: Tensor
    """The Monte Carlo standard errors of ``log_likelihood``."""

    def as_outlying(self) -> dict[str, Tensor]:
        """Return the scores by name; each is larger for data that are more outlying."""
        found = {"-log p(x)": -self.log_likelihood, "typicality": self.typicality}
        return found if self.regret is None else {**found, "likelihood regret": self.regret}


@dataclass(frozen=True)
class OutlierScores:
    """The results of `outlier_scores`."""

    inside: Scores
    """Scores of x."""
    other: Scores | None
    """Scores of the out-of-distribution data, if you passed some."""
    reference_nll: float
    """Mean of -log p(x) over the reference, in nats per example."""
    auroc: dict[str, float] | None
    """For each score, the probability that an out-of-distribution datum has a higher score than a
    datum of x; ties count one half. 1 means that the score separates them, 1/2 that it has no
    information, and less than 1/2 that it ranks them in the wrong order."""

    def as_dict(self) -> dict[str, Any]:
        """Return means and AUROCs for metrics.json; what is not finite becomes None."""
        found: dict[str, Any] = {"reference_nll": finite(self.reference_nll)}
        for which, scores in (("inside", self.inside), ("other", self.other)):
            if scores is not None:
                means = {name: finite(s.mean().item()) for name, s in scores.as_outlying().items()}
                bad = sum(int((~torch.isfinite(s)).sum()) for s in scores.as_outlying().values())
                n = len(scores.log_likelihood)
                found[which] = {"num_examples": n, "not_finite": bad, **means}
        return found if self.auroc is None else {**found, "auroc": self.auroc}

    _repr_html_ = shown_html

    def __str__(self) -> str:
        lines = [f"{'nats per example':<20}{'x':>12}{'other':>12}{'AUROC':>9}"]
        other = {} if self.other is None else self.other.as_outlying()
        for name, score in self.inside.as_outlying().items():
            line = f"{name:<20}{score.mean().item():>12.3f}"
            if name in other and self.auroc is not None:
                line += f"{other[name].mean().item():>12.3f}{self.auroc[name]:>9.3f}"
            lines.append(line)
        lines.append(f"{'reference':<20}{self.reference_nll:>12.3f}")
        return "\n".join(lines)


@alone()
def outlier_scores(
    pair: nn.Module,
    x: Rows,
    *context: Any,
    reference: Tensor | Sequence[Any] | None = None,
    other: Tensor | Sequence[Any] | None = None,
    regret: bool = True,
    num_samples: int = 500,
    steps: int = 300,
    binarize: str = "dynamic",
    seed: int = 0,
    engine: str = "auto",
    progress: bool = True,
) -> OutlierScores:
    r"""Score how much each datum is an outlier with respect to the training data of a pair.

    .. math:: -\log p(x), \qquad |{-\log p(x)} - \overline{\mathrm{nll}}|, \qquad
        \mathrm{ELBO}(q^*_x) - \mathrm{ELBO}(q_\phi(\cdot | x)),

    The scores are the negative log-likelihood; typicality, its distance from the mean of the
    reference; and likelihood regret, the gain of the ELBO when `refine` gives the datum its own q
    within the family. A higher score means more evidence of an outlier.

    Arguments:
        pair: any pair.
        x, context: data to score, as `pyro_vae.log_likelihood` takes them.
        reference: typical data: x, or a tuple of x and context. Pass held-out data from the
            distribution of the training data, and never the training data. By default x itself;
            then typicality compares a datum with the other data of x.
        other: out-of-distribution data in the same form, for the AUROC of each score.
        regret: compute likelihood regret, which takes the most time.
        num_samples: importance samples for each datum.
        steps: number of steps of the refinement.
        binarize: as in `pyro_vae.evaluate`.
        seed, engine, progress: as in `pyro_vae.refine`.

    With masked entries, log p(x) is that of the observed entries. It is closer to 0 if fewer
    entries are observed, so compare only data with the same number of observed entries.
    A high log p(x) does not show that a datum is in distribution: simple data of another kind, such
    as an empty image, can have a higher log p(x) than the training data.
    Raises `UsageError` for the same reasons as `pyro_vae.log_likelihood` and, with ``regret``, as
    `refine`.
    Nalisnick et al., 2019 (https://arxiv.org/abs/1810.09136, https://arxiv.org/abs/1906.02994);
    Xiao, Yan & Amit, 2020 (https://arxiv.org/abs/2003.02977).

    >>> import torch, pyro_vae as pv
    >>> x, other = torch.ones(8, 4), torch.zeros(8, 4)
    >>> found = outlier_scores(pv.VAE.mlp((4,)), x, other=(other,), regret=False, num_samples=50)
    >>> found.inside.typicality.shape, sorted(found.auroc)
    (torch.Size([8]), ['-log p(x)', 'typicality'])
    """
    options: dict[str, Any] = {"num_samples": num_samples, "binarize": binarize}
    options |= {"seed": seed, "engine": engine, "progress": progress}

    def measured(
        given: Tensor | Sequence[Any], refined: bool
    ) -> tuple[LogLikelihood, Tensor | None]:
        rows = parts(given)
        if not refined:
            return log_likelihood(pair, *rows, **options), None
        found = refine(pair, *rows, steps=steps, **options)
        return found.before, found.gain

    def scores(found: tuple[LogLikelihood, Tensor | None]) -> Scores:
        estimate, gain = found
        typicality = (-estimate.per_datum - reference_nll).abs()
        return Scores(estimate.per_datum, typicality, gain, estimate.standard_errors)

    own = measured((x, *context), regret)
    typical = own if reference is None else measured(reference, False)
    reference_nll = -typical[0].value
    inside = scores(own)
    outside = None if other is None else scores(measured(other, regret))
    auroc = None if outside is None else _auroc(inside, outside)
    return OutlierScores(inside, outside, reference_nll, auroc)


def _auroc(inside: Scores, outside: Scores) -> dict[str, float]:
    from sklearn.metrics import roc_auc_score

    found = {}
    for name, low in inside.as_outlying().items():
        high = outside.as_outlying()[name]
        values = torch.cat([low, high]).nan_to_num(nan=torch.finfo(low.dtype).max)
        belongs = torch.cat([torch.zeros(len(low)), torch.ones(len(high))])
        found[name] = float(roc_auc_score(belongs.numpy(), values.numpy()))
    return found
