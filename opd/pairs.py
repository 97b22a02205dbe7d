"""Direct preference optimisation as weights of sequences (arXiv 2305.18290, section 4)."""

import math

import numpy as np

from opd.tensors import current_logps


def preference_weights(scale, signs, log_ratios):
    """omega of DPO for one pair: signs (+1, -1), log_ratios = log pi(y) - log pi_ref(y) of the
    two whole answers, as they are now.

    The gradient of -log sigmoid(h), h = scale (log_ratio_chosen - log_ratio_rejected), is
    -scale sigmoid(-h) times the difference of the two grad log pi(y): a weighted imitation of
    one and avoidance of the other.  The factor 2: the mean over pairs is twice the mean over
    their answers.

    preference_weights(0.1, [1, -1], [0.0, 0.0]) -> [0.1, -0.1]"""
    h = scale * sum(s * r for s, r in zip(signs, log_ratios))
    return [2 * scale * s / (1 + math.exp(min(h, 700.0))) for s in signs]


def weigh_pairs(policy, data, items, settings):
    """Scales the signs that a pair's answers carry as their omega (DPO), from the log-probs of
    this moment.  Returns metrics."""
    scale = data.method.omega_scale
    pairs = {}
    for item, logp in zip(items, current_logps(policy, data, items, settings)):
        ratio = float((logp - item["reference_logp"]).sum())
        pairs.setdefault(item["key"][0], []).append((item, ratio))
    margins = []
    for pair in pairs.values():
        signs = [item["omega"] for item, _ in pair]
        ratios = [ratio for _, ratio in pair]
        omegas = [0.0] * len(pair)
        if all(item["length"] for item, _ in pair):  # half a pair is no preference
            omegas = preference_weights(scale, signs, ratios)
            margins.append(scale * sum(s * r for s, r in zip(signs, ratios)))
        for (item, _), omega in zip(pair, omegas):
            item["omega"] = omega
    if not margins:
        return {}
    margins = np.asarray(margins)
    return {
        "preference/margin": float(np.mean(margins)),
        "preference/accuracy": float(np.mean(margins > 0)),
        "preference/loss": float(np.logaddexp(0, -margins).mean()),
    }
