"""On-policy distillation from log-probs: what dense supervision on one's own answers buys, and
what decides how much.

    python -m experiments.opd --seeds 5              # every arm, tables, a picture and the
                                                     claims
    python -m experiments.opd --arms before,opd,teacher
    python -m experiments.opd --smoke                # seconds: does it all still run
    python -m experiments.opd --report results/opd.jsonl

One round of an on-policy arm is `rollout.py` (32 problems, 8 answers each) and `train.py
--teacher` (4 updates), which reads the teacher's whole distribution from memory; an off-policy
arm trains on as many of the teacher's answers in as many updates.  The world is that of the
main job (experiments/ropd.py) with a teacher that was trained longer.  Experiments, by the
numbers of the sources (Thinking Machines, "On-Policy Distillation" 2025; GKD arXiv 2306.13649):

    M1  dense beats sparse: a student is trained by reinforcement (the right final answer) as
        far as it goes; then its *initial*
        weights are distilled from that result.  `rl`, `rl-opd`; control `rl-self`: the student
        is its own teacher
    M2  own answers against given ones, as many of either: `opd` (one log-prob a token),
        `opd-full` (the distribution),
        `sft` (the teacher's answers, as many), `sft5` (five times as many, and five times the
        updates)
    M3  the share of own answers, all with the forward KL: `lambda0`, `lambda25`, `lambda50`,
        `dagger` (all own)
    M4  the divergence, all on own answers: `dagger` (forward), `jsd10`, `jsd50`, `jsd90`,
        `opd-full` (reverse)
    M6  new knowledge that costs an old skill: the teacher learns facts by heart (`facts`), and
        is then distilled from its old self on
        sums it solves by itself (`facts-opd`), or imitates its old self's answers (`facts-sft`)

M5 (a teacher outside of the student's support) is in experiments/unified.py, M7 (estimators) in
tests/test_loss.py. The learning rates were chosen on dev (results/opd_dev_lr*.jsonl, two
seeds); the held-out problems serve for measuring only.  Accuracy on the way is measured with 4
samples a problem, at the end of an arm with 16.
"""

import json
import shutil
import time

from experiments import (
    Claim,
    add_eval_flags,
    add_run_flags,
    begin,
    last,
    parse,
    report,
    run_arms,
    settle,
)
from experiments import add_world_flags, build_world, spoil_student
from opd import files

OWN = dict(source="own", teacher="world")
ARMS = {
    "before": {},
    "sft": dict(source="answers", method="seqkd", repeats=1),
    "sft5": dict(source="answers", method="seqkd", repeats=5),
    "opd": dict(method="opd", **OWN),
    "opd-full": dict(method="opd-full", **OWN),
    "lambda0": dict(source="answers", method="fkl", repeats=1, teacher="world"),
    "lambda25": dict(
        method="gkd", set="divergence=fkl student_fraction=0.25", data=True, **OWN
    ),
    "lambda50": dict(method="gkd", set="divergence=fkl student_fraction=0.5", data=True, **OWN),
    "dagger": dict(method="dagger", **OWN),
    "jsd10": dict(method="opd-full", set="divergence=jsd interpolation=0.1", **OWN),
    "jsd50": dict(method="opd-full", set="divergence=jsd interpolation=0.5", **OWN),
    "jsd90": dict(method="opd-full", set="divergence=jsd interpolation=0.9", **OWN),
    "rl": dict(method="ppo-clip", source="own", reward=True, every=2),
    "rl-opd": dict(method="opd-full", source="own", teacher="rl", every=1),
    "rl-self": dict(method="opd-full", source="own", teacher="student"),
    "facts": dict(source="facts", method="sft", start="world"),
    "facts-opd": dict(method="opd-full", start="facts", **OWN),
    "facts-sft": dict(source="answers", method="seqkd", repeats=1, start="facts"),
    "teacher": dict(start="world"),
}
SHARED = (
    "rounds",
    "rl_rounds",
    "prompts",
    "n",
    "updates",
    "rl_learning_rate",
    "opd_learning_rate",
    "sft_learning_rate",
    "facts_learning_rate",
    "facts_epochs",
    "max_tokens",
    "base_steps",
    "teacher_steps",
    "spoil_steps",
    "spoil_lr",
    "eval_every",
    "eval_n",
    "final_n",
    "eval_split",
)
SMOKE = dict(
    rounds=1,
    rl_rounds=1,
    prompts=4,
    n=2,
    updates=2,
    base_steps=2,
    teacher_steps=4,
    spoil_steps=2,
    eval_every=1,
    eval_n=1,
    final_n=1,
    facts_epochs=1,
    max_tokens=8,
)
COLUMNS = (
    "greedy",
    "pass@n",
    "facts",
    "entropy",
    "length_mean",
    "trained_tokens",
    "generated_tokens",
    "teacher_tokens",
    "seconds",
)


