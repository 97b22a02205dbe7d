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
from opd import pairs
from opd.loss import Method
from opd.records import BadInput

V = 5
REWARD = torch.tensor([0.3, -1.0, 2.0, 0.0, 0.7], dtype=torch.float64)
NOTHING = torch.zeros(V, dtype=torch.float64)


def row(name, *overrides):
    return losses.method_named(METHODS, name, overrides)


def distributions(seed=0):
    """Logits of the policy, and log-probs of a teacher and of a third policy."""
    g = torch.Generator().manual_seed(seed)
    logits, teacher, other = torch.randn(3, V, generator=g, dtype=torch.float64)
    return logits.requires_grad_(), teacher.log_softmax(-1), other.log_softmax(-1)


def log_pi(logits):
    return torch.log_softmax(logits.detach(), -1)


def every_token(teacher=None, mu=None, reference=None, **known):
    """The batch of V tokens of which each is another one of the vocabulary."""
    batch = known
    if teacher is not None:
        batch |= {"teacher_logp": teacher, "support_logp": teacher.expand(V, V), "whole": True}
    if mu is not None:
        batch["behaviour_logp"] = mu
    if reference is not None:
        batch["reference_logp"] = reference
        batch |= {"reference_support_logp": reference.expand(V, V), "reference_whole": True}
    return batch


def each_loss(method, logp, **known):
    """Token losses [V], the whole vocabulary as support."""
    numbers = torch.cat([logp[:, None], logp.expand(V, V)], 1)
    return losses.token_loss(method, numbers, every_token(**known))


def expected_gradient(method, logits, source, **known):
    """Gradient of the expected token loss when token a is sampled with probability source[a]
    (held constant)."""
    return gradient_of(logits, lambda logp: (source * each_loss(method, logp, **known)).sum())


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


def kl_gradient(logits, teacher, kind="rkl", b=0.5):
    return gradient_of(logits, lambda logp: by_definition(kind, logp, teacher, b))


def close(got, want, atol=1e-10):
    torch.testing.assert_close(got, want, atol=atol, rtol=0)


# ---- estimators


def teacher_row(coefficient, kind, **columns):
    advantage = "mean" if coefficient == "reward+k1" else "none"
    return Method("self", coefficient, divergence=kind, advantage=advantage, **columns)


KINDS = ("rkl", "fkl", "jsd")
LEGAL = {("k1", "rkl"), ("reward+k1", "rkl"), ("k2", "rkl")}
LEGAL |= {("full", kind) for kind in KINDS}
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
    "coefficient, kind", list(itertools.product(COEFFICIENTS, (*KINDS, "none")))
)
def test_every_pair_of_estimator_and_divergence_is_exact_or_refused(coefficient, kind):
    """Its expected gradient over the policy's own samples is that of the divergence, or check()
    refuses the pair with a reason."""
    b = {"interpolation": 0.3} if kind == "jsd" else {}
    method = teacher_row(coefficient, kind, **b)
    if (coefficient, kind) not in LEGAL:
        with pytest.raises(BadInput):
            losses.check(method)
        return
    losses.check(method)
    logits, teacher, _ = distributions(5)
    pi = log_pi(logits)
    got = expected_gradient(method, logits, pi.exp(), teacher=teacher, mu=pi, advantage=NOTHING)
    close(got, kl_gradient(logits, teacher, kind, 0.3))


