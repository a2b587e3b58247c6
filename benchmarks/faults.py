"""Faults of the machine and of files: is a run ever lost, mixed up, or loaded with wrong numbers?

    python benchmarks/faults.py [--trials kills damage ...] [--kills 60] [--fuzz-seconds 900]
    python benchmarks/faults.py --table

Each attempt is recorded in --out (JSON) as soon as it is finished, so the same command continues
after a break. `--table` prints the table of docs/how-to/reliability-of-runs.md from this file.

kills       a process is killed (SIGKILL) at random instants, and every sixth one inside a write;
            then the run is resumed and compared, bit by bit, with an uninterrupted run
damage      each file of a run is cut at random lengths or a bit is flipped; then it is read
hostile     pickles, huge declared shapes, archives that expand without bound, paths in names
fuzz        random changes of files, of config.json, of --config and of options
full-disk   a run is resumed, saved, exported and used on a disk with a few KB left
calls       many calls of each tool; the growth of the resident memory
epochs      20,000 epochs with a checkpoint after each; the processor time by epoch over the run

Attempts run in forked processes with one thread. An attempt that takes longer than a minute counts
as a hang; the time that it waits for a core, because other processes run, does not count. The disk
of `full-disk` is a small tmpfs, which needs the right to mount; without it, the size of files is
limited instead.
"""

import argparse
import contextlib
import gc
import io
import json
import os
import pickle
import random
import resource
import shutil
import signal
import statistics
import struct
import subprocess
import sys
import tempfile
import time
import warnings
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

import numpy as np
import pandas as pd
import torch

import pyro_vae as pv
from pyro_vae.cli.main import main as command_line
from pyro_vae.data import disk
from pyro_vae.runs import files as run_files
from pyro_vae.runs import folder as run_folder
from pyro_vae.runs import held_out_rows
from pyro_vae.runs.metrics import read_metrics

HANG_SECONDS = 60.0

MOST_MEMORY = 2 * 2**30
"""More memory than before an attempt, in bytes, that counts as a fault."""


