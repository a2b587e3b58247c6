"""The options that build a pair and its objective, and the rules about which go together.

This file imports nothing heavy, so ``pyro-vae --help`` answers before torch is loaded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal

from pyro_vae.cli.groups import NONE, OF_INFERENCE, OF_LIKELIHOOD, OF_TRAINING, WIDTHS
from pyro_vae.errors import UsageError

COUNTS = ("poisson", "negative-binomial", "zero-inflated-negative-binomial")
"""Likelihoods of counts. Under these, 8-bit data are whole numbers, not intensities."""


@dataclass(frozen=True, kw_only=True)
class Model:
    """The pair to build, and its parts.

    Parameters
    ----------
    model
        vae; hierarchical; semi-supervised (some rows have labels); mixture (finds clusters);
        deep-markov (sequences: rows of shape (steps, d), or images read from top to bottom);
        multilevel (rows in groups, see --group); or module:Class for a pair of your own. The
        constructor of your class receives data_shape, latent_dim, hidden, context_shapes and
        num_classes, if it has arguments of these names. The other options that build a pair are
        then rejected.
    network
        Kind of neural network: multilayer perceptrons (mlp), convolutions for images (conv), or
        recurrent networks for text (recurrent). auto chooses recurrent for text and mlp for other
        data.
    latent_dim
        Dimension of the latent vector. For --model hierarchical: the dimension of each level, from
        the data upwards. For --model multilevel: the dimensions of z and of the groups' u.
    hidden
        Widths of the hidden layers of the encoder, from the data inwards. The decoder uses them in
        reverse order. none makes linear networks without hidden layers. For text and --model
        deep-markov: the width of each network, one number.
    embedding_dim
        Width of the embedding of a character, for text.
    word_dropout
        Probability that the decoder of text does not see the previous character during training.
    channels
        Channels of the convolutions of the encoder, for --network conv.
    blocks
        Number of residual blocks after each convolution, for --network conv.
    activation
        Nonlinearity of the hidden layers. glu makes gated layers, for --network mlp.
    guide
        How --model hierarchical infers its levels: from the top level down, where the data correct
        the conditional distributions of the model (top-down), or from the data up (bottom-up).
    normalize
        Normalize hidden layers, for --model hierarchical.
    linear
        Add linear maps to the networks, start them at probabilistic PCA, and raise the learning
        rate over the first 40 epochs. The default is yes for complete rows (n, d) of real values
        with a standardized Gaussian likelihood, if the other parts have their defaults.
    likelihood
        Family of the likelihood p(x | z). The default is discretized-logistic for 8-bit color
        images, negative-binomial for integers above 1 in rows, gaussian for rows of floats below
        0 or above 255, and bernoulli for other data. The columns of a table determine theirs.
    scale
        Standard deviation of a Gaussian likelihood: predicted by the network (predicted), one
        learned parameter (learned), or a number.
    logistics
        Number of logistic distributions in the mixture of each element, for --likelihood
        discretized-logistic-mixture.
    library_size
        Model the means of counts as shares of the total of their row. The pair receives the log of
        this observed total as context.
    posterior
        Family of the approximate posterior q(z | x): normal distributions, or flows of affine
        (iaf) or spline autoregressive layers.
    prior
        Prior of z, or of the top level. conditional learns a prior that depends on the context.
        vamp is a mixture of approximate posteriors of pseudo-inputs, which start at training data.
    components
        Number of components of --prior gaussian-mixture (default: 10) or --prior vamp (default:
        500, or all training rows if there are fewer); number of clusters of --model mixture
        (default: 10).
    bayesian_decoder
        Give the weights of the decoder a prior and an approximate posterior.
    condition
        What the encoder and the decoder of a conditional VAE receive: the labels as one-hot vectors
        (label), the array "context" of the data file (context), or both.
    num_labels
        Number of training rows that keep their label, equally many for each class. The pair
        receives labels as whole numbers, and -1 for a hidden label. --model semi-supervised needs
        this option. A pair of your own receives no labels without it.
    classification_weight
        Weight of log q(y | x), the classifier, on rows with labels, for --model semi-supervised.
    """

    model: str = "vae"
    network: Literal["auto", "mlp", "conv", "recurrent"] = "auto"
    latent_dim: tuple[int, ...] = (20,)
    hidden: Annotated[tuple[int, ...], WIDTHS] = (128, 64)
    embedding_dim: int = 32
    word_dropout: float = 0.0
    channels: tuple[int, ...] = (32, 64)
    blocks: int = 0
    activation: Literal["relu", "leaky-relu", "elu", "silu", "softplus", "tanh", "glu"] = "relu"
    guide: Annotated[Literal["top-down", "bottom-up"], OF_INFERENCE] = "top-down"
    normalize: bool = True
    linear: bool | None = None
    likelihood: Annotated[
        Literal[
            "bernoulli",
            "continuous-bernoulli",
            "gaussian",
            "student-t",
            "categorical",
            "discretized-logistic",
            "discretized-logistic-mixture",
            "poisson",
            "negative-binomial",
            "zero-inflated-negative-binomial",
        ]
        | None,
        OF_LIKELIHOOD,
    ] = None
    scale: Annotated[str, OF_LIKELIHOOD] = "predicted"
    logistics: Annotated[int, OF_LIKELIHOOD] = 10
    library_size: Annotated[bool, OF_LIKELIHOOD] = False
    posterior: Annotated[
        Literal["diagonal-normal", "full-rank-normal", "low-rank-normal", "iaf", "spline"],
        OF_INFERENCE,
    ] = "diagonal-normal"
    prior: Literal["standard-normal", "gaussian-mixture", "flow", "vamp", "conditional"] = (
        "standard-normal"
    )
    components: int | None = None
    bayesian_decoder: bool = False
    condition: tuple[Literal["label", "context"], ...] = ()
    num_labels: int | None = None
    classification_weight: float = 50.0

    def __post_init__(self) -> None:
        _reject_ignored_fields(self)
        self._require_discrete()
        self._require_sizes()
        self._require_levels()
        if self.prior == "flow" and self.top_dim < 2:
            raise UsageError(f"--prior flow needs a `latent_dim` of at least 2, got {self.top_dim}")
        if self.network == "conv" and self.activation == "glu":
            raise UsageError("--activation glu needs --network mlp, got --network conv")

    def _require_sizes(self) -> None:
        for name in ("latent_dim", "hidden", "channels", "embedding_dim", "logistics"):
            value = getattr(self, name)
            sizes = value if isinstance(value, tuple) else (value,)
            if any(size < 1 for size in sizes):
                raise UsageError(f"must be at least 1, got {in_words(value)}", argument=name)
            if not sizes and name != "hidden":
                raise UsageError("must have at least one number, got none", argument=name)
        if self.blocks < 0:
            raise UsageError(f"must be at least 0, got {self.blocks}", argument="blocks")
        if self.components is not None and self.components < 1:
            raise UsageError(f"must be at least 1, got {self.components}", argument="components")

    def _require_levels(self) -> None:
        """Raise `UsageError` for a number of levels that the model cannot have."""
        levels = len(self.latent_dim)
        if (
            levels > 1
            and self.model not in ("hierarchical", "multilevel")
            and ":" not in self.model
        ):
            raise UsageError(
                f"must be one number for --model {self.model}, got {levels} numbers; --model "
                "hierarchical has several levels",
                argument="latent_dim",
            )
        if levels < 2 and self.model == "hierarchical":
            raise UsageError(
                f"--model hierarchical needs at least two levels, got --latent-dim {self.top_dim}; "
                "give their dimensions from the data upwards, for example --latent-dim 32 16"
            )
        if self.prior == "vamp" and self.guide == "bottom-up":
            raise UsageError(
                "--prior vamp needs --guide top-down, which has an approximate posterior of the "
                "top level given the data; got --guide bottom-up"
            )

    def _require_discrete(self) -> None:
        """Raise `UsageError` for options that do not agree with the discrete latents."""
        if self.model == "semi-supervised" and self.num_labels is None:
            raise UsageError("--model semi-supervised needs --num-labels")
        takes = self.model == "semi-supervised" or ":" in self.model
        if self.num_labels is not None and not takes:
            raise UsageError(
                "--num-labels needs --model semi-supervised or a pair of your own, got --model "
                f"{self.model}"
            )
        if self.model in ("semi-supervised", "mixture") and (self.condition or self.library_size):
            raise UsageError(f"--model {self.model} does not support --condition or --library-size")
        if self.model == "mixture" and self.prior != Model.prior:
            raise UsageError(f"--model mixture has its own prior, got --prior {self.prior}")
        if self.model == "semi-supervised" and self.prior == "vamp":
            raise UsageError("--model semi-supervised does not support --prior vamp")

    @property
    def top_dim(self) -> int:
        """The dimension of the latent vector, or of the top level's."""
        return self.latent_dim[-1]


