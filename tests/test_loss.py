"""Every row has the gradient of its name, by enumerating a 5-token vocabulary in float64."""

import dataclasses
import itertools
import math
import re
from pathlib import Path

import pytest
import torch

from methods.explain import explain
from opd import loss as losses
from opd.loss import METHODS, Method
from opd.records import BadInput

V = 5
TRL = {
    ("fkl", 0.0): [1.3868962065583772, 0.9741138362576061],
    ("jsd", 0.1): [0.11551553142053167, 0.07894429946249558],
    ("jsd", 0.5): [0.28572872853389053, 0.19682024738129106],
    ("jsd", 0.9): [0.10737287988774576, 0.07779482670833954],
    ("rkl", 1.0): [1.2439871592824985, 0.9286254935374586],
}


def distributions(seed=0):
    g = torch.Generator().manual_seed(seed)
    logits, teacher, old = torch.randn(3, V, generator=g, dtype=torch.float64)
    return logits.requires_grad_(), torch.log_softmax(teacher, -1), torch.log_softmax(old, -1)


def expected_gradient(method, logits, sample_from, make_batch, columns=None):
    """Gradient of the expected token loss when token a is sampled with probability
    sample_from[a] (held constant)."""
    total = 0.0
    logp = torch.log_softmax(logits, -1)
    entropy = -(logp.exp() * logp).sum()[None]
    for a in range(V):
        row = (
            logp[a][None, None]
            if columns is None
            else torch.cat([logp[a][None], logp[columns]])[None]
        )
        total = (
            total + sample_from[a] * losses.token_loss(method, row, entropy, make_batch(a))[0]
        )
    return torch.autograd.grad(total, logits)[0]


def reverse_kl_gradient(logits, teacher):
    logp = torch.log_softmax(logits, -1)
    return torch.autograd.grad((logp.exp() * (logp - teacher)).sum(), logits)[0]


def test_k1_is_the_reverse_kl_gradient_in_expectation():
    logits, teacher, _ = distributions()
    pi = torch.log_softmax(logits.detach(), -1)
    got = expected_gradient(
        METHODS["opd"],
        logits,
        pi.exp(),
        lambda a: {"teacher_logp": teacher[a][None], "behaviour_logp": pi[a][None]},
    )
    torch.testing.assert_close(got, reverse_kl_gradient(logits, teacher), atol=1e-12, rtol=0)


def test_k1_on_stale_samples_is_corrected_by_the_ratio_to_the_policy_that_sampled():
    """E_mu[pi/mu A grad log pi] = sum_a pi(a) A(a) grad log pi(a), with A = log p_T - log mu
    fixed when the rollout was scored; the log-probs of the weights training started from play
    no part."""
    logits, teacher, mu = distributions()
    got = expected_gradient(
        METHODS["opd"],
        logits,
        mu.exp(),
        lambda a: {
            "teacher_logp": teacher[a][None],
            "behaviour_logp": mu[a][None],
            "old_logp": mu[a][None] - 0.3,
        },
    )
    logp = torch.log_softmax(logits, -1)
    want = torch.autograd.grad(-(logp.exp() * (teacher - mu)).sum(), logits)[0]
    torch.testing.assert_close(got, want, atol=1e-12, rtol=0)


def by_definition(kind, logp, teacher, b=0.5):
    """D(pi, p_T) as its paper writes it, no shortcut shared with opd/loss.py."""
    p, q = logp.exp(), teacher.exp()
    m = b * q + (1 - b) * p
    return {
        "rkl": (p * (p / q).log()).sum(),
        "fkl": (q * (q / p).log()).sum(),
        "jsd": b * (q * (q / m).log()).sum() + (1 - b) * (p * (p / m).log()).sum(),
        "mix": b * (p * (p / q).log()).sum() + (1 - b) * (q * (q / p).log()).sum(),
    }[kind]


def row(coefficient, kind, **columns):
    signal, advantage = (
        ("reward+teacher", "mean") if coefficient == "reward+k1" else ("teacher", "none")
    )
    return Method("self", signal, coefficient, kind, advantage=advantage, **columns)


LEGAL = {
    (c, kind)
    for c, kinds in {
        "k1": ["rkl"],
        "reward+k1": ["rkl"],
        "k2": ["rkl"],
        "k3": ["fkl"],
        "full": ["rkl", "fkl", "jsd", "mix"],
    }.items()
    for kind in kinds
}


@pytest.mark.parametrize(
    "coefficient, kind",
    list(
        itertools.product(
            ("k1", "reward+k1", "k2", "k3", "full", "k1-loss", "k2-advantage", "k3-advantage"),
            ("rkl", "fkl", "jsd", "mix", "none"),
        )
    ),
)
def test_every_pair_of_estimator_and_divergence_is_exact_or_refused(coefficient, kind):
    """Its expected gradient over the policy's own samples is that of the divergence, or check()
    refuses the pair with a reason."""
    method = row(coefficient, kind, interpolation=0.3 if kind in ("jsd", "mix") else 0.5)
    if (coefficient, kind) not in LEGAL:
        with pytest.raises(BadInput):
            losses.check(method)
        return
    losses.check(method)
    logits, teacher, _ = distributions(5)
    pi = torch.log_softmax(logits.detach(), -1)
    batch = {
        "support_logp": teacher[None],
        "whole": True,
        "advantage": torch.zeros(1, dtype=torch.float64),
    }
    got = expected_gradient(
        method,
        logits,
        pi.exp(),
        lambda a: batch | {"teacher_logp": teacher[a][None], "behaviour_logp": pi[a][None]},
        torch.arange(V),
    )
    want = torch.autograd.grad(
        by_definition(kind, torch.log_softmax(logits, -1), teacher, 0.3), logits
    )[0]
    torch.testing.assert_close(got, want, atol=1e-10, rtol=0)


