"""The options that build a pair and its objective, and which of them go together.

This file imports nothing heavy, so that ``pyro-vae --help`` answers at once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pyro_vae.errors import UsageError

if TYPE_CHECKING:
    from pyro_vae.data.split import Data


COUNTS = ("poisson", "negative-binomial", "zero-inflated-negative-binomial")
"""Likelihoods of whole numbers, whose 8-bit data are no intensities."""


@dataclass(frozen=True, kw_only=True)
class Model:
    """Which pair is built, and of which parts.

    Parameters
    ----------
    model
        vae; hierarchical; semi-supervised, with labels of some rows; mixture, which clusters;
        deep-markov, for sequences, which are rows (steps, d) or images read from the top; or
        module:Class for a pair of your own, whose constructor gets those of data_shape,
        latent_dim, hidden, context_shapes and num_classes that it takes; what else builds our
        models is refused beside it.
    network
        Multilayer perceptrons, convolutions for images, or recurrent networks for text; auto takes
        the last for text and the first for other data.
    latent_dim
        Dimension of the latent vector; of each level, from the data upwards, for --model
        hierarchical.
    hidden
        Widths of the encoder's hidden layers, from the data inwards; the decoder reverses them.
        For text and deep-markov, the first is the width of each network.
    embedding_dim
        Width of the embedding of a character, for text.
    word_dropout
        Rate at which the decoder of text is not shown the character before, in training.
    channels
        Channels of the encoder's convolutions, for --network conv.
    blocks
        Residual blocks beside each convolution, for --network conv.
    activation
        Nonlinearity of the hidden layers; glu makes gated ones, for --network mlp.
    guide
        How --model hierarchical infers its levels: from the top down, correcting the model's own
        conditionals, or from the data up.
    normalize
        Normalise hidden layers, for --model hierarchical.
    likelihood
        Family of p(x | z).
    scale
        Standard deviation of a Gaussian likelihood: predicted by the network, learned as one
        parameter, or a number.
    logistics
        How many logistic distributions are mixed for each element, for --likelihood
        discretized-logistic-mixture.
    library_size
        Whether means of counts are shares of the total of their row, which is observed and given
        to the pair as context.
    posterior
        Family of q(z | x): normals, or flows of autoregressive layers, affine (iaf) or spline.
    prior
        Prior of z, or of the top level; "conditional" learns one that depends on the context,
        "vamp" is a mixture of posteriors of pseudo-inputs that start at data.
    components
        Terms of --prior gaussian-mixture, 10 by default, or vamp, 500, or all rows where there are
        fewer; clusters of --model mixture, 10.
    bayesian_decoder
        Give the decoder's weights a prior and a posterior of their own.
    condition
        What encoder and decoder are given, in a conditional VAE: the labels, one-hot, the
        "context" of the data file, or both.
    num_labels
        How many training rows keep their label, as many of each class; the pair gets whole numbers,
        -1 elsewhere. For --model semi-supervised, which needs it, or a pair of your own, which
        gets no labels by default.
    classification_weight
        Weight of the classifier's log q(y | x) on rows with labels, for --model semi-supervised.
    """

    model: str = "vae"
    network: Literal["auto", "mlp", "conv", "recurrent"] = "auto"
    latent_dim: tuple[int, ...] = (20,)
    hidden: tuple[int, ...] = (128, 64)
    embedding_dim: int = 32
    word_dropout: float = 0.0
    channels: tuple[int, ...] = (32, 64)
    blocks: int = 0
    activation: Literal["relu", "leaky-relu", "elu", "silu", "softplus", "tanh", "glu"] = "relu"
    guide: Literal["top-down", "bottom-up"] = "top-down"
    normalize: bool = True
    likelihood: Literal[
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
    ] = "bernoulli"
    scale: str = "predicted"
    logistics: int = 10
    library_size: bool = False
    posterior: Literal[
        "diagonal-normal", "full-rank-normal", "low-rank-normal", "iaf", "spline"
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
        _require_heard_fields(self)
        self._require_discrete()
        for name in ("latent_dim", "hidden", "channels", "embedding_dim", "logistics"):
            value = getattr(self, name)
            sizes = value if isinstance(value, tuple) else (value,)
            if any(size < 1 for size in sizes):
                raise UsageError(f"{name} must be positive, {', '.join(map(str, sizes))} came")
        if len(self.latent_dim) > 1 and self.model != "hierarchical" and ":" not in self.model:
            raise UsageError(
                f"latent_dim of --model {self.model} is one number, {len(self.latent_dim)} came: "
                "several levels are for --model hierarchical"
            )
        if len(self.latent_dim) < 2 and self.model == "hierarchical":
            raise UsageError(
                "--model hierarchical needs two levels or more, from the data upwards: "
                f"--latent-dim 32 16, say; {self.top_dim} came"
            )
        if self.prior == "vamp" and self.guide == "bottom-up":
            raise UsageError(
                "--prior vamp needs q of the top level given the data: --guide top-down"
            )
        if self.prior == "flow" and self.top_dim < 2:
            raise UsageError(f"--prior flow needs a latent_dim of 2 or more, {self.top_dim} came")
        if self.network == "conv" and self.activation == "glu":
            raise UsageError("--activation glu is for --network mlp, conv came")
        if self.blocks < 0:
            raise UsageError(f"blocks must not be negative, {self.blocks} came")
        if self.components is not None and self.components < 1:
            raise UsageError(f"components must be 1 or more, {self.components} came")

    def _require_discrete(self) -> None:
        """Options that go with discrete latents, or do not."""
        if self.model == "semi-supervised" and self.num_labels is None:
            raise UsageError("--model semi-supervised needs --num-labels")
        takes = self.model == "semi-supervised" or ":" in self.model
        if self.num_labels is not None and not takes:
            raise UsageError(f"num_labels are for --model semi-supervised, {self.model} came")
        if self.model in ("semi-supervised", "mixture") and (self.condition or self.library_size):
            raise UsageError(f"--model {self.model} takes no condition and no library size")
        if self.model == "mixture" and self.prior != Model.prior:
            raise UsageError(f"--model mixture has a prior of its own, --prior {self.prior} came")
        if self.model == "semi-supervised" and self.prior == "vamp":
            raise UsageError("--prior vamp is for pairs without classes")

    @property
    def top_dim(self) -> int:
        """The dimension of the latent vector, or of the top level's."""
        return self.latent_dim[-1]


