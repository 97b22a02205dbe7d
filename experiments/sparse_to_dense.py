"""Sparse-to-dense (arXiv 2605.12483): spend labels on the teacher, then distil it, or reward
the student itself?

    python -m experiments.sparse_to_dense --seeds 5
    python -m experiments.sparse_to_dense --arms grpo,rl-bridge,half-new,half-replay
    python -m experiments.sparse_to_dense --smoke
    python -m experiments.sparse_to_dense --report results/sparse_to_dense.jsonl

Labelled problems are scarce.  A label pays one number for a whole answer (sparse); a teacher
gives one for every token (dense).  The paper's workflow composes stages that are all here
already:

    1   GRPO on the teacher              rollout.py, rubric.py grade --grader answer, train.py
                                         --method grpo
    2a  forward-KL warm-up               teacher.py answer once, teacher.py score --top-k once,
                                         train.py --method fkl over the cached file
    2b  on-policy distillation           rollout.py, teacher.py score --top-k, train.py --method
                                         opd-full: exact reverse KL, the mean over tokens
    3   GRPO on the student              as 1, on labels that were not spent before

Bridge = 2a for --warm-share of the rounds, then 2b.  A round is 32 problems, 8 answers each, 4
updates, in every stage and arm: `grpo` to `self-bridge` make as many updates on as many
answers, and what the teacher cost stands beside them (`upstream_tokens`).  Stage 2 reads
problems from a file without answers.  Every arm has a ledger (methods/sparse_to_dense.py) that
goes on from its teacher's, so that a label which is in the teacher cannot be spent on the
student unnoticed; `half-replay` has to say --spend-again.

    before, teacher         the student and the teacher as they start
    teacher-rl              stage 1 on all labels;  teacher-half on the first half;
                            teacher-shuffled: rewards dealt out at random in each group
    grpo, grpo-long         labels spent on the student; the second twice as long, on the same
                            labels: the teacher's compute, spent here
    raw-bridge              the teacher as it starts, distilled
    rl-bridge               the paper's route;  rl-even: half of it warm-up;  rl-opd: no
                            warm-up;  rl-fkl: nothing else;  rl-sft: its sampled tokens only
    self-bridge             a teacher of the student's size: `grpo` itself, distilled into the
                            student as it was before
    shuffled-bridge         from teacher-shuffled: the negative control
    half-bridge             from teacher-half, half as many rounds;  half-new, half-replay: then
                            GRPO on the other half, or on the same again

World: problems of --terms terms.  Student and teacher learn right work first (so many steps
that one is weak and the other is not), then, in every seed anew, text of which half is right
work and the rest guesses, slips and skipped steps.  If the student does not start at 5 to 15 %
the question cannot be asked, and the experiment stops and says so.

The learning rates were chosen on dev (results/sparse_to_dense_dev_*.jsonl, seeds 0 and 1).
GRPO on the student reaches 20 % at 3e-5, 22 % at 1e-4, 17 % at 3e-4 and 5 % at 1e-3, on the
teacher 74, 85, 86 and 18 %.  From the teacher of 1e-4 (seed 0) the bridge reaches 30 % at 1e-4
and 3e-4, 25 % at 1e-3.  So GRPO trains at 1e-4 and everything with a teacher at 3e-4.
"""

import json
import shutil
import time

import numpy as np

from experiments import (
    Claim,
    add_eval_flags,
    add_run_flags,
    begin,
    gap,
    imitate,
    last,
    parse,
    report,
    run_arms,
    say,
    settle,
)
from opd import files, records

