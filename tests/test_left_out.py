"""What is missing, unfinished, empty or too long is named, and what is left goes on."""

import json
import shutil

import numpy as np
import pytest
import torch
import transformers
from conftest import (
    argv,
    by_key,
    dump,
    load,
    naive_model,
    naive_own,
    refusal,
    same_bits,
    variant,
    weights,
)
from safetensors.torch import load_file
from test_train import needs, refused, run

import eval as evaluation
import rollout
import rubric
import teacher
from opd import files
from opd.policy import load_policy
from opd.sampling import check_cache, sample_batch

# ---- what a stage could not make


def test_a_stage_goes_on_without_the_prompts_that_another_could_not_make(
    world, tmp_path, capsys
):
    """The API filters a prompt, so it has no answers: no rubric, no rewards, no training."""
    gone, *kept = dict.fromkeys(r["id"] for r in load(world.rollouts))
    prompts = {p["id"]: p for p in load(world.prompts)}
    answers = [
        {"id": i, "sample": s, "policy": {"model": "api"}, "text": prompts[i]["solution"]}
        | {"finish_reason": "stop"}
        for i in kept
        for s in range(4)
    ]
    common = dict(prompts=world.prompts, rollouts=world.rollouts)
    common["answers"] = dump(tmp_path / "answers.jsonl", answers)
    common["predicates"] = "worlds.predicates"
    rubrics = tmp_path / "rubrics.jsonl"
    rewards = tmp_path / "rewards.jsonl"
    made = rubric.main(argv("create", out=rubrics, **common))
    assert (made["records"], made["failed"]) == (7, 0)
    graded = rubric.main(argv("grade", rubrics=rubrics, out=rewards, **common))
    assert (graded["records"], graded["failed"]) == (28, 0), "no rubric is no failed request"
    left = [r for r in load(world.rollouts) if r["id"] != gone]
    only = dump(tmp_path / "left.jsonl", left)
    out, other = tmp_path / "with", tmp_path / "without"
    summary = run(world, out, method="ropd", rewards=rewards, epochs=1)
    run(world, other, method="ropd", rewards=rewards, rollouts=only, epochs=1)
    assert summary["prompts_left_out"] == 1
    assert same_bits(weights(out), weights(other)), "as if it had never been asked"
    said = capsys.readouterr().out
    assert said.count("1 of 8 prompts are left out") == 3 and said.count(f"[{gone}]") == 3


@pytest.mark.parametrize("method, flag", [("opd", "scores"), ("release", "token_weights")])
def test_a_prompt_without_all_of_its_records_is_left_out_of_training(
    world, tmp_path, method, flag
):
    flags = needs(world, method)
    rows = load(flags[flag])
    flags[flag] = dump(tmp_path / "some.jsonl", rows[:-1])
    assert run(world, tmp_path / "m", **flags)["prompts_left_out"] == 1


def test_evaluation_goes_on_without_the_answers_that_failed(world, tmp_path, capsys):
    prompts = dump(tmp_path / "p.jsonl", load(world.prompts)[:8])
    rows = {(r["id"], r["sample"]): r for r in load(world.rollouts)}
    bad = [key for key in rows if key[1] == 3][:2]
    out = tmp_path / "r.jsonl"

    def work(missing):
        return (ValueError("filtered") if key in bad else rows[key] for key in missing)

    limit = files.FailureLimit(rate=0.5)
    files.fill(out, "rollouts", rows, work, {}, limit=limit)
    flags = dict(prompts=prompts, rollouts=out)
    summary = evaluation.main(argv(out=tmp_path / "e.jsonl", **flags))
    assert (summary["answers"], summary["prompts"]) == (30, 8)
    # answers that nobody knows to have failed are another matter
    flags["rollouts"] = shutil.copy(out, tmp_path / "copy.jsonl")
    message = refusal(evaluation.main, argv(out=tmp_path / "e2.jsonl", **flags), capsys)
    assert "expected 4 answers to every prompt, got 3" in message


def test_a_file_that_a_killed_stage_left_short_is_refused_by_every_reader(
    world, tmp_path, capsys
):
    flags = dict(model=world.base, prompts=world.prompts, n=2, max_tokens=4)
    out = tmp_path / "r.jsonl"
    rollout.main(argv(out=out, **flags))
    lines = out.read_text().splitlines(keepends=True)
    out.write_text("".join(lines[:-5]))
    wanted = f"r.jsonl: unfinished: expected {len(lines)} records of "
    for main, arguments in (
        (rubric.main, argv("grade", grader="answer", prompts=world.prompts, rollouts=out)),
        (teacher.main, argv("score", model=world.teacher, rollouts=out)),
        (evaluation.main, argv(prompts=world.prompts, rollouts=out)),
        (files.main, ["check", str(out)]),
    ):
        if main is not files.main:
            arguments += ["--out", str(tmp_path / "x.jsonl")]
        assert wanted in refusal(main, arguments, capsys)
    assert wanted in refused(world, tmp_path, capsys, method="opd", rollouts=out)
    rollout.main(argv(out=out, **flags))
    ids = [
        by_key(list(map(json.loads, some))) for some in (lines, out.read_text().splitlines())
    ]
    assert all(ids[0][key]["response_ids"] == r["response_ids"] for key, r in ids[1].items())
    assert len(ids[1]) == len(lines)


