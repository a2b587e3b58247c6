"""Mutants of the rules in words, of effective sample sizes, and of what `selftest` checks.

    python benchmarks/mutants.py                  # all modules; hours of one core
    python benchmarks/mutants.py signs verdict    # some modules
    python benchmarks/mutants.py gaps --sample 40 # a random sample of each module

A mutant changes one thing: a number (times 2, times 1/2), a comparison (its limit or direction), a
veto (a side of "and", "or", "&", "|", a "not", or an early return is dropped), a sign, an operator,
a direction (the branches of a choice, least and greatest), or words. The tests of the module then
run, the cheapest first, until one fails. The mutant is then killed. The program prints the
survivors, and a table of counts. Survivors in `EQUIVALENT` change no result.

Each mutant runs in a fork of this process, which patches the functions of the module. So no file
changes, and nothing is imported twice. Run it in the root of the repository, with PYTHONPATH=. if
another copy of the package is installed.
"""

import argparse
import ast
import contextlib
import functools
import importlib
import os
import random
import resource
import sys
import time
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

import pyro_vae.diagnostics.selftest  # noqa: F401  loads every estimator before the forks

CPU_SECONDS = 90
"""A mutant that needs more is killed: it does not end."""

WORDS = {"place": "shape", "shape": "place", "rows": "mass", "mass": "rows"}
WORDS |= {"trust": "doubt", "doubt": "trust", "next": "doubt", "unchecked": "trust"}
WORDS |= {"encoder": "family", "family": "encoder", "prior": "decoder", "decoder": "prior"}
"""Words that decide: they become their opposites. Other words are left out."""

OPERATORS: dict[type, list[type]] = {
    ast.Lt: [ast.LtE, ast.Gt],
    ast.LtE: [ast.Lt, ast.GtE],
    ast.Gt: [ast.GtE, ast.Lt],
    ast.GtE: [ast.Gt, ast.LtE],
    ast.Eq: [ast.NotEq],
    ast.NotEq: [ast.Eq],
    ast.Is: [ast.IsNot],
    ast.IsNot: [ast.Is],
    ast.In: [ast.NotIn],
    ast.NotIn: [ast.In],
    ast.Add: [ast.Sub],
    ast.Sub: [ast.Add],
    ast.Mult: [ast.Div],
    ast.Div: [ast.Mult],
    ast.Pow: [ast.Mult],
    ast.FloorDiv: [ast.Mult],
    ast.And: [ast.Or],
    ast.Or: [ast.And],
}
SIDES = (ast.BitAnd, ast.BitOr)

NAMES = {"min": "max", "max": "min", "amin": "amax", "amax": "amin", "argmax": "argmin"}
NAMES |= {"argmin": "argmax", "minimum": "maximum", "maximum": "minimum", "any": "all"}
NAMES |= {"all": "any", "fmin": "fmax", "cummin": "cummax"}
DROPPED = {"abs", "sqrt", "rsqrt", "square", "log", "exp"}
"""Methods and functions that are replaced by their counterpart, and methods that are dropped."""


class Target(NamedTuple):
    """A module, the functions of it that are mutated, and the tests that ought to kill them."""

    module: str
    tests: list[str]
    functions: str = ""
    """All functions and constants if it is empty; names as in ``co_qualname``."""


