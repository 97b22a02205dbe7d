"""Stage 4: rollouts + rewards or teacher scores -> new weights.

    python train.py --method sft --model runs/toy/student --rollouts clean.jsonl --out M1
    python train.py --method ropd --model M1 --rollouts R.jsonl --rewards W.jsonl --out M2

Reads rollouts (or answers, for sft), the rewards and scores that belong to them, and a model
folder; writes a model folder that transformers, vLLM and lm-eval load as it is, with
metrics.jsonl and the optimiser's state beside it.  opd/loss.py defines the loss (ROPD, arXiv
2605.07396, eq. 6-8, is one of its rows), opd/batches.py a step's data, opd/trainer.py the
optimiser and resume.  `python -m methods` prints all rows.

One call is one round: the rollouts are walked once (--epochs), in a seeded order, --batch-size
prompts with all their rollouts an optimiser step.  Given M2 as --model, a next round of the
same --method continues M2's optimiser and step count.  A row with prefix "self" accepts only
rollouts whose recorded weight hash is that of --model, sampled with its template and
vocabulary at top-p 1 (--allow stale skips the first).  A killed run goes on from OUT.partial
and ends in the same bits.

Simplifications: 1. one device; 2. models run in evaluation mode (no dropout), so no random
state needs saving; 3. rows of a micro-batch are padded, not packed; 4. no LoRA."""

import dataclasses
import json
from dataclasses import dataclass
from importlib.util import find_spec

import numpy as np
import torch

from methods.rows import METHODS
from opd import files
from opd import loss as losses
from opd.batches import Data, Inputs, check_teacher, plan, taught_by
from opd.kernel import KERNELS, linear_token_loss, token_numbers
from opd.metrics import StepMetrics, sequence_metrics
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
from opd.trainer import Run, Trainer, add_trainer_flags, trainer_settings


@dataclass(frozen=True)
class StepSettings:
    """How a step is computed, not what it is: memory and speed."""

    micro_batch_tokens: int = 8192
    kernel: str = "auto"
    teacher_top_k: int = None  # of a teacher in memory; None: its whole vocabulary


# ---- one optimiser step


def optimise(trainer, data, items, settings, given=None, given_items=()):
    """One optimiser step on `items`; returns its metrics.  given, given_items: a Data of given
    answers and a step's items of it, for a row with gold_weight."""
    method = data.method
    extra = {}
    if method.omega == "preference":
        extra = weigh_pairs(trainer.policy, data, items, settings)
    items, metrics = gradient(trainer, data, items, settings)
    if method.gold_weight:
        weight = method.gold_weight
        _, more = gradient(trainer, given, given_items, settings, weight)
        extra["gold/nll"] = more["train/loss"] / weight
        metrics["train/loss"] += more["train/loss"]
    metrics["train/grad_norm"] = trainer.update()
    return metrics | sequence_metrics(items) | extra


def gradient(trainer, data, items, settings, scale=1.0):
    """Adds the gradient of one source of texts, times `scale`, micro-batch by micro-batch.
    Returns (items that counted, their metrics)."""
    norm = data.method.norm
    lengths = [s["length"] for s in items]
    weights = losses.token_weights(lengths, norm, [s["omega"] for s in items])
    # of a mean that is logged
    shares = losses.token_weights(lengths, "sequence" if norm == "sequence" else "token")
    for item, weight, share in zip(items, weights, shares):
        item["weight"] = np.asarray(weight) * scale
        item["share"] = np.asarray(share)
    items = [s for s in items if s["length"] and s["omega"]]
    if not items:
        raise BadInput("a whole optimiser step has no token to train on (loss masks are 0)")
    metrics = StepMetrics()
    for some in micro_batches(items, settings):
        loss = micro_batch(trainer.policy, data, some, settings, metrics)
        loss.backward()
        trainer.collect()
    return items, metrics.result()


def micro_batches(items, settings):
    lengths = [len(s["prompt_ids"]) + len(s["response_ids"]) for s in items]
    for batch in token_batches(lengths, settings.micro_batch_tokens):
        yield [items[i] for i in batch]


