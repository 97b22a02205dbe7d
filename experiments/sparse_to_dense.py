"""Sparse-to-dense (arXiv 2605.12483): spend labels on the teacher, then distil it, or reward
the student itself?

    python -m experiments.sparse_to_dense --seeds 5
    python -m experiments.sparse_to_dense --report results/sparse_to_dense.jsonl

Labelled problems are scarce.  A label pays one number for a whole answer (sparse); a teacher
gives one for every token (dense).  The paper's workflow:

    1   GRPO on the teacher       rollout.py, rubric.py grade --grader answer, train.py
                                  --method grpo
    2a  forward-KL warm-up        teacher.py answer and teacher.py score --top-k once, train.py
                                  --method fkl over the cached file
    2b  on-policy distillation    rollout.py, teacher.py score --top-k, train.py --method
                                  opd-full: exact reverse KL, the mean over tokens
    3   GRPO on the student       as 1, on labels that were not spent before

Bridge = 2a for --warm-share of the rounds, then 2b.  A round is 32 problems, 8 answers each, 4
updates, in every stage and arm.  What the teacher cost stands beside an arm as
`upstream_tokens`.  Stage 2 reads problems from a file without answers.  Every arm has a ledger
(methods/sparse_to_dense.py) that goes on from its teacher's: a label that is in the teacher
cannot be spent on the student unnoticed; `half-replay` has to say --again.

    before, teacher    as they start
    teacher-rl         stage 1 on all labels
    teacher-half       stage 1 on the first half
    teacher-shuffled   stage 1 with rewards in random order within each group
    grpo               labels spent on the student
    grpo-long          twice as long, on the same labels: the teacher's compute, spent here
    raw-bridge         the teacher as it starts, distilled
    rl-bridge          the paper's route
    rl-even, rl-opd, rl-fkl   half of it warm-up; no warm-up; nothing else
    rl-sft             only the sampled tokens of teacher-rl
    self-bridge        a teacher of the student's size: `grpo`, distilled into the student as
                       it was before
    shuffled-bridge    from teacher-shuffled: the negative control
    half-bridge        from teacher-half, half as many rounds
    half-new, half-replay   then GRPO on the other half, or on the same again

World: problems of --terms terms.  Student and teacher learn right work first (so many steps
that one is weak and the other is not), then, in every seed anew, text of which half is right
work and the rest guesses, slips and skipped steps.

Regime: rewards are sparse (reached): a student that does not start at 5 to 15 % is refused;
this one starts at 0.131.  Not reached: a student without support for right answers (its
pass@16 is 0.780), and a teacher that rewards make stronger in kind (+0.474 sampled, +0.098
greedy).

The learning rates were chosen on dev (results/sparse_to_dense_dev_*.jsonl, seeds 0 and 1).
GRPO on the student reaches 20 % at 3e-5, 22 % at 1e-4, 17 % at 3e-4 and 5 % at 1e-3, on the
teacher 74, 85, 86 and 18 %.  From the teacher of 1e-4 (seed 0) the bridge reaches 30 % at 1e-4
and 3e-4, 25 % at 1e-3.  So GRPO trains at 1e-4 and everything with a teacher at 3e-4.
"""

import json
from dataclasses import dataclass

import numpy as np

from experiments.claims import Claim, alike, last, less, more
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
from opd import cli, disk, files, records


@dataclass(frozen=True)
class Settings(Measured, Sampled, Spoiled):
    rounds: int = setting(24, "rounds an arm; on half of the labels, half of them", smoke=4)
    prompts: int = setting(32, "problems a round", smoke=2)
    labels: int = setting(512, "problems with an answer", smoke=8)
    warm_share: float = setting(0.25, "share of a bridge's rounds that are its warm-up")
    cached_n: int = setting(4, "cached answers of the teacher, a problem", smoke=1)
    rl_learning_rate: float = setting(1e-4, "of GRPO")
    bridge_learning_rate: float = setting(3e-4, "of everything that has a teacher")
    reference_kl: float = setting(5e-4, "GRPO's KL to the policy it starts from")
    max_tokens: int = setting(80, "longest answer", smoke=8)
    terms: str = setting("3:7", "fewest and most terms of a problem")
    right: float = setting(0.5, "share of right work in the text of mixed quality")
    student_steps: int = setting(400, "steps of 64 right texts, at first", smoke=2)
    teacher_steps: int = setting(1200, "the same for the teacher", smoke=3)
    eval_prompts: int = setting(256, "problems in each of dev and heldout", smoke=8)
    eval_every: int = setting(6, "rounds between evaluations", smoke=2)
    final_n: int = setting(16, "samples a problem at the end of an arm", smoke=2)

    def __post_init__(self):
        super().__post_init__()
        if self.labels % (2 * self.prompts):
            raise records.BadInput(
                f"--labels {self.labels}: expected a multiple of twice --prompts "
                f"{self.prompts}: a round must not reach into the other half"
            )


