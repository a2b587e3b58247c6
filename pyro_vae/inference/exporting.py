"""Export of a fitted pair: the parameters of its guide and of its likelihood, without Pyro."""

import io
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import pyro
import torch
from torch import Tensor, nn

from pyro_vae.data.preparation import preparation
from pyro_vae.data.sources import Rows, source
from pyro_vae.errors import NotTraceable, UsageError, first_line
from pyro_vae.inference.any_rows import any_rows, repeated
from pyro_vae.pairs.data_plate import is_local
from pyro_vae.pairs.guide import trace_guide
from pyro_vae.pairs.pair import Pair, Site
from pyro_vae.pairs.scope import using
from pyro_vae.pairs.sites import data_first, is_factor, latents, observed
from pyro_vae.pairs.threads import alone
from pyro_vae.pairs.traces import DataFirst, Given, Means, trace
from pyro_vae.parts.by_column import ByColumn
from pyro_vae.parts.circular import Circular
from pyro_vae.runs import files

TOLERANCE = 1e-5
"""The greatest difference, relative to 1 or to the value, between an export and the pair."""

CHECKED_ROWS = (1, 5, 17)
"""The numbers of rows with which an export is compared with the pair."""

FORMATS = {"onnx": ".onnx", "torch": ".pt2"}


class Exported(NamedTuple):
    """The encoder or the decoder of a pair as a function of plain tensors."""

    program: "torch.export.ExportedProgram"
    """Takes ``inputs`` and returns ``outputs``; dimension 0 is any number of rows, at least 1."""
    inputs: dict[str, Tensor]
    """The name of each input, and example rows."""
    outputs: dict[str, dict[str, Any]]
    """The name of each output, such as ``z.loc``, and what it is: the family of its distribution,
    for a part of the columns of a table their indices, and the periods of circular columns."""
    reference: Callable[..., Sequence[Tensor]]
    """The pair's own program for the same tensors."""


@alone()
def export(
    pair: nn.Module,
    x: Rows,
    *context: Any,
    folder: str | Path,
    formats: Sequence[str] = ("onnx", "torch"),
    binarize: str = "dynamic",
) -> list[Path]:
    r"""Write the encoder and the decoder of a pair as files that do not need this library.

    The encoder maps data to the parameters of :math:`q(z|x)`, and the decoder maps latents to the
    parameters of :math:`p(x|z)`. Neither draws. A distribution that depends on another latent gets
    its mean (the mode for categories). Global latents have the means of the guide.

    Arguments:
        pair: any pair whose programs have the same operations for every datum.
        x, context: some rows of data, as `pyro_vae.evaluate` takes them.
        folder: gets ``encoder.onnx`` and ``decoder.onnx``, the same as ``.pt2`` files for
            ``torch.export.load``, and ``config.json`` with the names, shapes and types of inputs
            and outputs.
        formats: "onnx" (needs the extra ``export``), "torch" or both.

    Each file is loaded again and compared with the pair on 1, 5 and 17 rows: the difference is at
    most 1e-5, relative to values above 1. Returns the paths of the files. Raises `UsageError` for
    another format, for distributions without parameters (flows), for a decoder that reads the data
    itself (autoregressive ones), and for a program that a graph cannot hold.

    >>> import tempfile, torch, pyro_vae as pv
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     vae = pv.VAE.mlp((4,), latent_dim=3)
    ...     paths = export(vae, torch.ones(5, 4), folder=folder, formats=["torch"])
    >>> [path.name for path in paths]
    ['encoder.pt2', 'decoder.pt2', 'config.json']
    """
    _require_formats(formats)
    parts = exported_parts(pair, x, *context, binarize=binarize)
    folder, paths = Path(folder), []
    folder.mkdir(parents=True, exist_ok=True)
    for form in formats:
        for name, part in parts.items():
            content = _onnx(part) if form == "onnx" else _torch(part)
            _require_equal(
                name, part, _onnx_runner(content) if form == "onnx" else _loaded(content)
            )
            paths.append(folder / f"{name}{FORMATS[form]}")
            with files.atomic(paths[-1]) as file:
                file.write(content)
    files.write_json(folder / files.CONFIG, _description(pair, parts, formats))
    return [*paths, folder / files.CONFIG]


