"""The multilevel VAE against linear-Gaussian random effects, which have a closed form."""

import math

import numpy as np
import pyro
import pytest
import torch
from multilevel_helpers import Effects

import pyro_vae as pv
from pyro_vae.data.sources import Arrays
from pyro_vae.errors import UsageError

SIZES = [1, 4, 2, 5, 3, 1]


@pytest.fixture(scope="module")
def effects():
    return Effects()


@pytest.fixture(scope="module")
def groups(effects):
    return pv.by_group(*effects.groups(SIZES))


@pytest.fixture(scope="module")
def truth(effects, groups):
    """The exact log p of each group."""
    pairs = zip(groups.x, groups.sizes, strict=True)
    return torch.stack([effects.log_p(x[:n]) for x, n in pairs])


def off(found, truth):
    """The distance of estimates from the truth, in standard errors."""
    return (found.per_datum - truth).abs() / found.standard_errors


def test_the_exact_guide_gives_log_p_of_each_group_without_error(effects, groups, truth):
    found = pv.log_likelihood(effects.pair(), *groups.batch, num_samples=3)
    assert torch.allclose(found.per_datum, truth, atol=1e-9)
    assert torch.allclose(found.elbo_per_datum, truth, atol=1e-9)


def test_importance_samples_over_u_and_z_give_log_p_of_a_group(effects, groups, truth):
    found = pv.log_likelihood(effects.pair(1.15), *groups.batch, num_samples=4000)
    assert bool((found.standard_errors > 0.005).all())
    assert bool((off(found, truth) < 4.5).all())
    assert bool((found.elbo_per_datum < truth - 0.02).all())


def test_evaluate_reports_nats_per_group(effects, groups, truth):
    found = pv.evaluate(effects.pair(), *groups.batch, num_samples=5)
    assert found.log_likelihood == pytest.approx(truth.mean().item(), abs=1e-9)
    assert found.num_examples == len(SIZES)


def test_the_kl_of_u_is_that_of_its_posterior(effects, groups):
    mean, covariance = effects.posterior_u(groups.x, groups.rows >= 0)
    q = torch.distributions.MultivariateNormal(mean, covariance)
    p = torch.distributions.MultivariateNormal(torch.zeros(2).double(), torch.eye(2).double())
    kl = torch.distributions.kl_divergence(q, p).mean().item()
    found = pv.evaluate(effects.pair(), *groups.batch, num_samples=2)
    assert found.kl_by_site["u"] == pytest.approx(kl, abs=0.5)  # an estimate of 10 draws


@pytest.mark.thorough
def test_nuts_finds_the_posterior_of_u():
    """Of a group of two among three members: NUTS must not move the padding."""
    effects = Effects(1, 1, 2)
    groups = pv.by_group(*effects.groups([2]), members=3)
    found = pv.nuts(
        effects.pair(), *groups.batch, num_draws=150, warmup=50, num_chains=2, progress=False
    )
    mean, covariance = effects.posterior_u(groups.x, groups.rows >= 0)
    at = found.units.index("u[0]")
    error = (found.moments.mean[0, at] - mean[0, 0]).abs() / found.mean_standard_error[0, at]
    assert error < 4.5
    scale = covariance[0, 0, 0].sqrt()
    assert found.moments.standard_deviation[0, at] == pytest.approx(scale.item(), rel=0.25)
    moves = dict(zip(found.units, found.moves[0].tolist(), strict=True))
    assert moves == {"u[0]": True, "z[0][0]": True, "z[1][0]": True, "z[2][0]": False}


def test_refine_closes_the_gap_of_a_wrong_guide(effects, groups, truth):
    result = pv.refine(
        effects.pair(1.6), *groups.batch, steps=150, num_samples=50, engine="eager", progress=False
    )
    before, after = (truth - part.elbo_per_datum for part in (result.before, result.after))
    assert bool((before > 0.2).all())
    assert bool((after.abs() < 0.1 * before + 0.03).all())
    codes = pv.encode(result.pair, *result.batch)
    mean, covariance = effects.posterior_u(groups.x, groups.rows >= 0)
    scale = covariance.diagonal(dim1=-2, dim2=-1).sqrt()
    assert bool(((codes["u"] - mean).abs() < 0.25 * scale).all())


# Invariances


def trained_like(members=5, **keywords):
    torch.manual_seed(0)
    pair = pv.MultilevelVAE.mlp((3,), 2, 2, (6,), members=members, **keywords)
    return pair.double()


