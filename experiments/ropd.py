"""ROPD, the main job: a student gets better from rubrics drawn between its own answers and its
teacher's.

    python -m experiments.ropd                       # before / ROPD / shuffled null / teacher:
                                                     a
                                                 table and a picture
    python -m experiments.ropd --claims --seeds 5    # every arm, five seeds
    python -m experiments.ropd --smoke               # seconds: does it all still run

One round is five commands (OUT/commands.sh keeps every command of the run):

    rollout.py        the student answers 32 problems, 8 times each
    rubric.py create  one rubric a problem from 4 teacher answers and those 8 rollouts
    rubric.py grade   the rubric's verdicts on the rollouts (an imperfect verifier: 5 % of the
                      verdicts are wrong)
    train.py          one policy-gradient step a quarter of the batch
    eval.py           every few rounds: accuracy on held-out problems, sampled at temperature 1

Arms, all with the same problems, optimiser and number of updates:

    before          the student as it starts
    sft             imitation of the same teacher texts (4 a problem where the others train on 8
                    rollouts)
    scalar          a holistic 0-10 judge, no rubric, that votes on everything it knows about
    scalar-merits   the same judge, told which properties are merits
    ropd            rubrics from m = 4 teacher answers; the loss of the released code
    ropd-paper      the same rubrics; the loss of the paper: std, symmetric clip, sequence mean,
                    KL to the start
    ropd-m1         rubrics from one teacher answer
    ropd-flat       every criterion the same points
    ropd-unchecked  rubrics without the one predicate that redoes the whole sum
    shuffled        ROPD's rewards dealt out at random within each group: must teach nothing
    answer          reward 1 for the right final answer: what a hidden checker would give
    teacher         the teacher

The world (worlds.sums): one pre-training run on clean work; its middle is the base, its end the
teacher.  The student is the base after a little careless text, so it has less skill than the
teacher and bad habits.  Pre-training is done once; a seed then fixes how the student is
spoiled, the teacher's answers, the order of the problems and every sample.  Arms with the same
seed start from the same student. The held-out problems serve for measuring only; the settings
below were chosen on dev.
"""

import shutil
import time
from pathlib import Path

from experiments import (
    Claim,
    add_run_flags,
    begin,
    claims_table,
    imitate,
    last,
    parse,
    run_arms,
    say,
    settle,
)
from opd import files

ARMS = (
    "before",
    "sft",
    "scalar",
    "scalar-merits",
    "ropd",
    "ropd-paper",
    "ropd-m1",
    "ropd-flat",
    "ropd-unchecked",
    "shuffled",
    "answer",
    "teacher",
)
SHARED = (
    "rounds",
    "prompts",
    "n",
    "updates",
    "learning_rate",
    "max_tokens",
    "verifier_noise",
    "base_steps",
    "teacher_steps",
    # what all arms and seeds have in common
    "spoil_steps",
    "spoil_lr",
    "eval_every",
    "eval_n",
    "eval_split",
)
DEFAULT_ARMS = ("before", "ropd", "shuffled", "teacher")
SMOKE = dict(
    rounds=2,
    prompts=4,
    n=4,
    base_steps=2,
    teacher_steps=4,
    spoil_steps=2,
    eval_every=1,
    eval_n=1,
)


def more(arm, other):
    return last("accuracy", arm, other)