class Record:
    """The outcomes of all attempts, kept in a JSON file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.found: dict[str, dict[str, Any]] = (
            json.loads(path.read_text()) if path.exists() else {}
        )
        self.saved = time.monotonic()

    def attempt(self, trial: str, key: str, work: Callable[[], Any]) -> None:
        """Run an attempt, unless it is recorded already."""
        known = self.found.setdefault(trial, {})
        if key not in known:
            known[key] = work()
            if known[key] != "ok" and not isinstance(known[key], dict):
                print(f"{trial} {key}: {known[key]}", flush=True)
            if time.monotonic() - self.saved > 1:
                self.save()

    def save(self) -> None:
        self.found["dates"] = self.found.get("dates", {}) | {"last": date.today().isoformat()}
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps(self.found, indent=1))
        part.replace(self.path)
        self.saved = time.monotonic()


# Attempts in processes of their own


def child(work: Callable[[], Any], seconds: float = HANG_SECONDS, at: float | None = None) -> str:
    """Run in a forked process; return "done", "refused: LINE", "killed", or what went wrong.

    Arguments:
        at: kill the process after so many seconds.
    """
    read, out = os.pipe()
    process = os.fork()
    if process == 0:
        os.close(read)
        _report(out, work)
    os.close(out)
    left, now, waited = seconds if at is None else at, time.monotonic(), 0.0
    done, status, used = os.wait4(process, os.WNOHANG)
    while not done and left > 0:
        time.sleep(min(0.002, left))
        done, status, used = os.wait4(process, os.WNOHANG)
        left -= min(time.monotonic() - now, 0.05)  # a pause of all processes does not count
        now = time.monotonic()
        if at is None:
            waits = waits_for_a_core(process)
            left, waited = min(seconds, left + waits - waited), waits
    if not done:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
    with os.fdopen(read, "rb") as words:
        said = words.read().decode(errors="replace")
    if not done:
        return "killed" if at is not None else "hang"
    if os.WIFSIGNALED(status):
        return "killed" if os.WTERMSIG(status) == signal.SIGKILL else f"signal {status}"
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if 1024 * (used.ru_maxrss - before) > MOST_MEMORY:
        return f"memory: {used.ru_maxrss / 2**20:.1f} GiB"
    return said or f"no answer, status {status}"


def waits_for_a_core(process: int) -> float:
    """How many seconds a process was ready to run while others had the cores; else 0.

    On a busy machine a process of low priority may take minutes for seconds of work, and that is
    no hang.
    """
    try:
        return int(Path(f"/proc/{process}/schedstat").read_text().split()[1]) / 1e9
    except (OSError, IndexError):
        return 0.0


def _report(out: int, work: Callable[[], Any]) -> None:
    """Run, write the outcome into a pipe, and end the process."""
    words, errors = "done", io.StringIO()
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    sys.stderr = errors
    try:
        said = work()
        words = said if isinstance(said, str) else "done"
    except pv.UsageError as error:
        words = f"refused: {error}"
    except SystemExit as error:
        lines = [line for line in errors.getvalue().splitlines() if line.startswith("pyro-vae")]
        last = lines[-1] if lines else errors.getvalue()[-300:]
        words = f"refused: {last}" if error.code == 2 else f"status {error.code}: {last}"
    except BaseException as error:
        place = error.__traceback__
        while place is not None and place.tb_next is not None:
            place = place.tb_next
        line = place and f"{place.tb_frame.f_code.co_filename}:{place.tb_lineno}"
        words = f"traceback: {type(error).__name__}: {error} ({line})"
    os.write(out, words.encode(errors="replace")[:30000])
    os._exit(0)


def is_refusal(said: str) -> bool:
    """Whether an attempt was refused in one line."""
    return said.startswith("refused: ") and "\n" not in said


# Kills


DATA = torch.rand(48, 6, generator=torch.Generator().manual_seed(0))

JOBS: list[dict[str, Any]] = [
    {"engine": engine, "beta": beta, "schedule": schedule, "patience": patience, "binarize": how}
    for engine, beta, schedule, patience, how in [
        ("eager", "warm-up", "none", None, "dynamic"),
        ("eager", "none", "cosine", 3, "fixed"),
        ("eager", "cycles", "linear", None, "dynamic"),
        ("traced", "warm-up", "cosine", None, "dynamic"),
        ("traced", "none", "none", 3, "dynamic"),
        ("traced", "cycles", "linear", None, "fixed"),
        ("traced", "warm-up", "linear", 3, "fixed"),
        ("compiled", "warm-up", "cosine", 3, "dynamic"),
        ("traced", "none", "linear", None, "dynamic"),
        ("auto", "cycles", "none", None, "dynamic"),
    ]
]
"""Every engine, warm-up, schedule, early stopping and binarization."""

EPOCHS = 8


def train(job: dict[str, Any], run: Path, **options: Any) -> None:
    """Fit a small pair by a job, in a run folder."""
    torch.manual_seed(0)
    vae = pv.VAE.mlp((6,), latent_dim=2, hidden=(8,))
    beta = {"none": 1.0, "warm-up": pv.LinearSchedule(4.0), "cycles": pv.CyclicalSchedule(3.0)}
    rates = {
        "none": None,
        "cosine": pv.CosineSchedule(EPOCHS),
        "linear": pv.LinearSchedule(EPOCHS, 1.0, 0.1),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pv.fit(
            *(vae, DATA[:32]),
            validation=DATA[32:],
            epochs=EPOCHS,
            batch_size=8,
            learning_rate=0.02,
            beta=beta[job["beta"]],
            learning_rate_schedule=rates[job["schedule"]],
            patience=job["patience"],
            binarize=job["binarize"],
            engine=job["engine"],
            checkpoint_seconds=0.0,
            out=run,
            progress=False,
            **options,
        )


def apart(
    job: int, run: Path, resume: bool = False, inside: int = 0, at: float | None = None
) -> str:
    """Train in a process that was not forked, which Inductor needs, like `child`."""
    words = [sys.executable, __file__, "--job", str(job), str(run), str(int(resume)), str(inside)]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.readline()  # the imports do not count
    try:
        said = process.communicate(timeout=600 if at is None else at)[0]
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return "killed"
    return "killed" if process.returncode == -signal.SIGKILL else said.strip() or "no answer"


def job_apart(job: int, run: Path, resume: bool, inside: int) -> None:
    """The process of `apart`."""
    print("imported", flush=True)
    if inside:
        kill_inside_writes(inside)
    train(JOBS[job], run, **{"resume": True} if resume else {})
    print("done", flush=True)


def result(run: Path) -> tuple[Any, ...]:
    """Everything that a run ends with, except its times."""
    state = run_files.read_checkpoint(run)
    epochs = [[*epoch[:9], *epoch[10:]] for epoch in state["epochs"]]
    kept = [state["pair"], state["best"], state["optimizer"], state["generators"]["torch"], epochs]
    return (run / "model.safetensors").read_bytes(), *map(str, kept), state["best_epoch"]


def kill_inside_writes(number: int) -> None:
    """Kill this process at the n-th flush or renaming."""
    count = 0

    def counted(name: str) -> Callable[..., Any]:
        honest = getattr(os, name)

        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal count
            count += 1
            if count == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return honest(*arguments, **options)

        return call

    for name in ("fsync", "replace"):
        setattr(os, name, counted(name))


def kills(record: Record, folder: Path, arguments: argparse.Namespace) -> None:
    wholes: dict[int, tuple[tuple[Any, ...], float]] = {}
    for number in range(arguments.kills):
        at = number % len(JOBS)
        if str(number) in record.found.get("kills", {}):
            continue
        if at not in wholes:
            run, seconds = folder / f"whole-{at}", 0.0
            for _ in range(2):  # the second time, the graph of Inductor is in its cache
                shutil.rmtree(run, ignore_errors=True)
                began = time.monotonic()
                said = trained(at, run)
                seconds = time.monotonic() - began
                assert said == "done", said
            wholes[at] = result(run), seconds
        inside = number % 6 == 5
        work = partial(kill, at, folder / f"killed-{number}", wholes[at], number, inside)
        record.attempt("kills", str(number), work)


def trained(
    job: int, run: Path, resume: bool = False, inside: int = 0, at: float | None = None
) -> str:
    """Train in another process; kill it inside the n-th write, or after so many seconds."""
    if JOBS[job]["engine"] == "compiled":
        return apart(job, run, resume, inside, at)

    def work() -> None:
        if inside:
            kill_inside_writes(inside)
        train(JOBS[job], run, **{"resume": True} if resume else {})

    return child(work, seconds=600, at=at)


def kill(job: int, run: Path, whole: tuple[tuple[Any, ...], float], seed: int, inside: bool) -> Any:
    """Kill a run once, resume it, and compare it with the uninterrupted run."""
    draw = random.Random(seed)
    if inside:  # each checkpoint, with model and history, has about ten flushes and renamings
        said = trained(job, run, inside=draw.randint(8, 10 * EPOCHS))
    else:
        said = trained(job, run, at=draw.uniform(0.0, whole[1]))
    if said not in ("killed", "done"):
        return said
    begun = (run / "config.json").exists()
    again = trained(job, run, resume=begun)
    if again != "done":
        return f"not resumed: {again}"
    same = result(run) == whole[0]
    shutil.rmtree(run)
    return {"was": said, "begun": begun, "inside": inside, "identical": same}


# Damaged files


def made_run(folder: Path) -> Path:
    """A run with every file that is read again; it is a run of the command line on a table."""
    run, table = folder / "run", folder / "table.csv"
    if not (run / "report.html").exists():
        draw = np.random.default_rng(0)
        rows = [
            f"{a:.3f},{b:.3f},{c}"
            for a, b, c in zip(
                draw.normal(size=60),
                draw.normal(size=60),
                draw.choice(list("uvw"), 60),
                strict=True,
            )
        ]
        table.write_text("\n".join(["a,b,c", *rows]) + "\n")
        words = ["train", str(table), "--out", str(run), "--epochs", "3", "--latent-dim", "2"]
        words += ["--hidden", "8", "--num-eval-samples", "5", "--diagnosis-seconds", "0"]
        words += ["--checkpoint-seconds", "0", "--engine", "eager", "--overwrite"]
        said = child(partial(command_line, words), seconds=600)
        assert said == "done", said
    return run


def _read_rows(run: Path) -> None:
    held_out_rows.count_seen(run, torch.zeros(3, 3))


def _read_schema(run: Path) -> None:
    from pyro_vae.data.schema import stored_schema

    stored_schema(run / "schema.toml")


def _read_history(run: Path) -> None:
    from pyro_vae.runs.history_file import read_history

    read_history(run / "history.csv")


def _read_older(run: Path) -> None:
    (run / "checkpoint.pt").unlink(missing_ok=True)
    run_files.read_checkpoint(run)


READERS: dict[str, Callable[[Path], Any]] = {
    "config.json": pv.load,
    "model.safetensors": pv.load,
    "checkpoint.pt": run_files.read_checkpoint,
    "checkpoint-older.pt": _read_older,
    "rows.safetensors": _read_rows,
    "history.csv": _read_history,
    "metrics.json": read_metrics,
    "schema.toml": _read_schema,
}
"""The function that reads each file of a run."""


def verdict(name: str, run: Path) -> str:
    """Read a damaged file: "ok" if it was refused in one line, or replaced by the older one."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            READERS[name](run)
        except pv.UsageError as error:
            return "ok" if "\n" not in str(error) else f"several lines: {error}"
        except Exception as error:
            return f"traceback: {type(error).__name__}: {error}"
    fell_back = any("checkpoint-older.pt" in str(warning.message) for warning in caught)
    return "ok" if fell_back else "loaded"


