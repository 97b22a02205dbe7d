"""opd/batches.py: only what belongs together becomes a training step; groups, weights and ends
of answers; whose answers they are."""

import re

import numpy as np
import pytest
import torch
from conftest import (
    argv,
    by_key,
    dump,
    load,
    make_rewards,
    naive_logps,
    naive_model,
    refusal,
    same_bits,
    variant,
    weights,
)
from test_teacher import padded, permuted
from test_train import END, FAST, V, gradient, metrics, needs, refused, run, same_gradient

import rollout
import teacher
import train
from methods.rows import METHODS
from opd import policy as policies
from opd import records
from opd.batches import Data, Inputs

# ---- ends of answers


def answers_file(path, texts, finish="stop"):
    return dump(
        path,
        [
            {
                "id": f"a{i}",
                "sample": 0,
                "policy": {"model": "elsewhere"},
                "messages": [{"role": "user", "content": q}],
                "text": text,
                "finish_reason": finish,
            }
            for i, (q, text) in enumerate(texts)
        ],
    )


TEXTS = [("1+2=?", "#3"), ("4+5-2=?", "4+5=9\n9-2=7\n#7"), ("9-3=?", "9-3=6\n#6")]


@pytest.mark.parametrize("finish, extra", [("stop", 1), ("length", 0), ("tool_limit", 0)])
def test_only_answers_that_ended_get_an_end_token(world, tmp_path, finish, extra):
    path = answers_file(tmp_path / "a.jsonl", TEXTS, finish)
    policy = policies.load_policy(str(world.base))
    data = Data(Inputs(path), METHODS["sft"], policy)
    for item, (question, text) in zip(data.sequences([(f"a{i}", 0) for i in range(3)]), TEXTS):
        assert policy.tokenizer.decode(item["prompt_ids"]) == f"<|user|>{question}<|assistant|>"
        assert policy.tokenizer.decode(item["response_ids"]) == text + "<|end|>" * extra
        assert item["mask"] == [1] * (len(text) + extra)
    summary = train.main(
        argv(method="sft", model=world.base, rollouts=path, out=tmp_path / "m", **FAST)
    )
    assert (
        summary["trained_tokens"] == sum(len(t) + extra for _, t in TEXTS)
        and summary["retokenized"] == 3
    )


def end_probability(folder, texts):
    """Mean probability of the end token after each whole text."""
    model, tokenizer = naive_model(folder), policies.load_policy(str(folder)).tokenizer
    out = []
    with torch.no_grad():
        for question, text in texts:
            ids = tokenizer(f"<|user|>{question}<|assistant|>{text}", add_special_tokens=False)[
                "input_ids"
            ]
            out.append(float(torch.softmax(model(torch.tensor([ids])).logits[0, -1], -1)[END]))
    return np.mean(out)


@pytest.mark.parametrize("pad_is_end", [False, True])
@pytest.mark.parametrize("tokens_on_disk", [False, True])
def test_the_end_token_is_learnt_also_where_it_is_the_pad_token(
    world, tmp_path, pad_is_end, tokens_on_disk
):
    """Texts are cut in the middle, so nothing but the end token itself can teach the model to
    end there."""
    texts = [(q, t[:-1].rstrip("\n")) for q, t in TEXTS]

    def change(tokenizer):
        if pad_is_end:
            tokenizer.pad_token = tokenizer.eos_token

    folder = variant(world.base, tmp_path / "m", change)
    policy = policies.load_policy(str(folder))
    assert (
        policy.tokenizer.pad_token_id == END
    ) == pad_is_end and policy.tokenizer.eos_token_id == END
    path = answers_file(tmp_path / "a.jsonl", texts)
    if tokens_on_disk:
        rows = []
        for r, (_, text) in zip(load(path), texts):
            ids = policy.tokenizer(text)["input_ids"] + [END]
            rows.append(
                r
                | {
                    "policy": policy.identity,
                    "prompt_ids": policies.render(policy.tokenizer, r),
                    "response_ids": ids,
                    "loss_mask": [1] * len(ids),
                    "logprobs": [-1.0] * len(ids),
                    "temperature": 1.0,
                    "top_p": 1.0,
                }
            )
        dump(path, rows)
    before = end_probability(folder, texts)
    summary = train.main(
        argv(
            method="sft",
            model=folder,
            rollouts=path,
            out=tmp_path / "out",
            steps=8,
            learning_rate=3e-3,
            batch_size=3,
        )
    )
    assert summary["trained_tokens"] == 8 * sum(len(t) + 1 for _, t in texts)
    assert summary["retokenized"] == (0 if tokens_on_disk else 3), (
        "the number of answers, however often they are read"
    )
    after = end_probability(tmp_path / "out", texts)
    assert before < 0.5 and after > 0.8
    # without an end token the same steps teach no end
    train.main(
        argv(
            method="sft",
            model=folder,
            rollouts=answers_file(tmp_path / "cut.jsonl", texts, "length"),
            out=tmp_path / "cut",
            steps=8,
            learning_rate=3e-3,
            batch_size=3,
        )
    )
    assert end_probability(tmp_path / "cut", texts) < before + 0.1


