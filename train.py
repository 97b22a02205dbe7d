"""Stage 4: rollouts + rewards or teacher scores -> new weights.

    python train.py --method sft --model M --rollouts clean.jsonl --out M1
    python train.py --method ropd --model M1 --rollouts R.jsonl --rewards rewards.jsonl --out M2

Reads rollouts (or answers, for sft), the rewards and scores that belong to them, and a model
folder; writes a model folder that transformers, vLLM and lm-eval load as it is, with
metrics.jsonl and the optimiser's state beside it.  opd/loss.py defines the loss; `ropd` is the
row of ROPD's released code, `ropd-paper` that of its equations 6-8 (arXiv 2605.07396).
opd/batches.py joins rollouts and rewards, computes the group advantages once (`Data._weigh`)
and hands out a step's items, a dict a rollout; opd/tensors.py spreads them over tokens;
opd/trainer.py is the optimiser and resume.  `python -m methods` prints all rows.

One call is one round: the rollouts are walked once (--epochs), in a seeded order, --batch-size
prompts with all their rollouts an optimiser step.  From the second step on the weights have
moved away from those that sampled: importance ratios and clips are for this.  Given M2 as
--model, a next round of the same --method continues M2's optimiser and step count.  A row with
prefix "self" accepts only rollouts whose recorded weight hash is that of --model, sampled with
its template and vocabulary at top-p 1 (--allow stale skips the first).  A killed run goes on
from OUT.partial and ends in the same bits.

Read main, train_steps, optimise, gradient, micro_batch; for ROPD `given`, `teacher`, `exact`
and `support` are empty.

Simplifications: 1. one device; 2. models run in evaluation mode (no dropout), so no random
state needs saving; 3. rows of a micro-batch are padded, not packed."""

import opd.quiet  # noqa: F401

# isort: split

import dataclasses
from importlib.util import find_spec

import numpy as np
import torch

from methods.rows import METHODS
from opd import cli
from opd import loss as losses
from opd.batches import Data, Inputs, check_teacher, plan, taught_by
from opd.kernel import KERNELS, linear_token_loss, token_numbers
from opd.metrics import StepMetrics, sequence_metrics
from opd.pairs import weigh_pairs
from opd.policy import (
    add_place_flags,
    checkpoint_layers,
    find_folder,
    hash_weights,
    load_policy,
    load_teacher,
)
from opd.records import BadInput
from opd.shared import share_prompts
from opd.tensors import (
    StepSettings,
    chosen_ids,
    field_ids,
    micro_batches,
    read_teacher,
    starting_logps,
    states,
    token_constants,
)
from opd.trainer import Run, Trainer, add_trainer_flags, run_identity, trainer_settings

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
    items = [s for s in items if s["length"] and s["omega"]]
    if not items:
        raise BadInput("a whole optimiser step has no token to train on (loss masks are 0)")
    lengths = [s["length"] for s in items]
    weights = losses.normalised_weights(lengths, norm, [s["omega"] for s in items])
    # a token's part in a mean that is logged, omega left out
    shares = losses.normalised_weights(lengths, "sequence" if norm == "sequence" else "token")
    for item, weight, share in zip(items, weights, shares):
        item["weight"] = np.asarray(weight) * scale
        item["share"] = np.asarray(share)
    metrics = StepMetrics()
    total = sum(item["length"] for item in items)
    with cli.progress(total=total, desc="step", unit="token") as bar:
        for some in micro_batches(trainer.policy, items, settings.micro_batch_tokens):
            loss = micro_batch(trainer.policy, data, some, settings, metrics)
            loss.backward()  # the head's part is done: linear_token_loss walks it only once
            bar.update(sum(item["length"] for item in some))
    return items, metrics.result()


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
        help="prompts per optimiser step, each with all its rollouts",
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
        "--compute",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="memory and time, not result: gradient_checkpointing (0; 1: activations are "
        "computed again in the backward pass), shared_prompts (0; 1: a prompt is read once for "
        f"all its answers), kernel (one of {', '.join(KERNELS)}; naive "
        "holds all logits at once, for comparison)",
    )
    p.add_argument(
        "--dtype",
        default="float32",
        choices=("float32", "bfloat16"),
        help="bfloat16 keeps float32 master weights in the state",
    )
    add_place_flags(p)
    p.add_argument("--seed", type=int, default=0, help="order of the prompts")


