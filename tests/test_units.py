"""SimCT's loss: an example by hand, the same vocabulary as ordinary distillation, and a real
pair of tokenizers in float64."""

import copy

import numpy as np
import pytest
import torch
from conftest import SFT, argv, by_key, dump, load, naive_model, refusal, with_positions
from test_train import FAST, gradient, same_gradient

import teacher
import train
from experiments import simct_regroup
from methods.simct import __main__ as simct_command
from methods.simct import align, units
from methods.simct.loss import UnitLoss, unit_divergence
from opd import policy as policies
from opd import records
from opd.chat import render


def doubles(values):
    return torch.tensor(values, dtype=torch.float64)


def one_unit(student, teacher_, text, text_teacher, **changes):
    """The loss of one unit: candidates' probabilities on both sides, of which the first begins
    its text; the token probabilities of the text on both sides."""
    own, support = doubles(text).log(), doubles(student).log()
    spelling = [len(text_teacher), float(doubles(text_teacher).log().sum())]
    unit = torch.zeros(len(text), 6, dtype=torch.float64)
    unit[:, 1] = 1
    unit[0] = doubles([1, 1, len(text), *spelling, 0])
    prefix = torch.zeros(len(text), len(student))
    prefix[0, 0] = 1
    theirs = doubles(teacher_).log().expand(len(text), -1)
    batch = {"unit": unit, "support_logp": theirs, "prefix": prefix, "raw": own}
    logp = torch.cat([own[:, None], support.expand(len(text), -1)], 1)
    value = unit_divergence(UnitLoss(**changes), logp, batch)
    assert not value[1:].any(), "it counts once, at its first token"
    return float(value[0])


def test_two_spellings_of_one_opinion():
    """The teacher spells 1|2|3, the student 123: nearly one opinion, and yet 0.572 nats, for
    the token 1 rivals the text it begins."""
    # candidates: 1, and everything else
    case = ([0.01, 0.09], [0.9, 0.1], [0.90], [0.9, 0.95, 0.95])
    assert one_unit(*case) == pytest.approx(0.572, abs=5e-4)
    assert one_unit(*case, prefixes="drop") == pytest.approx(0.0002, abs=5e-5)
    assert one_unit(*case, span="none") == 0.0
    # units of one token on both sides keep them: there is no other spelling
    alone = ([0.3, 0.2], [0.4, 0.1], [0.5], [0.6])
    assert 0 < one_unit(*alone) == one_unit(*alone, prefixes="drop")
    total = 0.9 * 0.95 * 0.95
    q, p = doubles([0.01, 0.09, 0.9]), doubles([0.9, 0.1, total]) / (1 + total)
    expected = float((q * (q / p).log()).sum())
    assert one_unit(*case, span="sum") == pytest.approx(expected, abs=1e-9)


# ---- files


def scored(world, model, out, **flags):
    """methods.simct score of the world's rollouts; returns its summary."""
    paths = dict(student=world.base, prompts=world.prompts, rollouts=world.rollouts)
    return simct_command.main(argv("score", model=model, out=out, **paths, **flags))


def test_a_teacher_without_positions_for_a_text_is_refused(world, tmp_path, capsys):
    short = with_positions(world.teacher, tmp_path / "short", 8)
    flags = argv(model=short, student=world.base, prompts=world.prompts)
    flags += argv(rollouts=world.rollouts, out=tmp_path / "u.jsonl")
    message = refusal(simct_command.main, ["score", *flags], capsys)
    assert "expected at most 8 tokens" in message


@pytest.fixture(scope="module")
def foreign(world, tmp_path_factory):
    """A teacher that merges two digits, after a little training, and its units of the world's
    rollouts."""
    root = tmp_path_factory.mktemp("foreign")
    files = dict(model=world.toy / "teacher_merged_digits", rollouts=world.toy / "clean.jsonl")
    train.main(argv(out=root / "teacher", steps=25, learning_rate=6e-3, **files, **SFT))
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


