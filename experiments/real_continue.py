"""Parts `continue`, `sod` and `saved` of experiments.real_signals: the teacher goes on from
what the student wrote.  `pair`: its Pair, with the files of the parts before.

A continuation is sampled after the very ids of prompt and beginning, and graded together with
it.  Files: OUT/continued*.jsonl, OUT/saved*.jsonl."""

import dataclasses
import json

import numpy as np

from experiments.by_prompt import auc_within, difference, minus, over_prompts
from experiments.real_tasks import INSTRUCTION
from methods.sod.weights import measure_file, open_tables
from opd import files, records
from opd.answers import final_answer, is_correct
from opd.policy import load_policy, load_tokenizer, resume_identity
from opd.sampling import ANSWER_STREAM, LocalSampler, Sampling, jobs_by_key
from opd.tools import Toolbox
from rollout import summarise

# ---- places, and what the teacher makes of them


def two_places(spans, blocks):
    """{"cut": tokens of the first `blocks` blocks, "later": of these and half of the others};
    {} where nothing would be left to write."""
    later = blocks + (len(spans) - blocks) // 2
    if not 0 < blocks < later < len(spans):
        return {}
    return {"cut": spans[blocks - 1][1], "later": spans[later - 1][1]}


def quarters_of(spans):
    """{share: tokens of the blocks before it}, at a quarter, half and three quarters of at
    least 4 blocks; else {}."""
    n = len(spans)
    return {x: spans[round(x * n) - 1][1] for x in (0.25, 0.5, 0.75)} if n >= 4 else {}


def beginnings(pair):
    """{(rollout's key, group, place): tokens of its response that stand}, all before its final
    answer.  Groups: "start", place 0, once a prompt; "wrong" and "right", quarters of a
    prompt's first such rollout (of 4 blocks, without a final answer before the last place);
    "cut", the cut and a later place of every rollout with one."""
    tokenizer = load_tokenizer(pair.student)
    rollouts = pair.rows("rollouts.jsonl", "rollouts")
    correct = pair.correct()
    taken = set()  # (prompt, group) that have theirs
    found = {}
    for key, w in pair.rows("cuts_faithful.jsonl", "weights").items():
        ids = rollouts[key]["response_ids"]
        outcome = "right" if correct[key] else "wrong"
        groups = {"start": {0: 0}, outcome: quarters_of(w["blocks"])}
        groups = {g: places for g, places in groups.items() if (key[0], g) not in taken}
        if w["cut"]:
            groups["cut"] = two_places(w["blocks"], w["cut"])
        for group, places in groups.items():
            if any(final_answer(tokenizer.decode(ids[:end])) for end in places.values()):
                continue
            found |= {(key, group, place): end for place, end in places.items()}
            if places:
                taken.add((key[0], group))
    return found


def continue_from(pair, name, begun, toolbox=None):
    """{name of a beginning: [whether what the teacher makes of it is right]}.  begun: {name:
    (prompts record, rollout, tokens of its response that stand)}; files NAME*.jsonl."""
    s = pair.settings
    rows = {key: prompt | {"id": key} for key, (prompt, _, _) in begun.items()}
    pair.run.write(f"{name}_prompts.jsonl", "prompts of what is continued", rows.values())
    policy = load_policy(pair.teacher, s.dtype)
    sampling = Sampling(max_tokens=s.max_tokens, seed=s.seed + ANSWER_STREAM)
    sampler = LocalSampler(policy, sampling, toolbox)
    # in place of a rendered prompt; `fill_with` would read these from the file
    sampler.begun = {
        key: r["prompt_ids"] + r["response_ids"][:end] for key, (_, r, end) in begun.items()
    }
    jobs = jobs_by_key(rows.values(), s.continuations)
    ends = {key: end for key, (_, _, end) in sorted(begun.items())}
    how = {"policy": resume_identity(policy.identity), "from": ends}
    how |= {"tools": toolbox and toolbox.settings}
    how |= {"max_tokens": s.max_tokens, "seed": sampling.seed}
    out, inputs = pair.path(f"{name}.jsonl"), [pair.path(f"{name}_prompts.jsonl")]

    def work(missing):
        return sampler([jobs[key] for key in missing])

    files.fill(out, "rollouts", jobs, work, how, inputs)
    hits = {}
    for answer in files.read(out, "rollouts"):
        if answer["sample"] >= s.continuations:
            continue  # of an earlier run with more of them
        prompt, r, end = begun[answer["id"]]
        text = records.final_text(answer)
        if not toolbox:  # the beginning may hold the words before the answer
            text = policy.tokenizer.decode(r["response_ids"][:end]) + text
        hits.setdefault(answer["id"], []).append(is_correct(text, prompt["answer"]))
    return hits