# ---- what cannot teach


def test_an_empty_answer_alone_in_its_step_is_left_out_by_name(world, tmp_path, capsys):
    rows = load(world.prompts)[:4]
    texts = [
        dict(id=p["id"], sample=0, policy={"model": "api"}, messages=p["messages"])
        | dict(text="" if i == 2 else p["solution"])
        | dict(finish_reason="length" if i == 2 else "stop")
        for i, p in enumerate(rows)
    ]
    answers = dump(tmp_path / "a.jsonl", texts)
    flags = dict(method="sft", rollouts=answers, batch_size=1, epochs=1)
    assert run(world, tmp_path / "m", **flags)["steps"] == 3
    assert "1 of 4 prompts are left out" in (said := capsys.readouterr().out)
    assert f"[{rows[2]['id']}]" in said


def test_rewards_that_teach_nothing_are_said(world, tmp_path, capsys):
    rewards = load(world.rewards)
    first = rewards[0]["id"]
    for row in rewards:
        row["reward"] = 0.5 if row["id"] == first else row["reward"]
    flags = dict(method="ropd", rewards=dump(tmp_path / "w.jsonl", rewards))
    run(world, tmp_path / "m", **flags | dict(batch_size=1, epochs=1))
    assert "in 1 of 8 steps every advantage is 0" in capsys.readouterr().out
    single = [r for r in load(world.rollouts) if r["sample"] == 0]
    flags |= dict(rollouts=dump(tmp_path / "r.jsonl", single))
    for method in ("ropd", "grpo"):
        message = refused(world, tmp_path, capsys, **flags | dict(method=method))
        assert "expected at least 2 rollouts of a prompt" in message


def test_one_seed_draws_other_numbers_in_every_stage(world, tmp_path):
    """Else a model that is its own teacher would copy its rollouts, and an evaluation would
    repeat what was trained on."""
    few = dump(tmp_path / "p.jsonl", load(world.prompts)[:6])
    flags = dict(model=world.base, prompts=few, n=4, max_tokens=12, seed=7)
    rollout.main(argv(out=tmp_path / "r.jsonl", **flags))
    teacher.main(argv("answer", out=tmp_path / "a.jsonl", **flags))
    evaluation.main(argv(out=tmp_path / "e.jsonl", **flags))
    names = ("r.jsonl", "a.jsonl", "e.rollouts.jsonl")
    drawn = [by_key(load(tmp_path / name)) for name in names]
    for a, b in ((0, 1), (0, 2), (1, 2)):
        same = [drawn[a][key]["text"] == drawn[b][key]["text"] for key in drawn[a]]
        assert sum(same) < len(same) / 2


# ---- models


def test_master_weights_survive_a_fresh_optimiser_and_another_method(world, tmp_path, capsys):
    """At a small rate the bfloat16 weights do not move, the float32 masters do."""
    student = variant(world.base, tmp_path / "m", model=lambda m: m.to(torch.bfloat16))
    common = dict(rollouts=world.toy / "clean.jsonl", steps=2, dtype="bfloat16")
    common["optimizer"] = dict(weight_decay=0)
    one = tmp_path / "one"
    run(world, one, method="sft", model=student, learning_rate=2e-6, **common)

    def masters(folder):
        saved = load_file(folder / "trainer" / "optimizer.safetensors")
        return {k: v for k, v in saved.items() if k.startswith("master/")}

    for name, flags in (
        ("same", dict(method="sft")),
        ("fresh", dict(method="sft", fresh_optimizer=True)),
        ("other", dict(method="seqkd")),
    ):
        out = tmp_path / name
        run(world, out, model=one, learning_rate=0, **common | flags)
        assert all(torch.equal(v, masters(out)[k]) for k, v in masters(one).items()), name
    # weights that somebody has changed since are not silently replaced
    shutil.copy(world.base / "model.safetensors", one / "model.safetensors")
    flags = dict(method="sft", model=one) | common
    assert "that round to the folder's weights" in refused(world, tmp_path, capsys, **flags)


