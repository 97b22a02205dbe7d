"""--optimizer lora_rank: the gradient is that of W_0 + 2 B A, written out in float64; nothing
else changes; rounds and killed runs go on with the same bits.  (Whole matrices:
test_train.py.)"""

import dataclasses

import pytest
import torch
import transformers
from conftest import load, naive_logps, naive_model, same_bits, variant, weights
from safetensors.torch import load_file, save_file
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


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_that_were_edited_after_the_training_are_refused(
    world, tmp_path, capsys, dtype
):
    run(world, tmp_path / "m", dtype="bfloat16", learning_rate=1e-2, epochs=3, **LORA)
    path = tmp_path / "m" / "model.safetensors"
    edited = {n: w * 0 if "q_proj" in n else w for n, w in load_file(path).items()}
    save_file(edited, path, metadata={"format": "pt"})
    flags = dict(method="sft", model=tmp_path / "m", dtype=dtype) | LORA
    message = refused(world, tmp_path, capsys, **flags)
    assert "the weights were changed after the training" in message


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


def learnt(folder):
    """{name: (A, B)} of a folder's matrices."""
    state = load_file(folder / MOMENTS)
    names = [n.removesuffix(".lora_A") for n in state if n.endswith("lora_A")]
    names = [n.removeprefix("master/") for n in names if n.startswith("master/")]
    return {n: tuple(state[f"master/{n}.lora_{x}"] for x in "AB") for n in names}


def test_another_kind_of_run_starts_from_the_weights_alone(world, tmp_path):
    """Another rank, or none, has other masters; fresh moments or another method keep these."""
    flags = dict(method="sft", steps=3) | LORA
    run(world, tmp_path / "m", **flags, fresh_optimizer=True)
    start, product = weights(tmp_path / "m"), learnt(tmp_path / "m")
    flags |= dict(model=tmp_path / "m", learning_rate=0, steps=1, allow="stale")
    for name, kept, more in (
        ("rank", False, dict(optimizer=dict(lora_rank=3))),
        ("whole", False, dict(optimizer=dict(lora_rank=0))),
        ("fresh", True, dict(fresh_optimizer=True)),
        ("method", True, dict(method="opd")),
    ):
        summary = run(world, tmp_path / name, **flags | more)
        assert summary["step"] == 1 and same_bits(weights(tmp_path / name), start)
        found = learnt(tmp_path / name)
        same = found and all(all(map(torch.equal, found[n], ab)) for n, ab in product.items())
        assert bool(same) == kept


def test_what_was_learnt_in_float32_goes_on_in_bfloat16_and_back(world, tmp_path):
    flags = dict(epochs=3, learning_rate=1e-2) | LORA
    run(world, tmp_path / "m", **flags, fresh_optimizer=True)
    want, product = weights(tmp_path / "m"), learnt(tmp_path / "m")
    flags |= dict(steps=1, epochs=None, learning_rate=0, allow="stale")
    run(world, tmp_path / "half", **flags, model=tmp_path / "m", dtype="bfloat16")
    run(world, tmp_path / "back", **flags, model=tmp_path / "half", dtype="float32")
    kept = load_file(tmp_path / "half" / MOMENTS)
    half, back = weights(tmp_path / "half"), weights(tmp_path / "back")
    for name, ab in product.items():
        for folder in ("half", "back"):
            assert all(map(torch.equal, learnt(tmp_path / folder)[name], ab))
        exact = kept[f"start/{name}"].float() + 2 * ab[1] @ ab[0]
        assert torch.allclose(half[name].float(), want[name], rtol=2**-7, atol=2**-10)
        assert torch.allclose(back[name], exact, atol=1e-6)
        assert not torch.allclose(half[name].float(), exact, atol=1e-6)


def test_a_bfloat16_folder_whose_weights_were_changed_since_is_refused(world, tmp_path, capsys):
    flags = dict(dtype="bfloat16") | LORA
    run(world, tmp_path / "m", **flags, fresh_optimizer=True)
    changed = weights(tmp_path / "m")
    name = next(iter(learnt(tmp_path / "m")))
    changed[name] = changed[name] * 1.1
    save_file(changed, tmp_path / "m" / "model.safetensors", {"format": "pt"})
    more = dict(model=tmp_path / "m", allow="stale")
    message = refused(world, tmp_path, capsys, **flags | more)
    assert f"master weights of {name} that round to the folder's weights" in message


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_checkpointing_and_a_tied_head_change_no_bit(world, tmp_path, dtype):
    torch.manual_seed(0)
    sizes = dict(vocab_size=99, hidden_size=32, intermediate_size=48, num_hidden_layers=2)
    sizes |= dict(num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=True)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
    folder = variant(world.base, tmp_path / "tied", model=lambda _: model)
    flags = dict(method="sft", model=folder, steps=3, dtype=dtype, micro_batch_tokens=100)
    flags |= dict(rollouts=world.rollouts, prompts=world.prompts) | LORA
    run(world, tmp_path / "plain", **flags)
    run(world, tmp_path / "again", **flags, compute=dict(gradient_checkpointing=1))
    same_run(tmp_path / "again", tmp_path / "plain")
    embedding = "model.embed_tokens.weight"
    before, after = weights(folder)[embedding], weights(tmp_path / "plain")[embedding]
    assert torch.equal(before.to(after.dtype), after)


def test_which_matrices_are_trained_and_how():
    sizes = dict(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1)
    config = transformers.LlamaConfig(**sizes, num_attention_heads=1, num_labels=1)
    model = transformers.LlamaForSequenceClassification(config)
    parts = masters_of(model, RANK)
    assert [p.name for p in parts if type(p) is Whole] == ["score.weight"]
    assert sum(type(p) is LowRank for p in parts) == 7
    attention = model.model.layers[0].self_attn
    attention.k_proj.weight = attention.q_proj.weight
    assert len(masters_of(model, RANK)) == 7, "a matrix of two layers is one"
    for kind in (transformers.GPT2LMHeadModel, transformers.GPT2ForSequenceClassification):
        config = transformers.GPT2Config(vocab_size=9, n_embd=8, n_layer=1, n_head=1)
        with pytest.raises(BadInput, match=f"torch.nn.Linear layers .*got {kind.__name__}"):
            masters_of(kind(config), RANK)
