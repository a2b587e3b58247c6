"""The shell commands of README.md, as they are written; its Python blocks run in test_docs.py."""

import json
import re
import shlex
from pathlib import Path

import pytest

from pyro_vae.cli.main import main
from pyro_vae.diagnostics import diagnosis

ROOT = Path(__file__).parent.parent
BLOCKS = re.findall(r"^```sh\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)
LINES = [shlex.split(line, comments=True) for block in BLOCKS for line in block.splitlines()]
COMMANDS = [words[1:] for words in LINES if words[0] == "pyro-vae"]


def test_the_other_lines_are_those_of_ci():
    """`pip install` is tried by `make try-package`, and the targets are those of .ci/run."""
    ci = (ROOT / ".ci" / "run").read_text().splitlines()
    others = [words for words in LINES if words[0] != "pyro-vae"]
    targets = [words[1] for words in others if words[0] == "make"]
    assert targets == ["train", "test"]
    assert all(f"make {target}" in ci for target in targets)
    rest = [words for words in others if words[0] != "make"]
    assert rest == [["pip", "install", "pyro-vae"], [".", ".venv/bin/activate"]]


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
def test_the_commands_end_with_a_model_that_has_not_collapsed(tmp_path, monkeypatch, capsys):
    """They run in full, but for the time of a diagnosis, which is a second each."""
    shorter = diagnosis.diagnose
    monkeypatch.setattr(
        diagnosis, "diagnose", lambda *args, **more: shorter(*args, **more | {"budget": 1.0})
    )
    monkeypatch.chdir(tmp_path)
    assert COMMANDS[0][:2] == ["train", "digits"]
    main(COMMANDS[0])
    active, units = map(
        int, re.search(r"active units +(\d+) of (\d+)", capsys.readouterr().out).groups()
    )
    assert units == 16
    assert active >= 4
    for words in COMMANDS[1:]:
        main(words)
    metrics = json.loads((tmp_path / "runs/first/metrics.json").read_text())
    assert metrics["diagnostics"]["findings"]
    assert (tmp_path / "runs/first/samples.npy").exists()
    assert (tmp_path / "runs/first/report.html").exists()
