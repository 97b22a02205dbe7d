"""Stable-OPD (arXiv 2604.08527): on-policy distillation with a KL penalty to its start and
golden answers beside it, against length inflation and loops.

The paper's text was not available: the formula is from secondary notes, the weights 0.1 and
0.01 are a third party's, the clip of 0.2 is ours.  train.py computes all of it: --reference
holds scores by the starting policy, --data the golden answers."""

from opd.loss import Method

ROWS = {
    "stable-opd": Method(
        "self",
        "k1",
        clip_low=0.2,
        clip_high=0.2,
        reference_kl=0.01,
        gold_weight=0.1,
        formula="π/μ (log p_T − log μ) [a = y]",
        about="on-policy distillation with golden answers beside it and a KL to the start, "
        "against length inflation and loops (arXiv 2604.08527)",
    )
}
