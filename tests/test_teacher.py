"""teacher.py: cached numbers equal a direct forward pass, and ids are never read with another
vocabulary or template."""

import json

import numpy as np
import pytest
import torch
from conftest import (
    argv,
    by_key,
    dump,
    kill_while_writing,
    load,
    naive_logps,
    naive_own,
    refusal,
    run_program,
    variant,
)

import teacher
from experiments import controls
from opd import records
from opd.policy import load_tokenizer

V = 24


def score(world, out, **flags):
    summary = teacher.main(
        argv(
            "score",
            **dict(dict(model=world.teacher, rollouts=world.rollouts, out=out), **flags),
        )
    )
    return summary, by_key(load(out))


def topk(record):
    return records.unpack(record["topk"]["ids"]), records.unpack(record["topk"]["logprobs"])


def edge_rollouts(world, path, base64bit):
    """Rollouts with an answer of one token, an empty answer, and a usual one."""
    rows = load(world.rollouts)[:3]
    end = next(
        r["response_ids"][-1] for r in load(world.rollouts) if r["finish_reason"] == "stop"
    )
    for r, ids, reason, text in ((rows[0], [end], "stop", ""), (rows[1], [], "length", "")):
        r.update(response_ids=ids, loss_mask=[1] * len(ids), finish_reason=reason, text=text)
        r["logprobs"] = naive_own(base64bit, r)
    return dump(path, rows)


# ---- the numbers


def test_cached_log_probs_are_those_of_the_teacher(world, teacher64bit):
    scores = by_key(load(world.scores))
    assert scores.keys() == by_key(load(world.rollouts)).keys()
    for r in load(world.rollouts):
        s = scores[r["id"], r["sample"]]
        assert s["rollout"] == records.fingerprint(r)
        np.testing.assert_allclose(s["logprobs"], naive_own(teacher64bit, r), atol=2e-5, rtol=0)


def test_scores_are_at_temperature_one_whatever_the_rollouts_were(
    world, teacher64bit, tmp_path
):
    rows = [dict(r, temperature=0.5) for r in load(world.rollouts)[:3]]
    _, scores = score(world, tmp_path / "s.jsonl", rollouts=dump(tmp_path / "r.jsonl", rows))
    for r in rows:
        np.testing.assert_allclose(
            scores[r["id"], r["sample"]]["logprobs"],
            naive_own(teacher64bit, r),
            atol=2e-5,
            rtol=0,
        )


@pytest.mark.parametrize("k", [1, 5, V])
def test_top_k_are_the_likeliest_tokens(world, teacher64bit, tmp_path, k):
    _, scores = score(world, tmp_path / "s.jsonl", top_k=k, batch_tokens=100)
    for r in load(world.rollouts):
        ids, logps = topk(scores[r["id"], r["sample"]])
        assert ids.shape == logps.shape == (len(r["response_ids"]), k)
        with torch.no_grad():
            want = naive_logps(teacher64bit, r["prompt_ids"], r["response_ids"])
        np.testing.assert_allclose(logps, want.topk(k).values.numpy(), atol=2e-5, rtol=0)
        np.testing.assert_allclose(
            logps,
            want.gather(1, torch.from_numpy(ids.astype(np.int64))).numpy(),
            atol=2e-5,
            rtol=0,
        )
        assert all(len(set(row)) == k for row in ids.tolist())
        if k == V:
            np.testing.assert_allclose(np.exp(logps.astype(np.float64)).sum(1), 1, atol=1e-5)


