"""train.py: the gradient is the formula's, whatever the batching, the kernel or where the
teacher is read; a killed run ends in the same bits.  (What may become a step at all:
test_data.py.)  The reference is plain transformers in float64, a sequence at a time."""

import copy
import json
import math
import re
import shutil
import signal
import subprocess
import sys
import time
import types

import numpy as np
import pytest
import torch
import transformers
from conftest import (
    ROOT,
    argv,
    by_key,
    dump,
    load,
    make_rewards,
    naive_logps,
    naive_model,
    program,
    refusal,
    run_program,
    same_bits,
    variant,
    weights,
)
from safetensors.torch import load_file
from test_teacher import edge_rollouts, permuted

import rollout
import teacher
import train
from methods.rows import METHODS
from opd import batches, files, kernel, records
from opd import loss as losses
from opd import policy as policies
from opd import trainer as trainers
from opd.batches import Data, Inputs
from opd.files import read

V, END = 24, 4
FAST = dict(learning_rate=1e-3, batch_size=3)
PLAIN = trainers.TrainerSettings(1e-3, 0.01, 0.999, 0.0, "constant", 0, None, 100)


def row_of(method, overrides=()):
    """The row, and a lower bar where the rewards of the world, drawn from [0, 1], would never
    reach it."""
    bar = ("omega_scale=0.5",) if METHODS[method].omega == "accepted" else ()
    return losses.settings(METHODS, method, overrides or bar)


def changed(world, **paths):
    return types.SimpleNamespace(**vars(world) | paths)


def needs(world, method, overrides=()):
    """The files a row of METHODS reads, as flags."""
    row = row_of(method, overrides)
    flags = dict(method=method, rollouts=world.rollouts)
    if row.rewards:
        flags["rewards"] = world.rewards
    if row.teacher:
        flags["scores"] = as_units(world.scores) if row.own else world.scores
    if row.reference:  # any policy can be the reference; the teacher is a far one
        flags["reference"] = world.scores
    if row.prefix == "mixed":
        flags |= dict(data=world.rollouts, data_scores=world.scores)
    if row.gold_weight:
        flags["data"] = world.prompts  # their solutions
    if row.token_weight != "one":
        flags["token_weights"] = token_weights(
            world.rollouts,
            lambda r, t: (0, 1, 2.5)[(t + 2 * r["sample"] + int(r["id"][1:])) % 3],
        )
    if row.consistency == "sft":  # the world's base model was fine-tuned on nobody's answers
        flags["allow"] = "teacher"
    # the same texts, said to be the teacher's, or those of weights that are gone
    if row.prefix in ("teacher", "old"):
        author = load(world.scores)[0]["policy"]["weights"]
        author = author if row.prefix == "teacher" else "0" * 12
        flags["rollouts"] = written_by(author, world.rollouts)
    return flags


def written_by(author, rollouts):
    """The rollouts, said to be of other weights."""
    rows = [dict(r, policy=r["policy"] | {"weights": author}) for r in load(rollouts)]
    return dump(rollouts.with_suffix(f".{author}.jsonl"), rows)


def as_units(scores):
    """The same scores as a methods.simct score file: every token a unit of its own, all tokens
    candidates."""
    rows = []
    for s in load(scores):
        n, logps = len(s["logprobs"]), records.unpack(s["topk"]["logprobs"])
        units = {
            "units": [[t, t + 1, t, t + 1] for t in range(n)],
            "unit_logprobs": s["logprobs"],
            "unit_logits": s["logprobs"],
            "unit_logz": [0.0] * n,
            "unit_topk": s["topk"],
            "prefixes": records.pack(np.zeros(logps.shape, np.uint8)),
            "bytes": [n, n, n],
            "sorted": records.pack(np.sort(logps)[:, ::-1].copy()),
        }
        rows.append(s | units)
    return dump(scores.with_suffix(".units.jsonl"), rows)


def token_weights(rollouts, weight, name="weights"):
    """A file beside the rollouts with weight(rollout, t) for every response token."""
    rows = [
        {
            "id": r["id"],
            "sample": r["sample"],
            "rollout": records.fingerprint(r),
            "rule": "test",
            "weights": [weight(r, t) for t in range(len(r["response_ids"]))],
        }
        for r in load(rollouts)
    ]
    return dump(rollouts.with_suffix(f".{name}.jsonl"), rows)


def words(world, out, **flags):
    """train.py's command line on the world's base model, by default."""
    flags = needs(world, flags.get("method", "opd")) | flags
    return argv(**dict(model=world.base, out=out, **FAST) | flags)


def run(world, out, **flags):
    return train.main(words(world, out, **flags))


def refused(world, tmp_path, capsys, **flags):
    message = refusal(train.main, words(world, tmp_path / "refused", **flags), capsys)
    assert not (tmp_path / "refused").exists(), (
        "a refusal leaves nothing that looks like a model"
    )
    return message


def moved(a, b):
    """Largest difference between two models' parameters."""
    a, b = weights(a), weights(b)
    return max(float((a[k] - b[k]).abs().max()) for k in a)


def metrics(folder):
    return list(read(folder / "metrics.jsonl", "metrics"))


# ---- one step's gradient


class Recorder:
    """An optimiser that only writes the gradient down."""

    def __init__(self, masters):
        self.masters = masters

    def step(self):
        grads = [torch.zeros_like(m) if m.grad is None else m.grad for m in self.masters]
        self.gradient = torch.cat([g.double().flatten() for g in grads])

    def zero_grad(self):
        for m in self.masters:
            m.grad = None


def flat_gradient(model):
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    return torch.cat([g.flatten() for g in grads])


def gradient(
    world,
    flags,
    micro=8192,
    model=None,
    overrides=(),
    old=None,
    dtype="auto",
    kernel="auto",
    teacher=None,
):
    """train.py's gradient for one step on all rollouts: (one flat float64 vector, the step's
    metrics)."""
    method = row_of(flags["method"], overrides)
    names = ("rollouts", "rewards", "scores", "reference", "token_weights")
    own = Inputs(*[flags.get(name) for name in names])
    policy = policies.load_policy(str(model or world.base), dtype)
    helper = teacher and policies.load_policy(str(teacher))
    data = Data(own, method, policy, helper, allow_stale=model is not None)
    items = data.items(data.groups)
    for item in items if old else ():
        item["old_logp"] = np.asarray(old[item["key"]], np.float32)
    step = train.StepSettings(micro, kernel, flags.get("teacher_top_k"))
    trainer = trainers.Trainer(policy, PLAIN)
    trainer.optimiser = Recorder(trainer.masters)
    given, golden = None, ()
    if method.gold_weight:
        given = Data(Inputs(flags["data"]), METHODS["sft"], policy)
        golden = given.items(data.groups)
    numbers = train.optimise(trainer, data, items, step, given, golden)
    return trainer.optimiser.gradient, numbers


