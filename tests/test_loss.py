"""Every row has the gradient of its name, by enumerating a 5-token vocabulary in float64."""

import dataclasses
import itertools
import math
from pathlib import Path

import pytest
import torch

from methods import __main__ as methods_command
from methods.rows import METHODS
from opd import loss as losses
from opd.loss import Method
from opd.records import BadInput

V = 5
ALL = list(range(V))
TRL = {
    ("fkl", 0.0): [1.3868962065583772, 0.9741138362576061],
    ("jsd", 0.1): [0.11551553142053167, 0.07894429946249558],
    ("jsd", 0.5): [0.28572872853389053, 0.19682024738129106],
    ("jsd", 0.9): [0.10737287988774576, 0.07779482670833954],
    ("rkl", 1.0): [1.2439871592824985, 0.9286254935374586],
}
REWARD = torch.tensor([0.3, -1.0, 2.0, 0.0, 0.7], dtype=torch.float64)


def row(name, *overrides):
    return losses.settings(METHODS, name, overrides)


def distributions(seed=0):
    g = torch.Generator().manual_seed(seed)
    logits, teacher, old = torch.randn(3, V, generator=g, dtype=torch.float64)
    return logits.requires_grad_(), torch.log_softmax(teacher, -1), torch.log_softmax(old, -1)


def constants(a, teacher=None, mu=None, **more):
    """The batch of one token that was sampled as a."""
    batch = {name: x[a][None] for name, x in more.items() if x.ndim == 1}
    batch |= {name: x for name, x in more.items() if x.ndim == 2}
    if teacher is not None:
        whole = {"support_logp": teacher[None], "whole": True}
        batch |= {"teacher_logp": teacher[a][None]} | whole
    if mu is not None:
        batch["behaviour_logp"] = mu[a][None]
    return batch


def expected_gradient(method, logits, source, columns=(), reference=None, **known):
    """Gradient of the expected token loss when token a is sampled with probability source[a]
    (held constant)."""
    total, logp = 0.0, torch.log_softmax(logits, -1)
    for a in range(V):
        numbers = torch.cat([logp[a][None], logp[list(columns)]])[None]
        batch = constants(a, **known)
        if reference is not None:
            batch |= {"reference_support_logp": reference[None], "reference_whole": True}
        total = total + source[a] * losses.token_loss(method, numbers, batch)[0]
    return torch.autograd.grad(total, logits)[0]


def by_definition(kind, logp, teacher, b=0.5):
    """D(pi, p_T) as its paper writes it, no shortcut shared with opd/loss.py."""
    p, q = logp.exp(), teacher.exp()
    m = b * q + (1 - b) * p
    if kind == "rkl":
        return (p * (p / q).log()).sum()
    if kind == "fkl":
        return (q * (q / p).log()).sum()
    return b * (q * (q / m).log()).sum() + (1 - b) * (p * (p / m).log()).sum()


def gradient_of(logits, value):
    """Of value(log pi), by autograd."""
    return torch.autograd.grad(value(torch.log_softmax(logits, -1)), logits)[0]


def reverse_kl_gradient(logits, teacher):
    return gradient_of(logits, lambda logp: by_definition("rkl", logp, teacher))


def close(got, want, atol=1e-12):
    torch.testing.assert_close(got, want, atol=atol, rtol=0)


# ---- estimators


def teacher_row(coefficient, kind, **columns):
    advantage = "mean" if coefficient == "reward+k1" else "none"
    return Method("self", coefficient, divergence=kind, advantage=advantage, **columns)


LEGAL = {("k1", "rkl"), ("reward+k1", "rkl"), ("k2", "rkl")}
LEGAL |= {("full", kind) for kind in ("rkl", "fkl", "jsd")}
COEFFICIENTS = (
    "k1",
    "reward+k1",
    "k2",
    "full",
    "k3",
    "k1-loss",
    "k2-advantage",
    "k3-advantage",
)


