"""Each rule of the verdict at its limit, and which unit, row and part it names."""

from dataclasses import replace

import pytest
import torch
from verdict_helpers import (
    N,
    annealed,
    chains,
    checked,
    gaps,
    moments,
    normals,
    ranks,
    trained,
    weights,
)

from pyro_vae.diagnostics import attribution, signs, verdict
from pyro_vae.diagnostics.attribution import Blame
from pyro_vae.diagnostics.calibration import JOINT, LIKELIHOOD, Calibration
from pyro_vae.diagnostics.gaps import PerDatum
from pyro_vae.diagnostics.signs import Sign
from pyro_vae.diagnostics.study import Finding
from pyro_vae.diagnostics.two_samples import Difference, Separation

ROWS = torch.arange(1000, 2000)
PLACE = {"calibration": ranks(mean=0.3)}
SHAPE = {"calibration": ranks(joint=0.3)}
BOTH = {"calibration": ranks(mean=0.3, joint=0.3)}


def parts(**results):
    return [blame.part for blame in verdict.blamed(results)]


def told(**results):
    return [sign.words for sign in signs.guide_signs(results)]


# The sentence of a part

ADVICE = {
    "globals": (
        "the guide of global latents",
        "a guide in which local latents depend on the global ones, q(w) q(z | x, w), or a richer "
        "q(w) (docs/models/global-latents.md)",
    ),
    "prior of globals": (
        "the prior of global latents",
        "a prior that allows such values, or a model that explains them",
    ),
    "encoder": (
        "the encoder",
        "a larger encoder, fitted to training data and many draws of the model "
        "(pyro_vae.refit_guide), or pyro_vae.refine for the rows that you analyze; if only some "
        "rows are wrong, look at their inputs",
    ),
    "family": (
        "the family of the guide",
        "a richer posterior family (pyro_vae.refit_guide shows the gain)",
    ),
    "prior": ("the prior", "a richer prior, such as GaussianMixture, VampPrior or FlowPrior"),
    "likelihood scale": (
        "the scale of the likelihood",
        "a learned or predicted scale, or a likelihood with heavier tails",
    ),
    "decoder": (
        "the model: its decoder or its structure",
        "a larger decoder, more latents, or KL warm-up and free bits if latents have collapsed",
    ),
    "data": (
        "too little data",
        "more data, or a smaller model if log p(x) of held-out data rises with it",
    ),
}


@pytest.mark.parametrize("part", ADVICE)
def test_a_part_is_told_with_its_evidence_and_its_advice(part):
    title, advice = ADVICE[part]
    one, two = Sign("place", "gaps", "first"), Sign("rows", "nuts", "second", 0.5)
    blame = Blame(part, 1.234, (one, two, one))
    words = f"{title} (1.23 nats per example): first; second. Try {advice}"
    assert blame.finding == Finding("fault", words, part)
    assert blame.as_dict() == {
        "part": part,
        "nats": 1.234,
        "evidence": [
            {"kind": "place", "tool": "gaps", "words": "first", "nats": None},
            {"kind": "rows", "tool": "nuts", "words": "second", "nats": 0.5},
            {"kind": "place", "tool": "gaps", "words": "first", "nats": None},
        ],
        "next": advice,
    }


def test_all_parts_are_in_the_table():
    assert attribution.PARTS == ADVICE


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (1, "0"),
        (3, "0; 1; 2"),
        (4, "0; 1; 2 (and 1 more)"),
        (6, "0; 1; 2 (and 3 more)"),
    ],
)
def test_three_signs_are_told(number, words):
    blame = Blame("data", None, tuple(Sign("data", "t", str(i)) for i in range(number)))
    assert blame.words == f"too little data: {words}. Try {ADVICE['data'][1]}"


def test_the_fault_of_a_guide_of_global_latents_has_no_size():
    found = Finding("doubt", "it is off", "w")
    sign = Sign("globals", "global_nuts", "it is off")
    assert attribution.of_globals(found) == Blame("globals", None, (sign,))


# Which part, and in which order


def exactly(encoder, family):
    """Gaps of four rows, whose means have no rounding."""
    none = torch.zeros(4).double()
    return gaps(n=4)._replace(
        amortization=PerDatum(torch.full_like(none, encoder), none),
        approximation=PerDatum(torch.full_like(none, family), none),
    )


