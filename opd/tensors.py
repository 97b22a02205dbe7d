"""The tensors of a training step: items of opd/batches.py, micro-batch by micro-batch.

N is the number of trained tokens of a micro-batch, D the width of its hidden states."""

from dataclasses import dataclass

import numpy as np
import torch

from opd import cli
from opd.kernel import KERNELS, token_numbers
from opd.policy import likeliest
from opd.records import BadInput
from opd.shared import answer_batches, answer_states


@dataclass(frozen=True)
class StepSettings:
    """How a step is computed, not what it is: memory and speed."""

    micro_batch_tokens: int = 8192
    kernel: str = "auto"
    teacher_top_k: int = None  # of a teacher in memory; None: its whole vocabulary
    gradient_checkpointing: int = 0  # 1: activations are computed again in the backward pass
    shared_prompts: int = 0  # 1: a prompt is read once for all its answers

    def changed(self, texts, *fixed):
        """These settings with what --compute NAME=VALUE says; `fixed` are no names of it."""
        fixed = ("micro_batch_tokens", "teacher_top_k", *fixed)
        settings = self
        for text in texts:
            settings = cli.changed_field(settings, "--compute", text, fixed)
        if settings.kernel not in KERNELS:
            raise BadInput(
                f"--compute kernel: expected {', '.join(KERNELS)}, got {settings.kernel!r}"
            )
        for name in ("gradient_checkpointing", "shared_prompts"):
            if getattr(settings, name) not in (0, 1):
                raise BadInput(
                    f"--compute {name}: expected 0 or 1, got {getattr(settings, name)}"
                )
        return settings


def micro_batches(policy, items, batch_tokens):
    """Lists of items whose padded forward pass has at most batch_tokens, in rows of like
    length."""
    names = [s["key"][0] for s in items]
    sizes = [(len(s["prompt_ids"]), len(s["response_ids"])) for s in items]
    for batch in answer_batches(policy, names, sizes, batch_tokens):
        yield [items[i] for i in batch]


def states(policy, items):
    """Hidden states [N, D] that predict the trained tokens of a micro-batch, in order."""
    fields = ("prompt_ids", "response_ids", "mask")
    return answer_states(policy, *([s[name] for s in items] for name in fields))


def chosen_ids(items, device=None):
    """The recorded trained tokens, [N, 1]."""
    ids = [t for s in items for t, m in zip(s["response_ids"], s["mask"]) if m]
    return torch.tensor(ids, dtype=torch.int64, device=device)[:, None]


def field_ids(items, name, device):
    """The ids of a field like "support_ids", [N, K]; K = 0 where items have none."""
    arrays = [s.get(name, np.zeros((s["length"], 0))) for s in items]
    return torch.from_numpy(np.concatenate(arrays).astype(np.int64)).to(device)


def token_constants(items, device, vocabulary):
    """{name: [N, ...]}: the constant arrays of the items, for loss.token_loss."""
    batch = {}
    for name, value in items[0].items():
        if isinstance(value, np.ndarray) and not name.endswith("_ids"):
            array = np.concatenate([s[name] for s in items]).astype(np.float32)
            batch[name] = torch.from_numpy(array).to(device)
    if "advantage" in items[0]:
        values = [s["advantage"] for s in items for _ in range(s["length"])]
        batch["advantage"] = torch.tensor(values, dtype=torch.float32, device=device)
    if "support_logp" in batch:
        batch["whole"] = batch["support_logp"].shape[1] >= vocabulary
    if "reference_support_logp" in batch:
        batch["reference_whole"] = batch["reference_support_logp"].shape[1] >= vocabulary
    return batch


@torch.no_grad()
def read_teacher(teacher, items, top_k):
    """A teacher in memory: what kernel.token_numbers takes of it, and the ids [N, K] of its
    likeliest tokens, K = 0 where its whole vocabulary is read."""
    hidden = states(teacher, items)
    options = {name: teacher.head_options[name] for name in ("scale", "softcap")}
    ids = torch.zeros((len(hidden), 0), dtype=torch.int64, device=hidden.device)
    if top_k:
        ids = likeliest(teacher, hidden, top_k)
    return (hidden, teacher.head, options), ids


@torch.no_grad()
def current_logps(policy, data, items, settings):
    """log-probs [length] of the trained tokens of every item under the weights as they are."""
    out = {}
    for some in micro_batches(policy, items, settings.micro_batch_tokens):
        hidden = states(policy, some)
        numbers = token_numbers(
            hidden,
            policy.head,
            chosen_ids(some, hidden.device),
            temperature=data.temperature or 1.0,
            kernel=settings.kernel,
            **policy.head_options,
        )
        logp = numbers.logp[:, 0].cpu().numpy()
        ends = np.cumsum([s["length"] for s in some])[:-1]
        out |= {s["key"]: part for s, part in zip(some, np.split(logp, ends))}
    return [out[s["key"]] for s in items]


def starting_logps(policy, data, settings):
    """{key: log-probs of its trained tokens} before the first update, a thousand rollouts in
    memory at a time."""
    keys = [key for group in data.groups.values() for key in group]
    out = {}
    for start in range(0, len(keys), 1024):
        some = keys[start : start + 1024]
        out |= zip(some, current_logps(policy, data, data.sequences(some), settings))
    return out
