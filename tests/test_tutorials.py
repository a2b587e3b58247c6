"""The code of each tutorial runs, short, and its statements of what to expect are true.

The last cells of a tutorial assert what the page promises. Here the first of these statements hold
for fewer images, epochs, draws and seconds. `make tutorials` checks all, with the sizes as written.
"""

import re
from pathlib import Path

import jupytext
import matplotlib
import pytest
from small_programs import small

import pyro_vae as pv

TUTORIALS = Path(__file__).parent.parent / "docs" / "tutorials"
SHORT = {
    "choosing": {"EPOCHS": 3, "REFIT_EPOCHS": 1, "NUM_SAMPLES": 21, "NUM_DRAWS": 5},
    "counts": {"EPOCHS": 6, "NUM_SAMPLES": 21},
    "first-model": {
        "EPOCHS": 8,
        "BUDGET": 1,
        "NUM_SAMPLES": 21,
        "REFIT_EPOCHS": 2,
        "DRAWN": 500,
        "NUM_REFINED": 4,
    },
    "holes": {"EPOCHS": 40, "NUM_SAMPLES": 50},
    "own-pair": {"EPOCHS": 40, "BUDGET": 3, "STEPS": 100},
    "repeated-measures": {"EPOCHS": 200, "NUM_DRAWS": 100},
}


def shortened(code, values):
    """The code with other values of its constants, each of which it must define once."""
    for name, value in values.items():
        code, found = re.subn(rf"(?m)^{name} = \d+", f"{name} = {value}", code)
        assert found == 1, name
    return code


@pytest.mark.thorough
@pytest.mark.parametrize("name", SHORT)
@pytest.mark.filterwarnings("ignore")
def test_the_statements_of_a_tutorial_are_true(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pv, "load_data", small(pv.load_data))
    matplotlib.use("agg")
    code = (TUTORIALS / f"{name}.py").read_text()
    code, *_ = code.split("# The others need the sizes above.")
    assert re.search(r"(?m)^assert ", code)
    exec(compile(shortened(code, SHORT[name]), name, "exec"), {"__name__": "tutorial"})


def test_every_tutorial_is_run():
    assert sorted(path.stem for path in TUTORIALS.glob("*.py")) == sorted(SHORT)


@pytest.mark.parametrize("name", SHORT)
def test_a_notebook_is_its_script_and_has_all_outputs(name):
    script, notebook = (jupytext.read(TUTORIALS / f"{name}.{kind}") for kind in ("py", "ipynb"))
    advice = "run `make tutorials`"
    assert [cell.source for cell in notebook.cells] == [cell.source for cell in script.cells], (
        advice
    )
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1)), advice
    kinds = {output.output_type for cell in code for output in cell.outputs}
    assert {"stream", "display_data"} <= kinds <= {"stream", "display_data", "execute_result"}


def test_a_figure_shows_itself_where_pyplot_was_never_used():
    """IPython asks an object for `_repr_png_`, unless pyplot has told it how to show figures."""
    pair = pv.VAE.mlp((4,), latent_dim=2, hidden=())
    x = pv.sample(pair, 8)
    history = pv.fit(pair, x, epochs=2, engine="eager", progress=False)
    assert history.plot()._repr_png_().startswith(b"\x89PNG")
