"""`python train.py --explain NAME`: a row of loss.METHODS in words, with its formula, its
files, and one worked token."""

import math

import torch

from methods.gad import pair_weights
from opd import loss as losses


def files(method):
    """{flag of train.py: what it holds} that a row reads beside --model and --rollouts."""
    needs = {}
    if method.rewards:
        needs["--rewards"] = "rubric.py grade: one reward an answer"
    if method.teacher:
        needs[
            "--scores" if method.coefficient in ("unit", "sorted") else "--scores or --teacher"
        ] = (
            "methods.simct score: a teacher of another vocabulary"
            if method.coefficient == "unit"
            else "methods.simct score --sorted: its largest log-probs"
            if method.coefficient == "sorted"
            else "teacher.py score: the teacher's log-prob of every token"
            + (", with --top-k its likeliest tokens" if method.support else "")
        )
    if method.token_weight != "one":
        needs["--token-weights"] = (
            f"methods.prefix {'steps' if method.token_weight == 'teacher' else 'cut'}: a "
            f"number "
            f"for every token"
        )
    if method.scalar:
        needs["--data"] = "given answers to the same prompts, which are to score higher"
    if method.gold_weight:
        needs["--data"] = "given answers to the same prompts, beside the rollouts in every step"
    if method.prefix == "mixed":
        needs["--data (with --data-scores or --teacher)"] = (
            "given answers to the same prompts, for the steps that are not on rollouts"
        )
    if method.reference:
        needs["--reference"] = "teacher.py score by the reference policy" + (
            ", with --top-k" if method.reference_support == "full" else ""
        )
    return needs


def formula(method):
    """c_t(a) of the row in words of mathematics."""
    c, b = method.coefficient, method.interpolation

    def importance(old):
        return (
            f"pi/{old}" if method.ratio == "token" else f"(pi/{old} of the sequence)^(1/length)"
        )

    ratio = importance("pi_old")
    parts = {
        "rkl": "log u(a)",
        "fkl": "u(a)",
        "jsd": f"{1 - b:g} log({b:g} u(a) + {1 - b:g})",
        "mix": f"({b:g} log u(a) + {1 - b:g} u(a))",
    }
    k1 = "log p_T(y) - log mu(y)" + (" + KL(pi || p_T)" if method.baseline == "kl" else "")
    later = (
        f" + {'mean' if method.future == 'mean' else 'sum'} over later tokens of gamma^k "
        f"(log p_T - log mu), gamma = {method.gamma:g}"
        if method.gamma
        else ""
    )
    text = {
        "token": "1 [a = y]",
        "score": "grad D(y) of the whole text, in the place of sum_t sum_a c_t(a) grad log "
        "pi(a)" + (": of its length alone" if method.view == "length" else ""),
        "reward": f"{ratio} A [a = y]",
        "k1": f"{importance('mu')} ({k1}{later}) [a = y]",
        "reward+k1": f"{ratio} (A + {method.teacher_weight:g} "
        f"{'w ' if method.token_weight == 'teacher' else ''}({k1}{later})) [a = y]"
        + ", w the token's weight"
        * (method.token_weight == "teacher"),
        "k2": ("" if method.ratio == "none" else "pi/mu ") + "(log p_T(y) - log pi(y)) [a = y]",
        "k3": "pi/mu (p_T(y)/pi(y) - 1) [a = y]",
        "unit": "q(a) log(q_T(a) / q(a)) over the candidates a of the unit that y begins: "
        "shared tokens"
        + (
            ", where both spell y alike, 0 elsewhere"
            if method.span == "none"
            else f" and the unit's text, scored by the "
            f"{'sum' if method.span == 'sum' else 'mean'} of its "
            f"{'logits' if method.span == 'logit' else 'log-probs'}"
            + (
                "; candidates that only begin that text are dropped"
                if method.prefixes == "drop"
                else ""
            )
        ),
        "sorted": "-sign(pi(a) - p_T at the same rank) pi(a), ranks of the K largest "
        "probabilities of either side at the same place",
        "full": f"pi(a) {parts.get(method.divergence)}"
        + (f"{later.replace(' + ', ' + [a = y] pi/mu ', 1)}" if later else "")
        + ",  u = p_T / pi",
    }[c]
    extra = [
        f"ratio clipped to [{1 - method.clip_low if method.clip_low else 0:g}, "
        f"{1 + method.clip_high if method.clip_high else math.inf:g}]"
        if method.clip_low or method.clip_high
        else "",
        f"dual clip {method.dual_clip:g}" if method.dual_clip else "",
        ""
        if not method.tis_cap
        else f"pi/mu at most {method.tis_cap:g}"
        if c in ("k2", "k3")
        else f"times min(pi_old/mu, {method.tis_cap:g})",
        f"teacher's advantage within +-{method.advantage_clip:g}"
        if method.advantage_clip
        else "",
        "times the token's weight" if method.token_weight == "file" else "",
        f"plus {method.gold_weight:g} grad log pi of given answers, a mean over their tokens"
        if method.gold_weight
        else "",
        f"minus {method.reference_kl:g} grad KL(pi || pi_ref)" if method.reference_kl else "",
        f"plus {method.entropy_bonus:g} grad H(pi)" if method.entropy_bonus else "",
    ]
    return ";  ".join([text] + [e for e in extra if e])


