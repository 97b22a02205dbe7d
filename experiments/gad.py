"""GAD (arXiv 2511.10643): distillation from a teacher that shows only texts, with a
discriminator that learns beside the student as the reward.

    python -m experiments.gad --seeds 5
    python -m experiments.gad --report results/gad.jsonl
    python -m experiments.gad_toy                       # the paper's ten-class toy, in a minute

World: a teacher that writes in one style of the four (`7+5=12 / 12-3=9 / #9`), one text a
problem, collected once; the student knows all four, and bad habits.  Warm-up: --warm-rounds
rounds in which the student imitates the teacher's texts and the discriminator, which begins as
the student with a new head, learns to score them above the student's answers of the moment; it
begins alone, for --judge-rounds rounds.  Then, in every round,

    rollout.py                                    32 problems, 8 answers each
    methods.gad grade                             its score as it stands is the reward; the
                                                  teacher's texts are scored beside it and earn
                                                  nothing
    methods.gad train                             the discriminator learns from these very
                                                  answers
    train.py --method gad                         the student follows the scores of before:
                                                  GRPO's advantage, clip, KL to the
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

Regime: not reached.  The paper starts where imitation has little left to give; here the
warmed-up student has 39 % and imitation goes on to 80 % (results/gad.md).
"""

import re
import shutil
from dataclasses import dataclass

from experiments import study
from experiments.claims import Claim, last, more
from experiments.study import part, setting
from opd import files, records


@dataclass(frozen=True)
class Settings(study.World, study.Measured):
    rounds: int = setting(20, "rounds after the warm-up", smoke=2)
    warm_rounds: int = setting(4, "rounds of warm-up", smoke=2)
    judge_rounds: int = setting(
        2,
        "of these, rounds in which the discriminator alone learns (paper: 10 steps)",
        smoke=1,
    )
    prompts: int = setting(32, "problems a round", smoke=2)
    n: int = setting(8, "answers a problem", smoke=2)
    updates: int = setting(4, "optimiser steps a round, of each of the two", smoke=1)
    learning_rate: float = setting(1e-4, "of the student behind rewards")
    warm_learning_rate: float = setting(3e-4, "of imitation")
    judge_learning_rate: float = setting(1e-3, "of the discriminator")
    reference_kl: float = setting(0.001, "weight of the KL to the student after its warm-up")
    grad_clip: float = setting(0.2, "largest gradient norm of both, as in the released scripts")
    pause_judge: float = setting(
        0.95,
        "gad-paused: the discriminator does not learn while it is right more often than this",
    )
    pause_student: float = setting(
        0.55,
        "gad-paused: the student does not learn while the discriminator is right less often",
    )
    style_steps: int = setting(
        300, "steps of 64 texts of one style that the teacher is made with", smoke=2
    )
    max_tokens: int = 96
    eval_every: int = setting(5, "rounds between evaluations", smoke=2)

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.judge_rounds < self.warm_rounds:
            raise records.BadInput(
                f"--judge-rounds {self.judge_rounds}: expected fewer than --warm-rounds "
                f"{self.warm_rounds}, in the others the student learns, too"
            )


@dataclass(frozen=True)
class Arm:
    signal: str | None = None  # what the student follows; None: the arm is only measured
    start: str = "warm"  # which student
    judge: str = "warm"  # which discriminator, one of WARM_UPS or new
    frozen: bool = False
    paused: bool = False
    shuffled: bool = False


