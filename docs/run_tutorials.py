"""Run the tutorials: each script of docs/tutorials becomes an executed notebook beside it.

    python docs/run_tutorials.py [first-model ...]

A notebook is written only if all its cells ran, and their statements of what to expect were true.
"""

import resource
import sys
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient

TUTORIALS = Path(__file__).parent / "tutorials"


def run(script: Path) -> None:
    """Execute a script in percent format, and write it with its outputs as a notebook."""
    notebook = jupytext.read(script)
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3"}
    NotebookClient(notebook, timeout=None).execute()
    for i, cell in enumerate(notebook.cells):
        cell["id"] = f"{script.stem}-{i}"  # random ones would change with each run
        cell.metadata.pop("execution", None)  # the times of day
    notebook.metadata.pop("language_info", None)
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
