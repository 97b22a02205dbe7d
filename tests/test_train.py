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
from opd import files, kernel, records
from opd import loss as losses
from opd import policy as policies
from opd.files import read
from opd.loss import METHODS

V, END = 24, 4
# a discriminator's row: tests/test_discriminator.py
TOKEN_ROWS = [m for m, row in METHODS.items() if not row.scalar]
FAST = dict(learning_rate=1e-3, batch_size=3)


def row_of(method, overrides=()):
    """The row, and a lower bar where the rewards of the world, drawn from [0, 1], would never
    reach it."""
    return losses.settings(
        method,
        overrides or (("omega_scale=0.5",) if METHODS[method].omega == "accepted" else ()),
    )


def needs(world, method, overrides=()):
    """The files a row of METHODS reads, as flags."""
    row = row_of(method, overrides)
    flags = dict(method=method, rollouts=world.rollouts)
    if row.rewards:
        flags["rewards"] = world.rewards
    if row.teacher:
        flags["scores"] = world.scores
    if row.coefficient in ("unit", "sorted"):
        flags["scores"] = as_units(world.scores)
    if row.reference:
        # any policy can be the reference; the teacher is a far one
        flags["reference"] = world.scores
    if row.prefix == "mixed":
        flags |= dict(data=world.rollouts, data_scores=world.scores)
    if row.gold_weight:
        flags["data"] = world.prompts  # their solutions
    if row.scalar:
        flags["data"] = world.prompts
    if row.token_weight != "one":
        flags["token_weights"] = token_weights(
            world.rollouts,
            lambda r, t: (0, 1, 2.5)[(t + 2 * r["sample"] + int(r["id"][1:])) % 3],
        )
    if row.consistency == "sft":
        # the world's base model was fine-tuned on nobody's answers
        flags["allow_teacher_mismatch"] = True
    # the same texts, said to be the teacher's, or those of weights that are gone
    if row.prefix in ("teacher", "old"):
        author = (
            load(world.scores)[0]["policy"]["weights"] if row.prefix == "teacher" else "0" * 12
        )
        flags["rollouts"] = dump(
            world.rollouts.with_suffix(".by-teacher.jsonl"),
            [dict(r, policy=r["policy"] | {"weights": author}) for r in load(world.rollouts)],
        )
    return flags


def as_units(scores):
    """The same scores as a methods.simct score file: every token a unit of its own, all tokens
    candidates."""
    rows = []
    for s in load(scores):
        n = len(s["logprobs"])
        rows.append(
            s
            | {
                "units": [[t, t + 1, t, t + 1] for t in range(n)],
                "unit_logprobs": s["logprobs"],
                "unit_logits": s["logprobs"],
                "unit_logz": [0.0] * n,
                "unit_topk": s["topk"],
                "prefixes": records.pack(
                    np.zeros(records.unpack(s["topk"]["ids"]).shape, np.uint8)
                ),
                "bytes": [n, n, n],
                "sorted": records.pack(
                    np.sort(records.unpack(s["topk"]["logprobs"]))[:, ::-1].copy()
                ),
            }
        )
    return dump(scores.with_suffix(".units.jsonl"), rows)


def token_weights(rollouts, weight, name="weights"):
    """A file beside the rollouts with weight(rollout, t) for every response token."""
    return dump(
        rollouts.with_suffix(f".{name}.jsonl"),
        [
            {
                "id": r["id"],
                "sample": r["sample"],
                "rollout": records.fingerprint(r),
                "rule": "test",
                "weights": [weight(r, t) for t in range(len(r["response_ids"]))],
            }
            for r in load(rollouts)
        ],
    )


def run(world, out, **flags):
    """train.main on the world's base model, by default; returns its summary."""
    flags = dict(needs(world, flags.get("method", "opd")), **flags)
    return train.main(argv(**dict(dict(model=world.base, out=out, **FAST), **flags)))


def moved(a, b):
    """Largest difference between two models' parameters."""
    a, b = weights(a), weights(b)
    return max(float((a[k] - b[k]).abs().max()) for k in a)


def metrics(folder):
    return list(read(folder / "metrics.jsonl", "metrics"))


def refused(world, tmp_path, capsys, **flags):
    flags = dict(needs(world, flags.get("method", "opd")), **flags)
    message = refusal(
        train.main,
        argv(**dict(dict(model=world.base, out=tmp_path / "refused", **FAST), **flags)),
        capsys,
    )
    assert not (tmp_path / "refused").exists(), (
        "a refusal leaves nothing that looks like a model"
    )
    return message


# ---- one step's gradient


class Recorder:
    """An optimiser that only writes the gradient down."""

    def __init__(self, masters):
        self.masters = masters

    def step(self):
        self.gradient = [
            torch.zeros_like(m, dtype=torch.float64) if m.grad is None else m.grad.double()
            for m in self.masters
        ]

    def zero_grad(self):
        for m in self.masters:
            m.grad = None


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
    args = types.SimpleNamespace(
        **dict(
            dict(
                rewards=None,
                scores=None,
                reference=None,
                prompts=None,
                teacher=teacher,
                data=None,
                data_scores=None,
                token_weights=None,
                tail=256,
                threshold=4.0,
                teacher_top_k=None,
                allow_stale=model is not None,
                grad_clip=0.0,
                kernel=kernel,
                micro_batch_tokens=micro,
                model=str(model or world.base),
            ),
            **flags,
        )
    )
    policy = policies.load_policy(args.model, dtype)
    data = train.Data(
        args,
        row_of(args.method, overrides),
        policy,
        teacher and policies.load_policy(str(teacher)),
    )
    items = data.sequences([key for keys in data.groups.values() for key in keys])
    for item in items:
        if old:
            item["old_logp"] = np.asarray(old[item["key"]], np.float32)
    masters = [
        p if p.dtype == torch.float32 else p.detach().float().requires_grad_()
        for p in policy.model.parameters()
    ]
    recorder = Recorder(masters)
    gold = ()
    if data.method.gold_weight:
        given = train.Data(args, METHODS["sft"], policy, given=True)
        gold = (
            given,
            given.sequences([key for prompt in data.groups for key in given.groups[prompt]]),
        )
    numbers = train.optimise(policy, data, items, masters, recorder, args, gold)
    return torch.cat([g.flatten() for g in recorder.gradient]), numbers


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
    if row.omega == "frontier":
        return [(rate := math.fsum(rewards) / len(rewards)) - rate**2] * len(rewards)
    # -log sigmoid(h), averaged over pairs, is a sum over pairs * 2 / answers
    if row.omega == "preference":
        h = row.omega_scale * (log_ratios[best] - log_ratios[worst])
        pull = 2 * row.omega_scale / (1 + math.exp(h))
        return [
            pull if i == best else -pull if i == worst else 0.0 for i in range(len(rewards))
        ]
    return [0.0 if row.omega == "informative" and best == worst else 1.0] * len(rewards)


