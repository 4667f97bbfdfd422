"""ConditionedPolicy: a language model whose parameters are blended, per row, by a reward weighting and a KL coefficient.

    theta(w, alpha) = theta_ref + c(alpha) * sum_i w_i * Delta_i,      Delta_i = s_i B_i A_i on the conditioned layers

(Conditioned Language Policy, parameter-space conditioning.) Rows of one batch may have different (w, alpha); a row whose
blend is zero is the reference model.
"""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from clp_kernels import HeadLoRA, TokenStats, linear_logprob
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PreTrainedModel,
)

from clp_engine import peft_format
from clp_engine.adapters import Blend, ConditionedLinear, attach, detach, find_targets, place
from clp_engine.backbone import make_backbone
from clp_engine.conditions import KL_CONDITIONING, Conditions, blend_coefficients, parse_weights
from clp_engine.errors import ConfigError
from clp_engine.files import write_directory
from clp_engine.rollout import BlendDecoding, Decoding, Rollout, SamplingParams, rollout
from clp_engine.scoring import completion_hidden

_SPEC_FILE, _ADAPTER_FILE = "clp_config.json", "adapters.safetensors"


@dataclass(frozen=True)
class PolicySpec:
    """What makes a policy of a base model: saved beside the adapters, enough to build it again.

    base_model: name or path as given; objectives: names in order; ranks, lora_alphas: one per objective;
    target_modules: exact layer names; min_kl: the smallest KL coefficient of training, for kl_conditioning "odds";
    kl_is_beta: whether `kl` means beta (objective w.R - beta KL) instead of alpha ((1 - alpha) w.R - alpha KL);
    default_kl: the KL coefficient a row has where none is asked for.
    """

    base_model: str
    objectives: tuple[str, ...]
    ranks: tuple[int, ...]
    lora_alphas: tuple[float, ...]
    target_modules: tuple[str, ...]
    conditioning: str = "lora"
    kl_conditioning: str = "none"
    min_kl: float | None = None
    default_kl: float = 0.1
    kl_is_beta: bool = False

    @property
    def scalings(self) -> tuple[float, ...]:
        return tuple(alpha / rank for alpha, rank in zip(self.lora_alphas, self.ranks))


def _per_objective(value, objectives: Sequence[str], name: str) -> tuple:
    values = tuple(value) if isinstance(value, Sequence) else (value,) * len(objectives)
    if len(values) != len(objectives):
        raise ConfigError(
            f"{name} has {len(values)} entries for {len(objectives)} objectives ({', '.join(objectives)})"
        )
    return values


