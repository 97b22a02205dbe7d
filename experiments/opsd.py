"""OPSD (arXiv 2601.18734): a model that is its own teacher, for it is told the solution there.
Not one of the nine; it needs no stage of its own.

    python -m experiments.opsd --seeds 5
    python -m experiments.opsd --arms opsd,blank,wrong
    python -m experiments.opsd --smoke
    python -m experiments.opsd --report results/opsd.jsonl

World: running sums.  Half of the texts that the base has read answer a question with its
solution behind it, so it can copy; then the student reads careless text.  A round is 32
problems, 8 answers each, in 4 updates:

    rollout.py                                      answers to the bare questions
    teacher.py score --prompts told_train.jsonl     the student as it began, after the question
                                                    with its solution
    train.py --method opd                           reverse KL to that, one number a token

    before, told        as they start: the student; the student that is told the solutions of
                        the held-out problems, too, which is what teaches
    opsd                the method
    full                the exact reverse KL, from all log-probs
    live                the teacher is the student of this moment, and not the one it began as
    base, base-blank    the teacher is the base, which has not read careless text: told the
                        solution, and not told
    wrong, blank        controls: the solution of another problem; no solution at all
    grpo, rwsft         the same labels as rewards of as many answers; own answers imitated, a
                        right one with 150 times the weight of a wrong one
    sft                 the solutions imitated, each as often as it is answered in the other
                        arms

`told_accuracy` is the accuracy when told.  The learning rates were chosen on dev, one seed
(`--arms opsd,grpo,rwsft,sft --eval-split dev --final-n 4`, results/opsd_dev_lr*.jsonl): grpo is
best at 3e-4, opsd (which lifts nothing at any of three rates) and rwsft at 1e-4 and 3e-4 alike,
sft at 1e-3.
"""

import shutil
import time

from experiments import (
    Claim,
    add_eval_flags,
    add_run_flags,
    begin,
    gap,
    imitate,
    parse,
    report,
    run_arms,
    say,
    settle,
    train_round,
)
from opd import files

ARMS = {
    "before": {},
    "told": {},
    "opsd": dict(method="opd"),
    "full": dict(method="opd-full"),
    "live": dict(method="opd", live=True),
    "wrong": dict(method="opd", prompts="wrong_train"),
    "blank": dict(method="opd", prompts="train"),
    "base": dict(method="opd", teacher="base"),
    "base-blank": dict(method="opd", teacher="base", prompts="train"),
    "grpo": dict(method="grpo"),
    "rwsft": dict(method="rwsft", set="prefix=self --set omega_scale=0.2"),
    "sft": dict(method="sft"),
}
SHARED = (
    "rounds",
    "prompts",
    "n",
    "updates",
    "learning_rate",
    "sft_learning_rate",
    "max_tokens",
    "hints",
    "base_steps",
    "spoil_steps",
    "spoil_lr",
    "eval_every",
    "eval_n",
    "final_n",
    "eval_split",
)
SMOKE = dict(
    rounds=2,
    prompts=4,
    n=2,
    updates=2,
    max_tokens=8,
    base_steps=4,
    spoil_steps=1,
    eval_every=2,
    eval_n=1,
    final_n=1,
)
COLUMNS = (
    "greedy",
    "told_accuracy",
    "length_mean",
    "truncated",
    "kl",
    "generated_tokens",
    "teacher_tokens",
    "trained_tokens",
    "seconds",
)