def measured(pair, *batch):
    """What must not change: log weights by group, codes of u, and the loss with its gradients."""
    found = pv.log_likelihood(pair, *batch, num_samples=4, engine="eager")
    return found.per_datum, pv.encode(pair, *batch)["u"]


def loss_and_gradients(pair, batch):
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    loss = pyro.infer.Trace_ELBO().differentiable_loss(pair.model, pair.guide, *batch)
    return [loss, *torch.autograd.grad(loss, list(pair.parameters()))]


@pytest.mark.parametrize("value", [-1.0, 1e30, math.nan, math.inf])
def test_padding_of_any_value_counts_for_nothing(groups, value):
    pair = trained_like()
    x, sizes = groups.batch
    spoiled = torch.where(groups.rows[..., None] < 0, value, x)
    assert not torch.equal(spoiled, x)
    for found, wanted in zip(
        loss_and_gradients(pair, (spoiled, sizes)),
        loss_and_gradients(pair, (x, sizes)),
        strict=True,
    ):
        assert torch.equal(found, wanted)


def test_tools_ignore_padding(groups):
    pair = trained_like()
    x, sizes = groups.batch
    spoiled = torch.where(groups.rows[..., None] < 0, -7.0, x)
    for found, wanted in zip(measured(pair, spoiled, sizes), measured(pair, x, sizes), strict=True):
        assert torch.equal(found, wanted)


def test_intensities_are_binarized_whatever_the_padding(groups):
    """The padding -1 is not an intensity; without this, intensities would be scored as they are."""
    torch.manual_seed(0)
    pair = pv.MultilevelVAE.mlp((3,), 2, 2, (6,), likelihood=pv.Bernoulli, members=5)
    x = torch.rand(6, 5, 3)
    spoiled, sizes = torch.where(groups.rows[..., None] < 0, -1.0, x), groups.sizes
    for found, wanted in zip(measured(pair, spoiled, sizes), measured(pair, x, sizes), strict=True):
        assert torch.equal(found, wanted)
    scores = [
        pv.log_likelihood(pair, spoiled, sizes, num_samples=4, binarize=how).per_datum
        for how in ("dynamic", "none")
    ]
    assert not torch.allclose(*scores)
    spoiled[0, 0, 0] = -1.0  # not padding
    with pytest.raises(UsageError, match="outside the support"):
        pv.log_likelihood(pair, spoiled, sizes)


def test_fixed_binary_draws_ignore_hidden_entries():
    x = torch.tensor([[0.0, 1.0, math.nan, -3.0], [1.0, 0.0, 7.0, 0.0]])
    drawn = Arrays([x]).binarized().tensors[0]
    assert torch.equal(drawn[:, :2].float(), x[:, :2])
    assert drawn.isnan().tolist() == [[False, False, True, False], [False] * 4]
    assert Arrays([x[1:]]).binarized().tensors[0].dtype == torch.bool


def test_more_padding_changes_nothing(effects, truth):
    rows, ids = effects.groups(SIZES)
    wide = pv.by_group(rows, ids, members=9)
    assert wide.x.shape == (6, 9, 3)
    found = pv.log_likelihood(effects.pair(), *wide.batch, num_samples=3)
    assert torch.allclose(found.per_datum, truth, atol=1e-9)
    narrow, pair = pv.by_group(rows, ids), trained_like()
    codes = [pv.encode(pair, *groups.batch)["u"] for groups in (narrow, wide)]
    assert torch.allclose(*codes, atol=1e-12)


def test_the_order_of_the_members_does_not_matter(effects, groups, truth):
    x, sizes = groups.batch
    turned = x.clone()
    for g, n in enumerate(sizes.tolist()):
        turned[g, :n] = x[g, :n].flip(0)
    found = pv.log_likelihood(effects.pair(), turned, sizes, num_samples=3)
    assert torch.allclose(found.per_datum, truth, atol=1e-9)
    pair = trained_like()
    codes = [pv.encode(pair, rows, sizes) for rows in (x, turned)]
    assert torch.allclose(codes[0]["u"], codes[1]["u"], atol=1e-12)
    assert torch.allclose(codes[0]["z"][3], codes[1]["z"][3].flip(0), atol=1e-12)


def test_a_group_of_one_is_an_ordinary_datum(effects):
    """Its log p is that of one row: N(c, B B' + C)."""
    rows, _ = effects.groups([4])
    alone = pv.by_group(rows, range(4))
    fn = torch.distributions.MultivariateNormal(effects.c, effects.B @ effects.B.T + effects.C)
    found = pv.log_likelihood(effects.pair(), *alone.batch, num_samples=2)
    assert torch.allclose(found.per_datum, fn.log_prob(rows), atol=1e-9)


