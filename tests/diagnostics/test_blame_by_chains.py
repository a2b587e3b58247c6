"""What chains of NUTS say of the guide: which data and units count, and the largest error."""

import re

import pytest
import torch

from pyro_vae.diagnostics import signs
from pyro_vae.inference.chains import compared


def told(**results):
    return [sign.words for sign in signs.guide_signs(results)]


def drawn(
    posterior=0.0, guide=0.0, apart=0.0, scales=(1.0, 1.0, 1.0), shifts=(0.0, 0.0, 0.0), diverged=0
):
    """Draws of three data with these correlations; ``apart`` is between the chains of datum 0."""
    generator = torch.Generator().manual_seed(1)

    def correlated(shape, by):
        z = torch.randn(*shape, 2, generator=generator).double()
        second = by * z[..., 0] + (1 - by**2) ** 0.5 * z[..., 1]
        return torch.stack([z[..., 0], second], -1)

    z = correlated((4, 1000, 3), posterior)
    z[:, :, 0] += apart * torch.arange(4).double()[:, None, None]
    q = correlated((4000, 3), guide)
    q = torch.tensor(shifts)[:, None] + torch.tensor(scales)[:, None] * q
    return compared({"z": z}, {"z": q}, torch.tensor([diverged, 0, 0]))


def number_in(words):
    return float(re.search(r"\d+\.\d+", words).group())


def test_chains_that_disagree_do_not_judge():
    shifts = (2.0, 0.0, 0.0)
    assert told(nuts=drawn(shifts=shifts)) != []
    assert told(nuts=drawn(shifts=shifts, apart=1.0)) == []
    assert told(nuts=drawn(shifts=shifts, diverged=1)) == []
    (words,) = told(nuts=drawn(shifts=(0.0, -2.0, 0.0), apart=1.0))
    assert number_in(words) == pytest.approx(2.0, abs=0.1)


def test_a_correlation_that_both_have_is_not_off():
    assert told(nuts=drawn(posterior=0.6, guide=0.6)) == []
    (words,) = told(nuts=drawn(posterior=0.6, guide=-0.6))
    assert words.startswith("against NUTS, a correlation is off by ")
    assert number_in(words) == pytest.approx(1.2, abs=0.05)


def test_the_scale_that_is_most_off_is_told():
    (words,) = told(nuts=drawn(scales=(1.5, 0.5, 1.0)))
    assert words.startswith("against NUTS, its scale is ")
    assert number_in(words) == pytest.approx(0.5, abs=0.03)


def test_units_that_do_not_move_do_not_count():
    """Such as padding: their moments are NaN."""
    generator = torch.Generator().manual_seed(2)
    z = torch.randn(4, 600, 2, 2, generator=generator).double()
    z[:, :, 1, 1] = 0.0
    q = 0.8 + 1.5 * torch.randn(2400, 2, 2, generator=generator).double()
    shift, scale = told(nuts=compared({"z": z}, {"z": q}, torch.zeros(2)))
    assert number_in(shift) == pytest.approx(0.8, abs=0.1)
    assert number_in(scale) == pytest.approx(1.5, abs=0.1)


def test_a_correlation_with_a_unit_that_does_not_move_does_not_count():
    generator = torch.Generator().manual_seed(3)
    z = torch.randn(4, 600, 1, 3, generator=generator).double()
    z[..., 1] = 0.6 * z[..., 0] + 0.8 * z[..., 1]
    z[..., 2] = 0.0
    q = torch.randn(2400, 1, 3, generator=generator).double()
    (words,) = told(nuts=compared({"z": z}, {"z": q}, torch.zeros(1)))
    assert number_in(words) == pytest.approx(0.6, abs=0.05)


@pytest.mark.parametrize(("rho", "said"), [(0.0, 1), (0.75, 0)])
def test_the_error_of_chains_is_that_of_their_slowest_unit(rho, said):
    """4,000 draws with these autocorrelations are worth 4,000 and 570 independent ones, so that 0.6
    plus three errors is 0.65 and 0.73."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(4, 1000, 1, 2, generator=generator).double()
    z = noise.clone()
    for t in range(1, 1000):
        z[:, t, :, 1] = rho * z[:, t - 1, :, 1] + (1 - rho**2) ** 0.5 * noise[:, t, :, 1]
    q = torch.randn(4000, 1, 2, generator=generator).double()
    q[..., 0] += 0.69 + z[..., 0].mean() - q[..., 0].mean()
    found = compared({"z": z}, {"z": q}, torch.zeros(1))
    assert not found.too_few_draws.any()
    assert len(told(nuts=found)) == said