def steps_to(arms, arm, share):
    """Updates until accuracy first reaches `share` of what reinforcement ends with, both arms
    looked at every 8; infinite if never."""
    level = share * arms["rl"][-1]["accuracy"]
    return next(
        (row["step"] for row in arms[arm] if row["step"] % 8 == 0 and row["accuracy"] >= level),
        float("inf"),
    )


CLAIMS = [
    Claim(
        "M1: distillation from the result of reinforcement reaches 95 % of it in a fifth of "
        "its updates",
        "steps(rl-opd) / steps(rl)",
        lambda a: min(1.0, steps_to(a, "rl-opd", 0.95) / max(1, steps_to(a, "rl", 0.95))),
        "below",
        0.2,
    ),
    Claim(
        "M1 control: a student that is its own teacher gains nothing",
        "rl-self − before",
        last("accuracy", "rl-self", "before"),
        "within",
        0.03,
    ),
    Claim(
        "M2: own answers beat as many given ones",
        "opd-full − sft",
        last("accuracy", "opd-full", "sft"),
    ),
    Claim(
        "M2: ...and five times as many", "opd-full − sft5", last("accuracy", "opd-full", "sft5")
    ),
    Claim(
        "M2: also with one teacher number a token", "opd − sft", last("accuracy", "opd", "sft")
    ),
    Claim(
        "M2: the distribution is worth more than one number a token",
        "opd-full − opd",
        last("accuracy", "opd-full", "opd"),
    ),
    Claim(
        "M3: a quarter of own answers beats none",
        "lambda25 − lambda0",
        last("accuracy", "lambda25", "lambda0"),
    ),
    Claim(
        "M3: a half beats a quarter",
        "lambda50 − lambda25",
        last("accuracy", "lambda50", "lambda25"),
    ),
    Claim("M3: all beat a half", "dagger − lambda50", last("accuracy", "dagger", "lambda50")),
    Claim(
        "M4: forward and reverse KL decode alike greedily",
        "greedy(opd-full) − greedy(dagger)",
        last("greedy", "opd-full", "dagger"),
        "within",
        0.03,
    ),
    Claim(
        "M4: reverse KL samples better answers",
        "opd-full − dagger",
        last("accuracy", "opd-full", "dagger"),
    ),
    Claim(
        "M4: forward KL keeps more of pass@16",
        "pass@16(dagger) − pass@16(opd-full)",
        last("pass@n", "dagger", "opd-full"),
    ),
    Claim(
        "M4: forward KL keeps more entropy",
        "entropy(dagger) − entropy(opd-full)",
        last("entropy", "dagger", "opd-full"),
    ),
    Claim(
        "M4: JSD(0.1) is like forward KL",
        "jsd10 − dagger",
        last("accuracy", "jsd10", "dagger"),
        "within",
        0.03,
    ),
    Claim(
        "M4: JSD(0.9) is like reverse KL",
        "jsd90 − opd-full",
        last("accuracy", "jsd90", "opd-full"),
        "within",
        0.03,
    ),
    Claim(
        "M6: learning facts costs the old skill",
        "teacher − facts",
        last("accuracy", "teacher", "facts"),
        "above",
        0.1,
    ),
    Claim(
        "M6: the old self brings nine tenths of it back",
        "(facts-opd − facts) / (teacher − facts)",
        lambda a: (
            last("accuracy", "facts-opd", "facts")(a)
            / max(1e-9, last("accuracy", "teacher", "facts")(a))
        ),
        "above",
        0.9,
    ),
    Claim(
        "M6: ...and the facts stay",
        "facts(facts-opd) − facts(facts)",
        last("facts", "facts-opd", "facts"),
        "above",
        -0.1,
    ),
    Claim(
        "M6: imitation of the old self's answers forgets more of the facts",
        "facts(facts-opd) − facts(facts-sft)",
        last("facts", "facts-opd", "facts-sft"),
    ),
]


