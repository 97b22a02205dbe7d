"""methods/sod/weights.py and the row sod: weights by step, and what they do to a gradient
(arXiv 2605.07725)."""

import dataclasses
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
    refusal,
    same_bits,
    weights,
)
from hypothesis import given, settings
from hypothesis import strategies as st

import teacher
import train
from experiments import sod_drift
from methods.sod import __main__ as sod_command
from methods.sod import weights as stepweights
from opd import loss as losses
from opd import policy as policies
from opd import records
from opd.records import BadInput

# ---- the weights

positive = st.lists(st.floats(0, 5), min_size=1, max_size=12)


@settings(max_examples=300, deadline=None)
@given(positive, st.floats(0, 1))
def test_the_telescoped_form_is_the_papers_product(d, delta):
    product, expected = 1.0, []
    for k in range(len(d)):
        if k:
            product *= (d[k - 1] + 1e-6) / (d[k] + 1e-6)
        # the bound is put on the result, never on the running product
        expected.append(min(product, 1 + delta) if k else 1.0)
    assert stepweights.step_weights(d, delta=delta) == pytest.approx(expected, rel=1e-6)
    if len(d) == 1:
        assert stepweights.step_weights(d).tolist() == [1.0]


def test_the_papers_cases():
    stable = [0.22, 0.2, 0.22, 0.5, 0.18]
    assert stepweights.step_weights(stable) == pytest.approx([1, 1.1, 1, 0.44, 1.2], rel=1e-4)
    # case B
    assert stepweights.step_weights([0.218, 0.6, 1.284])[-1] == pytest.approx(0.17, abs=0.005)
    # teacher == student: eps keeps it finite
    assert stepweights.step_weights([0.0, 0.0, 0.0]).tolist() == [1, 1, 1]
    assert (
        stepweights.step_weights([1.0, 1e-9])[1] == pytest.approx(1.2)
        and stepweights.step_weights([1.0, 1e-9], delta=None)[1] > 1e5
    )


def test_divergence_is_a_mean_over_loss_tokens():
    steps = [[0, 2, True], [4, 6, None]]
    assert stepweights.divergences(
        [-1, -2, 0, 0, -3, -1], [-2, -2, -9, -9, -1, -1], [1, 1, 0, 0, 1, 1], steps
    ).tolist() == [0.5, 1.0]
    assert stepweights.divergences(
        [-1, -2, 0, 0, -3, -1], [-2, -2, -9, -9, -1, -1], [1, 1, 0, 0, 0, 1], steps
    ).tolist() == [0.5, 0.0]


CAME, D = ["result", "mistake", "result", "answer"], np.array([0.5, 1.0, 2.0, 0.25])


@pytest.mark.parametrize(
    "rule, expected",
    [
        ("sod", [1, 0.5, 0.25, 1.2]),
        ("uniform", [1, 1, 1, 1]),
        ("no-cap", [1, 0.5, 0.25, 2]),
        ("mask", [1, 1, 0, 0]),
        ("decay", [1, 1, 0.9, 0.81]),
        ("mean", [0.7] * 4),
        ("amount", [0.3] * 4),
        ("batch", [0.4, 0.2, 0.1, 0.8]),
    ],
)
def test_rules(rule, expected):
    assert stepweights.weigh(
        rule, D, CAME, None, stepweights.File(0.2, 0.7, 0.3)
    ) == pytest.approx(expected, rel=1e-4)


def test_what_a_rule_asks_of_the_file():
    one, two = np.array([1, 1]), np.array([2, 2])
    assert stepweights.of_file([(np.array([1.0, 3.0]), one)]) == pytest.approx(
        (1, 2 / 3, 1 / 2), rel=1e-5
    )
    assert stepweights.of_file(
        [(np.array([1.0, 3.0]), one), (np.array([0.5, 0.25]), two)]
    ) == pytest.approx(
        (0.75, (1 + 1 / 3 + 2 + 2.4) / 6, (1 + 1 + 1 + 0.6) / (4 + 1 + 0.5)), rel=1e-5
    )
    assert (
        stepweights.of_file([(np.array([0.0]), one[:1])]).amount == 1
        and stepweights.of_file([(np.array([0.0]), np.array([0]))]) is None
    )