@pytest.mark.parametrize("coefficient, kind", [("k2", "rkl"), ("k3", "fkl")])
def test_estimators_that_are_losses_stay_exact_on_stale_samples(coefficient, kind):
    """Samples of mu, weighed by pi / mu as it is now: the gradient at pi, which k1's advantage
    of yesterday does not give."""
    logits, teacher, mu = distributions(6)
    got = expected_gradient(
        row(coefficient, kind),
        logits,
        mu.exp(),
        lambda a: {"teacher_logp": teacher[a][None], "behaviour_logp": mu[a][None]},
    )
    want = torch.autograd.grad(
        by_definition(kind, torch.log_softmax(logits, -1), teacher), logits
    )[0]
    torch.testing.assert_close(got, want, atol=1e-10, rtol=0)


@pytest.mark.parametrize(
    "kind, b", [("rkl", 1.0), ("fkl", 0.0), ("jsd", 0.1), ("jsd", 0.9), ("mix", 0.3)]
)
def test_full_is_pi_times_g_of_the_ratio(kind, b):
    """The coefficients c(a) = pi(a) g(p_T(a) / pi(a)) of opd/loss.py's docstring, against
    autograd on the value."""
    logits, teacher, _ = distributions(7)
    logp = torch.log_softmax(logits, -1)
    value = losses.divergence(kind, logp[None], teacher[None], True, b)[0]
    assert value.item() == pytest.approx(
        by_definition(kind, logp, teacher, b).item(), abs=1e-12
    )
    u = (teacher - logp).exp().detach()
    g = {
        "rkl": u.log(),
        "fkl": u,
        "jsd": (1 - b) * (b * u + 1 - b).log(),
        "mix": b * u.log() + (1 - b) * u,
    }[kind]
    want = -torch.autograd.grad(
        (logp.exp().detach() * g * logp).sum(), logits, retain_graph=True
    )[0]
    torch.testing.assert_close(torch.autograd.grad(value, logits)[0], want, atol=1e-12, rtol=0)


def test_divergences_are_those_that_trl_computes():
    """Values of TRL 1.16, GKDTrainer.generalized_jsd_loss on these logits, sum over the
    vocabulary of one token each."""
    student = torch.tensor(
        [[1.0, -0.5, 0.25, 2.0, 0.0], [0.3, 0.1, -2.0, 0.7, 1.5]], dtype=torch.float64
    ).log_softmax(-1)
    teacher = torch.tensor(
        [[0.0, 1.0, -1.0, 0.5, 2.5], [1.0, -0.4, 0.6, 0.2, -0.9]], dtype=torch.float64
    ).log_softmax(-1)
    for (kind, b), want in TRL.items():
        torch.testing.assert_close(
            losses.divergence(kind, student, teacher, True, b),
            torch.tensor(want, dtype=torch.float64),
            atol=1e-9,
            rtol=0,
        )


def test_a_jensen_shannon_divergence_leans_as_its_interpolation_says():
    """JSD_b / b -> forward, JSD_b / (1 - b) -> reverse KL; the thing itself vanishes at both
    ends, which is why they are refused."""
    logits, teacher, _ = distributions(8)
    logp, teacher = torch.log_softmax(logits.detach(), -1)[None], teacher[None]
    forward, reverse = (
        losses.divergence(kind, logp, teacher).item() for kind in ("fkl", "rkl")
    )
    assert losses.divergence("jsd", logp, teacher, True, 1e-6).item() / 1e-6 == pytest.approx(
        forward, rel=1e-4
    )
    assert losses.divergence(
        "jsd", logp, teacher, True, 1 - 1e-6
    ).item() / 1e-6 == pytest.approx(reverse, rel=1e-4)
    for b in (0.0, 1.0):
        with pytest.raises(BadInput, match="at the ends use divergence"):
            losses.settings("gkd", [f"interpolation={b}"])


def test_full_through_the_kernels_two_numbers_is_full_over_the_support():
    logits, teacher, _ = distributions()
    logp = torch.log_softmax(logits, -1)
    exact = by_definition("rkl", logp, teacher)[None], by_definition("fkl", logp, teacher)[None]
    for kind in ("rkl", "fkl", "mix"):
        method = row("full", kind, interpolation=0.3)
        a = losses.token_loss(method, logp[:1][None], torch.zeros(1), {}, exact)
        b = losses.token_loss(
            method,
            torch.cat([logp[:1], logp])[None],
            torch.zeros(1),
            {"support_logp": teacher[None], "whole": True},
        )
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


# ---- sampled rows against the rows they sample


