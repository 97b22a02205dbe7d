"""SimCT's loss: an example by hand, the same vocabulary as ordinary distillation, and a real
pair of tokenizers in float64."""

import copy
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


def scored(world, model, out, **flags):
    """methods.simct score of the world's rollouts; returns its summary."""
    paths = dict(student=world.base, prompts=world.prompts, rollouts=world.rollouts)
    return simct_command.main(argv("score", model=model, out=out, **paths, **flags))


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
    done = scored(world, root / "teacher", root / "units.jsonl")
    return root, root / "teacher", root / "units.jsonl", done


def both(world, foreign):
    """(rollout, score) pairs."""
    scores = by_key(load(foreign[2]))
    return [(r, scores[r["id"], r["sample"]]) for r in load(world.rollouts)]


def tokenizers(world, foreign):
    names = (world.base, foreign[1])
    return [policies.load_tokenizer(str(name)) for name in names]


def candidates_of(score):
    """(ids, log-probs, prefixes), each [U, K]."""
    packed = (*score["unit_topk"].values(), score["prefixes"])
    return [records.unpack(x) for x in packed]


def test_the_files_numbers_are_the_teachers(world, foreign):
    model = naive_model(foreign[1])
    student, there = tokenizers(world, foreign)
    shared = align.shared_vocabulary(student, there) | {
        student.eos_token_id: there.eos_token_id
    }
    prompts = {p["id"]: p for p in load(world.prompts)}
    numbers = 0
    for r, s in both(world, foreign):
        ids = align.align(student, there, r["response_ids"]).teacher_ids
        prompt = policies.render(there, prompts[r["id"]])
        with torch.no_grad():
            z = model(torch.tensor([prompt + ids])).logits[0][len(prompt) - 1 : -1]
        logp = torch.log_softmax(z, -1)
        candidates, top, prefixes = candidates_of(s)
        for row, (s0, s1, t0, t1) in enumerate(s["units"]):
            own = torch.tensor(ids[t0:t1])[:, None]
            total = float(logp[t0:t1].gather(1, own).sum())
            assert s["unit_logprobs"][row] == pytest.approx(total, abs=1e-4)
            assert sum(s["logprobs"][s0:s1]) == pytest.approx(total, abs=1e-3)
            logits = float(z[t0:t1].gather(1, own).sum())
            assert s["unit_logits"][row] == pytest.approx(logits, abs=1e-3)
            assert s["unit_logz"][row] == pytest.approx(float(z[t0].logsumexp(-1)), abs=1e-3)
            theirs = [float(logp[t0, shared[int(i)]]) for i in candidates[row]]
            assert top[row] == pytest.approx(theirs, abs=1e-4)
            # of two digits at most; a <|user|> has no text
            text = b"".join(align.pieces_of(student, r["response_ids"][s0:s1])).decode()
            begins = [student.convert_tokens_to_ids(text[0])] if len(text) > 1 else []
            assert candidates[row][prefixes[row] > 0].tolist() == begins
            numbers += len(text) > 1
    assert numbers > 10, "there are numbers of two digits"
    assert 0 < foreign[3]["strict"] < foreign[3]["covered"] <= 1


def is_span(unit):
    return (unit[1] - unit[0], unit[3] - unit[2]) != (1, 1)


def unit_by_hand(z, r, s, row, span, prefixes):
    """The divergence of one unit by equations 6 to 9; z [T, V] logits of the rollout's tokens.
    None where it is left out."""
    s0, s1, t0, t1 = s["units"][row]
    several = is_span(s["units"][row])
    if several and span == "none":
        return None
    values = z if span == "logit" else torch.log_softmax(z, -1)
    shift = s["unit_logz"][row] if span == "logit" else 0
    mine = []
    theirs = []
    for i, logp, begins in zip(*(x[row] for x in candidates_of(s))):
        if not (several and prefixes == "drop" and begins):
            mine.append(values[s0][int(i)])
            theirs.append(float(logp) + shift)
    if several:
        own = torch.tensor(r["response_ids"][s0:s1])[:, None]
        spelt = values[s0:s1].gather(1, own).sum()
        score = s["unit_logits" if span == "logit" else "unit_logprobs"][row]
        mine.append(spelt if span == "sum" else spelt / (s1 - s0))
        theirs.append(score if span == "sum" else score / (t1 - t0))
    q = torch.log_softmax(torch.stack(mine), 0)
    p = torch.log_softmax(torch.tensor(theirs, dtype=torch.float64), 0)
    return (q.exp() * (q - p)).sum()


