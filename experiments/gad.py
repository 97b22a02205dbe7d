"""GAD (arXiv 2511.10643): distillation from a teacher that shows only texts, with a
discriminator that learns beside the student as the reward.

    python -m experiments.gad --seeds 5
    python -m experiments.gad --arms seqkd,gad,frozen
    python -m experiments.gad --smoke
    python -m experiments.gad --report results/gad.jsonl
    python -m experiments.gad_toy                       # the paper's ten-class toy, in a minute

World: a teacher that writes in one style of the four (`7+5=12 / 12-3=9 / #9`), one text a
problem, collected once; the student knows all four, and bad habits.  Warm-up: --warm-rounds
rounds in which the student imitates the teacher's texts and the discriminator, which begins as
the student with a new head, learns to score them above the student's answers of the moment; it
begins alone, for --judge-rounds rounds.  Then, in every round,

    rollout.py                                    32 problems, 8 answers each
    rubric.py grade --grader discriminator        its score as it stands is the reward; the
                                                  teacher's texts are scored beside it and earn
                                                  nothing
    train.py --method discriminator               the discriminator learns from these very
                                                  answers
    train.py --method gad                         the student follows the scores of before:
                                                  GRPO's advantage, clip, a leash to the
                                                  warmed-up student

as many updates of one as of the other, gradients clipped at 0.2.

    before, teacher     as they start
    warm                after the warm-up: where all arms below begin, unless they say otherwise
    seqkd               imitation goes on for as many updates: control
    gad                 the method;  gad-ce: cross-entropy in place of Bradley-Terry, from its
                        warm-up on;  gad-paused: with the pause rules
    no-judge-warm       the discriminator begins anew after the warm-up;  no-student-warm: the
                        student is not warmed up, only the discriminator is
    frozen              the discriminator learns on for as many updates, from answers of the
                        warmed-up student, and then no more
    length              it sees nothing but how long an answer is
    random              gad's scores, dealt out at random within each group
    rubric, answer      ROPD's rubrics from the same texts, and the right final answer, as
                        rewards: what GAD is compared with (arXiv 2605.07396)

True quality is accuracy, which no discriminator is shown; `style` is the share of answers in
the teacher's style, `ood` accuracy on longer problems than any trained on.  `proxy` is the mean
score of the last round's answers, `margin` how far below the teacher's texts they lie.

How long to warm up and how fast to learn was chosen on dev (`--arms seqkd,gad,frozen,answer
--eval-split dev --final-n 4`, seed 0, results/gad_dev_*.jsonl).  After ten rounds of warm-up
the student has 73 % in the teacher's style, of which the discriminator can tell next to nothing
(it is right in 50 to 60 % of the pairs), and its score leads away from there: gad 37, 58 and 72
% at --learning-rate 3e-4, 1e-4 and 3e-5, where seqkd has 86 %.  The defaults are those of a
warm-up of four rounds.
"""

import re
import shutil
import time

from experiments import (
    Claim,
    add_eval_flags,
    add_run_flags,
    begin,
    gap,
    parse,
    report,
    run_arms,
    say,
    settle,
)
from experiments import add_world_flags, build_world, spoil_student
from opd import files, records

WARM = dict(start="warm", judge="warm")
ARMS = {  # start: which student; judge: which discriminator; reward: what the student follows
    "before": {},
    "teacher": {},
    "warm": {},
    "seqkd": dict(start="warm", reward=None),
    "gad": dict(WARM, reward="judge"),
    "gad-ce": dict(WARM, judge="warm-ce", reward="judge", set="omega=cross-entropy"),
    "gad-paused": dict(WARM, reward="judge", pause=True),
    "no-judge-warm": dict(start="warm", judge="new", reward="judge"),
    "no-student-warm": dict(start="student", judge="cold", reward="judge"),
    "frozen": dict(WARM, reward="judge", frozen=True),
    "length": dict(WARM, judge="warm-length", reward="judge", set="view=length"),
    "random": dict(WARM, reward="judge", shuffle=True),
    "rubric": dict(start="warm", reward="rubric"),
    "answer": dict(start="warm", reward="answer"),
}
SHARED = (
    "rounds",
    "warm_rounds",
    "judge_rounds",
    "prompts",
    "n",
    "updates",
    "learning_rate",
    "warm_learning_rate",
    "judge_learning_rate",
    "reference_kl",
    "grad_clip",
    "pause_judge",
    "pause_student",
    "max_tokens",
    "base_steps",
    "teacher_steps",
    "style_steps",
    "spoil_steps",
    "spoil_lr",
    "eval_every",
    "eval_n",
    "final_n",
    "eval_split",
)
SMOKE = dict(
    rounds=2,
    warm_rounds=2,
    judge_rounds=1,
    prompts=2,
    n=2,
    updates=1,
    max_tokens=8,
    base_steps=2,
    teacher_steps=4,
    style_steps=2,
    spoil_steps=2,
    eval_every=2,
    eval_n=1,
    final_n=1,
)
COLUMNS = (
    "ood",
    "style",
    "length_mean",
    "length_gap",
    "truncated",
    "proxy",
    "margin",
    "judge_accuracy",
    "length_correlation",
    "score_std",
    "flat_groups",
    "paused",
    "seconds",
)


