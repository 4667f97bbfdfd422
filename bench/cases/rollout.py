"""The decode step of a rollout: against its floor, a blend per row against the merged model, few weightings against many.

What is timed is `clp_engine.rollout` as training calls it, drawing included: on a GPU graphs over fixed slots, on a CPU
one call of C++ for all tokens. No row ends before it has written `new` tokens.

    step        (seconds of the rollout - set-up - prefill) / (new - 1): the first token comes of the prefill
    set-up      what a rollout makes before it reads: the decoder, its buffers, its low-rank factors packed
    prefill     the prompts; of transformers' generate, everything up to the first token
    tokens/s    rows / step

Variants, all of them under the same draws:

    merged model    `policy.merge` of one weighting, its layers without adapters, by the same decoder
    N weightings    N different ones among the prompts (a group shares its prompt's); as many as there are prompts is a
                    blend of its own for every row where a group is one row
    reference       every weight zero: the base model
    transformers    its `generate` on the merged model, and with PEFT's adapter of the same blend beside the base model

Two objectives of rank 16 on every linear layer; the deltas are random, uniform weights change a weight by 0.3 of its norm.

Floor of a step, the mean of the new - 1 steps, e bytes an element, L layers, D wide heads, n new tokens:

    bytes   e (parameters of layers, norm and head + R (N + K) of every layer with factors
               + 2 L Hkv D (prompts * prompt + rows * n / 2) + rows * H)
    FLOPs   2 rows (matrices + R (N + K)) + 4 rows L Hq D (prompt + n / 2)
    exps    rows (V + L Hq (prompt + n / 2) + L I)

Weights and factors count once, a prompt's keys and values once for its group, a row's own as they grow (one read or written
for each token so far), its embedding. Logits and activations count nothing: a method might keep them on the chip. Factors are
no part of the floor of a variant without them.

Every variant's log-probs, of the first and the last row, are compared with those of `bench.step.decoder_truth` in float64 for
the tokens it drew. Models as in `bench.cases.e2e`.
"""

from __future__ import annotations

import gc
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import ModuleType

import torch

from bench.core import accuracy, ceilings, schema, targets
from bench.core.case import Work
from bench.core.measure import medians, summary
from bench.core.memory import extra_peak
from bench.core.runner import raised
from bench.step import decoder_truth
from bench.step.phases import Phases
from bench.step.step_case import FLOAT32, load_model, load_tokenizer, prompts_of, refuse_detours

OURS = targets.OURS
MERGED = targets.MERGED
OBJECTIVES, RANK, CHANGE = ("one", "other"), 16, 0.3
SEED = 1


@dataclass(frozen=True)
class Written:
    """One call: seconds of its parts, and (rows, new) tokens with their log-probs, None where they were not asked for."""

    phases: dict[str, float]
    tokens: torch.Tensor | None = None
    logprobs: torch.Tensor | None = None


@dataclass(frozen=True)
class Decoder:
    """A variant: call(checked) -> Written, with log-probs where `checked`; coefficients (prompts, D) of its blend."""

    call: Callable[[bool], Written]
    coefficients: torch.Tensor
    low_rank: bool = False
    peer: bool = False


