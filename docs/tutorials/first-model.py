# %% [markdown]
# # A first model: from data to "can I believe it?"
#
# After this tutorial you have fitted a VAE to images of digits, measured it on held-out data, and
# decided which of its numbers you can report. The notebook takes about a minute of processor time
# and runs offline.
#
# ## Data
#
# The digits of scikit-learn are 1,797 images of 8 by 8 pixels. `load_data` splits them into
# training, validation and test data. Validation data choose the best epoch. Test data are used
# only for the numbers that you report.

# %%
import matplotlib.pyplot as plt
import torch

import pyro_vae as pv

EPOCHS = 60  # passes over the training data
BUDGET = 15  # seconds for the diagnosis
NUM_SAMPLES = 200  # importance samples of each image
REFIT_EPOCHS = 20
DRAWN = 15000  # images that the model draws to fit its new guide
NUM_REFINED = 60  # test images that are analyzed further

torch.manual_seed(0)  # for the initial weights
digits = pv.load_data("digits")
print(digits)

# %% [markdown]
# ## The model
#
# A VAE is a *pair* of Pyro programs. The model draws a latent vector z from a standard normal,
# and then the 64 pixels given z. The guide is the approximate posterior q(z | x), a normal whose
# mean and scale an encoder computes from the image. `DiscretizedLogistic` is a likelihood for
# pixels with 256 levels, so log p(x) is that of the images as they are.

# %%
vae = pv.VAE.mlp(digits.shape, latent_dim=16, hidden=(128, 64), likelihood=pv.DiscretizedLogistic)

# %% [markdown]
# ## Fit
#
# `fit` maximizes the ELBO, a lower bound of log p(x), by stochastic variational inference. The
# weight on the KL rises from 0 to 1 in the first half of the epochs. Without this warm-up, units
# of z may *collapse*: they stay at the prior.

# %%
history = pv.fit(
    vae,
    digits.train.x,
    validation=digits.validation.x,
    beta=pv.LinearSchedule(EPOCHS / 2),
    epochs=EPOCHS,
    batch_size=64,
    learning_rate=2e-3,
    progress=False,
)
history

# %% [markdown]
# **Expect** that the bounds rise quickly and flatten. A growing distance between training and
# validation data would be overfitting.

# %%
history.plot()

# %% [markdown]
# ## Measure
#
# `evaluate` uses the test data. All numbers are nats per example, and higher bounds are better.
# `log_likelihood` is an estimate of log p(x) by importance sampling. It is above the ELBO, because
# the guide is not the exact posterior. It is the number for a paper *if* it is reliable, which the
# diagnosis below tells.
#
# **Expect** an ELBO of about -166, log p(x) of about -164 (3.7 bits per pixel), and 4 to 8 of 16
# active units. An active unit carries information about the image. With no active unit, see
# [Posterior collapse](../diagnostics/collapse.md).

# %%
result = pv.evaluate(vae, digits.test.x, num_samples=NUM_SAMPLES)
result

# %% [markdown]
# Look at what the model does. The first row has test images, and the second row has their
# reconstructions: z is drawn from the guide and decoded. The third row has new images: z is drawn
# from the prior. **Expect** reconstructions that look alike, and new images of which most, but
# not all, look like digits.

# %%
rows = {
    "test": digits.test.x[:12],
    "reconstructed": 255 * pv.reconstruct(vae, digits.test.x[:12]),
    "new": 255 * pv.sample(vae, 12, seed=1),
}
figure, axes = plt.subplots(3, 12, figsize=(7, 1.9), layout="constrained")
for line, (name, images) in zip(axes, rows.items(), strict=True):
    line[0].set_ylabel(name, rotation=0, ha="right", va="center")
    for axis, image in zip(line, images, strict=True):
        axis.imshow(image.squeeze(), cmap="gray_r", vmin=0, vmax=255)
        axis.set(xticks=[], yticks=[])
