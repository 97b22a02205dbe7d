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
import shutil
from dataclasses import dataclass

import numpy as np

from experiments.claims import Claim, last, more
from experiments.study import RAMP, Measured, Study, Trial, conduct, setting
from opd import files, records


@dataclass(frozen=True)
class Settings(Measured):
    rounds: int = setting(24, "rounds an arm; on half of the labels, half of them", smoke=4)
    prompts: int = setting(32, "problems a round", smoke=2)
    n: int = setting(8, "answers a problem", smoke=2)
    updates: int = setting(4, "optimiser steps a round", smoke=2)
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
    spoil_steps: int = setting(100, "steps of 64 texts of mixed quality for both", smoke=1)
    spoil_lr: float = setting(1e-3, "learning rate of those steps")
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
ARMS = {
    "before": dict(model="student"),
    "teacher": dict(model="teacher"),
    "teacher-rl": dict(model="teacher", stage="grpo"),
    "teacher-half": dict(model="teacher", stage="grpo", part="first", share=0.5),
    "teacher-shuffled": dict(model="teacher", stage="grpo", shuffle=True),
    "grpo": dict(model="student", stage="grpo"),
    "grpo-long": dict(model="grpo", stage="grpo"),
    "raw-bridge": dict(model="student", teacher="teacher", stage=BRIDGE),
    "rl-bridge": dict(model="student", teacher="teacher-rl", stage=BRIDGE),
    "rl-even": dict(model="student", teacher="teacher-rl", stage=BRIDGE, warm=0.5),
    "rl-opd": dict(model="student", teacher="teacher-rl", stage=BRIDGE, warm=0),
    "rl-fkl": dict(model="student", teacher="teacher-rl", stage=BRIDGE, warm=1),
    "rl-sft": dict(model="student", teacher="teacher-rl", stage="seqkd"),
    "self-bridge": dict(model="student", teacher="grpo", stage=BRIDGE),
    "shuffled-bridge": dict(model="student", teacher="teacher-shuffled", stage=BRIDGE),
    "half-bridge": dict(
        model="student", teacher="teacher-half", stage=BRIDGE, part="first", share=0.5
    ),
    "half-new": dict(model="half-bridge", stage="grpo", part="second", share=0.5),
    "half-replay": dict(model="half-bridge", stage="grpo", part="first", share=0.5, again=True),
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
    more("P2: a teacher without rewards is not worth it", "raw-bridge", "grpo", "below"),
    more("P2: ...its own accuracy beside what GRPO reaches", "teacher", "grpo", "below"),
    more("P3: the bridge beats distillation without a warm-up", "rl-bridge", "rl-opd"),
    more("P3: ...which beats imitation of the teacher's samples", "rl-opd", "rl-sft"),
    more(
        "P3 control: the bridge beats its own warm-up alone (soft labels, no own answers)",
        "rl-bridge",
        "rl-fkl",
    ),
    more("P3 control: soft labels beat sampled tokens", "rl-fkl", "rl-sft"),
    more(
        "P3: how long the warm-up is makes no difference (a quarter, a half)",
        "rl-even",
        "rl-bridge",
        "within",
        0.03,
    ),
    more("P4: after the bridge, new labels help", "half-new", "half-bridge"),
    more(
        "P4: labels that are in the teacher already do not",
        "half-replay",
        "half-bridge",
        "within",
        0.03,
    ),
    more("P4: new ones help more than those", "half-new", "half-replay"),
    more(
        "P4: all labels upstream are as good as half of them downstream",
        "rl-bridge",
        "half-new",
        "within",
        0.03,
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
    more(
        "control: a teacher of shuffled rewards is no better than the teacher as it starts",
        "teacher-shuffled",
        "teacher",
        "below",
        0.03,
    ),
    more(
        "control: its student loses to the rewarded one's",
        "shuffled-bridge",
        "rl-bridge",
        "below",
    ),
    more(
        "watch: the bridge leaves less entropy than GRPO on the student",
        "rl-bridge",
        "grpo",
        "below",
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
    toy = run.world / "toy"
    if not toy.exists():
        run.stage(
            "worlds.sums",
            out=toy,
            terms=s.terms,
            right=s.right,
            train_prompts=s.labels,
            eval_prompts=s.eval_prompts,
            clean=64 * s.teacher_steps,
            mixed=128 * s.spoil_steps,
        )
    if not (run.world / "unlabelled.jsonl").exists():
        hide_answers(run, toy / "train.jsonl", run.world / "unlabelled.jsonl")
    schedule = dict(optimizer=RAMP, save_every=200)
    for name, steps in (("student", s.student_steps), ("teacher", s.teacher_steps)):
        clean = toy / "clean.jsonl"
        run.pretrain(toy / name, clean, run.world / name, steps, **schedule)


def hide_answers(run, prompts, out):
    """The problems that stage 2 reads: a teacher needs no labels."""
    run.commands.write(f"# {out}: {prompts} without `answer` and `solution`\n")
    rows = list(files.read(prompts, "prompts"))
    for row in rows:
        row.pop("answer")
        row.pop("solution")
    files.write_atomically(out, (json.dumps(row) + "\n" for row in rows))


def prepare(run, seed):
    """This seed's student and teacher: both after a little text of mixed quality."""
    s = run.settings
    start = run.out / f"seed{seed}" / "start"
    mixed = run.world / "toy" / "mixed.jsonl"
    options = dict(rate=s.spoil_lr, seed=seed, fresh_optimizer=True)
    for name in ("student", "teacher"):
        run.pretrain(run.world / name, mixed, start / name, s.spoil_steps, **options)
    if not (start / "dev.jsonl").exists() and not run.smoke:
        done = run.stage(
            "eval.py",
            model=start / "student",
            prompts=run.world / "toy" / "dev.jsonl",
            n=8,
            max_tokens=s.max_tokens,
            seed=3 * 10**6 + seed,
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
    def __init__(self, run, seed, arm):
        self.how = ARMS[arm]
        self.stage = self.how.get("stage")
        seed_folder = run.out / f"seed{seed}"

        def model_of(name):
            trained = seed_folder / name / "model"
            return trained if trained.exists() else seed_folder / "start" / name

        rounds = int(run.settings.rounds * self.how.get("share", 1)) if self.stage else 0
        super().__init__(run, seed, arm, start=model_of(self.how["model"]), rounds=rounds)
        self.teacher = model_of(self.how["teacher"]) if "teacher" in self.how else None
        warm = self.how.get("warm", run.settings.warm_share)
        self.warm_rounds = round(rounds * warm) if self.stage == BRIDGE else 0
        self.inherit()

    def inherit(self):
        """Tokens and labels that are in the teacher, or in the model this one goes on from."""
        # arm -> its own tokens: each stands behind this arm once, however often it is met
        self.upstream = {}
        self.ledger = self.place / "labels.jsonl"
        self.spent = 0
        ledgers = []
        for parent in PARENTS[self.arm]:
            self.upstream |= json.loads((self.folder / parent / "tokens.json").read_text())
            if (self.folder / parent / "labels.jsonl").exists():
                ledgers.append(self.folder / parent / "labels.jsonl")
        if ledgers:
            self.run.concatenate(ledgers, self.ledger)
            self.spent = len({line["question"] for line in files.read(self.ledger, "labels")})

    def execute(self):
        row = super().execute()
        own = {}
        if self.rounds:
            self.model.rename(self.place / "model")
            own[self.arm] = sum(self.cost.values())
        text = json.dumps(self.upstream | own) + "\n"
        files.write_atomically(self.place / "tokens.json", text)
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
                _, done = self.score(self.teacher, sampled, "fresh", overwrite=True)
                columns["kl"] = done["kl_mean"]
        return columns | super().columns(score, n, final)

    def round(self, number):
        if self.stage == "grpo":
            self.reward(number)
        elif self.stage == "seqkd":
            self.imitate(number, "seqkd")
        elif number < self.warm_rounds:
            self.imitate(number, "fkl")
        else:
            self.distil(number)
        done = number + 1
        if done < self.rounds and not self.due(done):
            # a reader finds the records of the rounds that were measured
            shutil.rmtree(self.at(number), ignore_errors=True)

    def sample(self, number, prompts):
        """Answers to this round's problems, of the arm's half of the labels if it has one."""
        size = self.settings.prompts
        half = self.settings.labels // 2
        low = half if self.how.get("part") == "second" else 0
        count = half if "part" in self.how else 2 * half
        at = low + number * size % count
        return self.rollout(number, prompts=prompts, slice=f"{at}:{at + size}")

    def update(self, number, method, rollouts, rate, fresh, **options):
        self.train(
            method,
            rollouts,
            self.place / f"model{number}",
            rate,
            seed=self.seed * 1000 + number,
            fresh_optimizer=fresh,
            **options,
        )

    def reward(self, number):
        """A round of GRPO: the only place where answers of problems are read."""
        s = self.settings
        rollouts = self.sample(number, self.toy / "train.jsonl")
        purpose = "teacher-rl" if self.how["model"] == "teacher" else "student-rl"
        labels = self.run.stage(
            "methods.sparse_to_dense spend",
            ledger=self.ledger,
            prompts=self.toy / "train.jsonl",
            rollouts=rollouts,
            purpose=purpose,
            again=self.how.get("again"),
        )
        self.spent = labels["labels_spent"]
        rewards, _ = self.grade_answers(rollouts, self.how.get("shuffle"))
        reference, _ = self.score(self.start, rollouts, "reference")
        self.update(
            number,
            "grpo",
            rollouts,
            s.rl_learning_rate,
            number == 0,
            rewards=rewards,
            reference=reference,
            set={"reference_kl": s.reference_kl},
        )

    def distil(self, number):
        """A round of on-policy distillation."""
        rollouts = self.sample(number, self.run.world / "unlabelled.jsonl")
        scores, _ = self.teach(rollouts, top_k=1000)
        rate = self.settings.bridge_learning_rate
        fresh = number == self.warm_rounds
        self.update(number, "opd-full", rollouts, rate, fresh, scores=scores)

    def imitate(self, number, method):
        """A round on the teacher's answers and, for soft labels, its distributions: made once,
        walked as often as the rounds need."""
        s = self.settings
        answers = self.place / "cache" / "answers.jsonl"
        if not answers.exists():
            self.fill_cache(answers, method)
        # as many answers an update as everywhere
        size = max(1, s.prompts * s.n // s.updates // s.cached_n)
        options = dict(batch_size=size, steps=s.updates)
        if method == "fkl":
            options["scores"] = answers.with_name("scores.jsonl")
        self.update(number, method, answers, s.bridge_learning_rate, number == 0, **options)

    def fill_cache(self, answers, method):
        s = self.settings
        done = self.run.stage(
            "teacher.py answer",
            model=self.teacher,
            prompts=self.run.world / "unlabelled.jsonl",
            slice=f"0:{s.labels // 2}" if self.how.get("part") == "first" else None,
            n=s.cached_n,
            max_tokens=s.max_tokens,
            seed=10**6 + self.seed,
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
    prepare,
    SparseTrial,
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
    files.run(main)
