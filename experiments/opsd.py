"""OPSD (arXiv 2601.18734): a model as its own teacher, which is told the solution.  Not one of
the nine systems; it needs no stage of its own.

    python -m experiments.opsd --seeds 5
    python -m experiments.opsd --report results/opsd.jsonl

World: running sums.  Half of the texts that the base has read answer a question with its
solution behind it, so it can copy; then the student reads careless text.  A round is 32
problems, 8 answers each, in 4 updates:

    rollout.py                                    answers to the bare questions
    teacher.py score --prompts told_train.jsonl   the student as it began, after the question
                                                  with its solution
    train.py --method opd                         reverse KL to that, one number a token

    before, told        the student as it starts; the same student, told the solutions of the
                        held-out problems
    opsd                the method
    full                the exact reverse KL, from all log-probs
    live                the teacher is the student of this moment, not the one it began as
    base, base-blank    the teacher is the base, which has not read careless text: told the
                        solution, and not told
    wrong, blank        controls: the solution of another problem; no solution at all
    grpo, rwsft         the same labels as rewards of as many answers; own answers imitated, a
                        right one with 150 times the weight of a wrong one
    sft                 the solutions imitated, each as often as it is answered elsewhere

`told_accuracy` is the accuracy when told.

Regime (not reached): the paper needs a model that reasons from a solution.  The told student is
right in 0.581 of samples, but writes 10.2 tokens; worked answers have 26.8 (`sft`).

The learning rates were chosen on dev, one seed (`--arms opsd,grpo,rwsft,sft --eval-split dev
--final-n 4`, results/opsd_dev_lr*.jsonl): grpo is best at 3e-4, opsd (which lifts nothing at
any of three rates) and rwsft at 1e-4 and 3e-4 alike, sft at 1e-3.
"""

from dataclasses import dataclass

from experiments.claims import Claim, last, less, more
from experiments.study import (
    Measured,
    Sampled,
    Spoiled,
    Study,
    Trial,
    build_world,
    conduct,
    setting,
)
from opd import cli


@dataclass(frozen=True)
class Settings(Measured, Sampled, Spoiled):
    rounds: int = setting(20, "rounds of an arm", smoke=2)
    learning_rate: float = setting(3e-4, "of all arms but sft")
    sft_learning_rate: float = setting(1e-3, "of imitation of solutions")
    hints: float = setting(0.5, "share of the base's texts with the solution in the question")
    base_steps: int = setting(1300, "pre-training steps of 64 texts", smoke=4)
    eval_every: int = setting(5, "rounds between evaluations", smoke=2)


# prompts: what the teacher reads (default: the question with its solution)
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
    "rwsft": dict(method="rwsft", set={"prefix": "self", "omega_scale": 0.2}),
    "sft": dict(method="sft"),
}
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
    more("the student is right more often when it is told", "told", "before"),
    more("it can teach itself (the paper's claim)", "opsd", "before"),
    more("...by what the solution adds: without one nothing is taught", "opsd", "blank"),
    more("...by the right one: another problem's teaches less", "opsd", "wrong"),
    less("...and it does harm", "wrong", "before"),
    more("the base, told, teaches more than the student, told", "base", "opsd"),
    more("...and more than the base that is not told", "base", "base-blank"),
    more("a solution teaches more as a hint than as a reward", "opsd", "grpo"),
    more("...than own right answers, imitated", "opsd", "rwsft"),
    more("...than the solutions, imitated", "opsd", "sft"),
    more("the whole distribution teaches more than one number a token", "full", "opsd"),
    more("a teacher that learns along teaches more", "live", "opsd"),
    less("...it takes the student with it", "live", "before"),
    less(
        "the student comes to use a solution less well, too",
        "opsd",
        "before",
        metric="told_accuracy",
    ),
    less("it does not pass what it does when told", "opsd", "told"),
    Claim(
        "answers grow shorter",
        "length(opsd) − length(before)",
        last("length_mean", "opsd", "before"),
        "below",
    ),
]


def build(run):
    """Problems with their solutions, and the base that every seed's student is made from."""
    s = run.settings
    build_world(
        run,
        "worlds.sums",
        [("student", "base", s.base_steps)],
        train_prompts=s.prompts * s.rounds,
        hints=s.hints,
        clean=64 * s.base_steps,
        mixed=256 * s.spoil_steps,
    )


class OpsdTrial(Trial):
    def setup(self):
        self.method = self.how.get("method")
        self.rounds = {None: 0, "sft": 1}.get(self.method, self.rounds)
        # the problems that an arm is measured on, with their solutions
        self.told = self.heldout.with_name(f"told_{self.heldout.name}")

    def step(self, done):
        return self.steps

    @property
    def problems(self):
        return self.told if self.arm == "told" else self.heldout

    def columns(self, score, n, final):
        columns = super().columns(score, n, final)
        if final:
            columns["told_accuracy"] = self.evaluate(self.told, 1)["accuracy"]
        return columns

    def round(self):
        if self.method == "sft":
            return self.imitate_solutions()
        rollouts = self.rollout()
        options = {"set": self.how.get("set")}
        if self.method.startswith("opd"):
            options["scores"] = self.ask_teacher(rollouts)
        else:
            options["rewards"], _ = self.grade(rollouts, grader="answer")
        self.train(self.method, rollouts, **options)

    def ask_teacher(self, rollouts):
        teacher = self.run.world / "base" if "teacher" in self.how else self.start
        self.teacher = self.model if self.how.get("live") else teacher
        prompts = self.data / f"{self.how.get('prompts', 'told_train')}.jsonl"
        top_k = 1000 if self.method == "opd-full" else None
        scores, done = self.teach(rollouts, prompts=prompts, top_k=top_k)
        self.signal["kl"] = done["kl_mean"]
        return scores

    def imitate_solutions(self):
        """As many walks over the solutions as the others have answers to a problem, in
        as many steps."""
        s, out = self.settings, self.place / "model"
        how = dict(batch_size=s.prompts // s.updates * s.n, epochs=s.n)
        self.train("sft", self.prompts, s.sft_learning_rate, out, **how)


STUDY = Study(
    "opsd",
    "a teacher that is the student, told the solution",
    Settings,
    ARMS,
    CLAIMS,
    COLUMNS,
    build,
    OpsdTrial,
)


def main(argv=None):
    return conduct(STUDY, __doc__, argv)


if __name__ == "__main__":
    cli.run(main)
