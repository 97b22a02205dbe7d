"""The unified view (arXiv 2604.07941), measured: does the source of the answers decide what
training does to a policy?

    python -m experiments.unified --seeds 5
    python -m experiments.unified --report results/unified.jsonl

The paper sorts all of post-training by provenance (whose answers), interface (tokens, rewards,
a teacher) and role: training *expands* the set of things a policy writes, *reshapes* how it
divides its mass among them, or consolidates.  It reports no experiment.  Here every class of
method trains the same student with as many updates on as many answers (more where it says so),
in a world (worlds/forks.py) so small that `methods.unified` lists every answer with its
probability: expansion, attrition and moved mass are exact numbers.

The student writes route aa (mostly wrong) and cc (a habit, at random).  Route bb is outside of
its support, although as right as aa.  The teacher writes aa and bb, and recovers from any
prefix.

    before              the student as it starts
    sft-both, sft-a     imitation of right demonstrations of aa and bb, and of aa only
    sft-b-long          imitation of bb only, four times as long: a narrow corpus
    seqkd, fkl          imitation of the teacher's answers; of its whole distribution on them
    rft, dpo, grpo      own answers of this round and a verifier: accepted ones imitated, best
                        against worst, policy gradient
    opd, dagger, gkd    own answers and the teacher: reverse KL, forward KL, half of each source
    fkl-opd             half of the updates fkl, then opd
    fkl-long-opd        all of the updates fkl, then as many again opd (added after a look at
                        fkl-opd)
    grpo-shuffled       control: rewards in random order within each group
    opd-self            control: the student is its own teacher

Every effective support is measured at eps 1e-2, 1e-3 and 1e-4; claims use 1e-4, which the
student's whole corpus passes and a pair outside of it does not.  At 1e-3 most of the student's
pairs are below the bar, and mere reweighting of them would count as expansion.  A pair's mass
is at most 1 / (8 problems x 5 tokens) = 0.025.  So small a world has no held-out part.

Regime: reached for support: the student writes route b in 0 of 2048 samples.  Not reached for
pass@k: its pass@256 is 1.00 at the start.

The learning rate is 5e-4: at 1e-3, the first that was tried (one seed), the control
`grpo-shuffled` drifted to an expansion mass of 0.29.  The student is pre-trained on right aa
answers first and then on its own corpus: otherwise it learns the routes long before the digits.
"""

from dataclasses import dataclass
from typing import NamedTuple

from experiments.claims import Claim, alike, last, more
from experiments.study import RAMP, Rounds, Study, Trial, conduct, part, setting
from opd import cli, files, records


@dataclass(frozen=True)
class Settings(Rounds):
    rounds: int = setting(30, "rounds an arm", smoke=2)
    prompts: int = setting(32, "prompts a round, the 8 problems in turn", smoke=16)
    n: int = setting(8, "answers per prompt")
    updates: int = setting(4, "optimiser steps a round", smoke=1)
    learning_rate: float = setting(5e-4, "of every arm")
    max_tokens: int = setting(5, "longest answer, end token included")
    teacher_steps: int = setting(500, "steps of 64 texts that make the teacher", smoke=60)
    digit_steps: int = setting(
        150, "steps of 64 texts that teach the student right digits, by route aa", smoke=100
    )
    student_steps: int = setting(1000, "steps of 64 texts of its own corpus", smoke=60)
    pretrain_lr: float = setting(4e-3, "learning rate of those steps")
    floor: float = setting(1e-6, "rarer answers are not listed, see missed_mass", smoke=1e-5)
    eval_every: int = setting(5, "rounds between evaluations", smoke=9)
    recovery_n: int = setting(32, "samples from each foreign beginning", smoke=1)

    def __post_init__(self):
        super().__post_init__()
        if self.rounds % 2:
            raise records.BadInput(
                f"--rounds {self.rounds}: expected an even number: fkl-opd takes half of them "
                f"each way"
            )


# arm -> phases (row of METHODS, whose answers, times --rounds)
ARMS = {
    "before": (),
    "sft-both": (("sft", "demos_both", 1),),
    "sft-a": (("sft", "demos_a", 1),),
    "sft-b-long": (("sft", "demos_b", 4),),
    "seqkd": (("seqkd", "teacher", 1),),
    "fkl": (("fkl", "teacher", 1),),
    "rft": (("rft", "own", 1),),
    "dpo": (("dpo", "own", 1),),
    "grpo": (("grpo", "own", 1),),
    "opd": (("opd-full", "own", 1),),
    "dagger": (("dagger", "own", 1),),
    "gkd": (("gkd", "own", 1),),
    "fkl-opd": (("fkl", "teacher", 0.5), ("opd-full", "own", 0.5)),
    "fkl-long-opd": (("fkl", "teacher", 1), ("opd-full", "own", 1)),
    "grpo-shuffled": (("grpo", "own", 1),),
    "opd-self": (("opd-full", "own", 1),),
}
VERIFIED = ("grpo", "dpo", "rft")
EPS = ("0.01", "0.001", "0.0001")
COLUMNS = (
    "expansion@0.0001",
    "expansion_mass@0.0001",
    "attrition_mass@0.0001",
    "moved@0.0001",
    "right_answers",
    "route_b",
    "recovery",
    "trained_tokens",
    "seconds",
)


