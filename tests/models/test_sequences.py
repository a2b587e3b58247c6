"""Sequences: probabilities sum to one, padding is ignored, and the Kalman filter agrees."""

from itertools import product

import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pyro_vae as pv
from pyro_vae.pairs.rng import seeded
from pyro_vae.parts.factors import unbounded_scale
from pyro_vae.parts.recurrent import recur, token_lengths
from pyro_vae.parts.sequences import elements


def family(tokens=3, **options):
    with seeded(4):
        made = pv.Autoregressive(tokens, embedding_dim=2, hidden=3, **options).double()
        for parameter in made.parameters():
            nn.init.normal_(parameter, std=1.5)
        nn.init.zeros_(made.writer.head.bias)
    return made.eval()


def condition(n, width=8, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, width, generator=generator, dtype=torch.float64)


def whole_rows(tokens, length):
    """Every possible row: those that token 0 ends, padded with 0, and those without token 0."""
    rows = torch.tensor(list(product(range(tokens), repeat=length)), dtype=torch.float64)
    places = torch.arange(length)
    padded = (rows == 0) | (places < token_lengths(rows)[:, None])
    return rows[padded.all(1)]


def test_probabilities_of_all_rows_sum_to_one():
    rows = whole_rows(3, 4)
    assert len(rows) == 1 + 2 + 4 + 8 + 16
    written = family()(condition(2)[:, None], (4,))
    assert written.log_prob(rows).exp().sum(-1).tolist() == pytest.approx([1.0, 1.0])


def test_a_row_is_scored_as_an_lstm_reads_it():
    """Compare with torch's LSTM, step by step."""
    made, raw = family(), condition(1)
    writer, row = made.writer, [2, 1, 1, 0]
    state = (raw[:, 5:].tanh(), torch.zeros(1, 3).double())
    state, total, read = tuple(s[None] for s in state), 0.0, 0
    for token in row:
        inputs = writer.embedding(torch.tensor([[read]])) + raw[:, None, :2]
        output, state = writer.lstm(inputs, state)
        total += (writer.head(output)[0, 0] + raw[0, 2:5]).log_softmax(-1)[token].item()
        read = token
    padded = torch.tensor([[*row, 0, 0]]).double()
    assert made(raw, (6,)).log_prob(padded).item() == pytest.approx(total)


def test_draws_are_as_frequent_as_they_are_probable():
    written = family()(condition(1)[0], (3,))
    rows, n = whole_rows(3, 3), 20_000
    with seeded(0):
        draws = written.sample((n,))
    drawn = (draws[:, None] == rows).all(-1).double().mean(0)
    p = written.log_prob(rows).exp().detach()
    assert drawn.sum().item() == pytest.approx(1)
    assert ((drawn - p).abs() < 5 * (p * (1 - p) / n).sqrt() + 1e-4).all()


def test_the_mode_is_the_greedy_decoding():
    written = family()(condition(6), (4,))
    greedy = written.mode
    assert len(greedy.unique(dim=0)) > 1
    for row, raw in zip(greedy, condition(6), strict=True):
        alone = family()(raw, (4,))
        for place in range(int(token_lengths(row))):
            others = row.repeat(3, 1)
            others[:, place] = torch.arange(3.0)
            others[:, place + 1 :] = 0
            # No other token is more probable up to this position.
            short = family()(raw, (place + 1,)).log_prob(others[:, : place + 1])
            assert short.argmax() == row[place]
        assert alone.log_prob(row) <= 0


def test_a_row_is_scored_under_every_batch_shape():
    made, raw, rows = family(), condition(12).reshape(3, 4, 8), whole_rows(3, 3)[:4]
    together = made(raw, (3,)).log_prob(rows)
    assert together.shape == (3, 4)
    one = made(raw[1, 2], (3,))
    assert one.log_prob(rows[2]).item() == pytest.approx(together[1, 2].item())
    expanded = made(raw[0], (3,)).expand((2, 4))
    assert torch.allclose(expanded.log_prob(rows), together[0].expand(2, 4))
    assert expanded.sample((5,)).shape == (5, 2, 4, 3)


def texts(length, seed=0, **options):
    with seeded(seed):
        options = {"hidden": 4, "embedding_dim": 3} | options
        return pv.VAE.recurrent((length,), 4, 2, **options).double()


ENDED = torch.tensor([[3, 1, 0, 0], [2, 0, 0, 0], [1, 2, 3, 0], [0, 0, 0, 0]]).double()