def naive_divergence(row, log_p, log_q):
    p, q, b = log_p.exp(), log_q.exp(), row.interpolation
    m = b * q + (1 - b) * p
    forward, reverse = (q * (log_q - log_p)).sum(), (p * (log_p - log_q)).sum()
    return {
        "rkl": reverse,
        "fkl": forward,
        "mix": b * reverse + (1 - b) * forward,
        "jsd": b * (q * (log_q - m.log())).sum() + (1 - b) * (p * (log_p - m.log())).sum(),
    }[row.divergence]


def full_table(score):
    """A score's whole distribution, [T, V] in order of ids."""
    ids, logps = (records.unpack(score["topk"][f]) for f in ("ids", "logprobs"))
    full = np.empty((len(ids), V))
    np.put_along_axis(full, ids.astype(int), logps, 1)
    return torch.tensor(full)


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
    rollouts = by_key([r for r in rollouts])
    tables = {
        key: naive_logps(model, r["prompt_ids"], r["response_ids"], temperature)
        for key, r in rollouts.items()
    }
    trained = {
        key: [t for t, m in enumerate(r["loss_mask"]) if m] for key, r in rollouts.items()
    }
    omegas, groups = {key: 1.0 for key in rollouts}, {}
    for key in rollouts:
        groups.setdefault(key[0], []).append(key)
    for keys in groups.values() if row.rewards else ():
        ratios = (
            [
                sum(
                    float(tables[k][t, rollouts[k]["response_ids"][t]].detach())
                    - reference[k]["logprobs"][t]
                    for t in trained[k]
                )
                for k in keys
            ]
            if row.reference
            else None
        )
        omegas.update(
            zip(keys, naive_omegas(row, [rewards[k]["reward"] for k in keys], ratios))
        )
        if row.omega == "preference" and not all(trained[k] for k in keys if omegas[k]):
            omegas.update(dict.fromkeys(keys, 0.0))
    kept = [len(trained[key]) for key in rollouts if trained[key] and omegas[key]]
    total = 0.0
    for key, r in rollouts.items():
        if not trained[key] or not omegas[key]:
            continue
        table = tables[key]
        n = {
            "token": sum(kept),
            "sequence": len(kept) * len(trained[key]),
            "batch": len(kept),
            "sum": 1,
        }[row.norm] / omegas[key]
        advantage = 0.0
        if row.advantage != "none":
            group = [rewards[k]["reward"] for k in groups[key[0]]]
            advantage = rewards[key]["reward"] - np.mean(group)
            if row.advantage == "std":
                advantage /= np.std(group) + 1e-6
        full = full_table(scores[key]) if row.support else None
        k1 = (
            [scores[key]["logprobs"][t] - r["logprobs"][t] for t in trained[key]]
            if row.teacher and row.on_policy
            else None
        )
        for place, t in enumerate(trained[key]):
            own, p = table[t, r["response_ids"][t]], table[t].exp()
            before = float(own.detach()) if old is None else old[key][place]
            against = (
                before
                if row.advantage != "none"
                else r["logprobs"][t]
                if row.on_policy
                else None
            )
            teacher_part = 0.0
            if k1:
                later = k1[place + 1 :]
                future = sum(row.gamma ** (i + 1) * x for i, x in enumerate(later)) / (
                    max(1, len(later)) if row.future == "mean" else 1
                )
                teacher_part = (0.0 if row.coefficient == "full" else k1[place]) + future
                if row.baseline == "kl":
                    teacher_part += float((p * (table[t] - full[t])).sum().detach())
                if row.advantage_clip:
                    teacher_part = max(
                        -row.advantage_clip, min(row.advantage_clip, teacher_part)
                    )
            if row.token_weight == "teacher":
                teacher_part *= token_weights[key]["weights"][t]
            a = (
                advantage
                + (row.teacher_weight if row.coefficient == "reward+k1" else 1.0) * teacher_part
            )
            if row.coefficient == "token":
                value = own
            elif row.coefficient == "sorted":
                value = (
                    -(
                        p.sort(descending=True).values
                        - torch.tensor(
                            sorted(math.exp(x) for x in full_table(scores[key])[t].tolist()),
                            dtype=torch.float64,
                        ).flip(0)
                    )
                    .abs()
                    .sum()
                )
            elif row.coefficient in ("full", "unit"):
                value = -naive_divergence(row, table[t], full[t])
                if row.gamma:
                    value = value + surrogate(row, own, against, r["logprobs"][t], a)
            elif row.coefficient in ("k2", "k3"):
                d = scores[key]["logprobs"][t] - own
                ratio = (
                    1.0
                    if row.ratio == "none"
                    else math.exp(float(own.detach()) - r["logprobs"][t])
                )
                value = -min(ratio, row.tis_cap or math.inf) * (
                    d * d / 2 if row.coefficient == "k2" else d.exp() - 1 - d
                )
                # the clipped advantage, held constant
                if row.advantage_clip and abs(float(d.detach())) > row.advantage_clip:
                    value = math.copysign(row.advantage_clip, float(d.detach())) * own
            # the geometric mean over the answer's trained tokens stands for every one of them
            elif row.ratio == "sequence":
                known = (
                    [float(table[i, r["response_ids"][i]].detach()) for i in trained[key]]
                    if old is None
                    else old[key]
                )
                logs = [table[i, r["response_ids"][i]] - x for i, x in zip(trained[key], known)]
                value = surrogate(row, sum(logs) / len(logs), 0.0, 0.0, a)
            else:
                value = surrogate(row, own, against, r["logprobs"][t], a)
            if row.token_weight == "file":
                value = value * token_weights[key]["weights"][t]
            if row.reference_kl and row.reference_support == "full":
                value = (
                    value
                    - row.reference_kl * (p * (table[t] - full_table(reference[key])[t])).sum()
                )
            elif row.reference_kl:  # the gradient of k2 = d^2 / 2 is d grad log pi
                value = (
                    value
                    - row.reference_kl
                    * math.exp(float(own.detach()) - before)
                    * float(own.detach() - reference[key]["logprobs"][t])
                    * own
                )
            if row.entropy_bonus:
                value = value - row.entropy_bonus * (p * table[t]).sum()
            total = total - value / n
    for prompt, response in gold:
        own = naive_logps(model, prompt, response)[
            torch.arange(len(response)), torch.tensor(response)
        ]
        total = total - row.gold_weight * own.sum() / sum(len(r) for _, r in gold)
    total.backward()
    return torch.cat(
        [
            torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten()
            for p in model.parameters()
        ]
    )


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
        r["loss_mask"] = (
            [int(rng.random() < 0.7) for _ in r["loss_mask"]] if i % 3 == 0 else r["loss_mask"]
        )
        if i in (5, 11):
            r["loss_mask"] = [0] * len(r["loss_mask"])
    path = dump(tmp_path_factory.mktemp("masked") / "rollouts.jsonl", rows)
    assert (
        len({len(r["prompt_ids"]) for r in rows}) > 2
        and len({sum(r["loss_mask"]) for r in rows}) > 8
    )
    return types.SimpleNamespace(**dict(vars(world), rollouts=path))


def solutions(world):
    """(prompt ids, response ids) of the golden answers to the prompts that were rolled out."""
    tokenizer, asked = (
        policies.load_tokenizer(str(world.base)),
        {r["id"] for r in load(world.rollouts)},
    )
    return [
        (policies.render(tokenizer, p), tokenizer(p["solution"])["input_ids"] + [END])
        for p in load(world.prompts)
        if p["id"] in asked
    ]


