"""Variational autoencoders as Pyro programs, with the inference in plain sight.

Names are imported on first use, so that the command line answers before torch is loaded.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pyro_vae.annealing import anneal as anneal
    from pyro_vae.annealing import sandwich as sandwich
    from pyro_vae.arviz_export import to_arviz as to_arviz
    from pyro_vae.bayesian import BayesianDecoder as BayesianDecoder
    from pyro_vae.bayesian import uncertainty as uncertainty
    from pyro_vae.datasets import hide_labels as hide_labels
    from pyro_vae.datasets import load_data as load_data
    from pyro_vae.datasets import one_hot as one_hot
    from pyro_vae.diagnosis import diagnose as diagnose
    from pyro_vae.disentanglement import disentanglement_scores as disentanglement_scores
    from pyro_vae.errors import UsageError as UsageError
    from pyro_vae.evaluation import evaluate as evaluate
    from pyro_vae.factors import Factor as Factor
    from pyro_vae.factors import Family as Family
    from pyro_vae.flows import Affine as Affine
    from pyro_vae.flows import AutoregressiveLayer as AutoregressiveLayer
    from pyro_vae.flows import CouplingLayer as CouplingLayer
    from pyro_vae.flows import Spline as Spline
    from pyro_vae.guide_calibration import calibration as calibration
    from pyro_vae.guides import bounds_table as bounds_table
    from pyro_vae.guides import refine as refine
    from pyro_vae.guides import refit_guide as refit_guide
    from pyro_vae.importance import log_likelihood as log_likelihood
    from pyro_vae.inference import decode as decode
    from pyro_vae.inference import encode as encode
    from pyro_vae.inference import interpolate as interpolate
    from pyro_vae.inference import predict as predict
    from pyro_vae.inference import reconstruct as reconstruct
    from pyro_vae.inference import sample as sample
    from pyro_vae.inference import traverse as traverse
    from pyro_vae.inference_gaps import gaps as gaps
    from pyro_vae.latent import kl_parts as kl_parts
    from pyro_vae.likelihoods import Bernoulli as Bernoulli
    from pyro_vae.likelihoods import Categorical as Categorical
    from pyro_vae.likelihoods import ContinuousBernoulli as ContinuousBernoulli
    from pyro_vae.likelihoods import DiscretizedLogistic as DiscretizedLogistic
    from pyro_vae.likelihoods import Gaussian as Gaussian
    from pyro_vae.likelihoods import NegativeBinomial as NegativeBinomial
    from pyro_vae.likelihoods import Poisson as Poisson
    from pyro_vae.likelihoods import StudentT as StudentT
    from pyro_vae.mcmc import nuts as nuts
    from pyro_vae.models.hierarchical import BottomUp as BottomUp
    from pyro_vae.models.hierarchical import HierarchicalVAE as HierarchicalVAE
    from pyro_vae.models.hierarchical import TopDown as TopDown
    from pyro_vae.models.mixture import MixtureVAE as MixtureVAE
    from pyro_vae.models.semisupervised import SemiSupervisedVAE as SemiSupervisedVAE
    from pyro_vae.models.sequence import DeepMarkovModel as DeepMarkovModel
    from pyro_vae.models.vae import VAE as VAE
    from pyro_vae.networks import MLP as MLP
    from pyro_vae.networks import Chain as Chain
    from pyro_vae.networks import ConvDecoder as ConvDecoder
    from pyro_vae.networks import ConvEncoder as ConvEncoder
    from pyro_vae.networks import Convolutions as Convolutions
    from pyro_vae.networks import ResidualBlock as ResidualBlock
    from pyro_vae.objectives import EnumeratedELBO as EnumeratedELBO
    from pyro_vae.objectives import FreeBitsELBO as FreeBitsELBO
    from pyro_vae.objectives import Gradient as Gradient
    from pyro_vae.objectives import ImportanceWeightedELBO as ImportanceWeightedELBO
    from pyro_vae.objectives import KLWeight as KLWeight
    from pyro_vae.objectives import StickingTheLandingELBO as StickingTheLandingELBO
    from pyro_vae.objectives import TotalCorrelationELBO as TotalCorrelationELBO
    from pyro_vae.posteriors import Classes as Classes
    from pyro_vae.posteriors import DiagonalNormal as DiagonalNormal
    from pyro_vae.posteriors import FlowPosterior as FlowPosterior
    from pyro_vae.posteriors import FullRankNormal as FullRankNormal
    from pyro_vae.posteriors import LowRankNormal as LowRankNormal
    from pyro_vae.predictive import outlier_scores as outlier_scores
    from pyro_vae.predictive import predictive_check as predictive_check
    from pyro_vae.preflight import check as check
    from pyro_vae.priors import FlowPrior as FlowPrior
    from pyro_vae.priors import GaussianMixture as GaussianMixture
    from pyro_vae.priors import StandardNormal as StandardNormal
    from pyro_vae.priors import VampPrior as VampPrior
    from pyro_vae.recurrent import BackwardLSTM as BackwardLSTM
    from pyro_vae.recurrent import GatedTransition as GatedTransition
    from pyro_vae.recurrent import TokenEncoder as TokenEncoder
    from pyro_vae.report import write_report as write_report
    from pyro_vae.runs import load as load
    from pyro_vae.runs import save as save
    from pyro_vae.schedules import Cosine as Cosine
    from pyro_vae.schedules import Cyclical as Cyclical
    from pyro_vae.schedules import Linear as Linear
    from pyro_vae.self_test import selftest as selftest
    from pyro_vae.sequences import Autoregressive as Autoregressive
    from pyro_vae.sequences import MarkovChain as MarkovChain
    from pyro_vae.text import as_text as as_text
    from pyro_vae.text import as_tokens as as_tokens
    from pyro_vae.training import fit as fit

__version__ = "0.1.0"

_WHERE = {
    # the pair and its parts
    "VAE": "models.vae",
    "DeepMarkovModel": "models.sequence",
    "SemiSupervisedVAE": "models.semisupervised",
    "MixtureVAE": "models.mixture",
    "HierarchicalVAE": "models.hierarchical",
    "TopDown": "models.hierarchical",
    "BottomUp": "models.hierarchical",
    "Factor": "factors",
    "Family": "factors",
    "MLP": "networks",
    "Chain": "networks",
    "ConvEncoder": "networks",
    "ConvDecoder": "networks",
    "Convolutions": "networks",
    "ResidualBlock": "networks",
    "TokenEncoder": "recurrent",
    "BackwardLSTM": "recurrent",
    "GatedTransition": "recurrent",
    "StandardNormal": "priors",
    "GaussianMixture": "priors",
    "FlowPrior": "priors",
    "VampPrior": "priors",
    "DiagonalNormal": "posteriors",
    "Classes": "posteriors",
    "FullRankNormal": "posteriors",
    "LowRankNormal": "posteriors",
    "FlowPosterior": "posteriors",
    "AutoregressiveLayer": "flows",
    "CouplingLayer": "flows",
    "Affine": "flows",
    "Spline": "flows",
    "Bernoulli": "likelihoods",
    "ContinuousBernoulli": "likelihoods",
    "Gaussian": "likelihoods",
    "Categorical": "likelihoods",
    "DiscretizedLogistic": "likelihoods",
    "StudentT": "likelihoods",
    "Poisson": "likelihoods",
    "NegativeBinomial": "likelihoods",
    "Autoregressive": "sequences",
    "MarkovChain": "sequences",
    # training
    "fit": "training",
    "check": "preflight",
    "KLWeight": "objectives",
    "EnumeratedELBO": "objectives",
    "ImportanceWeightedELBO": "objectives",
    "Gradient": "objectives",
    "StickingTheLandingELBO": "objectives",
    "TotalCorrelationELBO": "objectives",
    "FreeBitsELBO": "objectives",
    "Linear": "schedules",
    "Cyclical": "schedules",
    "Cosine": "schedules",
    # use and evaluation
    "sample": "inference",
    "encode": "inference",
    "decode": "inference",
    "reconstruct": "inference",
    "predict": "inference",
    "interpolate": "inference",
    "traverse": "inference",
    "evaluate": "evaluation",
    "log_likelihood": "importance",
    "refine": "guides",
    "refit_guide": "guides",
    "bounds_table": "guides",
    "BayesianDecoder": "bayesian",
    "write_report": "report",
    # whether it can be believed
    "diagnose": "diagnosis",
    "gaps": "inference_gaps",
    "calibration": "guide_calibration",
    "anneal": "annealing",
    "sandwich": "annealing",
    "nuts": "mcmc",
    "predictive_check": "predictive",
    "outlier_scores": "predictive",
    "uncertainty": "bayesian",
    "kl_parts": "latent",
    "disentanglement_scores": "disentanglement",
    "to_arviz": "arviz_export",
    "selftest": "self_test",
    # data and runs
    "load_data": "datasets",
    "hide_labels": "datasets",
    "one_hot": "datasets",
    "as_tokens": "text",
    "as_text": "text",
    "save": "runs",
    "load": "runs",
    "UsageError": "errors",
}

__all__ = sorted(_WHERE)


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        value = getattr(import_module(f"pyro_vae.{_WHERE[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'pyro_vae' has no attribute '{name}'")


def __dir__() -> list[str]:
    return list(__all__)
