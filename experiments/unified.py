"""The unified view, measured: does where the answers come from decide what training does to a
policy?

    python -m experiments.unified --seeds 5
    python -m experiments.unified --smoke
    python -m experiments.unified --report results/unified.jsonl

arXiv 2604.07941 sorts all of post-training by provenance (whose answers), interface (tokens,
rewards, a teacher) and role: training *expands* the set of things a policy writes, *reshapes*
how it divides its mass among them, or consolidates.  It reports no experiment. Here every class
of row trains the same student with as many updates on as many answers (twice and four times as
many where it says so), in a world (worlds.forks) so small that `methods.unified`
lists every answer with its probability, and expansion, attrition and moved mass are exact
numbers.

The student writes route aa (mostly wrong) and cc (a habit, at random); route bb is outside of
its support, although as right as aa. The teacher writes aa and bb, and gets home from any
beginning.  Arms:

    before
    sft-both, sft-a     imitation of right demonstrations of aa and bb, and of aa only: the same
                        loss
    sft-b-long          imitation of bb only, four times as long: a narrow corpus
    seqkd, fkl          imitation of the teacher's answers, and of its whole distribution on
                        them
    rft, dpo, grpo      own answers of this round and a verifier: accepted ones imitated, best
                        against worst, policy gradient
    opd, dagger, gkd    own answers and the teacher: reverse KL, forward KL, half of each source
    fkl-opd             half of the updates fkl, then opd
    fkl-long-opd        all of the updates fkl, then as many again opd: a handover after the new
                        route has been learnt to its end
    grpo-shuffled       control: rewards dealt out at random within each group
    opd-self            control: the student is its own teacher

Checks C1-C5 are claims below.  Every effective support is measured at eps 1e-2, 1e-3 and 1e-4;
claims use 1e-4, which the student's whole corpus passes and a pair outside of it does not: at
1e-3 most of the student's pairs are below the bar, and mere reweighting of them would count as
expansion.  A pair's mass is at most 1 / (8 problems x 5 tokens) = 0.025. There is no held-out
part of so small a world.  The learning rate is 5e-4 because at 1e-3, the first that was tried
(one seed), the control `grpo-shuffled` drifted: the noise of shuffled rewards alone gave it an
expansion mass of 0.29.  `fkl-long-opd` was added after a look at fkl-opd. The student is
pre-trained on right aa answers first, and then on its own corpus: otherwise it learns the
routes long before the digits.
"""

import shutil
import time

from experiments import Claim, add_run_flags, begin, last, parse, report, run_arms, settle
from opd import files, records

ARMS = {
    "before": (),
    "sft-both": (("sft", "demos_both", 1),),
    "sft-a": (("sft", "demos_a", 1),),
    "sft-b-long": (("sft", "demos_b", 4),),
    "seqkd": (("seqkd", "teacher", 1),),
    "fkl": (("fkl", "teacher", 1),),
    "rft": (("rft", "own", 1),),
    "dpo": (("dpo", "own", 1),),
    "grpo": (("grpo", "own", 1),),
    "opd": (("opd-full", "own", 1),),
    "dagger": (("dagger", "own", 1),),
    "gkd": (("gkd", "own", 1),),
    "fkl-opd": (("fkl", "teacher", 0.5), ("opd-full", "own", 0.5)),
    "fkl-long-opd": (("fkl", "teacher", 1), ("opd-full", "own", 1)),
    "grpo-shuffled": (("grpo", "own", 1),),
    "opd-self": (("opd-full", "own", 1),),
}  # arm -> phases (row of METHODS, whose answers, times --rounds)
EPS = ("0.01", "0.001", "0.0001")
SHARED = (
    "rounds",
    "prompts",
    "n",
    "updates",
    "learning_rate",
    "max_tokens",
    "teacher_steps",
    "digit_steps",
    "student_steps",
    "pretrain_lr",
    "floor",
    "eval_every",
    "recovery_n",
)
SMOKE = dict(
    eval_every=9,
    rounds=2,
    prompts=16,
    n=8,
    updates=1,
    teacher_steps=60,
    digit_steps=100,
    student_steps=60,
    recovery_n=1,
    floor=1e-5,
)
COLUMNS = (
    "expansion@0.0001",
    "expansion_mass@0.0001",
    "attrition_mass@0.0001",
    "moved@0.0001",
    "right_answers",
    "route_b",
    "recovery",
    "trained_tokens",
    "seconds",
)


def gain(arm, metric="accuracy"):
    return last(metric, arm, "before")


