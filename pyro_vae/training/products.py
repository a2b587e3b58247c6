"""Matrix products by oneDNN, on processors where torch's own products are slow.

torch multiplies float32 matrices by MKL, which uses the full width of AVX-512 only on processors of
Intel. On an AMD EPYC of the fifth generation (Zen 5), oneDNN needs half the time of MKL for the
products of a 784-400-50 network with batches of 256. A call of oneDNN costs 10 µs more than one of
MKL, so small products stay with MKL. See docs/benchmarks for the figures.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor, fx

from pyro_vae.compat import linear_by_onednn, value_in_graph

aten = torch.ops.aten

LEAST_WORK = 5_000_000
"""From this number of multiplications on, oneDNN is used."""

LEAST_WIDTH = 64
"""A product with fewer columns stays with MKL."""


def _product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    return linear_by_onednn(a, b.t(), bias)


# An operation of our own keeps Inductor from copying the second matrix in every step.
_library = torch.library.Library("pyro_vae", "FRAGMENT")
_library.define("product(Tensor a, Tensor b, Tensor? bias=None) -> Tensor")
_library.impl("product", _product, "CPU")
_library.impl("product", lambda a, b, bias=None: a.new_empty(len(a), b.shape[1]), "Meta")

PRODUCT = torch.ops.pyro_vae.product.default
"""a b + bias, of shapes (m, k), (k, n) and (n,), as one operation of a graph."""


@cache
def is_faster() -> bool:
    """Whether oneDNN is faster than MKL on this processor. Only Zen 5 is known to be so."""
    if not hasattr(torch.cpu, "get_capabilities") or not torch.backends.mkldnn.is_available():
        return False
    known = torch.cpu.get_capabilities()
    # Of AMD's processors with AVX-512, Zen 4 lacks this instruction.
    return "AMD" in known.get("cpu_name", "") and bool(known.get("avx512_vp2intersect"))


def choose_products(graph: fx.GraphModule) -> None:
    """Let oneDNN compute the large float32 products of a graph on a CPU, if it is faster."""
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
            node.target, node.args = PRODUCT, (_in_rows(a, node), b, bias)
    graph.recompile()


def _suits(a: Tensor, b: Tensor, bias: Any) -> bool:
    if a.dtype != torch.float32 or a.device.type != "cpu":
        return False
    if bias is not None and value_in_graph(bias).dim() != 1:
        return False
    return a.numel() * b.shape[1] >= LEAST_WORK and b.shape[1] >= LEAST_WIDTH


def _in_rows(a: fx.Node, node: fx.Node) -> fx.Node:
    """Return the first matrix row by row in memory, as oneDNN needs it.

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