def test_another_models_likeliest_tokens_are_scored_in_its_order(
    world, teacher64bit, tmp_path, capsys
):
    """--top-k-of: what the teacher thinks of the student's own alternatives."""
    score(world, tmp_path / "own.jsonl", model=world.base, top_k=4)
    _, scores = score(
        world, tmp_path / "s.jsonl", top_k_of=tmp_path / "own.jsonl", batch_tokens=100
    )
    students = by_key(load(tmp_path / "own.jsonl"))
    for r in load(world.rollouts):
        key = r["id"], r["sample"]
        (ids, logps), (proposed, _) = topk(scores[key]), topk(students[key])
        assert (
            np.array_equal(ids, proposed)
            and scores[key]["topk_of"]
            == students[key]["policy"]["weights"]
            == r["policy"]["weights"]
        )
        with torch.no_grad():
            want = naive_logps(teacher64bit, r["prompt_ids"], r["response_ids"])
        np.testing.assert_allclose(
            logps, want.gather(1, torch.from_numpy(ids.astype(np.int64))), atol=2e-5, rtol=0
        )
    for flags in (
        dict(top_k_of=tmp_path / "own.jsonl", top_k=3),
        dict(top_k_of=world.scores.with_name("absent.jsonl")),
    ):
        refusal(
            teacher.main,
            argv(
                "score",
                model=world.teacher,
                rollouts=world.rollouts,
                out=tmp_path / "x.jsonl",
                **flags,
            ),
            capsys,
        )
    score(world, tmp_path / "plain.jsonl", model=world.base)
    assert "topk: expected ids to score" in refusal(
        teacher.main,
        argv(
            "score",
            model=world.teacher,
            rollouts=world.rollouts,
            out=tmp_path / "x.jsonl",
            top_k_of=tmp_path / "plain.jsonl",
        ),
        capsys,
    )


def test_the_mass_on_ending_is_that_of_the_stop_tokens_at_the_last_position(
    world, base64bit, teacher64bit
):
    scores = by_key(load(world.scores))
    for r in load(world.rollouts):
        for model, got in (
            (base64bit, r["end_mass"]),
            (teacher64bit, scores[r["id"], r["sample"]]["end_mass"]),
        ):
            with torch.no_grad():
                # 4: <|end|>
                want = float(
                    naive_logps(model, r["prompt_ids"], r["response_ids"])[-1, 4].exp()
                )
            assert got == pytest.approx(want, rel=1e-3, abs=1e-6)
    assert {r["finish_reason"] for r in load(world.rollouts)} == {"stop", "length"}, (
        "the fixture should have answers of both kinds"
    )


def test_a_token_that_means_the_same_lends_its_mass(world, teacher64bit, tmp_path, capsys):
    _, scores = score(world, tmp_path / "s.jsonl", same_token="#=<|end|>")
    hash_id, changed = load_tokenizer(str(world.teacher)).get_vocab()["#"], 0
    for r in load(world.rollouts):
        with torch.no_grad():
            table = naive_logps(teacher64bit, r["prompt_ids"], r["response_ids"])
        for t, (token, got) in enumerate(
            zip(r["response_ids"], scores[r["id"], r["sample"]]["logprobs"])
        ):
            want = (
                torch.logaddexp(table[t, 4], table[t, hash_id])
                if token == 4
                else table[t, token]
            )
            assert got == pytest.approx(float(want), abs=2e-5)
            changed += token == 4
    assert changed > 3
    for flags in (
        dict(same_token="#"),
        dict(same_token="#=nothing"),
        dict(same_token="#=<|end|>", top_k=3),
    ):
        assert "--same-token" in refusal(
            teacher.main,
            argv(
                "score",
                model=world.teacher,
                rollouts=world.rollouts,
                out=tmp_path / "x.jsonl",
                **flags,
            ),
            capsys,
        )


def test_a_teacher_may_read_more_than_the_student(world, base64bit, tmp_path, capsys):
    """Self-distillation: the rollouts' own model, with the answer in the question's place;
    against a forward pass over a prompt built by hand."""
    tokenizer, prompts = load_tokenizer(world.base), {p["id"]: p for p in load(world.prompts)}
    _, scores = score(
        world,
        tmp_path / "s.jsonl",
        model=world.base,
        prompts=world.prompts,
        hint="{answer}={question}",
        top_k=3,
    )
    for r in load(world.rollouts):
        content = f"{prompts[r['id']]['answer']}={prompts[r['id']]['messages'][0]['content']}"
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        got = scores[r["id"], r["sample"]]
        assert ids != r["prompt_ids"] and got["rollout"] == records.fingerprint(r)
        assert got["context"] == records.fingerprint(r | {"prompt_ids": ids}) != got["rollout"]
        np.testing.assert_allclose(
            got["logprobs"], naive_own(base64bit, r | {"prompt_ids": ids}), atol=2e-5, rtol=0
        )
    # the same prompts: the student itself
    without = score(world, tmp_path / "own.jsonl", model=world.base, prompts=world.prompts)[0]
    assert abs(without["gap_max"]) < 1e-4
    message = refusal(
        teacher.main,
        argv(
            "score",
            model=world.base,
            rollouts=world.rollouts,
            out=tmp_path / "s.jsonl",
            prompts=world.prompts,
            hint="{question}",
        ),
        capsys,
    )
    # half of a file with the answer, half without
    assert "hint" in message and "another --out" in message