def test_padding_changes_no_number():
    """The bound, gradients and log p(x), with three columns of padding or without padding."""
    short, long = texts(4), texts(7)
    wide = nn.functional.pad(ENDED, (0, 3))
    a, b = pv.evaluate(short, ENDED, num_samples=20), pv.evaluate(long, wide, num_samples=20)
    assert a.elbo == pytest.approx(b.elbo, rel=1e-12)
    assert a.log_likelihood == pytest.approx(b.log_likelihood, rel=1e-12)
    assert a.bits_per_dim == pytest.approx(b.bits_per_dim, rel=1e-12)
    assert torch.allclose(pv.encode(short, ENDED)["z"], pv.encode(long, wide)["z"], rtol=1e-12)
    from pyro.infer import Trace_ELBO

    for pair, x in ((short, ENDED), (long, wide)):
        with seeded(1):
            Trace_ELBO().differentiable_loss(pair.model, pair.guide, x).backward()
    for p, q in zip(short.parameters(), long.parameters(), strict=True):
        assert torch.allclose(p.grad, q.grad, rtol=1e-10, atol=1e-12)
        assert p.grad.abs().sum() > 0


def test_what_follows_the_end_is_not_looked_at():
    pair, other = texts(4), ENDED.clone()
    other[0, 3], other[1, 2:], other[3, 1:] = 2, 3, 1
    a, b = pv.evaluate(pair, ENDED, num_samples=5), pv.evaluate(pair, other, num_samples=5)
    assert a == b


def test_bits_are_of_the_tokens_that_count():
    result = pv.evaluate(texts(4), ENDED, num_samples=5)
    tokens = (3 + 2 + 4 + 1) / 4
    bits = -result.log_likelihood / (tokens * torch.tensor(2.0).log().item())
    assert result.bits_per_dim == pytest.approx(bits, rel=1e-6)


def test_tokens_that_there_are_not_are_refused():
    for wrong in (4.0, 0.5):
        x = ENDED.clone()
        x[0, 0] = wrong
        with pytest.raises(pv.UsageError, match=f"x holds {wrong:g}, outside the support"):
            pv.evaluate(texts(4), x, num_samples=2)


def test_word_dropout_hides_what_was_before_in_training_only():
    made, raw = family(word_dropout=1.0), condition(1)
    a, b = torch.tensor([[1.0, 1, 2], [2, 1, 2]]).double()
    last = [made(raw, (3,)).log_prob(x) - made(raw, (2,)).log_prob(x[:2]) for x in (a, b)]
    assert abs(last[0] - last[1]).item() > 1e-3  # p(x_3 | x_1, x_2, z) depends on x_1
    made.train()
    last = [made(raw, (3,)).log_prob(x) - made(raw, (2,)).log_prob(x[:2]) for x in (a, b)]
    assert last[0].item() == pytest.approx(last[1].item(), abs=1e-12)
    half = family(word_dropout=0.5)
    scores = [half.train()(raw, (3,)).log_prob(a).item() for _ in range(20)]
    assert 1 < len(set(scores)) <= 4  # each of the two read tokens is kept or dropped


def test_an_lstm_runs_as_torchs_own():
    with seeded(0):
        lstm, x = nn.LSTM(3, 4, batch_first=True), torch.randn(2, 5, 6, 3)
    outputs, (h, c) = recur(lstm, x)
    want, (last, cell) = lstm(x.flatten(0, 1))
    assert torch.allclose(outputs.flatten(0, 1), want, atol=1e-6)
    assert torch.allclose(h.flatten(0, 1), last[0], atol=1e-6)
    assert torch.allclose(c.flatten(0, 1), cell[0], atol=1e-6)


STEPS, NOISE, DRIFT = 4, 0.5, 0.7
TURN = torch.tensor([[0.9, -0.3], [0.2, 0.8]]).double()
SEEN = torch.tensor([[1.0, 0.5], [-0.4, 0.8], [0.3, 0.3]]).double()
FIRST = torch.tensor([0.5, -1.0]).double()


class ExactReader(nn.Module):
    """The information of x_t to x_T on z_t: a vector and the Cholesky factor of a precision."""

    def forward(self, x, lengths):
        n, inverse, turn = len(x), torch.eye(2).double() / DRIFT**2, TURN
        precision, vector = torch.zeros(n, 2, 2).double(), torch.zeros(n, 2).double()
        found = []
        for t in reversed(range(STEPS)):
            counts = (t < lengths).double()
            vector = vector + counts[:, None] * (x[:, t] @ SEEN) / NOISE**2
            precision = precision + counts[:, None, None] * (SEEN.T @ SEEN) / NOISE**2
            whole = precision + inverse
            found.append(torch.cat([vector, whole.flatten(1)], -1))
            gain = inverse @ torch.linalg.inv(whole)
            vector = (gain @ vector[..., None])[..., 0] @ turn
            precision = turn.T @ (inverse - gain @ inverse) @ turn
        return torch.stack(found[::-1], -2)


