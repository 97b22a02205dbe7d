"""SOD (arXiv 2605.07725): agents with a tool, and a teacher that counts less at the steps where
the student has drifted away from it.

    python -m experiments.sod --seeds 5
    python -m experiments.sod --report results/sod.jsonl

World: chains of operations to be worked out with a calculator (worlds/agents.py).  The teacher
calls rightly and recovers from errors; the student has learnt the same, and then text in which
three calls in ten are malformed and an error is followed by another, or by a guess.  A fifth
of all calls fail without being wrong: an outage, after which the same call again is right.  A
round is 32 problems, 8 episodes each, in 4 updates:

    rollout.py --tools calculator    episodes
    rubric.py grade --grader answer  1 for the right final answer
    teacher.py score                 the teacher's log-prob of every token
    methods.sod weigh                a weight for every step (other rules:
                                     experiments.sod_controls)
    train.py --method sod            GRPO's advantage + weight x (log p_T - log mu), PPO's clip
                                     around the sum

    before, teacher      as they start; experiments.sod_drift reads the episodes of `before`
                         step by step, also with results as long as an error (placebo)
    sft                  imitation of as many of the teacher's episodes
    grpo, opd            the reward alone; the teacher alone, every step alike
    opd-weighted         the teacher alone, weighted as sod
    uniform              both, every step alike: what the paper calls OPD
    sod                  both, weighted: the method
    no-cap, mask, decay  its ablations: no bound; nothing after the first mistake; 0.9 to the
                         power of the steps since then
    shuffled, mean       its controls: an episode's weights in random order; one weight
                         everywhere, sod's mean of the round
    amount               one weight everywhere: as little of the teacher's term as sod leaves
    batch                d measured against the mean first step of the round
    half, double         uniform with half and twice the weight of the teacher
    shaped               sod, and a wrong answer earns a little for every call, as in the
                         released code
    large-...            a larger teacher (0.69 M weights; else 0.25 M, the student 0.11 M)
    calm-...             no outages

`d_first` and `w_mean` are of the last round; `after_error` is accuracy on episodes with a
failed call.  `alarm` counts evaluations with less than half of the calls that an arm started
with: users of the released code met agents that stop calling.

Regime (not reached): the paper's teacher becomes unsure after errors.  Here its entropy at the
student's mistakes is 0.045 nats, the median of d_1 is 0.081, and the student starts at 0.128
without fine-tuning.

The learning rate was chosen on dev, one seed (`--arms sft,grpo,uniform,sod --eval-split dev
--final-n 4`, results/sod_dev_lr*.jsonl): 3e-4 is best for all four.
"""

import json
from dataclasses import dataclass

from experiments import sod_drift
from experiments.claims import Claim, alike, last, less, markdown, minus, more, plus_minus
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
from opd import cli, files


@dataclass(frozen=True)
class Settings(Measured, Sampled, Spoiled):
    rounds: int = setting(15, "rounds of an arm", smoke=1)
    learning_rate: float = setting(3e-4, "of all arms but sft")
    sft_learning_rate: float = setting(3e-4, "of imitation")
    outage: float = setting(0.2, "calls that fail without being wrong, but in the calm arms")
    terms: str = setting("2:4", "fewest and most operations of a problem")
    pad: int = setting(45, "placebo: characters of a padded result, about those of an error")
    max_calls: int = setting(10, "calls of an episode", smoke=2)
    max_tokens: int = setting(256, "longest episode, with the tool's text", smoke=48)
    base_steps: int = setting(900, "steps of 64 right episodes of the student", smoke=4)
    teacher_steps: int = setting(1500, "of the teachers", smoke=4)


