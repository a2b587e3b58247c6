"""`selftest`: compare every estimator with answers in closed form, on this machine."""

import platform
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pyro
import torch

import pyro_vae
from pyro_vae.diagnostics.selftest_checks import (
    Check,
    annealing_checks,
    bounds_checks,
    calibration_checks,
    densities_checks,
    enumeration_checks,
    fit_checks,
    gaps_checks,
    gradients_checks,
    information_checks,
    log_likelihoods_checks,
    nuts_checks,
    shared_checks,
    use_checks,
)
from pyro_vae.diagnostics.selftest_errors import (
    by_datum_checks,
    of_means_checks,
    sample_size_checks,
)
from pyro_vae.diagnostics.selftest_kinds import (
    constrained_checks,
    heavy_tail_checks,
    mixed_checks,
)
from pyro_vae.errors import first_line
from pyro_vae.pairs.progress import bar
from pyro_vae.pairs.rng import seeded
from pyro_vae.pairs.showing import shown_html
from pyro_vae.pairs.threads import alone


@dataclass(frozen=True)
class SelfTest:
    """The results of `selftest`."""

    checks: list[Check]
    faults: dict[str, str]
    """The exception that ended each failed group of checks."""
    versions: dict[str, str]
    seconds: float

    @property
    def passed(self) -> bool:
        """Whether every estimate is within its tolerance and no group raised an exception."""
        return not self.faults and all(check.passed for check in self.checks)

    def as_dict(self) -> dict[str, Any]:
        """Return the table in a form for JSON."""
        return {
            "passed": self.passed,
            "versions": self.versions,
            "seconds": self.seconds,
            "checks": [check._asdict() | {"passed": check.passed} for check in self.checks],
            "faults": self.faults,
        }

    _repr_html_ = shown_html

    def __str__(self) -> str:
        lines = [", ".join(f"{name} {version}" for name, version in self.versions.items()), ""]
        lines.append(f"{'':<44}{'estimate':>11}{'true':>11}{'error':>10}{'allowed':>10}")
        for check in self.checks:
            lines.append(
                f"{check.name:<44}{check.estimate:>11.4f}{check.truth:>11.4f}{check.error:>10.1e}"
                f"{check.tolerance:>10.1e}  {'ok' if check.passed else 'FAILED'}"
            )
        lines += [f"{name:<44}FAILED: {fault}" for name, fault in self.faults.items()]
        failed = sum(not check.passed for check in self.checks) + len(self.faults)
        of = len(self.checks) + len(self.faults)
        lines += ["", f"{of - failed} of {of} passed, {self.seconds:.0f} s"]
        return "\n".join(lines)


@alone()
def selftest(progress: bool = True) -> SelfTest:
    """Compare every estimator with closed forms, on this machine and with these versions.

    Most checks use the linear-Gaussian pair, :math:`z \\sim N(0, I),\\ x|z \\sim N(Wz + b, s^2 I)`,
    whose marginal and posterior are normal. Seeds are fixed, so a failure repeats.

    Arguments:
        progress: show a bar if the run takes over two seconds.

    Returns a table of estimate, true value, error and tolerance; ``passed`` is true if all checks
    pass. The command ``pyro-vae selftest`` prints the table and exits with status 1 if one fails.
    """
    start = time.perf_counter()
    checks: list[Check] = []
    faults: dict[str, str] = {}
    with bar(progress, len(CHECKS), "selftest", delay=2) as shown:
        for name, group in CHECKS.items():
            try:
                with seeded(0):
                    checks += group()
            except Exception as error:  # the table must report every failure
                faults[name] = f"{type(error).__name__}: {first_line(error)}"
            shown.update()
    return SelfTest(checks, faults, _versions(), time.perf_counter() - start)


def _versions() -> dict[str, str]:
    return {
        "pyro_vae": pyro_vae.__version__,
        "torch": torch.__version__,
        "pyro": pyro.__version__,
        "python": platform.python_version(),
        "platform": f"{sys.platform} {platform.machine()}",
    }


CHECKS: dict[str, Callable[[], Iterator[Check]]] = {
    "bounds": bounds_checks,
    "gradients": gradients_checks,
    "log p(x)": log_likelihoods_checks,
    "information": information_checks,
    "gaps": gaps_checks,
    "annealing": annealing_checks,
    "NUTS": nuts_checks,
    "calibration": calibration_checks,
    "enumeration": enumeration_checks,
    "global latents": shared_checks,
    "use": use_checks,
    "fit": fit_checks,
    "densities": densities_checks,
    "a constrained latent": constrained_checks,
    "a heavy tail": heavy_tail_checks,
    "a class and a place": mixed_checks,
    "errors of data": by_datum_checks,
    "errors of means": of_means_checks,
    "effective sample sizes": sample_size_checks,
}
"""The checks, by group."""