def test_ids_may_be_numbers(world, tmp_path):
    numbers = {p["id"]: i for i, p in enumerate(load(world.prompts))}
    prompts = dump(
        tmp_path / "p.jsonl", [p | {"id": numbers[p["id"]]} for p in load(world.prompts)]
    )
    rollouts = dump(
        tmp_path / "r.jsonl", [r | {"id": numbers[r["id"]]} for r in load(world.rollouts)]
    )
    summary = teacher.main(
        argv(
            "score",
            model=world.base,
            rollouts=rollouts,
            out=tmp_path / "s.jsonl",
            prompts=prompts,
        )
    )
    assert summary["records"] == len(load(world.rollouts)) and summary["gap_max"] < 1e-4


def test_hints_are_filled_in(tmp_path):
    prompt = {
        "id": "a",
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "2+2={?}"},
            {"role": "assistant", "content": "It"},
        ],
        "answer": 4,
    }
    assert teacher.hinted(prompt, "{question} {{is}} {answer}", "f:1")["messages"] == [
        prompt["messages"][0],
        {"role": "user", "content": "2+2={?} {is} 4"},
        prompt["messages"][2],
    ]
    assert prompt["messages"][1]["content"] == "2+2={?}"
    assert (
        teacher.hinted(
            {"id": "a", "prompt": "2+2=", "solution": "see"}, "{solution}: {question}", "f:1"
        )["prompt"]
        == "see: 2+2="
    )
    for hint, message in (
        (
            "{solution}",
            "f:1: solution: expected, for --hint asks for it, .*there is: answer, question",
        ),
        ("{answer", "--hint: expected text with"),
        ("{}", "--hint: expected text with"),
    ):
        with pytest.raises(records.BadInput, match=message):
            teacher.hinted(prompt, hint, "f:1")
    with pytest.raises(records.BadInput, match="messages: expected one of the user's"):
        teacher.hinted(
            {"id": "a", "messages": [{"role": "system", "content": "x"}]}, "{question}", "f:1"
        )


def test_prompts_that_the_rollouts_do_not_answer_are_refused(world, tmp_path, capsys):
    few = dump(tmp_path / "p.jsonl", load(world.prompts)[1:])
    message = refusal(
        teacher.main,
        argv(
            "score",
            model=world.teacher,
            rollouts=world.rollouts,
            out=tmp_path / "s.jsonl",
            prompts=few,
        ),
        capsys,
    )
    assert "expected a prompt" in message and "which" in message
    assert "--hint: needs --prompts" in refusal(
        teacher.main,
        argv(
            "score",
            model=world.teacher,
            rollouts=world.rollouts,
            out=tmp_path / "s.jsonl",
            hint="x",
        ),
        capsys,
    )


def test_shuffled_scores_are_the_same_numbers_at_other_tokens(world, tmp_path):
    summary = controls.main(
        argv("shuffle-scores", scores=world.scores, out=tmp_path / "null.jsonl", seed=3)
    )
    before, after = load(world.scores), load(tmp_path / "null.jsonl")
    assert summary["records"] == len(before) == len(after)
    flat = [np.concatenate([s["logprobs"] for s in rows]) for rows in (before, after)]
    assert (
        np.array_equal(np.sort(flat[0]), np.sort(flat[1])) and np.mean(flat[0] == flat[1]) < 0.2
    )
    assert abs(np.corrcoef(*flat)[0, 1]) < 0.15 and all("topk" not in s for s in after)
    assert [(s["rollout"], len(s["logprobs"])) for s in before] == [
        (s["rollout"], len(s["logprobs"])) for s in after
    ]


