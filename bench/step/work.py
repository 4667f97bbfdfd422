"""python -m bench work: what a training step does, counted: the same on any machine, however busy.

    products      FLOPs of matrix products, over the least that the step's tokens need (`least`)
    attention     FLOPs of attention, in millions
    launches      operators dispatched, but for views and bare allocations: launches on a GPU, and a measure of Python's work
    bytes         of the tensors that operators made, in millions (what an operator uses inside itself is not seen)
    host reads    values that the host waits for on a GPU: item, tolist, bool(tensor), masks whose size decides a shape

The step is one of a small model, float32, on the CPU: 6 prompts of 3 to 41 tokens, 4 completions each of 1 to 16 tokens, two
objectives, two micro-batches. Ops of clp_kernels count by the formulas here. The ceilings are in
tests/engine/training/test_step_work.py.

The least: every token of a prompt once, whatever the size of its group, and every completion token but the last once, in
rollout, in the policy's pass and in the reference's; the backward pass with the frozen weights left out; the output projection
once for each drawn token, in the update for policy and, with a KL, reference, and once for the gradient.
"""

from __future__ import annotations

import functools
import math
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from clp_engine.rollouts.engines import trials

REST = "rest"
VOCABULARY = 67
PROMPTS = (41, 3, 17, 8, 29, 12)  # tokens


@dataclass
class Work:
    """Of one phase. products, attention: FLOPs; bytes: of new tensors."""

    products: int = 0
    attention: int = 0
    launches: int = 0
    bytes: int = 0
    host_reads: int = 0


# -- FLOPs of an operator -----------------------------------------------------------------------------------------------------


def _multi_lora(x, weight, bias, lora_a, lora_b, gate, gate_index) -> int:
    tokens, (out, inner), rank = x.numel() // x.shape[-1], weight.shape, lora_a.shape[0]
    return 2 * tokens * out * inner + 2 * tokens * rank * (inner + out)


def _multi_lora_backward(dy, x, weight, lora_a, lora_b, gate, gate_index, h, needs) -> int:
    tokens, out, (rank, inner) = dy.numel() // dy.shape[-1], dy.shape[-1], lora_a.shape
    need_x, need_weight, _, need_a, need_b, need_gate = needs
    through_h = need_x or need_a or need_gate  # d(gated h) = dy B
    layer = 2 * tokens * out * inner * (need_x + need_weight)
    return layer + 2 * tokens * rank * (out * (through_h + need_b) + inner * (need_x + need_a))


def _head(hidden, weight, bias, lora_a, lora_b, gate, ref_hidden, ref_weight) -> tuple[int, int]:
    """FLOPs of the logits of one token, of the policy and of the reference."""
    vocabulary, width = weight.shape
    lora = 0 if lora_a is None else 2 * lora_a.shape[0] * (vocabulary + width)
    reference = 0 if ref_hidden is None else 2 * ref_hidden.shape[1] * vocabulary
    return 2 * vocabulary * width + lora, reference


def _linear_logprob(*arguments) -> int:
    """Logits, and where the derivatives in hidden are kept instead of logits ("directions") a product for each."""
    (*inputs, _, differentiable, _, _, directions, _) = arguments
    kept = len(differentiable.split(",")) * inputs[1].numel() * 2 if directions else 0
    return inputs[0].shape[0] * (sum(_head(*inputs[:8])) + kept)


def _linear_logprob_backward(*arguments) -> int:
    """Nothing where the derivatives were kept. Otherwise logits that were not kept are made again; then one product for each
    gradient asked for."""
    (*inputs, saved, kept, directions, needs, _) = arguments
    if directions:
        return 0
    inputs = inputs[-14:]  # behind the incoming gradients
    hidden, weight, lora_a = inputs[0], inputs[1], inputs[3]
    tokens, (vocabulary, width) = hidden.shape[0], weight.shape
    again = (tokens - kept.shape[1]) * sum(_head(*inputs[:8]))
    gradients = 2 * tokens * vocabulary * width * (needs[0] + needs[1])
    if lora_a is not None:
        rank = lora_a.shape[0]
        gradients += 2 * tokens * rank * (vocabulary * (1 + needs[4]) + width * (needs[0] + needs[3]))
    return again + gradients


def _pairs(starts: Tensor, parents: Tensor) -> int:
    """(query, key) pairs of packed sequences, each of which continues its parent."""
    lengths = starts.diff().tolist()
    return sum(
        n * (n + 1) // 2 + (n * lengths[p] if p >= 0 else 0) for n, p in zip(lengths, parents.tolist())
    )


def _prefix_attention(q, k, v, starts, parents, *_) -> int:
    return 4 * q.shape[-1] * q.shape[-2] * _pairs(starts, parents)


def _prefix_attention_backward(d_out, q, k, v, out, lse, starts, parents, *_) -> int:
    return 10 * q.shape[-1] * q.shape[-2] * _pairs(starts, parents)


def _sdpa(q, k, v, *_) -> int:
    return sdpa_flop_count(q.shape, k.shape, v.shape)