ARMS = {
    "before": Arm(start="student"),
    "teacher": Arm(start="teacher"),
    "warm": Arm(),
    "seqkd": Arm("imitation"),
    "gad": Arm("judge"),
    "gad-ce": Arm("judge", judge="warm-ce"),
    "gad-paused": Arm("judge", paused=True),
    "no-judge-warm": Arm("judge", judge="new"),
    "no-student-warm": Arm("judge", start="student", judge="cold"),
    "frozen": Arm("judge", frozen=True),
    "length": Arm("judge", judge="warm-length"),
    "random": Arm("judge", shuffled=True),
    "rubric": Arm("rubric"),
    "answer": Arm("answer"),
}
WARM_UPS = {  # settings of the discriminator's row
    "warm": {},
    "warm-ce": {"loss": "cross-entropy"},
    "warm-length": {"view": "length"},
    "cold": {},  # without imitation
}
COLUMNS = (
    "ood style length_mean length_gap truncated proxy margin judge_accuracy "
    "length_correlation score_std flat_groups paused seconds"
).split()


def growth(arm, metric):
    """From the first round's line to the last."""
    return lambda arms: arms[arm][-1][metric] - arms[arm][1][metric]


CLAIMS = [
    more("1: GAD beats as many updates of imitation", "gad", "seqkd"),
    more("1: ...on longer problems than any trained on", "gad", "seqkd", metric="ood"),
    more("1: GAD improves on its start", "gad", "warm"),
    Claim(
        "2: a frozen discriminator's score rises",
        "proxy(frozen), last line − first",
        growth("frozen", "proxy"),
    ),
    more("2: ...while true quality falls", "frozen", "warm", "below"),
    Claim(
        "2: ...and answers grow",
        "length(frozen) − length(warm)",
        last("length_mean", "frozen", "warm"),
    ),
    more(
        "2: with a discriminator that learns on, quality does not fall",
        "gad",
        "warm",
        "above",
        -0.02,
    ),
    Claim(
        "2: ...nor does length run away from the teacher's (characters)",
        "length gap(gad) − length gap(frozen)",
        last("length_gap", "gad", "frozen"),
        "below",
    ),
    more("2: ...and it ends above the frozen one", "gad", "frozen"),
    more(
        "3: without warming the discriminator up there is nothing beyond imitation",
        "no-judge-warm",
        "seqkd",
        "below",
        0.03,
    ),
    more("3: ...it loses to GAD", "gad", "no-judge-warm"),
    more("3: ...and so does an unwarmed student", "gad", "no-student-warm"),
    more("3: Bradley-Terry is no worse than cross-entropy", "gad", "gad-ce", "above", -0.02),
    more("pause rules change nothing", "gad-paused", "gad", "within", 0.03),
    more("control: scores at random teach nothing", "random", "warm", "below", 0.02),
    more("control: length alone does not do it", "gad", "length"),
    more("control: ...it teaches nothing", "length", "warm", "below", 0.02),
    more(
        "bridge: GAD brings the student nearer to the teacher's style",
        "gad",
        "warm",
        metric="style",
    ),
    more("bridge: ...than a rubric does", "gad", "rubric", metric="style"),
    more("bridge: ...and moves correctness less", "gad", "rubric", "below"),
    more("bridge: a checker of answers is above both", "answer", "rubric"),
]


def in_style(text):
    """Whether every line but the last is one step, `12-3=9`, as the teacher writes them, and
    there is one.   in_style("7+5=12\\n#12") -> True"""
    *work, end = text.split("\n")
    steps = all(re.fullmatch(r"\d+[+-]\d=\d+", line) for line in work)
    return bool(work) and steps and end.startswith("#")


def build(run):
    """Problems, longer ones, the teacher in its one style, and its one text to every problem
    that is trained on."""
    s, world = run.settings, run.world
    rounds = s.warm_rounds + s.rounds
    study.build_sums(run, s.prompts * rounds)
    small = dict(train_prompts=8, mixed=8)
    far = dict(terms="7:8", eval_prompts=8 if run.smoke else 100, clean=8)
    run.once("worlds.sums", world / "ood", **far, **small)
    style = dict(styles="lines", eval_prompts=8, clean=64 * s.style_steps)
    run.once("worlds.sums", world / "lines", **style, **small)
    run.pretrain(
        world / "teacher",
        world / "lines" / "clean.jsonl",
        world / "teacher-lines",
        s.style_steps,
        rate=1e-3,
        fresh_optimizer=True,
        optimizer=study.RAMP,
    )
    for number in range(rounds):
        out, problems = world / "answers" / f"{number}.jsonl", part(number, s.prompts)
        run.answers("teacher-lines", out, 10**6, slice=problems, n=1)


