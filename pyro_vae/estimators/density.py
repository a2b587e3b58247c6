"""A VAE as an estimator of scikit-learn: codes, densities and samples of rows of numbers."""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from sklearn.base import (
    BaseEstimator,
    ClassNamePrefixFeaturesOutMixin,
    DensityMixin,
    TransformerMixin,
)
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_array, check_is_fitted, validate_data
from torch import Tensor

from pyro_vae.errors import UsageError
from pyro_vae.inference.encoding import encode
from pyro_vae.inference.generation import decode, sample
from pyro_vae.inference.importance import log_likelihood
from pyro_vae.models.vae import VAE
from pyro_vae.pairs.rng import seeded
from pyro_vae.parts.factors import Family
from pyro_vae.parts.likelihoods import Gaussian
from pyro_vae.parts.standardized import Standardized
from pyro_vae.training.fit import fit as fit_pair

Array = NDArray[Any]


class VAEEstimator(ClassNamePrefixFeaturesOutMixin, TransformerMixin, DensityMixin, BaseEstimator):
    r"""A VAE of rows of real numbers with the interface of scikit-learn.

    ``transform`` gives the means of :math:`q(z|x)`, ``inverse_transform`` the means of
    :math:`p(x|z)`, and ``score_samples`` log p(x) of each row in nats, by importance sampling and
    in the units of the data. The pair standardizes its data itself.

    Arguments:
        latent_dim: the dimension of z.
        hidden: widths of the hidden layers of the encoder; the decoder uses them in reverse.
        likelihood: a `pyro_vae.Gaussian` or `pyro_vae.StudentT`, in standard units. The default is
            a Gaussian with one learned scale.
        epochs, batch_size, learning_rate: as in `pyro_vae.fit`.
        num_samples: importance samples of each row in ``score_samples``.
        random_state: a seed, a ``numpy.random.RandomState`` or None.

    After ``fit``, ``pair_`` is the pair, which every tool of this library takes, and ``history_``
    is its `History`. Log p(x) is a lower bound in expectation, and it is noisy: the scores of a row
    depend on the rows that are scored with it. Raises ``ValueError`` for data that are not a
    finite matrix with at least two rows.

    >>> import numpy as np
    >>> x = np.random.default_rng(0).normal(100.0, 5.0, (50, 3))
    >>> vae = VAEEstimator(hidden=(8,), epochs=2, random_state=0).fit(x)
    >>> vae.transform(x).shape, vae.score_samples(x).shape
    ((50, 2), (50,))
    """

    def __init__(
        self,
        latent_dim: int = 2,
        *,
        hidden: tuple[int, ...] = (128, 64),
        likelihood: Family | None = None,
        epochs: int = 200,
        batch_size: int | None = None,
        learning_rate: float = 1e-3,
        num_samples: int = 500,
        random_state: Any = None,
    ) -> None:
        self.latent_dim = latent_dim
        self.hidden = hidden
        self.likelihood = likelihood
        self.epochs = epochs
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.num_samples = num_samples
        self.random_state = random_state

    def fit(self, X: ArrayLike, y: Any = None) -> "VAEEstimator":
        """Fit the VAE to rows (n, features); y is ignored."""
        fit_vae(self, self._rows(X, reset=True))
        self._n_features_out = self.latent_dim
        return self

    def transform(self, X: ArrayLike) -> Array:
        """Return the means of q(z|x), (n, latent_dim), in the floating-point type of X."""
        check_is_fitted(self)
        return like(encode(self.pair_, self._rows(X))["z"], X)

    def inverse_transform(self, X: ArrayLike) -> Array:
        """Return the means of p(x|z), (n, features), for codes (n, latent_dim)."""
        check_is_fitted(self)
        codes = check_array(X, dtype=[np.float64, np.float32], input_name="X")
        z = torch.tensor(codes, dtype=torch.float32)
        return like(decode(self.pair_, {"z": z}), X)

    def score_samples(self, X: ArrayLike) -> Array:
        """Return log p(x) of each row, in nats, from ``num_samples`` importance samples."""
        check_is_fitted(self)
        rows = self._rows(X)
        found = log_likelihood(
            self.pair_, rows, num_samples=self.num_samples, seed=self.seed_, progress=False
        )
        return found.per_datum.double().numpy()

    def score(self, X: ArrayLike, y: Any = None) -> float:
        """Return the mean of log p(x) over rows, in nats per example; y is ignored."""
        return float(self.score_samples(X).mean())

    def sample(self, n_samples: int = 1) -> Array:
        """Draw rows (n_samples, features) from the model."""
        check_is_fitted(self)
        return sample(self.pair_, n_samples, seed=self.seed_).numpy()

    def _rows(self, X: ArrayLike, reset: bool = False) -> Tensor:
        options: dict[str, Any] = {"ensure_min_samples": 2} if reset else {}
        array = validate_data(self, X, reset=reset, dtype=[np.float64, np.float32], **options)
        return torch.tensor(array)  # in its own type: `standardize` needs all digits

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.non_deterministic = True  # scores are Monte Carlo estimates
        tags.transformer_tags.preserves_dtype = ["float64", "float32"]
        return tags


def fit_vae(
    estimator: Any, x: Tensor, likelihood: Callable[[Family], Family] = lambda f: f
) -> None:
    """Fit a VAE with the options of an estimator, and give the estimator what it then has.

    Arguments:
        likelihood: makes the likelihood of the VAE from the standardized one.
    """
    estimator.seed_ = int(check_random_state(estimator.random_state).randint(2**31))
    # A fit trains its own copy, so the next fit starts where this one did.
    family = Gaussian(learned=True) if estimator.likelihood is None else estimator.likelihood
    family = deepcopy(family)
    with seeded(estimator.seed_):
        standardized = Standardized(family, (x.shape[1],)).standardize(x)
        estimator.pair_ = VAE.mlp(
            (x.shape[1],),
            latent_dim=estimator.latent_dim,
            hidden=_widths(estimator.hidden),
            likelihood=likelihood(standardized),
        )
    estimator.history_ = fit_pair(
        estimator.pair_,
        x,
        epochs=estimator.epochs,
        batch_size=estimator.batch_size,
        learning_rate=estimator.learning_rate,
        seed=estimator.seed_,
        progress=False,
    )


def _widths(hidden: Any) -> tuple[int, ...]:
    try:
        return tuple(hidden)
    except TypeError as error:
        raise UsageError(
            f"must be a tuple of integers, got {hidden!r}", argument="hidden"
        ) from error


def like(values: Tensor, X: ArrayLike) -> Array:
    """The values as an array of the floating-point type of X, or else as double precision."""
    dtype = getattr(X, "dtype", np.float64)
    return values.numpy().astype(dtype if dtype in (np.float32, np.float64) else np.float64)