def run_arm(run, args, world, folder, seed, arm):
    """One arm of one seed; appends a result line at every evaluation.  Returns the last one."""
    a, place = ARMS[arm], folder / arm
    shutil.rmtree(place, ignore_errors=True)  # an interrupted arm is begun again
    place.mkdir(parents=True)
    named = {
        "world": world / "teacher",
        "student": folder / "student",
        "facts": folder / "facts" / "model",
        "rl": folder / "rl" / "model",
    }
    model, row = named[a.get("start", "student")], None
    cost, started, entropy = (
        {"generated_tokens": 0, "teacher_tokens": 0, "trained_tokens": 0},
        time.time(),
        None,
    )
    rate = (
        args.facts_learning_rate
        if arm == "facts"
        else args.rl_learning_rate
        if a.get("reward")
        else args.opd_learning_rate
        if a.get("teacher")
        else args.sft_learning_rate
    )

    def measure(step, final):
        nonlocal row
        spent, n = round(time.time() - started, 2), args.final_n if final else args.eval_n

        def evaluate(prompts, n, more=""):
            return run.stage(
                f"eval.py --model {model} --prompts {world}/toy/{prompts}.jsonl --n {n} "
                f"--max-tokens {args.max_tokens} "
                f"--seed {2 * 10**6 + seed} --out {place}/eval.jsonl --overwrite {more}"
            )

        score = evaluate(args.eval_split, n)
        row = {
            "arm": arm,
            "seed": seed,
            "step": step,
            "final": final,
            "accuracy": score["accuracy"],
            "samples": n,
            "pass@n": score[f"pass@{n}"],
            "length_mean": score["length_mean"],
            "truncated": score["truncated_fraction"],
            **cost,
            "seconds": spent,
            "entropy": entropy,
        }
        if final:
            row |= {
                "greedy": evaluate(args.eval_split, 1, "--temperature 0")["accuracy"],
                "facts": evaluate("facts_prompts", 4)["accuracy"],
            }
        run.result(args, row)

    def answers(number):
        """The teacher's answers to the problems of all rounds, sampled once a seed: (file,
        tokens)."""
        out = folder / "answers" / f"{number}.jsonl"
        done = run.stage(
            f"teacher.py answer --model {world}/teacher --prompts {world}/toy/train.jsonl "
            f"--slice :{args.prompts * args.rounds} --n {args.n} "
            f"--max-tokens {args.max_tokens} --seed {10**6 + 1000 * seed + number} --out {out}"
        )
        return out, done["generated_tokens"]

    def train(number, rollouts, more):
        """One call of train.py from `model`; the new weights are the model from then on."""
        nonlocal model, entropy
        out = place / f"model{number}"
        sets = " ".join(f"--set {s}" for s in a.get("set", "").split())
        fresh = "--fresh-optimizer" if number == 0 else ""
        done = run.stage(
            f"train.py --method {a['method']} {sets} --model {model} --rollouts {rollouts} "
            f"--out {out} --learning-rate {rate} --seed {seed} {fresh} {more}"
        )
        cost["trained_tokens"] += done["trained_tokens"]
        entropy = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])[
            "policy/entropy"
        ]
        if number:
            shutil.rmtree(model)  # the round before; rollouts stay for reading
        model = out
        return done["steps"]

    batch = f"--batch-size {args.prompts // args.updates}"
    if not a.get("source"):
        measure(0, True)
        return row
    measure(0, False)
    step = 0
    if a["source"] == "facts":
        step = train(0, world / "toy" / "facts.jsonl", f"--epochs {args.facts_epochs}")
    for number in range(a.get("repeats", 0)):
        kept, tokens = answers(number)
        cost["teacher_tokens"] += tokens
        step += train(
            number, kept, batch + (f" --teacher {world}/teacher" if a.get("teacher") else "")
        )
        if number + 1 < a["repeats"]:
            measure(step, False)
    rounds = args.rl_rounds if a.get("reward") else args.rounds
    for number in files.progress(
        range(rounds if a["source"] == "own" else 0), desc=f"seed {seed} {arm}", unit="round"
    ):
        at = place / f"round{number}"
        rolled = run.stage(
            f"rollout.py --model {model} --prompts {world}/toy/train.jsonl --slice "
            f"{number * args.prompts}:{(number + 1) * args.prompts} --n {args.n} "
            f"--max-tokens {args.max_tokens} --seed {seed * 1000 + number} --out "
            f"{at}/rollouts.jsonl"
        )
        cost["generated_tokens"] += rolled["generated_tokens"]
        more = batch
        if a.get("reward"):
            run.stage(
                f"rubric.py grade --grader answer --prompts {world}/toy/train.jsonl "
                f"--rollouts {at}/rollouts.jsonl --out {at}/rewards.jsonl"
            )
            more += f" --rewards {at}/rewards.jsonl"
        else:
            more += f" --teacher {named[a['teacher']]}" + (
                " --teacher-top-k 24" if "jsd" in a.get("set", "") else ""
            )
        if a.get("data"):
            kept, cost["teacher_tokens"] = answers(0)
            more += f" --data {kept}"
        step += train(number, at / "rollouts.jsonl", more)
        if number + 1 < rounds and (number + 1) % a.get("every", args.eval_every) == 0:
            measure(step, False)
    # before the line that says this arm is done: others start from it
    model = model.rename(place / "model")
    measure(step, True)
    return row


