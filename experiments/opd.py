"""On-policy distillation from log-probs: what dense supervision on one's own answers buys, and
what decides how much.

    python -m experiments.opd --seeds 5
    python -m experiments.opd --report results/opd.jsonl

One round of an on-policy arm is `rollout.py` (32 problems, 8 answers each) and `train.py
--teacher` (4 updates), which reads the teacher's whole distribution from memory; an off-policy
arm trains on as many of the teacher's answers in as many updates.  The world is that of the
main job (experiments/ropd.py) with a teacher that was trained longer.  Experiments, by the
numbers of the sources (Thinking Machines, "On-Policy Distillation" 2025; GKD arXiv 2306.13649):

    M1  dense beats sparse: a student is trained by reinforcement (the right final answer) as
        far as it goes; then its *initial* weights are distilled from that result: `rl`,
        `rl-opd`; control `rl-self`: the student is its own teacher
    M2  own answers against given ones, as many of either: `opd` (one log-prob a token),
        `opd-full` (the distribution), `sft` (the teacher's answers, as many), `sft5` (five
        times as many, and five times the updates)
    M3  the share of own answers, all with the forward KL: `lambda0`, `lambda25`, `lambda50`,
        `dagger` (all own)
    M4  the divergence, all on own answers: `dagger` (forward), `jsd10`, `jsd50`, `jsd90`,
        `opd-full` (reverse)
    M6  new knowledge that costs an old skill: the teacher learns facts by heart (`facts`), and
        is then distilled from its old self on sums it solves by itself (`facts-opd`), or
        imitates its old self's answers (`facts-sft`)

M5 (a teacher outside of the student's support) is in experiments/unified.py, M7 (estimators) in
tests/test_loss.py.  The learning rates were chosen on dev (results/opd_dev_lr*.jsonl, two
seeds); the held-out problems serve for measuring only.  Accuracy on the way is measured with 4
samples a problem, at the end of an arm with 16.

Regime (results/opd.md): the student starts at 13 % sampled and 38 % greedy, the teacher is at
99 %; docs/opd.md lists the claims whose regime was not reached.
"""

from dataclasses import dataclass, field

from experiments import study
from experiments.claims import Claim, alike, last, more
from experiments.study import setting
from opd import cli


@dataclass(frozen=True)
class Settings(study.World, study.Measured, study.Sampled):
    rounds: int = setting(20, "rounds of a distillation arm", smoke=1)
    rl_rounds: int = setting(40, "rounds of the reinforcement arm", smoke=1)
    rl_learning_rate: float = setting(3e-4, "of reinforcement")
    opd_learning_rate: float = setting(3e-4, "of arms that read a teacher's log-probs")
    sft_learning_rate: float = setting(3e-4, "of imitation")
    facts_learning_rate: float = setting(1e-3, "of learning facts by heart")
    facts_epochs: int = setting(100, "passes over the facts", smoke=1)
    teacher_steps: int = 2000
    eval_every: int = 4
    eval_n: int = 4
    final_n: int = 16


@dataclass(frozen=True)
class Arm:
    method: str | None = None  # row of train.py; None: the arm is only measured
    source: str = "own"  # whose answers: own, answers (the teacher's), facts
    teacher: str | None = "world"  # which model's log-probs are read
    start: str = "student"
    set: dict = field(default_factory=dict)
    rate: str = "opd"  # which learning rate
    rounds: int | None = None  # where it is not --rounds
    eval_every: int | None = None  # where it is not --eval-every
    data: bool = False  # the teacher's answers beside the own ones


def imitation(method="seqkd", rounds=1, teacher=None, rate="sft", start="student"):
    """Training on the teacher's answers to all problems, sampled anew in every round."""
    return Arm(method, "answers", teacher, start, rate=rate, rounds=rounds, eval_every=1)


def jsd(interpolation):
    return Arm("opd-full", set=dict(divergence="jsd", interpolation=interpolation))


def gkd(student_fraction):
    return Arm("gkd", set=dict(divergence="fkl", student_fraction=student_fraction), data=True)


ARMS = {
    "before": Arm(),
    "sft": imitation(),
    "sft5": imitation(rounds=5),
    "opd": Arm("opd"),
    "opd-full": Arm("opd-full"),
    "lambda0": imitation("fkl", teacher="world", rate="opd"),
    "lambda25": gkd(0.25),
    "lambda50": gkd(0.5),
    "dagger": Arm("dagger"),
    "jsd10": jsd(0.1),
    "jsd50": jsd(0.5),
    "jsd90": jsd(0.9),
    "rl": Arm("ppo-clip", teacher=None, rate="rl", eval_every=2),
    "rl-opd": Arm("opd-full", teacher="rl", eval_every=1),
    "rl-self": Arm("opd-full", teacher="student"),
    "facts": Arm("sft", "facts", None, "world", rate="facts", rounds=1),
    "facts-opd": Arm("opd-full", start="facts"),
    "facts-sft": imitation(start="facts"),
    "teacher": Arm(start="world"),
}
COLUMNS = (
    "greedy pass@n facts entropy length_mean trained_tokens generated_tokens "
    "teacher_tokens seconds"
).split()


def steps_to(arms, arm, share):
    """Updates until accuracy first reaches `share` of what reinforcement ends with, both arms
    looked at every 8; infinite if never."""
    level = share * arms["rl"][-1]["accuracy"]
    for row in arms[arm]:
        if row["step"] % 8 == 0 and row["accuracy"] >= level:
            return row["step"]
    return float("inf")


