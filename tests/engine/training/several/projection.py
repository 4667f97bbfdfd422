"""Token statistics over the pieces of an output projection: python projection.py OUT, which is JSON. OUT/RANK.pt has them."""

import json
import os
import sys
from pathlib import Path

import torch
from clp_kernels import HeadLoRA, linear_logprob

OUTPUTS = ("logprob", "entropy", "kl")


class Case:
    """A projection of 29 tokens with low-rank factors, and the rows of each process."""

    rows, width, tokens, rank = (3, 0, 5), 16, 29, 4

    def __init__(self):
        generator = torch.Generator().manual_seed(0)

        def drawn(*shape):
            return torch.randn(shape, generator=generator)

        self.weight, self.bias = drawn(self.tokens, self.width), drawn(self.tokens)
        self.lora_a, self.lora_b = drawn(self.rank, self.width), drawn(self.tokens, self.rank)
        self.hidden = [drawn(n, self.width) for n in self.rows]
        self.ref_hidden = [hidden + 0.1 * drawn(*hidden.shape) for hidden in self.hidden]
        self.gates = [drawn(n, self.rank) for n in self.rows]
        self.targets = [torch.randint(self.tokens, (n,), generator=generator) for n in self.rows]
        self.loss = [drawn(n, len(OUTPUTS)) for n in self.rows]  # its gradient

    def statistics(self, ranks, function=linear_logprob):
        """Statistics of the rows of these processes, and the gradients of a loss of them."""
        hidden, ref_hidden, gate, targets, loss = (
            torch.cat([values[rank] for rank in ranks])
            for values in (self.hidden, self.ref_hidden, self.gates, self.targets, self.loss)
        )
        trained = {"hidden": hidden, "lora_a": self.lora_a.clone(), "lora_b": self.lora_b.clone()}
        for tensor in trained.values():
            tensor.requires_grad_()
        found = function(
            hidden,
            self.weight,
            targets,
            bias=self.bias,
            temperature=0.9,
            ref_hidden=ref_hidden,
            lora=HeadLoRA(trained["lora_a"], trained["lora_b"], gate),
            outputs=OUTPUTS,
            differentiable=None,
        )
        stats = {name: getattr(found, name) for name in OUTPUTS}
        sum((stats[name] * loss[:, i]).sum() for i, name in enumerate(OUTPUTS)).backward()
        return {"stats": {n: s.detach() for n, s in stats.items()}, **{n: t.grad for n, t in trained.items()}}


if __name__ == "__main__":
    from bench.step.processes import counting
    from clp_engine.training.parallel.processes import Parallel
    from clp_engine.training.parallel.vocab_parallel import SplitProjection

    torch.set_num_threads(1)
    Parallel.joined(use_cpu=True)
    rank, case, seen = int(os.environ["RANK"]), Case(), []
    with counting(seen):
        found = case.statistics([rank], SplitProjection(torch.distributed.group.WORLD, case.tokens))
    torch.save({**found, "seen": seen}, Path(json.loads(sys.argv[1])) / f"{rank}.pt")