def growth(arm, metric):
    """From the first round's line to the last."""
    return lambda arms: arms[arm][-1][metric] - arms[arm][1][metric]


CLAIMS = [
    Claim("1: GAD beats as many updates of imitation", "gad − seqkd", gap("gad", "seqkd")),
    Claim(
        "1: ...on longer problems than any trained on",
        "ood(gad) − ood(seqkd)",
        gap("gad", "seqkd", "ood"),
    ),
    Claim("1: GAD improves on its start", "gad − warm", gap("gad", "warm")),
    Claim(
        "2: a frozen discriminator's score rises",
        "proxy(frozen), last line − first",
        growth("frozen", "proxy"),
    ),
    Claim("2: ...while true quality falls", "frozen − warm", gap("frozen", "warm"), "below"),
    Claim(
        "2: ...and answers grow",
        "length(frozen) − length(warm)",
        gap("frozen", "warm", "length_mean"),
    ),
    Claim(
        "2: with a discriminator that learns on, quality does not fall",
        "gad − warm",
        gap("gad", "warm"),
        "above",
        -0.02,
    ),
    Claim(
        "2: ...nor does length run away from the teacher's (characters)",
        "length gap(gad) − length gap(frozen)",
        gap("gad", "frozen", "length_gap"),
        "below",
    ),
    Claim("2: ...and it ends above the frozen one", "gad − frozen", gap("gad", "frozen")),
    Claim(
        "3: without warming the discriminator up there is nothing beyond imitation",
        "no-judge-warm − seqkd",
        gap("no-judge-warm", "seqkd"),
        "below",
        0.03,
    ),
    Claim("3: ...it loses to GAD", "gad − no-judge-warm", gap("gad", "no-judge-warm")),
    Claim(
        "3: ...and so does an unwarmed student",
        "gad − no-student-warm",
        gap("gad", "no-student-warm"),
    ),
    Claim(
        "3: Bradley-Terry is no worse than cross-entropy",
        "gad − gad-ce",
        gap("gad", "gad-ce"),
        "above",
        -0.02,
    ),
    Claim(
        "pause rules change nothing",
        "gad-paused − gad",
        gap("gad-paused", "gad"),
        "within",
        0.03,
    ),
    Claim(
        "control: scores at random teach nothing",
        "random − warm",
        gap("random", "warm"),
        "below",
        0.02,
    ),
    Claim("control: length alone does not do it", "gad − length", gap("gad", "length")),
    Claim(
        "control: ...it teaches nothing", "length − warm", gap("length", "warm"), "below", 0.02
    ),
    Claim(
        "bridge: GAD brings the student nearer to the teacher's style",
        "style(gad) − style(warm)",
        gap("gad", "warm", "style"),
    ),
    Claim(
        "bridge: ...than a rubric does",
        "style(gad) − style(rubric)",
        gap("gad", "rubric", "style"),
    ),
    Claim(
        "bridge: ...and moves correctness less", "gad − rubric", gap("gad", "rubric"), "below"
    ),
    Claim(
        "bridge: a checker of answers is above both", "answer − rubric", gap("answer", "rubric")
    ),
]


def in_style(text):
    """Whether every line but the last is one step, `12-3=9`, as the teacher writes them, and
    there is one.   in_style("7+5=12\\n#12") -> True"""
    *work, end = text.split("\n")
    return (
        bool(work)
        and all(re.fullmatch(r"\d+[+-]\d=\d+", line) for line in work)
        and end.startswith("#")
    )


