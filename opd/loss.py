"""The token-level loss.  Every method is one row, and every row is the same formula:

    grad L = - sum_{sequences} omega  sum_t  m_t w_t / N_t  *  sum_a c_t(a) grad log pi(a | s_t)

s_t is the prefix before token t, m_t the loss mask, w_t a token weight (1 in most rows), omega
the weight of the sequence (1 in most rows), c_t(a) the coefficient of token a, held constant,
and N_t the normaliser (`norm`): the number of trained tokens of the optimiser step ("token"),
that sequence's length times the number of sequences ("sequence"), or the number of sequences
("batch").  N_t and omega are fixed before the first backward pass, so cutting a step into
micro-batches cannot change its gradient.

What c_t can be (`coefficient`), with y the recorded token and [a = y] its indicator:

    token      [a = y]                                   imitation: SFT
    reward     rho_t A [a = y], clipped as PPO does      GRPO, ROPD;  A: group advantage
    k1         pi/mu (log p_T - log mu) [a = y]          OPD with one teacher number a token
    reward+k1  rho_t (A + b (log p_T - log mu)) [a = y]  both at once, b = teacher_weight
    k2         pi/mu (log p_T - log pi) [a = y]          reverse KL, differentiated as a loss
    full       pi(a) g(p_T(a) / pi(a)) for every a       the teacher's distribution: GKD, OPD
               g(u) = log u                              rkl: reverse KL(pi || p_T)
                      u                                  fkl: forward KL(p_T || pi)
                      (1-b) log(b u + 1-b)               jsd: b KL(p_T || M)
                                                         + (1-b) KL(pi || M),
                                                         M = b p_T + (1-b) pi

pi is the model being trained and p_T the teacher.  mu is the policy that sampled; its log-probs
stand in the rollout (`behaviour_logp` here).  pi_old is the state that this call of train.py
began with; pi and pi_old are taken at the rollouts' temperature.  mu and pi_old differ when a
served sampler computes in other precision or when rollouts are stale; pi and pi_old from the
second step of a call on.  rho_t = pi / pi_old is the importance ratio.

The row `ropd`, put together (S is PPO's clipped objective, L_t the loss of a token):

    S = min(rho A, clip(rho, 0.8, 1.28) A), and where A < 0 at least 3 A
    L_t = -min(pi_old/mu, 2) S,  A = reward - mean of the group,
    N_t = number of trained tokens of the step

For ROPD read `Method`, the row `ropd`, `group_advantages`, `normalised_weights`,
`clipped_surrogate` and `coefficient_loss`; the rest is other methods and refusals.

Estimators of a KL from one sample y ~ pi, with r = p_T(y) / pi(y): k1 = -log r, k2 =
(log r)^2 / 2, k3 = r - 1 - log r.  The gradient depends on the estimator and on its use:

          as an advantage (held constant)         as a loss (differentiated)
    k1    reverse KL                              0 in expectation: refused
    k2    the gradient of no divergence: refused  reverse KL
    k3    reverse minus forward KL: refused       forward KL under another name: refused

Where the prefixes come from (`prefix`) decides what an expectation is over: "data" any text;
"teacher" a teacher's samples; "old" samples of an earlier state of this policy; "self" samples
of these very weights; "mixed" those or given texts by turns (GKD).  batches.py reads it off the
weight hashes in the files and refuses what does not fit.

Beside c_t stand `reference_kl` KL(pi || pi_ref), a penalty that holds the policy near a
reference, and `gold_weight` -log pi of given answers (--data), a mean over their own tokens.

`k2` with ratio "none" has no importance weights.  Its gradient is that of the reverse KL while
pi is mu, and later that of a least-squares regression of log pi onto log p_T at tokens that mu
sampled; advantage_clip makes it a Huber loss.  `k1` is exact in expectation for the first
update of a call: its advantage is fixed when the rollout is scored, while pi moves on.

Sources: the papers of the rows are named there; the formula, the forms of g(u) and the table of
estimators follow from the chain rule and are checked by enumeration in tests/test_loss.py.
"""