_GRADIENTS = {
    "elbo": ("total", "sticking-the-landing"),
    "importance-weighted": ("total", "sticking-the-landing", "doubly-reparametrized"),
}
"""The gradients of an objective, if there are several."""


@dataclass(frozen=True, kw_only=True)
class Objective:
    """The objective that training maximizes.

    Parameters
    ----------
    objective
        The ELBO (elbo); the ELBO with its KL in closed form (analytic); the importance-weighted
        bound (importance-weighted); the ELBO with a minimum KL (free-bits); or the β-TCVAE, with
        separate weights on mutual information, total correlation and the KL of each unit
        (total-correlation). The default is the recipe of the pair, or elbo if it has no recipe.
    num_samples
        Samples for each datum: particles of the ELBO, or importance samples of the
        importance-weighted bound.
    gradient
        Gradient estimator of the guide, for --objective elbo or importance-weighted.
    free_bits
        Minimum KL of each latent unit in nats, for --objective free-bits.
    mutual_information
        Weight on the mutual information between datum and code, for --objective total-correlation.
    total_correlation
        Weight on the total correlation of the units of the code, for --objective total-correlation.
    dimension_kl
        Weight on the KL of the aggregate posterior of each unit, for --objective total-correlation.
    beta
        Weight on the KL. 1 gives the ELBO.
    warm_up
        How the weight on the KL reaches --beta: at once (none), linearly (linear), or linearly in
        each cycle (cyclical). The default is the recipe of the pair, or none if it has no recipe.
    warm_up_epochs
        Epochs of the linear warm-up, or of one cycle.
    learning_rate_schedule
        How the learning rate changes over all epochs.
    """

    objective: (
        Literal["elbo", "analytic", "importance-weighted", "free-bits", "total-correlation"] | None
    ) = None
    num_samples: int = 1
    gradient: Literal["total", "sticking-the-landing", "doubly-reparametrized"] = "total"
    free_bits: float = 0.1
    mutual_information: float = 1.0
    total_correlation: float = 6.0
    dimension_kl: float = 1.0
    beta: float = 1.0
    warm_up: Literal["none", "linear", "cyclical"] | None = None
    warm_up_epochs: float = 10.0
    learning_rate_schedule: Annotated[Literal["constant", "linear", "cosine"], OF_TRAINING] = (
        "constant"
    )

    def __post_init__(self) -> None:
        _reject_ignored_fields(self)
        self._require_numbers()
        if self.objective in ("free-bits", "total-correlation") and self.num_samples > 1:
            raise UsageError(
                f"--objective {self.objective} uses one sample for each datum, got --num-samples "
                f"{self.num_samples}"
            )
        objective = self.objective or "elbo"
        gradients = _GRADIENTS.get(objective, ("total",))
        if self.gradient not in gradients:
            raise UsageError(
                f"must be {' or '.join(gradients)} for --objective {objective}, got "
                f"{self.gradient}",
                argument="gradient",
            )

    def _require_numbers(self) -> None:
        if self.num_samples < 1:
            raise UsageError(f"must be at least 1, got {self.num_samples}", argument="num_samples")
        weights = ("beta", "free_bits", "mutual_information", "total_correlation", "dimension_kl")
        for name in weights:
            if getattr(self, name) < 0:
                raise UsageError(f"must be at least 0, got {getattr(self, name)}", argument=name)
        if not self.warm_up_epochs > 0:
            raise UsageError(
                f"must be positive, got {self.warm_up_epochs}", argument="warm_up_epochs"
            )


