"""What the signals of the methods are worth on a real pair, before anybody trains.

    python -m experiments.real_signals --student FOLDER --teacher FOLDER --prompts P \\
        --judge NAME --judge-url http://localhost:8011/v1 --out runs/signals
    python -m experiments.real_signals ... --parts base positions   # some of the parts

One fixed set of the student's rollouts, and OUT/signals.json with an entry a part:

    base       the rollouts, who is right, log-probs of student and teacher
    positions  log mu - log p_T a token, whose mean is the reverse KL, by position, length of
               the answer, repetition and outcome
    ropd       does a signal tell right from wrong answers to one prompt?  AUC of rubric rewards
               (m = 1 and 4), holistic judge, log-probs, length; failures and flips of verdicts
    prefix     cuts of methods.prefix, and experiments.prefix_null
    continue   is the teacher's own continuation right more often from the cut than from half of
               what follows?  The same for rollouts without a cut, at places dealt from the
               others
    sod        the drift of episodes with a calculator; is the teacher, going on behind an
               error or a result of the same step, right, and does the drift tell?
    support    pass@1 to pass@N of student and teacher: who solves what the other never does

Every stage is issued as a command (OUT/commands.sh) and resumes: a run may take several
sittings.  Without --judge rubrics are mined from predicates and there is no holistic judge.

Simplifications: 1. intervals are t-intervals over prompts, each with the mean of its rollouts;
2. the teacher goes on at the end of a block and only before a final answer.
"""

import dataclasses
import json
from pathlib import Path

import numpy as np

from experiments.study import Run, add_settings, say, setting, settings_of, versions
from methods.sod.weights import measure_file, open_tables
from opd import files, records
from opd.answers import final_answer
from opd.policy import load_policy, load_tokenizer, resume_identity
from opd.sampling import ANSWER_STREAM, LocalSampler, Sampling, jobs_by_key
from opd.stats import auc, interval, repetition_ratio
from opd.tools import Toolbox


@dataclasses.dataclass(frozen=True)
class Settings:
    n: int = setting(8, "rollouts a prompt", smoke=4)
    max_tokens: int = setting(400, "longest answer", smoke=24)
    seed: int = setting(0, "of sampling")
    dtype: str = setting("float32", "of both models", choices=("float32", "bfloat16"))
    concurrency: int = setting(8, "requests to the judge at once")
    timeout: float = setting(3600.0, "seconds of silence of the judge that are a failure")
    teacher_n: int = setting(4, "reference answers a prompt")
    judged: int = setting(0, "prompts that are judged; 0: all of them")
    repeats: int = setting(2, "judgements of an answer: they say how often verdicts flip")
    goes_on: int = setting(2, "times the teacher goes on from a place", smoke=1)
    support_prompts: int = setting(24, "prompts of the part `support`", smoke=3)
    support_n: int = setting(64, "answers a prompt there", smoke=4)
    block_end: str = setting(r"""[.!?]["')]*\s+|\n+""", "regular expression that ends a block")


EDGES = (0, 4, 8, 16, 32, 64, 128, 256, 512, 1024)  # of positions in an answer

# ---- numbers


def over_prompts(values):
    """{"mean", "half", "prompts"} of {(prompt, ...): number or None}: half of the 95 %
    t-interval over prompts, each with the mean of its numbers."""
    groups = {}
    for key, value in values.items():
        if value is not None:
            groups.setdefault(key[0], []).append(value)
    if not groups:
        return {"mean": None, "half": None, "prompts": 0}
    mean, half = interval([np.mean(group) for group in groups.values()])
    return {"mean": mean, "half": half, "prompts": len(groups)}


def quartiles(values, places):
    """`over_prompts` of the values in each quarter of places {key: number}, with the bounds of
    the quarter."""
    bounds = np.quantile(list(places.values()), (0, 0.25, 0.5, 0.75, 1)).tolist()
    rows = []
    for low, high in zip(bounds, bounds[1:]):
        last = high == bounds[-1]
        some = {
            k: v
            for k, v in values.items()
            if low <= places[k] < high or last and places[k] == high
        }
        rows.append({"low": low, "high": high} | over_prompts(some))
    return rows