plt.show()

# %% [markdown]
# ## Can I believe it?
#
# A bound that rises shows that training works. It does not show that q(z | x) is close to the
# posterior, or that the model is right. `diagnose` runs several tools within a budget of seconds
# and sums up. Read the titles in their order: *At fault* names the part of the pair with the
# largest error, and *Reliable* the numbers that you can report.

# %%
found = pv.diagnose(vae, digits.test.x, train=digits.train.x, budget=BUDGET, progress=False)
print(found.summary)

# %% [markdown]
# **Expect** the answer "not yet". The encoder is at fault with about 2 nats, and log p(x) is *not
# reliable*: the weights of most images are too uneven. Pareto k measures this. The estimate for
# an image is reliable if its k is at most 0.57, the limit for 200 samples (0.7 from 2,200 on).
#
# ## Mend the guide
#
# The summary says what to try: a larger encoder, fitted to training data and many draws of the
# model. The model, and so log p(x), stays as it is. `FullRankNormal` also gives the guide
# correlations between latents.

# %%
drawn = pv.sample(vae, DRAWN, seed=2)  # between 0 and 1, but the data are bytes from 0 to 255
rows = torch.cat([digits.train.x, (255 * drawn).round().byte()])
mended = pv.refit_guide(
    vae,
    rows,
    posterior=pv.FullRankNormal,
    hidden=(256, 256),
    epochs=REFIT_EPOCHS,
    batch_size=128,
    learning_rate_schedule=pv.CosineSchedule(REFIT_EPOCHS),
    progress=False,
)
few = digits.test.x[:NUM_REFINED]
refined = pv.refine(mended, few, progress=False)
annealed = pv.anneal(vae, few, num_chains=8, progress=False)

# %% [markdown]
# `refine` fits the guide of each row further, for the rows that you analyze. `anneal` is another
# estimate of log p(x), which does not need a good guide.

# %%
guides = {"first guide": (vae, few), "mended guide": (mended, few)}
guides["refined guide"] = (refined.pair, *refined.batch)
found_by = {
    name: pv.log_likelihood(*batch, num_samples=NUM_SAMPLES) for name, batch in guides.items()
}
print(f"{NUM_REFINED} rows{'ELBO':>16}{'log p(x)':>12}{'unreliable rows':>18}")
for name, one in found_by.items():
    print(f"{name:<14}{one.elbo:>9.2f}{one.value:>12.2f}{int(one.unreliable.sum()):>18}")
print(f"annealing{annealed.value:>26.2f}")

# %% [markdown]
# **Expect** that the ELBO rises from line to line and the number of unreliable rows falls. The
# first guide leaves about 40 of 60 rows unreliable, the mended guide 30, and the refined guide 7.
# Now two methods with different weaknesses agree on log p(x): importance sampling with the
# refined guide, and annealing. This is the number to believe, for these 60 images. For all 360, a
# paper would report `pv.anneal(vae, digits.test.x)`, which takes six times as long: annealing
# needs neither the mended nor the refined guide.
#
# ## What this page promises
#
# The statements below stop the notebook if they are wrong.

# %%
first, better, best = found_by.values()
assert result.log_likelihood > result.elbo  # the guide is not the exact posterior
assert best.elbo > better.elbo
# The others need the sizes above.
assert 2 <= result.active_units["z"] <= 12  # the latents have not collapsed
assert any(one.part == "encoder" for one in found.blamed)
assert best.elbo > better.elbo > first.elbo
assert best.unreliable.sum() < first.unreliable.sum()
assert abs(best.value - annealed.value) < 0.5

# %% [markdown]
# ## Next
#
# - [Which part is at fault](../diagnostics/verdict.md): the rules behind the summary.
# - [Choosing a model](choosing.ipynb): more latents, another prior, another guide.
# - [Your own data](../how-to/your-own-data.md) and [your own pair](own-pair.ipynb).
