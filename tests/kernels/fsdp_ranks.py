"""One rank of the FSDP2 test: python fsdp_ranks.py FOLDER RANKS RANK."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from clp_kernels import (
    HeadLoRA,
    ema_,
    interpolate,
    interpolated_linear,
    linear_logprob,
    logits_logprob,
    merged_weight,
    multi_lora_linear,
    prefix_attention,
    sample_tokens,
    slerp,
    sparsify,
    vocab_parallel_linear_logprob,
)
from clp_kernels.integrations.verl import linear_cross_entropy
from clp_kernels.prefix_layout import PrefixLayout

WIDTH, VOCABULARY, RANK = 16, 30, 4


class Adapted(torch.nn.Module):
    """multi_lora_linear and interpolated_linear with every parameter trained."""

    def __init__(self):
        super().__init__()
        shapes = {
            "weight": (WIDTH, WIDTH),
            "lora_a": (RANK, WIDTH),
            "lora_b": (WIDTH, RANK),
            "stack": (2, WIDTH, WIDTH),
        }
        for name, shape in shapes.items():
            setattr(self, name, torch.nn.Parameter(torch.randn(shape) * 0.2))

    def forward(self, x):
        y = multi_lora_linear(x, self.weight, self.lora_a, self.lora_b, torch.full((1, RANK), 0.5))
        return x + interpolated_linear(y.tanh(), self.stack, torch.tensor([[0.3, 0.7]]))


class Scored(torch.nn.Module):
    """Two layers and an output projection: the loss of linear_logprob."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.embed = torch.nn.Embedding(VOCABULARY, WIDTH)
        self.layers = torch.nn.ModuleList(Adapted() for _ in range(2))
        self.head = torch.nn.Parameter(torch.randn(VOCABULARY, WIDTH) * 0.2)

    def forward(self, tokens):
        x = self.embed(tokens[:-1])
        for layer in self.layers:
            x = layer(x)
        stats = linear_logprob(x, self.head, tokens[1:], outputs=("logprob", "entropy"))
        return -stats.logprob.mean() - 0.1 * stats.entropy.mean()


def train(model):
    """Three steps on the same tokens on every rank -> losses, and whole parameters."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    tokens = torch.arange(12) * 7 % VOCABULARY
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = model(tokens)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    whole = {n: p.full_tensor() if hasattr(p, "full_tensor") else p for n, p in model.named_parameters()}
    return {"losses": losses, "parameters": {name: tensor.detach() for name, tensor in whole.items()}}


def refusals(head, x, targets):
    """Message by op, each called with the sharded head where it takes a weight."""
    lora = (torch.ones(2, WIDTH), torch.ones(VOCABULARY, 2), torch.ones(1, 2))
    plain = torch.ones(VOCABULARY, WIDTH)
    three = head.unsqueeze(1)
    calls = {
        "linear_logprob": lambda: linear_logprob(
            x, plain, targets, lora=HeadLoRA(lora[0], head.sum(1, keepdim=True), lora[2])
        ),
        "vocab_parallel_linear_logprob": lambda: vocab_parallel_linear_logprob(x, head, targets),
        "logits_logprob": lambda: logits_logprob(head, None, outputs=("entropy",)),
        "multi_lora_linear": lambda: multi_lora_linear(x, head, *lora),
        "merged_weight": lambda: merged_weight(head, *lora[:2], lora[2][0]),
        "interpolated_linear": lambda: interpolated_linear(x, head.unsqueeze(0), torch.ones(1, 1)),
        "prefix_attention": lambda: prefix_attention(
            three, three, three, PrefixLayout.from_lengths([VOCABULARY], [-1])
        ),
        "sample_tokens": lambda: sample_tokens(head.detach()),
        "interpolate": lambda: interpolate([plain, head], [0.5, 0.5]),
        "slerp": lambda: slerp([plain], [head], 0.5),
        "sparsify": lambda: sparsify(head.detach(), 0.5, seed=1),
        "ema_": lambda: ema_([plain], [head], 0.5),
    }
    messages = {}
    for op, call in calls.items():
        try:
            call()
        except TypeError as error:
            messages[op] = str(error)
        else:
            messages[op] = "was not refused"
    return messages


def split_head(ranks, rank):
    """verl's linear_cross_entropy of an output projection that is split over the ranks -> its results on this one."""
    generator = torch.Generator().manual_seed(5)
    hidden, whole = (torch.randn(rows, WIDTH, generator=generator) for rows in (7, VOCABULARY))
    targets, incoming = torch.arange(7) * 4, torch.linspace(-1, 2, 7)
    shard = whole.chunk(ranks)[rank].clone().requires_grad_()
    hidden.requires_grad_()
    group = dist.group.WORLD if dist.is_initialized() else None
    logprob, entropy = linear_cross_entropy(hidden, shard, targets, 0.8, "none", group)
    gradients = torch.autograd.grad(((logprob - 0.3 * entropy) * incoming).sum(), (hidden, shard))
    return {
        "logprob": logprob.detach(),
        "entropy": entropy.detach(),
        "d_hidden": gradients[0],
        "d_weight": gradients[1],
    }


def main(folder, ranks, rank):
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", init_method=f"file://{folder}/met", rank=rank, world_size=ranks)
    model = Scored()
    mesh = dist.device_mesh.init_device_mesh("cpu", (ranks,))
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    found = train(model)
    head, x, targets = model.head, torch.randn(5, WIDTH), torch.arange(5)
    found["refused"] = refusals(head, x, targets)
    (gradient,) = torch.autograd.grad(linear_logprob(x, head.full_tensor(), targets).logprob.sum(), head)
    found["full_gradient"] = bool(gradient.full_tensor().any())
    average = torch.zeros_like(head.to_local())
    ema_(average, head.to_local(), 0.9)
    found["averaged"], found["expected_average"] = average, 0.1 * head.to_local().detach()
    found["split"] = split_head(ranks, rank)
    torch.save(found, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
