"""SimCT (arXiv 2605.07711): a teacher of another vocabulary; what do text units of several
tokens add to the tokens that both spell alike?

    python -m experiments.simct --seeds 5
    python -m experiments.simct --report results/simct.jsonl

World: running sums.  The teacher writes one character a token; students have longer tokens.
m16 has 16 of them, learnt by byte-pair encoding from the same texts (half of the bytes is then
spelt alike), m64, m4, m1 and d20 (the numbers from 20 to 40) more and fewer; m0 is the
teacher's own vocabulary.  Every student has learnt right work, then text of which half is
right.  A round is --prompts problems, one answer each, in --updates optimiser steps.

    before, teacher     as they start
    sft                 as many of the teacher's texts, re-tokenized: needs no alignment
    simple              reverse KL where both spell alike, nothing elsewhere (strict shared
                        vocabulary)
    top16               the same on the student's 16 likeliest tokens
    simct               the paper: and text units, scored by the mean log-prob of their spelling
    masked              without the tokens that only begin a unit's text
    sum, logit          the whole log-prob instead of the mean; raw logits, as released
    masked-sum          both: a text's probability is then the same however it is spelt
    simple-slow, simct-slow   a third of the learning rate (on dev the best one of simct)
    dpca                each unit's log-prob, split among its tokens as an advantage
    uld                 sorted probabilities, aligned by nothing
    drop25, 50, 75      simct without that share of the spans
    coarse30, 70        simct with that share of neighbouring one-token units joined
    shuffled            simct with the spans' scores in random order among the spans
    VOCABULARY-...      before, simple, simct, masked with the other vocabularies
    m0-...              control: one vocabulary, where all are ordinary on-policy distillation

`strict` is the share of the answers' bytes in units of one token on either side, `covered` in
units at all.

Regime (not reached): the paper's student is fine-tuned on its teacher's answers first.  Here it
starts at 0.204, and 80 updates of imitation add 0.204 more.

Rates were chosen on dev, one seed (`--arms simple,simct,sft,dpca,uld,masked --eval-split dev
--final-n 4`, results/simct_dev_lr*.jsonl): simple, masked, dpca and uld are best at 1e-4, simct
at 3e-5, sft at 3e-4.  Two diagnostics of the literature are not built: bits a byte of the
teacher's texts, and the angle between the gradients of one-token units and spans.
"""

from dataclasses import dataclass

from experiments.claims import Claim, alike, last, less, minus, more
from experiments.study import RAMP, Measured, Spoiled, Study, Trial, conduct, setting
from opd import cli


@dataclass(frozen=True)
class Settings(Measured, Spoiled):
    rounds: int = setting(20, "rounds of an arm", smoke=2)
    prompts: int = setting(128, "problems a round, one answer each", smoke=4)
    updates: int = setting(4, "optimiser steps a round", smoke=2)
    learning_rate: float = setting(1e-4, "of distillation")
    sft_learning_rate: float = setting(3e-4, "of imitation of the teacher's texts")
    right: float = setting(0.5, "share of right work in the text of mixed quality")
    base_steps: int = setting(600, "steps of 64 right texts of every student", smoke=2)
    teacher_steps: int = setting(1300, "of the teacher", smoke=4)
    eval_every: int = setting(5, "rounds between evaluations", smoke=2)


# --student-merges of worlds.sums
VOCABULARIES = {"m16": "16", "m64": "64", "m4": "4", "m1": "1", "d20": "20:40", "m0": None}
MAIN = "m16"
# top: only the student's likeliest tokens; regroup: flags of experiments.simct_regroup
VARIANTS = {
    "before": {},
    "sft": dict(method="seqkd"),
    "simple": dict(method="simple-opd"),
    "top16": dict(method="simple-opd", top=16),
    "simct": dict(method="simct"),
    "masked": dict(method="simct", set=dict(prefixes="drop")),
    "sum": dict(method="simct", set=dict(span="sum")),
    "logit": dict(method="simct", set=dict(span="logit")),
    "masked-sum": dict(method="simct", set=dict(prefixes="drop", span="sum")),
    "simple-slow": dict(method="simple-opd", slow=True),
    "simct-slow": dict(method="simct", slow=True),
    "dpca": dict(method="opd"),
    "uld": dict(method="uld"),
    "drop25": dict(method="simct", regroup=dict(drop_spans=0.25)),
    "drop50": dict(method="simct", regroup=dict(drop_spans=0.5)),
    "drop75": dict(method="simct", regroup=dict(drop_spans=0.75)),
    "coarse30": dict(method="simct", regroup=dict(coarsen=0.3)),
    "coarse70": dict(method="simct", regroup=dict(coarsen=0.7)),
    "shuffled": dict(method="simct", regroup=dict(shuffle_spans=True)),
}


def arms():
    """{arm: its variant and vocabulary}."""
    found = {"before": {"vocabulary": MAIN}, "teacher": {"vocabulary": "m0"}}
    for name, how in VARIANTS.items():
        found[name] = how | {"vocabulary": MAIN}
    for vocabulary in VOCABULARIES:
        if vocabulary != MAIN:
            for name in ("before", "simple", "simct", "masked"):
                found[f"{vocabulary}-{name}"] = VARIANTS[name] | {"vocabulary": vocabulary}
    found["m0-opd"] = {"vocabulary": "m0", "method": "opd-full"}
    return found


