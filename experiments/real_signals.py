"""What the signals of the methods are worth on a real pair, before anybody trains.

    python -m experiments.real_signals --student FOLDER --teacher FOLDER --prompts P \\
        --judge NAME --judge-url http://localhost:8011/v1 --out runs/signals
    python -m experiments.real_signals ... --parts base positions   # some of the parts

One fixed set of the student's rollouts, and OUT/signals.json with an entry a part, drawn in
OUT/signals.png; `base` comes first, `prefix` before `continue`, `sod` before `saved`:

    base       the rollouts, who is right, log-probs of student and teacher
    positions  log mu - log p_T a token, whose expectation is the reverse KL, by position,
               length of the answer, repetition and outcome
    outcome    does a signal tell right from wrong answers to one prompt?  AUC of log-probs,
               length, and of having a final answer at all
    ropd       AUC of rubric rewards (m = 1 or 4 reference answers; the verifier reads all
               answers to a prompt at once, or one by one) and of a holistic judge, on the
               first --judged prompts; failures and flips of verdicts
    prefix     cuts of methods.prefix, and experiments.prefix_null
    continue   can the teacher still end right if it continues the student's text?  It does so
               at quarters of a wrong and a right answer to each prompt, and at each cut
               against halfway between cut and end; does the margin predict it?
    sod        the drift of episodes with a calculator, each after a worked example, on the
               first --tool-prompts: after failed calls, against results of calls at the same
               step of the same problem
    saved      from those places, can the teacher still end right, and does the drift predict
               it?
    support    pass@1 to pass@N of both models, beside guesses: the model's own answers to the
               other prompts.  Where these come near, pass@k says nothing: give prompts with
               many possible answers.  By default 3,072 answers

Every stage is issued as a command (OUT/commands.sh) and resumes: a run may take several
sittings.

Simplifications: 1. intervals are t-intervals over prompts, each with the mean of its rollouts;
2. a continuation has --max-tokens of its own, wherever it begins; 3. a judge's calls and tokens
are those of the last sitting (OUT/stages.log has all); 4. the teacher scores episodes as the
student's template has tools and outputs, also where its own has them otherwise.
"""

import dataclasses
import json
import math
from collections import Counter
from pathlib import Path

import numpy as np

from experiments.by_prompt import difference, minus, over_prompts, quarters
from experiments.real_continue import continued, saved, sod
from experiments.sod_drift import draw_steps
from experiments.study import Run, add_settings, say, setting, settings_of, versions
from opd import cli, disk, files, records
from opd.answers import accepted_answers, equal, final_answer, is_correct
from opd.pictures import COLOURS, new_picture, tidy
from opd.records import BadInput
from opd.rewards import rubric_reward
from opd.shared import shares_prompts
from opd.stats import auc_by_prompt, pass_at_k, powers_up_to


@dataclasses.dataclass(frozen=True)
class Settings:
    student: str = setting("", "folder or Hugging Face id", smoke="-")
    teacher: str = setting("", "of the same vocabulary", smoke="-")
    prompts: str = setting("", "JSONL of prompts with answers (real_tasks make)", smoke="-")
    judge: str = setting("", "served model: rubricator, verifier and holistic judge", free=True)
    judge_url: str = setting("", "its OpenAI-compatible server", free=True)
    n: int = setting(8, "rollouts per prompt", smoke=4)
    max_tokens: int = setting(400, "longest answer", smoke=24)
    seed: int = setting(0, "of sampling")
    dtype: str = setting("float32", "of both models", choices=("float32", "bfloat16"))
    concurrency: int = setting(8, "requests to the judge at once", free=True)
    timeout: float = setting(
        3600.0, "seconds of silence of the judge that are a failure", free=True
    )
    judged: int = setting(0, "prompts that are judged; 0: all of them")
    repeats: int = setting(
        2, "judgements of an answer: they say how often verdicts flip", free=True
    )
    continuations: int = setting(
        2, "times the teacher continues from a place", smoke=1, free=True
    )
    tool_prompts: int = setting(12, "prompts of the part `sod`", smoke=3, free=True)
    support_prompts: int = setting(24, "prompts of the part `support`", smoke=3, free=True)
    support_n: int = setting(64, "answers per prompt there", smoke=4, free=True)
    block_end: str = setting(r"""[.!?]["')]*\s+|\n+""", "regular expression that ends a block")

    def __post_init__(self):
        if not (self.student and self.teacher and self.prompts):
            raise BadInput("expected --student, --teacher and --prompts (or --smoke)")
        if bool(self.judge) != bool(self.judge_url):
            raise BadInput("--judge, --judge-url: expected both or neither")