def test_answers_sampled_at_other_temperatures_are_fine_to_imitate(world, tmp_path):
    """A temperature matters where log-probs are used; imitation uses none."""
    rows = load(world.rollouts)
    for i, r in enumerate(rows):
        r["temperature"], r["top_p"] = (0.0, 0.7, 1.0)[i % 3], 0.9
    hot, _ = gradient(world, dict(method="sft", rollouts=dump(tmp_path / "r.jsonl", rows)))
    same_gradient(hot, gradient(world, dict(method="sft", rollouts=world.rollouts))[0], 1e-6)


def test_answers_of_another_vocabulary_are_read_as_text(world, tmp_path):
    """Ids of a foreign tokenizer are never taken for ours: the text is tokenized again."""
    rows = load(world.rollouts)
    prompts = by_key([dict(p, sample=0) for p in load(world.prompts)])
    for r in rows:
        r["messages"] = prompts[r["id"], 0]["messages"]
    foreign = [
        dict(
            r,
            policy=dict(r["policy"], vocabulary="f" * 12),
            response_ids=[0] * len(r["response_ids"]),
        )
        for r in rows
    ]
    native = [
        {
            k: v
            for k, v in r.items()
            if k in ("id", "sample", "policy", "text", "finish_reason", "messages")
        }
        for r in rows
    ]
    a, _ = gradient(world, dict(method="sft", rollouts=dump(tmp_path / "a.jsonl", foreign)))
    b, _ = gradient(world, dict(method="sft", rollouts=dump(tmp_path / "b.jsonl", native)))
    same_gradient(a, b, 1e-6)


# ---- failed judgements


@pytest.mark.parametrize("method", [m for m, row in METHODS.items() if row.rewards])
def test_a_group_with_a_failed_judgement_is_as_if_it_were_not_there(world, tmp_path, method):
    bad = ("t00002", 1)
    rewards = make_rewards(
        world.rollouts,
        tmp_path / "w.jsonl",
        lambda r: None if (r["id"], r["sample"]) == bad else r["sample"] / 3,
    )
    flags = dict(needs(world, method), rewards=rewards, epochs=2)
    summary = run(world, tmp_path / "a", **flags)
    assert summary["groups_dropped"] == 1
    rest = dump(tmp_path / "r.jsonl", [r for r in load(flags["rollouts"]) if r["id"] != bad[0]])
    # 7 groups at 3 a step: had the dropped group kept its place in the plan, or its tokens in a
    # denominator, weights would differ
    other = run(world, tmp_path / "b", **dict(flags, rollouts=rest))
    assert other["groups_dropped"] == 0 and other["trained_tokens"] == summary["trained_tokens"]
    assert same_bits(weights(tmp_path / "a"), weights(tmp_path / "b"))
    assert all(m["judge/groups_dropped"] == 1 for m in metrics(tmp_path / "a"))


def test_nothing_left_to_train_on_is_said(world, tmp_path, capsys):
    rewards = make_rewards(world.rollouts, tmp_path / "w.jsonl", lambda r: None)
    assert "every group has a failed judgement" in refused(
        world, tmp_path, capsys, method="ropd", rewards=rewards
    )