@pytest.mark.parametrize(
    "name, overrides, reward, teacher, reference",
    [
        ("ropd", [], 1, 0, 0),
        ("grpo", [], 1, 0, 0),
        ("gad", ["reference_kl=0"], 1, 0, 0),
        ("ropd-paper", ["reference_kl=0.37"], 1, 0, 0.37),
        ("opd-grpo", ["teacher_weight=0.4"], 1, 0.4, 0),
        ("opd", ["baseline=kl"], 0, 1, 0),
        ("opd-full", [], 0, 1, 0),
        ("lightning", ["advantage_clip=0"], 0, 1, 0),
        ("stable-opd", ["reference_kl=0.37"], 0, 1, 0.37),
        ("stable-opd", ["reference_kl=0.37", "reference_support=full"], 0, 1, 0.37),
    ],
)
def test_on_own_samples_a_row_is_policy_gradient_and_reverse_kls_to_teacher_and_reference(
    name, overrides, reward, teacher, reference
):
    logits, p_teacher, p_reference = distributions(12)
    pi = log_pi(logits)
    known = dict(teacher=p_teacher, reference=p_reference, mu=pi, advantage=REWARD)
    got = expected_gradient(row(name, *overrides), logits, pi.exp(), **known)
    want = reward * gradient_of(logits, lambda logp: -(logp.exp() * REWARD).sum())
    want = want + teacher * kl_gradient(logits, p_teacher)
    close(got, want + reference * kl_gradient(logits, p_reference))


@pytest.mark.parametrize(
    "name, overrides, reward",
    [
        ("release", [], 0),
        ("sod", [], 1),
        ("opd", ["advantage_clip=0.3", "token_weight=file"], 0),
    ],
)
def test_weights_of_tokens_and_clips_of_advantages_change_the_pull_of_each_token(
    name, overrides, reward
):
    logits, teacher, _ = distributions(4)
    pi, weight = log_pi(logits), torch.tensor([0.0, 1.0, 2.5, 0.0, 0.5], dtype=torch.float64)
    method = row(name, *overrides)
    bound = method.advantage_clip or math.inf
    known = dict(teacher=teacher, mu=pi, advantage=REWARD, token_weight=weight)
    got = expected_gradient(method, logits, pi.exp(), **known)
    pull = reward * REWARD + weight * (teacher - pi).clamp(-bound, bound)
    assert (bound < math.inf) <= bool(((teacher - pi).abs() > bound).any())
    close(got, gradient_of(logits, lambda logp: -(pi.exp() * pull * logp).sum()))


def test_k1_and_k2_on_stale_samples_are_corrected_by_the_ratio_to_the_policy_that_sampled():
    """E_mu[pi/mu A grad log pi] = sum_a pi(a) A(a) grad log pi(a), with A = log p_T - log mu
    fixed when the rollout was scored; the log-probs of the weights training started from play
    no part.  k2, weighed by pi / mu as it is now, stays exact."""
    logits, teacher, mu = distributions()
    known = dict(teacher=teacher, mu=mu, old_logp=mu - 0.3)
    got = expected_gradient(row("opd"), logits, mu.exp(), **known)
    close(got, gradient_of(logits, lambda logp: -(logp.exp() * (teacher - mu)).sum()))
    got = expected_gradient(teacher_row("k2", "rkl"), logits, mu.exp(), **known)
    close(got, kl_gradient(logits, teacher))


def test_the_reference_term_stays_exact_on_stale_samples():
    """From samples of pi_old, weighed by pi / pi_old; over the whole support, whoever
    sampled."""
    logits, reference, old = distributions(1)
    want = 0.37 * kl_gradient(logits, reference)
    known = dict(mu=old, reference=reference)
    method = row("ropd-paper", "reference_kl=0.37")
    more = dict(advantage=NOTHING, old_logp=old)
    close(expected_gradient(method, logits, old.exp(), **known, **more), want)
    # a teacher that agrees with the sampler adds nothing
    method = row("stable-opd", "reference_kl=0.37", "reference_support=full")
    close(expected_gradient(method, logits, old.exp(), **known, teacher=old), want)


@pytest.mark.parametrize("clip, bound", [(0, math.inf), (0.4, 0.4)])
def test_without_importance_weights_the_pull_is_the_clipped_gap_on_the_samplers_tokens(
    clip, bound
):
    """sum_a mu(a) clip(log p_T - log pi) grad log pi, Huber's gradient."""
    logits, teacher, mu = distributions(2)
    gap = teacher - log_pi(logits)
    assert (gap.abs() > 0.4).any(), "the fixture should clip"
    method = row("lightning", f"advantage_clip={clip}")
    got = expected_gradient(method, logits, mu.exp(), teacher=teacher, mu=mu)
    pull = mu.exp() * gap.clamp(-bound, bound)
    close(got, gradient_of(logits, lambda logp: -(pull * logp).sum()))