def check_inputs(label, method, own, given, teacher):
    """The files a row reads are there, and none that it does not read.  own, given: the Inputs
    of the rollouts and of --data."""
    scored_data = method.prefix == "mixed" and not teacher
    cli.check_given(label, method.rewards, rewards=own.rewards)
    cli.check_given(label, method.teacher, scores=own.scores, teacher=teacher)
    cli.check_given(label, method.reference, reference=own.reference)
    cli.check_given(label, method.token_weight != "one", token_weights=own.token_weights)
    cli.check_given(label, method.given, data=given.rollouts)
    cli.check_given(label, scored_data, data_scores=given.scores)
    if method.prefix == "self" and own.prompts and not given.rollouts:
        raise BadInput(
            f"{label}: --prompts is given, but rollouts bring their prompt's tokens along"
        )


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
            "--compute kernel=triton: has no KL to a teacher in memory: use auto or torch with "
            "--teacher"
        )
    if settings.kernel == "triton" and not find_spec("triton"):
        raise BadInput("--compute kernel=triton: `pip install triton` first")


def load_given(inputs, method, policy, teacher, data):
    """The answers of --data: golden ones to imitate, or a mixed row's other texts."""
    if not inputs.rollouts:
        return None
    if method.gold_weight:
        given = Data(inputs, METHODS["sft"], policy)
    else:
        given = Data(inputs, dataclasses.replace(method, prefix="data"), policy, teacher)
    data.keep_answered(given)
    return given


def parse(argv):
    p = cli.parser(__doc__)
    add_input_flags(p)
    add_run_flags(p)
    add_trainer_flags(p)
    args = p.parse_args(argv)
    cli.check_at_least(
        1,
        batch_size=args.batch_size,
        micro_batch_tokens=args.micro_batch_tokens,
        epochs=args.epochs,
        steps=args.steps,
        teacher_top_k=args.teacher_top_k,
    )
    cli.check_at_least(0, seed=args.seed)
    if args.steps and args.epochs:
        raise BadInput("--steps and --epochs both say how long to train: give one of them")
    return args


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


def tell(method, dropped, summary):
    text = f", {dropped} groups dropped for failed judgements" if dropped else ""
    print(
        f"train.py: {summary['out']}: {method}, {summary['steps']} steps, "
        f"{summary['trained_tokens']} tokens, loss {summary['loss']:.4f}{text}"
    )


def main(argv=None):
    args = parse(argv)
    method = losses.method_named(METHODS, args.method, args.set)
    settings = StepSettings(args.micro_batch_tokens, teacher_top_k=args.teacher_top_k)
    settings = settings.changed(args.compute)
    optimizer = trainer_settings(args)
    own_files, given_files = input_files(args)
    check_inputs(f"--method {args.method}", method, own_files, given_files, args.teacher)
    check_teacher_flags(method, args.teacher, settings)
    source = find_folder(args.model)
    weights = hash_weights(source)
    inputs = [*own_files.paths(), *given_files.paths()]
    identity = run_identity(
        vars(args),
        source,
        weights,
        inputs,
        method=method.columns(),
        teacher=hash_weights(find_folder(args.teacher)) if args.teacher else None,
    )
    reads = [*inputs, source, *filter(None, [args.teacher])]
    with Run(args.out, identity, source, reads, args.overwrite) as run:
        if run.finished:
            print(f"train.py: {args.out}: complete already, {run.finished['steps']} steps")
            return run.finished

        policy = load_policy(
            args.model, args.dtype, args.device, args.template_options, weights
        )
        if settings.gradient_checkpointing:
            checkpoint_layers(policy.model)
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
        if settings.shared_prompts:
            for model in filter(None, (policy, teacher)):
                share_prompts(model, settings.micro_batch_tokens)
        data = Data(own_files, method, policy, teacher, "stale" in args.allow)
        given = load_given(given_files, method, policy, teacher, data)
        if "teacher" not in args.allow:
            check_teacher(source, method, data)
        steps = plan(data.groups, args.batch_size, args.epochs or 1, args.steps, args.seed)
        data.check_signal(steps)
        for texts in filter(None, (data, given)):
            texts.check_texts(steps)
        several = method.on_policy and len(steps) > 1
        old = starting_logps(policy, data, settings) if several else {}

        trainer = Trainer(policy, optimizer)
        run.begin(trainer, args.fresh_optimizer)
        train_steps(trainer, run, steps, data, given, settings, args.seed, old)
        summary = run.finish(data.counts(), taught_by(source, method, data))
        tell(args.method, data.dropped, summary)
        return summary


if __name__ == "__main__":
    cli.run(main)