def within_prompts(values, right):
    """{(prompt,): AUC of a signal {key: number or None} for right answers}, None of a prompt
    without both kinds."""
    groups = {}
    for key, value in values.items():
        if value is not None:
            numbers, hits = groups.setdefault(key[:1], ([], []))
            numbers.append(value)
            hits.append(right[key])
    return {prompt: auc(*group) for prompt, group in groups.items()}


def less(a, b):
    """a - b, None where one is unknown."""
    return None if a is None or b is None else a - b


# ---- the fixed set


class Pair:
    """Student, teacher, prompts, and the folder with everything that is made of them."""

    def __init__(self, run, student, teacher, prompts, judge):
        """judge: {"model", "base_url"} of a judge, or {} without one."""
        self.run = run
        self.settings = run.settings
        self.student = student
        self.teacher = teacher
        self.prompts = prompts
        self.judge = judge

    def path(self, name):
        return str(self.run.out / name)

    def stage(self, command, out, **options):
        """What a stage that writes OUT/`out` returns; it makes only what is missing."""
        summary = self.run.stage(command, **options, out=self.path(out))
        if summary.get("failed"):
            say(f"{out}: {summary['failed']} records failed: run again to try them once more")
        return {name: x for name, x in summary.items() if name != "out"}

    def rows(self, name, kind):
        """{key: record} of a file of OUT."""
        found = files.read(self.path(name), kind)
        return {records.key_of(record, kind): record for record in found}

    def sampled(self, model, out, n, **options):
        s = self.settings
        options = {"prompts": self.prompts} | options
        how = dict(n=n, max_tokens=s.max_tokens, seed=s.seed, dtype=s.dtype)
        return self.stage("rollout.py", out, model=model, **options, **how)

    def scored(self, out, model, **options):
        how = dict(model=model, dtype=self.settings.dtype)
        return self.stage("teacher.py score", out, **how, **options)

    def asked(self):
        """{prompt id: record}"""
        return {str(p["id"]): p for p in files.read(self.prompts, "prompts")}

    def right(self):
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
    found = pair.sampled(pair.student, "rollouts.jsonl", pair.settings.n)
    on = {"rollouts": pair.path("rollouts.jsonl")}
    right = pair.stage("eval.py", "evals.jsonl", prompts=pair.prompts, **on)
    pair.scored("own.jsonl", pair.student, **on, top_k=4)
    pair.scored("scores.jsonl", pair.teacher, **on, top_k_of=pair.path("own.jsonl"))
    long = sum(len(gap) >= 150 for gap in pair.gaps().values())
    return {"rollouts": found, "evals": right, "rollouts of at least 150 tokens": long}


def positions(pair):
    gaps = pair.gaps()
    right = pair.right()
    rollouts = pair.rows("rollouts.jsonl", "rollouts")
    means = {key: float(gap.mean()) for key, gap in gaps.items() if len(gap)}
    by_position = []
    for low, high in zip(EDGES, EDGES[1:]):
        some = {key: gap[low:high].mean() for key, gap in gaps.items() if len(gap) > low}
        if some:
            by_position.append({"low": low, "high": high} | over_prompts(some))
    repetition = {key: repetition_ratio(rollouts[key]["text"], 256) for key in means}
    return {
        "all": over_prompts(means),
        "by_position": by_position,
        "by_length": quartiles(means, {key: len(gaps[key]) for key in means}),
        "by_repetition": quartiles(means, repetition),
        "right": over_prompts({key: x for key, x in means.items() if right[key]}),
        "wrong": over_prompts({key: x for key, x in means.items() if not right[key]}),
    }


# ---- ROPD: which signal knows a right answer?


def graded(pair, asked):
    """({signal: its rewards file}, {signal: summaries of the stages}): rubrics of one and of
    four reference answers, and the holistic judge."""
    s = pair.settings
    judge = asked | pair.judge
    if pair.judge:
        judge |= {"cache": pair.path("judge.jsonl"), "concurrency": s.concurrency}
        judge |= {"timeout": s.timeout}
    answers = {"answers": pair.path("answers.jsonl")}
    create = {"rubricator": "llm" if pair.judge else "contrast"}
    grade = {"grader": "judge", "repeats": s.repeats} if pair.judge else {"grader": "check"}
    paths = {}
    told = {}
    for m in (1, 4):
        name = f"rubric, m = {m}"
        rubrics, paths[name] = f"rubrics{m}.jsonl", f"rewards{m}.jsonl"
        made = pair.stage("rubric.py create", rubrics, **judge, **answers, **create, m=m)
        more = answers | grade | {"rubrics": pair.path(rubrics)}
        told[name] = {
            "create": made,
            "grade": pair.stage("rubric.py grade", paths[name], **judge, **more),
        }
    if pair.judge:
        name, paths["holistic judge"] = "holistic judge", "holistic.jsonl"
        told[name] = {
            "grade": pair.stage("rubric.py grade", paths[name], **judge, grader="scalar")
        }
    return paths, told