RULES = [
    "tests/diagnostics/test_blame.py",
    "tests/diagnostics/test_blame_by_chains.py",
    "tests/diagnostics/test_words_of_the_verdict.py",
    "tests/diagnostics/test_part_of_a_marginal_difference.py",
    "tests/diagnostics/test_tails_of_many_rows.py",
    "tests/diagnostics/test_not_checked_is_not_trusted.py",
    "tests/diagnostics/test_bridge.py",
    "tests/diagnostics/test_advice_with_globals.py",
    "tests/diagnostics/test_class_gap.py",
    "tests/diagnostics/test_wrong_classes.py",
    "tests/diagnostics/test_scores_of_masked_units.py",
    "tests/diagnostics/test_blame_of_discrete_guides.py",
    "tests/diagnostics/test_verdict.py",
    "tests/diagnostics/test_prior_conflict.py",
    "-k",
    "not contradicts and not the_verdict_names_the_prior",
]
SIZES = "study or grow or leaves or size or left or underestimated or cost or share"
DIAGNOSTICS, INFERENCE = "tests/diagnostics/", "tests/inference/"
TARGETS = {
    "signs": Target("pyro_vae.diagnostics.signs", RULES),
    "verdict": Target("pyro_vae.diagnostics.verdict", RULES),
    "attribution": Target("pyro_vae.diagnostics.attribution", RULES),
    "prior_tail": Target(
        "pyro_vae.inference.prior_tail",
        [
            INFERENCE + "test_prior_tail_by_hand.py",
            INFERENCE + "test_prior_tail.py",
            "-k",
            "not uniform_tail",
        ],
    ),
    "sizing": Target(
        "pyro_vae.diagnostics.sizing",
        [DIAGNOSTICS + "test_budget.py", DIAGNOSTICS + "test_diagnose.py", "-k", SIZES],
    ),
    "two_samples": Target(
        "pyro_vae.diagnostics.two_samples",
        [DIAGNOSTICS + "test_two_samples.py"],
        "scale_statistics _excess correlation_statistic clipped explained _terms",
    ),
    "model_check": Target(
        "pyro_vae.diagnostics.model_check",
        [DIAGNOSTICS + "test_bridge.py"],
        "ModelCheck.missed Missed.words",
    ),
    "model_sides": Target(
        "pyro_vae.diagnostics.model_sides",
        [DIAGNOSTICS + "test_bridge.py"],
        "_bridge _weights_of_truth",
    ),
    "pareto": Target(
        "pyro_vae.inference.pareto",
        [
            INFERENCE + "test_sizes_of_chains.py",
            INFERENCE + "test_threshold_of_weights.py",
            INFERENCE + "test_reliability.py",
            DIAGNOSTICS + "test_discrete_guides.py",
            "-k",
            "threshold or arviz or parts or paper or too_few or bounded",
        ],
    ),
    "chain_measures": Target(
        "pyro_vae.inference.chain_measures",
        [INFERENCE + "test_sizes_of_chains.py", INFERENCE + "test_chain_measures.py"],
    ),
    "chains": Target(
        "pyro_vae.inference.chains",
        [
            INFERENCE + "test_sizes_of_chains.py",
            INFERENCE + "test_chain_measures.py",
            INFERENCE + "test_posterior_by_hand.py",
            DIAGNOSTICS + "test_blame.py",
        ],
        (
            "Posterior.moves Posterior.too_few_draws Posterior.mean_standard_error Posterior.shift "
            "Posterior.scale_ratio Posterior.disagreement Posterior.r_hat_limit Posterior.agrees "
            "Posterior._correlations _effective rank_r_hat _vary _moments _greatest _least"
        ),
    ),
    "importance": Target(
        "pyro_vae.inference.importance",
        [
            INFERENCE + "test_importance_by_hand.py",
            INFERENCE + "test_reliability.py",
            DIAGNOSTICS + "test_verdict.py",
            "-k",
            "not contradicts and not every_pair and not dimensions",
        ],
        (
            "LogLikelihood.unreliable LogLikelihood.total_error LogLikelihood.worst "
            "_error_of_mean _weighed relative_error _shapes"
        ),
    ),
    "ranks": Target(
        "pyro_vae.diagnostics.ranks",
        [
            DIAGNOSTICS + "test_ranks.py",
            DIAGNOSTICS + "test_ranks_by_hand.py",
            DIAGNOSTICS + "test_calibration_by_hand.py",
            DIAGNOSTICS + "test_effect_sizes.py",
            DIAGNOSTICS + "test_blame.py",
        ],
        (
            "ranks_of simultaneous_band _inside _normal_scores in_words Calibration.counts "
            "Calibration.points Calibration.differences Calibration.coverage "
            "Calibration.coverage_errors Calibration.scores Calibration.score_means "
            "Calibration.score_deviations Calibration.score_mean_errors "
            "Calibration.score_deviation_errors Calibration.failures Calibration.calibrated"
        ),
    ),
    "gaps": Target(
        "pyro_vae.diagnostics.gaps",
        [
            DIAGNOSTICS + "test_gaps_by_hand.py",
            DIAGNOSTICS + "test_choice_of_a_proposal.py",
            DIAGNOSTICS + "test_threshold_of_gaps.py",
            DIAGNOSTICS + "test_blame.py",
        ],
        (
            "PerDatum.value PerDatum.standard_error _proposal_is_refined _split _joined "
            "_with_given _error _minus"
        ),
    ),
    "information": Target(
        "pyro_vae.diagnostics.information",
        [
            DIAGNOSTICS + "test_bias_of_kl_parts.py",
            DIAGNOSTICS + "test_calibration_by_hand.py",
            DIAGNOSTICS + "test_exact.py",
            DIAGNOSTICS + "test_latent.py",
            "-k",
            "kl or information or share or parts",
        ],
        "KLParts.aggregate_kl_lower KLParts.saturated _parts _scores _shares _by_unit _mean",
    ),
}


