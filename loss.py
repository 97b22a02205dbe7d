"""The token-level loss.  Every method is one row of METHODS, and every row is the same formula:

    grad L = - sum_{sequences} sum_t  m_t / N_t  *  sum_a c_t(a) grad log pi(a | s_t)

s_t is the prefix before token t, m_t the loss mask, c_t(a) what the method wants to do with token a there, held constant, and
N_t the normaliser: the number of trained tokens of the optimiser step (`norm="token"`), or that sequence's length times the
number of sequences (`norm="sequence"`).  N_t is fixed before the first backward pass, so cutting a step into micro-batches
cannot change its gradient.  (Some methods put sequence weights and token weights between the sums; for all rows so far they
are 1.)

What c_t can be (`coefficient`):

    token     1 on the recorded token                              imitation: SFT
    reward    rho_t A on the sampled token, clipped as PPO does    GRPO, ROPD;  A = group advantage of the reward
    k1        pi/mu (log p_T - log mu) on the sampled token        OPD with one teacher number a token
    full      pi(a) log(p_T(a) / pi(a)) for every token a          OPD with the teacher's distribution

pi is the model being trained and p_T the teacher.  Two policies have sampled or could have: mu, whose log-probs stand in the
rollout, and pi_old, the weights this file's training started from, whose log-probs train.py computes itself.  They differ
when a served sampler computes in other precision or when rollouts are stale.  rho_t = pi / pi_old is the importance ratio.

`k1` and `full` descend the reverse KL(pi || p_T) at the student's own prefixes: `full` exactly; `k1` in expectation, and only
for the first update of a file: its advantage is fixed when the rollout is scored, as in its source, while pi moves on.
Two tempting variants are refused by `check`: k1 differentiated as a loss has gradient zero in expectation, and k3 as an
advantage is reverse minus forward KL, which vanishes near p = q.

Sources: ROPD arXiv 2605.07396 equations 6-8 and its released code; GRPO arXiv 2402.03300; dual clip arXiv 1912.09729;
OPD: Thinking Machines, "On-Policy Distillation" (2025).
"""
import dataclasses
import math
from dataclasses import dataclass

import torch

from records import BadInput


@dataclass(frozen=True)
class Method:
    """One row.  `--set name=value` on train.py's command line changes a column for one run."""
    prefix: str                      # whose prefixes: "data" (any text) or "self" (sampled by this very policy)
    signal: str                      # what must be on disk: "tokens", "reward" (--rewards) or "teacher" (--scores, --teacher)
    coefficient: str                 # c_t: "token", "reward", "k1" or "full"
    ratio: str = "token"             # importance ratio: each token's, or "sequence": the geometric mean over the sequence (GSPO)
    norm: str = "token"              # "token": mean over the step's tokens; "sequence": mean over sequences of their means
    advantage: str = "none"          # group advantage: "mean" subtracts the group's mean, "std" also divides by its std
    clip_low: float = 0.0            # no gain from a ratio below 1 - clip_low (bad tokens); 0 turns this side off
    clip_high: float = 0.0           # no gain from a ratio above 1 + clip_high (good tokens); 0 turns this side off
    dual_clip: float = 0.0           # bound of -ratio * A for A < 0 as a multiple of |A| (> 1); 0 is off
    tis_cap: float = 0.0             # truncated importance sampling: weight min(pi_old / mu, cap) for sampler/trainer gaps; 0 is off
    reference_kl: float = 0.0        # coefficient of KL(pi || pi_ref), needs --reference (scores by the reference policy)
    entropy_bonus: float = 0.0       # coefficient of the policy's entropy, added to the objective

    @property
    def on_policy(self):
        return self.prefix == "self"

    @property
    def separable(self):
        """Whether a token's loss needs no other token's log-prob, so that kernel.linear_token_loss may walk slices of tokens."""
        return self.ratio == "token"


METHODS = {
    # imitation: maximise the likelihood of given answers (a corpus, or a teacher's texts)
    "sft": Method(prefix="data", signal="tokens", coefficient="token"),
    # GRPO as its paper has it (no KL term here unless --set reference_kl=...)
    "grpo": Method(prefix="self", signal="reward", coefficient="reward", norm="sequence", advantage="std", clip_low=0.2, clip_high=0.2),
    # ROPD as its released code runs it: no std, token mean, clip-higher, dual clip, truncated importance weights, no KL
    "ropd": Method(prefix="self", signal="reward", coefficient="reward", advantage="mean", clip_low=0.2, clip_high=0.28,
                   dual_clip=3.0, tis_cap=2.0),
    # ROPD's loss as its paper writes it (eq. 6-8), which names neither the clip range nor the KL coefficient.  Its schedule
    # (cosine, 100 warm-up steps, weight decay 0.1, beta2 0.95) are flags of train.py
    "ropd-paper": Method(prefix="self", signal="reward", coefficient="reward", norm="sequence", advantage="std", clip_low=0.2,
                         clip_high=0.2, reference_kl=0.001),
    # GSPO: GRPO with one ratio a sequence, and the narrow clip range that goes with it
    "gspo": Method(prefix="self", signal="reward", coefficient="reward", ratio="sequence", norm="sequence", advantage="std", clip_low=3e-4, clip_high=4e-4),
    # on-policy distillation from log-probs: one number a token (its source sums over tokens, we average), or the teacher's
    # (top-k) distribution
    "opd": Method(prefix="self", signal="teacher", coefficient="k1"),
    "opd-full": Method(prefix="self", signal="teacher", coefficient="full"),
}
CHOICES = {"prefix": ("data", "self"), "signal": ("tokens", "reward", "teacher"), "coefficient": ("token", "reward", "k1", "full"),
           "ratio": ("token", "sequence"), "norm": ("token", "sequence"), "advantage": ("none", "mean", "std")}
