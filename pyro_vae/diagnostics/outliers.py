"""`outlier_scores`: how little each datum belongs to what the pair was fitted to."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pyro_vae.data.sources import Rows, parts
from pyro_vae.diagnostics.predictive import finite
from pyro_vae.inference.importance import LogLikelihood, log_likelihood
from pyro_vae.inference.refinement import refine
from pyro_vae.pairs.threads import alone


class Scores(NamedTuple):
    """Outlier scores of some data, nats, each of shape (n,)."""

    log_likelihood: Tensor
    """log p(x), importance-sampled."""
    typicality: Tensor
    """How far -log p(x) is from its mean over the reference, either way."""
    regret: Tensor | None
    """How much the ELBO rises as each datum gets its own q; None where it was not asked for."""
    standard_errors: Tensor
    """The Monte Carlo standard errors of ``log_likelihood``."""

    def as_outlying(self) -> dict[str, Tensor]:
        """The scores by name, each greater the less the datum belongs."""
        found = {"-log p(x)": -self.log_likelihood, "typicality": self.typicality}
        return found if self.regret is None else {**found, "likelihood regret": self.regret}


@dataclass(frozen=True)
class OutlierScores:
    """What `outlier_scores` found."""

    inside: Scores
    """Scores of x."""
    other: Scores | None
    """Scores of the other data, where they were given."""
    reference_nll: float
    """Mean of -log p(x) over the reference, nats per example."""
    auroc: dict[str, float] | None
    """For each score the probability that a datum of the other data has the greater one, ties
    halved: 1 where it tells them apart, 1/2 where it says nothing, below that where it errs."""

    def as_dict(self) -> dict[str, Any]:
        """Means and AUROCs, as metrics.json holds them; what is not finite is None."""
        found: dict[str, Any] = {"reference_nll": finite(self.reference_nll)}
        for which, scores in (("inside", self.inside), ("other", self.other)):
            if scores is not None:
                means = {name: finite(s.mean().item()) for name, s in scores.as_outlying().items()}
                bad = sum(int((~torch.isfinite(s)).sum()) for s in scores.as_outlying().values())
                n = len(scores.log_likelihood)
                found[which] = {"num_examples": n, "not_finite": bad, **means}
        return found if self.auroc is None else {**found, "auroc": self.auroc}

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
    r"""Score how little each datum belongs to what the pair was fitted to.

    .. math:: -\log p(x), \qquad |{-\log p(x)} - \overline{\mathrm{nll}}|, \qquad
        \mathrm{ELBO}(q^*_x) - \mathrm{ELBO}(q_\phi(\cdot | x)),

    the negative log-likelihood; typicality, its distance from the mean of the reference; and
    likelihood regret, what the ELBO gains as `refine` gives the datum its own q within the family.
    The greater each is, the more the datum is an outlier.

    Arguments:
        pair: any pair.
        x, context: data to score, as `pyro_vae.log_likelihood` takes them.
        reference: x, or a tuple of x and context, of which typical data are taken: held-out data of
            the kind that the pair was fitted to, never those that it was fitted to. x itself by
            default, which says how unlike the rest a datum is.
        other: the same of data known not to belong, for the AUROC of each score.
        regret: compute likelihood regret, much the longest.
        num_samples: importance samples for each datum.
        steps: of the refinement. seed, engine, progress: as in `pyro_vae.refine`.

    Of data with masked entries log p is that of what is seen: data of which less is seen have less
    of it, so compare data of which as much is seen.
    A high log p(x) does not say that a datum belongs: simple data of another kind, an empty image
    say, can have a higher one than the data that the pair was fitted to.
    Raises `UsageError` as `pyro_vae.log_likelihood`, and with ``regret`` as `refine`.
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
