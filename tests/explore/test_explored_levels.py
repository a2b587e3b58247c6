"""The planes of points: axes by KL, principal components, members of groups."""

import pytest
import torch
from sklearn.decomposition import PCA

from pyro_vae.explore.levels import MOST_POINTS, levels, thinned


def one(mean, kl=None, **more):
    given = {"scales": {}, "kl": {} if kl is None else {"z": kl}, "sizes": None, "members": None}
    (level,) = levels({"z": mean}, **(given | more))
    return level


def test_the_units_with_the_largest_kl_come_first():
    level = one(torch.randn(6, 3), [0.1, 2.0, 0.5])
    assert level.order == [1, 2, 0]
    assert list(level.axes) == ["1", "2", "0", "component 1", "component 2"]
    assert level.axes["1"] == "z[1], KL 2"


def test_without_a_kl_the_order_is_that_of_the_variance():
    level = one(torch.tensor([[0.0, 0.0], [1.0, 4.0]]))
    assert level.order == [1, 0]
    assert level.axes == {"1": "z[1], variance 4", "0": "z[0], variance 0.25"}


def test_components_are_those_of_scikit_learn():
    codes = torch.randn(40, 4, generator=torch.Generator().manual_seed(0)).double()
    codes = codes * torch.tensor([3.0, 1.0, 2.0, 0.5]) + 7
    level = one(codes)
    expected = torch.from_numpy(PCA(2).fit_transform(codes.numpy()))
    for i, axis in enumerate(("component 1", "component 2")):
        found = level.coordinates(axis)
        assert torch.allclose(found.abs(), expected[:, i].abs(), atol=1e-9)
        assert torch.allclose(level.projected(axis, codes[3:5]), found[3:5])


def test_each_member_that_counts_is_a_point():
    mean = torch.arange(24.0).reshape(2, 4, 3)
    kl = [1.0, 0.0, 0.0, 0.0, 5.0, 0.0] + [0.0] * 6
    level = one(mean, kl, sizes=torch.tensor([1, -1]), members=4)
    assert level.rows.tolist() == [0, 1, 1, 1, 1]
    assert level.members.tolist() == [0, 0, 1, 2, 3]
    assert level.codes[2].tolist() == mean[1, 1].tolist()
    assert level.first_unit(2) == 3
    assert level.kl.tolist() == [1.0, 5.0, 0.0]


def test_discrete_latents_come_last_and_do_not_move():
    means = {"y": torch.tensor([0, 2, 1]), "z": torch.randn(3, 2)}
    found = levels(means, {}, {}, None, None)
    assert [(level.site, level.movable) for level in found] == [("z", True), ("y", False)]
    assert found[1].codes.tolist() == [[0.0], [2.0], [1.0]]


@pytest.mark.parametrize("n", [1, MOST_POINTS, MOST_POINTS + 1, 10_000])
def test_points_are_thinned_in_order(n):
    rows = thinned(n, MOST_POINTS)
    assert len(rows) == min(n, MOST_POINTS)
    assert rows.tolist() == sorted(set(rows.tolist()))
    assert 0 <= int(rows[0]) <= int(rows[-1]) < n