def test_an_outage_is_no_mistake():
    calm = ["result", "outage", "result", "answer"]
    for rule in ("mask", "decay"):
        assert stepweights.weigh(rule, D, calm, None, None).tolist() == [1, 1, 1, 1]
    rollout = {
        "response_ids": [1] * 9,
        "finish_reason": "stop",
        "steps": [[0, 2, True], [3, 4, False], [5, 6, False], [7, 9, None]],
        "calls": [{"ok": True}, {"ok": False, "outage": True}, {"ok": False}],
    }
    assert stepweights.outcomes(rollout) == ["result", "outage", "mistake", "answer"]
    assert (
        stepweights.outcomes(rollout | {"finish_reason": "tool_limit"})[-1]
        == stepweights.outcomes({"response_ids": [1], "finish_reason": "length"})[0]
        == "cut"
    )
    assert sod_drift.events(
        ["result", "mistake", "result", "outage", "result", "result", "answer"]
    ) == ["result", "mistake", "recovery", "outage", "recovery", "result"]


def test_shuffled_keeps_an_episodes_weights_and_loses_their_places():
    deals = {
        tuple(stepweights.weigh("shuffled", D, CAME, np.random.default_rng(seed), None))
        for seed in range(40)
    }
    assert {tuple(sorted(deal)) for deal in deals} == {
        tuple(sorted(stepweights.step_weights(D)))
    } and len(deals) > 10


# ---- the stage


def weighed(agents, path, rule, **flags):
    sod_command.main(
        argv(
            "weigh",
            rollouts=agents.rollouts,
            scores=agents.scores,
            rule=rule,
            out=path,
            **flags,
        )
    )
    return by_key(load(path))


@pytest.mark.parametrize("rule", stepweights.RULES)
def test_weights_of_a_file_by_hand(agents, tmp_path, rule):
    """Against a second computation, from plain transformers in float64."""
    got, rollouts = weighed(agents, tmp_path / "w.jsonl", rule), by_key(load(agents.rollouts))
    student, teacher, d = naive_model(agents.student), naive_model(agents.teacher), {}
    with torch.no_grad():
        for key, r in rollouts.items():
            ids = torch.tensor(r["response_ids"])[:, None]
            gap = (
                (
                    naive_logps(student, r["prompt_ids"], r["response_ids"])
                    - naive_logps(teacher, r["prompt_ids"], r["response_ids"])
                )
                .gather(1, ids)[:, 0]
                .abs()
            )
            d[key] = [float(gap[a:b].mean()) for a, b, _ in r["steps"]]
    sod = {key: [min((v[0] + 1e-6) / (x + 1e-6), 1.2) for x in v] for key, v in d.items()}
    sizes = {key: [b - a for a, b, _ in r["steps"]] for key, r in rollouts.items()}
    mean = sum(np.dot(sod[k], sizes[k]) for k in d) / sum(map(sum, sizes.values()))
    left = sum(np.dot(np.multiply(sod[k], d[k]), sizes[k]) for k in d) / sum(
        np.dot(d[k], sizes[k]) for k in d
    )
    first = np.mean([v[0] for v in d.values()])
    for key, r in rollouts.items():
        w, failed = (
            got[key]["w"],
            [not c["ok"] and "no answer, try again" not in c["output"] for c in r["calls"]]
            + [False],
        )
        after = [
            max(0, k - failed.index(True)) if any(failed) else 0 for k in range(len(failed))
        ]
        expected = {
            "sod": sod[key],
            "uniform": [1] * len(w),
            "no-cap": [(d[key][0] + 1e-6) / (x + 1e-6) for x in d[key]],
            "mask": [float(a == 0) for a in after],
            "decay": [0.9**a for a in after],
            "mean": [mean] * len(w),
            "amount": [left] * len(w),
            "batch": [min((first + 1e-6) / (x + 1e-6), 1.2) for x in d[key]],
        }
        assert got[key]["d"] == pytest.approx(d[key], abs=1e-4)
        assert (
            sorted(w) == pytest.approx(sorted(sod[key]), rel=2e-3)
            if rule == "shuffled"
            else w == pytest.approx(expected[rule], rel=2e-3)
        )
        for (start, end, _), each in zip(r["steps"], w):
            assert got[key]["weights"][start:end] == pytest.approx([each] * (end - start))
        inside = {t for a, b, _ in r["steps"] for t in range(a, b)}
        assert all(x == 0 for t, x in enumerate(got[key]["weights"]) if t not in inside)


def test_an_answer_without_tools_is_one_step(world, tmp_path):
    sod_command.main(
        argv(
            "weigh",
            rollouts=world.rollouts,
            scores=world.scores,
            rule="sod",
            out=tmp_path / "w.jsonl",
        )
    )
    assert all(r["w"] == [1] and set(r["weights"]) == {1.0} for r in load(tmp_path / "w.jsonl"))


