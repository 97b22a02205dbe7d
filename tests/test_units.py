"""SimCT's loss: an example by hand, the same vocabulary as ordinary distillation, and a real
pair of tokenizers in float64."""

import math

import numpy as np
import pytest
import torch
from conftest import argv, by_key, dump, load, naive_model, refusal
from test_train import FAST, gradient, same_gradient

import teacher
import train
from experiments import simct_regroup
from methods.rows import METHODS
from methods.simct import __main__ as simct_command
from methods.simct import align, units
from methods.simct.loss import UnitLoss, unit_divergence
from opd import policy as policies
from opd import records

SIMCT = METHODS["simct"].own


def one_unit(student, teacher_, text, text_teacher, **changes):
    """The loss of one unit: candidates' probabilities on both sides, the token probabilities of
    its text on both sides."""
    own = torch.tensor([math.log(p) for p in text], dtype=torch.float64)
    support = torch.tensor([math.log(p) for p in student], dtype=torch.float64).expand(
        len(text), -1
    )
    logs = [math.log(p) for p in text_teacher]
    unit = torch.zeros(len(text), 6, dtype=torch.float64)
    unit[:, 1], unit[0] = (
        1,
        torch.tensor([1, 1, len(text), len(logs), sum(logs), 0], dtype=torch.float64),
    )
    prefix = torch.zeros(len(text), len(student))
    prefix[0, 0] = 1
    batch = {
        "unit": unit,
        "support_logp": torch.tensor(
            [math.log(p) for p in teacher_], dtype=torch.float64
        ).expand(len(text), -1),
        "prefix": prefix,
        "raw": own,
    }
    return unit_divergence(UnitLoss(**changes), torch.cat([own[:, None], support], 1), batch)


def test_two_spellings_of_one_opinion():
    """The teacher spells 1|2|3, the student 123: nearly one opinion, and yet 0.572 nats, for
    the token 1 rivals the text it begins."""
    # candidates: 1, and everything else
    case = ([0.01, 0.09], [0.9, 0.1], [0.90], [0.9, 0.95, 0.95])
    assert float(one_unit(*case)[0]) == pytest.approx(0.572, abs=5e-4)
    assert float(one_unit(*case, prefixes="drop")[0]) == pytest.approx(0.0002, abs=5e-5)
    assert float(one_unit(*case, span="none")[0]) == 0.0
    total = 0.9 * 0.95 * 0.95
    q, p = [0.01, 0.09, 0.9], [x / (1 + total) for x in (0.9, 0.1, total)]
    assert float(one_unit(*case, span="sum")[0]) == pytest.approx(
        sum(a * math.log(a / b) for a, b in zip(q, p)), abs=1e-9
    )


def test_a_unit_counts_once_at_its_first_token_and_teaches_all_of_them():
    value = one_unit([0.3, 0.2], [0.4, 0.1], [0.5, 0.7, 0.9], [0.6, 0.8])
    assert value[0] > 0 and value[1:].tolist() == [0, 0]
    logits = torch.randn(
        3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    ).requires_grad_()
    logp, unit = torch.log_softmax(logits, -1), torch.zeros(3, 6, dtype=torch.float64)
    unit[:, 1], unit[0] = 1, torch.tensor([1, 1, 3, 2, -1.3, 0], dtype=torch.float64)
    batch = {
        "unit": unit,
        "support_logp": torch.log_softmax(torch.zeros(3, 2, dtype=torch.float64), -1),
        "prefix": torch.zeros(3, 2),
    }
    unit_divergence(SIMCT, torch.cat([logp[:, :1], logp[:, 1:3]], 1), batch).sum().backward()
    assert (logits.grad.abs().sum(1) > 1e-3).all()
    # eq. 7: the span's score passes g / k times (onehot - p) to every token of it; here tokens
    # 1 and 2, which have no candidates
    q = torch.log_softmax(
        torch.tensor(
            [logp[0, 1].item(), logp[0, 2].item(), logp[:, 0].mean().item()],
            dtype=torch.float64,
        ),
        0,
    )
    t = torch.log_softmax(
        torch.tensor([math.log(0.5), math.log(0.5), -1.3 / 2], dtype=torch.float64), 0
    )
    g = float(q[2].exp() * ((q - t)[2] - (q.exp() * (q - t)).sum()))
    for i in (1, 2):
        want = g / 3 * (torch.eye(5, dtype=torch.float64)[0] - logp[i].exp())
        assert torch.allclose(logits.grad[i], want.detach(), atol=1e-12)


