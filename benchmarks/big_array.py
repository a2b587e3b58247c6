"""One epoch of a small VAE on a large .npy file: memory, and speed against rows in memory.

    python benchmarks/big_array.py --gigabytes 20 --memory-rows 200000 --threads 2

The file is sparse: its rows are zeros, which the system reads like rows of its cache. Some rows of
the same kind are also trained in memory and from disk, in turn.
"""

import argparse
import multiprocessing
import resource
import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

import pyro_vae as pv
from pyro_vae.data import disk

WIDTH = 784


def epoch(threads: int, path: Path, rows: int | None, in_memory: bool, found: Any) -> None:
    """Train an epoch, and tell its rows per second and the largest resident size in GiB."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    if rows is not None:
        disk.LEAST_BYTES = 1
    x: Any = np.load(path, mmap_mode="r")[:rows]
    x = np.array(x) if in_memory else x
    vae = pv.VAE.mlp((WIDTH,), latent_dim=10, hidden=(128,), likelihood=pv.Gaussian(1.0))
    history = pv.fit(vae, x, epochs=1, batch_size=256, engine="traced", progress=False)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    found.put((len(x) / history.epochs[0].seconds, peak))


def apart(*arguments: Any) -> tuple[float, float]:
    """Run `epoch` in a process of its own."""
    context = multiprocessing.get_context("spawn")
    found = context.Queue()
    process = context.Process(target=epoch, args=(*arguments, found))
    process.start()
    result = found.get()
    process.join()
    return result


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--gigabytes", type=float, default=20.0)
    parser.add_argument("--memory-rows", type=int, default=200_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--folder", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        path = Path(folder) / "x.npy"
        shape = (int(given.gigabytes * 1e9 / (4 * WIDTH)), WIDTH)
        np.lib.format.open_memmap(path, "w+", np.float32, shape)
        rates: dict[bool, list[float]] = {False: [], True: []}
        for _ in range(given.rounds):
            for in_memory, kept in rates.items():
                rows = min(given.memory_rows, len(np.load(path, "r")))
                kept.append(apart(given.threads, path, rows, in_memory)[0])
        on_disk, in_memory = (statistics.median(rates[kind]) for kind in (False, True))
        print(f"rows per second: {on_disk:.0f} from disk, {in_memory:.0f} in memory")
        print(f"ratio {on_disk / in_memory:.3f}")
        rate, peak = apart(given.threads, path, None, False)
        print(f"{given.gigabytes:g} GB: {rate:.0f} rows per second, {peak:.2f} GiB resident")


if __name__ == "__main__":
    main()
