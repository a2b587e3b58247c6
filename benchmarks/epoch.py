"""An epoch of MNIST, data included: `pyro_vae.fit`, Pyro's example loop, pythae and pyroVED.

    pip install 'pyro-vae[bench]'
    python benchmarks/epoch.py --data-dir DIR [--epochs 6]

The model is 784-400-50 with softplus, batches of 256, Adam at 1e-3, gray targets under a Bernoulli,
and all 60,000 training images. Each contender is a process of its own, and they alternate after
each epoch. So other load on the machine affects all of them equally, and memory is measured
separately. The first epoch does not count, because it traces, compiles and fills caches. The test
ELBO is that of the 10,000 test images after all epochs, for the contenders with the same model.
Memory is the largest resident set, minus that of the interpreter with torch, Pyro and the data's
own library imported.
"""

import argparse
import resource
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable

CONTENDERS = ("example", "pythae", "pyroved", "traced", "compiled", "traced-bf16", "compiled-bf16")
LABELS = {"example": "Pyro's example loop", "pyroved": "pyroVED"}


def peak() -> float:
    """Return the largest resident set so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def turn(seconds: float) -> None:
    """Report an epoch and wait for the next turn."""
    print(f"seconds {seconds}", flush=True)
    sys.stdin.readline()


def library(data_dir: str, epochs: int, engine: str, precision: str) -> None:
    import torch
    from pyro.infer import Trace_ELBO
    from torchvision import datasets

    import pyro_vae as pv
    from pyro_vae.data.preparation import held_rows
    from pyro_vae.training.validation import bound

    base = peak()
    warnings.filterwarnings("ignore", message="gr[ae]y intensities")  # intended, see above
    train = datasets.MNIST(data_dir, train=True).data[:, None]
    torch.manual_seed(0)
    vae = pv.VAE.mlp((1, 28, 28), latent_dim=50, hidden=(400,), activation=torch.nn.Softplus)
    began = [0.0, -1.0]  # time and epoch

    def constant(epoch: float) -> float:
        if int(epoch) > began[1]:  # a new epoch begins
            if began[1] >= 0:
                turn(time.perf_counter() - began[0])
            began[:] = time.perf_counter(), int(epoch)
        return 1.0

    pv.fit(
        vae,
        train,
        epochs=epochs,
        batch_size=256,
        binarize="none",
        engine=engine,
        precision=precision,
        learning_rate_schedule=constant,
        progress=False,
    )
    turn(time.perf_counter() - began[0])
    print(f"memory {peak() - base}")
    rows, prepare = held_rows(vae, datasets.MNIST(data_dir, train=False).data[:, None], (), "none")
    print(f"elbo {bound(vae, rows, prepare, Trace_ELBO()).elbo}", flush=True)


def example(data_dir: str, epochs: int) -> None:
    import torch
    from pyro_example import StockLoop

    base = peak()
    torch.manual_seed(0)
    loop = StockLoop(data_dir)
    repeat(loop.train, epochs, base)
    print(f"elbo {loop.test()}", flush=True)


def pyroved(data_dir: str, epochs: int) -> None:
    import pyroved
    from torchvision import datasets

    base = peak()
    train = datasets.MNIST(data_dir, train=True).data.float() / 255
    vae = pyroved.models.iVAE(
        (28, 28), 50, None, hidden_dim_e=[400], hidden_dim_d=[400], activation="softplus"
    )
    trainer = pyroved.trainers.SVItrainer(vae)
    loader = pyroved.utils.init_dataloader(train, batch_size=256)
    repeat(lambda: trainer.train(loader), epochs, base)


def pythae(data_dir: str, epochs: int) -> None:
    import logging
    import tempfile

    logging.disable(logging.INFO)
    from pythae.data.datasets import BaseDataset
    from pythae.models import VAE, VAEConfig
    from pythae.models.base.base_utils import ModelOutput
    from pythae.models.nn import BaseDecoder, BaseEncoder
    from pythae.trainers import BaseTrainer, BaseTrainerConfig
    from torch import Tensor, nn
    from torchvision import datasets

    base = peak()

    class Encoder(BaseEncoder):
        def __init__(self) -> None:
            super().__init__()
            self.hidden = nn.Sequential(nn.Linear(784, 400), nn.Softplus())
            self.mean, self.log_variance = nn.Linear(400, 50), nn.Linear(400, 50)

        def forward(self, x: Tensor) -> ModelOutput:
            h = self.hidden(x.reshape(-1, 784))
            return ModelOutput(embedding=self.mean(h), log_covariance=self.log_variance(h))

    class Decoder(BaseDecoder):
        def __init__(self) -> None:
            super().__init__()
            layers = (nn.Linear(50, 400), nn.Softplus(), nn.Linear(400, 784), nn.Sigmoid())
            self.layers = nn.Sequential(*layers)

        def forward(self, z: Tensor) -> ModelOutput:
            return ModelOutput(reconstruction=self.layers(z).reshape(-1, 1, 28, 28))

    images = datasets.MNIST(data_dir, train=True).data[:, None].float() / 255
    data = BaseDataset(images, datasets.MNIST(data_dir, train=True).targets)
    config = VAEConfig(input_dim=(1, 28, 28), latent_dim=50, reconstruction_loss="bce")
    with tempfile.TemporaryDirectory() as folder:
        settings = BaseTrainerConfig(
            output_dir=folder,
            num_epochs=epochs,
            learning_rate=1e-3,
            per_device_train_batch_size=256,
            optimizer_cls="Adam",
            no_cuda=True,
        )
        trainer = BaseTrainer(VAE(config, Encoder(), Decoder()), data, training_config=settings)
        trainer.prepare_training()
        trainer.callback_handler.callbacks.clear()  # removes its progress bar
        repeat(lambda: trainer.train_step(1), epochs, base)


def repeat(epoch: Callable[[], object], epochs: int, base: float) -> None:
    for _ in range(epochs):
        began = time.perf_counter()
        epoch()
        turn(time.perf_counter() - began)
    print(f"memory {peak() - base}", flush=True)


def work(name: str, data_dir: str, epochs: int) -> None:
    """Run one contender in its own process."""
    sys.stdin.readline()
    if name in ("example", "pythae", "pyroved"):
        {"example": example, "pythae": pythae, "pyroved": pyroved}[name](data_dir, epochs)
    else:
        engine, _, half = name.partition("-")
        library(data_dir, epochs, engine, "bfloat16" if half else "float32")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=CONTENDERS)
    parser.add_argument("--work", choices=CONTENDERS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work(options.work, options.data_dir, options.epochs)
        return
    words = [sys.executable, __file__, "--data-dir", options.data_dir]
    workers = {
        name: subprocess.Popen(
            [*words, "--epochs", str(options.epochs), "--work", name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for name in options.contenders
    }

    def answer(worker: subprocess.Popen, key: str) -> float:
        for line in worker.stdout:
            if line.startswith(key):
                return float(line.split()[1])
        raise SystemExit(f"a contender ended without printing '{key}'")

    times: dict[str, list[float]] = {name: [] for name in workers}
    for epoch in range(options.epochs):
        for name, worker in workers.items():
            worker.stdin.write("\n")
            worker.stdin.flush()
            times[name].append(answer(worker, "seconds"))
        shown = {name: round(found[-1], 2) for name, found in times.items()}
        print(f"epoch {epoch}: {shown}", flush=True)
    memory, elbo = {}, {}
    for name, worker in workers.items():
        worker.stdin.write("\n")
        worker.stdin.flush()
        memory[name] = answer(worker, "memory")
        if name not in ("pythae", "pyroved"):
            elbo[name] = answer(worker, "elbo")
        worker.communicate()
    middle = {name: statistics.median(found[1:]) for name, found in times.items()}
    print("\n| | seconds an epoch (least to most) | ÷ traced | memory, MiB | test ELBO |")
    print("| --- | --- | --- | --- | --- |")
    for name, found in times.items():
        ratio = middle[name] / middle["traced"] if "traced" in middle else float("nan")
        value = f"{elbo[name]:.2f}" if name in elbo else "another model"
        print(
            f"| {LABELS.get(name, name)} | {middle[name]:.2f} ({min(found[1:]):.2f} to "
            f"{max(found[1:]):.2f}) | {ratio:.2f} | {memory[name]:.0f} | {value} |"
        )


if __name__ == "__main__":
    main()
