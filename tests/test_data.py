"""opd/batches.py: only what belongs together becomes a training step; groups, weights and ends
of answers; whose answers they are."""

import shutil

import numpy as np
import pytest
import torch
from conftest import (
    argv,
    by_key,
    dump,
    load,
    make_rewards,
    naive_model,
    padded,
    permuted,
    refusal,
    same_bits,
    variant,
    weights,
    with_positions,
)
from test_train import (
    END,
    FAST,
    Step,
    gradient,
    metrics,
    needs,
    refused,
    run,
    same_gradient,
    written_by,
)

import rollout
import teacher
import train
from methods.rows import METHODS
from opd import policy as policies
from opd import records
from opd.batches import Data, Inputs
from opd.chat import render
from opd.metrics import policy_metrics, sequence_metrics

# ---- answers that are texts


def answer(id, text, question, finish="stop"):
    return {
        "id": id,
        "sample": 0,
        "policy": {"model": "elsewhere"},
        "messages": [{"role": "user", "content": question}],
        "text": text,
        "finish_reason": finish,
    }


TEXTS = [("1+2=?", "#3"), ("4+5-2=?", "4+5=9\n9-2=7\n#7"), ("9-3=?", "9-3=6\n#6")]


@pytest.mark.parametrize("finish, extra", [("stop", 1), ("length", 0)])
def test_only_answers_that_ended_get_an_end_token(world, tmp_path, finish, extra):
    rows = [answer(f"a{i}", text, q, finish) for i, (q, text) in enumerate(TEXTS)]
    path = dump(tmp_path / "a.jsonl", rows)
    policy = policies.load_policy(str(world.base))
    data = Data(Inputs(path), METHODS["sft"], policy)
    decode = policy.tokenizer.decode
    for item, (question, text) in zip(data.items(data.groups), TEXTS):
        assert decode(item["prompt_ids"]) == f"<|user|>{question}<|assistant|>"
        assert decode(item["response_ids"]) == text + "<|end|>" * extra
        assert item["mask"] == [1] * (len(text) + extra)
    summary = run(world, tmp_path / "m", method="sft", rollouts=path)
    assert summary["trained_tokens"] == sum(len(t) + extra for _, t in TEXTS)
    assert summary["retokenized"] == 3


def test_a_text_without_a_prompt_is_refused_before_the_first_step(world, tmp_path, capsys):
    rows = [answer(f"a{i}", text, q) for i, (q, text) in enumerate(TEXTS)]
    del rows[-1]["messages"]
    path = dump(tmp_path / "a.jsonl", rows)
    flags = dict(method="sft", rollouts=path, batch_size=1)
    assert f"{path}:3: expected tokens" in refused(world, tmp_path, capsys, **flags)
    assert not (tmp_path / "refused.partial" / "metrics.jsonl").exists()


def end_probability(folder, texts):
    """Mean probability of the end token after each whole text."""
    model, tokenizer = naive_model(folder), policies.load_tokenizer(str(folder))
    out = []
    for question, text in texts:
        text = f"<|user|>{question}<|assistant|>{text}"
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            out.append(torch.softmax(model(ids).logits[0, -1], -1)[END])
    return float(np.mean(out))