def exported_parts(
    pair: nn.Module, x: Rows, *context: Any, binarize: str = "dynamic"
) -> dict[str, Exported]:
    """Return the encoder and the decoder of a pair; the arguments are those of `export`."""
    rows = source(x, context, pair)
    batch = preparation(pair, rows, binarize)(rows.first(max(CHECKED_ROWS)))
    batch = tuple(repeated(batch, max(CHECKED_ROWS)))
    with using(pair, seed=0):
        with Means():
            guide = latents(trace_guide(pair, batch))
        shared = {name: site["value"] for name, site in guide.items() if not is_local(site)}
        if len(shared) == len(guide):
            raise UsageError(
                f"export needs a local latent in the guide, but the guide of {type(pair).__name__} "
                f"has {'only global or group latents' if guide else 'none'}"
            )
        with Means(), Given(shared):
            model = latents(trace(cast(Pair, pair).model, batch))
        local = {n: data_first(s["value"], s) for n, s in model.items() if n not in shared}
    inputs = {f"x{i}" if i else "x": tensor for i, tensor in enumerate(batch)}

    def encode(*tensors: Tensor) -> dict[str, Site]:
        with Means(_closed_mean):
            return latents(trace_guide(pair, tensors))

    def decode(*tensors: Tensor) -> dict[str, Site]:
        values = dict(zip(local, tensors, strict=False))
        with Given(shared), DataFirst(values):
            traced = trace(cast(Pair, pair).model, tensors[len(local) :])
        return {name: site for name, site in observed(traced).items() if not is_factor(site)}

    parts = {
        "encoder": _exported(pair, "encoder", encode, inputs),
        "decoder": _exported(pair, "decoder", decode, local | inputs),
    }
    if "x" in parts["decoder"].inputs:
        raise UsageError(
            "the likelihood of x depends on x itself, as in an autoregressive decoder, so the "
            "decoder cannot be exported as a function of the latents"
        )
    return parts


def _exported(
    pair: nn.Module,
    name: str,
    sites: Callable[..., dict[str, Site]],
    inputs: Mapping[str, Tensor],
) -> Exported:
    """Trace the parameters of the local sites that a program returns."""
    outputs: dict[str, dict[str, Any]] = {}

    def parameters(*tensors: Tensor) -> list[Tensor]:
        with using(pair), pyro.validation_enabled(False):
            local = {n: site for n, site in sites(*tensors).items() if is_local(site)}
            found = {f"{n}.{p.name}": p for n, site in local.items() for p in _parameters(site)}
            if not outputs:  # within a graph, numbers are not known
                outputs.update({key: parameter.words for key, parameter in found.items()})
        return [parameter.value.contiguous() for parameter in found.values()]

    # A graph holds the strides of its examples, and a file is given other tensors.
    tensors = [tensor.contiguous() for tensor in inputs.values()]
    try:
        parameters(*tensors)  # a first run decides what a graph cannot decide
        graph, used = any_rows(parameters, tensors)
        kept = {list(inputs)[i]: tensors[i] for i in used}
        rows = tuple({0: torch.export.Dim("rows", min=1)} for _ in kept)
        with _quiet():
            program = torch.export.export(graph, tuple(kept.values()), dynamic_shapes=rows)
    except Exception as error:  # user code may raise anything
        why = str(error) if isinstance(error, NotTraceable) else first_line(error)
        raise UsageError(
            f"the {name} of {type(pair).__name__} cannot be exported as a graph: {why}"
        ) from error

    def reference(*given: Tensor) -> list[Tensor]:
        again = dict(zip(kept, given, strict=True))
        others = {key: repeated([value], len(given[0]))[0] for key, value in inputs.items()}
        return parameters(*(others | again).values())

    return Exported(program, kept, outputs, reference)


def _closed_mean(fn: Any) -> Tensor:
    _parameter_names(_base(fn))
    try:
        return cast(Tensor, fn.mean)
    except NotImplementedError as error:
        raise NotTraceable(f"the mean of {type(fn).__name__} has no closed form") from error


class _Parameter(NamedTuple):
    """A parameter of a site."""

    name: str
    value: Tensor
    """Its values, data first."""
    of: Any
    """The distribution."""
    columns: list[int] | None
    """The columns of a table to which it belongs; None for all."""

    @property
    def words(self) -> dict[str, Any]:
        """The meaning of the parameter."""
        found: dict[str, Any] = {"distribution": _family(self.of)}
        if self.columns is not None:
            found["columns"] = self.columns
        if isinstance(self.of, Circular):
            found["period"] = self.of.period.tolist()
        return found


def _family(fn: Any) -> str:
    return type(fn).__name__.lstrip("_")


def _parameters(site: Site) -> Iterator[_Parameter]:
    """The parameters of a site."""
    fn, base = site["fn"], _base(site["fn"])
    parts = base.parts if isinstance(base, ByColumn) else [(None, one) for one in _nested(base)]
    for columns, part in parts:
        inner = len(part.batch_shape) - len(fn.batch_shape)
        for key in _parameter_names(part):
            value = torch.as_tensor(getattr(part, key))
            own = part.arg_constraints[key].event_dim
            value = value.expand(part.batch_shape + value.shape[value.dim() - own :])
            name = key if part is base else f"{_family(part)}.{key}"
            yield _Parameter(name, value.movedim(-1 - inner - own, 0), part, columns)