def surrogate(row, own, old, mu, advantage):
    """PPO's clipped objective for one token, case by case, with dual clip and truncated
    importance weights."""
    ratio = torch.exp(own - old)
    value = ratio * advantage
    if row.clip_high and advantage > 0:
        value = torch.clamp(ratio, max=1 + row.clip_high) * advantage
    if row.clip_low and advantage <= 0:
        value = torch.clamp(ratio, min=1 - row.clip_low) * advantage
    if row.dual_clip and advantage < 0 and float(value.detach()) < row.dual_clip * advantage:
        value = torch.zeros_like(value) + row.dual_clip * advantage
    return value * (min(math.exp(old - mu), row.tis_cap) if row.tis_cap else 1.0)


def naive_omegas(row, rewards, log_ratios):
    """omega of a group's answers: rewards and log pi - log pi_ref of the whole answers."""
    best, worst = rewards.index(max(rewards)), rewards.index(min(rewards))
    if row.omega == "accepted":
        return [1.0 if r >= row.omega_scale else 0.0 for r in rewards]
    if row.omega == "softmax":
        e = [math.exp(r / row.omega_scale) for r in rewards]
        return [len(e) * x / sum(e) for x in e]
    if row.omega == "preference":  # a mean over pairs is a sum over pairs * 2 / answers
        h = row.omega_scale * (log_ratios[best] - log_ratios[worst])
        pull = 2 * row.omega_scale / (1 + math.exp(h))
        return [pull * ((i == best) - (i == worst)) for i in range(len(rewards))]
    return [0.0 if row.omega == "informative" and best == worst else 1.0] * len(rewards)


def naive_divergence(row, log_p, log_q):
    p, q, b = log_p.exp(), log_q.exp(), row.interpolation
    m = b * q + (1 - b) * p
    if row.divergence == "rkl":
        return (p * (log_p - log_q)).sum()
    if row.divergence == "fkl":
        return (q * (log_q - log_p)).sum()
    return b * (q * (log_q - m.log())).sum() + (1 - b) * (p * (log_p - m.log())).sum()


def full_table(score):
    """A score's whole distribution, [T, V] in order of ids."""
    ids, logps = (records.unpack(score["topk"][f]) for f in ("ids", "logprobs"))
    full = np.empty((len(ids), V))
    np.put_along_axis(full, ids.astype(int), logps, 1)
    return torch.tensor(full)


def naive_value(row, logp, y, mu, old, score, t, advantage, weight):
    """What one token adds to the objective, without reference: logp [V] of the policy."""
    own, p = logp[y], logp.exp()
    if row.coefficient == "token":
        return own
    theirs = full_table(score)[t] if score and "topk" in score else None
    if row.coefficient == "own" and not hasattr(row.own, "span"):
        ranks = p.sort(descending=True).values - theirs.exp().sort(descending=True).values
        return -ranks.abs().sum()
    if row.coefficient in ("full", "own"):  # units of one token: the ordinary divergence
        return -naive_divergence(row, logp, theirs)
    if row.coefficient == "k2":
        d = score["logprobs"][t] - own
        ratio = 1.0 if row.ratio == "none" else math.exp(float(own.detach()) - mu)
        clip, size = row.advantage_clip, float(d.detach())
        if clip and abs(size) > clip:  # the clipped advantage, held constant
            return min(ratio, row.tis_cap or math.inf) * math.copysign(clip, size) * own
        return -min(ratio, row.tis_cap or math.inf) * d * d / 2
    if row.coefficient == "reward":
        return surrogate(row, own, old, mu, advantage)
    pull = score["logprobs"][t] - mu
    if row.baseline == "kl":
        pull += float((p * (logp - theirs)).sum().detach())
    if row.advantage_clip:
        pull = max(-row.advantage_clip, min(row.advantage_clip, pull))
    if row.token_weight == "teacher":
        pull *= weight
    if row.coefficient == "k1":
        return surrogate(row, own, mu, mu, pull)
    return surrogate(row, own, old, mu, advantage + row.teacher_weight * pull)


def naive_reference(row, logp, y, old, score, t):
    """What the reference takes from one token's objective."""
    if row.reference_support == "full":
        return row.reference_kl * (logp.exp() * (logp - full_table(score)[t])).sum()
    own = logp[y]  # the gradient of k2 = d^2 / 2 is d grad log pi
    d = float(own.detach() - score["logprobs"][t])
    return row.reference_kl * math.exp(float(own.detach()) - old) * d * own


def naive_gradient(
    model,
    row,
    rollouts,
    rewards=None,
    scores=None,
    reference=None,
    old=None,
    temperature=1.0,
    token_weights=None,
    gold=(),
):
    """The same step from the formula in opd/loss.py's docstring: full logits, float64, one
    unpadded sequence at a time."""
    model = copy.deepcopy(model)
    rollouts = by_key(rollouts)
    tables, trained, groups = {}, {}, {}
    for key, r in rollouts.items():
        tables[key] = naive_logps(model, r["prompt_ids"], r["response_ids"], temperature)
        trained[key] = [t for t, m in enumerate(r["loss_mask"]) if m]
        groups.setdefault(key[0], []).append(key)
    omegas = dict.fromkeys(rollouts, 1.0)
    for keys in groups.values() if row.rewards else ():
        ratios = []
        for k in keys if row.reference else ():
            ids = rollouts[k]["response_ids"]
            own = [float(tables[k][t, ids[t]].detach()) for t in trained[k]]
            ratios.append(sum(own) - sum(reference[k]["logprobs"][t] for t in trained[k]))
        group = naive_omegas(row, [rewards[k]["reward"] for k in keys], ratios)
        if row.omega == "preference" and not all(
            trained[k] for k, omega in zip(keys, group) if omega
        ):
            group = [0.0] * len(keys)
        omegas.update(zip(keys, group))
    kept = [key for key in rollouts if trained[key] and omegas[key]]
    tokens = sum(len(trained[key]) for key in kept)
    total = 0.0
    for key in kept:
        r, n = rollouts[key], len(trained[key])
        norm = {"token": tokens, "sequence": len(kept) * n, "batch": len(kept)}[row.norm]
        advantage = 0.0
        if row.advantage != "none":
            group = [rewards[k]["reward"] for k in groups[key[0]]]
            advantage = rewards[key]["reward"] - np.mean(group)
            advantage /= np.std(group) + 1e-6 if row.advantage == "std" else 1.0
        for place, t in enumerate(trained[key]):
            logp, y, mu = tables[key][t], r["response_ids"][t], r["logprobs"][t]
            before = float(logp[y].detach()) if old is None else old[key][place]
            weight = token_weights[key]["weights"][t] if token_weights else 1.0
            score = scores and scores[key]
            value = naive_value(row, logp, y, mu, before, score, t, advantage, weight)
            if row.token_weight == "file":
                value = value * weight
            if row.reference_kl:
                value = value - naive_reference(row, logp, y, before, reference[key], t)
            total = total - omegas[key] * value / norm
    for prompt, response in gold:
        table = naive_logps(model, prompt, response)
        own = table[torch.arange(len(response)), torch.tensor(response)]
        total = total - row.gold_weight * own.sum() / sum(len(r) for _, r in gold)
    total.backward()
    return flat_gradient(model)