# as the row sod has it: what differs is then the reward alone
CLIP = {"clip_low": 0.2, "clip_high": 0.28, "dual_clip": 3}
BOTH = dict(method="opd-grpo")
RULES = ("sod", "no-cap", "mask", "decay", "shuffled", "mean", "amount", "batch")
# rule: how steps are weighted, by method sod unless another is named
ARMS = {
    "before": {},
    "teacher": {},
    "sft": dict(method="seqkd"),
    "grpo": dict(method="opd-grpo", set={"teacher_weight": 0}),
    "opd": dict(method="opd", set=CLIP, rewards=False),
    "opd-weighted": dict(
        method="opd", set=CLIP | {"token_weight": "file"}, rule="sod", rewards=False
    ),
    "uniform": BOTH,
    **{rule: dict(rule=rule) for rule in RULES},
    "half": dict(method="opd-grpo", set={"teacher_weight": 0.5}),
    "double": dict(method="opd-grpo", set={"teacher_weight": 2}),
    "shaped": dict(rule="sod", shape=True),
    "large-teacher": dict(large=True),
    "large-uniform": dict(method="opd-grpo", large=True),
    "large-sod": dict(rule="sod", large=True),
    "calm-before": dict(calm=True),
    "calm-uniform": dict(method="opd-grpo", calm=True),
    "calm-sod": dict(rule="sod", calm=True),
}
EVALUATED = ("calls", "call_errors", "error_episodes", "tool_limit")
COLUMNS = (
    "greedy",
    "after_error",
    "without_error",
    *EVALUATED,
    "truncated",
    "length_mean",
    "d_first",
    "w_mean",
    "alarm",
    "trained_tokens",
    "seconds",
)
DENSE = ("uniform", *RULES)


def drift(one, other=None):
    """value of a Claim: a number that experiments.sod_drift found in the episodes of `before`,
    or the difference of two."""

    def value(arms):
        # an episode without errors has nothing to say of them
        found = {name: x for name, x in arms["before"][-1]["drift"].items() if x is not None}
        return found[one] - (found[other] if other else 0)

    return value


def mask_against_lowest(arms):
    others = (arms[arm][-1]["accuracy"] for arm in DENSE if arm != "mask")
    return arms["mask"][-1]["accuracy"] - min(others)