def test_many_samples_of_k1_approach_analytic_reverse_kl_and_many_of_sft_soft_forward_kl():
    """Two pairs of rows that are one in expectation: 400,000 tokens agree within five standard
    errors, and a wrong row does not."""
    logits, teacher, _ = distributions(9)
    pi, n = torch.log_softmax(logits.detach(), -1), 400_000
    r = torch.Generator().manual_seed(0)
    for name, exact, source in (("opd", "opd-full", pi), ("seqkd", "fkl", teacher)):
        counts = (
            torch.multinomial(source.exp(), n, replacement=True, generator=r).bincount(
                minlength=V
            )
            / n
        )
        # noqa: E731
        make = lambda a: {
            "teacher_logp": teacher[a][None],
            "behaviour_logp": pi[a][None],
            "support_logp": teacher[None],
            "whole": True,
        }
        got = expected_gradient(METHODS[name], logits, counts.double(), make)
        want = expected_gradient(
            METHODS[exact],
            logits,
            torch.full((V,), 1 / V, dtype=torch.float64),
            make,
            torch.arange(V),
        )
        # variance of one token's gradient, exactly; the error of the mean of n of them
        each = [
            expected_gradient(METHODS[name], logits, torch.eye(V, dtype=torch.float64)[a], make)
            for a in range(V)
        ]
        error = (sum(source.exp()[a] * (each[a] - want) ** 2 for a in range(V)) / n).sqrt()
        assert ((got - want).abs() <= 5 * error + 1e-12).all()
        other = expected_gradient(
            METHODS["dagger" if name == "opd" else "opd-full"],
            logits,
            torch.full((V,), 1 / V, dtype=torch.float64),
            make,
            torch.arange(V),
        )
        assert ((got - other).abs() > 5 * error).any()


def test_the_baseline_keeps_the_mean_and_lowers_the_variance():
    logits, teacher, _ = distributions(10)
    pi = torch.log_softmax(logits.detach(), -1)
    # noqa: E731
    make = lambda a: {
        "teacher_logp": teacher[a][None],
        "behaviour_logp": pi[a][None],
        "support_logp": teacher[None],
        "whole": True,
    }
    spread = {}
    for name in ("none", "kl"):
        method = losses.settings("opd", [f"baseline={name}"])
        each = [
            expected_gradient(
                method, logits, torch.eye(V, dtype=torch.float64)[a], make, torch.arange(V)
            )
            for a in range(V)
        ]
        mean = sum(pi[a].exp() * g for a, g in enumerate(each))
        torch.testing.assert_close(
            mean, reverse_kl_gradient(logits, teacher), atol=1e-12, rtol=0
        )
        spread[name] = sum(
            pi[a].exp() * ((g - mean) ** 2).sum() for a, g in enumerate(each)
        ).item()
    assert spread["kl"] < 0.9 * spread["none"]


@pytest.mark.parametrize("name, overrides", [("opd", ["gamma=1"]), ("minillm", ["future=sum"])])
def test_with_gamma_1_the_gradient_is_that_of_the_whole_sequences_kl(name, overrides):
    """All 25 two-token answers: sum_y pi(y) of the gradient = grad KL(pi(y) || p_T(y)).
    Without gamma only the part at each prefix."""
    r = torch.Generator().manual_seed(11)
    first, second = (
        torch.randn(*shape, generator=r, dtype=torch.float64).requires_grad_()
        for shape in ((V,), (V, V))
    )
    t_first, t_second = (
        torch.log_softmax(torch.randn(*shape, generator=r, dtype=torch.float64), -1)
        for shape in ((V,), (V, V))
    )

    def gradient(method):
        total, p1, p2 = 0.0, torch.log_softmax(first, -1), torch.log_softmax(second, -1)
        for a, b in itertools.product(range(V), range(V)):
            support, t_support = torch.stack([p1, p2[a]]), torch.stack([t_first, t_second[a]])
            own, t_own = (
                torch.stack([p1[a], p2[a, b]]),
                torch.stack([t_first[a], t_second[a, b]]),
            )
            batch = {
                "teacher_logp": t_own,
                "behaviour_logp": own.detach(),
                "support_logp": t_support,
                "whole": True,
                "sequence": torch.zeros(2, dtype=torch.int64),
            }
            total = (
                total
                + own.detach().sum().exp()
                * losses.token_loss(
                    method, torch.cat([own[:, None], support], 1), torch.zeros(2), batch
                ).sum()
            )
        return torch.autograd.grad(total, (first, second))

    p1, p2 = torch.log_softmax(first, -1), torch.log_softmax(second, -1)
    joint, t_joint = p1[:, None] + p2, t_first[:, None] + t_second
    want = torch.autograd.grad((joint.exp() * (joint - t_joint)).sum(), (first, second))
    for got, exact in zip(gradient(losses.settings(name, overrides)), want):
        torch.testing.assert_close(got, exact, atol=1e-10, rtol=0)
    short = gradient(losses.settings("opd"))
    assert (short[0] - want[0]).abs().max() > 0.01, "the test would not see a forgotten future"


def test_later_tokens_by_hand_and_within_their_sequence():
    each = torch.tensor([1.0, 2.0, 3.0, 10.0])
    sequence = torch.tensor([0, 0, 0, 1])
    for gamma, future, want in (
        (1.0, "sum", [5, 3, 0, 0]),
        (0.5, "sum", [1.75, 1.5, 0, 0]),
        (1.0, "mean", [2.5, 3, 0, 0]),
    ):
        assert (
            losses.later_tokens(
                each, sequence, dataclasses.replace(METHODS["opd"], gamma=gamma, future=future)
            ).tolist()
            == want
        )