def build(run, args):
    """Problems, longer ones, the teacher in its one style, and its one text to every problem
    that is trained on."""
    problems = args.prompts * (args.rounds + args.warm_rounds)
    world = build_world(run, args, problems)
    for name, flags in (
        ("ood", f"--terms 7:8 --eval-prompts {100 if not args.smoke else 8} --clean 8"),
        ("lines", f"--styles lines --eval-prompts 8 --clean {64 * args.style_steps}"),
    ):
        if not (world / name).exists():
            run.stage(f"worlds.sums --out {world}/{name} {flags} --train-prompts 8 --mixed 8")
    if not (world / "teacher-lines").exists():
        say(f"a teacher of one style: {args.style_steps} more steps of 64 texts")
        run.stage(
            f"train.py --method sft --model {world}/teacher --rollouts "
            f"{world}/lines/clean.jsonl --batch-size 64 --learning-rate 1e-3 "
            f"--warmup-steps 20 --schedule linear --adam-beta2 0.95 "
            f"--micro-batch-tokens 4096 --fresh-optimizer --steps {args.style_steps} --out "
            f"{world}/teacher-lines"
        )
    for number in range(args.warm_rounds + args.rounds):
        run.stage(
            f"teacher.py answer --model {world}/teacher-lines --prompts "
            f"{world}/toy/train.jsonl --slice "
            f"{number * args.prompts}:{(number + 1) * args.prompts} --n 1 "
            f"--max-tokens {args.max_tokens} --seed {10**6} --out "
            f"{world}/answers/{number}.jsonl"
        )
    return world


class Place:
    """A folder in which a student and a discriminator go on, round by round, each from where an
    arm says."""

    def __init__(self, run, args, world, folder, seed, student, judge, omega=""):
        (
            self.run,
            self.args,
            self.world,
            self.folder,
            self.seed,
            self.student,
            self.judge,
            self.omega,
        ) = run, args, world, folder, seed, student, judge, omega
        self.prompts, self.cost, self.mine = (
            world / "toy" / "train.jsonl",
            {"generated_tokens": 0, "teacher_tokens": 0, "trained_tokens": 0},
            set(),
        )

    def rollouts(self, number, at):
        """Answers of the student as it is to the problems of round `number`; folder `at`."""
        args = self.args
        self.cost["generated_tokens"] += self.run.stage(
            f"rollout.py --model {self.student} --prompts {self.prompts} --slice "
            f"{number * args.prompts}:{(number + 1) * args.prompts} --n {args.n} "
            f"--max-tokens {args.max_tokens} --seed {self.seed * 1000 + number} --out "
            f"{at}/rollouts.jsonl"
        )["generated_tokens"]
        return at / "rollouts.jsonl"

    def answers(self, number):
        """The teacher's texts to the problems of round `number`."""
        return self.world / "answers" / f"{number}.jsonl"

    def train(self, which, out, flags):
        """One call of train.py; the new weights are the student or the discriminator from then
        on."""
        args, source = self.args, getattr(self, which)
        done = self.run.stage(
            f"train.py {flags} --model {source} --out {out} --batch-size "
            f"{args.prompts // args.updates} --grad-clip {args.grad_clip} --seed "
            f"{self.seed}" + " --fresh-optimizer" * (source not in self.mine)
        )
        if which == "student":
            self.cost["trained_tokens"] += done["trained_tokens"]
        if source in self.mine:
            shutil.rmtree(source)  # the round before
        self.mine.add(out)
        setattr(self, which, out)

    def learn_to_judge(self, number, at, rate=None):
        args, rollouts = self.args, at / "rollouts.jsonl"
        rate = args.judge_learning_rate if rate is None else rate
        self.train(
            "judge",
            at / "judge",
            f"--method discriminator --rollouts {rollouts} --data {self.answers(number)} "
            f"--learning-rate {rate} {self.omega}",
        )

    def imitate(self, number, at):
        args = self.args
        self.train(
            "student",
            at / "student",
            f"--method seqkd --rollouts {self.answers(number)} --prompts {self.prompts} "
            f"--learning-rate {args.warm_learning_rate}",
        )


def warm_up(run, args, world, folder, seed, name, omega="", imitate=True):
    """FOLDER/name/student and FOLDER/name/judge after the warm-up."""
    out = folder / name
    if (out / "judge").exists():
        return
    shutil.rmtree(out, ignore_errors=True)
    place = Place(run, args, world, out, seed, folder / "student", folder / "student", omega)
    for number in range(args.warm_rounds):
        at = out / f"round{number}"
        place.rollouts(number, at)
        place.learn_to_judge(number, at)
        if imitate and number >= args.judge_rounds:
            place.imitate(number, at)
    if place.student in place.mine:
        place.student.rename(out / "student")
    place.judge.rename(out / "judge")


