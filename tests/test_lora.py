"""--optimizer lora_rank: the gradient is that of W_0 + 2 B A, written out in float64; nothing
else changes; rounds and killed runs go on with the same bits.  (Whole matrices:
test_train.py.)"""

import dataclasses

import pytest
import torch
import transformers
from conftest import load, naive_logps, naive_model, same_bits, weights
from safetensors.torch import load_file
from test_train import (
    PLAIN,
    RESUME,
    Recorder,
    killed,
    metrics,
    one_group,
    refused,
    run,
    same_gradient,
    same_run,
)
from torch.nn.utils import parametrize

import train
from methods.rows import METHODS
from opd import policy as policies
from opd.batches import Data, Inputs
from opd.masters import LowRank, Whole, masters_of
from opd.records import BadInput
from opd.trainer import MOMENTS, Trainer

RANK = 2
LORA = dict(optimizer=dict(lora_rank=RANK))


class Written(torch.nn.Module):
    """W_0 -> W_0 + 2 B A."""

    def __init__(self, a, b):
        super().__init__()
        self.a = torch.nn.Parameter(a.detach().double())
        self.b = torch.nn.Parameter(b.detach().double())

    def forward(self, start):
        return start + 2 * self.b @ self.a


def matrices(model):
    """{name: layer} of the linear layers that LoRA changes."""
    linear = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    return {n: m for n, m in linear.items() if m is not model.get_output_embeddings()}


@pytest.mark.parametrize("micro", [8192, 60])
def test_the_gradient_is_that_of_the_product_written_out(world, micro):
    policy = policies.load_policy(str(world.base))
    trainer = Trainer(policy, dataclasses.replace(PLAIN, lora_rank=RANK))
    parts = {part.name: part for part in trainer.parts}
    reference = naive_model(world.base).requires_grad_(False)
    written = {}
    torch.manual_seed(0)
    for name, layer in matrices(reference).items():
        part = parts.pop(f"{name}.weight")
        part.b.data.normal_(std=0.1)  # at 0 the gradient of A is 0
        part.write()
        written[part.name] = Written(part.a, part.b)
        parametrize.register_parametrization(layer, "weight", written[part.name])
    assert not parts and len(written) > 5

    trainer.optimiser = Recorder(trainer.masters)
    data = Data(Inputs(world.rollouts), METHODS["sft"], policy)
    items = data.items(data.groups)
    train.optimise(trainer, data, items, train.StepSettings(micro))
    logps = []
    for r in load(world.rollouts):
        table = naive_logps(reference, r["prompt_ids"], r["response_ids"], 1.0)
        logps.append(table[range(len(table)), r["response_ids"]])
    (-torch.cat(logps).mean()).backward()
    wanted = [x.grad for part in trainer.parts for x in written[part.name].parameters()]
    same_gradient(trainer.optimiser.gradient, torch.cat([x.flatten() for x in wanted]), 2e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_matrix_changes_by_a_product_and_nothing_else_does(world, tmp_path, dtype):
    flags = dict(learning_rate=1e-2, dtype=dtype, fresh_optimizer=True, epochs=3) | LORA
    run(world, tmp_path / "m", **flags)
    before, after = weights(world.base), weights(tmp_path / "m")
    state = load_file(tmp_path / "m" / MOMENTS)
    changed = {f"{name}.weight" for name in matrices(naive_model(world.base))}
    for name, new in after.items():
        old = before[name].to(new.dtype)
        if name not in changed:
            assert same_bits({name: old}, {name: new})
            continue
        a, b = (state[f"master/{name}.lora_{x}"] for x in "AB")
        assert a.shape == (RANK, new.shape[1]) and b.shape == (new.shape[0], RANK)
        product = (2 * b.double() @ a.double()).float()
        assert float(product.abs().max()) > 1e-3
        rounding = 2**-8 if dtype == "bfloat16" else 1e-6
        assert torch.allclose(new.float(), old + product, rtol=rounding, atol=1e-5)
    moments = [x for name, x in state.items() if name.startswith("exp_avg")]
    assert len(moments) == 4 * len(changed), "two for A, two for B"


def test_it_learns(world, tmp_path):
    path = one_group(world, tmp_path / "r.jsonl")
    flags = dict(method="sft", rollouts=path, steps=30, learning_rate=1e-2) | LORA
    run(world, tmp_path / "m", **flags, fresh_optimizer=True)
    losses = [row["train/loss"] for row in metrics(tmp_path / "m")]
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_killed_run_and_a_second_round_go_on_with_the_same_bits(
    world, tmp_path, monkeypatch, dtype
):
    flags = RESUME | dict(dtype=dtype, batch_size=4) | LORA
    run(world, tmp_path / "whole", **flags)
    killed(world, tmp_path / "m", "before the log line", monkeypatch, **flags)
    run(world, tmp_path / "m", **flags)
    same_run(tmp_path / "m", tmp_path / "whole")

    path = one_group(world, tmp_path / "r.jsonl")
    flags = dict(method="sft", rollouts=path, dtype=dtype) | LORA
    run(world, tmp_path / "four", **flags, steps=4, fresh_optimizer=True)
    run(world, tmp_path / "two", **flags, steps=2, fresh_optimizer=True)
    run(world, tmp_path / "two_two", **flags, steps=2, model=tmp_path / "two")
    assert same_bits(weights(tmp_path / "four"), weights(tmp_path / "two_two"))


def test_another_rank_is_refused_and_no_rank_trains_what_was_learnt(world, tmp_path, capsys):
    run(world, tmp_path / "m", **LORA)
    model = dict(model=tmp_path / "m", allow="stale")
    message = refused(world, tmp_path, capsys, **model, optimizer=dict(lora_rank=3))
    assert "lora_A: expected the shape [3, " in message and "got [2, " in message
    run(world, tmp_path / "rest", **model, steps=1, learning_rate=1e-6)
    start, rest = weights(tmp_path / "m"), weights(tmp_path / "rest")
    moved = [float((rest[name] - start[name]).abs().max()) for name in start]
    assert 0 < min(moved) and max(moved) < 1e-5


def test_what_was_learnt_in_float32_goes_on_in_bfloat16_and_back(world, tmp_path):
    flags = dict(epochs=3, learning_rate=1e-2) | LORA
    run(world, tmp_path / "m", **flags, fresh_optimizer=True)
    flags |= dict(steps=1, epochs=None, learning_rate=0, allow="stale")
    run(world, tmp_path / "half", **flags, model=tmp_path / "m", dtype="bfloat16")
    run(world, tmp_path / "back", **flags, model=tmp_path / "half", dtype="float32")
    want = weights(tmp_path / "m")
    for folder in ("half", "back"):
        for name, x in weights(tmp_path / folder).items():
            assert torch.allclose(x.float(), want[name], rtol=2**-7, atol=2**-10)


def test_a_score_head_is_trained_whole_and_a_model_without_linear_layers_not_at_all():
    sizes = dict(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1)
    sizes |= dict(num_attention_heads=1, num_labels=1)
    config = transformers.LlamaConfig(**sizes)
    parts = masters_of(transformers.LlamaForSequenceClassification(config), RANK)
    assert [p.name for p in parts if type(p) is Whole] == ["score.weight"]
    assert sum(type(p) is LowRank for p in parts) == 7
    config = transformers.GPT2Config(vocab_size=9, n_embd=8, n_layer=1, n_head=1)
    with pytest.raises(BadInput, match="linear layers, got GPT2LMHeadModel"):
        masters_of(transformers.GPT2LMHeadModel(config), RANK)
