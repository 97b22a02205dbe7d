"""rollout.py: the sampler draws from the model's distribution, records what it drew, and a
rerun changes nothing."""

import math
import types

import numpy as np
import pytest
import torch
from conftest import (
    argv,
    by_key,
    dump,
    kill_while_writing,
    load,
    naive_model,
    naive_own,
    refusal,
    run_program,
    variant,
)

import rollout
import teacher
import train
from opd import policy as policies
from opd import sampling, scoring
from opd.kernel import linear_logp, token_numbers

V = 16
END = "<|end|>"


# ---- a decoder that knows its successor


class Successor(torch.nn.Module):
    """The hidden state at position t makes exactly one next token certain: (token + 1 +
    position) mod V.

    The rule sees the token and its position, counted from the first real token.  So a log-prob
    is 0 only where the state at t is read for token t + 1, whatever the padding."""

    class Cache:
        def reorder_cache(self, rows):
            pass

    def __init__(self):
        super().__init__()
        self.head = torch.nn.Linear(V, V, bias=False)
        self.head.weight.data = torch.eye(V)

    def get_output_embeddings(self):
        return self.head

    def get_decoder(self):
        return self

    def forward(
        self, input_ids, attention_mask=None, position_ids=None, cache=None, use_cache=False
    ):
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1]).expand_as(input_ids)
        hidden = (
            60.0 * torch.nn.functional.one_hot((input_ids + 1 + position_ids) % V, V).float()
        )
        return types.SimpleNamespace(last_hidden_state=hidden, cache=self.Cache())


def successor_policy(stops=()):
    model = Successor()
    return types.SimpleNamespace(
        model=model,
        head=model.head.weight,
        head_options={},
        vocabulary=V,
        device=torch.device("cpu"),
        stop_ids=list(stops),
        tokenizer=range(V),
    )


def trainer_logps(policy, items, temperature=1.0):
    """log-probs [N, 1] of the trained tokens as train.py computes them."""
    return token_numbers(
        train.states(policy, items),
        policy.head,
        train.chosen_ids(items),
        temperature=temperature,
        **policy.head_options,
    ).logp


def chain(prompt, count):
    """The `count` tokens that Successor is certain of after `prompt`."""
    sequence = list(prompt)
    for _ in range(count):
        sequence.append((sequence[-1] + 1 + len(sequence) - 1) % V)
    return sequence[len(prompt) :]


# unequal lengths, one answer of a single token
PROMPTS, COUNTS = [[3, 3], [5, 5, 5, 5], [1, 2], [9, 0, 0]], [1, 4, 3, 6]
CHAINS = [
    {"prompt_ids": p, "response_ids": chain(p, n), "mask": [1] * n}
    for p, n in zip(PROMPTS, COUNTS)
]


@pytest.mark.parametrize("shift", [-1, 0, 1])
def test_only_the_right_shift_gives_log_prob_zero(shift):
    policy = successor_policy()
    sequences = [c["prompt_ids"] + c["response_ids"] for c in CHAINS]
    positions = [
        [q + shift for q in policies.response_positions(c["prompt_ids"], c["mask"])]
        for c in CHAINS
    ]
    ids = torch.tensor([t for c in CHAINS for t in c["response_ids"]])
    logp, _ = linear_logp(
        policies.hidden_at(policy.model, sequences, positions), policy.head, ids
    )
    if shift == 0:
        assert logp.abs().max() < 1e-6
    else:
        assert logp.max() < -50


def test_trainer_and_teacher_read_the_right_position():
    policy = successor_policy()
    logp = trainer_logps(policy, CHAINS)
    assert logp.shape == (sum(COUNTS), 1) and logp.abs().max() < 1e-6
    for top_k in (0, 3):
        for c, (own, ids, *_) in zip(CHAINS, scoring.score_batch(policy, CHAINS, top_k)):
            assert len(own) == len(c["response_ids"]) and np.abs(own).max() < 1e-6
            assert ids is None or ids[:, 0].tolist() == c["response_ids"]


def test_a_masked_token_is_skipped_not_shifted():
    masked = [dict(c, mask=[t % 2 for t in range(len(c["response_ids"]))]) for c in CHAINS]
    logp = trainer_logps(successor_policy(), masked)
    assert logp.shape[0] == sum(sum(c["mask"]) for c in masked) and logp.abs().max() < 1e-6