CLAIMS = [
    Claim("ROPD lifts the student (main claim)", "ropd − before", more("ropd", "before")),
    Claim(
        "...because of which answer gets which reward",
        "shuffled − before",
        more("shuffled", "before"),
        "below",
        0.02,
    ),
    Claim(
        "Four teacher answers beat one (the paper's largest ablation)",
        "ropd − ropd-m1",
        more("ropd", "ropd-m1"),
    ),
    Claim(
        "Rubrics beat imitation of the same texts at equal updates (not equal tokens)",
        "ropd − sft",
        more("ropd", "sft"),
    ),
    Claim(
        "Rubrics beat a holistic score that votes on everything it knows of",
        "ropd − scalar",
        more("ropd", "scalar"),
    ),
    Claim(
        "Rubrics beat a holistic score that is told what is merit",
        "ropd − scalar-merits",
        more("ropd", "scalar-merits"),
    ),
    Claim("Flat points are exploited", "ropd − ropd-flat", more("ropd", "ropd-flat")),
    Claim(
        "The predicate that redoes the whole sum matters",
        "ropd − ropd-unchecked",
        more("ropd", "ropd-unchecked"),
    ),
    Claim(
        "...but rubrics without it still lift the student",
        "ropd-unchecked − before",
        more("ropd-unchecked", "before"),
    ),
    Claim(
        "The released code's loss beats the paper's",
        "ropd − ropd-paper",
        more("ropd", "ropd-paper"),
    ),
    Claim("A hidden exact checker is a ceiling", "answer − ropd", more("answer", "ropd")),
]


def add_world_flags(p, teacher_steps):
    p.add_argument(
        "--base-steps",
        type=int,
        default=600,
        help="pre-training steps of the base model the students come from",
    )
    p.add_argument(
        "--teacher-steps",
        type=int,
        default=teacher_steps,
        help="pre-training steps of the teacher, which goes on from the base",
    )
    p.add_argument(
        "--spoil-steps",
        type=int,
        default=100,
        help="steps of 64 careless texts for the student",
    )
    p.add_argument("--spoil-lr", type=float, default=1e-3, help="learning rate of those steps")


def build_world(run, args, problems, more="", corpus="clean"):
    """Problems (so many to train on; `more` flags for worlds.sums), corpora and two checkpoints
    of one pre-training run: the base (the student's) and, later, the teacher."""
    world = run.out / "world"
    if not (world / "toy").exists():
        run.stage(
            f"worlds.sums --out {world}/toy --train-prompts {problems} --clean "
            f"{64 * args.teacher_steps} --mixed {64 * args.spoil_steps * 4} {more}"
        )
    common = (
        f"--method sft --rollouts {world}/toy/{corpus}.jsonl --batch-size 64 --learning-rate "
        f"4e-3 --warmup-steps 20 --schedule linear "
        f"--total-steps {args.teacher_steps} --adam-beta2 0.95 --micro-batch-tokens 4096 "
        f"--save-every 200"
    )
    for name, start, steps, seed in (
        ("base", "toy/student", args.base_steps, 0),
        ("teacher", "base", args.teacher_steps - args.base_steps, 1),
    ):
        if not (world / name).exists():
            say(f"pre-training the {name}: {steps} steps of 64 clean texts")
            run.stage(
                f"train.py --model {world}/{start} --steps {steps} --seed {seed} --out "
                f"{world}/{name} {common}"
            )
    return world


def spoil_student(run, args, world, seed):
    """This seed's folder with its student: the base, spoiled by careless text."""
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


def evaluate(run, args, world, seed, model, out):
    return run.stage(
        f"eval.py --model {model} --prompts {world}/toy/{args.eval_split}.jsonl --n "
        f"{args.eval_n} --max-tokens {args.max_tokens} "
        f"--seed {2 * 10**6 + seed} --out {out} --overwrite"
    )