def _sdpa_backward(d_out, q, k, v, *_) -> int:
    return sdpa_backward_flop_count(d_out.shape, q.shape, k.shape, v.shape)


PRODUCTS: dict[str, Callable[..., int]] = {
    "multi_lora_linear": _multi_lora,
    "multi_lora_linear_backward": _multi_lora_backward,
    "linear_logprob": _linear_logprob,
    "linear_logprob_backward": _linear_logprob_backward,
    "sample_tokens": lambda *_: 0,
    "logits_logprob": lambda *_: 0,
    "logits_logprob_backward": lambda *_: 0,
}
ATTENTION: dict[str, Callable[..., int]] = {
    "prefix_attention": _prefix_attention,
    "prefix_attention_backward": _prefix_attention_backward,
    "_scaled_dot_product_flash_attention_for_cpu": _sdpa,
    "_scaled_dot_product_flash_attention_for_cpu_backward": _sdpa_backward,
}


def flops(op, arguments: tuple, options: dict, result: object) -> tuple[int, int]:
    """(of products, of attention). Raises NotImplementedError for an op of clp_kernels that has no formula."""
    name = op._schema.name.partition("::")[2]
    if name in ATTENTION:
        return 0, ATTENTION[name](*arguments)
    if name in PRODUCTS:
        return PRODUCTS[name](*arguments), 0
    if op.namespace == "clp_kernels":
        raise NotImplementedError(f"{op}: no formula for its FLOPs; add one to bench/step/work.py")
    if op.overloadpacket in flop_registry:
        found = int(flop_registry[op.overloadpacket](*arguments, **options, out_val=result))
        return (0, found) if "attention" in name else (found, 0)
    return 0, 0


# -- counting -----------------------------------------------------------------------------------------------------------------

# Of operators by name: those that a GPU's host waits for; those whose output's size depends on values.
_READS = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive"}
_ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
# Methods that read without an operator that says so.
_READING_METHODS = {"torch.Tensor.tolist", "torch.Tensor.numpy", "torch.Tensor.cpu", "torch.Tensor.__array__"}


class WorkCounter(TorchDispatchMode):
    """Counts by phase; `phase(name)` is a context in which work counts for `name`."""

    def __init__(self) -> None:
        super().__init__()
        self.work: dict[str, Work] = {}
        self.by_op: Counter[tuple[str, str]] = Counter()
        self._phases = [REST]
        self._methods = _Methods(self)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self._phases.append(name)
        try:
            yield
        finally:
            self._phases.pop()

    @property
    def here(self) -> Work:
        return self.work.setdefault(self._phases[-1], Work())

    def __enter__(self):
        self._methods.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self._methods.__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        work, name = self.here, func._schema.name.partition("::")[2]
        products, attention = flops(func, args, kwargs, result)
        work.products += products
        work.attention += attention
        if name in _READS or name in ("index", "index_put", "index_put_") and _by_mask(args[1]):
            work.host_reads += 1
        if name not in _ALLOCATIONS and not _is_view(func):
            work.launches += 1
            self.by_op[self._phases[-1], str(func)] += 1
        known = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for tensor in (t for t in tree_leaves(result) if isinstance(t, Tensor)):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in known:
                known.add(storage.data_ptr())
                work.bytes += storage.nbytes()
        return result


class _Methods(TorchFunctionMode):
    """Counts the methods that hand values to Python without an operator."""

    def __init__(self, counter: WorkCounter) -> None:
        super().__init__()
        self._counter = counter

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if resolve_name(func) in _READING_METHODS:
            self._counter.here.host_reads += 1
        return func(*args, **(kwargs or {}))


def _by_mask(indices) -> bool:
    return any(t is not None and t.dtype in (torch.bool, torch.uint8) for t in indices)


def _is_view(op) -> bool:
    """Whether its outputs alias an input and nothing is written."""
    returns = op._schema.returns
    return bool(returns) and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)


# -- the step -----------------------------------------------------------------------------------------------------------------


