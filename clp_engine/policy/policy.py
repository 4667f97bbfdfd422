"""ConditionedPolicy: a language model whose parameters are blended, per row, by a reward weighting and a KL coefficient.

    theta(w, alpha) = theta_ref + c(alpha) * sum_i w_i * Delta_i

(Conditioned Language Policy, parameter-space conditioning.) What Delta_i is, `models.forms` says: low-rank factors s_i B_i A_i
on linear layers, whole weights, those of attention, or of the output projection. Rows of one batch may have different
(w, alpha); a row whose blend is zero is the reference model.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from clp_kernels import TokenStats, interpolate
from safetensors.torch import save_file
from transformers import AutoTokenizer, PreTrainedModel

from clp_engine.core import ranges, records
from clp_engine.core.conditions import (
    KL_CONDITIONING,
    Conditions,
    blend_coefficients,
    check_objectives,
    parse_weights,
)
from clp_engine.core.errors import ConfigError, shown
from clp_engine.core.files import finish, read_json, read_tensors, refuse_overlap, write_directory
from clp_engine.core.positions import Room
from clp_engine.core.sizes import check_size
from clp_engine.models import fingerprint
from clp_engine.models.base import holds_adapters, load_base, same_weights
from clp_engine.models.conditioned import ConditionedModel
from clp_engine.models.forms import Conditioning
from clp_engine.models.targets import lora_targets, untie
from clp_engine.policy import attached, prompt_conditioning
from clp_engine.policy.peft import warm_start, writing
from clp_engine.policy.peft.reading import Adapter
from clp_engine.rollouts import texts
from clp_engine.rollouts.scoring import hidden_states
from clp_engine.rollouts.types import Profile, Rollout

_SPEC_FILE, _ADAPTER_FILE = "clp_config.json", "adapters.safetensors"


@dataclass(frozen=True)
class PolicySpec:
    """What makes a policy of a base model: saved beside the adapters, enough to build it again.

    base_model: name or path as given; objectives: names in order; ranks, lora_alphas: one per delta;
    target_modules: exact names of the layers with low-rank factors; conditioning, carrier: see `models.forms`;
    min_kl: the smallest KL coefficient of training, for kl_conditioning "odds";
    kl_is_beta: whether `kl` means beta (objective w.R - beta KL) instead of alpha ((1 - alpha) w.R - alpha KL);
    default_kl: the KL coefficient a row has where none is asked for.
    prompt_template: what prompt conditioning writes into the prompt, see `prompt_conditioning`; None where it does not.
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
    carrier: str = "lora"
    prompt_template: str | None = None

    @property
    def scalings(self) -> tuple[float, ...]:
        return tuple(alpha / rank for alpha, rank in zip(self.lora_alphas, self.ranks))


def _read_spec(path: Path) -> PolicySpec:
    raw = read_json(path)
    names = {field.name for field in dataclasses.fields(PolicySpec)}
    if unknown := sorted(set(raw) - names):
        raise ConfigError(
            f"{path} has settings this version does not know ({', '.join(unknown)}); it was written by a newer one"
        )
    spec = records.of(PolicySpec, raw, path, "write or copy the policy again")
    try:
        ranges.ADAPTER["rank"].check("ranks", spec.ranks, several=ranges.LISTS)
        ranges.ADAPTER["lora_alpha"].check("lora_alphas", spec.lora_alphas, several=ranges.LISTS)
        ranges.check(ranges.ADAPTER, default_kl=spec.default_kl)
    except ConfigError as error:
        raise ConfigError(f"{path} is damaged ({error}); write or copy the policy again") from error
    return spec


def _per_delta(value, deltas: Sequence[str], name: str) -> tuple:
    """One value for each delta; `deltas` are the objectives they belong to, or one name where there is a single one."""
    values = tuple(value) if isinstance(value, Sequence) else (value,) * len(deltas)
    if len(values) != len(deltas):
        raise ConfigError(
            f"{name} has {len(values)} entries for {len(deltas)} objectives ({', '.join(deltas)})"
        )
    return values