import dataclasses
import math
from dataclasses import dataclass

import torch

from opd.cli import changed_field
from opd.records import BadInput


@dataclass(frozen=True)
class OwnLoss:
    """A loss that is not the common formula: a row's `own`, with what it reads and logs.  Its
    fields can be changed with --set, as the columns of a row."""

    # a token's loss needs no other token's log-prob: kernel.linear_token_loss may walk slices
    separable = True

    def fields(self, score, where, mask, vocabulary):
        """{name: array [T, ...]} of a scores record, one row a response token, T = len(mask).
        BadInput, with `where` = file:line, for a record that lacks what it reads."""
        return {}

    def prepare(self, policy, hidden, ids, batch):
        """The ids [N, K] whose log-probs the loss wants; may add to `batch`.  Given are hidden
        [N, D] and ids: the recorded token, then `support_ids` of `fields`."""
        return ids

    def loss(self, logp, batch):
        """[N], differentiable in logp [N, K], at the ids of `prepare`."""
        raise NotImplementedError

    def metrics(self, logp, batch):
        """{slash name: [N]} whose means are logged."""
        return {}


@dataclass(frozen=True)
class Method:
    """One row.  `--set column=value` on train.py's command line changes it for one run."""

    prefix: str  # whose prefixes: "data", "teacher", "old", "self" or "mixed"
    coefficient: str  # c_t: "token", "reward", "k1", "reward+k1", "k2", "full" or "own"
    formula: str = ""  # c_t in writing, for docs/methods.md
    about: str = ""  # what it is, and its source
    divergence: str = "rkl"  # of coefficient full: "rkl", "fkl" or "jsd"
    interpolation: float = 0.5  # b of jsd: towards 0 forward, towards 1 reverse KL
    # weight of a sequence: "one", "informative", "accepted", "softmax" or "preference"
    omega: str = "one"
    # its constant: the reward that is accepted, the softmax's temperature, DPO's beta
    omega_scale: float = 1.0
    ratio: str = "token"  # importance ratio: "token", each token's, or "none", always 1 (k2)
    norm: str = "token"  # N_t: "token", "sequence" or "batch"
    # group advantage: "mean" subtracts the group's mean, "std" also divides by its std
    advantage: str = "none"
    teacher_weight: float = 1.0  # of the teacher's term in reward+k1
    # "kl" adds KL(pi || p_T) at s_t to k1's advantage; same mean, less variance
    baseline: str = "none"
    advantage_clip: float = 0.0  # bounds the teacher's advantage to +-this; 0 is off
    clip_low: float = 0.0  # no gain from a ratio below 1 - clip_low; 0 is off
    clip_high: float = 0.0  # no gain from a ratio above 1 + clip_high; 0 is off
    # bound of -ratio * A for A < 0 as a multiple of |A| (> 1); 0 is off (arXiv 1912.09729)
    dual_clip: float = 0.0
    # truncated importance weight min(pi_old / mu, cap), with k2 min(pi / mu, cap); 0 is off
    tis_cap: float = 0.0
    reference_kl: float = 0.0  # coefficient of KL(pi || pi_ref), needs --reference
    # the KL from the "sample"d tokens (k2), or "full" from the distributions in --reference
    reference_support: str = "sample"
    gold_weight: float = 0.0  # coefficient of -log pi of given answers (--data)
    # "file": --token-weights multiplies c_t; "teacher": the teacher's term in it; the
    # normaliser still counts tokens, not weights
    token_weight: str = "one"
    # "sft": the teacher must be the one whose answers this model was fine-tuned on
    consistency: str = "any"
    student_fraction: float = 1.0  # share of steps on rollouts, the others on --data (GKD)
    own: OwnLoss = None  # coefficient own: the loss

    @property
    def on_policy(self):
        """Whether the rollouts must be samples of the very weights that are trained."""
        return self.prefix in ("self", "mixed")

    @property
    def rewards(self):
        """Whether --rewards are read."""
        return self.coefficient in ("reward", "reward+k1") or self.omega != "one"

    @property
    def teacher(self):
        """Whether a teacher's log-probs are read (--scores or --teacher)."""
        return self.coefficient not in ("token", "reward")

    @property
    def support(self):
        """Whether the teacher's distribution is read, not only its log-prob of a token."""
        return self.coefficient == "full" or self.baseline == "kl"

    @property
    def reference(self):
        """Whether --reference is read."""
        return self.reference_kl > 0 or self.omega == "preference"

    @property
    def given(self):
        """Whether answers from elsewhere (--data) are trained on, too."""
        return self.prefix == "mixed" or self.gold_weight > 0

    @property
    def separable(self):
        """Whether kernel.linear_token_loss may walk slices of tokens."""
        return self.own is None or self.own.separable

    def columns(self):
        """What decides the computation, as JSON: all columns but the words about them."""
        columns = dataclasses.asdict(self)
        del columns["formula"], columns["about"]
        return columns


