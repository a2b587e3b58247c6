"""The sentences of the verdict: what each result of a tool says, in full."""

import pytest
import torch
from verdict_helpers import (
    annealed,
    chains,
    checked,
    gaps,
    moments,
    ranks,
    trained,
    weights,
)

from pyro_vae.diagnostics import signs, verdict
from pyro_vae.diagnostics.attribution import PARTS, Blame
from pyro_vae.diagnostics.signs import Sign

OWN = "on the model's own data, the guide is off: z[0] is too "
DENSITY = "on the model's own data, the density of draws is off: log p(x, z) is too "
MISSED = (
    "the guide misses a part of the posterior: by the true latents of the model's own data, log "
    "p(x) is 0.50 ± 0.00 nats too low (200 data)"
)
CODES = "a classifier tells codes 'z' of data from those of the model's own data (AUC 0.70)"
WIDE = "the likelihood is too wide: residuals are 0.78 times its scale"
NARROW = "the likelihood is too narrow: residuals are 1.28 times its scale"
BY_ROW = "the scale of residuals differs by row more than the likelihood allows"
BY_ELEMENT = "the scale of residuals differs by element more than the likelihood allows"
DIFFER = "log p(x) of data and of the model's own data differ (p 5e-05)"


def by_scale(log_ratio):
    """Nats that a scale for all six elements would gain: D/2 (c - 1 - log c)."""
    return pytest.approx(3 * (torch.tensor(log_ratio).double().exp().item() - 1 - log_ratio))


SIGNS = [
    ("calibration", ranks(mean=0.3), [("place", OWN + "low (scores of ranks +0.30 ± 0.01)")]),
    ("calibration", ranks(mean=-0.3), [("place", OWN + "high (scores of ranks -0.30 ± 0.01)")]),
    (
        "calibration",
        ranks(spread=1.5),
        [("place", OWN + "narrow (scores of ranks spread by 1.40)")],
    ),
    ("calibration", ranks(spread=0.7), [("place", OWN + "wide (scores of ranks spread by 0.70)")]),
    (
        "calibration",  # all true values are above all draws, so their scores are equal
        ranks(mean=9.0, spread=0.5),
        [("place", OWN + "low (scores of ranks +2.58 ± 0.01)")],
    ),
    (
        "calibration",
        ranks(mean=1.3, spread=0.05),
        [("place", OWN + "low (scores of ranks +1.30 ± 0.01)")],
    ),
    (
        "calibration",
        ranks(mean=0.8, spread=0.05),
        [("place", OWN + "wide (scores of ranks spread by 0.05)")],
    ),
    ("calibration", ranks(joint=0.3), [("shape", DENSITY + "low (scores of ranks +0.30 ± 0.01)")]),
    (
        "local_calibration",
        moments(shift=-0.2),
        [("place", "at the data, 'z[0]': its mean is off by -0.20 posterior sd")],
    ),
    (
        "local_calibration",
        moments(scatter=0.5),
        [("place", "at the data, 'z[0]': means of rows are off by 0.50 posterior sd")],
    ),
    (
        "local_calibration",
        moments(ratio=0.6),
        [("place", "at the data, 'z[0]': its scale is 0.60 times the posterior's")],
    ),
    (
        "local_calibration",
        moments(correlation=-0.5),
        [("shape", "at the data, the correlation of 'z[0]' and 'z[1]' is off by 0.50")],
    ),
    (
        "log_likelihood",
        weights(unreliable=7),
        [("rows", "importance weights of 7 data (4 %) are not reliable")],
    ),
    (
        "nuts",
        chains(shift=-0.8),
        [("place", "against NUTS, its mean is off by 0.80 posterior sd")],
    ),
    (
        "nuts",
        chains(ratio=0.6),
        [("place", "against NUTS, its scale is 0.59 times the posterior's")],
    ),
    ("nuts", chains(correlation=0.5), [("shape", "against NUTS, a correlation is off by 0.52")]),
    ("model_check", checked(codes=0.1, auc=0.7), [("prior", CODES, 0.1)]),
    ("model_check", checked(scale=-0.5), [("likelihood scale", WIDE, by_scale(-0.5))]),
    ("model_check", checked(scale=0.5), [("likelihood scale", NARROW, by_scale(0.5))]),
    (
        "model_check",
        checked(row=0.1, column=0.2),
        [("likelihood scale", BY_ROW, 0.1), ("likelihood scale", BY_ELEMENT, 0.2)],
    ),
    (
        "model_check",
        checked(dependence=0.3, regression=0.1),
        [
            ("decoder", "residuals of different elements are correlated", 0.3),
            ("decoder", "residuals still depend on the codes or the context", 0.1),
        ],
    ),
    ("model_check", checked(p=4.6e-5), [("decoder", DIFFER)]),
    (
        "train_gap",
        trained(0.123, 0.021),
        [("data", "the ELBO of training data is 0.12 ± 0.02 nats per example higher", 0.123)],
    ),
]