@pytest.mark.parametrize(
    "coefficient, kind", list(itertools.product(COEFFICIENTS, ("rkl", "fkl", "jsd", "none")))
)
def test_every_pair_of_estimator_and_divergence_is_exact_or_refused(coefficient, kind):
    """Its expected gradient over the policy's own samples is that of the divergence, or check()
    refuses the pair with a reason."""
    method = teacher_row(coefficient, kind, interpolation=0.3)
    if (coefficient, kind) not in LEGAL:
        with pytest.raises(BadInput):
            losses.check(method)
        return
    losses.check(method)
    logits, teacher, _ = distributions(5)
    pi = torch.log_softmax(logits.detach(), -1)
    known = dict(teacher=teacher, mu=pi, advantage=torch.zeros(V).double())
    got = expected_gradient(method, logits, pi.exp(), ALL, **known)
    want = gradient_of(logits, lambda logp: by_definition(kind, logp, teacher, 0.3))
    close(got, want, 1e-10)


def test_k1_on_stale_samples_is_corrected_by_the_ratio_to_the_policy_that_sampled():
    """E_mu[pi/mu A grad log pi] = sum_a pi(a) A(a) grad log pi(a), with A = log p_T - log mu
    fixed when the rollout was scored; the log-probs of the weights training started from play
    no part.  k2, weighed by pi / mu as it is now, stays exact."""
    logits, teacher, mu = distributions()
    known = dict(teacher=teacher, mu=mu, old_logp=mu - 0.3)
    got = expected_gradient(row("opd"), logits, mu.exp(), **known)
    close(got, gradient_of(logits, lambda logp: -(logp.exp() * (teacher - mu)).sum()))
    got = expected_gradient(teacher_row("k2", "rkl"), logits, mu.exp(), **known)
    close(got, reverse_kl_gradient(logits, teacher), 1e-10)


@pytest.mark.parametrize("kind, b", [("rkl", 1.0), ("fkl", 0.0), ("jsd", 0.1), ("jsd", 0.9)])
def test_full_is_pi_times_g_of_the_ratio(kind, b):
    """The coefficients c(a) = pi(a) g(p_T(a) / pi(a)) of opd/loss.py's docstring, against
    autograd on the value; and the kernel's two numbers give what the support gives."""
    logits, teacher, _ = distributions(7)
    logp = torch.log_softmax(logits, -1)
    value = losses.divergence(kind, logp[None], teacher[None], True, b)[0]
    assert value.item() == pytest.approx(
        by_definition(kind, logp, teacher, b).item(), abs=1e-12
    )
    u = (teacher - logp).exp().detach()
    g = {"rkl": u.log(), "fkl": u, "jsd": (1 - b) * (b * u + 1 - b).log()}[kind]
    want = gradient_of(logits, lambda logp: -(logp.exp().detach() * g * logp).sum())
    close(torch.autograd.grad(value, logits, retain_graph=True)[0], want)
    if kind != "jsd":
        exact = [by_definition(kind, logp, teacher)[None] for kind in ("rkl", "fkl")]
        close(losses.token_loss(teacher_row("full", kind), logp[:1][None], {}, exact)[0], value)


def test_divergences_are_those_that_trl_computes():
    """Values of TRL 1.16, GKDTrainer.generalized_jsd_loss on these logits, sum over the
    vocabulary of one token each."""
    student = [[1.0, -0.5, 0.25, 2.0, 0.0], [0.3, 0.1, -2.0, 0.7, 1.5]]
    teacher = [[0.0, 1.0, -1.0, 0.5, 2.5], [1.0, -0.4, 0.6, 0.2, -0.9]]
    student, teacher = (
        torch.tensor(x, dtype=torch.float64).log_softmax(-1) for x in (student, teacher)
    )
    for (kind, b), want in TRL.items():
        got = losses.divergence(kind, student, teacher, True, b)
        close(got, torch.tensor(want, dtype=torch.float64), 1e-9)


def test_a_jensen_shannon_divergence_leans_as_its_interpolation_says():
    """JSD_b / b -> forward, JSD_b / (1 - b) -> reverse KL; the thing itself vanishes at both
    ends, which is why they are refused."""
    logits, teacher, _ = distributions(8)
    logp, teacher = torch.log_softmax(logits.detach(), -1)[None], teacher[None]
    for kind, b in (("fkl", 1e-6), ("rkl", 1 - 1e-6)):
        want = losses.divergence(kind, logp, teacher).item()
        got = losses.divergence("jsd", logp, teacher, True, b).item() / 1e-6
        assert got == pytest.approx(want, rel=1e-4)
    for b in (0.0, 1.0):
        with pytest.raises(BadInput, match="at the ends use divergence"):
            row("gkd", f"interpolation={b}")


