"""What the tests hold estimators against: see `pyro_vae.models.exact`."""

from pyro_vae.models.exact import CORRELATED as CORRELATED
from pyro_vae.models.exact import LinearGaussian as LinearGaussian
from pyro_vae.models.exact import Spoiled as Spoiled
from pyro_vae.models.exact import linear_gaussian as linear_gaussian
from pyro_vae.models.exact import ppca_log_likelihood as ppca_log_likelihood