def test_a_tools_tokens_keep_their_scores_when_the_others_are_dealt_out(
    agents, tmp_path, capsys
):
    controls.main(
        argv(
            "shuffle-scores",
            scores=agents.scores,
            rollouts=agents.rollouts,
            out=tmp_path / "null.jsonl",
        )
    )
    before, after, masks = (
        by_key(load(agents.scores)),
        by_key(load(tmp_path / "null.jsonl")),
        {
            key: np.array(r["loss_mask"], bool)
            for key, r in by_key(load(agents.rollouts)).items()
        },
    )
    own, tools = (
        [
            np.concatenate(
                [
                    np.array(rows[key]["logprobs"])[mask if kept else ~mask]
                    for key, mask in masks.items()
                ]
            )
            for rows in (before, after)
        ]
        for kept in (True, False)
    )
    assert len(tools[0]) > 50 and np.array_equal(*tools)
    assert np.array_equal(*map(np.sort, own)) and np.mean(own[0] == own[1]) < 0.2
    part = dump(tmp_path / "part.jsonl", load(agents.rollouts)[:-1])
    message = refusal(
        controls.main,
        argv("shuffle-scores", scores=agents.scores, rollouts=part, out=tmp_path / "x.jsonl"),
        capsys,
    )
    assert "expected the scores of a rollout of" in message and str(agents.scores) in message


def test_masked_tokens_are_scored_too(world, tmp_path):
    rows = [dict(r, loss_mask=[0] * len(r["loss_mask"])) for r in load(world.rollouts)]
    _, scores = score(world, tmp_path / "s.jsonl", rollouts=dump(tmp_path / "r.jsonl", rows))
    for s in load(world.scores):
        np.testing.assert_allclose(
            scores[s["id"], s["sample"]]["logprobs"], s["logprobs"], atol=2e-5, rtol=0
        )


def test_batching_changes_nothing(world, tmp_path):
    for budget in (1, 200):
        _, scores = score(world, tmp_path / f"{budget}.jsonl", batch_tokens=budget, top_k=V)
        for s in load(world.scores):
            other = scores[s["id"], s["sample"]]
            np.testing.assert_allclose(other["logprobs"], s["logprobs"], atol=2e-5, rtol=0)
            np.testing.assert_allclose(topk(other)[1], topk(s)[1], atol=2e-5, rtol=0)


@pytest.mark.parametrize("k", [0, 4])
def test_one_token_and_empty_answers(world, base64bit, teacher64bit, tmp_path, k):
    path = edge_rollouts(world, tmp_path / "r.jsonl", base64bit)
    summary, scores = score(world, tmp_path / "s.jsonl", rollouts=path, top_k=k)
    for r in load(path):
        s = scores[r["id"], r["sample"]]
        np.testing.assert_allclose(s["logprobs"], naive_own(teacher64bit, r), atol=2e-5, rtol=0)
        if k:
            assert topk(s)[0].shape == topk(s)[1].shape == (len(r["response_ids"]), 4)
    assert summary["teacher_tokens"] == sum(len(r["response_ids"]) for r in load(path))
    nothing = dump(tmp_path / "nothing.jsonl", load(path)[1:2])
    summary, scores = score(world, tmp_path / "t.jsonl", rollouts=nothing, top_k=k)
    assert summary["teacher_tokens"] == 0 and all(s["logprobs"] == [] for s in scores.values())


def test_a_bfloat16_teacher_keeps_float32_log_probs(world, teacher64bit, tmp_path):
    """Rounding logits to bfloat16 would leave log-probs on a coarse grid; a rounded model is
    near the exact one, and off the grid."""
    _, scores = score(world, tmp_path / "s.jsonl", dtype="bfloat16")
    values = np.array(
        [v for r in load(world.rollouts) for v in scores[r["id"], r["sample"]]["logprobs"]]
    )
    exact = np.array([v for r in load(world.rollouts) for v in naive_own(teacher64bit, r)])
    assert 1e-5 < np.abs(values - exact).max() < 0.2
    on_grid = torch.tensor(values, dtype=torch.float32)
    assert (on_grid.bfloat16().float() == on_grid).float().mean() < 0.1


# ---- the summary


def test_a_student_that_is_the_teacher_has_no_gap(world, tmp_path):
    same, _ = score(world, tmp_path / "same.jsonl", model=world.base)
    assert abs(same["kl_mean"]) < 1e-5 and same["gap_max"] < 2e-5
    other, _ = score(world, tmp_path / "other.jsonl")
    assert other["kl_mean"] > 0.05 and other["gap_max"] > 0.5