# ---- weights of sequences


def test_sft_is_the_cross_entropy():
    logits, teacher, _ = distributions(15)
    source = teacher.exp()
    close(expected_gradient(row("sft"), logits, source), log_pi(logits).exp() - source)


def weighted_loss(name, logp, answers, omegas):
    """A row's loss of answers (lists of tokens) that share one token distribution."""
    weights = losses.normalised_weights([len(y) for y in answers], METHODS[name].norm, omegas)
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

    omegas, ratio = [], log_pi(logits) - reference
    for pair in answers:
        ratios = [float(ratio[y].sum()) for y in pair]
        omegas += pairs.preference_weights(scale, [1.0, -1.0], ratios)
    flat = [answer for pair in answers for answer in pair]
    got = gradient_of(logits, lambda logp: weighted_loss("dpo", logp, flat, omegas))
    close(got, gradient_of(logits, dpo))
    # a hopeless pair pulls at full strength, without an overflow
    assert pairs.preference_weights(10.0, [1, -1], [-1e6, 0.0]) == [20.0, -20.0]


@pytest.mark.parametrize(
    "name, overrides, rewards, want",
    [
        ("sft", [], [1, 0.5, 0], [1, 1, 1]),
        ("rft", [], [1, 0.5, 0], [1, 0, 0]),
        ("rft", ["omega_scale=0.5"], [1, 0.5, 0], [1, 1, 0]),
        ("dapo", [], [0.5, 0.5, 0.5], [0, 0, 0]),
        ("dapo", [], [1, 0.5, 0.5], [1, 1, 1]),
        ("dpo", [], [0.2, 0.9, 0.1, 0.1], [0, 1, -1, 0]),
        ("dpo", [], [0.4, 0.4], [0, 0]),
        ("rwsft", [], [1, 0.5, 0], [1.520, 0.922, 0.559]),
    ],
)
def test_weights_of_sequences_by_hand(name, overrides, rewards, want):
    got = losses.sequence_weights(row(name, *overrides), rewards)
    assert got == pytest.approx(want, abs=1e-3)


def test_group_advantages_have_mean_0_and_a_failed_judgement_leaves_none():
    assert losses.group_advantages([1.0, 0.5, 0.0], "mean") == [0.5, 0.0, -0.5]
    std = losses.group_advantages([1.0, 0.5, 0.0], "std")
    assert std == pytest.approx([1.2247, 0.0, -1.2247], abs=1e-4)
    # no spread, no signal, no division by zero
    assert losses.group_advantages([0.4, 0.4], "std") == [0.0, 0.0]
    assert losses.group_advantages([0.1] * 3, "mean") == [0.0] * 3, "their mean is not 0.1"
    assert losses.group_advantages([0.4, None, 1.0], "mean") is None


@pytest.mark.parametrize(
    "norm, lengths, omegas, want",
    [
        ("token", [1, 0, 4], None, [1 / 5, 0, 1 / 5]),
        ("sequence", [1, 0, 4], None, [1 / 2, 0, 1 / 8]),
        ("batch", [1, 0, 4], None, [1 / 2, 0, 1 / 2]),
        ("token", [2, 3, 5], [1.0, 0.0, -2.0], [1 / 7, 0, -2 / 7]),
        ("sequence", [2, 3, 5], [1.0, 0.0, 3.0], [1 / 4, 0, 3 / 10]),
        ("batch", [2, 3, 5], [1.0, 0.0, 3.0], [1 / 2, 0, 3 / 2]),
    ],
)
def test_token_weights_by_hand_and_what_weighs_0_leaves_the_normaliser(
    norm, lengths, omegas, want
):
    got = losses.normalised_weights(lengths, norm, omegas)
    assert got == [[w] * n for w, n in zip(want, lengths)]


