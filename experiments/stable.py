"""Stable-OPD (arXiv 2604.08527): does on-policy distillation run into loops, and do golden
answers and a leash keep it out of them?

    python -m experiments.stable --seeds 5
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

Regime (results/stable.md): the collapse is there at ten times the rate alone: 73 % of hot-opd's
answers are loops at its end, 5 % of opd's and 2.5 % of the teacher's.
"""

import shutil
from dataclasses import dataclass

from experiments import study
from experiments.claims import Claim, alike, last, less, more
from experiments.study import setting
from opd import cli, files, records


@dataclass(frozen=True)
class Settings(study.World, study.Measured):
    rounds: int = setting(60, "rounds of an arm, each one optimiser step", smoke=2)
    eos_rounds: int = setting(
        20,
        "the same for arms with two end tokens, whose answers may all run to the longest; at "
        "most --rounds",
        smoke=2,
    )
    hot_rounds: int = setting(
        30, "the same for arms at --hot-learning-rate, for the same reason", smoke=2
    )
    prompts: int = setting(16, "problems a round, each with its golden answer", smoke=2)
    n: int = setting(4, "answers a problem", smoke=2)
    learning_rate: float = setting(3e-4, "of arms that answer by themselves")
    sft_learning_rate: float = setting(3e-4, "of imitation of the golden answers")
    hot_learning_rate: float = setting(3e-3, "of the arms hot-...")
    gold_weight: float = setting(0.1, "weight of the golden answers' loss")
    leash: float = setting(0.01, "weight of the KL to the student as it starts")
    max_tokens: int = setting(320, "longest answer; a golden one has at most 60", smoke=8)
    clean_steps: int = setting(
        600, "pre-training steps of 64 right texts, with which the base begins", smoke=2
    )
    base_steps: int = setting(
        500, "more steps on text with loops: the base model the students come from", smoke=1
    )
    teacher_steps: int = setting(900, "more steps on the same: the teacher", smoke=2)
    loop_share: float = setting(0.03, "loops among those texts")
    eos_steps: int = setting(
        1500, "pre-training steps of the teacher with the other end token", smoke=3
    )
    spoil_steps: int = setting(100, "steps of 64 careless texts for a student", smoke=1)
    student_loops: float = setting(0.03, "loops among the careless texts")
    planted_loops: float = setting(0.35, "the same for the student that loops already")
    eval_every: int = 15

    def __post_init__(self):
        for flag, rounds in (("eos", self.eos_rounds), ("hot", self.hot_rounds)):
            if not 1 <= rounds <= self.rounds:
                raise records.BadInput(
                    f"--{flag}-rounds {rounds}: expected 1 to --rounds {self.rounds}, for all "
                    f"take the same problems"
                )


@dataclass(frozen=True)
class Arm:
    source: str | None = "own"  # whose answers: own, gold; None: the arm is only measured
    start: str = "student"  # a folder of the seed, or teacher, or best (of opd)
    leash: bool = False  # the paper's two additions
    gold: bool = False
    hot: bool = False  # --hot-learning-rate
    baseline: bool = False
    eos: bool = False  # the teacher has another end token
    same_end: bool = False  # both end tokens counted as one


ARMS = {
    "before": Arm(None),
    "opd": Arm(),
    "kl": Arm(leash=True),
    "gold": Arm(gold=True),
    "stable": Arm(leash=True, gold=True),
    "sft": Arm("gold"),
    "opd-best": Arm(None, "best"),
    "baseline": Arm(baseline=True),
    "planted-opd": Arm(start="planted"),
    "planted-stable": Arm(start="planted", leash=True, gold=True),
    "eos-opd": Arm(start="eos", eos=True),
    "eos-kl": Arm(start="eos", eos=True, leash=True),
    "eos-class": Arm(start="eos", eos=True, same_end=True),
    "hot-opd": Arm(hot=True),
    "hot-kl": Arm(hot=True, leash=True),
    "hot-gold": Arm(hot=True, gold=True),
    "hot-stable": Arm(hot=True, leash=True, gold=True),
    "hot-sft": Arm("gold", hot=True),
    "teacher": Arm(None, "teacher"),
}
COLUMNS = (
    "dev_accuracy greedy peak repetition worst_repetition truncated length_mean alarms "
    "advantage_repetitive advantage_other student_end_mass teacher_end_mass gold_tokens "
    "seconds"
).split()