CLAIMS = [
    Claim(
        "stage 0: after a mistake the teacher and the student are further apart",
        "d above clean episodes at the same step",
        drift("mistake"),
    ),
    Claim(
        "...than after a result as long as an error (placebo)",
        "after a mistake − after a padded result",
        drift("mistake", "placebo"),
    ),
    Claim(
        "...also after an outage, where the student was right",
        "d above clean episodes at the same step",
        drift("outage"),
    ),
    Claim(
        "...the more the longer the error is",
        "correlation of length and d above clean",
        drift("length_correlation"),
    ),
    Claim(
        "...and come back after a recovery",
        "after a recovery − after a mistake",
        drift("recovery", "mistake"),
        "below",
    ),
    Claim(
        "...the teacher itself is unsure after a mistake",
        "change of its entropy − after a result",
        drift("mistake_entropy", "result_entropy"),
    ),
    Claim(
        "d is larger at mistakes, where it is the student who is wrong",
        "d(mistakes) − d(calls with results)",
        drift("d_mistake", "d_result"),
    ),
    Claim(
        "where the next call is right, too, d is larger after a mistake than after a result",
        "d of calls with results, after a mistake − after a result",
        drift("way_mistake_result", "way_result_result"),
    ),
    Claim(
        "the teacher's gradient has less signal to noise after a mistake (Prop. 2)",
        "snr of calls after a mistake − after a result",
        drift("snr_after_mistake", "snr_after_result"),
        "below",
    ),
    Claim(
        "...and at a mistake",
        "snr of mistakes − of calls with results",
        drift("snr_at_mistake", "snr_at_result"),
        "below",
    ),
    Claim(
        "step weights make an episode's gradient smaller (Prop. 3 bounds it)",
        "squared norm of the gradient, sod / uniform",
        drift("size_sod"),
        "below",
        1,
    ),
    Claim(
        "...and its signal to noise larger, which is what for",
        "snr of an episode's gradient, sod − uniform",
        drift("snr_sod", "snr_uniform"),
    ),
    Claim(
        "...more than the same weights shuffled",
        "snr(sod) − snr(shuffled)",
        drift("snr_sod", "snr_shuffled"),
    ),
    Claim(
        "step weights leave as much of the teacher in episodes with a quiet first step",
        "share left in the quieter half − in all",
        drift("left_quiet_sod", "left_sod"),
        "within",
        0.05,
    ),
    Claim(
        "...held against the file's mean first step they do",
        "the same of batch",
        drift("left_quiet_batch", "left_batch"),
        "within",
        0.05,
    ),
    more("step weights help (the paper's claim)", "sod", "uniform"),
    more("...without the reward, too", "opd-weighted", "opd"),
    more("...on episodes with a failed call", "sod", "uniform", metric="after_error"),
    more("it is the steps: shuffled weights lose", "sod", "shuffled"),
    more("it is not only a smaller coefficient: one weight everywhere loses", "sod", "mean"),
    more("nor only less of the teacher: as little of it everywhere loses", "sod", "amount"),
    alike("one weight everywhere is as good as none", "mean", "uniform"),
    alike("...even if it leaves as little as sod does", "amount", "uniform"),
    Claim(
        "masking all that follows an error is the worst of the dense arms",
        "mask − lowest other",
        mask_against_lowest,
        "below",
    ),
    more("the bound helps", "sod", "no-cap"),
    more("decay is below sod", "sod", "decay"),
    alike("a batch's first step serves as well as an episode's own", "batch", "sod"),
    alike("...and as uniform weights", "batch", "uniform"),
    more("weighted, the teacher adds to the reward", "sod", "grpo"),
    more("uniform, it does", "uniform", "grpo"),
    more("the reward adds to the teacher", "uniform", "opd"),
    more("the method beats imitation", "sod", "sft"),
    more("...and so do uniform weights", "uniform", "sft"),
    more(
        "greedily decoded, too, sod is better than the student",
        "sod",
        "before",
        metric="greedy",
    ),
    more("...and uniform", "uniform", "before", metric="greedy"),
    more("paying for calls adds calls", "shaped", "sod", metric="calls"),
    less("...and no accuracy", "shaped", "sod", 0.02),
    Claim(
        "a larger teacher hurts uniform weights more",
        "(large-uniform − uniform) − (large-sod − sod)",
        minus(
            last("accuracy", "large-uniform", "uniform"), last("accuracy", "large-sod", "sod")
        ),
        "below",
    ),
    alike("without outages there is no gap", "calm-sod", "calm-uniform"),
    Claim(
        "sod's agent goes on calling",
        "calls(sod) / calls(before)",
        lambda a: a["sod"][-1]["calls"] / max(a["before"][-1]["calls"], 1e-9),
        "above",
        0.5,
    ),
]

# ---- the table of stage 0

# what came of a step
OUTCOMES = {
    "result": "call with a result",
    "mistake": "mistake",
    "outage": "call into an outage",
    "answer": "answer",
}
AFTER = {
    "start": "first call",
    "result": "call after a result",
    "mistake": "call after a mistake",
    "outage": "call after an outage",
    "recovery": "call after a recovery",
}


