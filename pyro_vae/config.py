"""The typed configuration: what Python takes as keywords and the command line as options.

This file imports nothing heavy, so that ``pyro-vae --help`` answers at once. It is the one place
where names become parts (`make_pair`, `make_objective`, `make_beta`).
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

from pyro_vae.errors import UsageError, nearest

if TYPE_CHECKING:
    from pyro.infer import ELBO
    from torch import nn

    from pyro_vae.datasets import Data
    from pyro_vae.schedules import Schedule

EngineName: TypeAlias = Literal["auto", "eager", "traced", "compiled"]

ENGINES: tuple[str, ...] = get_args(EngineName)


COUNTS = ("poisson", "negative-binomial", "zero-inflated-negative-binomial")
"""Likelihoods of whole numbers, whose 8-bit data are no intensities."""


def require_engine(name: str) -> str:
    """The name of an engine, or `UsageError` with the nearest."""
    if name not in ENGINES:
        raise UsageError(f"engine is '{name}'; {nearest(name, ENGINES)}")
    return name


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How training is run: the keywords of `pyro_vae.fit`.

    Parameters
    ----------
    epochs
        Passes over the training data.
    batch_size
        Rows of a minibatch; by default 128, or all where there are fewer.
    learning_rate
        Step size of the optimiser.
    clip_norm
        Greatest global norm of the gradient; none by default.
    patience
        Stop after so many epochs without a better validation bound; never by default.
    seed
        Seeds every random draw of training.
    device
        "auto" is the GPU where there is one, else the CPU.
    precision
        "bfloat16" runs networks under autocast; parameters and densities stay in float32.
    engine
        How a step is run: as stock Pyro (eager), as a graph traced once and replayed (traced), or
        as that graph compiled; auto traces, and compiles where the steps to come repay it.
    checkpoint_seconds
        Least time between two checkpoints, which are written at the end of an epoch.
    tensorboard
        Write the history for TensorBoard too.
    """

    epochs: int = 100
    batch_size: int | None = None
    learning_rate: float = 1e-3
    clip_norm: float | None = None
    patience: int | None = None
    seed: int = 0
    device: str = "auto"
    precision: Literal["float32", "bfloat16"] = "float32"
    engine: EngineName = "auto"
    checkpoint_seconds: float = 30.0
    tensorboard: bool = False

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "patience"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, int) and value >= 1):
                raise UsageError(f"{name} must be a whole number of 1 or more, {value} came")
        for name in ("learning_rate", "clip_norm"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, (int, float)) and 0 < value < inf):
                raise UsageError(f"{name} must be positive and finite, {value} came")
        if not (isinstance(self.seed, int) and 0 <= self.seed < 2**63):
            raise UsageError(f"seed must be a whole number from 0 to 2^63 - 1, {self.seed} came")
        if self.precision not in ("float32", "bfloat16"):
            raise UsageError(f"precision is float32 or bfloat16, '{self.precision}' came")
        require_engine(self.engine)

    def for_rows(self, n: int) -> Settings:
        """These settings, with what goes by the number of rows decided.

        >>> Settings().for_rows(1000).batch_size, Settings().for_rows(40).batch_size
        (128, 40)
        """
        return self if self.batch_size is not None else replace(self, batch_size=min(128, n))

    @classmethod
    def of(cls, keywords: dict[str, Any]) -> Settings:
        """Settings from keywords, an unknown one answered with the nearest known.

        >>> Settings.of({"epoch": 3})
        Traceback (most recent call last):
        ...
        pyro_vae.errors.UsageError: fit has no option 'epoch'; did you mean 'epochs'?
        """
        known = [field.name for field in fields(cls)]
        for name in keywords:
            if name not in known:
                raise UsageError(f"fit has no option '{name}'; {nearest(name, known)}")
        return cls(**keywords)


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
            raise UsageError(f"{_option(name)} is not for a pair of your own, --model {model} came")
        goes_with = _ONLY_FOR.get(name, {})
        known = {of: chosen[of] for of in goes_with if of in chosen and of not in unheard}
        if known and not any(value in goes_with[of] for of, value in known.items()):
            kinds = (f"{_option(of)} {' or '.join(goes_with[of])}" for of in goes_with)
            came = (
                f"{_option(of)} {value}" if value else f"no {_option(of)}"
                for of, value in known.items()
            )
            raise UsageError(
                f"{_option(name)} goes with {', or with '.join(kinds)}; {' and '.join(came)} came"
            )