def continued(pair):
    prompts = pair.read_prompts()
    rollouts = pair.rows("rollouts.jsonl", "rollouts")
    places = beginnings(pair)
    names = {of: f"{of[0][0]}~{of[0][1]}~{of[2]}" for of in places}
    begun = {names[of]: (prompts[of[0][0]], rollouts[of[0]], end) for of, end in places.items()}
    hits = continue_from(pair, "continued", begun)
    return by_place(places, {of: hits[name] for of, name in names.items()}) | {
        "AUC among places": predictors(pair, places, hits, names)
    }


def by_place(places, hits):
    """How often the teacher ends right by group and place, with the mean of the tokens that
    stood; what places of one prompt or rollout differ by.  places, hits: {(rollout's key,
    group, place): tokens that stood, [whether right]}."""
    found = {}
    rates = {}
    for (key, group, place), each in hits.items():
        rates.setdefault((group, place), {})[key] = float(np.mean(each))
    for (group, place), values in sorted(rates.items(), key=str):
        stood = [end for of, end in places.items() if of[1:] == (group, place)]
        row = {"rollouts": len(values), "tokens": float(np.mean(stood))}
        found.setdefault(group, {})[str(place)] = row | over_prompts(values)
    apart = {}
    for place in (0.25, 0.5, 0.75):
        ones, others = (rates.get((group, place), {}) for group in ("right", "wrong"))
        apart[f"right - wrong, at {place}"] = difference(ones, others)
        for group, others in (("right", ones), ("wrong", others)):
            lost = difference(rates.get(("start", 0), {}), others)
            apart[f"start - {place} of a {group} answer"] = lost
    both = (rates.get(("cut", place), {}) for place in ("cut", "later"))
    apart["cut - later"] = over_prompts(minus(*both))
    return {"teacher right": found, "differences": apart}


def predictors(pair, places, hits, names):
    """{what is known of a place: its AUC for the teacher ending right, among the places of all
    answers to a prompt (mostly: of a right answer or a wrong one) and among those of one
    answer}."""
    gaps = pair.gaps()
    weights = pair.rows("cuts_faithful.jsonl", "weights")
    right = {}
    signals = {"margin of the block before": {}, "small gap so far": {}, "early place": {}}
    for (key, group, place), end in places.items():
        if group not in ("wrong", "right"):
            continue
        w = weights[key]
        block = [stop for _, stop in w["blocks"]].index(end)
        values = w["signal"][block], -float(np.mean(gaps[key][:end])), -end
        for i, hit in enumerate(hits[names[key, group, place]]):
            of = (key[0], key[1], place, i)
            right[of] = hit
            for signal, value in zip(signals.values(), values):
                signal[of] = value
    return {
        name: {"of a prompt": auc_within(x, right, 1), "of an answer": auc_within(x, right, 2)}
        for name, x in signals.items()
    }


# ---- SOD: steps with a calculator

TOOLS = "calculator"
CALLS = {"call_format": "json", "max_calls": 4}


def worked_example():
    """Messages that solve an equation by two calls: a small model that has only been told of a
    tool seldom calls it, or calls it until it is cut."""

    def calling(expression):
        call = json.dumps({"name": TOOLS, "arguments": {"expression": expression}})
        return {"role": "assistant", "content": call}

    question = "Determine the value of x that satisfies: 6*x + 3 = 45"
    return [
        {"role": "user", "content": f"{question}\n\n{INSTRUCTION}"},
        calling("45 - 3"),
        {"role": "tool", "content": "42"},
        calling("42 / 6"),
        {"role": "tool", "content": "7"},
        {"role": "assistant", "content": r"\boxed{7}"},
    ]


@dataclasses.dataclass(frozen=True)
class Call:
    """A call that the student went on from."""

    rollout: dict
    step: int  # from 0
    ok: bool  # it had a result
    d: float  # drift of its step, nats; NaN where no token of it counts
    d_next: float  # of the step after it

    @property
    def place(self):
        return str(self.rollout["id"]), self.step