def drift_table(path):
    """Markdown: the numbers of stage 0, mean over seeds ± half of the 95 % t-interval."""
    seen = {}
    for row in files.read(path, "results"):
        for name, x in row.get("drift", {}).items():
            if x is not None:
                seen.setdefault(name, []).append(x)

    def show(name, digits=3):
        return plus_minus(seen[name], digits) if name in seen else ""

    after = ("d, after a result", "d, after a mistake")
    steps = [["step", "d", *after, "the teacher's entropy", "signal to noise"]]
    for name, words in OUTCOMES.items():
        kinds = ("d", "way_result", "way_mistake", "entropy")
        numbers = [show(f"{kind}_{name}") for kind in kinds]
        steps.append([words, *numbers, show(f"snr_at_{name}", 4)])
    for name, words in AFTER.items():
        steps.append([words, "", "", "", "", show(f"snr_after_{name}", 4)])
    quiet = "in the half of the episodes with the smaller d_1"
    norm = "squared norm of an episode's gradient, of uniform's"
    rules = [["rule", "left of the teacher's term", quiet, norm, "its signal to noise"]]
    for rule in DENSE:
        numbers = [show(f"{kind}_{rule}", 2) for kind in ("left", "left_quiet", "size")]
        rules.append([rule, *numbers, show(f"snr_{rule}", 4)])
    return (
        f"{markdown(steps)}\n{markdown(rules)}\nd_1: mean {show('d_first')}, median "
        f"{show('d_first_median')}; an error's text has {show('mistake_length', 0)} tokens, a "
        f"padded result {show('placebo_length', 0)}.\n"
    )


# ---- the world


def build(run):
    """Problems, corpora, the teachers, and the base model that every seed's student is made
    from."""
    s = run.settings
    models = [("student", "base", s.base_steps), ("teacher", "teacher", s.teacher_steps)]
    if any(ARMS[arm].get("large") for arm in run.arms):
        models.append(("large", "large", s.teacher_steps))
    build_world(
        run,
        "worlds.agents",
        models,
        terms=s.terms,
        train_prompts=s.prompts * s.rounds,
        eval_prompts=8 if run.smoke else 200,
        clean=64 * s.base_steps,
        mixed=64 * s.spoil_steps,
        outage=s.outage,
    )


# ---- an arm


class SodTrial(Trial):
    def setup(self):
        self.method = self.how.get("method", "sod" if "rule" in self.how else None)
        if not self.method:
            self.rounds = 0
        if self.how.get("large"):
            self.teacher = self.run.world / "large"
        if self.arm in ("teacher", "large-teacher"):
            self.start = self.teacher
        self.calls = None  # an episode, at the start
        self.alarm = 0

    def execute(self):
        if self.arm == "before":
            self.signal["drift"] = self.stage0()
        return super().execute()

    def generation(self, **calculator):
        s = self.settings
        outage = {} if self.how.get("calm") else {"outage": s.outage}
        return {
            "tools": json.dumps({"calculator": outage | calculator}),
            "tool_options": {"call_format": "brackets", "max_calls": s.max_calls},
            "max_tokens": s.max_tokens,
        }

    def columns(self, score, n, final):
        if self.calls is None:
            self.calls = score["calls"]
        self.alarm += score["calls"] < self.calls / 2
        columns = super().columns(score, n, final) | {
            "after_error": score["accuracy_after_error"],
            "without_error": score["accuracy_without_error"],
            **{name: score[name] for name in EVALUATED},
            "alarm": self.alarm,
        }
        return {name: value for name, value in columns.items() if value is not None}

    def round(self):
        s, how = self.settings, self.how
        if self.method == "seqkd":
            return self.train("seqkd", self.answer(), s.sft_learning_rate)
        rollouts = self.rollout()
        scores, _ = self.teach(rollouts)
        options = {"scores": scores, "set": how.get("set")}
        if how.get("rewards", True):
            options["rewards"] = self.reward(rollouts)
        if "rule" in how:
            options["token_weights"] = self.weigh(rollouts, scores)
        self.train(self.method, rollouts, **options)

    def reward(self, rollouts):
        """1 for a right answer; of an arm that shapes, a little for a wrong one's calls."""
        if not self.how.get("shape"):
            return self.grade(rollouts, grader="answer")[0]
        graded, _ = self.grade(rollouts, "graded", grader="answer")
        return self.control("shape-calls", graded, rollouts=rollouts)[0]

    def weigh(self, rollouts, scores):
        """Step weights by the arm's rule."""
        command, options = "methods.sod weigh", {}
        if self.how["rule"] != "sod":
            command = "experiments.sod_controls"
            options = dict(rule=self.how["rule"], seed=self.seed * 1000 + self.number)
        weights, done = self.beside(rollouts, "weights", command, scores=scores, **options)
        for name in ("d_first", "w_mean", "w_low", "w_bound"):
            if done[name] is not None:
                self.signal[name] = done[name]
        return weights

    # ---- stage 0

    def stage0(self):
        """What experiments.sod_drift finds in the student's own episodes, and with results
        padded to an error's length."""
        plain = self.measure_drift("plain", model=self.start)
        against = self.folder / "drift/plain/drift.json"
        placebo = self.measure_drift("placebo", against=against, pad=self.settings.pad)
        return of_steps(plain, placebo) | of_gradients(plain) | by_outcome(plain)

    def measure_drift(self, name, model=None, against=None, **calculator):
        s = self.settings
        at = self.folder / "drift" / name
        rollouts = at / "rollouts.jsonl"
        how = dict(prompts=self.heldout, n=s.eval_n, seed=self.seed)
        how |= self.generation(**calculator)
        self.run.stage("rollout.py", model=self.start, **how, out=rollouts)
        scores, _ = self.score(self.teacher, rollouts, "scores", top_k=1000)
        return self.run.stage(
            "experiments.sod_drift",
            rollouts=rollouts,
            scores=scores,
            model=model,
            against=against,
            out=at / "drift.json",
            plot=at / "drift.png",
            overwrite=True,
        )


