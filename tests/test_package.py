"""The wheel: what it holds, one version, and that it works apart from its source."""

import subprocess
import sys
import tomllib
import zipfile
from email.parser import Parser
from pathlib import Path
from shutil import copytree, ignore_patterns

import pytest

import pyro_vae as pv

ROOT = Path(__file__).parent.parent
BUILD = "import sys; from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])"


def run(*words, folder):
    done = subprocess.run(
        [sys.executable, *words], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel of a copy of the source, so that building leaves nothing in the source."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    copytree(ROOT / "pyro_vae", source / "pyro_vae", ignore=ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        (source / name).write_bytes((ROOT / name).read_bytes())
    run("-c", BUILD, str(out), folder=source)
    (path,) = out.glob("*.whl")
    return path


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    package = {name for name in names if ".dist-info/" not in name}
    source = {str(p.relative_to(ROOT)) for p in (ROOT / "pyro_vae").rglob("*.py")}
    assert len(source) > 200
    assert package == source | {"pyro_vae/py.typed"}
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_the_wheel_says_the_version_of_the_package(wheel):
    archive = zipfile.ZipFile(wheel)
    (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    metadata = Parser().parsestr(archive.read(name).decode())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert metadata["Version"] == pv.__version__
    assert metadata["License-Expression"] == "MIT"
    assert set(metadata.get_all("Provides-Extra")) == set(project["optional-dependencies"])
    assert f"\nversion: {pv.__version__}\n" in (ROOT / "CITATION.cff").read_text()


def test_the_wheel_works_without_its_source(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path / "installed")
    start = f"import sys; sys.path.insert(0, {str(tmp_path / 'installed')!r}); import pyro_vae"
    program = f"{start}; print(pyro_vae.__file__); from pyro_vae.cli.main import main; main(['-h'])"
    out = run("-P", "-c", program, folder=tmp_path)
    assert out.startswith(str(tmp_path / "installed"))
    assert "selftest" in out
