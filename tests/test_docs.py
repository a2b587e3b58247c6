"""The Python blocks of README.md, AGENTS.md and docs/ run, a page after another as a reader would.

They run as they are printed, but for their size: see `small_programs`. A block that
starts with the name of a file is that file.
```` ```python no-test ```` marks a block that does not run, and a comment in the page says why.
"""

import re
from pathlib import Path

import pytest
import torch
from mktestdocs import check_md_file, grab_code_blocks
from small_programs import shrink

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "AGENTS.md", *sorted((ROOT / "docs").rglob("*.md"))]


def named(page):
    return str(page.relative_to(ROOT).with_suffix("")).removeprefix("docs/")


def blocks(page):
    return grab_code_blocks(page.read_text(), lang="python")


SLOW = (
    "diagnostics/annealing",
    "diagnostics/local-checks",
    "diagnostics/nuts",
    "how-to/other-tools",
    "models/nested",
    "models/sequence",
)
CASES = [
    pytest.param(page, marks=[pytest.mark.thorough] if named(page) in SLOW else [])
    for page in PAGES
    if blocks(page)
]


@pytest.fixture
def _small(monkeypatch, tmp_path):
    torch.manual_seed(0)  # pages do not seed the first parameters
    shrink(monkeypatch)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.parametrize("page", CASES, ids=named)
@pytest.mark.usefixtures("_small")
@pytest.mark.filterwarnings("ignore:.*:UserWarning", "ignore:.*:DeprecationWarning")
def test_the_blocks_of_a_page_run(page):
    for block in blocks(page):
        if name := re.match(r"# (\w+\.py)\n", block):
            Path(name[1]).write_text(block)
    check_md_file(page, memory=True)


def test_few_blocks_are_left_out():
    """Each block has a language that is known, so that none is missed by its spelling."""
    first = re.compile(r"^ *```(\w+)(.*)$", re.M)
    starts = {match.groups() for page in PAGES for match in first.finditer(page.read_text())}
    assert {words for language, words in starts if language == "python"} <= {"", " no-test"}
    assert {language for language, _ in starts} <= {"python", "bash", "sh", "text", "console"}