def same_gradient(got, want, tolerance):
    """|got - want| <= tolerance |want|."""
    assert float(want.norm()) > 1e-3, "the reference gradient should not be empty"
    assert float((got - want).norm() / want.norm()) < tolerance


@pytest.fixture(scope="module")
def masked(world, tmp_path_factory):
    """The world with holes in the loss masks: some tokens, the beginning of one answer, all of
    two answers."""
    rng = np.random.default_rng(0)
    rows = load(world.rollouts)
    for i, r in enumerate(rows):
        if i % 3 == 0:
            r["loss_mask"] = [int(rng.random() < 0.7) for _ in r["loss_mask"]]
        if i in (5, 11):
            r["loss_mask"] = [0] * len(r["loss_mask"])
    assert len({len(r["prompt_ids"]) for r in rows}) > 2
    assert len({sum(r["loss_mask"]) for r in rows}) > 8
    path = dump(tmp_path_factory.mktemp("masked") / "rollouts.jsonl", rows)
    return changed(world, rollouts=path)


def tables(world, flags):
    """What naive_gradient reads beside the rollouts."""
    out = dict(rewards=by_key(load(world.rewards)), scores=by_key(load(world.scores)))
    out["reference"] = out["scores"]
    if "token_weights" in flags:
        out["token_weights"] = by_key(load(flags["token_weights"]))
    if flags.get("data") == world.prompts:  # golden answers to the prompts that were rolled out
        tokenizer = policies.load_tokenizer(str(world.base))
        asked = {r["id"] for r in load(world.rollouts)}
        out["gold"] = [
            (policies.render(tokenizer, p), tokenizer(p["solution"])["input_ids"] + [END])
            for p in load(world.prompts)
            if p["id"] in asked
        ]
    return out


ROWS = [(m, ()) for m in METHODS] + [
    ("opd", ("norm=sequence", "clip_low=0.2", "clip_high=0.2")),
    ("ropd", ("reference_kl=0.5", "norm=sequence")),
    ("opd", ("coefficient=k2", "norm=batch")),
    ("opd", ("baseline=kl", "advantage_clip=0.3")),
    ("gkd", ("interpolation=0.9",)),
    ("opd-grpo", ("teacher_weight=0.3", "baseline=kl")),
    ("dpo", ("prefix=self", "omega_scale=0.7")),
    ("lightning", ("advantage_clip=0.3", "norm=token")),
    ("lightning", ("ratio=token", "tis_cap=1.1", "advantage_clip=0")),
    ("stable-opd", ("reference_support=full", "gold_weight=0", "reference_kl=0.5")),
    ("opd-full", ("token_weight=file",)),
    ("opd-full", ("prefix=data",)),
]


@pytest.mark.parametrize("method, overrides", ROWS)
def test_the_first_step_has_the_gradient_of_the_formula(masked, base64bit, method, overrides):
    """Every row of METHODS: relative error of the whole gradient below 2e-5 (float32 against
    float64)."""
    flags, row = needs(masked, method, overrides), row_of(method, overrides)
    got, _ = gradient(masked, flags, overrides=overrides)
    want = naive_gradient(base64bit, row, load(masked.rollouts), **tables(masked, flags))
    same_gradient(got, want, 2e-5)


@pytest.mark.parametrize(
    "method", [m for m, row in METHODS.items() if row.coefficient in losses.SURROGATE]
)
def test_later_steps_weigh_by_the_importance_ratio(masked, drifted, method):
    """After an update: ratios, clips and truncated importance weights against log-probs
    recorded before it."""
    rng, old, rows = np.random.default_rng(1), {}, load(masked.rollouts)
    for r in rows:
        noisy = np.array(r["logprobs"]) + rng.normal(0, 0.5, len(r["logprobs"]))
        old[r["id"], r["sample"]] = [min(x, 0.0) for x, m in zip(noisy, r["loss_mask"]) if m]
    flags = needs(masked, method)
    got, numbers = gradient(masked, flags, model=drifted, old=old)
    known = tables(masked, flags)
    want = naive_gradient(naive_model(drifted), row_of(method), rows, old=old, **known)
    same_gradient(got, want, 1e-4)
    if METHODS[method].clip_low:
        assert numbers["policy/clip_fraction"] > 0.05, "the fixture should clip"


def test_without_its_two_terms_stable_opd_is_clipped_opd_bit_for_bit(world, tmp_path):
    common = dict(model=world.base, rollouts=world.rollouts, scores=world.scores, **FAST)
    for method, sets in (
        ("stable-opd", ("reference_kl=0", "gold_weight=0")),
        ("opd", ("clip_low=0.2", "clip_high=0.2")),
    ):
        more = [word for text in sets for word in ("--set", text)]
        train.main([*argv(method=method, out=tmp_path / method, **common), *more])
    assert same_bits(weights(tmp_path / "stable-opd"), weights(tmp_path / "opd"))


def test_token_weights_of_one_are_plain_opd_and_zeros_keep_the_normaliser(world, tmp_path):
    ones = token_weights(world.rollouts, lambda r, t: 1, "ones")
    run(world, tmp_path / "a", method="release", token_weights=ones)
    run(world, tmp_path / "b", method="opd")
    assert same_bits(weights(tmp_path / "a"), weights(tmp_path / "b"))
    whole, _ = gradient(world, needs(world, "opd"))
    parts, kept = 0.0, []
    for name, inside in (("early", lambda t: t < 3), ("late", lambda t: t >= 3)):
        path = token_weights(world.rollouts, lambda r, t: int(inside(t)), name)
        part, numbers = gradient(world, needs(world, "release") | {"token_weights": path})
        parts = parts + part
        kept.append(numbers["weights/kept"])
    # were masked tokens to leave the normaliser, the parts would not add up
    same_gradient(parts, whole, 1e-5)
    lengths = [len(r["response_ids"]) for r in load(world.rollouts)]
    early = sum(min(3, n) for n in lengths) / sum(lengths)
    assert kept == pytest.approx([early, 1 - early], abs=1e-5)