def test_an_advantage_clip_bounds_the_pull_of_a_token_the_teacher_finds_absurd():
    batch = {
        "teacher_logp": torch.tensor([-30.0, -1.5]),
        "behaviour_logp": torch.tensor([-1.0, -1.0]),
    }
    own = torch.tensor([[-1.0], [-1.0]], requires_grad=True)
    for clip, want in ((0.0, [29.0, 0.5]), (5.0, [5.0, 0.5])):
        value = losses.token_loss(
            dataclasses.replace(METHODS["opd"], advantage_clip=clip), own, torch.zeros(2), batch
        )
        assert torch.autograd.grad(value.sum(), own)[0][:, 0].tolist() == pytest.approx(want)


# ---- rewards and weights of sequences


def test_reward_plus_k1_is_the_sum_of_both():
    logits, teacher, _ = distributions(12)
    pi = torch.log_softmax(logits.detach(), -1)
    reward = torch.tensor([0.3, -1.0, 2.0, 0.0, 0.7], dtype=torch.float64)
    method = losses.settings("opd-verifier", ["teacher_weight=0.4"])
    got = expected_gradient(
        method,
        logits,
        pi.exp(),
        lambda a: {
            "advantage": reward[a][None],
            "teacher_logp": teacher[a][None],
            "behaviour_logp": pi[a][None],
        },
    )
    want = torch.autograd.grad(-(torch.softmax(logits, -1) * reward).sum(), logits)[
        0
    ] + 0.4 * reverse_kl_gradient(logits, teacher)
    torch.testing.assert_close(got, want, atol=1e-12, rtol=0)


def test_dpo_has_the_gradient_of_its_loss():
    """Two pairs with answers of unlike length, one token distribution for all: the weighted
    imitation equals autograd on mean over pairs of -log sigmoid(scale (log-ratio of the chosen
    - of the rejected))."""
    logits, reference, _ = distributions(13)
    scale, answers = 0.3, [([0, 1, 2], [3, 3]), ([4], [0, 2, 2, 1])]
    logp = torch.log_softmax(logits, -1)
    loss = -torch.stack(
        [
            torch.nn.functional.logsigmoid(
                scale * ((logp - reference)[w].sum() - (logp - reference)[lost].sum())
            )
            for w, lost in answers
        ]
    ).mean()
    want = torch.autograd.grad(loss, logits, retain_graph=True)[0]
    omegas, flat = [], [answer for pair in answers for answer in pair]
    for pair in answers:
        omegas += losses.preference_weights(
            scale, [1.0, -1.0], [float((logp.detach() - reference)[y].sum()) for y in pair]
        )
    weights = losses.token_weights([len(y) for y in flat], METHODS["dpo"].norm, omegas)
    total = sum(
        (
            losses.token_loss(METHODS["dpo"], logp[y][:, None], torch.zeros(len(y)), {})
            * torch.tensor(w, dtype=torch.float64)
        ).sum()
        for y, w in zip(flat, weights)
    )
    torch.testing.assert_close(torch.autograd.grad(total, logits)[0], want, atol=1e-12, rtol=0)
    assert losses.preference_weights(10.0, [1, -1], [-1e6, 0.0]) == [20.0, -20.0], (
        "a hopeless pair pulls at full strength, without an overflow"
    )


def test_weights_of_sequences_by_hand():
    for name, overrides, rewards, want in (
        ("paced", [], [1, 0.5, 0], [0.25, 0.25, 0.25]),
        ("paced", [], [1, 0, 0, 0], [0.1875] * 4),
        ("paced", [], [1, 1], [0, 0]),
        ("paced", [], [0, 0], [0, 0]),
        ("sft", [], [1, 0.5, 0], [1, 1, 1]),
        ("rft", [], [1, 0.5, 0], [1, 0, 0]),
        ("rft", ["omega_scale=0.5"], [1, 0.5, 0], [1, 1, 0]),
        ("dapo", [], [0.5, 0.5, 0.5], [0, 0, 0]),
        ("dapo", [], [1, 0.5, 0.5], [1, 1, 1]),
        ("dpo", [], [0.2, 0.9, 0.1, 0.1], [0, 1, -1, 0]),
        ("dpo", [], [0.4, 0.4], [0, 0]),
        ("rwsft", [], [1, 0.5, 0], [1.520, 0.922, 0.559]),
    ):
        assert losses.sequence_weights(
            losses.settings(name, overrides), rewards
        ) == pytest.approx(want, abs=1e-3), name


def test_a_reward_weighted_step_is_the_softmax_weighted_gradient():
    logits, _, _ = distributions(14)
    rewards = [0.0, 1.0, 0.25, 0.5, 0.75]
    omegas = losses.sequence_weights(METHODS["rwsft"], rewards)
    logp = torch.log_softmax(logits, -1)
    weights = losses.token_weights([1] * V, "token", omegas)
    total = sum(
        (
            losses.token_loss(METHODS["rwsft"], logp[a][None, None], torch.zeros(1), {})
            * weights[a][0]
        ).sum()
        for a in range(V)
    )
    want = torch.autograd.grad(
        -(torch.softmax(torch.tensor(rewards, dtype=torch.float64), 0) * logp).sum(),
        logits,
        retain_graph=True,
    )[0]
    torch.testing.assert_close(torch.autograd.grad(total, logits)[0], want, atol=1e-12, rtol=0)


