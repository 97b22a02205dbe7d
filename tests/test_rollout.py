"""rollout.py: the sampler draws from the model's distribution, records what it drew, and a
rerun changes nothing."""

import math
import sys
from functools import partial

import numpy as np
import pytest
import torch
import transformers
from conftest import (
    argv,
    by_key,
    dump,
    kill_while_writing,
    load,
    naive_model,
    naive_own,
    refusal,
    variant,
)
from fake_server import FakeServer

import rollout
from opd import cli, sampling, scoring, tensors
from opd import policy as policies
from opd.kernel import linear_logp, token_numbers

END = "<|end|>"


# ---- pick


def picked(logits, draws, temperature=1.0, top_p=1.0):
    draws = torch.as_tensor(draws, dtype=torch.float64)
    return sampling.pick(logits.expand(len(draws), -1), draws, temperature, top_p)


@pytest.fixture(params=[512, 5], ids=["one block", "blocks"])
def block(request, monkeypatch):
    """24 tokens are one block of columns, or four and a rest."""
    monkeypatch.setattr(sampling, "BLOCK", request.param)


def some_logits(seed=0, size=24):
    return 2 * torch.randn(size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    "temperature, top_p",
    [(1.0, 1.0), (0.7, 1.0), (2.0, 1.0), (1.0, 0.05), (1.0, 0.3), (0.7, 0.9), (1.0, 0.999)],
)
def test_a_grid_of_uniforms_reproduces_the_softmax_on_exactly_the_nucleus(
    temperature, top_p, block
):
    """Inversion: of N equally spaced uniforms, N p(a) fall on token a, up to one; the log-probs
    are those of the whole softmax."""
    logits, n = some_logits(2), 20_000
    p = torch.softmax(logits.double() / temperature, -1)
    nucleus = torch.zeros_like(p)
    for token in p.argsort(descending=True):
        if nucleus.sum() < top_p - 1e-9:
            nucleus[token] = p[token]
    ids, logps = picked(logits, (np.arange(n) + 0.5) / n, temperature, top_p)
    shares = torch.bincount(ids, minlength=len(p)) / n
    assert ((shares > 0) == (nucleus > 1e-4)).all()
    assert (shares - nucleus / nucleus.sum()).abs().max() < 1e-4
    torch.testing.assert_close(logps.double(), p.log()[ids], atol=1e-5, rtol=0)


@pytest.mark.parametrize("dead", [[0, 1], [5, 23], [23, 22, 21]])
def test_impossible_tokens_are_never_drawn_at_the_ends_of_the_interval(dead, block):
    draws = [0.0, 2.0**-53, 0.5, 1 - 2.0**-52, 1 - 2.0**-53]
    alive = [a for a in range(24) if a not in dead]
    for seed in range(3):
        logits = some_logits(seed)
        logits[dead] = -math.inf
        for temperature, top_p in ((1.0, 1.0), (0.7, 1.0), (1.0, 0.9)):
            ids, logps = picked(logits, draws, temperature, top_p)
            assert not set(ids.tolist()) & set(dead) and torch.isfinite(logps).all()
        ids, _ = picked(logits, draws)
        assert ids[0] == alive[0] and ids[-1] == alive[-1]


# ---- the stage


def words(world, out, **flags):
    plain = dict(model=world.base, prompts=world.prompts, slice=":8", n=4, max_tokens=28)
    return argv(**plain | flags, out=out)


def sample(world, out, **flags):
    rollout.main(words(world, out, **flags))
    return by_key(load(out))


def answers(rows):
    names = ("prompt_ids", "response_ids", "finish_reason", "text")
    return {key: [r[name] for name in names] for key, r in rows.items()}


def near(got, want, atol=2e-5):
    np.testing.assert_allclose(got, want, atol=atol, rtol=0)


