"""Every coefficient has the gradient of its name, by enumerating a 5-token vocabulary in float64."""
import dataclasses

import pytest
import torch

import loss as losses
from loss import METHODS, Method
from records import BadInput

V = 5


def distributions(seed=0):
    g = torch.Generator().manual_seed(seed)
    logits, teacher, old = torch.randn(3, V, generator=g, dtype=torch.float64)
    return logits.requires_grad_(), torch.log_softmax(teacher, -1), torch.log_softmax(old, -1)


def expected_gradient(method, logits, sample_from, make_batch, columns=None):
    """Gradient of the expected token loss when token a is sampled with probability sample_from[a] (held constant)."""
    total = 0.0
    logp = torch.log_softmax(logits, -1)
    entropy = -(logp.exp() * logp).sum()[None]
    for a in range(V):
        row = logp[a][None, None] if columns is None else torch.cat([logp[a][None], logp[columns]])[None]
        total = total + sample_from[a] * losses.token_loss(method, row, entropy, make_batch(a))[0]
    return torch.autograd.grad(total, logits)[0]


def reverse_kl_gradient(logits, teacher):
    logp = torch.log_softmax(logits, -1)
    return torch.autograd.grad((logp.exp() * (logp - teacher)).sum(), logits)[0]


def test_k1_is_the_reverse_kl_gradient_in_expectation():
    logits, teacher, _ = distributions()
    pi = torch.log_softmax(logits.detach(), -1)
    got = expected_gradient(METHODS["opd"], logits, pi.exp(), lambda a: {"teacher_logp": teacher[a][None], "behaviour_logp": pi[a][None]})
    torch.testing.assert_close(got, reverse_kl_gradient(logits, teacher), atol=1e-12, rtol=0)


def test_k1_on_stale_samples_is_corrected_by_the_ratio_to_the_policy_that_sampled():
    """E_mu[pi/mu A grad log pi] = sum_a pi(a) A(a) grad log pi(a), with A = log p_T - log mu fixed when the rollout was scored;
    the log-probs of the weights training started from play no part."""
    logits, teacher, mu = distributions()
    got = expected_gradient(METHODS["opd"], logits, mu.exp(),
                            lambda a: {"teacher_logp": teacher[a][None], "behaviour_logp": mu[a][None], "old_logp": mu[a][None] - 0.3})
    logp = torch.log_softmax(logits, -1)
    want = torch.autograd.grad(-(logp.exp() * (teacher - mu)).sum(), logits)[0]
    torch.testing.assert_close(got, want, atol=1e-12, rtol=0)


def test_full_is_the_reverse_kl_and_its_gradient_exactly():
    logits, teacher, _ = distributions()
    everything = torch.arange(V)
    batch = {"support_logp": teacher[None], "whole": True}
    got = expected_gradient(METHODS["opd-full"], logits, torch.full((V,), 1 / V, dtype=torch.float64), lambda a: batch, everything)
    torch.testing.assert_close(got, reverse_kl_gradient(logits, teacher), atol=1e-12, rtol=0)


def test_reward_is_the_policy_gradient():
    logits, _, _ = distributions()
    pi = torch.softmax(logits.detach(), -1)
    reward = torch.tensor([0.3, -1.0, 2.0, 0.0, 0.7], dtype=torch.float64)
    for name in ("ropd", "grpo", "ropd-paper"):
        method = dataclasses.replace(METHODS[name], reference_kl=0.0)
        got = expected_gradient(method, logits, pi, lambda a: {"advantage": reward[a][None], "behaviour_logp": pi[a].log()[None]})
        want = torch.autograd.grad(-(torch.softmax(logits, -1) * reward).sum(), logits)[0]
        torch.testing.assert_close(got, want, atol=1e-12, rtol=0)


def test_sft_is_the_cross_entropy():
    logits, teacher, _ = distributions()
    got = expected_gradient(METHODS["sft"], logits, teacher.exp(), lambda a: {})
    want = torch.softmax(logits.detach(), -1) - teacher.exp()
    torch.testing.assert_close(got, want, atol=1e-12, rtol=0)


def test_reference_kl_has_the_gradient_of_the_reverse_kl_to_the_reference():
    logits, reference, _ = distributions()
    pi = torch.softmax(logits.detach(), -1)
    method = dataclasses.replace(METHODS["ropd-paper"], reference_kl=0.37)
    got = expected_gradient(method, logits, pi, lambda a: {"advantage": torch.zeros(1, dtype=torch.float64), "reference_logp": reference[a][None]})
    torch.testing.assert_close(got, 0.37 * reverse_kl_gradient(logits, reference), atol=1e-12, rtol=0)


def test_reference_kl_keeps_its_gradient_after_the_first_update():
    """Samples of pi_old, weighed by pi / pi_old, give the gradient of KL(pi || pi_ref) at the pi of now."""
    logits, reference, old = distributions(1)
    method = dataclasses.replace(METHODS["ropd-paper"], reference_kl=0.37)
    got = expected_gradient(method, logits, old.exp(), lambda a: {"advantage": torch.zeros(1, dtype=torch.float64), "reference_logp": reference[a][None],
                                                                   "old_logp": old[a][None]})
    torch.testing.assert_close(got, 0.37 * reverse_kl_gradient(logits, reference), atol=1e-12, rtol=0)