def tables(world, flags):
    out = dict(
        rewards=by_key(load(world.rewards)),
        scores=by_key(load(world.scores)),
        reference=by_key(load(world.scores)),
    )
    if "token_weights" in flags:
        out["token_weights"] = by_key(load(flags["token_weights"]))
    return out | (dict(gold=solutions(world)) if flags.get("data") == world.prompts else {})


ROWS = [(m, ()) for m in TOKEN_ROWS] + [
    ("opd", ("entropy_bonus=0.1",)),
    ("opd", ("norm=sequence", "clip_low=0.2", "clip_high=0.2")),
    ("ropd", ("reference_kl=0.5", "norm=sequence")),
    ("opd", ("coefficient=k2", "norm=batch")),
    ("opd", ("coefficient=k3", "divergence=fkl")),
    ("opd", ("baseline=kl", "advantage_clip=0.3")),
    ("opd", ("gamma=0.9", "norm=sum")),
    ("gkd", ("divergence=mix", "interpolation=0.2")),
    ("gkd", ("interpolation=0.9",)),
    ("opd-verifier", ("teacher_weight=0.3", "baseline=kl")),
    ("dpo", ("prefix=self", "omega_scale=0.7")),
    ("lightning", ("advantage_clip=0.3", "norm=token")),
    ("lightning", ("ratio=token", "tis_cap=1.1", "advantage_clip=0")),
    ("stable-opd", ("reference_support=full", "gold_weight=0", "reference_kl=0.5")),
    ("opd-full", ("token_weight=file",)),
]


@pytest.mark.parametrize("method, overrides", ROWS)
def test_the_first_step_has_the_gradient_of_the_formula(masked, base64bit, method, overrides):
    """Every row of METHODS: relative error of the whole gradient below 2e-5 (float32 against
    float64)."""
    flags = needs(masked, method, overrides)
    got, _ = gradient(masked, flags, overrides=overrides)
    same_gradient(
        got,
        naive_gradient(
            base64bit, row_of(method, overrides), load(masked.rollouts), **tables(masked, flags)
        ),
        2e-5,
    )


@pytest.mark.parametrize(
    "method",
    [m for m, row in METHODS.items() if row.coefficient in losses.SURROGATE or row.gamma],
)
def test_later_steps_weigh_by_the_importance_ratio(masked, drifted, method):
    """After an update: ratios, clips and truncated importance weights against log-probs
    recorded before it."""
    rng, old = np.random.default_rng(1), {}
    for r in load(masked.rollouts):
        old[r["id"], r["sample"]] = [
            min(x, 0.0)
            for x in np.array(r["logprobs"]) + rng.normal(0, 0.5, len(r["logprobs"]))
        ]
    rows = load(masked.rollouts)
    old = {
        key: [v for v, m in zip(old[key], r["loss_mask"]) if m]
        for key, r in by_key(rows).items()
    }
    flags = needs(masked, method)
    got, numbers = gradient(masked, flags, model=drifted, old=old)
    want = naive_gradient(
        naive_model(drifted), row_of(method), rows, old=old, **tables(masked, flags)
    )
    same_gradient(got, want, 1e-4)
    if METHODS[method].clip_low:
        assert numbers["policy/clip_fraction"] > 0.05, "the fixture should clip"


def test_without_its_two_terms_stable_opd_is_clipped_opd_bit_for_bit(world, tmp_path):
    off = [x for text in ("reference_kl=0", "gold_weight=0") for x in ("--set", text)]
    clip = [x for text in ("clip_low=0.2", "clip_high=0.2") for x in ("--set", text)]
    common = dict(model=world.base, rollouts=world.rollouts, scores=world.scores, **FAST)
    train.main([*argv(method="stable-opd", out=tmp_path / "a", **common), *off])
    train.main([*argv(method="opd", out=tmp_path / "b", **common), *clip])
    assert same_bits(weights(tmp_path / "a"), weights(tmp_path / "b"))


def test_token_weights_of_one_are_plain_opd_bit_for_bit_and_zeros_keep_the_normaliser(
    world, base64bit, tmp_path
):
    ones = token_weights(world.rollouts, lambda r, t: 1, "ones")
    run(world, tmp_path / "a", method="release", token_weights=ones)
    run(world, tmp_path / "b", method="opd")
    assert same_bits(weights(tmp_path / "a"), weights(tmp_path / "b"))
    whole, _ = gradient(world, needs(world, "opd"))
    early, numbers = gradient(
        world,
        dict(
            needs(world, "release"),
            token_weights=token_weights(world.rollouts, lambda r, t: int(t < 3), "early"),
        ),
    )
    late, _ = gradient(
        world,
        dict(
            needs(world, "release"),
            token_weights=token_weights(world.rollouts, lambda r, t: int(t >= 3), "late"),
        ),
    )
    # were masked tokens to leave the normaliser, the parts would not add up
    same_gradient(early + late, whole, 1e-5)
    lengths = [len(r["response_ids"]) for r in load(world.rollouts)]
    assert numbers["weights/kept"] == pytest.approx(
        sum(min(3, n) for n in lengths) / sum(lengths), abs=1e-5
    )


def test_golden_answers_have_a_mean_of_their_own_and_never_meet_the_teacher(world, tmp_path):
    """Gradient of stable-opd = clipped OPD's + weight x that of imitating the solutions,
    whatever the number of rollouts."""
    overrides = ("reference_kl=0", "gold_weight=0.7")
    both, numbers = gradient(world, needs(world, "stable-opd", overrides), overrides=overrides)
    alone, _ = gradient(world, needs(world, "opd"), overrides=("clip_low=0.2", "clip_high=0.2"))
    answers = [
        {
            "id": f"g{i}",
            "sample": 0,
            "policy": {"model": "x"},
            "text": p["solution"],
            "finish_reason": "stop",
            "messages": p["messages"],
        }
        for i, p in enumerate(load(world.prompts))
        if p["id"] in {r["id"] for r in load(world.rollouts)}
    ]
    gold, imitation = gradient(
        world, dict(method="sft", rollouts=dump(tmp_path / "gold.jsonl", answers))
    )
    same_gradient(both, alone + 0.7 * gold, 1e-5)
    assert numbers["gold/nll"] == pytest.approx(imitation["train/loss"], rel=1e-5)