class ExactSmoother(nn.Module):
    """The posterior of z_t given z_{t-1} and the reader's output, with a widened scale."""

    def __init__(self, spread=1.0):
        super().__init__()
        self.spread = spread

    def forward(self, before, read):
        precision = read[..., 2:].unflatten(-1, (2, 2))
        vector = read[..., :2] + before @ TURN.T / DRIFT**2
        loc = torch.linalg.solve(precision, vector[..., None])[..., 0]
        return dist.MultivariateNormal(loc, precision_matrix=precision / self.spread**2)


def linear_chain(spread=1.0):
    """A deep Markov model that is a linear-Gaussian state space model with the exact guide."""
    transition, emission = pv.MLP(2, (), 4).double(), pv.MLP(2, (), 3).double()
    scale = unbounded_scale(DRIFT, 1e-4, 10.0)
    with torch.no_grad():
        transition.layers[0].weight.copy_(torch.cat([TURN, torch.zeros(2, 2)]))
        transition.layers[0].bias.copy_(torch.tensor([0, 0, scale, scale], dtype=torch.float64))
        emission.layers[0].weight.copy_(SEEN)
        emission.layers[0].bias.zero_()
    pair = pv.DeepMarkovModel(
        pv.Factor(transition, pv.DiagonalNormal(), (2,)),
        pv.Factor(emission, pv.Gaussian(NOISE), (3,)),
        ExactSmoother(spread),
        ExactReader(),
        STEPS,
        ragged=True,
    ).double()
    with torch.no_grad():
        pair.start.copy_(FIRST)
    return pair


def kalman(x):
    """log p(x) of one sequence from the Kalman filter: predict, score, correct; NaN is missing."""
    mean, covariance, total = FIRST, torch.zeros(2, 2).double(), 0.0
    for seen in x:
        mean = TURN @ mean
        covariance = TURN @ covariance @ TURN.T + DRIFT**2 * torch.eye(2).double()
        known = ~seen.isnan()
        if not known.any():
            continue
        map_, seen = SEEN[known], seen[known]
        spread = map_ @ covariance @ map_.T + NOISE**2 * torch.eye(len(map_)).double()
        total += torch.distributions.MultivariateNormal(map_ @ mean, spread).log_prob(seen).item()
        gain = covariance @ map_.T @ torch.linalg.inv(spread)
        mean = mean + gain @ (seen - map_ @ mean)
        covariance = covariance - gain @ map_ @ covariance
    return total


def sequences(n=6):
    generator = torch.Generator().manual_seed(2)
    x = 1.5 * torch.randn(n, STEPS, 3, generator=generator, dtype=torch.float64)
    return x, torch.tensor([4, 3, 1, 2, 4, 1])[:n]


def test_with_the_exact_guide_every_weight_is_the_kalman_filters_likelihood():
    x, lengths = sequences()
    want = [kalman(row[:length]) for row, length in zip(x, lengths, strict=True)]
    found = pv.log_likelihood(linear_chain(), x, lengths, num_samples=3)
    assert found.per_datum.tolist() == pytest.approx(want, abs=1e-9)
    assert found.standard_error < 1e-7
    bound = pv.evaluate(linear_chain(), x, lengths, num_samples=2).elbo
    assert bound == pytest.approx(sum(want) / len(want), abs=1e-9)


def test_with_a_wider_guide_the_estimate_nears_the_kalman_filters_likelihood():
    x, lengths = sequences()
    want = torch.tensor([kalman(row[:length]) for row, length in zip(x, lengths, strict=True)])
    pair = linear_chain(spread=1.3)
    found = pv.log_likelihood(pair, x, lengths, num_samples=4000)
    assert ((found.per_datum - want).abs() < 5 * found.standard_errors + 1e-5).all()
    assert pv.evaluate(pair, x, lengths, num_samples=2).elbo < want.mean() - 0.1


