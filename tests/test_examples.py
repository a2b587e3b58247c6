"""Every example runs, small; one that is not listed here fails a test."""

import runpy
import sys
from pathlib import Path

import pytest
from small_programs import shrink

EXAMPLES = Path(__file__).parent.parent / "examples"
RUNS = {
    "article.py": ["--epochs", "1", "--out", "OUT"],
    "autoencoder_vae_gan.py": ["--epochs", "2", "--out", "OUT"],
    "bayesian_decoder.py": ["--steps", "4", "--num-samples", "5", "--out", "OUT"],
    "completion.py": ["--epochs", "2", "--out", "OUT"],
    "conditional.py": ["--epochs", "2"],
    "counts.py": ["--epochs", "1"],
    "disentanglement.py": ["--epochs", "1"],
    "digits.py": ["--epochs", "2", "--out", "OUT"],
    "guide_swap.py": ["--epochs", "1", "--steps", "2", "--num-samples", "5", "--out", "OUT"],
    "hierarchical.py": ["--epochs", "2", "--out", "OUT"],
    "sequence.py": ["--epochs", "1", "--out", "OUT"],
    "structured_guide.py": ["--epochs", "2", "--num-samples", "21", "--out", "OUT.png"],
    "text.py": ["--epochs", "2", "--rows", "64"],
    "mixture.py": ["--epochs", "2"],
    "multilevel.py": ["--epochs", "1", "--groups", "120"],
    "not_at_random.py": ["--epochs", "1", "--num-samples", "21"],
    "own_pair.py": ["--epochs", "2"],
    "trust.py": ["--epochs", "1", "--num-samples", "42", "--num", "4", "--out", "OUT"],
    "semisupervised.py": ["--epochs", "2"],
}


SLOW = (
    "article.py",
    "autoencoder_vae_gan.py",
    "bayesian_decoder.py",
    "guide_swap.py",
    "text.py",
    "trust.py",
)
CASES = [pytest.param(n, marks=[pytest.mark.thorough] if n in SLOW else []) for n in RUNS]


def test_every_example_is_run():
    assert sorted(path.name for path in EXAMPLES.glob("*.py")) == sorted(RUNS)


@pytest.mark.parametrize("name", CASES)
def test_example(name, tmp_path, monkeypatch, capsys):
    words = [word.replace("OUT", str(tmp_path / "run")) for word in RUNS[name]]
    monkeypatch.chdir(tmp_path)
    shrink(monkeypatch)
    monkeypatch.setattr(sys, "argv", [name, *words])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    assert "log p(x)" in capsys.readouterr().out
