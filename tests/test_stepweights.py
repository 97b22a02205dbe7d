"""SOD (arXiv 2605.07725): step weights, their controls, what they do to a gradient, and the
drift that they answer."""

import json

import numpy as np
import pytest
import torch
from conftest import (
    argv,
    by_key,
    dump,
    load,
    naive_logps,
    naive_model,
    same_bits,
    weights,
)
from hypothesis import given, settings
from hypothesis import strategies as st

import teacher
import train
from experiments import sod_controls, sod_drift
from methods.rows import METHODS
from methods.sod import __main__ as sod_command
from methods.sod import weights as stepweights
from opd import loss as losses
from opd import policy as policies
from opd import records
from opd.records import BadInput

# ---- the weights


@settings(max_examples=300, deadline=None)
@given(st.lists(st.floats(0, 5), min_size=1, max_size=12), st.floats(0, 1))
def test_the_telescoped_form_is_the_papers_product(d, delta):
    product = 1.0
    expected = [1.0]
    for before, after in zip(d, d[1:]):
        product *= (before + 1e-6) / (after + 1e-6)
        # the bound is put on the result, never on the running product
        expected.append(min(product, 1 + delta))
    assert stepweights.step_weights(d, delta=delta) == pytest.approx(expected, rel=1e-6)


def test_a_divergence_is_the_mean_over_a_steps_loss_tokens():
    own = [-1, -2, 0, 0, -3, -1]
    theirs = [-2, -2, -9, -9, -1, -1]
    steps = [[0, 2, True], [2, 4, True], [4, 6, None]]
    d = stepweights.divergences(own, theirs, [1, 1, 0, 0, 0, 1], steps)
    assert d == pytest.approx([0.5, np.nan, 0.0], nan_ok=True)
    assert stepweights.steps_or_whole({"response_ids": own}) == [[0, 6, None]]


# ---- the commands


def weighed(run, path, rule="sod", **flags):
    flags = dict(rollouts=run.rollouts, scores=run.scores, out=path) | flags
    if rule == "sod":
        sod_command.main(argv("weigh", **flags))
    else:
        sod_controls.main(argv(rule=rule, **flags))
    return by_key(load(path))


@pytest.fixture(scope="module")
def measured(agents):
    """{key: (rollout, d [K], loss tokens [K])} from plain transformers in float64."""
    student = naive_model(agents.student)
    theirs = naive_model(agents.teacher)
    found = {}
    for key, r in by_key(load(agents.rollouts)).items():
        with torch.no_grad():
            own = naive_logps(student, r["prompt_ids"], r["response_ids"])
            gap = own - naive_logps(theirs, r["prompt_ids"], r["response_ids"])
        gap = gap.gather(1, torch.tensor(r["response_ids"])[:, None])[:, 0].abs()
        d = [float(gap[a:b].mean()) for a, b, _ in r["steps"]]
        found[key] = r, d, [b - a for a, b, _ in r["steps"]]
    return found


def steps_after_mistake(rollout):
    failed = [not c["ok"] and not c.get("outage") for c in rollout["calls"]] + [False]
    first = failed.index(True) if any(failed) else len(failed)
    return [max(0, k - first) for k in range(len(rollout["steps"]))]


def weights_by_hand(measured):
    """{rule: {key: w [K]}} by the definitions; shuffled is left out."""
    d = {key: np.array(x) for key, (_, x, _) in measured.items()}
    sizes = {key: n for key, (_, _, n) in measured.items()}
    sod = {key: np.minimum(x[0] / x, 1.2) for key, x in d.items()}
    mean = sum(sod[k] @ sizes[k] for k in d) / sum(map(sum, sizes.values()))
    terms = {key: d[key] * sizes[key] for key in d}
    left = sum(sod[k] @ terms[k] for k in d) / sum(map(sum, terms.values()))
    first = np.mean([x[0] for x in d.values()])
    after = {key: np.array(steps_after_mistake(r)) for key, (r, _, _) in measured.items()}
    return {
        "sod": sod,
        "uniform": {key: x**0 for key, x in d.items()},
        "no-cap": {key: x[0] / x for key, x in d.items()},
        "mask": {key: (a == 0) * 1.0 for key, a in after.items()},
        "decay": {key: 0.9**a for key, a in after.items()},
        "mean": {key: mean * x**0 for key, x in d.items()},
        "amount": {key: left * x**0 for key, x in d.items()},
        "batch": {key: np.minimum(first / x, 1.2) for key, x in d.items()},
    }