class Pair(study.Trial):
    """A student and a discriminator that go on, round by round, each from where it is told."""

    def __init__(self, run, seed, arm, start, judge, view, place):
        super().__init__(run, seed, arm, start, place=place)
        self.first_judge = judge
        self.judge = judge
        self.view = view

    def answers(self, index):
        """The teacher's texts to the problems of round `index` of all, warm-up included."""
        return self.run.world / "answers" / f"{index}.jsonl"

    def learn_to_judge(self, index, at, rate=None):
        """The discriminator learns from AT/rollouts.jsonl and the teacher's texts."""
        s, out = self.settings, at / "judge"
        self.run.stage(
            "methods.gad train",
            model=self.judge,
            rollouts=at / "rollouts.jsonl",
            data=self.answers(index),
            batch_size=s.prompts // s.updates,
            learning_rate=s.judge_learning_rate if rate is None else rate,
            optimizer=dict(grad_clip=s.grad_clip),
            **self.view,
            seed=self.seed,
            fresh_optimizer=self.judge == self.first_judge,
            out=out,
        )
        if self.judge != self.first_judge:
            shutil.rmtree(self.judge)
        self.judge = out

    def imitate(self, index, at):
        s, prompts = self.settings, self.toy / "train.jsonl"
        options = dict(prompts=prompts, optimizer=dict(grad_clip=s.grad_clip))
        answers, out = self.answers(index), at / "student"
        self.train("seqkd", answers, out, s.warm_learning_rate, **options)


def warm_up(run, seed, name):
    """SEED/name/student and SEED/name/judge after the warm-up."""
    s, folder = run.settings, run.out / f"seed{seed}"
    if (folder / name / "judge").exists():
        return
    student = folder / "student"
    pair = Pair(run, seed, name, student, student, WARM_UPS[name], place=name)
    for number in range(s.warm_rounds):
        pair.rollout(number)
        pair.learn_to_judge(number, pair.at(number))
        if name != "cold" and number >= s.judge_rounds:
            pair.imitate(number, pair.at(number))
    if pair.model != student:
        pair.model.rename(pair.place / "student")
    pair.judge.rename(pair.place / "judge")


def prepare(run, seed):
    """A seed's student, and a warm-up for every kind of discriminator."""
    study.spoil_student(run, seed)
    for name in WARM_UPS:
        warm_up(run, seed, name)


