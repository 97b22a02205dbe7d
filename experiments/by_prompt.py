"""Values keyed by rollout, {(prompt, sample, ...): value}: means, intervals over prompts."""

import numpy as np

from opd.stats import auc_by_prompt, interval


def over_prompts(values):
    """{"mean", "half", "prompts"} of {(prompt, ...): number or None}: half of the 95 %
    t-interval over prompts, each with the mean of its numbers."""
    groups = {}
    for key, value in values.items():
        if value is not None:
            groups.setdefault(key[0], []).append(value)
    if not groups:
        return {"mean": None, "half": None, "prompts": 0}
    mean, half = interval([np.mean(group) for group in groups.values()])
    return {"mean": mean, "half": half, "prompts": len(groups)}


def difference(ones, others, depth=1):
    """`over_prompts` of the mean of `ones` minus that of `others`, for prompts with both; with
    depth 2 within what shares the first two parts of a key, such as (prompt, step)."""
    groups = {}
    for side, values in enumerate((ones, others)):
        for key, value in values.items():
            groups.setdefault(key[:depth], ([], []))[side].append(value)
    return over_prompts(
        {name: np.mean(a) - np.mean(b) for name, (a, b) in groups.items() if a and b}
    )


def quarters(values, covariate):
    """`over_prompts` of the values in each quarter of their keys by covariate {key: number},
    with the least and the largest covariate of the quarter."""
    rows = []
    keys = sorted(values, key=covariate.get)
    for part in np.array_split(np.arange(len(keys)), 4):
        if len(part):
            some = [keys[i] for i in part]
            bounds = {"low": covariate[some[0]], "high": covariate[some[-1]]}
            rows.append(bounds | over_prompts({key: values[key] for key in some}))
    return rows


def minus(ones, others):
    """Differences of {key: number or None}, where both are known."""
    return {
        key: value - others[key]
        for key, value in ones.items()
        if value is not None and others.get(key) is not None
    }


def auc_within(values, right, depth):
    """`over_prompts` of AUCs within what shares the first `depth` parts of a key, such as
    (prompt, step).  values {key: number}, right {key: true or false}."""
    shared = {(key[:depth], key): value for key, value in values.items()}
    aucs = auc_by_prompt(shared, {(key[:depth], key): x for key, x in right.items()})
    return over_prompts({group: auc for (group,), auc in aucs.items()})
