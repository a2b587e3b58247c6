"""The compilation of a graph by Inductor."""

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from pyro_vae import compat
from pyro_vae.pairs import noise
from pyro_vae.training.decompositions import DECOMPOSITIONS
from pyro_vae.training.products import IN_C


@contextmanager
def quiet() -> Iterator[None]:
    """Hide torch's own messages about tracing and compiling."""
    loggers = [logging.getLogger(name) for name in ("torch.utils.cpp_extension", "torch._inductor")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def compile_graph(
    graph: torch.fx.GraphModule, examples: Sequence[Tensor]
) -> Callable[..., list[Tensor]]:
    """Return a graph as compiled by Inductor, with our formulas in place of some operations."""
    with torch.no_grad(), quiet():
        plain = [tensor.detach() for tensor in examples]
        formulas = {**DECOMPOSITIONS, **noise.FORMULAS}
        return compat.compile_graph(compat.with_formulas(graph, plain, formulas), plain, IN_C)