def micro_batch(policy, data, items, settings, metrics):
    """The loss of a micro-batch, a scalar; its part of the step's metrics goes into
    `metrics`."""
    method = data.method
    hidden = states(policy, items)  # [N, D]
    batch = token_constants(items, hidden.device, policy.vocabulary)
    ids = chosen_ids(items, policy.head.device)  # [N, 1]
    ids = torch.cat([ids, field_ids(items, "support_ids", ids.device)], 1)
    teacher = None
    if data.teacher is not None:
        teacher, likely = read_teacher(data.teacher, items, settings.teacher_top_k)
        ids = torch.cat([ids, likely], 1)
        batch["whole"] = likely.shape[1] >= policy.vocabulary
    if method.own:
        ids = method.own.prepare(policy, hidden, ids, batch)
    support = slice(1, ids.shape[1])
    ids = torch.cat([ids, field_ids(items, "reference_support_ids", ids.device)], 1)

    def loss(cut, numbers):
        part = {k: v if isinstance(v, bool) else v[cut] for k, v in batch.items()}
        exact = None
        if teacher is not None:
            part["teacher_logp"] = numbers.teacher_logp[:, 0].detach()
            if settings.teacher_top_k:
                part["support_logp"] = numbers.teacher_logp[:, support].detach()
            else:
                exact = (numbers.reverse_kl, numbers.forward_kl)
        value = losses.token_loss(method, numbers.logp, part, exact)
        metrics.add(method, numbers, part, exact, value.detach())
        return (value * part["weight"]).sum()

    options = dict(
        temperature=data.temperature or 1.0,
        teacher=teacher,
        kernel=settings.kernel,
        **policy.head_options,
    )
    if method.separable:
        return linear_token_loss(hidden, policy.head, ids, loss, **options)
    return loss(slice(None), token_numbers(hidden, policy.head, ids, **options))


def weigh_pairs(policy, data, items, settings):
    """Scales the signs that a pair's answers carry as their omega (DPO), from the log-probs of
    this moment.  Returns metrics."""
    scale = data.method.omega_scale
    pairs = {}
    for item, logp in zip(items, current_logps(policy, data, items, settings)):
        ratio = float((logp - item["reference_logp"]).sum())
        pairs.setdefault(item["key"][0], []).append((item, ratio))
    margins = []
    for pair in pairs.values():
        signs = [item["omega"] for item, _ in pair]
        ratios = [ratio for _, ratio in pair]
        omegas = [0.0] * len(pair)
        if all(item["length"] for item, _ in pair):  # half a pair is no preference
            omegas = losses.preference_weights(scale, signs, ratios)
            margins.append(scale * sum(s * r for s, r in zip(signs, ratios)))
        for (item, _), omega in zip(pair, omegas):
            item["omega"] = omega
    if not margins:
        return {}
    margins = np.asarray(margins)
    return {
        "preference/margin": float(np.mean(margins)),
        "preference/accuracy": float(np.mean(margins > 0)),
        "preference/loss": float(np.logaddexp(0, -margins).mean()),
    }


# ---- tensors of a micro-batch


def states(policy, items):
    """Hidden states [N, D] that predict the trained tokens of a micro-batch, in order."""
    sequences = [s["prompt_ids"] + s["response_ids"] for s in items]
    positions = [response_positions(s["prompt_ids"], s["mask"]) for s in items]
    return hidden_at(policy.model, sequences, positions)


def chosen_ids(items, device=None):
    """The recorded trained tokens, [N, 1]."""
    ids = [t for s in items for t, m in zip(s["response_ids"], s["mask"]) if m]
    return torch.tensor(ids, dtype=torch.int64, device=device)[:, None]


def field_ids(items, name, device):
    """The ids of a field like "support_ids", [N, K]; K = 0 where items have none."""
    arrays = [s.get(name, np.zeros((s["length"], 0))) for s in items]
    return torch.from_numpy(np.concatenate(arrays).astype(np.int64)).to(device)


