"""Arrays from outside: as tensors of numbers, or refused in one line that says what to do."""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pyro_vae.errors import UsageError


def as_tensor(value: Any, name: str, dtype: torch.dtype | None = None) -> Tensor:
    """An array as a tensor, checked to hold finite numbers alone.

    Arguments:
        value: a tensor, an array of NumPy or of what has ``__array__``, or a list.
        name: what it is, for messages.
        dtype: the type that it is cast to later, in which its values must be finite too.

    Raises `UsageError` for an array that is empty, masked, sparse, nested, quantized, complex, not
    finite, or no numbers.
    """
    tensor = _numbers(value, name)
    if tensor.dim() == 0 or len(tensor) == 0 or tensor.numel() == 0:
        raise UsageError(f"{name} is empty: an array of shape {tuple(tensor.shape)} came")
    require_finite(tensor, name, dtype)
    return tensor


def require_finite(
    tensor: Tensor, name: str, dtype: torch.dtype | None = None, start: int = 0, of: str = ""
) -> None:
    """Raise `UsageError`, which names the row, for values that are not finite once they are cast.

    Rows are counted from ``start``; ``of`` says of what, where that is not plain.
    """
    if not tensor.is_floating_point():
        return
    narrow = dtype is not None and torch.finfo(dtype).max < torch.finfo(tensor.dtype).max
    for offset, part in zip(range(0, len(tensor), 4096), tensor.split(4096), strict=True):
        bad = ~torch.isfinite(part.to(dtype) if narrow else part)
        if not bool(bad.any()):
            continue
        at = int(bad.reshape(len(bad), -1).any(1).nonzero()[0])
        value, row = part[at][bad[at]].flatten()[0].item(), f"row {start + offset + at}{of}"
        if np.isfinite(value):
            raise UsageError(
                f"{name} holds {value:g} in {row}, more than {dtype}, the type of the pair's "
                "parameters, can hold: standardize the column, or use pair.double()"
            )
        raise UsageError(
            f"{name} holds values that are not finite (NaN or infinite), first in {row}"
        )


def as_labels(value: Any, name: str = "labels", count: int | None = None) -> Tensor:
    """Labels as whole numbers (n,), of which -1 is a missing one.

    Arguments:
        value: whole numbers of any type, -1 where missing; or floats that are whole numbers, NaN
            where missing.
        count: how many there must be.

    >>> as_labels([2.0, float("nan"), 0.0])
    tensor([ 2, -1,  0])
    """
    labels = _numbers(value, name).cpu()
    if labels.dim() == 0 or labels.numel() != len(labels):
        raise UsageError(
            f"{name} must be one number for each row, got shape {tuple(labels.shape)}; rows of a "
            "one-hot code become labels by argmax(1)"
        )
    labels = labels.reshape(-1)
    if labels.is_floating_point():
        labels = labels.double().nan_to_num(nan=-1.0, posinf=0.5, neginf=0.5)
    whole = labels.long()
    wrong = whole < -1
    if labels.is_floating_point():
        wrong |= whole != labels
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0])
        raise UsageError(
            f"{name} must be whole numbers from 0, and -1 where missing, got "
            f"{np.asarray(value).reshape(-1)[row]} in row {row}"
        )
    if count is not None and len(whole) != count:
        raise UsageError(f"{len(whole)} {name} came for {count} rows")
    return whole


def plain_fault(value: Any) -> str | None:
    """Why this holds more or less than an array of numbers, and what to do; None where it does not.

    >>> plain_fault(np.ma.array([1.0, 2.0], mask=[True, False]))
    'has masked values, which are not served: fill them in, or leave out their rows'
    """
    if isinstance(value, np.ma.MaskedArray):
        masked = np.ma.is_masked(value)
    elif isinstance(value, Tensor) and hasattr(value, "get_mask"):  # torch.masked
        masked = not bool(value.get_mask().all())
    else:
        masked = False
    if masked:
        return "has masked values, which are not served: fill them in, or leave out their rows"
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
    return f"must be real, an array of {value.dtype} came" if value.is_complex() else None


def _numbers(value: Any, name: str) -> Tensor:
    """An array as a tensor, without a look at its values."""
    parts = value if isinstance(value, (list, tuple)) else ()
    for part in (value, *parts):
        if fault := plain_fault(part):
            raise UsageError(f"{name} {fault}")
    if isinstance(value, Tensor) and hasattr(value, "get_data"):
        value = value.get_data()
    try:
        if not isinstance(value, Tensor) and hasattr(value, "__array__"):
            # A pandas column is read by its positions, not by its labels.
            value = _native(np.asarray(value))
        tensor = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        words = isinstance(value, (list, tuple)) and all(isinstance(v, str) for v in value)
        kind = np.dtype("U") if words else getattr(value, "dtype", type(value).__name__)
        raise UsageError(
            f"{name} must be an array of numbers, one of {kind} came{_cure(kind)}"
        ) from error
    if fault := plain_fault(tensor):
        raise UsageError(f"{name} {fault}")
    return tensor


def _native(array: np.ndarray) -> np.ndarray:
    """An array that torch takes: of the machine's byte order, writable, of positive strides."""
    odd = not (array.dtype.isnative and array.flags.writeable)
    if odd or any(stride < 0 for stride in array.strides):
        return array.astype(array.dtype.newbyteorder("="), order="C")
    return array


def _cure(kind: Any) -> str:
    code = getattr(kind, "kind", None)
    if code == "O":
        return "; objects are often numbers beside missing values (None, pandas.NA): fill these in"
    if code in ("U", "S"):
        return "; numpy.unique(values, return_inverse=True)[1] numbers the words"
    return ""


def recorded_divisor(pair: nn.Module) -> int | None:
    """What the pair's 8-bit training data were divided by; None where it had none."""
    found = (vars(module).get(DIVISOR) for module in pair.modules())
    return next((divisor for divisor in found if divisor is not None), None)


DIVISOR = "uint8_divisor"
"""The attribute of a fitted pair that holds it, recorded in config.json by the same name."""
