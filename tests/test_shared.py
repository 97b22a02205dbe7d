"""opd/shared.py: a prompt is read once for all its answers, and nothing else changes."""

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from conftest import argv, by_key, load, refusal
from transformers import AutoModelForCausalLM

import teacher
from opd import shared
from opd.policy import load_policy
from opd.records import BadInput
from opd.sampling import sample_batch

V = 50
TINY = dict(
    vocab_size=V,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
GPT2 = dict(vocab_size=V, n_embd=32, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=2)


def tiny(kind, attention="sdpa", **changes):
    """What opd/shared.py reads of a policy, with random weights."""
    config = getattr(transformers, f"{kind}Config")(
        **(GPT2 if kind == "GPT2" else TINY) | changes
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
    return SimpleNamespace(model=model, row_tokens=0)


def answers_to(prompts, count, seed=0, longest=9):
    """(prompts, answers, masks) of `count` random answers to random ones of the prompts."""
    draw = random.Random(seed)
    asked = [draw.choice(prompts) for _ in range(count)]
    answers = [[draw.randrange(V) for _ in range(draw.randrange(longest))] for _ in asked]
    masks = [[draw.randrange(2) for _ in answer] for answer in answers]
    return asked, answers, masks


PROMPTS = [[5, 6, 7], [5, 6], [8], [9, 5, 6, 7, 11, 12]]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["Llama", "Mistral", "Qwen2", "Qwen3", "GPT2", "Olmo2"])
def test_states_and_gradients_are_those_of_one_row_an_answer(monkeypatch, kind, attention):
    """Some answers are empty, some hidden, some prompts begin others; rows are cut, too."""
    window = {"sliding_window": None} if kind == "Mistral" else {}
    policy = tiny(kind, attention, **window)
    asked = answers_to(PROMPTS, 24)
    plain = shared.answer_states(policy, *asked)
    toward = torch.randn(plain.shape, generator=torch.Generator().manual_seed(1))
    parameters = list(policy.model.parameters())

    def gradient(states):
        found = torch.autograd.grad((states * toward).sum(), parameters, allow_unused=True)
        return [g for g in found if g is not None]

    wanted = gradient(plain)
    shared.share_prompts(policy, 10**6)
    for longest in (2048, 12):
        monkeypatch.setattr(shared, "LONGEST", longest)
        states = shared.answer_states(policy, *asked)
        torch.testing.assert_close(states, plain, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(gradient(states), wanted, rtol=1e-3, atol=1e-4)


def test_a_prompt_is_read_once():
    policy = tiny("Llama")
    shared.share_prompts(policy, 10**6)
    read = []
    decoder = policy.model.get_decoder()
    decoder.register_forward_pre_hook(
        lambda _, args, how: read.append(how["input_ids"].numel()), with_kwargs=True
    )
    prompt, answers = [5] * 20, [[6] * 4] * 5
    shared.answer_states(policy, [prompt] * 5, answers, [[1] * 4] * 5)
    assert read == [20 + 5 * 4]


def test_a_long_answer_has_a_row_and_no_mask_of_its_square(monkeypatch):
    monkeypatch.setattr(shared, "LONGEST", 16)
    policy = tiny("Llama")
    shared.share_prompts(policy, 10**6)
    masks = []
    policy.model.get_decoder().register_forward_pre_hook(
        lambda _, args, how: masks.append(how["attention_mask"]), with_kwargs=True
    )
    answers = [[6] * 40, [7] * 3, [8] * 40, [9] * 3]
    shared.answer_states(policy, [[5] * 4] * 4, answers, [[1] * len(a) for a in answers])
    four = [mask.shape[-1] for mask in masks if mask is not None and mask.dim() == 4]
    assert max(four, default=0) <= 16


def test_the_sampler_reads_a_prompt_once(world):
    policy = load_policy(str(world.base))
    read = []
    policy.model.get_decoder().register_forward_pre_hook(
        lambda _, args, how: read.append(tuple(how["input_ids"].shape)), with_kwargs=True
    )
    prompts = [[5, 6, 7], [8], [5, 6, 7], [5, 6, 7]]
    draws = np.random.default_rng(0).random((4, 6))
    how = dict(max_tokens=6, temperature=1.0, top_p=1.0)
    answers = sample_batch(policy, prompts, draws, **how)
    assert read[0] == (2, 3)
    for i, answer in enumerate(answers):
        (alone,) = sample_batch(policy, prompts[i : i + 1], draws[i : i + 1], **how)
        assert answer.response_ids == alone.response_ids
        assert answer.logprobs == pytest.approx(alone.logprobs, abs=1e-5)
    assert len({tuple(answer.response_ids) for answer in answers}) > 2


def planned(budget, longest, seed):
    """(prompts, sizes, batches) of 60 random answers, for a policy that shares."""
    policy = SimpleNamespace(row_tokens=budget)
    asked, answers, _ = answers_to(PROMPTS, 60, seed, longest)
    sizes = [(len(prompt), len(answer)) for prompt, answer in zip(asked, answers)]
    names = [str(prompt) for prompt in asked]
    return asked, sizes, shared.answer_batches(policy, names, sizes, budget)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("budget, longest", [(1, 9), (30, 9), (200, 90), (10**6, 9)])
def test_batches_lose_nothing_and_rows_keep_the_budget(monkeypatch, budget, longest, seed):
    """Rows as `answer_states` lays them: only a single answer may be longer."""
    monkeypatch.setattr(shared, "LONGEST", 100)
    asked, sizes, batches = planned(budget, longest, seed)
    assert sorted(i for batch in batches for i in batch) == list(range(60))
    for batch in batches:
        names = [tuple(asked[i]) for i in batch]
        rows, widths, _ = shared.rows_of(names, [sizes[i] for i in batch], budget)
        for row, width in zip(rows, widths):
            some = [batch[i] for i in row]
            assert all(asked[i] == asked[some[0]] for i in some)
            answers = sum(sizes[i][1] for i in some)
            assert width == len(asked[some[0]]) + answers
            assert len(some) == 1 or (width <= budget and answers <= 100)
        assert len(rows) * max(widths) <= budget or len(batch) == 1
    if budget == 10**6:
        assert len(batches) == 1 + (sum(n for _, n in sizes) > 4 * 100)


@pytest.mark.parametrize(
    "kind, changes, complaint",
    [
        ("Mistral", dict(sliding_window=8), "a sliding window"),
        ("GPTNeo", dict(attention_types=[[["global", "local"], 1]]), "type gpt_neo"),
        ("Gemma3Text", dict(head_dim=8), "type gemma3_text"),
        ("Mamba", dict(state_size=8), "type mamba"),
        ("Qwen2", dict(use_sliding_window=True, max_window_layers=1), "sliding_attention"),
    ],
)
def test_a_model_that_does_not_attend_to_all_is_refused(kind, changes, complaint):
    with pytest.raises(BadInput, match=f"shared prompts: .*{complaint}.*go without"):
        shared.share_prompts(tiny(kind, "eager", **changes), 100)


def test_scores_are_those_of_one_row_an_answer(world, tmp_path, capsys):
    """Through teacher.py, in few and in many batches."""
    flags = dict(model=world.teacher, rollouts=world.rollouts, top_k=3)
    plain = by_key(load(world.scores))
    for budget in (40, 10**5):
        out = tmp_path / f"{budget}.jsonl"
        how = dict(share_prompts=True, batch_tokens=budget, out=out)
        summary = teacher.main(argv("score", **flags, **how))
        known = summary["noise_floor"] is not None
        assert known == (budget > 40) and (not known or summary["noise_floor"] < 1e-4)
        for key, row in by_key(load(out)).items():
            assert np.allclose(row["logprobs"], plain[key]["logprobs"], atol=2e-5)
            assert row["end_mass"] == pytest.approx(plain[key]["end_mass"], rel=1e-3)
    served = dict(share_prompts=True, base_url="http://127.0.0.1:9/v1", out=tmp_path / "s")
    told = refusal(
        teacher.main, argv("score", **flags | served, tokenizer=world.teacher), capsys
    )
    assert "--share-prompts" in told


def test_masks_of_a_16_bit_model_are_finite(world):
    policy = load_policy(str(world.teacher), "bfloat16")
    shared.share_prompts(policy, 10**6)
    states = shared.answer_states(policy, [[5, 6]] * 3, [[7], [8, 9], []], [[1], [1, 1], []])
    assert states.dtype == torch.bfloat16 and bool(states.isfinite().all())