def test_the_summary_is_the_mean_gap(world, teacher64bit, tmp_path):
    summary, _ = score(world, tmp_path / "s.jsonl")
    gaps = [
        mu - q
        for r in load(world.rollouts)
        for mu, q in zip(r["logprobs"], naive_own(teacher64bit, r))
    ]
    assert summary["kl_mean"] == pytest.approx(np.mean(gaps), abs=1e-5)
    assert summary["gap_max"] == pytest.approx(np.abs(gaps).max(), abs=1e-4)
    assert summary["records"] == 32 and summary["teacher_tokens"] == len(gaps)


def test_the_self_test_reports_what_batching_does_to_the_numbers(
    world, tmp_path, monkeypatch, capsys
):
    summary, _ = score(world, tmp_path / "quiet.jsonl")
    assert 0 <= summary["noise_floor"] < 1e-4
    quiet, alone = scoring.hidden_at, []

    # a model whose batched forward differs from its single one
    def noisy(model, sequences, positions):
        alone.append(len(sequences) == 1)
        return quiet(model, sequences, positions) * (1.0 if len(sequences) == 1 else 1.01)

    monkeypatch.setattr(scoring, "hidden_at", noisy)
    summary, _ = score(world, tmp_path / "noisy.jsonl")
    assert any(alone) and not all(alone)
    assert summary["noise_floor"] > 1e-3
    assert f"noise floor {summary['noise_floor']:.1e}" in capsys.readouterr().out


# ---- identity


def refused(world, tmp_path, capsys, **flags):
    out = tmp_path / "refused.jsonl"
    message = refusal(
        teacher.main,
        argv(
            "score",
            **dict(dict(model=world.teacher, rollouts=world.rollouts, out=out), **flags),
        ),
        capsys,
    )
    assert not out.exists()
    return message


def permuted(tokenizer):
    """The same tokens with `1` and `2` trading ids."""
    core = json.loads(tokenizer.backend_tokenizer.to_str())
    ids = core["model"]["vocab"]
    ids["1"], ids["2"] = ids["2"], ids["1"]
    tokenizer._tokenizer = tokenizer._tokenizer.from_str(json.dumps(core))


def padded(extra):
    """More embedding rows than the vocabulary has tokens, as checkpoints padded to a multiple
    of 64 have."""

    def grow(model):
        old = {k: v.clone() for k, v in model.state_dict().items()}
        model.resize_token_embeddings(V + extra)
        with torch.no_grad():
            for name, p in model.named_parameters():
                if p.shape[0] == V + extra:
                    p[:V] = old[name]
                    p[V:] = torch.randn(
                        extra, p.shape[1], generator=torch.Generator().manual_seed(1)
                    )

    return grow


def test_a_permuted_vocabulary_is_refused(world, tmp_path, capsys):
    folder = variant(world.teacher, tmp_path / "m", permuted)
    message = refused(world, tmp_path, capsys, model=folder)
    assert f"{world.rollouts}:1: policy.vocabulary: expected" in message
    assert "policy.vocabulary" in refused(
        world, tmp_path, capsys, model=folder, allow_template_mismatch=True
    )
    merged = world.toy / "teacher_merged_digits"
    assert "policy.vocabulary" in refused(world, tmp_path, capsys, model=merged)


def test_an_off_template_teacher_is_refused_unless_meant(world, tmp_path, capsys):
    folder = variant(
        world.teacher,
        tmp_path / "m",
        lambda t: setattr(
            t, "chat_template", t.chat_template.replace("<|user|>", "<|system|>") + " "
        ),
    )
    assert f"{world.rollouts}:1: policy.template: expected" in refused(
        world, tmp_path, capsys, model=folder
    )
    _, scores = score(world, tmp_path / "s.jsonl", model=folder, allow_template_mismatch=True)
    assert {k: s["logprobs"] for k, s in scores.items()} == {
        k: s["logprobs"] for k, s in score(world, tmp_path / "t.jsonl")[1].items()
    }


def test_one_foreign_line_among_many_is_named(world, tmp_path, capsys):
    rows = load(world.rollouts)
    rows[20]["policy"] = dict(rows[20]["policy"], vocabulary="f" * 12)
    assert ":21: policy.vocabulary" in refused(
        world, tmp_path, capsys, rollouts=dump(tmp_path / "r.jsonl", rows)
    )