def test_golden_answers_have_a_mean_of_their_own_and_never_meet_the_teacher(world, tmp_path):
    """Gradient of stable-opd = clipped OPD's + weight x that of imitating the solutions,
    whatever the number of rollouts."""
    overrides = ("reference_kl=0", "gold_weight=0.7")
    both, numbers = gradient(world, needs(world, "stable-opd", overrides), overrides=overrides)
    alone, _ = gradient(world, needs(world, "opd"), overrides=("clip_low=0.2", "clip_high=0.2"))
    asked = {r["id"] for r in load(world.rollouts)}
    prompts = [p for p in load(world.prompts) if p["id"] in asked]
    path = dump(tmp_path / "gold.jsonl", prompts)
    gold, imitation = gradient(world, dict(method="sft", rollouts=path))
    same_gradient(both, alone + 0.7 * gold, 1e-5)
    assert numbers["gold/nll"] == pytest.approx(imitation["train/loss"], rel=1e-5)


def test_offline_and_online_have_one_gradient_at_the_first_step_and_no_weights_later(
    world, drifted
):
    """Lightning on fresh rollouts is OPD; on stale ones it is the least-squares regression onto
    the teacher's numbers (2604.13010 section 3)."""
    overrides = ("norm=token", "advantage_clip=0")
    flags = needs(world, "lightning", overrides)
    offline, _ = gradient(world, flags, overrides=overrides)
    online, _ = gradient(world, needs(world, "opd"))
    same_gradient(offline, online, 1e-4)
    stale, numbers = gradient(world, flags, overrides=overrides, model=drifted)
    model, scores, rollouts = naive_model(drifted), by_key(load(world.scores)), []
    total, ratios = 0.0, []
    for r in load(world.rollouts):
        ids, n = r["response_ids"], len(r["response_ids"])
        own = naive_logps(model, r["prompt_ids"], ids)[torch.arange(n), torch.tensor(ids)]
        wanted = torch.tensor(scores[r["id"], r["sample"]]["logprobs"])
        total = total + 0.5 * ((wanted - own) ** 2).sum()
        ratios.append(np.exp(own.detach().numpy() - r["logprobs"]))
        rollouts.append(n)
    (total / sum(rollouts)).backward()
    same_gradient(stale, flat_gradient(model), 1e-4)
    x = np.concatenate(ratios)
    assert numbers["policy/weight_std"] == pytest.approx(x.std(), rel=1e-3)
    assert numbers["policy/weight_ess"] == pytest.approx(
        x.mean() ** 2 / (x**2).mean(), rel=1e-3
    )


def test_rollouts_at_another_temperature_train_that_distribution(world, base64bit, tmp_path):
    path, rewards = tmp_path / "r.jsonl", tmp_path / "w.jsonl"
    flags = dict(slice=":3", n=3, max_tokens=20, temperature=0.7)
    rollout.main(argv(model=world.base, prompts=world.prompts, out=path, **flags))
    make_rewards(path, rewards)
    got, numbers = gradient(world, dict(method="grpo", rollouts=path, rewards=rewards))
    rows, table = load(path), by_key(load(rewards))
    want = naive_gradient(base64bit, METHODS["grpo"], rows, table, temperature=0.7)
    same_gradient(got, want, 2e-5)
    assert numbers["rollout/logprob_gap_max"] < 2e-5
    lie = dump(tmp_path / "lie.jsonl", [dict(r, temperature=1.0) for r in rows])
    _, numbers = gradient(world, dict(method="grpo", rollouts=lie, rewards=rewards))
    assert numbers["rollout/logprob_gap_mean"] > 0.05, "a lie shows in the gap"


# ---- kernels, a teacher in memory


@pytest.mark.parametrize("method, overrides", ROWS)
def test_slices_recomputing_and_naive_logits_give_one_gradient(
    masked, monkeypatch, method, overrides
):
    """The three-product form in slices of 5 tokens, the recomputing form, and plain autograd on
    all logits; metrics too."""
    flags, separable = needs(masked, method, overrides), row_of(method, overrides).separable
    plain, plain_numbers = gradient(masked, flags, overrides=overrides, kernel="naive")
    forms = {}
    for form in ("slices", "recomputed"):
        calls = []

        def slices(*a, **k):
            calls.append("slices")
            return kernel.linear_token_loss(*a, rows=5, **k)

        def recomputed(*a, **k):
            calls.extend(["recomputed"] * torch.is_grad_enabled())
            return kernel.token_numbers(*a, **k)

        with monkeypatch.context() as patch:
            patch.setattr(losses.Method, "separable", separable and form == "slices")
            patch.setattr(train, "linear_token_loss", slices)
            patch.setattr(train, "token_numbers", recomputed)
            forms[form], numbers = gradient(masked, flags, overrides=overrides)
        assert set(calls) == {form if separable else "recomputed"}
        same_gradient(forms[form], plain, 1e-5)
        assert numbers == pytest.approx(plain_numbers, rel=1e-4, abs=1e-5)
    same_gradient(forms["slices"], forms["recomputed"], 2e-6)


@pytest.fixture(scope="module")
def wide_teacher(world, tmp_path_factory):
    """A teacher of another width and with 8 more rows in its head, all far likelier than any
    token."""
    torch.manual_seed(5)
    config = transformers.LlamaConfig(
        vocab_size=V + 8,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        tie_word_embeddings=False,
        eos_token_id=END,
    )
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        model.lm_head.weight.mul_(30)
        model.lm_head.weight[V:].mul_(20)
    return variant(world.base, tmp_path_factory.mktemp("wide") / "m", model=lambda _: model)


@pytest.mark.parametrize(
    "method, overrides, k, wide",
    [
        *[(m, (), k, False) for m in ("gkd", "opd-full", "dagger") for k in (V, 5)],
        *[("opd", ("baseline=kl",), k, False) for k in (V, 5)],
        *[(m, (), None, wide) for m in ("opd", "opd-full") for wide in (False, True)],
    ],
)
def test_a_teacher_in_memory_gives_the_gradient_of_its_scores_on_disk(
    masked, wide_teacher, tmp_path, method, overrides, k, wide
):
    """Its k likeliest tokens, or (None) its whole vocabulary."""
    folder, scores = wide_teacher if wide else masked.teacher, tmp_path / "scores.jsonl"
    teacher.main(
        argv("score", model=folder, rollouts=masked.rollouts, out=scores, top_k=k or V)
    )
    flags = needs(changed(masked, scores=scores), method, overrides)
    disk, disk_numbers = gradient(masked, flags, overrides=overrides)
    flags |= dict(scores=None, teacher_top_k=k)
    memory, numbers = gradient(masked, flags, teacher=folder, overrides=overrides)
    same_gradient(memory, disk, 1e-5)
    for name in ("train/loss", "kl/teacher", "policy/entropy"):
        assert numbers[name] == pytest.approx(disk_numbers[name], rel=1e-4)