def test_a_teacher_that_is_the_student_has_no_drift_and_no_pull(agents, tmp_path):

    teacher.main(
        argv(
            "score", model=agents.student, rollouts=agents.rollouts, out=tmp_path / "own.jsonl"
        )
    )
    sod_command.main(
        argv(
            "weigh",
            rollouts=agents.rollouts,
            scores=tmp_path / "own.jsonl",
            own_scores=tmp_path / "own.jsonl",
            rule="sod",
            out=tmp_path / "w.jsonl",
        )
    )
    rows = load(tmp_path / "w.jsonl")
    assert all(set(r["d"]) == {0} and set(r["w"]) == {1} for r in rows)
    from_rollouts = weighed(agents, tmp_path / "a.jsonl", "sod")
    # the true teacher's is not 0
    assert max(abs(x) for r in from_rollouts.values() for x in r["d"]) > 0.1


def test_own_scores_must_be_the_writers(agents, tmp_path, capsys):
    message = refusal(
        sod_command.main,
        argv(
            "weigh",
            rollouts=agents.rollouts,
            scores=agents.scores,
            own_scores=agents.scores,
            rule="sod",
            out=tmp_path / "w.jsonl",
        ),
        capsys,
    )
    assert (
        "policy.weights: expected" in message
        and "the weights that wrote the rollout" in message
    )


# ---- the row


def trained(agents, out, method, **flags):
    train.main(
        argv(
            method=method,
            model=agents.student,
            rollouts=agents.rollouts,
            rewards=agents.rewards,
            scores=agents.scores,
            out=out,
            learning_rate=1e-3,
            batch_size=4,
            **flags,
        )
    )
    return weights(out)


def test_weights_of_one_are_grpo_plus_opd_bit_for_bit(agents, tmp_path):
    weighed(agents, tmp_path / "ones.jsonl", "uniform")
    weighed(agents, tmp_path / "sod.jsonl", "sod")
    ones = trained(agents, tmp_path / "a", "sod", token_weights=tmp_path / "ones.jsonl")
    assert same_bits(ones, trained(agents, tmp_path / "b", "opd-grpo"))
    assert not same_bits(
        ones, trained(agents, tmp_path / "c", "sod", token_weights=tmp_path / "sod.jsonl")
    )


def test_rows_differ_in_their_weights_alone():
    a, b = (dataclasses.asdict(losses.METHODS[name]) for name in ("sod", "opd-grpo"))
    assert {k for k in a if a[k] != b[k]} == {"token_weight", "about"}
    row = losses.METHODS["sod"]
    assert (
        row.clip_low,
        row.clip_high,
        row.dual_clip,
        row.norm,
        row.advantage,
        row.teacher_weight,
        row.reference_kl,
    ) == (0.2, 0.28, 3.0, "token", "std", 1.0, 0.0)


def test_the_gradient_of_one_token_by_hand():
    """pi / pi_old = 1: c = A + w (log p_T - log mu), so dL/dlogit = -c (onehot - pi)."""
    row, logits = (
        losses.METHODS["sod"],
        torch.tensor([[0.3, -0.2, 0.1]], dtype=torch.float64, requires_grad=True),
    )
    logp = torch.log_softmax(logits, -1)
    for w in (0.0, 0.4, 1.2):
        batch = {
            "advantage": torch.tensor([0.7]).double(),
            "behaviour_logp": logp.detach()[:, 1],
            "teacher_logp": torch.tensor([-0.3]).double(),
            "token_weight": torch.tensor([w]).double(),
        }
        (gradient,) = torch.autograd.grad(
            losses.token_loss(row, logp[:, 1:2], torch.zeros(1), batch).sum(),
            logits,
            retain_graph=True,
        )
        c = 0.7 + w * (-0.3 - float(logp.detach()[0, 1]))
        onehot = torch.tensor([0.0, 1, 0]).double()
        assert torch.allclose(gradient[0], -c * (onehot - logp.detach().exp()[0]))