@pytest.mark.parametrize(
    ("results", "named"),
    [
        # From 40 rows on, gaps overrule wrong means and scales.
        (PLACE | {"gaps": gaps(family=0.3, n=40)}, ["family"]),
        (PLACE | {"gaps": gaps(family=0.3, n=39)}, ["encoder"]),
        # Gaps of few rows count if nothing else, or also the shape, is off.
        ({"gaps": gaps(family=0.3, n=20)}, ["family"]),
        (BOTH | {"gaps": gaps(family=0.3, n=20)}, ["family"]),
        (SHAPE | {"gaps": gaps(encoder=0.3, n=20)}, ["encoder"]),
        # Without gaps.
        (SHAPE | {"log_likelihood": weights(unreliable=10)}, ["family"]),
        (PLACE | {"log_likelihood": weights(unreliable=10)}, ["encoder"]),
        (BOTH, ["encoder"]),
        # At their limits.
        ({"gaps": exactly(0.02, 0.0)}, []),
        ({"gaps": exactly(0.5, 0.1)}, ["encoder", "family"]),
        ({"train_gap": trained(0.02, 0.0)}, []),
        # No size is known: last, also after a small one. Missing mass: first.
        (PLACE | {"train_gap": trained(0.05, 0.0)}, ["data", "encoder"]),
        (
            {
                "model_check": checked(codes=5.0, auc=0.9, missed=0.5),
                "train_gap": trained(9.0, 0.0),
                "calibration": ranks(mean=0.3),
            },
            ["family", "data", "prior"],
        ),
    ],
)
def test_the_parts_in_their_order(results, named):
    assert parts(**results) == named


def test_a_negative_size_is_before_an_unknown_one():
    """Sizes are lower bounds with errors, so that a sign may have a size below 0."""
    more = [Sign("prior", "t", "a"), Sign("decoder", "t", "b", -1.5)]
    assert [b.part for b in verdict.blamed({}, more)] == ["decoder", "prior"]


def test_a_part_has_the_size_of_its_largest_sign():
    found = checked(row=0.1, column=0.3)
    (blame,) = verdict.blamed({"model_check": found})
    assert (blame.part, blame.nats, len(blame.evidence)) == ("likelihood scale", 0.3, 2)
    (blame,) = verdict.blamed({"model_check": checked(p=5e-5)})
    assert blame.nats is None


def test_the_evidence_goes_to_the_larger_gap():
    encoder, family = verdict.blamed(PLACE | {"gaps": gaps(0.5, 0.3)})
    assert [sign.tool for sign in encoder.evidence] == ["gaps", "calibration"]
    assert [sign.tool for sign in family.evidence] == ["gaps"]
    assert encoder.evidence[0].nats == pytest.approx(0.8)
    assert encoder.evidence[0].kind == "gaps"
    family, encoder = verdict.blamed(SHAPE | {"gaps": gaps(0.3, 0.5)})
    assert [sign.tool for sign in family.evidence] == ["gaps", "calibration"]
    assert [sign.tool for sign in encoder.evidence] == ["gaps"]


def test_missing_mass_has_the_size_and_the_evidence_of_all_signs():
    results = PLACE | {"annealing": annealed(0.5), "log_likelihood": weights(error=0.01)}
    (blame,) = verdict.blamed(results)
    assert (blame.part, blame.nats) == ("family", pytest.approx(0.5))
    assert [sign.kind for sign in blame.evidence] == ["mass", "place"]


def test_the_size_without_a_gap_over_its_error_is_the_whole_gap():
    (blame,) = verdict.blamed(PLACE | {"gaps": gaps(encoder=0.01)})
    assert (blame.part, blame.nats) == ("encoder", pytest.approx(0.01))
    assert verdict.blamed(PLACE)[0].nats is None


@pytest.mark.parametrize(("n", "size"), [(49, 0.4), (50, 0.4), (51, 0.8)])
def test_the_gap_is_that_of_the_most_rows(n, size):
    results = {"gaps": gaps(0.3, 0.1, n=50), "log_likelihood": weights(gap=0.8, n=n)}
    assert attribution.inference_gap(results) == pytest.approx(size)