def test_a_teacher_that_is_the_student_moves_nothing(world):
    flags = dict(method="opd-full", rollouts=world.rollouts)
    got, numbers = gradient(world, flags, teacher=world.base)
    assert numbers["train/loss"] == 0 and float(got.abs().max()) == 0  # to the bit


def test_a_teacher_in_memory_trains_and_is_remembered(world, tmp_path, capsys):
    flags = dict(method="opd-full", scores=None, teacher=world.teacher, steps=2)
    summary = run(world, tmp_path / "m", **flags)
    assert summary["steps"] == 2 and moved(world.base, tmp_path / "m") > 0
    assert all("kl/teacher" in m and "kl/reverse" in m for m in metrics(tmp_path / "m"))
    assert run(world, tmp_path / "m", **flags) == summary, "complete already"
    other = words(world, tmp_path / "m", **flags | dict(teacher=world.base))
    assert "another training run" in refusal(train.main, other, capsys)


def test_a_kernel_that_cannot_do_it_is_refused(world, tmp_path, capsys, monkeypatch):
    flags = dict(method="opd-full", kernel="triton")
    message = refused(world, tmp_path, capsys, **flags, scores=None, teacher=world.teacher)
    assert "--teacher" in message
    monkeypatch.setattr(train, "find_spec", lambda name: None)
    assert "pip install triton" in refused(world, tmp_path, capsys, **flags)


def test_teachers_that_read_other_tokens_are_refused(world, tmp_path, capsys):
    flags = dict(method="opd-full", scores=None)
    foreign = variant(world.teacher, tmp_path / "permuted", permuted)
    message = refused(world, tmp_path, capsys, **flags, teacher=foreign)
    assert "--teacher" in message and "token ids mean different things" in message
    other = variant(
        world.teacher,
        tmp_path / "template",
        lambda t: setattr(t, "chat_template", t.chat_template + " "),
    )
    assert "--allow template" in refused(world, tmp_path, capsys, **flags, teacher=other)
    assert run(world, tmp_path / "m", **flags, teacher=other, allow="template")["steps"] > 0
    both = dict(method="opd-full", teacher=world.teacher)
    assert "give one of them" in refused(world, tmp_path, capsys, **both)
    message = refused(world, tmp_path, capsys, method="ropd", teacher=world.teacher)
    assert "does not read it" in message


# ---- batching, masks


@pytest.mark.parametrize("method", METHODS)
def test_micro_batches_do_not_change_the_gradient(masked, method):
    """One row, a few rows or all rows in a forward pass: relative difference below 1e-5; means
    of means would be off by far."""
    whole, numbers = gradient(masked, needs(masked, method), micro=10**6)
    for micro in (1, 90):
        part, other = gradient(masked, needs(masked, method), micro=micro)
        same_gradient(part, whole, 1e-5)
        assert other == pytest.approx(numbers, rel=1e-4, abs=1e-6), "the metrics neither"


