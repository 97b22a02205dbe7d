"""The same stages on a real chat model.  Set OPD_REAL_MODEL to a transformers folder
(SmolLM2-135M-Instruct will do).

The sampler (left padding, one token at a time, key-value cache) and the scorer (right padding,
one pass) must agree on the log-prob of every sampled token.  Tolerances, measured on
SmolLM2-135M: float32 differs in the last digits (below 1e-4 nats); bfloat16 rounds every
activation, so single tokens differ by tenths of a nat and only the mean is small."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

import eval as evaluation
import rollout
import teacher
import train
from opd import files, records

MODEL = os.environ.get("OPD_REAL_MODEL")
pytestmark = pytest.mark.skipif(
    not (MODEL and Path(MODEL).is_dir()),
    reason="OPD_REAL_MODEL names no model folder: real-model checks not run",
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


@pytest.mark.parametrize(
    "dtype, mean_bound, max_bound", [("float32", 1e-5, 1e-4), ("bfloat16", 0.08, 1.0)]
)
def test_sampler_and_scorer_agree(prompts, dtype, mean_bound, max_bound):
    rollouts, scores = (
        prompts.with_name(f"rollouts.{dtype}.jsonl"),
        prompts.with_name(f"scores.{dtype}.jsonl"),
    )
    rollout.main(
        [
            "--model",
            MODEL,
            "--prompts",
            str(prompts),
            "--n",
            "2",
            "--max-tokens",
            "24",
            "--dtype",
            dtype,
            "--out",
            str(rollouts),
        ]
    )
    teacher.main(
        [
            "score",
            "--model",
            MODEL,
            "--rollouts",
            str(rollouts),
            "--dtype",
            dtype,
            "--out",
            str(scores),
        ]
    )
    sampled = {
        records.key_of(r, "rollouts"): r["logprobs"] for r in files.read(rollouts, "rollouts")
    }
    gap = np.concatenate(
        [
            np.abs(np.subtract(s["logprobs"], sampled[records.key_of(s, "scores")]))
            for s in files.read(scores, "scores")
        ]
    )
    assert len(gap) > 50 and gap.mean() < mean_bound and gap.max() < max_bound


def test_rollouts_carry_the_chat_template(prompts):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    for r in files.read(prompts.with_name("rollouts.float32.jsonl"), "rollouts"):
        question = QUESTIONS[int(r["id"][1:])]
        assert tokenizer.decode(r["prompt_ids"]) == tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
        )
        assert (r["response_ids"][-1] == tokenizer.eos_token_id) == (
            r["finish_reason"] == "stop"
        )


def test_one_update_and_the_folder_loads_and_generates(prompts):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    rollouts, rewards, out = (
        prompts.with_name(n) for n in ("rollouts.float32.jsonl", "rewards.jsonl", "updated")
    )
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
    rewards.write_text("".join(json.dumps(r) + "\n" for r in rows))
    done = train.main(
        [
            "--method",
            "ropd",
            "--model",
            MODEL,
            "--rollouts",
            str(rollouts),
            "--rewards",
            str(rewards),
            "--learning-rate",
            "1e-5",
            "--micro-batch-tokens",
            "512",
            "--out",
            str(out),
        ]
    )
    metrics = json.loads((out / "metrics.jsonl").read_text())
    # trainer and sampler: ratio 1 at the first step
    assert done["steps"] == 1 and metrics["rollout/logprob_gap_max"] < 1e-4
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(out),
        AutoTokenizer.from_pretrained(out),
    )
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    text = tokenizer.decode(
        model.generate(**ids, max_new_tokens=8, do_sample=False)[0][ids["input_ids"].shape[1] :]
    )
    assert text.strip()
    result = evaluation.main(
        [
            "--model",
            str(out),
            "--prompts",
            str(prompts),
            "--n",
            "1",
            "--max-tokens",
            "12",
            "--out",
            str(prompts.with_name("eval.jsonl")),
        ]
    )
    assert 0 <= result["accuracy"] <= 1