# Data


def test_without_sizes_all_members_count(effects):
    rows, ids = effects.groups([3, 3])
    groups = pv.by_group(rows, ids)
    pair = effects.pair(members=3)
    found = pv.log_likelihood(pair, groups.x, num_samples=2)
    assert torch.allclose(found.per_datum, torch.stack([*map(effects.log_p, groups.x)]), atol=1e-9)


def test_rows_to_groups_and_back():
    rows = torch.arange(12.0).reshape(6, 2)
    times = np.arange(6)
    groups = pv.by_group(rows, np.array(["c", "a", "c", "b", "c", "a"]), times)
    assert groups.ids.tolist() == ["a", "b", "c"]
    assert groups.sizes.tolist() == [2, 1, 3]
    assert groups.rows.tolist() == [[1, 5, -1], [3, -1, -1], [0, 2, 4]]
    x, context, sizes = groups.batch
    assert context.tolist() == [[1, 5, 0], [3, 0, 0], [0, 2, 4]]
    assert x.dtype == rows.dtype
    assert torch.equal(sizes, groups.sizes)
    assert torch.equal(groups.member_rows(groups.x), rows)
    assert groups.group_rows(torch.tensor([10, 20, 30])).tolist() == [30, 10, 30, 20, 30, 10]


def test_a_split_never_tears_a_group_apart():
    ids = torch.randint(0, 40, (200,), generator=torch.Generator().manual_seed(0))
    rows = torch.arange(200.0)[:, None]
    parts = pv.by_group(rows, ids).split(7, 1, 2)
    seen = [set(part.ids.tolist()) for part in parts]
    assert [len(part) for part in parts] == [28, 4, 8] == [len(one) for one in seen]
    assert not seen[0] & seen[1] | seen[0] & seen[2] | seen[1] & seen[2]
    assert torch.cat([part.row_numbers for part in parts]).sort().values.tolist() == [*range(200)]
    for part in parts:
        assert torch.equal(part.member_rows(part.x)[:, 0], rows[part.row_numbers, 0])
        assert torch.equal(part.group_rows(torch.from_numpy(part.ids)), ids[part.row_numbers])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pv.by_group([[1.0]] * 3, [1, 2]), "x has 3 rows but there are 2 group ids"),
        (lambda: pv.by_group([[1.0]] * 2, [1.0, math.nan]), "group id of row 1 is missing"),
        (
            lambda: pv.by_group([[1.0]] * 2, np.array(["a", None], dtype=object)),
            "group id of row 1 is missing",
        ),
        (lambda: pv.by_group([[1.0]] * 2, np.array(["a", 1], dtype=object)), "of one kind"),
        (lambda: pv.by_group([[1.0]] * 2, [1, 1], [5.0]), "context 1 has 1 rows"),
        (lambda: pv.by_group([[1.0]] * 2, [1, 1], members=1), "at least 2"),
        (lambda: pv.by_group([[1.0]] * 2, [[1, 1]]), "one id for each row"),
        (lambda: pv.by_group([[1.0]] * 2, [1, 2]).split(7, 1, 2), "too few"),
        (lambda: pv.by_group([[1.0]] * 2, [1, 2]).split(1, 0), "positive"),
        (lambda: pv.by_group([[1.0]] * 2, [1, 2]).member_rows([1.0]), "groups, members"),
        (lambda: pv.by_group([[1.0]] * 2, [1, 2]).group_rows([1.0]), "each of 2 groups"),
        (lambda: pv.MultilevelVAE.mlp((2,), members=0), "at least 1, got 0"),
        (lambda: pv.MultilevelVAE.mlp((2,), group_dim=0), "must be positive"),
    ],
)
def test_wrong_use_in_one_line(call, message):
    with pytest.raises(UsageError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ((torch.zeros(4, 3),), r"row of x must be a group of shape \(members, 3\), got \(3,\)"),
        ((torch.zeros(4, 5, 2),), r"\(members, 3\), got \(5, 2\)"),
        ((torch.zeros(4, 5, 3), torch.tensor([5, 5, 0, 1])), "from 1 to 5.*got 0"),
        ((torch.zeros(4, 5, 3), torch.tensor([5, 5, 6, 1])), "from 1 to 5.*got 6"),
        ((torch.zeros(4, 5, 3), torch.tensor([5, -2, 1, 1])), "from 1 to 5.*got -2"),
        ((torch.zeros(4, 5, 3), torch.ones(4), torch.ones(4)), "got 2 tensors after x"),
        ((torch.zeros(4, 5, 3), torch.ones(4, 1)), "one number for each group"),
    ],
)
def test_wrong_batches_in_one_line(batch, message):
    pair = trained_like().float()
    for call in (
        lambda: pv.encode(pair, *batch),
        lambda: pv.fit(pair, *batch, epochs=1, progress=False),
    ):
        with pytest.raises(UsageError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)


