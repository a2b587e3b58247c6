# %% [markdown]
# # A table with holes: imputation with intervals
#
# After this tutorial you can fill the empty cells of a table, give an interval for each filled
# cell, and say for which rows the intervals are reliable. The notebook takes about half a minute
# of processor time, and runs offline.
#
# ## Data
#
# The Palmer penguins (Horst, Hill & Gorman, 2020) are 344 birds of three species: bill, flipper,
# body mass and sex. A few cells are empty. We hide 20 % of the other cells of five columns, so
# that we can compare each filled cell with its true value.

# %%
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from palmerpenguins import load_penguins
from sklearn.experimental import enable_iterative_imputer  # noqa: F401
from sklearn.impute import IterativeImputer

import pyro_vae as pv

EPOCHS = 400
NUM_SAMPLES = 1000

penguins = load_penguins().drop(columns="year")
numbers = ["bill_length_mm", "bill_depth_mm", "flipper_length_mm", "body_mass_g"]
random = np.random.default_rng(0)
holes = penguins.copy()
for column in [*numbers, "sex"]:
    holes.loc[random.random(len(holes)) < 0.2, column] = None
hidden = holes.isna() & penguins.notna()
holes.head()

# %% [markdown]
# `read_table` infers what each column holds. An empty cell is missing, and needs no mark.

# %%
table = pv.read_table(holes, dict.fromkeys(numbers, "continuous"))
print(table.schema)

# %% [markdown]
# ## Fit
#
# The likelihood has one factor for each column: Student-t for numbers, Bernoulli or categorical
# for words. The factor of an empty cell is 1, so the bound is one on the density of the observed
# cells. `ImportanceWeightedELBO` makes it tighter (MIWAE; Mattei & Frellsen, 2019). It needs a pair
# without global and group latents; fit others with the default objective.

# %%
torch.manual_seed(0)
likelihood = table.schema.likelihood(table.x)
vae = pv.VAE.mlp(table.x.shape[1:], latent_dim=4, hidden=(64,), likelihood=likelihood)
history = pv.fit(
    vae,
    table.x,
    objective=pv.ImportanceWeightedELBO(10),
    epochs=EPOCHS,
    batch_size=32,
    learning_rate_schedule=pv.CosineSchedule(EPOCHS),
    progress=False,
)
history

# %% [markdown]
# ## Impute
#
# For each row, `impute` draws latents from the guide and weights them by importance, so the
# imputations follow the posterior given the observed cells. `mean` has the posterior means, and
# the most probable category for words. `low` and `high` are intervals of 90 %. `draws` are
# complete copies of the table for multiple imputation.

# %%
found = pv.impute(vae, table.x, draws=20, num_samples=NUM_SAMPLES)
filled = table.filled(found.mean).to_pandas()  # only the empty cells change
print(found)
filled.head()

# %% [markdown]
# ## Compare with the truth
#
# The reference is scikit-learn's `IterativeImputer`: a chain of linear regressions, on the
# numbers and one-hot columns. The errors are in standard deviations of the column.
#
# **Expect** an error of about 1 for the mean of the column, and of about 0.4 for both others. So
# on this small table with nearly linear relations the VAE does not predict better. It gives what
# the regressions do not: an interval for each cell, of which about 90 % contain the true value,
# and categories.

# %%
one_hot = pd.get_dummies(holes, columns=["species", "island", "sex"], dtype=float)
regression = IterativeImputer(random_state=0, max_iter=50).fit_transform(one_hot)
guesses = {
    "column mean": holes.fillna(holes[numbers].mean()),
    "regressions": pd.DataFrame(regression, columns=one_hot.columns),
    "VAE": filled,
}
table_of_errors, inside = {}, []
for column in numbers:
    at, j = hidden[column].to_numpy(), table.schema.names.index(column)
    truth = penguins[column][at].to_numpy()
    table_of_errors[column] = {
        name: np.sqrt(np.mean((guess[column][at] - truth) ** 2)) / penguins[column].std()
        for name, guess in guesses.items()
    }
    low, high = found.low[at, j].numpy(), found.high[at, j].numpy()
    inside.append((low <= truth) & (truth <= high))
errors = pd.DataFrame(table_of_errors).T.round(2)
coverage = np.concatenate(inside).mean()
right = (filled["sex"] == penguins["sex"])[hidden["sex"]].mean()
print(f"{coverage:.0%} of the intervals of 90 % contain the true value")
print(f"{right:.0%} of the hidden sexes are filled with the true one")
errors

# %%
order = np.argsort(found.mean[at, j].numpy())
middle = found.mean[at, j].numpy()[order]
figure, axis = plt.subplots(figsize=(6.5, 2.8), layout="constrained")
bars = [middle - low[order], high[order] - middle]
axis.errorbar(range(len(middle)), middle, bars, fmt=".", color="C0", alpha=0.5, label="VAE, 90 %")
axis.plot(truth[order], "k.", label="hidden value")
axis.set(xlabel="hidden cell, sorted by its imputation", ylabel="body mass, g")
axis.legend()
plt.show()

# %% [markdown]
# ## Can I believe the intervals?
#
# Pareto k of a row tells whether its weights are reliable. **Expect** over 90 % of reliable rows.
# For the others, `method="refine"` fits the guide of the row first.

# %%
incomplete = table.x[found.missing.any(1)]
unsure = table.x[found.missing.any(1) & ~found.reliable]
print(f"{len(unsure)} of {len(incomplete)} rows with holes are not reliable")
if len(unsure):
    better = pv.impute(vae, unsure, method="refine", draws=20, num_samples=NUM_SAMPLES)
    print(f"after refinement: {int((~better.reliable).sum())}")

# %% [markdown]
# All of this assumes that a cell is missing *at random*: given the observed cells, its value does
# not decide whether it is missing. Here that is true, because we hid the cells at random. If
# large values are missing more often, see the second link below.
#
# ## What this page promises
#
# The statements below stop the notebook if they are wrong.

# %%
seen = holes[numbers].notna()
assert np.allclose(filled[numbers].to_numpy()[seen], holes[numbers].to_numpy()[seen])
assert (errors["VAE"] < errors["column mean"]).all()
# The others need the sizes above.
assert (errors["VAE"] < 0.75 * errors["column mean"]).all()
assert (errors["VAE"] < 1.4 * errors["regressions"]).all()
assert 0.84 < coverage < 0.97
assert right > 0.85
assert len(unsure) < 0.15 * len(incomplete)

# %% [markdown]
# ## Next
#
# - [Your own data](../how-to/your-own-data.md): kinds and roles of columns, the same from the
#   shell.
# - [Missing values](../how-to/missing-values.md): values that are missing because of their size;
#   your own pair with holes.