class ConditionedPolicy(nn.Module):
    """A causal or encoder-decoder language model with one LoRA adapter per objective on its linear layers, blended per row.

    Build with `from_pretrained` or `load`. The base model is frozen and always in evaluation mode: dropout would make the
    log-probs of rollout and training those of different networks.
    """

    def __init__(self, model: PreTrainedModel, spec: PolicySpec, tokenizer=None, seed: int = 0):
        super().__init__()
        self.spec, self.tokenizer = spec, tokenizer
        self.blend = Blend()
        self.model = model.requires_grad_(False).eval()
        self.backbone = make_backbone(model)
        self.backbone.check_head()
        self.layers = attach(model, spec.target_modules, spec.ranks, spec.scalings, seed, self.blend)
        self.backbone = make_backbone(model)  # the head may have been wrapped

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | PreTrainedModel,
        objectives: Sequence[str],
        *,
        conditioning: str = "lora",
        rank: int | Sequence[int] = 16,
        lora_alpha: float | Sequence[float] | None = None,
        target_modules: str | Sequence[str] | None = None,
        kl_conditioning: str = "none",
        min_kl: float | None = None,
        default_kl: float = 0.1,
        kl_is_beta: bool = False,
        tokenizer=None,
        dtype: torch.dtype | str | None = None,
        device: str | torch.device | None = None,
        seed: int = 0,
    ) -> ConditionedPolicy:
        """A policy that starts as `name_or_path` for every weighting.

        name_or_path: a model name, directory, "docsum" (the model shipped with the engine), or a loaded transformers causal
            or encoder-decoder language model whose projections are nn.Linear or GPT-2's Conv1D; it is wrapped in place.
        objectives: their names, in the order of weight vectors.
        rank, lora_alpha: one for all or one per objective; the update is scaled by lora_alpha / rank (lora_alpha: 2 * rank).
        target_modules: as in PEFT; None is every linear layer but the output projection.
        kl_conditioning, min_kl: see `conditions.blend_coefficients`. kl_is_beta, default_kl: see `PolicySpec`.
        dtype: float32 on a CPU and the checkpoint's own elsewhere, if None. seed: of the adapters' start.
        Raises ConfigError for an unknown conditioning, layer name, or a model that cannot be conditioned.
        """
        objectives = tuple(objectives)
        if not objectives or len(set(objectives)) != len(objectives):
            raise ConfigError(f"objectives={list(objectives)}: expected at least one name, no name twice")
        if conditioning != "lora":
            raise ConfigError(f"conditioning={conditioning!r}: expected 'lora'")
        if kl_conditioning not in KL_CONDITIONING:
            raise ConfigError(
                f"kl_conditioning={kl_conditioning!r}: expected one of {', '.join(KL_CONDITIONING)}"
            )
        ranks = _per_objective(rank, objectives, "rank")
        if not all(isinstance(r, int) and r > 0 for r in ranks):
            raise ConfigError(f"rank={rank!r}: expected a positive integer, or one per objective")
        alphas = (
            tuple(2.0 * r for r in ranks)
            if lora_alpha is None
            else tuple(map(float, _per_objective(lora_alpha, objectives, "lora_alpha")))
        )
        model, tokenizer, base = _load_base(name_or_path, tokenizer, dtype, device)
        spec = PolicySpec(
            base,
            objectives,
            ranks,
            alphas,
            tuple(find_targets(model, target_modules)),
            conditioning,
            kl_conditioning,
            min_kl,
            default_kl,
            kl_is_beta,
        )
        return cls(model, spec, tokenizer, seed)

    # -- what it is ---------------------------------------------------------------------------------------------------

    @property
    def objectives(self) -> tuple[str, ...]:
        return self.spec.objectives

    @property
    def kl_is_beta(self) -> bool:
        return self.spec.kl_is_beta

    @property
    def config(self):
        return self.model.config

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def stop_token_ids(self) -> list[int]:
        """End tokens of the generation config and the tokenizer; generation stops at any of them."""
        ids = []
        for source in (self.model.generation_config, self.model.config, self.tokenizer):
            value = getattr(source, "eos_token_id", None)
            ids += value if isinstance(value, list) else [] if value is None else [value]
        return sorted(set(ids))

    @property
    def pad_token_id(self) -> int:
        for source in (self.tokenizer, self.model.generation_config, self.model.config):
            if (value := getattr(source, "pad_token_id", None)) is not None:
                return value
        return (self.stop_token_ids or [0])[0]

    def train(self, mode: bool = True) -> ConditionedPolicy:
        """Keeps the model in evaluation mode (no dropout); the adapters have no mode of their own."""
        self.training = mode
        return self

    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        """Trainable parameters by '<layer>.lora_a' and '<layer>.lora_b'."""
        return {
            f"{name}.{part}": getattr(layer, part)
            for name, layer in self.layers.items()
            for part in ("lora_a", "lora_b")
        }

    # -- conditions ---------------------------------------------------------------------------------------------------

    def conditions(self, weights=None, kl=None, rows: int = 1) -> Conditions:
        """Per-row conditions from what a user writes.

        weights: a mapping by name, a sequence of M numbers, a list of either with one per row, a (rows, M) tensor, or None
        (uniform). kl: a number, one per row, or None (`spec.default_kl`). Raises ConfigError naming what is wrong.
        """
        per_row = (
            isinstance(weights, torch.Tensor)
            and weights.dim() == 2
            or isinstance(weights, Sequence)
            and weights
            and not isinstance(weights[0], int | float)
        )
        try:
            parsed = [parse_weights(w, self.objectives) for w in (weights if per_row else [weights])]
        except ValueError as error:
            raise ConfigError(str(error)) from None
        kls = torch.as_tensor(self.spec.default_kl if kl is None else kl, dtype=torch.float32).reshape(-1)
        for name, count in (("weights", len(parsed)), ("kl", len(kls))):
            if count not in (1, rows):
                raise ConfigError(f"{name} has {count} entries for {rows} rows; expected one, or one per row")
        if not bool((kls >= 0).all()) or not self.kl_is_beta and bool((kls > 1).any()):
            raise ConfigError(
                f"kl={kl!r}: expected {'beta >= 0' if self.kl_is_beta else 'alpha between 0 and 1'}"
            )
        return Conditions(torch.stack(parsed).expand(rows, -1), kls.expand(rows))

    def coefficients(self, conditions: Conditions | None) -> torch.Tensor | None:
        """The blend (rows, M) on the model's device, or None where every row is the reference."""
        if conditions is None or not bool(conditions.weights.any()):
            return None
        return blend_coefficients(
            conditions, self.spec.kl_conditioning, min_kl=self.spec.min_kl, kl_is_beta=self.kl_is_beta
        ).to(self.device)

    @contextlib.contextmanager
    def blended(self, conditions: Conditions | None) -> Iterator[None]:
        """Inside, row i of every batch runs under conditions[i]; None is the base model."""
        with self.blend.use(self.coefficients(conditions)):
            yield

    # -- computing ----------------------------------------------------------------------------------------------------

    def forward(
        self,
        input_ids: torch.Tensor,
        *args,
        weights=None,
        kl=None,
        conditions: Conditions | None = None,
        **kwargs,
    ):
        """The transformers model's forward, row i under its own (w, kl): give `conditions`, or `weights` and `kl` as for
        `conditions()`; an encoder-decoder takes `decoder_input_ids=` beside input_ids."""
        conditions = conditions or self.conditions(weights, kl, input_ids.shape[0])
        with self.blended(conditions):
            return self.model(input_ids, *args, **kwargs)

    def completion_hidden(self, batch: Rollout, conditions: Conditions | None) -> torch.Tensor:
        """(B, T, H): the hidden state that predicts each completion token; the prompt of a group is computed once.

        conditions: one row per prompt, or None for the base model. Differentiable in the adapters.
        """
        return completion_hidden(self, batch, self.coefficients(conditions))

    def decoding(
        self,
        prompt_ids: torch.Tensor,
        prompt_mask: torch.Tensor,
        conditions: Conditions,
        group: int,
        room: int,
    ) -> Decoding:
        """What `rollout` draws from: `group` rows of each prompt (P, S) under its condition, at most `room` tokens each."""
        return BlendDecoding(self, prompt_ids, prompt_mask, self.coefficients(conditions), group, room)

    def token_stats(
        self,
        hidden: torch.Tensor,
        targets: torch.Tensor,
        *,
        ref_hidden: torch.Tensor | None = None,
        conditions: Conditions | None = None,
        temperature: float = 1.0,
        outputs: Sequence[str] = ("logprob",),
    ) -> TokenStats:
        """`linear_logprob` through this model's output projection; hidden (rows, H), targets (rows,).

        conditions: one per row, needed only where the output projection itself is conditioned.
        """
        head = self.backbone.head
        lora = None
        if (
            isinstance(head.module, ConditionedLinear)
            and (blend := self.coefficients(conditions)) is not None
        ):
            with self.blend.use(blend):
                gate = self.blend.gate(head.module.ranks, head.module.scalings)
            lora = HeadLoRA(head.module.lora_a.to(hidden.dtype), head.module.lora_b.to(hidden.dtype), gate)
        return linear_logprob(
            hidden,
            head.module.weight,
            targets,
            bias=head.bias,
            temperature=temperature,
            softcap=head.softcap,
            logit_scale=head.logit_scale,
            ref_hidden=ref_hidden,
            lora=lora,
            outputs=tuple(outputs),
        )

    def generate(
        self,
        prompts: str | Sequence[str],
        weights=None,
        kl=None,
        *,
        max_new_tokens: int = 128,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        num_return_sequences: int = 1,
        seed: int = 0,
    ) -> list:
        """Completions of prompts, each under its own weighting.

        prompts: texts; weights, kl: one for all or one per prompt (see `conditions`). Returns one string per prompt, or one
        list of `num_return_sequences` strings per prompt where more than one was asked for.
        """
        if self.tokenizer is None:
            raise ConfigError("this policy has no tokenizer; give one to from_pretrained(tokenizer=...)")
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        encoded = [self.tokenizer(p).input_ids for p in prompts]
        drawn = rollout(
            self,
            encoded,
            self.conditions(weights, kl, len(prompts)),
            num_generations=num_return_sequences,
            sampling=SamplingParams(max_new_tokens, temperature, top_k, top_p, min_p),
            seed=seed,
        )
        texts = self.tokenizer.batch_decode(drawn.token_lists(), skip_special_tokens=True)
        if num_return_sequences == 1:
            return texts
        return [texts[i : i + num_return_sequences] for i in range(0, len(texts), num_return_sequences)]

    # -- saving -------------------------------------------------------------------------------------------------------

    def save_pretrained(self, directory: str | Path) -> None:
        """Write the adapters and what is needed to build the policy again from its base model; atomic."""
        with write_directory(directory) as temporary:
            spec = json.dumps(asdict(self.spec), indent=2) + "\n"
            (temporary / _SPEC_FILE).write_text(spec, encoding="utf-8")
            save_file(
                {n: p.detach().cpu().contiguous() for n, p in self.adapter_parameters().items()},
                temporary / _ADAPTER_FILE,
            )
            if self.tokenizer is not None:
                self.tokenizer.save_pretrained(temporary)

    @classmethod
    def load(
        cls,
        directory: str | Path,
        *,
        base_model: str | PreTrainedModel | None = None,
        dtype: torch.dtype | str | None = None,
        device: str | torch.device | None = None,
    ) -> ConditionedPolicy:
        """The policy that `save_pretrained` wrote; base_model: where the base is now, if it has moved."""
        directory = Path(directory)
        if not (directory / _SPEC_FILE).is_file():
            raise ConfigError(
                f"{directory}: no {_SPEC_FILE} here; expected a directory written by save_pretrained"
            )
        raw = json.loads((directory / _SPEC_FILE).read_text(encoding="utf-8"))
        spec = PolicySpec(**{k: tuple(v) if isinstance(v, list) else v for k, v in raw.items()})
        tokenizer = (
            AutoTokenizer.from_pretrained(directory)
            if (directory / "tokenizer_config.json").is_file()
            else None
        )
        model, tokenizer, _ = _load_base(base_model or spec.base_model, tokenizer, dtype, device)
        policy = cls(model, spec, tokenizer)
        policy.load_adapters(load_file(directory / _ADAPTER_FILE))
        return policy

    def load_adapters(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Set every adapter parameter; raises ConfigError where names or shapes differ from this policy's."""
        own = self.adapter_parameters()
        if own.keys() != tensors.keys():
            odd = sorted(own.keys() ^ tensors.keys())
            raise ConfigError(f"adapters do not fit this policy: {len(odd)} names differ, such as {odd[0]!r}")
        with torch.no_grad():
            for name, parameter in own.items():
                if parameter.shape != tensors[name].shape:
                    raise ConfigError(
                        f"adapter {name}: shape {tuple(tensors[name].shape)}, expected {tuple(parameter.shape)}"
                    )
                parameter.copy_(tensors[name])

    def export_adapter(self, path: str | Path, weights=None, kl=None) -> None:
        """Write one blend as an ordinary PEFT LoRA adapter of rank R = sum of ranks (A stacked, B scaled by the blend):
        exactly this policy at (weights, kl), for peft, transformers and other stacks to load."""
        coefficients = self.coefficients(self.conditions(weights, kl))
        task = "SEQ_2_SEQ_LM" if self.config.is_encoder_decoder else "CAUSAL_LM"
        peft_format.save(path, self.spec, self.layers, coefficients[0], task)
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(path)

    def merge(self, weights=None, kl=None) -> PreTrainedModel:
        """An ordinary transformers model whose weights are the blend at (weights, kl); this policy is left as it was."""
        coefficients = self.coefficients(self.conditions(weights, kl))[0]
        detach(self.model, self.layers)
        try:
            merged = copy.deepcopy(self.model)
        finally:
            place(self.model, self.layers)
        with torch.no_grad():
            for name, layer in self.layers.items():
                weight = merged.get_submodule(name).weight
                delta = layer.delta(coefficients)
                weight.copy_(weight.float() + (delta.t() if layer.transposed else delta))
        return merged


def _resolve(name_or_path: str | Path) -> str | Path:
    """A shipped model by its task's name; everything else as it is."""
    if str(name_or_path) == "docsum" and not Path(name_or_path).exists():
        from clp_engine.tasks import docsum

        return docsum.checkpoint_path()
    return name_or_path


def _load_base(name_or_path, tokenizer, dtype, device) -> tuple[PreTrainedModel, object, str]:
    """(model, tokenizer, name to save)."""
    if isinstance(name_or_path, PreTrainedModel):
        model = name_or_path
        if device is not None:
            model = model.to(device)
        return model, tokenizer, model.config.name_or_path or ""
    path = _resolve(name_or_path)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    try:
        encoder_decoder = getattr(AutoConfig.from_pretrained(path), "is_encoder_decoder", False)
        model = (AutoModelForSeq2SeqLM if encoder_decoder else AutoModelForCausalLM).from_pretrained(
            path, dtype=dtype or (torch.float32 if device.type == "cpu" else "auto")
        )
        if tokenizer is None:
            tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"cannot load the model {str(name_or_path)!r}: {reason}") from error
    return model.to(device), tokenizer, str(name_or_path)
