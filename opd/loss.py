"""The token-level loss.  Every method is one row of METHODS, and every row is the same formula:

    grad L = - sum_{sequences} omega  sum_t  m_t / N_t  *  sum_a c_t(a) grad log pi(a | s_t)

s_t is the prefix before token t, m_t the loss mask, c_t(a) what the method wants to do with
token a there, held constant, omega the weight of the sequence (1 in most rows), and N_t the
normaliser (`norm`): the number of trained tokens of the optimiser step ("token"), that
sequence's length times the number of sequences ("sequence"), the number of sequences ("batch"),
or 1 ("sum").  N_t and omega are fixed before the first backward pass, so cutting a step into
micro-batches cannot change its gradient.

What c_t can be (`coefficient`):

    token       1 on the recorded token                               imitation: SFT
    reward      rho_t A on the sampled token, clipped as PPO does     GRPO, ROPD;  A = group
                advantage of the reward
    k1          pi/mu (log p_T - log mu) on the sampled token         OPD with one teacher
                number a token
    reward+k1   rho_t (A + teacher_weight (log p_T - log mu))         both at once
    k2, k3      pi/mu times the derivative of an estimator            the same gradients as
                reverse, forward KL, see below
    unit        the same over text units of another tokenization      a teacher of another
                vocabulary (methods/simct/units.py, methods/simct/align.py)
    sorted      a distance of sorted probabilities, whatever tokens   ULD: place i of one
                tokenization against place i of the other
    score       grad D(y) of a whole text in place of grad log pi     a discriminator, which
                learns rewards (methods/gad.py)
    full        pi(a) g(p_T(a) / pi(a)) for every token a             the teacher's
                distribution: KD, GKD, OPD
                g(u) = log u            reverse KL(pi || p_T)         `divergence` rkl
                       u                forward KL(p_T || pi)         fkl
                       (1-b) log(b u + 1-b)   JSD_b                   jsd: b KL(p_T || M) +
                                              (1-b) KL(pi || M), M = b p_T + (1-b) pi
                       b log u + (1-b) u      a mixture of both       mix              b is the
                                              column `interpolation`: 0 forward, 1 reverse

pi is the model being trained and p_T the teacher.  Two policies have sampled or could have: mu,
whose log-probs stand in the rollout, and pi_old, the weights this file's training started from,
whose log-probs train.py computes itself.  They differ when a served sampler computes in other
precision or when rollouts are stale.  rho_t = pi / pi_old is the importance ratio.

Estimators from one sample y ~ pi, with r = p_T(y) / pi(y): k1 = -log r, k2 = (log r)^2 / 2, k3
= r - 1 - log r.  Which gradient one gets depends on the estimator *and* on its use, and most
pairs are traps:

          as an advantage (held constant)         as a loss (differentiated)
    k1    reverse KL                              0 in expectation: refused
    k2    another, nameless gradient: refused     reverse KL
    k3    reverse minus forward KL, which         forward KL, whatever it is called: allowed
                                                  with divergence fkl only
          vanishes near pi = p_T: refused

Beside the rows' own term stand three others, each with a column: `reference_kl` KL(pi ||
pi_ref), a leash to a reference policy; `gold_weight` -log pi of given answers (--data), a mean
over their tokens, so that its meaning does not depend on how long rollouts have become;
`entropy_bonus`.  With `token_weight` "file" c_t is multiplied by a number that a file has for
every token (methods.prefix), with "teacher" only the teacher's term in it.

`k2` with ratio "none" forgets that its samples grow old: no importance weights.  Its gradient
is that of the reverse KL while pi is mu, and later that of a least-squares regression of log pi
onto log p_T at the tokens that mu sampled; advantage_clip makes it a Huber loss.

`k1` is exact in expectation for the first update of a file: its advantage is fixed when the
rollout is scored, as in its source, while pi moves on.

Where the prefixes come from (`prefix`) decides what an expectation is over: "data" any text,
whoever wrote it; "teacher" a teacher's samples; "old" samples of an earlier state of this
policy; "self" samples of these very weights; "mixed" those or given texts (GKD).
opd/batches.py reads it off the weight hashes in the files: "self" and "mixed" refuse rollouts
of any other weights, "teacher" and "old" those of the very weights that are trained, "teacher"
also answers that another model wrote than scores them.

Sources: papers of the rows are named there; the one formula, the g(u) forms and the table of
estimators follow from the chain rule and are checked by enumeration in tests/test_loss.py.
Taxonomy: arXiv 2604.07941, which gives no gradient.
"""

import dataclasses
import math
from dataclasses import dataclass

import torch

from opd.records import BadInput


