# %% [markdown]
# # Your own pair, from an existing Pyro model
#
# After this tutorial you can turn a Pyro program that you already have into a *pair*, and use
# every tool of the library with it. The notebook takes about 45 seconds of processor time.
#
# ## The program that exists
#
# The data are the breast-cancer table of scikit-learn: 569 tumors with 30 features, standardized.
# The program is factor analysis with Student-t noise, which is robust to outliers. It has a
# plate, parameters by `pyro.param`, and one of Pyro's automatic guides.

# %%
import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from sklearn.datasets import load_breast_cancer
from torch import nn
from torch.distributions import constraints

import pyro_vae as pv

EPOCHS = 200
BUDGET = 15  # seconds for the diagnosis
STEPS = 3000

bunch = load_breast_cancer()
x = torch.tensor(bunch.data, dtype=torch.float)
x = (x - x.mean(0)) / x.std(0)
order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
train, validation, test = x[order].split([399, 57, 113])
labels = torch.tensor(bunch.target)[order][-113:]
FACTORS = 3


def model(x: torch.Tensor) -> None:
    weights = pyro.param("weights", lambda: 0.3 * torch.randn(FACTORS, 30))
    loc = pyro.param("loc", torch.zeros(30))
    scale = pyro.param("scale", torch.ones(30), constraint=constraints.positive)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(FACTORS), 1.0).to_event(1))
        pyro.sample("x", dist.StudentT(4.0, z @ weights + loc, scale).to_event(1), obs=x)


torch.manual_seed(0)
pyro.clear_param_store()
guide = AutoNormal(model)
svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO())
losses = [svi.step(train) for _ in range(STEPS)]
stock = -sum(losses[-50:]) / 50 / len(train)
print(f"stock SVI: ELBO of the training data {stock:.2f} nats per example")

# %% [markdown]
# This guide has a mean and a scale *for each row of the training data*. So it cannot serve
# minibatches or new rows, and you cannot measure the model on held-out data.
#
# ## Step 1: a module with `model` and `guide`
#
# A pair is an `nn.Module` with both programs as methods. The first try moves the code as it is.


# %%
class First(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.guide = AutoNormal(self.model)

    def model(self, x: torch.Tensor) -> None:
        model(x)


print(pv.check(First(), train[:16]))

# %% [markdown]
# ## Step 2: an amortized guide
#
# `check` says what is missing. The guide must compute q(z | x) from x, with a network. Three
# rules of the contract matter here. The plate has `dim=-1`. Latents are events (`.to_event(1)`).
# The programs count dimensions from the right, so that tools can add a dimension of samples on
# the left: `z @ weights` does this. Tensors are made with `x.new_zeros`, so that they are on the
# device of the data. `template` is for tools that draw data.


# %%
class Robust(nn.Module):
    def __init__(self, factors: int = FACTORS) -> None:
        super().__init__()
        self.factors = factors
        self.encoder = nn.Sequential(nn.Linear(30, 64), nn.ReLU(), nn.Linear(64, 2 * factors))

    def model(self, x: torch.Tensor) -> None:
        weights = pyro.param("weights", lambda: 0.3 * torch.randn(self.factors, 30))
        loc = pyro.param("loc", torch.zeros(30))
        scale = pyro.param("scale", torch.ones(30), constraint=constraints.positive)
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(self.factors), 1.0).to_event(1))
            pyro.sample("x", dist.StudentT(4.0, z @ weights + loc, scale).to_event(1), obs=x)

    def guide(self, x: torch.Tensor) -> None:
        mean, raw = self.encoder(x).chunk(2, -1)
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(mean, nn.functional.softplus(raw) + 1e-3).to_event(1))

    def template(self, n: int) -> tuple[torch.Tensor, ...]:
        """n rows of the right shape, for tools that draw data; the values have no meaning."""
        return (torch.zeros(n, 30),)


torch.manual_seed(0)
pair = Robust()
print(pv.check(pair, train[:16]))

# %% [markdown]
# ## Step 3: fit and measure
#
# `fit` is stochastic variational inference of the same two programs, with minibatches. Parameters
# of `pyro.param` become parameters of the pair, and Pyro's global parameter store stays as it is.
#
# **Expect** a training ELBO that is not lower than that of stock SVI, although one network
# replaces 399 means and scales, and now also numbers for the test data.


# %%
def fitted(factors: int) -> Robust:
    torch.manual_seed(0)
    pair = Robust(factors)
    pv.fit(
        pair,
        train,
        validation=validation,
        epochs=EPOCHS,
        batch_size=32,
        learning_rate=5e-3,
        learning_rate_schedule=pv.CosineSchedule(EPOCHS),
        progress=False,
    )
    return pair


pair = fitted(FACTORS)
own = pv.evaluate(pair, train, num_samples=100).elbo
print(f"training data: ELBO {stock:.2f} by stock SVI, {own:.2f} by the pair")
pv.evaluate(pair, test, num_samples=500)

# %% [markdown]
# ## Step 4: diagnose
#
# **Expect** that the *model* is at fault, by about 18 nats: with three factors, the residuals of
# the features are still correlated. The encoder is a smaller fault, of about a nat.

# %%
found = pv.diagnose(pair, test, train=train, budget=BUDGET, progress=False)
for blame in found.blamed:
    size = "size unknown" if blame.nats is None else f"{blame.nats:.1f} nats"
    print(f"{blame.part} ({size}): {blame.next}")

# %% [markdown]
# ## Step 5: follow the advice
#
# More latents are one number here. The rows of the test data are the same, so compare the
# differences by row: their standard error is smaller than that of each mean. **Expect** that ten
# factors are better by about 6 nats.

# %%
larger = fitted(10)
scores = [pv.log_likelihood(one, test, num_samples=500) for one in (pair, larger)]
difference = scores[1].per_datum - scores[0].per_datum
gain, error = float(difference.mean()), float(difference.std() / len(test) ** 0.5)
print(f"log p(x) of test data: {scores[0].value:.2f} with 3 factors, {scores[1].value:.2f} with 10")
print(f"difference {gain:.2f} ± {error:.2f} nats per example")

# %% [markdown]
# The codes are those of any pair: `encode` has the posterior means of new rows. The model never
# saw the diagnosis of the tumors, but the factors separate most of them.

# %%
codes = pv.encode(pair, test)["z"]
axes = codes[:, codes.var(0).argsort(descending=True)[:2]]
figure, axis = plt.subplots(figsize=(4.2, 3), layout="constrained")
for value, name in enumerate(("malignant", "benign")):
    axis.scatter(*axes[labels == value].T, s=12, label=name)
axis.set(xlabel="a factor of z", ylabel="another factor")
axis.legend()
plt.show()

# %% [markdown]
# ## What this page promises
#
# The statements below stop the notebook if they are wrong.

# %%
assert "row for each datum" in str(pv.check(First(), train[:16]))
assert not pv.check(Robust(), train[:16]).errors
assert own > stock - 0.5
assert found.blamed[0].part == "decoder"
assert gain > 3 * error > 0

# %% [markdown]
# ## Next
#
# - [Your own pair](../how-to/own-pairs.md): the whole contract; run folders, the command line,
#   discrete latents, masks.
# - [Pyro's idioms](../models/idioms.md): what each tool does with each style of Pyro program.
# - [Repeated measures](repeated-measures.ipynb): global latents, and Pyro's automatic guides
#   where they fit.
