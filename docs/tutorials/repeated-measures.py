# %% [markdown]
# # Repeated measures: a hierarchical Bayesian model
#
# After this tutorial you can fit a model with global coefficients and an effect for each group,
# let small groups borrow from the others, and check the posterior of all of them. The notebook
# takes about half a minute of processor time.
#
# ## Data
#
# 48 patients have 1 to 8 visits each. Half of the patients are treated. At each visit a device
# measures one value, with a known error of 0.7. The data are simulated, so the truth is known,
# and the exact posterior too.

# %%
import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from torch import nn

import pyro_vae as pv

EPOCHS = 2000
NUM_DRAWS = 1000

PATIENTS, ERROR, TAU = 48, 0.7, 0.8
BETA = torch.tensor([2.0, 0.3, -1.0])  # intercept, change per year, effect of the treatment

torch.manual_seed(0)
visits = 1 + torch.arange(PATIENTS) % 8
patient = torch.arange(PATIENTS).repeat_interleave(visits)
treated = (torch.arange(PATIENTS) // 8 % 2).float()
years = torch.rand(len(patient)) * 3
design = torch.stack([torch.ones(len(patient)), years, treated[patient]], 1)
effect = TAU * torch.randn(PATIENTS)
y = (design @ BETA + effect[patient] + ERROR * torch.randn(len(patient)))[:, None]
print(f"{len(y)} visits of {PATIENTS} patients, {int(treated.sum())} of them treated")

# %% [markdown]
# ## The pair
#
# $$\beta \sim N(0, 2^2), \quad \tau \sim \mathrm{LogNormal}(-0.5, 0.5), \quad
# u_g \sim N(0, \tau^2), \quad y_i \sim N(x_i \beta + u_{g(i)},\ 0.7^2)$$
#
# `beta` and `tau` are *global latents*, because they are outside of all plates. `u` is a *group
# latent* in the plate of the patients. The patient and the covariates of each visit are
# *context*: tensors with a row for each visit. Tools add a dimension of samples on the left. So
# write `u[..., patient]` and not `u[patient]`, and `(design * beta).sum(-1)` and not
# `design @ beta`: with samples, `beta` has the shape (samples, 1, 3). `template` is for tools that
# draw data from the model.
#
# The guide is any Pyro guide. We take two of Pyro's, which differ in one word.


# %%
class Trial(nn.Module):
    def __init__(self, autoguide: type) -> None:
        super().__init__()
        self.guide = autoguide(self.model)

    def model(self, y: torch.Tensor, patient: torch.Tensor, design: torch.Tensor) -> None:
        beta = pyro.sample("beta", dist.Normal(y.new_zeros(3), 2.0).to_event(1))
        tau = pyro.sample("tau", dist.LogNormal(-0.5, 0.5))
        with pyro.plate("patients", PATIENTS, dim=-1):
            u = pyro.sample("u", dist.Normal(0.0, tau))
        with pyro.plate("data", len(y), dim=-1):
            mean = (design * beta).sum(-1) + u[..., patient]
            pyro.sample("y", dist.Normal(mean[..., None], ERROR).to_event(1), obs=y)

    def template(self, n: int) -> tuple[torch.Tensor, ...]:
        return torch.zeros(n, 1), torch.arange(n) % PATIENTS, torch.zeros(n, 3)


print(pv.check(Trial(AutoNormal), y, patient, design))

# %% [markdown]
# ## Fit
#
# `AutoNormal` gives every latent its own normal (mean field). `AutoMultivariateNormal` gives all
# latents one normal with all correlations. There are few visits, so all of them are one
# minibatch. Eight draws for each step make the gradient less noisy. They run together, in a plate
# to the left of the model's own: `max_plate_nesting=1` says that the model has plates at dimension
# -1 only. `history["elbo"]` is in nats
# per visit; times the number of visits it is a bound on the log density of all data.

# %%
pairs, bounds = {}, {}
for name, autoguide in (("mean field", AutoNormal), ("full rank", AutoMultivariateNormal)):
    torch.manual_seed(1)
    pairs[name] = Trial(autoguide)
    history = pv.fit(
        pairs[name],
        y,
        patient,
        design,
        epochs=EPOCHS,
        batch_size=len(y),
        learning_rate=0.03,
        learning_rate_schedule=pv.CosineSchedule(EPOCHS),
        objective=Trace_ELBO(num_particles=8, max_plate_nesting=1, vectorize_particles=True),
        progress=False,
    )
    bounds[name] = len(y) * sum(history["elbo"][-50:]) / 50
    print(f"{name:<12}ELBO of all data {bounds[name]:.1f}")

# %% [markdown]
# ## The exact answer
#
# Given $\tau$ the model is linear and normal, so the posterior of the coefficients and effects is
# a normal, and p(y | tau) is known. A grid over $\tau$ gives the rest. You do not have this in
# practice; here it shows which guide is right.

# %%
rows = torch.cat([design, nn.functional.one_hot(patient, PATIENTS)], 1).double()
values = y[:, 0].double()
grid = torch.linspace(0.05, 3, 300, dtype=torch.double)
found = []
for tau in grid:
    prior = torch.cat([torch.full((3,), 4.0), (tau**2).expand(PATIENTS)]).double()
    covariance = torch.linalg.inv(rows.T @ rows / ERROR**2 + torch.diag(1 / prior))
    mean = covariance @ rows.T @ values / ERROR**2
    spread = ERROR**2 * torch.eye(len(y)) + (rows * prior) @ rows.T
    log_p = dist.MultivariateNormal(torch.zeros_like(values), spread).log_prob(values)
    found.append((log_p + dist.LogNormal(-0.5, 0.5).log_prob(tau), mean, covariance.diagonal()))
log_p, means, variances = (torch.stack(part) for part in zip(*found, strict=True))
weights = log_p.softmax(0)
log_p_y = float(log_p.logsumexp(0) + (grid[1] - grid[0]).log())
exact = weights @ means
exact_sd = (weights @ (variances + (means - exact) ** 2)).sqrt()
print(f"log p(y) {log_p_y:.1f}")

# %% [markdown]
# ## Is the posterior right?
#
# **Expect** that both guides have the means about right, and that only one has the right width.
# Mean field says that the effect of the treatment is known to 0.07. The truth is 0.28, four times
# as much: the effects of the patients and that of the treatment explain the same data, and mean
# field cannot express this. Both ELBOs are below log p(y), mean field by 3 nats and full rank by
# less than 1.

# %%
draws = {
    name: pv.posterior(pair, y, patient, design, draws=NUM_DRAWS, progress=False)
    for name, pair in pairs.items()
}
print(f"{'effect of the treatment':<26}{'mean':>8}{'sd':>8}{'distance of the ELBO':>24}")
print(f"{'exact':<26}{exact[2]:>8.2f}{exact_sd[2]:>8.2f}")
for name, drawn in draws.items():
    treatment, distance = drawn["beta"][:, 2], log_p_y - bounds[name]
    print(f"{name:<26}{treatment.mean():>8.2f}{treatment.std():>8.2f}{distance:>24.2f}")

# %%
figure, axis = plt.subplots(figsize=(6, 2.4), layout="constrained")
line = torch.linspace(-2, 0.2, 200)
normal = dist.Normal(float(exact[2]), float(exact_sd[2]))
axis.plot(line, normal.log_prob(line).exp(), "k", label="exact (a normal of its moments)")
for name, drawn in draws.items():
    axis.hist(drawn["beta"][:, 2], 40, density=True, alpha=0.5, label=name)
axis.axvline(BETA[2], color="gray", linestyle=":", label="truth of the simulation")
axis.set(xlabel="effect of the treatment", yticks=[])
axis.legend(fontsize=8)
plt.show()

# %% [markdown]
# Without an exact answer, `global_weights` tells the same. It compares draws of the guide with
# the posterior by importance weights. `num_samples` would be the samples of local latents for each
# draw. There are none here, so 1 is enough. **Expect** that it rejects mean field, and accepts full
# rank. The table has a row for each unit: *shift* is the guide's mean minus the posterior's, in
# posterior standard deviations, and *scale* the ratio of the standard deviations (0 and 1 are
# exact). Without a reliable Pareto k, as for mean field, these columns mean nothing.

# %%
checks = {
    name: pv.global_weights(
        pair, y, patient, design, num_draws=NUM_DRAWS, num_samples=1, progress=False
    )
    for name, pair in pairs.items()
}
for name, one in checks.items():
    print(f"{name:<12}Pareto k {one.pareto_k:.2f}, reliable: {one.reliable}")

good = checks["full rank"]
print(f"{'unit':<10}{'shift':>8}{'scale':>8}")
for i in range(8):  # beta and tau, then the first patients
    print(f"{good.units[i]:<10}{good.shift[i]:>8.2f}{good.scale_ratio[i]:>8.2f}")
worst, spread = good.shift.abs().max(), good.scale_ratio
print(f"all {len(good.units)} units: shifts up to {worst:.2f}, ", end="")
print(f"scales {spread.min():.2f} to {spread.max():.2f}")

# %% [markdown]
# `pv.nuts` is the next reference. It needs two minutes here, so this page does not run it: its
# means differ from the full-rank guide by at most 0.14 standard deviations.
#
# ## Partial pooling
#
# A patient's own mean is a noisy estimate of the effect after one visit, and a good one after
# eight. The posterior mean shrinks it towards 0, most for patients with few visits. **Expect**
# points between the diagonal (no pooling) and the horizontal line (complete pooling), and an
# error that is smaller than without pooling.

# %%
residual = (y - design @ draws["full rank"]["beta"].mean(0)[:, None])[:, 0]
own = torch.zeros(PATIENTS).index_add(0, patient, residual) / visits
pooled = draws["full rank"]["u"].mean(0)
figure, axis = plt.subplots(figsize=(4.6, 3.2), layout="constrained")
axis.axline((0, 0), slope=1, color="gray", linewidth=0.8)
axis.axhline(0, color="gray", linewidth=0.8)
points = axis.scatter(own, pooled, c=visits, cmap="viridis", s=18)
figure.colorbar(points, label="visits")
axis.set(xlabel="effect from the patient's own visits", ylabel="posterior mean")
plt.show()
errors = [float((estimate - effect).square().mean().sqrt()) for estimate in (own, pooled)]
print(
    f"error of the effects: {errors[0]:.2f} without pooling, {errors[1]:.2f} with partial pooling"
)

# %% [markdown]
# ## What this page promises
#
# The statements below stop the notebook if they are wrong.

# %%
narrow, right = (drawn["beta"][:, 2].std() / exact_sd[2] for drawn in draws.values())
assert narrow < 0.4
assert not checks["mean field"].reliable
# The others need the sizes above.
assert 0.75 < right < 1.25
assert bounds["mean field"] < bounds["full rank"] < log_p_y + 1
assert errors[1] < errors[0]

# %% [markdown]
# ## Next
#
# - [Global and group latents](../models/global-latents.md): which check when, new groups, NUTS.
# - [The multilevel VAE](../models/multilevel.md): a latent vector for each group, with networks,
#   for groups not seen before.
# - [Your own pair](own-pair.ipynb): an existing Pyro model, step by step.
