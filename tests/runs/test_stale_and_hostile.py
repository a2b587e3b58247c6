"""Numbers name their weights, text from a folder is escaped, and generators do not change."""

import html.parser
import json
import random
import re
import shutil
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pyro_vae as pv
from pyro_vae.cli.main import main
from pyro_vae.errors import UsageError
from pyro_vae.inference.encoding import encode
from pyro_vae.pairs.figures import png
from pyro_vae.plots import canvas
from pyro_vae.runs import files as run_files
from pyro_vae.runs import metrics as run_metrics
from pyro_vae.runs.history_file import read_history, write_history

pytestmark = pytest.mark.filterwarnings("always:.*findings of diagnose for other weights")

TRAIN = (
    "--likelihood gaussian --latent-dim 2 --hidden 8 --batch-size 32 --engine eager "
    "--num-eval-samples 2 --diagnosis-seconds 0"
)


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shelf")
    x = np.random.default_rng(0).normal(size=(60, 4)).astype("float32")
    np.save(folder / "x.npy", x)
    main(f"train {folder}/x.npy --out {folder}/run --epochs 1 {TRAIN}".split())
    config = json.loads((folder / "run/config.json").read_text())
    config["train"]["data"] = "x.npy"
    run_files.write_json(folder / "run/config.json", config)
    return folder


@pytest.fixture
def here(shelf, tmp_path, monkeypatch):
    """A run of one epoch with its report, next to its data."""
    monkeypatch.chdir(shutil.copytree(shelf, tmp_path / "here"))
    return Path.cwd() / "run"


def metrics(run):
    return json.loads((run / "metrics.json").read_text())


def shown(run):
    return (run / "report.html").read_text()


def train_on(run, epochs=3):
    """Train longer in Python, without an evaluation."""
    data = pv.load_data("x.npy")
    pair = pv.load(run)
    torch.manual_seed(0)
    options = {"batch_size": 32, "engine": "eager", "progress": False, "resume": True}
    held = data.validation.x
    pv.fit(pair, data.train.x, validation=held, epochs=epochs, out=run, **options)


# Stale numbers


def test_numbers_and_report_name_their_weights(here):
    model = run_metrics.fingerprint(pv.load(here))
    assert metrics(here)["model"] == model
    assert f'<meta name="model" content="{model}">' in shown(here)
    main(["diagnose", "run", "--budget", "0.1", "--no-report"])
    assert metrics(here)["diagnostics"]["model"] == model
    other = pv.load(here)
    with torch.no_grad():
        next(other.parameters())[0] += 1e-6
    assert run_metrics.fingerprint(other) != model


@pytest.mark.thorough
def test_numbers_of_earlier_weights_are_not_shown(here):
    main(["diagnose", "run", "--budget", "0.1"])
    elbo = f"{metrics(here)['elbo']:.4g}"
    assert elbo in shown(here)
    assert "Can the inference be believed?" in shown(here)
    train_on(here)
    main(["report", "run"])
    page = shown(here)
    assert elbo not in page
    assert "Can the inference be believed?" not in page
    assert "describe other weights" in page
    assert "Run pyro-vae evaluate again" in page
    assert "Run pyro-vae diagnose again" in page
    main(["evaluate", "run", "--num-samples", "2"])
    main(["report", "run"])
    assert f"{metrics(here)['elbo']:.4g}" in shown(here)
    assert "Run pyro-vae evaluate again" not in shown(here)


def test_an_old_report_is_marked_once(here):
    before = shown(here)
    train_on(here)
    train_on(here, epochs=5)
    page = shown(here)
    assert page.count("has changed since this report was written") == 1
    assert page.replace(run_metrics._STALE, "") == before
    main(["report", "run"])
    assert "has changed since" not in shown(here)


def test_the_same_weights_do_not_mark_the_report(here):
    before = shown(here)
    pv.save(pv.load(here), here, json.loads((here / "config.json").read_text()))
    assert shown(here) == before
    other = pv.load(here)
    with torch.no_grad():
        next(other.parameters())[0] += 1
    pv.save(other, here)
    assert "has changed since this report was written" in shown(here)


def test_new_numbers_remove_the_findings_of_earlier_weights(here, capsys):
    main(["diagnose", "run", "--budget", "0.1", "--no-report"])
    main(["evaluate", "run", "--num-samples", "2"])
    assert "diagnostics" in metrics(here)
    train_on(here)
    capsys.readouterr()
    main(["evaluate", "run", "--num-samples", "2"])
    assert "findings of diagnose for other weights" in capsys.readouterr().err
    assert "diagnostics" not in metrics(here)
    assert metrics(here)["model"] == run_metrics.fingerprint(pv.load(here))