EDGES = (0, 4, 8, 16, 32, 64, 128, 256, 512, 1024, math.inf)  # of positions in an answer
LONG = 150  # tokens

# ---- the fixed set


class Pair:
    """Student, teacher, prompts, and the folder with everything that is made of them."""

    def __init__(self, run, student, teacher, prompts):
        self.run = run
        self.settings = run.settings
        self.student = student
        self.teacher = teacher
        self.prompts = prompts
        self.failed = 0  # records that could not be made

    def path(self, name):
        return str(self.run.out / name)

    def stage(self, command, out, **options):
        """Runs a stage that completes OUT/`out`; returns its summary."""
        summary = self.run.stage(command, **options, out=self.path(out))
        if summary.get("failed"):
            self.failed += summary["failed"]
            say(f"{out}: {summary['failed']} records failed: run again to try them once more")
        return {name: x for name, x in summary.items() if name != "out"}

    def sample(self, command, model, out, n, **options):
        s = self.settings
        options = {"prompts": self.prompts} | options
        how = dict(n=n, max_tokens=s.max_tokens, seed=s.seed, dtype=s.dtype)
        return self.stage(command, out, model=model, **options, **how)

    def score(self, out, model, **options):
        s = self.settings
        how = dict(model=model, dtype=s.dtype, share_prompts=shares_prompts(model))
        return self.stage("teacher.py score", out, **how, **options)

    def rows(self, name, kind):
        """{key: record} of a file of OUT."""
        found = files.read(self.path(name), kind)
        return {records.key_of(record, kind): record for record in found}

    def read_prompts(self):
        """{prompt id: record}"""
        return {str(p["id"]): p for p in files.read(self.prompts, "prompts")}

    def correct(self):
        """{key: whether the rollout is right}"""
        return {key: row["correct"] for key, row in self.rows("evals.jsonl", "evals").items()}

    def gaps(self):
        """{key: log mu - log p_T of each token [T]}"""
        scores = self.rows("scores.jsonl", "scores")
        rollouts = self.rows("rollouts.jsonl", "rollouts")
        return {
            k: np.subtract(r["logprobs"], scores[k]["logprobs"]) for k, r in rollouts.items()
        }


def base(pair):
    found = pair.sample("rollout.py", pair.student, "rollouts.jsonl", pair.settings.n)
    on = {"rollouts": pair.path("rollouts.jsonl")}
    evals = pair.stage("eval.py", "evals.jsonl", prompts=pair.prompts, **on)
    own = pair.score("own.jsonl", pair.student, **on, top_k=4)
    scores = pair.score("scores.jsonl", pair.teacher, **on, top_k_of=pair.path("own.jsonl"))
    long = sum(len(gap) >= LONG for gap in pair.gaps().values())
    found = {"rollouts": found, "evals": evals, "own": own, "scores": scores}
    return found | {f"rollouts of at least {LONG} tokens": long}


def by_position(gaps):
    """The mean gap in each span of EDGES, over the answers that reach it."""
    rows = []
    for low, high in zip(EDGES, EDGES[1:]):
        high = min(high, max(map(len, gaps.values()), default=0))
        some = {k: gap[low:high].mean() for k, gap in gaps.items() if len(gap) > low}
        if some:
            rows.append({"low": low, "high": high} | over_prompts(some))
    return rows


def share_before(gaps, end):
    """Which share of all tokens, and of the sum of all gaps, lies before position `end`."""
    tokens = sum(len(gap[:end]) for gap in gaps.values()) / sum(map(len, gaps.values()))
    gap = sum(gap[:end].sum() for gap in gaps.values()) / sum(g.sum() for g in gaps.values())
    return {"tokens": tokens, "gap": float(gap)}