def test_sampler_walks_the_chain_and_rows_leave_when_they_stop():
    """Left padding, positions and the shrinking batch: a row that is mixed up with another
    leaves its chain."""
    stops = [7, 12]
    answers = sampling.sample_batch(
        successor_policy(stops),
        PROMPTS,
        np.full((4, 20), 0.5),
        max_tokens=20,
        temperature=1.0,
        top_p=1.0,
    )
    reasons = set()
    for prompt, answer in zip(PROMPTS, answers):
        ids = answer.response_ids
        logps = answer.logprobs
        reason = answer.finish_reason
        end_mass = answer.end_mass
        want = chain(prompt, 20)
        ends = [t for t, token in enumerate(want) if token in stops]
        want = want[: ends[0] + 1] if ends else want
        assert ids == want and reason == ("stop" if ends else "length")
        assert len(logps) == len(ids) and max(map(abs, logps)) < 1e-6
        assert abs(end_mass - bool(ends)) < 1e-6, (
            "the chain is certain of its next token, so ending has all the mass or none "
            "where the last one stands"
        )
        reasons.add((reason, len(ids)))
    assert len(reasons) > 2, "the fixture should have rows that leave at different times"


# ---- pick


def picked(logits, draws, temperature=1.0, top_p=1.0):
    draws = torch.as_tensor(draws, dtype=torch.float64)
    return sampling.pick(logits.expand(len(draws), -1), draws, temperature, top_p)


def some_logits(seed=0, size=24):
    return 2 * torch.randn(size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.0])
def test_a_grid_of_uniforms_reproduces_the_softmax(temperature):
    """Inversion: of N equally spaced uniforms, N p(a) fall on token a, up to one."""
    logits, n = some_logits(), 50_000
    ids, logps = picked(logits, (np.arange(n) + 0.5) / n, temperature)
    p = torch.softmax(logits.double() / temperature, -1)
    assert (torch.bincount(ids, minlength=len(p)) - n * p).abs().max() <= 1 + n * 1e-6
    torch.testing.assert_close(logps.double(), p.log()[ids], atol=1e-5, rtol=0)