BRIDGE = "bridge"


# model: what is trained; teacher: the arm that teaches; part: which labels or problems; share:
# of --rounds
def bridge(teacher, **options):
    return dict(model="student", teacher=teacher, stage=BRIDGE, **options)


def grpo(model, **options):
    return dict(model=model, stage="grpo", **options)


ARMS = {
    "before": dict(model="student"),
    "teacher": dict(model="teacher"),
    "teacher-rl": grpo("teacher"),
    "teacher-half": grpo("teacher", part="first", share=0.5),
    "teacher-shuffled": grpo("teacher", shuffle=True),
    "grpo": grpo("student"),
    "grpo-long": grpo("grpo"),
    "raw-bridge": bridge("teacher"),
    "rl-bridge": bridge("teacher-rl"),
    "rl-even": bridge("teacher-rl", warm=0.5),
    "rl-opd": bridge("teacher-rl", warm=0),
    "rl-fkl": bridge("teacher-rl", warm=1),
    "rl-sft": dict(model="student", teacher="teacher-rl", stage="seqkd"),
    "self-bridge": bridge("grpo"),
    "shuffled-bridge": bridge("teacher-shuffled"),
    "half-bridge": bridge("teacher-half", part="first", share=0.5),
    "half-new": grpo("half-bridge", part="second", share=0.5),
    "half-replay": grpo("half-bridge", part="first", share=0.5, again=True),
}
PARENTS = {
    arm: tuple(how[k] for k in ("model", "teacher") if how.get(k) in ARMS and how[k] != arm)
    for arm, how in ARMS.items()
}
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
    more(
        "P1: a label spent on the teacher brings the student more than one spent on the "
        "student",
        "rl-bridge",
        "grpo",
    ),
    more(
        "P1: ...also when GRPO may go on for as many tokens as the teacher's took",
        "rl-bridge",
        "grpo-long",
    ),
    less("P2: a teacher without rewards is not worth it", "raw-bridge", "grpo"),
    less("P2: ...its own accuracy beside what GRPO reaches", "teacher", "grpo"),
    more("P3: the bridge beats distillation without a warm-up", "rl-bridge", "rl-opd"),
    more("P3: ...which beats imitation of the teacher's samples", "rl-opd", "rl-sft"),
    more(
        "P3 control: the bridge beats its own warm-up alone (soft labels, no own answers)",
        "rl-bridge",
        "rl-fkl",
    ),
    more("P3 control: soft labels beat sampled tokens", "rl-fkl", "rl-sft"),
    alike(
        "P3: how long the warm-up is makes no difference (a quarter, a half)",
        "rl-even",
        "rl-bridge",
    ),
    more("P4: after the bridge, new labels help", "half-new", "half-bridge"),
    alike("P4: labels that are in the teacher already do not", "half-replay", "half-bridge"),
    more("P4: new ones help more than those", "half-new", "half-replay"),
    alike(
        "P4: all labels upstream are as good as half of them downstream",
        "rl-bridge",
        "half-new",
    ),
    more("P5: a teacher of the student's own size is worth it", "self-bridge", "grpo"),
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
    less(
        "control: a teacher of shuffled rewards is no better than the teacher as it starts",
        "teacher-shuffled",
        "teacher",
        0.03,
    ),
    less("control: its student loses to the rewarded one's", "shuffled-bridge", "rl-bridge"),
    less(
        "watch: the bridge leaves less entropy than GRPO on the student",
        "rl-bridge",
        "grpo",
        metric="entropy",
    ),
    more("stage 1 works: rewards teach the teacher", "teacher-rl", "teacher"),
]

# ---- the world

# the student's pass@1 (at 0 nothing is sampled that could be rewarded; above, rewards are not
# sparse)
START = (0.05, 0.15)


