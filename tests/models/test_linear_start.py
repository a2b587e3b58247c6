"""A VAE with linear maps starts at probabilistic PCA: bound, posterior, and what `train` makes."""

import numpy as np
import pytest
import torch
from cli_helpers import SHORT, command, read
from torch import nn

import pyro_vae as pv
from pyro_vae.diagnostics.baseline import ppca
from pyro_vae.models.linear_start import start_at_ppca
from pyro_vae.parts.standardized import Standardized
from pyro_vae.runs import files as run_files


def rows(n=120, d=6, rank=2):
    draw = torch.Generator().manual_seed(0)
    codes, weights = torch.randn(n, rank, generator=draw), torch.randn(rank, d, generator=draw)
    units = torch.logspace(-2, 3, d)
    return (codes @ weights + 0.3 * torch.randn(n, d, generator=draw)) * units + 5 * units


def started(x, latent_dim=3, **options):
    family = Standardized(pv.Gaussian(**options), x.shape[1:]).standardize(x)
    vae = pv.VAE.mlp(
        x.shape[1:], latent_dim, (8,), family, activation=nn.SiLU, linear=True
    ).double()
    return start_at_ppca(vae, x)


@pytest.mark.parametrize("latent_dim", [1, 3, 5, 9])
@pytest.mark.parametrize("options", [{}, {"learned": True}, {"learned": True, "scale": 0.2}])
def test_the_bound_is_log_p_of_probabilistic_pca(latent_dim, options):
    x = rows().double()
    found = pv.log_likelihood(started(x, latent_dim, **options), x[:40], num_samples=3)
    expected = ppca(x, x[:40], latent_dim)
    assert found.elbo == pytest.approx(expected, abs=1e-4)  # the posterior is exact
    assert found.value == pytest.approx(expected, abs=1e-4)


def test_a_column_that_is_a_function_of_another_keeps_the_scale_within_its_bounds():
    x = rows(rank=1).double()
    x[:, 1:] = x[:, :1] * torch.arange(1.0, 6.0)
    with torch.no_grad():
        scale = started(x, 2).decoder(torch.zeros(1, 2).double()).base_dist.scale
    assert bool((scale / x.std(0, correction=0) - 2e-3).abs().max() < 1e-9)


def trained(path, options=""):
    run = path.parent / "run"
    command(f"train {{path}} --out {{run}} --overwrite --no-report {options}", path=path, run=run)
    return run, read(run / "config.json")["train"]


def test_a_run_without_options_is_not_worse_than_probabilistic_pca(tmp_path):
    np.save(tmp_path / "x.npy", rows(150).numpy())
    run, given = trained(tmp_path / "x.npy", f"{SHORT} --batch-size 16")
    assert given["linear"] is True
    numbers = read(run / "metrics.json")
    assert numbers["log_likelihood"] > numbers["baseline"]["log_likelihood"] - 0.02
    assert numbers["active_units"]["z"] >= 2


@pytest.mark.parametrize(
    "options",
    [
        "--no-linear",
        "--likelihood student-t",
        "--likelihood gaussian --scale 0.5 --standardize",
        "--posterior iaf",
    ],
)
def test_other_pairs_have_no_linear_maps(tmp_path, options):
    np.save(tmp_path / "x.npy", rows(60).numpy())
    assert not trained(tmp_path / "x.npy", f"{SHORT} {options}")[1].get("linear")


def test_rows_with_holes_have_no_linear_maps(tmp_path, capsys):
    x = rows(60)
    x[3, 2] = torch.nan
    np.save(tmp_path / "x.npy", x.numpy())
    assert not trained(tmp_path / "x.npy", SHORT)[1].get("linear")
    with pytest.raises(SystemExit):
        trained(tmp_path / "x.npy", f"{SHORT} --linear")
    assert "--linear needs --model vae" in capsys.readouterr().err


def test_a_run_of_an_earlier_version_resumes_without_linear_maps(tmp_path):
    np.save(tmp_path / "x.npy", rows(60).numpy())
    run, given = trained(tmp_path / "x.npy", f"{SHORT} --no-linear")
    config = read(run / "config.json")
    del config["train"]["linear"]  # which version 0.1.0 did not know
    run_files.write_json(run / "config.json", config)
    words = "train {path} --out {run} --resume --no-report --epochs 3"
    command(words, path=tmp_path / "x.npy", run=run)
    assert not any("shortcut" in name for name in pv.load(run).state_dict())
    assert given["linear"] is False


def test_a_run_with_linear_maps_is_loaded_and_resumed(tmp_path):
    np.save(tmp_path / "x.npy", rows(60).numpy())
    run, _ = trained(tmp_path / "x.npy", SHORT)
    words = "train {path} --out {run} --resume --no-report --epochs 3"
    command(words, path=tmp_path / "x.npy", run=run)
    assert any("shortcut" in name for name in pv.load(run).state_dict())


def test_a_network_without_a_last_layer_has_no_linear_map():
    with pytest.raises(pv.UsageError, match="linear needs outputs, got None"):
        pv.MLP(3, (4,), None, linear=True)