@pytest.mark.parametrize("rule", sod_drift.RULES)
def test_weights_of_a_file_by_hand(agents, measured, tmp_path, rule):
    expected = weights_by_hand(measured)
    got = weighed(agents, tmp_path / "w.jsonl", rule)
    moved = []
    for key, (r, d, _) in measured.items():
        w = got[key]["w"]
        assert got[key]["d"] == pytest.approx(d, abs=1e-4)
        if rule == "shuffled":
            assert sorted(w) == pytest.approx(sorted(expected["sod"][key]), rel=2e-3)
            moved.append(w != pytest.approx(expected["sod"][key], rel=2e-3))
        else:
            assert w == pytest.approx(expected[rule][key], rel=2e-3)
        tokens = np.zeros(len(r["response_ids"]))
        for (start, end, _), step_weight in zip(r["steps"], w):
            tokens[start:end] = step_weight
        assert got[key]["weights"] == pytest.approx(tokens)
    assert rule != "shuffled" or sum(moved) > 5


def test_a_teacher_that_is_the_student_has_no_drift(agents, tmp_path):
    own = tmp_path / "own.jsonl"
    teacher.main(argv("score", model=agents.student, rollouts=agents.rollouts, out=own))
    rows = weighed(agents, tmp_path / "w.jsonl", scores=own, own_scores=own)
    assert all(set(r["d"]) == {0} and set(r["w"]) == {1} for r in rows.values())


# ---- the row


def trained(agents, out, method="sod", **flags):
    paths = dict(model=agents.student, rollouts=agents.rollouts, rewards=agents.rewards)
    paths |= dict(scores=agents.scores, out=out)
    train.main(argv(method=method, learning_rate=1e-3, **paths | flags))
    return weights(out)


def test_weights_of_one_are_grpo_plus_opd_bit_for_bit(agents, tmp_path):
    got = {}
    for rule in ("uniform", "sod"):
        path = tmp_path / f"{rule}.jsonl"
        weighed(agents, path, rule)
        got[rule] = trained(agents, tmp_path / rule, token_weights=path, batch_size=4)
    assert same_bits(got["uniform"], trained(agents, tmp_path / "b", "opd-grpo", batch_size=4))
    assert not same_bits(got["uniform"], got["sod"])


def test_tools_text_has_no_gradient_and_counts_nowhere(agents, tmp_path):
    """Other scores and weights of a tool's tokens change no bit of the new weights; those of
    sampled tokens do."""
    own = tmp_path / "w.jsonl"
    rows = weighed(agents, own).values()
    rollouts = by_key(load(agents.rollouts))
    masks = {key: r["loss_mask"] for key, r in rollouts.items()}
    assert sum(mask.count(0) for mask in masks.values()) > 100

    def changed(field, shift, where):
        moved = []
        for r in rows if field == "weights" else load(agents.scores):
            mask = masks[r["id"], r["sample"]]
            values = [x + shift * (m == where) for x, m in zip(r[field], mask)]
            moved.append(r | {field: values})
        return dump(tmp_path / f"{field}{where}.jsonl", moved)

    plain = trained(agents, tmp_path / "plain", token_weights=own)
    metrics = load(tmp_path / "plain" / "metrics.jsonl")[-1]
    assert metrics["train/tokens"] == sum(map(sum, masks.values()))
    assert metrics["rollout/calls"] == np.mean([len(r["calls"]) for r in rollouts.values()])
    other = changed("logprobs", -3.0, where=0)
    heavy = changed("weights", 5.0, where=0)
    assert same_bits(
        plain, trained(agents, tmp_path / "tool", scores=other, token_weights=heavy)
    )
    other = changed("logprobs", -3.0, where=1)
    assert not same_bits(
        plain, trained(agents, tmp_path / "own", scores=other, token_weights=own)
    )


# ---- drift


