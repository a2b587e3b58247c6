"""The numbers of the page are those of encode, decode, refine and log_likelihood."""

import global_pairs
import pytest
import torch
from pairs import make, rows

import pyro_vae as pv
from pyro_vae.errors import UsageError
from pyro_vae.explore.view import HeldOut, view


def of(pair, x, *context, **more):
    return view(pair, HeldOut(x, context, **more), num_samples=30)


@pytest.fixture(scope="module")
def flat():
    torch.manual_seed(0)
    return pv.VAE.mlp((5,), latent_dim=3, hidden=(8,), likelihood=pv.Gaussian), torch.randn(12, 5)


@pytest.fixture(scope="module")
def shown(flat):
    return of(*flat)


def test_codes_and_scores(flat, shown):
    pair, x = flat
    (level,) = shown.levels
    assert torch.equal(level.codes, pv.encode(pair, x)["z"].double())
    assert torch.equal(level.scales, pv.encode(pair, x, what="scale")["z"].double())
    assert level.kl.tolist() == pv.evaluate(pair, x, num_samples=1).kl_by_unit["z"]
    expected = pv.log_likelihood(pair, x, num_samples=30)
    assert torch.equal(shown.likelihood.per_datum, expected.per_datum)
    assert torch.equal(shown.likelihood.pareto_k, expected.pareto_k)
    assert torch.equal(shown.reconstructions, pv.reconstruct(pair, x))


def test_a_moved_unit_is_decoded(flat, shown):
    pair, x = flat
    code = pv.encode(pair, x)["z"][4:5]
    assert torch.allclose(shown.moved(4, "z", {}), pv.decode(pair, {"z": code})[0])
    code[0, 1], code[0, 2] = 2.5, -1.0
    found = shown.moved(4, "z", {1: 2.5, 2: -1.0})
    assert torch.allclose(found, pv.decode(pair, {"z": code})[0])


def test_a_value_outside_the_support_is_refused():
    pair = pv.MixtureVAE.mlp((4,), latent_dim=2, components=3)
    shown = of(pair, torch.ones(6, 4))
    (discrete,) = [level.site for level in shown.levels if not level.movable]
    with pytest.raises(UsageError, match=f"within the support of latent '{discrete}'"):
        shown.moved(0, discrete, {0: 7})


def test_a_refinement_is_that_of_refine(flat, shown):
    pair, x = flat
    found = shown.refined(2, num_samples=40, steps=30)
    expected = pv.refine(pair, x[2:3], steps=30, num_samples=40, engine="eager", progress=False)
    assert found.before.elbo == expected.before.elbo
    assert found.after.elbo == expected.after.elbo > found.before.elbo
    assert torch.equal(found.means[0]["z"], pv.encode(pair, x[2:3])["z"])
    after = pv.encode(expected.pair, *expected.batch)["z"]
    assert torch.equal(found.means[1]["z"], after)
    assert not torch.equal(after, found.means[0]["z"])
    scale = pv.encode(expected.pair, *expected.batch, what="scale")["z"]
    assert torch.equal(found.scales[1]["z"], scale)
    assert torch.allclose(found.reconstructions[1], pv.decode(pair, {"z": after})[0], atol=1e-6)


def test_images_that_are_flattened_keep_their_shape():
    torch.manual_seed(0)
    pair = pv.VAE.mlp((1, 4, 4), latent_dim=2, hidden=(8,), likelihood=pv.DiscretizedLogistic)
    x = torch.randint(0, 256, (6, 1, 4, 4), dtype=torch.uint8)
    shown = of(pair, x)
    assert shown.reconstructions.shape == (6, 1, 4, 4)
    code = pv.encode(pair, x)["z"][1:2] + 1
    found = shown.moved(1, "z", dict(enumerate(code[0].tolist())))
    assert torch.allclose(found, pv.decode(pair, {"z": code})[0].reshape(1, 4, 4), atol=1e-6)
    assert shown.refined(0, num_samples=21, steps=2).reconstructions[0].shape == (1, 4, 4)


def test_the_refinement_of_binarized_data_keeps_the_binary_draw():
    torch.manual_seed(0)
    pair = pv.VAE.mlp((6,), latent_dim=2, hidden=(8,))
    x = torch.rand(4, 6)
    found = of(pair, x).refined(1, num_samples=21, steps=3)
    result = pv.refine(pair, x[1:2], num_samples=21, steps=3, engine="eager", progress=False)
    assert bool(((result.batch[0] == 0) | (result.batch[0] == 1)).all())
    assert torch.equal(found.means[0]["z"], pv.encode(pair, result.batch[0])["z"])