def test_equal_rewards_in_every_group_teach_nothing(world, tmp_path):
    rewards = make_rewards(world.rollouts, tmp_path / "w.jsonl", lambda r: 0.75)
    for method in ("ropd", "grpo"):
        got, _ = gradient(world, dict(needs(world, method), rewards=rewards))
        assert float(got.norm()) < 1e-6


# ---- what belongs together


ON_POLICY = [m for m, row in METHODS.items() if row.on_policy]


@pytest.mark.parametrize("method", ON_POLICY)
def test_rollouts_of_other_weights_are_refused(world, drifted, tmp_path, capsys, method):
    message = refused(world, tmp_path, capsys, method=method, model=drifted)
    assert (
        f"{world.rollouts}:1: policy.weights: expected " in message
        and "--allow stale" in message
    )


def test_stale_rollouts_are_accepted_when_meant_and_one_line_is_named(
    world, drifted, tmp_path, capsys
):
    assert run(world, tmp_path / "m", model=drifted, allow="stale")["steps"] == 3
    rows = load(world.rollouts)
    rows[17]["policy"] = dict(rows[17]["policy"], weights="0" * 12)
    path = dump(tmp_path / "r.jsonl", rows)
    assert f"{path}:18: policy.weights: expected" in refused(
        world, tmp_path, capsys, rollouts=path
    )


@pytest.mark.parametrize("method", ON_POLICY)
@pytest.mark.parametrize(
    "field, change",
    [
        ("template", lambda t: setattr(t, "chat_template", t.chat_template + " ")),
        ("vocabulary", permuted),
    ],
)
def test_another_template_or_a_permuted_vocabulary_is_refused_even_when_stale(
    world, tmp_path, capsys, method, field, change
):
    folder = variant(world.base, tmp_path / "m", change)
    assert f":1: policy.{field}: expected" in refused(
        world, tmp_path, capsys, method=method, model=folder, allow="stale"
    )


def test_a_padded_embedding_is_the_same_vocabulary(world, tmp_path):
    """More rows than tokens: the same loss and the same gradient on the rows that are tokens,
    also with the whole support."""
    folder = variant(world.base, tmp_path / "m", model=padded(8))
    for method in ("opd", "opd-full", "ropd"):
        run(world, tmp_path / method / "a", method=method, batch_size=8)
        run(
            world,
            tmp_path / method / "b",
            method=method,
            batch_size=8,
            model=folder,
            allow="stale",
        )
        a, b = metrics(tmp_path / method / "a")[0], metrics(tmp_path / method / "b")[0]
        for name in (
            "train/loss",
            "policy/entropy",
            "train/grad_norm",
            "rollout/logprob_gap_mean",
        ):
            assert b[name] == pytest.approx(a[name], rel=1e-3, abs=2e-5), (method, name)


@pytest.mark.parametrize("method", [m for m, row in METHODS.items() if row.prefix == "old"])
def test_samples_of_the_very_weights_are_not_old_ones(world, tmp_path, capsys, method):
    message = refused(world, tmp_path, capsys, method=method, rollouts=world.rollouts)
    assert (
        f"{world.rollouts}:1: policy.weights: expected those of an earlier state" in message
        and "prefix=self" in message
    )
    flags = dict(needs(world, method), rollouts=world.rollouts)
    assert (
        train.main(
            [
                *argv(model=world.base, out=tmp_path / "m", **FAST, **flags),
                "--set",
                "prefix=self",
                "--set",
                "omega_scale=0.5",
            ]
        )["steps"]
        == 3
    )


@pytest.mark.parametrize("method", [m for m, row in METHODS.items() if row.prefix == "teacher"])
def test_a_row_on_a_teachers_answers_refuses_the_policys_own(world, tmp_path, capsys, method):
    """Off-policy is derived, too: the survey's taxonomy puts the same teacher under another row
    when it scores the student's rollouts."""
    message = refused(world, tmp_path, capsys, method=method, rollouts=world.rollouts)
    assert (
        f"{world.rollouts}:1: policy.weights: expected another model's" in message
        and "off-policy" in message
    )
    assert run(world, tmp_path / "m", method=method)["steps"] == 3
    assert all(m["rollout/on_policy_fraction"] == 0 for m in metrics(tmp_path / "m"))


