"""Stage 4: rollouts + rewards or teacher scores -> new weights.

    python train.py --method sft  --model runs/toy/student --rollouts runs/toy/clean.jsonl
                                  --batch-size 128 --out M1
    python train.py --method ropd --model M1 --rollouts rollouts.jsonl --rewards rewards.jsonl
    --out M2
    python train.py --explain gkd                        # a method's row, formula, files, and
                                                         one worked token

Reads rollouts (or answers, for sft), the rewards and scores that belong to them, and a model
folder; writes a model folder that transformers, vLLM and lm-eval load as it is, with
metrics.jsonl and the optimiser's state beside it. opd/loss.py says what is descended,
opd/batches.py what a step is made of: this file has no branch that is named after a method.

One call is one round: the rollouts are walked once (--epochs), in a seeded order, --batch-size
prompts with all their rollouts an optimiser step.  The log-probs of the starting weights are
computed before the first update when there is more than one.  Given M2 as --model, a next round
of the same --method continues M2's optimiser and step count.

On-policy is checked, not believed: a row of METHODS with prefix "self" accepts only rollouts
whose recorded weight hash is that of --model, sampled with the same chat template and
vocabulary, at top-p 1 (--allow-stale skips the first).

Checkpoints go to OUT.partial every --save-every steps; a killed run continues there, and ends
in the same bits.

Simplifications: 1. one device; 2. models run in evaluation mode (no dropout), so no random
state needs saving;
3. rows of a micro-batch are padded, not packed; 4. parameters are all trained, no LoRA.
"""

import functools
import json
import math
import shutil
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from methods.explain import explain as explain_row
from methods.gad import load_scorer, weigh_scores
from methods.simct.units import raw_logits
from opd import files
from opd import loss as losses
from opd.batches import Data, check_teacher, plan, taught_by
from opd.kernel import KERNELS, linear_token_loss, token_numbers
from opd.policy import (
    find_folder,
    hash_weights,
    hidden_at,
    likeliest,
    load_policy,
    response_positions,
    token_batches,
)
from opd.records import BadInput
from opd.tools import call_use

# ---- one step


def states(policy, items):
    """Hidden states [N, D] that predict the trained tokens of a micro-batch, in order; for a
    discriminator, those of the last tokens."""
    if "judged" in items[0]:
        return policy.states([s["judged"] for s in items])
    return hidden_at(
        policy.model,
        [s["prompt_ids"] + s["response_ids"] for s in items],
        [response_positions(s["prompt_ids"], s["mask"]) for s in items],
    )


def chosen_ids(items, field=None):
    """The recorded tokens, [N, 1]; of a field like "support_ids" its ids, [N, K]; K = 0 where
    items have none."""
    if field:
        arrays = [s.get(field, np.zeros((s["length"], 0))) for s in items]
        return torch.from_numpy(np.concatenate(arrays).astype(np.int64))
    return torch.tensor(
        [t for s in items for t, m in zip(s["response_ids"], s["mask"]) if m], dtype=torch.int64
    )[:, None]


def known(items, device, vocabulary):
    """The constant per-token tensors of a micro-batch for loss.token_loss, in the order of
    `states`."""
    batch = {}
    for name in (
        "old_logp",
        "behaviour_logp",
        "teacher_logp",
        "support_logp",
        "reference_logp",
        "reference_support_logp",
        "token_weight",
        "weight",
        "share",
        "unit",
        "prefix",
        "sorted_logp",
        "sorted_here",
    ):
        if name in items[0]:
            batch[name] = torch.from_numpy(
                np.concatenate([s[name] for s in items]).astype(np.float32)
            ).to(device)
    batch["sequence"] = torch.repeat_interleave(torch.tensor([s["length"] for s in items])).to(
        device
    )
    if "advantage" in items[0]:
        batch["advantage"] = torch.tensor(
            [s["advantage"] for s in items for _ in range(s["length"])],
            dtype=torch.float32,
            device=device,
        )
    if "support_logp" in batch:
        batch["whole"] = batch["support_logp"].shape[1] >= vocabulary
    if "reference_support_logp" in batch:
        batch["reference_whole"] = batch["reference_support_logp"].shape[1] >= vocabulary
    return batch


@torch.no_grad()
def current_logps(policy, data, items, args):
    """log-probs [length] of the trained tokens of every item under the weights as they are
    now."""
    out = [None] * len(items)
    for batch in token_batches(
        [len(s["prompt_ids"]) + len(s["response_ids"]) for s in items], args.micro_batch_tokens
    ):
        micro = [items[i] for i in batch]
        hidden = states(policy, micro)
        logp = (
            token_numbers(
                hidden,
                policy.head,
                chosen_ids(micro).to(hidden.device),
                temperature=data.temperature or 1.0,
                kernel=args.kernel,
                **policy.head_options,
            )
            .logp[:, 0]
            .cpu()
            .numpy()
        )
        for i, part in zip(
            batch, np.split(logp, np.cumsum([items[i]["length"] for i in batch])[:-1])
        ):
            out[i] = part
    return out