def test_a_constant_on_one_positions_logits_changes_the_released_score_only():
    """Logits are meant up to a constant; a mean of raw ones is not."""

    def value(shift, span):
        z = torch.tensor([[1.0, 0.2, -0.5], [0.3, 2.0, 0.1]], dtype=torch.float64)
        z[1] += shift
        logp, unit = (
            torch.log_softmax(z, -1),
            torch.tensor([[1, 1, 2, 1, -0.4, 0.5], [0, 1, 0, 0, 0, 0]], dtype=torch.float64),
        )
        batch = {
            "unit": unit,
            "support_logp": torch.log_softmax(torch.ones(2, 2, dtype=torch.float64), -1),
            "prefix": torch.zeros(2, 2),
            "raw": z[:, 0],
        }
        return float(
            unit_divergence(
                UnitLoss(span=span),
                torch.cat([logp[:, :1], logp[:, 1:]], 1),
                batch,
            )[0]
        )

    for span in ("mean", "sum"):
        assert value(0, span) == pytest.approx(value(3.0, span), abs=1e-12)
    assert abs(value(0, "logit") - value(3.0, "logit")) > 0.1


# ---- files


@pytest.fixture(scope="module")
def foreign(world, tmp_path_factory):
    """A teacher that merges two digits, after a little training, and its units of the world's
    rollouts."""
    root = tmp_path_factory.mktemp("foreign")
    train.main(
        argv(
            method="sft",
            model=world.toy / "teacher_merged_digits",
            rollouts=world.toy / "clean.jsonl",
            out=root / "teacher",
            batch_size=32,
            steps=25,
            learning_rate=6e-3,
            warmup_steps=5,
        )
    )
    done = simct_command.main(
        argv(
            "score",
            model=root / "teacher",
            student=world.base,
            prompts=world.prompts,
            rollouts=world.rollouts,
            out=root / "units.jsonl",
        )
    )
    return root, root / "teacher", root / "units.jsonl", done


def both(world, foreign):
    """(rollout, score) pairs."""
    scores = by_key(load(foreign[2]))
    return [(r, scores[r["id"], r["sample"]]) for r in load(world.rollouts)]


def pieces(world, foreign):
    """Per rollout: (rollout, score, teacher's ids, teacher's prompt ids), recomputed."""
    student, there = (
        policies.load_tokenizer(str(world.base)),
        policies.load_tokenizer(str(foreign[1])),
    )
    prompts = {p["id"]: p for p in load(world.prompts)}
    for r, s in both(world, foreign):
        yield (
            r,
            s,
            align.align(student, there, r["response_ids"]).teacher_ids,
            policies.render(there, prompts[r["id"]]),
        )


