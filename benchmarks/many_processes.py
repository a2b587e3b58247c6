"""Several processes against one: examples per second, and a run whose process is killed.

    python benchmarks/many_processes.py speed --rounds 5     # 1 and 2 processes of one thread each
    python benchmarks/many_processes.py kills --kills 5      # one of 2 processes is killed 5 times
    python benchmarks/many_processes.py nodes                # two "nodes" of one process each
    python benchmarks/many_processes.py gradients            # those of 2 and 4 processes against 1

``speed`` alternates the two, so that the load of the machine affects both. ``kills`` starts
torchrun with ``--max-restarts`` and kills a process at random times. It compares the result with
that of a run without kills, whose rows must have the order that seed and epoch give. ``gradients``
fixes the noise of each row.
"""

import argparse
import importlib
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import pyro_vae as pv
from pyro_vae.data.order import order
from pyro_vae.pairs.processes import Team, here, join_processes, restarts

ROWS, WIDTH, BATCH, EPOCHS = 20_000, 784, 256, 3


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
    """Train a VAE of 784-400-20, and write the seconds of each epoch."""
    joined()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    assert here().count == int(os.environ.get("WORLD_SIZE", "1"))
    x = torch.rand(ROWS, WIDTH).round()
    vae = pv.VAE.mlp((WIDTH,), latent_dim=20, hidden=(400, 400))
    history = pv.fit(vae, x, epochs=EPOCHS, batch_size=BATCH, engine="traced", progress=False)
    if here().first:
        out.write_text(json.dumps([epoch.seconds for epoch in history.epochs[1:]]))


def speed(rounds: int) -> None:
    found: dict[int, list[float]] = {1: [], 2: []}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(rounds):
            for count, rates in found.items():
                out = Path(folder) / "seconds.json"
                assert torchrun(count, ["train", str(out)]).wait() == 0
                rates += [ROWS / seconds for seconds in json.loads(out.read_text())]
    for count, rates in found.items():
        print(f"{count} processes: median {statistics.median(rates):.0f}, best {max(rates):.0f} /s")
    print(f"ratio of medians {statistics.median(found[2]) / statistics.median(found[1]):.2f}")
    print(f"ratio of the best {max(found[2]) / max(found[1]):.2f}")


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


CHOICES = ["speed", "kills", "nodes", "gradients", "train", "killed", "gradient"]
"""The trials, and what their processes run."""


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=CHOICES)
    parser.add_argument("out", nargs="?", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--kills", type=int, default=5)
    given = parser.parse_args()
    if given.what == "speed":
        speed(given.rounds)
    elif given.what == "kills":
        kills(given.kills)
    elif given.what == "nodes":
        nodes()
    elif given.what == "gradients":
        gradients()
    else:
        {"train": train, "killed": killed, "gradient": gradient}[given.what](given.out)
