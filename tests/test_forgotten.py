"""A likelihood or a diagnostic that was forgotten somewhere fails here."""

import re
from pathlib import Path
from typing import get_type_hints

import pytest
import torch
from pairs import EVERY, LIKELIHOODS, make, rows

import pyro_vae as pv
from pyro_vae.cli.make_parts import make_likelihood
from pyro_vae.cli.options import Model
from pyro_vae.diagnostics import attribution, guide_studies, model_studies, signs
from pyro_vae.diagnostics.studies import STUDIES
from pyro_vae.diagnostics.study import Bench
from pyro_vae.parts import likelihoods

DOCS = Path(__file__).parent.parent / "docs"

FAMILIES = [
    kind
    for name, kind in vars(likelihoods).items()
    if isinstance(kind, type) and kind.__module__ == likelihoods.__name__ and name[0] != "_"
]

NAMES = get_type_hints(Model)["likelihood"].__args__[0].__args__  # the other one is None
"""What ``--likelihood`` takes."""


@pytest.fixture(scope="module")
def in_pairs():
    """The families of the pairs that the contract tests take, Bernoulli's is the usual one."""
    pairs = [make(name) for name in ("bernoulli", *LIKELIHOODS)]
    return {type(module) for pair in pairs for module in pair.modules()}


def test_every_likelihood_is_found():
    assert {pv.Bernoulli, pv.Gaussian, pv.NegativeBinomial} <= set(FAMILIES)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda kind: kind.__name__)
def test_a_likelihood_is_everywhere(family, in_pairs):
    """In the public names, the command line, the lists of the tests, and docs/models/vae.md."""
    assert family.__name__ in pv.__all__
    assert family in {type(make_likelihood(Model(likelihood=name))) for name in NAMES}
    assert family in {type(build()) for build in EVERY.values()}
    assert family in in_pairs
    assert re.search(rf"^\| `{family.__name__}\b", (DOCS / "models/vae.md").read_text(), re.M)


def studies_of(module):
    return [f for name, f in vars(module).items() if name.endswith("_study")]


@pytest.mark.parametrize("module", [guide_studies, model_studies])
def test_every_study_is_run(module):
    assert studies_of(module)
    assert set(studies_of(module)) <= set(STUDIES)


@pytest.fixture(scope="module")
def names():
    """The name of each study."""
    pair, batch = make("semi-supervised"), rows("semi-supervised", 200)  # it enumerates a class
    bench = Bench(pair, batch, torch.arange(200), 0, "eager", 1e-3, 1e-6, 1e-6, batch, batch)
    shared = bench._replace(shared=("w",))
    return [(study(bench) or study(shared)).name for study in STUDIES]


def rows_of(name):
    """The rows of a study in the table of tools of docs/diagnostics/index.md."""
    rows = (DOCS / "diagnostics/index.md").read_text().splitlines()
    return [row for row in rows if row.startswith(f"| `{name}` |")]


def test_every_study_is_documented(names):
    assert {name: len(rows_of(name)) for name in names} == dict.fromkeys(names, 1)


def test_every_part_and_every_tool_of_the_verdict_is_in_its_page():
    page = (DOCS / "diagnostics/verdict.md").read_text()
    assert all(f"| `{part}` |" in page for part in attribution.PARTS)
    assert all(f"`{tool}`" in page for tool in [*signs.GUIDE_TOOLS, "gaps", "annealing"])
    assert all(f"`{tool}`" in page for tool in ("model_check", "predictive_check", "kl_parts"))


def test_the_tool_of_every_study_is_public_and_tested(names):
    tests = "".join(path.read_text() for path in Path(__file__).parent.rglob("test_*.py"))
    for name in names:
        tool = re.search(r"`(\w+)`", rows_of(name)[0].split("|")[2])[1]
        assert tool in pv.__all__
        assert f"pv.{tool}(" in tests