def expansion(arm):
    return last("expansion_mass@0.0001", arm)


def moved(arm):
    return last("moved@0.0001", arm)


def route_b(text, arm, test="above", bound=0.25):
    """A claim about the share of an arm's answers that take the missing route."""
    formula = f"share of answers with a b({arm})"
    return Claim(text, formula, last("route_b", arm), test, bound)


CLAIMS = [
    Claim(
        "C1: demonstrations of a route outside of the support expand it",
        "expansion mass(sft-both)",
        expansion("sft-both"),
        "above",
        0.1,
    ),
    Claim(
        "C1: the same loss on demonstrations inside of it does not: the data decides, not "
        "the loss",
        "expansion mass(sft-a)",
        expansion("sft-a"),
        "below",
        0.01,
    ),
    *(
        Claim(
            f"C2: {arm} does not expand",
            f"expansion mass({arm})",
            expansion(arm),
            "below",
            0.01,
        )
        for arm in VERIFIED
    ),
    *(
        Claim(
            f"C2: {arm} moves mass inside of the common support",
            f"moved({arm})",
            moved(arm),
            "above",
            0.1,
        )
        for arm in VERIFIED
    ),
    *(more(f"C2: {arm} raises pass@1", arm, "before", 0.1) for arm in VERIFIED),
    *(
        Claim(
            f"C2: {arm} brings no new right answer (distinct ones of probability 1e-4 or "
            f"more, a problem)",
            f"right answers({arm}) − before",
            last("right_answers", arm, "before"),
            "below",
            0.5,
        )
        for arm in VERIFIED
    ),
    route_b(
        "C3: reverse KL at own prefixes does not reach the missing route", "opd", "below", 0.05
    ),
    route_b("C3: after a forward-KL warm-up it is kept", "fkl-opd"),
    route_b(
        "C3: ...after one of twice the length (added after a look at fkl-opd)", "fkl-long-opd"
    ),
    route_b("C3: forward KL at own prefixes reaches it too", "dagger"),
    Claim(
        "C4: long imitation of a narrow corpus loses more of the old support than on-policy "
        "distillation",
        "attrition(sft-b-long) − attrition(opd)",
        last("attrition_mass@0.0001", "sft-b-long", "opd"),
    ),
    more(
        "C5: from a foreign beginning, training on own answers gets home more often than on "
        "given ones: reverse KL",
        "opd",
        "fkl",
        metric="recovery",
    ),
    more(
        "C5: ...and with the same loss, forward KL, on other prefixes",
        "dagger",
        "fkl",
        metric="recovery",
    ),
    alike(
        "control: shuffled rewards teach nothing (the learning rate was lowered until they "
        "did not)",
        "grpo-shuffled",
        "before",
        0.05,
    ),
    Claim(
        "control: shuffled rewards do not expand (the same)",
        "expansion mass(grpo-shuffled)",
        expansion("grpo-shuffled"),
        "below",
        0.01,
    ),
    Claim(
        "control: a student that is its own teacher hardly moves (AdamW makes full steps of "
        "tiny gradients)",
        "moved(opd-self)",
        moved("opd-self"),
        "below",
        0.05,
    ),
]


def pretrain(run, start, corpus, out, steps, seed):
    texts, rate = f"world/forks/{corpus}", run.settings.pretrain_lr
    how = dict(optimizer=RAMP, micro_batch_tokens=None, fresh_optimizer=True)
    run.pretrain(start, texts, out, steps, rate, seed, **how)


def build(run):
    s = run.settings
    sizes = dict(train_prompts=s.prompts * s.rounds, texts=64 * s.student_steps)
    run.once("worlds.forks", "world/forks", **sizes)
    pretrain(run, "world/forks/teacher", "teacher", "world/teacher", s.teacher_steps, 0)


def prepare(run, seed):
    """This seed's student: right digits first, then its own corpus."""
    s, digits, student = run.settings, f"seed{seed}/digits", f"seed{seed}/student"
    pretrain(run, "world/forks/student", "demos_a", digits, s.digit_steps, seed)
    pretrain(run, digits, "base", student, s.student_steps, seed)