def test_imitating_oneself_changes_nothing_which_is_why_it_is_refused():
    logits, _, _ = distributions(15)
    pi = torch.softmax(logits.detach(), -1)
    assert expected_gradient(METHODS["sft"], logits, pi, lambda a: {}).abs().max() < 1e-12
    with pytest.raises(BadInput, match="imitating itself"):
        losses.settings("sft", ["prefix=self"])
    losses.settings("rft", ["prefix=self"])  # with an omega it is a policy gradient


def test_reward_is_the_policy_gradient():
    logits, _, _ = distributions()
    pi = torch.softmax(logits.detach(), -1)
    reward = torch.tensor([0.3, -1.0, 2.0, 0.0, 0.7], dtype=torch.float64)
    for name in ("ropd", "grpo", "ropd-paper"):
        method = dataclasses.replace(METHODS[name], reference_kl=0.0)
        got = expected_gradient(
            method,
            logits,
            pi,
            lambda a: {"advantage": reward[a][None], "behaviour_logp": pi[a].log()[None]},
        )
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
    got = expected_gradient(
        method,
        logits,
        pi,
        lambda a: {
            "advantage": torch.zeros(1, dtype=torch.float64),
            "reference_logp": reference[a][None],
        },
    )
    torch.testing.assert_close(
        got, 0.37 * reverse_kl_gradient(logits, reference), atol=1e-12, rtol=0
    )


def test_reference_kl_keeps_its_gradient_after_the_first_update():
    """Samples of pi_old, weighed by pi / pi_old, give the gradient of KL(pi || pi_ref) at the
    pi of now."""
    logits, reference, old = distributions(1)
    method = dataclasses.replace(METHODS["ropd-paper"], reference_kl=0.37)
    got = expected_gradient(
        method,
        logits,
        old.exp(),
        lambda a: {
            "advantage": torch.zeros(1, dtype=torch.float64),
            "reference_logp": reference[a][None],
            "old_logp": old[a][None],
        },
    )
    torch.testing.assert_close(
        got, 0.37 * reverse_kl_gradient(logits, reference), atol=1e-12, rtol=0
    )


@pytest.mark.parametrize("sampler", ["own", "stale"])
def test_the_leash_over_the_whole_support_is_the_exact_kl_whoever_sampled(sampler):
    logits, reference, old = distributions(1)
    method = dataclasses.replace(
        METHODS["stable-opd"], reference_kl=0.37, reference_support="full"
    )
    source = torch.log_softmax(logits.detach(), -1) if sampler == "own" else old
    got = expected_gradient(
        method,
        logits,
        source.exp(),
        lambda a: {
            "behaviour_logp": source[a][None],
            "teacher_logp": source[a][None],
            "reference_support_logp": reference[None],
            "reference_whole": True,
        },
        columns=list(range(V)),
    )
    # a teacher that agrees with the sampler adds nothing
    torch.testing.assert_close(
        got, 0.37 * reverse_kl_gradient(logits, reference), atol=1e-12, rtol=0
    )
    at_start = torch.log_softmax(logits.detach(), -1)
    zero = expected_gradient(
        method,
        logits,
        source.exp(),
        lambda a: {
            "behaviour_logp": source[a][None],
            "teacher_logp": source[a][None],
            "reference_support_logp": at_start[None],
            "reference_whole": True,
        },
        columns=list(range(V)),
    )
    assert zero.abs().max() < 1e-12


def test_offline_distillation_by_enumeration():
    """Without importance weights: the reverse KL's gradient while pi is mu; after that sum_a
    mu(a) clip(log p_T - log pi) grad log pi, Huber's gradient."""
    logits, teacher, mu = distributions(2)
    free, bounded = (
        dataclasses.replace(METHODS["lightning"], advantage_clip=0.0),
        dataclasses.replace(METHODS["lightning"], advantage_clip=0.4),
    )
    pi = torch.log_softmax(logits.detach(), -1)
    got = expected_gradient(
        free,
        logits,
        pi.exp(),
        lambda a: {"teacher_logp": teacher[a][None], "behaviour_logp": pi[a][None]},
    )
    torch.testing.assert_close(got, reverse_kl_gradient(logits, teacher), atol=1e-12, rtol=0)
    logp = torch.log_softmax(logits, -1)
    for method, bound in ((free, math.inf), (bounded, 0.4)):
        got = expected_gradient(
            method,
            logits,
            mu.exp(),
            lambda a: {"teacher_logp": teacher[a][None], "behaviour_logp": mu[a][None]},
        )
        want = torch.autograd.grad(
            -(mu.exp() * (teacher - pi).clamp(-bound, bound) * logp).sum(),
            logits,
            retain_graph=True,
        )[0]
        torch.testing.assert_close(got, want, atol=1e-12, rtol=0)
    assert ((teacher - pi).abs() > 0.4).any(), "the fixture should clip"


def test_offline_distillation_ends_at_the_teacher_from_any_start_with_full_support():
    """2604.13010's ideal case, one state: the sampler that never changes decides the speed, not
    where it ends."""
    for seed in range(3):
        logits, teacher, mu = distributions(seed)
        optimiser = torch.optim.SGD([logits], lr=1.0)
        for _ in range(4000):
            optimiser.zero_grad()
            logp, method = torch.log_softmax(logits, -1), METHODS["lightning"]
            sum(
                mu[a].exp()
                * losses.token_loss(
                    method,
                    logp[a][None, None],
                    torch.zeros(1),
                    {"teacher_logp": teacher[a][None], "behaviour_logp": mu[a][None]},
                )[0]
                for a in range(V)
            ).backward()
            optimiser.step()
        assert (torch.softmax(logits.detach(), -1) - teacher.exp()).abs().max() < 1e-4