def starting_logps(policy, data, keys, args):
    """{key: log-probs of its trained tokens} before the first update, a thousand rollouts in
    memory at a time."""
    out = {}
    for start in range(0, len(keys), 1024):
        out.update(
            zip(
                keys[start : start + 1024],
                current_logps(policy, data, data.sequences(keys[start : start + 1024]), args),
            )
        )
    return out


def weigh_pairs(policy, data, items, args):
    """Scales the signs that a pair's answers carry as their omega, from the log-probs of this
    moment.  Returns metrics."""
    pairs, margins = {}, []
    for item, logp in zip(items, current_logps(policy, data, items, args)):
        pairs.setdefault(item["key"][0], []).append(
            (item, float((logp - item["reference_logp"]).sum()))
        )
    for pair in pairs.values():
        signs, ratios = [item["omega"] for item, _ in pair], [ratio for _, ratio in pair]
        if not all(item["length"] for item, _ in pair):  # half a pair is no preference
            for item, _ in pair:
                item["omega"] = 0.0
            continue
        margins.append(data.method.omega_scale * sum(s * r for s, r in zip(signs, ratios)))
        for (item, _), omega in zip(
            pair, losses.preference_weights(data.method.omega_scale, signs, ratios)
        ):
            item["omega"] = omega
    return (
        {}
        if not margins
        else {
            "preference/margin": float(np.mean(margins)),
            "preference/accuracy": float(np.mean(np.asarray(margins) > 0)),
            "preference/loss": float(np.logaddexp(0, -np.asarray(margins)).mean()),
        }
    )


def gradient(policy, data, items, masters, args, scale=1.0):
    """Adds the gradient of one source of texts, times `scale`, micro-batch by micro-batch.
    Returns (items that counted, their metrics)."""
    method, lengths = data.method, [s["length"] for s in items]
    weights = losses.token_weights(lengths, method.norm, [s["omega"] for s in items])
    # of a mean that is logged
    shares = losses.token_weights(lengths, "sequence" if method.norm == "sequence" else "token")
    for item, weight, share in zip(items, weights, shares):
        item["weight"], item["share"] = np.asarray(weight) * scale, np.asarray(share)
    items = [s for s in items if s["length"] and s["omega"]]
    if not items:
        raise BadInput(
            "train.py: a whole optimiser step has no token to train on (every loss mask is 0)"
        )
    sums, worst = {}, {}
    for micro in token_batches(
        [len(s["prompt_ids"]) + len(s["response_ids"]) for s in items], args.micro_batch_tokens
    ):
        micro = [items[i] for i in micro]
        micro_batch(policy, data, micro, args, sums, worst).backward()
        for p, master in zip(policy.model.parameters(), masters):
            if master is not p and p.grad is not None:  # micro-batches add up in float32
                master.grad, p.grad = (
                    p.grad.float() if master.grad is None else master.grad.add_(p.grad),
                    None,
                )
    if "policy/weight_square" in sums:  # of pi / mu - 1
        gap, square = sums.pop("policy/weight_gap"), sums.pop("policy/weight_square")
        sums |= {
            "policy/weight_std": math.sqrt(max(0.0, square - gap**2)),
            "policy/weight_ess": (1 + gap) ** 2 / (1 + 2 * gap + square),
        }
    return items, sums | worst


def optimise(policy, data, items, masters, optimiser, args, gold=()):
    """One optimiser step on `items`: micro-batches, one gradient, one update.  Returns the
    step's metrics.

    gold: (Data, its items), the given answers of a row that takes some."""
    extra, own = (
        weigh_pairs(policy, data, items, args) if data.method.omega == "preference" else {},
        items,
    )
    if data.method.scalar:  # one loss of own and given answers together
        extra = weigh_scores(policy, data.method.omega, own, gold[1], args.micro_batch_tokens)
        items = [*own, *gold[1]]
    items, metrics = gradient(policy, data, items, masters, args)
    if data.method.gold_weight:
        _, more = gradient(policy, *gold, masters, args, data.method.gold_weight)
        extra |= {"gold/nll": more["train/loss"] / data.method.gold_weight}
        metrics["train/loss"] += more["train/loss"]
    norm = torch.nn.utils.clip_grad_norm_(
        masters, args.grad_clip if args.grad_clip > 0 else math.inf
    )
    if not torch.isfinite(norm):
        raise BadInput(
            f"train.py: gradient norm is {float(norm)}: lower --learning-rate, or look for "
            f"bad log-probs in the inputs"
        )
    optimiser.step()
    optimiser.zero_grad()
    with torch.no_grad():
        for p, master in zip(policy.model.parameters(), masters):
            if master is not p:
                p.copy_(master)
    return (
        metrics
        | {"train/grad_norm": float(norm)}
        | sequence_metrics(own if data.method.scalar else items)
        | extra
    )