def test_entropy_bonus_raises_entropy():
    logits, _, _ = distributions()
    method = dataclasses.replace(METHODS["ropd"], entropy_bonus=0.5)
    pi = torch.softmax(logits.detach(), -1)
    got = expected_gradient(method, logits, pi, lambda a: {"advantage": torch.zeros(1, dtype=torch.float64), "behaviour_logp": pi[a].log()[None]})
    logp = torch.log_softmax(logits, -1)
    want = torch.autograd.grad(0.5 * (logp.exp() * logp).sum(), logits)[0]
    torch.testing.assert_close(got, want, atol=1e-12, rtol=0)


def test_tempting_variants_do_not_have_the_gradient_of_the_name_they_carry():
    """Why check() refuses them: k1 as a loss has gradient 0; k3 as an advantage is reverse minus forward KL."""
    logits, teacher, _ = distributions()
    pi = torch.softmax(logits.detach(), -1)
    logp = torch.log_softmax(logits, -1)
    k1_loss = torch.autograd.grad((pi * (logp - teacher)).sum(), logits, retain_graph=True)[0]
    assert k1_loss.abs().max() < 1e-12
    k3 = (teacher - logp).exp() - 1 - (teacher - logp)
    k3_advantage = torch.autograd.grad((pi * k3.detach() * logp).sum(), logits, retain_graph=True)[0]
    forward = torch.softmax(logits.detach(), -1) - teacher.exp()
    torch.testing.assert_close(k3_advantage, reverse_kl_gradient(logits, teacher) - forward, atol=1e-12, rtol=0)
    assert (k3_advantage - reverse_kl_gradient(logits, teacher)).abs().max() > 0.05


@pytest.mark.parametrize("row, complaint", [
    (Method("self", "teacher", "k3-advantage"), "vanishes"), (Method("self", "teacher", "k1-loss"), "gradient 0"), (Method("self", "teacher", "k3-loss"), "forward"),
    (Method("self", "reward", "reward", advantage="mean", clip_low=1.5), "below 1"), (Method("self", "reward", "reward", advantage="mean", tis_cap=float("nan")), "finite"),
    (Method("self", "reward", "reward", advantage="mean", reference_kl=-0.1), "at least 0"), (Method("self", "teacher", "k1", tis_cap=2.0), "tis_cap"), (Method("data", "teacher", "k1"), "own samples"), (Method("data", "reward", "reward", advantage="mean"), "own samples"),
    (Method("self", "tokens", "k1"), "signal"), (Method("self", "reward", "reward"), "advantage"), (Method("self", "teacher", "full", clip_low=0.2), "clip_low"),
    (Method("self", "reward", "reward", advantage="std", dual_clip=0.5), "dual_clip"), (Method("data", "tokens", "token", reference_kl=0.1), "reference_kl"),
    (Method("self", "teacher", "k1", norm="batch"), "norm"), (Method("self", "reward", "reward", advantage="mean", clip_high=-0.1), "clip_high")])
def test_rows_that_would_lie_are_refused(row, complaint):
    with pytest.raises(BadInput, match=complaint):
        losses.check(row)


def test_every_row_passes_its_own_check_and_set_changes_one_column():
    for name in METHODS:
        losses.check(METHODS[name])
    changed = losses.settings("ropd", ["clip_high=0.2", "norm=sequence", "advantage=std"])
    assert (changed.clip_high, changed.norm, changed.advantage) == (0.2, "sequence", "std")
    assert dataclasses.replace(changed, clip_high=0.28, norm="token", advantage="mean") == METHODS["ropd"]
    for bad in ("beta=1", "clip_high", "clip_high=wide", "norm=both"):
        with pytest.raises(BadInput):
            losses.settings("ropd", [bad])
    with pytest.raises(BadInput, match="expected one of sft"):
        losses.settings("rodp")


# ------------------------------------------------------------------ clipping, case by case, by hand

@pytest.mark.parametrize("ratio, advantage, objective, moves", [
    (1.0, 1.0, 1.0, True), (1.5, 1.0, 1.28, False), (0.5, 1.0, 0.5, True),        # a good token: no reward for going beyond 1.28
    (1.0, -1.0, -1.0, True), (1.5, -1.0, -1.5, True), (0.5, -1.0, -0.8, False),   # a bad token: none for going below 0.8
    (4.0, -1.0, -3.0, False)])                                                    # dual clip: -3 is the worst it can get
def test_clip_higher_and_dual_clip(ratio, advantage, objective, moves):
    old = torch.tensor([-2.0], dtype=torch.float64)
    logp = (old + torch.tensor(ratio, dtype=torch.float64).log()).requires_grad_()
    value = losses.clipped_surrogate(logp - old, torch.tensor([advantage], dtype=torch.float64), METHODS["ropd"])
    assert value.item() == pytest.approx(-objective)
    assert (torch.autograd.grad(value.sum(), logp)[0].item() != 0) == moves