class Trial(Pair):
    def __init__(self, run, seed, arm):
        self.how = how = ARMS[arm]
        folder = run.out / f"seed{seed}"
        start = {
            "teacher": run.world / "teacher-lines",
            "student": folder / "student",
            "warm": folder / "warm" / "student",
        }[how.start]
        # new: the student's weights and a head that knows nothing
        judge = start if how.judge == "new" else folder / how.judge / "judge"
        view = WARM_UPS.get(how.judge, {})
        super().__init__(run, seed, arm, start, judge, view, place=f"arm-{arm}")
        self.rounds = run.settings.rounds if how.signal else 0
        self.signal["paused"] = 0

    def sampling(self, number):
        return super().sampling(self.index(number))

    def index(self, number):
        """Of a round among all, warm-up included."""
        return self.settings.warm_rounds + number

    def round(self, number):
        if number == 0 and self.how.frozen:
            self.learn_ahead()
        at, rollouts = self.at(number), self.rollout(number)
        if self.how.signal == "imitation":
            self.imitate(self.index(number), at)
            return
        grade = {
            "judge": self.grade_by_judge,
            "rubric": self.grade_by_rubric,
            "answer": self.grade_by_answer,
        }[self.how.signal]
        if grade(number, rollouts):
            self.follow(rollouts)

    def learn_ahead(self):
        """The frozen discriminator learns from the warmed-up student's answers to the problems
        of all rounds, and then no more."""
        for number in range(self.rounds):
            at = self.place / f"judge{number}"
            self.rollout(number, at)
            self.learn_to_judge(self.index(number), at)

    def grade_by_judge(self, number, rollouts):
        """Rewards by the discriminator of the round before, which then learns from these very
        rollouts.  Returns whether the student learns from them, too."""
        s, index = self.settings, self.index(number)
        if self.judge == self.start:
            # a folder with the new head; at rate 0 nothing is learnt
            shutil.copytree(self.at(number), self.place / "untrained")
            self.learn_to_judge(index, self.place / "untrained", rate=0)
        out = rollouts.with_name("scored.jsonl" if self.how.shuffled else "rewards.jsonl")
        graded = self.run.stage(
            "methods.gad grade",
            discriminator=self.judge,
            rollouts=rollouts,
            answers=self.answers(index),
            out=out,
        )
        if self.how.shuffled:
            graded |= self.control("shuffle-rewards", out)[1]
        judged = graded["accuracy"]
        self.signal |= {
            "proxy": graded["reward_mean"],
            "margin": graded["margin"],
            "judge_accuracy": judged,
            "length_correlation": graded["length_correlation"],
            "score_std": graded["score_std"],
            "flat_groups": graded["zero_variance_groups"],
        }
        judge_pauses = self.how.paused and judged > s.pause_judge
        student_pauses = self.how.paused and judged < s.pause_student
        if not self.how.frozen and not judge_pauses:
            self.learn_to_judge(index, self.at(number))
        self.signal["paused"] += judge_pauses or student_pauses
        return not student_pauses

    def grade_by_rubric(self, number, rollouts):
        rubrics = rollouts.with_name("rubrics.jsonl")
        self.run.stage(
            "rubric.py create",
            prompts=self.toy / "train.jsonl",
            rollouts=rollouts,
            answers=self.answers(self.index(number)),
            m=1,
            out=rubrics,
        )
        return self.grade(rollouts, rubrics=rubrics)

    def grade_by_answer(self, number, rollouts):
        return self.grade(rollouts, grader="answer")

    def follow(self, rollouts):
        """The student follows a round's rewards."""
        s = self.settings
        reference, _ = self.score(self.start, rollouts, "reference")
        self.train(
            "gad",
            rollouts,
            rollouts.with_name("student"),
            s.learning_rate,
            rewards=rollouts.with_name("rewards.jsonl"),
            reference=reference,
            set=dict(reference_kl=s.reference_kl),
            optimizer=dict(grad_clip=s.grad_clip),
        )

    def due(self, done):
        return done == 1 or super().due(done)

    def columns(self, score, n, final):
        texts = [r["text"] for r in files.read(self.place / "eval.jsonl", "evals")]
        solutions = [p["solution"] for p in files.read(self.problems(), "prompts")]
        far = self.evaluate(self.run.world / "ood" / self.problems().name, n)
        columns = {
            "ood": far["accuracy"],
            "style": sum(map(in_style, texts)) / len(texts),
            "length_gap": abs(mean_length(texts) - mean_length(solutions)),
        }
        return columns | super().columns(score, n, final)


def mean_length(texts):
    return sum(map(len, texts)) / len(texts)


STUDY = study.Study(
    name="gad",
    about="a discriminator as the reward",
    settings=Settings,
    arms=ARMS,
    claims=CLAIMS,
    columns=COLUMNS,
    build=build,
    prepare=prepare,
    trial=Trial,
)


def main(argv=None):
    return study.conduct(STUDY, __doc__, argv)


if __name__ == "__main__":
    files.run(main)
