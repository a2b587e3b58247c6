# %% [markdown]
# # Counts with covariates: library size and batch
#
# After this tutorial you can fit counts, such as the reads of genes in cells, so that the codes
# tell the type of a cell, and neither its depth nor its batch. You can also read from the model
# what a covariate does. The notebook takes about half a minute of processor time.
#
# ## Data
#
# The cells are simulated, so their types are known. Each of four types gives each of 50 genes its
# share of the reads. The total of a cell, its *library size*, varies more than tenfold. The cells
# are from two *batches*: in the second, a third of the genes is read twice as often. Counts are
# negative binomial: they vary more than Poisson counts.

# %%
import matplotlib.pyplot as plt
import pyro.distributions as dist
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor

import pyro_vae as pv

EPOCHS = 80
NUM_SAMPLES = 200

CELLS, GENES, TYPES, DISPERSION = (1200, 200, 600), 50, 4, 2.0
torch.manual_seed(0)
shares = dist.Dirichlet(torch.full((GENES,), 0.5)).sample((TYPES,))
kind, batch = torch.randint(TYPES, (sum(CELLS),)), torch.randint(2, (sum(CELLS),))
doubled = torch.arange(GENES) % 3 == 0
mean = shares[kind] * torch.where(doubled & (batch[:, None] == 1), 2.0, 1.0)
mean = dist.LogNormal(6.0, 0.8).sample((sum(CELLS), 1)) * mean / mean.sum(1, keepdim=True)
x = dist.GammaPoisson(DISPERSION, DISPERSION / mean.clamp(min=1e-6)).sample()
totals = x.sum(1, keepdim=True)
print(f"{len(x)} cells, totals from {int(totals.min())} to {int(totals.max())}")

# %% [markdown]
# ## Three models
#
# With `library_size=True` the means of the likelihood are *shares* of the total. The logarithm of
# the total is the last tensor of context. The tensors before it go to the encoder and to the
# decoder: here the batch, as a one-hot row. The models differ in one thing each: the likelihood,
# and whether the batch is given.


# %%
def context(name: str) -> list[Tensor]:
    given = [pv.one_hot(batch, 2)] if "batch" in name else []
    return [*given, totals.log()]


likelihoods = {
    "Poisson, batch given": pv.Poisson(library_size=True),
    "negative binomial": pv.NegativeBinomial(library_size=True),
    "negative binomial, batch given": pv.NegativeBinomial(library_size=True),
}
models, codes, scores = {}, {}, {}
for name, likelihood in likelihoods.items():
    parts = [part.split(CELLS) for part in (x, *context(name))]
    train, validation, test = zip(*parts, strict=True)
    torch.manual_seed(0)
    shapes = [tuple(part.shape[1:]) for part in context(name)]
    models[name] = pv.VAE.mlp((GENES,), 4, (64,), likelihood, context_shapes=shapes)
    pv.fit(
        models[name],
        *train,
        validation=validation,
        beta=pv.LinearSchedule(EPOCHS / 2),
        epochs=EPOCHS,
        batch_size=64,
        learning_rate=2e-3,
        progress=False,
    )
    codes[name] = pv.encode(models[name], *test)["z"]
    scores[name] = pv.log_likelihood(models[name], *test, num_samples=NUM_SAMPLES)

# %% [markdown]
# ## Which likelihood?
#
# All three models describe the same rows given the same totals, so their log p(x | context) can be
# compared. **Expect** that the negative binomial is better than the Poisson by about 60 nats for
# each cell. The batch adds only a fraction of a nat, because the codes of the second model contain
# it. For many cells the estimate is not reliable (Pareto k is over its limit, 0.57 for 200
# samples), most of all with the Poisson, so their log p(x) is a lower bound. A difference of 60
# nats can be believed all the same. One of 0.3 nats cannot, and [log p(x) from both
# sides](../diagnostics/annealing.md) is the next step if it matters.

# %%
print(f"{'model':<32}{'log p(x | context)':>20}{'unreliable cells':>20}")
for name, score in scores.items():
    unreliable = float(score.unreliable.double().mean())
    print(f"{name:<32}{score.value:>20.1f}{unreliable:>20.0%}")

# %% [markdown]
# ## What do the codes contain?
#
# A good code tells the type, and not the batch. A linear classifier measures this: half of the
# test cells train it, and the others test it. Chance is about 25 % for the type and 50 % for the
# batch. **Expect** the right type for nearly every cell, with each model. The codes of the model
# without the batch tell the batch much better than chance, and those of the others hardly do.


# %%
def accuracy(code: Tensor, labels: Tensor) -> float:
    half = len(code) // 2
    probe = LogisticRegression(max_iter=1000).fit(code[:half], labels[:half])
    return float(probe.score(code[half:], labels[half:]))


of_type, of_batch = kind[-CELLS[2] :], batch[-CELLS[2] :]
probes = {name: (accuracy(code, of_type), accuracy(code, of_batch)) for name, code in codes.items()}
print(f"{'linear classifier of the codes':<32}{'type':>8}{'batch':>8}")
for name, (right_type, right_batch) in probes.items():
    print(f"{name:<32}{right_type:>8.0%}{right_batch:>8.0%}")

# %%
figure, axes = plt.subplots(1, 2, figsize=(7, 3.2), layout="constrained")
for axis, name in zip(axes, list(codes)[1:], strict=True):
    code = codes[name] - codes[name].mean(0)
    plane = code @ torch.linalg.svd(code, full_matrices=False).Vh[:2].T
    for which, marker in ((0, "o"), (1, "x")):
        rows = of_batch == which
        axis.scatter(*plane[rows].T, c=of_type[rows], cmap="tab10", vmax=9, s=12, marker=marker)
    axis.set(title=name, xticks=[], yticks=[])
figure.suptitle("codes, two principal components; color: type, marker: batch", fontsize=9)
plt.show()

# %% [markdown]
# ## What does the batch do?
#
# The decoder answers a question about each cell: which shares would it have in the other batch?
# Give it the same codes with each batch, and a total of 1. **Expect** a ratio near the
# truth, 2. Compare genes with genes, because shares add up to one: if a third of them doubles,
# the others shrink.

# %%
model = models["negative binomial, batch given"]
code = codes["negative binomial, batch given"]
with torch.no_grad():
    first, second = (
        model.decoder(code, pv.one_hot(torch.full((len(code),), b), 2), torch.zeros(len(code), 1))
        for b in (0, 1)
    )
    change = (second.mean / first.mean).log2().median(0).values
ratio = float(2 ** (change[doubled].median() - change[~doubled].median()))
print(f"genes read twice as often against the others: {ratio:.2f} times")

# %% [markdown]
# ## What this page promises
#
# The statements below stop the notebook if they are wrong.

# %%
assert probes["negative binomial, batch given"][0] > 0.9
# The others need the sizes above.
poisson, alone, given = (score.value for score in scores.values())
assert given - poisson > 40
assert abs(given - alone) < 2
assert all(right_type > 0.95 for right_type, _ in probes.values())
assert probes["negative binomial"][1] > 0.7
assert probes["negative binomial, batch given"][1] < 0.62
assert 1.7 < ratio < 2.4

# %% [markdown]
# ## Next
#
# - [Cells](../how-to/your-own-data.md#cells-counts-of-genes): the same for a `.h5ad` file, in one
#   command: `pyro-vae train cells.h5ad --batch batch --library-size`.
# - [Conditional models](../models/conditional.md): other context, and a prior that depends on it.
# - [Choosing a model](choosing.ipynb): by log p(x), LOO and diagnostics.