CLAIMS = [
    Claim(
        "the student is right more often when it is told",
        "told − before",
        gap("told", "before"),
    ),
    Claim("it can teach itself (the paper's claim)", "opsd − before", gap("opsd", "before")),
    Claim(
        "...by what the solution adds: without one nothing is taught",
        "opsd − blank",
        gap("opsd", "blank"),
    ),
    Claim(
        "...by the right one: another problem's teaches less",
        "opsd − wrong",
        gap("opsd", "wrong"),
    ),
    Claim("...and it does harm", "wrong − before", gap("wrong", "before"), "below"),
    Claim(
        "the base, told, teaches more than the student, told",
        "base − opsd",
        gap("base", "opsd"),
    ),
    Claim(
        "...and more than the base that is not told",
        "base − base-blank",
        gap("base", "base-blank"),
    ),
    Claim(
        "a solution teaches more as a hint than as a reward", "opsd − grpo", gap("opsd", "grpo")
    ),
    Claim("...than own right answers, imitated", "opsd − rwsft", gap("opsd", "rwsft")),
    Claim("...than the solutions, imitated", "opsd − sft", gap("opsd", "sft")),
    Claim(
        "the whole distribution teaches more than one number a token",
        "full − opsd",
        gap("full", "opsd"),
    ),
    Claim("a teacher that learns along teaches more", "live − opsd", gap("live", "opsd")),
    Claim("...it takes the student with it", "live − before", gap("live", "before"), "below"),
    Claim(
        "the student comes to use a solution less well, too",
        "told_accuracy(opsd) − told_accuracy(before)",
        gap("opsd", "before", "told_accuracy"),
        "below",
    ),
    Claim(
        "it does not pass what it does when told", "opsd − told", gap("opsd", "told"), "below"
    ),
    Claim(
        "answers grow shorter",
        "length(opsd) − length(before)",
        gap("opsd", "before", "length_mean"),
        "below",
    ),
]


def build(run, args):
    """Problems with their solutions, and the base that every seed's student is made from."""
    world = run.out / "world"
    if not (world / "toy").exists():
        run.stage(
            f"worlds.sums --out {world}/toy --train-prompts {args.prompts * args.rounds} "
            f"--hints "
            f"{args.hints} --clean {64 * args.base_steps} --mixed "
            f"{256 * args.spoil_steps}"
        )
    if not (world / "base").exists():
        say(f"pre-training the base: {args.base_steps} steps of 64 texts")
    imitate(
        run,
        world / "toy" / "student",
        world / "toy" / "clean.jsonl",
        args.base_steps,
        4e-3,
        0,
        world / "base",
        "--warmup-steps 20 --schedule linear --save-every 200",
    )
    return world


def prepare(run, args, world, seed):
    folder = run.out / f"seed{seed}"
    imitate(
        run,
        world / "base",
        world / "toy" / "mixed.jsonl",
        args.spoil_steps,
        args.spoil_lr,
        seed,
        folder / "student",
        "--fresh-optimizer",
    )
    return folder