PPO = dict(coefficient="reward", clip_low=0.2, clip_high=0.2, formula="ρ A [a = y]")
FULL_RKL = dict(coefficient="full", divergence="rkl", formula="π log u")
FULL_FKL = dict(coefficient="full", divergence="fkl", formula="p_T")
IMITATE = dict(coefficient="token", formula="[a = y]")

ROWS = {  # the base methods and ROPD; the other systems' rows stand in methods/
    # ---- off-policy: somebody else's prefixes
    "sft": Method("data", **IMITATE, about="maximise the likelihood of given answers"),
    "seqkd": Method(
        "teacher",
        **IMITATE,
        about="imitate a teacher's sampled answers: forward KL by Monte Carlo "
        "(arXiv 1606.07947)",
    ),
    "fkl": Method(
        "teacher",
        **FULL_FKL,
        about="forward KL on the teacher's own cached answers (arXiv 2605.12483 stage 2a)",
    ),
    "rft": Method(
        "old",
        **IMITATE,
        omega="accepted",
        about="rejection sampling: imitate own earlier answers that a verifier accepts "
        "(RAFT, STaR)",
    ),
    "rwsft": Method(
        "old",
        **IMITATE,
        omega="softmax",
        about="imitate own earlier answers, weighted by the softmax of their rewards",
    ),
    "dpo": Method(
        "data",
        **IMITATE,
        omega="preference",
        omega_scale=0.1,
        norm="batch",
        about="direct preference optimisation on the best and the worst answer to a prompt "
        "(arXiv 2305.18290); online: --set prefix=self",
    ),
    # ---- on-policy, from a reward
    "ppo-clip": Method(
        "self",
        **PPO,
        advantage="std",
        about="PPO's clipped surrogate with a group advantage, mean over tokens "
        "(arXiv 1707.06347)",
    ),
    "grpo": Method(
        "self",
        **PPO,
        advantage="std",
        norm="sequence",
        about="GRPO: group advantage by mean and std, mean over sequences (arXiv 2402.03300); "
        "no KL unless --set reference_kl=...",
    ),
    "dapo": Method(
        "self",
        **PPO | dict(clip_high=0.28),
        advantage="std",
        omega="informative",
        about="GRPO with a mean over all tokens, clip-higher, and no groups that have one "
        "reward (arXiv 2503.14476)",
    ),
    "ropd": Method(
        "self",
        **PPO | dict(clip_high=0.28),
        advantage="mean",
        dual_clip=3.0,
        tis_cap=2.0,
        about="rubric rewards, the loss of ROPD's released code: no std, token mean, "
        "clip-higher, dual clip, truncated importance weights (arXiv 2605.07396)",
    ),
    # the paper names neither clip range nor KL coefficient; its schedule (cosine, 100 warm-up
    # steps, weight decay 0.1, beta2 0.95) are flags of train.py
    "ropd-paper": Method(
        "self",
        **PPO,
        advantage="std",
        norm="sequence",
        reference_kl=0.001,
        about="rubric rewards, the loss of ROPD's equations 6-8; clip 0.2 and KL weight 0.001 "
        "are ours, the paper names none",
    ),
    # ---- on-policy, from a teacher
    "opd": Method(
        "self",
        coefficient="k1",
        formula="π/μ (log p_T − log μ) [a = y]",
        about="on-policy distillation from one teacher number a token (Thinking Machines 2025; "
        "it sums over tokens, we average)",
    ),
    "opd-full": Method(
        "self",
        **FULL_RKL,
        about="on-policy distillation, exact reverse KL at every own prefix (GKD with "
        "lambda 1, beta 1)",
    ),
    "dagger": Method(
        "self",
        **FULL_FKL,
        about="forward KL at the student's own prefixes (GKD with lambda 1, beta 0)",
    ),
    "gkd": Method(
        "mixed",
        coefficient="full",
        divergence="jsd",
        formula="π (1−b) log(b u + 1−b)",
        student_fraction=0.5,
        about="generalised KD: Jensen-Shannon divergence on own and given texts "
        "(arXiv 2306.13649; its mean is over sequences, ours over tokens)",
    ),
    "opd-grpo": Method(
        "self",
        **PPO
        | dict(
            coefficient="reward+k1", clip_high=0.28, formula="ρ (A + log p_T − log μ) [a = y]"
        ),
        advantage="std",
        dual_clip=3.0,
        about="GRPO plus on-policy distillation: both advantages on every token",
    ),
}
CHOICES = {
    "prefix": ("data", "teacher", "old", "self", "mixed"),
    "coefficient": ("token", "reward", "k1", "reward+k1", "k2", "full", "own"),
    "divergence": ("rkl", "fkl", "jsd"),
    "omega": ("one", "informative", "accepted", "softmax", "preference"),
    "ratio": ("token", "none"),
    "norm": ("token", "sequence", "batch"),
    "advantage": ("none", "mean", "std"),
    "baseline": ("none", "kl"),
    "reference_support": ("sample", "full"),
    "token_weight": ("one", "file", "teacher"),
    "consistency": ("any", "sft"),
}
REFUSED = {
    "k1-loss": "k1 differentiated as a loss has gradient 0 in expectation: use k1 (as an "
    "advantage), k2 (as a loss) or full",
    "k2-advantage": "k2 as an advantage is the gradient of no divergence here: use k1 (as an "
    "advantage) or k2 (as a loss)",
    "k3-advantage": "k3 as an advantage is reverse minus forward KL and vanishes near "
    "pi = p_T: use k1 or full",
    "k3": "k3 differentiated on own samples is the forward KL under another name: use "
    "full with divergence fkl",
}
SURROGATE = ("reward", "k1", "reward+k1")  # coefficients with a ratio that can be clipped
# columns that change nothing with the other coefficients
USED_BY = {
    "clip_low": SURROGATE,
    "clip_high": SURROGATE,
    "dual_clip": SURROGATE,
    "tis_cap": ("reward", "reward+k1", "k2"),
    "advantage_clip": ("k1", "reward+k1", "k2"),
    "baseline": ("k1", "reward+k1"),
    "teacher_weight": ("reward+k1",),
}