class Equivalent(NamedTuple):
    """Mutants that change no result: a part of the line, the start of the change, the reason."""

    module: str
    line: str
    change: str
    reason: str


REAL = "both sides are estimates, so that they are equal with probability 0"
MEMORY = "how much is computed at once changes no result"
INFINITE = "the shape of a tail with so few weights is set to infinity"
ROUNDING = "the change is below the rounding of the sums"
EQUIVALENT = [
    Equivalent("prior_tail", "few, strict=True)", "True to False", "both sides have one length"),
    Equivalent("prior_tail", "if name in left_out", "condition never", "a later reason is told"),
    Equivalent("prior_tail", "if len(names) > 1", "1 to 2", "two names are joined by 'and'"),
    Equivalent("prior_tail", "none[0], *(tail[1, 0]", "0 to 1", "all draws have one number"),
    Equivalent("prior_tail", "max=len(weights) - 1", "Sub to Add", ROUNDING),
    Equivalent("prior_tail", "max=len(weights) - 1", "1 to 0", ROUNDING),
    Equivalent("prior_tail", "max(1, value.numel())", "1 to 0", "a site has a number"),
    Equivalent("prior_tail", "ours.isfinite(), ROUNDING", "0.0 to 1", "infinity minus 1"),
    Equivalent("sizing", "with bar(progress, 3 * len", "", "a bar changes no result"),
    Equivalent("sizing", "max(seconds, 1e-9)", "1e-09 to", "a run takes longer"),
    Equivalent("sizing", "zip(*known[-2:], strict", "True to False", "both have a cost and a time"),
    Equivalent("sizing", "if rest else 0.0", "0.0 to 1", "all studies are over"),
    Equivalent("signs", "if factor < 1", "Lt to LtE", "a factor of 1 is not told"),
    Equivalent("signs", "sign.nats is not None and", "side 1", "for mypy: the size is known"),
    Equivalent("signs", "abs(found[0]) <= max(AGREE", "LtE to Lt", REAL),
    Equivalent("chain_measures", "if number > 1", "1 to 2", "split chains are at least two"),
    Equivalent("chain_measures", "within > 1e-12", "Gt to GtE", ROUNDING),
    Equivalent("chain_measures", "within > 1e-12", "1e-12 to", ROUNDING),
    Equivalent("chain_measures", "counted = (pairs > 0)", "Gt to GtE", REAL),
    Equivalent("signs", "clamp(max=1e6)", "1000000.0 to ", "chains are shorter"),
    Equivalent("verdict", "other[0] > 0", "Gt to GtE", "a difference of 0 is not told"),
    Equivalent("signs", "return value > limit", "Gt to GtE", REAL),
    Equivalent("verdict", "<= TOGETHER", "LtE to Lt", REAL),
    Equivalent("verdict", "isinstance(found, Annealing)", "side 1", "then other is None, too"),
    Equivalent("chain_measures", "correction=0", "0 to 1", "a factor of 1 - 1 / draws"),
    Equivalent("ranks", "if abs(width) > max", "Gt to GtE", REAL),
    Equivalent("ranks", "if abs(width) > max", "0 to 1", "a width that is told is over 3"),
    Equivalent("ranks", "if width > 0", "Gt to GtE", "a width of 0 is not told"),
    Equivalent("ranks", "middle <= interval", "LtE to Lt", REAL),
    Equivalent("ranks", "one > 1e-18", "Gt to GtE", REAL),
    Equivalent("ranks", "narrow, wide = level", "", "the bisection starts elsewhere"),
    Equivalent("ranks", "for _ in range(30)", "30 to 15", "both are more than enough steps"),
    Equivalent("ranks", "*bounds(tail)) >= 1 - level", "GtE to Gt", REAL),
    Equivalent("ranks", "one = one[: np.flatnonzero", "", MEMORY),
    Equivalent("ranks", "strict=True", "True to False", "both sides have one length"),
    Equivalent("ranks", "float(state[-1] /", "1 to 0", "one count is left"),
    Equivalent("ranks", "if abs(place) > max", "Gt to GtE", REAL),
    Equivalent("ranks", "if place > 0", "Gt to GtE", "a place of 0 is not told"),
    Equivalent("ranks", "slack = 1e-9", "1e-09 to ", ROUNDING),
    Equivalent("ranks", "low - slack", "Lt to LtE", REAL),
    Equivalent("ranks", "low - slack", "Gt to GtE", REAL),
    Equivalent("ranks", "poisson.pmf(np.arange(sim", "Add to Sub", "a count without probability"),
    Equivalent("ranks", "poisson.pmf(np.arange(sim", "1 to 2", "a count above the sum"),
    Equivalent("ranks", "start + len(state) - 1", "1 to ", "a slice ends with its array"),
    Equivalent("ranks", "start + len(state) - 1", "Sub to Add", "a slice ends with its array"),
    Equivalent("ranks", "if width > 0", "0 to 1", "a width below 3 is not told"),
    Equivalent("ranks", "if place > 0", "0 to 1", "a place below 3 is not told"),
    Equivalent("chains", ".clamp(min=1))  # of loc", "1 to 0", "resting units have no limit"),
    Equivalent("chains", "self.r_hat > self.r_hat_limit", "Gt to GtE", REAL),
    Equivalent("chains", "self.r_hat > self.r_hat_limit", "right side", "inf is above all limits"),
    Equivalent("gaps", "where(clear, gain > 0", "Gt to GtE", "a gain of 0 is not clear"),
    Equivalent("gaps", "strict=True", "True to False", "both sides have one length"),
    Equivalent("information", "return low > log", "Gt to GtE", REAL),
    Equivalent("information", "strict=True", "True to False", "both sides have one length"),
    Equivalent("signs", "found.value > least", "Gt to GtE", REAL),
    Equivalent("signs", "missed.value > class_nats", "Gt to GtE", REAL),
    Equivalent("attribution", "units_off(ranked).tolist(), strict=True", "True to", "one length"),
    Equivalent("signs", "low.value <= MUCH", "LtE to Lt", REAL),
    Equivalent("signs", "mean.abs() > MISSING_SHIFT", "Gt to GtE", REAL),
    Equivalent("signs", "spread > MISSING", "Gt to GtE", REAL),
    Equivalent("signs", "if not found.value > NATS", "Gt to GtE", REAL),
    Equivalent("attribution", "< SMALL_GAP and", "Lt to LtE", REAL),
    Equivalent("verdict", "higher[0] > 0", "Gt to GtE", "a difference of 0 is not significant"),
    Equivalent("attribution", "prior = next((blame.nats or 0.0", "0.0 to 1", "a prior has a size"),
    Equivalent("attribution", "if not gap > NATS", "Gt to GtE", REAL),
    Equivalent("two_samples", "1e-9 * torch.eye", "Add to Sub", ROUNDING),
    Equivalent("two_samples", "z = causes - causes.mean(", "Sub to Add", "they span the same"),
    Equivalent("two_samples", "return c - 1 - c.clamp(min=1e-12)", "1e-12 to", ROUNDING),
    Equivalent("two_samples", ".clamp(min=1e-12)", "1e-12 to", "a constant becomes 0"),
    Equivalent("chains", "limit.nan_to_num(0.0)", "0.0 to 1", "below the least limit"),
    Equivalent("gaps", "k = torch.where(gain > 0", "Gt to GtE", "a gain of 0 is not clear"),
    Equivalent("importance", "stable=True", "True to False", "sorting on a CPU is stable"),
    Equivalent("signs", "higher[0] > 0", "Gt to GtE", "a difference of 0 is not significant"),
    Equivalent("signs", "abs(mean) / SHIFT >", "Gt to GtE", REAL),
    Equivalent("signs", "if abs(mean) > 1", "Gt to GtE", REAL),
    Equivalent("ranks", "u.mean().abs() > u.std()", "Gt to GtE", REAL),
    Equivalent("signs", '"low" if mean > 0', "Gt to GtE", "a unit of mean 0 is not told"),
    Equivalent("attribution", "default=0.0", "0.0 to 1", "without sizes nothing is compared"),
    Equivalent("chain_measures", "apart.isnan(), apart, -1.0", "1.0 to ", "any negative number"),
    Equivalent("signs", "far = mean.abs() >", "Gt to GtE", REAL),
    Equivalent("signs", "off = (spread - 1).abs() >", "Gt to GtE", REAL),
    Equivalent("signs", "(spread.log().abs() > log(SCALE)", "Gt to GtE", REAL),
    Equivalent("signs", '"narrow" if spread > 1', "Gt to GtE", "a unit of spread 1 is not told"),
    Equivalent(
        "verdict", "masked_fill(~bad, -1)", "1 to ", "any number below the shape of bad rows"
    ),
    Equivalent("pareto", "FITTED_CELLS = ", "", MEMORY),
    Equivalent("pareto", "points = 30 + int(greatest", "", MEMORY),
    Equivalent("pareto", "rows = max(1, FITTED_CELLS", "", MEMORY),
    Equivalent("pareto", "for part in self.parts) >", "", MEMORY),
    Equivalent("pareto", "length.clamp(min=1)", "1 to 2", INFINITE),
    Equivalent("pareto", "clamp(min=1)  # the rank", "1 to 0", INFINITE),
    Equivalent(
        "pareto", "index = torch.arange(1, int", "1 to 2", "one more point, which is masked"
    ),
    Equivalent("pareto", "log() - k - 1)", "Sub to Add", "a constant in a softmax"),
    Equivalent("pareto", "log() - k - 1)", "1 to ", "a constant in a softmax"),
    Equivalent("pareto", "kept = weights >=", "", ROUNDING),
    Equivalent("pareto", "deviation > STEADY", "Gt to GtE", REAL),
    Equivalent("pareto", "torch.where(kept, b, 0.0)", "0.0 to 1", "its weight is 0"),
    Equivalent("pareto", "clamp(min=0.5)", "0.5 to ", "the sum is 1, or 0 with a numerator of 0"),
    Equivalent("pareto", "clamp(min=0.5)", "Div to Mult", ROUNDING),
    Equivalent("chain_measures", "units = apart.shape[1]", "1 to 2", "the matrix is square"),
]