def check_start(accuracy, split, seed):
    """Refuses a student whose pass@1 leaves nothing to compare."""
    if not START[0] <= accuracy <= START[1]:
        raise records.BadInput(
            f"seed {seed}: the student starts at {accuracy:.1%} pass@1 on {split}: expected "
            f"{START[0]:.0%} to {START[1]:.0%}: below, no group has an answer to reward, "
            f"above, rewards are not sparse: the claim cannot be tested; change "
            f"--student-steps, --right or --terms"
        )


def build(run):
    """Problems, corpora, the problems without their answers, and both models after right
    work."""
    s = run.settings
    build_world(
        run,
        "worlds.sums",
        [("student", "student", s.student_steps), ("teacher", "teacher", s.teacher_steps)],
        terms=s.terms,
        right=s.right,
        train_prompts=s.labels,
        eval_prompts=s.eval_prompts,
        clean=64 * s.teacher_steps,
        mixed=128 * s.spoil_steps,
    )
    # what stage 2 reads: a teacher needs no labels
    problems = files.read(run.world / "toy/train.jsonl", "prompts")
    made_of = "toy/train.jsonl without `answer` and `solution`"
    run.write("world/unlabelled.jsonl", made_of, map(without_answer, problems))


def without_answer(prompt):
    return {k: v for k, v in prompt.items() if k not in ("answer", "solution")}


def prepare(run, seed):
    """This seed's student and teacher: both after a little text of mixed quality."""
    start = run.out / f"seed{seed}/start"
    for name in ("student", "teacher"):
        run.spoil(seed, name, name=f"start/{name}")
    if not (start / "dev.jsonl").exists() and not run.smoke:
        done = run.stage(
            "eval.py",
            model=start / "student",
            prompts=run.world / "toy/dev.jsonl",
            n=8,
            max_tokens=run.settings.max_tokens,
            seed=10**6 + seed,
            out=start / "dev.jsonl",
        )
        check_start(done["accuracy"], "dev", seed)


# ---- an arm


def groups(path, size=8):
    """Shares of the problems whose first `size` graded answers are {all alike, all wrong, all
    right}."""
    by_problem = {}
    for line in files.read(path, "evals"):
        if line["sample"] < size:
            by_problem.setdefault(line["id"], []).append(bool(line["correct"]))
    wrong = float(np.mean([not any(group) for group in by_problem.values()]))
    right = float(np.mean([all(group) for group in by_problem.values()]))
    return {"flat_groups": wrong + right, "all_wrong": wrong, "all_right": right}