def main(argv=None):
    p = files.parser(__doc__)
    add_run_flags(p, "opd")
    p.add_argument("--rounds", type=int, default=20, help="rounds of a distillation arm")
    p.add_argument("--rl-rounds", type=int, default=40, help="rounds of the reinforcement arm")
    p.add_argument("--prompts", type=int, default=32, help="problems a round")
    p.add_argument("--n", type=int, default=8, help="answers a problem")
    p.add_argument("--updates", type=int, default=4, help="optimiser steps a round")
    p.add_argument("--rl-learning-rate", type=float, default=3e-4, help="of reinforcement")
    p.add_argument(
        "--opd-learning-rate",
        type=float,
        default=3e-4,
        help="of arms that read a teacher's log-probs",
    )
    p.add_argument("--sft-learning-rate", type=float, default=3e-4, help="of imitation")
    p.add_argument(
        "--facts-learning-rate", type=float, default=1e-3, help="of learning facts by heart"
    )
    p.add_argument("--facts-epochs", type=int, default=100, help="walks over the facts")
    p.add_argument("--max-tokens", type=int, default=64, help="longest answer")
    add_world_flags(p, teacher_steps=2000)
    add_eval_flags(p, every=4, n=4, final_n=16)
    if not (args := parse(p, argv, CLAIMS, SMOKE)):
        return None
    arms = settle(
        args, "opd", ARMS, {"rl-opd": ("rl",), "facts-opd": ("facts",), "facts-sft": ("facts",)}
    )
    run = begin(args, "on-policy distillation on running sums", arms, SHARED)
    world = build_world(run, args, problems=args.prompts * max(args.rounds, args.rl_rounds))
    run_arms(
        run,
        args,
        arms,
        lambda seed: spoil_student(run, args, world, seed),
        lambda *which: run_arm(run, args, world, *which),
        lambda row: (
            f"{args.eval_split} accuracy {row['accuracy']:.1%}, greedy {row['greedy']:.1%}, "
            f"facts {row['facts']:.1%}"
        ),
    )
    return report(run, args, CLAIMS, COLUMNS)


if __name__ == "__main__":
    files.run(main)