def test_missing_entries_and_steps_are_left_out_as_by_the_kalman_filter():
    """The usual reader sees 0 and a mask where the likelihood leaves entries out."""
    exact, family = linear_chain(), pv.Missing(pv.Gaussian(NOISE))
    with seeded(0):
        pair = pv.DeepMarkovModel.usual(STEPS, 3, 2, 16, family, pv.FullRankNormal, ragged=True)
    pair = pair.double()
    pair.transition, pair.start = exact.transition, exact.start
    pair.emission = pv.Factor(exact.emission.network, family, (3,))
    for part in (*pair.transition.parameters(), *pair.emission.parameters(), pair.start):
        part.requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, STEPS + 1, (300,), generator=generator)
    x = pv.sample(exact, 300, lengths, seed=0)
    hidden = torch.rand(x.shape, generator=generator) < 0.3
    hidden[::3, 1] = True  # whole steps
    hidden[:, 0, 0] = False
    x = torch.where(hidden, torch.nan, x)
    pv.fit(pair, x, lengths, epochs=30, batch_size=30, learning_rate=1e-2, progress=False)
    found = pv.log_likelihood(pair, x[:40], lengths[:40], num_samples=2000, progress=False)
    want = torch.tensor([kalman(r[:n]) for r, n in zip(x[:40], lengths[:40], strict=True)])
    near = (found.per_datum - want).abs() < 5 * found.standard_errors + 1e-5
    assert near[~found.unreliable].all()
    assert int(found.unreliable.sum()) < 8
    assert not pv.impute(pair, x[:5], lengths[:5], num_samples=100).mean.isnan().any()


@pytest.mark.parametrize(
    "likelihood", [pv.NegativeBinomial(), pv.Missing(pv.Gaussian()), pv.Categorical(3, tokens=True)]
)
def test_the_reader_sees_what_the_likelihood_shows_to_encoders(likelihood):
    pair = pv.DeepMarkovModel.usual(3, 2, latent_dim=1, hidden=4, likelihood=likelihood)
    x = torch.tensor([[[0.0, 1], [2, 2], [1, 0]]]).expand(4, 3, 2)
    view = likelihood.view((2,))
    assert pair.reader.network.inputs == view(x).flatten(2).shape[-1]
    assert pv.encode(pair, x)["z"].shape == (4, 3, 1)


@pytest.mark.parametrize(
    ("lengths", "words"),
    [
        ([9, 1], "whole numbers from 0 to 4, the steps of the model, got 9"),
        ([-1, 1], "got -1"),
        ([1.5, 1], "got 1.5"),
        ([[1], [1]], r"one number for each row, got rows of shape \(1,\)"),
    ],
)
def test_lengths_that_a_row_cannot_have_are_refused(lengths, words):
    x = torch.ones(2, STEPS, 3).double()
    with pytest.raises(pv.UsageError, match=words):
        pv.log_likelihood(linear_chain(), x, torch.tensor(lengths), num_samples=3)
    with pytest.raises(pv.UsageError, match=words):
        pv.fit(linear_chain(), x, torch.tensor(lengths), epochs=1, progress=False)


def test_means_are_those_of_the_exact_smoother():
    """E[z | x] from the joint normal of all z and x."""
    x, _ = sequences()
    powers = [torch.linalg.matrix_power(TURN, k) for k in range(STEPS + 1)]
    rows = [
        torch.cat([powers[t - s] if s <= t else torch.zeros(2, 2) for s in range(STEPS)], 1)
        for t in range(STEPS)
    ]
    mixing = torch.cat([row.double() for row in rows])
    prior = torch.cat([powers[t + 1] @ FIRST for t in range(STEPS)])
    covariance = DRIFT**2 * mixing @ mixing.T
    seen = torch.block_diag(*[SEEN] * STEPS)
    spread = seen @ covariance @ seen.T + NOISE**2 * torch.eye(3 * STEPS).double()
    gain = covariance @ seen.T @ torch.linalg.inv(spread)
    want = prior + (x.flatten(1) - seen @ prior) @ gain.T
    codes = pv.encode(linear_chain(), x, torch.full((6,), STEPS))["z"]
    assert torch.allclose(codes.flatten(1), want, atol=1e-9)


def chain(n=5, masked=False):
    def step(before, inputs):
        return dist.Normal(0.8 * before + inputs, 0.6).to_event(1)

    inside = torch.arange(3) < (torch.tensor([3, 2, 1, 3, 2])[:n, None] if masked else 3)
    inputs = torch.linspace(-1, 1, n * 6).reshape(n, 3, 2)
    return pv.MarkovChain(step, torch.ones(2), inside.expand(n, 3), inputs)