@pytest.mark.parametrize("tokens_on_disk", [False, True])
def test_the_end_token_is_learnt_also_where_it_is_the_pad_token(
    world, tmp_path, tokens_on_disk
):
    """Texts are cut in the middle, so nothing but the end token itself can teach the model to
    end there."""
    texts = [(q, t[:-1].rstrip("\n")) for q, t in TEXTS]
    pad_is_end = lambda tokenizer: setattr(tokenizer, "pad_token", tokenizer.eos_token)
    folder = variant(world.base, tmp_path / "m", pad_is_end)
    policy = policies.load_policy(str(folder))
    assert policy.tokenizer.pad_token_id == policy.tokenizer.eos_token_id == END
    rows = [answer(f"a{i}", text, q) for i, (q, text) in enumerate(texts)]
    for r in rows if tokens_on_disk else ():
        ids = policy.tokenizer(r["text"])["input_ids"] + [END]
        r |= {"policy": policy.identity, "prompt_ids": render(policy.tokenizer, r)}
        r |= {"response_ids": ids, "loss_mask": [1] * len(ids)}
    path = dump(tmp_path / "a.jsonl", rows)
    before = end_probability(folder, texts)
    flags = dict(method="sft", model=folder, rollouts=path, steps=8, learning_rate=3e-3)
    summary = run(world, tmp_path / "out", **flags)
    assert summary["trained_tokens"] == 8 * sum(len(t) + 1 for _, t in texts)
    # the number of answers, however often they are read
    assert summary["retokenized"] == (0 if tokens_on_disk else 3)
    assert before < 0.5 and end_probability(tmp_path / "out", texts) > 0.8


def test_answers_of_another_vocabulary_are_read_as_text(world, tmp_path):
    """Ids of a foreign tokenizer are never taken for ours: the text is tokenized again."""
    questions = {p["id"]: p["messages"][0]["content"] for p in load(world.prompts)}
    native, foreign = [], []
    for r in load(world.rollouts):
        text = answer(r["id"], r["text"], questions[r["id"]], r["finish_reason"])
        native.append(text | {"sample": r["sample"]})
        policy = dict(r["policy"], vocabulary="f" * 12)
        foreign.append(dict(r, policy=policy, messages=text["messages"]))
        foreign[-1]["response_ids"] = [0] * len(r["response_ids"])
    a, _ = gradient(world, dict(method="sft", rollouts=dump(tmp_path / "a.jsonl", foreign)))
    b, _ = gradient(world, dict(method="sft", rollouts=dump(tmp_path / "b.jsonl", native)))
    same_gradient(a, b, 1e-6)


@pytest.mark.parametrize("method", ["sft", "stable-opd"])
def test_solutions_of_prompts_and_texts_of_an_api_that_say_the_same_train_the_same(
    world, tmp_path, method
):
    """An API gives neither tokens nor messages; their prompts come from --prompts."""
    rows = [answer(p["id"], p["solution"], "") for p in load(world.prompts)]
    for row in rows:
        del row["messages"]
    texts = dump(tmp_path / "api.jsonl", rows)
    name = "rollouts" if method == "sft" else "data"
    for out, more in (
        ("texts", {name: texts, "prompts": world.prompts}),
        ("solutions", {name: world.prompts}),
    ):
        run(world, tmp_path / out, **dict(method=method, batch_size=32) | more)
    assert same_bits(weights(tmp_path / "texts"), weights(tmp_path / "solutions"))


@pytest.mark.parametrize("method", ["sft", "lightning"])
def test_without_importance_weights_any_sampling_will_do(world, tmp_path, method):
    """A temperature matters where the sampler's log-probs are used."""
    rows = load(world.rollouts)
    plain, _ = gradient(world, needs(world, method))
    for i, r in enumerate(rows):
        r["temperature"], r["top_p"] = (0.8, 1.0, 0.0)[i % 3], 0.9
    hot = needs(world, method) | dict(rollouts=dump(tmp_path / "r.jsonl", rows))
    same_gradient(gradient(world, hot)[0], plain, 1e-6)


# ---- groups