@dataclass(frozen=True)
class Method:
    """One row.  `--set name=value` on train.py's command line changes a column for one run."""

    # whose prefixes: "data", "teacher", "old", "self" or "mixed" (see above)
    prefix: str
    # what must be on disk: "tokens", "reward" (--rewards), "teacher" (--scores, --teacher),
    # "reward+teacher"
    signal: str
    # c_t: "token", "reward", "k1", "reward+k1", "k2", "k3", "full", "unit", "sorted" or "score"
    coefficient: str
    # what the teacher's signal descends: "rkl", "fkl", "jsd" or "mix"
    divergence: str = "none"
    interpolation: float = 0.5  # b of jsd and mix: towards 0 forward, towards 1 reverse KL
    # weight of a sequence: "one", "informative", "frontier", "accepted", "softmax",
    # "preference" (sequence_weights), "bradley-terry" or "cross-entropy"
    omega: str = "one"
    # its constant: the reward that is accepted, the softmax's temperature, DPO's beta
    omega_scale: float = 1.0
    # importance ratio: each token's, "sequence": the geometric mean over it (GSPO), or "none":
    # always 1 (k2)
    ratio: str = "token"
    # "token": mean over the step's tokens; "sequence": of the sequences' means; "batch": of
    # their sums; "sum"
    norm: str = "token"
    # group advantage: "mean" subtracts the group's mean, "std" also divides by its std
    advantage: str = "none"
    teacher_weight: float = 1.0  # of the teacher's term in reward+k1
    # discount of the later tokens' log p_T - log mu in a token's advantage; 0: each token for
    # itself
    gamma: float = 0.0
    # the later tokens' discounted "sum", or "mean": divided by their number (MiniLLM)
    future: str = "sum"
    # "kl": subtracts E[k1-advantage] = -KL(pi || p_T) at s_t; same mean, less variance
    baseline: str = "none"
    advantage_clip: float = 0.0  # bounds the teacher's advantage to +-this; 0 is off
    # no gain from a ratio below 1 - clip_low (bad tokens); 0 turns this side off
    clip_low: float = 0.0
    # no gain from a ratio above 1 + clip_high (good tokens); 0 turns this side off
    clip_high: float = 0.0
    # bound of -ratio * A for A < 0 as a multiple of |A| (> 1); 0 is off
    dual_clip: float = 0.0
    # truncated importance sampling: weight min(pi_old / mu, cap), with k2 min(pi / mu, cap); 0
    # is off
    tis_cap: float = 0.0
    # coefficient of KL(pi || pi_ref), needs --reference (scores by the reference policy)
    reference_kl: float = 0.0
    # "sample": from the sampled tokens (k2); "full": from the distributions that --reference
    # holds
    reference_support: str = "sample"
    # coefficient of -log pi of given answers to the same prompts (--data), with a token mean of
    # its own
    gold_weight: float = 0.0
    # "file": --token-weights multiplies c_t (methods.prefix), "teacher": the teacher's term in
    # it;
    # the normaliser still counts tokens, not weights
    token_weight: str = "one"
    # "sft": the teacher must be the one whose answers this model was fine-tuned on
    consistency: str = "any"
    # score of a unit of several tokens: their log-probs' "mean" (SimCT eq. 7), "sum", the
    # "logit" mean (its code); "none" leaves it out
    span: str = "mean"
    # in a unit of several tokens, shared tokens that only begin its text: "keep" them as rivals
    # or "drop" them
    prefixes: str = "keep"
    # what a discriminator sees of an answer: its "text" or, for a control, its "length"
    view: str = "text"
    # coefficient of the policy's entropy, added to the objective
    entropy_bonus: float = 0.0
    # share of optimiser steps on rollouts, the others on --data (GKD's lambda)
    student_fraction: float = 1.0
    about: str = ""  # what it is, for `train.py --explain`

    @property
    def on_policy(self):
        """Whether the rollouts must be samples of the very weights that are trained."""
        return self.prefix in ("self", "mixed")

    @property
    def rewards(self):
        return "reward" in self.signal

    @property
    def teacher(self):
        return "teacher" in self.signal

    @property
    def support(self):
        """Whether the teacher's distribution is read, not only its log-prob of the sampled
        token."""
        return self.coefficient in ("full", "unit") or self.baseline == "kl"

    @property
    def reference(self):
        return self.reference_kl > 0 or self.omega == "preference"

    @property
    def given(self):
        """Whether answers from elsewhere (--data) are trained on, too."""
        return self.prefix == "mixed" or self.gold_weight > 0 or self.scalar

    @property
    def scalar(self):
        """Whether the model that is trained gives a text one number and no next token a
        probability."""
        return self.coefficient == "score"

    @property
    def separable(self):
        """Whether a token's loss needs no other token's log-prob, so that
        kernel.linear_token_loss may walk slices of tokens."""
        return self.ratio != "sequence" and self.gamma == 0 and self.coefficient != "unit"

    def columns(self):
        return {k: v for k, v in dataclasses.asdict(self).items() if k != "about"}


PPO = dict(prefix="self", signal="reward", coefficient="reward", clip_low=0.2, clip_high=0.2)
TEACHER_FULL = dict(signal="teacher", coefficient="full")