def calls_of(pair):
    tables = open_tables(pair.path("episodes.jsonl"), pair.path("episode_scores.jsonl"), None)
    drifts = measure_file(*tables)
    for rollout in tables[0]:
        d = drifts[records.key_of(rollout, "rollouts")].d
        for k, (_, _, ok) in enumerate(rollout.get("steps", ())[:-1]):
            yield Call(rollout, k, ok, d[k], d[k + 1])


def sod(pair):
    prompts = list(pair.read_prompts().values())[: pair.settings.tool_prompts]
    prompts = [p | {"messages": worked_example() + p["messages"]} for p in prompts]
    shown = pair.path("episode_prompts.jsonl")
    pair.run.write("episode_prompts.jsonl", "a worked example before each", prompts)
    how = dict(tools=TOOLS, tool_options=CALLS, prompts=shown, batch_tokens=65536)
    made = pair.sample("rollout.py", pair.student, "episodes.jsonl", pair.settings.n, **how)
    on = {"rollouts": pair.path("episodes.jsonl")}
    evals = pair.stage("eval.py", "episode_evals.jsonl", prompts=shown, **on)
    pair.score("episode_scores.jsonl", pair.teacher, **on, allow_template_mismatch=True)
    scores = {"scores": pair.path("episode_scores.jsonl")}
    drift = pair.stage("experiments.sod_drift", "drift.json", **on, **scores, overwrite=True)
    found = {"rollouts": made, "evals": evals, "drift": drift}
    return found | drift_after(calls_of(pair))


def saved(pair):
    calls = matched(calls_of(pair))
    if not calls:
        return {}
    shown = pair.path("episode_prompts.jsonl")
    asked = {str(p["id"]): p for p in files.read(shown, "prompts")}
    toolbox = Toolbox(TOOLS, CALLS["call_format"], CALLS["max_calls"])
    begun = {}
    for name, call in calls.items():
        end = call.rollout["steps"][call.step + 1][0]  # with the tool's output
        begun[name] = asked[call.place[0]], call.rollout, end
    found = after_calls(calls, continue_from(pair, "saved", begun, toolbox))
    lengths, use = summarise(pair.path("saved.jsonl"))
    return found | {"continuations": lengths | use}


def drift_after(calls):
    """By how much more the next step drifts after a failed call than after a result at the same
    step of the same prompt, and by how much more the drift has changed."""
    after = {True: {}, False: {}}
    change = {True: {}, False: {}}
    for i, call in enumerate(calls):
        if np.isfinite(call.d + call.d_next):
            after[call.ok][(*call.place, i)] = call.d_next
            change[call.ok][(*call.place, i)] = call.d_next - call.d
    return {
        "failed call - result, same step": {
            "d of the next step": difference(after[False], after[True], depth=2),
            "change of d": difference(change[False], change[True], depth=2),
        }
    }


def matched(calls, most=1):
    """{name: Call}: at every step of a prompt where some failed and some did not, up to so many
    of either."""
    groups = {}
    for call in calls:
        groups.setdefault(call.place, {True: [], False: []})[call.ok].append(call)
    return {
        f"{prompt}~{call.rollout['sample']}~{step}": call
        for (prompt, step), kinds in groups.items()
        if kinds[True] and kinds[False]
        for some in kinds.values()
        for call in some[:most]
    }


def after_calls(calls, hits):
    """How often the teacher ends right after failed calls and after results, and what tells
    when: AUCs among the calls of a prompt.  calls {name: Call};  hits {name: [whether it ended
    right]}."""
    rates = {True: {}, False: {}}
    right = {}
    signals = {"call had a result": {}, "early step": {}}
    signals |= {"small d": {}, "small d of the next step": {}}
    for name, call in calls.items():
        rates[call.ok][(*call.place, name)] = float(np.mean(hits[name]))
        values = call.ok, -call.step, -call.d, -call.d_next
        for i, hit in enumerate(hits[name]):
            of = (*call.place, name, i)
            right[of] = hit
            for signal, value in zip(signals.values(), values):
                if np.isfinite(value):
                    signal[of] = value
    found = {}
    for kind, ok in (("after a failed call", False), ("after a result", True)):
        row = {"calls": len(rates[ok]), "teacher right": over_prompts(rates[ok])}
        found[kind] = row
    found["result - failed call, same step"] = difference(rates[True], rates[False], depth=2)
    aucs = {name: auc_within(x, right, 1) for name, x in signals.items()}
    return found | {"AUC among calls of a prompt": aucs}
