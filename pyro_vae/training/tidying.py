"""A shorter graph: without constants, copies and operations that change nothing."""

import operator
from typing import Any, cast

import torch
from torch import Tensor

from pyro_vae.compat import OpOverload, owning_source, schema, value_in_graph

aten = torch.ops.aten

_ALIASES = (aten.alias.default, aten.detach.default)

_SHAPES = (aten.view.default, aten.expand.default, aten.unsqueeze.default, aten.t.default)

_MADE = {
    aten.ones_like.default: 1.0,
    aten.ones.default: 1.0,
    aten.zeros_like.default: 0.0,
    aten.zeros.default: 0.0,
}


def tidy(graph: torch.fx.GraphModule) -> None:
    """Remove operations that a replay does not need, without changing one bit of its results.

    These are aliases, views with the same shape, arithmetic with whole tensors of zeros or ones
    (frequent in a backward pass), repeated computations, and unused results.
    """
    constants: dict[torch.fx.Node, float] = {}
    written, known = _written(graph.graph), dict[Any, torch.fx.Node]()
    for node in list(graph.graph.nodes):
        if node.op != "call_function" or not isinstance(node.target, OpOverload):
            continue
        constant = _constant(node, constants)
        if constant is not None and node not in written:
            constants[node] = constant
        if node.target is aten.mul.Tensor and -1.0 in map(constants.get, node.args):
            source = node.args[constants.get(node.args[0]) == -1.0]
            if isinstance(source, torch.fx.Node) and _alike(source, node):
                node.target, node.args = aten.neg.default, (source,)
        same = _same(node, constants)
        changes = bool(written & {node, *node.all_input_nodes, same})
        if changes and not _is_view(node):
            same = None  # it is a copy of values that change later, or that differ until then
        if same is None and not _has_effect(node) and not changes:
            same = known.setdefault((node.target, str(node.args), str(node.kwargs)), node)
        if same is not None and same is not node:
            node.replace_all_uses_with(same)
    for node in reversed(list(graph.graph.nodes)):
        if node.op in ("get_attr", "call_function") and not _has_effect(node) and not node.users:
            graph.graph.erase_node(node)
    graph.recompile()
    owning_source(graph)


def hold_constants(graph: torch.fx.GraphModule) -> None:
    """Keep constants of a program on the GPU that its graph copies from the CPU in each run.

    CUDA cannot capture such a copy. ``torch.arange(3).to(x.device)`` has one, and so has
    ``torch.tensor([1.0], device="cuda")``.
    """
    known: dict[torch.fx.Node, Tensor] = {}
    written: set[torch.fx.Node] | None = None
    for node in list(graph.graph.nodes):
        value = value_in_graph(node)
        if not isinstance(value, Tensor) or not all(
            source in known for source in node.all_input_nodes
        ):
            continue
        if node.op == "get_attr":
            known[node] = getattr(graph, cast(str, node.target))
        elif node.op == "call_function" and isinstance(node.target, OpOverload):
            written = _written(graph.graph) if written is None else written
            if _has_effect(node) or written & {node, *node.all_input_nodes}:
                continue
            args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), known.__getitem__)
            if value.device.type == "cpu":
                known[node] = node.target(*args, **kwargs)
            elif node.all_input_nodes:
                _hold(graph, node, node.target(*args, **kwargs))


def _hold(graph: torch.fx.GraphModule, node: torch.fx.Node, value: Tensor) -> None:
    """Replace a node by a constant."""
    name = f"constant_{node.name}"
    graph.register_buffer(name, value, persistent=False)
    with graph.graph.inserting_before(node):
        held = graph.graph.get_attr(name)
    held.meta["val"] = value_in_graph(node)
    node.replace_all_uses_with(held)


def _has_effect(node: torch.fx.Node) -> bool:
    target = node.target
    return isinstance(target, OpOverload) and (
        schema(target).is_mutable
        or torch.Tag.nondeterministic_seeded in target.tags
        or "batch_norm" in schema(target).name  # the schema hides the running means
    )


def _written(graph: torch.fx.Graph) -> set[torch.fx.Node]:
    """Return nodes with values, or shared memory, that a later node changes."""
    found = {source for node in graph.nodes if _has_effect(node) for source in node.all_input_nodes}
    for nodes in (reversed(list(graph.nodes)), graph.nodes):
        for node in nodes:
            if _is_view(node):
                shared = {node, *node.all_input_nodes}
                if shared & found:
                    found |= shared
    return found


def _is_view(node: torch.fx.Node) -> bool:
    """Whether the result of a node may lie in the memory of its source.

    ``chunk`` returns a list of views, so an element of such a list is a view too. The schema of an
    "unsafe" view does not say that it is a view.
    """
    target = node.target
    if not isinstance(target, OpOverload):
        return target is operator.getitem
    declared = any(returned.alias_info is not None for returned in schema(target).returns)
    return declared or "unsafe_view" in schema(target).name


def _constant(node: torch.fx.Node, constants: dict[torch.fx.Node, float]) -> float | None:
    """Return the number that all elements of a node's value equal, if it is known."""
    target: Any = node.target
    if target in _MADE:
        return _MADE[target]
    source = node.args[0] if node.args else None
    if not isinstance(source, torch.fx.Node) or source not in constants:
        return None
    if target in _SHAPES or target in _ALIASES:
        return constants[source]
    if torch.Tag.pointwise not in target.tags or len(node.kwargs):
        return None
    operands = [constants.get(a) if isinstance(a, torch.fx.Node) else a for a in node.args]
    if not all(isinstance(value, (int, float)) for value in operands):
        return None
    dtypes = [value_in_graph(a).dtype if isinstance(a, torch.fx.Node) else None for a in node.args]
    return target(
        *(
            value if dtype is None else torch.tensor(value, dtype=dtype)
            for value, dtype in zip(operands, dtypes, strict=True)
        )
    ).item()


def _same(node: torch.fx.Node, constants: dict[torch.fx.Node, float]) -> torch.fx.Node | None:
    """Return an earlier node with the same value, if there is one."""
    target: Any = node.target
    first, second = (*node.args, None, None)[:2]
    if target in (aten.mul.Tensor, aten.add.Tensor) and first in constants:
        first, second = second, first
    if not isinstance(first, torch.fx.Node) or node.kwargs:
        return None
    if target in _ALIASES:
        return first
    if target is aten.t.default and first.target is aten.t.default:
        return cast(torch.fx.Node, first.args[0])
    if target is aten.neg.default and first.target is aten.neg.default:
        return cast(torch.fx.Node, first.args[0])
    if not _alike(first, node):
        return None
    if target in _SHAPES[:2]:
        return first
    number = constants.get(second) if isinstance(second, torch.fx.Node) else second
    if target in (aten.mul.Tensor, aten.div.Tensor) and number == 1:
        return first
    if target is aten.pow.Tensor_Scalar and number == 1:
        return first
    return first if target in (aten.add.Tensor, aten.sub.Tensor) and number == 0 else None


def _alike(a: torch.fx.Node, b: torch.fx.Node) -> bool:
    """Whether the values of two nodes are tensors of the same shape and type."""
    left, right = value_in_graph(a), value_in_graph(b)
    if not isinstance(left, Tensor) or not isinstance(right, Tensor):
        return False
    return left.shape == right.shape and left.dtype == right.dtype