METHODS = {
    # ---- off-policy: somebody else's prefixes
    "sft": Method(
        "data",
        "tokens",
        "token",
        about="maximise the likelihood of given answers: a corpus, or demonstrations",
    ),
    "seqkd": Method(
        "teacher",
        "tokens",
        "token",
        about="the same on a teacher's sampled answers: forward KL by Monte Carlo (arXiv "
        "1606.07947)",
    ),
    "kd": Method(
        "data",
        divergence="fkl",
        **TEACHER_FULL,
        about="supervised KD: the teacher's distribution at every token of given texts (GKD "
        "with lambda 0)",
    ),
    "fkl": Method(
        "teacher",
        divergence="fkl",
        **TEACHER_FULL,
        about="forward-KL warm-up on the teacher's own cached answers (arXiv 2605.12483 "
        "stage 2a)",
    ),
    "teacher-rkl": Method(
        "teacher",
        divergence="rkl",
        **TEACHER_FULL,
        about="reverse KL at the teacher's prefixes: the fourth corner of prefix x direction",
    ),
    "rft": Method(
        "old",
        "reward",
        "token",
        omega="accepted",
        about="rejection sampling: imitate those own earlier answers that a verifier accepts "
        "(RAFT, STaR)",
    ),
    "rwsft": Method(
        "old",
        "reward",
        "token",
        omega="softmax",
        about="imitate own earlier answers, weighted by the softmax of their rewards",
    ),
    # the best and the worst answer to a prompt are a pair; online DPO is --set prefix=self
    "dpo": Method(
        "data",
        "reward",
        "token",
        omega="preference",
        omega_scale=0.1,
        norm="batch",
        about="direct preference optimisation on the best and the worst answer to a prompt "
        "(arXiv 2305.18290)",
    ),
    # ---- on-policy, from a reward
    "reinforce": Method(
        "self",
        "reward",
        "reward",
        advantage="mean",
        about="plain policy gradient with the group's mean as the baseline",
    ),
    "ppo-clip": Method(
        advantage="std",
        **PPO,
        about="PPO's clipped surrogate, mean over tokens, group advantage in the critic's "
        "place (arXiv 1707.06347)",
    ),
    "grpo": Method(
        norm="sequence",
        advantage="std",
        **PPO,
        about="GRPO: group advantage by mean and std, mean over sequences (arXiv "
        "2402.03300); no KL unless --set reference_kl=...",
    ),
    "dapo": Method(
        **PPO | dict(clip_high=0.28),
        advantage="std",
        omega="informative",
        about="GRPO with a mean over all tokens, clip-higher, and no groups that have one "
        "reward (arXiv 2503.14476)",
    ),
    "gspo": Method(
        **PPO | dict(clip_low=3e-4, clip_high=4e-4),
        ratio="sequence",
        norm="sequence",
        advantage="std",
        about="GRPO with one ratio a sequence and the narrow clip range that goes with it "
        "(arXiv 2507.18071)",
    ),
    # ROPD as its released code runs it: no std, token mean, clip-higher, dual clip (arXiv
    # 1912.09729), truncated importance weights, no KL
    "ropd": Method(
        **PPO | dict(clip_high=0.28),
        advantage="mean",
        dual_clip=3.0,
        tis_cap=2.0,
        about="rubric rewards, the loss of ROPD's released code (arXiv 2605.07396)",
    ),
    # ROPD's loss as its paper writes it (eq. 6-8), which names neither the clip range nor the
    # KL coefficient.  Its schedule
    # (cosine, 100 warm-up steps, weight decay 0.1, beta2 0.95) are flags of train.py
    "ropd-paper": Method(
        norm="sequence",
        advantage="std",
        reference_kl=0.001,
        **PPO,
        about="rubric rewards, the loss of ROPD's equations 6-8",
    ),
    # GAD's reward model and its policy's row: the released scripts' token mean and clip;
    # gradient clip 0.2 is a flag of train.py
    "discriminator": Method(
        "data",
        "tokens",
        "score",
        omega="bradley-terry",
        norm="sum",
        about="a scalar head learns to score given answers (--data) above own ones to the "
        "same prompts (arXiv 2511.10643 eq. 3)",
    ),
    "gad": Method(
        advantage="std",
        reference_kl=0.001,
        **PPO,
        about="a co-trained discriminator's score as the reward: distillation from a teacher "
        "that shows only texts (arXiv 2511.10643)",
    ),
    # ---- on-policy, from a teacher
    "opd": Method(
        "self",
        "teacher",
        "k1",
        "rkl",
        about="on-policy distillation from one teacher number a token (Thinking Machines "
        "2025; it sums over tokens, we average)",
    ),
    "opd-full": Method(
        "self",
        divergence="rkl",
        **TEACHER_FULL,
        about="on-policy distillation, exact reverse KL at every own prefix (GKD with lambda "
        "1, beta 1)",
    ),
    "dagger": Method(
        "self",
        divergence="fkl",
        **TEACHER_FULL,
        about="forward KL at the student's own prefixes (GKD with lambda 1, beta 0)",
    ),
    "gkd": Method(
        "mixed",
        divergence="jsd",
        student_fraction=0.5,
        **TEACHER_FULL,
        about="generalised KD: Jensen-Shannon divergence on own and given texts (arXiv "
        "2306.13649; its mean is over sequences, ours over tokens)",
    ),
    "minillm": Method(
        "self",
        divergence="rkl",
        gamma=1.0,
        future="mean",
        clip_low=0.2,
        clip_high=0.2,
        **TEACHER_FULL,
        about="exact single-step reverse KL plus what a token does to the later ones, "
        "length-normalised (arXiv 2306.08543, without its teacher-mixed sampling "
        "and its language-modelling term)",
    ),
    # The clip range, one update a file and the coefficients are what secondary sources say of a
    # paper that leaves them out
    "stable-opd": Method(
        "self",
        "teacher",
        "k1",
        "rkl",
        clip_low=0.2,
        clip_high=0.2,
        reference_kl=0.01,
        gold_weight=0.1,
        about="on-policy distillation with golden answers beside it and a leash to the "
        "start, against length inflation and loops (arXiv 2604.08527)",
    ),
    "release": Method(
        "self",
        "teacher",
        "k1",
        "rkl",
        token_weight="file",
        about="on-policy distillation up to where the teacher's margin collapses: "
        "methods.prefix "
        "cut (arXiv 2605.13643)",
    ),
    "lightning": Method(
        "self",
        "teacher",
        "k2",
        "rkl",
        ratio="none",
        norm="sequence",
        advantage_clip=10.0,
        consistency="sft",
        about="offline on-policy distillation: answers and teacher numbers computed once, by "
        "the teacher of the fine-tuning (arXiv 2604.13010)",
    ),
    # ---- on-policy, from a teacher of another vocabulary; `opd` on the same scores is DPCA
    # (arXiv 2606.09456)
    "simct": Method(
        "self",
        "teacher",
        "unit",
        "rkl",
        about="reverse KL over shared tokens and the text unit that was written (arXiv "
        "2605.07711); --set span=logit is its released code's score",
    ),
    "simple-opd": Method(
        "self",
        "teacher",
        "unit",
        "rkl",
        span="none",
        about="reverse KL over shared tokens where both tokenizers spell alike, nothing "
        "elsewhere (its baseline; arXiv 2610.08448 on 16 candidates)",
    ),
    "uld": Method(
        "self",
        "teacher",
        "sorted",
        about="L1 distance of sorted probabilities, place by place, blind to which tokens "
        "they belong to (arXiv 2402.12030, without its cross-entropy)",
    ),
    # ---- both
    "opd-verifier": Method(
        **PPO | dict(signal="reward+teacher", coefficient="reward+k1"),
        divergence="rkl",
        advantage="std",
        about="a verifier's group advantage plus the teacher's advantage of every token",
    ),
    "sod": Method(
        **PPO | dict(signal="reward+teacher", coefficient="reward+k1", clip_high=0.28),
        divergence="rkl",
        advantage="std",
        dual_clip=3.0,
        token_weight="teacher",
        about="step-wise distillation of agents: GRPO plus the teacher's advantage, faded "
        "where a step has drifted (arXiv 2605.07725); weights: methods.sod weigh",
    ),
    "opd-grpo": Method(
        **PPO | dict(signal="reward+teacher", coefficient="reward+k1", clip_high=0.28),
        divergence="rkl",
        advantage="std",
        dual_clip=3.0,
        about="the same with every step's weight 1: GRPO plus on-policy distillation, SOD's "
        "baseline",
    ),
    "paced": Method(
        "self",
        "reward+teacher",
        "full",
        "rkl",
        omega="frontier",
        about="exact on-policy distillation, prompts weighted by p (1 - p), p the student's "
        "pass rate (arXiv 2603.11178)",
    ),
    "rwopd": Method(
        "self",
        "reward+teacher",
        "full",
        "rkl",
        omega="softmax",
        about="exact on-policy distillation, answers weighted by the softmax of their rewards",
    ),
}
CHOICES = {
    "prefix": ("data", "teacher", "old", "self", "mixed"),
    "signal": ("tokens", "reward", "teacher", "reward+teacher"),
    "coefficient": (
        "token",
        "reward",
        "k1",
        "reward+k1",
        "k2",
        "k3",
        "full",
        "unit",
        "sorted",
        "score",
    ),
    "divergence": ("none", "rkl", "fkl", "jsd", "mix"),
    "omega": (
        "one",
        "informative",
        "frontier",
        "accepted",
        "softmax",
        "preference",
        "bradley-terry",
        "cross-entropy",
    ),
    "view": ("text", "length"),
    "span": ("mean", "sum", "logit", "none"),
    "prefixes": ("keep", "drop"),
    "ratio": ("token", "sequence", "none"),
    "reference_support": ("sample", "full"),
    "token_weight": ("one", "file", "teacher"),
    "consistency": ("any", "sft"),
    "norm": ("token", "sequence", "batch", "sum"),
    "advantage": ("none", "mean", "std"),
    "future": ("sum", "mean"),
    "baseline": ("none", "kl"),
}
DESCENDS = {
    "k1": ("rkl",),
    "reward+k1": ("rkl",),
    "k2": ("rkl",),
    "k3": ("fkl",),
    "full": ("rkl", "fkl", "jsd", "mix"),
    "unit": ("rkl",),
    "sorted": ("none",),
}
REFUSED = {
    "k1-loss": "k1 differentiated as a loss has gradient 0 in expectation: use k1 (as an "
    "advantage), k2 (as a loss) or full",
    "k2-advantage": "k2 as an advantage is the gradient of no divergence here: use k1 (as an "
    "advantage) or k2 (as a loss)",
    "k3-advantage": "k3 as an advantage is reverse minus forward KL and vanishes near pi = "
    "p_T: use k1 or full",
}
# coefficients with an importance ratio that can be clipped
SURROGATE = ("reward", "k1", "reward+k1")