def test_many_samples_of_k1_approach_analytic_reverse_kl_and_many_of_sft_soft_forward_kl():
    """Two pairs of rows that are one in expectation: 400,000 tokens agree within five standard
    errors, and a wrong row does not."""
    logits, teacher, _ = distributions(9)
    pi, n = torch.log_softmax(logits.detach(), -1), 400_000
    r = torch.Generator().manual_seed(0)
    uniform, one = torch.full((V,), 1 / V).double(), torch.eye(V).double()
    for name, exact, wrong, source in (
        ("opd", "opd-full", "dagger", pi),
        ("seqkd", "fkl", "opd-full", teacher),
    ):

        def expected(name, source, columns=()):
            known = dict(teacher=teacher, mu=pi)
            return expected_gradient(row(name), logits, source, columns, **known)

        draws = torch.multinomial(source.exp(), n, replacement=True, generator=r)
        got = expected(name, draws.bincount(minlength=V).double() / n)
        want = expected(exact, uniform, ALL)
        # variance of one token's gradient, exactly; the error of the mean of n of them
        each = [expected(name, one[a]) for a in ALL]
        error = (sum(source.exp()[a] * (each[a] - want) ** 2 for a in ALL) / n).sqrt()
        assert ((got - want).abs() <= 5 * error + 1e-12).all()
        assert ((got - expected(wrong, uniform, ALL)).abs() > 5 * error).any()


def test_the_baseline_keeps_the_mean_and_lowers_the_variance():
    logits, teacher, _ = distributions(10)
    pi = torch.log_softmax(logits.detach(), -1)
    spread = {}
    for name in ("none", "kl"):
        method = row("opd", f"baseline={name}")
        known = dict(teacher=teacher, mu=pi)
        one = torch.eye(V).double()
        each = [expected_gradient(method, logits, one[a], ALL, **known) for a in ALL]
        mean = sum(pi[a].exp() * g for a, g in enumerate(each))
        close(mean, reverse_kl_gradient(logits, teacher))
        spread[name] = sum(float(pi[a].exp() * ((each[a] - mean) ** 2).sum()) for a in ALL)
    assert spread["kl"] < 0.9 * spread["none"]


@pytest.mark.parametrize(
    "name, clip, pulls",
    [
        ("opd", 0.0, (29.0, 0.5)),
        ("opd", 5.0, (5.0, 0.5)),
        ("lightning", 0.0, (29.0, 0.5)),
        ("lightning", 10.0, (10.0, 0.5)),
    ],
)
def test_an_advantage_clip_bounds_the_pull_of_a_token_the_teacher_finds_absurd(
    name, clip, pulls
):
    own = torch.tensor([[-1.0], [-1.0]], requires_grad=True)
    teacher = torch.tensor([-30.0, -1.5])
    batch = {"teacher_logp": teacher, "behaviour_logp": own.detach()[:, 0]}
    value = losses.token_loss(row(name, f"advantage_clip={clip}"), own, batch)
    assert torch.autograd.grad(value.sum(), own)[0][:, 0].tolist() == pytest.approx(pulls)


def test_offline_distillation_by_enumeration():
    """Without importance weights: the reverse KL's gradient while pi is mu; after that sum_a
    mu(a) clip(log p_T - log pi) grad log pi, Huber's gradient."""
    logits, teacher, mu = distributions(2)
    pi = torch.log_softmax(logits.detach(), -1)
    assert ((teacher - pi).abs() > 0.4).any(), "the fixture should clip"
    for clip, bound in ((0, math.inf), (0.4, 0.4)):
        method = row("lightning", f"advantage_clip={clip}")
        got = expected_gradient(method, logits, mu.exp(), teacher=teacher, mu=mu)
        pull = mu.exp() * (teacher - pi).clamp(-bound, bound)
        close(got, gradient_of(logits, lambda logp: -(pull * logp).sum()))
    method = row("lightning", "advantage_clip=0")
    got = expected_gradient(method, logits, pi.exp(), teacher=teacher, mu=pi)
    close(got, reverse_kl_gradient(logits, teacher))


