"""Lightning OPD (arXiv 2604.13010): answers and teacher log-probs are computed once and reused,
without importance weights.

The teacher must be the one whose answers the student was fine-tuned on (section 3.4: their
difference enters the bound of the gradient's error).  `consistency="sft"` says so, and train.py
compares the scorer with the writers that it has recorded in sft_teacher.json."""

from opd.loss import Method

ROWS = {
    "lightning": Method(
        "self",
        "k2",
        ratio="none",
        norm="sequence",
        advantage_clip=10.0,
        consistency="sft",
        formula="(log p_T − log π) [a = y]",
        about="offline on-policy distillation: answers and teacher numbers computed once, by "
        "the teacher of the fine-tuning (arXiv 2604.13010)",
    )
}
