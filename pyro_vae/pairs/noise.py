"""Noise that is a function of a key and a counter, so that a compiled step can compute it inline.

The generators of torch draw one number after another, and Inductor cannot fuse them. Here, each
draw is a hash of its key and its position: the counter-based generator "squares" of Widynski (2020,
arXiv:2004.06278, five rounds for 64 bits). The same key gives the same bits in every engine.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyro_vae.compat import DispatchMode, site_is_subsample

aten = torch.ops.aten

STRIDE = 2**40
"""The distance between the counters of two draws. No draw has more elements."""


def new_number(out: Tensor | None = None) -> Tensor:
    """Draw the number behind a key from torch's generator of the CPU, whatever the device.

    The state of this generator thus determines the noise of all later steps.
    """
    return torch.randint(2**61, (), out=out)


def key_of(number: Tensor) -> Tensor:
    """Return the key of a number: odd, with 62 bits."""
    return number * 2 + 1


def new_key() -> Tensor:
    """Draw a key, as a tensor without dimensions."""
    return key_of(new_number())


def bits(key: Tensor, counter: Tensor) -> Tensor:
    """Hash a key and a counter to 64 random bits, as int64.

    Arguments:
        key: an odd number, which differs from step to step.
        counter: whole numbers from 1.

    >>> bits(torch.tensor(0x548C9DECBCE65297), torch.arange(1, 3))
    tensor([-7762210281180045398, -3987668225389865793])
    """
    return _hashed(counter * key, key)


def _hashed(y: Tensor, key: Tensor) -> Tensor:
    """Hash the product of a key and a counter."""
    # Inductor writes out an operand again for each of its uses, so x * x would double the kernel.
    z = y + key
    x = _swapped(y.square() + y)
    x = _swapped(x.square() + z)
    x = _swapped(x.square() + y)
    last = x.square() + z
    x = _swapped(last)
    return last ^ _high(x.square() + y, 32)


def _high(x: Tensor, shift: int) -> Tensor:
    """Shift to the right without copies of the sign."""
    return (x >> shift) & (2 ** (64 - shift) - 1)


def _swapped(x: Tensor) -> Tensor:
    return _high(x, 32) | (x << 32)


def _bits_by_formula(key: Tensor, first: int, number: int) -> Tensor:
    counter = torch.arange(number, device=key.device)
    if key.is_cuda:  # Inductor's index has 32 bits there, too few for its sum with a large number
        return _hashed(counter * key + first * key, key)
    return bits(key, counter + first)


def _bits_in_place(key: Tensor, first: int, number: int) -> Tensor:
    """Return the same bits on a CPU, in a third of the time of whole tensors."""
    y = np.arange(first, first + number, dtype=np.uint64)
    half, other = np.uint64(32), np.empty_like(y)
    factor = key.numpy().view(np.uint64)
    y *= factor
    z = y + factor
    x, last = y.copy(), y
    for term in (y, z, y, z, y):
        x *= x
        x += term
        np.right_shift(x, half, out=other)
        if term is z:
            last = x.copy()  # after the loop, the fourth of five rounds
        np.left_shift(x, half, out=x)
        x |= other
    return torch.from_numpy((last ^ other).view(np.int64))


_library = torch.library.Library("pyro_vae", "DEF")
_library.define("bits(Tensor key, int first, int number) -> Tensor")
_library.impl("bits", _bits_by_formula, "CompositeExplicitAutograd")
_library.impl("bits", _bits_in_place, "CPU")
_library.impl("bits", lambda key, first, number: key.new_empty(number), "Meta")

COUNTED_BITS = torch.ops.pyro_vae.bits.default
"""`bits` of the counters ``first``, ``first + 1`` and so on, as one operation.