class ConditionedPolicy(ConditionedModel):
    """A causal or encoder-decoder language model with one delta per objective, blended per row.

    Build with `from_pretrained` or `load`. The base model is frozen and always in evaluation mode: dropout would make the
    log-probs of rollout and training those of different networks.
    """

    def __init__(self, model: PreTrainedModel, spec: PolicySpec, tokenizer=None, seed: int = 0):
        conditioning = Conditioning.parse(spec.conditioning, spec.carrier)
        if tokenizer is not None:  # before anything is done to the model
            Room.of(model).check_tokenizer(tokenizer)
        super().__init__(model, conditioning, spec.target_modules, spec.ranks, spec.scalings, seed)
        self.spec, self._tokenizer = spec, tokenizer
        self.loaded_from: list[Path] = []  # folders of adapters

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | PreTrainedModel,
        objectives: Sequence[str],
        *,
        conditioning: str = "lora",
        rank: int | Sequence[int] | None = None,
        lora_alpha: float | Sequence[float] | None = None,
        target_modules: str | Sequence[str] | Callable[[PreTrainedModel], list[str]] | None = None,
        kl_conditioning: str = "none",
        min_kl: float | None = None,
        default_kl: float = 0.1,
        kl_is_beta: bool = False,
        carrier: str = "lora",
        prompt_template: str | None = None,
        tokenizer=None,
        dtype: torch.dtype | str | None = None,
        device: str | torch.device | None = None,
        attention: str | None = None,
        seed: int = 0,
    ) -> ConditionedPolicy:
        """A policy that starts as `name_or_path` for every weighting.

        name_or_path: a model name, directory, "docsum" (the model shipped with the engine), or a loaded transformers causal
            or encoder-decoder language model whose projections are nn.Linear or GPT-2's Conv1D; it is wrapped in place.
            Of a PeftModel, each objective begins at the adapter of its name, or all of them at a single one; the adapters are
            taken out of the model (see `from_adapters` for other names). The reference is the base model without them.
        objectives: their names, in the order of weight vectors.
        conditioning: "lora", "full", "attention", "logit", "prompt", "none", or several joined by "+"; see `models.forms`.
        carrier: which parameters are trained where conditioning is "prompt" or "none".
        rank, lora_alpha: of "lora" and "logit", one for all or one per objective; the update is scaled by lora_alpha / rank
            (rank: 16, lora_alpha: 2 * rank; of a PeftModel its own). An output projection with a rank of the hidden size or
            more is trained whole, unscaled.
        target_modules: of "lora", as in PEFT, or a function of the model that gives names; None is every linear layer but the
            output projection.
        prompt_template: of "prompt", text with {weights} and, where the KL coefficient varies, {kl}; see `prompt_conditioning`.
        kl_conditioning, min_kl: see `conditions.blend_coefficients`. kl_is_beta, default_kl: see `PolicySpec`.
        dtype: float32 on a CPU and the checkpoint's own elsewhere, if None. attention: transformers' attn_implementation, where
            the model is loaded here. seed: of the adapters' start.
        Raises ConfigError for an unknown conditioning, layer name, or a model that cannot be conditioned.
        """
        if holds_adapters(name_or_path):
            if lora_alpha is not None:
                raise ConfigError(
                    f"lora_alpha={lora_alpha!r} was given with a model that holds adapters, which have their own; leave it out"
                )
            base, adapters = warm_start.of_model(name_or_path, objectives)
            return cls.from_adapters(
                base,
                adapters,
                conditioning=None if conditioning == "lora" else conditioning,
                rank=rank,
                target_modules=target_modules,
                kl_conditioning=kl_conditioning,
                min_kl=min_kl,
                default_kl=default_kl,
                kl_is_beta=kl_is_beta,
                carrier=carrier,
                prompt_template=prompt_template,
                tokenizer=tokenizer,
                dtype=dtype,
                device=device,
                seed=seed,
            )
        objectives = tuple(objectives)
        check_objectives(objectives)
        parsed = Conditioning.parse(conditioning, carrier)
        if prompt_template is not None and not parsed.prompt:
            raise ConfigError(
                f"prompt_template was given with conditioning={conditioning!r}, which writes no prompt"
            )
        if parsed.prompt:
            prompt_template = prompt_template or prompt_conditioning.DEFAULT_TEMPLATE
            prompt_conditioning.check_template(prompt_template)
        if kl_conditioning not in KL_CONDITIONING:
            raise ConfigError(
                f"kl_conditioning={kl_conditioning!r}: expected one of {', '.join(KL_CONDITIONING)}"
            )
        deltas = objectives if parsed.blended else ("one delta for all",)
        ranks = _per_delta(warm_start.DEFAULT_RANK if rank is None else rank, deltas, "rank")
        for r in ranks:
            ranges.check(ranges.ADAPTER, rank=r)
        ranges.check(ranges.ADAPTER, default_kl=default_kl)
        if min_kl is not None:
            ranges.check(ranges.ADAPTER, min_kl=min_kl)
        alphas = tuple(2.0 * r for r in ranks)
        if lora_alpha is not None:
            alphas = _per_delta(lora_alpha, deltas, "lora_alpha")
            for value in alphas:
                ranges.check(ranges.ADAPTER, lora_alpha=value)
            alphas = tuple(map(float, alphas))
        model, tokenizer, base = load_base(name_or_path, tokenizer, dtype, device, attention)
        spec = PolicySpec(
            base,
            objectives,
            ranks,
            alphas,
            tuple(lora_targets(model, parsed, target_modules)),
            conditioning,
            kl_conditioning,
            min_kl,
            default_kl,
            kl_is_beta,
            carrier,
            prompt_template,
        )
        head = model.get_output_embeddings()  # a rank beyond the hidden size makes it whole
        layers = [layer for name in spec.target_modules if (layer := model.get_submodule(name)) is not head]
        check_size(
            f"rank={max(ranks):,} for {len(deltas)} deltas",
            4 * sum(ranks) * sum(sum(layer.weight.shape) for layer in layers),
            model.device,
        )
        return cls(model, spec, tokenizer, seed)

    @classmethod
    def from_adapters(
        cls,
        base: str | PreTrainedModel,
        adapters: Mapping[str, str | Path | Adapter | None] | str | Path,
        **options,
    ) -> ConditionedPolicy:
        """A policy whose objectives begin at PEFT's LoRA adapters: a Rewarded Soup of them as it is, or the start of a run.

        base: as `name_or_path` of `from_pretrained`. adapters: by objective, in the order of weight vectors, a directory (or
            repository of the hub) with adapter_config.json and adapter_model.safetensors, or None for an objective that begins
            at the base model; or the one directory that `save_adapters` wrote, whose settings are then the defaults of
            `options`. Ranks, alphas (rsLoRA, patterns) and layers may differ: where an objective's adapter has a lower rank
            than elsewhere, or no delta, it gets further directions that start at zero, see `warm_start`.
        options: as those of `from_pretrained`, but for lora_alpha. conditioning: by default "lora", with "logit" where an
            adapter is on the output projection; rank: at least the adapter's, by default that, and 16 for None;
            target_modules: layers to have deltas beside those of the adapters.
        Raises ConfigError for an adapter that is no plain LoRA (DoRA, modules_to_save, biases, embeddings, ...) or was trained
        on another model; warns of dropout, which is left out, and of an adapter that names another base model.
        """
        return warm_start.build(cls, base, adapters, **options)

    @classmethod
    def from_specialists(
        cls, specialists: Sequence[ConditionedPolicy], objectives: Sequence[str] | None = None
    ) -> ConditionedPolicy:
        """Rewarded Soups (Rame et al., 2023): the deltas of models fine-tuned one by one become the deltas of one policy,
        theta(w) = theta_ref + sum_i w_i Delta_i.

        specialists: policies with conditioning "none", one per objective, of one base model and carrier; their
            adapters are copied.
        objectives: names of the new policy's objectives; by default those of the specialists, if there are as many.
        Raises ConfigError where the specialists do not fit together.
        """
        if not specialists:
            raise ConfigError("no specialists were given; expected one per objective")
        first = specialists[0]
        objectives = tuple(first.objectives if objectives is None else objectives)
        if len(objectives) != len(specialists):
            raise ConfigError(
                f"{len(specialists)} specialists for {len(objectives)} objectives ({', '.join(objectives)}); expected one each"
            )
        for specialist in specialists:
            spec = specialist.spec
            if specialist.conditioning.blended or specialist.conditioning.prompt:
                raise ConfigError(
                    f"a specialist has conditioning='none'; one of these has {spec.conditioning!r}"
                )
            for name in ("base_model", "carrier", "kl_conditioning", "kl_is_beta"):
                ours, theirs = getattr(first.spec, name), getattr(spec, name)
                if ours != theirs:
                    raise ConfigError(
                        "the specialists must have the same base model, carrier and form of the KL coefficient; "
                        f"{name} is {ours!r} and {theirs!r}"
                    )
            if specialist.adapter_parameters().keys() != first.adapter_parameters().keys():
                raise ConfigError(
                    "the specialists' deltas lie on different layers, or one has a whole output projection "
                    "and another has factors"
                )
            if not spec.base_model and not same_weights(specialist.model, first.model):
                raise ConfigError("the specialists were trained from models whose weights differ")
        spec = dataclasses.replace(
            first.spec,
            objectives=objectives,
            conditioning=first.spec.carrier,
            carrier="lora",
            ranks=tuple(s.spec.ranks[0] for s in specialists),
            lora_alphas=tuple(s.spec.lora_alphas[0] for s in specialists),
        )
        policy = cls(first.plain_copy(), spec, first.tokenizer)
        theirs = [s.adapter_parameters() for s in specialists]
        with torch.no_grad():
            for name, parameter in policy.adapter_parameters().items():
                layer, _, part = name.rpartition(".")
                parts = [parameters[name] for parameters in theirs]
                parameter.copy_(torch.cat(parts, policy.layers[layer].delta_dim(part)))
        policy.loaded_from = [folder for s in specialists for folder in s.loaded_from]
        return policy

    engine = None  # what draws from it, see `rollouts.types.RolloutEngine`; None: the fastest that serves

    # -- what it is ---------------------------------------------------------------------------------------------------

    @property
    def objectives(self) -> tuple[str, ...]:
        return self.spec.objectives

    @property
    def kl_is_beta(self) -> bool:
        return self.spec.kl_is_beta

    @property
    def tokenizer(self):
        """Setting it raises ConfigError where its special tokens have no embedding, see `positions.Room.check_tokenizer`."""
        return self._tokenizer

    @tokenizer.setter
    def tokenizer(self, tokenizer) -> None:
        if tokenizer is not None:
            self.room.check_tokenizer(tokenizer)
        self._tokenizer = tokenizer

    @property
    def conditioned(self) -> ConditionedModel:
        return self

    @property
    def profile(self) -> Profile:
        """What a caller must know before it asks for completions."""
        spec = self.spec
        return Profile(
            spec.objectives,
            spec.kl_is_beta,
            spec.default_kl,
            spec.base_model,
            self.tokenizer,
            self.pad_token_id,
            self.stop_token_ids,
            self.room,
        )

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
        except (TypeError, OverflowError) as error:
            raise ConfigError(f"weights={shown(weights)}: expected numbers from 0 to 1 ({error})") from None
        try:
            kls = torch.as_tensor(self.spec.default_kl if kl is None else kl, dtype=torch.float32).reshape(-1)
        except (TypeError, ValueError, OverflowError, RuntimeError) as error:
            raise ConfigError(f"kl={shown(kl)}: expected a number, or one per row ({error})") from None
        for name, count in (("weights", len(parsed)), ("kl", len(kls))):
            if count not in (1, rows):
                raise ConfigError(f"{name} has {count} entries for {rows} rows; expected one, or one per row")
        if not bool(((kls >= 0) & kls.isfinite()).all()) or not self.kl_is_beta and bool((kls > 1).any()):
            raise ConfigError(
                f"kl={shown(kl)}: expected {'beta >= 0' if self.kl_is_beta else 'alpha between 0 and 1'}"
            )
        return Conditions(torch.stack(parsed).expand(rows, -1), kls.expand(rows))

    def coefficients(self, conditions: Conditions | None) -> torch.Tensor | None:
        """The blend (rows, D) on the model's device, a coefficient per delta, or None where every row is the reference."""
        if conditions is None or not bool(conditions.weights.any()):
            return None
        if not self.conditioning.blended:
            conditions = Conditions(conditions.weights.any(-1, keepdim=True).float(), conditions.kl)
        try:
            blend = blend_coefficients(
                conditions, self.spec.kl_conditioning, min_kl=self.spec.min_kl, kl_is_beta=self.kl_is_beta
            )
        except ValueError as error:
            raise ConfigError(str(error)) from None
        return blend.to(self.device)

    def prompt_text(self, weights=None, kl=None) -> str:
        """What prompt conditioning writes into a prompt at one weighting; empty for other policies."""
        return self._prompt_texts(self.conditions(weights, kl))[0]

    def _prompt_texts(self, conditions: Conditions) -> list[str]:
        """What is written for each row; nothing where the blend is zero: the row is the reference then, prompt and all."""
        blend = self.coefficients(conditions) if self.conditioning.prompt else None
        if blend is None:
            return [""] * len(conditions)
        return [
            prompt_conditioning.weighting_text(self.spec.prompt_template, self.objectives, weights, kl) if moved else ""
            for weights, kl, moved in zip(
                conditions.weights.tolist(), conditions.kl.tolist(), blend.any(-1).tolist(), strict=True
            )
        ]

    def shown_prompts(
        self, prompt_ids: Sequence[Sequence[int]], conditions: Conditions, prompts: Sequence | None = None
    ) -> list[list[int]] | None:
        """What the policy reads for each prompt under its condition, or None where that is the prompt itself (no prompt
        conditioning). prompts: what prompt_ids were made from, for chat messages; reference rows see the plain prompt."""
        if not self.conditioning.prompt:
            return None
        if self.tokenizer is None:
            raise ConfigError(
                "prompt conditioning needs a tokenizer; give one to from_pretrained(tokenizer=...)"
            )
        asked = [None] * len(prompt_ids) if prompts is None else prompts
        return [
            prompt_conditioning.with_weighting(prompt, ids, text, self.tokenizer) if text else list(ids)
            for prompt, ids, text in zip(asked, prompt_ids, self._prompt_texts(conditions), strict=True)
        ]

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
        if not torch.compiler.is_compiling():
            self.room.check_ids([int(input_ids.min()), int(input_ids.max())], "input_ids", self.tokenizer)
        with self.blended(conditions):
            return self.model(input_ids, *args, **kwargs)

    def completion_hidden(
        self, batch: Rollout, conditions: Conditions | None, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """(N, H): the hidden state that predicts each completion token, see `scoring.hidden_states`.

        conditions: one row per prompt, or None for the base model. Differentiable in the adapters.
        """
        return hidden_states(self, batch, self.coefficients(conditions), mask)

    def token_stats(
        self,
        hidden: torch.Tensor,
        targets: torch.Tensor,
        *,
        ref_hidden: torch.Tensor | None = None,
        conditions: Conditions | None = None,
        temperature: float = 1.0,
        outputs: Sequence[str] = ("logprob",),
        differentiable: Sequence[str] | None = None,
    ) -> TokenStats:
        """`linear_logprob` through this model's output projection; hidden (rows, H), targets (rows,).

        conditions: one per row, needed only where the output projection itself is conditioned.
        """
        return self.stats_under(
            self.coefficients(conditions) if self.conditions_output else None,
            hidden,
            targets,
            ref_hidden=ref_hidden,
            temperature=temperature,
            outputs=outputs,
            differentiable=differentiable,
        )

    def generate(self, prompts: str | Sequence, weights=None, kl=None, **options) -> list:
        """Completions of prompts, each under its own weighting; options as of `texts.generate`: max_new_tokens, temperature,
        top_k, top_p, min_p, stop_strings, num_return_sequences, max_rows, seed.

        prompts: a text or a chat (a list of messages), or a list of either; weights, kl: one for all or one per prompt (see
        `conditions`). Returns one string per prompt, or one list of `num_return_sequences` strings per prompt where more than
        one was asked for. Any thread may call this; calls run one after another.
        """
        return texts.generate(self, prompts, weights, kl, **options)

    # -- saving -------------------------------------------------------------------------------------------------------

    def save_pretrained(self, directory: str | Path) -> None:
        """Write the adapters and what is needed to build the policy again from its base model. Other files in the directory
        stay; raises ConfigError for the base model's own folder."""
        for source in self.read_from:
            if source not in self.loaded_from and source.resolve() == Path(directory).resolve():
                raise ConfigError(
                    f"{directory} is the folder of the base model, whose tokenizer would be replaced; give another folder"
                )
        with write_directory(directory) as temporary:
            self.write_files(temporary)

    def write_files(self, directory: Path) -> None:
        """Write what `save_pretrained` writes into a directory that is there, file after file."""
        spec = json.dumps(asdict(self.spec), indent=2) + "\n"
        (directory / _SPEC_FILE).write_text(spec, encoding="utf-8")
        save_file(
            {n: p.detach().cpu().contiguous() for n, p in self.adapter_parameters().items()},
            directory / _ADAPTER_FILE,
        )
        fingerprint.write(directory, self.model)
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(directory)

    @classmethod
    def load(
        cls,
        directory: str | Path,
        *,
        base_model: str | PreTrainedModel | None = None,
        dtype: torch.dtype | str | None = None,
        device: str | torch.device | None = None,
    ) -> ConditionedPolicy:
        """The policy that `save_pretrained` wrote; base_model: where the base is now, if it has moved. Raises ConfigError where
        that is another model than the policy was saved over, see `fingerprint`."""
        directory = Path(directory)
        finish(directory)
        if not (directory / _SPEC_FILE).is_file():
            raise ConfigError(
                f"{directory}: no {_SPEC_FILE} here; expected a directory written by save_pretrained"
            )
        spec = _read_spec(directory / _SPEC_FILE)
        if not (directory / _ADAPTER_FILE).is_file():
            raise ConfigError(f"{directory}: {_ADAPTER_FILE} is missing")
        if base_model is None and not spec.base_model:
            raise ConfigError(f"{directory} was saved from a model in memory; give it with base_model=")
        tokenizer = (
            AutoTokenizer.from_pretrained(directory)
            if (directory / "tokenizer_config.json").is_file()
            else None
        )
        tensors = read_tensors(directory / _ADAPTER_FILE)
        model, tokenizer, _ = load_base(base_model or spec.base_model, tokenizer, dtype, device)
        fingerprint.check(directory, model)  # before anything is done to the model
        policy = cls(model, spec, tokenizer)
        try:
            policy.load_adapters(tensors)
        except ConfigError as error:
            raise ConfigError(f"{directory / _ADAPTER_FILE}: {error}") from error
        policy.loaded_from.append(directory)
        return policy

    @property
    def read_from(self) -> list[Path]:
        """Folders that this policy was loaded from, and that of its base model, which it needs whenever it is loaded again."""
        bases = {self.spec.base_model, self.model.config.name_or_path or ""}
        return [*self.loaded_from, *(Path(base) for base in sorted(bases) if base and Path(base).is_dir())]

    def export_adapter(self, path: str | Path, weights=None, kl=None, *, rank: int | None = None) -> float:
        """Write one blend as an ordinary PEFT LoRA adapter, for peft, transformers and vLLM; returns the error.

        Low-rank factors are written exactly (A stacked, B scaled by the blend; rank R = sum of the ranks whose coefficient is
        not 0): error 0. rank: cut each layer's blended delta to its largest `rank` singular values; the error is
        |written - delta| / |delta| over all layers (Frobenius), 0 where `rank` is R or more. Whole weights of linear layers
        need it; a warning says where R is more than vLLM takes. blend.json says which blend it is and what prompt conditioning
        writes into the prompt. Other files in the folder stay. An adapter on an output projection that shares its weight with
        the input embedding must not be merged by peft, which would change both: a warning says so; `merge` keeps them apart.
        Raises ConfigError where a delta has no adapter form (embeddings, norms: `merge` has all), and for a path that is, holds
        or lies in a folder of `read_from`.
        """
        refuse_overlap(path, self.read_from)
        self._warn_of_tied_head()
        coefficients = self.coefficients(self.conditions(weights, kl))
        with write_directory(path) as temporary:
            error = writing.save(temporary, self, coefficients[0], rank)
            self._describe_blend(temporary, weights, kl)
            fingerprint.write(temporary, self.model)
            if self.tokenizer is not None:
                self.tokenizer.save_pretrained(temporary)
        return error

    def save_adapters(self, directory: str | Path, *, rank: int | None = None) -> dict[str, float]:
        """Write each objective's delta as a PEFT LoRA adapter, <directory>/<objective>/, and how they are blended,
        <directory>/clp_blend.json; returns the error of each, as `export_adapter`. Other files in the directory stay.

        Rank and lora_alpha are the objective's own, so that an adapter can be trained on. peft loads each, its
        add_weighted_adapter(combination_type="cat") with the weights c(kl) w_i is the blend, exactly, and `from_adapters` makes
        the policy again. Where there is one delta for all objectives, its folder is "adapter". rank: as of `export_adapter`.
        """
        refuse_overlap(directory, self.read_from)
        self._warn_of_tied_head()
        with write_directory(directory) as temporary:
            errors = writing.save_each(temporary, self, rank)
            fingerprint.write(temporary, self.model)
            if self.tokenizer is not None:
                self.tokenizer.save_pretrained(temporary)
        return errors

    def _warn_of_tied_head(self) -> None:
        if self.splits_tied_head:
            warnings.warn(
                "this adapter changes an output projection that shares its weight with the input embedding: use it as an "
                "adapter, or write a merged model with merge(); peft's merge_and_unload would change both",
                stacklevel=3,
            )

    def _describe_blend(self, path: Path, weights, kl) -> None:
        condition = self.conditions(weights, kl)
        blend = {
            "weights": dict(zip(self.objectives, condition.weights[0].tolist())),
            "kl": condition.kl[0].item(),
            "conditioning": self.spec.conditioning,
            "prompt_text": self.prompt_text(weights, kl),
        }
        (path / "blend.json").write_text(json.dumps(blend, indent=2) + "\n", encoding="utf-8")

    def merge(self, weights=None, kl=None) -> PreTrainedModel:
        """An ordinary transformers model whose weights are the blend at (weights, kl); this policy is left as it was.

        Where only the output projection is conditioned and shares its weight with the input embedding, the merged model has
        the two apart (tie_word_embeddings=False). With prompt conditioning its prompts need `prompt_text(weights, kl)`.
        """
        coefficients = self.coefficients(self.conditions(weights, kl))[0]
        merged = self.plain_copy()
        if self.splits_tied_head:
            untie(merged)
        parameters, stacks, done = [], [], set()
        with torch.no_grad():
            for name, layer in self.layers.items():
                base = merged.get_submodule(name)
                for part, stack in layer.targets():
                    target = getattr(base, part)
                    if id(target) not in done:
                        done.add(id(target))
                        parameters.append(target)
                        stacks.append(list(stack.to(target.dtype).contiguous()))
            if parameters:
                for target, value in zip(
                    parameters, interpolate(stacks, coefficients.float(), base=parameters)
                ):
                    target.copy_(value)
            for name, layer in self.layers.items():
                if not layer.targets():
                    weight, delta = merged.get_submodule(name).weight, layer.weight_delta(coefficients)
                    exact = weight.to(torch.promote_types(weight.dtype, delta.dtype))
                    weight.copy_(exact + (delta.t() if layer.transposed else delta))
        return merged

    def attach(self, model: PreTrainedModel | None = None) -> PreTrainedModel:
        """A transformers model whose forward and generate take `weights=` and `kl=`, for all rows or one per row; see
        `attached`.

        model: another loaded copy of the base model, which is changed in place (its detach() undoes that); None makes one that
        shares the base model's weights. The deltas are shared either way, and this policy is left as it was. Raises ConfigError
        for a model of other layers or shapes, or a quantised one.
        """
        if self.conditioning.prompt:
            warnings.warn(
                "this policy writes the weighting into the prompt, and an attached model reads prompts as they are: put "
                "policy.prompt_text(weights, kl) into them",
                stacklevel=2,
            )
        return attached.attach(self, self.plain_copy(shared=True) if model is None else model)