def tokenizer():
    """Words w0, w1, ..., a token each."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<unk>"] + [f"w{i}" for i in range(VOCABULARY - 2)]
    made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="<pad>",
        unk_token="<unk>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def model():
    """Two layers of Qwen2's form; every ninth token ends a completion, so that lengths differ."""
    from transformers import AutoModelForCausalLM, Qwen2Config

    config = Qwen2Config(
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        pad_token_id=0,
        eos_token_id=list(range(2, VOCABULARY, 9)),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def _first_reward(completions, **_) -> list[float]:
    return [float(len(c.split())) for c in completions]


def _second_reward(completions, **_) -> list[float]:
    return [float(c.count("1")) for c in completions]


@dataclass(frozen=True)
class Counted:
    """work: by phase. by_op: launches by (phase, operator). least: FLOPs of products by phase. prompts, completions: tokens."""

    work: dict[str, Work]
    by_op: Counter
    least: dict[str, int]
    prompts: list[int]
    completions: list[int]

    def figures(self) -> dict[str, float]:
        """What the ceilings are on, by "phase/quantity"."""
        found: dict[str, float] = {}
        for phase, work in self.work.items():
            if phase in self.least:
                found[f"{phase}/products"] = work.products / self.least[phase]
                found[f"{phase}/attention"] = work.attention / 1e6
            found[f"{phase}/launches"] = work.launches
            found[f"{phase}/bytes"] = work.bytes / 1e6
            found[f"{phase}/host reads"] = work.host_reads
        return found


def count(**settings) -> Counted:
    """The work of the second step of a run (the first one also fills caches). settings: of CLPConfig, beside those here."""
    from bench.step.profile import with_marks
    from clp_engine.training.settings.config import CLPConfig
    from clp_engine.training.trainer import CLPTrainer

    generator = torch.Generator().manual_seed(0)
    rows = [
        {
            "prompt": " ".join(
                f"w{i}" for i in torch.randint(VOCABULARY - 2, (n,), generator=generator).tolist()
            )
        }
        for n in PROMPTS
    ]
    with tempfile.TemporaryDirectory() as folder:
        options = {
            "output_dir": folder, "per_device_train_batch_size": 12, "gradient_accumulation_steps": 2,
            "num_generations": 4, "max_steps": 2, "max_completion_length": 16, "rank": 4, "logging_steps": 1,
            "save_strategy": "no", "disable_tqdm": True, "shuffle_dataset": False, "seed": 3,
        }  # fmt: skip
        trainer = CLPTrainer(
            model(),
            [_first_reward, _second_reward],
            CLPConfig(**{**options, **settings}),
            rows,
            processing_class=tokenizer(),
        )
        counter, step, second = WorkCounter(), trainer._step, []

        def counted_step(*arguments):
            if not second:
                second.append(True)
                return step(*arguments)
            trainer.timer.__class__ = with_marks(type(trainer.timer), lambda _, phase: counter.phase(phase))
            with counter:
                return step(*arguments)

        trainer._step = counted_step
        trainer.train()
        drawn = trainer._batch.rollout
        prompts, completions = drawn.prompt_mask.sum(-1).tolist(), drawn.lengths.tolist()
        return Counted(
            counter.work,
            counter.by_op,
            least(trainer.policy, prompts, completions, bool(trainer.args.kl)),
            prompts,
            completions,
        )


def least(policy, prompts: list[int], completions: list[int], with_reference: bool) -> dict[str, int]:
    """FLOPs of matrix products that these tokens cannot do without, with a reference and its KL or without."""
    from clp_engine.models.low_rank_layers import ConditionedLinear

    named = {n: m for n, m in policy.model.named_modules() if isinstance(m, ConditionedLinear)}
    layers = list(named.values())
    # Below the first layer nothing is trained: what reads the embeddings passes no gradient on.
    first = [m for n, m in named.items() if n.endswith(tuple(f"layers.0.self_attn.{p}_proj" for p in "qkv"))]
    not_on = sum(2 * m.in_features * (m.out_features + sum(m.ranks)) for m in first)
    frozen = sum(2 * m.out_features * m.in_features for m in layers)
    factors = sum(2 * sum(m.ranks) * (m.out_features + m.in_features) for m in layers)
    head = 2 * math.prod(policy.backbone.head.module.weight.shape)
    drawn = sum(completions)
    read = sum(prompts) + drawn - len(completions)
    return {
        "rollout": read * (frozen + factors) + (len(prompts) + drawn - len(completions)) * head,
        "reference": read * frozen,
        # The policy's pass forward, then dx and the factors' two gradients.
        "update": read * (2 * frozen + 3 * factors - not_on) + (3 if with_reference else 2) * drawn * head,
    }


# Settings, and how rollouts decode: products inside the native decoder are not seen, those of transformers' modules are.
SCENARIOS: dict[str, tuple[dict, str]] = {
    "KL": ({"beta": 0.1}, "torch"),
    "no KL": ({"beta": 0.0}, "torch"),
    "native decoding": ({"beta": 0.1}, "native"),
}


@functools.cache
def counted(scenario: str) -> Counted:
    settings, decoding = SCENARIOS[scenario]
    before = os.environ.get(trials.SWITCH)
    os.environ[trials.SWITCH] = decoding
    try:
        return count(**settings)
    finally:
        os.environ.pop(trials.SWITCH)
        if before is not None:
            os.environ[trials.SWITCH] = before


def report() -> str:
    """The present counts, as the table of ceilings has them."""
    lines = []
    for scenario in SCENARIOS:
        found = counted(scenario)
        lines.append(f"{scenario}: prompts {found.prompts}, completions {found.completions}")
        lines += [
            f"    {name:24s}{value:12,.3f}".rstrip("0").rstrip(".") for name, value in found.figures().items()
        ]
    return "\n".join(lines)


def operators(scenario: str, limit: int = 25) -> str:
    """The commonest launches of each phase."""
    found = counted(scenario).by_op.most_common(limit)
    return "\n".join(f"{times:6d}  {phase:10s}{op}" for (phase, op), times in found)
