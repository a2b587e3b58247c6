"""When the alarm for posterior collapse warns: the figure of docs/diagnostics/collapse.md.

    python benchmarks/collapse.py [--out docs/figures/collapse.png]

The program trains VAEs of binarized digits and of sentences, with and without remedies. For each it
prints the KL at the end, the lowest KL, and the epoch of the alarm, if any. It takes about four
minutes on one core.
"""

import argparse
import warnings
from typing import Any

import torch
from torch import nn

import pyro_vae as pv
from pyro_vae.pairs.figures import BLUE, GRAY, ORANGE, new_figure
from pyro_vae.training.collapse import CollapseAlarm, units


def digits_pair() -> nn.Module:
    return pv.VAE.mlp((1, 8, 8), latent_dim=20, hidden=(128, 64))


def levels_pair() -> nn.Module:
    return pv.HierarchicalVAE.mlp((1, 8, 8), latent_dim=(10, 5), hidden=(64,))


def text_pair(word_dropout: float) -> nn.Module:
    return pv.VAE.recurrent(TEXT.shape, len(TEXT.vocabulary or ""), 16, 64, 32, word_dropout)


DIGITS, TEXT = pv.load_data("digits"), pv.load_data("docstrings", length=50)
WRITING = {"epochs": 13, "batch_size": 16, "learning_rate": 3e-3}
RUNS: dict[str, tuple[str | None, Any, Any, dict[str, Any]]] = {  # with the color of its curve
    "digits": (ORANGE, digits_pair, DIGITS, {}),
    "digits, batches of 32": (None, digits_pair, DIGITS, {"batch_size": 32}),
    "digits, 30 epochs": (GRAY, digits_pair, DIGITS, {"epochs": 30}),
    "digits, warm-up of 20": (BLUE, digits_pair, DIGITS, {"beta": pv.LinearSchedule(20)}),
    "digits, two levels, recipe": (None, levels_pair, DIGITS, {}),
    "text": (ORANGE, lambda: text_pair(0.0), TEXT, WRITING),
    "text, dropout and warm-up": (
        BLUE,
        lambda: text_pair(0.75),
        TEXT,
        WRITING | {"beta": pv.LinearSchedule(8)},
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="docs/figures/collapse.png")
    options = parser.parse_args()
    figure = new_figure(9, 3.2)
    axes = dict(zip(("digits", "text"), figure.subplots(1, 2), strict=True))
    for name, (color, make, data, settings) in RUNS.items():
        torch.manual_seed(0)
        pair = make()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            history = pv.fit(pair, data.train.x, progress=False, **settings)
        per_epoch = len(data.train.x) // settings.get("batch_size", 128)
        alarm = CollapseAlarm(units(pair, (data.train.x[:2].float(),)), len(history), per_epoch)
        heard = {epoch.epoch: alarm.heard(epoch) for epoch in history.epochs}
        spoke = {site: epoch for epoch, sites in heard.items() for site in sites}
        spoke |= dict.fromkeys(alarm.over(), len(history))
        for site in history.epochs[0].kl:
            kl = [epoch.kl[site] for epoch in history.epochs]
            print(f"{name:<28}{site:<4}{kl[-1]:8.3f}{min(kl):8.3f}   {spoke.get(site, 'silent')}")
            if color is not None:
                axis = axes[name.split(",")[0]]
                axis.plot(range(1, len(kl) + 1), kl, color=color, label=name, linewidth=1.3)
                if site in spoke:
                    axis.plot(spoke[site], kl[spoke[site] - 1], "o", color=color)
    for axis in axes.values():
        axis.axhline(0.2, color=GRAY, linewidth=0.8, linestyle=":")
        axis.set_yscale("log")
        axis.set_xlabel("epoch", fontsize=8)
        axis.set_ylabel("KL, nats per example", fontsize=8)
        axis.tick_params(labelsize=7)
        axis.legend(fontsize=7, frameon=False)
    figure.savefig(options.out, dpi=120)


if __name__ == "__main__":
    main()