def token_constants(items, device, vocabulary):
    """{name: [N, ...]}: the constant arrays of the items, for loss.token_loss."""
    batch = {}
    for name, value in items[0].items():
        if isinstance(value, np.ndarray) and not name.endswith("_ids"):
            array = np.concatenate([s[name] for s in items]).astype(np.float32)
            batch[name] = torch.from_numpy(array).to(device)
    if "advantage" in items[0]:
        values = [s["advantage"] for s in items for _ in range(s["length"])]
        batch["advantage"] = torch.tensor(values, dtype=torch.float32, device=device)
    if "support_logp" in batch:
        batch["whole"] = batch["support_logp"].shape[1] >= vocabulary
    if "reference_support_logp" in batch:
        batch["reference_whole"] = batch["reference_support_logp"].shape[1] >= vocabulary
    return batch


@torch.no_grad()
def read_teacher(teacher, items, top_k):
    """A teacher in memory: what kernel.token_numbers takes of it, and the ids [N, K] of its
    likeliest tokens, K = 0 where its whole vocabulary is read."""
    hidden = states(teacher, items)
    options = {name: teacher.head_options[name] for name in ("scale", "softcap")}
    ids = torch.zeros((len(hidden), 0), dtype=torch.int64, device=hidden.device)
    if top_k:
        ids = likeliest(teacher, hidden, top_k)
    return (hidden, teacher.head, options), ids


@torch.no_grad()
def current_logps(policy, data, items, settings):
    """log-probs [length] of the trained tokens of every item under the weights as they are."""
    out = {}
    for some in micro_batches(items, settings):
        hidden = states(policy, some)
        numbers = token_numbers(
            hidden,
            policy.head,
            chosen_ids(some, hidden.device),
            temperature=data.temperature or 1.0,
            kernel=settings.kernel,
            **policy.head_options,
        )
        logp = numbers.logp[:, 0].cpu().numpy()
        ends = np.cumsum([s["length"] for s in some])[:-1]
        out |= {s["key"]: part for s, part in zip(some, np.split(logp, ends))}
    return [out[s["key"]] for s in items]


def starting_logps(policy, data, settings):
    """{key: log-probs of its trained tokens} before the first update, a thousand rollouts in
    memory at a time."""
    keys = [key for group in data.groups.values() for key in group]
    out = {}
    for start in range(0, len(keys), 1024):
        some = keys[start : start + 1024]
        out |= zip(some, current_logps(policy, data, data.sequences(some), settings))
    return out


# ---- the stage


def add_input_flags(p):
    p.add_argument("--method", required=True, metavar="NAME", help="row: " + ", ".join(METHODS))
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
        help="JSONL of rollouts, or of answers for methods on other people's texts (sft: or of "
        "prompts with a `solution`)",
    )
    p.add_argument("--rewards", help="JSONL of rewards for these rollouts (rubric.py grade)")
    p.add_argument("--scores", help="JSONL of teacher scores for them (teacher.py score)")
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
        help="read only the K likeliest tokens of --teacher (default: exact)",
    )
    p.add_argument(
        "--reference",
        help="JSONL of reference-policy scores for reference_kl (teacher.py score --model "
        "START)",
    )
    p.add_argument(
        "--token-weights", help="JSONL of a number for every token of these rollouts"
    )
    p.add_argument(
        "--data",
        help="JSONL of given answers to the same prompts (gkd: in the rollouts' place; "
        "gold_weight: beside them), or of prompts with a `solution`",
    )
    p.add_argument("--data-scores", help="JSONL of teacher scores for --data")
    p.add_argument(
        "--prompts", help="JSONL of prompts, for answers that bring neither tokens nor messages"
    )
    p.add_argument(
        "--allow",
        nargs="+",
        default=[],
        choices=("stale", "teacher", "template"),
        help="stale: rollouts of other weights for an on-policy method; teacher: another than "
        "that of the fine-tuning; template: a --teacher with another chat template",
    )
    p.add_argument("--out", required=True, help="folder for the new weights")