CLAIMS = [
    Claim(
        "C1: demonstrations of a route outside of the support expand it",
        "expansion mass(sft-both)",
        last("expansion_mass@0.0001", "sft-both"),
        "above",
        0.1,
    ),
    Claim(
        "C1: the same loss on demonstrations inside of it does not: the data decides, not "
        "the loss",
        "expansion mass(sft-a)",
        last("expansion_mass@0.0001", "sft-a"),
        "below",
        0.01,
    ),
    *(
        Claim(
            f"C2: {arm} does not expand",
            f"expansion mass({arm})",
            last("expansion_mass@0.0001", arm),
            "below",
            0.01,
        )
        for arm in ("grpo", "dpo", "rft")
    ),
    *(
        Claim(
            f"C2: {arm} moves mass inside of the common support",
            f"moved({arm})",
            last("moved@0.0001", arm),
            "above",
            0.1,
        )
        for arm in ("grpo", "dpo", "rft")
    ),
    *(
        Claim(f"C2: {arm} raises pass@1", f"{arm} − before", gain(arm), "above", 0.1)
        for arm in ("grpo", "dpo", "rft")
    ),
    *(
        Claim(
            f"C2: {arm} brings no new right answer (distinct ones of probability 1e-4 or "
            f"more, a problem)",
            f"right answers({arm}) − before",
            gain(arm, "right_answers"),
            "below",
            0.5,
        )
        for arm in ("grpo", "dpo", "rft")
    ),
    Claim(
        "C3: reverse KL at own prefixes does not reach the missing route",
        "share of answers with a b(opd)",
        last("route_b", "opd"),
        "below",
        0.05,
    ),
    Claim(
        "C3: after a forward-KL warm-up it is kept",
        "share of answers with a b(fkl-opd)",
        last("route_b", "fkl-opd"),
        "above",
        0.25,
    ),
    Claim(
        "C3: ...after one of twice the length (added after a look at fkl-opd)",
        "share of answers with a b(fkl-long-opd)",
        last("route_b", "fkl-long-opd"),
        "above",
        0.25,
    ),
    Claim(
        "C3: forward KL at own prefixes reaches it too",
        "share of answers with a b(dagger)",
        last("route_b", "dagger"),
        "above",
        0.25,
    ),
    Claim(
        "C4: long imitation of a narrow corpus loses more of the old support than on-policy "
        "distillation",
        "attrition(sft-b-long) − attrition(opd)",
        last("attrition_mass@0.0001", "sft-b-long", "opd"),
    ),
    Claim(
        "C5: from a foreign beginning, training on own answers gets home more often than on "
        "given ones: reverse KL",
        "recovery(opd) − recovery(fkl)",
        last("recovery", "opd", "fkl"),
    ),
    Claim(
        "C5: ...and with the same loss, forward KL, on other prefixes",
        "recovery(dagger) − recovery(fkl)",
        last("recovery", "dagger", "fkl"),
    ),
    Claim(
        "control: shuffled rewards teach nothing (the learning rate was lowered until they "
        "did not)",
        "grpo-shuffled − before",
        gain("grpo-shuffled"),
        "within",
        0.05,
    ),
    Claim(
        "control: shuffled rewards do not expand (the same)",
        "expansion mass(grpo-shuffled)",
        last("expansion_mass@0.0001", "grpo-shuffled"),
        "below",
        0.01,
    ),
    Claim(
        "control: a student that is its own teacher hardly moves (AdamW makes full steps of "
        "tiny gradients)",
        "moved(opd-self)",
        last("moved@0.0001", "opd-self"),
        "below",
        0.05,
    ),
]


def build_world(run, args):
    world = run.out / "world"
    if not (world / "forks").exists():
        run.stage(
            f"worlds.forks --out {world}/forks --train-prompts "
            f"{args.prompts * args.rounds} --texts {64 * args.student_steps}"
        )
    pretrain(
        run,
        args,
        world,
        world / "forks" / "teacher",
        "teacher",
        args.teacher_steps,
        0,
        world / "teacher",
    )
    return world


def pretrain(run, args, world, start, corpus, steps, seed, out):
    if not out.exists():
        run.stage(
            f"train.py --method sft --model {start} --rollouts {world}/forks/{corpus}.jsonl "
            f"--batch-size 64 --learning-rate {args.pretrain_lr} --fresh-optimizer "
            f"--steps {steps} --warmup-steps 20 --schedule linear --adam-beta2 0.95 --seed "
            f"{seed} --out {out}"
        )


