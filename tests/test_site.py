"""The reference of the site has every public name. `make docs` checks all else, with each link."""

import re
from pathlib import Path

import pyro_vae as pv

DOCS = Path(__file__).parent.parent / "docs"


def test_each_folder_with_public_names_has_one_page_of_the_reference():
    text = "".join(path.read_text() for path in (DOCS / "api").glob("*.rst"))
    folders = {getattr(pv, name).__module__.split(".")[1] for name in pv.__all__}
    assert len(folders) > 8
    assert sorted(re.findall(r"(?m)^@names (\w+)$", text)) == sorted(folders)


def test_each_page_is_in_one_table_of_contents():
    """A page that is in none would be in no navigation."""
    listed: list[Path] = []
    for path in [*DOCS.rglob("*.md"), *DOCS.rglob("*.rst")]:
        block = r"(?:```\{toctree\}|\.\. toctree::)\n(.*?)(?:^```|\Z)"
        for entries in re.findall(block, path.read_text(), re.M | re.S):
            names = [line.split("<")[-1].strip(" >") for line in entries.splitlines()]
            listed += [path.parent / name for name in names if name and name[0] not in ":%"]
    pages = [p.with_suffix("") for kind in ("md", "rst", "ipynb") for p in DOCS.rglob(f"*.{kind}")]
    assert sorted(listed) == sorted(page for page in pages if page != DOCS / "index")