def is_equivalent(name: str, line: str, change: str) -> bool:
    return any(
        one.module == name and one.line in line and change.startswith(one.change)
        for one in EQUIVALENT
    )


class Mutant(NamedTuple):
    line: int
    change: str
    tree: ast.Module
    statement: ast.stmt
    """The statement of the module that holds the change."""


def changes(node: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    """Return the changed nodes that may replace a node."""
    match node:
        case ast.Constant(bool() as value):
            yield f"{value} to {not value}", ast.Constant(not value)
        case ast.Constant(int() | float() as value):
            others = [1] if value == 0 else [2 * value, value / 2]
            if isinstance(value, int):
                others = [int(other) for other in others]
            yield from ((f"{value} to {other}", ast.Constant(other)) for other in others)
        case ast.Constant(str() as value) if value.strip():
            other = WORDS.get(value, "")
            yield f"'{value}' to '{other}'", ast.Constant(other)
        case ast.Compare(left, [operator], right):
            for new in OPERATORS.get(type(operator), []):
                yield _named(operator, new), ast.Compare(left, [new()], right)
        case ast.BinOp(left, operator, right) if isinstance(operator, SIDES):
            yield "right side dropped", left
            yield "left side dropped", right
        case ast.BinOp(left, operator, right):
            for new in OPERATORS.get(type(operator), []):
                yield _named(operator, new), ast.BinOp(left, new(), right)
        case ast.BoolOp(operator, values):
            for i in range(len(values)):
                rest = values[:i] + values[i + 1 :]
                new_node = ast.BoolOp(operator, rest) if len(rest) > 1 else rest[0]
                yield f"side {i + 1} dropped", new_node
        case ast.UnaryOp(operator, operand) if isinstance(
            operator, ast.Not | ast.USub | ast.Invert
        ):
            yield f"{type(operator).__name__} dropped", operand
        case ast.IfExp(test, body, orelse):
            yield "branches exchanged", ast.IfExp(test, orelse, body)
        case ast.If(_, body, orelse):
            yield "condition never true", ast.If(ast.Constant(False), body, orelse)
        case ast.Call(ast.Attribute(value, name), arguments, _):
            if name in DROPPED and not arguments:
                yield f"{name} dropped", value
        case ast.Attribute(value, name, context) if name in NAMES:
            yield f"{name} to {NAMES[name]}", ast.Attribute(value, NAMES[name], context)
        case ast.Name(name, context) if name in NAMES:
            yield f"{name} to {NAMES[name]}", ast.Name(NAMES[name], context)


def _source(target: Target) -> str:
    return Path(importlib.import_module(target.module).__file__ or "").read_text()


def _named(old: ast.AST, new: type) -> str:
    return f"{type(old).__name__} to {new.__name__}"


def mutants(target: Target) -> Iterator[Mutant]:
    """Return all mutants of the functions and constants of a module."""
    tree = ast.parse(_source(target))
    for statement, parent, field, index in list(_places(tree, target.functions.split())):
        held = getattr(parent, field)
        node = held if index is None else held[index]
        for change, new in changes(node):
            ast.copy_location(new, node)
            _put(parent, field, index, new)
            ast.fix_missing_locations(tree)
            yield Mutant(node.lineno, change, tree, statement)
            _put(parent, field, index, node)


def _put(parent: ast.AST, field: str, index: int | None, node: ast.AST) -> None:
    if index is None:
        setattr(parent, field, node)
    else:
        getattr(parent, field)[index] = node


def _places(
    tree: ast.Module, functions: list[str]
) -> Iterator[tuple[ast.stmt, ast.AST, str, int | None]]:
    """Return the nodes that may change: statement of the module, parent, field and index."""
    for statement in tree.body:
        if isinstance(statement, ast.Assign | ast.AnnAssign) and not functions:
            value = statement.value
            if value is not None:
                yield from _below(statement, statement, ("value",))
        elif isinstance(statement, ast.FunctionDef):
            if not functions or statement.name in functions:
                yield from _below(statement, statement, ("body",))
        elif isinstance(statement, ast.ClassDef):
            for method in statement.body:
                if isinstance(method, ast.FunctionDef) and (
                    not functions or f"{statement.name}.{method.name}" in functions
                ):
                    yield from _below(statement, method, ("body",))


SKIPPED = {"annotation", "returns", "decorator_list", "args", "type_params"}


def _below(
    statement: ast.stmt, parent: ast.AST, fields: tuple[str, ...] | None = None
) -> Iterator[tuple[ast.stmt, ast.AST, str, int | None]]:
    for field, value in ast.iter_fields(parent):
        if (fields and field not in fields) or (
            field in SKIPPED and not isinstance(parent, ast.Call)
        ):
            continue
        for index, node in enumerate(value) if isinstance(value, list) else [(None, value)]:
            if not isinstance(node, ast.AST) or _is_docstring(node) or isinstance(node, ast.Raise):
                continue
            if isinstance(node, ast.expr | ast.If):
                yield statement, parent, field, index
            yield from _below(statement, node)


def _is_docstring(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def patch(target: Target, mutant: Mutant) -> None:
    """Put a mutant into the loaded module, and into the modules that import its constants."""
    module = importlib.import_module(target.module)
    if isinstance(mutant.statement, ast.Assign | ast.AnnAssign):
        space = dict(vars(module))
        only = ast.Module([mutant.statement], [])
        exec(compile(only, target.module, "exec"), space)
        for name, old in list(vars(module).items()):
            if space[name] is not old:
                for loaded in list(sys.modules.values()):
                    if getattr(loaded, name, None) is old and loaded.__name__.startswith(
                        "pyro_vae"
                    ):
                        setattr(loaded, name, space[name])
        return
    for value in vars(module).values():
        if hasattr(value, "cache_clear"):  # results of the code without the mutant
            value.cache_clear()
    codes = dict(_codes(compile(mutant.tree, module.__file__ or "", "exec")))
    for function in _functions(module):
        new = codes.get(function.__code__.co_qualname)
        if new is not None:
            function.__code__ = new


def _codes(code: types.CodeType) -> Iterator[tuple[str, types.CodeType]]:
    for inner in code.co_consts:
        if isinstance(inner, types.CodeType):
            yield inner.co_qualname, inner
            yield from _codes(inner)


def _functions(space: Any) -> Iterator[types.FunctionType]:
    for value in list(vars(space).values()):
        if isinstance(value, type) and value.__module__ == getattr(space, "__name__", None):
            yield from _functions(value)
        for attribute in ("fget", "func", "__func__"):
            value = getattr(value, attribute, value)
        while hasattr(value, "__wrapped__"):
            value = value.__wrapped__
        if isinstance(value, types.FunctionType):
            yield value


class Runner:
    """A plugin of pytest that collects the tests of a module once, and runs them on each mutant."""

    def __init__(self, name: str, sample: int | None, only: list[int] | None) -> None:
        self.name, self.target, self.sample, self.only = name, TARGETS[name], sample, only
        self.failed = False
        self.counts = [0, 0, 0]
        """Killed, equivalent and surviving mutants."""

    def pytest_runtest_logreport(self, report: Any) -> None:
        self.failed |= report.failed

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        seconds = {}
        for item in session.items:
            start = time.process_time()
            self._run(item)
            seconds[item] = time.process_time() - start
            if self.failed:
                raise SystemExit(f"{item.nodeid} fails without a mutant")
        self.items = sorted(session.items, key=seconds.__getitem__)
        for line, mutant in self._chosen():
            self._try(line, mutant)
        return True

    def _run(self, item: Any) -> None:
        item.config.hook.pytest_runtest_protocol(item=item, nextitem=None)

    def _chosen(self) -> Iterator[tuple[str, Mutant]]:
        lines = _source(self.target).split("\n")
        number = sum(1 for _ in mutants(self.target))
        some = (
            range(number)
            if self.sample is None
            else random.Random(12).sample(range(number), min(number, self.sample))
        )
        for i, mutant in enumerate(mutants(self.target)):
            if i in some and (self.only is None or mutant.line in self.only):
                yield lines[mutant.line - 1].strip(), mutant

    def _try(self, line: str, mutant: Mutant) -> None:
        if is_equivalent(self.name, line, mutant.change):
            self.counts[1] += 1
        elif self._killed(mutant):
            self.counts[0] += 1
        else:
            self.counts[2] += 1
            words = f"SURVIVES {self.name}:{mutant.line}: {mutant.change}: {line}\n"
            os.write(2, words.encode())

    def _killed(self, mutant: Mutant) -> bool:
        child = os.fork()
        if child:
            _, status = os.waitpid(child, 0)
            return os.waitstatus_to_exitcode(status) != 0
        with contextlib.suppress(BaseException):
            resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            patch(self.target, mutant)
            for item in self.items:
                self._run(item)
                if self.failed:
                    break
            else:
                os._exit(0)
        os._exit(1)


def run(name: str, sample: int | None, only: list[int] | None) -> list[int]:
    """Try the mutants of a module; return the numbers of killed, equivalent and surviving ones."""
    runner = Runner(name, sample, only)
    options = ["-n", "0", "-p", "no:cacheprovider", "--tb=no"]
    pytest.main([*options, *TARGETS[name].tests], plugins=[runner])
    return runner.counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("modules", nargs="*", default=list(TARGETS), choices=[*TARGETS, []])
    parser.add_argument("--sample", type=int, help="number of mutants of each module")
    parser.add_argument("--lines", type=int, nargs="*", help="only mutants of these lines")
    options = parser.parse_args()
    torch.set_num_threads(1)
    tried = functools.partial(run, sample=options.sample, only=options.lines)
    counts = {name: tried(name) for name in options.modules}
    print(f"{'module':<20}{'mutants':>9}{'killed':>9}{'equivalent':>12}{'survived':>10}")
    for name, found in counts.items():
        print(f"{name:<20}{sum(found):>9}{found[0]:>9}{found[1]:>12}{found[2]:>10}")


if __name__ == "__main__":
    main()