def positions(pair):
    gaps = {key: gap for key, gap in pair.gaps().items() if len(gap)}
    evals = pair.rows("evals.jsonl", "evals")
    means = {key: float(gap.mean()) for key, gap in gaps.items()}
    right = {key: x for key, x in means.items() if evals[key]["correct"]}
    wrong = {key: x for key, x in means.items() if not evals[key]["correct"]}
    return {
        "all": over_prompts(means),
        "before token 32": share_before(gaps, 32),
        "by_position": by_position(gaps),
        "by_position, long answers": by_position(
            {key: gap for key, gap in gaps.items() if len(gap) >= LONG}
        ),
        "by_length": quarters(means, {key: len(gaps[key]) for key in means}),
        "by_repetition": quarters(means, {key: evals[key]["repetition"] for key in means}),
        "right": over_prompts(right),
        "wrong": over_prompts(wrong),
        "wrong - right": difference(wrong, right),
    }


# ---- which signal knows a right answer?


def aucs(signals, keys, right):
    """{signal: `over_prompts` of its AUC on these rollouts, and of the difference to others}"""
    by_prompt = {
        name: auc_by_prompt({key: values[key] for key in keys}, right)
        for name, values in signals.items()
    }
    found = {}
    for name, values in by_prompt.items():
        found[name] = over_prompts(values)
        for other in ("teacher log-prob", "rubric, m = 1"):
            if other != name and other in by_prompt:
                found[name][f"minus {other}"] = over_prompts(minus(values, by_prompt[other]))
    return found


def free_signals(pair):
    """{signal: {key: number}} of what needs no judge, for every rollout."""
    scores = pair.rows("scores.jsonl", "scores")
    rollouts = pair.rows("rollouts.jsonl", "rollouts")
    answered = {k: final_answer(records.final_text(r)) is not None for k, r in rollouts.items()}
    return {
        "teacher log-prob": {k: float(np.mean(scores[k]["logprobs"])) for k in rollouts},
        "sampler log-prob": {k: float(np.mean(r["logprobs"])) for k, r in rollouts.items()},
        "small gap": {k: -float(np.mean(gap)) for k, gap in pair.gaps().items()},
        "shorter": {k: -len(r["response_ids"]) for k, r in rollouts.items()},
        "has a final answer": answered,
    }


def on_known(pair, signals, keys):
    """AUCs on these rollouts: those for which every signal has a number."""
    known = [k for k in keys if all(v.get(k) is not None for v in signals.values())]
    ended = [k for k in known if signals["has a final answer"][k]]
    right = pair.correct()
    return {
        "rollouts": len(known),
        "with a final answer": len(ended),
        "auc": aucs(signals, known, right),
        "auc among answers with a final answer": aucs(signals, ended, right),
    }


def outcome(pair):
    signals = free_signals(pair)
    return on_known(pair, signals, signals["shorter"])


def first_verdicts(rewards, rubrics):
    """{key: reward by the first of its judgements}, where it did not fail."""
    found = {}
    for key, record in rewards.items():
        if record["reward"] is not None and record.get("repeats"):
            points = [c["points"] for c in rubrics[key[:1]]["criteria"]]
            found[key] = rubric_reward(points, record["repeats"][:1]).value
    return found


