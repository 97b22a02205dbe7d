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
from experiments.claims import Claim, alike, last, less, more
from experiments.study import part, setting
from opd import cli, files, records


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
JUDGED = {  # a result line's column: its name in the summary of `methods.gad grade`
    "proxy": "reward_mean",
    "margin": "margin",
    "judge_accuracy": "accuracy",
    "length_correlation": "length_correlation",
    "score_std": "score_std",
    "flat_groups": "zero_variance_groups",
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
    less("2: ...while true quality falls", "frozen", "warm"),
    Claim(
        "2: ...and answers grow",
        "length(frozen) − length(warm)",
        last("length_mean", "frozen", "warm"),
    ),
    more("2: with a discriminator that learns on, quality does not fall", "gad", "warm", -0.02),
    Claim(
        "2: ...nor does length run away from the teacher's (characters)",
        "length gap(gad) − length gap(frozen)",
        last("length_gap", "gad", "frozen"),
        "below",
    ),
    more("2: ...and it ends above the frozen one", "gad", "frozen"),
    less(
        "3: without warming the discriminator up there is nothing beyond imitation",
        "no-judge-warm",
        "seqkd",
        0.03,
    ),
    more("3: ...it loses to GAD", "gad", "no-judge-warm"),
    more("3: ...and so does an unwarmed student", "gad", "no-student-warm"),
    more("3: Bradley-Terry is no worse than cross-entropy", "gad", "gad-ce", -0.02),
    alike("pause rules change nothing", "gad-paused", "gad"),
    less("control: scores at random teach nothing", "random", "warm", 0.02),
    more("control: length alone does not do it", "gad", "length"),
    less("control: ...it teaches nothing", "length", "warm", 0.02),
    more(
        "bridge: GAD brings the student nearer to the teacher's style",
        "gad",
        "warm",
        metric="style",
    ),
    more("bridge: ...than a rubric does", "gad", "rubric", metric="style"),
    less("bridge: ...and moves correctness less", "gad", "rubric"),
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
    s = run.settings
    rounds = s.warm_rounds + s.rounds
    study.build_sums(run, s.prompts * rounds)
    far = dict(terms="7:8", eval_prompts=8 if run.smoke else 100, clean=8)
    run.once("worlds.sums", "world/ood", **far, train_prompts=8, mixed=8)
    study.teach_style(run, "lines", "lines", "teacher-lines")
    for number in range(rounds):
        out, problems = f"world/answers/{number}.jsonl", part(number, s.prompts)
        run.answers("world/teacher-lines", out, 0, slice=problems, n=1)


class Pair(study.Trial):
    """A student and a discriminator that go on, round by round, each from where it is told."""

    weights = "round{}/student"
    first = 0  # of its rounds among all, warm-up included

    def sampling(self, number):
        return super().sampling(self.first + number)

    def answers(self, number):
        """The teacher's texts to the problems of a round."""
        return self.run.world / f"answers/{self.first + number}.jsonl"

    def learn_to_judge(self, number, at, rate=None):
        """The discriminator learns from AT/rollouts.jsonl and the teacher's texts."""
        s, out = self.settings, at / "judge"
        self.run.stage(
            "methods.gad train",
            model=self.judge,
            rollouts=at / "rollouts.jsonl",
            data=self.answers(number),
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

    def imitate(self):
        s = self.settings
        options = dict(prompts=self.prompts, optimizer=dict(grad_clip=s.grad_clip))
        self.train("seqkd", self.answers(self.number), s.warm_learning_rate, **options)


class WarmUp(Pair):
    """What SEED/NAME/student and SEED/NAME/judge come from."""

    def setup(self):
        self.judge = self.first_judge = self.start
        self.view = self.how

    def round(self):
        self.rollout()
        self.learn_to_judge(self.number, self.at)
        if self.arm != "cold" and self.number >= self.settings.judge_rounds:
            self.imitate()


def warm_up(run, seed, name):
    if (run.out / f"seed{seed}/{name}/judge").exists():
        return
    pair = WarmUp(run, seed, name, WARM_UPS[name])
    for number in range(run.settings.warm_rounds):
        pair.number = number
        pair.round()
    if pair.model != pair.start:
        pair.model.rename(pair.place / "student")
    pair.judge.rename(pair.place / "judge")


def prepare(run, seed):
    """A seed's student, and a warm-up for every kind of discriminator."""
    run.spoil(seed)
    for name in WARM_UPS:
        warm_up(run, seed, name)


class Trial(Pair):
    def setup(self):
        how = self.how
        self.place = self.folder / f"arm-{self.arm}"
        self.start = {
            "teacher": self.run.world / "teacher-lines",
            "student": self.folder / "student",
            "warm": self.folder / "warm/student",
        }[how.start]
        # new: the student's weights and a head that knows nothing
        self.judge = self.start if how.judge == "new" else self.folder / how.judge / "judge"
        self.first_judge = self.judge
        self.view = WARM_UPS.get(how.judge, {})
        self.first = self.settings.warm_rounds
        if not how.signal:
            self.rounds = 0
        self.signal["paused"] = 0

    def round(self):
        if self.number == 0 and self.how.frozen:
            self.learn_ahead()
        rollouts = self.rollout()
        if self.how.signal == "imitation":
            self.imitate()
        elif self.reward(rollouts):
            self.follow(rollouts)

    def learn_ahead(self):
        """The frozen discriminator learns from the warmed-up student's answers to the problems
        of all rounds, and then no more."""
        for number in range(self.rounds):
            at = self.place / f"judge{number}"
            self.rollout(at, **self.sampling(number))
            self.learn_to_judge(number, at)

    def reward(self, rollouts):
        """Rewards by the arm's grader.  Returns whether the student learns from them."""
        if self.how.signal == "judge":
            return self.grade_by_judge(rollouts)
        if self.how.signal == "answer":
            return self.grade(rollouts, grader="answer")
        library = {"predicates": "worlds.predicates"}
        given = dict(prompts=self.prompts, answers=self.answers(self.number), m=1)
        rubrics, _ = self.beside(rollouts, "rubrics", "rubric.py create", **library, **given)
        return self.grade(rollouts, rubrics=rubrics, **library)

    def grade_by_judge(self, rollouts):
        """Rewards by the discriminator of the round before, which then learns from these very
        rollouts."""
        s, how = self.settings, self.how
        if self.judge == self.start:
            # a folder with the new head; at rate 0 nothing is learnt
            shutil.copytree(self.at, self.place / "untrained")
            self.learn_to_judge(self.number, self.place / "untrained", rate=0)
        given = dict(discriminator=self.judge, answers=self.answers(self.number))
        name = "scored" if how.shuffled else "rewards"
        scored, graded = self.beside(rollouts, name, "methods.gad grade", **given)
        if how.shuffled:
            graded |= self.control("shuffle-rewards", scored)[1]
        for column, name in JUDGED.items():
            self.signal[column] = graded[name]
        judge_pauses = how.paused and graded["accuracy"] > s.pause_judge
        student_pauses = how.paused and graded["accuracy"] < s.pause_student
        if not how.frozen and not judge_pauses:
            self.learn_to_judge(self.number, self.at)
        self.signal["paused"] += judge_pauses or student_pauses
        return not student_pauses

    def follow(self, rollouts):
        """The student follows a round's rewards."""
        s = self.settings
        reference, _ = self.score(self.start, rollouts, "reference")
        self.train(
            "gad",
            rollouts,
            rewards=rollouts.with_name("rewards.jsonl"),
            reference=reference,
            set=dict(reference_kl=s.reference_kl),
            optimizer=dict(grad_clip=s.grad_clip),
        )

    def due(self, done):
        return done == 1 or super().due(done)

    def columns(self, score, n, final):
        texts = self.texts()
        solutions = [p["solution"] for p in files.read(self.heldout, "prompts")]
        far = self.evaluate(self.run.world / "ood" / self.heldout.name, n)
        columns = {
            "ood": far["accuracy"],
            "style": sum(map(in_style, texts)) / len(texts),
            "length_gap": abs(mean_length(texts) - mean_length(solutions)),
        }
        return columns | super().columns(score, n, final)


def mean_length(texts):
    return sum(map(len, texts)) / len(texts)


STUDY = study.Study(
    "gad",
    "a discriminator as the reward",
    Settings,
    ARMS,
    CLAIMS,
    COLUMNS,
    build,
    Trial,
    prepare,
)


def main(argv=None):
    return study.conduct(STUDY, __doc__, argv)


if __name__ == "__main__":
    cli.run(main)