def run_arm(run, args, world, folder, seed, arm):
    """One arm of one seed; appends a result line at every evaluation.  Returns the last one."""
    a, place = ARMS[arm], folder / arm
    shutil.rmtree(place, ignore_errors=True)  # an interrupted arm is begun again
    place.mkdir(parents=True)
    method, toy = a.get("method"), world / "toy"
    model = student = folder / "student"
    row, signal, started = None, {}, time.time()
    cost = {"generated_tokens": 0, "teacher_tokens": 0, "trained_tokens": 0}

    def measure(step, final):
        nonlocal row
        spent = round(time.time() - started, 2)

        def evaluate(n, prompts=args.eval_split, more=""):
            return run.stage(
                f"eval.py --model {model} --prompts {toy}/{prompts}.jsonl --n {n} "
                f"--max-tokens {args.max_tokens} --seed {2 * 10**6 + seed} --out "
                f"{place}/eval.jsonl --overwrite {more}"
            )

        n = args.final_n if final else args.eval_n
        score = evaluate(n, *[f"told_{args.eval_split}"] * (arm == "told"))
        row = {
            "arm": arm,
            "seed": seed,
            "step": step,
            "final": final,
            "accuracy": score["accuracy"],
            "samples": n,
            "length_mean": score["length_mean"],
            "truncated": score["truncated_fraction"],
            **signal,
            **cost,
            "seconds": spent,
        }
        if final:
            row |= {
                "greedy": evaluate(1, more="--temperature 0")["accuracy"],
                "told_accuracy": evaluate(1, f"told_{args.eval_split}")["accuracy"],
            }
        run.result(args, row)

    measure(0, not method)
    if not method:
        return row
    # as many walks over the problems' solutions as the others have answers to a problem, in as
    # many steps
    if method == "sft":
        done = run.stage(
            f"train.py --method sft --model {model} --rollouts {toy}/train.jsonl --out "
            f"{place}/model --batch-size {args.prompts // args.updates * args.n} "
            f"--epochs {args.n} "
            f"--learning-rate {args.sft_learning_rate} --seed {seed} --fresh-optimizer"
        )
        cost["trained_tokens"], model = done["trained_tokens"], place / "model"
        measure(done["steps"], True)
        return row
    for number in files.progress(range(args.rounds), desc=f"seed {seed} {arm}", unit="round"):
        at = place / f"round{number}"
        rollouts = f"{at}/rollouts.jsonl"
        cost["generated_tokens"] += run.stage(
            f"rollout.py --model {model} --prompts {toy}/train.jsonl --slice "
            f"{number * args.prompts}:{(number + 1) * args.prompts} --n {args.n} "
            f"--max-tokens {args.max_tokens} --seed {seed * 1000 + number} --out {rollouts}"
        )["generated_tokens"]
        if method in ("opd", "opd-full"):
            teacher = (
                model if a.get("live") else world / a["teacher"] if "teacher" in a else student
            )
            scored = run.stage(
                f"teacher.py score --model {teacher} --rollouts {rollouts} --prompts "
                f"{toy}/{a.get('prompts', 'told_train')}.jsonl --out "
                f"{at}/scores.jsonl" + " --top-k 1000" * (method == "opd-full")
            )
            cost["teacher_tokens"] += scored["teacher_tokens"]
            signal["kl"], flags = scored["kl_mean"], f"--scores {at}/scores.jsonl"
        else:
            run.stage(
                f"rubric.py grade --grader answer --prompts {toy}/train.jsonl --rollouts "
                f"{rollouts} --out {at}/rewards.jsonl"
            )
            flags = f"--rewards {at}/rewards.jsonl"
        model, done = train_round(
            run,
            args,
            method,
            model,
            student,
            at,
            seed,
            args.learning_rate,
            flags + (f" --set {a['set']}" if "set" in a else ""),
            first=number == 0,
        )
        cost["trained_tokens"] += done["trained_tokens"]
        if number + 1 == args.rounds or (number + 1) % args.eval_every == 0:
            measure((number + 1) * args.updates, number + 1 == args.rounds)
    return row


def main(argv=None):
    p = files.parser(__doc__)
    add_run_flags(p, "opsd")
    p.add_argument("--rounds", type=int, default=20, help="rounds of an arm")
    p.add_argument("--prompts", type=int, default=32, help="problems a round")
    p.add_argument("--n", type=int, default=8, help="answers a problem")
    p.add_argument("--updates", type=int, default=4, help="optimiser steps a round")
    p.add_argument("--learning-rate", type=float, default=3e-4, help="of all arms but sft")
    p.add_argument(
        "--sft-learning-rate", type=float, default=1e-3, help="of imitation of solutions"
    )
    p.add_argument("--max-tokens", type=int, default=64, help="longest answer")
    p.add_argument(
        "--hints",
        type=float,
        default=0.5,
        help="share of the base's texts that answer a question with its solution behind it",
    )
    p.add_argument(
        "--base-steps", type=int, default=1300, help="pre-training steps of 64 texts"
    )
    p.add_argument(
        "--spoil-steps", type=int, default=100, help="steps of 64 careless texts for a student"
    )
    p.add_argument("--spoil-lr", type=float, default=1e-3, help="learning rate of those steps")
    add_eval_flags(p, every=5, n=2, final_n=8)
    if not (args := parse(p, argv, CLAIMS, SMOKE)):
        return None
    arms = settle(args, "opsd", ARMS)
    run = begin(args, "a teacher that is the student, told the solution", arms, SHARED)
    world = build(run, args)
    run_arms(
        run,
        args,
        arms,
        lambda seed: prepare(run, args, world, seed),
        lambda *which: run_arm(run, args, world, *which),
        lambda row: (
            f"{args.eval_split} accuracy {row['accuracy']:.1%}, told "
            f"{row['told_accuracy']:.1%}, {row['length_mean']:.0f} tokens an answer"
        ),
    )
    return report(run, args, CLAIMS, COLUMNS)


if __name__ == "__main__":
    files.run(main)