def input_files(args):
    """The Inputs of the rollouts and those of --data."""
    own = Inputs(
        args.rollouts,
        args.rewards,
        args.scores,
        args.reference,
        args.token_weights,
        args.prompts,
    )
    return own, Inputs(args.data, scores=args.data_scores, prompts=args.prompts)


def add_run_flags(p):
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
    p.add_argument("--seed", type=int, default=0, help="order of the prompts")


def check_inputs(label, method, own, given, teacher):
    """The files a row reads are there, and none that it does not read.  own, given: the Inputs
    of the rollouts and of --data."""
    scored_data = method.prefix == "mixed" and not teacher
    check_input(label, method.rewards, rewards=own.rewards)
    check_input(label, method.teacher, scores=own.scores, teacher=teacher)
    check_input(label, method.reference, reference=own.reference)
    check_input(label, method.token_weight != "one", token_weights=own.token_weights)
    check_input(label, method.given, data=given.rollouts)
    check_input(label, scored_data, data_scores=given.scores)
    if method.prefix == "self" and own.prompts and not given.rollouts:
        raise BadInput(
            f"{label}: --prompts is given, but rollouts bring their prompt's tokens along"
        )


def check_input(label, needed, **options):
    """Exactly one of the flags is given where one is needed, and else none."""
    names = ["--" + name.replace("_", "-") for name in options]
    found = [name for name, value in zip(names, options.values()) if value]
    if needed and not found:
        raise BadInput(f"{label}: expected {' or '.join(names)}, but it is missing")
    if found and not needed:
        raise BadInput(f"{label}: {found[0]} is given, but this method does not read it")
    if len(found) > 1:
        raise BadInput(f"{' and '.join(found)} are both a teacher's numbers: give one of them")


def check_teacher_flags(method, teacher, settings):
    """What a teacher in memory can do."""
    top_k = settings.teacher_top_k
    if top_k is not None and not (teacher and method.support):
        raise BadInput(
            "--teacher-top-k: how much of a --teacher's distribution is read: needs --teacher "
            "and a method that reads a distribution"
        )
    if teacher and method.own:
        raise BadInput("--teacher: this method reads a teacher of another vocabulary: --scores")
    if teacher and method.support and method.divergence == "jsd" and not top_k:
        raise BadInput(
            "--teacher: a Jensen-Shannon divergence does not come out of the kernel's one "
            "pass: give --teacher-top-k (the vocabulary's size: exact)"
        )
    if settings.kernel == "triton" and teacher:
        raise BadInput(
            "--kernel triton: has no KL to a teacher in memory: use auto or torch with "
            "--teacher"
        )
    if settings.kernel == "triton" and not find_spec("triton"):
        raise BadInput("--kernel triton: `pip install triton` first")


def load_teacher(name, policy, dtype, device, template_options, weights, any_template):
    """The --teacher as a Policy that shares the student's token ids, and its template unless a
    mismatch is meant."""
    teacher = load_policy(name, dtype, device, template_options, weights)
    reasons = {
        "vocabulary": "their token ids mean different things",
        "template": "a teacher off its own template scores badly; pass --allow template if "
        "this is meant",
    }
    for field, reason in reasons.items():
        wanted, got = policy.identity[field], teacher.identity[field]
        if wanted != got and not (field == "template" and any_template):
            raise BadInput(
                f"--teacher {name}: expected the {field} of {policy.identity['model']}, "
                f"{wanted}, got {got}: {reason}"
            )
    return teacher


def load_given(inputs, method, policy, teacher, data):
    """The answers of --data: golden ones to imitate, or a mixed row's other texts."""
    if not inputs.rollouts:
        return None
    if method.gold_weight:
        given = Data(inputs, METHODS["sft"], policy)
    else:
        given = Data(inputs, dataclasses.replace(method, prefix="data"), policy, teacher)
    given.check_answers_all(data)
    return given