def _require_heard_fields(config: Model | Objective) -> None:
    own = {field.name: getattr(config, field.name) for field in fields(config)}
    require_heard((f.name for f in fields(config) if own[f.name] != f.default), own)


def require_data(source: Input, data: Data) -> None:
    """Raise `UsageError` for options of data that these data do not hear."""
    from pyro_vae.datasets import TORCHVISION

    if source.length != Input.length and data.vocabulary is None:
        raise UsageError(f"--length is for text, {data.name} is none")
    if source.data_dir is not None and data.name not in TORCHVISION:
        raise UsageError(f"--data-dir is for {', '.join(TORCHVISION)}, {data.name} came")


def _option(name: str) -> str:
    """The option that gives an argument of this name.

    >>> _option("free_bits")
    '--free-bits'
    """
    return f"--{name.replace('_', '-')}"


def make_pair(config: Model, data: Data) -> nn.Module:
    """The pair that a configuration asks for, on data of this shape."""
    pair = _make_pair(config, data)
    if not config.bayesian_decoder:
        return pair
    from pyro_vae.bayesian import BayesianDecoder

    return BayesianDecoder(pair)


def _make_pair(config: Model, data: Data) -> nn.Module:
    context = context_shapes(config, data)
    if ":" in config.model:
        given = {
            "data_shape": data.shape,
            "latent_dim": plain_dim(config.latent_dim),
            "hidden": config.hidden,
            "context_shapes": context,
            "num_classes": data.num_classes,
        }
        pair = make_user_pair(config.model, given)
        takes = inspect.signature(type(pair).__init__).parameters
        untaken = [name for name in ("latent_dim", "hidden") if name not in takes]
        _require_default(config, config.model, *untaken)
        return pair
    if config.model == "deep-markov":
        return _deep_markov_model(config, data)
    makers: dict[str, Callable[[Model, dict[str, Any]], tuple[Any, nn.Module | None]]] = {
        "vae": _make_vae,
        "hierarchical": _make_hierarchical,
        "semi-supervised": lambda of, common: _make_semisupervised(of, common, data),
        "mixture": _make_mixture,
    }
    if config.model not in makers:
        known = nearest(config.model, [*makers, "deep-markov"])
        raise UsageError(f"no model is called '{config.model}'; {known} (or give module:Class)")
    if data.train.lengths is not None:
        raise UsageError("rows of unequal lengths are for --model deep-markov")
    if data.vocabulary is not None:
        return _text_pair(config, data, context)
    if config.network == "recurrent":
        raise UsageError(f"--network recurrent is for text, {data.name} is none")
    _require_default(config, f"{data.name} is no text and", "embedding_dim", "word_dropout")
    common: dict[str, Any] = {
        "data_shape": data.shape,
        "hidden": config.hidden,
        "likelihood": make_likelihood(config),
        "prior": None if config.model == "semi-supervised" else make_prior(config, context),
        "context_shapes": context,
        "activation": make_activation(config.activation),
    }
    if config.network == "conv":
        common |= {"channels": config.channels, "blocks": config.blocks}
    pair, encoder = makers[config.model](config, common)
    if config.prior == "vamp" and encoder is not None:
        pair.prior = _make_vamp(config, encoder, data, context)
    return pair


def _make_vae(config: Model, common: dict[str, Any]) -> tuple[Any, nn.Module]:
    """The pair, and its q(z | x, context)."""
    from pyro_vae.models.vae import VAE

    make: Any = VAE.conv if config.network == "conv" else VAE.mlp
    pair = make(latent_dim=config.top_dim, posterior=make_posterior(config), **common)
    return pair, pair.encoder