def test_offline_distillation_ends_at_the_teacher_from_any_start_with_full_support():
    """2604.13010's ideal case, one state: the sampler that never changes decides the speed, not
    where it ends."""
    for seed in range(2):
        logits, teacher, mu = distributions(seed)
        for _ in range(2500):
            known = dict(teacher=teacher, mu=mu)
            step = expected_gradient(row("lightning"), logits, mu.exp(), **known)
            logits = (logits.detach() - 1.5 * step).requires_grad_()
        assert (torch.softmax(logits.detach(), -1) - teacher.exp()).abs().max() < 1e-4


# ---- rewards, weights of sequences, the reference


def test_reward_is_the_policy_gradient_and_reward_plus_k1_the_sum_of_both():
    logits, teacher, _ = distributions(12)
    pi = torch.log_softmax(logits.detach(), -1)
    policy = gradient_of(logits, lambda logp: -(logp.exp() * REWARD).sum())
    for name in ("ropd", "grpo", "ropd-paper", "gad"):
        method = row(name, "reference_kl=0")
        close(expected_gradient(method, logits, pi.exp(), mu=pi, advantage=REWARD), policy)
    known = dict(teacher=teacher, mu=pi, advantage=REWARD)
    got = expected_gradient(row("opd-grpo", "teacher_weight=0.4"), logits, pi.exp(), **known)
    close(got, policy + 0.4 * reverse_kl_gradient(logits, teacher))


def test_sft_is_the_cross_entropy_and_imitating_oneself_is_refused():
    logits, teacher, _ = distributions(15)
    pi = torch.softmax(logits.detach(), -1)
    close(expected_gradient(row("sft"), logits, teacher.exp()), pi - teacher.exp())
    assert expected_gradient(row("sft"), logits, pi).abs().max() < 1e-12
    with pytest.raises(BadInput, match="imitating itself"):
        row("sft", "prefix=self")
    row("rft", "prefix=self")  # with an omega it is a policy gradient


@pytest.mark.parametrize("stale", [False, True])
def test_the_reference_term_has_the_gradient_of_the_reverse_kl_to_the_reference(stale):
    """From samples of pi_old, weighed by pi / pi_old; over the whole support exactly, whoever
    sampled."""
    logits, reference, old = distributions(1)
    pi = torch.log_softmax(logits.detach(), -1)
    source = old if stale else pi
    want = 0.37 * reverse_kl_gradient(logits, reference)
    known = dict(mu=source, advantage=torch.zeros(V).double(), reference_logp=reference)
    known |= dict(old_logp=old) if stale else {}
    method = row("ropd-paper", "reference_kl=0.37")
    close(expected_gradient(method, logits, source.exp(), **known), want)
    # a teacher that agrees with the sampler adds nothing
    method = row("stable-opd", "reference_kl=0.37", "reference_support=full")
    for policy, gradient in ((reference, want), (pi, 0 * want)):
        known = dict(mu=source, teacher_logp=source, reference=policy)
        close(expected_gradient(method, logits, source.exp(), ALL, **known), gradient)


def weighed_loss(name, logp, answers, omegas):
    """A row's loss of answers (lists of tokens) that share one token distribution."""
    weights = losses.token_weights([len(y) for y in answers], METHODS[name].norm, omegas)
    values = [losses.token_loss(METHODS[name], logp[y][:, None], {}) for y in answers]
    return sum((v * torch.tensor(w, dtype=v.dtype)).sum() for v, w in zip(values, weights))