def episode(name, sample, calls, d, gaps):
    """(rollout, score) of an episode whose calls end as said (True, False, "outage") and whose
    drifts are d; gaps: tokens between the steps."""
    steps = []
    at = 0
    for call, gap in zip([*calls, None], [*gaps, 0]):
        steps.append([at, at + 2, False if call == "outage" else call])
        at += 2 + gap
    length = steps[-1][1]
    mask = [int(any(a <= t < b for a, b, _ in steps)) for t in range(length)]
    rollout = {
        "id": name,
        "sample": sample,
        "policy": {"model": "m", "weights": "w"},
        "text": "x",
        "finish_reason": "stop",
        "prompt_ids": [1],
        "response_ids": [2] * length,
        "loss_mask": mask,
        "logprobs": [-1.0 * m for m in mask],
        "temperature": 1,
        "top_p": 1,
        "steps": steps,
        "final": "x",
        "calls": [{"output": "", "ok": c is True, "outage": c == "outage"} for c in calls],
    }
    logprobs = [-5.0] * length
    for (a, b, _), x in zip(steps, d):
        logprobs[a:b] = [-1.0 - x] * (b - a)
    score = {
        "id": name,
        "sample": sample,
        "policy": {"model": "t", "weights": "t"},
        "rollout": records.fingerprint(rollout),
        "logprobs": logprobs,
    }
    return rollout, score


def drift_of(tmp_path, pairs, name="d", **flags):
    rollouts, scores = (
        dump(tmp_path / f"{name}.{kind}.jsonl", rows) for kind, rows in zip("rs", zip(*pairs))
    )
    return sod_drift.main(
        argv(rollouts=rollouts, scores=scores, out=tmp_path / f"{name}.json", **flags)
    )


def drift_of_agents(agents, tmp_path, **flags):
    paths = dict(rollouts=agents.rollouts, scores=agents.scores, out=tmp_path / "d.json")
    return sod_drift.main(argv(**paths | flags))


def holds(found, expected):
    """Every number of `expected`, a part of `found`."""
    if isinstance(expected, dict):
        for name, value in expected.items():
            holds(found[name], value)
    else:
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-6)


# the clean one has 0.1, 0.2, 0.3
FOUR = [
    episode("a", 0, [True, True], [0.1, 0.2, 0.3], [3, 3]),
    episode("a", 1, [False, True], [0.1, 0.9, 0.4], [10, 3]),
    episode("b", 0, [True, False], [0.2, 0.2, 1.0], [3, 12]),
    episode("b", 1, ["outage"], [0.3, 0.4], [5]),
]


def test_drift_by_hand(tmp_path):
    result = drift_of(tmp_path, FOUR, plot=tmp_path / "d.png")
    assert result == json.loads((tmp_path / "d.json").read_text())
    assert (tmp_path / "d.png").stat().st_size > 1000
    assert result["episodes"] == {"clean": 1, "recovered": 1, "error": 2}
    holds([row["mean"] for row in result["by_step"]["recovered"]], [0.1, 0.9, 0.4])
    after = {  # count, tokens between, change of d, d above that of clean episodes
        "mistake": (2, 11, 0.8, (0.9 - 0.2 + 1.0 - 0.3) / 2),
        "outage": (1, 5, 0.1, 0.4 - 0.2),
        "result": (3, 3, (0.1 + 0.1 + 0.0) / 3, 0),
        "recovery": (1, 3, -0.5, 0.1),
    }
    for event, row in after.items():
        found = result["after"][event]
        holds([found[name] for name in ("count", "length", "change", "above")], row)
    outcomes = {"result": 1.4 / 4, "mistake": 0.3 / 2, "outage": 0.3, "answer": 2.1 / 4}
    left = {
        "uniform": 1,
        "sod": 1.8 / 4.1,  # w_k d_k = d_1 where no bound is met
        "mean": (1 + 1 / 2 + 1 / 3 + 1 + 1 / 9 + 1 / 4 + 1 + 1 + 0.2 + 1 + 0.75) / 11,
    }
    holds(result["first"], {"mean": 0.7 / 4, "median": 0.15})
    holds(result, {"by_outcome": outcomes, "left": left})
    holds(result["left_quiet"], {"sod": 0.6 / 2})  # of the two that begin with 0.1
    # a placebo: longer text, held against the clean episodes of that file
    padded = [episode("a", 0, [True], [0.1, 0.7], [30])]
    result = drift_of(tmp_path, padded, "e", against=tmp_path / "d.json")
    holds(result, {"after": {"result": {"above": 0.5}}})