def run_arm(run, args, world, folder, seed, arm):
    """All rounds of one arm; appends a result line at every evaluation.  Returns the last
    one."""
    place = folder / arm
    shutil.rmtree(place, ignore_errors=True)  # an interrupted arm is begun again
    place.mkdir(parents=True)
    cost = {"generated_tokens": 0, "teacher_tokens": 0, "trained_tokens": 0}
    started, model, row = time.time(), folder / "student", None

    def measure(step, final, extra):
        nonlocal row
        spent = round(time.time() - started, 2)
        score = evaluate(run, args, world, seed, model, place / "eval.jsonl")
        row = {
            "arm": arm,
            "seed": seed,
            "step": step,
            "final": final,
            "accuracy": score["accuracy"],
            f"pass@{args.eval_n}": score[f"pass@{args.eval_n}"],
            "length_mean": score["length_mean"],
            "truncated": score["truncated_fraction"],
            **cost,
            "seconds": spent,
            **extra,
        }
        run.result(args, row)
        return row

    if arm in ("before", "teacher"):
        model = folder / "student" if arm == "before" else world / "teacher"
        return measure(0, True, {})
    measure(0, False, {})
    if arm == "sft":
        answers = folder / "answers.jsonl"
        done = run.stage(
            f"train.py --method sft --model {model} --rollouts {answers} --prompts "
            f"{world}/toy/train.jsonl --out {place}/model "
            f"--batch-size {args.prompts // args.updates} --learning-rate "
            f"{args.learning_rate} --fresh-optimizer --seed {seed}"
        )
        cost["trained_tokens"] += done["trained_tokens"]
        cost["teacher_tokens"] += sum(
            len(r["response_ids"]) for r in files.read(answers, "answers")
        )
        model = place / "model"
        return measure(args.rounds * args.updates, True, {"loss": done["loss"]})

    for number in files.progress(range(args.rounds), desc=f"seed {seed} {arm}", unit="round"):
        at, part = (
            place / f"round{number}",
            f"{number * args.prompts}:{(number + 1) * args.prompts}",
        )
        rolled = run.stage(
            f"rollout.py --model {model} --prompts {world}/toy/train.jsonl --slice {part} "
            f"--n {args.n} "
            f"--max-tokens {args.max_tokens} --seed {seed * 1000 + number} --out "
            f"{at}/rollouts.jsonl"
        )
        common = f"--prompts {world}/toy/train.jsonl --rollouts {at}/rollouts.jsonl"
        noise = f"--seed {seed} --verifier-noise {args.verifier_noise}"
        method, reference = "ropd", ""
        if arm == "answer":
            graded = run.stage(
                f"rubric.py grade --grader answer {common} --out {at}/rewards.jsonl"
            )
        elif arm.startswith("scalar"):
            graded = run.stage(
                f"rubric.py grade --grader scalar --scalar-view "
                f"{'merits' if arm == 'scalar-merits' else 'all'} {common} {noise} "
                f"--out {at}/rewards.jsonl"
            )
        else:
            m = 1 if arm == "ropd-m1" else 4
            option = {
                "ropd-flat": "--flat-points",
                "ropd-unchecked": "--without total_right",
            }.get(arm, "")
            run.stage(
                f"rubric.py create {common} --answers {folder}/answers.jsonl --m {m} "
                f"{option} --out {at}/rubrics.jsonl"
            )
            graded = run.stage(
                f"rubric.py grade {common} --rubrics {at}/rubrics.jsonl {noise} "
                f"{'--shuffle' if arm == 'shuffled' else ''} "
                f"--out {at}/rewards.jsonl"
            )
            cost["teacher_tokens"] += teacher_tokens(
                folder / "answers.jsonl", at / "rubrics.jsonl", m
            )
        if arm == "ropd-paper":
            run.stage(
                f"teacher.py score --model {folder}/student --rollouts {at}/rollouts.jsonl "
                f"--out {at}/reference.jsonl"
            )
            method, reference = "ropd-paper", f"--reference {at}/reference.jsonl"
        trained = run.stage(
            f"train.py --method {method} --model {model} --rollouts {at}/rollouts.jsonl "
            f"--rewards {at}/rewards.jsonl {reference} --out {at}/model "
            f"--batch-size {args.prompts // args.updates} --learning-rate "
            f"{args.learning_rate} --seed {seed}"
        )
        cost["generated_tokens"] += rolled["generated_tokens"]
        cost["trained_tokens"] += trained["trained_tokens"]
        if number:
            # the round before; its rollouts, rubrics and rewards stay for reading
            shutil.rmtree(model)
        model = at / "model"
        final = number == args.rounds - 1
        if final or (number + 1) % args.eval_every == 0:
            signal = run.stage(
                f"eval.py {common} --rewards {at}/rewards.jsonl --partial --out "
                f"{at}/signal.jsonl"
            )
            measure(
                (number + 1) * args.updates,
                final,
                {k: signal[k] for k in ("reward_mean", "reward_auc", "reward_auc_within")}
                | {"zero_variance_groups": graded["zero_variance_groups"]},
            )
            say(
                f"  {arm}: round {number + 1}/{args.rounds}, reward "
                f"{graded['reward_mean']:.2f}, answers of "
                f"{rolled['length_mean']:.0f} tokens, "
                f"{args.eval_split} accuracy {row['accuracy']:.1%}"
            )
    return row