def more_than_half(arm, whole, base):
    """What an arm gains beyond half of another one's gain."""
    gain, whole_gain = last("accuracy", arm, base), last("accuracy", whole, base)
    return lambda arms: gain(arms) - whole_gain(arms) / 2


def repetitive_advantage(arms):
    first = arms["planted-opd"][1]
    return first["advantage_repetitive"] - first["advantage_other"]


def against_smaller_rate(arms):
    """KeyError, that is not measured, if opd was not looked at then."""
    end = arms["hot-stable"][-1]
    return end["accuracy"] - {row["step"]: row["accuracy"] for row in arms["opd"]}[end["step"]]


def inflation(arms):
    return arms["eos-opd"][-1]["truncated"] - arms["eos-opd"][0]["truncated"]


CLAIMS = [
    more("1: plain distillation learns to loop", "opd", "before", 0.05, "repetition"),
    more("1: ...more than its teacher does", "opd", "teacher", 0.05, "repetition"),
    more("1: ...runs into the longest answer", "opd", "before", 0.05, "truncated"),
    less(
        "1: ...and ends below its own best checkpoint, which dev chose",
        "opd",
        "opd-best",
        -0.05,
    ),
    less(
        "2: with golden answers and a leash it does not loop",
        "stable",
        bound=0.05,
        metric="repetition",
    ),
    more("2: ...and ends above plain distillation", "stable", "opd"),
    Claim(
        "3: golden answers alone bring more than half of that",
        "(gold − opd) − (stable − opd) / 2",
        more_than_half("gold", "stable", "opd"),
    ),
    more("3: the leash alone brings some", "kl", "opd"),
    more("4: it is more than imitation of the golden answers", "stable", "sft"),
    more("4: ...and more than stopping in time", "stable", "opd-best"),
    alike(
        "4: the mean of the advantage is a symptom: without it the end is the same",
        "baseline",
        "opd",
        0.05,
    ),
    alike("4: ...and so are the loops", "baseline", "opd", 0.05, "repetition"),
    Claim(
        "4: loops look better to the teacher than other answers (first rounds of planted-opd)",
        "advantage(repetitive) − advantage(other)",
        repetitive_advantage,
    ),
    more(
        "hot: at ten times the rate plain distillation does learn to loop",
        "hot-opd",
        bound=0.3,
        metric="repetition",
    ),
    Claim(
        "hot: ...and its skill goes with it",
        "final(hot-opd) − peak(hot-opd)",
        last("final_minus_peak", "hot-opd"),
        "below",
        -0.05,
    ),
    less(
        "hot: golden answers and a leash keep it out of loops",
        "hot-stable",
        bound=0.05,
        metric="repetition",
    ),
    more("hot: ...and it ends above plain distillation", "hot-stable", "hot-opd"),
    Claim(
        "hot: golden answers alone bring more than half of that",
        "(hot-gold − hot-opd) − (hot-stable − hot-opd) / 2",
        more_than_half("hot-gold", "hot-stable", "hot-opd"),
    ),
    more("hot: the leash alone brings some", "hot-kl", "hot-opd"),
    more("hot: it is more than imitation of the golden answers", "hot-stable", "hot-sft"),
    Claim(
        "hot: ...and more than a smaller rate (as many rounds each; 2 samples a problem "
        "against 8)",
        "hot-stable − opd at that round",
        against_smaller_rate,
    ),
    Claim(
        "5: another end token inflates answers",
        "truncated(eos-opd) − before it",
        inflation,
        "above",
        0.1,
    ),
    less(
        "5: counting both ends as one removes that", "eos-class", "eos-opd", -0.1, "truncated"
    ),
    more("5: the leash does not", "eos-kl", "eos-opd", -0.1, "truncated"),
    more(
        "plant: a student that loops already is not healed by plain distillation",
        "planted-opd",
        bound=0.05,
        metric="repetition",
    ),
    less("plant: it is with both additions", "planted-stable", bound=0.05, metric="repetition"),
]