BRIDGE = "bridge"
# model: what is trained; teacher: the arm that teaches; part: which labels or problems; share:
# of --rounds
ARMS = {
    "before": dict(model="student"),
    "teacher": dict(model="teacher"),
    "teacher-rl": dict(model="teacher", stage="grpo"),
    "teacher-half": dict(model="teacher", stage="grpo", part="first", share=0.5),
    "teacher-shuffled": dict(model="teacher", stage="grpo", shuffle=True),
    "grpo": dict(model="student", stage="grpo"),
    "grpo-long": dict(model="grpo", stage="grpo"),
    "raw-bridge": dict(model="student", teacher="teacher", stage=BRIDGE),
    "rl-bridge": dict(model="student", teacher="teacher-rl", stage=BRIDGE),
    "rl-even": dict(model="student", teacher="teacher-rl", stage=BRIDGE, warm=0.5),
    "rl-opd": dict(model="student", teacher="teacher-rl", stage=BRIDGE, warm=0),
    "rl-fkl": dict(model="student", teacher="teacher-rl", stage=BRIDGE, warm=1),
    "rl-sft": dict(model="student", teacher="teacher-rl", stage="seqkd"),
    "self-bridge": dict(model="student", teacher="grpo", stage=BRIDGE),
    "shuffled-bridge": dict(model="student", teacher="teacher-shuffled", stage=BRIDGE),
    "half-bridge": dict(
        model="student", teacher="teacher-half", stage=BRIDGE, part="first", share=0.5
    ),
    "half-new": dict(model="half-bridge", stage="grpo", part="second", share=0.5),
    "half-replay": dict(model="half-bridge", stage="grpo", part="first", share=0.5, again=True),
}
PARENTS = {
    arm: tuple(a[k] for k in ("model", "teacher") if a.get(k) in ARMS and a[k] != arm)
    for arm, a in ARMS.items()
}
# the student's pass@1 (at 0 nothing is sampled that could be rewarded; above, rewards are not
# sparse)
START = (0.05, 0.15)
SHARED = (
    "rounds",
    "prompts",
    "n",
    "updates",
    "labels",
    "warm_share",
    "cached_n",
    "rl_learning_rate",
    "bridge_learning_rate",
    "reference_kl",
    "max_tokens",
    "terms",
    "right",
    "student_steps",
    "teacher_steps",
    "spoil_steps",
    "spoil_lr",
    "eval_prompts",
    "eval_every",
    "eval_n",
    "final_n",
    "eval_split",
)
SMOKE = dict(
    rounds=4,
    prompts=2,
    n=2,
    updates=2,
    labels=8,
    cached_n=1,
    max_tokens=8,
    student_steps=2,
    teacher_steps=3,
    spoil_steps=1,
    eval_prompts=8,
    eval_every=2,
    eval_n=1,
    final_n=2,
)
COLUMNS = (
    "pass@16",
    "greedy",
    "labels",
    "own_tokens",
    "upstream_tokens",
    "entropy",
    "kl",
    "flat_groups",
    "all_wrong",
    "all_right",
    "seconds",
)


CLAIMS = [
    Claim(
        "P1: a label spent on the teacher brings the student more than one spent on the "
        "student",
        "rl-bridge − grpo",
        gap("rl-bridge", "grpo"),
    ),
    Claim(
        "P1: ...also when GRPO may go on for as many tokens as the teacher's took",
        "rl-bridge − grpo-long",
        gap("rl-bridge", "grpo-long"),
    ),
    Claim(
        "P2: a teacher without rewards is not worth it",
        "raw-bridge − grpo",
        gap("raw-bridge", "grpo"),
        "below",
    ),
    Claim(
        "P2: ...its own accuracy beside what GRPO reaches",
        "teacher − grpo",
        gap("teacher", "grpo"),
        "below",
    ),
    Claim(
        "P3: the bridge beats distillation without a warm-up",
        "rl-bridge − rl-opd",
        gap("rl-bridge", "rl-opd"),
    ),
    Claim(
        "P3: ...which beats imitation of the teacher's samples",
        "rl-opd − rl-sft",
        gap("rl-opd", "rl-sft"),
    ),
    Claim(
        "P3 control: the bridge beats its own warm-up alone (soft labels, no own answers)",
        "rl-bridge − rl-fkl",
        gap("rl-bridge", "rl-fkl"),
    ),
    Claim(
        "P3 control: soft labels beat sampled tokens",
        "rl-fkl − rl-sft",
        gap("rl-fkl", "rl-sft"),
    ),
    Claim(
        "P3: how long the warm-up is makes no difference (a quarter, a half)",
        "rl-even − rl-bridge",
        gap("rl-even", "rl-bridge"),
        "within",
        0.03,
    ),
    Claim(
        "P4: after the bridge, new labels help",
        "half-new − half-bridge",
        gap("half-new", "half-bridge"),
    ),
    Claim(
        "P4: labels that are in the teacher already do not",
        "half-replay − half-bridge",
        gap("half-replay", "half-bridge"),
        "within",
        0.03,
    ),
    Claim(
        "P4: new ones help more than those",
        "half-new − half-replay",
        gap("half-new", "half-replay"),
    ),
    Claim(
        "P4: all labels upstream are as good as half of them downstream",
        "rl-bridge − half-new",
        gap("rl-bridge", "half-new"),
        "within",
        0.03,
    ),
    Claim(
        "P5: a teacher of the student's own size is worth it",
        "self-bridge − grpo",
        gap("self-bridge", "grpo"),
    ),
    Claim(
        "P6: fewer groups without a difference after the bridge",
        "flat(half-bridge) − flat(before)",
        last("flat_groups", "half-bridge", "before"),
        "below",
    ),
    Claim(
        "P6: ...fewer in which all answers are wrong",
        "all wrong(half-bridge) − all wrong(before)",
        last("all_wrong", "half-bridge", "before"),
        "below",
    ),
    Claim(
        "control: a teacher of shuffled rewards is no better than the teacher as it starts",
        "teacher-shuffled − teacher",
        gap("teacher-shuffled", "teacher"),
        "below",
        0.03,
    ),
    Claim(
        "control: its student loses to the rewarded one's",
        "shuffled-bridge − rl-bridge",
        gap("shuffled-bridge", "rl-bridge"),
        "below",
    ),
    Claim(
        "watch: the bridge leaves less entropy than GRPO on the student",
        "entropy(rl-bridge) − entropy(grpo)",
        last("entropy", "rl-bridge", "grpo"),
        "below",
    ),
    Claim(
        "stage 1 works: rewards teach the teacher",
        "teacher-rl − teacher",
        gap("teacher-rl", "teacher"),
    ),
]


