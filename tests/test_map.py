"""The maps of the folders in CONTRIBUTING.md and docs/design/index.md are those of the package."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "pyro_vae"


def listed():
    """The modules that docs/design/index.md lists, by folder."""
    rows = re.findall(
        r"^\| `(\w+)/` \| [^|]*: ([\w, ]+) \|$", (ROOT / "docs/design/index.md").read_text(), re.M
    )
    return {folder: modules.split(", ") for folder, modules in rows}


def test_the_design_lists_every_module():
    folders = [path.parent for path in PACKAGE.glob("*/__init__.py")]
    found = {
        folder.name: sorted(p.stem for p in folder.glob("*.py") if p.stem != "__init__")
        for folder in folders
    }
    assert len(found) > 8
    assert listed() == found


def test_every_path_of_contributing_exists():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    table = re.search(r"## Where does it live\?\n(.*?)\n## ", text, re.S)[1]
    places = re.findall(r"`([a-z_]+/(?:[a-z_]+\.py)?|[a-z_]+\.py)`", table)
    assert len(places) > 40
    missing = [place for place in places if not (PACKAGE / place).exists()]
    assert missing == ["pyro_vae/", "tests/"]  # places of the repository
    assert set(re.findall(r"`([a-z_]+)/", table)) >= set(listed())


def test_every_file_that_a_list_of_steps_names_exists():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    steps = re.findall(r"`((?:pyro_vae|tests|docs)/[\w/.]+\.(?:py|md))`", text)
    assert len(steps) > 15
    assert [step for step in steps if not (ROOT / step).exists()] == []