def judgements(pair, asked):
    """({signal: {key: reward or None}}, {signal: summaries of the stages}): rubrics of one and
    of four reference answers, the verifier reading all answers to a prompt at once, or one by
    one; and the holistic judge."""
    s = pair.settings
    common = dict(asked)
    create = {"predicates": "worlds.predicates"}  # the sums of --smoke
    modes = {"": {"grader": "check"} | create}  # by what they add to the name of a signal
    if s.judge:
        common |= dict(model=s.judge, base_url=s.judge_url, cache=pair.path("judge.jsonl"))
        common |= dict(concurrency=s.concurrency, timeout=s.timeout, max_failure_rate=1)
        create = {"rubricator": "llm"}
        grade = {"grader": "judge", "repeats": s.repeats}
        modes = {"": grade, ", one by one": grade | {"mode": "single"}}
    signals = {}
    told = {}
    for m in (1, 4):
        rubrics = f"rubrics{m}.jsonl"
        drawn = {"answers": pair.path("answers.jsonl"), "m": m}
        made = pair.stage("rubric.py create", rubrics, **common, **create, **drawn)
        told[f"rubricator, m = {m}"] = {"create": made}
        for mode, grade in modes.items():
            name = f"rubric, m = {m}{mode}"
            rewards = f"rewards{m}{'_single' if mode else ''}.jsonl"
            on = {"rubrics": pair.path(rubrics)}
            graded = pair.stage("rubric.py grade", rewards, **common, **grade, **on)
            told[name] = {"grade": graded}
            rows = pair.rows(rewards, "rewards")
            signals[name] = {key: row["reward"] for key, row in rows.items()}
            if first := first_verdicts(rows, pair.rows(rubrics, "rubrics")):
                signals[f"{name}, one judgement"] = first
    if s.judge:
        graded = pair.stage("rubric.py grade", "holistic.jsonl", **common, grader="scalar")
        told["holistic judge"] = {"grade": graded}
        rows = pair.rows("holistic.jsonl", "rewards")
        signals["holistic judge"] = {key: row["reward"] for key, row in rows.items()}
    return signals, told


def ropd(pair):
    """Every signal on the same rollouts: those whose judgements all succeeded."""
    s = pair.settings
    rollouts = pair.rows("rollouts.jsonl", "rollouts")
    every = pair.read_prompts()
    prompts = list(every)[: s.judged or None]
    judged = {key: r for key, r in rollouts.items() if key[0] in prompts}
    pair.run.write("judged.jsonl", f"rollouts of {len(prompts)} prompts", judged.values())
    pair.run.write("judged_prompts.jsonl", "their prompts", [every[name] for name in prompts])
    asked = {"prompts": pair.path("judged_prompts.jsonl")}
    pair.sample("teacher.py answer", pair.teacher, "answers.jsonl", 4, **asked)
    references = {
        key: is_correct(records.final_text(r), every[key[0]]["answer"])
        for key, r in pair.rows("answers.jsonl", "answers").items()
    }
    signals, told = judgements(pair, asked | {"rollouts": pair.path("judged.jsonl")})
    found = on_known(pair, signals | free_signals(pair), judged)
    return found | {
        "judged": len(judged),
        "references right": over_prompts(references),
        "stages": told,
    }


# ---- prefix


def prefix(pair):
    on = {"rollouts": pair.path("rollouts.jsonl"), "scores": pair.path("scores.jsonl")}
    on |= {"model": pair.student, "block_end": pair.settings.block_end}
    cuts = {}
    for name, guard in (("faithful", False), ("guarded", True)):
        cuts[name] = pair.stage("methods.prefix weigh", f"cuts_{name}.jsonl", **on, guard=guard)
    pair.run.once("experiments.prefix_null", "null.json", **on, seed=pair.settings.seed)
    return {"cuts": cuts, "null": json.loads(Path(pair.path("null.json")).read_text())}


# ---- support


def support(pair):
    s = pair.settings
    some = {"slice": f"0:{s.support_prompts}"}
    asked = pair.read_prompts()
    found = {}
    counts = {}
    curves = {}
    stages = {"student": ("rollout.py", pair.student)}
    stages["teacher"] = ("teacher.py answer", pair.teacher)
    for name, (stage, model) in stages.items():
        made = pair.sample(stage, model, f"many_{name}.jsonl", s.support_n, **some)
        on = {"rollouts": pair.path(f"many_{name}.jsonl"), "prompts": pair.prompts} | some
        evals = pair.stage("eval.py", f"many_{name}_evals.jsonl", **on)
        found[name] = {"stage": made, "evals": evals}
        right = {}
        given = {}
        for (prompt, sample), row in pair.rows(f"many_{name}_evals.jsonl", "evals").items():
            if sample < s.support_n:
                right.setdefault(prompt, []).append(row["correct"])
                given.setdefault(prompt, []).append(final_answer(records.final_text(row)))
        counts[name] = {prompt: [sum(hits), len(hits)] for prompt, hits in right.items()}
        wanted = {prompt: asked[prompt]["answer"] for prompt in right}
        curves[name] = pass_curve(counts[name], s.support_n)
        curves[f"{name}, guessing"] = guess_curve(given, wanted, s.support_n)
    found["pass@k"] = {name: means_of(curve) for name, curve in curves.items()}
    pairs = [(name, f"{name}, guessing") for name in stages] + [("teacher", "student")]
    for ones, others in pairs:
        gaps = {k: minus(values, curves[others][k]) for k, values in curves[ones].items()}
        found[f"{ones} - {others}, pass@k"] = means_of(gaps)
    found["right of all, by prompt"] = counts
    return found