It is fast in a traced graph and in the eager engine. A compiled graph uses `FORMULAS` instead.
"""

FORMULAS = {COUNTED_BITS: _bits_by_formula}
"""What Inductor compiles in place of an operation."""


class CounterDraws(DispatchMode):
    """Replaces draws from torch's generator inside its context by functions of a key.

    These are uniform, normal, exponential, Cauchy and Bernoulli draws of floating-point types. All
    other draws, and draws with a generator of their own, still use the generators of torch.

    >>> with CounterDraws(torch.tensor(12345)):
    ...     a = torch.rand(3)
    >>> with CounterDraws(torch.tensor(12345)):
    ...     b = torch.rand(3)
    >>> bool((a == b).all())
    True
    """

    def __init__(self, key: Tensor) -> None:
        super().__init__()
        self.key, self.done = key, 0

    def uniform(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return numbers from [0, 1): multiples of 2^-24, or of 2^-53 for float64."""
        found = self._bits(shape)
        if dtype == torch.float64:
            return _high(found, 11).to(dtype) * 2.0**-53
        return (_high(found, 40).to(torch.int32).to(torch.float32) * 2.0**-24).to(dtype)

    def normal(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return standard normals by the method of Box & Muller (1958)."""
        if dtype == torch.float64:
            first, angle = 1 - self.uniform(shape, dtype), self.uniform(shape, dtype)
        else:
            found = self._bits(shape)  # 32 bits for the radius, and 24 bits for the angle
            first = (_high(found, 32).to(torch.float32) + 0.5) * 2.0**-32
            angle = (found & 0xFFFFFF).to(torch.int32).to(torch.float32) * 2.0**-24
        return ((-2 * first.log()).sqrt() * (2 * math.pi * angle).cos()).to(dtype)

    def _bits(self, shape: Sequence[int]) -> Tensor:
        first = 1 + STRIDE * self.done
        self.done += 1
        return COUNTED_BITS(self.key, first, math.prod(shape)).view(tuple(shape))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        replace = REPLACED.get(func)
        found = None
        if replace is not None and kwargs.get("generator") is None:
            found = replace(self, *args, **kwargs)
        return func(*args, **kwargs) if found is None else found


class SiteNoise(Messenger):
    """Draws the values of sample sites. A program's other draws are as before."""

    def __init__(self, draws: CounterDraws) -> None:
        super().__init__()
        self.draws = draws

    def _pyro_sample(self, msg: Any) -> None:
        if msg["value"] is None and not msg["is_observed"] and not site_is_subsample(msg):
            with self.draws:
                msg["value"] = msg["fn"](*msg["args"], **msg["kwargs"])


Made = Callable[[CounterDraws, Sequence[int], torch.dtype], Tensor]


def _serves(dtype: Any) -> bool:
    return isinstance(dtype, torch.dtype) and dtype.is_floating_point


def _factory(made: Made) -> Callable[..., Any]:
    """For ``rand`` and ``randn``."""

    def replaced(draws: CounterDraws, size: Sequence[int], **options: Any) -> Tensor | None:
        dtype = options.get("dtype") or torch.get_default_dtype()
        return made(draws, size, dtype) if _serves(dtype) else None

    return replaced


def _like(made: Made) -> Callable[..., Any]:
    """For ``rand_like`` and ``randn_like``."""

    def replaced(draws: CounterDraws, x: Tensor, **options: Any) -> Tensor | None:
        dtype = options.get("dtype") or x.dtype
        return made(draws, x.shape, dtype) if _serves(dtype) else None

    return replaced


def _uniform_(
    draws: CounterDraws, x: Tensor, low: float = 0, high: float = 1, **_: Any
) -> Tensor | None:
    if not _serves(x.dtype):
        return None
    return x.copy_(draws.uniform(x.shape, x.dtype) * (high - low) + low)


def _normal_(
    draws: CounterDraws, x: Tensor, mean: float = 0, std: float = 1, **_: Any
) -> Tensor | None:
    if not _serves(x.dtype):
        return None
    return x.copy_(draws.normal(x.shape, x.dtype) * std + mean)


def _exponential_(draws: CounterDraws, x: Tensor, rate: float = 1, **_: Any) -> Tensor | None:
    if not _serves(x.dtype):
        return None
    return x.copy_((1 - draws.uniform(x.shape, x.dtype)).log() / -rate)


def _cauchy_(draws: CounterDraws, x: Tensor, median: float = 0, scale: float = 1, **_: Any) -> Any:
    if not _serves(x.dtype):
        return None
    return x.copy_((math.pi * (draws.uniform(x.shape, x.dtype) - 0.5)).tan() * scale + median)


def _normal(draws: CounterDraws, mean: Any, std: Any = 1.0, **_: Any) -> Tensor | None:
    shape = torch.broadcast_shapes(*(t.shape for t in (mean, std) if isinstance(t, Tensor)))
    like = mean if isinstance(mean, Tensor) else std
    return mean + std * draws.normal(shape, like.dtype) if _serves(like.dtype) else None


def _bernoulli(draws: CounterDraws, p: Tensor, **_: Any) -> Tensor | None:
    if not _serves(p.dtype):
        return None
    return (draws.uniform(p.shape, p.dtype) < p).to(p.dtype)


def _bernoulli_(draws: CounterDraws, x: Tensor, p: Any = 0.5, **_: Any) -> Tensor:
    like = p.dtype if isinstance(p, Tensor) else torch.float32
    return x.copy_(draws.uniform(x.shape, like) < p)


REPLACED: dict[Any, Callable[..., Tensor | None]] = {
    aten.rand.default: _factory(CounterDraws.uniform),
    aten.randn.default: _factory(CounterDraws.normal),
    aten.rand_like.default: _like(CounterDraws.uniform),
    aten.randn_like.default: _like(CounterDraws.normal),
    aten.uniform_.default: _uniform_,
    aten.normal_.default: _normal_,
    aten.exponential_.default: _exponential_,
    aten.cauchy_.default: _cauchy_,
    aten.normal.Tensor_Tensor: _normal,
    aten.normal.Tensor_float: _normal,
    aten.normal.float_Tensor: _normal,
    aten.bernoulli.default: _bernoulli,
    aten.bernoulli_.float: _bernoulli_,
    aten.bernoulli_.Tensor: _bernoulli_,
}
"""What `CounterDraws` replaces. A function that returns None leaves its operation alone."""