def test_resuming_from_the_shell_evaluates_again(here):
    before = metrics(here)
    resume = "train x.npy --out run --resume --epochs 3"
    main(f"{resume} --num-eval-samples 2 --no-report".split())
    after = metrics(here)
    assert after["model"] == run_metrics.fingerprint(pv.load(here)) != before["model"]
    assert after["elbo"] != before["elbo"]
    assert "has changed since this report was written" in shown(here)


def test_metrics_of_0_1_0_are_shown_with_a_remark(here):
    content = metrics(here)
    for name in ("model", "format", "sha256"):
        del content[name]
    (here / "metrics.json").write_text(json.dumps(content))
    main(["report", "run"])
    assert f"{content['elbo']:.4g}" in shown(here)
    assert "do not say on which weights they were measured" in shown(here)


@pytest.mark.thorough
def test_a_report_in_python_describes_the_given_pair(here):
    """metrics.json does not describe a pair that was changed in memory."""
    pair, x = pv.load(here), pv.load_data("x.npy").test.x
    with torch.no_grad():
        next(pair.parameters()).mul_(2)
    pv.write_report(pair, x, run=here)
    assert "describe other weights" in shown(here)
    run_metrics.write_metrics(here, pair, pv.evaluate(pair, x, num_samples=2).as_dict())
    pv.write_report(pair, x, run=here)
    assert "describe other weights" not in shown(here)


# Hostile text

EVIL = "</pre></title><script>alert(1)</script><img src=x onerror=alert(1)>\"'&$\\frac{$\ud800\x00"


class Tags(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.attributes = set(), set()

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}


ALLOWED = {
    *("html", "head", "meta", "title", "style", "body", "h1", "h2", "p", "b", "table", "tr", "td"),
    *("details", "summary", "pre", "span", "img", "code", "ul", "li"),
}


def clean(page):
    tags = Tags()
    tags.feed(page)
    assert tags.tags <= ALLOWED
    assert tags.attributes <= {
        "lang",
        "charset",
        "name",
        "content",
        "alt",
        "src",
        "open",
        "class",
        "width",
    }
    for source in re.findall(r"<img[^>]* src=\"([^\"]*)", page):
        assert source.startswith("data:image/png;base64,")
    return page


FINDINGS = {
    "findings": [{"kind": "trust", "words": EVIL}],
    "worst_data": EVIL,
    "tables": {EVIL: EVIL},
    "pictures": {EVIL: [EVIL, "../../../secret"]},
    "notes": {EVIL: [EVIL]},
    "not_applicable": {EVIL: EVIL},
    "failed": {EVIL: EVIL},
    "left_out": {EVIL: EVIL},
    "summary": EVIL,
}

NUMBERS = {
    "data": EVIL,
    "elbo": EVIL,
    "num_examples": [EVIL],
    "log_likelihood": {EVIL: EVIL},
    "active_units": {EVIL: EVIL},
    "kl_by_unit": {EVIL: [0.1, 0.2], "z": [0.3, 0.1]},
}


def test_text_of_metrics_is_escaped(here):
    (here / "metrics.json").write_text(json.dumps(NUMBERS | {"diagnostics": FINDINGS}))
    main(["report", "run"])
    page = clean(shown(here))
    assert "&lt;script&gt;" in page


def test_text_of_the_configuration_and_the_folder_name_is_escaped(here):
    config = json.loads((here / "config.json").read_text())
    config["train"] |= {"data": EVIL, "note": EVIL}
    config |= {EVIL: [EVIL], "versions": {EVIL: EVIL}}
    run_files.write_json(here / "config.json", config)
    pair, x = pv.load(here), pv.load_data("x.npy").test.x
    here = here.rename(here.with_name("<b onclick=alert(1)>run"))
    pv.write_report(pair, x, run=here)
    clean(shown(here))
    config["pair"]["class"] = f"evil:{EVIL}"
    run_files.write_json(here / "config.json", config)
    pv.write_report(pair, x, run=here)
    clean(shown(here))


def test_columns_of_the_history_are_escaped(here):
    row = {name: values[0] for name, values in read_history(here / "history.csv").items()}
    row |= {"kl_" + EVIL.replace("\ud800", "").replace("\x00", ""): 1.0}
    write_history(here / "history.csv", [row])
    main(["report", "run"])
    clean(shown(here))


class Named(nn.Module):
    """A pair whose latent site has a given name."""

    def __init__(self, name):
        super().__init__()
        self.site = name
        self.encoder, self.decoder = nn.Linear(4, 4), nn.Linear(2, 4)

    def model(self, x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample(self.site, dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), 1.0).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x), dim=-1):
            loc, scale = self.encoder(x).chunk(2, -1)
            pyro.sample(self.site, dist.Normal(loc, scale.exp()).to_event(1))

    def template(self, n):
        return (torch.zeros(n, 4),)