def test_tools_text_has_no_gradient(agents, tmp_path):
    """Changing what a method knows about a tool's tokens changes no bit of the new weights;
    changing a sampled token's does."""
    weighed(agents, tmp_path / "w.jsonl", "sod")
    spoilt, masks = (
        {},
        {key: r["loss_mask"] for key, r in by_key(load(agents.rollouts)).items()},
    )
    for name, where in (("tool", 0), ("own", 1)):
        rows, weights_rows = load(agents.scores), load(tmp_path / "w.jsonl")
        for r in rows:
            r["logprobs"] = [
                x - 3.0 if m == where else x
                for x, m in zip(r["logprobs"], masks[r["id"], r["sample"]])
            ]
        for r in weights_rows:
            r["weights"] = [
                x + 5.0 if m == where == 0 else x
                for x, m in zip(r["weights"], masks[r["id"], r["sample"]])
            ]
        dump(tmp_path / f"scores_{name}.jsonl", rows)
        dump(tmp_path / f"w_{name}.jsonl", weights_rows)
        train.main(
            argv(
                method="sod",
                model=agents.student,
                rollouts=agents.rollouts,
                rewards=agents.rewards,
                scores=tmp_path / f"scores_{name}.jsonl",
                token_weights=tmp_path / f"w_{name}.jsonl",
                out=tmp_path / name,
                learning_rate=1e-3,
            )
        )
        spoilt[name] = weights(tmp_path / name)
    train.main(
        argv(
            method="sod",
            model=agents.student,
            rollouts=agents.rollouts,
            rewards=agents.rewards,
            scores=agents.scores,
            token_weights=tmp_path / "w.jsonl",
            out=tmp_path / "plain",
            learning_rate=1e-3,
        )
    )
    plain = weights(tmp_path / "plain")
    assert same_bits(plain, spoilt["tool"]) and not same_bits(plain, spoilt["own"])
    # there was something to leave alone
    assert sum(m == 0 for r in load(agents.rollouts) for m in r["loss_mask"]) > 100


def test_one_number_a_token_is_all_that_is_counted(agents, tmp_path):
    weighed(agents, tmp_path / "w.jsonl", "sod")
    train.main(
        argv(
            method="sod",
            model=agents.student,
            rollouts=agents.rollouts,
            rewards=agents.rewards,
            scores=agents.scores,
            token_weights=tmp_path / "w.jsonl",
            out=tmp_path / "m",
            batch_size=8,
        )
    )
    rows, metrics = load(agents.rollouts), load(tmp_path / "m" / "metrics.jsonl")[-1]
    assert metrics["train/tokens"] == sum(sum(r["loss_mask"]) for r in rows)
    assert (
        metrics["rollout/calls"] == np.mean([len(r["calls"]) for r in rows])
        and metrics["weights/mean"] > 0
    )


@pytest.mark.parametrize(
    "row, change, words",
    [
        ("opd", "token_weight=teacher", "weighs the teacher's term against the reward's"),
        ("grpo", "token_weight=teacher", "token_weight teacher"),
    ],
)
def test_a_weight_of_the_teachers_term_needs_both_terms(row, change, words):
    with pytest.raises(BadInput, match=words):
        losses.settings(row, [change])


def test_sod_wants_its_weights(agents, tmp_path, capsys):
    flags = dict(
        model=agents.student,
        rollouts=agents.rollouts,
        rewards=agents.rewards,
        scores=agents.scores,
        out=tmp_path / "m",
    )
    assert "--method sod: expected --token-weights FILE" in refusal(
        train.main, argv(method="sod", **flags), capsys
    )
    weighed(agents, tmp_path / "w.jsonl", "sod")
    assert "--token-weights is given, but this method does not read it" in refusal(
        train.main, argv(method="opd-grpo", token_weights=tmp_path / "w.jsonl", **flags), capsys
    )


# ---- drift


def episode(name, sample, calls, d, gaps):
    """(rollout, score) of an episode whose calls end as said (True, False, "outage") and whose
    drifts are d; gaps: tokens between the steps."""
    steps, at = [], 0
    for k, call in enumerate([*calls, None]):
        steps.append([at, at + 2, call if call in (True, None) else False])
        at += 2 + (gaps[k] if k < len(gaps) else 0)
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
        "logprobs": [-1.0 if m else 0.0 for m in mask],
        "temperature": 1,
        "top_p": 1,
        "steps": steps,
        "final": "x",
        "calls": [
            {"output": "", "ok": call is True} | ({"outage": True} if call == "outage" else {})
            for call in calls
        ],
    }
    score = {
        "id": name,
        "sample": sample,
        "policy": {"model": "t", "weights": "t"},
        "rollout": records.fingerprint(rollout),
        "logprobs": [-5.0] * length,
    }
    for (a, b, _), x in zip(steps, d):
        score["logprobs"][a:b] = [-1.0 - x] * (b - a)
    return rollout, score


def looked_at(tmp_path, pairs, name="d", **flags):
    rollouts, scores = (
        dump(tmp_path / f"{name}.{kind}.jsonl", rows) for kind, rows in zip("rs", zip(*pairs))
    )
    return sod_drift.main(
        argv(rollouts=rollouts, scores=scores, out=tmp_path / f"{name}.json", **flags)
    )


