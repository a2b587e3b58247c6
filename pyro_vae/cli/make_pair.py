"""Options become a pair."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyro_vae.cli.make_parts import (
    made_for_data,
    make_activation,
    make_likelihood,
    make_posterior,
    make_prior,
    missing_entries,
    standardizes,
    with_likelihood,
    with_linear,
)
from pyro_vae.cli.options import COUNTS, Model, in_words
from pyro_vae.errors import UsageError, nearest

if TYPE_CHECKING:
    from torch import nn

    from pyro_vae.data.split import Data


def make_pair(
    config: Model, data: Data, standardize: bool | None = None, masked: bool = False
) -> nn.Module:
    """The pair that a configuration describes, for these data.

    Arguments:
        standardize: whether real-valued data are standardized inside the pair; None for the
            default of these data.
        masked: whether entries are hidden during training.
    """
    config = with_likelihood(config, data)
    standardize = standardizes(config, data, standardize)
    config = with_linear(config, data, standardize, masked)
    pair = _make_pair(config, data, standardize, masked)
    if not config.bayesian_decoder:
        return pair
    from pyro_vae.models.bayesian_decoder import BayesianDecoder

    return BayesianDecoder(pair)


def _make_pair(config: Model, data: Data, standardize: bool, masked: bool) -> nn.Module:
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
        _reject(untaken, config, f"{config.model}, whose constructor does not take it")
        return pair
    if config.model == "multilevel":
        return _multilevel_vae(config, data, masked)
    if config.model == "deep-markov":
        return _deep_markov_model(config, data, masked)
    makers: dict[str, Callable[[Model, dict[str, Any]], tuple[Any, nn.Module | None]]] = {
        "vae": _make_vae,
        "hierarchical": _make_hierarchical,
        "semi-supervised": lambda of, common: _make_semisupervised(of, common, data),
        "mixture": _make_mixture,
    }
    if config.model not in makers:
        known = nearest(config.model, [*makers, "deep-markov", "multilevel"])
        raise UsageError(f"unknown model '{config.model}'; {known} (or give module:Class)")
    if data.table is not None:
        options = ("likelihood", "scale", "logistics", "library_size", "network")
        _reject(options, config, f"{data.name}, a table, whose likelihood its columns determine")
    if data.train.lengths is not None:
        raise UsageError("rows of unequal lengths need --model deep-markov")
    if data.vocabulary is not None:
        return _text_pair(config, data, context)
    if config.network == "recurrent":
        raise UsageError(f"--network recurrent applies only to text; {data.name} is not text")
    _reject(("embedding_dim", "word_dropout"), config, f"{data.name}, which is not text")
    common: dict[str, Any] = {
        "data_shape": data.shape,
        "hidden": config.hidden,
        "likelihood": made_for_data(make_likelihood(config), config, data, standardize, masked),
        "prior": None if config.model == "semi-supervised" else make_prior(config, context),
        "context_shapes": context,
        "activation": make_activation(config.activation),
    }
    if config.network == "conv":
        common |= {"channels": config.channels, "blocks": config.blocks}
    pair, encoder = makers[config.model](config, common)
    if config.linear:
        _start(pair, data)
    if config.prior == "vamp" and encoder is not None:
        pair.prior = _make_vamp(config, encoder, data, context)
    return pair


def _make_vae(config: Model, common: dict[str, Any]) -> tuple[Any, nn.Module]:
    """The pair, and its encoder q(z | x, context)."""
    from pyro_vae.models.vae import VAE

    if config.linear:
        common["linear"] = True

    make: Any = VAE.conv if config.network == "conv" else VAE.mlp
    pair = make(latent_dim=config.top_dim, posterior=make_posterior(config), **common)
    return pair, pair.encoder


def _start(pair: Any, data: Data) -> None:
    from pyro_vae.data.disk import sampled
    from pyro_vae.models.linear_start import start_at_ppca

    start_at_ppca(pair, sampled(data.train.x))


def _make_hierarchical(config: Model, common: dict[str, Any]) -> tuple[Any, nn.Module | None]:
    """The pair, and the encoder of its top level given the data, if the guide has one."""
    from pyro_vae.models.hierarchical import HierarchicalVAE

    if config.posterior != Model.posterior:
        raise UsageError(
            f"must be diagonal-normal for --model hierarchical, got {config.posterior}",
            argument="posterior",
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
        raise UsageError(f"--model semi-supervised needs labels, but {data.name} has no labels")
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
    from pyro_vae.data.disk import sampled
    from pyro_vae.parts.priors import VampPrior

    if context:
        raise UsageError(
            "--prior vamp needs a pair without context; remove --condition or --library-size"
        )
    if data.table is not None:
        raise UsageError("--prior vamp does not apply to tables, whose categories have no gradient")
    whole = config.likelihood in COUNTS
    return VampPrior.of_data(
        encoder, sampled(data.train.x), components=config.components, whole=whole
    )


def plain_dim(latent_dim: Sequence[int]) -> int | tuple[int, ...]:
    """One dimension as a number, several dimensions as a tuple, for a pair of the user's own."""
    return latent_dim[0] if len(latent_dim) == 1 else tuple(latent_dim)


