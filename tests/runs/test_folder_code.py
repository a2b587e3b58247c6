"""Files never make a command or `pyro_vae.load` import a module or write to another folder."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

import pyro_vae as pv
from pyro_vae.cli.main import main
from pyro_vae.cli.make_pair import user_class
from pyro_vae.errors import UsageError
from pyro_vae.runs import description
from pyro_vae.runs import files as run_files
from pyro_vae.runs import folder as run_folder

SHORT = "--epochs 1 --num-eval-samples 2 --engine eager --no-report"

SPY = """
open({marker!r}, "w").close()
import pyro, torch
import pyro.distributions as dist
from torch import nn


class Pair(nn.Module):
    def __init__(self, data_shape):
        super().__init__()
        self.data_shape = data_shape
        self.encoder, self.decoder = nn.Linear(4, 2), nn.Linear(1, 4)

    def model(self, x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), 1.0).to_event(1), obs=x)

    def guide(self, x):
        import neighbor  # an import at run time

        with pyro.plate("data", len(x), dim=-1):
            loc, scale = self.encoder(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, scale.exp()).to_event(1))


class Other(Pair):
    pass
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with data and a module that creates a file when it is imported."""
    (tmp_path / "spy.py").write_text(SPY.format(marker=str(tmp_path / "marker")))
    (tmp_path / "neighbor.py").write_text("")
    np.save(tmp_path / "x.npy", np.random.default_rng(0).normal(size=(30, 4)).astype("float32"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    yield tmp_path
    forget()


def forget():
    for name in ("spy", "neighbor"):
        sys.modules.pop(name, None)


@pytest.fixture
def own(here):
    """The run of a pair of a user, whose class has not been imported since."""
    main(f"train x.npy --out run --model spy:Pair {SHORT}".split())
    (here / "marker").unlink()
    forget()
    return here / "run"


def complaint(line, capsys):
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main(line.split())
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith("pyro-vae: ")
    return error


HOSTILE = {
    "a bare recipe": {"train": {"data": "x.npy", "model": "spy:Pair"}},
    "options alone": {"data": "x.npy", "model": "spy:Pair"},
    "a list": {"data": "x.npy", "model": ["spy:Pair"]},
    "an object": {"data": "x.npy", "model": {"model": "spy:Pair"}},
    "an option within": {"data": "x.npy", "model": {"": "spy:Pair"}},
    "no module": {"data": "x.npy", "model": ":Pair"},
    "a module of this library": {"data": "x.npy", "model": "pyro_vae.__main__:main"},
}


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE)
@pytest.mark.parametrize(
    "line",
    [
        "train x.npy --resume --out run",
        "train --resume --out run",
        "train x.npy --config run/config.json",
        "train --config=run/config.json --out new",
        "train x.npy --resume --config run/config.json --out run",
    ],
)
def test_a_file_that_names_a_class_is_rejected_and_imports_nothing(content, line, here, capsys):
    (here / "run").mkdir()
    run_files.write_json(here / "run" / "config.json", content)
    complaint(line, capsys)
    assert not (here / "marker").exists()
    assert "spy" not in sys.modules


COMMANDS = ("evaluate", "diagnose", "sample", "reconstruct", "encode", "interpolate", "traverse")


@pytest.mark.parametrize("command", [*COMMANDS, "report"])
def test_no_command_imports_the_class_that_a_run_names(command, own, capsys):
    assert "--model module:Class" in complaint(f"{command} {own}", capsys)
    assert not (own.parent / "marker").exists()


@pytest.mark.parametrize("command", [*COMMANDS, "report"])
def test_another_class_than_the_recorded_one_is_rejected_and_not_imported(command, own, capsys):
    error = complaint(f"{command} {own} --model spy:Other", capsys)
    assert "--model spy:Pair" in error
    assert not (own.parent / "marker").exists()


def test_resume_accepts_the_typed_class_if_the_run_records_it(own, capsys):
    resume = "train x.npy --resume --out run --epochs 2"
    error = complaint(resume, capsys)
    assert "type --model spy:Pair" in error
    error = complaint(f"{resume} --model spy:Other", capsys)
    assert "--model spy:Pair" in error
    error = complaint(f"{resume} --model vae", capsys)
    assert "--model spy:Pair" in error
    assert not (own.parent / "marker").exists()
    main(f"{resume} --model spy:Pair --num-eval-samples 2 --no-report".split())
    assert len((own / "history.csv").read_text().splitlines()) == 3
    main(["evaluate", "run", "--num-samples", "2", "--model=spy:Pair"])


def test_the_shell_overrides_the_class_of_a_file_of_options(here):
    (here / "mine.json").write_text(json.dumps({"data": "x.npy", "model": "spy:Other"}))
    main(f"train --config mine.json --out run --model spy:Pair {SHORT}".split())
    assert json.loads((here / "run/config.json").read_text())["train"]["model"] == "spy:Pair"


def test_a_run_cannot_choose_another_output_folder(here, capsys):
    line = f"train x.npy --out run --likelihood gaussian {SHORT}"
    main(line.split())
    content = json.loads((here / "run/config.json").read_text())
    content["train"]["out"] = str(here / "victim")
    run_files.write_json(here / "run/config.json", content)
    assert "'out'" in complaint("train x.npy --resume --epochs 2 --out=run", capsys)
    assert not (here / "victim").exists()


# The parts that load builds

NAMES = [
    *("pyro_vae.__main__:main", "pyro_vae.cli:app", "pyro_vae:fit", "pyro_vae:load"),
    *("pyro_vae.pairs:_Adopted", "pyro_vae.self_test:_Categories", "pyro_vae.spy:Pair"),
    *(
        "torch.nn.spy:Pair",
        "torch.nn:Moduel",
        "torch.nn.modules.module:Any",
        "pyro_vae:__version__",
    ),
    *("spy:Pair", "torch.hub:load", "torch.nn.parallel:DataParallel", "pyro_vae.spy.deep:Pair"),
]


@pytest.mark.parametrize("name", NAMES)
def test_only_public_parts_are_built_and_nothing_else_is_imported(name, here, monkeypatch):
    # This makes such modules importable.
    monkeypatch.setattr(pv, "__path__", [*pv.__path__, str(here)])
    monkeypatch.setattr(nn, "__path__", [*nn.__path__, str(here)])
    pv.save(pv.VAE.mlp((4,), latent_dim=2), here / "run")
    content = json.loads((here / "run/config.json").read_text())
    content["pair"]["arguments"]["prior"] = {"class": name, "arguments": {}}
    run_files.write_json(here / "run/config.json", content)
    before = set(sys.modules)
    with pytest.raises(UsageError) as caught:
        pv.load(here / "run")
    assert "\n" not in str(caught.value)
    assert not (here / "marker").exists()
    assert not {m for m in set(sys.modules) - before if m.endswith(("spy", "__main__", "cli"))}


@pytest.mark.parametrize("kind", ["hub", "_dynamo", "system", "nn", "float33", 3, None])
def test_another_name_than_that_of_a_number_type_is_rejected(kind, tmp_path):
    pv.save(pv.VAE.mlp((4,), latent_dim=2), tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    content["adopted_batch"] = [[[4], kind]]
    run_files.write_json(tmp_path / "config.json", content)
    model = tmp_path / "model.safetensors"
    safetensors.torch.save_file(safetensors.torch.load_file(model), model)  # as in 0.1.0
    with pytest.raises(UsageError, match="a batch that cannot be created"):
        pv.load(tmp_path)


def test_parts_are_recorded_by_their_public_names(tmp_path):
    pair = pv.VAE.mlp((4,), latent_dim=2)
    pv.save(pair, tmp_path)
    recorded = json.loads((tmp_path / "config.json").read_text())["pair"]
    assert recorded["class"] == "pyro_vae:VAE"
    text = json.dumps(recorded)
    assert "pyro_vae." not in text
    assert '"torch.nn.modules.activation:ReLU"' in text


OLD = {
    "pyro_vae:VAE": "pyro_vae.models.vae:VAE",
    "pyro_vae:Factor": "pyro_vae.factors:Factor",
    "pyro_vae:MLP": "pyro_vae.networks:MLP",
    "pyro_vae:StandardNormal": "pyro_vae.priors:StandardNormal",
    "pyro_vae:DiagonalNormal": "pyro_vae.posteriors:DiagonalNormal",
    "pyro_vae:Bernoulli": "pyro_vae.likelihoods:Bernoulli",
}


def old_names(text):
    for new, old in OLD.items():
        text = text.replace(new, old)
    return text


def test_a_folder_of_0_1_0_loads_and_is_resumed(tmp_path):
    """Such a folder has no checksums and names parts by their old modules."""
    x = torch.rand(40, 4, generator=torch.Generator().manual_seed(0)).round()
    options = {"batch_size": 20, "engine": "eager", "progress": False}

    def make():
        torch.manual_seed(0)
        return pv.VAE.mlp((4,), latent_dim=2, hidden=(8,))

    straight, part = make(), make()
    pv.fit(straight, x, epochs=3, **options)
    pv.fit(part, x, epochs=1, out=tmp_path, **options)
    (tmp_path / "rows.safetensors").unlink()
    text = json.dumps(run_folder.read_config(tmp_path) | {"format": 1})
    (tmp_path / "config.json").write_text(old_names(text))
    model = tmp_path / "model.safetensors"
    safetensors.torch.save_file(safetensors.torch.load_file(model), model)
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    state["job"]["pair"] = old_names(state["job"]["pair"])
    assert "pyro_vae.models.vae:VAE" in state["job"]["pair"]
    torch.save(state, tmp_path / "checkpoint.pt")
    loaded = pv.load(tmp_path)
    for name, value in part.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)
    resumed = make()
    pv.fit(resumed, x, epochs=3, out=tmp_path, resume=True, **options)
    for name, value in straight.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value)
    pv.load(tmp_path)


# sys.path


def test_importing_the_class_of_a_user_restores_the_path(here):
    before = list(sys.path)
    kind = user_class("spy:Pair")
    assert kind.__module__ == "spy"
    assert sys.path == before
    with pytest.raises(UsageError, match="cannot import module"):
        user_class("nowhere:Pair")
    assert sys.path == before


@pytest.mark.usefixtures("own")
def test_a_command_restores_the_path_and_allows_late_imports(capsys):
    before = list(sys.path)
    main(["encode", "run", "--model", "spy:Pair"])
    assert sys.modules["neighbor"].__file__ == str(Path.cwd() / "neighbor.py")
    assert sys.path == before
    complaint("check spy:Nothing --data x.npy", capsys)
    assert sys.path == before


@pytest.mark.usefixtures("here")
def test_a_path_that_the_module_of_a_user_adds_stays(monkeypatch):
    Path("spy.py").write_text("import sys\nsys.path.append('mine')\nimport neighbor\n")
    before = list(sys.path)
    with pytest.raises(UsageError, match="has no class"):
        user_class("spy:Pair")
    assert sys.path == [*before, "mine"]
    monkeypatch.setattr(sys, "path", before)


def test_inner_parts_are_in_their_modules():
    """Every part in the private table exists and is an nn.Module."""
    for name in description._INNER:
        part = description._part(name)
        assert issubclass(part, nn.Module)
        assert description.class_of(description._path(part)) is part
    for name in pv.__all__:
        kind = getattr(pv, name)
        if isinstance(kind, type) and issubclass(kind, nn.Module):
            assert description.class_of(description._path(kind)) is kind
            assert description._path(kind) == f"pyro_vae:{name}"