def test_recorded_uniforms_give_the_softmax_frequencies():
    """The numbers the stage really draws, one a token and sample: a chi-square test at about 1
    in 10,000."""
    logits, n = some_logits(1, 6), 3000
    draws = np.concatenate([sampling.uniforms(0, f"p{i}", i % 4, 5) for i in range(n // 5)])
    ids, _ = picked(logits, draws)
    expected = n * torch.softmax(logits.double(), -1)
    chi_square = ((torch.bincount(ids, minlength=6) - expected) ** 2 / expected).sum()
    assert chi_square < 25.7  # 5 degrees of freedom


@pytest.mark.parametrize("top_p", [0.05, 0.3, 0.9, 0.999])
def test_top_p_keeps_exactly_the_nucleus(top_p):
    logits, n = some_logits(2), 50_000
    p = torch.softmax(logits.double(), -1).tolist()
    nucleus, mass = set(), 0.0
    for token in sorted(range(len(p)), key=lambda a: -p[a]):
        if mass >= top_p:
            break
        nucleus.add(token)
        mass += p[token]
    ids, logps = picked(logits, (np.arange(n) + 0.5) / n, top_p=top_p)
    assert set(ids.tolist()) == nucleus
    shares = torch.bincount(ids, minlength=len(p)) / n
    assert max(abs(float(shares[a]) - p[a] / mass) for a in nucleus) < 1e-4
    # of the whole softmax
    torch.testing.assert_close(
        logps.double(), torch.tensor(p, dtype=torch.float64).log()[ids], atol=1e-5, rtol=0
    )


def test_temperature_zero_is_argmax_whatever_the_draw():
    logits = some_logits(3)
    ids, logps = picked(logits, [0.0, 0.3, 0.999], temperature=0)
    assert ids.tolist() == [int(logits.argmax())] * 3
    assert float(logps[0]) == pytest.approx(
        float(torch.log_softmax(logits, -1).max()), abs=1e-6
    )


@pytest.mark.parametrize("dead", [[0, 1], [5, 23], [23, 22, 21], [0, 23]])
@pytest.mark.parametrize("seed", range(5))
def test_impossible_tokens_are_never_drawn_at_the_ends_of_the_interval(dead, seed):
    logits = some_logits(seed)
    logits[dead] = -math.inf
    draws = [0.0, 2.0**-53, 0.5, 1 - 2.0**-52, 1 - 2.0**-53]
    alive = [a for a in range(24) if a not in dead]
    for temperature, top_p in ((1.0, 1.0), (0.7, 1.0), (1.0, 0.9)):
        ids, logps = picked(logits, draws, temperature, top_p)
        assert not set(ids.tolist()) & set(dead) and torch.isfinite(logps).all()
    ids, _ = picked(logits, draws)
    assert ids[0] == alive[0] and ids[-1] == alive[-1]


def test_rows_do_not_see_each_other():
    logits = torch.stack([some_logits(s) for s in range(4)])
    draws = torch.tensor([0.1, 0.9, 0.5, 0.7], dtype=torch.float64)
    together = sampling.pick(logits, draws, 1.0, 0.8)[0].tolist()
    assert together == [
        int(sampling.pick(logits[i : i + 1], draws[i : i + 1], 1.0, 0.8)[0]) for i in range(4)
    ]


# ---- the stage


def sample(world, out, **flags):
    rollout.main(
        argv(
            **dict(
                dict(
                    model=world.base,
                    prompts=world.prompts,
                    slice=":8",
                    n=4,
                    max_tokens=28,
                    out=out,
                ),
                **flags,
            )
        )
    )
    return by_key(load(out))


def answers(rows):
    return {
        key: (r["prompt_ids"], r["response_ids"], r["finish_reason"], r["text"])
        for key, r in rows.items()
    }


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_recorded_log_probs_are_those_of_the_model(world, base64bit, tmp_path, temperature):
    """Sampler (left padding, cache, rows leaving), trainer (right padding, kernel), teacher,
    and plain float64: within 2e-5 nats."""
    rows = (
        load(world.rollouts)
        if temperature == 1
        else list(sample(world, tmp_path / "r.jsonl", temperature=temperature).values())
    )
    assert (
        len({len(r["prompt_ids"]) for r in rows}) > 2
        and len({len(r["response_ids"]) for r in rows}) > 5
    )
    policy = policies.load_policy(str(world.base))
    with torch.no_grad():
        trainer = trainer_logps(
            policy, [dict(r, mask=r["loss_mask"]) for r in rows], temperature
        )[:, 0].tolist()
    for r in rows:
        want = naive_own(base64bit, r, temperature)
        np.testing.assert_allclose(r["logprobs"], want, atol=2e-5, rtol=0)
        np.testing.assert_allclose([trainer.pop(0) for _ in want], want, atol=2e-5, rtol=0)
    if temperature == 1:
        for r, (own, *_) in zip(rows, scoring.score_batch(policy, rows, 0)):
            np.testing.assert_allclose(own, r["logprobs"], atol=2e-5, rtol=0)


def test_a_record_is_what_was_sampled(world):
    policy = policies.load_policy(str(world.base))
    end = policy.tokenizer.convert_tokens_to_ids(END)
    prompts = {p["id"]: p for p in load(world.prompts)}
    reasons = set()
    for r in load(world.rollouts):
        ids = r["response_ids"]
        reasons.add(r["finish_reason"])
        assert r["policy"] == policy.identity
        assert (
            policy.tokenizer.decode(r["prompt_ids"])
            == f"<|user|>{prompts[r['id']]['messages'][0]['content']}<|assistant|>"
        )
        assert r["loss_mask"] == [1] * len(ids)
        if r["finish_reason"] == "stop":
            assert ids[-1] == end and end not in ids[:-1], (
                "the end token is part of the answer iff it was sampled"
            )
        else:
            assert end not in ids and len(ids) == 28
        assert (
            END not in r["text"]
            and policy.tokenizer.decode([i for i in ids if i != end], skip_special_tokens=True)
            == r["text"]
        )
        assert max(r["logprobs"]) <= 0
    assert reasons == {"stop", "length"}


def test_greedy_rollouts_are_the_argmax_and_what_transformers_generates(
    world, base64bit, tmp_path
):
    rows = sample(world, tmp_path / "r.jsonl", n=1, temperature=0)
    for r in rows.values():
        out = base64bit.generate(
            torch.tensor([r["prompt_ids"]]),
            attention_mask=torch.ones(1, len(r["prompt_ids"]), dtype=torch.int64),
            do_sample=False,
            max_new_tokens=28,
        )[0].tolist()
        assert out[len(r["prompt_ids"]) :] == r["response_ids"]
        np.testing.assert_allclose(r["logprobs"], naive_own(base64bit, r), atol=2e-5, rtol=0)


def test_the_same_seed_gives_the_same_answers_however_they_are_batched(world, tmp_path):
    whole = answers(by_key(load(world.rollouts)))
    assert answers(sample(world, tmp_path / "a.jsonl", batch_tokens=1)) == whole
    assert answers(sample(world, tmp_path / "b.jsonl", batch_tokens=150)) == whole
    halves = [
        answers(sample(world, tmp_path / f"s{i}.jsonl", slice=f"{i}:8:2")) for i in (0, 1)
    ]
    assert len(halves[0]) == len(halves[1]) == 16 and halves[0] | halves[1] == whole
    part = answers(sample(world, tmp_path / "c.jsonl", slice="2:5"))
    assert part == {k: v for k, v in whole.items() if k[0] in ("t00002", "t00003", "t00004")}
    fewer = answers(sample(world, tmp_path / "d.jsonl", n=2))
    assert fewer == {k: v for k, v in whole.items() if k[1] < 2}


def test_another_seed_sample_or_prompt_draws_other_numbers(world, tmp_path):
    whole = by_key(load(world.rollouts))
    other = sample(world, tmp_path / "a.jsonl", seed=1)
    assert sum(whole[k]["response_ids"] != other[k]["response_ids"] for k in whole) > 0.8 * len(
        whole
    )
    for prompt in {k[0] for k in whole}:
        assert len({tuple(whole[prompt, s]["response_ids"]) for s in range(4)}) > 1
    draws = [
        sampling.uniforms(*names, 50)
        for names in ((0, "p", 0), (1, "p", 0), (0, "q", 0), (0, "p", 1))
    ]
    assert all(not np.isin(a, b).any() for i, a in enumerate(draws) for b in draws[:i])
    assert np.array_equal(draws[0], sampling.uniforms(0, "p", 0, 80)[:50]), (
        "a longer --max-tokens keeps the beginning"
    )


def test_killed_and_run_again_is_as_if_never_killed(world, tmp_path):
    flags = argv(
        model=world.base,
        prompts=world.prompts,
        slice=":8",
        n=4,
        max_tokens=28,
        out=tmp_path / "r.jsonl",
    )
    kill_while_writing("rollout", flags, after=5)
    text = (tmp_path / "r.jsonl").read_bytes()
    assert text.count(b"\n") == 5 and not text.endswith(b"\n"), "five records and a torn sixth"
    rollout.main(flags)
    assert (tmp_path / "r.jsonl").read_bytes().startswith(text[: text.rindex(b"\n") + 1]), (
        "what was written stays"
    )
    again, whole = by_key(load(tmp_path / "r.jsonl")), by_key(load(world.rollouts))
    assert answers(again) == answers(whole)
    for key, r in again.items():
        np.testing.assert_allclose(r["logprobs"], whole[key]["logprobs"], atol=2e-5, rtol=0)
    before = (tmp_path / "r.jsonl").read_bytes()
    rollout.main(flags)
    assert (tmp_path / "r.jsonl").read_bytes() == before


def test_a_file_of_other_settings_is_not_continued(world, tmp_path, capsys):
    out = tmp_path / "r.jsonl"
    flags = dict(
        model=world.base, prompts=world.prompts, slice=":1", n=1, max_tokens=8, out=out
    )
    rollout.main(argv(**flags))
    before = out.read_bytes()
    for name, change in {
        "temperature": dict(temperature=0.7),
        "top_p": dict(top_p=0.9),
        "max_tokens": dict(max_tokens=9),
        "seed": dict(seed=3),
        "weights": dict(model=world.teacher),
        "dtype": dict(dtype="bfloat16"),
    }.items():
        assert f"{out.name}: was begun with {name} = " in refusal(
            rollout.main, argv(**(flags | change)), capsys
        )
    assert out.read_bytes() == before
    # more prompts and samples are a continuation
    rollout.main(argv(**(flags | dict(n=3, slice=":2"))))
    assert len(by_key(load(out))) == 6 and out.read_bytes().startswith(before)
    rollout.main(argv(**(flags | dict(seed=3, overwrite=True))))
    assert len(load(out)) == 1


def test_as_a_program_it_explains_and_exits_with_2(world, tmp_path):
    done = run_program(
        "rollout.py",
        argv(model=world.base, prompts=tmp_path / "absent.jsonl", out=tmp_path / "r.jsonl"),
    )
    assert (
        done.returncode == 2
        and "absent.jsonl" in done.stderr
        and "Traceback" not in done.stderr
    )


@pytest.mark.parametrize(
    "flags",
    [
        dict(n=0),
        dict(max_tokens=0),
        dict(temperature=-1),
        dict(top_p=0),
        dict(top_p=1.5),
        dict(slice="3"),
        dict(slice="30:"),
        dict(slice="a:b"),
        dict(slice="::0"),
        dict(slice="1:2:3:4"),
    ],
)
def test_senseless_flags_are_refused(world, tmp_path, capsys, flags):
    refusal(
        rollout.main,
        argv(
            **dict(
                dict(model=world.base, prompts=world.prompts, out=tmp_path / "r.jsonl"), **flags
            )
        ),
        capsys,
    )
    assert not (tmp_path / "r.jsonl").exists()


# ---- models as they come


def test_pad_equal_to_end_hides_no_end_token(world, tmp_path):
    def pad_is_end(tokenizer):
        tokenizer.pad_token = END

    def same(model):
        model.generation_config.pad_token_id = model.config.pad_token_id = (
            model.config.eos_token_id
        )

    folder = variant(world.base, tmp_path / "m", pad_is_end, same)
    rows = sample(world, tmp_path / "r.jsonl", model=folder)
    assert answers(rows) == answers(by_key(load(world.rollouts))), (
        "the pad token has no say in sampling"
    )
    end = policies.load_policy(str(folder)).tokenizer.pad_token_id
    ended = [r for r in rows.values() if r["finish_reason"] == "stop"]
    assert ended and all(
        r["response_ids"][-1] == end and r["loss_mask"][-1] == 1 for r in ended
    )


def test_every_stop_id_of_the_generation_config_stops(world, tmp_path):
    """A chat model may end a turn with another token than its tokenizer's end token."""
    hash_id = policies.load_policy(str(world.base)).tokenizer.convert_tokens_to_ids("#")

    def two_ends(model):
        model.generation_config.eos_token_id = [model.config.eos_token_id, hash_id]

    folder = variant(world.base, tmp_path / "m", model=two_ends)
    whole = by_key(load(world.rollouts))
    rows = sample(world, tmp_path / "r.jsonl", model=folder)
    assert any(hash_id in r["response_ids"] for r in whole.values())
    for key, r in rows.items():
        full = whole[key]["response_ids"]
        cut = full.index(hash_id) + 1 if hash_id in full else len(full)
        assert r["response_ids"] == full[:cut] and (
            r["finish_reason"] == "stop" or hash_id not in full
        )


def test_a_model_without_any_stop_id_runs_to_the_limit(world, tmp_path):
    def endless(model):
        model.generation_config.eos_token_id = model.config.eos_token_id = None

    folder = variant(
        world.base, tmp_path / "m", lambda t: setattr(t, "eos_token", None), endless
    )
    rows = sample(world, tmp_path / "r.jsonl", model=folder, slice=":2", max_tokens=12)
    assert all(
        len(r["response_ids"]) == 12 and r["finish_reason"] == "length" for r in rows.values()
    )


def test_plain_prompts_are_tokenized_as_they_stand(world, tmp_path):
    prompts = dump(
        tmp_path / "p.jsonl",
        [
            {"id": 7, "prompt": "<|user|>1+2=?<|assistant|>"},
            {"id": "m", "messages": [{"role": "user", "content": "1+2=?"}]},
        ],
    )
    rows = sample(world, tmp_path / "r.jsonl", prompts=prompts, slice=":", n=1)
    assert rows[7, 0]["prompt_ids"] == rows["m", 0]["prompt_ids"]


def special_head(family):
    """A tiny untrained model of a family whose logits are not just hidden @ head.T."""
    import transformers

    sizes = dict(
        vocab_size=24,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
    )
    config = {
        "gemma2": lambda: transformers.Gemma2Config(**sizes, final_logit_softcapping=2.0),
        "granite": lambda: transformers.GraniteConfig(**sizes, logits_scaling=7.0),
        "cohere": lambda: transformers.CohereConfig(**sizes, logit_scale=0.25),
    }[family]()
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        # far enough from 0 for a cap or scale to matter
        model.get_output_embeddings().weight.mul_(40)
    return model


@pytest.mark.parametrize(
    "family, expected",
    [
        ("gemma2", {"scale": 1.0, "softcap": 2.0}),
        ("granite", {"scale": 1 / 7, "softcap": None}),
        ("cohere", {"scale": 0.25, "softcap": None}),
    ],
)
def test_scaled_and_capped_heads_are_read_from_the_config_and_proven_on_the_models_own_logits(
    family, expected
):
    model = special_head(family)
    options = policies.head_options(model, 24)
    assert options == expected
    ids = torch.arange(24)[None]
    with torch.no_grad():
        hidden = model.get_decoder()(input_ids=ids).last_hidden_state[0]
        want = torch.log_softmax(model(input_ids=ids).logits[0], -1)
        everything = torch.arange(24).expand(24, 24)
        got, _ = linear_logp(
            hidden, model.get_output_embeddings().weight, everything, **options
        )
        plain, _ = linear_logp(hidden, model.get_output_embeddings().weight, everything)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=0)
    assert (plain - want).abs().max() > 0.1


def test_heads_that_are_no_plain_matrix_are_refused(world):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(world.base)
    model.lm_head = torch.nn.Linear(64, 24, bias=True)
    with pytest.raises(sampling.BadInput, match="bias"):
        policies.head_options(model, 24)

    class Wrapped(torch.nn.Linear):  # as a LoRA adapter wraps the head
        pass

    model.lm_head = Wrapped(64, 24, bias=False)
    with pytest.raises(sampling.BadInput, match="Wrapped"):
        policies.head_options(model, 24)


def test_a_head_that_does_something_unheard_of_is_noticed(world, monkeypatch):
    """No list of config names is complete: the logits of a few tokens tell."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(world.base)
    plain = model.forward

    def capped(*args, **kwargs):
        out = plain(*args, **kwargs)
        out.logits = 3 * torch.tanh(out.logits / 3)
        return out

    assert policies.head_options(model, 24) == {"scale": 1.0, "softcap": None}
    monkeypatch.setattr(model, "forward", capped)
    with pytest.raises(sampling.BadInput, match="not hidden @ head.T"):
        policies.head_options(model, 24)


@pytest.mark.parametrize(
    "prompt, complaint",
    [
        ({"prompt": ""}, "at least one token"),
        ({"messages": [{"role": "user", "content": "\ud83d"}]}, "rendered"),
    ],
)
def test_a_prompt_that_cannot_be_rendered_is_named(world, tmp_path, capsys, prompt, complaint):
    prompts = dump(tmp_path / "p.jsonl", [{"id": "odd", **prompt}])
    message = refusal(
        rollout.main,
        argv(model=world.base, prompts=prompts, out=tmp_path / "r.jsonl", max_tokens=4),
        capsys,
    )
    assert "prompt 'odd'" in message and complaint in message


def test_logits_that_are_no_numbers_stop_the_stage(world, tmp_path, capsys):
    def poison(model):
        with torch.no_grad():
            model.model.norm.weight.fill_(float("nan"))

    folder = variant(world.base, tmp_path / "m", None, poison)
    message = refusal(
        rollout.main,
        argv(model=folder, prompts=world.prompts, out=tmp_path / "r.jsonl", max_tokens=4),
        capsys,
    )
    assert "finite" in message or "head @" in message or "head.T" in message


def test_pickled_weights_are_never_loaded(world, tmp_path):
    folder = variant(world.base, tmp_path / "m")
    for file in folder.glob("*.safetensors"):
        file.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(sampling.BadInput, match="safetensors"):
        policies.load_policy(str(folder))


def test_identity_follows_parameters_template_and_vocabulary_only(world, tmp_path):
    base = policies.load_policy(str(world.base)).identity

    def identity(name, *changes):
        return policies.load_policy(
            str(variant(world.base, tmp_path / name, *changes))
        ).identity

    def differs(other):
        return {f for f in ("weights", "template", "vocabulary") if other[f] != base[f]}

    assert differs(identity("copy")) == set(), (
        "a copy of the model without the trainer's state is the same policy"
    )
    assert differs(
        identity("template", lambda t: setattr(t, "chat_template", t.chat_template + "\n"))
    ) == {"template"}

    def nudge(model):
        with torch.no_grad():
            model.lm_head.weight[0, 0] += 1e-3

    assert differs(identity("nudged", None, nudge)) == {"weights"}
    assert (
        policies.load_policy(str(world.base), template_options={"x": 1}).identity["template"]
        != base["template"]
    )


def test_batches_respect_the_budget_and_lose_nothing():
    rng = np.random.default_rng(0)
    assert policies.token_batches([3, 9, 4], 10) == [[1], [2, 0]]
    for budget in (1, 10, 64, 10_000):
        lengths = rng.integers(0, 40, 50).tolist()
        batches = policies.token_batches(lengths, budget)
        assert sorted(i for b in batches for i in b) == list(range(50))
        for b in batches:
            assert len(b) == 1 or len(b) * max(lengths[i] for i in b) <= budget


# ---- an answer that has begun


def test_a_last_message_of_the_assistants_is_continued_locally_and_by_a_server(world, tmp_path):
    """ "1+2=?" with the beginning "1+": the model reads on after the plus, with neither an end
    token nor a new turn, and writes what is missing."""
    from fake_server import FakeServer

    begun = dump(
        tmp_path / "p.jsonl",
        [
            {
                "id": "p",
                "messages": [
                    {"role": "user", "content": "1+2=?"},
                    {"role": "assistant", "content": "1+"},
                ],
                "answer": "3",
            }
        ],
    )
    rollout.main(
        argv(model=world.base, prompts=begun, n=2, max_tokens=4, out=tmp_path / "r.jsonl")
    )
    tokenizer = policies.load_tokenizer(str(world.base))
    for r in load(tmp_path / "r.jsonl"):
        assert tokenizer.decode(r["prompt_ids"]) == "<|user|>1+2=?<|assistant|>1+"
        assert (
            tokenizer.decode([t for t in r["response_ids"] if t != tokenizer.eos_token_id])
            == r["text"]
        )
    # it refuses to be misread: rollout.py compares the prompt's ids
    with FakeServer(chat=lambda body: "2=3", tokenizer=tokenizer) as fake:
        rollout.main(
            argv(
                model=world.base,
                base_url=fake.base_url,
                prompts=begun,
                n=1,
                max_tokens=4,
                out=tmp_path / "s.jsonl",
            )
        )
        assert (
            fake.bodies()[-1]["continue_final_message"]
            and not fake.bodies()[-1]["add_generation_prompt"]
        )
    assert (
        load(tmp_path / "s.jsonl")[0]["prompt_ids"]
        == load(tmp_path / "r.jsonl")[0]["prompt_ids"]
    )


def test_a_model_with_a_recurrent_state_goes_on_when_a_row_has_ended(world, tmp_path):
    """Hybrid models: their layers' states follow the rows that are left; against a forward pass
    over whole answers."""
    import transformers

    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.Lfm2Config(
            vocab_size=24,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            layer_types=["conv", "full_attention"],
            tie_word_embeddings=False,
        )
    ).eval()
    tokenizer = policies.load_tokenizer(world.base)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(tmp_path / "hybrid")
    tokenizer.save_pretrained(tmp_path / "hybrid")
    rows = sample(
        world, tmp_path / "r.jsonl", model=tmp_path / "hybrid", slice=":4", max_tokens=40
    )
    assert len({len(r["response_ids"]) for r in rows.values()}) > 3
    naive = naive_model(tmp_path / "hybrid")
    for r in rows.values():
        np.testing.assert_allclose(r["logprobs"], naive_own(naive, r), atol=1e-4, rtol=0)
