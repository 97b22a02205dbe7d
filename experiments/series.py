"""Series of blocks or steps, averaged by their distance to an event."""

import math

import numpy as np

from opd.stats import interval


def kept_shares(sizes):
    """Share of the loss tokens in the first 1..n blocks: sizes [2, 6] -> [0.25, 1.0]."""
    return np.cumsum(sizes) / np.sum(sizes)


def means(pairs):
    """(place, value) pairs -> a row a place, in order: at, mean, half of its 95 % t-interval
    (None for one value), count."""
    groups = {}
    for place, value in pairs:
        groups.setdefault(place, []).append(float(value))
    rows = []
    for place in sorted(groups):
        mean, half = interval(groups[place])
        rows.append({"at": place, "mean": mean, "half": half, "count": len(groups[place])})
    return rows


def by_offset(series, slips):
    """`means` of S by blocks since the first slip (negative: before it); `no_slip`: mean S of
    rollouts without a slip at the same block numbers, which tells what is due to the slip from
    what is due to being late (None where no such rollout is that long)."""
    without = []
    after = []
    for s, slip in zip(series, slips):
        for i, x in enumerate(s):
            if math.isfinite(x) and slip is None:
                without.append((i, x))
            elif math.isfinite(x):
                after.append((i - slip, i, x))
    level = {row["at"]: row["mean"] for row in means(without)}
    alike = means((offset, level[i]) for offset, i, _ in after if i in level)
    no_slip = {row["at"]: row["mean"] for row in alike}
    rows = means((offset, x) for offset, _, x in after)
    return [row | {"no_slip": no_slip.get(row["at"])} for row in rows]


def band(axes, rows, colour, label, level=None):
    """Draws rows of `means` with their intervals; level: also `no_slip` of `by_offset`, dashed,
    under this name."""
    # of fewer, the band hides the rest
    enough = min(10, max((row["count"] for row in rows), default=0))
    rows = [row for row in rows if row["count"] >= enough]
    at, mean, half, alike = (
        np.array([row.get(field) for row in rows], float)
        for field in ("at", "mean", "half", "no_slip")
    )
    axes.plot(at, mean, color=colour, marker="o", markersize=4, linewidth=1.8, label=label)
    axes.fill_between(at, mean - half, mean + half, color=colour, alpha=0.15, linewidth=0)
    if level:
        axes.plot(at, alike, color="0.35", linestyle="--", label=level)