def test_a_teachers_answers_are_scored_by_that_teacher(world, tmp_path, capsys):
    path = dump(
        tmp_path / "r.jsonl",
        [dict(r, policy=r["policy"] | {"weights": "0" * 12}) for r in load(world.rollouts)],
    )
    assert "expected 000000000000, the weights that wrote the answer" in refused(
        world, tmp_path, capsys, method="fkl", rollouts=path
    )
    flags = dict(method="fkl", rollouts=path, scores=None, teacher=world.teacher)
    assert "policy.weights" in refused(world, tmp_path, capsys, **flags)
    # with prefix data for anybody's texts
    done = run(world, tmp_path / "m", method="fkl", rollouts=path, set="prefix=data")
    assert done["steps"] == 3


def test_gkd_takes_its_share_of_steps_from_the_given_texts(world, tmp_path, capsys):
    """One step a prompt: those on rollouts are the policy's own, the others come from --data,
    as a seeded coin says."""
    given = dump(
        tmp_path / "given.jsonl",
        [
            dict(r, policy=r["policy"] | {"weights": "0" * 12})
            for r in load(world.rollouts)
            if r["sample"] < 2
        ],
    )
    scores = dump(tmp_path / "s.jsonl", [s for s in load(world.scores) if s["sample"] < 2])
    flags = dict(method="gkd", data=given, data_scores=scores, batch_size=1, epochs=4)
    run(world, tmp_path / "m", **flags)
    rows = metrics(tmp_path / "m")
    own = [m["rollout/on_policy_fraction"] for m in rows]
    assert len(own) == 32 and set(own) == {0.0, 1.0} and 8 <= sum(own) <= 24
    assert all(m["train/sequences"] == (4 if x else 2) for m, x in zip(rows, own))
    run(world, tmp_path / "n", **flags, set="student_fraction=0.1")
    assert sum(m["rollout/on_policy_fraction"] for m in metrics(tmp_path / "n")) < sum(own)
    # rounds of two steps, under one seed: not the same two coins again and again
    model, coins = world.base, []
    for number in range(4):
        out = tmp_path / f"round{number}"
        train.main(
            argv(
                **dict(
                    flags,
                    model=model,
                    out=out,
                    epochs=None,
                    steps=2,
                    rollouts=world.rollouts,
                    scores=world.scores,
                    learning_rate=1e-3,
                    allow="stale",
                )
            )
        )
        coins += [m["train/sequences"] == 4 for m in metrics(out)]
        model = out
    assert len({tuple(coins[i : i + 2]) for i in range(0, 8, 2)}) > 1
    part = dump(tmp_path / "part.jsonl", [r for r in load(given) if r["id"] != "t00003"])
    assert "expected an answer to every prompt" in refused(
        world, tmp_path, capsys, **dict(flags, data=part)
    )


def test_a_consistent_row_wants_the_teacher_of_the_fine_tuning(world, tmp_path, capsys):
    """2604.13010: who wrote the fine-tuning's answers stands in the model's folder, goes along
    with later training, and is compared with the scorer."""
    by_teacher = needs(world, "seqkd")
    train.main(argv(model=world.base, out=tmp_path / "sft", **by_teacher, **FAST))
    train.main(
        argv(
            method="sft",
            model=tmp_path / "sft",
            rollouts=world.toy / "clean.jsonl",
            steps=1,
            out=tmp_path / "more",
            **FAST,
        )
    )
    rollout.main(
        argv(
            model=tmp_path / "more",
            prompts=world.prompts,
            slice=":4",
            n=2,
            max_tokens=20,
            out=tmp_path / "r.jsonl",
        )
    )
    flags = dict(
        method="lightning",
        model=tmp_path / "more",
        rollouts=tmp_path / "r.jsonl",
        out=tmp_path / "m",
        **FAST,
    )
    for name, folder in (("same", world.teacher), ("other", world.base)):
        teacher.main(
            argv(
                "score",
                model=folder,
                rollouts=tmp_path / "r.jsonl",
                out=tmp_path / f"{name}.jsonl",
            )
        )
    assert train.main(argv(**flags, scores=tmp_path / "same.jsonl"))["steps"] == 2
    assert (
        train.main(argv(**dict(flags, out=tmp_path / "live"), teacher=world.teacher))["steps"]
        == 2
    )
    for source in (dict(scores=tmp_path / "other.jsonl"), dict(teacher=world.base)):
        message = refusal(train.main, argv(**dict(flags, out=tmp_path / "x"), **source), capsys)
        assert (
            "policy.weights: expected the teacher that" in message
            and "--allow teacher" in message
        )
        assert (
            train.main(
                argv(
                    **dict(flags, out=tmp_path / f"meant{len(source)}{'teacher' in source}"),
                    **source,
                    allow="teacher",
                )
            )["steps"]
            == 2
        )
    assert "none on record" in refused(
        world, tmp_path, capsys, **dict(needs(world, "lightning"), allow=None)
    )


