"""Products by oneDNN: the right products of a graph, with the same values as torch's."""

import copy

import pytest
import torch
from torch import nn

import pyro_vae as pv
from pyro_vae.compat import make_graph
from pyro_vae.training import products
from pyro_vae.training.products import PRODUCT, choose_products
from pyro_vae.training.tidying import tidy

aten = torch.ops.aten

needs_onednn = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN"
)


@pytest.fixture
def everywhere(monkeypatch):
    """Use oneDNN on this processor, whichever it is; return the shapes that it multiplies."""
    monkeypatch.setattr(products, "is_faster", lambda: True)
    called, run = [], products.by_onednn

    def counted(x, weight, bias):
        called.append((*x.shape, len(weight)))
        return run(x, weight, bias)

    monkeypatch.setattr(products, "by_onednn", counted)
    return called


def graph_of(function, *inputs):
    graph = make_graph(function, inputs)
    choose_products(graph)
    tidy(graph)
    return graph


def targets(graph):
    return [node.target for node in graph.graph.nodes if node.op == "call_function"]


def of_shape(rows, columns, layout):
    """Return a matrix whose memory is in order of rows, of columns, has gaps, or is one row."""
    if layout == "rows":
        return torch.randn(rows, columns)
    if layout == "columns":
        return torch.randn(columns, rows).t()
    if layout == "gaps":
        return torch.randn(2 * rows, columns + 3)[::2, :columns]
    return torch.randn(columns).expand(rows, columns)


LAYOUTS = ("rows", "columns", "gaps", "one row")


@needs_onednn
@pytest.mark.parametrize("left", LAYOUTS)
@pytest.mark.parametrize("right", LAYOUTS)
@pytest.mark.parametrize("bias", [None, torch.randn(110), torch.randn(1).expand(110)])
def test_values_and_layout_are_those_of_torch(everywhere, left, right, bias):
    a, b = of_shape(256, 200, left), of_shape(200, 110, right)

    def function(a, b, bias):
        return a @ b if bias is None else torch.addmm(bias, a, b)

    graph = graph_of(function, a, b, bias)
    assert PRODUCT in targets(graph)
    assert not {aten.mm.default, aten.addmm.default} & set(targets(graph))
    doubles = (value if value is None else value.double() for value in (a, b, bias))
    found, exact = graph(a, b, bias), function(*doubles)
    assert found.dtype == torch.float32
    assert found.is_contiguous()
    assert (found - exact).abs().max() < 1e-4


@needs_onednn
def test_a_bias_may_get_gaps_after_the_trace(everywhere):
    a, b, whole = torch.randn(256, 200), torch.randn(200, 110), torch.randn(220)
    graph = graph_of(lambda a, b, bias: torch.addmm(bias, a, b), a, b, torch.randn(110))
    assert PRODUCT in targets(graph)
    assert torch.allclose(graph(a, b, whole[::2]), whole[::2] + a @ b, atol=1e-4)
    assert torch.allclose(graph(a, b, whole[:1].expand(110)), whole[0] + a @ b, atol=1e-4)


@needs_onednn
def test_other_products_stay_as_they_are(everywhere):
    large, wide = torch.randn(300, 300), torch.randn(300, 300)
    cases = {
        "small": (lambda a, b: a[:10] @ b, large, wide),
        "float64": (torch.mm, large.double(), wide.double()),
        "bfloat16": (torch.mm, large.bfloat16(), wide.bfloat16()),
        "overlapping rows": (lambda a, b: a @ b.unfold(0, 300, 1), large, torch.randn(599)),
        "a matrix is added": (lambda a, b: torch.addmm(a, a, b), large, wide),
        "another weight": (lambda a, b: torch.addmm(a[0], a, b, alpha=2.0), large, wide),
    }
    for name, (function, a, b) in cases.items():
        graph = graph_of(function, a, b)
        assert PRODUCT not in targets(graph), name
        assert torch.allclose(graph(a, b), function(a, b)), name


def test_a_processor_that_is_not_known_to_gain_keeps_the_products_of_torch(monkeypatch):
    monkeypatch.setattr(products, "is_faster", lambda: False)
    assert PRODUCT not in targets(graph_of(torch.mm, torch.randn(300, 300), torch.randn(300, 300)))


@pytest.mark.parametrize(
    ("known", "faster"),
    [
        ({"cpu_name": "AMD EPYC 9755", "avx512_vp2intersect": True}, True),
        ({"cpu_name": "AMD EPYC 9654", "avx512_f": True, "avx512_vp2intersect": False}, False),
        ({"cpu_name": "Intel(R) Core(TM) i7-1165G7", "avx512_vp2intersect": True}, False),
        ({"architecture": "arm64"}, False),
    ],
)
def test_zen_5_is_known_by_its_name_and_an_instruction(monkeypatch, known, faster):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: known, raising=False)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    assert products.is_faster.__wrapped__() is faster


@needs_onednn
@pytest.mark.parametrize("engine", ["traced", "compiled"])
def test_training_is_that_of_the_eager_engine(everywhere, engine):
    first, last = {(256, 784, 64), (64, 256, 784)}, {(256, 64, 784), (256, 784, 64), (784, 256, 64)}
    x = torch.rand(512, 784)
    histories = {}
    for name in ("eager", engine):
        torch.manual_seed(0)
        vae = pv.VAE.mlp((784,), latent_dim=4, hidden=(64,), activation=nn.Tanh)
        options = {"epochs": 2, "batch_size": 256, "engine": name, "progress": False}
        histories[name] = pv.fit(vae, x, **options)
    eager, graph = (histories[name]["elbo"] for name in ("eager", engine))
    assert graph == pytest.approx(eager, rel=1e-5)
    assert set(everywhere) == first | last


@needs_onednn
def test_estimates_of_log_p_x_are_those_of_the_eager_engine(everywhere):
    torch.manual_seed(0)
    vae = pv.VAE.mlp((784,), latent_dim=4, hidden=(64,))
    x = torch.rand(40, 784).round()
    eager, traced = (
        pv.log_likelihood(vae, x, num_samples=200, engine=engine) for engine in ("eager", "traced")
    )
    assert torch.allclose(traced.per_datum, eager.per_datum, rtol=1e-5)
    assert everywhere


@needs_onednn
@pytest.mark.parametrize("engine", ["traced", "compiled"])
def test_a_resumed_run_is_bit_identical(everywhere, engine, tmp_path):
    x = torch.rand(512, 784)
    options = {"batch_size": 256, "progress": False, "engine": engine}
    torch.manual_seed(0)
    whole = pv.VAE.mlp((784,), latent_dim=4, hidden=(64,))
    part = copy.deepcopy(whole)
    pv.fit(whole, x, epochs=4, **options)
    pv.fit(part, x, epochs=2, out=tmp_path, **options)
    pv.fit(part, x, epochs=4, out=tmp_path, resume=True, **options)
    assert everywhere
    for name, value in whole.state_dict().items():
        assert torch.equal(value, part.state_dict()[name])