def test_dpo_has_the_gradient_of_its_loss():
    """Two pairs with answers of unlike length: the weighted imitation equals autograd on mean
    over pairs of -log sigmoid(scale (log-ratio of the chosen - of the rejected))."""
    logits, reference, _ = distributions(13)
    scale, answers = 0.3, [([0, 1, 2], [3, 3]), ([4], [0, 2, 2, 1])]

    def dpo(logp):
        ratio = logp - reference
        gaps = [scale * (ratio[w].sum() - ratio[r].sum()) for w, r in answers]
        return -torch.nn.functional.logsigmoid(torch.stack(gaps)).mean()

    omegas, ratio = [], torch.log_softmax(logits.detach(), -1) - reference
    for pair in answers:
        ratios = [float(ratio[y].sum()) for y in pair]
        omegas += losses.preference_weights(scale, [1.0, -1.0], ratios)
    flat = [answer for pair in answers for answer in pair]
    got = gradient_of(logits, lambda logp: weighed_loss("dpo", logp, flat, omegas))
    close(got, gradient_of(logits, dpo))
    # a hopeless pair pulls at full strength, without an overflow
    assert losses.preference_weights(10.0, [1, -1], [-1e6, 0.0]) == [20.0, -20.0]


def test_weights_of_sequences_by_hand():
    for name, overrides, rewards, want in (
        ("sft", [], [1, 0.5, 0], [1, 1, 1]),
        ("rft", [], [1, 0.5, 0], [1, 0, 0]),
        ("rft", ["omega_scale=0.5"], [1, 0.5, 0], [1, 1, 0]),
        ("dapo", [], [0.5, 0.5, 0.5], [0, 0, 0]),
        ("dapo", [], [1, 0.5, 0.5], [1, 1, 1]),
        ("dpo", [], [0.2, 0.9, 0.1, 0.1], [0, 1, -1, 0]),
        ("dpo", [], [0.4, 0.4], [0, 0]),
        ("rwsft", [], [1, 0.5, 0], [1.520, 0.922, 0.559]),
    ):
        got = losses.sequence_weights(row(name, *overrides), rewards)
        assert got == pytest.approx(want, abs=1e-3), name


def test_a_reward_weighted_step_is_the_softmax_weighted_gradient():
    logits, _, _ = distributions(14)
    omegas = losses.sequence_weights(METHODS["rwsft"], REWARD.tolist())
    answers = [[a] for a in ALL]
    got = gradient_of(logits, lambda logp: weighed_loss("rwsft", logp, answers, omegas))
    close(got, gradient_of(logits, lambda logp: -(torch.softmax(REWARD, 0) * logp).sum()))


# ---- refusals


def test_tempting_variants_do_not_have_the_gradient_of_the_name_they_carry():
    """Why check() refuses them: k1 as a loss has gradient 0; k3 as an advantage is reverse
    minus forward KL."""
    logits, teacher, _ = distributions()
    pi = torch.softmax(logits.detach(), -1)
    zero = gradient_of(logits, lambda logp: (pi * (logp - teacher)).sum())
    assert zero.abs().max() < 1e-12
    r = teacher - pi.log()
    k3 = gradient_of(logits, lambda logp: (pi * (r.exp() - 1 - r) * logp).sum())
    reverse = reverse_kl_gradient(logits, teacher)
    close(k3, reverse - (pi - teacher.exp()))
    assert (k3 - reverse).abs().max() > 0.05