def test_without_importance_weights_any_sampling_will_do(world, tmp_path):
    """Lightning's rollouts are sampled at 0.8; its loss is of the model at temperature 1."""
    rows = load(world.rollouts)
    plain, _ = gradient(world, needs(world, "lightning"))
    for i, r in enumerate(rows):
        r["temperature"], r["top_p"] = (0.8, 1.0, 0.0)[i % 3], 0.9
    other, _ = gradient(
        world, dict(needs(world, "lightning"), rollouts=dump(tmp_path / "r.jsonl", rows))
    )
    same_gradient(other, plain, 1e-6)


def test_repetition_and_ends_are_logged_and_a_collapse_is_said(world, tmp_path, capsys):
    rows, scores = load(world.rollouts), by_key(load(world.scores))
    scores = [scores[r["id"], r["sample"]] for r in rows]
    run(world, tmp_path / "a", method="opd", batch_size=8)
    (fine,) = metrics(tmp_path / "a")
    ends = [(r["end_mass"], s["end_mass"]) for r, s in zip(rows, scores)]
    assert (
        fine["rollout/student_end_mass"],
        fine["rollout/teacher_end_mass"],
    ) == pytest.approx(tuple(np.mean(ends, 0)), rel=1e-5)
    assert fine["rollout/repetition"] == 0 and "kl/teacher_repetitive" not in fine
    assert fine["alarm/collapse"] == 0 and "WARNING" not in capsys.readouterr().out
    for i, r in enumerate(rows):
        if i % 4 == 0:
            r["text"] = "1+1=2\n" * 60
    looping = dump(tmp_path / "r.jsonl", rows)
    for r, s in zip(rows, scores):
        s["rollout"] = records.fingerprint(r)
    run(
        world,
        tmp_path / "b",
        method="opd",
        batch_size=8,
        rollouts=looping,
        scores=dump(tmp_path / "s.jsonl", scores),
    )
    (bad,) = metrics(tmp_path / "b")
    assert (
        bad["rollout/repetition"] == 0.25
        and bad["alarm/collapse"] == 1
        and "WARNING: in 1 of 1 steps" in capsys.readouterr().out
    )
    gaps = [[q - p for q, p in zip(s["logprobs"], r["logprobs"])] for r, s in zip(rows, scores)]
    assert bad["kl/teacher_repetitive"] == pytest.approx(
        -np.mean(np.concatenate(gaps[::4])), rel=1e-4
    )
    del rows[5]["end_mass"]  # as from a server: a mean over the others would be of another set
    run(
        world,
        tmp_path / "d",
        method="opd",
        batch_size=8,
        rollouts=dump(tmp_path / "q.jsonl", rows),
        scores=tmp_path / "s.jsonl",
    )
    assert (
        "rollout/student_end_mass" not in metrics(tmp_path / "d")[0]
        and "rollout/teacher_end_mass" in metrics(tmp_path / "d")[0]
    )


def test_a_prompt_without_a_solution_is_named(world, tmp_path, capsys):
    prompts = dump(
        tmp_path / "p.jsonl",
        [
            {k: v for k, v in p.items() if k != "solution" or p["id"] != "t00003"}
            for p in load(world.prompts)
        ],
    )
    assert f"{prompts}:4: solution: expected a text" in refused(
        world, tmp_path, capsys, **dict(needs(world, "stable-opd"), data=prompts)
    )