def settings(name, overrides=()):
    """The row `name` with `column=value` overrides applied, checked."""
    if name not in METHODS:
        raise BadInput(f"--method {name}: expected one of {', '.join(METHODS)}")
    changes = {}
    types = {f.name: f.type for f in dataclasses.fields(Method) if f.name != "about"}
    for text in overrides:
        column, equals, value = text.partition("=")
        if not equals or column not in types:
            raise BadInput(
                f"--set {text}: expected COLUMN=VALUE with a column of {', '.join(types)}"
            )
        try:
            changes[column] = types[column](value)
        except ValueError:
            raise BadInput(
                f"--set {text}: expected a {types[column].__name__}, got {value!r}"
            ) from None
    method = dataclasses.replace(METHODS[name], **changes)
    check(method)
    return method


def check(method):  # noqa: C901
    """Raises BadInput for a row that does not do what its columns say."""
    c = method.coefficient
    for column, choices in CHOICES.items():
        value = getattr(method, column)
        if value in REFUSED:
            raise BadInput(f"{column} {value}: {REFUSED[value]}")
        if value not in choices:
            raise BadInput(f"{column}: expected one of {', '.join(choices)}, got {value!r}")
    allowed = DESCENDS.get(c, ("none",))
    if method.divergence not in allowed:
        hint = (
            ": k3 differentiated on own samples is the forward KL under another name"
            if c == "k3"
            else ""
        )
        raise BadInput(
            f"divergence {method.divergence}: coefficient {c} descends "
            f"{' or '.join(allowed)}{hint}"
        )
    pairs = method.omega in ("bradley-terry", "cross-entropy")
    if (
        method.scalar != pairs
        or method.scalar
        and (method.norm, method.prefix) != ("sum", "data")
    ):
        raise BadInput(
            f"coefficient score: goes with omega bradley-terry or cross-entropy, which is a "
            f"mean over pairs (norm sum), and prefix data, got coefficient {c}, "
            f"omega {method.omega}, "
            f"norm {method.norm}, prefix {method.prefix}"
        )
    if (method.span != "mean" or method.prefixes != "keep") and c != "unit":
        raise BadInput(
            f"span, prefixes: how units of several tokens are scored: go with coefficient "
            f"unit, got {method.span}, {method.prefixes} with {c}"
        )
    if method.view != "text" and not method.scalar:
        raise BadInput(
            f"view {method.view}: what a discriminator sees: goes with coefficient score, "
            f"got {c}"
        )
    if method.token_weight == "teacher" and c != "reward+k1":
        raise BadInput(
            f"token_weight teacher: weighs the teacher's term against the reward's: goes "
            f"with coefficient reward+k1, got {c}: where there is no reward, it "
            f"is file"
        )
    if method.scalar and (method.entropy_bonus or method.token_weight != "one"):
        raise BadInput(
            "entropy_bonus, token_weight: a discriminator has no tokens of its own, expected "
            "0 and one"
        )
    needs = {
        "reward": c in ("reward", "reward+k1") or method.omega != "one" and not pairs,
        "teacher": c in DESCENDS,
    }
    needs = "+".join(name for name, needed in needs.items() if needed) or "tokens"
    if method.signal != needs:
        raise BadInput(
            f"signal: expected {needs!r} for coefficient {c} with omega {method.omega}, got "
            f"{method.signal!r}"
        )
    if c not in ("token", "full", "score") and method.prefix != "self":
        raise BadInput(
            f"coefficient {c}: an expectation over the policy's own samples; on other "
            f"prefixes ({method.prefix!r}) "
            "it has another gradient than its name says"
        )
    if c == "token" and method.on_policy and method.omega == "one":
        raise BadInput(
            "coefficient token on own samples: its expected gradient is 0, a policy is not "
            "changed by imitating itself; "
            "give it an omega, or use coefficient reward"
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
            f"advantage {method.advantage!r}: group advantages go with coefficient 'reward' "
            f"or 'reward+k1', which need one"
        )
    uses = {
        "clip_low": SURROGATE,
        "clip_high": SURROGATE,
        "dual_clip": SURROGATE,
        "tis_cap": ("reward", "reward+k1", "k2", "k3"),
        "gamma": ("k1", "reward+k1", "full"),
        "advantage_clip": ("k1", "reward+k1", "k2"),
    }
    for column in (
        *uses,
        "reference_kl",
        "gold_weight",
        "entropy_bonus",
        "omega_scale",
        "teacher_weight",
        "interpolation",
        "student_fraction",
    ):
        value = getattr(method, column)
        if not math.isfinite(value) or (value < 0 and column != "entropy_bonus"):
            raise BadInput(f"{column}: expected a finite number, at least 0, got {value}")
        clips_the_future = (
            column in ("clip_low", "clip_high", "dual_clip", "advantage_clip")
            and c == "full"
            and method.gamma > 0
        )
        if value and c not in uses.get(column, CHOICES["coefficient"]) and not clips_the_future:
            raise BadInput(
                f"{column}: goes with coefficient {' or '.join(uses[column])}, got {value} "
                f"with {c}"
            )
    if method.ratio == "none" and (c != "k2" or method.tis_cap):
        raise BadInput(
            f"ratio none: no importance weights: goes with coefficient k2 and no tis_cap, "
            f"got {c} with tis_cap {method.tis_cap:g}"
        )
    if method.ratio == "sequence" and c not in SURROGATE:
        raise BadInput(
            f"ratio {method.ratio}: goes with coefficient reward, k1 or reward+k1, which "
            f"have an importance ratio, got {c}"
        )
    if method.gamma > 1 or (method.gamma and method.prefix != "self"):
        raise BadInput(
            f"gamma: expected 0 to 1, with the policy's own samples, got {method.gamma} "
            f"with prefix {method.prefix!r}"
        )
    if method.future != "sum" and not method.gamma:
        raise BadInput("future: says how later tokens count: set gamma above 0")
    if method.baseline != "none" and c not in ("k1", "reward+k1"):
        raise BadInput(
            f"baseline {method.baseline}: goes with coefficient k1 or reward+k1, whose "
            f"variance it lowers, got {c}"
        )
    if method.divergence in ("jsd", "mix") and not 0 < method.interpolation < 1:
        raise BadInput(
            f"interpolation: expected between 0 and 1, got {method.interpolation}: at the "
            f"ends use divergence fkl (0) or rkl (1); JSD itself vanishes there"
        )
    if method.omega in ("softmax", "preference") and not method.omega_scale:
        raise BadInput(f"omega_scale: expected above 0 for omega {method.omega}, got 0")
    if method.interpolation != 0.5 and method.divergence not in ("jsd", "mix"):
        raise BadInput(
            f"interpolation: goes with divergence jsd or mix, got {method.interpolation} "
            f"with {method.divergence}"
        )
    if method.omega_scale != 1 and (
        pairs or method.omega in ("one", "informative", "frontier")
    ):
        raise BadInput(
            f"omega_scale: goes with omega accepted, softmax or preference, got "
            f"{method.omega_scale} with {method.omega}"
        )
    if method.teacher_weight != 1 and c != "reward+k1":
        raise BadInput(
            f"teacher_weight: weighs the teacher's term against the reward's: goes with "
            f"coefficient reward+k1, got {c}"
        )
    if (method.student_fraction < 1) != (
        method.prefix == "mixed"
    ) or method.student_fraction > 1:
        raise BadInput(
            f"student_fraction: expected below 1 with prefix mixed and 1 otherwise, got "
            f"{method.student_fraction} with prefix {method.prefix!r}"
        )
    if method.prefix == "mixed" and (method.signal != "teacher" or c != "full"):
        raise BadInput(
            f"prefix mixed: the steps on --data need a teacher's distribution: goes with "
            f"coefficient full and omega one, got {c} with omega {method.omega}"
        )
    if method.clip_low >= 1:
        raise BadInput(
            f"clip_low: expected below 1, a ratio is never below 0, got {method.clip_low}"
        )
    if 0 < method.dual_clip <= 1:
        raise BadInput(
            f"dual_clip: expected 0 (off) or a bound above 1, got {method.dual_clip}"
        )
    if method.reference_kl and method.prefix != "self":
        raise BadInput("reference_kl: an expectation over the policy's own samples")
    if method.reference_support != "sample" and not method.reference_kl:
        raise BadInput(
            "reference_support: says how the leash is computed: set reference_kl above 0"
        )
    if method.reference_kl and method.reference_support == "sample" and method.ratio == "none":
        raise BadInput(
            "reference_kl: from stale samples it needs an importance weight, or "
            "reference_support full, got ratio none"
        )
    if method.gold_weight and method.prefix != "self":
        raise BadInput(
            f"gold_weight: given answers beside the policy's own: goes with prefix self, "
            f"got {method.prefix!r}"
        )
    if method.consistency == "sft" and not method.teacher:
        raise BadInput(
            f"consistency sft: compares the teacher with that of the fine-tuning: goes with "
            f"a teacher's signal, got {method.signal!r}"
        )