def test_drift_by_hand(tmp_path):
    """Four episodes whose drifts are written down; the clean one has 0.1, 0.2, 0.3."""
    pairs = [
        episode("a", 0, [True, True], [0.1, 0.2, 0.3], [3, 3]),
        episode("a", 1, [False, True], [0.1, 0.9, 0.4], [10, 3]),
        episode("b", 0, [True, False], [0.2, 0.2, 1.0], [3, 12]),
        episode("b", 1, ["outage"], [0.3, 0.4], [5]),
    ]
    result = looked_at(tmp_path, pairs, plot=tmp_path / "d.png")
    assert (
        result == json.loads((tmp_path / "d.json").read_text())
        and (tmp_path / "d.png").stat().st_size > 1000
    )
    assert result["episodes"] == {"clean": 1, "recovered": 1, "error": 2}
    assert [row["mean"] for row in result["by_step"]["recovered"]] == pytest.approx(
        [0.1, 0.9, 0.4]
    ) and [row["at"] for row in result["by_step"]["clean"]] == [1, 2, 3]
    after = result["after"]
    assert after["mistake"] == {
        "count": 2,
        "length": 11,
        "change": pytest.approx((0.8 + 0.8) / 2),
        "above": pytest.approx((0.9 - 0.2 + 1.0 - 0.3) / 2),
        "entropy_change": None,
        "length_correlation": None,
    }
    assert (
        after["outage"]["count"] == 1
        and after["outage"]["above"] == pytest.approx(0.4 - 0.2)
        and after["outage"]["change"] == pytest.approx(0.1)
    )
    assert (
        after["result"]["count"] == 3
        and after["result"]["change"] == pytest.approx((0.1 + 0.1 + 0.0) / 3)
        and after["result"]["above"] == pytest.approx(0)
    )
    assert (
        after["recovery"]["count"] == 1
        and after["recovery"]["change"] == pytest.approx(-0.5)
        and after["recovery"]["above"] == pytest.approx(0.1)
    )
    assert result["by_outcome"] == pytest.approx(
        {
            "result": (0.1 + 0.2 + 0.9 + 0.2) / 4,
            "mistake": (0.1 + 0.2) / 2,
            "outage": 0.3,
            "answer": (0.3 + 0.4 + 1.0 + 0.4) / 4,
        }
    )
    assert result["first"] == pytest.approx({"mean": 0.7 / 4, "median": 0.15})
    left = {
        "uniform": 1,
        "sod": 1.8 / 4.1,
        "no-cap": 1.8 / 4.1,
        "amount": 1.8 / 4.1,
        "mask": (0.6 + 0.1 + 0.4 + 0.7) / 4.1,
        "mean": (1 + 1 / 2 + 1 / 3 + 1 + 1 / 9 + 1 / 4 + 1 + 1 + 0.2 + 1 + 0.75) / 11,
    }
    # w_k d_k = d_1 where no bound is met
    assert {rule: result["left"][rule] for rule in left} == pytest.approx(left, rel=1e-4)
    # of the two that begin with 0.1
    assert {rule: result["left_quiet"][rule] for rule in ("sod", "uniform")} == pytest.approx(
        {"sod": 0.6 / 2, "uniform": 1}, rel=1e-4
    )
    by_offset = {row["at"]: (row["mean"], row["no_slip"]) for row in result["since_mistake"]}
    assert by_offset[1] == pytest.approx(
        ((0.9 + 1.0) / 2, ((0.2 + 0.4) / 2 + 0.3) / 2)
    ) and by_offset[-1] == pytest.approx((0.2, 0.2))
    with pytest.raises(BadInput, match="d.json"):  # exists
        looked_at(tmp_path, pairs)


def test_a_placebo_is_held_against_the_first_look(tmp_path):
    looked_at(
        tmp_path,
        [episode("a", 0, [True], [0.1, 0.2], [3])],
        "plain",
        plot=tmp_path / "without_a_mistake.png",
    )
    padded = [episode("a", 0, [True], [0.1, 0.7], [30])]
    assert looked_at(tmp_path, padded, "own")["after"]["result"]["above"] == pytest.approx(0)
    assert looked_at(tmp_path, padded, "placebo", against=tmp_path / "plain.json")["after"][
        "result"
    ]["above"] == pytest.approx(0.5)
    (tmp_path / "no.json").write_text("[1]")
    for wrong in ("no.json", "nothing.json"):
        with pytest.raises(
            BadInput, match="--against .*expected what experiments.sod_drift writes"
        ):
            looked_at(tmp_path, padded, f"x{wrong}", against=tmp_path / wrong)