def run_arm(run, args, world, folder, seed, arm):
    """One arm of one seed; appends a result line at every evaluation.  Returns the last one."""
    a, place = ARMS[arm], folder / f"arm-{arm}"
    shutil.rmtree(place, ignore_errors=True)  # an interrupted arm is begun again
    place.mkdir(parents=True)
    student = {"before": folder / "student", "teacher": world / "teacher-lines"}.get(
        arm, folder / "student" if a.get("start") == "student" else folder / "warm" / "student"
    )
    # new: the student's weights and a head that knows nothing
    judge = student if a.get("judge") == "new" else folder / a.get("judge", "warm") / "judge"
    p = Place(
        run, args, world, place, seed, student, judge, f"--set {a['set']}" if "set" in a else ""
    )
    signal, row, started, paused = {}, None, time.time(), 0

    def measure(step, final):
        nonlocal row
        spent = round(time.time() - started, 2)

        def evaluate(prompts, n, more=""):
            done = run.stage(
                f"eval.py --model {p.student} --prompts {prompts}.jsonl --n {n} --max-tokens "
                f"{args.max_tokens} --seed {2 * 10**6 + seed} --out "
                f"{place}/eval.jsonl --overwrite {more}"
            )
            return done, [r["text"] for r in files.read(place / "eval.jsonl", "evals")]

        n = args.final_n if final else args.eval_n
        far, _ = evaluate(world / "ood" / args.eval_split, n)
        score, texts = evaluate(world / "toy" / args.eval_split, n)
        solutions = [
            len(problem["solution"])
            for problem in files.read(world / "toy" / f"{args.eval_split}.jsonl", "prompts")
        ]
        row = {
            "arm": arm,
            "seed": seed,
            "step": step,
            "final": final,
            "accuracy": score["accuracy"],
            "samples": n,
            "ood": far["accuracy"],
            "style": sum(map(in_style, texts)) / len(texts),
            "length_mean": score["length_mean"],
            "length_gap": abs(
                sum(map(len, texts)) / len(texts) - sum(solutions) / len(solutions)
            ),
            "truncated": score["truncated_fraction"],
            **signal,
            "paused": paused,
            **p.cost,
            "seconds": spent,
        }
        if final:
            row["greedy"] = evaluate(world / "toy" / args.eval_split, 1, "--temperature 0")[0][
                "accuracy"
            ]
        run.result(args, row)

    measure(0, "start" not in a)
    if "start" not in a:
        return row
    # it learns from the warmed-up student's answers to the problems of all rounds, and then no
    # more
    if a.get("frozen"):
        for number in range(args.rounds):
            at = place / f"judge{number}"
            p.rollouts(args.warm_rounds + number, at)
            p.learn_to_judge(args.warm_rounds + number, at)
    for number in files.progress(range(args.rounds), desc=f"seed {seed} {arm}", unit="round"):
        at, common, index = (
            place / f"round{number}",
            f"--prompts {world}/toy/train.jsonl",
            args.warm_rounds + number,
        )
        rollouts, judged = p.rollouts(index, at), None
        if a["reward"] is None:
            p.imitate(index, at)
        else:
            if a["reward"] == "judge":
                if a["judge"] == "new" and number == 0:
                    shutil.copytree(at, place / "untrained")
                    # a folder with the new head; at rate 0 nothing is learnt
                    p.learn_to_judge(index, place / "untrained", 0)
                graded = run.stage(
                    f"rubric.py grade --grader discriminator --discriminator {p.judge} "
                    f"{common} --rollouts {rollouts} --answers {p.answers(index)} "
                    f"--out {at}/rewards.jsonl "
                    + f"--shuffle --seed {seed}"
                    * a.get("shuffle", False)
                )
                signal = {
                    "proxy": graded["reward_mean"],
                    "margin": graded["margin"],
                    "judge_accuracy": graded["accuracy"],
                    "length_correlation": graded["length_correlation"],
                    "score_std": graded["score_std"],
                    "flat_groups": graded["zero_variance_groups"],
                }
                judged = graded["accuracy"] if a.get("pause") else None
                if not a.get("frozen") and (judged is None or judged <= args.pause_judge):
                    p.learn_to_judge(index, at)
                paused += (
                    judged is not None and not args.pause_student <= judged <= args.pause_judge
                )
            elif a["reward"] == "rubric":
                run.stage(
                    f"rubric.py create {common} --rollouts {rollouts} --answers "
                    f"{p.answers(index)} --m 1 --out {at}/rubrics.jsonl"
                )
                graded = run.stage(
                    f"rubric.py grade {common} --rollouts {rollouts} --rubrics "
                    f"{at}/rubrics.jsonl --out {at}/rewards.jsonl"
                )
            else:
                graded = run.stage(
                    f"rubric.py grade --grader answer {common} --rollouts {rollouts} --out "
                    f"{at}/rewards.jsonl"
                )
            if judged is None or judged >= args.pause_student:
                run.stage(
                    f"teacher.py score --model {student} --rollouts {rollouts} --out "
                    f"{at}/reference.jsonl"
                )
                p.train(
                    "student",
                    at / "student",
                    f"--method gad --rollouts {rollouts} --rewards {at}/rewards.jsonl "
                    f"--reference {at}/reference.jsonl --set "
                    f"reference_kl={args.reference_kl} "
                    f"--learning-rate {args.learning_rate}",
                )
        final = number + 1 == args.rounds
        if final or number == 0 or (number + 1) % args.eval_every == 0:
            measure((number + 1) * args.updates, final)
    return row


