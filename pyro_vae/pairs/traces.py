"""Traces of a pair's model and guide on a batch."""

from collections.abc import Callable, Sequence
from typing import Any

from pyro import poutine
from pyro.poutine import Trace
from torch import Tensor

from pyro_vae.compat import bad_parameter, site_is_subsample
from pyro_vae.errors import UsageError, first_line
from pyro_vae.pairs.data_plate import is_local
from pyro_vae.pairs.moments import is_discrete, mean, mode


def trace(program: Callable[..., Any], batch: Sequence[Tensor]) -> Trace:
    """The trace of a program on a batch; a usage error keeps its single line."""
    try:
        return poutine.trace(program).get_trace(*batch)
    except UsageError as error:
        # Pyro appends the shapes of all sites to the message.
        raise UsageError(first_line(error)) from None
    except IndexError as error:  # for example, a label that is too large for the pair
        raise UsageError(f"the pair fails on a value of its batch: {first_line(error)}") from error
    except (ValueError, RuntimeError) as error:
        require_numbers(error)
        raise


class BadNumbers(UsageError):
    """The pair gave a distribution invalid parameters."""


def require_numbers(error: Exception) -> None:
    """Raise `BadNumbers` if an error reports invalid parameters of a distribution, such as NaN."""
    if said := bad_parameter(error):
        raise BadNumbers(
            f"the pair gives a distribution invalid parameters ({said}): look for extreme values "
            "in the data, and bound the scales of the pair's distributions"
        ) from error


class Means(poutine.messenger.Messenger):
    """Sets every unobserved site to the mean of its distribution, or the mode if it is discrete.

    Arguments:
        average: the mean of a distribution. The default averages draws if it has no closed form.
    """

    def __init__(self, average: Callable[[Any], Tensor] = mean) -> None:
        super().__init__()
        self.average = average

    def _pyro_sample(self, msg: Any) -> None:
        free = msg["value"] is None and not msg["done"]
        if not msg["is_observed"] and (free or msg.get("folded")):
            if site_is_subsample(msg):
                return
            if msg.get("folded") == "later":
                msg["mean_later"] = True
                return
            fn = msg["fn"]
            msg["value"] = mode(fn) if is_discrete(fn) else self.average(fn)
            msg["done"] = True


class Given(poutine.messenger.Messenger):
    """Sets some sites to given values, as if they had been drawn."""

    def __init__(self, values: dict[str, Tensor]) -> None:
        super().__init__()
        self.values = values

    def gives(self, name: str, support: Any) -> Tensor | None:
        """The given value of a site, or None."""
        return self.values.get(name)

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in self.values:
            msg["value"], msg["done"] = self.values[msg["name"]], True


class DataFirst(Given):
    """`Given` for values with the data as dimension 0, as returned by `data_first`."""

    def _pyro_sample(self, msg: Any) -> None:
        super()._pyro_sample(msg)
        if msg["name"] in self.values and is_local(msg):
            msg["value"] = msg["value"].movedim(0, -1 - msg["fn"].event_dim)