def speed_up(arms):
    fast, slow = steps_to(arms, "rl-opd", 0.95), steps_to(arms, "rl", 0.95)
    return min(1.0, fast / max(1, slow))


def recovered(arms):
    lost = last("accuracy", "teacher", "facts")(arms)
    return last("accuracy", "facts-opd", "facts")(arms) / max(1e-9, lost)


CLAIMS = [
    Claim(
        "M1: distillation from the result of reinforcement reaches 95 % of it in a fifth of "
        "its updates",
        "steps(rl-opd) / steps(rl)",
        speed_up,
        "below",
        0.2,
    ),
    alike("M1 control: a student that is its own teacher gains nothing", "rl-self", "before"),
    more("M2: own answers beat as many given ones", "opd-full", "sft"),
    more("M2: ...and five times as many", "opd-full", "sft5"),
    more("M2: also with one teacher number a token", "opd", "sft"),
    more("M2: the distribution is worth more than one number a token", "opd-full", "opd"),
    more("M3: a quarter of own answers beats none", "lambda25", "lambda0"),
    more("M3: a half beats a quarter", "lambda50", "lambda25"),
    more("M3: all beat a half", "dagger", "lambda50"),
    alike(
        "M4: forward and reverse KL decode alike greedily",
        "opd-full",
        "dagger",
        metric="greedy",
    ),
    more("M4: reverse KL samples better answers", "opd-full", "dagger"),
    Claim(
        "M4: forward KL keeps more of pass@16",
        "pass@16(dagger) − pass@16(opd-full)",
        last("pass@n", "dagger", "opd-full"),
    ),
    more("M4: forward KL keeps more entropy", "dagger", "opd-full", metric="entropy"),
    alike("M4: JSD(0.1) is like forward KL", "jsd10", "dagger"),
    alike("M4: JSD(0.9) is like reverse KL", "jsd90", "opd-full"),
    more("M6: learning facts costs the old skill", "teacher", "facts", 0.1),
    Claim(
        "M6: the old self brings nine tenths of it back",
        "(facts-opd − facts) / (teacher − facts)",
        recovered,
        "above",
        0.9,
    ),
    more("M6: ...and the facts stay", "facts-opd", "facts", -0.1, "facts"),
    more(
        "M6: imitation of the old self's answers forgets more of the facts",
        "facts-opd",
        "facts-sft",
        metric="facts",
    ),
]


class Trial(study.Trial):
    weights = "model{}"

    def setup(self):
        s, how = self.settings, self.how
        self.models = {
            "world": self.teacher,
            "student": self.folder / "student",
            "facts": self.folder / "facts/model",
            "rl": self.folder / "rl/model",
        }
        self.start = self.models[how.start]
        if not how.method:
            self.rounds = 0
        elif how.rate == "rl":
            self.rounds = s.rl_rounds
        else:
            self.rounds = how.rounds or s.rounds
        self.signal["entropy"] = None

    def round(self):
        how = self.how
        if how.source == "facts":
            rollouts = self.data / "facts.jsonl"
            options = dict(epochs=self.settings.facts_epochs, batch_size=None)
        elif how.source == "answers":
            rollouts, tokens = self.given(self.number)
            self.cost["teacher_tokens"] += tokens
            options = {}
        else:
            rollouts = self.rollout()
            options = self.signal_for(rollouts)
        if how.teacher:
            options["teacher"] = self.models[how.teacher]
        rate = getattr(self.settings, f"{how.rate}_learning_rate")
        self.train(how.method, rollouts, rate, set=how.set, **options)
        self.signal["entropy"] = self.metrics[-1]["policy/entropy"]
        if self.number + 1 == self.rounds:
            # before the line that says this arm is done: others start from it
            self.model = self.model.rename(self.place / "model")

    def given(self, number):
        """The teacher's answers to the problems of all rounds, sampled once a seed: (file,
        tokens)."""
        s, out = self.settings, f"seed{self.seed}/answers/{number}.jsonl"
        seed = 1000 * self.seed + number
        how = dict(slice=f":{s.prompts * s.rounds}", n=s.n)
        tokens = self.run.answers("world/teacher", out, seed, **how)
        return self.run.out / out, tokens

    def signal_for(self, rollouts):
        """Options of train.py: what own answers are trained on besides a teacher."""
        if self.how.rate == "rl":
            rewards, _ = self.grade(rollouts, grader="answer")
            return dict(rewards=rewards)
        if self.how.set.get("divergence") == "jsd":
            return dict(teacher_top_k=24)
        if not self.how.data:
            return {}
        data, self.cost["teacher_tokens"] = self.given(0)
        return dict(data=data)

    def due(self, done):
        return done % (self.how.eval_every or self.settings.eval_every) == 0

    def step(self, done):
        return self.steps

    def columns(self, score, n, final):
        columns = super().columns(score, n, final)
        columns["pass@n"] = score[f"pass@{n}"]
        if final:
            facts = self.evaluate(self.data / "facts_prompts.jsonl", 4)
            columns["facts"] = facts["accuracy"]
        return columns


def build(run):
    s = run.settings
    study.build_sums(run, s.prompts * max(s.rounds, s.rl_rounds))


STUDY = study.Study(
    "opd",
    "on-policy distillation on running sums",
    Settings,
    ARMS,
    CLAIMS,
    COLUMNS,
    build,
    Trial,
    parents={"rl-opd": ("rl",), "facts-opd": ("facts",), "facts-sft": ("facts",)},
)


def main(argv=None):
    return study.conduct(STUDY, __doc__, argv)


if __name__ == "__main__":
    cli.run(main)
