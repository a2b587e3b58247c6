"""Clusters of digits that nobody has labelled: a mixture VAE.

    python examples/mixture.py [--epochs 60] [--out clusters.png]

The component is summed out while the model is fitted; labels are used in the end only, to see what
the clusters are. The figure has a row for each component: means of digits drawn from it.

Expect: about 59 % of the test digits are in the cluster that is matched to their label, one for
each label, and a normalised mutual information of cluster and label of 0.62. A few of the 15
components stay empty. Takes half a minute of one core.
"""

import argparse

import torch

import pyro_vae as pv
from pyro_vae import plots

COMPONENTS = 15


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--out", default="clusters.png")
    options = parser.parse_args()
    torch.manual_seed(0)  # the first weights

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
        beta=pv.Linear(options.epochs / 4),
    )
    print(pv.evaluate(pair, digits.test.x, labels=digits.test.labels, num_samples=100))
    clusters = pv.predict(pair, digits.test.x).argmax(1)
    for k in clusters.unique().tolist():
        labels, counts = digits.test.labels[clusters == k].unique(return_counts=True)
        most = counts.argmax()
        print(f"component {k}: {counts.sum()} digits, {counts[most]} of them {labels[most]}")
    figure = plots.by_value(pair, digits.test.x, [], "k", torch.arange(COMPONENTS))
    with open(options.out, "wb") as file:
        file.write(plots.png(figure))


if __name__ == "__main__":
    main()