def _make_hierarchical(config: Model, common: dict[str, Any]) -> tuple[Any, nn.Module | None]:
    """The pair, and q of its top level given the data, where the guide has it."""
    from pyro_vae.models.hierarchical import HierarchicalVAE

    if config.posterior != Model.posterior:
        raise UsageError(
            f"--model hierarchical has diagonal-normal posteriors, {config.posterior} came"
        )
    make: Any = HierarchicalVAE.conv if config.network == "conv" else HierarchicalVAE.mlp
    top_down = config.guide == "top-down"
    pair = make(
        latent_dim=config.latent_dim, top_down=top_down, normalize=config.normalize, **common
    )
    return pair, pair.inference.top() if top_down else None


def _make_semisupervised(
    config: Model, common: dict[str, Any], data: Data
) -> tuple[Any, nn.Module | None]:
    from pyro_vae.models.semisupervised import SemiSupervisedVAE

    if data.num_classes < 2:
        raise UsageError(f"--model semi-supervised needs labels, {data.name} has none")
    own = {
        "prior": make_prior(config, ((data.num_classes,),)),
        "num_classes": data.num_classes,
        "classification_weight": config.classification_weight,
        "latent_dim": config.top_dim,
        "posterior": make_posterior(config),
    }
    make: Any = SemiSupervisedVAE.conv if config.network == "conv" else SemiSupervisedVAE.mlp
    return make(**{k: v for k, v in common.items() if k != "context_shapes"} | own), None


def _make_mixture(config: Model, common: dict[str, Any]) -> tuple[Any, nn.Module | None]:
    from pyro_vae.models.mixture import MixtureVAE

    own = {
        "components": config.components or 10,
        "latent_dim": config.top_dim,
        "posterior": make_posterior(config),
    }
    kept = {k: v for k, v in common.items() if k not in ("prior", "context_shapes")}
    make: Any = MixtureVAE.conv if config.network == "conv" else MixtureVAE.mlp
    return make(**kept | own), None


def _make_vamp(config: Model, encoder: nn.Module, data: Data, context: Sequence[Any]) -> nn.Module:
    from pyro_vae.priors import VampPrior

    if context:
        raise UsageError("--prior vamp is for pairs without context here, --condition came with it")
    whole = config.likelihood in COUNTS
    return VampPrior.of_data(encoder, data.train.x, components=config.components, whole=whole)


def plain_dim(latent_dim: Sequence[int]) -> int | tuple[int, ...]:
    """One dimension as a number, several as a tuple: what a pair of a user's own is given."""
    return latent_dim[0] if len(latent_dim) == 1 else tuple(latent_dim)


def _deep_markov_model(config: Model, data: Data) -> nn.Module:
    """The deep Markov model that a configuration asks for."""
    _require_default(config, "--model deep-markov", "network", "prior", "condition", "activation")
    _require_default(config, "--model deep-markov", "library_size", "embedding_dim", "word_dropout")
    _require_one_width(config, "--model deep-markov")
    sequence = data.shape[1:] if len(data.shape) == 3 and data.shape[0] == 1 else data.shape
    if data.vocabulary is not None or len(sequence) != 2:
        raise UsageError(
            "--model deep-markov is for sequences (n, steps, d), or images of one channel, "
            f"{'text' if data.vocabulary else f'data of shape {data.shape}'} came"
        )
    from pyro_vae.models.sequence import DeepMarkovModel

    return DeepMarkovModel.usual(
        *sequence,
        latent_dim=config.top_dim,
        hidden=config.hidden[0],
        likelihood=make_likelihood(config),
        posterior=make_posterior(config),
        ragged=data.train.lengths is not None,
    )


def _require_default(config: Model, what: str, *names: str) -> None:
    for name in names:
        if getattr(config, name) != getattr(Model, name):
            raise UsageError(f"{what} takes no {_option(name)}: {getattr(config, name)} came")


def _require_one_width(config: Model, what: str) -> None:
    if config.hidden != Model.hidden and len(config.hidden) != 1:
        raise UsageError(f"{what} takes one width as --hidden, {len(config.hidden)} came")