@dataclass(frozen=True)
class DecodeCase:
    """`new` tokens for each of prompts * group rows, prompts of `prompt` tokens. weightings: how many different ones."""

    model: str
    device: str
    prompts: int
    group: int
    prompt: int
    new: int
    weightings: tuple[int, ...]
    targets: tuple[str, ...] = ()
    peers: bool = False
    most: int = field(default=15, compare=False)  # rounds

    op = "decode_step"
    title = "decode step"

    @property
    def dtype(self) -> str:
        return "float32" if self.model in FLOAT32 else "bfloat16"

    @property
    def rows(self) -> int:
        return self.prompts * self.group

    @property
    def shape(self) -> dict[str, int]:
        return {name: getattr(self, name) for name in ("rows", "group", "prompt", "new")}

    @property
    def id(self) -> str:
        return schema.case_id("rollout", self.title, self.shape, self.dtype, {"model": self.model})

    def measure(
        self, modules: Mapping[str, ModuleType], quick: bool, share: float, result: schema.Result
    ) -> schema.Case:
        end = time.monotonic() + share
        variants, floors = {}, {}
        try:
            subject = Subject(self)
        except Exception as error:  # no memory for the model, say: the cases after this one may have it
            variants[MERGED] = raised(MERGED, error)
        else:
            ready: dict[str, Decoder] = {}
            for name, make in subject.offers(modules):
                variants[name] = self._checked(subject, name, make, ready)
            seen = self._rounds(variants, ready, quick, end)
            for low_rank in (False, True):
                work = step_work(subject.policy.model, self, low_rank)
                floors[low_rank] = ceilings.floor(work, self.dtype, result.ceilings)
            for name, found in seen.items():
                variants[name].times = summary([phases["decode"] / (self.new - 1) for phases in found])
                variants[name].timing = "a rollout without set-up and prefill, over its steps"
                variants[name].phases = medians(found)
                variants[name].floor = floors[ready[name].low_rank]
            del subject, ready
        self._free()
        record = schema.Case(
            self.id, "rollout", self.op, self.title, self.shape, self.dtype, list(variants.values()),
            {"model": self.model}, MERGED, floors.get(False),
        )  # fmt: skip
        record.verdicts = targets.verdicts(self.targets, record, result.ceilings, result.environment)
        return record

    def _rounds(
        self, variants: dict[str, schema.Variant], ready: dict[str, Decoder], quick: bool, end: float
    ) -> dict[str, list[dict[str, float]]]:
        """Seconds of the parts of every call, by variant. One that raises is taken out of `ready`."""
        least, most, of_peers = (2, 2, 2) if quick else (3, self.most, 3)
        seen = {name: [] for name in ready}
        names = list(ready)
        for number in range(most):
            if number >= least and time.monotonic() > end:
                break
            shift = number % max(len(names), 1)
            for name in names[shift:] + names[:shift]:
                if name not in ready or ready[name].peer and number >= of_peers:
                    continue
                try:
                    seen[name].append(ready[name].call(False).phases)
                except Exception as error:
                    variants[name] = raised(name, error)
                    del ready[name], seen[name]
        return seen

    def _checked(self, subject: Subject, name: str, make: Callable, ready: dict) -> schema.Variant:
        """A variant with its errors and peak memory; those that can be timed are added to `ready`."""
        if isinstance(make, str):
            return schema.Variant(name, "unavailable", make)
        try:
            decoder = make()
            errors = subject.errors(decoder)
            peak = extra_peak(lambda: decoder.call(False), self.device)
        except Exception as error:
            self._free()
            return raised(name, error)
        ready[name] = decoder
        reason = accuracy.complaint(errors, ("logprob",))
        return schema.Variant(name, "wrong" if reason else "ok", reason, extra_peak_bytes=peak, errors=errors)

    def _free(self) -> None:
        gc.collect()
        if self.device == "cuda":
            torch.cuda.empty_cache()


def cases(device: str, sizes: str) -> list[DecodeCase]:
    if sizes == "tiny":
        return [DecodeCase("tiny", device, 3, 2, prompt=12, new=5, weightings=(1, 3), peers=True)]
    every = (1, 2, 4, 8, 16, 32, 64)
    if sizes == "cpu":
        blend, many = ("rollout-blend-cpu",), ("rollout-blend-cpu", "rollout-weightings-cpu")
        return [
            DecodeCase("docsum", device, 8, 8, 120, 40, (1, 8), blend, peers=True),
            DecodeCase("qwen2-30m", device, 8, 8, 120, 40, (1, 8), blend, most=7),
            DecodeCase("docsum", device, 64, 1, 120, 40, every, many),
            DecodeCase("docsum", device, 8, 1, 120, 40, (1, 8), blend),
            DecodeCase("qwen2-30m", device, 8, 1, 120, 40, (1, 8), blend, most=7),
            DecodeCase("qwen2-30m", device, 64, 1, 120, 40, (1, 64), many, most=7),
        ]
    blend = ("rollout-floor", "rollout-blend-gpu")
    many = (*blend, "rollout-weightings-gpu")
    large, small = "qwen2.5-7b", "qwen2.5-0.5b"
    return [
        DecodeCase(large, device, 8, 8, 256, 128, (1, 8), blend, peers=True),
        DecodeCase(small, device, 8, 8, 256, 128, (1, 8), blend, peers=True),
        DecodeCase(small, device, 64, 1, 256, 128, every, many),
        DecodeCase(large, device, 64, 1, 256, 128, every, many),
        DecodeCase(large, device, 8, 1, 256, 128, (1, 8), blend),
        DecodeCase(small, device, 8, 1, 256, 128, (1, 8), blend),
        DecodeCase(large, device, 32, 8, 256, 128, (1, 32)),
        DecodeCase(small, device, 32, 8, 256, 128, (1, 32)),
        DecodeCase("docsum", device, 8, 8, 256, 128, (1, 8)),
    ]


