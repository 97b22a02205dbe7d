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
    head = model.get_output_embeddings().weight
    return SimpleNamespace(model=model, head=head, vocabulary=V, shares_prompts=False)


def answers_to(prompts, count, seed=0, longest=9):
    """(prompts, answers, masks) of `count` random answers to random ones of the prompts."""
    draw = random.Random(seed)
    asked = [draw.choice(prompts) for _ in range(count)]
    answers = [[draw.randrange(V) for _ in range(draw.randrange(longest))] for _ in asked]
    masks = [[draw.randrange(2) for _ in answer] for answer in answers]
    return asked, answers, masks


PROMPTS = [[5, 6, 7], [5, 6], [8], [9, 5, 6, 7, 11, 12]]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["Llama", "Qwen2", "Qwen3", "GPT2", "Olmo2"])
def test_states_and_gradients_are_those_of_one_row_an_answer(monkeypatch, kind, attention):
    """Some answers are empty, some hidden, some prompts begin others; rows are cut, too."""
    policy = tiny(kind, attention)
    asked = answers_to(PROMPTS, 24)
    plain = shared.answer_states(policy, *asked)
    toward = torch.randn(plain.shape, generator=torch.Generator().manual_seed(1))
    parameters = list(policy.model.parameters())

    def gradient(states):
        found = torch.autograd.grad((states * toward).sum(), parameters, allow_unused=True)
        return [g for g in found if g is not None]

    wanted = gradient(plain)
    shared.share_prompts(policy)
    for longest in (2048, 12):
        monkeypatch.setattr(shared, "LONGEST", longest)
        states = shared.answer_states(policy, *asked)
        torch.testing.assert_close(states, plain, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(gradient(states), wanted, rtol=1e-3, atol=1e-4)


def test_a_prompt_is_read_once(monkeypatch):
    policy = tiny("Llama")
    shared.share_prompts(policy)
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
    shared.share_prompts(policy)
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


@pytest.mark.parametrize("budget", [1, 30, 10**6])
def test_batches_lose_nothing_and_keep_the_budget(budget):
    """A row that is longer than the budget has a batch of its own."""
    asked, answers, _ = answers_to(PROMPTS, 40)
    names = [str(prompt) for prompt in asked]
    sizes = [(len(prompt), len(answer)) for prompt, answer in zip(asked, answers)]
    for shares in (True, False):
        policy = SimpleNamespace(shares_prompts=shares)
        batches = shared.answer_batches(policy, names, sizes, budget)
        assert sorted(i for batch in batches for i in batch) == list(range(40))
        for batch in batches:
            rows, widths = shared.rows_of([names[i] for i in batch], [sizes[i] for i in batch])
            if not shares:
                rows, widths = batch, [sum(sizes[i]) for i in batch]
            assert len(rows) == 1 or len(rows) * max(widths) <= budget


@pytest.mark.parametrize("longest", [7, 20, 10**6])
def test_rows_hold_one_prompt_and_at_most_so_many_tokens(monkeypatch, longest):
    monkeypatch.setattr(shared, "LONGEST", longest)
    asked, answers, _ = answers_to(PROMPTS, 40)
    sizes = [(len(prompt), len(answer)) for prompt, answer in zip(asked, answers)]
    rows, widths = shared.rows_of(map(tuple, asked), sizes)
    assert sorted(i for row in rows for i in row) == list(range(40))
    for row, width in zip(rows, widths):
        assert all(asked[i] == asked[row[0]] for i in row)
        assert width == len(asked[row[0]]) + sum(len(answers[i]) for i in row)
        assert width <= longest or len(row) == 1
    if longest == 10**6:
        assert len(rows) == len(PROMPTS)


@pytest.mark.parametrize(
    "kind, changes, complaint",
    [
        ("Mistral", dict(sliding_window=8), "a sliding window"),
        ("Gemma3Text", dict(head_dim=8), "sliding_attention"),
        ("Mamba", dict(state_size=8), "linear_attention"),
    ],
)
def test_a_model_that_does_not_attend_to_all_is_refused(kind, changes, complaint):
    with pytest.raises(BadInput, match=f"shared prompts: .*{complaint}.*go without"):
        shared.share_prompts(tiny(kind, "eager", **changes))


def test_a_model_that_sees_other_answers_is_refused(monkeypatch):
    policy = tiny("Llama")
    decoder = policy.model.get_decoder()

    def blind(module, args, how):
        if how["attention_mask"] is not None and how["attention_mask"].dim() == 4:
            return args, how | {"attention_mask": None}

    decoder.register_forward_pre_hook(blind, with_kwargs=True)
    with pytest.raises(BadInput, match="shared prompts: .*states off by"):
        shared.share_prompts(policy)


def test_scores_are_those_of_one_row_an_answer(world, tmp_path, capsys):
    """Through teacher.py, in few and in many batches."""
    flags = dict(model=world.teacher, rollouts=world.rollouts, top_k=3)
    plain = by_key(load(world.scores))
    for budget in (40, 10**5):
        out = tmp_path / f"{budget}.jsonl"
        how = dict(share_prompts=True, batch_tokens=budget, out=out)
        summary = teacher.main(argv("score", **flags, **how))
        assert summary["noise_floor"] < 1e-4
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
    shared.share_prompts(policy)
    states = shared.answer_states(policy, [[5, 6]] * 3, [[7], [8, 9], []], [[1], [1, 1], []])
    assert states.dtype == torch.bfloat16 and bool(states.isfinite().all())