def ropd(pair):
    s = pair.settings
    rollouts = pair.rows("rollouts.jsonl", "rollouts")
    prompts = list(dict.fromkeys(key[0] for key in rollouts))[: s.judged or None]
    judged = {key: r for key, r in rollouts.items() if key[0] in set(prompts)}
    pair.run.write("judged.jsonl", f"rollouts of {len(prompts)} prompts", judged.values())
    asked = {"prompts": pair.prompts, "rollouts": pair.path("judged.jsonl")}
    # of every prompt: more judged prompts must not change its answers
    taught = dict(model=pair.teacher, max_tokens=s.max_tokens, seed=s.seed, dtype=s.dtype)
    pair.stage(
        "teacher.py answer", "answers.jsonl", prompts=pair.prompts, n=s.teacher_n, **taught
    )
    paths, told = graded(pair, asked)
    scores = pair.rows("scores.jsonl", "scores")
    signals = {
        "teacher log-prob": {k: float(np.mean(scores[k]["logprobs"])) for k in judged},
        "sampler log-prob": {k: float(np.mean(r["logprobs"])) for k, r in judged.items()},
        "shorter": {k: -len(r["response_ids"]) for k, r in judged.items()},
    }
    for name, path in paths.items():
        signals[name] = {k: r["reward"] for k, r in pair.rows(path, "rewards").items()}
    right = pair.right()
    aucs = {name: within_prompts(values, right) for name, values in signals.items()}
    level = aucs["teacher log-prob"]
    found = {}
    for name, values in aucs.items():
        above = {prompt: less(x, level.get(prompt)) for prompt, x in values.items()}
        found[name] = over_prompts(values) | {"above teacher log-prob": over_prompts(above)}
    return {"auc": found, "stages": told}


# ---- prefix


def prefix(pair):
    on = {"rollouts": pair.path("rollouts.jsonl"), "scores": pair.path("scores.jsonl")}
    on |= {"model": pair.student, "block_end": pair.settings.block_end}
    cuts = {}
    for name, guard in (("faithful", False), ("guarded", True)):
        cuts[name] = pair.stage("methods.prefix weigh", f"cuts_{name}.jsonl", **on, guard=guard)
    path = pair.path("null.json")
    if not Path(path).exists():
        pair.run.stage("experiments.prefix_null", **on, seed=pair.settings.seed, out=path)
    return {"cuts": cuts, "null": json.loads(Path(path).read_text())}


def two_places(spans, blocks):
    """{place: tokens}: so many blocks, and with them half of the others; {} where nothing would
    be left to write."""
    later = blocks + (len(spans) - blocks) // 2
    if not 0 < blocks < later < len(spans):
        return {}
    return {"cut": spans[blocks - 1][1], "later": spans[later - 1][1]}


def go_on(pair, name, begun, tools=None):
    """{beginning: [whether an answer is right that the teacher ends from there]}.  begun:
    {beginning: (prompts record, ids of the prompt and of what stands)}; files NAME*.jsonl."""
    s = pair.settings
    rows = {key: prompt | {"id": key} for key, (prompt, _) in begun.items()}
    pair.run.write(f"{name}_prompts.jsonl", "prompts of what is gone on with", rows.values())
    asked = {"prompts": pair.path(f"{name}_prompts.jsonl")}
    policy = load_policy(pair.teacher, s.dtype)
    sampling = Sampling(max_tokens=s.max_tokens, seed=s.seed + ANSWER_STREAM)
    sampler = LocalSampler(policy, sampling, Toolbox(tools) if tools else None)
    sampler.begun = {key: ids for key, (_, ids) in begun.items()}
    jobs = jobs_by_key(rows.values(), s.goes_on)
    how = {"policy": resume_identity(policy.identity), "from": sorted(begun)}
    out = pair.path(f"{name}.jsonl")

    def work(missing):
        return sampler([jobs[key] for key in missing])

    files.fill(out, "rollouts", jobs, work, how, asked.values())
    pair.stage("eval.py", f"{name}_evals.jsonl", rollouts=out, **asked)
    hits = {}
    for (key, _), row in pair.rows(f"{name}_evals.jsonl", "evals").items():
        hits.setdefault(key, []).append(row["correct"])
    return hits