def check_start(accuracy, split, seed):
    """Refuses a student whose pass@1 leaves nothing to compare."""
    if not START[0] <= accuracy <= START[1]:
        raise records.BadInput(
            f"seed {seed}: the student starts at {accuracy:.1%} pass@1 on {split}: expected "
            f"{START[0]:.0%} to {START[1]:.0%}: below, no group has an answer to "
            f"reward, above, "
            "rewards are not sparse: the claim cannot be tested; change --student-steps, "
            "--right or --terms"
        )


def build(run, args):
    """Problems, corpora, the problems without their answers, and both models after right
    work."""
    world = run.out / "world"
    if not (world / "toy").exists():
        run.stage(
            f"worlds.sums --out {world}/toy --terms {args.terms} --right {args.right} "
            f"--train-prompts {args.labels} --eval-prompts {args.eval_prompts} "
            f"--clean {64 * args.teacher_steps} --mixed {128 * args.spoil_steps}"
        )
    if not (world / "unlabelled.jsonl").exists():
        run.commands.write(
            f"# {world}/unlabelled.jsonl: {world}/toy/train.jsonl without `answer` and "
            f"`solution`\n"
        )
        files.write_atomically(
            world / "unlabelled.jsonl",
            (
                json.dumps({k: v for k, v in p.items() if k not in ("answer", "solution")})
                + "\n"
                for p in files.read(world / "toy" / "train.jsonl", "prompts")
            ),
        )
    for name, steps in (("student", args.student_steps), ("teacher", args.teacher_steps)):
        if not (world / name).exists():
            say(f"pre-training the {name}: {steps} steps of 64 right texts")
            imitate(
                run,
                world / "toy" / name,
                world / "toy" / "clean.jsonl",
                steps,
                4e-3,
                0,
                world / name,
                "--warmup-steps 20 --schedule linear --save-every 200",
            )
    return world


def prepare(run, args, world, seed):
    """This seed's folder with its student and teacher: both after a little text of mixed
    quality."""
    folder = run.out / f"seed{seed}"
    for name in ("student", "teacher"):
        imitate(
            run,
            world / name,
            world / "toy" / "mixed.jsonl",
            args.spoil_steps,
            args.spoil_lr,
            seed,
            folder / "start" / name,
            "--fresh-optimizer",
        )
    if not (folder / "start" / "dev.jsonl").exists() and not args.smoke:
        check_start(
            run.stage(
                f"eval.py --model {folder}/start/student --prompts {world}/toy/dev.jsonl --n "
                f"8 --max-tokens {args.max_tokens} --seed {3 * 10**6 + seed} "
                f"--out {folder}/start/dev.jsonl"
            )["accuracy"],
            "dev",
            seed,
        )
    return folder