def pass_curve(counts, most):
    """{k: {(prompt,): pass@k}} of {prompt: (right, all)}, for k = 1, 2, 4 ... and `most`."""
    return {
        k: {(name,): pass_at_k(n, right, k) for name, (right, n) in counts.items() if n >= k}
        for k in powers_up_to(most)
    }


def guess_curve(given, wanted, most):
    """{k: {(prompt,): chance that k guesses hold a right one}}, where a guess is the final
    answer of any response to another prompt, None and wrong where it has none.

    A floor for luck: such guesses know which answers the model likes, and nothing of the
    prompt.  given: {prompt: [final answer or None]}; wanted: {prompt: `answer`}."""
    counts = {prompt: Counter(answers) for prompt, answers in given.items()}
    total = sum(counts.values(), Counter())
    shares = {}
    for prompt, own in counts.items():
        others = total - own
        accepted = accepted_answers(wanted[prompt])
        hits = (
            count
            for answer, count in others.items()
            if answer is not None and any(equal(answer, each) for each in accepted)
        )
        shares[prompt] = sum(hits) / others.total() if others else None
    return {
        k: {(name,): 1 - (1 - x) ** k for name, x in shares.items() if x is not None}
        for k in powers_up_to(most)
    }


def means_of(curve):
    return {k: over_prompts(values) for k, values in curve.items()}


# ---- the picture


def draw_means(axes, i, places, rows, label):
    """Line `i` of a panel: means with 95 % intervals, one of `rows` a place."""
    axes.errorbar(
        places,
        [row["mean"] for row in rows],
        yerr=[row["half"] or 0 for row in rows],
        color=COLOURS[i],
        marker="os^"[i],
        capsize=3,
        label=label,
    )


def draw_positions(axes, part):
    """Gap to the teacher by position, of all answers and of the long ones."""
    for i, name in enumerate(("by_position", "by_position, long answers")):
        rows = part[name]
        label = ("all answers", f"of at least {LONG} tokens")[i]
        draw_means(axes, i, range(len(rows)), rows, label)
    rows = part["by_position"]
    axes.set_xticks(range(len(rows)), [row["low"] for row in rows])
    axes.set(xlabel="positions from this token on", ylabel="log mu - log p_T a token")
    axes.axhline(0, color="0.6", linewidth=1)
    axes.legend(frameon=False, fontsize=8)


def draw_aucs(axes, part):
    """AUC of every signal, the best on top."""
    known = {name: row for name, row in part["auc"].items() if row["mean"] is not None}
    order = sorted(known, key=lambda name: known[name]["mean"])
    axes.errorbar(
        [known[name]["mean"] for name in order],
        range(len(order)),
        xerr=[known[name]["half"] or 0 for name in order],
        color=COLOURS[0],
        fmt="o",
        capsize=3,
    )
    axes.axvline(0.5, color="0.6", linewidth=1)
    axes.set_yticks(range(len(order)), order)
    prompts = max((row["prompts"] for row in known.values()), default=0)
    axes.set(xlabel=f"AUC, right against wrong, {prompts} prompts", xlim=(0, 1))


def draw_places(axes, part):
    """How often the teacher ends right, by how much of an answer stands."""
    groups = {"of a right answer": "right", "of a wrong answer": "wrong", "of none": "start"}
    for i, (label, group) in enumerate(groups.items()):
        rows = part["teacher right"].get(group, {})
        draw_means(axes, i, [float(place) for place in rows], rows.values(), label)
    axes.set(xlabel="share of its blocks that stands", ylabel="teacher, going on, ends right")
    axes.set(ylim=(0, 1.05))
    axes.legend(frameon=False, fontsize=8)