def beginnings(pair):
    """{(rollout's key, group, place): ids so far}: of cut rollouts, and of others at the share
    of one of these; two places of a rollout."""
    rng = np.random.default_rng(pair.settings.seed)
    tokenizer = load_tokenizer(pair.student)
    rollouts = pair.rows("rollouts.jsonl", "rollouts")
    weights = pair.rows("cuts_faithful.jsonl", "weights")
    shares = [w["cut"] / len(w["blocks"]) for w in weights.values() if w["cut"]]
    found = {}
    for key, w in weights.items():
        r = rollouts[key]
        blocks = w["cut"] or round(rng.choice(shares or [0]) * len(w["blocks"]))
        parts = {
            p: r["response_ids"][:end] for p, end in two_places(w["blocks"], blocks).items()
        }
        if any(final_answer(tokenizer.decode(ids)) for ids in parts.values()):
            continue
        for place, ids in parts.items():
            found[key, "cut" if w["cut"] else "uncut", place] = r["prompt_ids"] + ids
    return found


def goes_on(pair):
    prompts = pair.asked()
    ids = beginnings(pair)
    names = {of: f"{of[0][0]}~{of[0][1]}~{of[2]}" for of in ids}
    if not ids:
        return {"rollouts": 0}
    begun = {names[of]: (prompts[of[0][0]], ids[of]) for of in ids}
    hits = go_on(pair, "went_on", begun)
    rates = {of: float(np.mean(hits[name])) for of, name in names.items()}
    found = {}
    for group in ("cut", "uncut"):
        at = {
            place: {of[0]: rate for of, rate in rates.items() if of[1:] == (group, place)}
            for place in ("cut", "later")
        }
        lost = {key: rate - at["later"][key] for key, rate in at["cut"].items()}
        found[group] = {place: over_prompts(values) for place, values in at.items()}
        found[group] |= {"rollouts": len(lost), "cut - later": over_prompts(lost)}
    return found


# ---- SOD: steps with a calculator


def steps_of_calls(pair):
    """[(rollout, k, its call had a result, d of step k, d of the next step)] for every call
    that the student went on from."""
    tables = open_tables(pair.path("episodes.jsonl"), pair.path("episode_scores.jsonl"), None)
    drifts = measure_file(*tables)
    for rollout in tables[0]:
        d = drifts[records.key_of(rollout, "rollouts")].d
        for k, (_, _, ok) in enumerate(rollout.get("steps", ())[:-1]):
            yield rollout, k, ok, d[k], d[k + 1]


def sod(pair):
    tools = "calculator"
    made = pair.sampled(pair.student, "episodes.jsonl", pair.settings.n, tools=tools)
    on = {"rollouts": pair.path("episodes.jsonl")}
    right = pair.stage("eval.py", "episode_evals.jsonl", prompts=pair.prompts, **on)
    pair.scored("episode_scores.jsonl", pair.teacher, **on)
    scores = {"scores": pair.path("episode_scores.jsonl")}
    pair.stage("experiments.sod_drift", "drift.json", **on, **scores, overwrite=True)
    found = {"rollouts": made, "evals": right}
    found["drift"] = json.loads(Path(pair.path("drift.json")).read_text())
    calls = list(steps_of_calls(pair))
    late = {k for _, k, ok, *_ in calls if ok is False}
    calls = {
        f"{r['id']}~{r['sample']}~{k}": (r, k, ok, *d) for r, k, ok, *d in calls if k in late
    }
    if not calls:
        return found | {"errors that were gone on from": 0}
    prompts = pair.asked()
    begun = {}
    for name, (r, k, *_) in calls.items():
        ids = r["prompt_ids"] + r["response_ids"][: r["steps"][k + 1][0]]
        begun[name] = (prompts[str(r["id"])], ids)
    hits = go_on(pair, "saved", begun, tools)
    for kind, wanted in (("after an error", False), ("after a result", True)):
        some = {name: call for name, call in calls.items() if call[2] is wanted}
        rates = {
            (str(c[0]["id"]), name): float(np.mean(hits[name])) for name, c in some.items()
        }
        told = {"calls": len(some), "teacher right": over_prompts(rates)}
        for field, at in (("d of the step", 3), ("d of the next step", 4)):
            known = [
                (c[at], np.mean(hits[n]) > 0.5) for n, c in some.items() if np.isfinite(c[at])
            ]
            told[f"AUC of a small {field}"] = (
                auc([-d for d, _ in known], [x for _, x in known]) if known else None
            )
        found[kind] = told
    return found


