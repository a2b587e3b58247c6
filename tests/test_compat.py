"""What is private or unstable in torch and Pyro is named in compat.py alone, and does what it says.

The package is read for such names: attributes, strings, keywords and imports.
"""

import ast
import math
import shutil
from datetime import timedelta
from pathlib import Path

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from pyro.infer import Trace_ELBO
from pyro.nn import PyroModule, PyroParam
from pyro.poutine.enum_messenger import EnumMessenger
from torch import distributed, nn

import pyro_vae as pv
from pyro_vae import compat
from pyro_vae.training.decompositions import DECOMPOSITIONS

PACKAGE = Path(pv.__file__).parent

NAMED_TUPLES = {"_asdict", "_replace", "_fields", "_make"}
"""Public names of `collections.namedtuple`, in spite of the underscore."""

INTERNAL = ("torch._", "torch.fx.experimental", "pyro.infer.util", "pyro.distributions.util")
INTERNAL += ("pyro.poutine.runtime", "pyro.poutine.util")
"""Modules that torch and Pyro do not document."""

UNDOCUMENTED = {"full_size", "was_observed"}
"""Names without an underscore that are unstable all the same."""

STRINGS = {"_deterministic", "_enumerate_dim", "was_observed", "_unconstrained", "_mask"}
STRINGS |= {"_observed", "_unobserved", "variable"}
"""Keys, ends of names, and attributes that are looked up by name."""


def is_private(name):
    return name.startswith("_") and not name.startswith("__") and len(name) > 1


def own_names(tree):
    """The names that a file defines: functions, classes, variables, attributes of self."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(getattr(node, "ctx", None), ast.Store):
            if isinstance(node, ast.Name):
                yield node.id
            elif isinstance(node, ast.Attribute) and getattr(node.value, "id", "") == "self":
                yield node.attr


def is_own_call(node):
    """Whether an attribute is one of ``self`` or ``super()``."""
    value = node.value
    called = isinstance(value, ast.Call) and isinstance(value.func, ast.Name)
    return getattr(value, "id", None) == "self" or (called and value.func.id == "super")


def named(node, ours):
    """The private or unstable names of other libraries that one node of a file's tree has."""
    if isinstance(node, ast.Attribute):
        if node.attr in compat.PROTOCOL:
            return [] if is_own_call(node) else [node.attr]
        return [node.attr] if is_foreign(node.attr, ours) else []
    if isinstance(node, ast.keyword):
        return [node.arg] if is_foreign(node.arg or "", ours) else []
    if isinstance(node, ast.Constant):
        return [node.value] if node.value in STRINGS else []
    if isinstance(node, ast.ImportFrom):
        return [m for a in node.names if is_internal(m := f"{node.module}.{a.name}")]
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names if is_internal(alias.name)]
    return []


def is_foreign(name, ours):
    return name in UNDOCUMENTED or (is_private(name) and name not in ours)


def is_internal(module):
    outside = module.startswith(("torch.", "pyro."))
    return module.startswith(INTERNAL) or (outside and "._" in module)


def foreign(tree, ours):
    """Each private or unstable name of other libraries that a file has, with its line."""
    nodes = (node for node in ast.walk(tree) if hasattr(node, "lineno"))
    return [(node.lineno, name) for node in nodes for name in named(node, ours)]


def trees():
    return {path: ast.parse(path.read_text()) for path in sorted(PACKAGE.rglob("*.py"))}


def test_private_names_of_torch_and_pyro_are_in_one_file():
    read = trees()
    ours = {name for tree in read.values() for name in own_names(tree)} - set(compat.PROTOCOL)
    found = {
        f"{path.relative_to(PACKAGE)}:{line}: {name}"
        for path, tree in read.items()
        if path.name != "compat.py"
        for line, name in foreign(tree, ours | NAMED_TUPLES)
    }
    assert not found


@pytest.mark.parametrize(
    "line",
    [
        "objective._differentiable_loss_particle(a, b)",
        "objective._get_traces(model, guide, batch, {})",
        "store._params",
        'site["infer"]["_enumerate_dim"]',
        'site["infer"].get("was_observed")',
        "frame.full_size",
        "torch._fused_adam_(a)",
        "f(_allow_non_fake_inputs=True)",
        "import torch._inductor",
        "from torch.fx.experimental.proxy_tensor import make_fx",
        "from pyro.poutine.runtime import _PYRO_STACK",
        "from pyro.poutine.util import site_is_subsample",
        'getattr(fn, "_mask", True)',
    ],
)
def test_the_reading_finds_such_a_name(line):
    assert list(foreign(ast.parse(line), NAMED_TUPLES))


def test_every_name_is_used():
    """What compat.py has and nothing needs is to go."""
    used = set()
    for tree in trees().values():
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module == "pyro_vae.compat":
                used |= {alias.name for alias in node.names}
            if isinstance(node, ast.Attribute) and getattr(node.value, "id", "") == "compat":
                used.add(node.attr)
    tree = ast.parse((PACKAGE / "compat.py").read_text())
    defined = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    assert (defined | set(compat.__all__)) <= used