def explain(name, overrides=()):
    """The row in words: what it is, its formula, what it reads, and the pull on every token of
    one worked example."""
    method = losses.settings(name, overrides)
    default = losses.Method("", "", "")
    shown = {
        k: v
        for k, v in method.columns().items()
        if k in ("prefix", "signal", "coefficient") or v != getattr(default, k)
    }
    omega = {
        "one": "1",
        "informative": "1, but 0 for a group with one reward",
        "frontier": "p (1 - p), p the group's mean reward",
        "accepted": f"1 if the reward reaches {method.omega_scale:g}, else 0",
        "softmax": f"n softmax(reward / {method.omega_scale:g})",
        "preference": f"+- 2 x {method.omega_scale:g} sigmoid(-h), best and worst answer",
        "bradley-terry": "of a pair's given answer sigmoid(D(own) - D(given)) / pairs, of "
        "its own answer minus that",
        "cross-entropy": "of a pair's given answer sigmoid(-D(given)) / pairs, of its own "
        "answer -sigmoid(D(own)) / pairs",
    }[method.omega]
    norm = {
        "token": "trained tokens of the step",
        "sequence": "length x sequences",
        "batch": "sequences",
        "sum": "1",
    }[method.norm]
    lines = [
        f"{name}: {method.about}",
        "",
        "row       " + ", ".join(f"{k}={v}" for k, v in shown.items()),
        f"c_t(a)    {formula(method)}",
        f"omega     {omega}",
        f"N_t       {norm}",
        "reads     "
        + "; ".join(
            [
                "--rollouts ("
                + {
                    "self": "samples of --model itself: checked by weight hash",
                    "mixed": "samples of --model itself: checked by weight hash",
                    "teacher": "answers of another model",
                    "old": "samples of an earlier state of it",
                    "data": "any answers",
                }[method.prefix]
                + ")",
                *(f"{flag} ({what})" for flag, what in files(method).items()),
            ]
        ),
        "",
    ]
    return "\n".join(lines + (worked_pair(method) if method.scalar else worked_token(method)))


def worked_pair(method):
    """A given answer that scores 0.2 beside own ones that score 0.5 and -0.1."""
    (up,), down, pairs = pair_weights(method.omega, [0.2], [0.5, -0.1])
    return [
        "one question: a given answer scores 0.2, two own ones 0.5 and -0.1",
        f"loss {sum(pairs) / 2:+.4f}; pull on the scores: given {up / 2:+.4f}, own "
        f"{down[0] / 2:+.4f} and {down[1] / 2:+.4f}",
    ]


def worked_token(method):
    """The pull on every logit of a token whose student, teacher and choice are given."""
    names, pi, p_t = (
        ("yes", "no", "maybe"),
        torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64),
        torch.tensor([0.2, 0.7, 0.1], dtype=torch.float64),
    )
    logits = pi.log().requires_grad_()
    logp, y = torch.log_softmax(logits, -1), 1
    own = logp[y].detach()[None]
    batch = {
        "behaviour_logp": own,
        "teacher_logp": p_t[y].log()[None],
        "advantage": torch.ones(1, dtype=torch.float64),
        "whole": True,
        "support_logp": p_t.log()[None],
        "reference_logp": own,
        "token_weight": torch.ones(1, dtype=torch.float64),
        "sequence": torch.zeros(1, dtype=torch.int64),
        "unit": torch.tensor([[1, 1, 1, 1, float(p_t[y].log()), 0]], dtype=torch.float64),
        "prefix": torch.zeros(1, 3),
        "sorted_logp": p_t.sort(descending=True).values.log()[None],
        # one token on either side
        "sorted_here": torch.ones(1, dtype=torch.float64),
        "raw": logp[y : y + 1],
    }
    candidates = logp.sort(descending=True).values if method.coefficient == "sorted" else logp
    loss = losses.token_loss(
        method,
        torch.cat([logp[y : y + 1], candidates])[None],
        -(logp.exp() * logp).sum()[None],
        batch,
    )[0]
    pull = -torch.autograd.grad(loss, logits)[0]
    given = (
        "; its answer has advantage 1"
        if method.advantage != "none"
        else "; omega = 1"
        if method.omega != "one"
        else ""
    )
    return [
        f"one token: the student says yes 0.5, no 0.3, maybe 0.2; the teacher 0.2, 0.7, 0.1; "
        f'the recorded token is "no"{given}',
        f"loss {loss.item():+.4f}; pull on the logits, sum_a c(a) grad log pi(a): "
        + ", ".join(f"{n} {x:+.4f}" for n, x in zip(names, pull.tolist())),
    ]
