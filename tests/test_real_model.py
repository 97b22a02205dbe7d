"""The same stages on a real chat model.  Set OPD_REAL_MODEL to a transformers folder
(SmolLM2-135M-Instruct will do); a second one, OPD_FOREIGN_MODEL, is sampled and scored.

The sampler (left padding, one token at a time, key-value cache) and the scorer (right padding,
one pass) must agree on the log-prob of every sampled token.  Tolerances, measured on
SmolLM2-135M: float32 differs in the last digits (1e-5 nats, 1e-4 on Qwen2.5-0.5B); bfloat16
rounds every activation, so single tokens differ by tenths of a nat and only the mean is
small."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from conftest import argv, by_key, dump, load
from transformers import AutoModelForCausalLM, AutoTokenizer

import eval as evaluation
import rollout
import teacher
import train
from opd import files, records

MODEL, SECOND = (os.environ.get(name) for name in ("OPD_REAL_MODEL", "OPD_FOREIGN_MODEL"))
pytestmark = pytest.mark.skipif(
    not (MODEL and Path(MODEL).is_dir()),
    reason="OPD_REAL_MODEL names no model folder: real-model checks not run",
)
second = pytest.mark.skipif(
    not (SECOND and Path(SECOND).is_dir()),
    reason="OPD_FOREIGN_MODEL names no model folder: real-model checks not run on a second",
)

QUESTIONS = [
    "What is 7 + 5? Answer in one short sentence.",
    "Name three colours.",
    "Schreibe einen Satz über Bäume. 🌳",
    "Hi",
]


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("real") / "prompts.jsonl"
    rows = [
        {"id": f"q{i}", "answer": "12", "messages": [{"role": "user", "content": q}]}
        for i, q in enumerate(QUESTIONS)
    ]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def sample(prompts, dtype, model=MODEL):
    """The path of rollouts of all questions."""
    path = prompts.with_name(f"{Path(model).name}.{dtype}.jsonl")
    flags = dict(model=model, prompts=prompts, n=2, max_tokens=24, dtype=dtype)
    rollout.main(argv(**flags, out=path))
    return path


@pytest.fixture(scope="module")
def rollouts(prompts):
    return sample(prompts, "float32")


def gaps(rollouts, dtype, model=MODEL, **options):
    """|log-prob of the scorer - of the sampler| of every sampled token."""
    scores = rollouts.with_name(f"scores.{rollouts.name}")
    options |= dict(model=model, rollouts=rollouts, dtype=dtype, overwrite=True)
    teacher.main(argv("score", **options, out=scores))
    sampled = by_key(load(rollouts))
    return np.concatenate(
        [
            np.abs(np.subtract(s["logprobs"], sampled[s["id"], s["sample"]]["logprobs"]))
            for s in files.read(scores, "scores")
        ]
    )


def test_sampler_and_scorer_agree_in_float32(rollouts):
    gap = gaps(rollouts, "float32")
    assert len(gap) > 50 and gap.mean() < 1e-4 and gap.max() < 5e-4


@second
def test_a_second_model_agrees_too(prompts):
    rollouts = sample(prompts, "float32", SECOND)
    for options in ({}, {"share_prompts": True}):
        gap = gaps(rollouts, "float32", SECOND, **options)
        assert len(gap) > 50 and gap.mean() < 1e-4 and gap.max() < 1e-3


def test_sampler_and_scorer_agree_on_average_in_bfloat16(prompts):
    gap = gaps(sample(prompts, "bfloat16"), "bfloat16")
    assert len(gap) > 50 and gap.mean() < 0.08 and gap.max() < 1.0


def test_rollouts_carry_the_chat_template(rollouts):
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    for r in files.read(rollouts, "rollouts"):
        question = QUESTIONS[int(r["id"][1:])]
        assert tokenizer.decode(r["prompt_ids"]) == tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
        )
        assert (r["response_ids"][-1] == tokenizer.eos_token_id) == (
            r["finish_reason"] == "stop"
        )


def test_one_update_and_the_folder_loads_and_generates(prompts, rollouts):
    rewards = rollouts.with_name("rewards.jsonl")
    out = rollouts.with_name("updated")
    rows = [
        {
            "id": r["id"],
            "sample": r["sample"],
            "reward": float(r["sample"] == 0),
            "status": "ok",
            "grader": "test",
            "rollout": records.fingerprint(r),
        }
        for r in files.read(rollouts, "rollouts")
    ]
    dump(rewards, rows)
    flags = dict(method="ropd", model=MODEL, rollouts=rollouts, rewards=rewards, out=out)
    done = train.main(argv(**flags, learning_rate=1e-5, micro_batch_tokens=512))
    metrics = json.loads((out / "metrics.jsonl").read_text())
    # trainer and sampler: ratio 1 at the first step
    assert done["steps"] == 1 and metrics["rollout/logprob_gap_max"] < 5e-4
    tokenizer = AutoTokenizer.from_pretrained(out)
    model = AutoModelForCausalLM.from_pretrained(out)
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    answer = model.generate(**ids, max_new_tokens=8, do_sample=False)[0]
    assert tokenizer.decode(answer[ids["input_ids"].shape[1] :]).strip()
    flags = dict(model=out, prompts=prompts, n=1, max_tokens=12)
    result = evaluation.main(argv(**flags, out=rollouts.with_name("eval.jsonl")))
    assert 0 <= result["accuracy"] <= 1