def test_offline_and_online_have_one_gradient_at_the_first_step_and_no_weights_later(
    world, drifted, tmp_path
):
    """Lightning on fresh rollouts is OPD; on stale ones it is the least-squares regression onto
    the teacher's numbers (2604.13010 section 3)."""
    overrides = ("norm=token", "advantage_clip=0")
    offline, _ = gradient(world, needs(world, "lightning", overrides), overrides=overrides)
    online, _ = gradient(world, needs(world, "opd"))
    same_gradient(offline, online, 1e-4)
    stale, numbers = gradient(
        world, needs(world, "lightning", overrides), overrides=overrides, model=drifted
    )
    model, scores, total, rollouts = (
        naive_model(drifted),
        by_key(load(world.scores)),
        0.0,
        load(world.rollouts),
    )
    for r in rollouts:
        own = naive_logps(model, r["prompt_ids"], r["response_ids"])[
            torch.arange(len(r["response_ids"])), torch.tensor(r["response_ids"])
        ]
        total = total + 0.5 * (
            (torch.tensor(scores[r["id"], r["sample"]]["logprobs"]) - own) ** 2
        ).sum() / sum(len(x["response_ids"]) for x in rollouts)
    total.backward()
    same_gradient(stale, torch.cat([p.grad.flatten() for p in model.parameters()]), 1e-4)
    gaps = np.concatenate(
        [
            np.exp(
                naive_logps(model, r["prompt_ids"], r["response_ids"])
                .detach()
                .numpy()[np.arange(len(r["response_ids"])), r["response_ids"]]
                - r["logprobs"]
            )
            for r in rollouts
        ]
    )
    assert numbers["policy/weight_std"] == pytest.approx(gaps.std(), rel=1e-3) and numbers[
        "policy/weight_ess"
    ] == pytest.approx(gaps.mean() ** 2 / (gaps**2).mean(), rel=1e-3)


def test_rollouts_at_another_temperature_train_that_distribution(world, base64bit, tmp_path):
    rollout.main(
        argv(
            model=world.base,
            prompts=world.prompts,
            slice=":3",
            n=3,
            max_tokens=20,
            temperature=0.7,
            out=tmp_path / "r.jsonl",
        )
    )
    make_rewards(tmp_path / "r.jsonl", tmp_path / "w.jsonl")
    got, numbers = gradient(
        world, dict(method="grpo", rollouts=tmp_path / "r.jsonl", rewards=tmp_path / "w.jsonl")
    )
    rows, rewards = load(tmp_path / "r.jsonl"), by_key(load(tmp_path / "w.jsonl"))
    same_gradient(
        got, naive_gradient(base64bit, METHODS["grpo"], rows, rewards, temperature=0.7), 2e-5
    )
    assert numbers["rollout/logprob_gap_max"] < 2e-5
    for r in rows:
        r["temperature"] = 1.0  # a lie about the temperature shows in the gap
    _, numbers = gradient(
        world,
        dict(
            method="grpo",
            rollouts=dump(tmp_path / "lie.jsonl", rows),
            rewards=tmp_path / "w.jsonl",
        ),
    )
    assert numbers["rollout/logprob_gap_mean"] > 0.05


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
        with monkeypatch.context() as patch:
            patch.setattr(losses.Method, "separable", separable and form == "slices")
            patch.setattr(
                train,
                "linear_token_loss",
                lambda *a, **k: (
                    calls.append("slices") or kernel.linear_token_loss(*a, rows=5, **k)
                ),
            )
            patch.setattr(
                train,
                "token_numbers",
                lambda *a, **k: (
                    calls.extend(["recomputed"] * torch.is_grad_enabled())
                    or kernel.token_numbers(*a, **k)
                ),
            )
            forms[form], numbers = gradient(masked, flags, overrides=overrides)
        assert set(calls) == {form if separable else "recomputed"}
        same_gradient(forms[form], plain, 1e-5)
        assert numbers == pytest.approx(plain_numbers, rel=1e-4, abs=1e-5)
    same_gradient(forms["slices"], forms["recomputed"], 2e-6)


@pytest.fixture(scope="module")
def wide_teacher(world, tmp_path_factory):
    """A teacher of another width and with 8 more rows in its head, all far likelier than any
    token."""
    import transformers

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
    "method, overrides",
    [("gkd", ()), ("opd-full", ()), ("dagger", ()), ("minillm", ()), ("opd", ("baseline=kl",))],
)
@pytest.mark.parametrize("k", [V, 5])
def test_the_likeliest_tokens_of_a_teacher_in_memory_are_those_of_its_scores(
    masked, tmp_path, method, overrides, k
):
    scores = tmp_path / "scores.jsonl"
    teacher.main(
        argv("score", model=masked.teacher, rollouts=masked.rollouts, out=scores, top_k=k)
    )
    other = types.SimpleNamespace(**dict(vars(masked), scores=scores))
    disk, disk_numbers = gradient(other, needs(other, method, overrides), overrides=overrides)
    flags = dict(
        needs(other, method, overrides), scores=None, data_scores=None, teacher_top_k=k
    )
    memory, numbers = gradient(masked, flags, teacher=masked.teacher, overrides=overrides)
    same_gradient(memory, disk, 1e-5)
    assert numbers["train/loss"] == pytest.approx(disk_numbers["train/loss"], rel=1e-4)


@pytest.mark.parametrize("method", ["opd", "opd-full"])
@pytest.mark.parametrize("which", ["same width", "another width"])
def test_a_teacher_in_memory_gives_the_gradient_of_its_scores_on_disk(
    masked, wide_teacher, tmp_path, method, which
):
    folder, scores = masked.teacher, masked.scores
    if which == "another width":
        folder, scores = wide_teacher, tmp_path / "scores.jsonl"
        teacher.main(argv("score", model=folder, rollouts=masked.rollouts, out=scores, top_k=V))
    disk, disk_numbers = gradient(
        masked, dict(method=method, rollouts=masked.rollouts, scores=scores)
    )
    memory, numbers = gradient(
        masked, dict(method=method, rollouts=masked.rollouts), teacher=folder
    )
    same_gradient(memory, disk, 1e-5)
    for name in ("train/loss", "kl/teacher", "policy/entropy"):
        assert numbers[name] == pytest.approx(disk_numbers[name], rel=1e-4)


def test_a_teacher_that_is_the_student_moves_nothing(world, tmp_path):
    got, numbers = gradient(
        world, dict(method="opd-full", rollouts=world.rollouts), teacher=world.base
    )
    assert numbers["train/loss"] == 0 and float(got.abs().max()) == 0  # to the bit


def test_a_teacher_in_memory_trains_and_is_remembered(world, tmp_path, capsys):
    flags = dict(method="opd-full", scores=None, teacher=world.teacher, steps=2)
    summary = run(world, tmp_path / "m", **flags)
    assert summary["steps"] == 2 and moved(world.base, tmp_path / "m") > 0
    assert all("kl/teacher" in m for m in metrics(tmp_path / "m"))
    # the same line again: complete already
    assert run(world, tmp_path / "m", **flags) == summary
    other = (
        dict(model=world.base, rollouts=world.rollouts, out=tmp_path / "m", **FAST)
        | flags
        | dict(teacher=world.base)
    )
    message = refusal(train.main, argv(**other), capsys)
    assert "another training run" in message


def test_a_kernel_that_cannot_do_it_is_refused(world, tmp_path, capsys, monkeypatch):
    flags = dict(
        method="opd-full",
        rollouts=world.rollouts,
        model=world.base,
        out=tmp_path / "m",
        kernel="triton",
        **FAST,
    )
    assert "--teacher" in refusal(train.main, argv(**flags, teacher=world.teacher), capsys)
    monkeypatch.setattr(train, "find_spec", lambda name: None)
    assert "pip install triton" in refusal(
        train.main, argv(**flags, scores=world.scores), capsys
    )


