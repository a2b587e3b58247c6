"""torch.fx keeps the source of each graph; a graph that is freed leaves none."""

import gc
import linecache

from bad_input_helpers import binary, small
from torch.fx import graph_module

import pyro_vae as pv


def sources():
    gc.collect()
    known = [name for name in linecache.cache if "eval_with_key" in name]
    return len(graph_module._loader.eval_cache), len(known)


def test_calls_leave_no_sources_of_graphs():
    pair, x = small(), binary()
    before = sources()
    pv.fit(pair, x, engine="traced", epochs=1, batch_size=4, progress=False)
    pv.refine(pair, x[:2], steps=2, engine="traced", progress=False)
    assert sources() == before


def test_a_graph_that_lives_keeps_its_source():
    pair = small()
    before = sources()
    made = []
    real = graph_module.GraphModule.recompile

    def noted(graph):
        made.append(graph)
        return real(graph)

    graph_module.GraphModule.recompile = noted
    try:
        pv.fit(pair, binary(), engine="traced", epochs=1, batch_size=4, progress=False)
    finally:
        graph_module.GraphModule.recompile = real
    name = type(made[-1]).forward.__code__.co_filename
    assert "def forward" in graph_module._loader.eval_cache[name]
    made.clear()
    assert sources() == before