def parse(argv):
    p = files.parser(__doc__)
    add_input_flags(p)
    add_run_flags(p)
    add_trainer_flags(p)
    args = p.parse_args(argv)
    for flag in ("batch_size", "micro_batch_tokens", "epochs", "steps", "teacher_top_k"):
        value = getattr(args, flag)
        if value is not None and value < 1:
            raise BadInput(f"--{flag.replace('_', '-')}: expected at least 1, got {value}")
    if args.steps and args.epochs:
        raise BadInput("--steps and --epochs both say how long to train: give one of them")
    return args


def identity_of_run(flags, method, weights, teacher, inputs):
    """What determines the result of a run, as JSON: a folder of another run is refused.  flags:
    {name: value}, of which those are left out that change memory and speed alone."""
    without = ("overwrite", "save_every", "micro_batch_tokens", "device", "kernel")
    return {
        "flags": {name: value for name, value in flags.items() if name not in without},
        "method": method.columns(),
        "weights": weights,
        "teacher": hash_weights(find_folder(teacher)) if teacher else None,
        "inputs": {path: files.hash_file(path) for path in inputs},
    }


def train_steps(trainer, run, steps, data, given, settings, seed, old):
    """The optimiser steps that are left.  steps: each a list of prompts;  old: starting_logps,
    or {} where there is one update."""
    method = data.method
    for index, step in run.steps(len(steps)):
        prompts = steps[index]
        # a coin of each step's own: rounds of a few steps under one seed must not toss the same
        # few coins again and again
        coin = np.random.default_rng([seed, 1, step]).random()
        texts = data if coin < method.student_fraction else given
        items = texts.items(prompts)
        if old and texts is data:
            for item in items:
                item["old_logp"] = old[item["key"]]
        golden = given.items(prompts) if method.gold_weight else ()
        metrics = optimise(trainer, texts, items, settings, given, golden)
        run.log(metrics | data.signals)


def main(argv=None):
    args = parse(argv)
    method = losses.settings(METHODS, args.method, args.set)
    settings = StepSettings(args.micro_batch_tokens, args.kernel, args.teacher_top_k)
    own_files, given_files = input_files(args)
    check_inputs(f"--method {args.method}", method, own_files, given_files, args.teacher)
    check_teacher_flags(method, args.teacher, settings)
    source = find_folder(args.model)
    weights = hash_weights(source)
    inputs = [*own_files.paths(), *given_files.paths()]
    identity = identity_of_run(vars(args), method, weights, args.teacher, inputs)
    reads = [*inputs, source, *filter(None, [args.teacher])]
    run = Run(args.out, identity, source, reads, args.overwrite)
    if run.finished:
        print(f"train.py: {args.out}: complete already, {run.finished['steps']} steps")
        return run.finished

    policy = load_policy(args.model, args.dtype, args.device, args.template_options, weights)
    teacher = None
    if args.teacher:
        teacher = load_teacher(
            args.teacher,
            policy,
            args.teacher_dtype,
            args.device,
            args.template_options,
            identity["teacher"],
            "template" in args.allow,
        )
    data = Data(own_files, method, policy, teacher, "stale" in args.allow)
    given = load_given(given_files, method, policy, teacher, data)
    if "teacher" not in args.allow:
        check_teacher(source, method, data)
    steps = plan(data.groups, args.batch_size, args.epochs or 1, args.steps, args.seed)
    several = method.on_policy and len(steps) > 1
    old = starting_logps(policy, data, settings) if several else {}

    trainer = Trainer(policy, trainer_settings(args))
    run.begin(trainer, args.fresh_optimizer)
    train_steps(trainer, run, steps, data, given, settings, args.seed, old)
    counts = {
        "groups_dropped": data.dropped,
        "groups_without_weight": data.silent,
        "retokenized": len(data.retokenized),
    }
    summary = run.finish(counts, taught_by(source, method, data))
    dropped = f", {data.dropped} groups dropped for failed judgements" if data.dropped else ""
    print(
        f"train.py: {args.out}: {args.method}, {len(steps)} steps, {summary['trained_tokens']} "
        f"tokens, loss {summary['loss']:.4f}{dropped}"
    )
    return summary


if __name__ == "__main__":
    files.run(main)