def programs():
    def model(x):
        a = pyro.param("a", torch.tensor(2.0), constraint=dist.constraints.positive)
        with pyro.plate("data", 6, subsample_size=3, dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, a))
            pyro.deterministic("twice", 2 * z)
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", 6, subsample_size=3, dim=-1):
            pyro.sample("z", dist.Normal(0.5, 1.0))

    return model, guide


def test_what_sites_tell():
    model, _ = programs()
    trace = poutine.trace(poutine.uncondition(model)).get_trace(torch.zeros(3))
    marks = {n: compat.is_deterministic(trace.nodes[n]) for n in ("z", "twice", "x")}
    assert marks == {"z": False, "twice": True, "x": False}
    assert compat.was_observed(trace.nodes["x"])
    assert not compat.was_observed(trace.nodes["z"])
    (frame,) = trace.nodes["z"]["cond_indep_stack"]
    assert (frame.size, compat.full_size(frame)) == (3, 6)


def test_an_enumerated_site_has_its_dimension():
    def model():
        pyro.sample("k", dist.Categorical(torch.ones(4)), infer={"enumerate": "parallel"})

    plain = poutine.trace(model).get_trace()
    trace = poutine.trace(EnumMessenger(first_available_dim=-3)(model)).get_trace()
    assert compat.enumerate_dim(plain.nodes["k"]) is None
    assert trace.nodes["k"]["value"].shape[compat.enumerate_dim(trace.nodes["k"])] == 4


def test_the_parts_of_obs_mask_have_these_names():
    def model():
        with pyro.plate("data", 2):
            mask = torch.tensor([True, False])
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=torch.zeros(2), obs_mask=mask)

    nodes = poutine.trace(model).get_trace().nodes
    assert {f"x{compat.OBSERVED_PART}", f"x{compat.UNOBSERVED_PART}"} <= set(nodes)


def test_active_handlers_are_listed_innermost_first():
    inner, outer = poutine.trace(), poutine.block()
    before = len(list(compat.active_handlers()))
    with outer, inner:
        assert list(compat.active_handlers())[:2] == [inner, outer]
    assert len(list(compat.active_handlers())) == before


def test_traces_of_an_objective_give_its_own_loss():
    model, guide = programs()
    objective, x, shown = Trace_ELBO(num_particles=3), torch.zeros(3), []
    tapped = compat.tapped(objective, lambda m, g: shown.append((m, g)))
    pyro.set_rng_seed(0)
    loss = tapped.loss(model, guide, x)
    terms = [g.log_prob_sum() - m.log_prob_sum() for m, g in shown]
    assert loss == pytest.approx(float(sum(terms).detach() / 3))
    pyro.set_rng_seed(0)
    found = list(compat.particle_traces(objective, model, guide, (x,)))
    particles = [compat.particle_loss(objective, *traces)[0] for traces in found]
    assert loss == pytest.approx(sum(particles) / 3)
    assert len(compat.get_trace(objective, model, guide, (x,), {})) == 2
    assert len(shown) == 3  # the objective itself is as it was


def test_declared_parameters_are_unconstrained():
    model, _ = programs()
    model(torch.zeros(3))
    (parameter,) = compat.declared_parameters(pyro.get_param_store())
    assert parameter.item() == pytest.approx(math.log(2))
    assert parameter.is_leaf


class Part(PyroModule):
    def __init__(self):
        super().__init__()
        self.scale = PyroParam(torch.tensor(3.0), dist.constraints.positive)
        self.loc = nn.Parameter(torch.zeros(2))


class Whole(PyroModule):
    def __init__(self):
        super().__init__()
        self.part, self.weight = Part(), nn.Parameter(torch.ones(()))

    def forward(self):
        return self.part.scale, self.part.loc, self.weight


def test_names_of_a_pyro_module_are_those_of_the_store():
    outer = Whole()
    found = {compat.full_name(outer.part, "loc"), compat.full_name(outer, "weight")}
    declared = poutine.trace(outer).get_trace().nodes
    assert found == {"part.loc", "weight"}
    assert found <= set(declared)
    kept = {name: compat.is_unconstrained(name) for name in compat.parameters_of(outer.part)}
    assert kept == {"scale_unconstrained": True, "loc": False}


def test_parameters_and_buffers_are_replaced_in_place():
    layer = nn.BatchNorm1d(2)
    compat.parameters_of(layer)["weight"] = torch.full((2,), 3.0)
    compat.buffers_of(layer)["running_mean"] = torch.ones(2)
    found = layer.eval()(torch.full((1, 2), 2.0))
    torch.testing.assert_close(found, torch.full((1, 2), 3.0), atol=1e-4, rtol=0.0)


def test_a_recurrent_network_uses_the_parameters_that_it_holds():
    network, x = nn.GRU(2, 3), torch.ones(4, 2)
    before, held = network(x)[0], compat.parameters_of(network)
    own = dict(held)
    held |= {name: torch.zeros_like(value) for name, value in own.items()}
    with compat.flat_weights_renewed(network):
        assert torch.equal(network(x)[0], torch.zeros(4, 3))
    held |= own
    assert torch.equal(network(x)[0], before)