_APPLIES_WITH: dict[str, dict[str, tuple[str | None, ...]]] = {
    "embedding_dim": {"network": ("auto", "recurrent")},
    "word_dropout": {"network": ("auto", "recurrent")},
    "channels": {"network": ("conv",)},
    "blocks": {"network": ("conv",)},
    "guide": {"model": ("hierarchical",)},
    "normalize": {"model": ("hierarchical",)},
    "classification_weight": {"model": ("semi-supervised",)},
    "components": {"prior": ("gaussian-mixture", "vamp"), "model": ("mixture",)},
    "scale": {"likelihood": ("gaussian",)},
    "logistics": {"likelihood": ("discretized-logistic-mixture",)},
    "library_size": {"likelihood": COUNTS},
    "binarize": {"likelihood": ("bernoulli", None)},
    "free_bits": {"objective": ("free-bits",)},
    "mutual_information": {"objective": ("total-correlation",)},
    "total_correlation": {"objective": ("total-correlation",)},
    "dimension_kl": {"objective": ("total-correlation",)},
    "warm_up_epochs": {"warm_up": ("linear", "cyclical")},
}
"""Options that apply only with some values of another option, or of one of two options."""

_ANY_PAIR = ("model", "latent_dim", "hidden", "library_size", "condition", "num_labels")
"""Options of `Model` that apply to a pair of the user's own."""