@dataclass(frozen=True, kw_only=True)
class Objective:
    """What training maximises.

    Parameters
    ----------
    objective
        The ELBO; the same with its KL in closed form; the importance-weighted bound; free bits; or
        weights on mutual information, total correlation and KL by unit (β-TCVAE). By default what
        the pair's own recipe says, the ELBO where there is none.
    num_samples
        Samples for each datum: particles of the ELBO, weights of the importance-weighted bound.
    gradient
        How the gradient of elbo or importance-weighted reaches the guide.
    free_bits
        Floor of the KL of each latent unit, in nats, for --objective free-bits.
    mutual_information
        Weight on the mutual information of datum and code, for --objective total-correlation.
    total_correlation
        Weight on the total correlation of the code's units, for --objective total-correlation.
    dimension_kl
        Weight on the KL of each unit's aggregate, for --objective total-correlation.
    beta
        Weight on the KL; 1 is the ELBO.
    warm_up
        How the weight on the KL rises to beta: at once, linearly, or again in each cycle; by
        default as the pair's own recipe says, at once where there is none.
    warm_up_epochs
        Length of the linear rise, or of one cycle.
    learning_rate_schedule
        Course of the learning rate over all epochs.
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
    learning_rate_schedule: Literal["constant", "linear", "cosine"] = "constant"

    def __post_init__(self) -> None:
        _require_heard_fields(self)
        if self.num_samples < 1:
            raise UsageError(f"num_samples must be 1 or more, {self.num_samples} came")
        if self.objective in ("free-bits", "total-correlation") and self.num_samples > 1:
            raise UsageError(
                f"{self.objective} takes one sample, num_samples = {self.num_samples} came"
            )
        gradients = {
            "elbo": ("total", "sticking-the-landing"),
            "importance-weighted": ("total", "sticking-the-landing", "doubly-reparametrized"),
        }
        if self.gradient not in gradients.get(self.objective or "elbo", ("total",)):
            raise UsageError(
                f"gradient {self.gradient} is not for --objective {self.objective or 'elbo'}"
            )
        weights = ("beta", "free_bits", "mutual_information", "total_correlation", "dimension_kl")
        for name in weights:
            if getattr(self, name) < 0:
                raise UsageError(f"{name} must not be negative, {getattr(self, name)} came")
        if not self.warm_up_epochs > 0:
            raise UsageError(f"warm_up_epochs must be positive, {self.warm_up_epochs} came")


@dataclass(frozen=True, kw_only=True)
class Input:
    """Where data come from and how they are shown to the pair.

    Parameters
    ----------
    data_dir
        Folder of torchvision's files; else the environment variable PYRO_VAE_DATA.
    binarize
        Grey intensities under a Bernoulli likelihood: drawn at each visit, drawn once, or passed
        as they are, which is no likelihood.
    length
        Greatest width of a row of text in characters, the end counted: docstrings that are longer
        are left out, lines of a file are cut.
    """

    data_dir: Path | None = None
    binarize: Literal["dynamic", "fixed", "none"] = "dynamic"
    length: int = 60


_ONLY_FOR: dict[str, dict[str, tuple[str, ...]]] = {
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
    "binarize": {"likelihood": ("bernoulli",)},
    "free_bits": {"objective": ("free-bits",)},
    "mutual_information": {"objective": ("total-correlation",)},
    "total_correlation": {"objective": ("total-correlation",)},
    "dimension_kl": {"objective": ("total-correlation",)},
    "warm_up_epochs": {"warm_up": ("linear", "cyclical")},
}
"""Options that only some values of another option hear, or of either of two."""

_ANY_PAIR = ("model", "latent_dim", "hidden", "library_size", "condition", "num_labels")
"""Options of `Model` that a pair of a user's own hears."""