def micro_batch(policy, data, items, args, sums, worst):  # noqa: C901
    """The loss of a micro-batch, a scalar; its part of the step's metrics is added to `sums`
    and `worst`."""
    method, hidden = data.method, states(policy, items)
    if method.scalar:
        return -(
            (hidden @ policy.head.T)[:, 0].float()
            @ known(items, hidden.device, policy.vocabulary)["weight"]
        )
    ids, leash = (
        torch.cat([chosen_ids(items), chosen_ids(items, "support_ids")], 1).to(
            policy.head.device
        ),
        chosen_ids(items, "reference_support_ids").to(policy.head.device),
    )
    batch, teacher = known(items, hidden.device, policy.vocabulary), None
    # read here and now instead of from a file: its whole vocabulary, or its likeliest tokens
    if data.teacher is not None:
        with torch.no_grad():
            t_hidden = states(data.teacher, items)
            if args.teacher_top_k:
                ids, batch["whole"] = (
                    torch.cat([ids, likeliest(data.teacher, t_hidden, args.teacher_top_k)], 1),
                    args.teacher_top_k >= policy.vocabulary,
                )
        teacher = (
            t_hidden,
            data.teacher.head,
            {k: data.teacher.head_options[k] for k in ("scale", "softcap")},
        )
    if method.coefficient == "sorted":  # the policy's own largest, as many as the teacher's
        with torch.no_grad():
            ids = torch.cat([ids, likeliest(policy, hidden, batch["sorted_logp"].shape[1])], 1)
        batch["sorted_logp"] = batch["sorted_logp"][:, : ids.shape[1] - 1]
    width, ids = ids.shape[1], torch.cat([ids, leash], 1)
    if method.span == "logit":
        batch["raw"] = raw_logits(hidden, policy.head, ids[:, 0], **policy.head_options)

    def loss(cut, numbers):
        some = {k: v if isinstance(v, bool) else v[cut] for k, v in batch.items()}
        if teacher is not None:
            some["teacher_logp"] = numbers.teacher_logp[:, 0].detach()
            if args.teacher_top_k:
                some["support_logp"] = numbers.teacher_logp[:, 1:width].detach()
        kls = (
            (numbers.reverse_kl, numbers.forward_kl)
            if teacher is not None and not args.teacher_top_k
            else None
        )
        value = losses.token_loss(method, numbers.logp, numbers.entropy, some, kls)
        logp, entropy = numbers.logp.detach()[:, 0], numbers.entropy.detach()
        for name, x in token_metrics(method, logp, entropy, some, numbers, kls).items():
            sums[name] = sums.get(name, 0.0) + float((x * some["share"]).sum())
        sums["train/loss"] = sums.get("train/loss", 0.0) + float(
            (value.detach() * some["weight"]).sum()
        )
        if "behaviour_logp" in some:
            old = some.get("old_logp", logp)
            for name, x in (
                ("rollout/logprob_gap_max", old - some["behaviour_logp"]),
                ("policy/ratio_gap_max", torch.expm1(logp - old)),
            ):
                worst[name] = max(worst.get(name, 0.0), float(x.abs().max()))
        return (value * some["weight"]).sum()

    options = dict(
        temperature=data.temperature or 1.0,
        teacher=teacher,
        kernel=args.kernel,
        **policy.head_options,
    )
    if method.separable:
        return linear_token_loss(hidden, policy.head, ids, loss, **options)
    return loss(slice(None), token_numbers(hidden, policy.head, ids, **options))


def token_metrics(method, logp, entropy, batch, numbers, exact):  # noqa: C901
    """Per-token tensors [N] whose mean is logged."""
    out = {"policy/entropy": entropy}
    if method.signal == "tokens":
        return out
    if "behaviour_logp" in batch:
        old = batch.get("old_logp", logp)
        # KL(pi_old || pi) from pi_old's samples, k3
        out["policy/kl_from_start"] = (logp - old).exp() - 1 - (logp - old)
        out["rollout/logprob_gap_mean"] = (old - batch["behaviour_logp"]).abs()
        # one-sample reverse KL of the policy that sampled; single tokens may be negative
        if "teacher_logp" in batch:
            out["kl/teacher"] = batch["behaviour_logp"] - batch["teacher_logp"]
        # of pi / mu: how far the samples are from this policy's own
        if method.signal == "teacher":
            gap = torch.expm1(logp - batch["behaviour_logp"])
            out["policy/weight_gap"], out["policy/weight_square"] = gap, gap**2
    if numbers.reverse_kl is not None:
        out["kl/reverse"], out["kl/forward"] = (
            numbers.reverse_kl.detach(),
            numbers.forward_kl.detach(),
        )
    if "unit" in batch:
        out["kl/units"], several = (
            losses.unit_divergence(method, numbers.logp.detach(), batch).detach(),
            (batch["unit"][:, 2] > 1) | (batch["unit"][:, 3] > 1),
        )
        out["units/spans"], out["units/tokens_inside"] = several.float(), batch["unit"][:, 1]
    elif "support_logp" in batch:
        out["kl/teacher_support_mass"] = batch["support_logp"].exp().sum(-1)
    if "reference_logp" in batch:
        out["kl/reference"] = logp - batch["reference_logp"]
    if "reference_support_logp" in batch:
        leash = batch["reference_support_logp"]
        out["kl/reference_exact"] = losses.divergence(
            "rkl", numbers.logp.detach()[:, -leash.shape[1] :], leash, batch["reference_whole"]
        )
    if "token_weight" in batch:
        out["weights/mean"], out["weights/kept"] = (
            batch["token_weight"],
            (batch["token_weight"] > 0).float(),
        )
    kl = (
        losses.teacher_divergence(method, numbers.logp.detach(), batch, exact).detach()
        if method.baseline == "kl"
        else None
    )
    if method.advantage_clip:
        advantage = (
            batch["teacher_logp"] - logp
            if method.coefficient == "k2"
            else losses.teacher_advantage(method, batch, kl)
        )
        out["policy/advantage_clip_fraction"] = (
            advantage.abs() > method.advantage_clip
        ).float()
    # where the clip takes the gradient away
    if (method.clip_low or method.clip_high) and "behaviour_logp" in batch:
        ratio = losses.log_ratio(
            method, logp, old if method.advantage != "none" else batch["behaviour_logp"], batch
        ).exp()
        good = losses.sampled_advantage(method, batch, kl) > 0
        high, low = 1 + (method.clip_high or math.inf), 1 - (method.clip_low or 1)
        out["policy/clip_fraction"] = torch.where(good, ratio > high, ratio < low).float()
    return out


