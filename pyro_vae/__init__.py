"""Variational autoencoders as Pyro programs, with diagnostics of the inference.

The imports below are the only list of public names. Type checkers read them; at run time they are
skipped. Each name is imported at its first use, so that ``pyro-vae --help`` does not load torch.
"""

import ast
import inspect
import sys
import warnings
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pyro_vae.data.datasets import hide_labels as hide_labels
    from pyro_vae.data.datasets import load_data as load_data
    from pyro_vae.data.datasets import one_hot as one_hot
    from pyro_vae.data.groups import Groups as Groups
    from pyro_vae.data.groups import by_group as by_group
    from pyro_vae.data.schema import Column as Column
    from pyro_vae.data.schema import Schema as Schema
    from pyro_vae.data.tables import Table as Table
    from pyro_vae.data.tables import read_table as read_table
    from pyro_vae.data.text import as_text as as_text
    from pyro_vae.data.text import as_tokens as as_tokens
    from pyro_vae.diagnostics.arviz import to_arviz as to_arviz
    from pyro_vae.diagnostics.calibration import calibration as calibration
    from pyro_vae.diagnostics.class_gap import class_gap as class_gap
    from pyro_vae.diagnostics.diagnosis import diagnose as diagnose
    from pyro_vae.diagnostics.disentanglement import (
        disentanglement_scores as disentanglement_scores,
    )
    from pyro_vae.diagnostics.evaluation import evaluate as evaluate
    from pyro_vae.diagnostics.gaps import gaps as gaps
    from pyro_vae.diagnostics.global_calibration import global_calibration as global_calibration
    from pyro_vae.diagnostics.information import kl_parts as kl_parts
    from pyro_vae.diagnostics.local_c2st import local_c2st as local_c2st
    from pyro_vae.diagnostics.local_calibration import local_calibration as local_calibration
    from pyro_vae.diagnostics.loo_pit import loo_pit as loo_pit
    from pyro_vae.diagnostics.model_check import model_check as model_check
    from pyro_vae.diagnostics.outliers import outlier_scores as outlier_scores
    from pyro_vae.diagnostics.power_scaling import power_scaling as power_scaling
    from pyro_vae.diagnostics.predictive import predictive_check as predictive_check
    from pyro_vae.diagnostics.selftest import selftest as selftest
    from pyro_vae.diagnostics.tarp import tarp as tarp
    from pyro_vae.diagnostics.uncertainty import uncertainty as uncertainty
    from pyro_vae.errors import UsageError as UsageError
    from pyro_vae.estimators.density import VAEEstimator as VAEEstimator
    from pyro_vae.estimators.imputer import VAEImputer as VAEImputer
    from pyro_vae.inference.annealing import anneal as anneal
    from pyro_vae.inference.annealing import sandwich as sandwich
    from pyro_vae.inference.encoding import encode as encode
    from pyro_vae.inference.encoding import predict as predict
    from pyro_vae.inference.exporting import export as export
    from pyro_vae.inference.generation import decode as decode
    from pyro_vae.inference.generation import interpolate as interpolate
    from pyro_vae.inference.generation import reconstruct as reconstruct
    from pyro_vae.inference.generation import sample as sample
    from pyro_vae.inference.generation import traverse as traverse
    from pyro_vae.inference.global_weights import global_weights as global_weights
    from pyro_vae.inference.importance import log_likelihood as log_likelihood
    from pyro_vae.inference.imputation import impute as impute
    from pyro_vae.inference.nuts import nuts as nuts
    from pyro_vae.inference.posterior import posterior as posterior
    from pyro_vae.inference.refinement import refine as refine
    from pyro_vae.inference.refitting import bounds_table as bounds_table
    from pyro_vae.inference.refitting import refit_guide as refit_guide
    from pyro_vae.inference.scoring import score as score
    from pyro_vae.models.bayesian_decoder import BayesianDecoder as BayesianDecoder
    from pyro_vae.models.hierarchical import BottomUp as BottomUp
    from pyro_vae.models.hierarchical import HierarchicalVAE as HierarchicalVAE
    from pyro_vae.models.hierarchical import TopDown as TopDown
    from pyro_vae.models.mixture import MixtureVAE as MixtureVAE
    from pyro_vae.models.multilevel import MultilevelVAE as MultilevelVAE
    from pyro_vae.models.not_at_random import NotAtRandomVAE as NotAtRandomVAE
    from pyro_vae.models.semisupervised import SemiSupervisedVAE as SemiSupervisedVAE
    from pyro_vae.models.sequence import DeepMarkovModel as DeepMarkovModel
    from pyro_vae.models.vae import VAE as VAE
    from pyro_vae.pairs.inner_plates import data_plate_at as data_plate_at
    from pyro_vae.pairs.processes import join_processes as join_processes
    from pyro_vae.parts.bijections import Affine as Affine
    from pyro_vae.parts.bijections import Spline as Spline
    from pyro_vae.parts.columns import Columns as Columns
    from pyro_vae.parts.convolutions import ConvDecoder as ConvDecoder
    from pyro_vae.parts.convolutions import ConvEncoder as ConvEncoder
    from pyro_vae.parts.convolutions import Convolutions as Convolutions
    from pyro_vae.parts.convolutions import ResidualBlock as ResidualBlock
    from pyro_vae.parts.factors import Factor as Factor
    from pyro_vae.parts.factors import Family as Family
    from pyro_vae.parts.flows import AutoregressiveLayer as AutoregressiveLayer
    from pyro_vae.parts.flows import CouplingLayer as CouplingLayer
    from pyro_vae.parts.likelihoods import Bernoulli as Bernoulli
    from pyro_vae.parts.likelihoods import Categorical as Categorical
    from pyro_vae.parts.likelihoods import ContinuousBernoulli as ContinuousBernoulli
    from pyro_vae.parts.likelihoods import DiscretizedLogistic as DiscretizedLogistic
    from pyro_vae.parts.likelihoods import Gaussian as Gaussian
    from pyro_vae.parts.likelihoods import NegativeBinomial as NegativeBinomial
    from pyro_vae.parts.likelihoods import Poisson as Poisson
    from pyro_vae.parts.likelihoods import StudentT as StudentT
    from pyro_vae.parts.missing import Missing as Missing
    from pyro_vae.parts.networks import MLP as MLP
    from pyro_vae.parts.networks import Chain as Chain
    from pyro_vae.parts.networks import DeepSet as DeepSet
    from pyro_vae.parts.posteriors import Classes as Classes
    from pyro_vae.parts.posteriors import DiagonalNormal as DiagonalNormal
    from pyro_vae.parts.posteriors import FlowPosterior as FlowPosterior
    from pyro_vae.parts.posteriors import FullRankNormal as FullRankNormal
    from pyro_vae.parts.posteriors import LowRankNormal as LowRankNormal
    from pyro_vae.parts.priors import FlowPrior as FlowPrior
    from pyro_vae.parts.priors import GaussianMixture as GaussianMixture
    from pyro_vae.parts.priors import StandardNormal as StandardNormal
    from pyro_vae.parts.priors import VampPrior as VampPrior
    from pyro_vae.parts.recurrent import BackwardLSTM as BackwardLSTM
    from pyro_vae.parts.recurrent import GatedTransition as GatedTransition
    from pyro_vae.parts.recurrent import TokenEncoder as TokenEncoder
    from pyro_vae.parts.sequences import Autoregressive as Autoregressive
    from pyro_vae.parts.sequences import MarkovChain as MarkovChain
    from pyro_vae.parts.standardized import Standardized as Standardized
    from pyro_vae.report.report import write_report as write_report
    from pyro_vae.runs.folder import load as load
    from pyro_vae.runs.folder import save as save
    from pyro_vae.training.bounds import FreeBitsELBO as FreeBitsELBO
    from pyro_vae.training.bounds import TotalCorrelationELBO as TotalCorrelationELBO
    from pyro_vae.training.check import check as check
    from pyro_vae.training.elbo import EnumeratedELBO as EnumeratedELBO
    from pyro_vae.training.fit import fit as fit
    from pyro_vae.training.importance_bounds import Gradient as Gradient
    from pyro_vae.training.importance_bounds import ImportanceWeightedELBO as ImportanceWeightedELBO
    from pyro_vae.training.importance_bounds import StickingTheLandingELBO as StickingTheLandingELBO
    from pyro_vae.training.kl_weight import KLWeight as KLWeight
    from pyro_vae.training.schedules import CosineSchedule as CosineSchedule
    from pyro_vae.training.schedules import CyclicalSchedule as CyclicalSchedule
    from pyro_vae.training.schedules import LinearSchedule as LinearSchedule