def test_what_distributions_and_tensors_tell():
    mask = torch.tensor([True, False])
    assert compat.mask_of(dist.Normal(torch.zeros(2), 1.0).mask(mask)) is mask
    assert compat.mask_of(dist.Normal(0.0, 1.0)) is True
    for checks in (True, False):
        assert compat.validates(dist.Normal(0.0, 1.0, validate_args=checks)) is checks
    tensor = torch.zeros(2)
    before = compat.version(tensor)
    tensor.add_(1)
    assert compat.version(tensor) > before


def test_leaves_of_the_autograd_graph():
    leaf = torch.ones(2, requires_grad=True)
    node = (3 * leaf).grad_fn
    found = [compat.leaf_of(following) for following, _ in node.next_functions]
    assert compat.leaf_of(node) is None
    assert any(tensor is leaf for tensor in found)


def test_hooks_of_an_optimizer_are_seen():
    optimizer = torch.optim.Adam([torch.ones(2, requires_grad=True)])
    assert not compat.has_step_hooks(optimizer)
    optimizer.register_step_post_hook(lambda *args: None)
    assert compat.has_step_hooks(optimizer)


def test_a_graph_lists_what_it_calls():
    graph = compat.make_graph(lambda x: [x.add(1).add_(2)], [torch.zeros(3)])
    calls = [node for node in graph.graph.nodes if node.op == "call_function"]
    assert all(isinstance(node.target, compat.OpOverload) for node in calls)
    assert [compat.schema(node.target).is_mutable for node in calls] == [False, True]
    assert all(isinstance(compat.value_in_graph(node), compat.FakeTensor) for node in calls)
    assert torch.equal(graph(torch.zeros(3))[0], torch.full((3,), 3.0))


def error_of(function, *args):
    with pytest.raises((ValueError, RuntimeError)) as caught:
        function(*args)
    return caught.value


@pytest.mark.parametrize(
    "function",
    [
        lambda x: [x if x.sum() > 0 else -x],
        lambda x: [x * float(x[0])],
    ],
)
def test_a_graph_that_depends_on_values_is_known_as_such(function):
    error = error_of(compat.make_graph, function, [torch.ones(3)])
    assert compat.depends_on_values(error)


def test_other_faults_of_a_graph_are_not():
    def function(x):
        return [x @ x.new_ones(5, 5)]

    assert not compat.depends_on_values(error_of(compat.make_graph, function, [torch.ones(3)]))


def test_a_site_that_does_not_fit_its_plate_is_known():
    def model():
        with pyro.plate("rows", 5, dim=-1):
            pyro.sample("x", dist.Normal(torch.zeros(5, 3), 1.0))

    found = compat.plate_mismatch(str(error_of(model)))
    assert found.groups() == ("rows", "x", "5", "3")
    assert compat.plate_mismatch("Shape mismatch") is None


@pytest.mark.parametrize(
    "function",
    [
        lambda: dist.Normal(0.0, torch.tensor(-1.0), validate_args=True),
        lambda: torch.normal(torch.zeros(2), -torch.ones(2)),
    ],
)
def test_numbers_that_a_distribution_cannot_have_are_known(function):
    assert compat.bad_parameter(error_of(function))


def test_other_errors_are_not_of_numbers():
    fn = dist.Exponential(torch.ones(2), validate_args=True)
    assert compat.bad_parameter(error_of(fn.log_prob, -torch.ones(2))) is None


def test_one_row_of_batch_normalization_is_known():
    assert compat.lacks_variance(error_of(nn.BatchNorm1d(3), torch.ones(1, 3)))
    assert not compat.lacks_variance(error_of(nn.BatchNorm1d(3), torch.ones(2, 4)))


@pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")
def test_a_graph_that_was_compiled_before_is_found_on_disk():
    """Inductor counts the graphs that it finds, and those that it cannot look for."""
    from torch._dynamo.utils import counters

    inputs = [torch.rand(3, 4), torch.randn(3, 4)]
    for _ in range(2):
        graph = compat.make_graph(lambda x, y: [torch.log1p(x) * y.tanh()], inputs)
        before = dict(counters["inductor"])
        graph = compat.with_formulas(graph, inputs, DECOMPOSITIONS)
        (found,) = compat.compile_graph(graph, inputs, {})(*inputs)
        torch.testing.assert_close(found, inputs[0].log1p() * inputs[1].tanh())
    more = {name: count - before.get(name, 0) for name, count in counters["inductor"].items()}
    assert more["fxgraph_cache_hit"] == 1
    assert not more.get("fxgraph_cache_bypass")


def test_a_process_group_has_its_store_and_its_timeout(tmp_path):
    limit = timedelta(seconds=1234)
    where = {"init_method": f"file://{tmp_path}/store", "world_size": 1, "rank": 0}
    distributed.init_process_group("gloo", timeout=limit, **where)
    try:
        assert compat.group_timeout() == 1234
        compat.group_store().set("key", "value")
        assert compat.group_store().get("key") == b"value"
    finally:
        distributed.destroy_process_group()
