"""Stable-OPD (arXiv 2604.08527): does on-policy distillation run into loops, and do golden
answers and a leash keep it out of them?

    python -m experiments.stable --seeds 5
    python -m experiments.stable --arms before,opd,stable
    python -m experiments.stable --smoke
    python -m experiments.stable --report results/stable.jsonl

World: a real language model has read text that repeats itself, and finds a loop likely once it
has begun.  Here base and teacher read clean work first, then work of which a few texts repeat
their last line without end (worlds.sums --loops); the student is the base after careless text
with a few loops, and the `planted` one after text with many.  The longest answer, 320 tokens,
is six times a golden one.  A round is 16 problems, 4 answers each, one golden answer each for
the arms that take it, and one optimiser step.

    opd             plain on-policy distillation with PPO's clip            kl, gold, stable
                    with the leash, the golden answers, both
    sft             the golden answers alone, as many updates               opd-best
                    opd at its best checkpoint by dev
    baseline        opd with the advantage's mean taken out (+ KL)          planted-...
                    from the student that loops already
    eos-opd, eos-kl the teacher ends with another token than the student    eos-class
    both ends counted as one

The leash is exact over the small vocabulary (reference_support full).  Weights of 0.1 and 0.01
are what a secondary source says of the paper.  Accuracy, loops (tail of 256 characters, ratio
4) and cut answers are measured on the way; `advantage_...` are means over the rounds since the
line before, `worst_repetition` is the share of loops in the worst round so far.

The world's sizes were chosen for its start alone.  Seed 0 with `--arms before,teacher`: the
student is right in 12.7 % and loops in 0.9 %, the teacher 85.2 % and 2.9 %; the planted student
loops in about 30 % (first line of planted-opd).  The teacher loops more than the student: a
perfect pupil of it rises to its 3 %, which is imitation and no collapse, hence the claim
against the teacher.  Right text alone comes first because arithmetic is not learned in time
from text with loops; 200 steps on loops give no copy prior yet.

The learning rates were chosen on dev (results/stable_dev_lr*.jsonl, one seed, 80 rounds).  Of
3e-4, 1e-3 and 3e-3, in this order, opd reaches 71, 74 and 9 %, stable 74, 70 and 34 %, sft 90,
83 and 46 %.  At the first two loops surge early (17 % of opd's rollouts in the first 20 rounds)
and fall back to the teacher's few: no collapse.  At 3e-3 it is there: at round 20 84 % of opd's
answers are loops.  So all arms train at 3e-4, and five are run again hot, at ten times the
rate, for there the paper's cure has a disease to cure:

    hot-opd, hot-kl, hot-gold, hot-stable, hot-sft
"""

import json
import shutil
import time

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
    settle,
)
from opd import files, records

ARMS = {
    "before": {},
    "opd": dict(source="own"),
    "kl": dict(source="own", leash=True),
    "gold": dict(source="own", gold=True),
    "stable": dict(source="own", leash=True, gold=True),
    "sft": dict(source="gold"),
    "opd-best": dict(start="best"),
    "baseline": dict(source="own", set="baseline=kl"),
    "planted-opd": dict(source="own", start="planted"),
    "planted-stable": dict(source="own", start="planted", leash=True, gold=True),
    "eos-opd": dict(source="own", start="eos", world="eos"),
    "eos-kl": dict(source="own", start="eos", world="eos", leash=True),
    "eos-class": dict(source="own", start="eos", world="eos", same=True),
    "hot-opd": dict(source="own", hot=True),
    "hot-kl": dict(source="own", hot=True, leash=True),
    "hot-gold": dict(source="own", hot=True, gold=True),
    "hot-stable": dict(source="own", hot=True, leash=True, gold=True),
    "hot-sft": dict(source="gold", hot=True),
    "teacher": dict(start="teacher"),
    # source: whose answers are trained on; start: which student (default: the spoiled one);
    # leash,
    # gold: the two additions of the paper; hot: --hot-learning-rate
}
SHARED = (
    "rounds",
    "eos_rounds",
    "hot_rounds",
    "prompts",
    "n",
    "learning_rate",
    "sft_learning_rate",
    "hot_learning_rate",
    "gold_weight",
    "leash",
    "max_tokens",
    "clean_steps",
    "base_steps",
    "teacher_steps",
    "loop_share",
    "eos_steps",
    "spoil_steps",
    "spoil_lr",
    "student_loops",
    "planted_loops",
    "eval_every",
    "eval_n",
    "final_n",
    "eval_split",
)
SMOKE = dict(
    rounds=2,
    eos_rounds=2,
    hot_rounds=2,
    prompts=2,
    n=2,
    max_tokens=8,
    clean_steps=2,
    base_steps=1,
    teacher_steps=2,
    eos_steps=3,
    spoil_steps=1,
    eval_every=1,
    eval_n=1,
    final_n=1,
)
COLUMNS = (
    "dev_accuracy",
    "greedy",
    "peak",
    "repetition",
    "worst_repetition",
    "truncated",
    "length_mean",
    "alarms",
    "advantage_repetitive",
    "advantage_other",
    "student_end_mass",
    "teacher_end_mass",
    "gold_tokens",
    "seconds",
)