@pytest.mark.parametrize("method", ["ropd", "dpo"])
def test_a_group_with_a_failed_judgement_is_as_if_it_were_not_there(world, tmp_path, method):
    """7 groups at 3 a step: had it kept its place in the plan, or its tokens in a denominator,
    weights would differ."""
    bad = ("t00002", 1)
    reward = lambda r: None if (r["id"], r["sample"]) == bad else r["sample"] / 3
    rewards = make_rewards(world.rollouts, tmp_path / "w.jsonl", reward)
    flags = dict(needs(world, method), rewards=rewards, epochs=2)
    summary = run(world, tmp_path / "a", **flags)
    rest = dump(tmp_path / "r.jsonl", [r for r in load(flags["rollouts"]) if r["id"] != bad[0]])
    other = run(world, tmp_path / "b", **dict(flags, rollouts=rest))
    assert (summary["groups_dropped"], other["groups_dropped"]) == (1, 0)
    assert other["trained_tokens"] == summary["trained_tokens"]
    assert same_bits(weights(tmp_path / "a"), weights(tmp_path / "b"))
    assert all(m["judge/groups_dropped"] == 1 for m in metrics(tmp_path / "a"))


@pytest.mark.parametrize(
    "method, prompts, sequences", [("dapo", 4, 16), ("rft", 8, 20), ("dpo", 4, 8)]
)
def test_answers_of_weight_0_leave_the_data_and_are_counted(
    world, tmp_path, method, prompts, sequences
):
    """dapo: groups with one reward; rft: rejected answers; dpo: all but the best and the
    worst."""
    reward = lambda r: 1.0 if r["id"] < "t00004" else float(r["sample"] == 1)
    rewards = make_rewards(world.rollouts, tmp_path / "w.jsonl", reward)
    summary = run(world, tmp_path / "m", method=method, rewards=rewards, batch_size=8)
    (row,) = metrics(tmp_path / "m")
    assert row["train/sequences"] == sequences
    assert summary["groups_without_weight"] == 8 - prompts
    assert row["reward/groups_without_weight"] == 8 - prompts
    assert row["reward/zero_variance_groups"] == 0.5


# ---- what is logged


def test_repetition_and_ends_are_logged_and_a_collapse_is_said(world, tmp_path, capsys):
    rows, table = load(world.rollouts), by_key(load(world.scores))
    scores = [table[r["id"], r["sample"]] for r in rows]

    def logged(name, **files):
        for flag, lines in files.items():
            files[flag] = dump(tmp_path / f"{name}.{flag}.jsonl", lines)
        capsys.readouterr()
        run(world, tmp_path / name, batch_size=8, **files)
        (row,) = metrics(tmp_path / name)
        assert ("WARNING: in 1 of 1 steps" in capsys.readouterr().out) == row["alarm/collapse"]
        return row

    fine = logged("fine")
    for who, named in (("student", rows), ("teacher", scores)):
        mean = np.mean([x["end_mass"] for x in named])
        assert fine[f"rollout/{who}_end_mass"] == pytest.approx(mean, rel=1e-5)
    assert fine["rollout/repetition"] == fine["alarm/collapse"] == 0
    loop = "1+1=2\n" * 60
    ids = policies.load_tokenizer(world.base)(loop, add_special_tokens=False)["input_ids"]
    gaps = []
    for r, s in list(zip(rows, scores))[::4]:
        r |= dict(text=loop, response_ids=ids, loss_mask=[1] * len(ids))
        r["logprobs"] = np.linspace(-3, -1, len(ids)).tolist()
        s |= dict(rollout=records.fingerprint(r), logprobs=[-1.5] * len(ids))
        s.pop("topk", None)
        gaps += list(np.subtract(r["logprobs"], s["logprobs"]))
    del rows[5]["end_mass"]  # as from a server: a mean over the others would be of another set
    bad = logged("bad", rollouts=rows, scores=scores)
    assert bad["rollout/repetition"] == 0.25 and bad["alarm/collapse"] == 1
    assert bad["kl/teacher_repetitive"] == pytest.approx(np.mean(gaps), rel=1e-4)
    assert "rollout/student_end_mass" not in bad and "rollout/teacher_end_mass" in bad