def _deep_markov_model(config: Model, data: Data, masked: bool) -> nn.Module:
    """The deep Markov model that a configuration describes."""
    _reject(("network", "prior", "condition", "activation"), config, "--model deep-markov")
    _reject(("library_size", "embedding_dim", "word_dropout"), config, "--model deep-markov")
    _require_one_width(config, "--model deep-markov")
    sequence = data.shape[1:] if len(data.shape) == 3 and data.shape[0] == 1 else data.shape
    if data.vocabulary is not None or len(sequence) != 2:
        raise UsageError(
            "--model deep-markov needs sequences (n, steps, d), or images with one channel; got "
            f"{'text' if data.vocabulary else f'rows of shape {data.shape}'}"
        )
    from pyro_vae.models.sequence import DeepMarkovModel
    from pyro_vae.parts.missing import Missing

    likelihood = make_likelihood(config)
    return DeepMarkovModel.usual(
        *sequence,
        latent_dim=config.top_dim,
        hidden=config.hidden[0],
        likelihood=Missing(likelihood) if masked or missing_entries(data) else likelihood,
        posterior=make_posterior(config),
        ragged=data.train.lengths is not None,
    )


def _multilevel_vae(config: Model, data: Data, masked: bool) -> nn.Module:
    """The multilevel VAE that a configuration describes."""
    _reject(("network", "library_size"), config, "--model multilevel")
    if (levels := len(config.latent_dim)) > 2:
        raise UsageError(
            f"must be one or two numbers for --model multilevel, got {levels} numbers",
            argument="latent_dim",
        )
    if "label" in config.condition or config.prior in ("conditional", "vamp"):
        raise UsageError(
            "--model multilevel does not support --condition label and --prior conditional or vamp"
        )
    from pyro_vae.models.multilevel import MultilevelVAE

    return MultilevelVAE.mlp(
        data.shape[1:],
        latent_dim=config.latent_dim[0],
        group_dim=config.top_dim,
        hidden=config.hidden,
        likelihood=made_for_data(make_likelihood(config), config, data, False, masked),
        posterior=make_posterior(replace(config, latent_dim=config.latent_dim[:1])),
        group_posterior=make_posterior(config),
        prior=make_prior(config),
        members=data.shape[0],
        context_shapes=[shape[1:] for shape in context_shapes(config, data)],
        activation=make_activation(config.activation),
    )


def require_groups(model: str, group: str | None) -> None:
    """Raise `UsageError` if a model needs groups of rows but there are none, or the reverse."""
    if model == "multilevel" and group is None:
        raise UsageError("--model multilevel needs --group, the column or the array of group ids")
    if group is not None and model != "multilevel" and ":" not in model:
        raise UsageError(
            f"needs --model multilevel or a pair of your own, got --model {model}", argument="group"
        )


def _reject(names: Iterable[str], config: Model, what: str) -> None:
    """Raise `UsageError` for options that do not apply to a kind of model or data."""
    default = Model(likelihood="bernoulli")  # as `with_likelihood` sets it
    for name in names:
        value = getattr(config, name)
        if value != getattr(default, name):
            raise UsageError(f"does not apply to {what}; got {in_words(value)}", argument=name)


def _require_one_width(config: Model, what: str) -> None:
    if config.hidden != Model.hidden and len(config.hidden) != 1:
        raise UsageError(
            f"must be one number for {what}, got {len(config.hidden)} numbers", argument="hidden"
        )


def _text_pair(config: Model, data: Data, context: Sequence[tuple[int, ...]]) -> nn.Module:
    """The VAE of rows of characters that a configuration describes."""
    if config.network not in ("auto", "recurrent"):
        raise UsageError(f"must be recurrent for text, got {config.network}", argument="network")
    if config.model != "vae" or config.prior == "vamp":
        raise UsageError("text needs --model vae and a --prior other than vamp")
    _reject(("likelihood", "scale", "library_size", "activation"), config, "text")
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
    """The row shapes of the context that a configuration gives to the pair."""
    shapes: list[tuple[int, ...]] = []
    if "label" in config.condition:
        if data.train.labels is None:
            raise UsageError(f"--condition label needs labels, but {data.name} has no labels")
        shapes.append((data.num_classes,))
    if "context" in config.condition:
        if data.train.context is None:
            raise UsageError(
                f"--condition context needs an array 'context', but {data.name} has no such array"
            )
        shapes.append(tuple(data.train.context.shape[1:]))
    if config.library_size:
        shapes.append((1,))
    return tuple(shapes)


def make_user_pair(path: str, given: dict[str, Any]) -> nn.Module:
    """An instance of ``module:Class``, which receives the given arguments that it takes."""
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
            f"the constructor of {path} requires '{missing[0]}', but the command line gives only "
            f"{', '.join(given)}"
        )
    try:
        with current_folder():
            return kind(**taken)
    except Exception as error:  # The user's own code may raise anything.
        raise UsageError(f"cannot make {path}: {type(error).__name__}: {error}") from error


@contextmanager
def current_folder() -> Iterator[None]:
    """Let Python find modules of the current folder too, and restore ``sys.path`` afterwards.

    Folders that a module itself adds to ``sys.path`` during its import stay there.
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
    """The class that ``module:Class`` names. The module may be in the current folder.

    ``sys.path`` does not change. The module stays in ``sys.modules``, because its class needs it.
    """
    module_name, _, name = path.partition(":")
    if not module_name or not name:
        raise UsageError(f"a pair of your own has the form module:Class, got '{path}'")
    try:
        with current_folder():
            module = importlib.import_module(module_name)
    except Exception as error:  # The user's own code may raise anything.
        raise UsageError(
            f"cannot import module '{module_name}': {type(error).__name__}: {error}"
        ) from error
    if not hasattr(module, name):
        classes = [key for key, value in vars(module).items() if inspect.isclass(value)]
        raise UsageError(f"module '{module_name}' has no class '{name}'; {nearest(name, classes)}")
    kind = getattr(module, name)
    from torch import nn

    if not (inspect.isclass(kind) and issubclass(kind, nn.Module)):
        raise UsageError(f"a pair must be a subclass of nn.Module, but {path} is not")
    return kind
