"""Run the tutorials: each script of docs/tutorials becomes an executed notebook beside it.

    python docs/run_tutorials.py [first-model ...]

A notebook is written only if all its cells ran, and their statements of what to expect were true.
"""

import base64
import io
import resource
import sys
from pathlib import Path
from typing import Any

import jupytext
import nbformat
from nbclient import NotebookClient
from PIL import Image

TUTORIALS = Path(__file__).parent / "tutorials"


def shrink(output: Any) -> None:
    """Give a figure at most 128 colors, so that the repository stays small."""
    if figure := output.get("data", {}).get("image/png"):
        buffer = io.BytesIO()
        image = Image.open(io.BytesIO(base64.b64decode(figure))).convert("RGB")
        image.quantize(128).save(buffer, "png", optimize=True)
        output.data["image/png"] = base64.b64encode(buffer.getvalue()).decode()


def run(script: Path) -> None:
    """Execute a script in percent format, and write it with its outputs as a notebook."""
    notebook = jupytext.read(script)
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3"}
    NotebookClient(notebook, timeout=None).execute()
    for i, cell in enumerate(notebook.cells):
        if cell.cell_type == "code":
            # Warnings of other libraries depend on what else is installed.
            cell.outputs = [one for one in cell.outputs if one.get("name") != "stderr"]
            for output in cell.outputs:
                shrink(output)
        cell["id"] = f"{script.stem}-{i}"  # random ones would change with each run
        cell.metadata.pop("execution", None)  # the times of day
    notebook.metadata["language_info"] = {"name": "python", "pygments_lexer": "python"}
    nbformat.write(notebook, script.with_suffix(".ipynb"))


def main() -> None:
    names = sys.argv[1:] or sorted(path.stem for path in TUTORIALS.glob("*.py"))
    for name in names:
        before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
        run(TUTORIALS / f"{name}.py")
        seconds = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before
        print(f"{name:<24}{seconds:.0f} s of processor time")


if __name__ == "__main__":
    main()