def test_what_stood_before_a_step(tmp_path):
    pairs = [
        episode("a", 0, [False, True], [0.1, 0.5, 0.3], [3, 3]),
        episode("b", 0, [True, False], [0.2, 0.6, 0.9], [3, 3]),
        episode("c", 0, [False, "outage", False], [0.4, 0.8, 1.0, 2.0], [3] * 3),
    ]
    ways = {
        "mistake": {"answer": (0.9 + 2.0) / 2, "outage": 0.8, "result": 0.5},
        "outage": {"mistake": 1.0},
        "recovery": {"answer": 0.3},
        "result": {"mistake": 0.6},
    }
    # quiet: two of three, the half is rounded up
    left = {"sod": (0.3 + 0.6) / (0.9 + 1.7)}
    holds(drift_of(tmp_path, pairs), {"ways": ways, "left_quiet": left})


def test_a_masked_step_counts_nowhere(tmp_path):
    """The first step is masked: d_1 is that of the second."""
    pairs = [
        episode("a", 0, [True, True], [0.5, 0.1, 0.2], [3, 3]),
        episode("b", 0, [False], [0.1, 0.4], [3]),
    ]
    rollout, score = pairs[0]
    rollout["loss_mask"][0:2] = [0, 0]
    result = drift_of(tmp_path, pairs)
    assert [row["at"] for row in result["by_step"]["clean"]] == [2, 3]
    # left: 0.1 + 0.1 of 0.1 + 0.2 and 0.1 + 0.1 of 0.1 + 0.4
    expected = {"left": {"sod": 0.4 / 0.8}, "by_outcome": {"result": 0.1}}
    holds(result, expected | {"first": {"mean": 0.1, "median": 0.1}})
    flags = argv("weigh", rollouts=tmp_path / "d.r.jsonl", scores=tmp_path / "d.s.jsonl")
    summary = sod_command.main([*flags, "--out", str(tmp_path / "w.jsonl")])
    row = by_key(load(tmp_path / "w.jsonl"))["a", 0]
    assert row["d"][0] is None
    holds(row["w"], [1, 1, 0.5])
    holds(summary, {"d_mean": (0.1 + 0.2 + 0.1 + 0.4) / 4})
    drifts = [stepweights.Drift(np.array([np.nan, 1, np.nan, 2]), np.array([0, 1, 0, 1]))]
    holds(sod_controls.file_means(drifts), (1, 0.75, 2 / 3))


# ---- entropy, signal and noise of real episodes


def outcomes_by_hand(r):
    """(kind of the episode, outcome of every step, event before every step)."""
    oks = [c["ok"] for c in r["calls"]]
    kind = "clean" if all(oks) else "recovered" if oks[-1] else "error"
    names = {True: "result", False: "mistake"}
    got = ["outage" if c.get("outage") else names[c["ok"]] for c in r["calls"]]
    before = ["start"]
    for k, name in enumerate(got):
        came_back = name == "result" and k and not oks[k - 1]
        before.append("recovery" if came_back else name)
    if len(r["steps"]) > len(got):
        got.append("answer" if r["finish_reason"] == "stop" else "cut")
    return kind, got, before


def test_entropy_is_the_teachers_and_needs_all_of_it(agents, tmp_path):
    result = drift_of_agents(agents, tmp_path)
    theirs = naive_model(agents.teacher)
    by_step = {}
    for r in load(agents.rollouts):
        with torch.no_grad():
            logp = naive_logps(theirs, r["prompt_ids"], r["response_ids"])
        entropy = -(logp.exp() * logp).sum(1)
        kind, _, _ = outcomes_by_hand(r)
        for k, (a, b, _) in enumerate(r["steps"]):
            by_step.setdefault((kind, k + 1), []).append(float(entropy[a:b].mean()))
    for kind, rows in result["entropy"].items():
        for row in rows:
            values = by_step[kind, row["at"]]
            assert row["count"] == len(values)
            assert row["mean"] == pytest.approx(np.mean(values), abs=1e-4)
    bare = load(agents.scores)
    for row in bare:
        del row["topk"]
    flags = dict(scores=dump(tmp_path / "plain.jsonl", bare), out=tmp_path / "p.json")
    assert drift_of_agents(agents, tmp_path, **flags)["entropy"] == {}


def gradients_by_hand(model, rollout, score):
    """[K] gradients of the teacher's term in float64."""
    ids = torch.tensor(rollout["response_ids"])[:, None]
    own = naive_logps(model, rollout["prompt_ids"], rollout["response_ids"]).gather(1, ids)[
        :, 0
    ]
    gap = torch.tensor(score["logprobs"], dtype=torch.float64) - own.detach()
    found = []
    for a, b, _ in rollout["steps"]:
        loss = (gap * own)[a:b].sum()
        grads = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
        found.append(torch.cat([g.flatten() for g in grads]))
    return found