@pytest.mark.parametrize(
    ("encoder", "family", "percent"),
    [(0.6, -0.1, 100), (-0.1, 0.6, 0), (0.5, -0.6, 0), (0.5, -0.5, 0)],
)
def test_the_share_of_the_gap_is_between_nothing_and_all(encoder, family, percent):
    (blame,) = verdict.blamed({"gaps": gaps(encoder, family)})
    assert blame.evidence[0].words == (
        f"refining the guide of 200 data closes {percent} % of the gap between ELBO and log p(x)"
    )


def test_gaps_given_a_draw_of_global_latents_say_so():
    found = gaps(0.6, 0.2)._replace(given=("w", "u"))
    (blame, _) = verdict.blamed({"gaps": found})
    assert blame.evidence[0].words == (
        "refining the guide of 200 data given one draw of w, u closes 75 % of the gap between ELBO "
        "and log p(x)"
    )


@pytest.mark.parametrize(
    ("spread", "error", "blamed"),
    [
        (0.05, 0.0, True),
        (0.0, 0.05, True),
        (0.07, 0.0, False),
        (0.0, 0.07, False),
        (0.04, 0.04, True),
        (0.05, 0.05, False),
    ],
)
def test_the_error_of_a_gap_holds_the_spread_of_rows_and_the_monte_carlo_error(
    spread, error, blamed
):
    """0.2 nats exceed 0.02 plus three errors if the error is below 0.06."""
    n = 64
    side = torch.tensor([1.0, -1.0]).double().repeat(n // 2)
    each = 0.2 + spread * n**0.5 * side / side.std()
    errors = torch.full((n,), error * n**0.5).double()
    found = gaps(n=n)._replace(amortization=PerDatum(each, errors))
    assert attribution.gap_shares({"gaps": found}) == ({"encoder": 1.0} if blamed else {})


# What is said about each number


def test_the_rows_with_the_heaviest_tails_are_named_first():
    found = weights(unreliable=6)
    found.pareto_k[:6] = torch.tensor([0.8, 0.9, 2.0, 1.0, 0.95, 0.9]).double()
    found.pareto_k[6] = 5.0
    found.standard_errors[6] = 0.0  # constant weights are reliable whatever the fit of their tail
    _, said = verdict.findings({"log_likelihood": found}, ROWS)
    (words,) = (f.words for f in said if f.about == "log p(x)" and f.kind == "doubt")
    assert words.endswith("of 6 data are not reliable (rows 1002, 1003, 1004, 1001, 1005 ...)")
    _, said = verdict.findings({"log_likelihood": weights(unreliable=5)}, ROWS)
    assert said[1].words.endswith("(rows 1000, 1001, 1002, 1003, 1004)")


def test_a_gap_of_exactly_a_nat_is_too_large():
    results = {"log_likelihood": weights(gap=1.0), "calibration": ranks()}
    _, said = verdict.findings(results, ROWS)
    assert [(f.kind, f.about) for f in said[1:]] == [("trust", "log p(x)"), ("doubt", "ELBO")]


@pytest.mark.parametrize(
    ("found", "what"),
    [
        (replace(checked(), codes={}), "log p(x), residuals"),
        (replace(checked(), dependence=None), "log p(x), codes"),
        (replace(checked(), codes={}, dependence=None), "log p(x)"),
    ],
)
def test_the_model_is_trusted_in_what_was_compared(found, what):
    _, said = verdict.findings({"model_check": found}, ROWS)
    words = f"the model: no difference of data and own data was found in {what} (200 data)"
    assert said == [Finding("trust", words, "model")]


@pytest.mark.parametrize(
    "off", [checked(codes=0.1, auc=0.7), checked(scale=0.5), checked(regression=0.1)]
)
def test_a_fault_of_the_model_takes_its_trust(off):
    _, said = verdict.findings({"model_check": off}, ROWS)
    assert [f.kind for f in said] == ["fault"]
    _, said = verdict.findings({"model_check": checked(), "train_gap": trained(0.1, 0.0)}, ROWS)
    assert [f.kind for f in said] == ["fault", "trust"]  # too little data is another matter


def test_a_fault_of_the_model_leaves_the_guide_its_trust():
    results = {"calibration": ranks(), "train_gap": trained(0.1, 0.0)}
    _, said = verdict.findings(results, ROWS)
    assert [(f.kind, f.about) for f in said] == [("fault", "data"), ("trust", "guide")]


@pytest.mark.parametrize("off", [gaps(encoder=0.5), gaps(family=0.5)])
def test_a_fault_of_the_guide_takes_its_trust(off):
    _, said = verdict.findings({"gaps": off}, ROWS)
    assert [f.kind for f in said] == ["fault"]


# Ranks


def many(units, n=20_000):
    """Ranks of units whose normal scores have these means and deviations."""
    scores = torch.stack([mean + spread * normals(n) for mean, spread in units], 1)
    found = (torch.special.ndtr(scores) * 100).long().clamp(0, 99)
    return Calibration(tuple(f"z[{i}]" for i in range(len(units))), found, 99, 0.05, {})


def test_the_three_worst_units_are_told_the_worst_first():
    units = [(0.2, 1.0), (0.0, 1.5), (0.0, 1.0), (-0.3, 1.0), (0.0, 0.6)]
    (words,) = told(calibration=many(units))
    assert words == (
        "on the model's own data, the guide is off: z[4] is too wide (scores of ranks spread by "
        "0.60), z[3] is too high (scores of ranks -0.30 ± 0.01), z[1] is too narrow (scores of "
        "ranks spread by 1.40)"
    )


@pytest.mark.parametrize(
    ("unit", "words"),
    [((-0.4, 1.25), "z[0] is too high"), ((0.11, 1.5), "z[0] is too narrow")],
)
def test_a_unit_is_told_by_what_is_more_off(unit, words):
    (said,) = told(calibration=many([unit]))
    assert words in said


@pytest.mark.parametrize(
    ("spread", "n", "said"),
    [
        (1.1, 20_000, 0),
        (1.18, 200, 0),  # within an error of 0.05 of the factor 1.15
        (1.27, 200, 1),
        (0.8, 100, 0),  # within three errors of 0.07 of 1
        (0.76, 100, 1),
    ],
)
def test_the_scale_of_few_ranks_has_an_error(spread, n, said):
    assert len(told(calibration=many([(0.0, spread)], n))) == said


def test_both_densities_tell_of_the_shape():
    found = many([(0.0, 1.0), (0.0, 1.0), (0.0, 1.4)])
    found = replace(found, names=("z[0]", JOINT, LIKELIHOOD))
    (sign,) = signs.guide_signs({"calibration": found})
    assert sign.kind == "shape"
    assert "off: log p(x | z) is too narrow" in sign.words


# Moments at the data


def by_unit(**columns):
    found = moments()
    made = {
        name: torch.tensor(values).double().expand(N, -1).clone()
        for name, values in columns.items()
    }
    return replace(found, **made)


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (by_unit(shift=[0.2, -0.5]), ["'z[1]': its mean is off by -0.50 posterior sd"]),
        (by_unit(shift=[0.5, -0.2]), ["'z[0]': its mean is off by +0.50 posterior sd"]),
        (by_unit(log_scale=[0.26, -0.5]), ["'z[1]': its scale is 0.61 times the posterior's"]),
        (by_unit(log_scale=[0.5, -0.26]), ["'z[0]': its scale is 1.65 times the posterior's"]),
        (by_unit(log_scale=[-0.05, 0.2]), ["'z[1]': its scale is 1.22 times the posterior's"]),
    ],
)
def test_the_unit_that_is_most_off_at_the_data_is_named(found, words):
    assert told(local_calibration=found) == [f"at the data, {part}" for part in words]