def method_named(methods, name, overrides=()):
    """The row `name` of `methods` with `column=value` overrides applied, checked."""
    if name not in methods:
        raise BadInput(f"--method {name}: expected one of {', '.join(methods)}")
    method = methods[name]
    for text in overrides:
        own = method.own
        column = text.partition("=")[0]
        if own and column in [field.name for field in dataclasses.fields(own)]:
            own = changed_field(own, "--set", text)
            method = dataclasses.replace(method, own=own)
        else:
            method = changed_field(method, "--set", text, fixed=("formula", "about"))
    check(method)
    return method


def check(method):
    """Raises BadInput for a row whose gradient would not be what its columns say."""
    check_columns(method)
    check_expectation(method)
    check_terms(method)


def check_columns(method):
    """Every value is one of its column's, and every number set is read."""
    for column, choices in CHOICES.items():
        value = getattr(method, column)
        if value in REFUSED:
            raise BadInput(f"{column} {value}: {REFUSED[value]}")
        if value not in choices:
            raise BadInput(f"{column}: expected one of {', '.join(choices)}, got {value!r}")
    for field in dataclasses.fields(method):
        value = getattr(method, field.name)
        if field.type is float and (not math.isfinite(value) or value < 0):
            raise BadInput(f"{field.name}: expected a finite number, at least 0, got {value}")
    default = {field.name: field.default for field in dataclasses.fields(method)}
    reads = {
        "interpolation": ("divergence jsd", method.divergence == "jsd"),
        "reference_support": ("reference_kl above 0", method.reference_kl > 0),
    }
    for column, (user, is_read) in reads.items():
        value = getattr(method, column)
        if not is_read and value != default[column]:
            raise BadInput(f"{column}: goes with {user}, got {value} without it")
    for column, users in USED_BY.items():
        value = getattr(method, column)
        if value != default[column] and method.coefficient not in users:
            raise BadInput(
                f"{column}: goes with coefficient {' or '.join(users)}, got {value} with "
                f"{method.coefficient}"
            )