@pytest.mark.parametrize("method", METHODS)
def test_a_fully_masked_answer_contributes_nothing(masked, tmp_path, method):
    """Its tokens may be anything, and without a group baseline that counts its reward it may as
    well not be there."""
    whole, numbers = gradient(masked, needs(masked, method))
    filtered = METHODS[method].omega in ("accepted", "preference")
    assert numbers["train/sequences"] == 30 or filtered
    rows, scores = load(masked.rollouts), by_key(load(masked.scores))
    for r in rows:
        if not sum(r["loss_mask"]):
            s, n = scores[r["id"], r["sample"]], 3
            r.update(response_ids=[9] * n, logprobs=[-7.0] * n, loss_mask=[0] * n)
            topk = {f: records.pack(records.unpack(s["topk"][f])[:n]) for f in s["topk"]}
            s.update(rollout=records.fingerprint(r), logprobs=[-9.0] * n, topk=topk)
    path = dump(tmp_path / "r.jsonl", rows)
    other = changed(
        masked,
        rollouts=path,
        scores=dump(tmp_path / "s.jsonl", scores.values()),
        rewards=make_rewards(path, tmp_path / "w.jsonl"),
    )
    same_gradient(gradient(other, needs(other, method))[0], whole, 1e-5)
    if not METHODS[method].rewards:
        trained = [r for r in rows if sum(r["loss_mask"])]
        without = changed(masked, rollouts=dump(tmp_path / "without.jsonl", trained))
        same_gradient(gradient(without, needs(without, method))[0], whole, 1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_masked_positions_may_hold_anything(world, tmp_path, method):
    """Log-probs under a masked token are never read; ids after the last trained token
    neither."""
    clean, wild, scores = load(world.rollouts), load(world.rollouts), load(world.scores)
    place = {(s["id"], s["sample"]): s for s in scores}
    for a, b in zip(clean, wild):
        n = len(a["response_ids"])
        tail = list(range(n - n // 3, n))
        hidden = [0] * (n > 2) + tail  # the first token, and everything in the last third
        a["loss_mask"] = b["loss_mask"] = [int(t not in hidden) for t in range(n)]
        s = place[b["id"], b["sample"]]
        top = records.unpack(s["topk"]["logprobs"])
        for t in hidden:
            b["logprobs"][t] = s["logprobs"][t] = -1e30
            top[t] = np.nan
        for t in tail:
            b["response_ids"][t] = (b["response_ids"][t] + 1) % V
        s["rollout"], s["topk"]["logprobs"] = records.fingerprint(b), records.pack(top)
    a = changed(world, rollouts=dump(tmp_path / "a.jsonl", clean))
    path = dump(tmp_path / "b.jsonl", wild)
    b = changed(
        world,
        rollouts=path,
        scores=dump(tmp_path / "s.jsonl", scores),
        rewards=make_rewards(path, tmp_path / "w.jsonl"),
    )
    first, second = gradient(a, needs(a, method))[0], gradient(b, needs(b, method))[0]
    assert torch.isfinite(second).all()
    same_gradient(second, first, 1e-6)


def test_one_token_and_empty_answers_train(world, base64bit, tmp_path):
    path, scores = edge_rollouts(world, tmp_path / "r.jsonl", base64bit), tmp_path / "s.jsonl"
    teacher.main(argv("score", model=world.teacher, rollouts=path, out=scores, top_k=V))
    rewards = make_rewards(path, tmp_path / "w.jsonl")
    world = changed(world, rollouts=path, scores=scores, rewards=rewards)
    # the others leave groups of one answer out
    for method in (m for m, row in METHODS.items() if row.omega in ("one", "softmax")):
        flags = needs(world, method)
        got, numbers = gradient(world, flags)
        tokens = 1 + len(load(path)[2]["response_ids"])
        assert (numbers["train/sequences"], numbers["train/tokens"]) == (2, tokens)
        if METHODS[method].coefficient != "reward" or METHODS[method].advantage != "std":
            known = tables(world, flags)
            want = naive_gradient(base64bit, METHODS[method], load(path), **known)
            same_gradient(got, want, 2e-5)
    # and the whole stage, with log-probs of the starting weights
    run(world, tmp_path / "m", epochs=2)
    assert len(metrics(tmp_path / "m")) == 2


def test_a_bfloat16_model_accumulates_micro_batches_in_float32(world, tmp_path):
    """Summed in bfloat16 (8 bits), the gradients of 512 micro-batches lose what is small
    against the running sum."""
    rows = [dict(r, id=f"{r['id']}-{i}") for i in range(16) for r in load(world.rollouts)]
    flags = dict(method="sft", rollouts=dump(tmp_path / "r.jsonl", rows))
    exact, _ = gradient(world, flags)
    error = []
    for micro in (300, 1):
        part, _ = gradient(world, flags, micro=micro, dtype="bfloat16")
        error.append(float((part - exact).norm() / exact.norm()))
    assert error[0] < 0.05 and error[1] < 1.5 * error[0], error


# ---- signals that must be zero


def test_a_student_that_is_its_own_teacher_learns_nothing(world, tmp_path):
    """opd-full: loss below 1e-6, gradient below 1e-5 of that of another teacher.  opd:
    advantages within the noise floor."""
    scores = tmp_path / "s.jsonl"
    teacher.main(argv("score", model=world.base, rollouts=world.rollouts, out=scores, top_k=V))
    for method, bound in (("opd-full", 1e-5), ("opd", 1e-3)):
        same, same_numbers = gradient(world, needs(world, method) | dict(scores=scores))
        other, other_numbers = gradient(world, needs(world, method))
        assert float(same.norm()) < bound * float(other.norm())
        assert abs(same_numbers["train/loss"]) < 1e-5 < abs(other_numbers["train/loss"])
        assert abs(same_numbers["kl/teacher"]) < 1e-5 and other_numbers["kl/teacher"] > 0.05
    table = by_key(load(scores))
    for r in load(world.rollouts):
        gaps = np.subtract(table[r["id"], r["sample"]]["logprobs"], r["logprobs"])
        assert np.abs(gaps).max() < 2e-5


def test_top_k_support_is_between_nothing_and_everything(world, tmp_path):
    """More support, more of the loss: the lumped divergence never exceeds the full one and
    reaches it at K = V."""
    values = []
    for k in (1, 4, V - 1, V):
        out = tmp_path / f"{k}.jsonl"
        flags = argv("score", model=world.teacher, rollouts=world.rollouts, out=out, top_k=k)
        teacher.main(flags)
        _, numbers = gradient(world, needs(world, "opd-full") | dict(scores=out))
        values.append(numbers["train/loss"])
    assert 0 < values[0] < values[1] < values[2] <= values[3] + 1e-5
    assert values[2] == pytest.approx(values[3], abs=1e-4)


# ---- rounds


def one_group(world, path):
    """One prompt's rollouts: every optimiser step walks the very same batch in the very same
    order."""
    return dump(path, [r for r in load(world.rollouts) if r["id"] == "t00003"])


def test_the_next_round_continues_the_optimiser_and_the_step_count(world, tmp_path):
    """2 + 2 steps on one fixed batch are 4 steps, to the bit: moments, bias correction, warm-up
    and decay all continue.  (Imitation, which has no importance ratio that starts anew.)"""
    flags = dict(
        method="sft",
        rollouts=one_group(world, tmp_path / "r.jsonl"),
        warmup_steps=3,
        schedule="linear",
        total_steps=6,
        learning_rate=1e-3,
    )

    def go(model, out, **more):
        return train.main(argv(model=model, out=tmp_path / out, **flags | more))

    def rates(*folders):
        rows = [m for folder in folders for m in metrics(tmp_path / folder)]
        return [m["train/learning_rate"] for m in rows]

    assert go(world.base, "four", steps=4, fresh_optimizer=True)["step"] == 4
    assert go(world.base, "two", steps=2, fresh_optimizer=True)["step"] == 2
    second = go(tmp_path / "two", "two_two", steps=2)
    assert second["step"] == 4 and second["steps"] == 2
    assert same_bits(weights(tmp_path / "four"), weights(tmp_path / "two_two"))
    assert [m["step"] for m in metrics(tmp_path / "two_two")] == [3, 4]
    assert rates("two", "two_two") == pytest.approx([1e-3 / 3, 2e-3 / 3, 1e-3, 1e-3], rel=1e-9)
    tokens = [metrics(tmp_path / f)[-1]["train/tokens_total"] for f in ("two_two", "four")]
    assert tokens[0] == tokens[1]
    # the decay: steps 4, 5 of 3 + 3, and 0 at the end
    assert go(tmp_path / "two_two", "third", steps=3)["step"] == 7
    assert rates("third") == pytest.approx([1e-3 * 2 / 3, 1e-3 / 3, 0], abs=1e-12)
    fresh = go(tmp_path / "two", "fresh", steps=2, fresh_optimizer=True)
    assert fresh["step"] == 2 and moved(tmp_path / "fresh", tmp_path / "two_two") > 1e-5


def test_the_optimiser_is_adamw(world, tmp_path):
    """Three steps against torch's own AdamW driven by the naive gradient: no hidden scaling, no
    lost moment."""
    path = one_group(world, tmp_path / "r.jsonl")
    flags = dict(method="sft", rollouts=path, steps=3, grad_clip=0.5, weight_decay=0.1)
    run(world, tmp_path / "m", **flags, adam_beta2=0.95, fresh_optimizer=True)
    model = naive_model(world.base)
    parameters = list(model.parameters())
    optimiser = torch.optim.AdamW(parameters, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
    for step in range(3):
        flat = naive_gradient(model, METHODS["sft"], load(path))
        norm = float(flat.norm())
        logged = metrics(tmp_path / "m")[step]["train/grad_norm"]
        assert logged == pytest.approx(norm, rel=1e-4) and norm > 0.5
        clipped = (0.5 / norm * flat).split([p.numel() for p in parameters])
        for p, g in zip(parameters, clipped):
            p.grad = g.view_as(p)
        optimiser.step()
    want, start, got = model.state_dict(), weights(world.base), weights(tmp_path / "m")
    error = sum(float(((got[k] - want[k]) ** 2).sum()) for k in got) ** 0.5
    length = sum(float(((start[k] - want[k]) ** 2).sum()) for k in got) ** 0.5
    # entries whose gradient is nearly zero divide noise by noise in AdamW
    assert error < 0.01 * length


def test_another_method_does_not_inherit_the_moments(world, tmp_path):
    summary = run(world, tmp_path / "m")
    assert (world.base / "metrics.jsonl").exists() and summary["step"] == summary["steps"] == 3


def test_on_policy_rounds_chain_through_rollouts(world, tmp_path):
    """The loop of an experiment: sample with the new weights, score, train; yesterday's
    rollouts are refused."""
    model, step = world.base, 0
    for number in range(2):
        at = tmp_path / str(number)
        part = dict(slice=f"{4 * number}:{4 * number + 4}", n=3, max_tokens=20, seed=number)
        path, scores = at / "r.jsonl", at / "s.jsonl"
        rollout.main(argv(model=model, prompts=world.prompts, out=path, **part))
        teacher.main(argv("score", model=world.teacher, rollouts=path, out=scores))
        flags = dict(method="opd", rollouts=path, scores=scores)
        flags |= dict(learning_rate=1e-3, batch_size=2)
        step = train.main(argv(model=model, out=at / "m", **flags))["step"]
        model = at / "m"
        rows = metrics(model)
        # the log-probs of the starting weights, also in later steps
        assert max(m["rollout/logprob_gap_mean"] for m in rows) < 2e-5
        assert rows[0]["policy/kl_from_start"] < 1e-6 < rows[1]["policy/kl_from_start"]
    assert step == 4
    with pytest.raises(records.BadInput, match="policy.weights"):
        train.main(argv(model=model, out=tmp_path / "stale", **flags))


# ---- resume


RESUME = dict(method="ropd", epochs=3, save_every=1, batch_size=2, learning_rate=1e-3)


@pytest.fixture(scope="module")
def uninterrupted(world, tmp_path_factory):
    out = tmp_path_factory.mktemp("uninterrupted") / "m"
    run(world, out, **RESUME)
    return out


def same_run(out, uninterrupted):
    assert same_bits(weights(out), weights(uninterrupted))
    mine, whole = metrics(out), metrics(uninterrupted)
    assert [m["step"] for m in mine] == list(range(1, len(whole) + 1)), "each step once"
    assert mine == whole
    a, b = (
        {p.relative_to(f): load_file(p) for p in f.rglob("*.safetensors")}
        for f in (out, uninterrupted)
    )
    assert a.keys() == b.keys(), "moments too"
    assert all(same_bits(a[name], b[name]) for name in a)
    assert not out.with_name(out.name + ".partial").exists()


def test_killed_by_the_machine_and_run_again_ends_in_the_same_bits(
    world, uninterrupted, tmp_path
):
    flags = words(world, tmp_path / "m", **RESUME)
    log = tmp_path / "m.partial" / "metrics.jsonl"
    quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    process = subprocess.Popen(program("train.py", flags), cwd=ROOT, **quiet)
    deadline = time.time() + 100
    while process.poll() is None and time.time() < deadline:
        if log.exists() and log.read_bytes().count(b"\n") >= 3:
            break
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -9, "the run ended before it could be killed"
    assert not (tmp_path / "m").exists()
    train.main(flags)
    same_run(tmp_path / "m", uninterrupted)


class Killed(BaseException):
    """Stands in for a kill at one exact place: nothing in the stage catches it."""


PLACES = {  # what dies: function, on the n-th call (from 0) whose first argument ends like this
    "before the log line": (files, "append_whole", 3, ""),
    "model half written": (trainers, "save_file", 3, ""),
    "model written, LATEST still old": (files, "write_atomically", 3, "LATEST"),
    "LATEST new, old checkpoint still there": (shutil, "rmtree", 2, "step-"),
    "everything saved, not yet renamed": (shutil, "copy", 0, "metrics.jsonl"),
    "renamed, partial still there": (shutil, "rmtree", 0, ".partial"),
}


def dying(module, name, count, mark=""):
    """The function, dying at its count-th call (from 0) whose first argument ends with mark."""
    real, calls = getattr(module, name), [0]

    def function(*args, **kwargs):
        if str(args[0]).rstrip("0123456789").endswith(mark):
            if calls[0] == count:
                raise Killed
            calls[0] += 1
        return real(*args, **kwargs)

    return function


@pytest.mark.parametrize("place", PLACES)
def test_killed_anywhere_and_run_again_ends_in_the_same_bits(
    world, uninterrupted, tmp_path, monkeypatch, place
):
    out, (module, name, count, mark) = tmp_path / "m", PLACES[place]
    flags = words(world, out, **RESUME)
    with monkeypatch.context() as patch:
        patch.setattr(module, name, dying(module, name, count, mark))
        with pytest.raises(Killed):
            train.main(flags)
    renamed = place.startswith("renamed")
    assert out.exists() == renamed
    assert train.main(flags)["steps"] == 12
    if renamed:
        shutil.rmtree(tmp_path / "m.partial", ignore_errors=True)
    same_run(out, uninterrupted)


def test_a_finished_run_says_so_and_changes_nothing(world, uninterrupted, capsys):
    def state():
        found = [p for p in uninterrupted.rglob("*") if p.is_file()]
        return {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in found}

    before = state()
    summary = run(world, uninterrupted, **RESUME)
    assert "complete already, 12 steps" in capsys.readouterr().out and summary["steps"] == 12
    assert state() == before
    for change in (
        dict(learning_rate=2e-3),
        dict(seed=1),
        dict(epochs=4),
        dict(set="tis_cap=0"),
        dict(batch_size=4),
    ):
        message = refusal(train.main, words(world, uninterrupted, **RESUME | change), capsys)
        assert "holds another training run" in message and state() == before


def test_changed_inputs_with_the_same_out_are_refused(world, tmp_path, capsys):
    path = shutil.copy(world.rollouts, tmp_path / "r.jsonl")
    run(world, tmp_path / "m", rollouts=path)
    dump(path, load(world.rollouts)[:-4])
    message = refusal(train.main, words(world, tmp_path / "m", rollouts=path), capsys)
    assert "holds another training run" in message
    run(world, tmp_path / "m", rollouts=path, overwrite=True)
    assert metrics(tmp_path / "m")[-1]["step"] == 3


def test_overwrite_deletes_nothing_but_a_training_run(world, tmp_path, capsys):
    """Neither a folder of somebody's, nor the model it starts from, nor one that holds what the
    run reads, nor anything before the new run's inputs are known to be good."""

    def said(out, **flags):
        return refusal(train.main, words(world, tmp_path / out, **flags), capsys)

    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "thesis.txt").write_text("x")
    assert "is not a training run" in said("notes")
    assert "replaces a training run" in said("notes", overwrite=True)
    folder = variant(world.base, tmp_path / "start")
    said("start", method="sft", model=folder, overwrite=True)
    run(world, tmp_path / "m")
    inside = dump(tmp_path / "m" / "rollouts.jsonl", load(world.rollouts))
    assert f"would delete {inside}" in said("m", rollouts=inside, overwrite=True)
    said("m", rollouts=written_by("1" * 12, world.rollouts), overwrite=True)
    assert (tmp_path / "notes" / "thesis.txt").exists() and moved(folder, world.base) == 0
    assert inside.exists() and (tmp_path / "m" / "model.safetensors").exists()


def test_as_a_program_it_explains_and_exits_with_2(world, drifted, tmp_path):
    flags = argv(model=drifted, out=tmp_path / "m", **needs(world, "opd"))
    done = run_program("train.py", flags)
    assert done.returncode == 2
    assert "policy.weights" in done.stderr and "Traceback" not in done.stderr


# ---- the folder


def test_the_saved_folder_is_a_plain_transformers_model(world, tmp_path):
    """It loads and generates.  It has no pickle; servers load every *.safetensors of a folder
    that has no index: the optimiser's state must not be among them."""
    run(world, tmp_path / "m")
    folder = tmp_path / "m"
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ends = transformers.GenerationConfig.from_pretrained(folder).eos_token_id
    assert ends == tokenizer.eos_token_id == END
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "3+4=?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    assert tokenizer.decode(prompt["input_ids"][0]) == "<|user|>3+4=?<|assistant|>"
    out = model.generate(**prompt, max_new_tokens=10, do_sample=False)
    assert out.shape[1] > prompt["input_ids"].shape[1]
    assert moved(folder, world.base) > 1e-4
    suffixes = {p.suffix for p in folder.rglob("*") if p.is_file()}
    assert suffixes <= {".safetensors", ".json", ".jsonl", ".jinja", ".txt", ".model"}, suffixes
    for path in folder.glob("*.safetensors"):
        assert set(load_file(path)) <= set(weights(folder)), path.name


def test_bfloat16_keeps_masters_so_that_tiny_steps_add_up(world, tmp_path):
    """12 steps of 1e-5: each is below the spacing of a bfloat16 weight of 0.02 and would be
    rounded away."""
    flags = dict(method="sft", rollouts=one_group(world, tmp_path / "r.jsonl"))
    flags |= dict(dtype="bfloat16", steps=12, learning_rate=1e-5, weight_decay=0.0)
    run(world, tmp_path / "m", **flags, fresh_optimizer=True)
    start, end = weights(world.base), weights(tmp_path / "m")
    assert all(v.dtype == torch.bfloat16 for v in end.values())
    state = load_file(tmp_path / "m" / "trainer" / "optimizer.safetensors")
    masters = {k[7:]: v for k, v in state.items() if k.startswith("master/")}
    assert masters.keys() == end.keys()
    assert all(v.dtype == torch.float32 for v in masters.values())
    name = "model.layers.0.mlp.gate_proj.weight"
    begun = start[name].bfloat16()
    step = (masters[name] - begun.float()).abs()
    assert 3e-5 < float(step.median()) < 1.3e-4, "about 12 steps of at most 1e-5"
    large = begun.abs() > 0.02  # here half a spacing is at least 6e-5, six steps
    assert float((end[name] != begun)[large].float().mean()) > 0.1
    assert torch.equal(end[name], masters[name].bfloat16())


def test_bfloat16_resumes_with_its_masters(world, tmp_path, monkeypatch):
    flags = RESUME | dict(dtype="bfloat16", epochs=2, learning_rate=1e-4)
    run(world, tmp_path / "whole", **flags)
    with monkeypatch.context() as patch:
        patch.setattr(files, "append_whole", dying(files, "append_whole", 3))
        with pytest.raises(Killed):
            run(world, tmp_path / "m", **flags)
    run(world, tmp_path / "m", **flags)
    same_run(tmp_path / "m", tmp_path / "whole")


# ---- the plan


def test_the_plan_walks_every_prompt_once_an_epoch():
    plan = batches.plan
    call, result = re.search(r"(plan\(.*\)) -> (\[.*\])", plan.__doc__).groups()
    assert eval(call) == json.loads(result), "the docstring's example"
    names = {f"p{i}": None for i in range(10)}
    for batch in (1, 3, 10, 99):
        steps = plan(names, batch, 3, None, 5)
        flat = [n for s in steps for n in s]
        assert len(flat) == 30 and max(map(len, steps)) <= batch
        assert all(sorted(flat[i : i + 10]) == sorted(names) for i in (0, 10, 20))
        assert flat[:10] != flat[10:20]
    # --steps takes as many epochs as it needs
    assert plan(names, 3, 1, 7, 5) == plan(names, 3, 9, None, 5)[:7]
    assert plan(names, 3, 1, None, 5) != plan(names, 3, 1, None, 6)


def test_learning_rate_schedules_at_their_corners():
    def at(step, schedule="cosine", warmup=4):
        settings = trainers.TrainerSettings(2.0, 0, 0, 0, schedule, warmup, None, 1)
        return trainers.learning_rate(settings, step, 14)

    assert [at(s) for s in range(5)] == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.0])
    assert [at(s) for s in (9, 14, 99)] == pytest.approx([1.0, 0, 0], abs=1e-12)
    assert [at(s, "linear") for s in (9, 11)] == pytest.approx([1.0, 0.6])
    assert at(99, "constant") == 2.0 and at(0, warmup=0) == 2.0


def test_a_full_disk_is_one_line_and_the_run_goes_on_later(world, tmp_path):
    """The file size limit of a process stands for a full disk: no file may grow beyond 60 kB,
    and the weights are larger."""
    code = (
        "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (60000, 60000));"
        "import train; from opd import files; files.run(train.main)"
    )
    command = [sys.executable, "-c", code, *words(world, tmp_path / "m")]
    full = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert full.returncode == 2 and not (tmp_path / "m").exists()
    assert "make room" in full.stderr and "Traceback" not in full.stderr
    run(world, tmp_path / "m")
