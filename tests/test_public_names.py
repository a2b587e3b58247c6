"""The public names: one list, and nothing heavy imported until a name is used."""

import subprocess
import sys

import pytest

import pyro_vae as pv


def test_every_public_name_is_what_its_module_holds():
    assert len(pv.__all__) > 80
    assert pv.__all__ == sorted(set(pv.__all__))
    for name in pv.__all__:
        assert getattr(pv, name).__name__ == name
    assert dir(pv) == pv.__all__


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'VEA'"):
        _ = pv.VEA


def test_importing_the_package_imports_no_torch():
    program = "import sys, pyro_vae; print('torch' in sys.modules, 'VAE' in dir(pyro_vae))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.split() == ["False", "True"]
