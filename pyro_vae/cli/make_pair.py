"""Where options become a pair."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyro_vae.cli.make_parts import make_activation, make_likelihood, make_posterior, make_prior
from pyro_vae.cli.options import COUNTS, Model, option_of
from pyro_vae.errors import UsageError, nearest

if TYPE_CHECKING:
    from torch import nn

    from pyro_vae.data.split import Data


def make_pair(config: Model, data: Data) -> nn.Module:
    """The pair that a configuration asks for, on data of this shape."""
    pair = _make_pair(config, data)
    if not config.bayesian_decoder:
        return pair
    from pyro_vae.models.bayesian_decoder import BayesianDecoder

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
    from pyro_vae.parts.priors import VampPrior

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
            raise UsageError(f"{what} takes no {option_of(name)}: {getattr(config, name)} came")


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