def test_a_divergence_the_kernel_does_not_give_needs_a_support(world, tmp_path, capsys):
    flags = dict(method="gkd", scores=None, data_scores=None, teacher=world.teacher)
    assert "--teacher-top-k" in refused(world, tmp_path, capsys, **flags)
    assert "--teacher-top-k" in refused(
        world, tmp_path, capsys, method="opd-full", teacher_top_k=4
    )
    assert run(world, tmp_path / "m", **flags, teacher_top_k=V)["steps"] == 3


def test_answers_of_weight_0_leave_the_data_and_are_counted(world, tmp_path, capsys):
    """dapo: groups with one reward; rft: rejected answers; dpo: all but the best and the
    worst."""
    flat = make_rewards(
        world.rollouts,
        tmp_path / "flat.jsonl",
        lambda r: 1.0 if r["id"] < "t00004" else float(r["sample"] == 1),
    )
    for method, prompts, sequences in (("dapo", 4, 16), ("rft", 8, 20), ("dpo", 4, 8)):
        flags = dict(needs(world, method), rewards=flat)
        summary = run(world, tmp_path / method, **flags, batch_size=8)
        (row,) = metrics(tmp_path / method)
        assert (
            row["train/sequences"] == sequences
            and summary["groups_without_weight"]
            == 8 - prompts
            == row["reward/groups_without_weight"]
        )
        assert row["reward/zero_variance_groups"] == 0.5
    none = make_rewards(world.rollouts, tmp_path / "none.jsonl", lambda r: 0.25)
    for method in ("dapo", "rft", "dpo"):
        assert "nothing is left to train on" in refused(
            world, tmp_path, capsys, **dict(needs(world, method), rewards=none)
        )


def test_dpo_widens_its_margin(world, tmp_path):
    run(world, tmp_path / "m", method="dpo", epochs=6, learning_rate=3e-3)
    first, last = metrics(tmp_path / "m")[0], metrics(tmp_path / "m")[-1]
    assert (
        last["preference/margin"] > first["preference/margin"] + 0.1
        and last["preference/loss"] < first["preference/loss"]
    )


@pytest.mark.parametrize("baseline", ["none", "kl"])
def test_the_share_of_clipped_advantages_is_logged(world, baseline):
    """Counted by hand from the files: |log p_T - log mu (+ KL)| above the bound, over all
    trained tokens."""
    overrides = (f"baseline={baseline}", "advantage_clip=0.4")
    _, numbers = gradient(world, needs(world, "opd", overrides), overrides=overrides)
    scores, model, beyond = by_key(load(world.scores)), naive_model(world.base), []
    for key, r in by_key(load(world.rollouts)).items():
        table = naive_logps(model, r["prompt_ids"], r["response_ids"]).detach()
        ids, logps = (records.unpack(scores[key]["topk"][f]) for f in ("ids", "logprobs"))
        full = np.empty((len(ids), V))
        np.put_along_axis(full, ids.astype(int), logps, 1)
        kl = (
            (table.exp() * (table - torch.tensor(full))).sum(-1)
            if baseline == "kl"
            else torch.zeros(len(table))
        )
        beyond += [
            abs(q - mu + float(k)) > 0.4
            for q, mu, k in zip(scores[key]["logprobs"], r["logprobs"], kl)
        ]
    assert 0.02 < np.mean(beyond) < 0.98 and numbers[
        "policy/advantage_clip_fraction"
    ] == pytest.approx(np.mean(beyond), abs=1e-3)


@pytest.mark.parametrize("field, value", [("top_p", 0.9), ("temperature", 0.0)])
@pytest.mark.parametrize("method", [m for m in ON_POLICY if METHODS[m].ratio != "none"])
def test_rollouts_whose_log_probs_are_not_the_samplers_are_refused(
    world, tmp_path, capsys, method, field, value
):
    rows = load(world.rollouts)
    rows[3][field] = value
    message = refused(
        world, tmp_path, capsys, method=method, rollouts=dump(tmp_path / "r.jsonl", rows)
    )
    assert "r.jsonl:4: top_p: expected 1 and a temperature above 0" in message