def test_a_clip_keeps_a_token_that_the_teacher_rules_out_from_deciding_the_step():
    own = torch.tensor([[-1.0]], dtype=torch.float64, requires_grad=True)
    for bound, pull in ((0.0, 29.0), (10.0, 10.0)):
        method = dataclasses.replace(METHODS["lightning"], advantage_clip=bound)
        loss = losses.token_loss(
            method,
            own,
            torch.zeros(1),
            {
                "teacher_logp": torch.tensor([-30.0], dtype=torch.float64),
                "behaviour_logp": own.detach()[:, 0],
            },
        )[0]
        assert torch.autograd.grad(loss, own)[0].item() == pytest.approx(pull)


def test_entropy_bonus_raises_entropy():
    logits, _, _ = distributions()
    method = dataclasses.replace(METHODS["ropd"], entropy_bonus=0.5)
    pi = torch.softmax(logits.detach(), -1)
    got = expected_gradient(
        method,
        logits,
        pi,
        lambda a: {
            "advantage": torch.zeros(1, dtype=torch.float64),
            "behaviour_logp": pi[a].log()[None],
        },
    )
    logp = torch.log_softmax(logits, -1)
    want = torch.autograd.grad(0.5 * (logp.exp() * logp).sum(), logits)[0]
    torch.testing.assert_close(got, want, atol=1e-12, rtol=0)


def test_tempting_variants_do_not_have_the_gradient_of_the_name_they_carry():
    """Why check() refuses them: k1 as a loss has gradient 0; k3 as an advantage is reverse
    minus forward KL."""
    logits, teacher, _ = distributions()
    pi = torch.softmax(logits.detach(), -1)
    logp = torch.log_softmax(logits, -1)
    k1_loss = torch.autograd.grad((pi * (logp - teacher)).sum(), logits, retain_graph=True)[0]
    assert k1_loss.abs().max() < 1e-12
    k3 = (teacher - logp).exp() - 1 - (teacher - logp)
    k3_advantage = torch.autograd.grad(
        (pi * k3.detach() * logp).sum(), logits, retain_graph=True
    )[0]
    forward = torch.softmax(logits.detach(), -1) - teacher.exp()
    torch.testing.assert_close(
        k3_advantage, reverse_kl_gradient(logits, teacher) - forward, atol=1e-12, rtol=0
    )
    assert (k3_advantage - reverse_kl_gradient(logits, teacher)).abs().max() > 0.05


@pytest.mark.parametrize(
    "row, complaint",
    [
        (Method("self", "teacher", "k3-advantage", "rkl"), "vanishes"),
        (Method("self", "teacher", "k1-loss", "rkl"), "gradient 0"),
        (Method("self", "teacher", "k3", "rkl"), "forward KL under another name"),
        (Method("self", "teacher", "k2-advantage", "rkl"), "no divergence"),
        (Method("self", "teacher", "k1", "fkl"), "descends rkl"),
        (Method("self", "teacher", "full"), "descends rkl or fkl"),
        (Method("self", "reward", "reward", "rkl", advantage="mean"), "descends none"),
        (Method("mixed", "teacher", "full", "rkl"), "student_fraction"),
        (Method("self", "teacher", "full", "rkl", student_fraction=0.5), "student_fraction"),
        (
            Method(
                "mixed", "reward+teacher", "full", "rkl", omega="softmax", student_fraction=0.5
            ),
            "prefix mixed",
        ),
        (
            Method("self", "reward", "reward", advantage="mean", omega="accepted"),
            "omega accepted",
        ),
        (Method("data", "teacher", "full", "fkl", gamma=1.0), "gamma"),
        (Method("self", "teacher", "k1", "rkl", gamma=1.5), "gamma"),
        (Method("self", "teacher", "k1", "rkl", future="mean"), "future"),
        (Method("self", "teacher", "full", "rkl", baseline="kl"), "baseline"),
        (Method("data", "reward", "token", omega="softmax", omega_scale=0.0), "omega_scale"),
        (Method("self", "teacher", "k1", "rkl", teacher_weight=0.5), "teacher_weight"),
        (Method("mixed", "teacher", "full", "rkl", gamma=0.5, student_fraction=0.5), "gamma"),
        (Method("self", "teacher", "full", "rkl", interpolation=0.9), "interpolation"),
        (Method("self", "reward", "reward", advantage="mean", omega_scale=0.5), "omega_scale"),
        (Method("self", "teacher", "full", "rkl", advantage_clip=5.0), "advantage_clip"),
        (
            Method("self", "reward+teacher", "full", "rkl", omega="preference"),
            "omega preference",
        ),
        (Method("self", "reward", "reward", advantage="mean", clip_low=1.5), "below 1"),
        (Method("self", "reward", "reward", advantage="mean", tis_cap=float("nan")), "finite"),
        (Method("self", "reward", "reward", advantage="mean", reference_kl=-0.1), "at least 0"),
        (Method("self", "teacher", "k1", "rkl", tis_cap=2.0), "tis_cap"),
        (Method("self", "teacher", "k1", "rkl", ratio="none"), "ratio none"),
        (Method("self", "teacher", "k2", "rkl", ratio="none", tis_cap=2.0), "ratio none"),
        (
            Method("self", "teacher", "k2", "rkl", ratio="none", reference_kl=0.1),
            "stale samples",
        ),
        (Method("self", "teacher", "k2", "rkl", ratio="sequence"), "ratio sequence"),
        (Method("data", "tokens", "token", gold_weight=0.1), "gold_weight"),
        (Method("self", "teacher", "k1", "rkl", gold_weight=-1.0), "at least 0"),
        (Method("self", "teacher", "k1", "rkl", reference_support="full"), "reference_support"),
        (
            Method("self", "reward", "reward", advantage="mean", consistency="sft"),
            "consistency",
        ),
        (Method("data", "teacher", "k1", "rkl"), "own samples"),
        (Method("data", "reward", "reward", advantage="mean"), "own samples"),
        (Method("self", "tokens", "k1", "rkl"), "signal"),
        (Method("self", "reward", "reward"), "advantage"),
        (Method("self", "teacher", "full", "rkl", clip_low=0.2), "clip_low"),
        (Method("self", "reward", "reward", advantage="std", dual_clip=0.5), "dual_clip"),
        (Method("data", "tokens", "token", reference_kl=0.1), "reference_kl"),
        (Method("self", "teacher", "k1", "rkl", norm="mean"), "norm"),
        (Method("self", "reward", "reward", advantage="mean", clip_high=-0.1), "clip_high"),
    ],
)
def test_rows_that_would_lie_are_refused(row, complaint):
    with pytest.raises(BadInput, match=complaint):
        losses.check(row)