class Turn(NamedTuple):
    """One call of train.py: `rounds` of a phase, from its round `at` on; `number` of the arm's
    rounds came before."""

    method: str
    source: str
    at: int
    number: int
    rounds: int


def turns(phases, settings):
    """A corpus is there already: fewer, longer calls."""
    found = []
    number = 0
    for method, source, share in phases:
        sampled = source in ("own", "teacher")
        stride = 1 if sampled else min(settings.eval_every, settings.rounds)
        for at in range(0, int(share * settings.rounds), stride):
            found.append(Turn(method, source, at, number, stride))
            number += stride
    return found


class UnifiedTrial(Trial):
    def setup(self):
        self.turns = turns(self.how, self.settings)
        self.rounds = len(self.turns)
        self.data = self.run.world / "forks"
        self.done = 0  # rounds
        self.skipped = False

    def due(self, done):
        return not self.skipped and super().due(self.done)

    def step(self, done):
        return super().step(self.done)

    def sample(self, name, n):
        prompts = self.data / f"{name}.jsonl"
        return self.evaluate(prompts, n, out=self.place / f"{name}.jsonl")

    def examine(self, final):
        """On the way accuracy is sampled; at the end every answer is listed, and the foreign
        beginnings are tried."""
        free = self.sample("heldout", 8 * self.settings.recovery_n)
        texts = [r["text"] for r in files.read(free["out"], "evals")]
        found = {
            "accuracy": free["accuracy"],
            "updates": self.steps,
            "route_b": sum("b" in text for text in texts) / len(texts),
        }
        return found | self.support() if final else found

    def support(self):
        """Exact numbers, from every answer with its probability."""
        s = self.settings
        exact = self.run.stage(
            "methods.unified support",
            before=self.start,
            after=self.model,
            prompts=self.data / "heldout.jsonl",
            max_tokens=s.max_tokens,
            eps=EPS,
            floor=s.floor,
            max_prefixes=4000000,
            out=self.place / "support.jsonl",
            overwrite=True,
        )
        kinds = ("expansion", "expansion_mass", "attrition", "attrition_mass", "moved")
        return {
            "accuracy": exact["accuracy_after"],
            "pass@256": exact["pass@256_after"],
            "right_answers": exact["right_answers_after@0.0001"],
            "missed_mass": exact["missed_mass"],
            "recovery": self.sample("corrupt", s.recovery_n)["accuracy"],
            **{f"{kind}@{eps}": exact[f"{kind}@{eps}"] for kind in kinds for eps in EPS},
        }

    def round(self):
        s, turn = self.settings, self.turns[self.number]
        self.number = turn.number
        self.done = turn.number + turn.rounds
        options = dict(batch_size=s.prompts // s.updates, steps=s.updates)
        if turn.source == "own":
            rollouts = self.rollout(slice=part(turn.at, s.prompts))
            given = self.beside_own(turn, rollouts)
        elif turn.source == "teacher":
            rollouts = self.given(turn, "answers")
            given = dict(teacher=self.teacher) if turn.method == "fkl" else {}
        else:
            rollouts = self.data / f"{turn.source}.jsonl"
            given = dict(batch_size=s.prompts * s.n // s.updates, steps=s.updates * turn.rounds)
        self.skipped = given is None
        if not self.skipped:
            options |= dict(seed=self.seed * 1000 + turn.number, fresh_optimizer=turn.at == 0)
            self.train(turn.method, rollouts, **(options | given))

    def given(self, turn, name):
        """The teacher's answers."""
        problems = part(turn.at, self.settings.prompts)
        seed = self.seed * 1000 + turn.number
        return self.answer(name, slice=problems, seed=seed)

    def beside_own(self, turn, rollouts):
        """What train.py reads beside the student's answers; None where there is nothing to
        imitate or to compare."""
        if turn.method in ("opd-full", "dagger"):
            return dict(teacher=self.model if self.arm == "opd-self" else self.teacher)
        if turn.method == "gkd":
            data = self.given(turn, "given")
            return dict(data=data, teacher=self.teacher, teacher_top_k=1000)
        rewards, graded = self.grade_answers(rollouts, self.arm == "grpo-shuffled")
        if turn.method == "grpo":
            return dict(rewards=rewards)
        given = dict(rewards=rewards, set={"prefix": "self"})
        if turn.method == "rft":
            return given if graded["reward_mean"] else None
        if graded["zero_variance_groups"] == 1:
            return None
        reference, _ = self.score(self.start, rollouts, "reference")
        return given | dict(reference=reference)


STUDY = Study(
    "unified",
    "the unified view on forks",
    Settings,
    ARMS,
    CLAIMS,
    COLUMNS,
    build,
    UnifiedTrial,
    prepare,
)


def main(argv=None):
    return conduct(STUDY, __doc__, argv)


if __name__ == "__main__":
    cli.run(main)