def sequence_metrics(items):
    out = {
        "rollout/length_mean": float(np.mean([s["tokens"] for s in items])),
        "rollout/length_max": max(s["tokens"] for s in items),
        "rollout/truncated": float(np.mean([s["truncated"] for s in items])),
        "train/tokens": sum(s["tokens"] for s in items),
        "train/sequences": len(items),
        "rollout/on_policy_fraction": float(np.mean([s["own"] for s in items])),
    }
    if "calls" in items[0]:
        out |= {
            f"rollout/{name}": value
            for name, value in call_use(
                [s["calls"] for s in items], [s["limited"] for s in items]
            ).items()
        }
    if "reward" in items[0]:
        out["reward/mean"] = float(np.mean([s["reward"] for s in items]))
        out["reward/advantage_abs_mean"] = float(np.mean([abs(s["advantage"]) for s in items]))
    # at the last token of every rollout, whether it ended there or was cut
    for name in ("student_end_mass", "teacher_end_mass"):
        if all(name in s for s in items):  # a server, or an older file, does not say
            out[f"rollout/{name}"] = float(np.mean([s[name] for s in items]))
    if "repetitive" in items[0]:
        out["rollout/repetition"] = float(np.mean([s["repetitive"] for s in items]))
        for name, some in (("repetitive", True), ("other", False)):
            gaps = [
                s["teacher_logp"] - s["behaviour_logp"]
                for s in items
                if s["repetitive"] == some and "teacher_logp" in s
            ]
            if gaps:
                out[f"kl/teacher_{name}"] = -float(np.concatenate(gaps).mean())
    return out


def learning_rate(step, args):
    """Warm-up, then constant, or linear / cosine decay to zero at --total-steps.  `step` counts
    from 0 over all rounds."""
    scale = min(1.0, (step + 1) / args.warmup_steps) if args.warmup_steps else 1.0
    if args.schedule != "constant":
        done = min(
            1.0, max(0, step - args.warmup_steps) / max(1, args.total_steps - args.warmup_steps)
        )
        scale *= 1 - done if args.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return args.learning_rate * scale


# ---- checkpoints


def save(folder, policy, masters, optimiser, state):
    """A complete model folder.  Its subfolder trainer/ has the moments and master weights as
    safetensors and the rest as JSON: a subfolder, because loaders take every *.safetensors
    beside config.json for weights of the model."""
    (folder / "trainer").mkdir(parents=True, exist_ok=True)
    tensors, names = {}, [n for n, _ in policy.model.named_parameters()]
    for name, master, p in zip(names, masters, policy.model.parameters()):
        for key, value in optimiser.state.get(master, {}).items():
            tensors[f"{key}/{name}"] = value.contiguous()
        if master is not p:
            tensors[f"master/{name}"] = master.detach()
    try:
        policy.model.save_pretrained(folder)
        policy.tokenizer.save_pretrained(folder)
        save_file(tensors, folder / "trainer" / "optimizer.safetensors")
    except (OSError, SafetensorError) as error:
        raise BadInput(
            f"{folder}: could not be written ({error}): make room and run the same command "
            f"again, it goes on from its last checkpoint"
        ) from None
    files.write_atomically(
        folder / "trainer" / "state.json", json.dumps(state, indent=1, default=str) + "\n"
    )