def test_every_row_passes_its_own_check_and_set_changes_one_column():
    for name in METHODS:
        losses.check(METHODS[name])
    changed = losses.settings("ropd", ["clip_high=0.2", "norm=sequence", "advantage=std"])
    assert (changed.clip_high, changed.norm, changed.advantage) == (0.2, "sequence", "std")
    assert (
        dataclasses.replace(changed, clip_high=0.28, norm="token", advantage="mean")
        == METHODS["ropd"]
    )
    for bad in ("beta=1", "clip_high", "clip_high=wide", "norm=both"):
        with pytest.raises(BadInput):
            losses.settings("ropd", [bad])
    with pytest.raises(BadInput, match="expected one of sft"):
        losses.settings("rodp")


# ---- clipping, case by case, by hand


@pytest.mark.parametrize(
    "ratio, advantage, objective, moves",
    [
        # a good token: no reward for going beyond 1.28
        (1.0, 1.0, 1.0, True),
        (1.5, 1.0, 1.28, False),
        (0.5, 1.0, 0.5, True),
        # a bad token: none for going below 0.8
        (1.0, -1.0, -1.0, True),
        (1.5, -1.0, -1.5, True),
        (0.5, -1.0, -0.8, False),
        # dual clip: -3 is the worst it can get
        (4.0, -1.0, -3.0, False),
    ],
)
def test_clip_higher_and_dual_clip(ratio, advantage, objective, moves):
    old = torch.tensor([-2.0], dtype=torch.float64)
    logp = (old + torch.tensor(ratio, dtype=torch.float64).log()).requires_grad_()
    value = losses.clipped_surrogate(
        logp - old, torch.tensor([advantage], dtype=torch.float64), METHODS["ropd"]
    )
    assert value.item() == pytest.approx(-objective)
    assert (torch.autograd.grad(value.sum(), logp)[0].item() != 0) == moves


@pytest.mark.parametrize(
    "side, ratio, advantage, moves",
    [
        ("clip_low", 0.5, -1.0, True),
        ("clip_high", 0.5, -1.0, False),
        ("clip_low", 1.5, 1.0, False),
        ("clip_high", 1.5, 1.0, True),
    ],
)
def test_each_side_of_the_clip_can_be_off_alone(side, ratio, advantage, moves):
    method = dataclasses.replace(METHODS["ropd"], dual_clip=0.0, **{side: 0.0})
    logp = torch.tensor([ratio], dtype=torch.float64).log().requires_grad_()
    value = losses.clipped_surrogate(
        logp, torch.tensor([advantage], dtype=torch.float64), method
    )
    assert (torch.autograd.grad(value.sum(), logp)[0].item() != 0) == moves


def test_truncated_importance_weights_use_the_sampler_gap_and_are_capped():
    own = torch.tensor([[-1.0], [-1.0]], dtype=torch.float64, requires_grad=True)
    old = torch.tensor([-1.0, -1.0], dtype=torch.float64)
    batch = {
        "old_logp": old,
        "behaviour_logp": torch.tensor([-1.5, -9.0], dtype=torch.float64),
        "advantage": torch.ones(2, dtype=torch.float64),
    }
    value = losses.token_loss(METHODS["ropd"], own, torch.zeros(2), batch)
    assert value.tolist() == pytest.approx([-torch.tensor(0.5).exp().item(), -2.0])
    without = losses.token_loss(
        dataclasses.replace(METHODS["ropd"], tis_cap=0.0), own, torch.zeros(2), batch
    )
    assert without.tolist() == pytest.approx([-1.0, -1.0])


# ---- top-k with a tail