def test_the_share_of_clipped_advantages_is_logged(world, base64bit):
    """Counted by hand: |log p_T - log mu + KL| above the bound, over all trained tokens."""
    overrides = ("baseline=kl", "advantage_clip=0.4")
    flags = needs(world, "opd", overrides)
    _, numbers = gradient(world, flags, overrides=overrides)
    step, beyond = Step(base64bit, flags), []
    for key, known in step.known.items():
        logp = step.logps[key].detach()
        kl = (logp.exp() * (logp - known["support_logp"])).sum(-1)
        gap = known["teacher_logp"] - known["behaviour_logp"] + kl
        beyond += (gap.abs() > 0.4).tolist()
    assert 0.02 < np.mean(beyond) < 0.98
    got = numbers["policy/advantage_clip_fraction"]
    assert got == pytest.approx(np.mean(beyond), abs=1e-3)


def test_calls_are_counted_of_episodes_alone():
    text = dict(length=1, truncated=False, own=True)
    episode = text | dict(calls=[True, False], limited=False)
    for items in ([text, episode], [episode, text]):
        assert sequence_metrics(items)["rollout/calls"] == 2


def test_a_token_that_the_sampler_all_but_excluded_leaves_finite_numbers():
    batch = {"behaviour_logp": torch.tensor([-1e5, -1.0])}
    numbers = policy_metrics(METHODS["lightning"], torch.tensor([-0.1, -1.0]), batch)
    assert numbers["policy/weight_square"].isfinite().all()


# ---- a teacher in memory


def test_a_teacher_without_positions_or_rows_is_refused(world, tmp_path, capsys):
    short = with_positions(world.teacher, tmp_path / "short", 8)
    model = naive_model(world.teacher).float()
    model.resize_token_embeddings(12)
    small = shutil.copytree(world.teacher, tmp_path / "small")
    model.save_pretrained(small)
    for folder, words in ((short, "expected at most 8 tokens"), (small, "ids below 12")):
        flags = dict(method="opd-full", scores=None, teacher=folder)
        message = refused(world, tmp_path, capsys, **flags)
        assert words in message and "rollouts.jsonl:1" in message


# ---- whose answers


def test_gkd_takes_its_share_of_steps_from_the_given_texts(world, tmp_path):
    """One step a prompt: those on rollouts are the policy's own, the others come from --data,
    as a seeded coin says."""
    given = [r for r in load(written_by("0" * 12, world.rollouts)) if r["sample"] < 2]
    flags = dict(needs(world, "gkd"), data=dump(tmp_path / "given.jsonl", given), batch_size=1)

    def coins(out, **more):
        run(world, tmp_path / out, **flags | more)
        rows = metrics(tmp_path / out)
        own = [m["rollout/on_policy_fraction"] for m in rows]
        assert [m["train/sequences"] for m in rows] == [4 if x else 2 for x in own]
        return own

    own = coins("m", epochs=4)
    assert len(own) == 32 and set(own) == {0.0, 1.0} and 8 <= sum(own) <= 24
    assert sum(coins("n", epochs=4, set="student_fraction=0.1")) < sum(own)
    # rounds of two steps, under one seed: not the same two coins again and again
    rounds, model = set(), world.base
    for number in range(4):
        more = dict(model=model, steps=2, learning_rate=0, allow="stale")
        rounds.add(tuple(coins(f"round{number}", **more)))
        model = tmp_path / f"round{number}"
    assert len(rounds) > 1


def test_unknown_weights_are_no_known_teacher(world, tmp_path, capsys):
    unknown = by_key(load(world.scores))
    rows = [row | {"policy": row["policy"] | {"weights": None}} for row in unknown.values()]
    folder = shutil.copytree(world.base, tmp_path / "m")
    (folder / "sft_teacher.json").write_text('{"": "an api"}')
    flags = dict(needs(world, "lightning"), allow="stale", model=folder)
    flags["scores"] = dump(tmp_path / "s.jsonl", rows)
    message = refused(world, tmp_path, capsys, **flags)
    assert "unknown weights (an api), got unknown weights (" in message