def test_the_correlation_that_is_most_off_is_named():
    found = replace(
        moments(),
        names=("a", "b", "c"),
        pairs=((0, 1), (0, 2), (1, 2)),
        correlation=torch.tensor([torch.nan, 0.1, -0.4]).double().expand(N, 3),
        correlation_errors=torch.zeros(N, 3).double(),
    )
    assert told(local_calibration=found) == [
        "at the data, the correlation of 'b' and 'c' is off by 0.40"
    ]


def test_rows_that_scatter_are_told_only_of_units_without_a_shared_shift():
    assert len(told(local_calibration=moments(shift=0.5))) == 1
    found = moments(scatter=0.5)
    found.shift[:, 1] = 0.9
    assert told(local_calibration=found) == [
        "at the data, 'z[1]': its mean is off by +0.90 posterior sd",
        "at the data, 'z[0]': means of rows are off by 0.50 posterior sd",
    ]


@pytest.mark.parametrize(("error", "said"), [(0.0195, 1), (0.021, 0)])
def test_the_error_of_a_scale_is_relative(error, said):
    """log 1.15 + 3 errors of the logarithm are 0.198 and 0.203; the scale is exp(0.2) = 1.22."""
    side = torch.tensor([1.0, -1.0]).double().repeat(N // 2)
    each = 0.2 + error * N**0.5 * side / side.std()
    found = replace(moments(), log_scale=torch.stack([each, 0 * each], 1))
    assert len(told(local_calibration=found)) == said


def test_a_unit_that_no_row_judges_says_nothing():
    found = moments(shift=0.5, ratio=0.5, correlation=0.5)
    for name in ("shift", "log_scale", "correlation"):
        getattr(found, name)[:, 0] = torch.nan
    assert told(local_calibration=found) == [
        "at the data, 'z[1]': its mean is off by +0.50 posterior sd",
        "at the data, 'z[1]': its scale is 0.50 times the posterior's",
    ]


# A part of the posterior that the guide misses


@pytest.mark.parametrize(("n", "missing"), [(49, False), (50, True)])
def test_fifty_true_values_are_enough(n, missing):
    found = checked(scores=3 * normals(n)[:, None])
    assert (signs.missing_mass({"model_check": found}) is not None) == missing


@pytest.mark.parametrize(
    ("scores", "missing"),
    [
        (normals(N) + 0.49, False),  # 0.3 plus three errors of 200 values: 0.51
        (normals(N) + 0.53, True),
        (1.42 * normals(N), False),  # 1.3 plus three errors: 1.45
        (1.5 * normals(N), True),
        (0.2 * normals(N), False),  # wide draws miss nothing
    ],
)
def test_scores_of_few_true_values_have_errors(scores, missing):
    found = checked(scores=scores[:, None])
    assert (signs.missing_mass({"model_check": found}) is not None) == missing


@pytest.mark.parametrize(
    ("units", "worst"),
    [
        ([(0.8, 1.0), (-1.2, 1.0)], 1),
        ([(0.0, 2.0), (0.8, 1.0)], 0),
        ([(0.0, 1.0), (0.8, 1.0)], 1),
        ([(0.45, 1.35), (0.7, 1.0)], 1),  # the first is not far by either
        ([(0.0, 1.0), (0.8, 0.3)], 1),
        ([(0.0, 1.0), (0.0, 2.0)], 1),
        ([(0.6, 1.0), (0.55, 1.2)], 1),
    ],
)
def test_the_unit_whose_mass_is_missed_is_named(units, worst):
    scores = torch.stack([mean + spread * normals(N) for mean, spread in units], 1)
    found = replace(checked(scores=scores), units=("z[0]", "z[1]"))
    sign = signs.missing_mass({"model_check": found})
    assert sign is not None
    assert sign.words.startswith(f"true values of 'z[{worst}]' are far")


def test_the_difference_to_annealing_and_its_error():
    found, weighed = annealed(0.5, 0.06), weights(error=0.1)
    by, error, n = signs.annealed_difference({"annealing": found, "log_likelihood": weighed})
    assert (by, n) == (pytest.approx(0.5), 20)
    # Errors of 20 rows: those of chains are 0.06 for the mean, those of weights 0.1 for each row.
    assert error == pytest.approx((0.06**2 + 0.1**2 / 20) ** 0.5)
    found.per_datum[:4] += 100.0
    weighed.pareto_k[:4] = 2.0
    by, error, n = signs.annealed_difference({"annealing": found, "log_likelihood": weighed})
    assert (by, n) == (pytest.approx(0.5), 16)
    assert error == pytest.approx((20 * 0.06**2 + 0.1**2) ** 0.5 / 4)


def test_annealing_of_more_rows_than_weights_is_not_compared():
    def compares(n):
        results = {"annealing": annealed(0.5, n=20), "log_likelihood": weights(n=n)}
        return signs.annealed_difference(results) is not None

    assert [compares(19), compares(20)] == [False, True]


def test_the_bias_of_unreliable_weights_does_not_hide_missing_mass():
    weighed = weights(error=0.01)
    weighed.pareto_k[100:] = 2.0
    weighed.standard_errors[100:] = 5.0
    results = {"annealing": annealed(0.5), "log_likelihood": weighed}
    assert signs.missing_mass(results) is not None


# The model at the limits


@pytest.mark.parametrize(("deviations", "said"), [(4.0, 0), (4.1, 1)])
def test_four_deviations(deviations, said):
    for name in ("codes", "scale", "row", "column", "dependence", "regression"):
        more = {"auc": 0.7} if name == "codes" else {}
        found = checked(**{name: 0.5}, **more, deviations=deviations)
        assert len(signs.model_signs({"model_check": found})) == said, name
    found = replace(checked(), scale=Difference(-0.5, -deviations))
    assert len(signs.model_signs({"model_check": found})) == said


@pytest.mark.parametrize(("nats", "said"), [(0.02, 0), (0.021, 1)])
def test_a_fiftieth_of_a_nat(nats, said):
    for name in ("row", "column", "dependence", "regression"):
        found = checked(**{name: nats})
        assert len(signs.model_signs({"model_check": found})) == said, name
    found = replace(checked(), codes={"z": Separation(0.7, 10.0, nats)})
    assert len(signs.model_signs({"model_check": found})) == said


@pytest.mark.parametrize(("p", "said"), [(1e-4, 0), (0.9e-4, 1)])
def test_a_p_value_of_one_in_ten_thousand(p, said):
    assert len(signs.model_signs({"model_check": checked(p=p)})) == said


def test_what_was_not_measured_is_no_sign():
    nothing = dict.fromkeys(("scale", "row_scale", "column_scale", "dependence", "regression"))
    found = replace(checked(), **nothing)
    assert signs.model_signs({"model_check": found}) == []
    assert found.scale_nats == 0


def test_each_site_whose_codes_differ_is_named():
    found = replace(
        checked(),
        codes={
            "a": Separation(0.51, 10.0, 0.001),
            "b": Separation(0.8, 10.0, 0.4),
            "c": Separation(0.6, 10.0, 0.1),
        },
    )
    said = [sign.words for sign in signs.model_signs({"model_check": found})]
    start = "a classifier tells codes '{}' of data from those of the model's own data (AUC {})"
    assert said == [start.format("b", "0.80"), start.format("c", "0.60")]


def test_nuts_of_too_few_draws_says_nothing_and_nothing_is_said_without_results():
    assert told(nuts=chains(ratio=3.0, draws=40)) == []
    assert verdict.findings({}, ROWS) == ([], [])


@pytest.mark.parametrize(
    ("prior", "decoder", "order"),
    [
        (0.4, 0.3, ["prior", "decoder"]),
        (0.4, 0.8, ["prior", "decoder"]),
        (0.4, 0.81, ["decoder", "prior"]),
        (None, 0.81, ["decoder"]),
    ],
)
def test_the_prior_is_first_unless_the_decoder_is_clearly_larger(prior, decoder, order):
    """The classifier gives a lower bound, and codes off the prior leave structure in residuals."""
    found = checked(codes=prior or 0.0, auc=0.7, regression=decoder)
    assert parts(model_check=found) == order
    with_scale = checked(codes=prior or 0.0, auc=0.7, regression=decoder, row=0.5)
    assert [part for part in parts(model_check=with_scale) if part in order] == order


def test_without_a_prior_the_decoder_keeps_its_place():
    assert parts(model_check=checked(regression=1.5, row=1.2)) == ["decoder", "likelihood scale"]


def test_a_part_between_prior_and_decoder_keeps_its_place():
    found = checked(codes=0.4, auc=0.7, regression=0.7, row=0.5)
    assert parts(model_check=found) == ["likelihood scale", "prior", "decoder"]
