"""python -m bench scaling: what a training step of N processes should cost. Predicted from formulas; nothing is measured.

Collectives of a step, counted by tests/engine/training/several/test_several.py. N processes, nodes of g GPUs, m = N / g nodes:

    exchange   objects, all-gathered: sizes, then contents as long as the longest; every process unpickles all of them
               completions    9 bytes for each place of (rows, longest): token 4, log-prob 4, end 1
               rewards        4 bytes for each completion and objective
               metrics        some 200 bytes a process
    all-reduce the adapters' float32 gradient, after the update and not beside it; and a few flags
    FSDP2      an all-gather of each layer's weights in the forward and in the backward pass of each micro-batch, and of all
               layers once for each rollout; of frozen weights no gradient
               with gather_for_generation: false instead for each token of the longest completion, after an all-reduce of a flag
    split projection (vocab_parallel), for each micro-batch of L tokens in each process, T = N L, width H:
               all-gathers of 2 T H bytes, twice (policy, reference); of 4 bytes for 8 sums of each of T rows from each process;
               of 4 bytes for 2 gradients of a row; a reduce-scatter of 4 T H bytes, in the time of an all-gather

A collective of B bytes takes alpha + B / bandwidth in each of its hops (Hockney's model), inside a node first:

    all-gather    (g-1) a_in + B (g-1)/g / b_in      +  (m-1) a_out + B (m-1)/m / (g b_out)               B of all processes
    all-reduce    2 [(g-1) a_in + B (g-1)/g / b_in]  +  min(ring 2 [(m-1) a_out + B/g (m-1)/m / b_out],
                                                            tree 2 [log2(m) a_out + B/g / b_out])

Computation, P weights in bfloat16, K bytes of keys and values a token:

    decode step   max(weights and factors / HBM, 2 P rows / FLOPs) + K (tokens read) / HBM; ends with the longest completion
    update        6 P tokens / FLOPs: policy forward, backward through frozen weights, reference forward

Left out: attention's FLOPs, sampling, launches, the reward functions, tokens of prompts in the update. The lengths of
completions are log-normal, half of their variance in the prompt, cut at MOST tokens. Groups are dealt as training does.
"""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from clp_engine.core.tables import markdown
from clp_engine.training.parallel.dealing import deal, deal_rows

PROCESSES = (8, 16, 64, 128, 512)
PROMPT, GROUP, ROWS, BATCH = (
    200,
    8,
    64,
    4096,
)  # tokens; completions of a prompt, of a process, of a fixed batch
MEDIAN, SIGMA, MOST = 600, 0.7, 4096  # of the lengths
OBJECTIVES, RANK = 3, 16
TOKENS = 2000  # of a micro-batch of one process
STEPS = 6  # that are simulated