def test_a_chains_density_is_that_of_its_steps():
    made = chain(masked=True)
    z = torch.linspace(-2, 2, 30).reshape(5, 3, 2)
    for i, length in enumerate([3, 2, 1, 3, 2]):
        total, before = 0.0, torch.ones(2)
        for t in range(length):
            total += made.step(before, made.inputs[i, t]).log_prob(z[i, t]).item()
            before = z[i, t]
        assert made.log_prob(z)[i].item() == pytest.approx(total, rel=1e-5)


def test_a_chains_draws_have_its_means_and_variances():
    made = chain(1)
    with seeded(0):
        draws = made.rsample((20_000,))[:, 0]
    assert draws.shape == (20_000, 3, 2)
    variance = 0.36 * torch.tensor([1, 1 + 0.64, 1 + 0.64 + 0.64**2])
    assert torch.allclose(draws.var(0).mean(-1), variance, rtol=0.05)
    error = (draws.mean(0) - made.mean[0]).abs()
    assert (error < 5 * (variance[:, None] / 20_000).sqrt()).all()


def test_a_chain_is_zero_beyond_its_length():
    made = chain(masked=True)
    assert (made.rsample()[~made.inside] == 0).all()
    assert (made.expand((2, 5)).rsample()[:, ~made.inside] == 0).all()


def test_steps_beyond_the_length_count_for_nothing():
    x, lengths = sequences()
    other = torch.where(torch.arange(STEPS)[:, None] < lengths[:, None, None], x, 7.0)
    with seeded(3):
        pair = pv.DeepMarkovModel.usual(
            STEPS, 3, 2, 4, likelihood=pv.Gaussian(NOISE), ragged=True
        ).double()
    a = pv.evaluate(pair, x, lengths, num_samples=5)
    assert a == pv.evaluate(pair, other, lengths, num_samples=5)


@pytest.mark.parametrize("shape", [(4, 2), (1, 4, 2), (4, 1, 2)])
def test_steps_after_the_end_are_not_missing(shape):
    """They do not exist; at z = 0 the emission would fill them with numbers that mean nothing."""
    pair = pv.DeepMarkovModel.usual(4, 2, latent_dim=1, hidden=3, ragged=True)
    x, lengths = torch.ones(6, *shape), torch.tensor([1, 2, 3, 4, 4, 2])
    for method in ("importance", "nuts"):
        with pytest.raises(pv.UsageError, match="no missing entry"):
            pv.impute(pair, x, lengths, method=method, num_samples=30)


def test_elements_are_those_that_are_scored():
    full = dist.Bernoulli(torch.full((4, 3, 2), 0.5)).to_event(2)
    assert elements(full, torch.zeros(4, 3, 2)).tolist() == [6.0] * 4
    inside = torch.arange(3) < torch.tensor([3, 1, 2, 0])[:, None]
    ragged = dist.Bernoulli(torch.full((4, 3, 2), 0.5)).to_event(1).mask(inside).to_event(1)
    assert elements(ragged, torch.zeros(4, 3, 2)).tolist() == [6.0, 2.0, 4.0, 0.0]


def test_a_model_of_whole_rows_takes_no_lengths():
    x, lengths = sequences()
    pair = pv.DeepMarkovModel.usual(STEPS, 3, 2, 4, likelihood=pv.Gaussian(NOISE))
    with pytest.raises(pv.UsageError, match="needs x and no other tensors, got 1 tensors after x"):
        pv.evaluate(pair, x.float(), lengths, num_samples=2)


def test_a_graph_in_float32_runs_the_kernel_of_an_lstm():
    """torch runs float32 with other kernels than float64, whose graph has many small steps."""
    fitted = {}
    for engine in ("eager", "traced"):
        pair = texts(4, word_dropout=0.2).float()
        history = pv.fit(pair, ENDED.float(), epochs=3, batch_size=4, engine=engine, progress=False)
        fitted[engine] = [history["elbo"], *(p.flatten().tolist() for p in pair.parameters())]
    for ours, stock in zip(fitted["traced"], fitted["eager"], strict=True):
        assert ours == pytest.approx(stock, rel=1e-4, abs=1e-6)


def test_a_remembered_density_is_computed_again_where_it_no_longer_holds():
    with seeded(0):
        vae = pv.VAE.recurrent((6,), tokens=4, latent_dim=2, hidden=5)
        fn, x = vae.decoder(torch.zeros(3, 2)), torch.randint(1, 4, (3, 6)).float()
    with torch.no_grad():
        before = fn.log_prob(x)
    assert fn.log_prob(x).requires_grad
    x[:, 3:] = 0
    after = fn.log_prob(x)
    assert bool((after > before).all())
    torch.testing.assert_close(after, vae.decoder(torch.zeros(3, 2)).log_prob(x))