def groups(path, size=8):
    """Shares of the problems whose first `size` graded answers are {all alike, all wrong, all
    right}."""
    by_problem = {}
    for line in files.read(path, "evals"):
        if line["sample"] < size:
            by_problem.setdefault(line["id"], []).append(bool(line["correct"]))
    wrong, right = (
        float(np.mean([check(group) for group in by_problem.values()]))
        for check in (lambda g: not any(g), all)
    )
    return {"flat_groups": wrong + right, "all_wrong": wrong, "all_right": right}


def run_arm(run, args, world, folder, seed, arm):
    """One arm of one seed; appends a result line at every evaluation.  Returns the last one."""
    a, place = ARMS[arm], folder / arm
    shutil.rmtree(place, ignore_errors=True)  # an interrupted arm is begun again
    place.mkdir(parents=True)

    def model_of(name):
        return (
            folder / name / "model"
            if (folder / name / "model").exists()
            else folder / "start" / name
        )

    start, teacher, row, started = (
        model_of(a["model"]),
        a.get("teacher") and model_of(a["teacher"]),
        None,
        time.time(),
    )
    model = start
    own, ledger = (
        {"generated_tokens": 0, "teacher_tokens": 0, "trained_tokens": 0},
        place / "labels.jsonl",
    )
    # arm -> its own tokens: what stands behind this arm, each once however often it is met
    upstream, spent = {}, 0
    for parent in PARENTS[arm]:
        upstream |= json.loads((folder / parent / "tokens.json").read_text())
    if ledgers := [
        folder / parent / "labels.jsonl"
        for parent in PARENTS[arm]
        if (folder / parent / "labels.jsonl").exists()
    ]:
        # labels that are in the teacher, or in the model this one goes on from, are spent
        run.concatenate(ledgers, ledger)
        spent = len({line["question"] for line in files.read(ledger, "labels")})

    def measure(step, final):
        nonlocal row
        now = round(time.time() - started, 2)

        def evaluate(n, more=""):
            return run.stage(
                f"eval.py --model {model} --prompts {world}/toy/{args.eval_split}.jsonl --n "
                f"{n} --max-tokens {args.max_tokens} --seed {2 * 10**6 + seed} "
                f"--out {place}/eval.jsonl --overwrite {more}"
            )

        n = args.final_n if final else args.eval_n
        score = evaluate(n)
        row = {
            "arm": arm,
            "seed": seed,
            "step": step,
            "final": final,
            "accuracy": score["accuracy"],
            "samples": n,
            "length_mean": score["length_mean"],
            "truncated": score["truncated_fraction"],
            **own,
            "own_tokens": sum(own.values()),
            "upstream_tokens": sum(upstream.values()),
            "total_tokens": sum(own.values()) + sum(upstream.values()),
            "labels": spent,
            "seconds": now,
        }
        logps = [
            x
            for r in files.read(place / "eval.rollouts.jsonl", "rollouts")
            for x in r["logprobs"]
        ]
        row["entropy"] = -float(np.mean(logps))  # of a token, from the policy's own samples
        if final:
            row |= {f"pass@{n}": score[f"pass@{n}"], **groups(place / "eval.jsonl")}
            if teacher:
                row["kl"] = run.stage(
                    f"teacher.py score --model {teacher} --rollouts "
                    f"{place}/eval.rollouts.jsonl --out {place}/fresh.jsonl "
                    f"--overwrite"
                )["kl_mean"]
            row["greedy"] = evaluate(1, "--temperature 0")["accuracy"]
        run.result(args, row)

    def train(number, method, flags, rate, fresh):
        """One call of train.py from `model`; the new weights are the model from then on."""
        nonlocal model
        out = place / f"model{number}"
        done = run.stage(
            f"train.py --method {method} --model {model} --out {out} --learning-rate {rate} "
            f"--seed {seed * 1000 + number} {'--fresh-optimizer' if fresh else ''} "
            f"{flags}"
        )
        own["trained_tokens"] += done["trained_tokens"]
        if model != start:
            shutil.rmtree(model)  # the round before
        model = out

    def rollouts(number, prompts):
        """The answers of this round's problems by the model of the moment."""
        low, high = {
            "first": (0, args.labels // 2),
            "second": (args.labels // 2, args.labels),
        }.get(a.get("part"), (0, args.labels))
        at = low + number * args.prompts % (high - low)
        own["generated_tokens"] += run.stage(
            f"rollout.py --model {model} --prompts {prompts} --slice "
            f"{at}:{at + args.prompts} --n {args.n} --max-tokens {args.max_tokens} "
            f"--seed {seed * 1000 + number} --out {place}/round{number}/rollouts.jsonl"
        )["generated_tokens"]
        return place / f"round{number}"

    def reward(number, rate):
        """A round of GRPO: the only place where answers of problems are read."""
        nonlocal spent
        at = rollouts(number, world / "toy" / "train.jsonl")
        graded = run.stage(
            f"rubric.py grade --grader answer --prompts {world}/toy/train.jsonl --rollouts "
            f"{at}/rollouts.jsonl --out {at}/rewards.jsonl --ledger {ledger} "
            f"--spend {'teacher' if a['model'] == 'teacher' else 'student'}-rl "
            f"{'--spend-again' if a.get('again') else ''} "
            f"{f'--shuffle --seed {seed}' if a.get('shuffle') else ''}"
        )
        spent = graded["labels_spent"]
        run.stage(
            f"teacher.py score --model {start} --rollouts {at}/rollouts.jsonl --out "
            f"{at}/reference.jsonl"
        )
        train(
            number,
            "grpo",
            f"--rollouts {at}/rollouts.jsonl --rewards {at}/rewards.jsonl --set "
            f"reference_kl={args.reference_kl} --reference {at}/reference.jsonl "
            f"--batch-size {args.prompts // args.updates}",
            rate,
            number == 0,
        )

    def distil(number, fresh):
        """A round of on-policy distillation."""
        at = rollouts(number, world / "unlabelled.jsonl")
        own["teacher_tokens"] += run.stage(
            f"teacher.py score --model {teacher} --rollouts {at}/rollouts.jsonl --out "
            f"{at}/scores.jsonl --top-k 1000"
        )["teacher_tokens"]
        train(
            number,
            "opd-full",
            f"--rollouts {at}/rollouts.jsonl --scores {at}/scores.jsonl --batch-size "
            f"{args.prompts // args.updates}",
            args.bridge_learning_rate,
            fresh,
        )

    def cached(method):
        """The teacher's answers and, for soft labels, its distributions: made once, walked as
        often as the rounds need."""
        if not (place / "cache").exists():
            part = f"--slice 0:{args.labels // 2}" if a.get("part") == "first" else ""
            own["generated_tokens"] += run.stage(
                f"teacher.py answer --model {teacher} --prompts {world}/unlabelled.jsonl "
                f"{part} --n {args.cached_n} --max-tokens {args.max_tokens} "
                f"--seed {10**6 + seed} --out {place}/cache/answers.jsonl"
            )["generated_tokens"]
            if method == "fkl":
                own["teacher_tokens"] += run.stage(
                    f"teacher.py score --model {teacher} --rollouts "
                    f"{place}/cache/answers.jsonl --out {place}/cache/scores.jsonl "
                    f"--top-k 1000"
                )["teacher_tokens"]
        # as many answers an update as everywhere
        size = max(1, args.prompts * args.n // args.updates // args.cached_n)
        return (
            f"--rollouts {place}/cache/answers.jsonl "
            f"{f'--scores {place}/cache/scores.jsonl' if method == 'fkl' else ''} "
            f"--batch-size {size} --steps {args.updates}"
        )

    stage, rounds = a.get("stage"), int(args.rounds * a.get("share", 1))
    if not stage:
        measure(0, True)
        files.write_atomically(place / "tokens.json", json.dumps(upstream) + "\n")
        return row
    measure(0, False)
    warm = round(rounds * a.get("warm", args.warm_share)) if stage == BRIDGE else 0
    for number in files.progress(range(rounds), desc=f"seed {seed} {arm}", unit="round"):
        if stage == "grpo":
            reward(number, args.rl_learning_rate)
        elif stage == "seqkd" or number < warm:
            method = "seqkd" if stage == "seqkd" else "fkl"
            train(number, method, cached(method), args.bridge_learning_rate, number == 0)
        else:
            distil(number, number == warm)
        if (number + 1) % args.eval_every == 0 or number + 1 == rounds:
            measure((number + 1) * args.updates, number + 1 == rounds)
        elif (place / f"round{number}").exists():
            # a reader finds the records of the rounds that were measured
            shutil.rmtree(place / f"round{number}")
    model.rename(place / "model")
    files.write_atomically(
        place / "tokens.json", json.dumps(upstream | {arm: sum(own.values())}) + "\n"
    )
    return row


def main(argv=None):
    p = files.parser(__doc__)
    add_run_flags(p, "sparse_to_dense")
    p.add_argument(
        "--rounds",
        type=int,
        default=24,
        help="rounds of an arm; arms on half of the labels: half of them",
    )
    p.add_argument("--prompts", type=int, default=32, help="problems a round")
    p.add_argument("--n", type=int, default=8, help="answers a problem")
    p.add_argument("--updates", type=int, default=4, help="optimiser steps a round")
    p.add_argument(
        "--labels",
        type=int,
        default=512,
        help="problems with an answer; their halves are stage 1's and stage 3's in the arms "
        "half-...",
    )
    p.add_argument(
        "--warm-share",
        type=float,
        default=0.25,
        help="share of a bridge's rounds that are forward KL on the teacher's cached answers",
    )
    p.add_argument(
        "--cached-n", type=int, default=4, help="cached answers of the teacher, a problem"
    )
    p.add_argument("--rl-learning-rate", type=float, default=1e-4, help="of GRPO")
    p.add_argument(
        "--bridge-learning-rate",
        type=float,
        default=3e-4,
        help="of everything that has a teacher",
    )
    p.add_argument(
        "--reference-kl",
        type=float,
        default=5e-4,
        help="GRPO's leash to the policy it starts from",
    )
    p.add_argument("--max-tokens", type=int, default=80, help="longest answer")
    p.add_argument("--terms", default="3:7", help="fewest and most terms of a problem")
    p.add_argument(
        "--right",
        type=float,
        default=0.5,
        help="share of right work in the text of mixed quality",
    )
    p.add_argument(
        "--student-steps",
        type=int,
        default=400,
        help="steps of 64 right texts that the student learns from first",
    )
    p.add_argument("--teacher-steps", type=int, default=1200, help="the same for the teacher")
    p.add_argument(
        "--spoil-steps",
        type=int,
        default=100,
        help="steps of 64 texts of mixed quality for both",
    )
    p.add_argument("--spoil-lr", type=float, default=1e-3, help="learning rate of those steps")
    p.add_argument(
        "--eval-prompts", type=int, default=256, help="problems in each of dev and heldout"
    )
    add_eval_flags(p, every=6, n=2, final_n=16)
    if not (args := parse(p, argv, CLAIMS, SMOKE, resampled=True)):
        return None
    arms = settle(args, "sparse_to_dense", ARMS, PARENTS)
    if args.labels % (2 * args.prompts):
        raise records.BadInput(
            f"--labels {args.labels}: expected a multiple of twice --prompts {args.prompts}: "
            f"a round must not reach into the other half"
        )
    run = begin(args, "sparse to dense on running sums", arms, SHARED)
    world = build(run, args)
    run_arms(
        run,
        args,
        arms,
        lambda seed: prepare(run, args, world, seed),
        lambda *which: run_arm(run, args, world, *which),
        lambda row: (
            f"{args.eval_split} accuracy {row['accuracy']:.1%}, {row['labels']} labels, "
            f"entropy {row['entropy']:.2f}, groups alike {row['flat_groups']:.0%}"
        ),
    )
    return report(
        run,
        args,
        CLAIMS,
        COLUMNS,
        pictures=(
            ("step", "accuracy.png"),
            ("labels", "labels.png"),
            ("total_tokens", "tokens.png"),
        ),
        resampled=True,
    )


if __name__ == "__main__":
    files.run(main)
