"""What a training step logs: means over its trained tokens, and numbers of its texts.
docs/metrics.md says what to watch."""

import math

import numpy as np
import torch

from opd import loss as losses
from opd.tools import call_use


class StepMetrics:
    """Sums over the micro-batches of a step."""

    def __init__(self):
        self.means = {}
        self.largest = {}

    def add_mean(self, name, values, weights):
        """values, weights: [N] of some tokens; the weights of a whole step sum to 1."""
        self.means[name] = self.means.get(name, 0.0) + float((values * weights).sum())

    def add_largest(self, name, values):
        self.largest[name] = max(self.largest.get(name, 0.0), float(values.abs().max()))

    def add(self, method, numbers, batch, exact, loss):
        """Some tokens' part of everything that is logged: arguments as for token_metrics, and
        their loss [N]."""
        for name, values in token_metrics(method, numbers, batch, exact).items():
            self.add_mean(name, values, batch["share"])
        self.add_mean("train/loss", loss, batch["weight"])
        if "behaviour_logp" in batch:
            logp = numbers.logp.detach()[:, 0]
            old = batch.get("old_logp", logp)
            self.add_largest("rollout/logprob_gap_max", old - batch["behaviour_logp"])
            self.add_largest("policy/ratio_gap_max", torch.expm1(logp - old))

    def result(self):
        """{slash name: number}; the two moments of pi / mu - 1 become its spread and the share
        of effective samples."""
        out = self.means | self.largest
        if "policy/weight_square" in out:
            gap = out.pop("policy/weight_gap")
            square = out.pop("policy/weight_square")
            out["policy/weight_std"] = math.sqrt(max(0.0, square - gap**2))
            out["policy/weight_ess"] = (1 + gap) ** 2 / (1 + 2 * gap + square)
        return out


def token_metrics(method, numbers, batch, exact):
    """{slash name: [N]} whose means are logged.  numbers: kernel.TokenNumbers; batch, exact: as
    for loss.token_loss."""
    logp = numbers.logp.detach()
    out = {"policy/entropy": numbers.entropy.detach()}
    if "behaviour_logp" in batch:
        out |= policy_metrics(method, logp[:, 0], batch)
    if numbers.reverse_kl is not None:
        out["kl/reverse"] = numbers.reverse_kl.detach()
        out["kl/forward"] = numbers.forward_kl.detach()
    if method.own:
        out |= method.own.metrics(logp, batch)
    elif "support_logp" in batch:
        out["kl/teacher_support_mass"] = batch["support_logp"].exp().sum(-1)
    if "reference_logp" in batch:
        out["kl/reference"] = logp[:, 0] - batch["reference_logp"]
    if "reference_support_logp" in batch:
        reference = batch["reference_support_logp"]
        ours = logp[:, -reference.shape[1] :]
        whole = batch["reference_whole"]
        out["kl/reference_exact"] = losses.divergence("rkl", ours, reference, whole)
    if "token_weight" in batch:
        out["weights/mean"] = batch["token_weight"]
        out["weights/kept"] = (batch["token_weight"] > 0).float()
    return out | clip_metrics(method, logp, batch, exact)


def policy_metrics(method, logp, batch):
    """How far the policy is from its start and from the sampler: logp [N]."""
    old = batch.get("old_logp", logp)
    out = {
        # KL(pi_old || pi) from pi_old's samples, k3
        "policy/kl_from_start": (logp - old).exp() - 1 - (logp - old),
        "rollout/logprob_gap_mean": (old - batch["behaviour_logp"]).abs(),
    }
    # one-sample reverse KL of the policy that sampled; single tokens may be negative
    if "teacher_logp" in batch:
        out["kl/teacher"] = batch["behaviour_logp"] - batch["teacher_logp"]
    if method.teacher and not method.rewards:
        # bounded, or a token that mu all but excluded makes the squares infinite
        gap = torch.expm1((logp - batch["behaviour_logp"]).clamp(max=40))
        out["policy/weight_gap"] = gap
        out["policy/weight_square"] = gap**2
    return out


def clip_metrics(method, logp, batch, exact):
    """Where a clip bounds the advantage, or takes the gradient away."""
    out = {}
    own = logp[:, 0]
    kl = None
    if method.baseline == "kl":
        kl = losses.teacher_divergence(method, logp, batch, exact).detach()
    if method.advantage_clip:
        if method.coefficient == "k2":
            advantage = batch["teacher_logp"] - own
        else:
            advantage = losses.teacher_advantage(method, batch, kl)
        beyond = advantage.abs() > method.advantage_clip
        out["policy/advantage_clip_fraction"] = beyond.float()
    if (method.clip_low or method.clip_high) and "behaviour_logp" in batch:
        against = batch["behaviour_logp"]
        if method.advantage != "none":
            against = batch.get("old_logp", own)
        ratio = (own - against).exp()
        high = ratio > 1 + (method.clip_high or math.inf)
        low = ratio < 1 - (method.clip_low or 1)
        good = losses.sampled_advantage(method, batch, kl) > 0
        out["policy/clip_fraction"] = torch.where(good, high, low).float()
    return out


def sequence_metrics(items):
    """Of the texts of a step, as opd.batches.Data.sequences returns them."""
    out = {
        "rollout/length_mean": float(np.mean([s["length"] for s in items])),
        "rollout/length_max": max(s["length"] for s in items),
        "rollout/truncated": float(np.mean([s["truncated"] for s in items])),
        "train/tokens": sum(s["length"] for s in items),
        "train/sequences": len(items),
        "rollout/on_policy_fraction": float(np.mean([s["own"] for s in items])),
    }
    episodes = [s for s in items if "calls" in s]
    if episodes:
        use = call_use([s["calls"] for s in episodes], [s["limited"] for s in episodes])
        out |= {f"rollout/{name}": value for name, value in use.items()}
    if "reward" in items[0]:
        out["reward/mean"] = float(np.mean([s["reward"] for s in items]))
        out["reward/advantage_abs_mean"] = float(np.mean([abs(s["advantage"]) for s in items]))
    # at the last token of every rollout, whether it ended there or was cut
    for name in ("student_end_mass", "teacher_end_mass"):
        if all(name in s for s in items):  # a server, or an older file, does not say
            out[f"rollout/{name}"] = float(np.mean([s[name] for s in items]))
    if "repetitive" in items[0]:
        out["rollout/repetition"] = float(np.mean([s["repetitive"] for s in items]))
        looping = [s for s in items if s["repetitive"]]
        others = [s for s in items if not s["repetitive"]]
        out |= teacher_gap("kl/teacher_repetitive", looping)
        out |= teacher_gap("kl/teacher_other", others)
    return out


def teacher_gap(name, items):
    """{name: mean of log mu - log p_T}; {} without a teacher."""
    gaps = [s["teacher_logp"] - s["behaviour_logp"] for s in items if "teacher_logp" in s]
    return {name: -float(np.concatenate(gaps).mean())} if gaps else {}


def collapsed(metrics, truncated_before):
    """Whether a step's texts show length inflation: at least 5 % are repetitive, or more than
    90 % are cut at their longest, twice in a row."""
    cut = min(truncated_before, metrics["rollout/truncated"])
    return metrics.get("rollout/repetition", 0) >= 0.05 or cut > 0.9
