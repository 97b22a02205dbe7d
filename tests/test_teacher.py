"""teacher.py: cached numbers equal a direct forward pass, and ids are never read with another
vocabulary or template."""

import numpy as np
import pytest
import torch
from conftest import (
    argv,
    by_key,
    dump,
    edge_rollouts,
    kill_while_writing,
    load,
    naive_logps,
    naive_own,
    padded,
    permuted,
    refusal,
    variant,
)

import teacher
from experiments import controls
from opd import records, scoring
from opd.policy import load_tokenizer

V = 24
END = 4  # <|end|>


def close(got, want):
    np.testing.assert_allclose(got, want, atol=2e-5, rtol=0)


def topk(record):
    return records.unpack(record["topk"]["ids"]), records.unpack(record["topk"]["logprobs"])


def key_of(record):
    return record["id"], record["sample"]


class Stage:
    """`teacher.py score` on the world's rollouts, in a folder of its own."""

    def __init__(self, world, folder, capsys):
        self.folder = folder
        self.capsys = capsys
        self.flags = dict(model=world.teacher, rollouts=world.rollouts)

    def words(self, name, flags):
        return argv("score", out=self.folder / f"{name}.jsonl", **self.flags | flags)

    def score(self, name="s", **flags):
        """(the summary, {key: record})"""
        summary = teacher.main(self.words(name, flags))
        return summary, by_key(load(self.folder / f"{name}.jsonl"))

    def refused(self, name="refused", **flags):
        return refusal(teacher.main, self.words(name, flags), self.capsys)

    def dump(self, name, rows):
        return dump(self.folder / f"{name}.jsonl", rows)


@pytest.fixture
def stage(world, tmp_path, capsys):
    return Stage(world, tmp_path, capsys)


@pytest.fixture(scope="module")
def rollouts(world):
    return load(world.rollouts)


@pytest.fixture(scope="module")
def exact(rollouts, teacher64bit):
    """{key: the teacher's log-probs of the whole vocabulary, [T, V] float64}"""
    with torch.no_grad():
        ids = {key_of(r): (r["prompt_ids"], r["response_ids"]) for r in rollouts}
        return {key: naive_logps(teacher64bit, *each) for key, each in ids.items()}


def own(table, rollout):
    return table[range(len(table)), rollout["response_ids"]]


def gathered(table, ids):
    return table.gather(1, torch.from_numpy(ids.astype(np.int64)))


# ---- the numbers


def test_cached_log_probs_are_those_of_the_teacher(world, rollouts, exact, base64bit):
    """And end_mass is the mass on the stop tokens at the last position."""
    scores = by_key(load(world.scores))
    assert scores.keys() == exact.keys()
    for r in rollouts:
        s, table = scores[key_of(r)], exact[key_of(r)]
        assert s["rollout"] == records.fingerprint(r)
        close(s["logprobs"], own(table, r))
        with torch.no_grad():
            students = naive_logps(base64bit, r["prompt_ids"], r["response_ids"])
        for got, want in ((s, table), (r, students)):
            mass = pytest.approx(float(want[-1, END].exp()), rel=1e-3, abs=1e-6)
            assert got["end_mass"] == mass
    assert {r["finish_reason"] for r in rollouts} == {"stop", "length"}


def test_scores_hold_at_any_temperature_mask_batch_and_number_of_ids(stage, rollouts, exact):
    """Temperature 1, masked tokens too, each sequence as if it were alone; ids may be
    numbers."""
    numbers = {r["id"]: i for i, r in enumerate(rollouts)}
    rows = []
    for r in rollouts:
        masked = dict(loss_mask=[0] * len(r["loss_mask"]), temperature=0.5)
        rows.append(r | masked | {"id": numbers[r["id"]]})
    path = stage.dump("r", rows)
    for budget in (1, 200):
        _, scores = stage.score(f"s{budget}", rollouts=path, batch_tokens=budget)
        for r in rollouts:
            got = scores[numbers[r["id"]], r["sample"]]["logprobs"]
            close(got, own(exact[key_of(r)], r))


@pytest.mark.parametrize("k", [1, 5, V])
def test_top_k_are_the_likeliest_tokens(stage, exact, k):
    _, scores = stage.score(top_k=k, batch_tokens=100)
    for key, table in exact.items():
        ids, logps = topk(scores[key])
        assert ids.shape == (len(table), k)
        close(logps, table.topk(k).values)
        close(logps, gathered(table, ids))
        assert all(len(set(row)) == k for row in ids.tolist())


