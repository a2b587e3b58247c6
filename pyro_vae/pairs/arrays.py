"""Conversion of the user's arrays to tensors, with one-line errors that say what to do."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pyro_vae.errors import UsageError, warn


def as_tensor(
    value: Any,
    name: str,
    dtype: torch.dtype | None = None,
    missing: bool = False,
    finite: bool = True,
) -> Tensor:
    """Convert an array to a tensor and check that it holds only finite numbers.

    Arguments:
        value: a tensor, a NumPy array, an object with ``__array__``, or a list.
        name: the name of the array in error messages.
        dtype: the type to which the array is cast later. Its values must be finite in this type,
            too.
        missing: whether NaN is accepted, as a missing entry.
        finite: whether the values must be finite.

    Raises `UsageError` if the array is empty, masked, sparse, nested, quantized or complex, if it
    holds values that are not finite, or if it does not hold numbers.
    """
    tensor = _numbers(value, name)
    if tensor.dim() == 0:
        raise UsageError(f"{name} must have a row for each datum, got the number {tensor.item():g}")
    if tensor.numel() == 0:
        raise UsageError(f"{name} is empty: got an array of shape {tuple(tensor.shape)}")
    if finite:
        require_finite(tensor, name, dtype, missing=missing)
    return tensor


def with_holes(value: Any) -> Any:
    """A masked array as a plain array of floats, with NaN for masked values; others unchanged.

    >>> with_holes(np.ma.array([1, 2], mask=[True, False]))
    array([nan,  2.], dtype=float32)
    """
    if isinstance(value, np.ma.MaskedArray) and np.ma.is_masked(value):
        kind = value.dtype if value.dtype.kind == "f" else np.float32
        return np.ma.filled(value.astype(kind), np.nan)
    return value


def require_finite(
    tensor: Tensor,
    name: str,
    dtype: torch.dtype | None = None,
    start: int = 0,
    of: str = "",
    missing: bool = False,
) -> None:
    """Raise `UsageError` if a value is not finite after the cast to ``dtype``.

    NaN is accepted with ``missing``.

    The error names the row. Rows are counted from ``start``. ``of`` follows the row number in the
    message, for example " of the epoch".
    """
    if not tensor.is_floating_point():
        return
    narrow = dtype is not None and torch.finfo(dtype).max < torch.finfo(tensor.dtype).max
    for offset, part in zip(range(0, len(tensor), 4096), tensor.split(4096), strict=True):
        bad = ~torch.isfinite(part.to(dtype) if narrow else part)
        if missing:
            bad &= ~part.isnan()
        if not bool(bad.any()):
            continue
        at = int(bad.reshape(len(bad), -1).any(1).nonzero()[0])
        value, row = part[at][bad[at]].flatten()[0].item(), f"row {start + offset + at}{of}"
        if np.isfinite(value):
            raise UsageError(
                f"{name} holds {value:g} in {row}, which is too large for {dtype}, the type of the "
                "pair's parameters: standardize the column, or use pair.double()"
            )
        raise UsageError(
            f"{name} holds values that are not finite (NaN or infinite), first in {row}"
        )


def as_labels(value: Any, name: str = "labels", count: int | None = None) -> Tensor:
    """Convert labels to integers of shape (n,), where -1 marks a missing label.

    Arguments:
        value: integers of any type, with -1 for a missing label; or floats with integer values,
            with NaN for a missing label.
        name: the name of the labels in error messages.
        count: the required number of labels.

    Raises `UsageError` if a label is not an integer from -1 on, or if the number of labels differs
    from ``count``.

    >>> as_labels([2.0, float("nan"), 0.0])
    tensor([ 2, -1,  0])
    """
    labels = _numbers(value, name).cpu()
    if labels.dim() == 0 or labels.numel() != len(labels):
        raise UsageError(
            f"{name} must be one number for each row, got shape {tuple(labels.shape)}; convert "
            "one-hot rows to labels with argmax(1)"
        )
    labels = labels.reshape(-1)
    if labels.is_floating_point():
        labels = labels.double().nan_to_num(nan=-1.0, posinf=0.5, neginf=0.5)
    whole = labels.long()
    wrong = whole < (0 if labels.dtype == torch.uint64 else -1)  # over 2^63 they turn negative
    if labels.is_floating_point():
        wrong |= whole != labels
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0])
        raise UsageError(
            f"{name} must be integers of at least 0, or -1 for a missing label, got "
            f"{np.asarray(value).reshape(-1)[row]} in row {row}"
        )
    if count is not None and len(whole) != count:
        raise UsageError(f"got {len(whole)} {name} for {count} rows; the numbers must match")
    return whole


def as_context(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Context as a pair receives it: floats of its type, int64 for other integers, or booleans.

    An index of type uint8 would be read as a mask, and other short integers cannot index.
    """
    if value.is_floating_point():
        return value.to(dtype)
    return value if value.dtype == torch.bool else value.long()