def test_longer_errors_and_larger_drifts(tmp_path):
    pairs = [episode("c", 0, [True], [0.1, 0.1], [3])] + [
        episode("e", i, [False], [0.1, 0.1 * i], [10 * i]) for i in range(1, 5)
    ]
    assert looked_at(tmp_path, pairs)["after"]["mistake"][
        "length_correlation"
    ] == pytest.approx(1)


def test_log_probs_at_another_temperature_are_no_drift(tmp_path):
    rollout, score = episode("a", 0, [True], [0.1, 0.2], [3])
    with pytest.raises(BadInput, match="temperature: expected 1, as scores are, got 0.7"):
        looked_at(tmp_path, [(rollout | {"temperature": 0.7}, score)])


def test_entropy_is_the_teachers_and_needs_all_of_it(agents, tmp_path):
    result = sod_drift.main(
        argv(rollouts=agents.rollouts, scores=agents.scores, out=tmp_path / "d.json")
    )
    teacher, sums = naive_model(agents.teacher), {}
    with torch.no_grad():
        for r in load(agents.rollouts):
            logp = naive_logps(teacher, r["prompt_ids"], r["response_ids"])
            entropy = -(logp.exp() * logp).sum(1)
            for k, (a, b, _) in enumerate(r["steps"], 1):
                oks = [c["ok"] for c in r["calls"]]
                sums.setdefault(
                    ("clean" if all(oks) else "recovered" if oks[-1] else "error", k), []
                ).append(float(entropy[a:b].mean()))
                last = "answer" if r["finish_reason"] == "stop" else "cut"
                sums.setdefault(
                    last
                    if k > len(oks)
                    else "result"
                    if oks[k - 1]
                    else "outage"
                    if r["calls"][k - 1].get("outage")
                    else "mistake",
                    [],
                ).append(float(entropy[a:b].mean()))
    assert result["after"]["mistake"]["entropy_change"] is not None
    for kind, rows in result["entropy"].items():
        for row in rows:
            assert row["mean"] == pytest.approx(
                np.mean(sums[kind, row["at"]]), abs=1e-4
            ) and row["count"] == len(sums[kind, row["at"]])
    assert len(result["entropy_by_outcome"]) >= 4 and result[
        "entropy_by_outcome"
    ] == pytest.approx(
        {name: np.mean(sums[name]) for name in result["entropy_by_outcome"]}, abs=1e-4
    )
    rows = [{k: v for k, v in r.items() if k != "topk"} for r in load(agents.scores)]
    assert (
        sod_drift.main(
            argv(
                rollouts=agents.rollouts,
                scores=dump(tmp_path / "plain.jsonl", rows),
                out=tmp_path / "p.json",
            )
        )["entropy"]
        == {}
    )


# ---- signal and noise