REFUSED = {"k1-loss": "k1 differentiated as a loss has gradient 0 in expectation: use k1 (as an advantage) or full",
           "k3-advantage": "k3 as an advantage is reverse minus forward KL and vanishes near pi = p_T: use k1 or full",
           "k3-loss": "k3 differentiated as a loss on own samples is forward KL under another name: use full"}


def settings(name, overrides=()):
    """The row `name` with `column=value` overrides applied, checked."""
    if name not in METHODS:
        raise BadInput(f"--method {name}: expected one of {', '.join(METHODS)}")
    changes = {}
    types = {f.name: f.type for f in dataclasses.fields(Method)}
    for text in overrides:
        column, equals, value = text.partition("=")
        if not equals or column not in types:
            raise BadInput(f"--set {text}: expected COLUMN=VALUE with a column of {', '.join(types)}")
        try:
            changes[column] = types[column](value)
        except ValueError:
            raise BadInput(f"--set {text}: expected a {types[column].__name__}, came {value!r}") from None
    method = dataclasses.replace(METHODS[name], **changes)
    check(method)
    return method


def check(method):
    """Raises BadInput for a row that does not do what its columns say."""
    for column, choices in CHOICES.items():
        value = getattr(method, column)
        if value in REFUSED:
            raise BadInput(f"{column} {value}: {REFUSED[value]}")
        if value not in choices:
            raise BadInput(f"{column}: expected one of {', '.join(choices)}, came {value!r}")
    needs = {"token": "tokens", "reward": "reward", "k1": "teacher", "full": "teacher"}[method.coefficient]
    if method.signal != needs:
        raise BadInput(f"coefficient {method.coefficient}: expected signal {needs!r}, came {method.signal!r}")
    if method.coefficient in ("reward", "k1") and not method.on_policy:
        raise BadInput(f"coefficient {method.coefficient}: an expectation over the policy's own samples; on other prefixes ('data') "
                       "it has another gradient than its name says")
    if (method.advantage != "none") != (method.coefficient == "reward"):
        raise BadInput(f"advantage {method.advantage!r}: group advantages go with coefficient 'reward', and it needs one")
    uses = {"clip_low": ("reward", "k1"), "clip_high": ("reward", "k1"), "dual_clip": ("reward", "k1"), "tis_cap": ("reward",)}
    for column in (*uses, "reference_kl", "entropy_bonus"):
        value = getattr(method, column)
        if not math.isfinite(value) or (value < 0 and column != "entropy_bonus"):
            raise BadInput(f"{column}: expected a finite number, at least 0, came {value}")
        if value and method.coefficient not in uses.get(column, CHOICES["coefficient"]):
            raise BadInput(f"{column}: goes with coefficient {' or '.join(uses[column])}, came {value} with {method.coefficient}")
    if method.ratio != "token" and method.coefficient not in ("reward", "k1"):
        raise BadInput(f"ratio {method.ratio}: goes with coefficient reward or k1, which have an importance ratio, came {method.coefficient}")
    if method.clip_low >= 1:
        raise BadInput(f"clip_low: expected below 1, a ratio is never below 0, came {method.clip_low}")
    if 0 < method.dual_clip <= 1:
        raise BadInput(f"dual_clip: expected 0 (off) or a bound above 1, came {method.dual_clip}")
    if method.reference_kl and not method.on_policy:
        raise BadInput("reference_kl: its one-sample estimate needs the policy's own samples")


# ---------------------------------------------------------------------------------------------- advantages

def group_advantages(rewards, kind, eps=1e-6):
    """Advantages of one prompt's n rollouts (ROPD eq. 6), or None when a judgement in the group failed.

    A failed judgement is unknown, not zero: it would shift everyone's baseline, so its whole group leaves the step.

    group_advantages([1.0, 0.5, 0.0], "mean") -> [0.5, 0.0, -0.5]
    group_advantages([1.0, 0.5, 0.0], "std")  -> [1.2247, 0.0, -1.2247]   (population standard deviation)"""
    if any(r is None for r in rewards):
        return None
    mean = sum(rewards) / len(rewards)
    centred = [r - mean for r in rewards]
    if kind == "mean":
        return centred
    deviation = math.sqrt(sum(c * c for c in centred) / len(centred))
    return [c / (deviation + eps) for c in centred]


# ---------------------------------------------------------------------------------------------- per-token losses

