"""Names become parts: likelihood, posterior, prior, activation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pyro_vae.cli.options import Model
from pyro_vae.errors import UsageError

if TYPE_CHECKING:
    from torch import nn


def with_likelihood(config: Model, data: Any) -> Model:
    """The configuration with the default likelihood of these data, if it names none.

    Binarization would destroy color, so 8-bit color images get a likelihood of their gray levels.
    In rows (n, d), whole numbers that are not 8-bit are counts, and others outside of 0 to 1 are
    real values.
    """
    if config.likelihood is not None or ":" in config.model:
        return config
    if data.schema is None and data.vocabulary is None and config.model != "deep-markov":
        return replace(config, likelihood=_usual(data))
    return replace(config, likelihood="bernoulli")


def _usual(data: Any) -> Any:
    """The usual likelihood of arrays: by their type and range."""
    from pyro_vae.data.disk import sampled

    x = sampled(data.train.x)
    if in_color(data):
        return "discretized-logistic"
    known = x[~x.isnan()]
    bits = not len(known) or bool(known.min() >= 0 and known.max() <= 1)
    if bits or str(x.dtype) == "torch.uint8" or len(data.shape) != 1:
        return "bernoulli"
    if x.is_floating_point():  # floats from 0 to 255 may be intensities, which are refused in words
        return "bernoulli" if known.min() >= 0 and known.max() <= 255 else "gaussian"
    return "negative-binomial" if known.min() >= 0 else "gaussian"


def in_color(data: Any) -> bool:
    """Whether the data are 8-bit images with several channels."""
    import torch

    from pyro_vae.data.disk import sampled

    x = sampled(data.train.x)
    shape = data.shape if data.train.members is None else data.shape[1:]
    channels = len(shape) == 3 and shape[0] in (3, 4)
    return channels and x.dtype == torch.uint8 and int(x.max()) > 1


def binarized(config: Model, data: Any) -> bool:
    """Whether a Bernoulli likelihood meets intensities other than black and white."""
    from pyro_vae.data.disk import sampled

    x = sampled(data.train.x)
    if config.likelihood != "bernoulli" or data.schema is not None or data.vocabulary is not None:
        return False
    white = 255 if not x.is_floating_point() and int(x.max()) > 1 else 1
    return bool(((x != 0) & (x != white) & ~x.isnan()).any())


def make_likelihood(config: Model) -> Any:
    """The likelihood family of a configuration."""
    from pyro_vae.parts import likelihoods

    if config.likelihood == "gaussian":
        if config.scale in ("predicted", "learned"):
            return likelihoods.Gaussian(learned=config.scale == "learned")
        try:
            scale = float(config.scale)
        except ValueError:
            raise UsageError(
                f"must be 'predicted', 'learned' or a number, got '{config.scale}'",
                argument="scale",
            ) from None
        return likelihoods.Gaussian(scale)
    kinds: dict[str, Callable[[], Any]] = {
        "bernoulli": likelihoods.Bernoulli,
        "continuous-bernoulli": likelihoods.ContinuousBernoulli,
        "categorical": likelihoods.Categorical,
        "discretized-logistic": likelihoods.DiscretizedLogistic,
        "discretized-logistic-mixture": lambda: likelihoods.DiscretizedLogistic(
            components=config.logistics
        ),
        "student-t": likelihoods.StudentT,
        "poisson": lambda: likelihoods.Poisson(config.library_size),
        "negative-binomial": lambda: likelihoods.NegativeBinomial(library_size=config.library_size),
        "zero-inflated-negative-binomial": lambda: likelihoods.NegativeBinomial(
            zero_inflated=True, library_size=config.library_size
        ),
    }
    return kinds[config.likelihood or "bernoulli"]()


def made_for_data(
    likelihood: Any, config: Model, data: Any, standardize: bool, masked: bool
) -> Any:
    """The likelihood for these data: by column for tables, standardized, or with missing entries.

    Raises `UsageError` for options of the likelihood that tables ignore.
    """
    from pyro_vae.data.disk import sampled
    from pyro_vae.parts.missing import Missing
    from pyro_vae.parts.standardized import Standardized

    x = sampled(data.train.x)
    if data.schema is not None:
        return data.schema.likelihood(x if data.table is not None else x[data.train.members >= 0])
    if config.likelihood == "gaussian" and not standardize:
        likelihood = _started(likelihood, config, x)
    if standardize:
        likelihood = Standardized(likelihood, data.shape).standardize(x)
    return Missing(likelihood) if masked or missing_entries(data) else likelihood


def _started(likelihood: Any, config: Model, x: Any) -> Any:
    """A Gaussian whose learned or predicted scale starts at that of the data.

    The start is the standard deviation of the entries around the mean of their column.
    """
    from pyro_vae.parts.likelihoods import Gaussian
    from pyro_vae.plots.canvas import intensity

    if config.scale not in ("learned", "predicted"):
        return likelihood
    values = intensity(x).double()
    spread = (values - values.nanmean(0)).square().nanmean().sqrt().item()
    low, high = Gaussian().bounds
    start = min(max(spread, 2 * low), high / 2)
    if config.scale == "learned":
        return Gaussian(start, learned=True)
    return Gaussian(start=start)


def missing_entries(data: Any) -> int:
    """The number of entries of the data that are NaN, in a sample of rows on disk.

    Steps after the end of a sequence do not count.
    """
    return sum(map(_missing_of_part, (data.train, data.validation, data.test)))


def _missing_of_part(part: Any) -> int:
    import torch

    from pyro_vae.data.disk import sampled

    x = sampled(part.x)
    if not x.is_floating_point():
        return 0
    missing, lengths = x.isnan(), getattr(part, "lengths", None)
    if lengths is not None and part.members is None:  # (n, ..., steps, d)
        ends = lengths.reshape(-1, *[1] * (x.dim() - 2))
        missing = missing & (torch.arange(x.shape[-2]) < ends)[..., None]
    return int(missing.sum())


def standardizes(config: Model, data: Any, asked: bool | None) -> bool:
    """Whether real-valued data are standardized inside the pair."""
    real = config.likelihood in ("gaussian", "student-t") and ":" not in config.model
    if asked and not real:
        raise UsageError(
            "needs --likelihood gaussian or student-t and a pair of this library",
            argument="standardize",
        )
    if asked is not None or not real or data.schema is not None:
        return bool(asked)
    rows = data.train.x.is_floating_point() and len(data.shape) == 1 and data.train.lengths is None
    of_file = data.vocabulary is None and config.model != "deep-markov"
    return rows and of_file and config.scale in ("predicted", "learned")


def with_linear(config: Model, data: Any, standardize: bool, masked: bool) -> Model:
    """The configuration that says whether the networks add linear maps that start at PCA.

    Probabilistic PCA in closed form needs complete rows, and a pair that contains it.
    """
    fits = (
        standardize
        and (config.model, config.likelihood) == ("vae", "gaussian")
        and (config.prior, config.posterior) == (Model.prior, Model.posterior)
        and config.network in ("auto", "mlp")
        and config.scale in ("predicted", "learned")
        and len(data.shape) == 1
        and data.shape[0] > 1
        and not (config.condition or config.bayesian_decoder)
        and not (masked or missing_entries(data))
    )
    if config.linear and not fits:
        raise UsageError(
            "needs --model vae, --likelihood gaussian, standardized rows without missing entries, "
            "and the default prior, posterior, network and scale",
            argument="linear",
        )
    return replace(config, linear=True) if fits and config.linear is None else config


def make_posterior(config: Model) -> Any:
    """The posterior family of a configuration."""
    from pyro_vae.parts import bijections, posteriors

    wide = (max(64, config.top_dim),)
    kinds: dict[str, Callable[[], Any]] = {
        "diagonal-normal": posteriors.DiagonalNormal,
        "full-rank-normal": posteriors.FullRankNormal,
        "low-rank-normal": posteriors.LowRankNormal,
        "iaf": lambda: posteriors.FlowPosterior(config.top_dim, hidden=wide),
        "spline": lambda: posteriors.FlowPosterior(
            config.top_dim, bijection=bijections.Spline(), hidden=wide
        ),
    }
    return kinds[config.posterior]()


def make_prior(config: Model, context: Sequence[tuple[int, ...]] = ()) -> Any:
    """The prior of a configuration, for context of these row shapes."""
    from pyro_vae.parts import convolutions, factors, networks, posteriors, priors

    if config.prior == "conditional":
        if not context:
            raise UsageError("--prior conditional needs --condition label or --condition context")
        family, activation = posteriors.DiagonalNormal(), make_activation(config.activation)
        outputs = family.outputs((config.top_dim,))
        network = (
            convolutions.ConvEncoder(
                context, config.channels, config.hidden, outputs, activation, config.blocks
            )
            if config.network == "conv"
            else networks.MLP(context, config.hidden, outputs, activation)
        )
        return factors.Factor(network, family, (config.top_dim,))

    kinds: dict[str, Callable[[int], Any]] = {
        "standard-normal": priors.StandardNormal,
        "gaussian-mixture": lambda dim: priors.GaussianMixture(dim, config.components or 10),
        "flow": priors.FlowPrior,
        "vamp": priors.StandardNormal,  # `_make_vamp` replaces it when the encoder exists.
    }
    return kinds[config.prior](config.top_dim)


def make_activation(name: str) -> type[nn.Module]:
    """The torch module class of an activation."""
    from torch import nn

    return {
        "relu": nn.ReLU,
        "leaky-relu": nn.LeakyReLU,
        "elu": nn.ELU,
        "silu": nn.SiLU,
        "softplus": nn.Softplus,
        "tanh": nn.Tanh,
        "glu": nn.GLU,
    }[name]
