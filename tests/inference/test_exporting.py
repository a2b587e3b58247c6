"""Exported encoders and decoders: plain functions with the parameters of the pair."""

import json
import sys

import numpy as np
import pairs
import pyro
import pyro.distributions as dist
import pytest
import torch
from cli_helpers import command
from torch import nn

import pyro_vae as pv
from pyro_vae.inference import exporting


class Linear(nn.Module):
    """A linear pair, with three numbers of rows in its programs: n, 2n and the size of x."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([[1.0, 2.0], [0.0, -1.0], [3.0, 0.5]]))

    def model(self, x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x), 2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ self.weight.T, 0.5).to_event(1), obs=x)

    def guide(self, x):
        twice = x.repeat(2, 1)[: len(x)] + x.new_zeros(2 * len(x), 3)[len(x) :]
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(twice @ self.weight, 0.25).to_event(1))


def loaded(path):
    return torch.export.load(path).module()


def test_onnx_files_give_the_closed_form_for_any_number_of_rows(tmp_path):
    import onnxruntime

    pair = Linear()
    pv.export(pair, torch.randn(5, 3), folder=tmp_path)
    weight = pair.weight.detach().numpy()
    described = json.loads((tmp_path / "config.json").read_text())["parts"]
    for n in (1, 4, 300):
        for part, width, matrix in (("encoder", 3, weight), ("decoder", 2, weight.T)):
            session = onnxruntime.InferenceSession(tmp_path / f"{part}.onnx")
            given = np.random.default_rng(n).normal(size=(n, width)).astype(np.float32)
            loc, scale = session.run(None, {session.get_inputs()[0].name: given})
            assert loc == pytest.approx(given @ matrix, abs=1e-5)
            assert scale == pytest.approx(np.full(loc.shape, 0.25 if part == "encoder" else 0.5))
            outputs = [output.name for output in session.get_outputs()]
            assert outputs == list(described[part]["outputs"])
    assert described["encoder"]["outputs"]["z.loc"] == {
        "row_shape": [2],
        "type": "float32",
        "distribution": "Normal",
    }


def test_conditional_pairs_take_their_context(tmp_path):
    pair = pv.VAE.mlp((4,), latent_dim=2, hidden=(8,), context_shapes=((3,),))
    x, label = torch.rand(6, 4).round(), torch.eye(3)[[0, 1, 2, 0, 1, 2]]
    pv.export(pair, x, label, folder=tmp_path, formats=["torch"])
    loc, _ = loaded(tmp_path / "encoder.pt2")(x, label)
    torch.testing.assert_close(loc, pv.encode(pair, x, label)["z"])
    z = torch.randn(6, 2)
    (logits,) = loaded(tmp_path / "decoder.pt2")(z, label)
    torch.testing.assert_close(logits.sigmoid(), pv.decode(pair, {"z": z}, label))


@pytest.mark.thorough
def test_levels_of_latents_get_the_means_of_the_levels_above(tmp_path):
    pair = pairs.ALL["hierarchical"]()
    x = pair.template(6)[0].round()
    pv.export(pair, x, folder=tmp_path, formats=["torch"])
    names = json.loads((tmp_path / "config.json").read_text())["parts"]["encoder"]["outputs"]
    found = dict(zip(names, loaded(tmp_path / "encoder.pt2")(x), strict=True))
    for name, mean in pv.encode(pair, x).items():
        torch.testing.assert_close(found[f"{name}.loc"], mean)
    for name, scale in pv.encode(pair, x, what="scale").items():
        torch.testing.assert_close(found[f"{name}.scale"], scale)


def test_global_latents_have_the_means_of_the_guide(tmp_path):
    pair = pairs.GLOBAL["bayesian"]()
    x, *context = pair.template(5)
    pv.export(pair, x, *context, folder=tmp_path, formats=["torch"])
    z = torch.randn(5, *pv.encode(pair, x, *context)["z"].shape[1:])
    (logits,) = loaded(tmp_path / "decoder.pt2")(z)
    expected = pv.decode(pair, {"z": z}, *context, means=True)
    torch.testing.assert_close(logits.sigmoid(), expected)


@pytest.mark.thorough
def test_tables_have_the_parameters_of_each_family_of_columns(tmp_path):
    pair = pv.VAE.mlp(
        (3,),
        latent_dim=2,
        hidden=(4,),
        likelihood=pv.Columns(["continuous", "categorical", "positive"], [0, 3, 0]),
    )
    x = torch.tensor([[1.0, 2.0, 0.5], [torch.nan, 0.0, 2.0], [0.0, torch.nan, 1.0]])
    pv.export(pair, x, folder=tmp_path, formats=["torch"])
    described = json.loads((tmp_path / "config.json").read_text())["parts"]["decoder"]["outputs"]
    z = torch.randn(5, 2)
    found = dict(zip(described, loaded(tmp_path / "decoder.pt2")(z), strict=True))
    assert described["x.StudentT.loc"]["columns"] == [0]
    assert described["x.LogNormal.scale"]["columns"] == [2]
    expected = pv.decode(pair, {"z": z})
    torch.testing.assert_close(found["x.StudentT.loc"][:, 0], expected[:, 0])
    mean = (found["x.LogNormal.loc"] + found["x.LogNormal.scale"].square() / 2).exp()
    torch.testing.assert_close(mean[:, 0], expected[:, 2])
    assert torch.equal(found["x.Codes.logits"][:, 0].argmax(-1).to(z.dtype), expected[:, 1])
    codes, _ = loaded(tmp_path / "encoder.pt2")(x)
    torch.testing.assert_close(codes, pv.encode(pair, x)["z"])


def test_circular_columns_have_their_periods(tmp_path):
    """The mode of a column is its location, from the start of its period."""
    columns = pv.Columns(
        ["circular", "continuous", "circular"], [0, 0, 0], periods=[24.0, 0.0, 360.0]
    )
    pair = pv.VAE.mlp((3,), latent_dim=2, hidden=(4,), likelihood=columns)
    x = torch.tensor([[23.0, 2.0, 90.0], [1.0, 0.0, torch.nan]])
    pv.export(pair, x, folder=tmp_path, formats=["torch"])
    described = json.loads((tmp_path / "config.json").read_text())["parts"]["decoder"]["outputs"]
    assert described["x.Circular.loc"]["columns"] == [0, 2]
    assert described["x.Circular.loc"]["period"] == [24.0, 360.0]
    assert described["x.Circular.concentration"]["period"] == [24.0, 360.0]
    assert "period" not in described["x.StudentT.loc"]
    z = torch.randn(5, 2)
    found = dict(zip(described, loaded(tmp_path / "decoder.pt2")(z), strict=True))
    turns = (found["x.Circular.loc"] - pv.decode(pair, {"z": z})[:, [0, 2]]) / torch.tensor(
        [24.0, 360.0]
    )
    torch.testing.assert_close(turns, turns.round(), atol=1e-4, rtol=0)


@pytest.mark.thorough
def test_groups_have_the_parameters_of_their_members(tmp_path):
    """Latents of members have the groups first, which are not in that order in memory."""
    pair = pv.MultilevelVAE.mlp((3,), latent_dim=2, group_dim=1, hidden=(4,), members=5)
    x, sizes = torch.randn(6, 5, 3), torch.tensor([1, 2, 3, 5, 5, 4])
    pv.export(pair, x, sizes, folder=tmp_path, formats=["torch"])
    described = json.loads((tmp_path / "config.json").read_text())["parts"]
    z = {"u": torch.randn(4, 1), "z": torch.randn(4, 5, 2)}
    given = [(z | {"x1": sizes[:4]})[name] for name in described["decoder"]["inputs"]]
    parameters = dict(
        zip(described["decoder"]["outputs"], loaded(tmp_path / "decoder.pt2")(*given), strict=True)
    )
    torch.testing.assert_close(parameters["x.loc"], pv.decode(pair, z, sizes[:4]))
    codes = loaded(tmp_path / "encoder.pt2")(x, sizes)
    found = dict(zip(described["encoder"]["outputs"], codes, strict=True))
    torch.testing.assert_close(found["u.loc"], pv.encode(pair, x, sizes)["u"])


def test_data_in_another_order_in_memory_are_exported(tmp_path):
    pair = pv.VAE.mlp((4, 3), latent_dim=2, hidden=(4,), likelihood=pv.Gaussian)
    x = torch.randn(3, 4, 6).permute(2, 1, 0)
    pv.export(pair, x, folder=tmp_path, formats=["torch"])
    loc, _ = loaded(tmp_path / "encoder.pt2")(x.contiguous())
    torch.testing.assert_close(loc, pv.encode(pair, x)["z"])


class Reads(Linear):
    def guide(self, x):
        with pyro.plate("data", len(x), dim=-1):
            loc = x @ self.weight
            loc = loc if bool(x.sum() > 0) else -loc
            pyro.sample("z", dist.Normal(loc, 0.25).to_event(1))


class Counts(Linear):
    def guide(self, x):
        with pyro.plate("data", len(x), dim=-1):
            loc = x @ self.weight / (len(x) + 1)
            pyro.sample("z", dist.Normal(loc, 0.25).to_event(1))


class Noisy(Linear):
    def guide(self, x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal((x + torch.randn(3)) @ self.weight, 0.25).to_event(1))


@pytest.mark.parametrize(
    ("pair", "words"),
    [
        (Reads(), "cannot be exported as a graph"),
        (Counts(), "uses the number 12 for 11 rows and 14 for 13"),
        (Noisy(), "draws random numbers"),
        (pairs.ALL["flows"](), "such as a flow or a sequence, does not have parameters"),
        (pairs.ALL["text"](), "does not have parameters"),
    ],
    ids=["reads-values", "counts-rows", "draws", "flow", "sequence"],
)
def test_programs_without_a_fixed_graph_are_refused_in_one_line(pair, words, tmp_path):
    x = torch.ones(4, 3) if isinstance(pair, Linear) else pair.template(4)[0]
    with pytest.raises(pv.UsageError, match=words) as found:
        pv.export(pair, x, folder=tmp_path, formats=["torch"])
    assert "\n" not in str(found.value)
    assert not list(tmp_path.iterdir())


class Autoregressive(Linear):
    def model(self, x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x), 2), 1.0).to_event(1))
            before = nn.functional.pad(x, (1, 0))[:, :-1]
            pyro.sample("x", dist.Normal(z @ self.weight.T + before, 0.5).to_event(1), obs=x)


def test_a_decoder_that_reads_the_data_is_refused(tmp_path):
    with pytest.raises(pv.UsageError, match="depends on x itself"):
        pv.export(Autoregressive(), torch.ones(4, 3), folder=tmp_path, formats=["torch"])


def test_a_file_that_differs_from_the_pair_is_not_written(tmp_path, monkeypatch):
    write = exporting._torch

    def shifted(part):
        """The file of a pair whose means are off by a little more than the tolerance."""
        program = part.program.module()
        wrong = torch.export.export(
            Shifted(program), tuple(part.inputs.values()), dynamic_shapes=(({0: ROWS},),)
        )
        return write(part._replace(program=wrong))

    monkeypatch.setattr(exporting, "_torch", shifted)
    with pytest.raises(pv.UsageError, match="differs from the pair by") as found:
        pv.export(Linear(), torch.randn(5, 3), folder=tmp_path, formats=["torch"])
    assert "\n" not in str(found.value)
    assert not list(tmp_path.iterdir())


class Shifted(nn.Module):
    def __init__(self, program):
        super().__init__()
        self.program = program

    def forward(self, *rows):
        loc, scale = self.program(*rows)
        return loc + 3e-4, scale


ROWS = torch.export.Dim("rows", min=1)


def test_other_formats_and_a_missing_runtime_are_refused_in_one_line(tmp_path, monkeypatch):
    with pytest.raises(pv.UsageError, match="formats must be onnx or torch, got 'tflite'"):
        pv.export(Linear(), torch.ones(4, 3), folder=tmp_path, formats=["tflite"])
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(pv.UsageError, match=r"pip install 'pyro-vae\[export\]'"):
        pv.export(Linear(), torch.ones(4, 3), folder=tmp_path)


def test_the_command_exports_a_run(digits, tmp_path):
    command("export {run} --out {out} --formats torch", run=digits, out=tmp_path)
    pair, x = pv.load(digits), torch.rand(3, 64).round()
    shape = json.loads((tmp_path / "config.json").read_text())["parts"]["encoder"]["inputs"]["x"]
    x = x.reshape(3, *shape["row_shape"])
    loc, _ = loaded(tmp_path / "encoder.pt2")(x)
    torch.testing.assert_close(loc, pv.encode(pair, x)["z"])


def test_zero_inflated_counts_have_the_parameters_of_the_counts_too(tmp_path):
    pair = pairs.ALL["negative-binomial-library"]()
    x, size = pair.template(6)
    x, size = torch.poisson(torch.full_like(x, 2.0)), torch.full_like(size, 1.5)
    pv.export(pair, x, size, folder=tmp_path, formats=["torch"])
    described = json.loads((tmp_path / "config.json").read_text())["parts"]["decoder"]
    z = torch.randn(6, *pv.encode(pair, x, size)["z"].shape[1:])
    given = {"z": z, "x1": size}
    decoder = loaded(tmp_path / "decoder.pt2")
    found = decoder(*(given[name] for name in described["inputs"]))
    found = dict(zip(described["outputs"], found, strict=True))
    counts, logits, gate = (
        found[f"x.{name}"]
        for name in (
            "ExactNegativeBinomial.total_count",
            "ExactNegativeBinomial.logits",
            "gate_logits",
        )
    )
    mean = (1 - gate.sigmoid()) * counts * logits.exp()
    torch.testing.assert_close(mean, pv.decode(pair, {"z": z}, size))


class Coefficients(nn.Module):
    """A regression, whose only latents are global."""

    def model(self, x):
        w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("x", dist.Normal(w, 1.0).to_event(1), obs=x)

    def guide(self, x):
        pyro.sample("w", dist.Normal(torch.zeros(2), 0.1).to_event(1))


class Classes(nn.Module):
    """A class that is summed out, so the guide draws nothing."""

    def model(self, x):
        with pyro.plate("data", len(x), dim=-1):
            k = pyro.sample("k", dist.Categorical(torch.ones(2)), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(k[..., None] * torch.ones(2), 1.0).to_event(1), obs=x)

    def guide(self, x):
        pass


@pytest.mark.parametrize(
    ("pair", "says"), [(Coefficients(), "only global or group latents"), (Classes(), "has none")]
)
def test_a_pair_without_an_encoder_is_refused_with_the_reason(pair, says, tmp_path):
    with pytest.raises(pv.UsageError, match=f"needs a local latent in the guide.*{says}"):
        pv.export(pair, torch.randn(8, 2), folder=tmp_path, formats=["torch"])
