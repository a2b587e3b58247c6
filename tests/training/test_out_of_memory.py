"""A lack of memory ends in one line with the batch size that was used and a smaller one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from memory_program import SCENARIOS, Wide

import pyro_vae as pv
from pyro_vae.errors import UsageError
from pyro_vae.pairs.memory import in_words, lack_of_memory
from pyro_vae.runs import files as run_files

PROGRAM = Path(__file__).with_name("memory_program.py")

NEW_RUN = ", in a new run, because a resumed run keeps its {}batch{}size"

LINES = {
    "fit": "batch_size was 128; try 64",
    "fit folder": f"128; try 64{NEW_RUN.format('', '_')}; run keeps its last checkpoint",
    "fit small": "",
    "validation": "batch_size was 20; try 10",
    "evaluate": "batch_size was 500; try 250",
    "evaluate small": "",
    "log_likelihood": "batch_size was 200; try 100",
    "log_likelihood one": "",
    "train": f"--batch-size was 256; try 128{NEW_RUN.format('--', '-')}",
    "evaluate command": "--batch-size was 500; try 250",
    "evaluate command small": "",
    "sample command": "fewer rows or a smaller pair need less",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("memory")


@pytest.fixture(scope="module")
def found(folder):
    """The outcome of each scenario, in a process whose address space is really limited."""
    if not sys.platform.startswith("linux"):
        pytest.skip("limits and reads the address space as on Linux")
    paths = os.pathsep.join([str(PROGRAM.parents[2]), os.environ.get("PYTHONPATH", "")])
    made = subprocess.run(
        [sys.executable, str(PROGRAM)],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    lines = [json.loads(line) for line in made.stdout.splitlines() if line.startswith('["')]
    assert len(lines) == len(SCENARIOS), made.stderr[-2000:]
    return {name: (kind, message) for name, kind, message in lines}


@pytest.mark.thorough
@pytest.mark.parametrize("name", SCENARIOS)
def test_the_line_names_a_smaller_batch_size(name, found):
    kind, message = found[name]
    if not LINES[name]:
        assert (kind, message) == ("", "")
        return
    assert kind == ("SystemExit" if "command" in name or name == "train" else "OutOfMemoryError")
    assert "the memory does not suffice (" in message
    assert message.endswith(LINES[name])
    assert "\n" not in message


def test_the_last_checkpoint_stays(found, folder):
    run = folder / "run"
    assert len(run_files.read_checkpoint(run)["epochs"]) == 2
    assert not [path for path in os.listdir(run) if path.endswith(".part") or path == ".lock"]
    pv.load(run, Wide())


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has"),
            "(2.5 GiB more were asked for)",
        ),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"), "suffice"),
        (MemoryError(), "suffice"),
        (MemoryError("Unable to allocate 30.5 MiB for an array"), "(30.5 MiB more"),
    ],
)
def test_kinds_of_errors_and_their_causes(error, words):
    assert words in in_words(error)
    with pytest.raises(UsageError) as outer:
        raise UsageError("the model failed") from error
    assert lack_of_memory(outer.value) is error


@pytest.mark.parametrize("error", [RuntimeError("sizes do not match"), ValueError("out of memory")])
def test_other_errors_are_not_about_memory(error):
    assert lack_of_memory(error) is None


@pytest.mark.parametrize("tool", [pv.evaluate, pv.log_likelihood])
def test_batch_size_must_be_positive(tool):
    with pytest.raises(UsageError, match="batch_size must be at least 1, got 0"):
        tool(Wide(), torch.zeros(4, 4), batch_size=0)
