"""What the optimiser holds of a model: a float32 master of each parameter, or, of each weight
matrix, a change of low rank (LoRA).

A backward pass gives a parameter's gradient to its masters at once: those of micro-batches add
up in float32, and no two of a whole model are in memory.

Simplification: the gradient of a matrix is computed whole also where only a change of low rank
is trained, which saves memory and no time."""

import zlib

import torch

from opd.records import BadInput


class Whole:
    """A parameter that is trained as it is; its master is itself where it is float32."""

    def __init__(self, name, parameter):
        self.name = name
        self.parameter = parameter
        self.master = parameter
        self.apart = parameter.dtype != torch.float32
        if self.apart:
            self.master = parameter.detach().float().requires_grad_()
            parameter.register_post_accumulate_grad_hook(self.take_gradient)

    @property
    def masters(self):
        """{name: what the optimiser moves}."""
        return {self.name: self.master}

    def take_gradient(self, parameter):
        add_gradient(self.master, parameter.grad.float())
        parameter.grad = None

    def write(self):
        """Puts what was learnt into the model."""
        if self.apart:
            self.parameter.copy_(self.master)

    def saved(self):
        """{name: tensor} of what the model's folder does not hold."""
        return {f"master/{self.name}": self.master.detach()} if self.apart else {}

    def restore(self, saved, folder):
        """Takes it back.  saved: {name: a function that reads the tensor}; folder: of a model,
        for errors."""
        if read := saved.get(f"master/{self.name}"):
            master = read()
            check_rounded(master, self, folder)
            self.master.data.copy_(master)


class LowRank:
    """A weight matrix W = W_0 + 2 B A, of which A [rank, in] and B [out, rank] are trained
    (LoRA, arXiv 2106.09685, section 4.1, with alpha = 2 rank: under AdamW another factor is
    another learning rate).  B starts at 0, A at random numbers that the matrix' name alone
    decides.

    The model holds W, so passes over it and readers of its folder see a plain matrix.  From the
    gradient G of W, B gets 2 G A^T and A 2 B^T G."""

    def __init__(self, name, parameter, rank):
        self.name = name
        self.parameter = parameter
        rows, columns = parameter.shape
        numbers = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        a = (2 * torch.rand(rank, columns, generator=numbers) - 1) / columns**0.5
        self.a = a.to(parameter.device).requires_grad_()
        self.b = torch.zeros(rows, rank, device=parameter.device, requires_grad=True)
        self.written = (self.a.detach().clone(), self.b.detach().clone())
        # W_0, where 16 bits would lose small steps from W to the next W
        self.start = None
        if parameter.dtype != torch.float32:
            self.start = parameter.detach().clone()
        parameter.register_post_accumulate_grad_hook(self.take_gradient)

    @property
    def masters(self):
        return {f"{self.name}.lora_A": self.a, f"{self.name}.lora_B": self.b}

    @torch.no_grad()
    def take_gradient(self, parameter):
        gradient = parameter.grad.float()
        add_gradient(self.a, 2 * (self.b.T @ gradient))
        add_gradient(self.b, 2 * (gradient @ self.a.T))
        parameter.grad = None

    def change(self, a, b):
        """W - W_0, in float32."""
        return 2 * (b @ a)

    @torch.no_grad()
    def write(self):
        new = self.change(self.a, self.b)
        if self.start is None:
            self.parameter.add_(new - self.change(*self.written))
            self.written = (self.a.detach().clone(), self.b.detach().clone())
        else:
            self.parameter.copy_(self.start + new)

    def saved(self):
        found = {f"master/{name}": x.detach() for name, x in self.masters.items()}
        if self.start is not None:
            found[f"start/{self.name}"] = self.start
        return found

    @torch.no_grad()
    def restore(self, saved, folder):
        for name, x in self.masters.items():
            if read := saved.get(f"master/{name}"):
                kept = read()
                if kept.shape != x.shape:
                    raise BadInput(
                        f"{folder}/trainer: {name}: expected the shape {list(x.shape)}, got "
                        f"{list(kept.shape)}: it was trained with another lora_rank; remove "
                        f"the folder's trainer/ to begin a new change of its weights"
                    )
                x.data.copy_(kept)
        self.written = (self.a.detach().clone(), self.b.detach().clone())
        if self.start is None:
            return
        change = self.change(self.a, self.b)
        if read := saved.get(f"start/{self.name}"):
            self.start.copy_(read())
            check_rounded(self.start + change, self, folder)
        else:  # it was trained in float32
            self.start.copy_(self.parameter - change)


def add_gradient(master, gradient):
    if master.grad is None:
        master.grad = gradient
    else:
        master.grad.add_(gradient)


def check_rounded(exact, part, folder):
    """Refuses a folder whose weights are not those that were learnt, rounded: then somebody has
    changed them since."""
    now = part.parameter
    if not ((exact.to(now) - now).abs() <= now.abs() / 100).all():
        raise BadInput(
            f"{folder}/trainer: expected master weights of {part.name} that round to the "
            f"folder's weights, got others: the weights were changed after the training; "
            f"remove the folder's trainer/ to start from them"
        )


def masters_of(model, rank=0):
    """What is trained of a model: all of it; or with a `rank` a LowRank of every matrix of a
    linear layer but the head, those as small as that whole, and of the rest nothing."""
    if not rank:
        return [Whole(name, p) for name, p in model.named_parameters()]
    model.requires_grad_(False)
    head = model.get_output_embeddings()
    parts = []
    for name, layer in model.named_modules():
        if isinstance(layer, torch.nn.Linear) and layer is not head:
            layer.weight.requires_grad_()
            if min(layer.weight.shape) > rank:
                parts.append(LowRank(f"{name}.weight", layer.weight, rank))
            else:
                parts.append(Whole(f"{name}.weight", layer.weight))
    if not parts:
        raise BadInput(
            f"--optimizer lora_rank: expected a model with linear layers, got "
            f"{type(model).__name__}"
        )
    return parts
