"""Several processes against one: examples per second, and a run whose process is killed.

    python benchmarks/many_processes.py speed --batch 256    # 1 and 2 processes of one thread each
    python benchmarks/many_processes.py kills --kills 5      # one of 2 processes is killed 5 times
    python benchmarks/many_processes.py nodes                # two "nodes" of one process each
    python benchmarks/many_processes.py gradients            # those of 2 and 4 processes against 1

``speed`` alternates one process, two that share memory, two that use gloo, and two that exchange
nothing, every few epochs. The last is what the cores can do at most. It counts only epochs in which
other programs used less than a tenth of a core, if there are any.
``kills`` starts torchrun with ``--max-restarts`` and kills a process at random times. It compares
the result with that of a run without kills, whose rows must have the order that seed and epoch
give. ``gradients`` fixes the noise of each row.
"""

import argparse
import importlib
import json
import os
import random
import resource
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

import pyro_vae as pv
from pyro_vae.data.order import order
from pyro_vae.pairs.processes import Team, here, join_processes, restarts, single

ROWS, WIDTH, BATCH, EPOCHS = 20_000, 784, 256, 3

WAYS = (
    "one process",
    "two processes, shared memory",
    "two processes, gloo",
    "two processes without an exchange",
)


def port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def torchrun(count: int, words: list[str], restarts: int = 0, **more: str) -> subprocess.Popen:
    """Start this file in several processes."""
    nodes = [f"--{name.replace('_', '-')}={value}" for name, value in more.items()]
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={count}"]
    command += [f"--max-restarts={restarts}", "--monitor-interval=0.2"]
    command += nodes or ["--standalone"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    return subprocess.Popen([*command, __file__, *words], env=env, stderr=subprocess.DEVNULL)


def joined() -> None:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        join_processes("gloo")


def train(out: Path) -> None:
    """Train a VAE, and write the seconds of each epoch."""
    joined()
    torch.set_num_threads(1)
    assert here().count == int(os.environ.get("WORLD_SIZE", "1"))
    seconds = fitted(BATCH, (400, 400), EPOCHS)[0]
    if here().first:
        out.write_text(json.dumps(seconds))


def fitted(
    batch: int, hidden: tuple[int, ...], epochs: int, pids: Sequence[int] = (), rows: int = ROWS
) -> tuple[list[float], list[float]]:
    """The seconds of each epoch but the first, and the cores that other programs used in it."""
    torch.manual_seed(0)
    x = torch.rand(rows, WIDTH).round()
    vae = pv.VAE.mlp((WIDTH,), latent_dim=20, hidden=hidden)
    marks: list[tuple[float, float]] = []
    options = {"epochs": epochs, "batch_size": batch, "engine": "traced", "progress": False}
    history = pv.fit(vae, x, on_epoch=[lambda _: marks.append(others(pids))], **options)
    pairs = zip(marks[1:], marks, strict=False)
    used = [(a[0] - b[0]) / (a[1] - b[1]) for a, b in pairs]
    return [epoch.seconds for epoch in history.epochs[1:]], used


def others(pids: Sequence[int]) -> tuple[float, float]:
    """The seconds of all cores that programs other than these have used, and the time (Linux)."""
    if not Path("/proc/stat").exists():
        return 0.0, time.perf_counter()
    user, nice, system, _, _, *interrupts = map(int, _words("/proc/stat")[1:9])
    own = sum(sum(map(int, _words(f"/proc/{pid}/stat")[13:15])) for pid in pids)
    ticks = user + nice + system + sum(interrupts) - own
    return ticks / os.sysconf("SC_CLK_TCK"), time.perf_counter()


def _words(path: str) -> list[str]:
    return Path(path).read_text().splitlines()[0].split()


def alternate(out: Path, batch: int, hidden: tuple[int, ...], rounds: int) -> None:
    """Two processes train in turn, in each of `WAYS`."""
    joined()
    torch.set_num_threads(1)
    team, found = here(), []
    pids = [*team.gather(os.getpid), os.getppid()]  # torchrun, too
    whole = resource.getrlimit(resource.RLIMIT_FSIZE)
    for _ in range(rounds):
        for way in WAYS:
            alone, apart = way == "one process", way.endswith("without an exchange")
            parts = 2 if apart else 1  # each process has its own half of the rows
            if way == "two processes, gloo":  # the memory has a size, which is refused
                resource.setrlimit(resource.RLIMIT_FSIZE, (0, whole[1]))
            with single() if alone or apart else nullcontext():
                if team.first or not alone:
                    # Only the first process calls `on_epoch`, and has the use by other programs.
                    ran = fitted(batch // parts, hidden, EPOCHS, pids, ROWS // parts)
                    pairs = zip(*ran, strict=False)
                    found += [(way, ROWS / seconds, used) for seconds, used in pairs]
            resource.setrlimit(resource.RLIMIT_FSIZE, whole)
            team.gather(lambda: None)
    if team.first:
        out.write_text(json.dumps(found))


def speed(batch: int, hidden: tuple[int, ...], rounds: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "rates.json"
        words = ["alternate", str(out), "--batch", str(batch), "--rounds", str(rounds)]
        assert torchrun(2, [*words, "--hidden", *map(str, hidden)]).wait() == 0
        found = json.loads(out.read_text())
    one = None
    for way in WAYS:
        measured = [(rate, used) for name, rate, used in found if name == way]
        quiet = [(rate, used) for rate, used in measured if used < 0.1] or measured
        rate, used = (statistics.median(column) for column in zip(*quiet, strict=True))
        one = one or rate
        print(
            f"batch {batch}, {way}: median {rate:.0f}/s, {rate / one:.2f} times one process "
            f"({len(quiet)} epochs; other programs used {used:.2f} cores)"
        )


KILL_ROWS, KILL_EPOCHS, KILL_BATCH = 300, 40, 16


class Noted(torch.utils.data.Dataset):
    """Rows that are written down when they are read in training."""

    def __init__(self, log: Path) -> None:
        self.log = open(log, "a")  # noqa: SIM115

    def __len__(self) -> int:
        return KILL_ROWS

    def __getitem__(self, i: int) -> torch.Tensor:
        print(i, file=self.log, flush=True)
        if restarts() < int(os.environ["KILLS"]):
            time.sleep(0.01)  # until all kills have happened, an epoch takes some seconds
        return torch.sin(torch.arange(4.0) * (i + 1))


def killed(folder: Path) -> None:
    """One process of a run that is killed now and then. The log has its rows, by restart."""
    joined()
    torch.manual_seed(0)
    vae = pv.VAE.mlp((4,), latent_dim=2, hidden=(8,), likelihood=pv.Gaussian)
    log = folder / f"rows-{restarts()}-{here().rank}.txt"
    log.with_suffix(".pid").write_text(str(os.getpid()))
    options = {"epochs": KILL_EPOCHS, "batch_size": KILL_BATCH, "checkpoint_seconds": 0}
    pv.fit(
        vae,
        Noted(log),
        out=folder / "run",
        engine="eager",
        progress=False,
        **options,
    )


def kills(number: int) -> None:
    """Kill a process ``number`` times; the result must equal that of a run without kills."""
    draws, weights = random.Random(0), []
    for times in (0, number):
        with tempfile.TemporaryDirectory() as name:
            folder, done, last = Path(name), 0, -1
            os.environ["KILLS"] = str(times)
            running = torchrun(2, ["killed", name], restarts=2 * number)
            while running.poll() is None:
                time.sleep(0.5 + draws.random())
                found = sorted(folder.glob("rows-*-?.pid"))
                newest = max((int(path.name.split("-")[1]) for path in found), default=-1)
                pids = sorted(folder.glob(f"rows-{newest}-*.pid"))
                trained = (folder / "run" / "history.csv").exists()
                if done < times and newest > last and len(pids) == 2 and trained:
                    time.sleep(draws.random())
                    os.kill(int(draws.choice(pids).read_text()), signal.SIGKILL)
                    done, last = done + 1, newest
            assert running.returncode == 0, f"torchrun ended with {running.returncode}"
            assert done == times, f"killed only {done} times"
            pair = pv.load(folder / "run")
            weights.append(torch.cat([p.detach().flatten() for p in pair.parameters()]))
            if not times:
                rows = _rows(folder)
                wanted = torch.cat([order(0, epoch, KILL_ROWS) for epoch in range(KILL_EPOCHS)])
                assert rows == wanted.tolist(), "another order"
    same = torch.equal(*weights)
    print(f"killed {number} times: finished, parameters bit-identical: {same}")
    assert same


def _rows(folder: Path) -> list[int]:
    """The rows of all steps of a run of two processes, in the order of the run."""
    logs = [(folder / f"rows-0-{rank}.txt").read_text().split() for rank in range(2)]
    own = [iter(map(int, log[-_share(rank) :])) for rank, log in enumerate(logs)]
    found = []
    for _ in range(KILL_EPOCHS):
        for start in range(0, KILL_ROWS, KILL_BATCH):
            n = min(KILL_BATCH, KILL_ROWS - start)
            found += [next(own[0]) for _ in range(-(-n // 2))]
            found += [next(own[1]) for _ in range(n // 2)]
    return found


def _share(rank: int) -> int:
    sizes = [min(KILL_BATCH, KILL_ROWS - s) for s in range(0, KILL_ROWS, KILL_BATCH)]
    return KILL_EPOCHS * sum(-(-n // 2) if rank == 0 else n // 2 for n in sizes)


def gradient(out: Path) -> None:
    """Write the gradients of all steps, and the rows that each process read."""
    joined()
    sys.path.append(str(Path(__file__).parents[1] / "tests" / "training"))
    program: Any = importlib.import_module("processes_program")
    items = program.Items(program.X, program.NOISE)
    found, _ = program.recorded((items,))
    read = here().gather(lambda: items.read)
    if here().first:
        torch.save((found, read), out)


def _rows_of(team: Team) -> list[int]:
    """The rows that a process reads in two epochs of minibatches of 8 of 17 rows."""
    parts = [team.of(part) for epoch in range(2) for part in order(0, epoch, 17).split(8)]
    return [row for part in parts for row in part.tolist() or [0]]  # a row shows the shapes


def gradients() -> None:
    """Compare the gradients of 2 and 4 processes with those of one, with fixed noise."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for count in (1, 2, 4):
            out = Path(folder) / f"{count}.pt"
            assert torchrun(count, ["gradient", str(out)]).wait() == 0
            found[count] = torch.load(out)
    wanted, _ = found[1]
    for count in (2, 4):
        gradients, read = found[count]
        for rank in range(count):
            rows = _rows_of(Team(rank, count))
            assert read[rank][-len(rows) :] == rows, "another order"
        apart = ((gradients - wanted).norm(dim=1) / wanted.norm(dim=1)).max()
        words = f"the global order, and gradients within {apart:.1e}"
        print(f"{count} processes, {len(wanted)} steps: {words}")
        assert apart <= 1e-5


def nodes() -> None:
    """Two agents of torchrun on one machine, which meet at a port, as two nodes do."""
    with tempfile.TemporaryDirectory() as name:
        meet = {"nnodes": "2", "rdzv_backend": "c10d", "rdzv_id": "trial"}
        meet |= {"rdzv_endpoint": f"127.0.0.1:{port()}"}
        out = [str(Path(name) / "seconds.json")]
        agents = [torchrun(1, ["train", *out], **meet) for _ in range(2)]
        assert [agent.wait() for agent in agents] == [0, 0]
        print("two nodes: finished,", json.loads(Path(out[0]).read_text()), "seconds by epoch")


CHOICES = ["speed", "kills", "nodes", "gradients", "alternate", "train", "killed", "gradient"]
"""The trials, and what their processes run."""


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=CHOICES)
    parser.add_argument("out", nargs="?", type=Path)
    parser.add_argument("--batch", type=int, default=BATCH)
    parser.add_argument("--hidden", type=int, nargs="+", default=[400, 400])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--kills", type=int, default=5)
    given = parser.parse_args()
    if given.what == "speed":
        speed(given.batch, tuple(given.hidden), given.rounds)
    elif given.what == "alternate":
        alternate(given.out, given.batch, tuple(given.hidden), given.rounds)
    elif given.what == "kills":
        kills(given.kills)
    elif given.what == "nodes":
        nodes()
    elif given.what == "gradients":
        gradients()
    else:
        {"train": train, "killed": killed, "gradient": gradient}[given.what](given.out)
