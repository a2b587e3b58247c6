"""Files stay short enough to be read in one go."""

from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

MOST = {"pyro_vae": 400, "tests": 600}
"""Lines of a file, by folder."""


@pytest.mark.parametrize("folder", MOST)
def test_no_file_is_too_long(folder):
    lines = {path: len(path.read_text().splitlines()) for path in (ROOT / folder).rglob("*.py")}
    assert lines
    long = {str(path.relative_to(ROOT)): n for path, n in lines.items() if n > MOST[folder]}
    assert not long