@pytest.mark.parametrize(("tool", "found", "told"), SIGNS)
def test_each_sign_in_full(tool, found, told):
    results = {tool: found}
    said = [*signs.guide_signs(results), *signs.model_signs(results)]
    assert said == [Sign(kind, tool, words, *nats) for kind, words, *nats in told]


def test_missing_mass_is_told_first_and_by_its_tool():
    scores = {"model_check": checked(missed=0.5)}
    assert signs.guide_signs(scores | {"calibration": ranks(mean=0.3)})[0] == Sign(
        "mass", "model_check", MISSED, pytest.approx(0.5)
    )
    higher = {"annealing": annealed(0.5, 0.01), "log_likelihood": weights(error=0.01)}
    words = "annealing gives a higher log p(x) (by 0.50 ± 0.01 nats, 20 data)"
    (said,) = signs.guide_signs(higher)
    assert said == Sign("mass", "annealing", words, pytest.approx(0.5))


GAPS = "refining the guide of 200 data closes 62 % of the gap between ELBO and log p(x)"
VALUE = "-10.000 ± 0.009 nats per example (200 data)"
AS_LOG_P = "the ELBO as log p(x): at least 2.00 nats per example below log p(x)"
NOT_LOOKED = (
    "no tool has looked for a part of the posterior that the guide misses (model_check and "
    "calibration do; they need template(n) and time)"
)
MODEL = (
    "trust",
    "the model: no difference of data and own data was found in log p(x), codes, residuals (200 "
    "data)",
    "model",
)
FINDINGS = [
    (
        {"log_likelihood": weights(unreliable=2, gap=2.0)},
        [
            (
                "doubt",
                f"log p(x) by importance weights, {VALUE}: it may be too low, since the weights of "
                "2 data are not reliable (rows 1000, 1001)",
                "log p(x)",
            ),
            ("doubt", AS_LOG_P, "ELBO"),
            ("next", "pyro_vae.anneal for log p(x)", "log p(x)"),
        ],
    ),
    (
        {"log_likelihood": weights(gap=0.5)},
        [
            (
                "unchecked",
                f"log p(x) = {VALUE} by importance weights, but {NOT_LOOKED}",
                "log p(x)",
            ),
            ("unchecked", "the ELBO is 0.50 nats per example below log p(x) (200 data)", "ELBO"),
        ],
    ),
    (
        {"log_likelihood": weights(gap=0.5), "model_check": checked()},
        [
            MODEL,
            (
                "trust",
                f"log p(x) = {VALUE} by importance weights; a missed part of the posterior would "
                "show from 4 % on",
                "log p(x)",
            ),
            ("trust", "the ELBO is 0.50 nats per example below log p(x) (200 data)", "ELBO"),
        ],
    ),
    (
        {"log_likelihood": weights(gap=1.5), "annealing": annealed(0.05)},
        [
            (
                "unchecked",
                f"log p(x) = {VALUE} by importance weights, and annealing agrees (+0.05 ± 0.02, "
                "20 data), but " + NOT_LOOKED,
                "log p(x)",
            ),
            ("doubt", "the ELBO is 1.50 nats per example below log p(x) (200 data)", "ELBO"),
        ],
    ),
    (
        {"log_likelihood": weights(infinite=2)},
        [
            (
                "doubt",
                "log p(x) of 2 data: weights are infinite, because the guide gives no density to "
                "its own draws",
                "log p(x)",
            )
        ],
    ),
    (
        {"log_likelihood": weights(error=0.0), "annealing": annealed(-0.5, 0.01)},
        [
            (
                "unchecked",
                "log p(x) = -10.000 ± 0.000 nats per example (200 data) by importance weights, but "
                + NOT_LOOKED,
                "log p(x)",
            ),
            ("unchecked", "the ELBO is 0.00 nats per example below log p(x) (200 data)", "ELBO"),
            (
                "doubt",
                "annealing at 100 temperatures: importance weights give a higher bound (by 0.50 ± "
                "0.01 nats, on 20 data)",
                "annealing",
            ),
            ("next", "annealing with more temperatures or more time", "annealing"),
        ],
    ),
    (
        {"log_likelihood": weights(error=0.0), "annealing": annealed(-0.2)},
        [
            (
                "unchecked",
                "log p(x) = -10.000 ± 0.000 nats per example (200 data) by importance weights, but "
                + NOT_LOOKED,
                "log p(x)",
            ),
            ("unchecked", "the ELBO is 0.00 nats per example below log p(x) (200 data)", "ELBO"),
            (
                "doubt",
                "annealing at 100 temperatures: importance weights give a higher bound (by 0.20 ± "
                "0.00 nats, on 20 data)",
                "annealing",
            ),
            ("next", "annealing with more temperatures or more time", "annealing"),
        ],
    ),
    (
        {"gaps": gaps(), "calibration": ranks(), "local_calibration": moments()},
        [
            (
                "trust",
                "the guide of local latents: no fault found by calibration, local_calibration, "
                "gaps",
                "guide",
            )
        ],
    ),
    (
        {"model_check": checked()},
        [MODEL],
    ),
    (
        {"gaps": gaps(), "local_calibration": moments()},
        [
            (
                "unchecked",
                "the guide of local latents: no fault found by local_calibration, gaps, but "
                + NOT_LOOKED,
                "guide",
            )
        ],
    ),
    (
        {"model_check": checked(p=float("nan"))},
        [("unchecked", "the model: too few rows have reliable importance weights", "model")],
    ),
]