def test_the_files_numbers_are_the_teachers(world, foreign):
    model, shared = naive_model(foreign[1]), 0
    student, there = (
        policies.load_tokenizer(str(world.base)),
        policies.load_tokenizer(str(foreign[1])),
    )
    both = align.shared_vocabulary(student, there) | {student.eos_token_id: there.eos_token_id}
    for r, s, ids, prompt in pieces(world, foreign):
        with torch.no_grad():
            z = model(torch.tensor([prompt + ids])).logits[0][len(prompt) - 1 : -1]
        logp = torch.log_softmax(z, -1)
        candidates, top, prefixes = (
            records.unpack(x)
            for x in (s["unit_topk"]["ids"], s["unit_topk"]["logprobs"], s["prefixes"])
        )
        for row, (s0, s1, t0, t1) in enumerate(s["units"]):
            spelt = [float(logp[t, ids[t]]) for t in range(t0, t1)]
            assert s["unit_logprobs"][row] == pytest.approx(sum(spelt), abs=1e-4) and sum(
                s["logprobs"][s0:s1]
            ) == pytest.approx(sum(spelt), abs=1e-3)
            assert s["unit_logits"][row] == pytest.approx(
                sum(float(z[t, ids[t]]) for t in range(t0, t1)), abs=1e-3
            )
            assert s["unit_logz"][row] == pytest.approx(float(z[t0].logsumexp(-1)), abs=1e-3)
            assert top[row] == pytest.approx(
                [float(logp[t0, both[int(i)]]) for i in candidates[row]], abs=1e-4
            )
            # of two digits at most; a <|user|> has no text
            text = b"".join(
                align.token_bytes(student)[i] or b"" for i in r["response_ids"][s0:s1]
            ).decode()
            assert [int(i) for i, p in zip(candidates[row], prefixes[row]) if p] == (
                [student.convert_tokens_to_ids(text[0])] if len(text) > 1 else []
            )
            shared += len(text) > 1
    assert shared > 10, "there are numbers of two digits"
    assert 0 < foreign[3]["strict"] < foreign[3]["covered"] <= 1


@pytest.mark.parametrize("span", ["mean", "sum", "logit", "none"])
@pytest.mark.parametrize("prefixes", ["keep", "drop"])
def test_the_gradient_of_a_step_is_the_formulas(world, foreign, base64bit, span, prefixes):
    """Equations 6 to 9 written out: full logits in float64, one unpadded sequence at a time,
    one unit at a time."""
    import copy

    model = copy.deepcopy(base64bit)
    total, count, seen = 0.0, sum(len(r["response_ids"]) for r in load(world.rollouts)), 0
    for r, s, ids, _ in pieces(world, foreign):
        z = model(torch.tensor([r["prompt_ids"] + r["response_ids"]])).logits[0][
            len(r["prompt_ids"]) - 1 : -1
        ]
        logp = torch.log_softmax(z, -1)
        candidates, top, prefix = (
            records.unpack(x)
            for x in (s["unit_topk"]["ids"], s["unit_topk"]["logprobs"], s["prefixes"])
        )
        for row, (s0, s1, t0, t1) in enumerate(s["units"]):
            several = (s1 - s0, t1 - t0) != (1, 1)
            if several and span == "none":
                continue
            kept = [
                i
                for i in range(len(candidates[row]))
                if not (several and prefixes == "drop" and prefix[row][i])
            ]
            here = z[s0] if span == "logit" else logp[s0]
            mine = [here[int(candidates[row][i])] for i in kept]
            theirs = [
                float(top[row][i]) + (s["unit_logz"][row] if span == "logit" else 0)
                for i in kept
            ]
            if several:
                spelt = sum(
                    (z if span == "logit" else logp)[t, r["response_ids"][t]]
                    for t in range(s0, s1)
                )
                score = s["unit_logits" if span == "logit" else "unit_logprobs"][row]
                mine.append(spelt if span == "sum" else spelt / (s1 - s0))
                theirs.append(score if span == "sum" else score / (t1 - t0))
                seen += 1
            q, p = (
                torch.log_softmax(torch.stack(mine), 0),
                torch.log_softmax(torch.tensor(theirs, dtype=torch.float64), 0),
            )
            total = total + (q.exp() * (q - p)).sum()
    (total / count).backward()
    want = torch.cat(
        [
            torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten()
            for p in model.parameters()
        ]
    )
    flags = dict(method="simct", rollouts=world.rollouts, scores=foreign[2])
    got, numbers = gradient(world, flags, overrides=(f"span={span}", f"prefixes={prefixes}"))
    same_gradient(got, want, 5e-5)
    part, _ = gradient(
        world, flags, overrides=(f"span={span}", f"prefixes={prefixes}"), micro=1
    )
    same_gradient(part, got, 1e-5)
    assert (
        numbers["kl/units"] == pytest.approx(float(total.detach()) / count, rel=1e-4)
        and (seen > 20 or span == "none")
        and 0 < numbers["units/spans"] < 1
    )