def test_sequences_beyond_a_models_positions_are_refused_by_name(world, tmp_path, capsys):
    def short(model):
        model.config.max_position_embeddings = 24

    student = variant(world.base, tmp_path / "short", model=short)
    where = "rollouts.jsonl:"
    arguments = argv("score", model=student, rollouts=world.rollouts, out=tmp_path / "s.jsonl")
    for message in (
        refusal(teacher.main, arguments, capsys),
        refused(world, tmp_path, capsys, model=student, method="opd", allow="stale"),
    ):
        assert where in message and "expected at most 24 tokens with the prompt" in message


SIZES = dict(vocab_size=24, hidden_size=32, intermediate_size=48, num_attention_heads=2)
RECURRENT = {
    "recurrent_gemma": dict(num_hidden_layers=3, lru_width=32, attention_window_size=16),
    "rwkv": dict(num_hidden_layers=2),
    "mamba": dict(num_hidden_layers=2, state_size=8),
}


@pytest.mark.parametrize("kind", RECURRENT)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cache_is_proven_on_the_model_before_anything_is_sampled(
    world, tmp_path, capsys, kind, dtype
):
    """Mamba samples what its plain forward pass says; models without a cache are refused."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **SIZES | RECURRENT[kind])
    model = transformers.AutoModelForCausalLM.from_config(config).to(dtype)
    folder = variant(world.base, tmp_path / "m", model=lambda _: model)
    out = tmp_path / "r.jsonl"
    few = dump(tmp_path / "p.jsonl", load(world.prompts)[:4])
    arguments = argv(model=folder, prompts=few, n=2, max_tokens=12, out=out)
    if kind != "mamba":
        assert "expected a cache" in refusal(rollout.main, arguments, capsys)
        return
    rollout.main(arguments)
    naive = naive_model(folder)
    tolerance = 1e-4 if dtype == torch.float32 else 0.1
    for r in load(out):
        np.testing.assert_allclose(r["logprobs"], naive_own(naive, r), atol=tolerance)


def answered_anew(policy, prompt, draws, outputs, **how):
    """Answers to a prompt, with outputs between them: each reads all that is before it anew."""
    read, used, answers = list(prompt), 0, []
    for output in [*outputs, None]:
        left = how["max_tokens"] - (len(read) - len(prompt))
        one = how | {"max_tokens": left}
        (answer,) = sample_batch(policy, [read], draws[None, used : used + left], **one)
        answers.append(answer)
        if output is None or answer.finish_reason != "stop":
            return answers
        used += len(answer.response_ids)
        read += answer.response_ids + output


@pytest.mark.parametrize("kind", ["mamba", "mistral"])
def test_what_stands_between_answers_is_read_into_the_cache(world, tmp_path, kind):
    """The mistral has a window of 8.  Outputs: none, empty, and ones with the end token."""
    torch.manual_seed(0)
    sizes = SIZES | RECURRENT.get(kind, dict(num_key_value_heads=2, sliding_window=8))
    config = transformers.AutoConfig.for_model(kind, **sizes | {"num_hidden_layers": 2})
    model = transformers.AutoModelForCausalLM.from_config(config)
    policy = load_policy(variant(world.base, tmp_path / "m", model=lambda _: model))
    end = policy.stop_ids[0]
    prompts = [[5, 6, 7], [8], [5, 6, 7], [9, 4, 4, 4, 4, 9]]
    outputs = [[[7, end, 8]], [], [[], [4]], [[end], [5] * 6]]
    draws = np.random.default_rng(0).random((4, 200))
    how = dict(max_tokens=200, temperature=1.0, top_p=1.0)
    found = [[] for _ in prompts]

    def after_step(row, answer):
        found[row].append(answer)
        if answer.finish_reason == "stop" and len(found[row]) <= len(outputs[row]):
            return outputs[row][len(found[row]) - 1]
        return None

    last = sample_batch(policy, prompts, draws, **how, after_step=after_step)
    assert [len(answers) for answers in found] == [2, 1, 3, 3]
    for row, answers in enumerate(found):
        assert last[row] is answers[-1]
        for got, want in zip(
            answers,
            answered_anew(policy, prompts[row], draws[row], outputs[row], **how),
            strict=True,
        ):
            assert got.response_ids == want.response_ids
            assert got.finish_reason == want.finish_reason
            assert got.logprobs == pytest.approx(want.logprobs, abs=1e-4)
            assert got.end_mass == pytest.approx(want.end_mass, abs=1e-4)


def test_a_cache_that_mixes_rows_is_noticed(world, monkeypatch):
    policy = load_policy(world.base)
    check_cache(policy)
    monkeypatch.setattr(transformers.DynamicCache, "reorder_cache", lambda self, rows: None)
    with pytest.raises(files.BadInput, match="expected a cache"):
        check_cache(policy)