def step_work(model: torch.nn.Module, case: DecodeCase, low_rank: bool) -> Work:
    """The floor in the module's docstring; `model` may hold conditioned layers, whose factors count where `low_rank`."""
    from clp_engine.models.low_rank_layers import ConditionedLinear

    config = model.config
    layers, heads, kv_heads = (
        config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads,
    )  # fmt: skip
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    frozen = [p for module in (model.model.layers, model.model.norm) for p in module.parameters()]
    frozen = [p for p in frozen if not p.requires_grad] + list(model.get_output_embeddings().parameters())
    weights = sum(p.numel() for p in frozen)
    matrices = sum(p.numel() for p in frozen if p.dim() == 2)
    factors = sum(
        sum(layer.ranks) * (layer.in_features + layer.out_features)
        for layer in model.modules()
        if low_rank and isinstance(layer, ConditionedLinear)
    )
    own = case.new / 2  # tokens of a row that are there, on average: 1 to new - 1
    cached = 2 * layers * kv_heads * width * (case.prompts * case.prompt + case.rows * own)
    scores = layers * heads * (case.prompt + own)
    size = torch.float32.itemsize if case.dtype == "float32" else torch.bfloat16.itemsize
    return Work(
        flops=case.rows * (2 * (matrices + factors) + 4 * scores * width),
        bytes=size * (weights + factors + cached + case.rows * config.hidden_size),
        exps=case.rows * (config.vocab_size + scores + layers * config.intermediate_size),
    )


class Subject:
    """A case's policy, the same with merged weights, its prompts, and every variant of it."""

    def __init__(self, case: DecodeCase):
        self.case = case
        self.phases = Phases(torch.cuda.synchronize if case.device == "cuda" else lambda: None)
        refuse_detours(case.device)
        self.policy = make_policy(case.model, case.device)
        tokenizer = load_tokenizer()
        texts = [row["prompt"] for row in prompts_of(case.prompts, case.prompt)]
        self.prompts = [tokenizer(text).input_ids for text in texts]
        self.ids = torch.tensor(self.prompts, device=case.device)
        most = max(case.weightings)
        drawn = torch.empty(most, len(OBJECTIVES)).exponential_(generator=torch.Generator().manual_seed(SEED))
        self.weightings = drawn / drawn.sum(-1, keepdim=True)
        self.merged = without_adapters(self.policy.merge(self.weightings[:1]))

    def offers(self, modules: Mapping[str, ModuleType]) -> Iterator[tuple[str, Callable[[], Decoder] | str]]:
        """Every variant: how it is made, or why it is not there."""
        yield MERGED, self._merged
        for count in self.case.weightings:
            yield targets.of_weightings(count), lambda count=count: self._blended(count)
        yield f"{OURS}, reference", self._reference
        if not self.case.peers:
            return
        peers = {
            "transformers generate, merged model": ("transformers", lambda: self._generate({})),
            "transformers generate, merged model, static cache": (
                "transformers",
                # Compiling takes minutes a shape, and is not what GRPO trainers do.
                lambda: self._generate({"cache_implementation": "static", "disable_compile": True}),
            ),
            "transformers generate, peft adapter": ("peft", self._peft),
        }
        for name, (module, make) in peers.items():
            if "static" in name and self.case.device == "cpu":
                continue  # it serves graphs, which there are none of
            if module in modules:
                yield name, modules[module].unavailable(self.case.device) or make

    def conditions(self, count: int):
        """`count` different weightings, in turn."""
        from clp_engine.core.conditions import Conditions

        weights = self.weightings[torch.arange(self.case.prompts) % count]
        return Conditions(weights, torch.zeros(self.case.prompts))

    def _blended(self, count: int) -> Decoder:
        conditions = self.conditions(count)
        return self._ours(self.policy, conditions, self.policy.coefficients(conditions), low_rank=True)

    def _merged(self) -> Decoder:
        from clp_engine.core.conditions import Conditions

        coefficients = self.policy.coefficients(self.conditions(1))
        return self._ours(self.merged, Conditions.reference(self.case.prompts, 1), coefficients)

    def _reference(self) -> Decoder:
        from clp_engine.core.conditions import Conditions

        conditions = Conditions.reference(self.case.prompts, len(OBJECTIVES))
        # The slots of a GPU multiply the factors by zero; elsewhere they are left out.
        return self._ours(self.policy, conditions, torch.zeros(self.case.prompts, len(OBJECTIVES)))

    def _ours(self, policy, conditions, coefficients: torch.Tensor, low_rank: bool = False) -> Decoder:
        from clp_engine.rollouts.rollout import rollout
        from clp_engine.rollouts.types import SamplingParams

        def call(checked: bool) -> Written:
            with timed_parts(policy, self.phases), self.phases("decode"):
                drawn = rollout(
                    policy,
                    self.prompts,
                    conditions,
                    num_generations=self.case.group,
                    sampling=SamplingParams(max_new_tokens=self.case.new),
                    seed=SEED,
                )
            self._check_length(drawn.completion_ids)
            return Written(self.phases.drain(), drawn.completion_ids, drawn.logprobs)

        return Decoder(call, coefficients, low_rank)

    def _check_length(self, tokens: torch.Tensor) -> None:
        expected = (self.case.rows, self.case.new)
        if tuple(tokens.shape) != expected:
            raise RuntimeError(f"wrote {tuple(tokens.shape)} tokens instead of {expected}: not comparable")

    def _generate(self, options: Mapping, model=None, low_rank: bool = False) -> Decoder:
        """transformers' generate, drawing from the whole distribution, as many rows to a prompt as there are in a group."""
        from transformers import StoppingCriteria

        model = self.merged.model if model is None else model
        case, phases = self.case, self.phases

        class FirstToken(StoppingCriteria):
            """Tells where the prefill ends."""

            def __init__(self):
                self.at = None

            def __call__(self, ids, scores, **_):
                self.at = self.at or phases.now()
                return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

        def call(checked: bool) -> Written:
            first, start = FirstToken(), phases.now()
            with torch.no_grad():
                found = model.generate(
                    input_ids=self.ids,
                    attention_mask=torch.ones_like(self.ids),
                    do_sample=True,
                    temperature=1.0,
                    top_k=0,
                    top_p=1.0,
                    min_new_tokens=case.new,
                    max_new_tokens=case.new,
                    num_return_sequences=case.group,
                    stopping_criteria=[first],
                    pad_token_id=1,
                    return_dict_in_generate=True,
                    output_logits=checked,
                    **options,
                )
            end = phases.now()
            tokens = found.sequences[:, case.prompt :]
            self._check_length(tokens)
            seconds = {"prefill": first.at - start, "decode": end - first.at}
            if not checked:
                return Written(seconds)
            log_p = torch.stack(found.logits, 1).float().log_softmax(-1)
            return Written(seconds, tokens, log_p.gather(-1, tokens[..., None])[..., 0])

        return Decoder(call, self.policy.coefficients(self.conditions(1)), low_rank, peer=True)

    def _peft(self) -> Decoder:
        from peft import PeftModel

        base = base_model(self.case.model, self.case.device)
        with tempfile.TemporaryDirectory() as folder:
            self.policy.export_adapter(folder, self.weightings[:1])
            model = PeftModel.from_pretrained(base, folder).eval()
        return self._generate({}, model, low_rank=True)

    def errors(self, decoder: Decoder) -> dict[str, schema.Error]:
        """Of the first and the last row's log-probs."""
        written = decoder.call(True)
        own, plain, exact = [], [], []
        for row in (0, self.case.rows - 1):
            prompt = row // self.case.group
            ids = torch.cat([self.ids[prompt], written.tokens[row]]).unsqueeze(0)
            arguments = self.policy, decoder.coefficients[prompt], ids, self.case.prompt
            exact.append(decoder_truth.log_probs(*arguments, torch.float64)[0])
            plain.append(decoder_truth.log_probs(*arguments, getattr(torch, self.case.dtype))[0])
            own.append(written.logprobs[row])
        own, plain, exact = ({"logprob": torch.cat(rows)} for rows in (own, plain, exact))
        return accuracy.errors(own, plain, exact)