def test_an_embedding_padded_beyond_the_vocabulary_scores_the_same(world, tmp_path):
    """The padding rows are no tokens: they take no probability, and top-k never lists one."""
    folder = variant(world.teacher, tmp_path / "m", model=padded(9))
    _, scores = score(world, tmp_path / "s.jsonl", model=folder, top_k=V)
    for s in load(world.scores):
        other = scores[s["id"], s["sample"]]
        assert topk(other)[0].max() < V
        np.testing.assert_allclose(other["logprobs"], s["logprobs"], atol=2e-5, rtol=0)
        np.testing.assert_allclose(topk(other)[1], topk(s)[1], atol=2e-5, rtol=0)


# ---- the stage


@pytest.mark.parametrize("k", [0, 3])
def test_killed_and_run_again_is_as_if_never_killed(world, tmp_path, k):
    flags = argv(
        "score", model=world.teacher, rollouts=world.rollouts, out=tmp_path / "s.jsonl", top_k=k
    )
    if k == 0:
        kill_while_writing("teacher", flags, after=7)
        text = (tmp_path / "s.jsonl").read_bytes()
    else:  # the same state on disk without a second process: seven lines and a torn one
        teacher.main(flags)
        lines = (tmp_path / "s.jsonl").read_bytes().splitlines(keepends=True)
        text = b"".join(lines[:7]) + lines[7][:-20]
        (tmp_path / "s.jsonl").write_bytes(text)
    assert text.count(b"\n") == 7 and not text.endswith(b"\n")
    teacher.main(flags)
    assert (tmp_path / "s.jsonl").read_bytes().startswith(text[: text.rindex(b"\n") + 1])
    again, whole = by_key(load(tmp_path / "s.jsonl")), by_key(load(world.scores))
    assert again.keys() == whole.keys()
    for key, s in again.items():
        np.testing.assert_allclose(s["logprobs"], whole[key]["logprobs"], atol=2e-5, rtol=0)
        assert s["rollout"] == whole[key]["rollout"] and ("topk" in s) == bool(k)


def test_a_file_of_another_teacher_is_not_continued(world, tmp_path, capsys):
    score(world, tmp_path / "s.jsonl")
    for name, change in {
        "weights": dict(model=world.base),
        "top_k": dict(top_k=2),
        "dtype": dict(dtype="bfloat16"),
    }.items():
        flags = argv(
            "score",
            **dict(
                dict(model=world.teacher, rollouts=world.rollouts, out=tmp_path / "s.jsonl"),
                **change,
            ),
        )
        assert f"s.jsonl: was begun with {name} = " in refusal(teacher.main, flags, capsys)


def test_answers_are_complete_and_repeats_are_counted(world, tmp_path, capsys):
    flags = dict(model=world.teacher, prompts=world.prompts, slice=":3", n=3, max_tokens=20)
    summary = teacher.main(argv("answer", out=tmp_path / "a.jsonl", **flags))
    rows = by_key(load(tmp_path / "a.jsonl"))
    assert len(rows) == 9 and all(records.validate(r, "answers") is None for r in rows.values())
    texts = [[rows[f"t0000{p}", s]["text"] for s in range(3)] for p in range(3)]
    assert summary["duplicates"] == sum(3 - len(set(t)) for t in texts) / 9
    assert summary["generated_tokens"] == sum(len(r["response_ids"]) for r in rows.values())
    greedy = teacher.main(argv("answer", out=tmp_path / "g.jsonl", temperature=0, **flags))
    assert greedy["duplicates"] == pytest.approx(2 / 3), (
        "m copies of one answer teach a rubric nothing"
    )


def test_as_a_program_it_explains_and_exits_with_2(world, tmp_path, capsys):
    done = run_program(
        "teacher.py",
        argv("score", model=world.teacher, rollouts=world.prompts, out=tmp_path / "s.jsonl"),
    )
    assert (
        done.returncode == 2
        and f"{world.prompts}:1: sample: expected" in done.stderr
        and "Traceback" not in done.stderr
    )
    with pytest.raises(SystemExit) as stop:
        teacher.main(["grade"])
    assert stop.value.code == 2
    assert "--top-k" in refusal(
        teacher.main,
        argv(
            "score",
            model=world.teacher,
            rollouts=world.rollouts,
            out=tmp_path / "s.jsonl",
            top_k=-1,
        ),
        capsys,
    )