@pytest.mark.parametrize("span", ["mean", "sum", "logit", "none"])
@pytest.mark.parametrize("prefixes", ["keep", "drop"])
def test_the_gradient_of_a_step_is_the_formulas(world, foreign, base64bit, span, prefixes):
    """Full logits in float64, one unpadded sequence and one unit at a time."""
    model = copy.deepcopy(base64bit)
    pairs = both(world, foreign)
    count = sum(len(r["response_ids"]) for r, _ in pairs)
    total = 0.0
    for r, s in pairs:
        ids = torch.tensor([r["prompt_ids"] + r["response_ids"]])
        z = model(ids).logits[0][len(r["prompt_ids"]) - 1 : -1]
        for row in range(len(s["units"])):
            value = unit_by_hand(z, r, s, row, span, prefixes)
            total = total + (0 if value is None else value)
    assert sum(is_span(u) for _, s in pairs for u in s["units"]) > 20
    (total / count).backward()
    parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    flags = dict(method="simct", rollouts=world.rollouts, scores=foreign[2])
    overrides = (f"span={span}", f"prefixes={prefixes}")
    got, numbers = gradient(world, flags, overrides=overrides)
    same_gradient(got, torch.cat([part.flatten() for part in parts]), 5e-5)
    one_by_one, _ = gradient(world, flags, overrides=overrides, micro=1)
    same_gradient(one_by_one, got, 1e-5)
    assert numbers["kl/units"] == pytest.approx(float(total.detach()) / count, rel=1e-4)
    assert 0 < numbers["units/spans"] < 1


def test_one_vocabulary_on_both_sides_is_ordinary_distillation(world, tmp_path):
    """Units of a teacher with the student's own tokenizer: the gradient of the exact reverse KL
    over the whole vocabulary."""
    done = scored(world, world.teacher, tmp_path / "u.jsonl")
    assert done["shared_vocabulary"] == 24
    # a student in training samples a <|user|> now and then, whose bytes are none: what stands
    # behind it has no unit
    whole = set()
    for s in load(tmp_path / "u.jsonl"):
        if len(s["units"]) == len(s["logprobs"]):
            whole.add((s["id"], s["sample"]))
            assert not any(is_span(u) for u in s["units"])
    assert len(whole) > 16

    def kept(name, path):
        rows = [r for r in load(path) if (r["id"], r["sample"]) in whole]
        return dump(tmp_path / f"{name}.jsonl", rows)

    rollouts = kept("rollouts", world.rollouts)
    scores = kept("scores", world.scores)
    units_file = kept("units", tmp_path / "u.jsonl")

    def of(method, path):
        return gradient(world, dict(method=method, rollouts=rollouts, scores=path))[0]

    want = of("opd-full", scores)
    for name in ("simct", "simple-opd"):
        same_gradient(of(name, units_file), want, 2e-5)
    # the file's log-probs have six digits
    same_gradient(of("opd", units_file), of("opd", scores), 2e-4)


def test_opd_on_units_is_dpca(world, foreign):
    """Every token's advantage is (L_T / L_S - 1) log p_S(token), L the log-probs of its unit
    (2606.09456); none outside of units."""
    for r, s in both(world, foreign):
        want = np.zeros(len(r["logprobs"]))
        for (s0, s1, _, _), total in zip(s["units"], s["unit_logprobs"]):
            own = np.array(r["logprobs"][s0:s1])
            want[s0:s1] = (total / own.sum() - 1) * own
        assert np.subtract(s["logprobs"], r["logprobs"]) == pytest.approx(want, abs=2e-3)


def test_candidates_of_the_students_own_choice_bound_the_file(world, foreign, tmp_path):
    own = tmp_path / "own.jsonl"
    teacher.main(argv("score", model=world.base, rollouts=world.rollouts, out=own, top_k=3))
    scored(world, foreign[1], tmp_path / "u.jsonl", top_k_of=own)
    proposed = by_key(load(own))
    everything = by_key(load(foreign[2]))
    for key, s in by_key(load(tmp_path / "u.jsonl")).items():
        topk = records.unpack(proposed[key]["topk"]["ids"])
        all_ids, all_logps, _ = candidates_of(everything[key])
        ids, logps, _ = candidates_of(s)
        for row, (s0, _, _, _) in enumerate(s["units"]):
            known = dict(zip(all_ids[row].tolist(), all_logps[row].tolist()))
            assert ids[row].tolist() == topk[s0].tolist()
            want = [known.get(i, -np.inf) for i in ids[row].tolist()]
            assert logps[row].tolist() == pytest.approx(want, abs=1e-4)
    flags = dict(method="simct", rollouts=world.rollouts, scores=tmp_path / "u.jsonl")
    got, numbers = gradient(world, flags)
    assert torch.isfinite(got).all() and got.abs().sum() > 0
    assert math.isfinite(numbers["kl/units"])