def test_teachers_that_read_other_tokens_are_refused(world, tmp_path, capsys):
    flags = dict(
        method="opd-full", rollouts=world.rollouts, model=world.base, out=tmp_path / "m", **FAST
    )
    foreign = variant(world.teacher, tmp_path / "permuted", permuted)
    message = refusal(train.main, argv(**flags, teacher=foreign), capsys)
    assert "--teacher" in message and "token ids mean different things" in message
    other = variant(
        world.teacher,
        tmp_path / "template",
        lambda t: setattr(t, "chat_template", t.chat_template + " "),
    )
    message = refusal(train.main, argv(**flags, teacher=other), capsys)
    assert "--allow-template-mismatch" in message
    assert train.main(argv(**flags, teacher=other, allow_template_mismatch=True))["steps"] > 0
    message = refusal(
        train.main,
        argv(**dict(flags, out=tmp_path / "n"), teacher=world.teacher, scores=world.scores),
        capsys,
    )
    assert "give one of them" in message
    message = refusal(
        train.main,
        argv(
            **dict(flags, out=tmp_path / "n", method="ropd"),
            rewards=world.rewards,
            teacher=world.teacher,
        ),
        capsys,
    )
    assert "does not read it" in message


# ---- batching, masks


@pytest.mark.parametrize("method", TOKEN_ROWS)
def test_micro_batches_do_not_change_the_gradient(masked, method):
    """One row, a few rows or all rows in a forward pass: relative difference below 1e-5; means
    of means would be off by far."""
    whole, numbers = gradient(masked, needs(masked, method), micro=10**6)
    for micro in (1, 90):
        part, other = gradient(masked, needs(masked, method), micro=micro)
        same_gradient(part, whole, 1e-5)
        assert other == pytest.approx(numbers, rel=1e-4, abs=1e-6), "the metrics neither"


@pytest.mark.parametrize("method", TOKEN_ROWS)
def test_a_fully_masked_answer_contributes_nothing(masked, tmp_path, method):
    """Its tokens may be anything, and without a group baseline that counts its reward it may as
    well not be there."""
    whole, numbers = gradient(masked, needs(masked, method))
    assert numbers["train/sequences"] == 30 or METHODS[method].omega in (
        "accepted",
        "preference",
    )
    rows, scores = load(masked.rollouts), by_key(load(masked.scores))
    for r in rows:
        if not sum(r["loss_mask"]):
            s, n = scores[r["id"], r["sample"]], 3
            r.update(response_ids=[9] * n, logprobs=[-7.0] * n, loss_mask=[0] * n)
            s.update(
                rollout=records.fingerprint(r),
                logprobs=[-9.0] * n,
                topk={f: records.pack(records.unpack(s["topk"][f])[:n]) for f in s["topk"]},
            )
    other = types.SimpleNamespace(
        **dict(
            vars(masked),
            rollouts=dump(tmp_path / "r.jsonl", rows),
            scores=dump(tmp_path / "s.jsonl", scores.values()),
            rewards=make_rewards(tmp_path / "r.jsonl", tmp_path / "w.jsonl"),
        )
    )
    same_gradient(gradient(other, needs(other, method))[0], whole, 1e-5)
    if not METHODS[method].rewards:
        without = types.SimpleNamespace(
            **dict(
                vars(masked),
                rollouts=dump(
                    tmp_path / "without.jsonl", [r for r in rows if sum(r["loss_mask"])]
                ),
            )
        )
        same_gradient(gradient(without, needs(without, method))[0], whole, 1e-5)