# ---- support


def support(pair):
    s = pair.settings
    found = {}
    solved = {}
    for name, model in (("student", pair.student), ("teacher", pair.teacher)):
        some = {"slice": f"0:{s.support_prompts}"}
        made = pair.sampled(model, f"many_{name}.jsonl", s.support_n, **some)
        on = {"rollouts": pair.path(f"many_{name}.jsonl"), "prompts": pair.prompts} | some
        right = pair.stage("eval.py", f"many_{name}_evals.jsonl", **on)
        found[name] = {"rollouts": made, "evals": right}
        solved[name] = {}
        for key, row in pair.rows(f"many_{name}_evals.jsonl", "evals").items():
            solved[name][key[0]] = solved[name].get(key[0], False) or row["correct"]
    pairs = [(hit, solved["teacher"][prompt]) for prompt, hit in solved["student"].items()]
    kinds = {"both": (True, True), "student alone": (True, False)}
    kinds |= {"teacher alone": (False, True), "neither": (False, False)}
    return found | {
        "prompts solved by": {name: pairs.count(kind) for name, kind in kinds.items()}
    }


# ---- the command

PARTS = {
    "base": base,
    "positions": positions,
    "ropd": ropd,
    "prefix": prefix,
    "continue": goes_on,
    "sod": sod,
    "support": support,
}


def smoke_pair(run):
    """Two models of running sums after a few steps, and a few problems."""
    sizes = dict(train_prompts=6, eval_prompts=2, clean=64, mixed=8)
    run.once("worlds.sums", "world/toy", **sizes)
    for name in ("student", "teacher"):
        run.pretrain(f"world/toy/{name}", "world/toy/clean", f"world/{name}", steps=2)
    return Pair(
        run, *(str(run.world / x) for x in ("student", "teacher", "toy/train.jsonl")), {}
    )


def main(argv=None):
    p = files.parser(__doc__)
    p.add_argument("--student", help="folder or Hugging Face id")
    p.add_argument("--teacher", help="of the same vocabulary")
    p.add_argument("--prompts", help="JSONL of prompts with answers, as real_tasks makes them")
    p.add_argument(
        "--judge", help="name of a served model: rubricator, verifier, holistic judge"
    )
    p.add_argument("--judge-url", help="its OpenAI-compatible server")
    p.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    p.add_argument("--out", required=True, help="folder for everything")
    p.add_argument("--smoke", action="store_true", help="a tiny run on untrained models")
    add_settings(p, Settings)
    args = p.parse_args(argv)
    if not args.smoke and not (args.student and args.teacher and args.prompts):
        p.error("expected --student, --teacher and --prompts (or --smoke)")
    if bool(args.judge) != bool(args.judge_url):
        p.error("--judge and --judge-url: expected both or neither")
    run = Run(args.out, settings_of(args, Settings), list(PARTS), None, None, args.smoke)
    judge = {"model": args.judge, "base_url": args.judge_url} if args.judge else {}
    pair = Pair(run, args.student, args.teacher, args.prompts, judge)
    if args.smoke:
        pair = smoke_pair(run)
    path = run.out / "signals.json"
    for name in args.parts:
        found = json.loads(path.read_text()) if path.exists() else {}
        say(f"{name} ...")
        made = {"settings": dataclasses.asdict(run.settings), "versions": versions()}
        found[name] = PARTS[name](pair) | made
        files.write_atomically(path, json.dumps(found, indent=1) + "\n")
    return {"out": str(path)}


if __name__ == "__main__":
    files.run(main)