@pytest.mark.parametrize("side, ratio, advantage, moves", [("clip_low", 0.5, -1.0, True), ("clip_high", 0.5, -1.0, False),
                                                            ("clip_low", 1.5, 1.0, False), ("clip_high", 1.5, 1.0, True)])
def test_each_side_of_the_clip_can_be_off_alone(side, ratio, advantage, moves):
    method = dataclasses.replace(METHODS["ropd"], dual_clip=0.0, **{side: 0.0})
    logp = torch.tensor([ratio], dtype=torch.float64).log().requires_grad_()
    value = losses.clipped_surrogate(logp, torch.tensor([advantage], dtype=torch.float64), method)
    assert (torch.autograd.grad(value.sum(), logp)[0].item() != 0) == moves


def test_truncated_importance_weights_use_the_sampler_gap_and_are_capped():
    own = torch.tensor([[-1.0], [-1.0]], dtype=torch.float64, requires_grad=True)
    old = torch.tensor([-1.0, -1.0], dtype=torch.float64)
    batch = {"old_logp": old, "behaviour_logp": torch.tensor([-1.5, -9.0], dtype=torch.float64), "advantage": torch.ones(2, dtype=torch.float64)}
    value = losses.token_loss(METHODS["ropd"], own, torch.zeros(2), batch)
    assert value.tolist() == pytest.approx([-torch.tensor(0.5).exp().item(), -2.0])
    without = losses.token_loss(dataclasses.replace(METHODS["ropd"], tis_cap=0.0), own, torch.zeros(2), batch)
    assert without.tolist() == pytest.approx([-1.0, -1.0])


# ------------------------------------------------------------------ top-k with a tail

def test_top_k_reverse_kl_is_a_true_kl_and_exact_at_full_support():
    logits, teacher, _ = distributions(3)
    logp = torch.log_softmax(logits.detach(), -1)
    full = (logp.exp() * (logp - teacher)).sum()
    order = teacher.argsort(descending=True)
    before = 0.0
    for k in range(1, V + 1):
        ids = order[:k]
        value = losses.reverse_kl(logp[ids][None], teacher[ids][None], whole=k == V)[0]
        assert before - 1e-12 <= value <= full + 1e-12  # lumping outcomes can only lose information
        before = value
        if k >= V - 1:
            assert value.item() == pytest.approx(full.item(), abs=1e-9)


def test_top_k_pulls_mass_into_the_support_when_the_student_is_elsewhere():
    teacher = torch.log_softmax(torch.tensor([5.0, 4.0, 0.0, 0.0, 0.0], dtype=torch.float64), -1)
    logits = torch.tensor([0.0, 0.0, 6.0, 0.0, 0.0], dtype=torch.float64, requires_grad=True)
    value = losses.reverse_kl(torch.log_softmax(logits, -1)[:2][None], teacher[:2][None], whole=False)
    gradient = torch.autograd.grad(value.sum(), logits)[0]
    assert value.item() > 0 and gradient[0] < 0 and gradient[1] < 0 and gradient[2] > 0


def test_identical_distributions_have_zero_loss_and_zero_gradient():
    logits, _, _ = distributions()
    logp = torch.log_softmax(logits, -1)
    for ids, whole in ((slice(None), True), (slice(0, 3), False)):
        value = losses.reverse_kl(logp[ids][None], logp[ids].detach()[None], whole)
        assert value.abs().item() < 1e-12
        assert torch.autograd.grad(value.sum(), logits, retain_graph=True)[0].abs().max() < 1e-7


def test_a_token_of_probability_zero_is_no_nan():
    logits = torch.tensor([0.0, -2000.0, 0.0], dtype=torch.float64, requires_grad=True)
    value = losses.reverse_kl(torch.log_softmax(logits, -1)[None], torch.log(torch.full((1, 3), 1 / 3, dtype=torch.float64)), True)
    value.sum().backward()
    assert torch.isfinite(value).all() and torch.isfinite(logits.grad).all()


# ------------------------------------------------------------------ advantages and normalisers

def test_group_advantages():
    assert losses.group_advantages([1.0, 0.5, 0.0], "mean") == [0.5, 0.0, -0.5]
    std = losses.group_advantages([1.0, 0.5, 0.0], "std")
    assert std == pytest.approx([1.2247, 0.0, -1.2247], abs=1e-4)
    assert sum(std) == pytest.approx(0)
    assert losses.group_advantages([0.4, 0.4], "std") == [0.0, 0.0]  # no spread, no signal, no division by zero
    assert losses.group_advantages([0.4, None, 1.0], "mean") is None


def test_token_weights_sum_to_one_and_differ_as_named():
    for norm, first in (("token", 1 / 5), ("sequence", 1 / 2)):
        weights = losses.token_weights([1, 0, 4], norm)
        assert sum(map(sum, weights)) == pytest.approx(1) and weights[1] == [] and weights[0] == [first]