def test_one_vocabulary_on_both_sides_is_ordinary_distillation(world, tmp_path):
    """methods.simct score by a teacher of the student's own tokenizer: the gradient of the
    exact reverse KL over the whole vocabulary."""
    done = simct_command.main(
        argv(
            "score",
            model=world.teacher,
            student=world.base,
            prompts=world.prompts,
            rollouts=world.rollouts,
            out=tmp_path / "u.jsonl",
        )
    )
    assert done["shared_vocabulary"] == 24
    # a student in training samples a <|user|> now and then, whose bytes are none: what stands
    # behind it is not understood
    whole = {
        (s["id"], s["sample"])
        for s in load(tmp_path / "u.jsonl")
        if len(s["units"]) == len(s["logprobs"])
    }
    keep = {
        name: dump(
            tmp_path / f"{name}.jsonl",
            [r for r in load(path) if (r["id"], r["sample"]) in whole],
        )
        for name, path in (
            ("rollouts", world.rollouts),
            ("scores", world.scores),
            ("units", tmp_path / "u.jsonl"),
        )
    }
    assert len(whole) > 16 and all(
        [u[1] - u[0] for u in s["units"]] == [1] * len(s["units"]) for s in load(keep["units"])
    )
    want, _ = gradient(
        world, dict(method="opd-full", rollouts=keep["rollouts"], scores=keep["scores"])
    )
    for name in ("simct", "simple-opd"):
        got, _ = gradient(
            world, dict(method=name, rollouts=keep["rollouts"], scores=keep["units"])
        )
        same_gradient(got, want, 2e-5)
    got, _ = gradient(
        world, dict(method="opd", rollouts=keep["rollouts"], scores=keep["units"])
    )
    want, _ = gradient(
        world, dict(method="opd", rollouts=keep["rollouts"], scores=keep["scores"])
    )
    same_gradient(got, want, 2e-4)  # the file's log-probs have six digits


def test_opd_on_units_is_dpca(world, foreign):
    """Every token's advantage is (L_T / L_S - 1) log p_S(token), L the log-probs of its unit
    (2606.09456); none outside of units."""
    for r, s in both(world, foreign):
        inside = set()
        for (s0, s1, _, _), total in zip(s["units"], s["unit_logprobs"]):
            mine = sum(r["logprobs"][s0:s1])
            for t in range(s0, s1):
                assert s["logprobs"][t] - r["logprobs"][t] == pytest.approx(
                    (total / mine - 1) * r["logprobs"][t], abs=2e-3
                )
                inside.add(t)
        assert all(
            s["logprobs"][t] == pytest.approx(r["logprobs"][t], abs=1e-5)
            for t in range(len(r["logprobs"]))
            if t not in inside
        )


def test_candidates_of_the_students_own_choice_bound_the_file(world, foreign, tmp_path):
    teacher.main(
        argv(
            "score",
            model=world.base,
            rollouts=world.rollouts,
            out=tmp_path / "own.jsonl",
            top_k=3,
        )
    )
    simct_command.main(
        argv(
            "score",
            model=foreign[1],
            student=world.base,
            prompts=world.prompts,
            rollouts=world.rollouts,
            top_k_of=tmp_path / "own.jsonl",
            out=tmp_path / "u.jsonl",
        )
    )
    own, everything = by_key(load(tmp_path / "own.jsonl")), by_key(load(foreign[2]))
    for s in load(tmp_path / "u.jsonl"):
        key = s["id"], s["sample"]
        full = (
            dict(
                zip(map(int, records.unpack(everything[key]["unit_topk"]["ids"])[0]), range(99))
            )
            if s["units"]
            else {}
        )
        whole = records.unpack(everything[key]["unit_topk"]["logprobs"])
        for row, (s0, _, _, _) in enumerate(s["units"]):
            ids, logps = (
                records.unpack(s["unit_topk"]["ids"])[row],
                records.unpack(s["unit_topk"]["logprobs"])[row],
            )
            assert ids.tolist() == records.unpack(own[key]["topk"]["ids"])[s0].tolist()
            assert [float(x) for x in logps] == pytest.approx(
                [float(whole[row][full[int(i)]]) if int(i) in full else -np.inf for i in ids],
                abs=1e-4,
            )
    got, numbers = gradient(
        world, dict(method="simct", rollouts=world.rollouts, scores=tmp_path / "u.jsonl")
    )
    assert (
        torch.isfinite(got).all() and got.abs().sum() > 0 and math.isfinite(numbers["kl/units"])
    )