def teacher_tokens(answers, rubrics, m):
    """Teacher tokens behind one round's rubrics: the first m answers to each of their
    problems."""
    ids = {r["id"] for r in files.read(rubrics, "rubrics")}
    return sum(
        len(r["response_ids"])
        for r in files.read(answers, "answers")
        if r["id"] in ids and r["sample"] < m
    )


def main(argv=None):
    p = files.parser(__doc__)
    add_run_flags(p, "ropd", default="the default ones")
    p.add_argument("--claims", action="store_true", help="run every arm")
    p.add_argument("--rounds", type=int, default=20, help="rounds an arm")
    p.add_argument("--prompts", type=int, default=32, help="problems a round")
    p.add_argument("--n", type=int, default=8, help="rollouts a problem")
    p.add_argument("--updates", type=int, default=4, help="optimiser steps a round")
    p.add_argument("--learning-rate", type=float, default=3e-4, help="of every arm")
    p.add_argument("--max-tokens", type=int, default=64, help="longest answer")
    p.add_argument("--verifier-noise", type=float, default=0.05, help="share of wrong verdicts")
    add_world_flags(p, teacher_steps=1300)
    p.add_argument("--eval-every", type=int, default=5, help="rounds between evaluations")
    p.add_argument("--eval-n", type=int, default=4, help="samples a held-out problem")
    p.add_argument(
        "--eval-split",
        default="heldout",
        choices=("heldout", "dev"),
        help="dev is for choosing settings",
    )
    if not (args := parse(p, argv, CLAIMS, SMOKE)):
        return None
    arms = settle(
        args, "ropd", ARMS, default=None if args.claims or args.smoke else DEFAULT_ARMS
    )
    run = begin(args, "ROPD on running sums", arms, SHARED)
    world = build_world(run, args, problems=args.prompts * args.rounds)

    def prepare(seed):
        folder = spoil_student(run, args, world, seed)
        run.stage(
            f"teacher.py answer --model {world}/teacher --prompts {world}/toy/train.jsonl "
            f"--n 4 --max-tokens {args.max_tokens} "
            f"--seed {10**6 + seed} --out {folder}/answers.jsonl"
        )
        return folder

    run_arms(
        run,
        args,
        arms,
        prepare,
        lambda *which: run_arm(run, args, world, *which),
        lambda row: (
            f"{args.eval_split} accuracy {row['accuracy']:.1%}, {row['length_mean']:.0f} "
            f"tokens an answer"
        ),
    )
    say("")
    table = run.stage(
        f"experiments.report table {args.results} --out {args.out}/table.md --overwrite "
        "--columns length_mean reward_mean reward_auc_within generated_tokens teacher_tokens "
        "seconds"
    )
    run.stage(
        f"experiments.report plot {args.results} --out {args.out}/accuracy.png --overwrite"
    )
    say((Path(args.out) / "table.md").read_text())
    if args.claims:
        say(claims_table(args.results, CLAIMS))
    say(
        f"picture: {args.out}/accuracy.png   one prompt's records: "
        f"{args.out}/seed0/ropd/round0/   total {time.time() - run.started:.0f} s"
    )
    if not args.claims and not args.smoke:
        say(f"the other arms: python -m experiments.ropd --claims --seeds 5 --out {args.out}")
    return table


if __name__ == "__main__":
    files.run(main)
