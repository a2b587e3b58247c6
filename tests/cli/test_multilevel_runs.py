"""Groups on the command line: train, evaluate, sample and encode a multilevel VAE."""

import csv

import numpy as np
import pytest
import torch
from cli_helpers import SHORT, command, read

import pyro_vae as pv
from pyro_vae.cli.main import main

OPTIONS = f"{SHORT} --likelihood gaussian --hidden 4 --latent-dim 2 1 --no-report"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("groups")
    rng = np.random.default_rng(0)
    ids = np.concatenate([np.arange(20), rng.integers(0, 20, 40)])
    np.savez(
        folder / "visits.npz",
        x=rng.normal(size=(60, 3)).astype(np.float32),
        patient=ids,
        context=rng.normal(size=60).astype(np.float32),
    )
    line = f"train {{data}} --model multilevel --group patient --condition context {OPTIONS}"
    command(f"{line} --out {{run}}", data=folder / "visits.npz", run=folder / "run")
    return folder / "run"


def test_a_run_has_the_dimensions_of_both_levels(run):
    pair = pv.load(run)
    x, context, sizes = pv.by_group(np.ones((4, 3)), [1, 1, 2, 3], np.ones((4, 1))).batch
    codes = pv.encode(pair, x.float(), context.float(), sizes)
    assert codes["u"].shape == (3, 1)
    assert codes["z"].shape == (3, 2, 2)


def test_numbers_by_group_and_by_member(run):
    data = pv.load_data(run.parent / "visits.npz", group="patient").test
    metrics = read(run / "metrics.json")
    assert metrics["num_examples"] == 4
    found = pv.evaluate(pv.load(run), data.x, data.context, data.lengths, num_samples=5)
    assert metrics["log_likelihood"] == pytest.approx(found.log_likelihood, abs=1e-4)
    by_member = found.log_likelihood * 4 / int(data.lengths.sum())
    assert metrics["log_likelihood_by_member"] == pytest.approx(by_member, abs=1e-4)


def test_codes_name_the_rows_of_the_file(run):
    command("encode {run}", run=run)
    codes = np.load(run / "codes.npz")
    stored = np.load(run.parent / "visits.npz")
    assert codes["u_mean"].shape == (4, 1)
    for rows in codes["members"]:
        (one,) = set(stored["patient"][rows[rows >= 0]])
        assert (rows >= 0).sum() == (stored["patient"] == one).sum()


def test_other_groups_are_evaluated(run, capsys):
    rng = np.random.default_rng(1)  # the largest group is larger than in training
    other = run.parent / "other.npz"
    ids = np.repeat(np.arange(12), [*[1] * 11, 30])
    np.savez(other, x=rng.normal(size=(41, 3)), patient=ids, context=rng.normal(size=41))
    command("evaluate {run} --data {other} --num-samples 5", run=run, other=other)
    assert "log p(x) by member" in capsys.readouterr().out


def test_samples_are_whole_groups(run):
    command("sample {run} --num 3", run=run)
    assert np.load(run / "samples.npy").shape == (3, *pv.load(run).template(1)[0].shape[1:])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("train {data} --model multilevel", "needs --group"),
        ("train {data} --group patient", "--group needs --model multilevel"),
        ("train digits --model multilevel --group patient", "--group needs a table or a .npz file"),
        ("train {data} --model multilevel --group visit", "has no array 'visit'"),
        (
            "train {data} --model multilevel --group patient --latent-dim 3 2 1",
            "one or two numbers",
        ),
        ("train {data} --model multilevel --group patient --network conv", "--network does not"),
        ("train {data} --model multilevel --group patient --prior vamp", "does not support"),
        ("train {data} --model multilevl --group patient", "--group needs --model multilevel"),
    ],
)
def test_wrong_commands_in_one_line(run, line, message, capsys):
    with pytest.raises(SystemExit) as caught:
        main([*line.format(data=run.parent / "visits.npz").split(), "--out", str(run / "no")])
    assert caught.value.code == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


def test_each_end_of_an_interpolation_has_its_own_members(run):
    command("interpolate {run} --num 2 --steps 2", run=run)
    found = torch.from_numpy(np.load(run / "interpolations.npy"))
    pair, data = pv.load(run), pv.load_data(run.parent / "visits.npz", group="patient").test
    start, end = ((data.context[i : i + 2], data.lengths[i : i + 2]) for i in (0, 2))
    assert not torch.equal(start[1], end[1])
    codes = pv.encode(pair, data.x[2:4], *end)
    torch.testing.assert_close(found[:, 1], pv.decode(pair, codes, *start))


def test_scores_name_their_groups(run):
    command("score {run} --num-samples 21 --out {out}", run=run, out=run / "s.csv")
    with open(run / "s.csv", newline="") as file:
        found = [int(row["group"]) for row in csv.DictReader(file)]
    data = pv.load_data(run.parent / "visits.npz", group="patient")
    stored = np.load(run.parent / "visits.npz")["patient"]
    assert found == stored[data.test.members[:, 0]].tolist()
    command("encode {run}", run=run)
    assert np.load(run / "codes.npz")["rows"].tolist() == found
