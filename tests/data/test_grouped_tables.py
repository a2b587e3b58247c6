"""Tables whose rows are put into whole groups."""

import csv

import numpy as np
import pytest
import torch
from cli_helpers import command

import pyro_vae as pv
from pyro_vae.data.datasets import load_data


@pytest.fixture(scope="module")
def visits(tmp_path_factory):
    """Patients with one to four visits, in an order that mixes the patients."""
    generator = np.random.default_rng(0)
    rows = [
        [f"p{patient}", round(100 + generator.normal(), 3), generator.choice(["no", "yes"])]
        for patient in range(30)
        for _ in range(generator.integers(1, 5))
    ]
    generator.shuffle(rows)
    rows[3][1] = ""
    path = tmp_path_factory.mktemp("visits") / "visits.csv"
    with open(path, "w") as file:
        csv.writer(file).writerows([["patient", "weight", "smokes"], *rows])
    return path, rows


def test_members_are_the_rows_of_their_patient_and_no_patient_is_torn_apart(visits):
    path, rows = visits
    data = load_data(path, group="patient")
    seen = []
    for part in (data.train, data.validation, data.test):
        for x, size, members in zip(part.x, part.lengths, part.members, strict=True):
            own = members[members >= 0].tolist()
            assert len(own) == int(size)
            assert {rows[row][0] for row in own} == {rows[own[0]][0]}
            for values, row in zip(x, own, strict=False):
                expected = [np.nan if rows[row][1] == "" else float(rows[row][1])]
                expected.append(float(rows[row][2] == "yes"))
                assert np.array_equal(values.numpy(), expected, equal_nan=True)
            seen += own
    assert sorted(seen) == list(range(len(rows)))
    assert data.schema.names == ("weight", "smokes")


def test_a_table_in_groups_trains_and_its_results_name_the_rows(visits, tmp_path):
    path, rows = visits
    run = tmp_path / "run"
    options = "--latent-dim 2 1 --hidden 8 --epochs 1 --num-eval-samples 5 --no-report"
    line = "train {data} --model multilevel --group patient --out {run} --engine eager "
    command(line + options, data=path, run=run)
    command("encode {run} --part train", run=run)
    with np.load(run / "codes.npz") as codes:
        assert codes["u_mean"].shape == (len(codes["members"]), 1)
        patients = [{rows[row][0] for row in own if row >= 0} for own in codes["members"]]
    assert all(len(own) == 1 for own in patients)
    command("score {run} --num-samples 30", run=run)
    with np.load(run / "scores.npz") as scores:
        names = {name.partition(",") for name in scores["strangest_1"]}
    assert {column for _, _, column in names} <= {"weight", "smokes"}
    assert all(member.isdigit() for member, _, _ in names)
    command("sample {run} --num 3", run=run)
    drawn = list(csv.DictReader((run / "samples.csv").read_text().splitlines()))
    assert list(drawn[0]) == ["patient", "weight", "smokes"]
    assert {row["patient"] for row in drawn} == {"0", "1", "2"}
    assert {row["smokes"] for row in drawn} <= {"no", "yes"}
    assert all(80 < float(row["weight"]) < 120 for row in drawn)


def test_padding_is_not_a_missing_entry():
    groups = pv.by_group([[1.0], [np.nan], [3.0]], [0, 0, 1])
    torch.manual_seed(0)
    pair = pv.MultilevelVAE.mlp(
        (1,), latent_dim=1, group_dim=1, hidden=(4,), likelihood=pv.Missing(pv.Gaussian)
    )
    found = pv.impute(pair, *groups.batch, draws=2, num_samples=30)
    assert found.missing[..., 0].tolist() == [[False, True], [False, False]]


def test_a_group_needs_a_table_or_ids():
    with pytest.raises(pv.UsageError, match=r"group needs a table or a \.npz file"):
        load_data("digits", group="patient")