def _text_pair(config: Model, data: Data, context: Sequence[tuple[int, ...]]) -> nn.Module:
    """The VAE of rows of characters that a configuration asks for."""
    if config.network not in ("auto", "recurrent"):
        raise UsageError(f"--network {config.network} is not for text: use recurrent")
    if config.model != "vae" or config.prior == "vamp":
        raise UsageError("text is for --model vae, and for priors other than vamp")
    _require_default(config, "text", "likelihood", "scale", "library_size")
    _require_default(config, "text", "activation")
    _require_one_width(config, "text")
    from pyro_vae.models.vae import VAE

    return VAE.recurrent(
        data.shape,
        len(data.vocabulary or ""),
        latent_dim=config.top_dim,
        hidden=config.hidden[0],
        embedding_dim=config.embedding_dim,
        word_dropout=config.word_dropout,
        posterior=make_posterior(config),
        prior=make_prior(config, context),
        context_shapes=context,
    )


def context_shapes(config: Model, data: Data) -> tuple[tuple[int, ...], ...]:
    """The row shapes of what a configuration gives to the pair beside the data."""
    shapes: list[tuple[int, ...]] = []
    if "label" in config.condition:
        if data.train.labels is None:
            raise UsageError(f"--condition label needs labels, {data.name} has none")
        shapes.append((data.num_classes,))
    if "context" in config.condition:
        if data.train.context is None:
            raise UsageError(f"--condition context needs an array 'context', {data.name} has none")
        shapes.append(tuple(data.train.context.shape[1:]))
    if config.library_size:
        shapes.append((1,))
    return tuple(shapes)


def make_user_pair(path: str, given: dict[str, Any]) -> nn.Module:
    """An instance of ``module:Class``, made with those of the given arguments that it takes."""
    kind = user_class(path)
    signature = inspect.signature(kind.__init__)
    taken = {name: value for name, value in given.items() if name in signature.parameters}
    missing = [
        name
        for name, parameter in list(signature.parameters.items())[1:]
        if parameter.default is parameter.empty
        and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        and name not in taken
    ]
    if missing:
        raise UsageError(
            f"{path} takes '{missing[0]}', which the command line cannot give; it gives "
            f"{', '.join(given)}"
        )
    try:
        with current_folder():
            return kind(**taken)
    except Exception as error:  # a user's own code may raise anything
        raise UsageError(f"{path} cannot be made: {type(error).__name__}: {error}") from error


@contextmanager
def current_folder() -> Iterator[None]:
    """Python finds modules of the current folder too; afterwards ``sys.path`` is as it was.

    What a module itself adds to ``sys.path`` as it is imported stays there.
    """
    here = str(Path.cwd())
    added = "" not in sys.path and here not in sys.path
    if added:
        sys.path.insert(0, here)
    try:
        yield
    finally:
        if added and here in sys.path:
            sys.path.remove(here)


def user_class(path: str) -> type[nn.Module]:
    """The class that ``module:Class`` names; modules in the current folder are found too.

    ``sys.path`` is afterwards as it was. The module stays in ``sys.modules``, as after any import:
    its class needs it.
    """
    module_name, _, name = path.partition(":")
    if not module_name or not name:
        raise UsageError(f"a pair is named module:Class, '{path}' came")
    try:
        with current_folder():
            module = importlib.import_module(module_name)
    except Exception as error:  # a user's own code may raise anything
        raise UsageError(
            f"module '{module_name}' cannot be imported: {type(error).__name__}: {error}"
        ) from error
    if not hasattr(module, name):
        classes = [key for key, value in vars(module).items() if inspect.isclass(value)]
        raise UsageError(f"module '{module_name}' has no class '{name}'; {nearest(name, classes)}")
    kind = getattr(module, name)
    from torch import nn

    if not (inspect.isclass(kind) and issubclass(kind, nn.Module)):
        raise UsageError(f"a pair is a class that is an nn.Module, {path} is none")
    return kind