# ---- a group: advantages and weights


def group_advantages(rewards, kind, eps=1e-6):
    """Advantages of one prompt's n rollouts (ROPD eq. 6), or None when a judgement in the group
    failed.

    A failed judgement is unknown, not zero: it would shift everyone's baseline, so its whole
    group leaves the step.

    group_advantages([1.0, 0.5, 0.0], "mean") -> [0.5, 0.0, -0.5]
    group_advantages([1.0, 0.5, 0.0], "std")  -> [1.2247, 0.0, -1.2247]   (population standard
    deviation)"""
    if any(r is None for r in rewards):
        return None
    mean = sum(rewards) / len(rewards)
    centred = [r - mean for r in rewards]
    if kind in ("none", "mean"):
        return centred
    deviation = math.sqrt(sum(c * c for c in centred) / len(centred))
    return [c / (deviation + eps) for c in centred]


def sequence_weights(method, rewards):
    """omega of one prompt's n answers from their rewards; an answer of weight 0 leaves the step
    and its normaliser.

    one            1                                            sequence_weights([1, .5, 0]) ->
                   [1, 1, 1]
    informative    0 if the whole group has one reward, else 1  (DAPO)
    frontier       p (1 - p), p the group's mean reward: prompts that are neither mastered nor
                   out of reach (PACED)   -> [.25, .25, .25]
    accepted       1 if the reward reaches omega_scale, else 0  (RFT)               -> [1, 0, 0]
    softmax        n times the softmax of reward / omega_scale  (mean 1)            -> [1.520,
                   0.922, 0.559]
    preference     +1 the best, -1 the worst, 0 the others and ties; preference_weights scales
                   them (DPO)   -> [1, 0, -1]"""
    if method.omega == "accepted":
        return [float(r >= method.omega_scale) for r in rewards]
    if method.omega == "softmax":
        return (
            len(rewards)
            * torch.softmax(torch.tensor(rewards, dtype=torch.float64) / method.omega_scale, 0)
        ).tolist()
    if method.omega == "frontier":
        p = sum(rewards) / len(rewards)
        return [p * (1 - p)] * len(rewards)
    if method.omega == "informative":
        return [float(max(rewards) > min(rewards))] * len(rewards)
    if method.omega == "preference":
        out = [0.0] * len(rewards)
        if max(rewards) > min(rewards):
            out[rewards.index(max(rewards))], out[rewards.index(min(rewards))] = 1.0, -1.0
        return out
    return [1.0] * len(rewards)