@pytest.mark.parametrize("method", TOKEN_ROWS)
def test_masked_positions_may_hold_anything(world, tmp_path, method):
    """Log-probs under a masked token are never read; ids after the last trained token
    neither."""
    clean, wild, scores = load(world.rollouts), load(world.rollouts), load(world.scores)
    place = {(s["id"], s["sample"]): s for s in scores}
    for a, b in zip(clean, wild):
        n = len(a["response_ids"])
        hidden = [0] if n > 2 else []  # the first token, and everything in the last third
        tail = list(range(n - n // 3, n))
        for r in (a, b):
            r["loss_mask"] = [0 if t in hidden + tail else 1 for t in range(n)]
        s = place[b["id"], b["sample"]]
        top = records.unpack(s["topk"]["logprobs"])
        for t in hidden + tail:
            b["logprobs"][t], s["logprobs"][t] = -1e30, -1e30
            top[t] = np.nan
        for t in tail:
            b["response_ids"][t] = (b["response_ids"][t] + 1) % V
        s["rollout"], s["topk"]["logprobs"] = records.fingerprint(b), records.pack(top)
    a = types.SimpleNamespace(**dict(vars(world), rollouts=dump(tmp_path / "a.jsonl", clean)))
    b = types.SimpleNamespace(
        **dict(
            vars(world),
            rollouts=dump(tmp_path / "b.jsonl", wild),
            scores=dump(tmp_path / "s.jsonl", scores),
            rewards=make_rewards(tmp_path / "b.jsonl", tmp_path / "w.jsonl"),
        )
    )
    first, second = gradient(a, needs(a, method))[0], gradient(b, needs(b, method))[0]
    assert torch.isfinite(second).all()
    same_gradient(second, first, 1e-6)


def test_one_token_and_empty_answers_train(world, base64bit, tmp_path):
    path = edge_rollouts(world, tmp_path / "r.jsonl", base64bit)
    teacher.main(
        argv("score", model=world.teacher, rollouts=path, out=tmp_path / "s.jsonl", top_k=V)
    )
    make_rewards(path, tmp_path / "w.jsonl")
    world = types.SimpleNamespace(
        **dict(
            vars(world),
            rollouts=path,
            scores=tmp_path / "s.jsonl",
            rewards=tmp_path / "w.jsonl",
        )
    )
    # the others leave groups of one answer out
    for method in (m for m, row in METHODS.items() if row.omega in ("one", "softmax")):
        flags = needs(world, method)
        got, numbers = gradient(world, flags)
        assert numbers["train/sequences"] == 2 and numbers["train/tokens"] == 1 + len(
            load(path)[2]["response_ids"]
        )
        if METHODS[method].coefficient != "reward" or METHODS[method].advantage != "std":
            same_gradient(
                got,
                naive_gradient(base64bit, METHODS[method], load(path), **tables(world, flags)),
                2e-5,
            )
    # and the whole stage, with log-probs of the starting weights
    run(world, tmp_path / "m", epochs=2)
    assert len(metrics(tmp_path / "m")) == 2


def test_a_bfloat16_model_accumulates_micro_batches_in_float32(world, tmp_path):
    """Summed in bfloat16 (8 bits), the gradients of 512 micro-batches lose what is small
    against the running sum."""
    many = dump(
        tmp_path / "r.jsonl",
        [dict(r, id=f"{r['id']}-{i}") for i in range(16) for r in load(world.rollouts)],
    )
    exact, _ = gradient(world, dict(method="sft", rollouts=many))
    few, one = (
        gradient(world, dict(method="sft", rollouts=many), micro=micro, dtype="bfloat16")[0]
        for micro in (300, 1)
    )
    error = [float((g - exact).norm() / exact.norm()) for g in (few, one)]
    assert error[0] < 0.05 and error[1] < 1.5 * error[0], error


# ---- signals that must be zero


def test_a_student_that_is_its_own_teacher_learns_nothing(world, tmp_path):
    """opd-full: loss below 1e-6, gradient below 1e-5 of that of another teacher.  opd:
    advantages within the noise floor."""
    teacher.main(
        argv(
            "score",
            model=world.base,
            rollouts=world.rollouts,
            out=tmp_path / "s.jsonl",
            top_k=V,
        )
    )
    for method, bound in (("opd-full", 1e-5), ("opd", 1e-3)):
        same, same_numbers = gradient(
            world, dict(needs(world, method), scores=tmp_path / "s.jsonl")
        )
        other, other_numbers = gradient(world, needs(world, method))
        assert float(same.norm()) < bound * float(other.norm())
        assert abs(same_numbers["train/loss"]) < 1e-5 < abs(other_numbers["train/loss"])
        assert abs(same_numbers["kl/teacher"]) < 1e-5 and other_numbers["kl/teacher"] > 0.05
    gaps = [
        abs(q - mu)
        for r, s in zip(
            load(world.rollouts),
            map(by_key(load(tmp_path / "s.jsonl")).get, by_key(load(world.rollouts))),
        )
        for q, mu in zip(s["logprobs"], r["logprobs"])
    ]
    assert max(gaps) < 2e-5


def test_top_k_support_is_between_nothing_and_everything(world, tmp_path):
    """More support, more of the loss: the lumped divergence never exceeds the full one and
    reaches it at K = V."""
    values = []
    for k in (1, 4, V - 1, V):
        teacher.main(
            argv(
                "score",
                model=world.teacher,
                rollouts=world.rollouts,
                out=tmp_path / f"{k}.jsonl",
                top_k=k,
            )
        )
        values.append(
            gradient(world, dict(needs(world, "opd-full"), scores=tmp_path / f"{k}.jsonl"))[1][
                "train/loss"
            ]
        )
    assert 0 < values[0] < values[1] < values[2] <= values[3] + 1e-5
    assert values[2] == pytest.approx(values[3], abs=1e-4)


# ---- rounds


def one_group(world, path):
    """One prompt's rollouts: every optimiser step walks the very same batch in the very same
    order."""
    return dump(path, [r for r in load(world.rollouts) if r["id"] == "t00003"])


def test_the_next_round_continues_the_optimiser_and_the_step_count(world, tmp_path):
    """2 + 2 steps on one fixed batch are 4 steps, to the bit: moments, bias correction, warm-up
    and decay all continue.

    The importance ratio starts anew each round, so the comparison uses imitation, which has
    none."""
    flags = dict(
        method="sft",
        rollouts=one_group(world, tmp_path / "r.jsonl"),
        warmup_steps=3,
        schedule="linear",
        total_steps=6,
        learning_rate=1e-3,
    )

    def go(model, out, **more):
        return train.main(argv(model=model, out=tmp_path / out, **dict(flags, **more)))

    assert go(world.base, "four", steps=4, fresh_optimizer=True)["step"] == 4
    assert go(world.base, "two", steps=2, fresh_optimizer=True)["step"] == 2
    second = go(tmp_path / "two", "two_two", steps=2)
    assert second["step"] == 4 and second["steps"] == 2
    assert same_bits(weights(tmp_path / "four"), weights(tmp_path / "two_two"))
    assert [m["step"] for m in metrics(tmp_path / "two_two")] == [3, 4]
    rates = [
        m["train/learning_rate"]
        for m in metrics(tmp_path / "two") + metrics(tmp_path / "two_two")
    ]
    assert rates == pytest.approx([1e-3 / 3, 2e-3 / 3, 1e-3, 1e-3], rel=1e-9)
    assert (
        metrics(tmp_path / "two_two")[-1]["train/tokens_total"]
        == metrics(tmp_path / "four")[-1]["train/tokens_total"]
    )

    # the decay: steps 4, 5 of 3 + 3, and 0 at the end
    third = go(tmp_path / "two_two", "third", steps=3)
    assert [m["train/learning_rate"] for m in metrics(tmp_path / "third")] == pytest.approx(
        [1e-3 * 2 / 3, 1e-3 / 3, 0], abs=1e-12
    )
    assert third["step"] == 7

    fresh = go(tmp_path / "two", "fresh", steps=2, fresh_optimizer=True)
    assert fresh["step"] == 2 and moved(tmp_path / "fresh", tmp_path / "two_two") > 1e-5


def test_the_optimiser_is_adamw(world, tmp_path):
    """Three steps against torch's own AdamW driven by the naive gradient: no hidden scaling, no
    lost moment."""
    path = one_group(world, tmp_path / "r.jsonl")
    train.main(
        argv(
            method="sft",
            model=world.base,
            rollouts=path,
            out=tmp_path / "m",
            steps=3,
            learning_rate=1e-3,
            grad_clip=0.5,
            weight_decay=0.1,
            adam_beta2=0.95,
            fresh_optimizer=True,
        )
    )
    model = naive_model(world.base)
    optimiser = torch.optim.AdamW(
        model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1
    )
    for step in range(3):
        flat = naive_gradient(model, METHODS["sft"], load(path))
        norm = float(flat.norm())
        assert (
            metrics(tmp_path / "m")[step]["train/grad_norm"] == pytest.approx(norm, rel=1e-4)
            and norm > 0.5
        )
        for p, g in zip(
            model.parameters(),
            (0.5 / norm * flat).split([p.numel() for p in model.parameters()]),
        ):
            p.grad = g.view_as(p)
        optimiser.step()
    want, start = model.state_dict(), weights(world.base)
    got = weights(tmp_path / "m")
    error = sum(float(((got[k] - want[k]) ** 2).sum()) for k in got) ** 0.5
    length = sum(float(((start[k] - want[k]) ** 2).sum()) for k in got) ** 0.5
    # entries whose gradient is nearly zero divide noise by noise in AdamW
    assert error < 0.01 * length


def test_another_method_does_not_inherit_the_moments(world, tmp_path):
    summary = run(world, tmp_path / "m")
    assert (world.base / "metrics.jsonl").exists() and summary["step"] == summary["steps"] == 3


def test_on_policy_rounds_chain_through_rollouts(world, tmp_path):
    """The loop of a experiment: sample with the new weights, score, train; yesterday's rollouts
    are refused."""
    model, step = world.base, 0
    for number in range(2):
        at = tmp_path / str(number)
        rollout.main(
            argv(
                model=model,
                prompts=world.prompts,
                slice=f"{4 * number}:{4 * number + 4}",
                n=3,
                max_tokens=20,
                seed=number,
                out=at / "r.jsonl",
            )
        )
        teacher.main(
            argv("score", model=world.teacher, rollouts=at / "r.jsonl", out=at / "s.jsonl")
        )
        flags = dict(
            method="opd",
            rollouts=at / "r.jsonl",
            scores=at / "s.jsonl",
            learning_rate=1e-3,
            batch_size=2,
        )
        step = train.main(argv(model=model, out=at / "m", **flags))["step"]
        model = at / "m"
        gaps = [m["rollout/logprob_gap_mean"] for m in metrics(model)]
        assert max(gaps) < 2e-5, "the log-probs of the starting weights, also in later steps"
        assert (
            metrics(model)[0]["policy/kl_from_start"]
            < 1e-6
            < metrics(model)[1]["policy/kl_from_start"]
        )
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
    assert [m["step"] for m in mine] == list(range(1, len(whole) + 1)), (
        "every step once, in order"
    )
    assert mine == whole
    a, b = (
        {p.relative_to(f): load_file(p) for p in f.rglob("*.safetensors")}
        for f in (out, uninterrupted)
    )
    assert a.keys() == b.keys() and all(same_bits(a[name], b[name]) for name in a), (
        "moments too"
    )
    assert not out.with_name(out.name + ".partial").exists()


def test_killed_by_the_machine_and_run_again_ends_in_the_same_bits(
    world, uninterrupted, tmp_path
):
    out = tmp_path / "m"
    flags = argv(model=world.base, out=out, **dict(needs(world, "ropd"), **RESUME))
    log = tmp_path / "m.partial" / "metrics.jsonl"
    process = subprocess.Popen(
        program("train.py", flags),
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.time() + 100
    while (
        process.poll() is None
        and time.time() < deadline
        and not (log.exists() and log.read_bytes().count(b"\n") >= 3)
    ):
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -9, "the run ended before it could be killed"
    assert not out.exists()
    train.main(flags)
    same_run(out, uninterrupted)


class Killed(BaseException):
    """Stands in for a kill at one exact place: nothing in the stage catches it."""


PLACES = {  # what dies: function, on the n-th call (from 0) whose first argument ends like this
    "after the log line, before the checkpoint": (train, "checkpoint", 3, ""),
    "model half written": (train, "save_file", 3, ""),
    "model written, LATEST still old": (files, "write_atomically", 3, "LATEST"),
    "LATEST new, old checkpoint still there": (shutil, "rmtree", 2, "step-"),
    "everything saved, not yet renamed": (shutil, "copy", 0, "metrics.jsonl"),
    "renamed, partial still there": (shutil, "rmtree", 0, ".partial"),
}


@pytest.mark.parametrize("place", PLACES)
def test_killed_anywhere_and_run_again_ends_in_the_same_bits(
    world, uninterrupted, tmp_path, monkeypatch, place
):
    out, (module, name, count, mark) = tmp_path / "m", PLACES[place]
    real, calls = getattr(module, name), [0]

    def dying(*args, **kwargs):
        if str(args[0]).rstrip("0123456789").endswith(mark):
            if calls[0] == count:
                raise Killed
            calls[0] += 1
        return real(*args, **kwargs)

    flags = argv(model=world.base, out=out, **dict(needs(world, "ropd"), **RESUME))
    with monkeypatch.context() as patch:
        patch.setattr(module, name, dying)
        with pytest.raises(Killed):
            train.main(flags)
    if place.startswith("renamed"):
        assert out.exists()
        assert train.main(flags)["steps"] == 12
        shutil.rmtree(tmp_path / "m.partial", ignore_errors=True)
    else:
        assert not out.exists()
        train.main(flags)
    same_run(out, uninterrupted)


def test_a_finished_run_says_so_and_changes_nothing(world, uninterrupted, capsys):
    files = {
        p: (p.read_bytes(), p.stat().st_mtime_ns)
        for p in uninterrupted.rglob("*")
        if p.is_file()
    }
    summary = run(world, uninterrupted, **RESUME)
    assert "complete already, 12 steps" in capsys.readouterr().out and summary["steps"] == 12
    assert {
        p: (p.read_bytes(), p.stat().st_mtime_ns)
        for p in uninterrupted.rglob("*")
        if p.is_file()
    } == files


@pytest.mark.parametrize(
    "change",
    [
        dict(learning_rate=2e-3),
        dict(seed=1),
        dict(epochs=4),
        dict(set="tis_cap=0"),
        dict(batch_size=4),
    ],
)
def test_other_flags_with_the_same_out_are_refused(
    world, uninterrupted, tmp_path, capsys, change
):
    before = (uninterrupted / "metrics.jsonl").read_bytes()
    flags = dict(dict(needs(world, "ropd"), **RESUME), **change)
    message = refusal(train.main, argv(model=world.base, out=uninterrupted, **flags), capsys)
    assert (
        "holds another training run" in message
        and (uninterrupted / "metrics.jsonl").read_bytes() == before
    )


def test_changed_inputs_with_the_same_out_are_refused(world, tmp_path, capsys):
    path = tmp_path / "r.jsonl"
    shutil.copy(world.rollouts, path)
    run(world, tmp_path / "m", rollouts=path)
    dump(path, load(world.rollouts)[:-4])
    flags = dict(needs(world, "opd"), rollouts=path)
    assert "holds another training run" in refusal(
        train.main, argv(model=world.base, out=tmp_path / "m", **dict(flags, **FAST)), capsys
    )
    run(world, tmp_path / "m", rollouts=path, overwrite=True)
    assert metrics(tmp_path / "m")[-1]["step"] == 3


def test_a_folder_that_is_not_a_run_is_left_alone(world, tmp_path, capsys):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "thesis.txt").write_text("all of it")
    flags = dict(needs(world, "opd"), **FAST)
    assert "is not a training run" in refusal(
        train.main, argv(model=world.base, out=tmp_path / "m", **flags), capsys
    )
    assert (tmp_path / "m" / "thesis.txt").exists()


def test_overwrite_never_deletes_the_model_it_starts_from(world, tmp_path, capsys):
    folder = variant(world.base, tmp_path / "m")
    refusal(
        train.main,
        argv(
            method="sft",
            model=folder,
            rollouts=world.rollouts,
            out=folder,
            overwrite=True,
            **FAST,
        ),
        capsys,
    )
    assert moved(folder, world.base) == 0


def test_overwrite_deletes_nothing_but_a_training_run(world, tmp_path, capsys):
    """Neither a folder of somebody's, nor one that holds what the run reads."""
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "thesis.txt").write_text("x")
    flags = needs(world, "opd") | FAST | dict(method="opd", overwrite=True)
    assert "replaces a training run" in refusal(
        train.main, argv(model=world.base, out=tmp_path / "notes", **flags), capsys
    )
    run(world, tmp_path / "m")
    inside = dump(tmp_path / "m" / "rollouts.jsonl", load(world.rollouts))
    assert f"would delete {inside}" in refusal(
        train.main,
        argv(model=world.base, out=tmp_path / "m", **flags | dict(rollouts=inside)),
        capsys,
    )
    assert (
        (tmp_path / "notes" / "thesis.txt").exists()
        and inside.exists()
        and (tmp_path / "m" / "model.safetensors").exists()
    )


def test_overwrite_keeps_the_old_run_when_the_new_one_is_refused(world, tmp_path, capsys):
    run(world, tmp_path / "m")
    flags = dict(needs(world, "opd"), scores=None, overwrite=True, **FAST)
    refusal(train.main, argv(model=world.base, out=tmp_path / "m", **flags), capsys)
    assert (tmp_path / "m" / "model.safetensors").exists()


def test_as_a_program_it_explains_and_exits_with_2(world, drifted, tmp_path):
    done = run_program(
        "train.py", argv(model=drifted, out=tmp_path / "m", **needs(world, "opd"))
    )
    assert (
        done.returncode == 2
        and "policy.weights" in done.stderr
        and "Traceback" not in done.stderr
    )


# ---- the folder


def test_the_saved_folder_is_a_plain_transformers_model(world, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    run(world, tmp_path / "m")
    folder = tmp_path / "m"
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(folder),
        AutoTokenizer.from_pretrained(folder),
    )
    assert (
        GenerationConfig.from_pretrained(folder).eos_token_id == tokenizer.eos_token_id == END
    )
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


def test_the_saved_folder_has_no_pickle_and_loaders_that_glob_find_only_the_model(
    world, tmp_path
):
    """Servers load every *.safetensors of a folder that has no index: the optimiser's state
    must not be among them."""
    run(world, tmp_path / "m")
    suffixes = {p.suffix for p in (tmp_path / "m").rglob("*") if p.is_file()}
    assert suffixes <= {".safetensors", ".json", ".jsonl", ".jinja", ".txt", ".model"}, suffixes
    parameters = set(weights(tmp_path / "m"))
    for path in (tmp_path / "m").glob("*.safetensors"):
        assert set(load_file(path)) <= parameters, path.name


# ---- bfloat16


def test_bfloat16_keeps_masters_so_that_tiny_steps_add_up(world, tmp_path):
    """12 steps of 1e-5: each is below the spacing of a bfloat16 weight of 0.02 and would be
    rounded away."""
    flags = dict(
        method="sft",
        rollouts=one_group(world, tmp_path / "r.jsonl"),
        dtype="bfloat16",
        steps=12,
        learning_rate=1e-5,
        weight_decay=0.0,
        fresh_optimizer=True,
    )
    train.main(argv(model=world.base, out=tmp_path / "m", **flags))
    start, end = weights(world.base), weights(tmp_path / "m")
    assert all(v.dtype == torch.bfloat16 for v in end.values())
    states = [load_file(p) for p in (tmp_path / "m").rglob("*.safetensors")]
    masters = {
        k.removeprefix("master/"): v
        for s in states
        for k, v in s.items()
        if k.startswith("master/")
    }
    assert masters.keys() == end.keys() and all(
        v.dtype == torch.float32 for v in masters.values()
    )
    name = "model.layers.0.mlp.gate_proj.weight"
    begun = start[name].bfloat16()
    step = (masters[name] - begun.float()).abs()
    assert 3e-5 < float(step.median()) < 1.3e-4, "about 12 steps of at most 1e-5"
    large = begun.abs() > 0.02  # here half a spacing is at least 6e-5, six steps
    assert float((end[name] != begun)[large].float().mean()) > 0.1
    assert torch.equal(end[name], masters[name].bfloat16())


def test_bfloat16_resumes_with_its_masters(world, tmp_path, monkeypatch):
    flags = argv(
        model=world.base,
        **dict(
            needs(world, "ropd"), **dict(RESUME, dtype="bfloat16", epochs=2, learning_rate=1e-4)
        ),
    )
    train.main(flags + ["--out", str(tmp_path / "whole")])
    real, calls = train.checkpoint, [0]

    def dying(*args):
        real(*args)
        calls[0] += 1
        if calls[0] == 3:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(train, "checkpoint", dying)
        with pytest.raises(Killed):
            train.main(flags + ["--out", str(tmp_path / "m")])
    train.main(flags + ["--out", str(tmp_path / "m")])
    same_run(tmp_path / "m", tmp_path / "whole")


# ---- the plan


def test_the_plan_walks_every_prompt_once_an_epoch():
    call, result = re.search(r"(plan\(.*\)) -> (\[.*\])", train.plan.__doc__).groups()
    assert eval("train." + call) == json.loads(result), "the docstring's example"
    names = {f"p{i}": None for i in range(10)}
    for batch in (1, 3, 10, 99):
        steps = train.plan(names, batch, 3, None, 5)
        flat = [n for s in steps for n in s]
        assert len(flat) == 30 and all(
            sorted(flat[i : i + 10]) == sorted(names) for i in (0, 10, 20)
        )
        assert flat[:10] != flat[10:20] and max(map(len, steps)) <= batch
    assert train.plan(names, 3, 1, 7, 5) == train.plan(names, 3, 9, None, 5)[:7], (
        "--steps takes as many epochs as it needs"
    )
    assert train.plan(names, 3, 1, None, 5) != train.plan(names, 3, 1, None, 6)


def test_learning_rate_schedules_at_their_corners():
    args = types.SimpleNamespace(
        learning_rate=2.0, warmup_steps=4, schedule="cosine", total_steps=14
    )

    def at(step, **more):
        return train.learning_rate(step, types.SimpleNamespace(**dict(vars(args), **more)))

    assert [at(s) for s in range(5)] == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.0])
    assert (
        at(9) == pytest.approx(1.0)
        and at(14) == pytest.approx(0, abs=1e-12)
        and at(99) == pytest.approx(0, abs=1e-12)
    )
    assert at(9, schedule="linear") == pytest.approx(1.0) and at(
        11, schedule="linear"
    ) == pytest.approx(0.6)
    assert at(99, schedule="constant") == 2.0 and at(0, warmup_steps=0) == 2.0