def test_another_models_likeliest_tokens_are_scored_in_its_order(stage, world, exact):
    """--top-k-of: what the teacher thinks of the student's own alternatives."""
    _, students = stage.score("own", model=world.base, top_k=4)
    given = dict(top_k_of=stage.folder / "own.jsonl")
    _, scores = stage.score(**given, batch_tokens=100)
    for key, table in exact.items():
        (ids, logps), (proposed, _) = topk(scores[key]), topk(students[key])
        assert np.array_equal(ids, proposed)
        assert scores[key]["topk_of"] == students[key]["policy"]["weights"]
        close(logps, gathered(table, ids))


def test_a_token_that_means_the_same_lends_its_mass(stage, world, rollouts, exact):
    _, scores = stage.score(same_token="#=<|end|>")
    hash_id = load_tokenizer(str(world.teacher)).get_vocab()["#"]
    changed = 0
    for r in rollouts:
        table = exact[key_of(r)]
        both = torch.logaddexp(table[:, END], table[:, hash_id])
        ends = torch.tensor(r["response_ids"]) == END
        close(scores[key_of(r)]["logprobs"], torch.where(ends, both, own(table, r)))
        changed += int(ends.sum())
    assert changed > 3


def test_a_teacher_may_read_more_than_the_student(stage, world, rollouts, base64bit):
    """Self-distillation: the rollouts' own model, with the answer in the question's place;
    against a forward pass over a prompt built by hand."""
    tokenizer, prompts = load_tokenizer(world.base), {p["id"]: p for p in load(world.prompts)}
    itself = dict(model=world.base, prompts=world.prompts)
    _, scores = stage.score(**itself, hint="{answer}={question}", top_k=3)
    for r in rollouts:
        prompt = prompts[r["id"]]
        content = f"{prompt['answer']}={prompt['messages'][0]['content']}"
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        told, got = r | {"prompt_ids": ids}, scores[key_of(r)]
        assert ids != r["prompt_ids"] and got["rollout"] == records.fingerprint(r)
        assert got["context"] == records.fingerprint(told) != got["rollout"]
        close(got["logprobs"], naive_own(base64bit, told))
    # the same prompts: the student itself
    assert abs(stage.score("own", **itself)[0]["gap_max"]) < 1e-4
    # half of a file with the answer, half without
    message = stage.refused("s", **itself, hint="{question}")
    assert "hint" in message and "another --out" in message


ASKED = {"role": "user", "content": "2+2={?}"}
SYSTEM = {"role": "system", "content": "Be brief."}


def test_hints_are_filled_in():
    prompt = {"messages": [SYSTEM, ASKED, {"role": "assistant", "content": "It"}], "answer": 4}
    told = teacher.hinted(prompt, "{question} {{is}} {answer}", "f:1")["messages"]
    asked = {"role": "user", "content": "2+2={?} {is} 4"}
    assert told == [SYSTEM, asked, prompt["messages"][2]]
    assert prompt["messages"][1] is ASKED
    plain = {"prompt": "2+2=", "solution": "see"}
    assert teacher.hinted(plain, "{solution}: {question}", "f:1")["prompt"] == "see: 2+2="
    several = plain | {"answer": ["4", "four"]}
    assert teacher.hinted(several, "{question}{answer}", "f:1")["prompt"] == "2+2=4"
    for prompt, hint, message in (
        (prompt, "{solution}", "f:1: solution: expected, .*there is: answer, question"),
        (prompt, "{answer", "--hint: expected text with"),
        (prompt, "{}", "--hint: expected text with"),
        (prompt, "{question[a]}", "--hint: expected text with"),
        ({"messages": [SYSTEM]}, "{question}", "messages: expected one of the user's"),
    ):
        with pytest.raises(records.BadInput, match=message):
            teacher.hinted(prompt, hint, "f:1")