def preference_weights(scale, signs, log_ratios):
    """omega of DPO for one pair: signs (+1, -1), log_ratios = log pi(y) - log pi_ref(y) of the
    two whole answers, as they are now.

    The gradient of -log sigmoid(h), h = scale (log_ratio_chosen - log_ratio_rejected), is
    -scale sigmoid(-h) times the difference of the two grad log pi(y): a weighted imitation of
    one and avoidance of the other (arXiv 2305.18290 section 4).  The factor 2: the mean over
    pairs is twice the mean over their answers.   preference_weights(0.1, [1, -1], [0.0, 0.0])
                                                  -> [0.1, -0.1]"""
    h = scale * sum(s * r for s, r in zip(signs, log_ratios))
    return [2 * scale * s / (1 + math.exp(min(h, 700.0))) for s in signs]


def token_weights(lengths, norm, omegas=None):
    """omega m_t / N_t for every trained token of one optimiser step: a list of [length] lists.
    Without omegas they sum to 1 for "token" and "sequence"; a sequence with omega 0 or no token
    does not count in N.

    token_weights([1, 3], "token")    -> [[1/4], [1/4, 1/4, 1/4]]
    token_weights([1, 3], "sequence") -> [[1/2], [1/6, 1/6, 1/6]]
    token_weights([1, 3], "batch")    -> [[1/2], [1/2, 1/2, 1/2]]
    token_weights([1, 3], "sum")      -> [[1], [1, 1, 1]]"""
    omegas = [1.0] * len(lengths) if omegas is None else omegas
    kept = [n for n, omega in zip(lengths, omegas) if n and omega]
    divisor = {
        "token": lambda n: sum(kept),
        "sequence": lambda n: len(kept) * n,
        "batch": lambda n: len(kept),
        "sum": lambda n: 1,
    }[norm]
    return [
        [omega / divisor(n)] * n if n and omega else [0.0] * n
        for n, omega in zip(lengths, omegas)
    ]