def teacher_logits(world, foreign):
    """(rollout, score, the teacher's ids, its logits of them) from plain transformers."""
    model = naive_model(foreign[1])
    student, there = tokenizers(world, foreign)
    prompts = {p["id"]: p for p in load(world.prompts)}
    for r, s in both(world, foreign):
        ids = align.align(student, there, r["response_ids"]).teacher_ids
        prompt = render(there, prompts[r["id"]])
        with torch.no_grad():
            z = model(torch.tensor([prompt + ids])).logits[0]
        yield r, s, ids, z[len(prompt) - 1 : -1]


def test_the_files_numbers_are_the_teachers(world, foreign):
    student, there = tokenizers(world, foreign)
    shared = align.shared_vocabulary(student, there)
    shared[student.eos_token_id] = there.eos_token_id
    numbers = 0
    for r, s, ids, z in teacher_logits(world, foreign):
        logp, logz = torch.log_softmax(z, -1), z.logsumexp(-1)
        own = torch.tensor(ids)[:, None]
        logits, logps = z.gather(1, own)[:, 0], logp.gather(1, own)[:, 0]
        candidates, top, prefixes = candidates_of(s)
        for row, (s0, s1, t0, t1) in enumerate(s["units"]):
            found = [s[name][row] for name in ("unit_logprobs", "unit_logits", "unit_logz")]
            want = [logps[t0:t1].sum(), logits[t0:t1].sum(), logz[t0]]
            assert found == pytest.approx([float(x) for x in want], abs=5e-4)
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
    0 where it is left out."""
    s0, s1, t0, t1 = s["units"][row]
    several = is_span(s["units"][row])
    if several and span == "none":
        return 0
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


@pytest.mark.parametrize(
    "span, prefixes",
    [("mean", "keep"), ("mean", "drop"), ("sum", "drop"), ("logit", "keep"), ("none", "keep")],
)
def test_the_gradient_of_a_step_is_the_formulas(
    world, foreign, base64bit, tmp_path, span, prefixes
):
    """Full logits in float64, one unpadded sequence and one unit at a time."""
    model = copy.deepcopy(base64bit)
    pairs = both(world, foreign)[:12]
    count = sum(len(r["response_ids"]) for r, _ in pairs)
    total = 0.0
    for r, s in pairs:
        ids = torch.tensor([r["prompt_ids"] + r["response_ids"]])
        z = model(ids).logits[0][len(r["prompt_ids"]) - 1 : -1]
        for row in range(len(s["units"])):
            total = total + unit_by_hand(z, r, s, row, span, prefixes)
    assert sum(is_span(u) for _, s in pairs for u in s["units"]) > 10
    (total / count).backward()
    parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    rollouts = dump(tmp_path / "r.jsonl", [r for r, _ in pairs])
    flags = dict(method="simct", rollouts=rollouts, scores=foreign[2])
    overrides = (f"span={span}", f"prefixes={prefixes}")
    for micro in ({}, {"micro": 1}):
        got, numbers = gradient(world, flags, overrides=overrides, **micro)
        same_gradient(got, torch.cat([part.flatten() for part in parts]), 5e-5)
        assert numbers["kl/units"] == pytest.approx(float(total.detach()) / count, rel=1e-4)
    assert 0 < numbers["units/spans"] < 1


def test_one_vocabulary_on_both_sides_is_ordinary_distillation(world, tmp_path):
    """Units of a teacher with the student's own tokenizer: the gradient of the exact reverse KL
    over the whole vocabulary."""
    scored(world, world.teacher, tmp_path / "u.jsonl")
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
    # the log-probs of units have six digits
    for method, exact, tolerance in (
        ("simct", "opd-full", 2e-5),
        ("simple-opd", "opd-full", 2e-5),
        ("opd", "opd", 2e-4),
    ):
        got, want = (
            gradient(world, dict(method=name, rollouts=rollouts, scores=path))[0]
            for name, path in ((method, units_file), (exact, scores))
        )
        same_gradient(got, want, tolerance)


def test_opd_on_units_is_dpca(world, foreign):
    """Every token's advantage is (L_T / L_S - 1) log p_S(token), L the log-probs of its unit
    (2606.09456); none outside of units."""
    for r, s in both(world, foreign):
        want = np.array(r["logprobs"])
        for (s0, s1, _, _), total in zip(s["units"], s["unit_logprobs"]):
            want[s0:s1] *= total / want[s0:s1].sum()
        assert s["logprobs"] == pytest.approx(want, abs=2e-3)


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
    got, _ = gradient(world, flags)
    assert torch.isfinite(got).all() and got.abs().sum() > 0


@pytest.mark.parametrize("budget", [60, 10**5])
def test_a_shared_prompt_changes_no_score(world, foreign, tmp_path, budget):
    flags = dict(share_prompts=True, batch_tokens=budget)
    scored(world, foreign[1], tmp_path / "u.jsonl", **flags)
    found = by_key(load(tmp_path / "u.jsonl"))
    for r, s in both(world, foreign):
        again = found[r["id"], r["sample"]]
        assert again["units"] == s["units"]
        assert again["unit_logprobs"] == pytest.approx(s["unit_logprobs"], abs=1e-4)
        for one, other in zip(candidates_of(again), candidates_of(s)):
            np.testing.assert_allclose(one, other, atol=1e-4)


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


def test_coarsening_keeps_the_text_and_its_probability(world, foreign, tmp_path):
    done, coarse, fine = regrouped(world, foreign, tmp_path / "u.jsonl", coarsen=0.5)
    tokens = {key: r["response_ids"] for key, r in by_key(load(world.rollouts)).items()}
    joined = 0
    for key, s in coarse.items():
        before = fine[key]
        starts = [u[0] for u in s["units"]]
        inside = [[i for u in x["units"] for i in range(u[0], u[1])] for x in (s, before)]
        assert inside[0] == inside[1], "no new gap"
        assert s["units"][-1:] == before["units"][-1:], "the end of a turn stays alone"
        for name in ("unit_logprobs", "unit_logits"):
            assert sum(s[name]) == pytest.approx(sum(before[name]))
        (ids, logps, prefixes), (_, logps_before, _) = candidates_of(s), candidates_of(before)
        places = {u[0]: i for i, u in enumerate(before["units"])}
        old = [places[start] for start in starts]
        assert (logps == logps_before[old]).all()
        assert s["unit_logz"] == [before["unit_logz"][j] for j in old]
        for i, u in enumerate(s["units"]):
            if u != before["units"][old[i]]:
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


# ---- refusals


def test_scores_of_something_else_are_no_units(world, foreign, tmp_path, capsys):
    longer = [r | {"text": r["text"] + "1"} for r in load(world.rollouts)]
    gap = load(foreign[2])
    gap[3]["units"][0][1] = gap[3]["units"][1][1]
    gap = dump(tmp_path / "gap.jsonl", gap)
    base = dict(rollouts=world.rollouts, scores=foreign[2], out=tmp_path / "out")
    training = base | dict(method="simct", model=world.base, **FAST)
    scoring = dict(base, student=world.base, prompts=world.prompts, model=foreign[1])
    del scoring["scores"]
    table = [
        (base, dict(scores=world.scores), "run methods.simct score"),
        (base, dict(rollouts=dump(tmp_path / "l.jsonl", longer)), "made for other rollouts"),
        (training, dict(scores=world.scores), "run methods.simct score"),
        (training, dict(scores=gap), ":4: units: expected one after another"),
        (training, dict(scores=None, teacher=world.teacher), "another vocabulary: --scores"),
        (scoring, dict(student=foreign[1]), "policy.vocabulary"),
        (scoring, dict(ends="<|end|>"), "--ends <|end|>: expected A=B"),
        (scoring, dict(top_k_of=foreign[2]), "topk"),
    ]
    for flags, change, words in table:
        main, command = simct_regroup.main, []
        if flags is training:
            main = train.main
        if flags is scoring:
            main, command = simct_command.main, ["score"]
        assert words in refusal(main, command + argv(**flags | change), capsys)
    assert units.pair_of_ends("<|user|>=<|end|>", *tokenizers(world, foreign)) == (2, 4)