_OF_MODELS = {field.name for field in fields(Model)}


def reject_ignored(given: Iterable[str], chosen: Mapping[str, Any]) -> None:
    """Raise `UsageError` for a given option that the chosen configuration would ignore."""
    model = chosen.get("model") or ""
    ignored = _OF_MODELS - set(_ANY_PAIR) if ":" in model else set()
    for name in given:
        if name in ignored:
            raise UsageError(
                f"does not apply to a pair of your own, got --model {model}", argument=name
            )
        needed = _APPLIES_WITH.get(name, {})
        known = {of: chosen[of] for of in needed if of in chosen and of not in ignored}
        if known and not any(value in needed[of] for of, value in known.items()):
            kinds = (f"{option_of(of)} {' or '.join(filter(None, needed[of]))}" for of in needed)
            got = (
                f"{option_of(of)} {value}" if value else f"no {option_of(of)}"
                for of, value in known.items()
            )
            raise UsageError(
                f"applies only with {', or with '.join(kinds)}; got {' and '.join(got)}",
                argument=name,
            )


def _reject_ignored_fields(config: Model | Objective) -> None:
    own = {field.name: getattr(config, field.name) for field in fields(config)}
    reject_ignored((f.name for f in fields(config) if own[f.name] != f.default), own)


def option_of(name: str) -> str:
    """The option that sets the argument of this name.

    >>> option_of("free_bits")
    '--free-bits'
    """
    return f"--{name.replace('_', '-')}"


def in_words(value: Any) -> str:
    """A value as a user types it.

    >>> in_words((128, 64)), in_words(()), in_words("iaf")
    ('128 64', 'none', 'iaf')
    """
    return " ".join(map(str, value)) or NONE if isinstance(value, tuple) else str(value)