# ---- per-token losses


def log_ratio(method, logp, old_logp, batch):
    """log of the importance ratio of every token, [N]; with ratio "sequence" the mean over the
    tokens of its sequence (GSPO arXiv 2507.18071 eq. 7).  batch["sequence"] [N]: which sequence
    of the micro-batch a token belongs to."""
    each = logp - old_logp
    if method.ratio == "token":
        return each
    sequence = batch["sequence"]
    sums = each.new_zeros(int(sequence.max()) + 1).index_add(0, sequence, each)
    return (sums / sequence.bincount())[sequence]


def clipped_surrogate(log_ratios, advantage, method):
    """-objective of PPO's clipped policy gradient, [N] (ROPD eq. 8; the released code's range
    is asymmetric and it adds the dual clip).  Where the ratio is 1 its gradient is -A grad log
    pi.

    log_ratios (from log_ratio, differentiable), advantage: both [N]."""
    ratio = log_ratios.exp()
    objective = ratio * advantage
    low = 1 - method.clip_low if method.clip_low else 0.0
    high = 1 + method.clip_high if method.clip_high else math.inf
    objective = torch.minimum(objective, ratio.clamp(low, high) * advantage)
    if method.dual_clip:
        objective = torch.where(
            advantage < 0, torch.maximum(objective, method.dual_clip * advantage), objective
        )
    return -objective


def later_tokens(each, sequence, method):
    """sum_{k>=1} gamma^k each_{t+k} within a sequence, [N]; with future "mean" divided by the
    number of later tokens.

    each [1, 2, 3] of one sequence, gamma 1: [5, 3, 0]; gamma 0.5: [1.75, 1.5, 0]; gamma 1 and
    "mean": [2.5, 3, 0]."""
    out = torch.zeros_like(each)
    # positions in order
    for part in (torch.where(sequence == s)[0] for s in sequence.unique()):
        after, n = each.new_zeros(()), len(part)
        sums = []
        for t in part.flip(0):
            sums.append(after)
            after = method.gamma * (each[t] + after)
        counts = (
            torch.arange(n, device=each.device).clamp(min=1) if method.future == "mean" else 1
        )
        out[part] = (torch.stack(sums) / counts).flip(0)
    return out


def teacher_advantage(method, batch, kl=None):
    """The advantage that the teacher gives a sampled token, [N], before advantage_clip: log p_T
    - log mu of the token itself (not with coefficient full, which has that part exactly), plus
    the later tokens' (gamma), minus its expectation -kl (baseline)."""
    each = batch["teacher_logp"] - batch["behaviour_logp"]
    advantage = torch.zeros_like(each) if method.coefficient == "full" else each
    if method.gamma:
        advantage = advantage + later_tokens(each, batch["sequence"], method)
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
    return (
        batch["advantage"] + method.teacher_weight * advantage
        if method.coefficient == "reward+k1"
        else advantage
    )


def huber(r, bound):
    """r^2 / 2 within +-bound and linear beyond, [N] (bound 0: nowhere linear): its derivative
    is r clipped.  huber(3, 2) -> 4."""
    return (
        0.5 * r**2
        if not bound
        else torch.where(r.abs() <= bound, 0.5 * r**2, bound * (r.abs() - 0.5 * bound))
    )


def log_tail(logps):
    """log of the mass outside a support: logps [N, K] -> [N], the log of 1 - sum of exp."""
    return torch.log(-torch.expm1(logps.logsumexp(-1).clamp(max=-1e-7)))


def divergence(kind, logp, teacher_logp, whole=True, interpolation=0.5):
    """rkl, fkl, jsd or mix of pi and p_T a token from log-probs on a common support, both [N,
    K], differentiable in logp: [N], >= 0.

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
    if kind == "mix":
        return interpolation * kl(logp, teacher_logp) + (1 - interpolation) * kl(
            teacher_logp, logp
        )
    mixture = torch.logaddexp(
        teacher_logp + math.log(interpolation), logp + math.log(1 - interpolation)
    )
    return interpolation * kl(teacher_logp, mixture) + (1 - interpolation) * kl(logp, mixture)


def teacher_divergence(method, logp, batch, exact=None):
    """The row's divergence a token, [N], from a teacher in memory (exact) or over the support;
    arguments as for token_loss."""
    kind = method.divergence
    if exact is None or kind == "jsd":
        return divergence(
            kind,
            logp[:, 1 : 1 + batch["support_logp"].shape[1]],
            batch["support_logp"],
            batch["whole"],
            method.interpolation,
        )
    b = {"rkl": 1.0, "fkl": 0.0, "mix": method.interpolation}[kind]
    return exact[0] if b == 1 else exact[1] if b == 0 else b * exact[0] + (1 - b) * exact[1]


def unit_divergence(method, logp, batch):
    """SimCT's loss: the reverse KL over each unit's candidates (eq. 6-9), at the unit's first
    token, 0 at all others, [N].

    Candidates are the shared tokens of that place and, in a unit that is not one token on both
    sides, the unit's own text, scored by each model's mean log-prob of its spelling; both sides
    are normalised over the candidates.  The gradient reaches every token of the unit.

    logp [N, 1 + K]: column 0 the recorded token, then the candidates (of the unit's first
    token; elsewhere they are not looked at).  batch:
      unit           [N, 6]: 1 at a unit's first token | 1 inside of a unit | its tokens here |
                     the teacher's tokens | the teacher's score of its text
                     | what is added to the teacher's candidates (0, or with span "logit" the
                     log of the normaliser)
      support_logp   [N, K] the teacher's log-probs of the candidates, -inf for what is none
      prefix         [N, K] 1 where a candidate is a proper beginning of the unit's text
      raw            [N] the recorded token's logit (span "logit" only)"""
    first, inside, mine, theirs, score, shift = batch["unit"].T
    rows, member = first.nonzero()[:, 0], inside.nonzero()[:, 0]
    place = (first.cumsum(0) - 1).long()[member]
    each = batch["raw"] if method.span == "logit" else logp[:, 0]
    total = torch.zeros(len(rows), dtype=logp.dtype, device=logp.device).index_add(
        0, place, each[member]
    )
    several = (mine[rows] > 1) | (theirs[rows] > 1)
    support, teacher = (
        logp[rows, 1 : 1 + batch["support_logp"].shape[1]],
        batch["support_logp"][rows],
    )
    if method.span == "logit":
        support, teacher = (
            support + (batch["raw"] - logp[:, 0])[rows, None],
            teacher + shift[rows, None],
        )
    live = torch.isfinite(teacher)
    if method.prefixes == "drop":
        live = live & ~((batch["prefix"][rows] > 0) & several[:, None])
    span, span_teacher = (
        (total, score[rows])
        if method.span == "sum"
        else (total / mine[rows], score[rows] / theirs[rows])
    )
    live = torch.cat([live, several[:, None]], 1)
    q, p = (
        torch.log_softmax(
            torch.cat([a, b[:, None]], 1).masked_fill(~live, -torch.inf), -1
        ).masked_fill(~live, 0)
        for a, b in ((support, span), (teacher, span_teacher))
    )
    kl = (q.exp() * (q - p) * live).sum(-1)
    if method.span == "none":
        kl = kl.masked_fill(several, 0)
    return torch.zeros_like(logp[:, 0]).index_add(0, rows, kl.masked_fill(~live.any(-1), 0))