def run_arm(run, args, world, folder, seed, arm):
    """All phases of one arm; appends a result line at every evaluation.  Returns the last
    one."""
    phases, place = ARMS[arm], folder / arm
    shutil.rmtree(place, ignore_errors=True)  # an interrupted arm is begun again
    place.mkdir(parents=True)
    student, model, row, started = folder / "student", folder / "student", None, time.time()
    number, updates, total = 0, 0, sum(int(share * args.rounds) for _, _, share in phases)
    cost = {"generated_tokens": 0, "teacher_tokens": 0, "trained_tokens": 0}

    def measure(final):
        """On the way accuracy is sampled; at the end every answer is listed, and the foreign
        beginnings are tried."""
        nonlocal row
        spent = round(time.time() - started, 2)

        def sampled(name, n):
            return run.stage(
                f"eval.py --model {model} --prompts {world}/forks/{name}.jsonl --n {n} "
                f"--max-tokens {args.max_tokens} --seed {2 * 10**6 + seed} "
                f"--out {place}/{name}.jsonl --overwrite"
            )

        free = sampled("heldout", 8 * args.recovery_n)
        texts = [r["text"] for r in files.read(free["out"], "evals")]
        row = {
            "arm": arm,
            "seed": seed,
            "step": number * args.updates,
            "final": final,
            "accuracy": free["accuracy"],
            "updates": updates,
            "route_b": sum("b" in text for text in texts) / len(texts),
            **cost,
            "seconds": spent,
        }
        if final:
            exact = run.stage(
                f"methods.unified --before {student} --after {model} --prompts "
                f"{world}/forks/heldout.jsonl --max-tokens {args.max_tokens} --eps "
                f"{' '.join(EPS)} "
                f"--floor {args.floor} --max-prefixes 4000000 --out {place}/support.jsonl "
                f"--overwrite"
            )
            row |= {
                "accuracy": exact["accuracy_after"],
                "pass@256": exact["pass@256_after"],
                "right_answers": exact["right_answers_after@0.0001"],
                "missed_mass": exact["missed_mass"],
                **{
                    f"{name}@{eps}": exact[f"{name}@{eps}"]
                    for eps in EPS
                    for name in (
                        "expansion",
                        "expansion_mass",
                        "attrition",
                        "attrition_mass",
                        "moved",
                    )
                },
                "recovery": sampled("corrupt", args.recovery_n)["accuracy"],
            }
        run.result(args, row)

    if not phases:
        measure(True)
        return row
    measure(False)
    for method, source, share in phases:
        rounds = int(share * args.rounds)
        # a corpus is there already: fewer, longer calls
        stride = 1 if source in ("own", "teacher") else min(args.eval_every, args.rounds)
        for turn in range(0, rounds, stride):
            at = place / f"round{number}"
            part = (
                f"--prompts {world}/forks/train.jsonl --slice "
                f"{turn * args.prompts}:{(turn + 1) * args.prompts} --max-tokens "
                f"{args.max_tokens} --n {args.n}"
            )
            teacher = model if arm == "opd-self" else world / "teacher"
            flags = (
                f"--teacher {teacher}"
                if method in ("fkl", "opd-full", "dagger")
                else "--set prefix=self"
                if method in ("rft", "dpo")
                else ""
            )
            if source == "own":
                rollouts = at / "rollouts.jsonl"
                rolled = run.stage(
                    f"rollout.py --model {model} {part} --seed {seed * 1000 + number} --out "
                    f"{rollouts}"
                )
                cost["generated_tokens"] += rolled["generated_tokens"]
                if method in ("rft", "dpo", "grpo"):
                    shuffle = "--shuffle" if arm == "grpo-shuffled" else ""
                    graded = run.stage(
                        f"rubric.py grade --grader answer --prompts "
                        f"{world}/forks/train.jsonl --rollouts {rollouts} "
                        f"{shuffle} --seed {seed} --out {at}/rewards.jsonl"
                    )
                    flags += f" --rewards {at}/rewards.jsonl"
                    # nothing to imitate or to compare
                    if (
                        method == "rft"
                        and graded["reward_mean"] == 0
                        or method == "dpo"
                        and graded["zero_variance_groups"] == 1
                    ):
                        number += 1
                        continue
                if method == "dpo":
                    run.stage(
                        f"teacher.py score --model {student} --rollouts {rollouts} --out "
                        f"{at}/reference.jsonl"
                    )
                    flags += f" --reference {at}/reference.jsonl"
                if method == "gkd":
                    given = run.stage(
                        f"teacher.py answer --model {world}/teacher {part} --seed "
                        f"{10**6 + seed * 1000 + number} --out {at}/given.jsonl"
                    )
                    cost["teacher_tokens"] += given["generated_tokens"]
                    flags += (
                        f" --data {at}/given.jsonl --teacher {world}/teacher "
                        f"--teacher-top-k 1000"
                    )
            elif source == "teacher":
                rollouts = at / "answers.jsonl"
                given = run.stage(
                    f"teacher.py answer --model {world}/teacher {part} --seed "
                    f"{10**6 + seed * 1000 + number} --out {rollouts}"
                )
                cost["teacher_tokens"] += given["generated_tokens"]
            else:
                rollouts = world / "forks" / f"{source}.jsonl"
            size = (
                f"--batch-size {args.prompts // args.updates} --steps {args.updates}"
                if source in ("own", "teacher")
                else (
                    f"--batch-size {args.prompts * args.n // args.updates} --steps "
                    f"{args.updates * stride}"
                )
            )
            fresh = "--fresh-optimizer" if turn == 0 else ""
            done = run.stage(
                f"train.py --method {method} --model {model} --rollouts {rollouts} {flags} "
                f"--out {at}/model --learning-rate {args.learning_rate} "
                f"--seed {seed * 1000 + number} {size} {fresh}"
            )
            cost["trained_tokens"] += done["trained_tokens"]
            updates += done["steps"]
            if model != student:
                shutil.rmtree(model)
            model, number = at / "model", number + stride
            if number < total and number % args.eval_every == 0:
                measure(False)
    measure(True)
    return row