def damage(record: Record, folder: Path, arguments: argparse.Namespace) -> None:
    sound = made_run(folder)
    for name in READERS:
        for kind in ("cut", "flip"):
            for number in range(arguments.damages):
                record.attempt(
                    "damage",
                    f"{name} {kind} {number}",
                    partial(_damaged, sound, folder / "damaged", name, kind, number),
                )


def _damaged(sound: Path, run: Path, name: str, kind: str, number: int) -> str:
    shutil.rmtree(run, ignore_errors=True)
    shutil.copytree(sound, run)
    content, draw = bytearray((sound / name).read_bytes()), random.Random(f"{name} {number}")
    if kind == "cut":
        content = content[: draw.randrange(len(content))]
    else:
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    (run / name).write_bytes(content)
    said = verdict(name, run)
    return said


# Hostile files


class Touch:
    """An object whose unpickling creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


def bomb(path: Path, member: str = "x.npy", header: bytes = b"") -> None:
    """A zip archive of 64 MB that expands to 64 GiB of zeros."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    first = packer.compress(header) + packer.flush(zlib.Z_FULL_FLUSH)
    block = packer.compress(bytes(2**26)) + packer.flush(zlib.Z_FULL_FLUSH)
    size, times = len(header) + 2**36, 2**10
    body = first + block * times + b"\x03\x00"
    name = member.encode()
    extra = struct.pack("<HHQQ", 1, 16, size, len(body))
    fields = struct.pack("<HHHHHIIIHH", 45, 0, 8, 0, 33, 0, 2**32 - 1, 2**32 - 1, len(name), 20)
    local = b"PK\3\4" + fields + name + extra
    more = struct.pack("<HHHII", 0, 0, 0, 0, 0)
    central = b"PK\1\2" + struct.pack("<H", 45) + fields + more + name + extra
    end = b"PK\5\6" + struct.pack("<HHHHIIH", 0, 0, 1, 1, len(central), len(local) + len(body), 0)
    path.write_bytes(local + body + central + end)