def prepare(run, args, world, seed):
    """This seed's folder: the student, and a warm-up for every kind of discriminator."""
    folder = spoil_student(run, args, world, seed)
    for name, omega, imitate in (
        ("warm", "", True),
        ("warm-ce", "--set omega=cross-entropy", True),
        ("warm-length", "--set view=length", True),
        ("cold", "", False),
    ):
        warm_up(run, args, world, folder, seed, name, omega, imitate)
    return folder


def main(argv=None):
    p = files.parser(__doc__)
    add_run_flags(p, "gad")
    p.add_argument("--rounds", type=int, default=20, help="rounds after the warm-up")
    p.add_argument("--warm-rounds", type=int, default=4, help="rounds of warm-up")
    p.add_argument(
        "--judge-rounds",
        type=int,
        default=2,
        help="of these, rounds in which the discriminator alone learns (paper: 10 steps)",
    )
    p.add_argument("--prompts", type=int, default=32, help="problems a round")
    p.add_argument("--n", type=int, default=8, help="answers a problem")
    p.add_argument(
        "--updates", type=int, default=4, help="optimiser steps a round, of each of the two"
    )
    p.add_argument(
        "--learning-rate", type=float, default=1e-4, help="of the student behind rewards"
    )
    p.add_argument("--warm-learning-rate", type=float, default=3e-4, help="of imitation")
    p.add_argument(
        "--judge-learning-rate", type=float, default=1e-3, help="of the discriminator"
    )
    p.add_argument(
        "--reference-kl",
        type=float,
        default=0.001,
        help="the leash to the student after its warm-up",
    )
    p.add_argument(
        "--grad-clip",
        type=float,
        default=0.2,
        help="largest gradient norm of both, as in the released scripts",
    )
    p.add_argument(
        "--pause-judge",
        type=float,
        default=0.95,
        help="gad-paused: the discriminator does not learn while it is right more often than "
        "this",
    )
    p.add_argument(
        "--pause-student",
        type=float,
        default=0.55,
        help="gad-paused: the student does not learn while the discriminator is right less "
        "often",
    )
    p.add_argument("--max-tokens", type=int, default=96, help="longest answer")
    p.add_argument(
        "--style-steps",
        type=int,
        default=300,
        help="steps of 64 texts of one style that the teacher is made with",
    )
    add_world_flags(p, teacher_steps=1300)
    add_eval_flags(p, every=5, n=2, final_n=8)
    if not (args := parse(p, argv, CLAIMS, SMOKE)):
        return None
    arms = settle(args, "gad", ARMS)
    if not 0 <= args.judge_rounds < args.warm_rounds:
        raise records.BadInput(
            f"--judge-rounds {args.judge_rounds}: expected fewer than --warm-rounds "
            f"{args.warm_rounds}, in the others the student learns, too"
        )
    run = begin(args, "a discriminator as the reward", arms, SHARED)
    world = build(run, args)
    run_arms(
        run,
        args,
        arms,
        lambda seed: prepare(run, args, world, seed),
        lambda *which: run_arm(run, args, world, *which),
        lambda row: (
            f"{args.eval_split} accuracy {row['accuracy']:.1%}, longer problems "
            f"{row['ood']:.1%}, teacher's style {row['style']:.0%}, "
            f"{row['length_mean']:.0f} tokens"
        ),
    )
    return report(run, args, CLAIMS, COLUMNS)


if __name__ == "__main__":
    files.run(main)