def of_steps(plain, placebo):
    """What sod_drift found of d: after an event, against the placebo, and left by a rule."""
    after, padded = plain["after"], placebo["after"]["result"]
    found = {
        "placebo": padded["above"],
        "placebo_length": padded["length"],
        "mistake_length": after["mistake"]["length"],
        "length_correlation": after["mistake"]["length_correlation"],
        "d_first": plain["first"]["mean"],
        "d_first_median": plain["first"]["median"],
    }
    for event in ("mistake", "outage", "recovery"):
        found[event] = after[event]["above"]
    for event in ("mistake", "outage", "result"):
        found[f"{event}_entropy"] = after[event]["entropy_change"]
    for name in ("left", "left_quiet"):
        found |= {f"{name}_{rule}": x for rule, x in plain[name].items()}
    return found


def of_gradients(plain):
    """What it found of the teacher's gradient: after an event, and weighted by a rule."""
    after, rules = plain["gradient"]["after"], plain["gradient"]["rule"]
    found = {f"snr_after_{name}": after.get(name, {}).get("snr") for name in AFTER}
    uniform = rules["uniform"]["signal"] + rules["uniform"]["noise"]
    for rule, x in rules.items():
        found[f"snr_{rule}"] = x["snr"]
        if x["noise"]:
            found[f"size_{rule}"] = (x["signal"] + x["noise"]) / uniform
    return found


def by_outcome(drift):
    """What sod_drift found of a step, by what came of it and of the step before."""
    found = {}
    for name in OUTCOMES:
        found[f"d_{name}"] = drift["by_outcome"].get(name)
        found[f"entropy_{name}"] = drift["entropy_by_outcome"].get(name)
        found[f"snr_at_{name}"] = drift["gradient"]["outcome"].get(name, {}).get("snr")
        for before in sod_drift.EVENTS:
            found[f"way_{before}_{name}"] = drift["ways"][before].get(name)
    return found


STUDY = Study(
    "sod",
    "agents with a calculator",
    Settings,
    ARMS,
    CLAIMS,
    COLUMNS,
    build,
    SodTrial,
    more=drift_table,
)


def main(argv=None):
    return conduct(STUDY, __doc__, argv)


if __name__ == "__main__":
    cli.run(main)
