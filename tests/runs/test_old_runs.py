"""Run folders of 0.1.0 can be loaded, resumed and saved again with present names."""

import csv
import json
import shutil
from pathlib import Path

import pytest
import torch

import pyro_vae as pv

OLD = Path(__file__).parent / "run_0.1.0"
EXPECTED = json.loads((OLD / "expected.json").read_text())
X = torch.tensor(EXPECTED["x"])


@pytest.fixture
def old(tmp_path):
    """A copy of a run folder of 0.1.0."""
    return shutil.copytree(OLD, tmp_path / "run")


def classes(recipe):
    """Every class and type that a recipe names."""
    if isinstance(recipe, list):
        return {name for part in recipe for name in classes(part)}
    if not isinstance(recipe, dict):
        return set()
    own = {recipe[key] for key in ("class", "type") if key in recipe}
    return own | {name for part in recipe.values() for name in classes(part)}


def test_a_folder_of_0_1_0_gives_the_same_codes_and_log_likelihood(old):
    pair = pv.load(old)
    codes = pv.encode(pair, X[32:])["z"]
    torch.testing.assert_close(codes, torch.tensor(EXPECTED["codes"]))
    found = pv.log_likelihood(
        pair, X[32:], num_samples=EXPECTED["num_samples"], seed=0, engine="eager"
    )
    expected = torch.tensor(EXPECTED["log_likelihood"], dtype=torch.float64)
    torch.testing.assert_close(found.per_datum, expected, rtol=1e-5, atol=1e-5)


def test_a_run_of_0_1_0_resumes_from_its_checkpoint(old):
    history = pv.fit(
        pv.load(old),
        X[:32],
        validation=X[32:],
        epochs=4,
        batch_size=16,
        engine="eager",
        progress=False,
        out=old,
        resume=True,
    )
    assert len(history) == 4
    kept, now = columns(OLD), columns(old)
    assert {name: now[name][:3] for name in kept} == kept
    assert now["gradient_norm_max"][:3] == ["nan"] * 3  # 0.1.0 did not record it
    assert float(now["gradient_norm_max"][3]) >= float(now["gradient_norm"][3])


def columns(run):
    """The columns of history.csv, in words."""
    with open(run / "history.csv", newline="") as file:
        names, *rows = csv.reader(file)
    return dict(zip(names, map(list, zip(*rows, strict=True)), strict=True))


def test_a_folder_of_0_1_0_that_is_saved_again_has_present_names(old, tmp_path):
    new = pv.save(pv.load(old), tmp_path / "new")
    config = json.loads((new / "config.json").read_text())
    found = classes(config["pair"])
    assert not any("pyro_vae." in name for name in found)
    assert {name.rpartition(":")[2] for name in found} == {
        *("VAE", "Factor", "MLP", "DiagonalNormal", "Gaussian", "GaussianMixture", "ReLU")
    }
    for name, value in pv.load(new).state_dict().items():
        assert torch.equal(value, pv.load(old).state_dict()[name])