def test_a_consistent_row_wants_the_teacher_of_the_fine_tuning(world, tmp_path, capsys):
    """2604.13010: who wrote the fine-tuning's answers stands in the model's folder, goes along
    with later training, and is compared with the scorer."""
    run(world, tmp_path / "sft", method="seqkd")
    more = dict(method="sft", model=tmp_path / "sft", rollouts=world.toy / "clean.jsonl")
    run(world, tmp_path / "more", **more, steps=1)
    flags = dict(model=tmp_path / "more", prompts=world.prompts, slice=":2", n=2, max_tokens=20)
    rollout.main(argv(**flags, out=tmp_path / "r.jsonl"))
    flags = dict(method="lightning", model=tmp_path / "more", rollouts=tmp_path / "r.jsonl")
    for name, folder in (("same", world.teacher), ("other", world.base)):
        scores = tmp_path / f"{name}.jsonl"
        how = dict(model=folder, rollouts=tmp_path / "r.jsonl", out=scores)
        teacher.main(argv("score", **how))
        for number, source in enumerate((dict(scores=scores), dict(teacher=folder))):
            command = argv(**FAST, **flags, **source, out=tmp_path / f"{name}{number}")
            if name == "other":
                message = refusal(train.main, command, capsys)
                assert "policy.weights: expected the teacher that" in message
                command += argv(allow="teacher")
            assert train.main(command)["steps"] == 1
    flags = dict(needs(world, "lightning"), allow=None)
    assert "none on record" in refused(world, tmp_path, capsys, **flags)


def test_a_padded_embedding_is_the_same_vocabulary(world, tmp_path):
    """More rows than tokens: the same loss and the same gradient on the rows that are tokens,
    also with the whole support."""
    folder = variant(world.base, tmp_path / "m", model=padded(8))
    flags = needs(world, "opd-full")
    numbers, others = (gradient(world, flags, model=m)[1] for m in (world.base, folder))
    for name in ("train/loss", "policy/entropy", "train/grad_norm", "rollout/logprob_gap_mean"):
        assert others[name] == pytest.approx(numbers[name], rel=1e-3, abs=2e-5), name


def test_what_is_meant_is_trained_on(world, drifted, tmp_path):
    stale = written_by("0" * 12, world.rollouts)
    equal = make_rewards(world.rollouts, tmp_path / "w.jsonl", lambda r: 1.0)
    for method, flags, own in (
        ("opd", dict(model=drifted, allow="stale"), 0),
        ("rft", dict(rollouts=world.rollouts, set="prefix=self", rewards=equal), 1),
        ("fkl", dict(rollouts=stale, set="prefix=data"), 0),
    ):
        out = tmp_path / f"{method}{len(flags)}"
        assert run(world, out, method=method, **flags)["steps"] == 3
        assert {m["rollout/on_policy_fraction"] for m in metrics(out)} == {own}


# ---- refusals


def at(i, **fields):
    """An edit of one record."""
    return lambda rows: rows[i].update(fields)


def everywhere(**fields):
    return lambda rows: [row.update(fields) for row in rows]


def without(field, i):
    return lambda rows: rows[i].pop(field)


def of_weights(weights, *places):
    return lambda rows: [rows[i]["policy"].update(weights=weights) for i in places]


OTHER = "made for other rollouts"
BAD_FILES = [  # method, the file that is edited, the edit, what the message names
    ("opd", "rollouts", of_weights("0" * 12, 17), "bad.jsonl:18: policy.weights: expected"),
    ("opd", "rollouts", at(3, top_p=0.9), "bad.jsonl:4: top_p: expected 1"),
    ("grpo", "rollouts", at(3, temperature=0.0), "a temperature above 0"),
    ("opd", "rollouts", everywhere(temperature=0.7), "bad.jsonl:1: temperature: expected 1"),
    ("grpo", "rollouts", at(9, temperature=0.9), "bad.jsonl:10: temperature: expected 1"),
    ("fkl", "rollouts", of_weights("0" * 12, *range(32)), "the weights that wrote the answer"),
    ("ropd", "rewards", everywhere(reward=None, status="failed"), "a failed judgement"),
    ("dapo", "rewards", everywhere(reward=0.25), "nothing is left to train on"),
    ("ropd", "rewards", at(2, rollout="0" * 12), OTHER),
    ("release", "token_weights", at(2, rollout="0" * 12), OTHER),
    ("ropd-paper", "reference", at(5, context="hint"), "bad.jsonl:6: context: expected scores"),
    ("opd-full", "scores", without("topk", 5), "--top-k"),
    ("stable-opd", "data", without("solution", 3), "bad.jsonl:4: solution: expected a text"),
]


