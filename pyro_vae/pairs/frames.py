"""Tables of results as pandas frames. pandas is optional, and imported when it is needed."""

from importlib import import_module
from types import ModuleType

from pyro_vae.errors import UsageError


def installed_pandas(needed_by: str) -> ModuleType:
    """Return the module pandas. Raises `UsageError` if pandas is not installed."""
    try:
        return import_module("pandas")
    except ImportError as error:
        raise UsageError(
            f"{needed_by} needs pandas, which is not installed; run pip install pandas"
        ) from error