def trainer_logps(policy, items, temperature=1.0):
    """log-probs [N] of the trained tokens as train.py computes them."""
    hidden, ids = tensors.states(policy, items), tensors.chosen_ids(items)
    options = dict(temperature=temperature, **policy.head_options)
    return token_numbers(hidden, policy.head, ids, **options).logp[:, 0]


def test_on_a_terminal_a_bar_tells_tokens_a_second_and_time_left(
    world, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    every = partial(cli.tqdm, mininterval=0, miniters=1)  # it waits for 0.1 s by default
    monkeypatch.setattr(cli, "tqdm", every)
    sample(world, tmp_path / "r.jsonl", batch_tokens=200)
    told = capsys.readouterr().err
    assert "r.jsonl: 100%" in told and "tokens/s" in told and "answers: " in told


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_recorded_log_probs_are_those_of_the_model(world, base64bit, tmp_path, temperature):
    """Sampler (left padding, cache, rows leaving), trainer (right padding, kernel), teacher,
    and plain float64: within 2e-5 nats."""
    rows = load(world.rollouts)
    if temperature != 1:
        rows = sample(world, tmp_path / "r.jsonl", temperature=temperature).values()
    assert len({len(r["prompt_ids"]) for r in rows}) > 2
    assert len({len(r["response_ids"]) for r in rows}) > 5
    policy = policies.load_policy(str(world.base))
    want = [naive_own(base64bit, r, temperature) for r in rows]
    with torch.no_grad():
        items = [dict(r, mask=r["loss_mask"]) for r in rows]
        near(trainer_logps(policy, items, temperature), np.concatenate(want))
    for r, logps in zip(rows, want):
        near(r["logprobs"], logps)
    if temperature == 1:
        for logps, (own, *_) in zip(want, scoring.score_batch(policy, rows, 0)):
            near(own, logps)


def test_a_record_is_what_was_sampled(world):
    policy = policies.load_policy(str(world.base))
    end, decode = policy.tokenizer.convert_tokens_to_ids(END), policy.tokenizer.decode
    questions = {p["id"]: p["messages"][0]["content"] for p in load(world.prompts)}
    reasons = set()
    for r in load(world.rollouts):
        ids, ended = r["response_ids"], r["finish_reason"] == "stop"
        reasons.add(r["finish_reason"])
        assert r["policy"] == policy.identity and r["loss_mask"] == [1] * len(ids)
        assert decode(r["prompt_ids"]) == f"<|user|>{questions[r['id']]}<|assistant|>"
        # the end token is part of the answer iff it was sampled
        assert decode(ids, skip_special_tokens=True) == r["text"]
        assert ids.count(end) == ended and (ids[-1] == end) == ended
        assert ended or len(ids) == 28
        assert max(r["logprobs"]) <= 0
    assert reasons == {"stop", "length"}


def test_greedy_rollouts_are_the_argmax_and_what_transformers_generates(
    world, base64bit, tmp_path
):
    for r in sample(world, tmp_path / "r.jsonl", n=1, temperature=0).values():
        prompt = torch.tensor([r["prompt_ids"]])
        how = dict(do_sample=False, max_new_tokens=28, attention_mask=torch.ones_like(prompt))
        out = base64bit.generate(prompt, **how)[0].tolist()
        assert out == r["prompt_ids"] + r["response_ids"]
        near(r["logprobs"], naive_own(base64bit, r))


@pytest.mark.parametrize(
    "flags, kept",
    [
        (dict(batch_tokens=150), lambda number, sample: True),
        (dict(batch_tokens=1, slice="1:8:4"), lambda number, sample: number in (1, 5)),
        (dict(n=2, slice="2:5"), lambda number, sample: sample < 2 and 2 <= number < 5),
    ],
)
def test_the_same_seed_gives_the_same_answers_however_they_are_batched(
    world, tmp_path, flags, kept
):
    whole = answers(by_key(load(world.rollouts)))
    part = {k: v for k, v in whole.items() if kept(int(k[0][1:]), k[1])}
    assert answers(sample(world, tmp_path / "r.jsonl", **flags)) == part


def test_another_seed_sample_or_prompt_draws_other_numbers():
    names = ((0, "p", 0), (1, "p", 0), (0, "q", 0), (0, "p", 1))
    draws = [sampling.uniforms(*some, 50) for some in names]
    assert all(not np.isin(a, b).any() for i, a in enumerate(draws) for b in draws[:i])
    assert abs(np.mean(draws) - 0.5) < 0.1
    longer = sampling.uniforms(0, "p", 0, 80)
    assert np.array_equal(draws[0], longer[:50]), "a longer --max-tokens keeps the beginning"


def test_killed_and_run_again_is_as_if_never_killed(world, tmp_path):
    out = tmp_path / "r.jsonl"
    flags = words(world, out)
    kill_while_writing("rollout", flags, after=5)
    text = out.read_bytes()
    assert text.count(b"\n") == 5 and not text.endswith(b"\n"), "five records and a torn sixth"
    rollout.main(flags)
    finished = out.read_bytes()
    assert finished.startswith(text[: text.rindex(b"\n") + 1]), "what was written stays"
    assert answers(by_key(load(out))) == answers(by_key(load(world.rollouts)))
    rollout.main(flags)
    assert out.read_bytes() == finished


def test_a_file_of_other_settings_is_not_continued(world, tmp_path, capsys):
    out = tmp_path / "r.jsonl"
    flags = dict(slice=":1", n=1, max_tokens=8)
    sample(world, out, **flags)
    before = out.read_bytes()
    for name, change in {
        "temperature": dict(temperature=0.7),
        "seed": dict(seed=3),
        "weights": dict(model=world.teacher),
    }.items():
        message = refusal(rollout.main, words(world, out, **flags | change), capsys)
        assert f"{out.name}: was begun with {name} = " in message
    assert out.read_bytes() == before
    # more prompts and samples are a continuation
    assert len(sample(world, out, **flags | dict(n=3, slice=":2"))) == 6
    assert out.read_bytes().startswith(before)


def poison(model):
    model.model.norm.weight.data.fill_(float("nan"))


@pytest.mark.parametrize(
    "flags, complaint",
    [
        (dict(n=0), "--n"),
        (dict(max_tokens=0), "--max-tokens"),
        (dict(temperature=-1), "--temperature"),
        (dict(temperature=0.0001), "--temperature"),
        (dict(temperature="nan"), "--temperature"),
        (dict(top_p=0), "--top-p"),
        (dict(tool_options={"max_calls": 1}), "--tools beside it"),
        (dict(tools="calculator", tool_options={"max_calls": 0}), "max_calls of at least 1"),
        (
            dict(tools="calculator", tool_options={"call_format": "x"}),
            "hermes or json or brackets",
        ),
        (dict(prompts="absent.jsonl", slice=None), "absent.jsonl"),
        (dict(prompts={"prompt": ""}), "prompt 'odd': expected at least one token"),
        (
            dict(prompts={"messages": [{"role": "user", "content": "\ud83d"}]}),
            "half a surrogate pair is no text",
        ),
        (dict(model="nan"), "finite"),
        (dict(model="pickle"), "safetensors"),
    ],
)
def test_what_cannot_be_sampled_is_refused(world, tmp_path, capsys, flags, complaint):
    """Among it pickled weights, and logits that are no numbers."""
    if isinstance(flags.get("prompts"), dict):
        prompt = {"id": "odd"} | flags["prompts"]
        flags = dict(slice=None, prompts=dump(tmp_path / "p.jsonl", [prompt]))
    if "model" in flags:
        folder = tmp_path / "m"
        variant(world.base, folder, model=poison if flags["model"] == "nan" else None)
        if flags["model"] == "pickle":
            (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
        flags = dict(model=folder)
    assert complaint in refusal(
        rollout.main, words(world, tmp_path / "r.jsonl", **flags), capsys
    )


# ---- models as they come


def test_pad_equal_to_end_hides_no_end_token(world, tmp_path):
    def pad_is_end(tokenizer):
        tokenizer.pad_token = END

    def same(model):
        end = model.config.eos_token_id
        model.generation_config.pad_token_id = model.config.pad_token_id = end

    folder = variant(world.base, tmp_path / "m", pad_is_end, same)
    rows = sample(world, tmp_path / "r.jsonl", model=folder)
    assert answers(rows) == answers(by_key(load(world.rollouts)))
    assert all(r["loss_mask"] == [1] * len(r["response_ids"]) for r in rows.values())


def test_every_stop_id_of_the_generation_config_stops(world, tmp_path):
    """A chat model may end a turn with another token than its tokenizer's end token."""
    hash_id = policies.load_tokenizer(str(world.base)).convert_tokens_to_ids("#")

    def two_ends(model):
        model.generation_config.eos_token_id = [model.config.eos_token_id, hash_id]

    folder = variant(world.base, tmp_path / "m", model=two_ends)
    whole, cut = by_key(load(world.rollouts)), 0
    for key, r in sample(world, tmp_path / "r.jsonl", model=folder).items():
        want = whole[key]["response_ids"]
        if hash_id in want:
            want = want[: want.index(hash_id) + 1]
            cut += 1
            assert r["finish_reason"] == "stop"
        assert r["response_ids"] == want
    assert cut


def test_plain_prompts_are_tokenized_as_they_stand(world, tmp_path):
    plain = {"id": 7, "prompt": "<|user|>1+2=?<|assistant|>"}
    chat = {"id": "m", "messages": [{"role": "user", "content": "1+2=?"}]}
    prompts = dump(tmp_path / "p.jsonl", [plain, chat])
    rows = sample(world, tmp_path / "r.jsonl", prompts=prompts, slice=None, n=1)
    assert rows[7, 0]["prompt_ids"] == rows["m", 0]["prompt_ids"]


SIZES = dict(
    vocab_size=24,
    hidden_size=32,
    intermediate_size=48,
    num_attention_heads=2,
    num_key_value_heads=1,
)


@pytest.mark.parametrize(
    "family, how, scale, softcap",
    [
        ("Gemma2", dict(final_logit_softcapping=2.0), 1.0, 2.0),
        ("Granite", dict(logits_scaling=7.0), 1 / 7, None),
        ("Cohere", dict(logit_scale=0.25), 0.25, None),
    ],
)
def test_scaled_and_capped_heads_are_read_from_the_config_and_proven_on_the_models_own_logits(
    family, how, scale, softcap
):
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")
    config = config(**SIZES, **how, num_hidden_layers=1, head_dim=16)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    head = model.get_output_embeddings().weight
    head.data.mul_(40)  # far enough from 0 for a cap or scale to matter
    options = policies.head_options(model, 24)
    assert options == {"scale": scale, "softcap": softcap}
    everything = torch.arange(24).expand(24, 24)
    with torch.no_grad():
        hidden = model.get_decoder()(input_ids=everything[:1]).last_hidden_state[0]
        want = torch.log_softmax(model(input_ids=everything[:1]).logits[0], -1)
        got, _ = linear_logp(hidden, head, everything, **options)
        plain, _ = linear_logp(hidden, head, everything)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=0)
    assert (plain - want).abs().max() > 0.1


def test_heads_that_are_no_plain_matrix_are_refused(world, monkeypatch):
    """No list of config names is complete: the logits of a few tokens tell."""

    class Wrapped(torch.nn.Linear):  # as a LoRA adapter wraps the head
        pass

    model = naive_model(world.base)
    plain, head = model.forward, model.lm_head

    def capped(*args, **kwargs):
        out = plain(*args, **kwargs)
        out.logits = 3 * torch.tanh(out.logits / 3)
        return out

    assert policies.head_options(model, 24) == {"scale": 1.0, "softcap": None}
    for forward, other, complaint in (
        (capped, head, "not hidden @ head.T"),
        (plain, torch.nn.Linear(64, 24, bias=True), "bias"),
        (plain, Wrapped(64, 24, bias=False), "Wrapped"),
    ):
        model.forward, model.lm_head = forward, other
        with pytest.raises(sampling.BadInput, match=complaint):
            policies.head_options(model, 24)


def test_identity_follows_parameters_template_and_vocabulary_only(world, tmp_path):
    def nudge(model):
        model.lm_head.weight.data[0, 0] += 1e-3

    base = policies.load_policy(str(world.base)).identity
    template = lambda t: setattr(t, "chat_template", t.chat_template + "\n")
    for differs, changes, options in (
        # a copy of the model without the trainer's state is the same policy
        (set(), (), {}),
        ({"template"}, (template,), {}),
        ({"weights"}, (None, nudge), {}),
        ({"template"}, (), {"x": 1}),
    ):
        folder = variant(world.base, tmp_path / f"{len(changes)}{len(options)}", *changes)
        other = policies.load_policy(str(folder), template_options=options).identity
        assert {name for name in base if other[name] != base[name]} - {"model"} == differs


@pytest.mark.parametrize("budget", [1, 64, 10_000])
def test_batches_respect_the_budget_and_lose_nothing(budget):
    lengths = np.random.default_rng(0).integers(0, 40, 50).tolist()
    batches = policies.token_batches(lengths, budget)
    assert sorted(i for b in batches for i in b) == list(range(50))
    for b in batches:
        assert len(b) == 1 or len(b) * max(lengths[i] for i in b) <= budget


# ---- an answer that has begun


def test_a_last_message_of_the_assistants_is_continued_locally_and_by_a_server(world, tmp_path):
    """ "1+2=?" with the beginning "1+": the model reads on after the plus, with neither an end
    token nor a new turn, and writes what is missing."""
    asked, begun = {"role": "user", "content": "1+2=?"}, {"role": "assistant", "content": "1+"}
    prompts = dump(
        tmp_path / "p.jsonl",
        [{"id": "p", "messages": [asked, begun], "continue_final_message": True}],
    )
    flags = dict(prompts=prompts, slice=None, n=1, max_tokens=4)
    tokenizer = policies.load_tokenizer(str(world.base))
    (local,) = sample(world, tmp_path / "r.jsonl", **flags).values()
    assert tokenizer.decode(local["prompt_ids"]) == "<|user|>1+2=?<|assistant|>1+"
    assert tokenizer.decode(local["response_ids"], skip_special_tokens=True) == local["text"]
    with FakeServer(chat=lambda body: "2=3", tokenizer=tokenizer) as fake:
        flags |= dict(base_url=fake.base_url)
        (served,) = sample(world, tmp_path / "s.jsonl", **flags).values()
        body = fake.bodies()[-1]
    assert body["continue_final_message"] and not body["add_generation_prompt"]
    assert served["prompt_ids"] == local["prompt_ids"]


def test_a_model_with_a_recurrent_state_goes_on_when_a_row_has_ended(world, tmp_path):
    """Hybrid models: their layers' states follow the rows that are left; against a forward pass
    over whole answers."""
    torch.manual_seed(0)
    layers = dict(num_hidden_layers=2, layer_types=["conv", "full_attention"])
    config = transformers.Lfm2Config(**SIZES, **layers, tie_word_embeddings=False)
    model = transformers.AutoModelForCausalLM.from_config(config)
    folder = variant(world.base, tmp_path / "m", model=lambda _: model)
    rows = sample(world, tmp_path / "r.jsonl", model=folder, slice=":4", max_tokens=40)
    assert len({len(r["response_ids"]) for r in rows.values()}) > 3
    naive = naive_model(folder)
    for r in rows.values():
        near(r["logprobs"], naive_own(naive, r), atol=1e-4)