@pytest.mark.sample(1)
@pytest.mark.parametrize("name", ["$\\frac{$", "$x$", "<script>alert(1)</script>", "\n", "$"])
def test_names_of_sites_are_escaped_in_page_and_pictures(name, tmp_path):
    pair = Named(name)
    x = torch.randn(20, 4, generator=torch.Generator().manual_seed(0))
    pv.save(pair, tmp_path)
    run_metrics.write_metrics(tmp_path, pair, pv.evaluate(pair, x, num_samples=2).as_dict())
    pv.write_report(pair, x, run=tmp_path, labels=torch.arange(20) % 3)
    clean((tmp_path / "report.html").read_text())
    assert set(encode(pair, x)) == {name}


def test_a_picture_of_another_folder_is_not_shown(here):
    secret = here.parent / "secret.png"
    secret.write_bytes(png(canvas.grid([("", torch.zeros(1, 1, 2, 2))], "secret")))
    (here / "figures" / "diagnosis-..").mkdir()
    found = FINDINGS | {"pictures": {EVIL: ["../../../secret"]}}
    (here / "metrics.json").write_text(json.dumps({"diagnostics": found}))
    main(["report", "run"])
    import base64

    assert base64.b64encode(secret.read_bytes()).decode() not in clean(shown(here))


WRONG = {
    "a list": [1],
    "units that are not lists": {"kl_by_unit": {"z": "many"}},
    "units in words": {"kl_by_unit": {"z": ["a", "b"]}},
    "units as a list": {"kl_by_unit": [1, 2]},
    "active units as text": {"active_units": "all"},
    "findings as text": {"diagnostics": "fine"},
    "findings without parts": {"diagnostics": {"model": None}},
    "an invalid finding": {"diagnostics": FINDINGS | {"findings": ["fine"]}},
    "a finding without words": {"diagnostics": FINDINGS | {"findings": [{"kind": "trust"}]}},
    "invalid tables": {"diagnostics": FINDINGS | {"tables": [1]}},
}


@pytest.mark.parametrize("content", WRONG.values(), ids=WRONG)
def test_metrics_of_another_format_give_an_error_in_one_line(content, here, capsys):
    (here / "metrics.json").write_text(json.dumps(content))
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main(["report", "run"])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "metrics.json" in error


@pytest.mark.parametrize("given", [None, 3, ["digits"], {"data": 5}, {"data_dir": ["a"]}])
def test_options_of_another_format_give_an_error_in_one_line(given, here, capsys):
    config = json.loads((here / "config.json").read_text())
    config["train"] = given
    run_files.write_json(here / "config.json", config)
    for command in ("evaluate", "report", "sample"):
        capsys.readouterr()
        if (given, command) == ({"data_dir": ["a"]}, "sample"):
            continue
        with pytest.raises(SystemExit) as stopped:
            main([command, "run"])
        assert stopped.value.code == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert "run" in error


# Generators


def states():
    numpy = np.random.get_state()
    numbers = (*numpy[:1], numpy[1].tolist(), *numpy[2:])
    return torch.get_rng_state().tolist(), numbers, random.getstate()


class Drawing(nn.Module):
    """A pair whose constructor draws from every generator."""

    def __init__(self, width=2):
        super().__init__()
        self.width = width
        self.layer = nn.Linear(width, 2)
        self.number = float(np.random.rand()) + random.random()


USES = {
    "load": lambda run: pv.load(run),
    "load a class": lambda run: pv.load(run.parent / "own", Drawing),
    "save": lambda run: pv.save(pv.load(run), run.parent / "copy"),
    "load_data": lambda run: pv.load_data("digits"),
    "shapes": lambda run: pv.load_data("shapes"),
    "write_report": lambda run: pv.write_report(
        pv.load(run), pv.load_data("x.npy").test.x, run=run
    ),
    "a load that fails": lambda run: refused_load(run),
}


def refused_load(run):
    with pytest.raises(UsageError, match="pass the class"):
        pv.load(run.parent / "own")


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_generators_do_not_change(use, here):
    pv.save(Drawing(), here.parent / "own")
    torch.manual_seed(5), np.random.seed(5), random.seed(5)
    before = states()
    use(here)
    assert states() == before


def test_loading_does_not_depend_on_the_generators(here):
    first = pv.load(here).state_dict()
    torch.rand(3)
    assert all(torch.equal(v, first[k]) for k, v in pv.load(here).state_dict().items())