def huge_array(path: Path, shape: str = "(1000000, 1000000)") -> bytes:
    words = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    content = b"\x93NUMPY\x01\x00" + struct.pack("<H", 118) + words.encode()
    path.write_bytes(content)
    return content


def huge_tensors(path: Path) -> None:
    header = json.dumps(
        {"w": {"dtype": "F32", "shape": [2**20, 2**20], "data_offsets": [0, 2**42]}}
    )
    path.write_bytes(struct.pack("<Q", len(header)) + header.encode())


def only_checkpoint(run: Path) -> Any:
    """Read a checkpoint that has no older one to fall back on."""
    (run / "checkpoint-older.pt").unlink()
    return run_files.read_checkpoint(run)


def hostile(record: Record, folder: Path, arguments: argparse.Namespace) -> None:
    sound, marker = made_run(folder), folder / "executed"
    place = folder / "hostile"

    def attempt(key: str, prepare: Callable[[Path], Any], read: Callable[[Path], Any]) -> None:
        def work() -> str:
            shutil.rmtree(place, ignore_errors=True)
            shutil.copytree(sound, place)
            prepare(place)
            outside = set(os.listdir(folder))
            said = child(lambda: read(place))
            if marker.exists() or set(os.listdir(folder)) != outside:
                marker.unlink(missing_ok=True)
                return f"wrote or executed something: {said}"
            return "ok" if is_refusal(said) else said

        record.attempt("hostile", key, work)

    for name, read in READERS.items():
        if name == "checkpoint.pt":  # without an older one to fall back on
            read = only_checkpoint
        code = pickle.dumps(Touch(marker))
        attempt(
            f"pickle {name}", lambda run, name=name, code=code: (run / name).write_bytes(code), read
        )
        legacy = io.BytesIO()
        torch.save(Touch(marker), legacy)
        attempt(
            f"torch pickle {name}",
            lambda run, name=name, of=legacy: (run / name).write_bytes(of.getvalue()),
            read,
        )
        attempt(
            f"huge json {name}", lambda run, name=name: (run / name).write_bytes(b"[" * 2**20), read
        )
        attempt(f"bomb {name}", lambda run, name=name: bomb(run / name, "data.pkl"), read)
        attempt(f"huge tensors {name}", lambda run, name=name: huge_tensors(run / name), read)
        attempt(
            f"pipe {name}",
            lambda run, name=name: ((run / name).unlink(), os.mkfifo(run / name)),
            read,
        )
    data: dict[str, tuple[str, Callable[[Path], Any]]] = {
        "huge npy": ("x.npy", huge_array),
        "huge npz": ("x.npz", lambda path: _zipped(path, "x.npy", huge_array(path))),
        "bomb npz": ("x.npz", lambda path: bomb(path, "x.npy", _header((2**34,)))),
        "path npz": ("x.npz", lambda path: _zipped(path, "../../x.npy", _array(np.zeros((9, 2))))),
        "absolute path npz": ("x.npz", lambda path: _zipped(path, "/tmp/x.npy", _array(np.eye(3)))),
        "pickled npy": ("x.npy", lambda path: np.save(path, np.array([Touch(marker)], object))),
        "pickled npz": ("x.npz", lambda path: np.savez(path, x=np.array([Touch(marker)], object))),
        "pipe npy": ("x.npy", os.mkfifo),
        "pipe csv": ("x.csv", os.mkfifo),
    }
    for key, (file, make) in data.items():
        words = [
            "train",
            str(place / file),
            "--epochs",
            "1",
            "--no-report",
            "--out",
            str(place / "o"),
        ]
        attempt(
            f"data {key}",
            lambda run, file=file, make=make: make(run / file),
            lambda run, words=words: command_line(words),
        )
    for key, changes in {
        "huge": {"arguments": {"hidden": [10**9]}},
        "class": {"class": "os:system"},
        "path in class": {"class": "../../os:system"},
    }.items():
        attempt(f"config {key}", partial(_edit_pair, changes=changes), pv.load)


def _zipped(path: Path, member: str, content: bytes) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(member, content)


