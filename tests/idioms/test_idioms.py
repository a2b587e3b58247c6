"""Every idiom through every tool: the right number, or a refusal of one line."""

from functools import cache
from pathlib import Path

import pytest
from idiom import TOOLS, Batch, Idiom
from registry import IDIOMS, PAGE, page
from tools import RUN, fitted
from torch import nn

from pyro_vae.errors import UsageError

SLOW = ["evaluate", "refine", "gaps", "anneal", "nuts", "diagnose"]
"""Tools that `make test` runs for every sixth idiom, each tool for others of them."""


def _case(number: int, idiom: Idiom, tool: str):
    served = tool in SLOW and tool not in idiom.refuses
    left_out = served and (number + SLOW.index(tool)) % len(SLOW) != 0
    marks = [pytest.mark.thorough] if left_out else []
    return pytest.param(idiom, tool, id=f"{idiom.name}-{tool}", marks=marks)


CASES = [_case(number, idiom, tool) for number, idiom in enumerate(IDIOMS) for tool in TOOLS]

CORE = {"fit", "evaluate", "log_likelihood", "encode", "save and load"}
"""Tools that serve every pair that `check` finds sound."""


@cache
def _fitted(name: str) -> tuple[nn.Module, Batch]:
    (idiom,) = (one for one in IDIOMS if one.name == name)
    return fitted(idiom)


def _pair(idiom: Idiom, tool: str) -> tuple[nn.Module, Batch]:
    """Return a fitted pair, or a new one if the tool needs it or fit refuses the idiom."""
    new = tool == "check" or "fit" in idiom.refuses
    return idiom.seeded() if new else _fitted(idiom.name)


@pytest.mark.parametrize(("idiom", "tool"), CASES)
def test_a_tool_is_right_or_refuses_in_one_line(idiom: Idiom, tool: str):
    pair, batch = _pair(idiom, tool)
    if tool not in idiom.refuses:
        RUN[tool](idiom, pair, batch)
        return
    with pytest.raises(UsageError) as said:
        RUN[tool](idiom, pair, batch)
    assert idiom.refuses[tool].says in str(said.value)
    assert "\n" not in str(said.value)


@pytest.mark.parametrize("idiom", IDIOMS, ids=lambda one: one.name)
def test_the_verdict_of_check_is_what_the_tools_do(idiom: Idiom):
    refused = {tool: idiom.refuses[tool] for tool in CORE if tool in idiom.refuses}
    verdict = idiom.refuses.get("check")
    assert refused == ({} if verdict is None else dict.fromkeys(CORE, verdict))


def test_the_page_is_that_of_the_registry():
    assert len({idiom.name for idiom in IDIOMS}) == len(IDIOMS)
    assert Path(PAGE).read_text() == page(), "run python tests/idioms/registry.py"