@dataclass(frozen=True)
class Machine:
    """A node of H100 class. Rates are 0.4 of the peak of matrix products, 0.6 of HBM's, 0.8 of a link's; in FLOP/s and bytes/s.

    host: what one process unpickles and joins. hop: seconds.
    """

    flops: float = 0.4 * 989e12
    hbm: float = 0.6 * 3.35e12
    node: int = 8
    inside: float = 0.8 * 450e9
    between: float = 0.8 * 50e9
    hop_inside: float = 3e-6
    hop_between: float = 10e-6
    host: float = 1e9

    def nodes(self, processes: int) -> tuple[int, int]:
        """(GPUs of a node, nodes)"""
        of_node = min(processes, self.node)
        return of_node, -(-processes // of_node)

    def all_gather(self, total: float, processes: int) -> float:
        g, m = self.nodes(processes)
        inside = (g - 1) * self.hop_inside + total * (g - 1) / g / self.inside
        return inside + (m - 1) * self.hop_between + total * (m - 1) / m / (g * self.between)

    def all_reduce(self, size: float, processes: int) -> float:
        g, m = self.nodes(processes)
        inside = (g - 1) * self.hop_inside + size * (g - 1) / g / self.inside
        ring = (m - 1) * self.hop_between + size / g * (m - 1) / m / self.between
        tree = math.log2(m) * self.hop_between + size / g / self.between if m > 1 else 0.0
        return 2 * (inside + min(ring, tree))

    def exchange(self, of_each: float, processes: int) -> float:
        """Objects of `of_each` bytes from everyone to everyone."""
        contents = self.all_gather(of_each * processes, processes) + of_each * processes / self.host
        return self.all_gather(8 * processes, processes) + contents


@dataclass(frozen=True)
class Shape:
    """A decoder: width, layers, widths of queries and of keys, of the MLP; vocabulary."""

    name: str
    width: int
    layers: int
    queries: int
    keys: int
    inner: int
    vocabulary: int

    @property
    def linear(self) -> list[tuple[int, int]]:
        """(in, out) of a layer's projections."""
        w, q, k, i = self.width, self.queries, self.keys, self.inner
        return [(w, q), (w, k), (w, k), (q, w), (w, i), (w, i), (i, w)]

    @property
    def layer(self) -> int:
        return sum(a * b for a, b in self.linear)

    @property
    def weights(self) -> int:
        return self.layers * self.layer + 2 * self.vocabulary * self.width

    @property
    def adapters(self) -> int:
        return OBJECTIVES * RANK * self.layers * sum(a + b for a, b in self.linear)

    @property
    def cached(self) -> int:
        """Bytes of a token's keys and values."""
        return 2 * 2 * self.layers * self.keys


SMALL = Shape("7B (Qwen2.5-7B)", 3584, 28, 3584, 512, 18944, 152064)
LARGE = Shape("70B (Llama-3.1-70B)", 8192, 80, 8192, 1024, 28672, 128256)


# -- a step, simulated --------------------------------------------------------------------------------------------------------


def lengths(generator: random.Random, groups: int) -> list[list[int]]:
    """Of each group its completions' tokens."""
    part = SIGMA / math.sqrt(2)
    means = [math.log(MEDIAN) + generator.gauss(0, part) for _ in range(groups)]
    return [
        [min(MOST, 1 + int(math.exp(mean + generator.gauss(0, part)))) for _ in range(GROUP)]
        for mean in means
    ]


def decode(rows: Iterable[tuple[int, int]], shape: Shape, machine: Machine) -> float:
    """Seconds of one process that decodes rows of (tokens read before, new tokens) together; prefill included."""
    rows = sorted(rows, key=lambda row: row[1])
    step, row = (2 * shape.weights + 4 * shape.adapters) / machine.hbm, 2 * shape.weights / machine.flops
    seconds, done = 0.0, 0
    for finished, (read, new) in enumerate(rows):
        seconds += (new - done) * max(step, (len(rows) - finished) * row)
        seconds += new * (read + new / 2) * shape.cached / machine.hbm + read * row
        done = new
    return seconds


@dataclass(frozen=True)
class Step:
    """Seconds of the slowest process, and of the mean one in `mean`; tokens of all."""

    rollout: float
    update: float
    traffic: float
    tokens: int
    idle: float
    imbalance: float
    phases: float = 1.0
    stale: float = 0.0

    @property
    def seconds(self) -> float:
        return self.rollout + self.update + self.traffic

    @classmethod
    def mean(cls, steps: Sequence[Step]) -> Step:
        return cls(*(sum(getattr(s, name) for s in steps) / len(steps) for name in cls.__annotations__))


def _step(groups, drawing: list[list[float]], tokens, processes, shape, machine, **more) -> Step:
    """drawing: seconds of each process in each phase. tokens: drawn in this step."""
    shares = deal([PROMPT + sum(group) for group in groups], processes)
    work = [sum(sum(groups[i]) for i in share) for share in shares]
    rollout = sum(map(max, drawing))
    rows = -(-len(groups) // processes) * GROUP
    traffic = machine.exchange(9 * rows * max(map(max, groups)), processes)
    traffic += machine.exchange(4 * OBJECTIVES * rows, processes) + machine.exchange(200, processes)
    traffic += machine.all_reduce(4 * shape.adapters, processes) + machine.all_reduce(64, processes)
    idle = 1 - sum(map(sum, drawing)) / processes / rollout
    imbalance = max(work) * processes / sum(work)
    return Step(
        rollout, 6 * shape.weights * max(work) / machine.flops, traffic, tokens, idle, imbalance, **more
    )


def whole(processes: int, groups: int, shape=SMALL, machine=Machine()) -> Step:
    """The mean step whose completions are drawn to their ends."""
    generator, found = random.Random(0), []
    for _ in range(STEPS):
        drawn = lengths(generator, groups)
        shares = deal_rows([PROMPT] * groups, processes)
        each = [decode(((PROMPT // GROUP, n) for i in s for n in drawn[i]), shape, machine) for s in shares]
        found.append(_step(drawn, [each], sum(map(sum, drawn)), processes, shape, machine))
    return Step.mean(found)


def partial(processes: int, groups: int, limit: int, shape=SMALL, machine=Machine()) -> Step:
    """The same with partial_rollouts: phases of at most `limit` new tokens, as collecting/partial_rollouts.py has them."""
    generator, found, waiting = random.Random(0), [], []  # waiting: groups of [length, done so far]
    for number in range(3 * STEPS):
        drawing, drawn, phases = [], 0, 0
        before = {id(group): sum(done for _, done in group) for group in waiting}
        while len(ended := [g for g in waiting if all(n == done for n, done in g)]) < groups:
            while len(active := [g for g in waiting if any(n > done for n, done in g)]) < groups:
                waiting += [[[n, 0] for n in group] for group in lengths(generator, groups)]
            active, phases = active[:groups], phases + 1
            fresh = [g for g in active if not any(done for _, done in g)]
            going = [c for g in active if any(done for _, done in g) for c in g if c[0] > c[1]]
            for parts, read in (([[c] for c in going], 1), (fresh, GROUP)):
                if not parts:
                    continue
                each = []
                for share in deal_rows([PROMPT + part[0][1] for part in parts], processes):
                    rows = [c for i in share for c in parts[i]]
                    news = (((PROMPT + done) // read, min(limit, n - done)) for n, done in rows)
                    each.append(decode(news, shape, machine))
                drawing.append(each)
            for completion in (c for g in active for c in g):
                new = min(limit, completion[0] - completion[1])
                completion[1], drawn = completion[1] + new, drawn + new
        taken = ended[:groups]
        stale = sum(before.get(id(g), 0) for g in taken) / sum(n for g in taken for n, _ in g)
        gone = set(map(id, taken))
        waiting = [g for g in waiting if id(g) not in gone]
        if number >= 2 * STEPS:
            trained = [[n for n, _ in g] for g in taken]
            found.append(
                _step(trained, drawing, drawn, processes, shape, machine, phases=phases, stale=stale)
            )
    return Step.mean(found)


# -- tables -------------------------------------------------------------------------------------------------------------------


def table(head: str, rows: Iterable[Sequence[object]]) -> str:
    return markdown(head.split(" | "), [tuple(map(str, row)) for row in rows], left=1)


def traffic(machine: Machine = Machine()) -> str:
    """Each collective of a step with ROWS completions for each process, and what the whole batch takes in each process."""
    rows, place = [], ROWS * MOST
    for shape in (SMALL, LARGE):
        for n in PROCESSES:
            parts = (
                machine.all_gather(9 * place * n, n),
                9 * place * n / machine.host,
                machine.exchange(4 * OBJECTIVES * ROWS, n) + machine.exchange(200, n),
                machine.all_reduce(4 * shape.adapters, n),
            )
            held = f"{17 * place * n / 2**30:.2f} GiB"
            rows.append((shape.name, n, *(f"{1e3 * part:.1f}" for part in parts), held))
    return table(
        "shape | GPUs | completions, wire, ms | the same, host, ms | rewards, metrics, ms | gradient, ms | batch in each GPU",
        rows,
    )


def steps() -> str:
    """Steps of the small shape, by the number of processes: one batch for all of them, and as many rows for each of them."""
    rows = []
    for label, batch_of in (
        (f"{BATCH} completions in all", lambda n: BATCH),
        (f"{ROWS} completions a GPU", lambda n: ROWS * n),
    ):
        first = None
        for n in PROCESSES:
            step = whole(n, batch_of(n) // GROUP)
            rate = step.tokens / step.seconds / n
            first = first or rate
            seconds = (f"{x:.1f}" for x in (step.rollout, step.update, step.traffic, step.seconds))
            rows.append(
                (label, n, *seconds, f"{step.idle:.0%}", f"{step.imbalance:.2f}", f"{rate / first:.0%}")
            )
    return table(
        "batch | GPUs | rollout, s | update, s | collectives, s | step, s | waits in rollout | update, longest / mean "
        "| tokens a GPU, of 8 GPUs'",
        rows,
    )


def partials() -> str:
    rows = []
    for n, groups in ((64, ROWS * 64 // GROUP), (8, BATCH // GROUP)):
        plain = whole(n, groups)
        rows.append(
            (n, groups * GROUP, "whole", "1.0", f"{plain.rollout:.1f}", f"{plain.seconds:.1f}", "0%", "1.00")
        )
        for limit in (2048, 1024, 512):
            step = partial(n, groups, limit)
            gain = step.tokens / step.seconds * plain.seconds / plain.tokens
            seconds = f"{step.rollout:.1f}", f"{step.seconds:.1f}"
            rows.append(
                (n, groups * GROUP, limit, f"{step.phases:.1f}", *seconds, f"{step.stale:.0%}", f"{gain:.2f}")
            )
    return table(
        "GPUs | completions | tokens a phase | phases | rollout, s | step, s | stale tokens | tokens/s, of whole", rows
    )  # fmt: skip


def sharded(machine: Machine = Machine()) -> str:
    """FSDP2: gathering, and how many tokens of a micro-batch hide it."""
    rows = []
    for shape in (SMALL, LARGE):
        for n in PROCESSES:
            layer = machine.all_gather(2 * shape.layer, n)
            rest = 2 * shape.weights - 2 * shape.layers * shape.layer
            held = (rest + 2 * shape.layers * shape.layer / n + 16 * shape.adapters) / 1e9
            whole_ = (2 * shape.weights + 16 * shape.adapters) / 1e9
            hidden = layer * machine.flops / (2 * shape.layer)
            gathered = f"{1e3 * layer:.1f}", f"{layer * shape.layers:.2f}"
            rows.append((shape.name, n, *gathered, f"{hidden:,.0f}", f"{held:.0f} GB", f"{whole_:.0f} GB"))
    return table(
        "shape | GPUs | a layer, ms | all layers, s | tokens that hide it | weights and optimiser, cut | the same, gathered",
        rows,
    )


def layer_by_layer(machine: Machine = Machine()) -> str:
    """gather_for_generation: false. While a layer reads its weights the next is gathered; nothing hides the first."""
    rows = []
    for shape in (SMALL, LARGE):
        for n in PROCESSES:
            layer = machine.all_gather(2 * shape.layer, n)
            gather = shape.layers * layer + machine.all_reduce(4, n)
            step = (2 * shape.weights + 4 * shape.adapters) / machine.hbm
            each = max(gather, step) + layer
            factors = 16 * shape.adapters
            outside = 2 * (shape.weights - shape.layers * shape.layer)
            held = factors + outside + 2 * shape.layer * (shape.layers / n + 3)
            seconds = (f"{1e3 * x:.0f}" for x in (step, gather, each))
            rest = f"{each / step:.1f}", f"{MOST * each / 60:.1f} min", f"{held / 1e9:.0f} GB"
            rows.append((shape.name, n, *seconds, *rest))
    return table(
        "shape | GPUs | reading, ms | gathering, ms | a token, ms | times as slow as whole "
        f"| {MOST} tokens | a GPU holds",
        rows,
    )


def split_projection(machine: Machine = Machine()) -> str:
    """What a micro-batch of TOKENS tokens in each process sends, holds and saves with vocab_parallel."""
    rows = []
    for shape in (SMALL, LARGE):
        for n in PROCESSES[:3]:
            every = n * TOKENS * shape.width
            sums, gradients = 4 * 8 * n * TOKENS * n, 4 * 2 * n * TOKENS
            parts = (
                2 * machine.all_gather(2 * every, n),
                machine.all_gather(sums, n),
                machine.all_gather(gradients, n) + machine.all_gather(4 * every, n),
            )
            held = (2 + 2 + 4) * every + sums  # hidden states of both, the gradient, sums of all
            saved = shape.vocabulary * shape.width * (1 - 1 / n)
            sizes = (f"{size / 1e9:.1f} GB" for size in (held, 2 * saved, (2 + 16 * OBJECTIVES) * saved))
            rows.append((shape.name, n, *(f"{1e3 * part:.1f}" for part in parts), *sizes))
    return table(
        "shape | GPUs | hidden states, ms | sums, ms | backward, ms | rows of all hold | weights saved | with whole deltas",
        rows,
    )


def tensor_parallel(machine: Machine = Machine()) -> str:
    """A decode step of ROWS rows of the large shape, its weights cut over the GPUs of a node: two all-reduces a layer."""
    rows = []
    for g in (1, 2, 4, 8):
        weights = (2 * LARGE.weights + 4 * LARGE.adapters) / g
        talk = 2 * LARGE.layers * machine.all_reduce(2 * ROWS * LARGE.width, g) if g > 1 else 0.0
        read = weights / machine.hbm
        rows.append((g, f"{weights / 1e9:.0f} GB", *(f"{1e3 * x:.1f}" for x in (read, talk, read + talk))))
    return table("GPUs | weights and factors of each | reading, ms | all-reduces, ms | step, ms", rows)


@functools.cache
def report() -> str:
    return "\n\n".join(
        f"### {title}\n\n{rows}"
        for title, rows in (
            ("Collectives of a step (predicted)", traffic()),
            ("A step of the 7B shape (simulated)", steps()),
            ("Partial rollouts (simulated)", partials()),
            ("FSDP2 (predicted)", sharded()),
            ("Drawing layer by layer (predicted)", layer_by_layer()),
            (f"A split projection, micro-batches of {TOKENS:,} tokens (predicted)", split_projection()),
            ("Decoding with tensor parallelism, 70B shape (predicted; not built)", tensor_parallel()),
        )
    )