def each_context(context: Sequence[Any]) -> tuple[Any, ...]:
    """The context tensors of a call. One list of them, as in version 0.1.0, is deprecated.

    >>> len(each_context((torch.ones(3), torch.ones(3, 2))))
    2
    """
    first = context[0] if len(context) == 1 else None
    if not isinstance(first, (list, tuple)) or not any(hasattr(part, "shape") for part in first):
        return tuple(context)
    warn(
        "a list of context tensors is deprecated and will be rejected in the next release; pass "
        "each tensor as an argument of its own",
        DeprecationWarning,
    )
    return tuple(first)


def plain_fault(value: Any) -> str | None:
    """Say why a value is not a plain array of numbers and what to do; None if it is one.

    >>> plain_fault(np.ma.array([1.0, 2.0], mask=[True, False]))
    'has masked values, which are not supported: fill them in, or leave out their rows'
    """
    if isinstance(value, np.ma.MaskedArray):
        masked = np.ma.is_masked(value)
    elif isinstance(value, Tensor) and hasattr(value, "get_mask"):  # torch.masked
        masked = not bool(value.get_mask().all())
    else:
        masked = False
    if masked:
        return "has masked values, which are not supported: fill them in, or leave out their rows"
    if hasattr(value, "toarray") and hasattr(value, "nnz"):  # scipy
        return f"is sparse ({type(value).__name__}): pass its toarray()"
    if not isinstance(value, Tensor):
        return None
    if value.is_nested:
        return "is a nested tensor: pad its rows to one shape (torch.nested.to_padded_tensor)"
    if value.layout != torch.strided:
        return f"is sparse ({value.layout}): pass its to_dense()"
    if value.is_quantized:
        return f"is quantized ({value.dtype}): pass its dequantize()"
    return f"must be real, got an array of {value.dtype}" if value.is_complex() else None


def _numbers(value: Any, name: str) -> Tensor:
    """Convert an array to a tensor without checking its values."""
    parts = value if isinstance(value, (list, tuple)) else ()
    for part in (value, *parts):
        if fault := plain_fault(part):
            raise UsageError(f"{name} {fault}")
    if isinstance(value, Tensor) and hasattr(value, "get_data"):
        value = value.get_data()
    try:
        if not isinstance(value, Tensor) and hasattr(value, "__array__"):
            # Index a pandas column by position, not by label.
            value = _native(np.asarray(value))
        tensor = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        words = isinstance(value, (list, tuple)) and all(isinstance(v, str) for v in value)
        kind = np.dtype("U") if words else getattr(value, "dtype", type(value).__name__)
        raise UsageError(
            f"{name} must be an array of numbers, got one of {kind}{_cure(kind)}"
        ) from error
    if fault := plain_fault(tensor):
        raise UsageError(f"{name} {fault}")
    return tensor


def _native(array: np.ndarray) -> np.ndarray:
    """The array in a form that torch accepts: native byte order, writable, positive strides."""
    odd = not (array.dtype.isnative and array.flags.writeable)
    if odd or any(stride < 0 for stride in array.strides):
        return array.astype(array.dtype.newbyteorder("="), order="C")
    return array


def _cure(kind: Any) -> str:
    if kind in ("tuple", "list"):
        return "; pass x and each array of its context as an argument of its own"
    code = getattr(kind, "kind", None)
    if code == "O":
        return "; often the cause is missing values (None, pandas.NA): fill them in"
    if code in ("U", "S"):
        return "; numpy.unique(values, return_inverse=True)[1] converts words to integers"
    return ""


def recorded_divisor(pair: nn.Module) -> int | None:
    """The divisor of the pair's 8-bit training data; None if its training data were not 8-bit."""
    found = (vars(module).get(DIVISOR) for module in pair.modules())
    return next((divisor for divisor in found if divisor is not None), None)


DIVISOR = "uint8_divisor"
"""The attribute of a fitted pair that holds the divisor; config.json uses the same name."""