def at_round(arm, step):
    """An arm's accuracy when it had made so many rounds; KeyError, that is not measured, if it
    was not looked at then."""
    return lambda arms: {line["step"]: line["accuracy"] for line in arms[arm]}[step]


CLAIMS = [
    Claim(
        "1: plain distillation learns to loop",
        "repetition(opd) − repetition(before)",
        last("repetition", "opd", "before"),
        "above",
        0.05,
    ),
    Claim(
        "1: ...more than its teacher does",
        "repetition(opd) − repetition(teacher)",
        last("repetition", "opd", "teacher"),
        "above",
        0.05,
    ),
    Claim(
        "1: ...runs into the longest answer",
        "truncated(opd) − truncated(before)",
        last("truncated", "opd", "before"),
        "above",
        0.05,
    ),
    Claim(
        "1: ...and ends below its own best checkpoint, which dev chose",
        "opd − opd-best",
        gap("opd", "opd-best"),
        "below",
        -0.05,
    ),
    Claim(
        "2: with golden answers and a leash it does not loop",
        "repetition(stable)",
        last("repetition", "stable"),
        "below",
        0.05,
    ),
    Claim("2: ...and ends above plain distillation", "stable − opd", gap("stable", "opd")),
    Claim(
        "3: golden answers alone bring more than half of that",
        "(gold − opd) − (stable − opd) / 2",
        lambda a: gap("gold", "opd")(a) - gap("stable", "opd")(a) / 2,
    ),
    Claim("3: the leash alone brings some", "kl − opd", gap("kl", "opd")),
    Claim(
        "4: it is more than imitation of the golden answers",
        "stable − sft",
        gap("stable", "sft"),
    ),
    Claim(
        "4: ...and more than stopping in time", "stable − opd-best", gap("stable", "opd-best")
    ),
    Claim(
        "4: the mean of the advantage is a symptom: without it the end is the same",
        "baseline − opd",
        gap("baseline", "opd"),
        "within",
        0.05,
    ),
    Claim(
        "4: ...and so are the loops",
        "repetition(baseline) − repetition(opd)",
        last("repetition", "baseline", "opd"),
        "within",
        0.05,
    ),
    Claim(
        "4: loops look better to the teacher than other answers (first rounds of planted-opd)",
        "advantage(repetitive) − advantage(other)",
        lambda a: (
            a["planted-opd"][1]["advantage_repetitive"] - a["planted-opd"][1]["advantage_other"]
        ),
    ),
    Claim(
        "hot: at ten times the rate plain distillation does learn to loop",
        "repetition(hot-opd)",
        last("repetition", "hot-opd"),
        "above",
        0.3,
    ),
    Claim(
        "hot: ...and its skill goes with it",
        "final(hot-opd) − peak(hot-opd)",
        last("final_minus_peak", "hot-opd"),
        "below",
        -0.05,
    ),
    Claim(
        "hot: golden answers and a leash keep it out of loops",
        "repetition(hot-stable)",
        last("repetition", "hot-stable"),
        "below",
        0.05,
    ),
    Claim(
        "hot: ...and it ends above plain distillation",
        "hot-stable − hot-opd",
        gap("hot-stable", "hot-opd"),
    ),
    Claim(
        "hot: golden answers alone bring more than half of that",
        "(hot-gold − hot-opd) − (hot-stable − hot-opd) / 2",
        lambda a: gap("hot-gold", "hot-opd")(a) - gap("hot-stable", "hot-opd")(a) / 2,
    ),
    Claim("hot: the leash alone brings some", "hot-kl − hot-opd", gap("hot-kl", "hot-opd")),
    Claim(
        "hot: it is more than imitation of the golden answers",
        "hot-stable − hot-sft",
        gap("hot-stable", "hot-sft"),
    ),
    Claim(
        "hot: ...and more than a smaller rate (as many rounds each; 2 samples a problem "
        "against 8)",
        "hot-stable − opd at that round",
        lambda a: (
            last("accuracy", "hot-stable")(a) - at_round("opd", a["hot-stable"][-1]["step"])(a)
        ),
    ),
    Claim(
        "5: another end token inflates answers",
        "truncated(eos-opd) − before it",
        lambda a: a["eos-opd"][-1]["truncated"] - a["eos-opd"][0]["truncated"],
        "above",
        0.1,
    ),
    Claim(
        "5: counting both ends as one removes that",
        "truncated(eos-class) − truncated(eos-opd)",
        last("truncated", "eos-class", "eos-opd"),
        "below",
        -0.1,
    ),
    Claim(
        "5: the leash does not",
        "truncated(eos-kl) − truncated(eos-opd)",
        last("truncated", "eos-kl", "eos-opd"),
        "above",
        -0.1,
    ),
    Claim(
        "plant: a student that loops already is not healed by plain distillation",
        "repetition(planted-opd)",
        last("repetition", "planted-opd"),
        "above",
        0.05,
    ),
    Claim(
        "plant: it is with both additions",
        "repetition(planted-stable)",
        last("repetition", "planted-stable"),
        "below",
        0.05,
    ),
]