def token_loss(method, logp, entropy, batch, exact=None):  # noqa: C901
    """The loss of each trained token, [N], for any row of METHODS; sum(loss * batch["weight"])
    is the step's loss.

    logp [N, 1 + K + R]: column 0 the recorded token, then the teacher's support and the leash's
    (K and R are 0 without them). entropy [N].  exact: KL(pi || p_T) and KL(p_T || pi), each
    [N], over the whole vocabulary, from a teacher in memory, in place of a support. batch: what
    is known about the tokens, each [N] unless noted, all constant:
      old_logp        log pi before this file's first update (absent when this is the first
                      update: then it is logp)
      behaviour_logp  log mu, from the rollout
      advantage       the sequence's group advantage (coefficient "reward")
      teacher_logp    log p_T of the recorded token
      support_logp    [N, K] log p_T of the support; `whole` says whether that is the whole
                      vocabulary
      reference_logp  log pi_ref of the recorded token
      reference_support_logp  [N, R] log pi_ref of the leash's support, whose columns of logp
                              stand last; `reference_whole` as `whole`
      token_weight    what multiplies c_t
      sorted_logp     [N, K] the teacher's K largest log-probs at the same place, best first
                      (logp then holds the policy's); sorted_here  1 where it has one
      unit, prefix, raw  of a teacher with another vocabulary: unit_divergence
      sequence        int64, which sequence a token belongs to (ratio "sequence", gamma)"""
    own, kl = logp[:, 0], None
    old = batch.get("old_logp", own.detach())
    if method.coefficient == "unit":
        kl = unit_divergence(method, logp, batch)
    elif method.support:
        kl = teacher_divergence(method, logp, batch, exact)
    if method.coefficient in SURROGATE or method.gamma:
        advantage = sampled_advantage(method, batch, kl)
    if method.coefficient == "token":
        loss = -own
    elif method.coefficient == "sorted":
        loss = (
            logp[:, 1 : 1 + batch["sorted_logp"].shape[1]].exp() - batch["sorted_logp"].exp()
        ).abs().sum(-1) * batch["sorted_here"]
    elif method.coefficient in ("full", "unit"):
        loss = kl
        if method.gamma:
            loss = loss + clipped_surrogate(
                log_ratio(method, own, batch["behaviour_logp"], batch), advantage, method
            )
    # the ratio to mu corrects for stale weights and for the sampler's precision at once
    elif method.coefficient == "k1":
        loss = clipped_surrogate(
            log_ratio(method, own, batch["behaviour_logp"], batch), advantage, method
        )
    elif method.coefficient in ("k2", "k3"):
        r = batch["teacher_logp"] - own
        loss = (
            huber(r, method.advantage_clip)
            if method.coefficient == "k2"
            else torch.expm1(r) - r
        )
        if method.ratio == "token":
            loss = (own.detach() - batch["behaviour_logp"]).exp().clamp(
                max=method.tis_cap or math.inf
            ) * loss
    else:
        loss = clipped_surrogate(log_ratio(method, own, old, batch), advantage, method)
        if method.tis_cap:
            loss = loss * (old - batch["behaviour_logp"]).exp().clamp(max=method.tis_cap)
    if method.token_weight == "file":
        loss = loss * batch["token_weight"]
    if method.reference_kl and method.reference_support == "full":
        reference = batch["reference_support_logp"]
        loss = loss + method.reference_kl * divergence(
            "rkl", logp[:, -reference.shape[1] :], reference, batch["reference_whole"]
        )
    elif method.reference_kl:
        # k2 = (log pi - log pi_ref)^2 / 2, on own samples and weighed by the ratio: its
        # gradient is that of KL(pi || pi_ref)
        loss = (
            loss
            + method.reference_kl
            * (own.detach() - old).exp()
            * 0.5
            * (own - batch["reference_logp"]) ** 2
        )
    if method.entropy_bonus:
        loss = loss - method.entropy_bonus * entropy
    return loss
