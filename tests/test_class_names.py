"""Each class name of the package means one class."""

import ast
from collections import defaultdict
from pathlib import Path

import pyro_vae

PACKAGE = Path(pyro_vae.__file__).parent


def test_no_two_classes_have_one_name():
    places = defaultdict(list)
    for path in PACKAGE.rglob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef):
                places[node.name.lstrip("_")].append(str(path.relative_to(PACKAGE)))
    assert len(places) > 100
    assert {name: found for name, found in places.items() if len(found) > 1} == {}
