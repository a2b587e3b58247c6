"""Bad commands: one line, status 2, nothing changed."""

import json
import pickle
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import safetensors.torch
import torch
from bad_input_helpers import Marker, snapshot

from pyro_vae.cli.main import main

# The command line

OWN = """
import pyro, torch
import pyro.distributions as dist
from torch import nn


class Sound(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = nn.Linear(4, 4), nn.Linear(2, 4)

    def model(self, x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), 1.0).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x), dim=-1):
            loc, scale = self.encoder(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, scale.exp()).to_event(1))


class Silent(Sound):
    def guide(self, x):
        pass


class Idle(Sound):
    def __init__(self):
        super().__init__()
        self.idle = nn.Parameter(torch.zeros(3))


class Failing(Sound):
    def __init__(self):
        raise KeyError("no key")


class Wanting(Sound):
    def __init__(self, vocabulary):
        super().__init__()


class Diverging(Sound):
    steps = 0

    def model(self, x):
        self.steps += self.training
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            mean = self.decoder(z) * (float("nan") if self.steps > 5 else 1.0)
            likelihood = dist.Normal(mean, 1.0, validate_args=False)
            pyro.sample("x", likelihood.to_event(1), obs=x)


class Plain:
    model = guide = print
"""


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    """A folder to copy: a run of the command line, data files and modules."""
    folder = tmp_path_factory.mktemp("shelf")
    generator = np.random.default_rng(0)
    np.save(folder / "table.npy", generator.normal(size=(60, 4)).astype(np.float32))
    np.save(folder / "wide.npy", generator.random((60, 6)))
    np.save(folder / "floats.npy", generator.integers(0, 256, (60, 4)).astype(np.float32))
    np.save(folder / "nan.npy", np.full((60, 4), np.nan))
    np.save(folder / "few.npy", np.zeros((9, 4)))
    np.save(folder / "one.npy", np.zeros((1, 8, 8), np.uint8))
    np.save(folder / "empty.npy", np.zeros((0, 8, 8), np.uint8))
    np.save(folder / "pickle.npy", np.array([Marker(folder / "marker")], dtype=object))
    (folder / "own.py").write_text(OWN)
    (folder / "broken.py").write_text("def f(:\n")
    (folder / "raising.py").write_text("1 / 0\n")
    (folder / "wanting.py").write_text("import a_package_that_nobody_has\n")
    (folder / "list.json").write_text("[1]")
    (folder / "number.json").write_text('{"train": 3}')
    (folder / "cut.json").write_text("{")
    (folder / "option.json").write_text('{"epoch": 3}')
    (folder / "value.json").write_text('{"epochs": "many"}')
    (folder / "notes.txt").write_text("mine")
    (folder / "page.html").write_text("mine")
    (folder / "empty").mkdir()
    words = "--epochs 1 --num-eval-samples 2 --latent-dim 2 --hidden 8 --no-report"
    main(["train", "digits", "--out", str(folder / "run"), *words.split()])
    for name in ("cut", "evil"):
        shutil.copytree(folder / "run", folder / name)
        (folder / name / "checkpoint-older.pt").unlink()  # resume would fall back to it
    checkpoint = (folder / "cut" / "checkpoint.pt").read_bytes()
    (folder / "cut" / "checkpoint.pt").write_bytes(checkpoint[: len(checkpoint) // 2])
    model = (folder / "cut" / "model.safetensors").read_bytes()
    (folder / "cut" / "model.safetensors").write_bytes(model[: len(model) // 2])
    for name in ("checkpoint.pt", "model.safetensors"):
        (folder / "evil" / name).write_bytes(pickle.dumps(Marker(folder / "marker")))
    return folder


@pytest.fixture
def here(shelf, tmp_path, monkeypatch):
    """The current folder: a copy of the shelf. Modules are imported from it."""
    folder = shutil.copytree(shelf, tmp_path / "here")
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    yield folder
    for name in ("own", "broken", "raising", "wanting"):
        sys.modules.pop(name, None)


def complaint(words, capsys):
    """The error of a command: one line on standard error, with status 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main(words.split())
    out, err = capsys.readouterr()
    assert stopped.value.code == 2
    assert err.startswith("pyro-vae: ")
    assert err.endswith("\n")
    assert err.count("\n") == 1
    assert out == ""
    return err


TABLE = "table.npy --batch-size 8 --epochs 2 --num-eval-samples 2 --diagnosis-seconds 0"

COMMANDS = {
    "unknown command": ("trian digits", ["trian", "train"]),
    "unknown data set": ("train digts", ["'digts'", "did you mean 'digits'?"]),
    "unknown option": ("train digits --epoch 3", ["--epoch", "--epochs"]),
    "unknown likelihood": (
        "train digits --likelihood bernouli",
        ["bernouli", "bernoulli", "continuous-bernoulli"],
    ),
    "unknown network": ("train digits --network cnov", ["cnov", "conv"]),
    "unknown model": ("train digits --model vea", ["'vea'", "did you mean 'vae'?", "module:Class"]),
    "unknown module": ("train digits --model nowhere:Pair", ["'nowhere'"]),
    "unknown class": ("train digits --model own:Soun", ["'Soun'", "did you mean 'Sound'?"]),
    "unknown run": ("evaluate rum", ["'rum'", "did you mean 'run'?"]),
    "unknown run to resume": ("train digits --resume --out nowhere", ["nowhere"]),
    "unknown data to evaluate": ("evaluate run --data digts", ["did you mean 'digits'?"]),
    "unknown part": ("encode run --part tets", ["'tets'", "test"]),
    "no data": ("train", ["data"]),
    "epochs in words": ("train digits --epochs three", ["--epochs", "three"]),
    "negative epochs": ("train digits --epochs -1", ["epochs", "-1"]),
    "no latents": ("train digits --latent-dim 0", ["--latent-dim", "0"]),
    "no width": ("train digits --hidden 8 0", ["hidden", "0"]),
    "scale in words": ("train digits --likelihood gaussian --scale wide", ["scale", "'wide'"]),
    "scale of 0": ("train digits --likelihood gaussian --scale 0", ["scale", "0", "positive"]),
    "negative scale": ("train digits --likelihood gaussian --scale -1", ["scale", "-1"]),
    "seed too great": (f"train digits --seed {10**30}", ["seed", "10000"]),
    "no such GPU": ("train digits --device cuda:99", ["'cuda:99'", "'cpu'"]),
    "gradient of another objective": (
        "train digits --objective elbo --gradient doubly-reparametrized",
        ["doubly-reparametrized", "--objective elbo"],
    ),
    "samples of one draw": (
        "train digits --objective total-correlation --num-samples 2",
        ["total-correlation", "one sample", "2"],
    ),
    "negative weight": (
        "train digits --objective total-correlation --total-correlation -1",
        ["--total-correlation", "-1"],
    ),
    "total correlation of units that are not independent": (
        "train digits --objective total-correlation --posterior full-rank-normal",
        ["independent units", "posterior of 'z'", "use --objective elbo"],
    ),
    "no evaluation": ("train digits --epochs 1 --num-eval-samples 0", ["samples", "0"]),
    "no such file": ("train none.npy", ["none.npy", "no such file"]),
    "another kind of file": ("train page.html", ["page.html", ".npy"]),
    "a text too short to split": ("train notes.txt", ["notes has 1 rows", "at least 10"]),
    "a folder": ("train empty", ["empty must hold images", ".png", "no files"]),
    "nan": ("train nan.npy", ["nan.npy", "not finite", "row 0"]),
    "few rows": ("train few.npy", ["few", "9 rows", "at least 10"]),
    "one image": ("train one.npy", ["one", "1 row", "at least 10"]),
    "no image": ("train empty.npy", ["empty.npy", "(0, 8, 8)"]),
    "pickle": ("train pickle.npy", ["pickle.npy"]),
    "floats to 255": ("train floats.npy --batch-size 8", ["outside the support", "uint8"]),
    "reals as bernoulli": (
        "train table.npy --batch-size 8 --likelihood bernoulli",
        ["outside the support", "Gaussian"],
    ),
    "batch of more than all": (
        "train table.npy --likelihood gaussian --batch-size 43",
        ["--batch-size must be at most 42", "got 43"],
    ),
    "convolutions of rows": ("train table.npy --network conv", ["(4,)", "height"]),
    "condition without labels": ("train table.npy --condition label", ["labels", "table"]),
    "context without context": ("train table.npy --condition context", ["'context'", "table"]),
    "conditional on nothing": ("train digits --prior conditional", ["--condition"]),
    "library size of pixels": (
        "train digits --library-size",
        ["--library-size", "--likelihood poisson", "got no --likelihood"],
    ),
    "levels of a vae": (
        "train digits --latent-dim 3 2",
        ["one number", "got 2 numbers", "hierarchical"],
    ),
    "levels of a mixture": (
        "train digits --model mixture --latent-dim 3 2",
        ["--model mixture", "got 2 numbers", "hierarchical"],
    ),
    "one level": (
        "train digits --model hierarchical --latent-dim 3",
        ["two levels", "got --latent-dim 3"],
    ),
    "fewer labels than none": (
        "train digits --model semi-supervised --num-labels -5",
        ["--num-labels", "-5"],
    ),
    "a guide of a vae": ("train digits --guide bottom-up", ["--model hierarchical", "vae"]),
    "components of no mixture": (
        "train digits --components 3",
        ["--prior gaussian-mixture or vamp", "standard-normal"],
    ),
    "a vamp prior without q of the top": (
        "train digits --model hierarchical --latent-dim 3 2 --prior vamp --guide bottom-up",
        ["--guide top-down"],
    ),
    "another posterior of levels": (
        "train digits --model hierarchical --latent-dim 3 2 --posterior iaf",
        ["diagonal-normal", "iaf"],
    ),
    "a vamp prior with context": (
        "train digits --prior vamp --condition label",
        ["without context", "--condition"],
    ),
    "gated convolutions": (
        "train digits --network conv --activation glu",
        ["--activation glu", "--network mlp"],
    ),
    "blocks of no convolutions": ("train digits --blocks 2", ["--network conv", "auto"]),
    "no logistics": (
        "train digits --likelihood discretized-logistic-mixture --logistics 0",
        ["--logistics", "0"],
    ),
    "reals as counts": (
        "train table.npy --likelihood poisson --batch-size 8",
        ["outside the support", "Poisson"],
    ),
    "faulty pair": (f"train {TABLE} --model own:Silent", ["'z'", "missing from the guide"]),
    "no module in training": (f"train {TABLE} --model own:Plain", ["nn.Module", "Plain"]),
    "another run": ("train digits --out run", ["run", "already holds a run", "--overwrite"]),
    "file for a folder": ("train digits --out notes.txt", ["notes.txt", "file"]),
    "folder in a file": ("train digits --out notes.txt/run", ["notes.txt"]),
    "configuration is a list": ("train digits --config list.json", ["list.json"]),
    "configuration is a number": ("train digits --config number.json", ["number.json"]),
    "configuration is cut": ("train digits --config cut.json", ["cut.json", "JSON"]),
    "configuration is missing": ("train digits --config none.json", ["none.json"]),
    "configuration of no name": ("train digits --config", ["--config requires an argument"]),
    "option of configuration": ("train digits --config option.json", ["'epoch'", "'epochs'"]),
    "value of configuration": ("train digits --config value.json", ["epochs", "many"]),
    "evaluate an empty folder": ("evaluate empty", ["config.json", "missing"]),
    "evaluate other data": ("evaluate run --data wide.npy", [", 6)", "1, 8, 8"]),
    "evaluate without samples": ("evaluate run --num-samples 0", ["--num-samples", "0"]),
    "evaluate as another pair": ("evaluate run --model own:Sound", ["--model vae", "own:Sound"]),
    "sample nothing": ("sample run --num 0", ["num", "0"]),
    "label of no condition": ("sample run --label 1", ["run", "--condition label"]),
    "reconstruct nothing": ("reconstruct run --num 0", ["num", "0"]),
    "interpolate nothing": ("interpolate run --num 0", ["num", "0"]),
    "interpolate in one step": ("interpolate run --steps 1", ["steps", "1"]),
    "traverse from nowhere": ("traverse run --index 9999", ["index", "9999"]),
    "traverse in no steps": ("traverse run --steps 0", ["steps", "0"]),
    "traverse in negative steps": ("traverse run --steps -1", ["steps", "-1"]),
    "run is cut": ("sample cut", ["model.safetensors", "cut short"]),
    "checkpoint is cut": (
        "train digits --resume --out cut --epochs 2",
        ["checkpoint.pt", "cut short"],
    ),
    "model is a pickle": ("sample evil", ["model.safetensors"]),
    "checkpoint is a pickle": (
        "train digits --resume --out evil --epochs 2",
        ["checkpoint.pt", "checkpoint of a run"],
    ),
    "check a faulty pair": ("check own:Silent --data table.npy", ["'z'", "missing from the guide"]),
    "check on other data": ("check own:Sound --data wide.npy", ["guide fails", "(16, 6)"]),
    "check no module": ("check own:Plain --data table.npy", ["nn.Module", "Plain"]),
    "check a failing class": ("check own:Failing --data table.npy", ["Failing", "KeyError"]),
    "check a wanting class": ("check own:Wanting --data table.npy", ["'vocabulary'"]),
    "check an unknown class": ("check own:Silnet", ["did you mean 'Silent'?"]),
    "check no class": ("check own:torch --data table.npy", ["own:torch", "class"]),
    "check a function": ("check json:dumps --data table.npy", ["json:dumps", "class"]),
    "check half a name": ("check own", ["module:Class", "'own'"]),
    "check the other half": ("check :Sound", ["module:Class", "':Sound'"]),
    "check a broken module": ("check broken:Pair", ["broken", "SyntaxError"]),
    "check a raising module": ("check raising:Pair", ["raising", "ZeroDivisionError"]),
    "check a wanting module": ("check wanting:Pair", ["wanting", "a_package_that_nobody_has"]),
}


@pytest.mark.parametrize(("line", "words"), COMMANDS.values(), ids=COMMANDS)
def test_a_command_refuses_in_one_line_and_changes_nothing(line, words, here, shelf, capsys):
    before = snapshot(here)
    message = complaint(line, capsys)
    for word in words:
        assert word in message, message
    assert snapshot(here) == before
    assert not (shelf / "marker").exists()


@pytest.mark.usefixtures("here")
def test_check_of_a_sound_pair(capsys):
    main(["check", "own:Sound", "--data", "table.npy"])
    assert capsys.readouterr() == ("the pair is sound\n", "")
    main(["check", "own:Idle", "--data", "table.npy"])
    assert "'idle' has no effect" in capsys.readouterr().out


def test_a_command_whose_training_is_not_finite(here, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(f"train {TABLE} --model own:Diverging --engine eager --out new".split())
    assert stopped.value.code == 2
    last = capsys.readouterr().err.rpartition("\r")[2]  # the progress bar ends in a return
    assert last.startswith("pyro-vae: ")
    assert last.count("\n") == 1
    assert "site 'x'" in last
    assert "last good model is in new" in last
    state = safetensors.torch.load_file(here / "new" / "model.safetensors")
    assert all(bool(torch.isfinite(value).all()) for value in state.values())


@pytest.mark.parametrize(
    "content", [b"epoch,elbo\n1,", b"epoch,elbo\n1", b"\xff\xfe\x00", b"epoch,elbo\n1,x\n"]
)
def test_a_report_of_a_history_that_is_cut_short(content, here, capsys):
    (here / "run" / "history.csv").write_bytes(content)
    before = snapshot(here)
    assert "history.csv" in complaint("report run", capsys)
    assert snapshot(here) == before


def test_figures_that_cannot_be_written(here, capsys):
    (here / "run" / "figures").write_text("mine")
    assert "figures" in complaint("sample run --num 2", capsys)
    assert (here / "run" / "figures").read_text() == "mine"


def test_a_process_ends_with_status_2_and_no_traceback(tmp_path):
    words = [sys.executable, "-m", "pyro_vae", "train", "digts"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("pyro-vae: unknown data set or file 'digts'")
    assert done.stderr.count("\n") == 1
    assert snapshot(tmp_path) == {}


IGNORED = {
    # An option with its default value would be ignored just as silently.
    "--free-bits 0.1": "--free-bits applies only with --objective free-bits; got no --objective",
    "--objective elbo --free-bits 0.3": "with --objective free-bits; got --objective elbo",
    "--mutual-information 2": "applies only with --objective total-correlation",
    "--total-correlation 6": "applies only with --objective total-correlation",
    "--dimension-kl 2": "applies only with --objective total-correlation",
    "--warm-up-epochs 3": "applies only with --warm-up linear or cyclical; got no --warm-up",
    "--warm-up none --warm-up-epochs 3": "cyclical; got --warm-up none",
    "--embedding-dim 8 --network mlp": "with --network auto or recurrent; got --network mlp",
    "--embedding-dim 8": "--embedding-dim does not apply to digits, which is not text; got 8",
    "--word-dropout 0.2": "--word-dropout does not apply to digits, which is not text; got 0.2",
    "--channels 8": "--channels applies only with --network conv; got --network auto",
    "--blocks 0": "--blocks applies only with --network conv; got --network auto",
    "--guide top-down": "--guide applies only with --model hierarchical; got --model vae",
    "--no-normalize": "--normalize applies only with --model hierarchical; got --model vae",
    "--classification-weight 3": "applies only with --model semi-supervised; got --model vae",
    "--components 3": (
        "--components applies only with --prior gaussian-mixture or vamp, or with --model mixture; "
        "got --prior standard-normal and --model vae"
    ),
    "--scale 0.1": "--scale applies only with --likelihood gaussian; got no --likelihood",
    "--logistics 3": "applies only with --likelihood discretized-logistic-mixture",
    "--binarize fixed --likelihood gaussian": "applies only with --likelihood bernoulli",
    "--length 30": "--length applies only to text; digits is not text",
    "--data-dir runs": "--data-dir applies only to mnist,",
    "--prior flow --latent-dim 1": "--prior flow needs a --latent-dim of at least 2, got 1",
    "--model own:Sound --network mlp": "--network does not apply to a pair of your own, got",
    "--model own:Sound --hidden 8": "own:Sound, whose constructor does not take it; got 8",
    "--model deep-markov --embedding-dim 3": "does not apply to --model deep-markov; got 3",
    "--model deep-markov --hidden 3 2": "--hidden must be one number for --model deep-markov",
}


@pytest.mark.parametrize(("options", "words"), IGNORED.items(), ids=IGNORED)
def test_an_option_that_would_be_ignored_is_rejected(options, words, here, capsys):
    before = snapshot(here)
    assert words in complaint(f"train digits {options}", capsys)
    assert snapshot(here) == before


def test_every_option_of_a_part_applies_with_that_part():
    """Options that go together according to the table are accepted."""
    from pyro_vae.cli.options import Model, Objective

    Model(prior="vamp", components=3)
    Model(model="mixture", components=3)
    Model(model="own:Sound", library_size=True, latent_dim=(3, 2))
    Model(likelihood="negative-binomial", library_size=True)
    Objective(objective="total-correlation", dimension_kl=2.0)
    Objective(warm_up="cyclical", warm_up_epochs=3.0)


def test_a_default_in_a_file_of_options_is_not_rejected(here, capsys):
    """The config.json of a run names every option, also those that do not apply to its parts."""
    options = {"data": "digits", "objective": "elbo", "free_bits": 0.1, "epochs": 0}
    (here / "options.json").write_text(json.dumps(options))
    assert "--epochs must be" in complaint("train digits --config options.json", capsys)
    (here / "options.json").write_text(json.dumps(options | {"free_bits": 0.3}))
    words = "--free-bits applies only with --objective free-bits"
    assert words in complaint("train digits --config options.json", capsys)


def test_an_error_names_options_and_leaves_other_words(here, capsys):
    assert "'epoch'; did you mean 'epochs'" in complaint(
        "train digits --config option.json", capsys
    )
    assert "no run 'num_samples'" in complaint("evaluate num_samples", capsys)


def test_ctrl_c_is_one_line(capsys):
    """A timer interrupts as Ctrl-C does, also if the tests ignore Ctrl-C."""
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.setitimer(signal.ITIMER_REAL, 0.5)
    try:
        with pytest.raises(SystemExit) as ended:
            main(["selftest"])
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert ended.value.code == 130
    assert capsys.readouterr().err.splitlines()[-1] == "pyro-vae: interrupted"
