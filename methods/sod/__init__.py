"""SOD (arXiv 2605.07725): on-policy distillation of agents, with a weight a step.  The weights:
methods/sod/weights.py."""

import dataclasses

from opd.loss import ROWS as BASE

ROWS = {
    "sod": dataclasses.replace(
        BASE["opd-grpo"],
        token_weight="teacher",
        formula="ρ (A + w (log p_T − log μ)) [a = y]",
        about="step-wise distillation of agents: GRPO plus the teacher's advantage, faded "
        "where a step has drifted (arXiv 2605.07725); weights: methods.sod weigh",
    )
}