def test_top_k_of_another_vocabulary_or_of_two_sizes_is_refused(world, tmp_path, capsys):
    rows = load(world.scores)
    ids = records.unpack(rows[3]["topk"]["ids"])
    ids[0, 0] = 60000
    bad = [
        dict(r, topk=dict(r["topk"], ids=records.pack(ids))) if i == 3 else r
        for i, r in enumerate(rows)
    ]
    message = refused(
        world, tmp_path, capsys, method="opd-full", scores=dump(tmp_path / "a.jsonl", bad)
    )
    assert "topk: expected ids in" in message and ":4:" in message
    fewer = {
        name: records.pack(records.unpack(rows[3]["topk"][name])[:, :3])
        for name in ("ids", "logprobs")
    }
    bad = [dict(r, topk=fewer) if i == 3 else r for i, r in enumerate(rows)]
    assert "one --top-k" in refused(
        world, tmp_path, capsys, method="opd-full", scores=dump(tmp_path / "b.jsonl", bad)
    )


def test_a_full_disk_is_one_line_and_the_run_goes_on_later(world, tmp_path):
    """The file size limit of a process stands for a full disk: no file may grow beyond 60 kB,
    and the weights are larger."""
    words = argv(model=world.base, out=tmp_path / "m", **needs(world, "opd"), **FAST)
    code = (
        "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (60000, 60000));"
        "import train; from opd import files; files.run(train.main)"
    )
    full = subprocess.run(
        [sys.executable, "-c", code, *words], cwd=ROOT, capture_output=True, text=True
    )
    assert (
        full.returncode == 2
        and "make room" in full.stderr
        and "Traceback" not in full.stderr
        and not (tmp_path / "m").exists()
    )
    run(world, tmp_path / "m")