def test_the_levels_of_a_hierarchical_model():
    torch.manual_seed(0)
    pair = pv.HierarchicalVAE.mlp((5,), latent_dim=(3, 2), hidden=(8,), likelihood=pv.Gaussian)
    x = torch.randn(7, 5)
    shown, codes = of(pair, x), pv.encode(pair, x)
    assert {level.site: level.codes.shape for level in shown.levels} == {
        name: code.shape for name, code in codes.items()
    }
    top = min(codes, key=lambda name: codes[name].shape[1])
    moved = {name: code[3:4].clone() for name, code in codes.items()}
    moved[top][0, 0] = 1.5
    assert torch.allclose(shown.moved(3, top, {0: 1.5}), pv.decode(pair, moved)[0], atol=1e-6)


def test_the_levels_below_can_follow_the_model():
    torch.manual_seed(0)
    pair = pv.HierarchicalVAE.mlp((5,), latent_dim=(3, 2), hidden=(8,), likelihood=pv.Gaussian)
    shown = of(pair, torch.randn(4, 5))
    top = min(shown.levels, key=lambda level: level.codes.shape[1]).site
    held, first = shown.moved(0, top, {0: 1.5}), shown.moved(0, top, {0: 1.5}, hold=False)
    assert torch.equal(first, shown.moved(0, top, {0: 1.5}, hold=False))
    assert not torch.equal(first, held)
    assert not torch.equal(first, shown.moved(0, top, {0: 1.5}, hold=False, seed=1))


def test_members_of_groups_are_points():
    torch.manual_seed(0)
    pair = pv.MultilevelVAE.mlp((3,), latent_dim=2, group_dim=1, members=4, hidden=(8,))
    x, sizes = torch.randn(5, 4, 3), torch.tensor([4, 1, 2, 3, 4])
    shown = of(pair, x, sizes, sizes=sizes)
    by_site, codes = {level.site: level for level in shown.levels}, pv.encode(pair, x, sizes)
    assert by_site["u"].codes.shape == (5, 1)
    z = by_site["z"]
    assert z.codes.shape == (int(sizes.sum()), 2)
    for point in (0, 6, 13):
        row, member = int(z.rows[point]), int(z.members[point])
        assert z.codes[point].tolist() == codes["z"][row, member].tolist()
    row, member = int(z.rows[6]), int(z.members[6])
    found = shown.moved(row, "z", {z.first_unit(6) + 1: 3.0})
    still = shown.moved(row, "z", {})
    changed = (found - still).abs().sum(-1) > 0
    assert changed.nonzero().flatten().tolist() == [member]


ANY = [
    "hierarchical",
    "conditional-prior",
    "text",
    "deep-markov",
    "multilevel",
    "semi-supervised",
    "mixture",
    "params",
    "bags",
    "weights",
]


@pytest.mark.sample(5)
@pytest.mark.parametrize("name", ANY)
def test_the_code_of_a_datum_of_any_pair_decodes_to_its_reconstruction(name):
    pair, batch = make(name), rows(name, 6)
    shown, codes = of(pair, *batch), pv.encode(pair, *batch)
    assert len(shown.means) == len(shown.levels) > 0
    for level in shown.levels:
        assert torch.equal(level.codes, codes[level.site].reshape(6, -1).double())
        made = shown.moved(4, level.site, {})
        assert torch.allclose(made.double(), shown.reconstructions[4].double(), atol=1e-6)


def test_global_and_group_latents_are_those_of_all_data():
    x, g = global_pairs.data()
    pair = global_pairs.Amortized()
    shown, codes = of(pair, x, g), pv.encode(pair, x, g)
    assert list(shown.shared) == ["w", "u"]
    assert torch.equal(shown.shared["u"][0], codes["u"])
    share = 1 / (1 + global_pairs.NOISE**2)
    expected = share * x[5, 0] + (1 - share) * codes["u"][g[5]]
    assert torch.allclose(shown.moved(5, "z", {}), expected)
    assert shown.moved(5, "z", {0: 4.0}).tolist() == [4.0]
    with pytest.raises(UsageError, match="cannot be refined by itself"):
        shown.refined(5)


def test_no_rows():
    with pytest.raises(UsageError, match="no row to show"):
        of(pv.VAE.mlp((4,)), torch.ones(0, 4))