def check_expectation(method):
    """The texts are those over which the coefficient is an expectation."""
    c = method.coefficient
    if method.divergence != "rkl" and c != "full":
        raise BadInput(
            f"divergence {method.divergence}: coefficient {c} has the gradient of the reverse "
            f"KL or of none: goes with coefficient full"
        )
    if c not in ("token", "full") and method.prefix != "self":
        raise BadInput(
            f"coefficient {c}: an expectation over the policy's own samples; on other prefixes "
            f"({method.prefix!r}) it has another gradient than its name says"
        )
    if c == "token" and method.on_policy and method.omega == "one":
        raise BadInput(
            "coefficient token on own samples: its expected gradient is 0, a policy is not "
            "changed by imitating itself; give it an omega, or use coefficient reward"
        )
    if method.omega in ("accepted", "softmax", "preference") and c not in ("token", "full"):
        raise BadInput(
            f"omega {method.omega}: goes with coefficient token or full, got {c}: a reward "
            f"already weighs its tokens"
        )
    if method.omega == "preference" and c != "token":
        raise BadInput(f"omega preference: goes with coefficient token, got {c}")
    if (method.advantage != "none") != (c in ("reward", "reward+k1")):
        raise BadInput(
            f"advantage {method.advantage!r}: group advantages go with coefficient 'reward' or "
            f"'reward+k1', which need one"
        )
    if method.ratio == "none" and (c != "k2" or method.tis_cap):
        raise BadInput(
            f"ratio none: no importance weights: goes with coefficient k2 and no tis_cap, got "
            f"{c} with tis_cap {method.tis_cap:g}"
        )
    if method.prefix == "mixed" and (c != "full" or method.rewards):
        raise BadInput(
            f"prefix mixed: the steps on --data need a teacher's distribution: goes with "
            f"coefficient full and omega one, got {c} with omega {method.omega}"
        )
    if (method.student_fraction < 1) != (method.prefix == "mixed") or (
        method.student_fraction > 1
    ):
        raise BadInput(
            f"student_fraction: expected below 1 with prefix mixed and 1 otherwise, got "
            f"{method.student_fraction} with prefix {method.prefix!r}"
        )


