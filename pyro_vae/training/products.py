"""Matrix products by oneDNN, on processors where torch's own products are slow.

torch multiplies float32 matrices by MKL, which uses the full width of AVX-512 only on processors of
Intel. On an AMD EPYC of the fifth generation (Zen 5), oneDNN needs half the time of MKL for the
products of a 784-400-50 network with batches of 256. A call of oneDNN costs 8 µs more than one of
MKL, so small products stay with MKL. docs/how-to/engine.md has the figures.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor, fx

from pyro_vae.compat import by_onednn, value_in_graph

aten = torch.ops.aten

LEAST_WORK = 3_000_000
"""From this number of multiplications on, oneDNN is used."""


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, *_: Any) -> Tensor:
    # oneDNN ignores the stride of a bias, and a parameter may be replaced after the trace.
    return by_onednn(x, weight, None if bias is None else bias.contiguous())


# An operation of our own keeps Inductor from copying matrices that are not in order of rows. Name
# and arguments are those of a C function of torch, which compiled graphs call without Python.
_NAME = "_linear_pointwise"
_library = torch.library.Library("pyro_vae", "FRAGMENT")
_library.define(
    f"{_NAME}(Tensor x, Tensor weight, Tensor? bias, str after, Scalar?[] numbers, str? method) "
    "-> Tensor"
)
_library.impl(_NAME, _product, "CPU")
_library.impl(_NAME, lambda x, weight, *_: x.new_empty(len(x), len(weight)), "Meta")

PRODUCT = getattr(torch.ops.pyro_vae, _NAME).default
"""A linear layer of x (m, k), weight (n, k) and bias (n,), as one operation of a graph."""

PLAIN: tuple[Any, ...] = ("none", [], "")
"""The further arguments of `PRODUCT`: nothing is computed after it."""

IN_C = {
    PRODUCT: [
        "AOTITorchError aoti_torch_cpu__linear_pointwise(AtenTensorHandle x, AtenTensorHandle "
        "weight, AtenTensorHandle* bias, const char* after, const double** numbers, int64_t count, "
        "const char** method, AtenTensorHandle* result)"
    ]
}
"""The C function of each operation, for Inductor."""


@cache
def is_faster() -> bool:
    """Whether oneDNN is faster than MKL on this processor. Only Zen 5 is known to be so."""
    if not hasattr(torch.cpu, "get_capabilities") or not torch.backends.mkldnn.is_available():
        return False
    known = torch.cpu.get_capabilities()
    # Of AMD's processors with AVX-512, Zen 4 lacks this instruction.
    return "AMD" in known.get("cpu_name", "") and bool(known.get("avx512_vp2intersect"))


def choose_products(graph: fx.GraphModule) -> None:
    """Let oneDNN compute the large float32 products of a graph on a CPU, if it is faster.

    The graph runs the changed operations after `pyro_vae.training.tidying.tidy`.
    """
    if not is_faster():
        return
    for node in list(graph.graph.nodes):
        arguments: Any = node.args
        if node.target is aten.mm.default:
            arguments = (None, *arguments)
        elif node.target is not aten.addmm.default or node.kwargs:
            continue
        bias, a, b = arguments
        if _suits(value_in_graph(a), value_in_graph(b), bias):
            bias = bias and _in_rows(bias, node)  # oneDNN ignores the stride of a bias
            node.target, node.args = PRODUCT, (_in_rows(a, node), _weight(b, node), bias, *PLAIN)


def _suits(a: Tensor, b: Tensor, bias: Any) -> bool:
    if a.dtype != torch.float32 or a.device.type != "cpu":
        return False
    if bias is not None and value_in_graph(bias).dim() != 1:
        return False
    (rows, columns), (down, right) = b.shape, b.stride()
    # oneDNN rejects a matrix whose rows overlap in memory, such as windows of a sequence.
    apart = 0 in (down, right) or down >= right * columns or right >= down * rows
    return apart and a.numel() * columns >= LEAST_WORK


def _in_rows(a: fx.Node, node: fx.Node) -> fx.Node:
    """Return a matrix, or a bias, without gaps and row by row in memory, as oneDNN needs it.

    In a compiled graph the copy becomes part of the kernel that computes the matrix.
    """
    value = value_in_graph(a)
    if value.is_contiguous():
        return a
    layout: dict[str, Any] = {"memory_format": torch.contiguous_format}
    with node.graph.inserting_before(node):
        copy = node.graph.call_function(aten.clone.default, (a,), layout)
    copy.meta["val"] = value.clone(memory_format=torch.contiguous_format)
    return copy


def _weight(b: fx.Node, node: fx.Node) -> fx.Node:
    """Return the second matrix as the weight of a linear layer: transposed, without a copy."""
    with node.graph.inserting_before(node):
        transposed = node.graph.call_function(aten.t.default, (b,))
    transposed.meta["val"] = value_in_graph(b).t()
    return transposed