def test_teacher_scores_need_rollouts_at_temperature_one_and_one_temperature_a_file(
    world, tmp_path, capsys
):
    rows = [dict(r, temperature=0.7) for r in load(world.rollouts)]
    warm = dump(tmp_path / "r.jsonl", rows)
    assert "r.jsonl:1: temperature: expected 1, got 0.7" in refused(
        world, tmp_path, capsys, method="opd", rollouts=warm
    )
    rows[9]["temperature"] = 0.9
    mixed = dump(tmp_path / "q.jsonl", rows)
    assert "q.jsonl:10: temperature: expected 0.7" in refused(
        world, tmp_path, capsys, method="grpo", rollouts=mixed
    )


def test_rewards_and_scores_of_other_rollouts_with_the_same_ids_are_refused(
    world, tmp_path, capsys
):
    rollout.main(
        argv(
            model=world.base,
            prompts=world.prompts,
            slice=":8",
            n=4,
            max_tokens=28,
            seed=9,
            out=tmp_path / "r.jsonl",
        )
    )
    assert by_key(load(tmp_path / "r.jsonl")).keys() == by_key(load(world.rollouts)).keys()
    for method, flag in (
        ("ropd", world.rewards),
        ("opd", world.scores),
        ("opd-full", world.scores),
    ):
        message = refused(world, tmp_path, capsys, method=method, rollouts=tmp_path / "r.jsonl")
        assert (
            f"{flag}:" in message
            and ": rollout: expected" in message
            and "made for other rollouts" in message
        )


@pytest.mark.parametrize(
    "method, flag", [("ropd", "rewards"), ("opd", "scores"), ("ropd-paper", "reference")]
)
def test_a_missing_record_is_named(world, tmp_path, capsys, method, flag):
    path = dump(tmp_path / "part.jsonl", load(needs(world, method)[flag])[:-1])
    message = refused(world, tmp_path, capsys, method=method, **{flag: path})
    assert f"{path}: expected a record for id" in message and str(world.rollouts) in message


def test_scores_after_another_prompt_teach_but_are_no_reference(world, tmp_path, capsys):
    """A student that is taught by itself with the answer before it: a step moves it; without
    the answer there is nothing to learn."""

    told, same = tmp_path / "told.jsonl", tmp_path / "same.jsonl"
    teacher.main(
        argv(
            "score",
            model=world.base,
            rollouts=world.rollouts,
            out=told,
            prompts=world.prompts,
            hint="{answer}={question}",
            top_k=1000,
        )
    )
    teacher.main(
        argv(
            "score",
            model=world.base,
            rollouts=world.rollouts,
            out=same,
            prompts=world.prompts,
            top_k=1000,
        )
    )
    norms = {}
    for name, path in (("told", told), ("same", same)):
        train.main(
            argv(
                method="opd-full",
                model=world.base,
                rollouts=world.rollouts,
                scores=path,
                out=tmp_path / name,
            )
        )
        norms[name] = load(tmp_path / name / "metrics.jsonl")[0]["train/grad_norm"]
    assert norms["told"] > 1000 * norms["same"]
    message = refused(world, tmp_path, capsys, method="ropd-paper", reference=told)
    assert re.search(
        r"told.jsonl:\d+: context: expected scores after the student's own prompt", message
    )


def test_golden_answers_may_be_texts_of_another_model(world, tmp_path):
    """As an API gives them: no tokens, no messages; their prompts come from --prompts.  The
    same step as from the prompts' own solutions."""
    golden = dump(
        tmp_path / "api.jsonl",
        [
            {
                "id": p["id"],
                "sample": 0,
                "policy": {"model": "api"},
                "text": p["solution"],
                "finish_reason": "stop",
            }
            for p in load(world.prompts)
        ],
    )
    flags = needs(world, "stable-opd")
    for name, more in (
        ("texts", dict(data=golden, prompts=world.prompts)),
        ("solutions", dict(data=world.prompts)),
    ):
        train.main(
            argv(model=world.base, out=tmp_path / name, learning_rate=1e-3, **flags | more)
        )
    assert same_bits(weights(tmp_path / "texts"), weights(tmp_path / "solutions"))