def check_terms(method):
    """Clips, penalties and constants make sense."""
    c = method.coefficient
    if method.token_weight == "teacher" and c != "reward+k1":
        raise BadInput(
            f"token_weight teacher: weighs the teacher's term against the reward's: goes with "
            f"coefficient reward+k1, got {c}: where there is no reward, it is file"
        )
    if method.divergence == "jsd" and not 0 < method.interpolation < 1:
        raise BadInput(
            f"interpolation: expected between 0 and 1, got {method.interpolation}: at the ends "
            f"use divergence fkl (0) or rkl (1); JSD itself vanishes there"
        )
    if method.omega in ("softmax", "preference") and not method.omega_scale:
        raise BadInput(f"omega_scale: expected above 0 for omega {method.omega}, got 0")
    if method.clip_low >= 1:
        raise BadInput(
            f"clip_low: expected below 1, a ratio is never below 0, got {method.clip_low}"
        )
    if 0 < method.dual_clip <= 1:
        raise BadInput(
            f"dual_clip: expected 0 (off) or a bound above 1, got {method.dual_clip}"
        )
    if (method.reference_kl or method.gold_weight) and method.prefix != "self":
        raise BadInput(
            f"reference_kl, gold_weight: stand beside the policy's own samples: go with prefix "
            f"self, got {method.prefix!r}"
        )
    if method.reference_kl and method.reference_support == "sample" and method.ratio == "none":
        raise BadInput(
            "reference_kl: from stale samples it needs an importance weight, or "
            "reference_support full, got ratio none"
        )


# ---- a group: advantages and weights


def group_advantages(rewards, kind, eps=1e-6):
    """Advantages of one prompt's n rollouts (ROPD eq. 6), or None when a judgement in the group
    failed.

    A failed judgement is unknown, not zero: it would shift everyone's baseline, so its whole
    group leaves the step.

    group_advantages([1.0, 0.5, 0.0], "mean") -> [0.5, 0.0, -0.5]
    group_advantages([1.0, 0.5, 0.0], "std")  -> [1.2247, 0.0, -1.2247]   (population std)"""
    if any(r is None for r in rewards):
        return None
    if max(rewards) == min(rewards):
        return [0.0] * len(rewards)  # whatever the mean rounds to
    mean = sum(rewards) / len(rewards)
    centred = [r - mean for r in rewards]
    if kind in ("none", "mean"):
        return centred
    deviation = math.sqrt(sum(c * c for c in centred) / len(centred))
    return [c / (deviation + eps) for c in centred]


def sequence_weights(method, rewards):
    """omega of one prompt's n answers from their rewards; an answer of weight 0 leaves the step
    and its normaliser.  For rewards [1, .5, 0]:

    one            1                                                     [1, 1, 1]
    informative    0 if the whole group has one reward, else 1 (DAPO)    [1, 1, 1]
    accepted       1 if the reward reaches omega_scale, else 0 (RFT)     [1, 0, 0]
    softmax        n times the softmax of reward / omega_scale           [1.520, 0.922, 0.559]
    preference     +1 the best, -1 the worst, 0 the others and ties;     [1, 0, -1]
                   preference_weights scales them (DPO)"""
    scale = method.omega_scale
    if method.omega == "accepted":
        return [float(r >= scale) for r in rewards]
    if method.omega == "softmax":
        tensor = torch.tensor(rewards, dtype=torch.float64)
        return (len(rewards) * torch.softmax(tensor / scale, 0)).tolist()
    if method.omega == "informative":
        return [float(max(rewards) > min(rewards))] * len(rewards)
    if method.omega == "preference":
        out = [0.0] * len(rewards)
        if max(rewards) > min(rewards):
            out[rewards.index(max(rewards))] = 1.0
            out[rewards.index(min(rewards))] = -1.0
        return out
    return [1.0] * len(rewards)