def build(run, args):
    """The corpora, the golden answers, and the models that all seeds share."""
    world, texts, problems = (
        run.out / "world",
        4 * 64 * args.spoil_steps,
        args.prompts * args.rounds,
    )
    for name, flags in (
        (
            "toy",
            f"--train-prompts {problems} --clean {64 * args.clean_steps} --mixed 8 --loops "
            f"{max(texts, 64 * args.teacher_steps)} --loop-share {args.loop_share} "
            f"--planted-share {args.planted_loops}",
        ),
        (
            "careless",
            f"--train-prompts 8 --eval-prompts 8 --clean 8 --mixed 8 --loops {texts} "
            f"--planted-share {args.student_loops}",
        ),
        (
            "eos",
            f"--train-prompts {problems} --clean {64 * args.eos_steps} --mixed {texts} "
            f"--second-end",
        ),
    ):
        if not (world / name).exists():
            run.stage(f"worlds.sums --out {world}/{name} {flags}")
    # the golden answers of every stretch between evaluations, for the arm that has nothing else
    if not (world / "gold").exists():
        run.commands.write(
            f"# {world}/gold/N.jsonl: as answers, the `solution`s of "
            f"{args.eval_every * args.prompts} problems of {world}/toy/train.jsonl "
            f"from round N on\n"
        )
        answers = [
            {
                "id": p["id"],
                "sample": 0,
                "policy": {"model": "solution"},
                "messages": p["messages"],
                "text": p["solution"],
                "finish_reason": "stop",
            }
            for p in files.read(world / "toy" / "train.jsonl", "prompts")
        ]
        (world / "gold.partial").mkdir(exist_ok=True)
        for start in range(0, args.rounds, args.eval_every):
            part = answers[start * args.prompts : (start + args.eval_every) * args.prompts]
            files.write_atomically(
                world / "gold.partial" / f"{start}.jsonl", (json.dumps(a) + "\n" for a in part)
            )
        (world / "gold.partial").rename(world / "gold")
    total = args.clean_steps + args.base_steps + args.teacher_steps
    for seed, (name, start, corpus, steps, total) in enumerate(
        (
            ("skill", "toy/student", "toy/clean", args.clean_steps, total),
            ("base", "skill", "toy/looping", args.base_steps, total),
            ("teacher", "base", "toy/looping", args.teacher_steps, total),
            ("eos-base", "eos/student", "eos/clean", args.clean_steps, args.eos_steps),
            ("eos-teacher", "eos/teacher", "eos/clean", args.eos_steps, args.eos_steps),
        )
    ):
        imitate(
            run,
            world / start,
            world / f"{corpus}.jsonl",
            steps,
            4e-3,
            seed,
            world / name,
            f"--warmup-steps 20 --schedule linear --total-steps {total}",
        )
    return world