@contextmanager
def timed_parts(policy, phases: Phases) -> Iterator[None]:
    """Inside, what a rollout of the policy sets up and what it reads of prompts are phases of their own."""
    from clp_engine.rollouts.engines import choice
    from clp_engine.rollouts.engines.base import DecoderRequest, Stepwise

    def decoder(request):
        with phases("set-up"):
            made = choice.step_decoder(DecoderRequest.of(request))
        phases.time_methods(made, {"add": "prefill"})
        return made

    policy.engine = Stepwise(decoder)
    try:
        yield
    finally:
        del policy.engine


def base_model(name: str, device: str):
    """The model of that name, without an end token: every row runs to its full length."""
    model = load_model(name, device).eval()
    model.generation_config.eos_token_id = model.config.eos_token_id = None
    return model


def make_policy(name: str, device: str):
    """With random deltas."""
    from clp_engine.policy.policy import ConditionedPolicy

    policy = ConditionedPolicy.from_pretrained(base_model(name, device), OBJECTIVES, rank=RANK)
    uniform = torch.full((len(OBJECTIVES),), 1.0 / len(OBJECTIVES), device=device)
    generator = torch.Generator(device).manual_seed(SEED)
    with torch.no_grad():
        for layer in policy.layers.values():
            layer.lora_b.normal_(generator=generator)
            layer.lora_b *= CHANGE * layer.weight.float().norm() / layer.weight_delta(uniform).norm()
    return policy


def without_adapters(model):
    """A policy whose layers are the model's own: what decoding costs where nothing is conditioned."""
    from clp_engine.models.blend import place
    from clp_engine.policy.policy import ConditionedPolicy

    policy = ConditionedPolicy.from_pretrained(model, ("none",), conditioning="none", rank=1)
    place(policy.model, {name: layer.base for name, layer in policy.layers.items()})
    policy.layers = {}
    return policy