class SparseTrial(Trial):
    keeps_rounds = False
    weights = "model{}"

    def setup(self):
        how, s = self.how, self.settings
        self.stage = how.get("stage")
        self.rounds = int(s.rounds * how.get("share", 1)) if self.stage else 0
        self.start = self.model_of(how["model"])
        self.teacher = self.model_of(how["teacher"]) if "teacher" in how else None
        warm = round(self.rounds * how.get("warm", s.warm_share))
        self.warm_rounds = warm if self.stage == BRIDGE else 0
        self.unlabelled = self.run.world / "unlabelled.jsonl"

    def model_of(self, name):
        trained = self.folder / name / "model"
        return trained if trained.exists() else self.folder / "start" / name

    def clear(self):
        super().clear()
        self.inherit()

    def inherit(self):
        """Tokens and labels that are in the teacher, or in the model this one goes on from."""
        # arm -> its own tokens: each stands behind this arm once, however often it is met
        self.upstream = {}
        self.ledger = self.place / "labels.jsonl"
        self.spent = 0
        parents = [self.folder / parent for parent in PARENTS[self.arm]]
        for parent in parents:
            self.upstream |= json.loads((parent / "tokens.json").read_text())
        ledgers = [parent / "labels.jsonl" for parent in parents]
        if ledgers := [ledger for ledger in ledgers if ledger.exists()]:
            self.place.mkdir()
            self.run.concatenate(ledgers, self.ledger)
            self.spent = len({line["question"] for line in files.read(self.ledger, "labels")})

    def execute(self):
        row = super().execute()
        own = {}
        if self.rounds:
            self.model.rename(self.place / "model")
            own[self.arm] = sum(self.cost.values())
        text = json.dumps(self.upstream | own) + "\n"
        disk.write_atomically(self.place / "tokens.json", text)
        return row

    def columns(self, score, n, final):
        own = sum(self.cost.values())
        upstream = sum(self.upstream.values())
        sampled = self.place / "eval.rollouts.jsonl"
        logprobs = [x for r in files.read(sampled, "rollouts") for x in r["logprobs"]]
        columns = {
            "own_tokens": own,
            "upstream_tokens": upstream,
            "total_tokens": own + upstream,
            "labels": self.spent,
            "entropy": -float(np.mean(logprobs)),  # of a token, from the policy's own samples
        }
        if final:
            columns[f"pass@{n}"] = score[f"pass@{n}"]
            columns |= groups(self.place / "eval.jsonl")
            if self.teacher:
                columns["kl"] = self.gap_to_teacher()
        return columns | super().columns(score, n, final)

    def round(self):
        if self.stage == "grpo":
            self.reward()
        elif self.stage == "seqkd":
            self.imitate("seqkd")
        elif self.number < self.warm_rounds:
            self.imitate("fkl")
        else:
            self.distil()

    def sample(self, prompts):
        """Answers to this round's problems, of the arm's half of the labels if it has one."""
        size = self.settings.prompts
        half = self.settings.labels // 2
        low = half if self.how.get("part") == "second" else 0
        count = half if "part" in self.how else 2 * half
        at = low + self.number * size % count
        return self.rollout(prompts=prompts, slice=f"{at}:{at + size}")

    def update(self, method, rollouts, rate, begins=0, **options):
        """One call of train.py; begins: the round in which its optimiser begins anew."""
        fresh, seed = self.number == begins, self.seed * 1000 + self.number
        self.train(method, rollouts, rate, seed=seed, fresh_optimizer=fresh, **options)

    def reward(self):
        """A round of GRPO: the only place where answers of problems are read."""
        s, how = self.settings, self.how
        rollouts = self.sample(self.prompts)
        labels = self.run.stage(
            "methods.sparse_to_dense spend",
            ledger=self.ledger,
            prompts=self.prompts,
            rollouts=rollouts,
            purpose="teacher-rl" if how["model"] == "teacher" else "student-rl",
            again=how.get("again"),
        )
        self.spent = labels["labels_spent"]
        rewards, _ = self.grade_answers(rollouts, how.get("shuffle"))
        reference, _ = self.score(self.start, rollouts, "reference")
        given = dict(rewards=rewards, reference=reference, set={"reference_kl": s.reference_kl})
        self.update("grpo", rollouts, s.rl_learning_rate, **given)

    def distil(self):
        """A round of on-policy distillation."""
        rollouts = self.sample(self.unlabelled)
        scores, _ = self.teach(rollouts, top_k=1000)
        rate = self.settings.bridge_learning_rate
        self.update("opd-full", rollouts, rate, self.warm_rounds, scores=scores)

    def imitate(self, method):
        """A round on the teacher's answers and, for soft labels, its distributions: made once,
        walked as often as the rounds need."""
        s = self.settings
        answers = self.place / "cache/answers.jsonl"
        if not answers.exists():
            self.fill_cache(answers, method)
        # as many answers an update as everywhere
        size = max(1, s.prompts * s.n // s.updates // s.cached_n)
        options = dict(batch_size=size, steps=s.updates)
        if method == "fkl":
            options["scores"] = answers.with_name("scores.jsonl")
        self.update(method, answers, s.bridge_learning_rate, **options)

    def fill_cache(self, answers, method):
        s = self.settings
        done = self.run.stage(
            "teacher.py answer",
            model=self.teacher,
            prompts=self.unlabelled,
            slice=f"0:{s.labels // 2}" if self.how.get("part") == "first" else None,
            n=s.cached_n,
            max_tokens=s.max_tokens,
            seed=self.seed,
            out=answers,
        )
        self.cost["generated_tokens"] += done["generated_tokens"]
        if method == "fkl":
            self.teach(answers, top_k=1000)


STUDY = Study(
    "sparse_to_dense",
    "sparse to dense on running sums",
    Settings,
    ARMS,
    CLAIMS,
    COLUMNS,
    build,
    SparseTrial,
    prepare,
    parents=PARENTS,
    pictures=(
        ("step", "accuracy.png"),
        ("labels", "labels.png"),
        ("total_tokens", "tokens.png"),
    ),
    resampled=True,
)


def main(argv=None):
    return conduct(STUDY, __doc__, argv)


if __name__ == "__main__":
    cli.run(main)