def normalised_weights(lengths, norm, omegas=None):
    """omega m_t / N_t for every trained token of one optimiser step: a list of [length] lists.
    A sequence with omega 0 or no token does not count in N.

    normalised_weights([1, 3], "token")    -> [[1/4], [1/4, 1/4, 1/4]]
    normalised_weights([1, 3], "sequence") -> [[1/2], [1/6, 1/6, 1/6]]
    normalised_weights([1, 3], "batch")    -> [[1/2], [1/2, 1/2, 1/2]]"""
    omegas = [1.0] * len(lengths) if omegas is None else omegas
    kept = [n for n, omega in zip(lengths, omegas) if n and omega]
    weights = []
    for n, omega in zip(lengths, omegas):
        if not n or not omega:
            weights.append([0.0] * n)
            continue
        divisor = len(kept)
        if norm == "token":
            divisor = sum(kept)
        elif norm == "sequence":
            divisor = len(kept) * n
        weights.append([omega / divisor] * n)
    return weights


# ---- per-token losses


def clipped_surrogate(log_ratios, advantage, method):
    """-objective of PPO's clipped policy gradient, [N] (ROPD eq. 8; the released code's range
    is asymmetric and it adds the dual clip).  Where the ratio is 1 its gradient is
    -A grad log pi.

    log_ratios (log of the importance ratio, differentiable), advantage: both [N]."""
    ratio = log_ratios.exp()
    objective = ratio * advantage
    low = 1 - method.clip_low if method.clip_low else 0.0
    high = 1 + method.clip_high if method.clip_high else math.inf
    objective = torch.minimum(objective, ratio.clamp(low, high) * advantage)
    if method.dual_clip:
        bounded = torch.maximum(objective, method.dual_clip * advantage)
        objective = torch.where(advantage < 0, bounded, objective)
    return -objective


def teacher_advantage(method, batch, kl=None):
    """log p_T - log mu of the sampled token, [N], before advantage_clip; with baseline "kl"
    minus its expectation, which is -kl."""
    advantage = batch["teacher_logp"] - batch["behaviour_logp"]
    return advantage + kl.detach() if method.baseline == "kl" else advantage


def sampled_advantage(method, batch, kl=None):
    """The advantage of a sampled token, [N], that goes into the clipped surrogate."""
    if method.coefficient == "reward":
        return batch["advantage"]
    advantage = teacher_advantage(method, batch, kl)
    if method.advantage_clip:
        advantage = advantage.clamp(-method.advantage_clip, method.advantage_clip)
    if method.token_weight == "teacher":
        advantage = batch["token_weight"] * advantage
    if method.coefficient == "reward+k1":
        return batch["advantage"] + method.teacher_weight * advantage
    return advantage


def huber(r, bound):
    """r^2 / 2 within +-bound and linear beyond, [N] (bound 0: nowhere linear): its derivative
    is r clipped.  huber(3, 2) -> 4."""
    if not bound:
        return 0.5 * r**2
    return torch.where(r.abs() <= bound, 0.5 * r**2, bound * (r.abs() - 0.5 * bound))


def log_tail(logps):
    """log of the mass outside a support: logps [N, K] -> [N], the log of 1 - sum of exp."""
    return torch.log(-torch.expm1(logps.logsumexp(-1).clamp(max=-1e-7)))


def divergence(kind, logp, teacher_logp, whole=True, interpolation=0.5):
    """rkl, fkl or jsd of pi and p_T a token from log-probs on a common support, both [N, K],
    differentiable in logp: [N], >= 0.

    whole: the support is the whole vocabulary.  Otherwise everything outside becomes one more
    outcome (a tail bucket): a true divergence of the lumped distributions, a lower bound of the
    full one.  Without it the sum can be negative and pushes mass out of the support.  For pi =
    (1/2, 1/2), p_T = (1/4, 3/4): rkl 0.1438, fkl 0.1308, jsd(1/2) 0.0338."""
    if not whole:
        logp = torch.cat([logp, log_tail(logp)[:, None]], 1)
        teacher_logp = torch.cat([teacher_logp, log_tail(teacher_logp)[:, None]], 1)

    def kl(p, q):
        return torch.where(p > -torch.inf, p.exp() * (p - q), 0.0).sum(-1)

    if kind == "rkl":
        return kl(logp, teacher_logp)
    if kind == "fkl":
        return kl(teacher_logp, logp)
    mixture = torch.logaddexp(
        teacher_logp + math.log(interpolation), logp + math.log(1 - interpolation)
    )
    return interpolation * kl(teacher_logp, mixture) + (1 - interpolation) * kl(logp, mixture)