@pytest.mark.parametrize(
    "name, overrides, complaint",
    [
        ("opd", "coefficient=k3-advantage", "vanishes"),
        ("opd", "coefficient=k1-loss", "gradient 0"),
        ("opd", "coefficient=k3", "forward KL under another name"),
        ("opd", "coefficient=k2-advantage", "no divergence"),
        ("opd", "divergence=fkl", "coefficient full"),
        ("opd", "divergence=none", "expected one of rkl"),
        ("ropd", "divergence=jsd", "coefficient full"),
        ("gkd", "student_fraction=1", "student_fraction"),
        ("gkd", "student_fraction=1.5", "student_fraction"),
        ("opd-full", "student_fraction=0.5", "student_fraction"),
        ("gkd", "omega=softmax", "prefix mixed"),
        ("ropd", "omega=accepted", "omega accepted"),
        ("opd-full", "baseline=kl", "baseline"),
        ("rwsft", "omega_scale=0", "omega_scale"),
        ("opd-full", "advantage_clip=5", "advantage_clip"),
        ("opd-full", "omega=preference", "omega preference"),
        ("ropd", "clip_low=1.5", "below 1"),
        ("ropd", "tis_cap=nan", "finite"),
        ("ropd", "reference_kl=-0.1", "at least 0"),
        ("opd", "tis_cap=2", "tis_cap"),
        ("opd", "ratio=none", "ratio none"),
        ("lightning", "tis_cap=2", "ratio none"),
        ("lightning", "reference_kl=0.1", "stale samples"),
        ("sft", "gold_weight=0.1", "gold_weight"),
        ("sft", "reference_kl=0.1", "reference_kl"),
        ("opd", "prefix=data", "own samples"),
        ("ropd", "prefix=old", "own samples"),
        ("simct", "prefix=data", "own samples"),
        ("ropd", "advantage=none", "advantage"),
        ("opd-full", "clip_low=0.2", "clip_low"),
        ("ropd", "dual_clip=0.5", "dual_clip"),
        ("opd", "norm=mean", "norm"),
        ("opd", "token_weight=teacher", "reward"),
        ("simct", "span=size", "span: expected one of"),
        ("ropd", "beta=1", "with a column of"),
        ("ropd", "span=sum", "with a column of"),
        ("ropd", "clip_high", "COLUMN=VALUE"),
        ("ropd", "clip_high=wide", "expected a float"),
        ("rodp", "norm=token", "expected one of sft"),
    ],
)
def test_rows_that_would_lie_are_refused(name, overrides, complaint):
    with pytest.raises(BadInput, match=complaint):
        row(name, overrides)


def test_every_row_passes_its_own_check_and_set_changes_one_column():
    for name in METHODS:
        losses.check(METHODS[name])
    changed = row("ropd", "clip_high=0.2", "norm=sequence", "advantage=std")
    assert (changed.clip_high, changed.norm, changed.advantage) == (0.2, "sequence", "std")
    back = dataclasses.replace(changed, clip_high=0.28, norm="token", advantage="mean")
    assert back == METHODS["ropd"]
    unit = row("simct", "span=sum", "norm=sequence")
    assert unit.columns()["own"] == {"span": "sum", "prefixes": "keep"}
    assert unit.norm == "sequence"


def test_the_page_of_methods_is_the_printed_table():
    page = Path(__file__).parent.parent / "docs" / "methods.md"
    assert methods_command.table() in page.read_text()


# ---- clipping, case by case, by hand


@pytest.mark.parametrize(
    "off, ratio, advantage, objective, moves",
    [
        # a good token: no reward for going beyond 1.28
        ("", 1.0, 1.0, 1.0, True),
        ("", 1.5, 1.0, 1.28, False),
        ("", 0.5, 1.0, 0.5, True),
        # a bad token: none for going below 0.8
        ("", 1.0, -1.0, -1.0, True),
        ("", 1.5, -1.0, -1.5, True),
        ("", 0.5, -1.0, -0.8, False),
        # dual clip: -3 is the worst it can get
        ("", 4.0, -1.0, -3.0, False),
        # each side can be off alone
        ("clip_low", 0.5, -1.0, -0.5, True),
        ("clip_high", 0.5, -1.0, -0.8, False),
        ("clip_low", 1.5, 1.0, 1.28, False),
        ("clip_high", 1.5, 1.0, 1.5, True),
        ("dual_clip", 4.0, -1.0, -4.0, True),
    ],
)
def test_clip_higher_and_dual_clip(off, ratio, advantage, objective, moves):
    method = row("ropd", *[f"{off}=0"] * bool(off))
    log_ratio = torch.tensor([ratio], dtype=torch.float64).log().requires_grad_()
    value = losses.clipped_surrogate(log_ratio, torch.tensor([advantage]).double(), method)
    assert value.item() == pytest.approx(-objective)
    assert (torch.autograd.grad(value.sum(), log_ratio)[0].item() != 0) == moves


def test_truncated_importance_weights_use_the_sampler_gap_and_are_capped():
    own = torch.tensor([[-1.0], [-1.0]], dtype=torch.float64, requires_grad=True)
    batch = {
        "old_logp": own.detach()[:, 0],
        "behaviour_logp": torch.tensor([-1.5, -9.0], dtype=torch.float64),
        "advantage": torch.ones(2, dtype=torch.float64),
    }
    for method, want in (
        (row("ropd"), [-math.exp(0.5), -2.0]),
        (row("ropd", "tis_cap=0"), [-1.0, -1.0]),
    ):
        assert losses.token_loss(method, own, batch).tolist() == pytest.approx(want)