def log_ratio(method, logp, old_logp, batch):
    """log of the importance ratio of every token, [N]; with ratio "sequence" the mean over the tokens of its sequence
    (GSPO arXiv 2507.18071 eq. 7).  batch["sequence"] [N]: which sequence of the micro-batch a token belongs to."""
    each = logp - old_logp
    if method.ratio == "token":
        return each
    sequence = batch["sequence"]
    sums = each.new_zeros(int(sequence.max()) + 1).index_add(0, sequence, each)
    return (sums / sequence.bincount())[sequence]


def clipped_surrogate(log_ratios, advantage, method):
    """-objective of PPO's clipped policy gradient, [N] (ROPD eq. 8; the released code's range is asymmetric and it adds the
    dual clip).  Where the ratio is 1 its gradient is -A grad log pi.

    log_ratios (from log_ratio, differentiable), advantage: both [N]."""
    ratio = log_ratios.exp()
    objective = ratio * advantage
    low = 1 - method.clip_low if method.clip_low else 0.0
    high = 1 + method.clip_high if method.clip_high else math.inf
    objective = torch.minimum(objective, ratio.clamp(low, high) * advantage)
    if method.dual_clip:
        objective = torch.where(advantage < 0, torch.maximum(objective, method.dual_clip * advantage), objective)
    return -objective


def log_tail(logps):
    """log of the mass outside a support: logps [N, K] -> [N], the log of 1 - sum of exp."""
    return torch.log(-torch.expm1(logps.logsumexp(-1).clamp(max=-1e-7)))


def reverse_kl(logp, teacher_logp, whole):
    """KL(pi || p_T) a token from log-probs on a common support, both [N, K], differentiable in logp: [N], >= 0.

    whole: the support is the whole vocabulary.  Otherwise everything outside becomes one more outcome (a tail bucket):
    a true KL of the lumped distributions, a lower bound of the full one.  Without it the sum can be negative and pushes
    mass out of the support.   reverse_kl(log [[.5, .5]], log [[.25, .75]], True) -> [0.1438]"""
    if not whole:
        logp = torch.cat([logp, log_tail(logp)[:, None]], 1)
        teacher_logp = torch.cat([teacher_logp, log_tail(teacher_logp)[:, None]], 1)
    p = logp.exp()
    return torch.where(p > 0, p * (logp - teacher_logp), 0.0).sum(-1)


def token_loss(method, logp, entropy, batch, exact_reverse_kl=None):
    """The loss of each trained token, [N], for any row of METHODS; sum(loss * batch["weight"]) is the step's loss.

    logp [N, 1 + K]: column 0 the recorded token, the others the teacher's support (K = 0 unless coefficient "full").
    entropy [N].  exact_reverse_kl [N]: KL(pi || p_T) over the whole vocabulary, from a teacher in memory, in place of a support.
    batch: what is known about the tokens, each [N] unless noted, all constant:
      old_logp        log pi before this file's first update (absent when this is the first update: then it is logp)
      behaviour_logp  log mu, from the rollout
      advantage       the sequence's group advantage (coefficient "reward")
      teacher_logp    log p_T of the recorded token
      support_logp    [N, K] log p_T of the support; `whole` says whether that is the whole vocabulary
      reference_logp  log pi_ref of the recorded token
      sequence        int64, which sequence a token belongs to (ratio "sequence")"""
    own = logp[:, 0]
    old = batch.get("old_logp", own.detach())
    if method.coefficient == "token":
        loss = -own
    elif method.coefficient == "full":
        loss = exact_reverse_kl if exact_reverse_kl is not None else reverse_kl(logp[:, 1:], batch["support_logp"], batch["whole"])
    elif method.coefficient == "k1":  # the ratio to mu corrects for stale weights and for the sampler's precision at once
        loss = clipped_surrogate(log_ratio(method, own, batch["behaviour_logp"], batch), batch["teacher_logp"] - batch["behaviour_logp"], method)
    else:
        loss = clipped_surrogate(log_ratio(method, own, old, batch), batch["advantage"], method)
        if method.tis_cap:
            loss = loss * (old - batch["behaviour_logp"]).exp().clamp(max=method.tis_cap)
    if method.reference_kl:
        # k2 = (log pi - log pi_ref)^2 / 2, on own samples and weighed by the ratio: its gradient is that of KL(pi || pi_ref)
        loss = loss + method.reference_kl * (own.detach() - old).exp() * 0.5 * (own - batch["reference_logp"]) ** 2
    if method.entropy_bonus:
        loss = loss - method.entropy_bonus * entropy
    return loss


def token_weights(lengths, norm):
    """m_t / N_t for every trained token of one optimiser step: a list of [length] lists, summing to 1.

    token_weights([1, 3], "token")    -> [[1/4], [1/4, 1/4, 1/4]]
    token_weights([1, 3], "sequence") -> [[1/2], [1/6, 1/6, 1/6]]"""
    kept = [n for n in lengths if n]
    if norm == "token":
        return [[1 / sum(kept)] * n if n else [] for n in lengths]
    return [[1 / (len(kept) * n)] * n if n else [] for n in lengths]