_OF_MODELS = {field.name for field in fields(Model)}


def require_heard(given: Iterable[str], chosen: Mapping[str, Any]) -> None:
    """Raise `UsageError` for a given option that nothing hears of what is chosen."""
    model = chosen.get("model") or ""
    unheard = _OF_MODELS - set(_ANY_PAIR) if ":" in model else set()
    for name in given:
        if name in unheard:
            raise UsageError(
                f"{option_of(name)} is not for a pair of your own, --model {model} came"
            )
        goes_with = _ONLY_FOR.get(name, {})
        known = {of: chosen[of] for of in goes_with if of in chosen and of not in unheard}
        if known and not any(value in goes_with[of] for of, value in known.items()):
            kinds = (f"{option_of(of)} {' or '.join(goes_with[of])}" for of in goes_with)
            came = (
                f"{option_of(of)} {value}" if value else f"no {option_of(of)}"
                for of, value in known.items()
            )
            raise UsageError(
                f"{option_of(name)} goes with {', or with '.join(kinds)}; {' and '.join(came)} came"
            )


def _require_heard_fields(config: Model | Objective) -> None:
    own = {field.name: getattr(config, field.name) for field in fields(config)}
    require_heard((f.name for f in fields(config) if own[f.name] != f.default), own)


def require_data(source: Input, data: Data) -> None:
    """Raise `UsageError` for options of data that these data do not hear."""
    from pyro_vae.data.datasets import TORCHVISION

    if source.length != Input.length and data.vocabulary is None:
        raise UsageError(f"--length is for text, {data.name} is none")
    if source.data_dir is not None and data.name not in TORCHVISION:
        raise UsageError(f"--data-dir is for {', '.join(TORCHVISION)}, {data.name} came")


def option_of(name: str) -> str:
    """The option that gives an argument of this name.

    >>> option_of("free_bits")
    '--free-bits'
    """
    return f"--{name.replace('_', '-')}"