ARMS = arms()
COLUMNS = (
    "greedy",
    "strict",
    "covered",
    "whole",
    "spans",
    "length_mean",
    "truncated",
    "teacher_tokens",
    "trained_tokens",
    "seconds",
)
CLAIMS = [
    more("distillation across vocabularies works at all", "simple", "before"),
    more("text units add to it (the paper's claim)", "simct", "simple"),
    more("...more than re-tokenized texts do", "simct", "sft"),
    less("the gain shrinks as spans are given back", "drop75", "simct"),
    Claim("...in order", "(drop25 − drop75)", last("accuracy", "drop25", "drop75")),
    less("the gain is the spans' scores and not their presence", "shuffled", "simct"),
    less("coarser units lose", "coarse70", "simct"),
    more(
        "tokens that begin a unit's text teach segmentation: dropping them helps",
        "masked",
        "simct",
    ),
    more(
        "...what they teach is seen: the student comes to spell as the teacher does",
        "simct",
        "simple",
        metric="strict",
    ),
    alike("...and without them it does not", "masked", "simple", 0.02, "strict"),
    more("the mean log-prob is no worse than the whole one", "simct", "sum", -0.02),
    more(
        "raw logits, as released, are no worse than the paper's score", "logit", "simct", -0.02
    ),
    alike("the student's 16 likeliest shared tokens are enough", "top16", "simple", 0.02),
    more("dealing a unit's log-prob out as an advantage does as well", "dpca", "simct", -0.02),
    less("sorted probabilities, aligned by nothing, lose", "uld", "simple"),
    more("the masked form adds to shared tokens", "masked", "simple"),
    more("...and so does the one that keeps probabilities", "masked-sum", "simple"),
    more("at a third of the rate text units add to shared tokens", "simct-slow", "simple-slow"),
    *(
        more(f"gap at another coverage: {v}", f"{v}-simct", f"{v}-simple")
        for v in ("m64", "m4", "m1", "d20")
    ),
    *(
        more(f"...of the masked form: {v}", f"{v}-masked", f"{v}-simple")
        for v in ("m64", "m4", "m1", "d20")
    ),
    Claim(
        "the gap grows with the mismatch",
        "(simct − simple) at m64 − at d20",
        minus(
            last("accuracy", "m64-simct", "m64-simple"),
            last("accuracy", "d20-simct", "d20-simple"),
        ),
    ),
    alike("control: on one vocabulary there is no gap", "m0-simct", "m0-simple", 0.02),
    alike("control: ...and both are ordinary distillation", "m0-simct", "m0-opd", 0.02),
]


def build(run):
    """The corpora, the teacher, and every vocabulary's student after right work."""
    s = run.settings
    for name, merges in VOCABULARIES.items():
        # the same problems and texts in all of them, another untrained student
        run.once(
            "worlds.sums",
            f"world/{name}",
            train_prompts=s.prompts * s.rounds,
            right=s.right,
            clean=64 * s.teacher_steps,
            mixed=256 * s.spoil_steps,
            student_merges=merges,
        )
    clean, start = f"world/{MAIN}/clean", f"world/{MAIN}/teacher"
    options = dict(optimizer=RAMP, save_every=200)
    run.pretrain(start, clean, "world/teacher", s.teacher_steps, **options)
    decay = RAMP | dict(total_steps=s.teacher_steps)
    for name, merges in VOCABULARIES.items():
        start = f"world/{name}/" + ("student_merged" if merges else "student")
        run.pretrain(start, clean, f"world/base-{name}", s.base_steps, optimizer=decay)


def prepare(run, seed):
    """Every vocabulary's student, after text of mixed quality."""
    for name in VOCABULARIES:
        run.spoil(seed, f"base-{name}", f"{MAIN}/mixed", f"student-{name}")


class SimctTrial(Trial):
    def setup(self):
        self.method = self.how.get("method")
        if not self.method:
            self.rounds = 0
        if self.arm != "teacher":
            self.start = self.folder / f"student-{self.how['vocabulary']}"
        self.data = self.run.world / MAIN

    def round(self):
        s = self.settings
        if self.method == "seqkd":
            answers = self.answer()
            self.train("seqkd", answers, s.sft_learning_rate, prompts=self.prompts)
            return
        rollouts = self.rollout()
        if self.method == "opd-full":
            scores, _ = self.teach(rollouts, top_k=1000)
        else:
            scores = self.score_units(rollouts)
        if "regroup" in self.how:
            scores = self.regroup(rollouts, scores)
        rate = s.learning_rate / (3 if self.how.get("slow") else 1)
        self.train(self.method, rollouts, rate, scores=scores, set=self.how.get("set"))

    def score_units(self, rollouts):
        """Scores of text units under the teacher of another vocabulary."""
        own = None
        if "top" in self.how:
            own, _ = self.score(self.model, rollouts, "own", top_k=self.how["top"])
        scores, done = self.beside(
            rollouts,
            "scores",
            "methods.simct score",
            model=self.teacher,
            student=self.model,
            prompts=self.prompts,
            top_k_of=own,
            sorted=1000 if self.method == "uld" else None,
        )
        for name in ("strict", "covered", "whole"):
            self.signal[name] = done[name]
        self.cost["teacher_tokens"] += done["teacher_tokens"]
        return scores

    def regroup(self, rollouts, scores):
        """A control: the same scores with other spans."""
        how = dict(scores=scores, seed=self.seed * 1000 + self.number, **self.how["regroup"])
        command = "experiments.simct_regroup"
        regrouped, done = self.beside(rollouts, "regrouped", command, **how)
        self.signal["spans"] = done["spans"]
        return regrouped


STUDY = Study(
    "simct",
    "a teacher of another vocabulary",
    Settings,
    ARMS,
    CLAIMS,
    COLUMNS,
    build,
    SimctTrial,
    prepare,
)


def main(argv=None):
    return conduct(STUDY, __doc__, argv)


if __name__ == "__main__":
    cli.run(main)