def _nested(fn: Any) -> Iterator[Any]:
    """A distribution, and those inside it that have more parameters, as of a zero-inflated one."""
    yield fn
    if any(key in vars(fn) for key in fn.arg_constraints) and "base_dist" in vars(fn):
        yield from _nested(_base(fn.base_dist))


def _base(fn: Any) -> Any:
    """The distribution inside ``to_event``, ``mask`` and the treatment of missing entries."""
    while type(fn).__name__ in ("Independent", "MaskedDistribution", "PartlyObserved"):
        fn = fn.base_dist
    return fn


def _parameter_names(base: Any) -> list[str]:
    names = [key for key in base.arg_constraints if key in vars(base)]
    if base.arg_constraints and not _holds_networks(base):
        return names or list(base.arg_constraints)
    raise NotTraceable(
        f"a distribution of type {type(base).__name__}, such as a flow or a sequence, does not "
        "have parameters of its own"
    )


def _holds_networks(fn: Any) -> bool:
    """Whether a distribution holds networks, such as the layers of a flow."""
    values = [v for held in vars(fn).values() for v in (held if isinstance(held, list) else [held])]
    return any(isinstance(value, nn.Module) for value in values)


def _require_formats(formats: Sequence[str]) -> None:
    for form in formats:
        if form not in FORMATS:
            raise UsageError(f"must be {' or '.join(FORMATS)}, got '{form}'", argument="formats")
    if "onnx" in formats:
        try:
            import onnxruntime  # noqa: F401
            import onnxscript  # noqa: F401
        except ImportError as error:
            raise UsageError(
                "the format onnx needs onnxruntime and onnxscript, which are not installed; run "
                "pip install 'pyro-vae[export]'"
            ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide what the exporters of torch say about their own steps."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def _torch(part: Exported) -> bytes:
    buffer = io.BytesIO()
    with _quiet():
        torch.export.save(part.program, buffer)
    return buffer.getvalue()


def _loaded(content: bytes) -> Callable[..., list[Tensor]]:
    with _quiet():
        module = torch.export.load(io.BytesIO(content)).module()
    return lambda *tensors: list(module(*tensors))


def _onnx(part: Exported) -> bytes:
    try:
        with _quiet():
            made = torch.onnx.export(
                part.program,
                input_names=list(part.inputs),
                output_names=list(part.outputs),
                dynamo=True,
                verbose=False,
            )
    except Exception as error:  # an operation that ONNX does not have
        raise UsageError(
            f"ONNX cannot express the pair ({first_line(error)[:200]}); use formats=['torch']"
        ) from error
    return cast(Any, made).model_proto.SerializeToString()


def _onnx_runner(content: bytes) -> Callable[..., list[Tensor]]:
    import onnxruntime

    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]

    def run(*tensors: Tensor) -> list[Tensor]:
        arrays = [np.ascontiguousarray(tensor.cpu().numpy()) for tensor in tensors]
        found = session.run(None, dict(zip(names, arrays, strict=True)))
        return [torch.as_tensor(array) for array in found]

    return run


def _require_equal(name: str, part: Exported, run: Callable[..., Sequence[Tensor]]) -> None:
    """Compare an exported file with the pair."""
    for n in CHECKED_ROWS:
        rows = [tensor[:n] for tensor in part.inputs.values()]
        for key, one, two in zip(part.outputs, part.reference(*rows), run(*rows), strict=True):
            one = one.cpu()
            far = torch.where(one == two, 0.0, (one - two).abs() / one.abs().clamp(min=1))
            if one.shape != two.shape or not bool((far <= TOLERANCE).all()):
                raise UsageError(
                    f"the exported {name} differs from the pair by {far.max():.1g} at '{key}' on "
                    f"{n} rows; no file was written for it"
                )


def _description(
    pair: nn.Module, parts: Mapping[str, Exported], formats: Sequence[str]
) -> dict[str, Any]:
    return {
        "format_version": 1,
        "pair": type(pair).__name__,
        "torch": torch.__version__,
        "formats": list(formats),
        "parts": {
            name: {
                "inputs": {
                    key: {"row_shape": list(value.shape[1:]), "type": _type(value)}
                    for key, value in part.inputs.items()
                },
                "outputs": {
                    key: {
                        "row_shape": list(value.shape[1:]),
                        "type": _type(value),
                        **words,
                    }
                    for (key, words), value in zip(
                        part.outputs.items(), part.reference(*part.inputs.values()), strict=True
                    )
                },
            }
            for name, part in parts.items()
        },
    }


def _type(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
