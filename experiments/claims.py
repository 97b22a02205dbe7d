"""Claims: sentences, each with the number it stands or falls with, and their table."""

from typing import Callable, NamedTuple

import numpy as np

from opd import files
from opd.stats import interval


class Claim(NamedTuple):
    """A sentence and the number, one a seed, that it stands or falls with.

    value(arms) -> float, arms = {arm: its result lines, in order of steps}; the sentence holds
    when the 95 % interval of the mean over seeds lies above `bound` (test "above"), below it
    ("below"), or between -bound and +bound ("within")."""

    text: str
    formula: str
    value: Callable
    test: str = "above"
    bound: float = 0.0


def last(metric, arm, other=None):
    """value of a Claim: an arm's last `metric`, or what it is more than another arm's."""
    return lambda arms: arms[arm][-1][metric] - (arms[other][-1][metric] if other else 0)


def minus(value, other):
    """value of a Claim: the difference of two, as of two gains."""
    return lambda arms: value(arms) - other(arms)


def compare(text, arm, other, test, bound, metric):
    """A Claim about the difference of what two arms end with; of one, about what it ends
    with."""
    names = [name for name in (arm, other) if name]
    if metric != "accuracy":
        names = [f"{metric}({name})" for name in names]
    return Claim(text, " − ".join(names), last(metric, arm, other), test, bound)


def more(text, arm, other=None, bound=0.0, metric="accuracy"):
    """Claims that an arm ends with more than another one does, by more than `bound`."""
    return compare(text, arm, other, "above", bound, metric)


def less(text, arm, other=None, bound=0.0, metric="accuracy"):
    """Claims that it ends with less than the other one and `bound`."""
    return compare(text, arm, other, "below", bound, metric)


def alike(text, arm, other=None, bound=0.03, metric="accuracy"):
    """Claims that they end within `bound` of each other."""
    return compare(text, arm, other, "within", bound, metric)


def verdict(low, high, test, bound):
    """holds | does not hold | not resolvable here, from an interval.   verdict(0.01, 0.2,
    "above", 0) -> holds"""
    if test == "above":
        holds, fails = low > bound, high < bound
    elif test == "below":
        holds, fails = high < bound, low > bound
    else:
        holds = -bound < low and high < bound
        fails = low > bound or high < -bound
    if holds:
        return "holds"
    return "does not hold" if fails else "not resolvable here"


def resample(values, draws=10000):
    """Percentile interval of a mean: (2.5 %, 97.5 %) of the means of `draws` resamples of the
    seeds' values, a fixed generator."""
    means = np.random.default_rng(0).choice(np.asarray(values), (draws, len(values))).mean(1)
    return tuple(float(x) for x in np.quantile(means, (0.025, 0.975)))


def finished_lines(path):
    """A seed each {arm: its result lines in order of steps}, of the arms that were run to
    their end."""
    seeds = {}
    for row in sorted(files.read(path, "results"), key=lambda row: row["step"]):
        seeds.setdefault(row["seed"], {}).setdefault(row["arm"], []).append(row)
    for seed, arms in seeds.items():
        ended = {arm: rows for arm, rows in arms.items() if any(r.get("final") for r in rows)}
        seeds[seed] = ended
    return [seeds[seed] for seed in sorted(seeds)]


def plus_minus(values, digits=3):
    """The mean of some seeds' values ± half of its 95 % t-interval."""
    mean, half = interval(values)
    text = f"{mean:.{digits}f}"
    return text if half is None else f"{text} ± {half:.{digits}f}"


def markdown(rows):
    """Rows of cells as a table; the first is its head."""
    head, *body = rows
    lines = [head, ["---"] * len(head), *body]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def claim_cells(claim, values, resampled):
    """The cells of a measured claim behind its sentence."""
    mean, half = interval(values)
    decision = "one seed decides nothing"
    if half is not None:
        decision = verdict(mean - half, mean + half, claim.test, claim.bound)
    sign = {"above": "> ", "below": "< ", "within": "within ± "}[claim.test]
    drawn = ["{:.3f} to {:.3f}".format(*resample(values))] if resampled else []
    each = " ".join(f"{v:.3f}" for v in values)
    measured = f"{claim.formula} = {plus_minus(values)}"
    return [measured, *drawn, f"{sign}{claim.bound:g}", each, f"**{decision}**"]


def claims_table(path, claims, resampled=False):
    """Markdown: every claim with its number, its interval over seeds and its verdict, which is
    the t-interval's.  resampled: also the bootstrap interval over seeds, narrower with few of
    them, for papers that decide by it."""
    seeds, extra = finished_lines(path), ["bootstrap"] * resampled
    measured = "measured, mean over seeds ± half of the 95 % t-interval"
    rows = [["claim", measured, *extra, "bound", "each seed", "verdict"]]
    for claim in claims:
        try:
            values = [claim.value(arms) for arms in seeds]
            cells = claim_cells(claim, values, resampled)
        except KeyError as missing:  # an arm that was not run to its end in every seed
            cells = [claim.formula, *[""] * (2 + resampled), f"not measured: {missing.args[0]}"]
        rows.append([claim.text, *cells])
    return markdown(rows)