def test_a_wrong_size_in_a_later_row_is_found(groups):
    """Not only in the rows on which the pair is checked."""
    x = torch.zeros(100, 5, 3)
    sizes = torch.full((100,), 5)
    sizes[70] = 9
    with pytest.raises(UsageError, match=r"from 1 to 5.*got 9"):
        pv.fit(trained_like().float(), x, sizes, epochs=1, batch_size=10, progress=False)


# Context, global parameters, sampling, saving


def test_context_of_members_reaches_model_and_guide():
    pair = trained_like(context_shapes=[(2,)])
    x, context, sizes = torch.randn(4, 5, 3), torch.randn(4, 5, 2), torch.tensor([5, 1, 2, 3])
    before = measured(pair, x, context, sizes)
    changed = context.clone()
    changed[1, 1:] = 9.0  # padding
    for found, wanted in zip(measured(pair, x, changed, sizes), before, strict=True):
        assert torch.equal(found, wanted)
    changed[1, 0] = 9.0
    found = measured(pair, x, changed, sizes)
    differ = [(a != b).reshape(4, -1).any(1).tolist() for a, b in zip(found, before, strict=True)]
    assert differ == [[False, True, False, False]] * 2


def test_global_parameters_with_a_prior(groups):
    """log_likelihood is that of the posterior predictive density, with W and b drawn from q."""
    torch.manual_seed(0)
    effects = Effects()
    pair = pv.BayesianDecoder(effects.pair(), module="transition", prior_scale=3.0)
    weights = dict(pair.pair.transition.named_parameters()).values()
    scales = [torch.nn.functional.softplus(free) for free in pair.free_scales]
    exact = []
    for _ in range(2000):
        effects.W, effects.b = (
            (own + scale * torch.randn_like(own)).detach()
            for own, scale in zip(weights, scales, strict=True)
        )
        effects.B, effects.c = effects.A @ effects.W, effects.A @ effects.b + effects.a
        exact.append(effects.log_p(groups.x[3, :5]))
    truth = torch.stack(exact).logsumexp(0) - math.log(2000)
    few = tuple(part[3:4] for part in groups.batch)
    plain = pv.log_likelihood(Effects().pair(), *few, num_samples=2).value
    found = pv.log_likelihood(pair, *few, num_samples=400)
    assert abs(plain - truth) > 0.05
    assert abs(found.value - truth) < 4.5 * found.standard_error


def test_samples_are_draws_of_whole_groups(effects):
    """The covariance of two members is that of u alone, B B'; of one member B B' + C."""
    drawn = pv.sample(effects.pair(members=2), 20000, seed=0)
    assert drawn.shape == (20000, 2, 3)
    centered = drawn - effects.c
    within = centered[:, 0].T @ centered[:, 0] / len(drawn)
    between = centered[:, 0].T @ centered[:, 1] / len(drawn)
    both = effects.B @ effects.B.T
    tolerance = 5 * (both + effects.C).diagonal().max() / len(drawn) ** 0.5
    assert torch.allclose(between, both, atol=tolerance.item(), rtol=0)
    assert torch.allclose(within, both + effects.C, atol=1.5 * tolerance.item(), rtol=0)


def test_a_saved_run_gives_the_same_numbers(groups, tmp_path):
    pair = trained_like(prior=lambda dim: pv.GaussianMixture(dim, 2))
    pv.fit(pair, *groups.batch, epochs=1, out=tmp_path / "run", progress=False)
    again = pv.load(tmp_path / "run")
    assert type(again) is pv.MultilevelVAE
    assert again.members == 5
    for found, wanted in zip(
        measured(again, *groups.batch), measured(pair, *groups.batch), strict=True
    ):
        assert torch.equal(found, wanted)


def test_larger_groups_than_in_training_are_served(groups, tmp_path):
    pair = trained_like(members=2)
    assert pv.encode(pair, *groups.batch)["z"].shape == (6, 5, 2)
    assert str(pv.check(pair, groups.batch)) == "the pair is sound"