def load_trainer_state(folder, policy, masters, optimiser):
    """Puts moments and master weights back; returns the JSON part."""
    tensors = load_file(folder / "trainer" / "optimizer.safetensors")
    for (name, _), master in zip(policy.model.named_parameters(), masters):
        entry = {
            key: tensors[f"{key}/{name}"]
            .clone()
            .to("cpu" if key == "step" and not optimiser.defaults["fused"] else master.device)
            for key in ("step", "exp_avg", "exp_avg_sq")
            if f"{key}/{name}" in tensors
        }
        if entry:
            optimiser.state[master] = entry
        if f"master/{name}" in tensors:
            master.data.copy_(tensors[f"master/{name}"])
    return json.loads((folder / "trainer" / "state.json").read_text())


def checkpoint(partial, step, *content):
    """Writes OUT.partial/step-N, then points LATEST at it: a kill at any moment leaves one
    complete checkpoint."""
    save(partial / f"step-{step}", *content)
    files.write_atomically(partial / "LATEST", f"step-{step}")
    for old in partial.glob("step-*"):
        if old.name != f"step-{step}":
            shutil.rmtree(old)


# ---- the stage


def check_inputs(args, method):
    """The files a row reads are there, and none that it does not read."""
    row = f"--method {args.method}"
    for needed, flags in (
        (method.rewards, {"rewards": "FILE"}),
        (method.teacher, {"scores": "FILE", "teacher": "FOLDER"}),
        (method.reference, {"reference": "FILE"}),
        (method.token_weight != "one", {"token_weights": "FILE"}),
        (method.given, {"data": "FILE"}),
        (method.prefix == "mixed" and not args.teacher, {"data_scores": "FILE"}),
    ):
        given = [f"--{flag.replace('_', '-')}" for flag in flags if getattr(args, flag)]
        if needed and not given:
            raise BadInput(
                f"{row}: expected "
                f"{' or '.join(f'--{k} {v}' for k, v in flags.items()).replace('_', '-')}, "
                f"but it is missing"
            )
        if "--data-scores" in given and args.teacher:
            raise BadInput(
                "--data-scores and --teacher both say what the teacher thinks: give one of them"
            )
        if given and not needed:
            raise BadInput(f"{row}: {given[0]} is given, but this method does not read it")
        if len(given) > 1:
            raise BadInput(
                f"{' and '.join(given)} both say what the teacher thinks: give one of them"
            )
    if method.prefix == "self" and args.prompts and not args.data:
        raise BadInput(
            f"{row}: --prompts is given, but rollouts bring their prompt's tokens along"
        )
    if args.teacher_top_k is not None and not (args.teacher and method.support):
        raise BadInput(
            "--teacher-top-k: how much of a --teacher's distribution is read: needs "
            "--teacher and a method that reads a distribution"
        )
    if args.teacher and method.coefficient in ("unit", "sorted"):
        raise BadInput(
            f"{row}: a teacher of another vocabulary is read from --scores (teacher.py "
            f"units), got --teacher"
        )
    if args.teacher and method.divergence == "jsd" and not args.teacher_top_k:
        raise BadInput(
            "--teacher: a Jensen-Shannon divergence does not come out of the kernel's one "
            "pass: give --teacher-top-k (the vocabulary's size: exact)"
        )


def load_teacher(args, policy, weights):
    """The --teacher as a Policy that shares the student's token ids, and its template unless a
    mismatch is meant."""
    teacher = load_policy(
        args.teacher, args.teacher_dtype, args.device, args.template_options, weights
    )
    for field in (
        ("vocabulary",) if args.allow_template_mismatch else ("vocabulary", "template")
    ):
        if teacher.identity[field] != policy.identity[field]:
            raise BadInput(
                f"--teacher {args.teacher}: expected the {field} of {args.model}, "
                f"{policy.identity[field]}, got {teacher.identity[field]}: "
                + (
                    "their token ids mean different things"
                    if field == "vocabulary"
                    else (
                        "a teacher off its own template scores badly; pass "
                        "--allow-template-mismatch if this is meant"
                    )
                )
            )
    return teacher


def explain(argv):
    """train.py --explain NAME [--set COLUMN=VALUE]."""
    p = files.parser(
        "A row of loss.METHODS in words.\n\n    python train.py --explain gkd --set "
        "interpolation=0.1"
    )
    p.add_argument(
        "--explain",
        required=True,
        metavar="NAME",
        help="row of loss.METHODS: " + ", ".join(losses.METHODS),
    )
    p.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="COLUMN=VALUE",
        help="change a column of it",
    )
    args = p.parse_args(argv)
    text = explain_row(args.explain, args.set)
    print(text)
    return {"explain": text}


