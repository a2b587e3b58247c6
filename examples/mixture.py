"""Clusters of digits without labels: a mixture VAE.

    python examples/mixture.py [--epochs 60] [--out clusters.png]

Training sums out the component. Labels are used only at the end, to describe the clusters. The
figure has a row for each component, with means of digits drawn from it.

Expect: if each label is matched to one cluster, about 59 % of the test digits are in the cluster of
their label. The normalized mutual information of cluster and label is 0.62. A few of the 15
components stay empty. The program takes half a minute on one core.
"""

import argparse

import torch

import pyro_vae as pv
from pyro_vae.pairs import figures
from pyro_vae.plots import pictures

COMPONENTS = 15


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--out", default="clusters.png")
    options = parser.parse_args()
    torch.manual_seed(0)  # for the initial weights

    digits = pv.load_data("digits")
    pair = pv.MixtureVAE.mlp(
        digits.shape,
        components=COMPONENTS,
        latent_dim=6,
        hidden=(128, 64),
        likelihood=pv.DiscretizedLogistic,
    )
    pv.fit(
        pair,
        digits.train.x,
        validation=digits.validation.x,
        epochs=options.epochs,
        batch_size=64,
        learning_rate=2e-3,
        beta=pv.LinearSchedule(options.epochs / 4),
    )
    print(pv.evaluate(pair, digits.test.x, labels=digits.test.labels, num_samples=100))
    clusters = pv.predict(pair, digits.test.x).argmax(1)
    for k in clusters.unique().tolist():
        labels, counts = digits.test.labels[clusters == k].unique(return_counts=True)
        most = counts.argmax()
        print(f"component {k}: {counts.sum()} digits, {counts[most]} of them {labels[most]}")
    figure = pictures.by_value(pair, digits.test.x, [], "k", torch.arange(COMPONENTS))
    with open(options.out, "wb") as file:
        file.write(figures.png(figure))


if __name__ == "__main__":
    main()