def test_signal_and_noise_against_products_of_all_pairs(agents, tmp_path):
    """A float64 model of plain transformers, one gradient a step and episode kept in memory,
    and the mean of g_i . g_j over all i != j."""
    result = sod_drift.main(
        argv(
            rollouts=agents.rollouts,
            scores=agents.scores,
            out=tmp_path / "d.json",
            model=agents.student,
        )
    )
    assert result == json.loads((tmp_path / "d.json").read_text())
    student, scores, groups, episodes = (
        naive_model(agents.student),
        by_key(load(agents.scores)),
        {},
        [],
    )
    for key, r in by_key(load(agents.rollouts)).items():
        own = naive_logps(student, r["prompt_ids"], r["response_ids"]).gather(
            1, torch.tensor(r["response_ids"])[:, None]
        )[:, 0]
        gap = torch.tensor(scores[key]["logprobs"], dtype=torch.float64) - own.detach()
        steps = [
            torch.cat(
                [
                    g.flatten()
                    for g in torch.autograd.grad(
                        (gap * own)[a:b].sum(), list(student.parameters()), retain_graph=True
                    )
                ]
            )
            for a, b, _ in r["steps"]
        ]
        failed = [
            ("outage" if c.get("outage") else "mistake") if not c["ok"] else None
            for c in r["calls"]
        ]
        for k, g in enumerate(steps):
            before = (
                "start"
                if not k
                else failed[k - 1] or ("recovery" if k > 1 and failed[k - 2] else "result")
            )
            if k < len(r["calls"]):
                groups.setdefault(("after", before), []).append(g)
            groups.setdefault(
                (
                    "outcome",
                    ("answer" if r["finish_reason"] == "stop" else "cut")
                    if k == len(r["calls"])
                    else failed[k] or "result",
                ),
                [],
            ).append(g)
        episodes.append(
            (steps, [float(gap[a:b].abs().mean()) for a, b, _ in r["steps"]], failed)
        )
    first = np.mean([d[0] for _, d, _ in episodes])
    for steps, d, failed in episodes:
        # steps since the first mistake
        after = [sum("mistake" in failed[:k] for k in range(1, n + 1)) for n in range(len(d))]
        rules = {
            "uniform": [1] * len(d),
            "sod": [min(d[0] / x, 1.2) for x in d],
            "no-cap": [d[0] / x for x in d],
            "mask": [float(not a) for a in after],
            "decay": [0.9**a for a in after],
            "batch": [min(first / x, 1.2) for x in d],
        }
        for rule, w in rules.items():
            groups.setdefault(("rule", rule), []).append(sum(x * g for x, g in zip(w, steps)))
    assert set(result["gradient"]["rule"]) == {*rules, "shuffled"}
    assert (
        {group for kind, group in groups if kind == "after"}
        == set(result["gradient"]["after"])
        >= {"start", "result", "mistake"}
    )
    for (kind, group), rows in groups.items():
        products, found = (
            torch.stack(rows) @ torch.stack(rows).T,
            result["gradient"][kind][group],
        )
        assert found["count"] == len(rows)
        if len(rows) > 1:
            signal = float((products.sum() - products.trace()) / (len(rows) * (len(rows) - 1)))
            total = float(products.trace()) / len(rows)
            assert found["signal"] == pytest.approx(
                signal, rel=1e-3, abs=1e-4 * total
            ) and found["noise"] == pytest.approx(total - signal, rel=1e-3)
            assert found["snr"] == pytest.approx(signal / (total - signal), rel=2e-3, abs=2e-4)


def test_signal_is_without_bias_and_a_constant_has_no_noise():
    random, signals = np.random.default_rng(0), []
    for _ in range(400):
        spread = sod_drift.Spread()
        for _ in range(4):
            spread.add(torch.tensor([1.0, 0, 0] + random.normal(0, 2, 3)))
        signals.append(spread.numbers()["signal"])
    # |E g|^2 = 1, whatever the noise of 12 around it
    assert abs(np.mean(signals) - 1) < 4 * np.std(signals) / 20 and np.std(signals) / 20 < 0.3
    spread = sod_drift.Spread()
    assert spread.numbers() == {"count": 0, "signal": None, "noise": None, "snr": None}
    for _ in range(3):
        spread.add(torch.tensor([3.0, 4.0]))
    assert spread.numbers() == {"count": 3, "signal": 25.0, "noise": 0.0, "snr": None}


def test_signal_and_noise_are_of_the_writers(agents, tmp_path):
    with pytest.raises(
        BadInput,
        match="policy.weights: expected .*--model is the model that wrote the rollouts",
    ):
        sod_drift.main(
            argv(
                rollouts=agents.rollouts,
                scores=agents.scores,
                out=tmp_path / "d.json",
                model=agents.teacher,
            )
        )
    assert not (tmp_path / "d.json").exists()


# ---- steps without a token that counts