# ---- top-k with a tail


def test_top_k_reverse_kl_is_a_true_kl_and_exact_at_full_support():
    logits, teacher, _ = distributions(3)
    logp = torch.log_softmax(logits.detach(), -1)
    full = by_definition("rkl", logp, teacher)
    order = teacher.argsort(descending=True)
    before = 0.0
    for k in range(1, V + 1):
        ids = order[:k]
        value = losses.divergence("rkl", logp[ids][None], teacher[ids][None], whole=k == V)[0]
        # lumping outcomes can only lose information
        assert before - 1e-12 <= value <= full + 1e-12
        before = value
        if k >= V - 1:
            assert value.item() == pytest.approx(full.item(), abs=1e-9)


def test_top_k_pulls_mass_into_the_support_when_the_student_is_elsewhere():
    teacher = torch.tensor([5.0, 4.0, 0.0, 0.0, 0.0]).double().log_softmax(-1)
    logits = torch.tensor([0.0, 0.0, 6.0, 0.0, 0.0]).double().requires_grad_()
    logp = torch.log_softmax(logits, -1)
    value = losses.divergence("rkl", logp[:2][None], teacher[:2][None], whole=False)
    gradient = torch.autograd.grad(value.sum(), logits)[0]
    assert value.item() > 0 and gradient[0] < 0 and gradient[1] < 0 and gradient[2] > 0


def test_identical_distributions_have_zero_loss_and_zero_gradient():
    logits, _, _ = distributions()
    logp = torch.log_softmax(logits, -1)
    for ids, whole in ((slice(None), True), (slice(0, 3), False)):
        value = losses.divergence("rkl", logp[ids][None], logp[ids].detach()[None], whole)
        assert value.abs().item() < 1e-12
        assert torch.autograd.grad(value.sum(), logits, retain_graph=True)[0].abs().max() < 1e-7


def test_a_token_of_probability_zero_is_no_nan():
    logits = torch.tensor([0.0, -2000.0, 0.0], dtype=torch.float64, requires_grad=True)
    logp = torch.log_softmax(logits, -1)[None]
    value = losses.divergence("rkl", logp, torch.full((1, 3), -math.log(3)).double(), True)
    value.sum().backward()
    assert torch.isfinite(value).all() and torch.isfinite(logits.grad).all()


# ---- advantages, normalisers, docstrings


def test_group_advantages():
    assert losses.group_advantages([1.0, 0.5, 0.0], "mean") == [0.5, 0.0, -0.5]
    std = losses.group_advantages([1.0, 0.5, 0.0], "std")
    assert std == pytest.approx([1.2247, 0.0, -1.2247], abs=1e-4)
    # no spread, no signal, no division by zero
    assert losses.group_advantages([0.4, 0.4], "std") == [0.0, 0.0]
    assert losses.group_advantages([0.4, None, 1.0], "mean") is None


def test_token_weights_differ_as_named_and_a_sequence_of_weight_0_leaves_the_normaliser():
    for norm, first, total in (
        ("token", 1 / 5, 1),
        ("sequence", 1 / 2, 1),
        ("batch", 0.5, 2.5),
    ):
        weights = losses.token_weights([1, 0, 4], norm)
        assert sum(map(sum, weights)) == pytest.approx(total)
        assert weights[1] == [] and weights[0] == [first]
    for norm, omegas, want in (
        ("token", [1.0, 0.0, -2.0], (1 / 7, 0.0, -2 / 7)),
        ("sequence", [1.0, 0.0, 3.0], (1 / 4, 0.0, 3 / 10)),
        ("batch", [1.0, 0.0, 3.0], (1 / 2, 0.0, 3 / 2)),
    ):
        weights = losses.token_weights([2, 3, 5], norm, omegas)
        assert weights == [[w] * n for w, n in zip(want, (2, 3, 5))]
