"""A VAE as an imputer of scikit-learn."""

from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator, OneToOneFeatureMixin, TransformerMixin
from sklearn.utils.validation import check_is_fitted, validate_data

from pyro_vae.errors import UsageError
from pyro_vae.estimators.density import fit_vae, like
from pyro_vae.inference.imputation import Imputation, impute
from pyro_vae.parts.factors import Family
from pyro_vae.parts.missing import Missing


class VAEImputer(OneToOneFeatureMixin, TransformerMixin, BaseEstimator):
    r"""Replace missing numbers (NaN) by a VAE that is fitted to rows with holes.

    ``fit`` maximizes the bound on log p of the observed entries. ``transform`` replaces each
    missing entry by its posterior mean :math:`E[x_{mis}|x_{obs}]`, by importance sampling.

    Arguments:
        latent_dim, hidden, likelihood, epochs, batch_size, learning_rate, random_state: as in
            `pyro_vae.VAEEstimator`.
        sample_posterior: replace each missing entry by a draw from its posterior instead of the
            mean. Fit once and transform several times for multiple imputations: each call draws
            anew.
        num_samples: importance samples of each row with missing entries.

    ``impute`` returns draws of the missing entries and the Pareto k of each row. Raises
    ``ValueError`` for infinite numbers, and for a column or a row without an observed entry.
    Mattei & Frellsen, MIWAE, 2019 (https://arxiv.org/abs/1812.02633).

    >>> import numpy as np
    >>> x = np.random.default_rng(0).normal(100.0, 5.0, (50, 3))
    >>> x[0, 1] = np.nan
    >>> filled = VAEImputer(hidden=(8,), epochs=2, random_state=0).fit_transform(x)
    >>> bool(np.isfinite(filled).all()), bool(filled[0, 0] == x[0, 0])
    (True, True)
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
        sample_posterior: bool = False,
        num_samples: int = 500,
        random_state: Any = None,
    ) -> None:
        self.latent_dim = latent_dim
        self.hidden = hidden
        self.likelihood = likelihood
        self.epochs = epochs
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.sample_posterior = sample_posterior
        self.num_samples = num_samples
        self.random_state = random_state

    def fit(self, X: ArrayLike, y: Any = None) -> "VAEImputer":
        """Fit the VAE to rows (n, features) with NaN for missing entries; y is ignored."""
        x = torch.tensor(self._rows(X, reset=True))
        empty = x.isnan().all(0)
        if bool(empty.any()):
            raise UsageError(f"column {int(empty.nonzero()[0])} of X has no observed entry")
        fit_vae(self, x, Missing)
        self.random_state_ = np.random.RandomState(self.seed_)
        return self

    def transform(self, X: ArrayLike) -> NDArray[Any]:
        """Return X (n, features) with its missing entries replaced."""
        check_is_fitted(self)
        array = self._rows(X).copy()
        holes = np.isnan(array)
        if holes.any():
            found = self._imputed(array)
            values = found.draws[0] if self.sample_posterior else found.mean
            array[holes] = like(values, array)[holes]
        return array

    def impute(self, X: ArrayLike, draws: int = 20) -> Imputation:
        """Return draws of the missing entries of X, with the Pareto k of each row.

        Raises `UsageError` if no entry is missing, or if ``draws`` is below 1.
        """
        check_is_fitted(self)
        return self._imputed(self._rows(X), draws)

    def _imputed(self, array: NDArray[Any], draws: int = 1) -> Imputation:
        anew = self.sample_posterior
        return impute(
            self.pair_,
            torch.tensor(array),
            draws=draws,
            num_samples=self.num_samples,
            seed=int(self.random_state_.randint(2**31)) if anew else self.seed_,
        )

    def _rows(self, X: ArrayLike, reset: bool = False) -> NDArray[Any]:
        options: dict[str, Any] = {"ensure_min_samples": 2} if reset else {}
        return validate_data(
            self,
            X,
            reset=reset,
            dtype=[np.float64, np.float32],
            ensure_all_finite="allow-nan",
            **options,
        )

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.allow_nan = True
        tags.non_deterministic = True  # imputations are Monte Carlo estimates
        tags.transformer_tags.preserves_dtype = ["float64", "float32"]
        return tags