def spoil(run, args, world, seed):
    """This seed's folder with its three students: a base, spoiled by careless text of some
    kind."""
    folder = run.out / f"seed{seed}"
    for name, base, corpus in (
        ("student", "base", "careless/planted"),
        ("planted", "base", "toy/planted"),
        ("eos", "eos-base", "eos/mixed"),
    ):
        imitate(
            run,
            world / base,
            world / f"{corpus}.jsonl",
            args.spoil_steps,
            args.spoil_lr,
            seed,
            folder / name,
            "--fresh-optimizer",
        )
    return folder


def run_arm(run, args, world, folder, seed, arm):
    """One arm of one seed; appends a result line at every evaluation.  Returns the last one."""
    a, place = ARMS[arm], folder / arm
    shutil.rmtree(place, ignore_errors=True)  # an interrupted arm is begun again
    place.mkdir(parents=True)
    # one long answer holds a whole batch up: few and large ones
    home, large = world / a.get("world", "toy"), "--batch-tokens 65536"
    start, teacher = (
        a.get("start", "student"),
        world / ("eos-teacher" if "world" in a else "teacher"),
    )
    first = (
        teacher
        if start == "teacher"
        else next((folder / "opd").glob("best-*"))
        if start == "best"
        else folder / start
    )
    model, row, rows, history, started = first, None, [], [], time.time()
    cost = {
        "generated_tokens": 0,
        "teacher_tokens": 0,
        "trained_tokens": 0,
        "gold_tokens": 0,
        "alarms": 0,
        "worst_repetition": 0.0,
    }

    def measure(step, final):
        nonlocal row
        spent = round(time.time() - started, 2)

        def evaluate(prompts, n, more=""):
            return run.stage(
                f"eval.py --model {model} --prompts {home}/{prompts}.jsonl --n {n} "
                f"--max-tokens {args.max_tokens} --seed {2 * 10**6 + seed} {large} "
                f"--out {place}/{prompts}.jsonl --overwrite {more}"
            )

        dev, score = (
            evaluate("dev", args.eval_n)["accuracy"],
            evaluate(args.eval_split, args.final_n if final else args.eval_n),
        )
        if "source" in a and all(dev > earlier["dev_accuracy"] for earlier in rows):
            for worse in place.glob("best-*"):
                shutil.rmtree(worse)
            shutil.copytree(model, place / f"best-{step}")
        peak = max([score["accuracy"], *(earlier["accuracy"] for earlier in rows)])
        row = {
            "arm": arm,
            "seed": seed,
            "step": step,
            "final": final,
            "accuracy": score["accuracy"],
            "dev_accuracy": dev,
            "peak": peak,
            "final_minus_peak": score["accuracy"] - peak,
            "repetition": score["repetition_rate"],
            "truncated": score["truncated_fraction"],
            "length_mean": score["length_mean"],
            **cost,
            "seconds": spent,
        }
        for name, metric, sign in (
            ("train_repetition", "rollout/repetition", 1),
            ("train_truncated", "rollout/truncated", 1),
            ("advantage_repetitive", "kl/teacher_repetitive", -1),
            # means over the rounds since the line before
            ("advantage_other", "kl/teacher_other", -1),
        ):
            if values := [m[metric] for m in history if metric in m]:
                row[name] = sign * sum(values) / len(values)
        row |= {
            name: history[-1][f"rollout/{name}"]
            for name in ("student_end_mass", "teacher_end_mass")
            if history and f"rollout/{name}" in history[-1]
        }
        if final:
            row["greedy"] = evaluate(args.eval_split, 1, "--temperature 0")["accuracy"]
        run.result(args, row)
        rows.append(row)
        history.clear()

    def train(number, method, rollouts, rate, more):
        """One call of train.py from `model`; the new weights are the model from then on."""
        nonlocal model
        out = place / f"model{number}"
        done = run.stage(
            f"train.py --method {method} --model {model} --rollouts {rollouts} --out {out} "
            f"--batch-size {args.prompts} --learning-rate {rate} --seed {seed} "
            f"{'--fresh-optimizer' if number == 0 else ''} {more}"
        )
        cost["trained_tokens"] += done["trained_tokens"]
        history.extend(
            json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()
        )
        if model != first:
            shutil.rmtree(model)  # the round before
        model = out
        return history[-1]

    if "source" not in a:
        measure(int(first.name.removeprefix("best-")) if start == "best" else 0, True)
        return row
    measure(0, False)
    # a token a character, and the end
    gold = [len(p["solution"]) + 1 for p in files.read(home / "train.jsonl", "prompts")]
    sets = [
        f"gold_weight={args.gold_weight if a.get('gold') else 0}",
        *(
            [f"reference_kl={args.leash}", "reference_support=full"]
            if a.get("leash")
            else ["reference_kl=0"]
        ),
        *a.get("set", "").split(),
    ]
    rounds, rate = (
        args.eos_rounds if "world" in a else args.hot_rounds if "hot" in a else args.rounds,
        a.get("hot") and args.hot_learning_rate,
    )
    for number in files.progress(
        range(0, rounds, args.eval_every if a["source"] == "gold" else 1),
        desc=f"seed {seed} {arm}",
        unit="round",
    ):
        at = place / f"round{number}"
        if a["source"] == "gold":
            ended = min(number + args.eval_every, rounds)
            train(
                number,
                "sft",
                f"{world}/gold/{number}.jsonl",
                rate or args.sft_learning_rate,
                "",
            )
            cost["gold_tokens"] = cost["trained_tokens"]
        else:
            ended, rollouts, more = (
                number + 1,
                at / "rollouts.jsonl",
                " ".join(f"--set {s}" for s in sets),
            )
            rolled = run.stage(
                f"rollout.py --model {model} --prompts {home}/train.jsonl --slice "
                f"{number * args.prompts}:{ended * args.prompts} --n {args.n} "
                f"--max-tokens {args.max_tokens} --seed {seed * 1000 + number} {large} --out "
                f"{rollouts}"
            )
            scored = run.stage(
                f"teacher.py score --model {teacher} --rollouts {rollouts} --out "
                f"{at}/scores.jsonl"
                + " --top-k 1000" * ("baseline" in a.get("set", ""))
                + ' --same-token "<|eot|>=<|end|>"' * a.get("same", False)
            )
            cost["generated_tokens"] += rolled["generated_tokens"]
            cost["teacher_tokens"] += scored["teacher_tokens"]
            if a.get("leash"):
                run.stage(
                    f"teacher.py score --model {first} --rollouts {rollouts} --top-k 1000 "
                    f"--out {at}/reference.jsonl"
                )
                more += f" --reference {at}/reference.jsonl"
            if a.get("gold"):
                more += f" --data {home}/train.jsonl"
                cost["gold_tokens"] += sum(gold[number * args.prompts : ended * args.prompts])
            metrics = train(
                number,
                "stable-opd",
                rollouts,
                rate or args.learning_rate,
                f"--scores {at}/scores.jsonl {more}",
            )
            cost["alarms"] += int(metrics["alarm/collapse"])
            # of any round: loops can come and go between evaluations
            cost["worst_repetition"] = max(
                cost["worst_repetition"], metrics["rollout/repetition"]
            )
        if ended % args.eval_every == 0 or ended == rounds:
            measure(ended, ended == rounds)
        elif at.exists():
            shutil.rmtree(at)  # a reader finds the rollouts of the rounds that were measured
    return row