def _array(values: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, values)
    return buffer.getvalue()


def _header(shape: tuple[int, ...]) -> bytes:
    buffer = io.BytesIO()
    about = {"descr": "<f4", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(buffer, about)
    return buffer.getvalue()


def _edit_pair(run: Path, changes: dict[str, Any]) -> None:
    config = run_folder.read_config(run)
    config["pair"] |= changes
    run_files.write_json(run / "config.json", config)


# Fuzzing


ODD: list[Any] = [None, True, -1, 0, 2**63, 10**12, -0.5, 1e308, float("nan"), "", "x" * 5000]
ODD += [
    [],
    {},
    [[]],
    "../../etc/passwd",
    "\x00",
    "nan",
    "os:system",
    [10**9],
    "é\ud800",
    {"a": None},
]


def mutated(content: bytes, draw: random.Random) -> bytes:
    """A file with a few random changes."""
    data = bytearray(content)
    for _ in range(draw.randint(1, 6)):
        at, n = draw.randrange(len(data) + 1), draw.randint(1, 16)
        kind = draw.randrange(6)
        if kind == 0 and data:
            data[at % len(data)] = draw.randrange(256)
        elif kind == 1:
            del data[at : at + n]
        elif kind == 2:
            data[at:at] = bytes(draw.randrange(256) for _ in range(n))
        elif kind == 3:
            data[at : at + 4] = draw.choice([b"\xff" * 4, b"\0" * 4, b"\x7f\xff\xff\xff"])
        elif kind == 4:
            data = data[:at]
        else:
            data[at:at] = draw.choice(
                [b"nan", b"1e999", b"-", b",", b'"', b"\n", b"{", b"[", b"9" * 30]
            )
    return bytes(data)


def altered(value: Any, draw: random.Random) -> Any:
    """JSON with one random value replaced, removed or added."""
    if isinstance(value, dict) and value and draw.random() < 0.85:
        key = draw.choice(list(value))
        changed = dict(value)
        if draw.random() < 0.15:
            del changed[key]
        elif draw.random() < 0.1:
            changed[str(draw.choice(ODD))] = draw.choice(ODD)
        else:
            changed[key] = altered(value[key], draw)
        return changed
    if isinstance(value, list) and value and draw.random() < 0.7:
        at = draw.randrange(len(value))
        return [*value[:at], altered(value[at], draw), *value[at + 1 :]]
    return draw.choice(ODD)


def altered_object(value: dict[str, Any], draw: random.Random) -> dict[str, Any]:
    """The same, and still an object: another value would fail where the trial writes it."""
    found = value
    while found is value or not isinstance(found, dict):
        found = altered(value, draw)
    return found


OPTIONS = {
    "--epochs": ["1", "0", "-3", "x", "1e3", str(2**70)],
    "--batch-size": ["4", "0", "1000000", "nan"],
    "--learning-rate": ["0.01", "nan", "inf", "-1", "1e300"],
    "--latent-dim": ["2", "0", "1 2", "99999999999", ""],
    "--hidden": ["8", "-1", "0", "1000000000 1000000000", "a b"],
    "--likelihood": ["gaussian", "poisson", "none", "categorical"],
    "--prior": ["vamp", "flow", "gaussian-mixture", "x"],
    "--posterior": ["iaf", "spline", "full-rank-normal"],
    "--objective": ["analytic", "importance-weighted", "free-bits", "total-correlation"],
    "--model": ["hierarchical", "mixture", "os:system", "deep-markov", "a:b:c", ":"],
    "--seed": ["0", "-1", str(2**64), "x"],
    "--device": ["cpu", "meta", "cuda:99", ""],
    "--engine": ["eager", "warp"],
    "--beta": ["0", "nan", "-1", "1e9"],
    "--warm-up": ["linear", "none"],
    "--patience": ["1", "0"],
    "--clip-norm": ["1", "0", "nan"],
    "--on-nonfinite": ["skip", "stop", "x"],
    "--skip-limit": ["3", "0"],
    "--checkpoint-seconds": ["0", "-1", "nan"],
    "--columns": ["/dev/null", "/", "missing.toml"],
    "--config": ["/dev/null", "/", "missing.json"],
}


def fuzz(record: Record, folder: Path, arguments: argparse.Namespace) -> None:
    """Random inputs until the time is over, counting earlier sessions."""
    sound, place = made_run(folder), folder / "fuzzed"
    known = record.found.setdefault("fuzz", {})
    before, began = known.get("seconds", 0.0), time.monotonic()
    number = known.get("attempts", 0)
    while before + time.monotonic() - began < arguments.fuzz_seconds:
        draw = random.Random(number)
        target = draw.choice(
            [*READERS, "sealed config", "sealed state", "options", "--config", "data"]
        )
        said = child(partial(fuzzed, target, sound, place, draw))
        if not (said == "done" or is_refusal(said)):
            known.setdefault("faults", []).append(f"{number} {target}: {said}")
            print(f"fuzz {number} {target}: {said}", flush=True)
        number += 1
        known |= {"attempts": number, "seconds": before + time.monotonic() - began}
        known.setdefault("by target", {})
        known["by target"][target] = known["by target"].get(target, 0) + 1
        if number % 20 == 0:
            record.save()


def fuzzed(target: str, sound: Path, place: Path, draw: random.Random) -> None:
    """Read a changed file, or run the command line with changed options."""
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(sound, place)
    resource.setrlimit(resource.RLIMIT_CPU, (int(HANG_SECONDS), int(HANG_SECONDS)))
    warnings.simplefilter("ignore")
    out = ["--out", str(place / "out"), "--no-report", "--epochs", "1", "--num-eval-samples", "2"]
    table = sound.parent / "table.csv"
    if target in READERS:
        (place / target).write_bytes(mutated((sound / target).read_bytes(), draw))
        READERS[target](place)
    elif target == "sealed config":
        config = altered_object(run_folder.read_config(sound), draw)
        run_files.write_json(place / "config.json", config)
        words = draw.choice(
            [["encode"], ["evaluate", "--num-samples", "2"], ["report"], ["sample"]]
        )
        command_line([words[0], str(place), *words[1:]])
    elif target == "sealed state":
        state = run_files.read_checkpoint(sound)
        key = draw.choice(list(state))
        changed = altered(state[key], draw) if not torch.is_tensor(state[key]) else draw.choice(ODD)
        run_files.write_checkpoint(place, state | {key: changed})
        command_line(["train", str(table), "--out", str(place), "--resume", "--no-report",
                      "--epochs", "4", "--num-eval-samples", "2"])  # fmt: skip
    elif target == "options":
        chosen = draw.sample(sorted(OPTIONS), draw.randint(1, 4))
        words = [word for name in chosen for word in (name, *draw.choice(OPTIONS[name]).split(" "))]
        command_line(["train", str(table), *out, *words])
    elif target == "--config":
        given = run_folder.read_config(sound)["train"]
        text = json.dumps(altered(given, draw), default=str).encode()
        (place / "given.json").write_bytes(text if draw.random() < 0.7 else mutated(text, draw))
        command_line(["train", "--config", str(place / "given.json"), *out])
    else:
        kind = draw.choice(["npy", "npz", "csv", "txt", "json", "toml", "parquet", "feather"])
        if draw.random() < 0.3:  # in this process only: tables and arrays are large
            disk.LEAST_BYTES = 1
            os.environ["PYRO_VAE_DATA"] = str(place / "cache")
        path = place / f"data.{kind}"
        path.write_bytes(mutated(_sample(kind, table), draw))
        named = ["--columns", str(path)] if kind == "toml" else []
        command_line(["train", str(table if kind == "toml" else path), *named, *out])


def _sample(kind: str, table: Path) -> bytes:
    values = np.random.default_rng(0).random((40, 4)).astype(np.float32)
    if kind == "npy":
        return _array(values)
    if kind == "npz":
        buffer = io.BytesIO()
        np.savez(buffer, x=values, labels=np.arange(40) % 3)
        return buffer.getvalue()
    if kind == "csv":
        return table.read_bytes()
    if kind in ("parquet", "feather"):
        sink = io.BytesIO()
        frame = pd.read_csv(table)
        frame.to_parquet(sink) if kind == "parquet" else frame.to_feather(sink)
        return sink.getvalue()
    if kind == "toml":
        return (table.parent / "run" / "schema.toml").read_bytes()
    if kind == "json":
        rolls = [[[60, 64], [62], []] * 3] * 9
        return json.dumps({"train": rolls, "valid": rolls, "test": rolls}).encode()
    return b"\n".join(b"a line of text %d" % i for i in range(40))


# A full disk


DISK_COMMANDS: dict[str, list[str]] = {
    "encode": ["encode", "RUN"],
    "evaluate": ["evaluate", "RUN", "--num-samples", "2"],
    "sample": ["sample", "RUN", "--num", "2000"],
    "report": ["report", "RUN"],
    "score": ["score", "RUN", "--num-samples", "21"],
    "export": ["export", "RUN", "--formats", "torch"],
    "resume": [
        "train",
        "TABLE",
        "--out",
        "RUN",
        "--resume",
        "--epochs",
        "4",
        "--no-report",
        "--num-eval-samples",
        "2",
    ],
}


def full_disk(record: Record, folder: Path, arguments: argparse.Namespace) -> None:
    sound, disk = made_run(folder), folder / "disk"
    disk.mkdir(exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "none", str(disk)]
    mounted = subprocess.run(mount, capture_output=True, check=False).returncode == 0
    try:
        for name in DISK_COMMANDS:
            for room in (0, 4, 8, 16, 32, 64):
                record.attempt(
                    "full-disk",
                    f"{name} {room} KiB",
                    partial(_on_full_disk, sound, disk, name, room * 1024, mounted),
                )
    finally:
        if mounted:
            subprocess.run(["umount", str(disk)], check=False)


def _on_full_disk(sound: Path, disk: Path, name: str, room: int, mounted: bool) -> str:
    """Run a command with little room; afterwards, the run must load, and the command must work."""
    run, filler = disk / "run", disk / "filler"
    shutil.rmtree(run, ignore_errors=True)
    shutil.copytree(sound, run)
    table = sound.parent / "table.csv"
    words = [{"RUN": str(run), "TABLE": str(table)}.get(w, w) for w in DISK_COMMANDS[name]]
    before = str(pv.load(run).state_dict())
    if mounted:
        _fill(filler, room)
        said = child(partial(command_line, words))
    else:
        said = child(lambda: (_limit(room), command_line(words))[1])
    filler.unlink(missing_ok=True)
    if not (said == "done" or is_refusal(said)):
        return said
    left = [file for file in os.listdir(run) if file.endswith(".part") or file == ".lock"]
    if left:
        return f"left {left}"
    if name != "resume" and str(pv.load(run).state_dict()) != before:
        return "another model"
    pv.load(run), run_files.read_checkpoint(run), read_metrics(run), _read_history(run)
    after = child(partial(command_line, words))
    return "ok" if after == "done" else f"afterwards: {after}"


def _fill(path: Path, room: int) -> None:
    """Fill the disk, and leave this many bytes."""
    with contextlib.suppress(OSError), open(path, "wb", buffering=0) as file:
        while file.write(bytes(4096)):
            pass
    with contextlib.suppress(OSError):
        os.truncate(path, max(0, path.stat().st_size - room))


def _limit(size: int) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


# Many calls, many epochs


def resident() -> float:
    """The resident memory of this process, in KiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return float(line.split()[1])
    return 0.0


def tools(folder: Path) -> dict[str, Callable[[], Any]]:
    """A call of each tool, on a small pair."""
    torch.manual_seed(0)
    vae, x = pv.VAE.mlp((6,), latent_dim=2, hidden=(8,)), DATA[:16].round()
    quick = {"epochs": 1, "batch_size": 8, "progress": False}
    holed, missing = pv.VAE.mlp((6,), likelihood=pv.Missing(pv.Bernoulli)), x.clone()
    missing[0, 0] = torch.nan
    kept = pv.save(vae, folder / "saved")
    return {
        "fit (eager)": lambda: pv.fit(vae, x, engine="eager", **quick),
        "fit (traced)": lambda: pv.fit(vae, x, engine="traced", **quick),
        "fit (run folder)": lambda: pv.fit(
            vae, x, engine="eager", out=folder / "out", overwrite=True, **quick
        ),
        "save": lambda: pv.save(vae, folder / "saved"),
        "load": lambda: pv.load(kept),
        "check": lambda: pv.check(vae, x),
        "sample": lambda: pv.sample(vae, 4),
        "encode": lambda: pv.encode(vae, x),
        "reconstruct": lambda: pv.reconstruct(vae, x),
        "interpolate": lambda: pv.interpolate(vae, x[:2], x[2:4], steps=3),
        "traverse": lambda: pv.traverse(vae, x[:1]),
        "log_likelihood": lambda: pv.log_likelihood(vae, x, num_samples=4),
        "evaluate": lambda: pv.evaluate(vae, x, num_samples=4),
        "impute": lambda: pv.impute(holed, missing, num_samples=21),
        "refine": lambda: pv.refine(vae, x[:2], steps=2),
        "score": lambda: pv.score(vae, x, num_samples=21),
        "decode": lambda: pv.decode(vae, {"z": torch.zeros(2, 2)}),
    }


def calls(record: Record, folder: Path, arguments: argparse.Namespace) -> None:
    for name in tools(folder):
        record.attempt("calls", name, partial(_called, name, folder, arguments))


GARBAGE = 20
"""Calls between two runs of Python's garbage collector."""


def _called(name: str, folder: Path, arguments: argparse.Namespace) -> Any:
    """The growth of the memory by call, after a fifth of the calls."""

    def work() -> str:
        warnings.simplefilter("ignore")
        call, began, sizes = tools(folder)[name], time.monotonic(), []
        for number in range(arguments.calls):
            call()
            if number % GARBAGE == 0:
                gc.collect()  # cycles that wait for the collector do not count
            sizes.append(resident())
            if time.monotonic() - began > arguments.tool_seconds:
                break
        settled = sizes[len(sizes) // 5 :]
        half = len(settled) // 2
        growth = statistics.mean(settled[half:]) - statistics.mean(settled[:half])
        return json.dumps({"calls": len(sizes), "kib_by_call": round(growth / max(1, half), 3)})

    said = child(work, seconds=arguments.tool_seconds + 120)
    return json.loads(said) if said.startswith("{") else said


def epochs(record: Record, folder: Path, arguments: argparse.Namespace) -> None:
    def work() -> str:
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        vae, times, sizes = pv.VAE.mlp((6,), latent_dim=2, hidden=(8,)), [], []

        def see(epoch: Any) -> None:
            times.append(time.process_time())
            sizes.append(resident())

        shutil.rmtree(folder / "long", ignore_errors=True)
        pv.fit(
            vae,
            DATA[:32].round(),
            epochs=arguments.epochs,
            batch_size=32,
            engine="traced",
            checkpoint_seconds=0.0,
            out=folder / "long",
            progress=False,
            on_epoch=[see],
        )
        tenth = len(times) // 10
        spans = [times[i + tenth - 1] - times[i] for i in range(0, len(times) - tenth + 1, tenth)]
        return json.dumps({
            "epochs": len(times),
            "ms_by_epoch": [round(1000 * span / (tenth - 1), 2) for span in spans],
            "kib_by_epoch": round((sizes[-1] - sizes[tenth]) / (len(sizes) - tenth), 3),
        })  # fmt: skip

    def run() -> Any:
        said = child(work, seconds=arguments.epochs)
        return json.loads(said) if said.startswith("{") else said

    record.attempt("epochs", "traced", run)


# The table


def table(found: dict[str, dict[str, Any]]) -> str:
    rows = ["| trial | attempts | as required | otherwise |", "| --- | --- | --- | --- |"]

    def row(name: str, total: int, good: int, words: str = "") -> None:
        rows.append(f"| {name} | {total} | {good} | {words or total - good} |")

    done = found.get("kills", {}).values()
    for inside, name in ((False, "SIGKILL at a random instant"), (True, "SIGKILL inside a write")):
        own = [one for one in done if isinstance(one, dict) and one["inside"] == inside]
        if own:
            finished = sum(one["was"] == "done" for one in own)
            good = sum(one["identical"] for one in own)
            more = f"{len(own) - good}; {finished} had ended before" if finished else ""
            row(f"{name}, then resume", len(own), good, more)
    if odd := [one for one in done if not isinstance(one, dict)]:
        row("killed, not comparable", len(odd), 0)
    for kind, name in (("cut", "truncated"), ("flip", "with a flipped bit")):
        for file in READERS:
            own = [v for k, v in found.get("damage", {}).items() if k.startswith(f"{file} {kind} ")]
            if own:
                row(f"`{file}` {name}", len(own), own.count("ok"))
    groups = Counter(key.split()[0] for key in found.get("hostile", {}))
    for group, total in groups.items():
        own = [v for k, v in found["hostile"].items() if k.split()[0] == group]
        row(f"hostile: {group} ...", total, own.count("ok"))
    if fuzz := found.get("fuzz"):
        faults = len(fuzz.get("faults", []))
        row(
            f"fuzzing for {fuzz['seconds'] / 60:.0f} minutes",
            fuzz["attempts"],
            fuzz["attempts"] - faults,
        )
    if full := list(found.get("full-disk", {}).values()):
        row("a full disk", len(full), full.count("ok"))
    for name, one in found.get("calls", {}).items():
        if isinstance(one, dict):
            flat = one["kib_by_call"] < 1
            row(
                f"memory of `{name}`",
                one["calls"],
                one["calls"] * flat,
                f"{one['kib_by_call']} KiB a call",
            )
        else:
            row(f"memory of `{name}`", 1, 0, one)
    for one in found.get("epochs", {}).values():
        if isinstance(one, dict):
            spans = one["ms_by_epoch"]
            words = f"{spans[1]} ms of processor time by epoch, {spans[-1]} ms at the end; "
            flat = one["epochs"] * (spans[-1] < 1.5 * spans[1])
            words += f"{one['kib_by_epoch']} KiB by epoch"
            row("epochs with a checkpoint each", one["epochs"], flat, words)
    return "\n".join(rows)


TRIALS: dict[str, Callable[[Record, Path, argparse.Namespace], None]] = {
    "kills": kills,
    "damage": damage,
    "hostile": hostile,
    "full-disk": full_disk,
    "fuzz": fuzz,
    "epochs": epochs,
    "calls": calls,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("faults.json"))
    parser.add_argument("--folder", type=Path, help="for temporary files")
    parser.add_argument("--trials", nargs="+", choices=TRIALS, default=list(TRIALS))
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--damages", type=int, default=50, help="cuts and flips of each file")
    parser.add_argument("--fuzz-seconds", type=float, default=900.0)
    parser.add_argument("--calls", type=int, default=1000)
    parser.add_argument("--tool-seconds", type=float, default=600.0, help="limit for each tool")
    parser.add_argument("--epochs", type=int, default=20_000)
    parser.add_argument("--table", action="store_true", help="print the table and stop")
    parser.add_argument("--job", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.job:
        job, run, *rest = arguments.job
        job_apart(int(job), Path(run), bool(int(rest[0])), int(rest[1]))
        return
    record = Record(arguments.out)
    if arguments.table:
        print(table(record.found))
        return
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        for name in arguments.trials:
            TRIALS[name](record, Path(folder), arguments)
            record.save()
            print(f"{name}: recorded", flush=True)


if __name__ == "__main__":
    main()