# ---- rows


@pytest.mark.parametrize(
    "name, overrides, complaint",
    [
        ("gkd", "interpolation=0", "at the ends use divergence"),
        ("gkd", "omega=softmax", "prefix mixed"),
        ("opd-full", "baseline=kl", "baseline"),
        ("ropd", "clip_low=1.5", "below 1"),
        ("ropd", "tis_cap=nan", "finite"),
        ("ropd", "reference_kl=-0.1", "at least 0"),
        ("opd", "tis_cap=2", "tis_cap"),
        ("opd", "ratio=none", "ratio none"),
        ("lightning", "reference_kl=0.1", "stale samples"),
        ("sft", "reference_kl=0.1", "reference_kl"),
        ("sft", "prefix=self", "imitating itself"),
        ("ropd", "prefix=old", "own samples"),
        ("ropd", "advantage=none", "advantage"),
        ("opd", "token_weight=teacher", "reward"),
        ("ropd", "span=sum", "with a name of"),
        ("ropd", "clip_high", "NAME=VALUE"),
        ("ropd", "clip_high=wide", "expected a float"),
        ("rodp", "norm=token", "expected one of sft"),
        ("opd", "teacher_weight=5", "goes with coefficient reward"),
        ("opd-full", "interpolation=0.9", "goes with divergence jsd"),
        ("opd", "reference_support=full", "goes with reference_kl"),
    ],
)
def test_rows_that_would_lie_are_refused(name, overrides, complaint):
    with pytest.raises(BadInput, match=complaint):
        row(name, overrides)


def test_every_row_passes_its_own_check_and_set_changes_one_column():
    for name in METHODS:
        losses.check(METHODS[name])
    changed = dataclasses.replace(METHODS["ropd"], clip_high=0.2, norm="sequence")
    assert row("ropd", "clip_high=0.2", "norm=sequence") == changed
    unit = row("simct", "span=sum")
    assert unit.columns()["own"] == {"span": "sum", "prefixes": "keep"}
    row("rft", "prefix=self")  # with an omega, imitating oneself is a policy gradient


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


@pytest.mark.parametrize("cap, want", [(2, [-math.exp(0.5), -2.0]), (0, [-1.0, -1.0])])
def test_truncated_importance_weights_use_the_sampler_gap_and_are_capped(cap, want):
    own = torch.tensor([[-1.0], [-1.0]])
    mu = torch.tensor([-1.5, -9.0])
    batch = {"old_logp": own[:, 0], "behaviour_logp": mu, "advantage": torch.ones(2)}
    got = losses.token_loss(row("ropd", f"tis_cap={cap}"), own, batch)
    assert got.tolist() == pytest.approx(want)


# ---- top-k with a tail


def test_top_k_reverse_kl_is_a_true_kl_and_exact_at_full_support():
    logits, teacher, _ = distributions(3)
    logp = log_pi(logits)
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


@pytest.mark.parametrize("k", [V, 3])
def test_identical_distributions_have_zero_loss_and_zero_gradient(k):
    logits, _, _ = distributions()
    logp = torch.log_softmax(logits, -1)[None, :k]
    value = losses.divergence("rkl", logp, logp.detach(), k == V)
    assert value.abs().item() < 1e-12
    assert torch.autograd.grad(value.sum(), logits)[0].abs().max() < 1e-7


def test_a_token_of_probability_zero_is_no_nan():
    logits = torch.tensor([0.0, -2000.0, 0.0], dtype=torch.float64, requires_grad=True)
    logp = torch.log_softmax(logits, -1)[None]
    value = losses.divergence("rkl", logp, torch.full((1, 3), -math.log(3)).double(), True)
    value.sum().backward()
    assert torch.isfinite(value).all() and torch.isfinite(logits.grad).all()