def main(argv=None):
    p = files.parser(__doc__)
    add_run_flags(p, "unified")
    p.add_argument("--rounds", type=int, default=30, help="rounds an arm")
    p.add_argument(
        "--prompts", type=int, default=32, help="prompts a round, the 8 problems in turn"
    )
    p.add_argument("--n", type=int, default=8, help="answers a prompt")
    p.add_argument("--updates", type=int, default=4, help="optimiser steps a round")
    p.add_argument("--learning-rate", type=float, default=5e-4, help="of every arm")
    p.add_argument(
        "--max-tokens", type=int, default=5, help="longest answer, end token included"
    )
    p.add_argument(
        "--teacher-steps", type=int, default=500, help="steps of 64 texts that make the teacher"
    )
    p.add_argument(
        "--digit-steps",
        type=int,
        default=150,
        help="steps of 64 right texts by route aa, which teach the student what a right "
        "digit is",
    )
    p.add_argument(
        "--student-steps",
        type=int,
        default=1000,
        help="steps of 64 texts of its own corpus that make the student",
    )
    p.add_argument(
        "--pretrain-lr", type=float, default=4e-3, help="learning rate of those steps"
    )
    p.add_argument(
        "--floor",
        type=float,
        default=1e-6,
        help="answers less likely than this are not listed; what they hold together is in "
        "missed_mass",
    )
    p.add_argument("--eval-every", type=int, default=5, help="rounds between evaluations")
    p.add_argument(
        "--recovery-n", type=int, default=32, help="samples from each foreign beginning"
    )
    if not (args := parse(p, argv, CLAIMS, SMOKE)):
        return None
    arms = settle(args, "unified", ARMS)
    if args.rounds % 2:
        raise records.BadInput(
            f"--rounds {args.rounds}: expected an even number: fkl-opd takes half of them "
            f"each way"
        )
    run = begin(args, "the unified view on forks", arms, SHARED)
    world = build_world(run, args)

    def prepare(seed):
        folder = run.out / f"seed{seed}"
        pretrain(
            run,
            args,
            world,
            world / "forks" / "student",
            "demos_a",
            args.digit_steps,
            seed,
            folder / "digits",
        )
        pretrain(
            run,
            args,
            world,
            folder / "digits",
            "base",
            args.student_steps,
            seed,
            folder / "student",
        )
        return folder

    run_arms(
        run,
        args,
        arms,
        prepare,
        lambda *which: run_arm(run, args, world, *which),
        lambda row: (
            f"accuracy {row['accuracy']:.1%}, route b {row['route_b']:.1%}, expansion mass "
            f"{row['expansion_mass@0.0001']:.3f}, "
            f"attrition mass {row['attrition_mass@0.0001']:.3f}, recovery {row['recovery']:.1%}"
        ),
    )
    return report(run, args, CLAIMS, COLUMNS)


if __name__ == "__main__":
    files.run(main)