def build(run):
    """The corpora, the golden answers, and the models that all seeds share."""
    s = run.settings
    texts, problems = 256 * s.spoil_steps, s.prompts * s.rounds
    run.once(
        "worlds.sums",
        "world/toy",
        train_prompts=problems,
        clean=64 * s.clean_steps,
        mixed=8,
        loops=max(texts, 64 * s.teacher_steps),
        loop_share=s.loop_share,
        planted_share=s.planted_loops,
    )
    small = dict(train_prompts=8, eval_prompts=8, clean=8, mixed=8)
    loops = dict(loops=texts, planted_share=s.student_loops)
    run.once("worlds.sums", "world/careless", **small, **loops)
    other_end = dict(train_prompts=problems, clean=64 * s.eos_steps, mixed=texts)
    run.once("worlds.sums", "world/eos", **other_end, second_end=True)
    write_gold(run)
    total = s.clean_steps + s.base_steps + s.teacher_steps
    models = (  # name, what it goes on from, texts, steps, length of the schedule
        ("skill", "toy/student", "toy/clean", s.clean_steps, total),
        ("base", "skill", "toy/looping", s.base_steps, total),
        ("teacher", "base", "toy/looping", s.teacher_steps, total),
        ("eos-base", "eos/student", "eos/clean", s.clean_steps, s.eos_steps),
        ("eos-teacher", "eos/teacher", "eos/clean", s.eos_steps, s.eos_steps),
    )
    for seed, (name, start, corpus, steps, total) in enumerate(models):
        paths = (f"world/{start}", f"world/{corpus}", f"world/{name}")
        decay = study.RAMP | dict(total_steps=total)
        run.pretrain(*paths, steps, seed=seed, optimizer=decay)


def write_gold(run):
    """gold/N.jsonl: the golden answers to the problems between two evaluations, from round N
    on, for the arm that has nothing else."""
    s = run.settings
    prompts = list(files.read(run.world / "toy/train.jsonl", "prompts"))
    size = s.eval_every * s.prompts
    for start in range(0, s.rounds, s.eval_every):
        first = start * s.prompts
        made_of = f"as answers, `solution`s of toy/train.jsonl, {size} from {first} on"
        answers = map(golden_answer, prompts[first : first + size])
        run.write(f"world/gold/{start}.jsonl", made_of, answers)


def golden_answer(prompt):
    return {
        "id": prompt["id"],
        "sample": 0,
        "policy": {"model": "solution"},
        "messages": prompt["messages"],
        "text": prompt["solution"],
        "finish_reason": "stop",
    }


def prepare(run, seed):
    """A seed's three students: a base after careless text of some kind."""
    run.spoil(seed, "base", "careless/planted")
    run.spoil(seed, "base", "toy/planted", "planted")
    run.spoil(seed, "eos-base", "eos/mixed", "eos")