def test_sft_takes_the_solutions_of_a_prompts_file(world, tmp_path):
    """The same weights as from a file of answers that say the same, and a prompt without a
    solution is named."""
    prompts = load(world.prompts)
    answers = dump(
        tmp_path / "a.jsonl",
        [
            {
                "id": p["id"],
                "sample": 0,
                "policy": {"model": "solution"},
                "messages": p["messages"],
                "text": p["solution"],
                "finish_reason": "stop",
            }
            for p in prompts
        ],
    )
    for name, path in (("one", world.prompts), ("two", answers)):
        train.main(
            argv(
                method="sft",
                model=world.base,
                rollouts=path,
                out=tmp_path / name,
                learning_rate=1e-3,
            )
        )
    assert same_bits(weights(tmp_path / "one"), weights(tmp_path / "two"))
    bare = dump(
        tmp_path / "bare.jsonl",
        [prompts[0], {k: v for k, v in prompts[1].items() if k != "solution"}],
    )
    with pytest.raises(records.BadInput, match="bare.jsonl:2: solution: expected a text"):
        train.main(
            argv(
                method="sft",
                model=world.base,
                rollouts=bare,
                out=tmp_path / "three",
                learning_rate=1e-3,
            )
        )


def test_scores_without_a_distribution_are_refused_where_one_is_needed(world, tmp_path, capsys):
    path = dump(
        tmp_path / "s.jsonl",
        [{k: v for k, v in s.items() if k != "topk"} for s in load(world.scores)],
    )
    assert "--top-k" in refused(world, tmp_path, capsys, method="opd-full", scores=path)


@pytest.mark.parametrize("method", METHODS)
def test_files_a_method_needs_are_demanded_and_others_refused(world, tmp_path, capsys, method):
    have = needs(world, method)
    for flag, path in dict(
        rewards=world.rewards,
        scores=world.scores,
        reference=world.scores,
        data=world.rollouts,
        data_scores=world.scores,
        token_weights=world.rollouts,
    ).items():
        name = flag.replace("_", "-")
        if flag in have:
            wanted = "--scores or --teacher" if flag == "scores" else f"--{name}"
            message = refused(world, tmp_path, capsys, **have | {flag: None})
            assert f"expected {wanted}, but it is missing" in message
        else:
            message = refused(world, tmp_path, capsys, **have | {flag: path})
            assert f"--{name} is given, but this method does not read it" in message
    # golden answers may be texts that need their prompts
    if METHODS[method].prefix == "self" and not METHODS[method].gold_weight:
        assert "--prompts" in refused(
            world, tmp_path, capsys, **dict(have, prompts=world.prompts)
        )


@pytest.mark.parametrize(
    "flags", [dict(steps=3, epochs=2), dict(schedule="constant", total_steps=50)]
)
def test_flags_that_would_do_nothing_are_refused(world, tmp_path, capsys, flags):
    refused(world, tmp_path, capsys, **flags)


@pytest.mark.parametrize(
    "flags",
    [
        dict(batch_size=0),
        dict(epochs=0),
        dict(steps=0),
        dict(micro_batch_tokens=0),
        dict(save_every=0),
        dict(method="nope"),
        dict(set="clip_low"),
        dict(set="norm=other"),
        dict(set="coefficient=k3"),
    ],
)
def test_senseless_flags_are_refused(world, tmp_path, capsys, flags):
    flags = dict(needs(world, "opd"), **flags)
    refusal(
        train.main,
        argv(**dict(dict(model=world.base, out=tmp_path / "m", learning_rate=1e-3), **flags)),
        capsys,
    )


@pytest.mark.parametrize("flag", ["rollouts", "scores"])
def test_a_missing_file_is_one_line_and_exit_code_2(world, tmp_path, capsys, flag):
    assert "absent.jsonl" in refused(
        world, tmp_path, capsys, **{flag: tmp_path / "absent.jsonl"}
    )


def test_teacher_scores_are_not_joined_with_an_answer_that_was_tokenized_again(
    world, tmp_path, capsys
):
    """Off-policy distillation on another template: the teacher's numbers belong to tokens after
    another prompt."""
    folder = variant(
        world.base, tmp_path / "m", lambda t: setattr(t, "chat_template", t.chat_template + " ")
    )
    message = refused(
        world, tmp_path, capsys, method="opd-full", set="prefix=data", model=folder
    )
    assert "policy.template" in message
