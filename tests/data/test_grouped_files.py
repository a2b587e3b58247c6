"""Files of rows with group ids become data of whole groups."""

import numpy as np
import pytest
import torch

import pyro_vae as pv
from pyro_vae.errors import UsageError


def grouped(path, **arrays):
    np.savez(path, **arrays)
    return pv.load_data(path, group="patient")


def some(n=60, groups=20, seed=0):
    rng = np.random.default_rng(seed)
    ids = np.concatenate([np.arange(groups), rng.integers(0, groups, n - groups)])
    return np.arange(2.0 * n).reshape(n, 2), np.array([f"p{i}" for i in rng.permutation(ids)])


def parts_of(data):
    return data.train, data.validation, data.test


def test_a_file_is_split_by_group(tmp_path):
    x, ids = some()
    y = np.array([int(one[1:]) % 3 for one in ids])
    data = grouped(tmp_path / "visits.npz", x=x, patient=ids, y=y, context=-x[:, :1])
    assert [len(part.x) for part in parts_of(data)] == [14, 2, 4]
    seen = []
    for part in parts_of(data):
        assert part.context.shape == (*part.x.shape[:2], 1)
        for g, n in enumerate(part.lengths.tolist()):
            rows = part.members[g, :n].numpy()
            (one,) = set(ids[rows])
            assert n == (ids == one).sum()
            assert np.array_equal(part.x[g, :n], x[rows])
            assert np.array_equal(part.context[g, :n], -x[rows, :1])
            assert part.labels[g] == int(one[1:]) % 3
            assert not part.x[g, n:].any()
            assert bool((part.members[g, n:] == -1).all())
            seen.append(one)
    assert sorted(seen) == sorted(set(ids))


def test_labels_that_differ_within_a_group_are_not_labels_of_groups(tmp_path):
    x, ids = some()
    data = grouped(tmp_path / "visits.npz", x=x, patient=ids, y=np.arange(60))
    assert data.test.labels is None


def test_parts_that_the_file_gives(tmp_path):
    (x, ids), (more, _) = some(), some(9, 3)
    data = grouped(
        tmp_path / "visits.npz",
        x_train=x,
        patient_train=ids,
        x_test=more,
        patient_test=np.array(["q"] * 7 + ["r"] * 2),
    )
    assert data.test.lengths.tolist() == [7, 2]
    assert len({part.x.shape[1] for part in parts_of(data)}) == 1
    assert torch.equal(data.test.x[0, :7], torch.from_numpy(more[:7]))
    assert len(data.train.x) + len(data.validation.x) == 20


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"patients": 1}, "has no array 'patient'; did you mean 'patients'"),
        ({"patient": "short"}, "x has 60 rows but there are 5 group ids"),
        ({"patient": "few"}, "has 5 groups, but a split into three parts needs at least 10"),
        ({"patient": "ids", "lengths": 1}, "members of groups cannot have them"),
    ],
)
def test_wrong_files_in_one_line(arrays, message, tmp_path):
    x, ids = some()
    made = {"ids": ids, "short": ids[:5], "few": np.arange(60) % 5}
    arrays = {k: made.get(v, np.ones(60, int)) for k, v in arrays.items()}
    with pytest.raises(UsageError, match=message):
        grouped(tmp_path / "visits.npz", x=x if "lengths" not in arrays else x[:, None], **arrays)


def test_a_group_in_two_parts_is_refused(tmp_path):
    x, ids = some()
    with pytest.raises(UsageError, match=r"group 'p\d+' is in train and in test"):
        grouped(
            tmp_path / "v.npz", x_train=x, patient_train=ids, x_test=x[:9], patient_test=ids[:9]
        )


@pytest.mark.parametrize("name", ["digits", "mine.npy", "lines.txt"])
def test_groups_need_an_npz_file(name):
    with pytest.raises(UsageError, match=r"group needs a table or a \.npz file"):
        pv.load_data(name, group="patient")