def draw_drift(axes, part):
    """SOD's d by step, of the kinds of episodes that there are more than a few of."""
    labels = {"clean": "no call failed", "error": "the last call failed"}
    labels["recovered"] = "a call failed, the last did not"
    by_step = part["drift"]["by_step"]
    kinds = [kind for kind in labels if kind in by_step and by_step[kind][0]["count"] >= 8]
    draw_steps(axes, {labels[kind]: by_step[kind] for kind in kinds})


def draw_passes(axes, part):
    """pass@k of student and teacher with 95 % intervals, and of guessing (dashed)."""
    for i, name in enumerate(("student", "teacher")):
        curve = part["pass@k"][name]
        guessed = part["pass@k"][f"{name}, guessing"]
        ticks = [float(k) for k in curve]
        draw_means(axes, i, ticks, curve.values(), name)
        means = [math.nan if row["mean"] is None else row["mean"] for row in guessed.values()]
        axes.plot(ticks, means, "--", color=COLOURS[i], label=f"{name}, guessing")
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, list(curve))
    axes.set(xlabel="k answers", ylabel="pass@k", ylim=(0, 1.05))
    axes.legend(frameon=False, fontsize=8)


def figure(found):
    """The matplotlib figure of what signals.json has of `positions`, `continue`, `sod`,
    `outcome`, `ropd` and `support`; means and 95 % intervals over prompts, of `sod` over
    episodes.  None where there is none."""
    panels = {"positions": draw_positions, "continue": draw_places, "sod": draw_drift}
    panels |= {"outcome": draw_aucs, "ropd": draw_aucs, "support": draw_passes}
    panels = {name: draw for name, draw in panels.items() if name in found}
    if not panels:
        return None
    columns = min(2, len(panels))
    rows = math.ceil(len(panels) / columns)
    picture = new_picture(4.8 * columns, 3.6 * rows)
    for place, name in enumerate(panels, 1):
        axes = picture.add_subplot(rows, columns, place, title=name)
        panels[name](axes, found[name])
        tidy(axes)
    return picture


# ---- the command

PARTS = {
    "base": base,
    "positions": positions,
    "outcome": outcome,
    "ropd": ropd,
    "prefix": prefix,
    "continue": continued,
    "sod": sod,
    "saved": saved,
    "support": support,
}


def pair_of(run):
    """The Pair of a run's settings; under --smoke two models of running sums after a few steps,
    and a few problems."""
    s = run.settings
    if not run.smoke:
        return Pair(run, s.student, s.teacher, s.prompts)
    sizes = dict(train_prompts=6, eval_prompts=2, clean=64, mixed=8)
    run.once("worlds.sums", "world/toy", **sizes)
    for name in ("student", "teacher"):
        run.pretrain(f"world/toy/{name}", "world/toy/clean", f"world/{name}", steps=2)
    return Pair(run, *(str(run.world / x) for x in ("student", "teacher", "toy/train.jsonl")))


def main(argv=None):
    p = cli.parser(__doc__)
    p.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    p.add_argument("--out", required=True, help="folder for everything")
    p.add_argument("--smoke", action="store_true", help="a tiny run on untrained models")
    add_settings(p, Settings)
    args = p.parse_args(argv)
    run = Run(args.out, settings_of(args, Settings), list(PARTS), None, None, args.smoke)
    if "ropd" in args.parts and not (args.judge or args.smoke):
        raise BadInput(
            "--parts: ropd: expected --judge and --judge-url, for predicates know running sums "
            "alone; or name the other parts"
        )
    pair = pair_of(run)
    path = run.out / "signals.json"
    for name in (part for part in PARTS if part in args.parts):
        say(f"{name} ...")
        made = {"settings": dataclasses.asdict(run.settings), "versions": versions()}
        made = PARTS[name](pair) | made
        found = json.loads(path.read_text()) if path.exists() else {}
        found[name] = made
        disk.write_atomically(path, json.dumps(found, indent=1) + "\n")
        if picture := figure(found):
            picture.savefig(path.with_suffix(".png"))
    return {"out": str(path), "failed": pair.failed}


if __name__ == "__main__":
    cli.run(main)