def main(argv=None):
    p = files.parser(__doc__)
    add_run_flags(p, "stable")
    p.add_argument(
        "--rounds", type=int, default=60, help="rounds of an arm, each one optimiser step"
    )
    p.add_argument(
        "--eos-rounds",
        type=int,
        default=20,
        help="the same for arms with two end tokens, whose answers may all run to the "
        "longest; at most --rounds",
    )
    p.add_argument(
        "--hot-rounds",
        type=int,
        default=30,
        help="the same for arms at --hot-learning-rate, for the same reason",
    )
    p.add_argument(
        "--prompts", type=int, default=16, help="problems a round, each with its golden answer"
    )
    p.add_argument("--n", type=int, default=4, help="answers a problem")
    p.add_argument(
        "--learning-rate", type=float, default=3e-4, help="of arms that answer by themselves"
    )
    p.add_argument(
        "--sft-learning-rate",
        type=float,
        default=3e-4,
        help="of imitation of the golden answers",
    )
    p.add_argument("--hot-learning-rate", type=float, default=3e-3, help="of the arms hot-...")
    p.add_argument(
        "--gold-weight", type=float, default=0.1, help="weight of the golden answers' loss"
    )
    p.add_argument(
        "--leash", type=float, default=0.01, help="weight of the KL to the student as it starts"
    )
    p.add_argument(
        "--max-tokens",
        type=int,
        default=320,
        help="longest answer; a golden one has at most 60",
    )
    p.add_argument(
        "--clean-steps",
        type=int,
        default=600,
        help="pre-training steps of 64 right texts, with which the base begins",
    )
    p.add_argument(
        "--base-steps",
        type=int,
        default=500,
        help="more steps on text with loops: the base model the students come from",
    )
    p.add_argument(
        "--teacher-steps", type=int, default=900, help="more steps on the same: the teacher"
    )
    p.add_argument("--loop-share", type=float, default=0.03, help="loops among those texts")
    p.add_argument(
        "--eos-steps",
        type=int,
        default=1500,
        help="pre-training steps of the teacher with the other end token",
    )
    p.add_argument(
        "--spoil-steps", type=int, default=100, help="steps of 64 careless texts for a student"
    )
    p.add_argument("--spoil-lr", type=float, default=1e-3, help="learning rate of those steps")
    p.add_argument(
        "--student-loops", type=float, default=0.03, help="loops among the careless texts"
    )
    p.add_argument(
        "--planted-loops",
        type=float,
        default=0.35,
        help="the same for the student that has the disease already",
    )
    add_eval_flags(p, every=15, n=2, final_n=8)
    if not (args := parse(p, argv, CLAIMS, SMOKE)):
        return None
    args.updates = 1
    arms = settle(args, "stable", ARMS, {"opd-best": ("opd",)})
    for flag in ("eos_rounds", "hot_rounds"):
        if not 1 <= getattr(args, flag) <= args.rounds:
            raise records.BadInput(
                f"--{flag.replace('_', '-')} {getattr(args, flag)}: expected 1 to --rounds "
                f"{args.rounds}, for all take the same problems"
            )
    run = begin(args, "loops in on-policy distillation", arms, SHARED)
    world = build(run, args)
    run_arms(
        run,
        args,
        arms,
        lambda seed: spoil(run, args, world, seed),
        lambda *which: run_arm(run, args, world, *which),
        lambda row: (
            f"{args.eval_split} accuracy {row['accuracy']:.1%}, greedy {row['greedy']:.1%}, "
            f"repetitive {row['repetition']:.1%}, cut {row['truncated']:.1%}"
        ),
    )
    return report(run, args, CLAIMS, COLUMNS)


if __name__ == "__main__":
    files.run(main)