def teacher_divergence(method, logp, batch, exact=None):
    """The row's divergence a token, [N], from a teacher in memory (exact) or over the support;
    arguments as for token_loss."""
    kind = method.divergence
    if exact is not None and kind != "jsd":
        return exact[0] if kind == "rkl" else exact[1]
    support = batch["support_logp"]
    ours = logp[:, 1 : 1 + support.shape[1]]
    return divergence(kind, ours, support, batch["whole"], method.interpolation)


def reference_penalty(method, logp, old, batch):
    """reference_kl times KL(pi || pi_ref) a token, [N], from distributions or from the sampled
    tokens."""
    if method.reference_support == "full":
        reference = batch["reference_support_logp"]
        ours = logp[:, -reference.shape[1] :]
        exact = divergence("rkl", ours, reference, batch["reference_whole"])
        return method.reference_kl * exact
    # k2 on own samples, weighed by the ratio: its gradient is that of KL(pi || pi_ref)
    ratio = (logp[:, 0].detach() - old).exp()
    gap = logp[:, 0] - batch["reference_logp"]
    return method.reference_kl * ratio * 0.5 * gap**2


def token_loss(method, logp, batch, exact=None):
    """The loss of each trained token, [N]; sum(loss * batch["weight"]) is the step's loss.

    logp [N, 1 + K + R]: column 0 the recorded token, then the teacher's support and the
    reference's (K and R are 0 without them).  exact: KL(pi || p_T) and KL(p_T || pi), each [N],
    over the whole vocabulary, from a teacher in memory, in place of a support.  batch: what is
    known about the tokens, each [N] unless noted, all constant:

      old_logp        log pi_old (absent where the call makes one update: then it is logp)
      behaviour_logp  log mu, from the rollout
      advantage       the sequence's group advantage
      teacher_logp    log p_T of the recorded token
      support_logp    [N, K] log p_T of the support; `whole`: is it the whole vocabulary
      reference_logp  log pi_ref of the recorded token
      reference_support_logp  [N, R] log pi_ref of its support, whose columns of logp stand
                      last; `reference_whole` as `whole`
      token_weight    what multiplies c_t
      weight, share   omega m_t / N_t, and the same without omega for a mean that is logged"""
    own = logp[:, 0]
    old = batch.get("old_logp", own.detach())
    kl = teacher_divergence(method, logp, batch, exact) if method.support else None
    loss = coefficient_loss(method, logp, old, batch, kl)
    if method.token_weight == "file":
        loss = loss * batch["token_weight"]
    if method.reference_kl:
        loss = loss + reference_penalty(method, logp, old, batch)
    return loss


def coefficient_loss(method, logp, old, batch, kl):
    """The part of token_loss whose gradient is -sum_a c_t(a) grad log pi(a), [N]."""
    own = logp[:, 0]
    if method.coefficient == "token":
        return -own
    if method.coefficient == "own":
        return method.own.loss(logp, batch)
    if method.coefficient == "full":
        return kl
    if method.coefficient == "k2":
        loss = huber(batch["teacher_logp"] - own, method.advantage_clip)
        if method.ratio == "none":
            return loss
        weight = (own.detach() - batch["behaviour_logp"]).exp()
        return weight.clamp(max=method.tis_cap or math.inf) * loss
    advantage = sampled_advantage(method, batch, kl)
    if method.coefficient == "k1":
        # the ratio to mu corrects for stale weights and for the sampler's precision at once
        return clipped_surrogate(own - batch["behaviour_logp"], advantage, method)
    loss = clipped_surrogate(own - old, advantage, method)
    if method.tis_cap:
        loss = loss * (old - batch["behaviour_logp"]).exp().clamp(max=method.tis_cap)
    return loss