def test_a_step_that_nobody_learns_from_counts_nowhere(tmp_path):
    """The first step is masked: d_1 is that of the second, and the file looks as it would
    without that step's number."""
    d = stepweights.divergences(
        [-1, -2, -1, -1],
        [-3, -3, -2, -3],
        [0, 1, 0, 1],
        [[0, 1, True], [1, 2, True], [2, 3, False], [3, 4, None]],
    )
    assert np.isnan(d[[0, 2]]).all() and d[[1, 3]].tolist() == [1, 2]
    assert stepweights.step_weights(d) == pytest.approx([1, 1, 1, 0.5], rel=1e-5)
    assert stepweights.of_file([(d, np.array([0, 1, 0, 1]))]) == pytest.approx(
        (1, 0.75, 2 / 3), rel=1e-5
    )
    pairs = [
        episode("a", 0, [True, True], [0.5, 0.1, 0.2], [3, 3]),
        episode("b", 0, [False], [0.1, 0.4], [3]),
    ]
    rollout, score = pairs[0]
    rollout["loss_mask"][0:2] = [0, 0]
    score["topk"] = {
        "ids": records.pack(np.zeros((len(score["logprobs"]), 1), np.uint16)),
        "logprobs": records.pack(np.zeros((len(score["logprobs"]), 1), np.float32)),
    }
    result = looked_at(tmp_path, pairs)
    assert result["first"] == pytest.approx({"mean": 0.1, "median": 0.1}) and result[
        "by_outcome"
    ]["result"] == pytest.approx(0.1)
    assert [row["at"] for row in result["by_step"]["clean"]] == [2, 3] and [
        row["at"] for row in result["entropy"]["clean"]
    ] == [2, 3]
    # 0.1 + 0.1 of 0.1 + 0.2 and 0.1 + 0.1 of 0.1 + 0.4
    assert result["left"]["sod"] == pytest.approx(0.4 / 0.8, rel=1e-4)
    rollouts, scores = (
        dump(tmp_path / f"x.{kind}.jsonl", rows) for kind, rows in zip("rs", zip(*pairs))
    )
    summary = sod_command.main(
        argv("weigh", rollouts=rollouts, scores=scores, rule="sod", out=tmp_path / "w.jsonl")
    )
    rows = by_key(load(tmp_path / "w.jsonl"))
    assert (
        rows["a", 0]["d"][0] is None
        and rows["a", 0]["w"] == pytest.approx([1, 1, 0.5], rel=1e-4)
        and summary["d_mean"] == pytest.approx((0.1 + 0.2 + 0.1 + 0.4) / 4)
    )
    nothing = [(r | {"loss_mask": [0] * len(r["loss_mask"])}, s) for r, s in pairs]
    nothing = [(r, s | {"rollout": records.fingerprint(r)}) for r, s in nothing]
    with pytest.raises(
        BadInput, match="loss_mask: expected rollouts with loss tokens, got none"
    ):
        looked_at(tmp_path, nothing, "nothing")


def test_gradients_of_a_masked_step_are_zero(agents, tmp_path):

    policy, scores = (
        policies.load_policy(str(agents.student), "float32"),
        by_key(load(agents.scores)),
    )
    r = next(r for r in load(agents.rollouts) if len(r["steps"]) > 2)
    full = list(sod_drift.step_gradients(policy, r, scores[r["id"], r["sample"]], r["steps"]))
    start, end, _ = r["steps"][1]
    hidden = r | {
        "loss_mask": [0 if start <= t < end else m for t, m in enumerate(r["loss_mask"])]
    }
    part = list(
        sod_drift.step_gradients(policy, hidden, scores[r["id"], r["sample"]], r["steps"])
    )
    assert not part[1].any() and full[1].any()
    assert torch.allclose(part[0], full[0], atol=1e-5) and torch.allclose(
        part[2], full[2], atol=1e-5
    )


def test_a_look_knows_what_stood_before_a_step(tmp_path):
    pairs = [
        episode("a", 0, [False, True], [0.1, 0.5, 0.3], [3, 3]),
        episode("b", 0, [True, False], [0.2, 0.6, 0.9], [3, 3]),
        episode("c", 0, [False, "outage", False], [0.4, 0.8, 1.0, 2.0], [3] * 3),
    ]
    result = looked_at(tmp_path, pairs)
    assert result["ways"] == {
        "mistake": {
            "answer": {"mean": pytest.approx((0.9 + 2.0) / 2), "count": 2},
            "outage": {"mean": pytest.approx(0.8), "count": 1},
            "result": {"mean": pytest.approx(0.5), "count": 1},
        },
        "outage": {"mistake": {"mean": pytest.approx(1.0), "count": 1}},
        "recovery": {"answer": {"mean": pytest.approx(0.3), "count": 1}},
        "result": {"mistake": {"mean": pytest.approx(0.6), "count": 1}},
    }
    # two of three: the half is rounded up
    assert result["left_quiet"]["sod"] == pytest.approx((0.3 + 0.6) / (0.9 + 1.7), rel=1e-3)


def test_flags_of_a_look(tmp_path):
    pairs = [episode("a", 0, [False], [0.1, 0.2], [3])]
    looked_at(tmp_path, pairs, "failed")
    (tmp_path / "text.json").write_text('{"by_step": {"clean": [{"at": 2, "mean": "x"}]}}')
    for wrong in ("failed.json", "text.json"):  # no clean episode; not a number
        with pytest.raises(BadInput, match="--against .*of a file with clean episodes"):
            looked_at(tmp_path, pairs, f"x{wrong}", against=tmp_path / wrong)
    with pytest.raises(BadInput, match="--device: is that of --model"):
        looked_at(tmp_path, pairs, "y", device="cpu")