def test_a_masked_token_takes_its_unit_with_it(world, foreign, tmp_path):
    """What tool text has a part in is not trained on: the same gradient whatever stands in the
    unit."""
    rows, scores = map(list, zip(*both(world, foreign)))
    for r, s in zip(rows, scores):
        span = next(((s0, s1) for s0, s1, _, _ in s["units"] if s1 - s0 > 1), None)
        if span:
            r["loss_mask"][span[0] + 1] = 0
    masked = dump(tmp_path / "r.jsonl", rows)
    got, _ = gradient(world, dict(method="simct", rollouts=masked, scores=foreign[2]))
    for r, s in zip(rows, scores):
        for row, (s0, s1, _, _) in enumerate(s["units"]):
            if not all(r["loss_mask"][s0:s1]):
                s["unit_logprobs"][row] = -55.0
    other, _ = gradient(
        world, dict(method="simct", rollouts=masked, scores=dump(tmp_path / "s.jsonl", scores))
    )
    assert torch.equal(got, other)


# ---- controls


def regrouped(world, foreign, out, **flags):
    return (
        simct_regroup.main(argv(scores=foreign[2], rollouts=world.rollouts, out=out, **flags)),
        by_key(load(out)),
        by_key(load(foreign[2])),
    )


def is_span(unit):
    return (unit[1] - unit[0], unit[3] - unit[2]) != (1, 1)


def test_without_spans_simct_is_its_baseline(world, foreign, tmp_path):
    done, _, _ = regrouped(world, foreign, tmp_path / "u.jsonl", drop_spans=1.0)
    assert done["spans"] == 0
    flags = dict(rollouts=world.rollouts)
    got, _ = gradient(world, dict(flags, method="simct", scores=tmp_path / "u.jsonl"))
    want, _ = gradient(world, dict(flags, method="simple-opd", scores=foreign[2]))
    same_gradient(got, want, 1e-6)
    half, _, _ = regrouped(world, foreign, tmp_path / "h.jsonl", drop_spans=0.5, seed=3)
    whole = sum(is_span(u) for s in load(foreign[2]) for u in s["units"])
    assert 0.2 * whole < half["spans"] < 0.8 * whole


def test_coarsening_keeps_the_text_and_its_probability(world, foreign, tmp_path):
    done, coarse, fine = regrouped(world, foreign, tmp_path / "u.jsonl", coarsen=0.5)
    ids = {(r["id"], r["sample"]): r["response_ids"] for r in load(world.rollouts)}
    joined = 0
    for key, s in coarse.items():
        before = fine[key]
        assert [u[0] for u in s["units"]] == [0] * bool(s["units"]) + [
            u[1] for u in s["units"]
        ][:-1] and s["units"][-1:] == before["units"][-1:], (
            "no gap, and the end of a turn alone"
        )
        assert sum(s["unit_logprobs"]) == pytest.approx(sum(before["unit_logprobs"])) and sum(
            s["unit_logits"]
        ) == pytest.approx(sum(before["unit_logits"]))
        place = {u[0]: i for i, u in enumerate(before["units"])}
        for i, u in enumerate(s["units"]):
            j = place[u[0]]
            assert (
                records.unpack(s["unit_topk"]["logprobs"])[i].tolist()
                == records.unpack(before["unit_topk"]["logprobs"])[j].tolist()
                and s["unit_logz"][i] == before["unit_logz"][j]
            )
            if u != before["units"][j]:
                marked = records.unpack(s["unit_topk"]["ids"])[i][
                    records.unpack(s["prefixes"])[i] > 0
                ].tolist()
                assert marked in ([ids[key][u[0]]], []), (
                    "its first token begins it (a special one is no candidate)"
                )
                joined += 1
    assert joined > 30 and done["spans"] == joined + sum(
        is_span(u) for s in fine.values() for u in s["units"]
    )


