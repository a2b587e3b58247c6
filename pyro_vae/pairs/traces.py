"""Traces of a pair: model and guide run on a batch, without asking what the pair is."""

from collections.abc import Callable, Sequence
from typing import Any

from pyro import poutine
from pyro.poutine import Trace
from torch import Tensor

from pyro_vae.compat import bad_parameter, site_is_subsample
from pyro_vae.errors import UsageError, first_line
from pyro_vae.pairs.moments import mean, mode
from pyro_vae.pairs.places import is_local


def trace(program: Callable[..., Any], batch: Sequence[Tensor]) -> Trace:
    """The trace of a program on a batch; an error of use stays one line."""
    try:
        return poutine.trace(program).get_trace(*batch)
    except UsageError as error:
        # Pyro writes the shapes of all sites behind the message.
        raise UsageError(first_line(error)) from None
    except IndexError as error:  # a label, say, that the pair has no place for
        raise UsageError(f"the pair fails on a value of its batch: {first_line(error)}") from error
    except (ValueError, RuntimeError) as error:
        require_numbers(error)
        raise


class BadNumbers(UsageError):
    """A pair gave a distribution numbers that it cannot have."""


def require_numbers(error: Exception) -> None:
    """Raise `BadNumbers` where an error says that a distribution was given numbers it cannot have,
    such as a scale that is infinite or NaN."""
    if said := bad_parameter(error):
        raise BadNumbers(
            f"the pair gives a distribution numbers that it cannot have ({said}): look for extreme "
            "values in the data, and bound its scales"
        ) from error


class Means(poutine.messenger.Messenger):
    """Every unobserved site takes its distribution's mean (a discrete one its mode), not a draw."""

    def _pyro_sample(self, msg: Any) -> None:
        free = msg["value"] is None and not msg["done"]
        if not msg["is_observed"] and (free or msg.get("folded")):
            if site_is_subsample(msg):
                return
            if msg.get("folded") == "later":
                msg["mean_later"] = True
                return
            fn = msg["fn"]
            msg["value"] = mode(fn) if fn.support.is_discrete else mean(fn)
            msg["done"] = True


class Given(poutine.messenger.Messenger):
    """Some sites are given these values as if they had been drawn."""

    def __init__(self, values: dict[str, Tensor]) -> None:
        super().__init__()
        self.values = values

    def gives(self, name: str, support: Any) -> Tensor | None:
        """The value that a site is given, if any."""
        return self.values.get(name)

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in self.values:
            msg["value"], msg["done"] = self.values[msg["name"]], True


class DataFirst(Given):
    """`Given` for values with the data as dimension 0, as `data_first` gives them."""

    def _pyro_sample(self, msg: Any) -> None:
        super()._pyro_sample(msg)
        if msg["name"] in self.values and is_local(msg):
            msg["value"] = msg["value"].movedim(0, -1 - msg["fn"].event_dim)