class Trial(study.Trial):
    keeps_rounds = False
    weights = "model{}"

    def setup(self):
        s, how, world = self.settings, self.how, self.run.world
        self.gold = how.source == "gold"
        # all rounds of it; with golden answers alone, train.py is called between evaluations
        self.length = s.hot_rounds if how.hot else s.rounds
        if how.eos:
            self.length = s.eos_rounds
            self.data = world / "eos"
            self.teacher = world / "eos-teacher"
        self.rounds = -(-self.length // s.eval_every) if self.gold else self.length
        if not how.source:
            self.rounds = 0
        if how.start == "best":
            self.start = next((self.folder / "opd").glob("best-*"))
        elif how.start != "teacher":
            self.start = self.folder / how.start
        self.cost |= {"gold_tokens": 0, "alarms": 0, "worst_repetition": 0.0}
        self.peak = 0.0
        self.best_dev = -1.0
        self.history = []  # metrics of the steps since the last line

    def generation(self):
        # one long answer holds a whole batch up: few and large ones
        return super().generation() | {"batch_tokens": 65536}

    def round(self):
        s, how = self.settings, self.how
        if self.gold:
            first = self.number * s.eval_every
            texts = self.run.world / f"gold/{first}.jsonl"
            self.learn("sft", texts, s.sft_learning_rate, self.place / f"model{first}")
            self.cost["gold_tokens"] = self.cost["trained_tokens"]
            return
        rollouts = self.rollout()
        same = "<|eot|>=<|end|>" if how.same_end else None
        top_k = 1000 if how.baseline else None
        scores, _ = self.teach(rollouts, top_k=top_k, same_token=same)
        options = self.additions(rollouts)
        self.learn("stable-opd", rollouts, s.learning_rate, scores=scores, **options)
        metrics = self.history[-1]
        self.cost["alarms"] += int(metrics["alarm/collapse"])
        # of any round: loops can come and go between evaluations
        worst = max(self.cost["worst_repetition"], metrics["rollout/repetition"])
        self.cost["worst_repetition"] = worst

    def additions(self, rollouts):
        """Options of train.py for the KL to the start and the golden answers."""
        s, how = self.settings, self.how
        options = {"set": {"gold_weight": 0, "reference_kl": 0}}
        if how.baseline:
            options["set"]["baseline"] = "kl"
        if how.leash:
            options["reference"], _ = self.score(self.start, rollouts, "reference", top_k=1000)
            options["set"] |= {"reference_kl": s.leash, "reference_support": "full"}
        if how.gold:
            options["data"] = self.prompts
            options["set"]["gold_weight"] = s.gold_weight
            prompts = list(files.read(self.prompts, "prompts"))
            for prompt in prompts[self.number * s.prompts :][: s.prompts]:
                # a token a character, and the end
                self.cost["gold_tokens"] += len(prompt["solution"]) + 1
        return options

    def learn(self, method, rollouts, rate, out=None, **options):
        """One call of train.py, and what its steps told."""
        s = self.settings
        rate = s.hot_learning_rate if self.how.hot else rate
        self.train(method, rollouts, rate, out, batch_size=s.prompts, **options)
        self.history += self.metrics

    def due(self, done):
        return self.gold or super().due(done)

    def step(self, done):
        if self.how.start == "best":
            return int(self.start.name.removeprefix("best-"))
        if self.gold:
            done *= self.settings.eval_every
        return min(done, self.length)

    def evaluate(self, prompts, n, **options):
        return super().evaluate(prompts, n, out=self.place / prompts.name, **options)

    def columns(self, score, n, final):
        dev = self.evaluate(self.data / "dev.jsonl", self.settings.eval_n)["accuracy"]
        if dev > self.best_dev and self.rounds:
            self.best_dev = dev
            self.keep_best()
        self.peak = max(self.peak, score["accuracy"])
        columns = {
            "dev_accuracy": dev,
            "peak": self.peak,
            "final_minus_peak": score["accuracy"] - self.peak,
            "repetition": score["repetition_rate"],
        }
        columns |= super().columns(score, n, final) | self.means()
        del columns["samples"]
        self.history.clear()
        return columns

    def keep_best(self):
        """best-STEP: the weights that were best on dev."""
        for worse in self.place.glob("best-*"):
            shutil.rmtree(worse)
        shutil.copytree(self.model, self.place / f"best-{self.steps}")

    def means(self):
        """Columns over the steps since the last line: means, and where the end tokens stand
        last."""
        columns = {}
        for name, metric, sign in (
            ("train_repetition", "rollout/repetition", 1),
            ("train_truncated", "rollout/truncated", 1),
            ("advantage_repetitive", "kl/teacher_repetitive", -1),
            ("advantage_other", "kl/teacher_other", -1),
        ):
            if values := [metrics[metric] for metrics in self.history if metric in metrics]:
                columns[name] = sign * sum(values) / len(values)
        for name in ("student_end_mass", "teacher_end_mass"):
            if self.history and f"rollout/{name}" in self.history[-1]:
                columns[name] = self.history[-1][f"rollout/{name}"]
        return columns


STUDY = study.Study(
    "stable",
    "loops in on-policy distillation",
    Settings,
    ARMS,
    CLAIMS,
    COLUMNS,
    build,
    Trial,
    prepare,
    parents={"opd-best": ("opd",)},
)


def main(argv=None):
    return study.conduct(STUDY, __doc__, argv)


if __name__ == "__main__":
    cli.run(main)