@pytest.mark.parametrize("k", [0, 4])
def test_one_token_and_empty_answers(stage, world, base64bit, teacher64bit, k):
    path = edge_rollouts(world, stage.folder / "r.jsonl", base64bit)
    rows = load(path)
    summary, scores = stage.score(rollouts=path, top_k=k)
    for r in rows:
        s = scores[key_of(r)]
        close(s["logprobs"], naive_own(teacher64bit, r))
        if k:
            assert topk(s)[0].shape == topk(s)[1].shape == (len(r["response_ids"]), 4)
    assert summary["teacher_tokens"] == sum(len(r["response_ids"]) for r in rows)
    summary, scores = stage.score("t", rollouts=stage.dump("empty", rows[1:2]), top_k=k)
    assert summary["teacher_tokens"] == 0 and scores[key_of(rows[1])]["logprobs"] == []


def test_a_bfloat16_teacher_keeps_float32_log_probs(stage, rollouts, exact):
    """Rounding logits to bfloat16 would leave log-probs on a coarse grid; a rounded model is
    near the exact one, and off the grid."""
    _, scores = stage.score(dtype="bfloat16")
    values = torch.cat([torch.tensor(scores[key_of(r)]["logprobs"]) for r in rollouts])
    wanted = torch.cat([own(exact[key_of(r)], r) for r in rollouts])
    assert 1e-5 < (values - wanted).abs().max() < 0.2
    assert (values.bfloat16().float() == values).float().mean() < 0.1


def test_an_embedding_padded_beyond_the_vocabulary_scores_the_same(stage, world, exact):
    """The padding rows are no tokens: they take no probability, and top-k never lists one."""
    folder = variant(world.teacher, stage.folder / "m", model=padded(9))
    _, scores = stage.score(model=folder, top_k=V)
    for key, table in exact.items():
        ids, logps = topk(scores[key])
        assert ids.max() < V
        close(logps, gathered(table, ids))


# ---- controls