def main(argv=None):  # noqa: C901
    p = files.parser(__doc__)
    p.add_argument(
        "--explain",
        metavar="NAME",
        help="print that row of loss.METHODS: formula, files, one worked token; trains nothing",
    )
    p.add_argument(
        "--method",
        required=True,
        metavar="NAME",
        help="row of loss.METHODS: " + ", ".join(losses.METHODS),
    )
    p.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="COLUMN=VALUE",
        help="change a column of that row for this run",
    )
    p.add_argument(
        "--model", required=True, help="folder or Hugging Face id of the policy to train"
    )
    p.add_argument(
        "--rollouts",
        required=True,
        help="JSONL of rollouts, or of answers for methods on other people's texts (sft: or "
        "of prompts with a `solution`)",
    )
    p.add_argument("--rewards", help="JSONL of rewards for these rollouts (rubric.py grade)")
    p.add_argument(
        "--scores", help="JSONL of teacher scores for these rollouts (teacher.py score)"
    )
    p.add_argument(
        "--teacher",
        help="folder or Hugging Face id of a teacher to read in place of --scores: opd-full "
        "then sees its whole distribution",
    )
    p.add_argument(
        "--teacher-dtype",
        default="auto",
        choices=("auto", "float32", "bfloat16", "float16"),
        help="auto: as its folder stores it",
    )
    p.add_argument(
        "--teacher-top-k",
        type=int,
        metavar="K",
        help="read only the K likeliest tokens of --teacher (default: exact; the "
        "vocabulary's size is exact, too)",
    )
    p.add_argument(
        "--allow-template-mismatch",
        action="store_true",
        help="a --teacher with another chat template, off its own ground",
    )
    p.add_argument(
        "--reference",
        help="JSONL of reference-policy scores for the KL leash (teacher.py score --model "
        "START)",
    )
    p.add_argument(
        "--token-weights",
        help="JSONL of a number for every token of these rollouts (methods.prefix), for a "
        "method "
        "that reads them (release, sod)",
    )
    p.add_argument(
        "--allow-teacher-mismatch",
        action="store_true",
        help="another teacher than that of the fine-tuning, for a method that wants the same",
    )
    p.add_argument(
        "--data",
        help="JSONL of given answers to the same prompts (gkd: in the rollouts' place; "
        "stable-opd: beside them), or of prompts with a `solution`",
    )
    p.add_argument("--data-scores", help="JSONL of teacher scores for --data")
    p.add_argument(
        "--prompts", help="JSONL of prompts, for answers that bring neither tokens nor messages"
    )
    p.add_argument("--out", required=True, help="folder for the new weights")
    p.add_argument(
        "--batch-size",
        type=int,
        default=32,
        help="prompts an optimiser step, each with all its rollouts",
    )
    p.add_argument(
        "--epochs",
        type=int,
        help="walks over the rollouts (default: 1); more make on-policy data stale",
    )
    p.add_argument(
        "--steps", type=int, help="exactly this many optimiser steps instead of --epochs"
    )
    p.add_argument(
        "--learning-rate",
        type=float,
        default=1e-6,
        help="peak of AdamW's learning rate; tiny models want 1e-3",
    )
    p.add_argument(
        "--weight-decay", type=float, default=0.01, help="AdamW's decoupled weight decay"
    )
    p.add_argument(
        "--adam-beta2",
        type=float,
        default=0.999,
        help="memory of AdamW's second moment; 0.95 forgets faster",
    )
    p.add_argument(
        "--grad-clip", type=float, default=1.0, help="largest gradient norm; 0 is off"
    )
    p.add_argument(
        "--schedule",
        default="constant",
        choices=("constant", "linear", "cosine"),
        help="decay to 0 at --total-steps",
    )
    p.add_argument(
        "--warmup-steps",
        type=int,
        default=0,
        help="steps of linear warm-up, counted over all rounds",
    )
    p.add_argument(
        "--total-steps",
        type=int,
        help="end of the decay, counted over all rounds (default: this call's last step)",
    )
    p.add_argument(
        "--micro-batch-tokens",
        type=int,
        default=8192,
        help="rows x longest row in one forward pass: memory, not result",
    )
    p.add_argument(
        "--kernel",
        default="auto",
        choices=KERNELS,
        help="log-prob kernel: naive holds all logits at once, for comparison",
    )
    p.add_argument(
        "--dtype",
        default="float32",
        choices=("float32", "bfloat16"),
        help="bfloat16 keeps float32 master weights in the state",
    )
    p.add_argument("--device", help="cpu, cuda, cuda:1 ... (default: a GPU if there is one)")
    p.add_argument(
        "--template-options",
        type=json.loads,
        default={},
        metavar="JSON",
        help="as for rollout.py",
    )
    p.add_argument(
        "--save-every",
        type=int,
        default=100,
        help="steps between checkpoints a killed run continues from",
    )
    p.add_argument(
        "--fresh-optimizer",
        action="store_true",
        help="do not continue the optimiser state of --model",
    )
    p.add_argument(
        "--allow-stale",
        action="store_true",
        help="accept rollouts of other weights for an on-policy method",
    )
    p.add_argument(
        "--tail",
        type=int,
        default=256,
        help="characters at the end of a rollout that are searched for repetition, as in "
        "eval.py",
    )
    p.add_argument(
        "--threshold",
        type=float,
        default=4.0,
        help="compression ratio that counts as repetitive",
    )
    p.add_argument("--seed", type=int, default=0, help="order of the prompts")
    p.add_argument("--overwrite", action="store_true", help="replace --out and any partial run")
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["--explain"] or argv[:1] and argv[0].startswith("--explain="):
        return explain(argv)
    args = p.parse_args(argv)
    if args.explain:
        p.error("--explain: comes first, and alone but for --set")
    for flag in (
        "batch_size",
        "micro_batch_tokens",
        "save_every",
        "epochs",
        "steps",
        "teacher_top_k",
    ):
        if getattr(args, flag) is not None and getattr(args, flag) < 1:
            raise BadInput(
                f"--{flag.replace('_', '-')}: expected at least 1, got {getattr(args, flag)}"
            )
    if args.steps and args.epochs:
        raise BadInput("--steps and --epochs both say how long to train: give one of them")
    if args.total_steps and args.schedule == "constant":
        raise BadInput("--total-steps: the end of a decay; a constant schedule has none")
    if args.kernel == "triton" and args.teacher:
        raise BadInput(
            "--kernel triton: has no KL to a teacher in memory: use auto or torch with "
            "--teacher"
        )
    if args.kernel == "triton" and not find_spec("triton"):
        raise BadInput("--kernel triton: `pip install triton` first")
    method = losses.settings(args.method, args.set)
    check_inputs(args, method)
    out, partial = Path(args.out), Path(str(args.out) + ".partial")
    source = find_folder(args.model)
    flags = {
        k: v
        for k, v in vars(args).items()
        if k
        not in (
            "overwrite",
            "save_every",
            "micro_batch_tokens",
            "device",
            "kernel",
            "tail",
            "threshold",
        )
    }
    run = {
        "flags": flags,
        "method": method.columns(),
        "weights": hash_weights(source),
        "teacher": hash_weights(find_folder(args.teacher)) if args.teacher else None,
        "inputs": {
            f: files.hash_file(f)
            for f in (
                args.rollouts,
                args.rewards,
                args.scores,
                args.reference,
                args.data,
                args.data_scores,
                args.token_weights,
                args.prompts,
            )
            if f
        },
    }
    if out.exists() and out.samefile(source):
        raise BadInput(f"--out {out}: is the model to start from: give another --out")
    if not args.overwrite:
        for state_file in (out / "trainer" / "state.json", partial / "run.json"):
            if state_file.exists() and (
                difference := files.first_difference(
                    json.loads(state_file.read_text()).get("run"), run
                )
            ):
                raise BadInput(
                    f"{state_file}: holds another training run ({difference}): give another "
                    f"--out, or --overwrite"
                )
        if (out / "trainer" / "state.json").exists():
            summary = json.loads((out / "trainer" / "state.json").read_text())["summary"]
            print(f"train.py: {out}: complete already, {summary['steps']} steps")
            return summary
        if out.exists():
            raise BadInput(
                f"{out}: exists and is not a training run of this stage: give another --out"
            )
    elif (
        out.exists()
        and (not out.is_dir() or any(out.iterdir()))
        and not (out / "trainer" / "state.json").exists()
    ):
        raise BadInput(
            f"--overwrite: replaces a training run, and {out} is none: give another --out"
        )
    elif inside := [
        path
        for path in vars(args).values()
        if isinstance(path, str)
        and path != args.out
        and Path(path).exists()
        and out.resolve() in Path(path).resolve().parents
    ]:
        raise BadInput(
            f"--overwrite: would delete {inside[0]}, which this run reads, with {out}: give "
            f"another --out"
        )

    load = (
        functools.partial(load_scorer, seed=args.seed, view=method.view)
        if method.scalar
        else load_policy
    )
    policy = load(args.model, args.dtype, args.device, args.template_options, run["weights"])
    teacher = load_teacher(args, policy, run["teacher"]) if args.teacher else None
    data = Data(args, method, policy, teacher)
    check_teacher(args, source, method, data)
    given = None
    if args.data:
        given = (
            Data(args, losses.METHODS["sft"], policy, given=True)
            if method.gold_weight
            else Data(args, method, policy, teacher, given=True)
        )
    if given and (missing := [prompt for prompt in data.groups if prompt not in given.groups]):
        raise BadInput(
            f"{args.data}: expected an answer to every prompt of {args.rollouts}, got none "
            f"to id {missing[0]!r}"
        )
    if args.overwrite:  # only now, when the new run's inputs are known to be good
        for folder in (out, partial):
            shutil.rmtree(folder, ignore_errors=True)
    steps = plan(data.groups, args.batch_size, args.epochs or 1, args.steps, args.seed)
    old = {}
    if method.on_policy and len(steps) > 1:
        old = starting_logps(
            policy, data, [key for keys in data.groups.values() for key in keys], args
        )

    masters = [
        p if p.dtype == torch.float32 else p.detach().float().requires_grad_()
        for p in policy.model.parameters()
    ]
    # one pass over memory in place of ten: on a CPU 0.1 s instead of several for 135 million
    # parameters; a tiny model gains nothing
    fused = sum(m.numel() for m in masters) > 10_000_000
    optimiser = torch.optim.AdamW(
        masters,
        lr=args.learning_rate,
        betas=(0.9, args.adam_beta2),
        weight_decay=args.weight_decay,
        fused=fused,
    )
    done, before, metrics_path = 0, {"step": 0, "tokens": 0}, partial / "metrics.jsonl"
    if (partial / "LATEST").exists():
        folder = partial / (partial / "LATEST").read_text()
        policy.model.load_state_dict(
            load(folder, args.dtype, args.device, weights="unfinished").model.state_dict()
        )
        state = load_trainer_state(folder, policy, masters, optimiser)
        done, before = state["done"], state["before"]
        kept = metrics_path.read_text().splitlines(keepends=True)[:done]
        files.write_atomically(metrics_path, kept)
    else:
        partial.mkdir(parents=True, exist_ok=True)
        files.write_atomically(partial / "run.json", json.dumps({"run": run}, indent=1) + "\n")
        metrics_path.unlink(missing_ok=True)
        continued = source / "trainer" / "state.json"
        if (
            continued.exists()
            and not args.fresh_optimizer
            and json.loads(continued.read_text())["run"]["flags"]["method"] == args.method
        ):
            state = load_trainer_state(source, policy, masters, optimiser)
            before = {"step": state["step"], "tokens": state["tokens"]}
    args.total_steps = args.total_steps or before["step"] + len(steps)

    tokens, started, cut, alarms = (
        before["tokens"] if not done else state["tokens"],
        time.time(),
        0.0,
        0,
    )
    with open(metrics_path, "ab", buffering=0) as log:
        for index in files.progress(
            range(done, len(steps)), initial=done, total=len(steps), desc=f"train {args.method}"
        ):
            step = before["step"] + index
            # a coin of each step's own: rounds of a few steps under one seed must not toss the
            # same few coins again and again
            texts = (
                data
                if np.random.default_rng([args.seed, 1, step]).random()
                < method.student_fraction
                else given
            )
            items = texts.sequences(
                [key for prompt in steps[index] for key in texts.groups[prompt]]
            )
            for item in items:
                if texts is data and item["key"] in old:
                    item["old_logp"] = old[item["key"]]
            for group in optimiser.param_groups:
                group["lr"] = learning_rate(step, args)
            gold = (
                (
                    given,
                    given.sequences(
                        [key for prompt in steps[index] for key in given.groups[prompt]]
                    ),
                )
                if method.gold_weight or method.scalar
                else ()
            )
            metrics = optimise(policy, texts, items, masters, optimiser, args, gold)
            metrics["alarm/collapse"], cut = (
                float(
                    metrics.get("rollout/repetition", 0) >= 0.05
                    or min(cut, metrics["rollout/truncated"]) > 0.9
                ),
                metrics["rollout/truncated"],
            )
            alarms += metrics["alarm/collapse"]
            tokens += metrics["train/tokens"]
            metrics |= {
                "train/learning_rate": learning_rate(step, args),
                "train/tokens_total": tokens,
            }
            if method.rewards:
                metrics |= data.signals
            files.append_whole(log, json.dumps({"step": step + 1} | metrics).encode() + b"\n")
            if (index + 1) % args.save_every == 0 and index + 1 < len(steps):
                checkpoint(
                    partial,
                    index + 1,
                    policy,
                    masters,
                    optimiser,
                    {
                        "run": run,
                        "done": index + 1,
                        "before": before,
                        "step": step + 1,
                        "tokens": tokens,
                    },
                )
    summary = {
        "out": str(out),
        "steps": len(steps),
        "step": before["step"] + len(steps),
        "trained_tokens": tokens - before["tokens"],
        "loss": metrics["train/loss"],
        "groups_dropped": data.dropped,
        "groups_without_weight": data.silent,
        "retokenized": len(data.retokenized),
        "seconds": round(time.time() - started, 2),
    }
    final = partial / "final"
    shutil.rmtree(final, ignore_errors=True)
    save(
        final,
        policy,
        masters,
        optimiser,
        {"run": run, "step": summary["step"], "tokens": tokens, "summary": summary},
    )
    shutil.copy(metrics_path, final / "metrics.jsonl")
    if taught := taught_by(source, method, data):
        files.write_atomically(final / "sft_teacher.json", json.dumps(taught) + "\n")
    final.rename(out)
    shutil.rmtree(partial)
    if alarms:
        print(
            f"train.py: {out}: WARNING: in {alarms:.0f} of {len(steps) - done} steps at "
            f"least 5 % of the texts were repetitive, or more than 90 % cut at "
            f"their longest "
            "twice in a row: length inflation (rollout/repetition, rollout/truncated; "
            "--method stable-opd)"
        )
    print(
        f"train.py: {out}: {args.method}, {len(steps)} steps, {summary['trained_tokens']} "
        f"tokens, loss {summary['loss']:.4f}"
        + (f", {data.dropped} groups dropped for failed judgements" if data.dropped else "")
    )
    return summary


if __name__ == "__main__":
    files.run(main)