def test_top_k_reverse_kl_is_a_true_kl_and_exact_at_full_support():
    logits, teacher, _ = distributions(3)
    logp = torch.log_softmax(logits.detach(), -1)
    full = (logp.exp() * (logp - teacher)).sum()
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
    teacher = torch.log_softmax(
        torch.tensor([5.0, 4.0, 0.0, 0.0, 0.0], dtype=torch.float64), -1
    )
    logits = torch.tensor([0.0, 0.0, 6.0, 0.0, 0.0], dtype=torch.float64, requires_grad=True)
    value = losses.divergence(
        "rkl", torch.log_softmax(logits, -1)[:2][None], teacher[:2][None], whole=False
    )
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
    value = losses.divergence(
        "rkl",
        torch.log_softmax(logits, -1)[None],
        torch.log(torch.full((1, 3), 1 / 3, dtype=torch.float64)),
        True,
    )
    value.sum().backward()
    assert torch.isfinite(value).all() and torch.isfinite(logits.grad).all()


# ---- advantages and normalisers


def test_group_advantages():
    assert losses.group_advantages([1.0, 0.5, 0.0], "mean") == [0.5, 0.0, -0.5]
    std = losses.group_advantages([1.0, 0.5, 0.0], "std")
    assert std == pytest.approx([1.2247, 0.0, -1.2247], abs=1e-4)
    assert sum(std) == pytest.approx(0)
    # no spread, no signal, no division by zero
    assert losses.group_advantages([0.4, 0.4], "std") == [0.0, 0.0]
    assert losses.group_advantages([0.4, None, 1.0], "mean") is None


def test_token_weights_sum_to_one_and_differ_as_named():
    for norm, first, total in (
        ("token", 1 / 5, 1),
        ("sequence", 1 / 2, 1),
        ("batch", 1 / 2, 5 / 2),
        ("sum", 1, 5),
    ):
        weights = losses.token_weights([1, 0, 4], norm)
        assert (
            sum(map(sum, weights)) == pytest.approx(total)
            and weights[1] == []
            and weights[0] == [first]
        )


def test_a_sequence_of_weight_0_leaves_the_normaliser():
    assert losses.token_weights([2, 3, 5], "token", [1.0, 0.0, -2.0]) == [
        [1 / 7] * 2,
        [0.0] * 3,
        [-2 / 7] * 5,
    ]
    assert losses.token_weights([2, 3, 5], "sequence", [1.0, 0.0, 3.0]) == [
        [1 / 4] * 2,
        [0.0] * 3,
        [3 / 10] * 5,
    ]


# ---- explain


@pytest.mark.parametrize("name", [m for m, row in METHODS.items() if not row.scalar])
def test_explain_tells_the_row_and_its_worked_token_is_the_rows_gradient(name):
    text, method = explain(name), METHODS[name]
    assert (
        text.startswith(f"{name}: ")
        and f"prefix={method.prefix}" in text
        and f"coefficient={method.coefficient}" in text
    )
    assert (
        ("--rewards" in text) == method.rewards
        and ("--scores or --teacher" in text or "--scores (methods.simct score" in text)
        == method.teacher
        and ("--reference" in text) == method.reference
    )
    pull = [float(x) for x in re.findall(r"(?:yes|no|maybe) ([+-][0-9.]+)", text)]
    assert len(pull) == 3 and sum(pull) == pytest.approx(0, abs=2e-4), (
        "a pull on logits sums to 0"
    )
    p, q = [0.5, 0.3, 0.2], [0.2, 0.7, 0.1]
    own = [(a == 1) - p[a] for a in range(3)]
    u = [b / a for a, b in zip(p, q)]
    g = {
        "rkl": [math.log(x) for x in u],
        "fkl": u,
        "jsd": [0.5 * math.log(0.5 * x + 0.5) for x in u],
    }.get(method.divergence)
    if method.coefficient in ("full", "unit"):
        c = [a * x for a, x in zip(p, g)]
        want = [c[a] - p[a] * sum(c) for a in range(3)]
    # ranks: 0.5 against 0.7, 0.3 against 0.2, 0.2 against 0.1
    elif method.coefficient == "sorted":
        c = [0.5, -0.3, -0.2]
        want = [c[a] - p[a] * sum(c) for a in range(3)]
    else:
        scale = {
            "token": 1.0,
            "reward": 1.0,
            "k1": math.log(0.7 / 0.3),
            "k2": math.log(0.7 / 0.3),
            "reward+k1": 1 + math.log(0.7 / 0.3),
        }[method.coefficient]
        want = [scale * x for x in own]
    assert pull == pytest.approx(want, abs=1e-4)


def test_the_page_of_methods_lists_every_row_and_quotes_explain_as_it_is():
    readme = (Path(__file__).parent.parent / "docs" / "methods.md").read_text()
    listed = re.findall(
        r"^\| `([a-z][a-z-]*)` \| (\w+) \|[^|]*\|([^|]*)\| (\w+) \|", readme, re.M
    )
    assert [(name, prefix, norm) for name, prefix, _, norm in listed] == [
        (name, method.prefix, method.norm) for name, method in METHODS.items()
    ]
    assert {name for name, _, pull, _ in listed if "reference KL" in pull} == {
        name for name, method in METHODS.items() if method.reference_kl
    }
    assert "\n".join(explain("gkd").splitlines()[-2:]) in readme
