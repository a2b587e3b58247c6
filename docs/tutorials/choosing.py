# %% [markdown]
# # Choosing a model: latent dimension, prior and guide
#
# After this tutorial you can choose between models by numbers that you can defend. The notebook
# takes about 150 seconds of processor time.
#
# Four rules:
#
# - Compare log p(x) of *validation* data, and look at the test data once, at the end.
# - Compare **differences by row**: two models are good at the same images, so the error of the
#   difference is small.
# - Change one thing at a time, and the guide last: a better guide does not change p(x).
# - Check that log p(x) is reliable before you compare it.

# %%
import warnings

import arviz as az
import matplotlib.pyplot as plt
import torch

import pyro_vae as pv

EPOCHS = 60
REFIT_EPOCHS = 30
NUM_SAMPLES = 300
NUM_DRAWS = 60

digits = pv.load_data("digits")
x, validation, test = (part.x for part in (digits.train, digits.validation, digits.test))


def fitted(latent_dim: int, prior: type = pv.StandardNormal, seed: int = 0) -> pv.VAE:
    torch.manual_seed(seed)
    vae = pv.VAE.mlp(
        digits.shape,
        latent_dim,
        hidden=(128, 64),
        likelihood=pv.DiscretizedLogistic,
        posterior=pv.FullRankNormal,
        prior=prior,
    )
    pv.fit(
        vae,
        x,
        validation=validation,
        beta=pv.LinearSchedule(EPOCHS / 2),
        epochs=EPOCHS,
        batch_size=64,
        learning_rate=2e-3,
        learning_rate_schedule=pv.CosineSchedule(EPOCHS),
        progress=False,
    )
    return vae


def difference(name: str, base: str) -> tuple[float, float]:
    """Return the mean difference of log p(x) by row, and its standard error."""
    by_row = scores[name].per_datum - scores[base].per_datum
    return float(by_row.mean()), float(by_row.std() / len(by_row) ** 0.5)


def show(names: list[str], base: str) -> None:
    print(f"{'model':<18}{'log p(x)':>10}{'difference':>16}{'active':>8}{'unreliable':>12}")
    for name in names:
        one, (mean, error) = scores[name], difference(name, base)
        codes = pv.encode(models[name], validation)["z"]
        active = int((codes.var(0) > 0.01).sum())
        print(
            f"{name:<18}{one.value:>10.2f}{mean:>9.2f} ± {error:.2f}{active:>8}"
            f"{int(one.unreliable.sum()):>12}"
        )


def add(name: str, vae: pv.VAE) -> None:
    models[name] = vae
    scores[name] = pv.log_likelihood(vae, validation, num_samples=NUM_SAMPLES)


models, scores = {}, {}

# %% [markdown]
# ## Latent dimension
#
# Fit the same networks with 2, 8 and 16 latents, and one of them again with another seed.
# **Expect** that 8 latents are better than 2 by about 3 nats, and 16 better than 8 by about 1
# nat. The other seed differs by 0.3 nats. So do not believe a difference between two models that
# is not several times larger than this, however small its standard error: that error does not
# contain the randomness of training.

# %%
for dim in (2, 8, 16):
    add(f"{dim} latents", fitted(dim))
add("8, another seed", fitted(8, seed=1))
show(list(models), "8 latents")

# %% [markdown]
# A third of the rows or more are *unreliable*: their Pareto k is high, so their log p(x) is a
# bound that may be too low. It is so for all models, and more for larger ones, so the comparison
# is conservative for the larger ones. [The first tutorial](first-model.ipynb) shows how to get
# reliable values.
#
# ## Prior
#
# Now the prior of the model with 8 latents changes. **Expect** a gain of about 0.6 nats by a
# mixture and 1.4 to 2.2 nats by a flow.

# %%
add("8, mixture prior", fitted(8, pv.GaussianMixture))
add("8, flow prior", fitted(8, pv.FlowPrior))
show(["8 latents", "8, mixture prior", "8, flow prior"], "8 latents")

# %%
names = [name for name in models if name != "8 latents"]
means, errors = zip(*(difference(name, "8 latents") for name in names), strict=True)
figure, axis = plt.subplots(figsize=(5.6, 2.2), layout="constrained")
axis.errorbar(means, names, xerr=[2 * error for error in errors], fmt="o")
axis.axvline(0, color="gray", linewidth=0.8)
axis.set(xlabel="log p(x) minus that of 8 latents, nats per example (± 2 errors)")
plt.show()

# %% [markdown]
# ## Leave-one-out
#
# `to_arviz` exports draws, and ArviZ's `compare` ranks models by LOO. The parameters of these
# pairs are single values, so LOO estimates the same as log p(x), in total for all rows. On
# held-out data this is fair; on training data it would be too optimistic, since no model is
# fitted again. **Expect** the same order as above.

# %%
exported = {
    name: pv.to_arviz(
        models[name], validation, num_samples=NUM_DRAWS, num_particles=20, progress=False
    )
    for name in ("2 latents", "8 latents", "8, flow prior")
}
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # a Pareto k over 0.5, as above
    loo = az.compare(exported)
loo[["rank", "elpd_loo", "p_loo", "elpd_diff", "dse"]].round(1)

# %% [markdown]
# ## Guide
#
# The models above have a full-rank normal as guide. Is this better than a diagonal one? Keep the
# *model*, and fit both guides to it anew. All rows of this table have the same log p(x), so the
# higher ELBO is the better guide. **Expect** that the diagonal guide loses some tenths of a nat.

# %%
best = models["8, flow prior"]
guides = {
    family.__name__: pv.refit_guide(
        best,
        x,
        posterior=family,
        validation=validation,
        epochs=REFIT_EPOCHS,
        batch_size=64,
        progress=False,
    )
    for family in (pv.DiagonalNormal, pv.FullRankNormal)
}
elbos = {
    name: pv.log_likelihood(guide, validation, num_samples=NUM_SAMPLES).elbo
    for name, guide in guides.items()
}
for name, elbo in elbos.items():
    print(f"{name:<18}ELBO {elbo:.2f}")

# %% [markdown]
# ## The result
#
# The choice is made, so now look at the test data, once.

# %%
print(pv.log_likelihood(best, test, num_samples=NUM_SAMPLES))

# %% [markdown]
# ## What this page promises
#
# The statements below stop the notebook if they are wrong.

# %%
assert all(one.value > one.elbo for one in scores.values())
# The others need the sizes above.
assert difference("2 latents", "8 latents")[0] < -0.5
assert abs(difference("8, another seed", "8 latents")[0]) < 1.5
assert difference("8, flow prior", "8 latents")[0] > 0
assert list(loo.index)[-1] == "2 latents"
assert elbos["FullRankNormal"] > elbos["DiagonalNormal"] - 0.3

# %% [markdown]
# ## Next
#
# - [The verdict](../diagnostics/verdict.md): which part is at fault, in nats.
# - [Other guides for one model](../how-to/guide-swap.md) and [ArviZ](../diagnostics/arviz.md).
