"""What the optimiser holds of a model: a float32 master of each parameter, or, of each weight
matrix, a change of low rank (LoRA).

A backward pass gives a parameter's gradient to its masters at once: those of micro-batches add
up in float32, and the 16-bit gradients of a whole model never stand beside them.

Simplification: where a change of low rank is trained, the gradient of the matrix is computed
whole all the same: that saves memory rather than time."""

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
        add_gradient(self.master, parameter.grad)
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
    (LoRA, arXiv 2106.09685, section 4.1, with alpha = 2 rank).  B starts at 0, A at random
    numbers that the matrix' name alone decides; weight decay pulls W back to W_0.

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
        # in 16 bits W is always rounded from W_0 + 2 B A, never from the last W; in float32 it
        # moves by what 2 B A has moved, and W_0 is not kept
        self.start = None
        if parameter.dtype != torch.float32:
            self.start = parameter.detach().clone()
        self.written = self.factors()
        parameter.register_post_accumulate_grad_hook(self.take_gradient)

    @property
    def masters(self):
        return {f"{self.name}.lora_A": self.a, f"{self.name}.lora_B": self.b}

    def factors(self):
        """Copies of A and B."""
        return self.a.detach().clone(), self.b.detach().clone()

    @staticmethod
    def change(a, b):
        """W - W_0, in float32."""
        return 2 * (b @ a)

    @torch.no_grad()
    def take_gradient(self, parameter):
        gradient = parameter.grad.float()
        add_gradient(self.a, 2 * (self.b.T @ gradient))
        add_gradient(self.b, 2 * (gradient @ self.a.T))
        parameter.grad = None

    @torch.no_grad()
    def write(self):
        new = self.change(self.a, self.b)
        if self.start is None:
            self.parameter.add_(new - self.change(*self.written))
            self.written = self.factors()
        else:
            self.parameter.copy_(self.start + new)

    def saved(self):
        found = {f"master/{name}": x.detach() for name, x in self.masters.items()}
        if self.start is not None:
            found[f"start/{self.name}"] = self.start
        return found

    @torch.no_grad()
    def restore(self, saved, folder):
        reads = [saved.get(f"master/{name}") for name in self.masters]
        if None in reads:
            return  # a part that another model has not
        for x, read in zip(self.masters.values(), reads):
            x.copy_(read())
        self.written = self.factors()
        change = self.change(self.a, self.b)
        read = saved.get(f"start/{self.name}")
        if read is None:  # it was trained in float32
            if self.start is not None:
                self.start.copy_(self.parameter - change)
            return
        start = read().to(change)
        check_rounded(start + change, self, folder, slack=start.abs() + change.abs())
        if self.start is None:
            self.parameter.copy_(start + change)
        else:
            self.start.copy_(start)


def add_gradient(master, gradient):
    """Adds it up in float32."""
    if master.grad is None:
        master.grad = gradient.float()
    else:
        master.grad.add_(gradient)


def check_rounded(exact, part, folder, slack=0.0):
    """Refuses a folder whose weights are not those that were learnt, rounded: then somebody has
    changed them since.  slack: what `exact` is the small difference of."""
    now = part.parameter
    if not ((exact.to(now) - now).abs() <= now.abs() / 100 + slack / 1e5).all():
        raise BadInput(
            f"{folder}/trainer: expected master weights of {part.name} that round to the "
            f"folder's weights, got others: the weights were changed after the training; "
            f"remove the folder's trainer/ to start from them"
        )


def masters_of(model, rank=0):
    """What is trained of a model: all of it; or with a `rank` a LowRank of the matrix of every
    torch.nn.Linear but the head, whole where that has fewer numbers, and of the rest nothing
    (embeddings, norms, experts in one tensor)."""
    if not rank:
        return [Whole(name, p) for name, p in model.named_parameters()]
    model.requires_grad_(False)
    head = model.get_output_embeddings()
    taken = [] if head is None else [head.weight]
    parts = []
    for name, layer in model.named_modules():
        if not isinstance(layer, torch.nn.Linear) or any(layer.weight is x for x in taken):
            continue
        taken.append(layer.weight)  # layers may share it
        layer.weight.requires_grad_()
        rows, columns = layer.weight.shape
        if rank * (rows + columns) < rows * columns:
            parts.append(LowRank(f"{name}.weight", layer.weight, rank))
        else:
            parts.append(Whole(f"{name}.weight", layer.weight))
    if not any(isinstance(part, LowRank) for part in parts):
        raise BadInput(
            f"--optimizer lora_rank={rank}: expected a model with larger torch.nn.Linear "
            f"layers beside its head, got {type(model).__name__}"
        )
    return parts
