"""The losses of a teacher with another vocabulary: SimCT (arXiv 2605.07711) over text units,
and ULD (arXiv 2402.12030) over ranks.

`python -m methods.simct score` writes what they read (methods/simct/units.py).  The row `opd`
on the same scores is DPCA (arXiv 2606.09456)."""

from dataclasses import dataclass

import numpy as np
import torch

from methods.simct.units import raw_logits
from opd.loss import Method, OwnLoss
from opd.policy import likeliest
from opd.records import BadInput, unpack

FIELDS = ("units", "unit_logprobs", "unit_logits", "unit_logz", "unit_topk", "prefixes")
SPANS = ("mean", "sum", "logit", "none")
PREFIXES = ("keep", "drop")


@dataclass(frozen=True)
class UnitLoss(OwnLoss):
    """The reverse KL over each text unit's candidates (eq. 6-9)."""

    # score of a unit of several tokens: their log-probs' "mean" (eq. 7) or "sum", or the mean
    # "logit" (the released code); "none" leaves such units out
    span: str = "mean"
    # shared tokens that only begin the text of such a unit: "keep" them as rivals, or "drop"
    prefixes: str = "keep"
    separable = False

    def __post_init__(self):
        for name, choices in (("span", SPANS), ("prefixes", PREFIXES)):
            value = getattr(self, name)
            if value not in choices:
                raise BadInput(f"{name}: expected one of {', '.join(choices)}, got {value!r}")

    def fields(self, score, where, mask, vocabulary):
        """What `unit_divergence` reads; a unit with a masked token is left out whole."""
        check_units(score, where, vocabulary)
        ids = unpack(score["unit_topk"]["ids"])
        logps = unpack(score["unit_topk"]["logprobs"])
        prefixes = unpack(score["prefixes"])
        shape = (len(mask), ids.shape[1])
        unit = np.zeros((len(mask), 6), np.float32)
        support_ids = np.zeros(shape, np.int64)
        support_logp = np.zeros(shape, np.float32)
        prefix = np.zeros(shape, np.float32)
        logit = self.span == "logit"
        totals = score["unit_logits" if logit else "unit_logprobs"]
        for row, (s0, s1, t0, t1) in enumerate(score["units"]):
            if not all(mask[s0:s1]):
                continue
            shift = score["unit_logz"][row] if logit else 0
            unit[s0:s1, 1] = 1
            unit[s0] = (1, 1, s1 - s0, t1 - t0, totals[row], shift)
            support_ids[s0] = ids[row]
            support_logp[s0] = logps[row]
            prefix[s0] = prefixes[row]
        arrays = {"unit": unit, "prefix": prefix}
        return arrays | {"support_ids": support_ids, "support_logp": support_logp}

    def prepare(self, policy, hidden, ids, batch):
        if self.span == "logit":
            batch["raw"] = raw_logits(hidden, policy.head, ids[:, 0], **policy.head_options)
        return ids

    def loss(self, logp, batch):
        return unit_divergence(self, logp, batch)

    def metrics(self, logp, batch):
        _, inside, mine, theirs, _, _ = batch["unit"].T
        return {
            "kl/units": unit_divergence(self, logp, batch).detach(),
            "units/spans": ((mine > 1) | (theirs > 1)).float(),
            "units/tokens_inside": inside,
        }


def check_units(score, where, vocabulary):
    """Refuses a score without units, or with those of a larger vocabulary."""
    if any(field not in score for field in FIELDS):
        raise BadInput(
            f"{where}: units: expected text units of a teacher with another vocabulary, but "
            f"the field is missing: run methods.simct score"
        )
    largest = unpack(score["unit_topk"]["ids"]).max(initial=0)
    if largest >= vocabulary:
        raise BadInput(f"{where}: unit_topk: expected ids in [0, {vocabulary}), got {largest}")