def make_likelihood(config: Model) -> Any:
    """The likelihood family of a configuration."""
    from pyro_vae import likelihoods

    if config.likelihood == "gaussian":
        if config.scale in ("predicted", "learned"):
            return likelihoods.Gaussian(learned=config.scale == "learned")
        try:
            scale = float(config.scale)
        except ValueError:
            raise UsageError(
                f"scale is 'predicted', 'learned' or a number, '{config.scale}' came"
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
    return kinds[config.likelihood]()


def make_posterior(config: Model) -> Any:
    """The posterior family of a configuration."""
    from pyro_vae import flows, posteriors

    wide = (max(64, config.top_dim),)
    kinds: dict[str, Callable[[], Any]] = {
        "diagonal-normal": posteriors.DiagonalNormal,
        "full-rank-normal": posteriors.FullRankNormal,
        "low-rank-normal": posteriors.LowRankNormal,
        "iaf": lambda: posteriors.FlowPosterior(config.top_dim, hidden=wide),
        "spline": lambda: posteriors.FlowPosterior(
            config.top_dim, bijection=flows.Spline(), hidden=wide
        ),
    }
    return kinds[config.posterior]()


def make_prior(config: Model, context: Sequence[tuple[int, ...]] = ()) -> Any:
    """The prior of a configuration, for context of these row shapes."""
    from pyro_vae import factors, networks, posteriors, priors

    if config.prior == "conditional":
        if not context:
            raise UsageError("--prior conditional needs context: give --condition too")
        family, activation = posteriors.DiagonalNormal(), make_activation(config.activation)
        outputs = family.outputs((config.top_dim,))
        network = (
            networks.ConvEncoder(
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
        "vamp": priors.StandardNormal,  # until the encoder is there, see `_make_vamp`
    }
    return kinds[config.prior](config.top_dim)


def make_activation(name: str) -> type[nn.Module]:
    """The torch module of an activation's name."""
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


def make_objective(config: Objective, num_data: int, enumerated: bool = False) -> ELBO | None:
    """The Pyro ELBO of a configuration, for so many training data; None leaves it to the pair.

    ``enumerated`` says whether the pair has discrete latents to be summed out.
    """
    from pyro.infer import Trace_ELBO, TraceMeanField_ELBO

    from pyro_vae import objectives

    if config.objective == "importance-weighted":
        gradient = objectives.Gradient(config.gradient)
        return objectives.ImportanceWeightedELBO(config.num_samples, gradient=gradient)
    if config.objective == "free-bits":
        return objectives.FreeBitsELBO(config.free_bits)
    if config.objective == "total-correlation":
        return objectives.TotalCorrelationELBO(
            num_data, config.total_correlation, config.mutual_information, config.dimension_kl
        )
    if config.objective is None and config.num_samples == 1 and config.gradient == "total":
        return None
    usual = objectives.EnumeratedELBO if enumerated else Trace_ELBO
    kind: Any = TraceMeanField_ELBO if config.objective == "analytic" else usual
    if config.gradient == "sticking-the-landing":
        kind = objectives.StickingTheLandingELBO
    return kind(
        num_particles=config.num_samples,
        vectorize_particles=config.num_samples > 1,
        max_plate_nesting=1,
    )


def make_beta(config: Objective) -> float | Schedule | None:
    """The weight on the KL, as a number or as a schedule; None leaves it to the pair."""
    from pyro_vae.schedules import Cyclical, Linear

    if config.warm_up == "linear":
        return Linear(config.warm_up_epochs, end=config.beta)
    if config.warm_up == "cyclical":
        return Cyclical(config.warm_up_epochs, end=config.beta)
    return None if config.warm_up is None and config.beta == 1 else config.beta


def make_learning_rate_schedule(config: Objective, epochs: int) -> Schedule | None:
    """The factor on the learning rate by epoch, or None where it is constant."""
    from pyro_vae.schedules import Cosine, Linear

    if config.learning_rate_schedule == "constant":
        return None
    if config.learning_rate_schedule == "linear":
        return Linear(epochs, start=1.0, end=0.0)
    return Cosine(epochs)
