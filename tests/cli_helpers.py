"""Helpers of the tests of the command line."""

import json
import math

from pyro_vae.cli.main import main
from pyro_vae.diagnostics import diagnosis

PNG = b"\x89PNG\r\n\x1a\n"

SHORT = "--epochs 2 --num-eval-samples 5 --engine eager --diagnosis-seconds 0"

QUICK = f"{SHORT} --latent-dim 2 --hidden 16"


def command(line, **paths):
    """Run a command. Names in braces stand for paths."""
    main([word.format(**paths) for word in line.split()])


def train(folder, options=""):
    command(f"train digits --out {{run}} {QUICK} {options}", run=folder)
    return folder


def read(path):
    return json.loads(path.read_text())


def is_png(path):
    return path.read_bytes().startswith(PNG)


def only_smallest(monkeypatch, *studies):
    """Let `diagnose` run these studies, at their smallest size whatever the time: no chance."""

    def smallest(make):
        def made(bench):
            study = make(bench)
            return study._replace(rungs=[study.rungs[0]._replace(cost=-math.inf)])

        return made

    monkeypatch.setattr(diagnosis, "STUDIES", [smallest(study) for study in studies])