def test_a_masked_token_takes_its_unit_with_it(world, foreign, tmp_path):
    """The same gradient whatever score stands in such a unit."""
    rows, scores = map(list, zip(*both(world, foreign)))
    for r, s in zip(rows, scores):
        span = next((u for u in s["units"] if u[1] - u[0] > 1), None)
        if span:
            r["loss_mask"][span[0] + 1] = 0
    flags = dict(method="simct", rollouts=dump(tmp_path / "r.jsonl", rows))
    got, _ = gradient(world, flags | {"scores": foreign[2]})
    for r, s in zip(rows, scores):
        for row, (s0, s1, _, _) in enumerate(s["units"]):
            if not all(r["loss_mask"][s0:s1]):
                s["unit_logprobs"][row] = -55.0
    other, _ = gradient(world, flags | {"scores": dump(tmp_path / "s.jsonl", scores)})
    assert torch.equal(got, other)


# ---- controls


def regrouped(world, foreign, out, **flags):
    paths = dict(scores=foreign[2], rollouts=world.rollouts, out=out)
    done = simct_regroup.main(argv(**paths, **flags))
    return done, by_key(load(out)), by_key(load(foreign[2]))


def test_without_spans_simct_is_its_baseline(world, foreign, tmp_path):
    done, _, before = regrouped(world, foreign, tmp_path / "u.jsonl", drop_spans=1.0)
    assert done["spans"] == 0
    flags = dict(rollouts=world.rollouts)
    got, _ = gradient(world, dict(flags, method="simct", scores=tmp_path / "u.jsonl"))
    want, _ = gradient(world, dict(flags, method="simple-opd", scores=foreign[2]))
    same_gradient(got, want, 1e-6)
    half, _, _ = regrouped(world, foreign, tmp_path / "h.jsonl", drop_spans=0.5, seed=3)
    whole = sum(is_span(u) for s in before.values() for u in s["units"])
    assert 0.2 * whole < half["spans"] < 0.8 * whole


def test_coarsening_keeps_the_text_and_its_probability(world, foreign, tmp_path):
    done, coarse, fine = regrouped(world, foreign, tmp_path / "u.jsonl", coarsen=0.5)
    tokens = {key: r["response_ids"] for key, r in by_key(load(world.rollouts)).items()}
    joined = 0
    for key, s in coarse.items():
        before = fine[key]
        edges = [0, *(u[1] for u in s["units"])]
        assert [u[0] for u in s["units"]] == edges[:-1], "no gap"
        assert s["units"][-1:] == before["units"][-1:], "the end of a turn stays alone"
        for name in ("unit_logprobs", "unit_logits"):
            assert sum(s[name]) == pytest.approx(sum(before[name]))
        ids, logps, prefixes = candidates_of(s)
        _, logps_before, _ = candidates_of(before)
        place = {u[0]: i for i, u in enumerate(before["units"])}
        for i, u in enumerate(s["units"]):
            j = place[u[0]]
            assert logps[i].tolist() == logps_before[j].tolist()
            assert s["unit_logz"][i] == before["unit_logz"][j]
            if u != before["units"][j]:
                # its first token begins it (a special one is no candidate)
                assert ids[i][prefixes[i] > 0].tolist() in ([tokens[key][u[0]]], [])
                joined += 1
    spans = sum(is_span(u) for s in fine.values() for u in s["units"])
    assert joined > 30 and done["spans"] == joined + spans


def test_shuffling_deals_the_spans_scores_among_the_spans(world, foreign, tmp_path):
    _, dealt, before = regrouped(world, foreign, tmp_path / "u.jsonl", shuffle_spans=True)
    means = {"dealt": [], "before": []}
    for key, old in before.items():
        new = dealt[key]
        for i, u in enumerate(old["units"]):
            if is_span(u):
                means["dealt"].append(new["unit_logprobs"][i] / (u[3] - u[2]))
                means["before"].append(old["unit_logprobs"][i] / (u[3] - u[2]))
            else:
                assert new["unit_logprobs"][i] == old["unit_logprobs"][i]
    assert means["dealt"] != means["before"]
    assert sorted(means["dealt"]) == pytest.approx(sorted(means["before"]), abs=2e-5)


def test_regroup_refuses_what_is_no_units_file(world, foreign, tmp_path, capsys):
    flags = dict(rollouts=world.rollouts, scores=foreign[2], out=tmp_path / "u.jsonl")

    def said(**changes):
        return refusal(simct_regroup.main, argv(**flags | changes), capsys)

    assert "run methods.simct score" in said(scores=world.scores)
    rows = [r | {"text": r["text"] + "1"} for r in load(world.rollouts)]
    other = dump(tmp_path / "r.jsonl", rows)
    assert "made for other rollouts" in said(rollouts=other)
    strange = dump(tmp_path / "s.jsonl", [load(foreign[2])[0] | {"id": "strange"}])
    assert "expected those of a rollout of" in said(scores=strange)
    with pytest.raises(SystemExit):
        simct_regroup.main(argv(coarsen=1.5, **flags))


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