@pytest.mark.parametrize("tools", [False, True])
def test_shuffled_scores_are_the_same_numbers_at_other_tokens(stage, world, rollouts, tools):
    """A tool's tokens, which the loss mask hides, keep their own."""
    rows = rollouts
    if tools:
        rows = [
            r | {"loss_mask": [i % 3 // 2 for i, _ in enumerate(r["loss_mask"])]} for r in rows
        ]
    given = dict(rollouts=stage.dump("r", rows)) if tools else {}
    flags = argv("shuffle-scores", scores=world.scores, out=stage.folder / "null.jsonl", seed=3)
    controls.main(flags + argv(**given))
    before, after = load(world.scores), load(stage.folder / "null.jsonl")
    flat = [np.concatenate([s["logprobs"] for s in each]) for each in (before, after)]
    masks = {key_of(r): r["loss_mask"] for r in rows}
    dealt = np.concatenate([masks[key_of(s)] for s in before]) > 0
    own, kept = ([x[where] for x in flat] for where in (dealt, ~dealt))
    assert np.array_equal(*kept) and (len(kept[0]) > 50) == tools
    assert np.array_equal(*map(np.sort, own)) and np.mean(own[0] == own[1]) < 0.2
    assert abs(np.corrcoef(*own)[0, 1]) < 0.15 and all("topk" not in s for s in after)
    same = [[(s["rollout"], len(s["logprobs"])) for s in each] for each in (before, after)]
    assert same[0] == same[1]


# ---- the summary


def test_the_summary_is_the_mean_gap_and_a_student_that_is_the_teacher_has_none(
    stage, world, rollouts, exact
):
    summary, _ = stage.score()
    gaps = np.concatenate(
        [np.array(r["logprobs"]) - own(exact[key_of(r)], r).numpy() for r in rollouts]
    )
    assert summary["kl_mean"] == pytest.approx(np.mean(gaps), abs=1e-5) and np.mean(gaps) > 0.05
    assert summary["gap_max"] == pytest.approx(np.abs(gaps).max(), abs=1e-4)
    assert summary["records"] == 32 and summary["teacher_tokens"] == len(gaps)
    same, _ = stage.score("same", model=world.base)
    assert abs(same["kl_mean"]) < 1e-5 and same["gap_max"] < 2e-5
    warm = stage.dump("warm", [rollouts[0] | {"temperature": 0.7}])
    summary, _ = stage.score("other", rollouts=warm)
    assert summary["kl_mean"] is None, "the log-probs are of two temperatures"
    assert summary["noise_floor"] is None, "one rollout alone"


def test_the_self_test_reports_what_batching_does_to_the_numbers(stage, monkeypatch):
    assert 0 <= stage.score("quiet")[0]["noise_floor"] < 1e-4
    quiet, alone = scoring.answer_states, []

    # a model whose batched forward differs from its single one
    def noisy(policy, prompts, *answers):
        alone.append(len(prompts) == 1)
        return quiet(policy, prompts, *answers) * (1.0 if len(prompts) == 1 else 1.01)

    monkeypatch.setattr(scoring, "answer_states", noisy)
    summary, _ = stage.score("noisy")
    assert any(alone) and not all(alone)
    assert summary["noise_floor"] > 1e-3
    assert f"noise floor {summary['noise_floor']:.1e}" in stage.capsys.readouterr().out


# ---- what is refused


def test_another_vocabulary_is_refused_always_and_another_template_unless_meant(
    stage, world, rollouts
):
    folder = variant(world.teacher, stage.folder / "m", permuted)
    mismatch = dict(allow_template_mismatch=True)
    for flags in ({}, mismatch):
        message = stage.refused(model=folder, **flags)
        assert f"{world.rollouts}:1: policy.vocabulary: expected" in message
    foreign = [dict(r) for r in rollouts]
    foreign[20]["policy"] = dict(foreign[20]["policy"], vocabulary="f" * 12)
    assert ":21: policy.vocabulary" in stage.refused(rollouts=stage.dump("r", foreign))

    def other_template(tokenizer):
        tokenizer.chat_template += " "

    folder = variant(world.teacher, stage.folder / "t", other_template)
    message = stage.refused(model=folder)
    assert f"{world.rollouts}:1: policy.template: expected" in message
    assert not (stage.folder / "refused.jsonl").exists()
    scores = stage.score("s", model=folder, **mismatch)[1]
    for s in load(world.scores):
        close(scores[key_of(s)]["logprobs"], s["logprobs"])


def test_bad_input_is_named_and_makes_no_file(stage, world):
    plain = stage.folder / "plain.jsonl"
    stage.score("plain", model=world.base)
    few = stage.dump("few", load(world.prompts)[1:])
    for flags, words in (
        (dict(rollouts=world.prompts), f"{world.prompts}:1: sample: expected"),
        (dict(prompts=few), "expected a prompt 't00000', which"),
        (dict(hint="x"), "--hint: needs --prompts"),
        (dict(tokenizer=world.teacher), "--tokenizer: expected --base-url"),
        (dict(top_k=-1), "--top-k: expected at least 0"),
        (dict(same_token="#"), "--same-token"),
        (dict(same_token="#=nothing"), "--same-token"),
        (dict(same_token="#=<|end|>", top_k=3), "--same-token"),
        (dict(top_k_of=plain), "topk: expected ids to score"),
        (dict(top_k_of=world.scores, top_k=3), "--top-k"),
        (dict(top_k_of=stage.folder / "absent.jsonl"), "absent.jsonl"),
    ):
        assert words in stage.refused(**flags)
        assert not (stage.folder / "refused.jsonl").exists()


# ---- the stage


def test_killed_and_run_again_is_as_if_never_killed(stage, exact, rollouts):
    out = stage.folder / "s.jsonl"
    kill_while_writing("teacher", stage.words("s", dict(top_k=3)), after=7)
    text = out.read_bytes()
    assert text.count(b"\n") == 7 and not text.endswith(b"\n")
    _, scores = stage.score(top_k=3)
    assert out.read_bytes().startswith(text[: text.rindex(b"\n") + 1])
    assert len(scores) == len(rollouts)
    for r in rollouts:
        close(scores[key_of(r)]["logprobs"], own(exact[key_of(r)], r))


def test_answers_are_complete_and_repeats_are_counted(world, tmp_path):
    flags = dict(model=world.teacher, prompts=world.prompts, slice=":3", n=3, max_tokens=20)
    summary = teacher.main(argv("answer", out=tmp_path / "a.jsonl", **flags))
    rows = by_key(load(tmp_path / "a.jsonl"))
    assert len(rows) == 9 and all(records.validate(r, "answers") is None for r in rows.values())
    texts = [[rows[f"t0000{p}", s]["text"] for s in range(3)] for p in range(3)]
    assert summary["duplicates"] == sum(3 - len(set(t)) for t in texts) / 9
    assert summary["generated_tokens"] == sum(len(r["response_ids"]) for r in rows.values())