def test_shuffling_deals_the_spans_scores_among_the_spans(world, foreign, tmp_path):
    _, dealt, before = regrouped(world, foreign, tmp_path / "u.jsonl", shuffle_spans=True)
    means = [
        sorted(
            round(s["unit_logprobs"][i] / (u[3] - u[2]), 5)
            for s in some.values()
            for i, u in enumerate(s["units"])
            if is_span(u)
        )
        for some in (dealt, before)
    ]
    assert means[0] == pytest.approx(means[1], abs=2e-5) and any(
        dealt[k]["unit_logprobs"] != before[k]["unit_logprobs"] for k in before
    )
    for key in before:
        assert all(
            a == b
            for a, b, u in zip(
                dealt[key]["unit_logprobs"], before[key]["unit_logprobs"], before[key]["units"]
            )
            if not is_span(u)
        )


def test_regroup_refuses_what_is_no_units_file(world, foreign, tmp_path, capsys):
    flags = dict(rollouts=world.rollouts, out=tmp_path / "u.jsonl")
    assert "run methods.simct score" in refusal(
        simct_regroup.main, argv(scores=world.scores, **flags), capsys
    )
    with pytest.raises(SystemExit):
        simct_regroup.main(argv(scores=foreign[2], coarsen=1.5, **flags))
    other = dump(
        tmp_path / "r.jsonl", [r | {"text": r["text"] + "1"} for r in load(world.rollouts)]
    )
    assert "made for other rollouts" in refusal(
        simct_regroup.main, argv(scores=foreign[2], **dict(flags, rollouts=other)), capsys
    )


def test_what_does_not_fit_is_refused(world, foreign, tmp_path, capsys):
    def said(**flags):
        return refusal(
            train.main,
            argv(
                **dict(
                    dict(
                        method="simct",
                        model=world.base,
                        rollouts=world.rollouts,
                        scores=foreign[2],
                        out=tmp_path / "m",
                        **FAST,
                    ),
                    **flags,
                )
            ),
            capsys,
        )

    assert "run methods.simct score" in said(scores=world.scores)
    broken = load(foreign[2])
    broken[3]["units"][0][1] = broken[3]["units"][1][1]
    assert ":4: units: expected one after another" in said(
        scores=dump(tmp_path / "s.jsonl", broken)
    )
    assert "another vocabulary: --scores" in said(scores=None, teacher=world.teacher)
    assert "with a column of" in said(method="opd", set="span=sum")
    units_flags = dict(
        model=foreign[1],
        student=world.base,
        prompts=world.prompts,
        rollouts=world.rollouts,
        out=tmp_path / "u.jsonl",
    )
    assert "policy.vocabulary" in refusal(
        simct_command.main, argv("score", **dict(units_flags, student=foreign[1])), capsys
    )
    assert "--ends <|end|>: expected A=B" in refusal(
        simct_command.main, argv("score", **units_flags, ends="<|end|>"), capsys
    )
    assert "topk" in refusal(
        simct_command.main, argv("score", **units_flags, top_k_of=foreign[2]), capsys
    )
    assert units.pair_of_ends(
        "<|user|>=<|end|>",
        policies.load_tokenizer(str(world.base)),
        policies.load_tokenizer(str(foreign[1])),
    ) == (2, 4)