@pytest.mark.parametrize("method, flag, edit, complaint", BAD_FILES)
def test_a_file_that_does_not_fit_is_named(
    world, tmp_path, capsys, method, flag, edit, complaint
):
    flags = needs(world, method)
    rows = load(flags[flag])
    edit(rows)
    flags[flag] = dump(tmp_path / "bad.jsonl", rows)
    message = refused(world, tmp_path, capsys, **flags)
    assert complaint in message


def test_rollouts_of_other_weights_template_or_vocabulary_are_refused(
    world, drifted, tmp_path, capsys
):
    change = lambda t: setattr(t, "chat_template", t.chat_template + " ")
    template = variant(world.base, tmp_path / "template", change)
    vocabulary = variant(world.base, tmp_path / "vocabulary", permuted)
    stale = written_by("0" * 12, world.rollouts)
    live = dict(scores=None, teacher=world.teacher)
    for method, flags, complaint in (
        *((m, dict(model=drifted), "--allow stale") for m in ("opd", "ropd", "gkd")),
        ("opd", dict(model=template, allow="stale"), ":1: policy.template: expected"),
        ("grpo", dict(model=vocabulary, allow="stale"), ":1: policy.vocabulary: expected"),
        # the teacher's numbers belong to tokens after another prompt
        ("opd-full", dict(model=template, set="prefix=data"), "policy.template"),
        ("rft", dict(rollouts=world.rollouts), "expected those of an earlier state"),
        ("fkl", dict(rollouts=world.rollouts), "expected another model's"),
        ("fkl", dict(rollouts=stale) | live, "policy.weights"),
    ):
        message = refused(world, tmp_path, capsys, method=method, **flags)
        assert complaint in message, (method, message)


@pytest.mark.parametrize("method", ["sft", "dpo", "ropd-paper", "gkd", "sod"])
def test_files_a_method_needs_are_demanded_and_others_refused(world, tmp_path, capsys, method):
    have = needs(world, method)
    paths = dict.fromkeys(("scores", "reference"), world.scores) | dict(rewards=world.rewards)
    paths |= dict.fromkeys(("data", "token_weights"), world.rollouts)
    for flag, path in paths.items():
        wrong = have | {flag: None if flag in have else path}
        message = refused(world, tmp_path, capsys, **wrong)
        assert "--" + flag.replace("_", "-") in message
        assert ("is missing" if flag in have else "does not read it") in message


@pytest.mark.parametrize(
    "flags",
    [
        *({name: 0} for name in ("batch_size", "epochs", "steps", "save_every")),
        dict(seed=-1),
        dict(optimizer=dict(adam_beta2=1)),
        dict(steps=3, epochs=2),
        dict(optimizer=dict(total_steps=50)),
        dict(compute=dict(gradient_checkpointing=2)),
        dict(compute=dict(shared_prompts=2)),
        dict(compute=dict(kernel="fast")),
        dict(compute=dict(teacher_top_k=2)),
        dict(rollouts="absent.jsonl"),
        dict(scores="absent.jsonl"),
        dict(method="ropd", prompts="prompts.jsonl"),
    ],
)
def test_senseless_flags_are_refused(world, tmp_path, capsys, flags):
    refused(world, tmp_path, capsys, **flags)