def unit_divergence(options, logp, batch):
    """The reverse KL over the candidates of each unit, at the unit's first token, 0 at all
    others, [N].

    Candidates are the shared tokens of that place and, in a unit that is not one token on both
    sides, the unit's own text, scored by each model's mean log-prob of its spelling; both sides
    are normalised over the candidates.  The gradient reaches every token of the unit.

    options: a UnitLoss.  logp [N, 1 + K]: column 0 the recorded token, then the candidates of
    the unit's first token; elsewhere they are not read.  batch:

      unit           [N, 6]: 1 at a unit's first token | 1 inside of a unit | its tokens here |
                     the teacher's tokens | the teacher's score of its text | what is added to
                     the teacher's candidates (0, or with span "logit" the log of the
                     normaliser)
      support_logp   [N, K] the teacher's log-probs of the candidates, -inf for none
      prefix         [N, K] 1 where a candidate is a proper beginning of the unit's text
      raw            [N] the recorded token's logit (span "logit" only)"""
    first, inside, mine, theirs, score, shift = batch["unit"].T
    rows = first.nonzero()[:, 0]
    member = inside.nonzero()[:, 0]
    place = (first.cumsum(0) - 1).long()[member]  # of each member: which unit
    several = (mine[rows] > 1) | (theirs[rows] > 1)
    support = logp[rows, 1 : 1 + batch["support_logp"].shape[1]]
    teacher = batch["support_logp"][rows]
    each = logp[:, 0]
    if options.span == "logit":
        each = batch["raw"]
        support = support + (batch["raw"] - logp[:, 0])[rows, None]
        teacher = teacher + shift[rows, None]
    live = torch.isfinite(teacher)
    if options.prefixes == "drop":
        live = live & ~((batch["prefix"][rows] > 0) & several[:, None])
    live = torch.cat([live, several[:, None]], 1)
    text = torch.zeros(len(rows), dtype=logp.dtype, device=logp.device)
    text = text.index_add(0, place, each[member])
    teacher_text = score[rows]
    if options.span != "sum":
        text = text / mine[rows]
        teacher_text = teacher_text / theirs[rows]
    q = over_candidates(support, text, live)
    p = over_candidates(teacher, teacher_text, live)
    kl = (q.exp() * (q - p) * live).sum(-1)
    if options.span == "none":
        kl = kl.masked_fill(several, 0)
    kl = kl.masked_fill(~live.any(-1), 0)
    return torch.zeros_like(logp[:, 0]).index_add(0, rows, kl)


def over_candidates(support, text, live):
    """log-probs [U, K + 1] of the candidates, normalised over those that are live; 0 at the
    others."""
    scores = torch.cat([support, text[:, None]], 1).masked_fill(~live, -torch.inf)
    return torch.log_softmax(scores, -1).masked_fill(~live, 0)


@dataclass(frozen=True)
class SortedLoss(OwnLoss):
    """ULD: the L1 distance of sorted probabilities, place by place."""

    def fields(self, score, where, mask, vocabulary):
        if "sorted" not in score:
            raise BadInput(
                f"{where}: sorted: expected the largest log-probs of every place, but the "
                f"field is missing: run methods.simct score with --sorted K"
            )
        best = unpack(score["sorted"])
        here = np.zeros(len(mask), np.float32)  # 1 where the teacher has such a place
        here[: len(best)] = 1
        padded = np.zeros((len(mask), best.shape[1]), np.float32)
        padded[: len(best)] = best
        return {"sorted_here": here, "sorted_logp": padded}

    @torch.no_grad()
    def prepare(self, policy, hidden, ids, batch):
        """The policy's own largest, as many as the teacher's."""
        own = likeliest(policy, hidden, batch["sorted_logp"].shape[1])
        batch["sorted_logp"] = batch["sorted_logp"][:, : own.shape[1]]
        return torch.cat([ids, own], 1)

    def loss(self, logp, batch):
        ours = logp[:, 1 : 1 + batch["sorted_logp"].shape[1]].exp()
        gaps = (ours - batch["sorted_logp"].exp()).abs()
        return gaps.sum(-1) * batch["sorted_here"]


UNITS = "q (log(q_T / q) + KL(q ‖ q_T)) over the candidates of the unit that y begins"
ROWS = {
    "simct": Method(
        "self",
        "own",
        own=UnitLoss(),
        formula=UNITS + ": shared tokens and the unit's text",
        about="reverse KL over shared tokens and the text unit that was written (arXiv "
        "2605.07711); --set span=logit is its released code's score",
    ),
    "simple-opd": Method(
        "self",
        "own",
        own=UnitLoss(span="none"),
        formula=UNITS + ": shared tokens, where both spell y alike",
        about="reverse KL over shared tokens where both tokenizers spell alike, nothing "
        "elsewhere (its baseline; arXiv 2610.08448 on 16 candidates)",
    ),
    "uld": Method(
        "self",
        "own",
        own=SortedLoss(),
        formula="−sign(π − p_T at the same rank) π over the K largest",
        about="L1 distance of sorted probabilities, place by place, blind to which tokens they "
        "belong to (arXiv 2402.12030, without its cross-entropy)",
    ),
}