__version__ = "0.2.0.dev0"


def _listed() -> dict[str, str]:
    """The module of each public name, read from the source of the imports above."""
    tree = ast.parse(inspect.getsource(sys.modules[__name__]))
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    return {
        alias.name: str(statement.module)
        for statement in block.body
        if isinstance(statement, ast.ImportFrom)
        for alias in statement.names
    }


def _import_progress_bars() -> None:
    """Import tqdm.auto, which Pyro uses, without its request for ipywidgets: a bar can be text."""
    if "IPython" in sys.modules:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="IProgress not found")
            import_module("tqdm.auto")


_import_progress_bars()

_WHERE = _listed()

__all__ = sorted(_WHERE)

_DEPRECATED = {name: f"{name}Schedule" for name in ("Linear", "Cyclical", "Cosine")}
"""Names of version 0.1.0 that work for one more release."""


def __getattr__(name: str) -> Any:
    """Import a public name at its first use."""
    if name in _DEPRECATED:
        globals()[name] = __getattr__(_DEPRECATED[name])
        warnings.warn(
            f"pyro_vae.{name} is deprecated and will be removed in the next release; "
            f"use pyro_vae.{_DEPRECATED[name]}",
            DeprecationWarning,
            stacklevel=2,
        )
        return globals()[name]
    if name in _WHERE:
        value = getattr(import_module(_WHERE[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'pyro_vae' has no attribute '{name}'")


def __dir__() -> list[str]:
    return list(__all__)