def test_what_is_said_if_the_guide_misses_a_part_of_the_posterior():
    results = {"log_likelihood": weights(gap=2.0), "annealing": annealed(0.5)}
    (blame,), found = verdict.findings(results, torch.arange(1000, 2000))
    assert [tuple(finding) for finding in found] == [
        ("fault", blame.words, "family"),
        (
            "doubt",
            f"log p(x) by importance weights, {VALUE}: it is too low, since the guide misses a "
            "part of the posterior",
            "log p(x)",
        ),
        ("doubt", AS_LOG_P, "ELBO"),
    ]


@pytest.mark.parametrize(("results", "told"), FINDINGS)
def test_each_finding_in_full(results, told):
    _, found = verdict.findings(results, torch.arange(1000, 2000))
    assert [tuple(finding) for finding in found] == told


@pytest.mark.parametrize(
    ("part", "tools", "by_replicates"),
    [
        ("decoder", ("predictive",), True),
        ("decoder", ("predictive", "model_check"), False),
        ("decoder", ("model_check",), False),
        ("prior", ("predictive",), False),
    ],
)
def test_replicates_alone_do_not_tell_which_part_of_the_model_is_wrong(part, tools, by_replicates):
    blame = Blame(part, None, tuple(Sign(part, tool, "data differ") for tool in tools))
    words = (
        "the model: its likelihood, its decoder or its prior: data differ. Try a likelihood with "
        "another spread, a larger decoder or a richer prior: the replicates do not tell which of "
        "them"
    )
    assert (blame.words == words) is by_replicates
    assert by_replicates or blame.next == PARTS[part][1]