def test_signal_and_noise_against_products_of_all_pairs(agents, measured, tmp_path):
    """Every gradient kept in memory, and the mean of g_i . g_j over all i != j."""
    result = drift_of_agents(agents, tmp_path, model=agents.student)["gradient"]
    student = naive_model(agents.student)
    scores = by_key(load(agents.scores))
    groups = {}
    by_rule = weights_by_hand(measured)
    del by_rule["mean"], by_rule["amount"]
    for key, (r, _, _) in measured.items():
        gradients = gradients_by_hand(student, r, scores[key])
        _, got, before = outcomes_by_hand(r)
        for k, g in enumerate(gradients):
            if k < len(r["calls"]):
                groups.setdefault(("after", before[k]), []).append(g)
            groups.setdefault(("outcome", got[k]), []).append(g)
        for rule, w in by_rule.items():
            total = sum(x * g for x, g in zip(w[key], gradients))
            groups.setdefault(("rule", rule), []).append(total)
    assert set(result["rule"]) == {*by_rule, "shuffled"}
    after = {group for kind, group in groups if kind == "after"}
    assert after == set(result["after"]) and after >= {"start", "result", "mistake"}
    for (kind, group), rows in groups.items():
        products = torch.stack(rows) @ torch.stack(rows).T
        n = len(rows)
        found = result[kind][group]
        assert found["count"] == n
        if n > 1:
            signal = float((products.sum() - products.trace()) / (n * (n - 1)))
            total = float(products.trace()) / n
            assert found["signal"] == pytest.approx(signal, rel=1e-3, abs=1e-4 * total)
            assert found["noise"] == pytest.approx(total - signal, rel=1e-3)
            assert found["snr"] == pytest.approx(signal / (total - signal), rel=2e-3, abs=2e-4)


def test_gradients_of_a_masked_step_are_zero(agents):
    policy = policies.load_policy(str(agents.student), "float32")
    r = next(r for r in load(agents.rollouts) if len(r["steps"]) > 2)
    score = by_key(load(agents.scores))[r["id"], r["sample"]]
    full = list(sod_drift.step_gradients(policy, r, score))
    mask = list(r["loss_mask"])
    for t in range(*r["steps"][1][:2]):
        mask[t] = 0
    part = list(sod_drift.step_gradients(policy, r | {"loss_mask": mask}, score))
    assert full[1].any() and not part[1].any()
    assert torch.allclose(part[2], full[2], atol=1e-5)


# ---- refusals


def drift_of_one(tmp_path, against=None, **change):
    rollout, score = episode("a", 0, [True], [0.1, 0.2], [3])
    return drift_of(tmp_path, [(rollout | change, score)], against=against)


REFUSALS = [  # what is called with (agents, tmp_path), what the message names
    (
        lambda w, path: weighed(w, path / "w.jsonl", own_scores=w.scores),
        "policy.weights: expected .*that wrote the rollout",
    ),
    (
        lambda w, path: drift_of_agents(w, path, model=w.teacher),
        "policy.weights: .*--model is the model that wrote",
    ),
    (lambda _, path: drift_of_one(path, temperature=0.7), "temperature: expected 1, .*got 0.7"),
    (lambda _, path: drift_of_one(path, loss_mask=[0] * 7), "loss_mask: expected rollouts"),
    (lambda _, path: [drift_of_one(path) for _ in range(2)], "d.json: exists"),
    (lambda w, path: drift_of_one(path, against=w.rewards), "--against .*with clean episodes"),
    (lambda w, path: trained(w, path / "m"), "--method sod: expected --token-weights"),
    (
        lambda w, path: trained(w, path / "m", "opd-grpo", token_weights=w.scores),
        "--token-weights is given, but this method does not",
    ),
    (
        lambda *_: losses.method_named(METHODS, "opd", ["token_weight=teacher"]),
        "weighs the teacher's term against the reward's",
    ),
]


@pytest.mark.parametrize("run, message", REFUSALS)
def test_wrong_input_is_refused(agents, tmp_path, run, message):
    with pytest.raises(BadInput, match=message):
        run(agents, tmp_path)
