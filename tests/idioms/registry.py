"""All idioms, and the page docs/models/idioms.md: ``python tests/idioms/registry.py`` writes it."""

from pathlib import Path

import pairs_discrete
import pairs_global
import pairs_local
import pairs_reparam
import pairs_sequences
from idiom import TOOLS, Idiom

IDIOMS = [
    *pairs_local.IDIOMS,
    *pairs_discrete.IDIOMS,
    *pairs_sequences.IDIOMS,
    *pairs_global.IDIOMS,
    *pairs_reparam.IDIOMS,
]

PAGE = Path(__file__).parents[2] / "docs" / "models" / "idioms.md"

HEAD = """# Pyro idioms

This page says which ways of writing a model in Pyro the tools serve. Find the row that is closest
to your pair.

The tools are {tools}.

The table is generated from `tests/idioms/`. There, each row is a small pair that goes through all
tools. A tool gives the right number, or it refuses the pair in one line:

- After 50 steps, the parameters equal those of stock Pyro's `SVI` with the same noise, if `fit`
  serves the pair.
- log p(x) of `evaluate`, `log_likelihood`, `refine`, `gaps` and `anneal` agrees with a closed form,
  a sum or a quadrature.
- Draws of `encode`, `reconstruct` and `sample` agree with those of stock Pyro.
- `check` reports an error exactly if `fit` refuses the pair.

| Pyro idiom | works | works if | refused |
| --- | --- | --- | --- |
"""


def _named(tools: list[str]) -> str:
    return ", ".join(f"`{tool}`" if tool.isidentifier() else tool for tool in tools)


def _works(idiom: Idiom) -> str:
    served = [tool for tool in TOOLS if tool not in idiom.refuses]
    if not idiom.refuses:
        return "all tools"
    return "all other tools" if "fit" in served else _named(served) or "no tool"


def _refused(idiom: Idiom) -> str:
    by_reason: dict[str, list[str]] = {}
    for tool in TOOLS:
        if tool in idiom.refuses:
            by_reason.setdefault(idiom.refuses[tool].reason, []).append(tool)
    last = by_reason.pop(idiom.refuses["fit"].reason) if "fit" in idiom.refuses else []
    cells = [f"{_named(tools)}: {reason}" for reason, tools in by_reason.items()]
    if last:
        who = "all tools" if len(last) == len(TOOLS) else "all other tools"
        cells.append(f"{who}: {idiom.refuses['fit'].reason}")
    return "; ".join(cells)


def page() -> str:
    """Return the text of docs/models/idioms.md."""
    rows = [
        f"| {idiom.name} | {_works(idiom)} | {idiom.needs} | {_refused(idiom)} |"
        for idiom in IDIOMS
    ]
    return HEAD.format(tools=_named(list(TOOLS))) + "\n".join(rows) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
