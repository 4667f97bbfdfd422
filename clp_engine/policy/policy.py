"""ConditionedPolicy: a language model whose parameters are blended, per row, by a reward weighting and a KL coefficient.

    theta(w, alpha) = theta_ref + c(alpha) * sum_i w_i * Delta_i

This is parameter-space conditioning (Conditioned Language Policy). `models.forms` defines Delta_i: low-rank factors s_i B_i A_i
on linear layers, or deltas of all weights, of attention, or of the output projection. Rows of one batch may have different
(w, alpha). A row whose blend is zero is the reference model.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer, PreTrainedModel

from clp_engine.core import ranges
from clp_engine.core.conditions import (
    KL_CONDITIONING,
    check_objectives,
)
from clp_engine.core.errors import ConfigError
from clp_engine.core.files import finish, read_tensors, write_directory
from clp_engine.core.sizes import check_size
from clp_engine.models import fingerprint
from clp_engine.models.base import holds_adapters, load_base
from clp_engine.models.forms import Conditioning
from clp_engine.models.targets import lora_targets
from clp_engine.policy import attached, prompt_conditioning
from clp_engine.policy.merging import merged
from clp_engine.policy.peft import stacking, warm_start, writing
from clp_engine.policy.peft.reading import Adapter
from clp_engine.policy.soups import soup
from clp_engine.policy.spec import SPEC_FILE, PolicySpec, per_delta, read_spec
from clp_engine.policy.steerable import SteerableModel

_ADAPTER_FILE = "adapters.safetensors"


class ConditionedPolicy(SteerableModel):
    """A causal or encoder-decoder language model with one delta per objective, blended per row.

    Build one with `from_pretrained` or `load`. The base model is frozen and always in evaluation mode: with dropout, rollout
    and training would take log-probs from different networks.
    """

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

        name_or_path: a model name, a directory, "docsum" (the model shipped with the engine), or a loaded transformers causal
            or encoder-decoder language model whose projections are nn.Linear or GPT-2's Conv1D, which is wrapped in place.
            For a PeftModel, each objective begins at the adapter of its name, or all of them at a single one. The adapters are
            taken out of the model (see `from_adapters` for other names). The reference is the base model without them.
        objectives: their names, in the order of weight vectors.
        conditioning: "lora", "full", "attention", "logit", "prompt", "none", or several joined by "+"; see `models.forms`.
        carrier: the trained parameters if conditioning is "prompt" or "none".
        rank, lora_alpha: for "lora" and "logit", one for all or one per objective. The update is scaled by lora_alpha / rank.
            Defaults: rank 16, lora_alpha 2 * rank; for a PeftModel its own. An output projection with a rank of the hidden size
            or more is trained whole, unscaled.
        target_modules: for "lora", as in PEFT, or a function that takes the model and returns names. None chooses every linear
            layer but the output projection.
        prompt_template: for "prompt", a text with {weights} and, if the KL coefficient varies, {kl}; see `prompt_conditioning`.
        kl_conditioning, min_kl: see `conditions.blend_coefficients`. kl_is_beta, default_kl: see `PolicySpec`.
        dtype: None means float32 on a CPU and the checkpoint's own elsewhere. attention: transformers' attn_implementation, for
            a model loaded here. seed: seed of the adapters' initial values.

        Raises ConfigError for an unknown conditioning or layer name, or a model that cannot be conditioned.
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
        ranks = per_delta(warm_start.DEFAULT_RANK if rank is None else rank, deltas, "rank")
        for r in ranks:
            ranges.check(ranges.ADAPTER, rank=r)
        ranges.check(ranges.ADAPTER, default_kl=default_kl)
        if min_kl is not None:
            ranges.check(ranges.ADAPTER, min_kl=min_kl)
        alphas = tuple(2.0 * r for r in ranks)
        if lora_alpha is not None:
            alphas = per_delta(lora_alpha, deltas, "lora_alpha")
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
        head = model.get_output_embeddings()  # a rank of the hidden size or more trains it whole
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
        """A policy whose objectives begin at PEFT's LoRA adapters: their Rewarded Soup, or the start of a training run.

        base: as `name_or_path` of `from_pretrained`.
        adapters: by objective, in the order of weight vectors. Each is a directory (or repository of the hub) with
            adapter_config.json and adapter_model.safetensors, or None for an objective that begins at the base model.
            Alternatively the one directory that `save_adapters` wrote, whose settings are then the defaults of `options`.
        options: those of `from_pretrained` without lora_alpha. conditioning is "lora" by default, with "logit" if an adapter is
            on the output projection. rank is at least the adapter's, by default equal to it, and 16 for None.
            target_modules names layers that get deltas beside the adapters' own.

        Ranks, alphas (rsLoRA, patterns) and layers of the adapters may differ. If an objective's adapter has a lower rank in
        some layer than elsewhere, or no delta, the objective gets further directions that start at zero, see `warm_start`.

        Raises ConfigError for an adapter that is no plain LoRA (DoRA, modules_to_save, biases, embeddings, ...) or was trained
        on another model. Warns of dropout, which is left out, and of an adapter that names another base model.
        """
        return warm_start.build(cls.from_pretrained, base, adapters, **options)

    @classmethod
    def from_specialists(
        cls, specialists: Sequence[ConditionedPolicy], objectives: Sequence[str] | None = None
    ) -> ConditionedPolicy:
        """Rewarded Soups (Rame et al., 2023): one policy with the deltas of models that were fine-tuned one by one,
        theta(w) = theta_ref + sum_i w_i Delta_i.

        specialists: policies with conditioning "none", one per objective, with the same base model and carrier. Their adapters
            are copied.
        objectives: names of the new policy's objectives. By default those of the specialists, if there are as many.

        Raises ConfigError if the specialists do not fit together.
        """
        return soup(cls, specialists, objectives)

    # -- saving -------------------------------------------------------------------------------------------------------

    def save_pretrained(self, directory: str | Path) -> None:
        """Write the adapters and the settings from which the policy is built again over its base model.

        Other files in the directory stay. Raises ConfigError for the base model's own folder.
        """
        for source in self.read_from:
            if source not in self.loaded_from and source.resolve() == Path(directory).resolve():
                raise ConfigError(
                    f"{directory} is the folder of the base model, whose tokenizer would be replaced; give another folder"
                )
        with write_directory(directory) as temporary:
            self.write_files(temporary)

    def write_files(self, directory: Path) -> None:
        """Write the files of `save_pretrained` one by one into an existing directory."""
        adapters = self.adapter_parameters()
        if any(hasattr(p, "to_local") for p in adapters.values()):
            raise ConfigError(
                "the deltas are cut over the processes (fsdp); write the policy with trainer.save_model(), or inside `with "
                "trainer.whole_base():`"
            )
        spec = json.dumps(asdict(self.spec), indent=2) + "\n"
        (directory / SPEC_FILE).write_text(spec, encoding="utf-8")
        save_file(
            {n: p.detach().cpu().contiguous() for n, p in adapters.items()},
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
        """The policy that `save_pretrained` wrote. base_model: the base model's present location, if it has moved.

        Raises ConfigError if the base model differs from the one the policy was saved over, see `fingerprint`.
        """
        directory = Path(directory)
        finish(directory)
        if not (directory / SPEC_FILE).is_file():
            raise ConfigError(
                f"{directory}: no {SPEC_FILE} here; expected a directory written by save_pretrained"
            )
        spec = read_spec(directory / SPEC_FILE)
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
        fingerprint.check(directory, model)  # before the model is changed
        policy = cls(model, spec, tokenizer)
        try:
            policy.load_adapters(tensors)
        except ConfigError as error:
            raise ConfigError(f"{directory / _ADAPTER_FILE}: {error}") from error
        policy.loaded_from.append(directory)
        return policy

    def export_adapter(self, path: str | Path, weights=None, kl=None, *, rank: int | None = None) -> float:
        """Write one blend as an ordinary PEFT LoRA adapter for peft, transformers and vLLM. Returns its error.

        rank: None writes low-rank factors exactly (A stacked, B scaled by the blend, rank R = sum of the ranks whose
            coefficient is not 0), with error 0. A number cuts each layer's blended delta to its largest `rank` singular values.
            Whole weights of linear layers need a number.

        The error is |written - delta| / |delta| over all layers (Frobenius), 0 if `rank` is at least R. A warning says if R is
        more than vLLM takes. blend.json records the blend and the text that prompt conditioning writes into the prompt. Other
        files in the folder stay. An adapter on an output projection that shares its weight with the input embedding must not be
        merged by peft, which would change both: a warning says so, and `merge` separates the two.

        Raises ConfigError if a delta has no adapter form (embeddings, norms: `merge` supports all), and for a path that equals,
        contains or lies inside a folder of `read_from`.
        """
        return writing.export(self, path, weights, kl, rank)

    def save_adapters(self, directory: str | Path, *, rank: int | None = None) -> dict[str, float]:
        """Write each objective's delta as a PEFT LoRA adapter, <directory>/<objective>/, and <directory>/clp_blend.json, which
        says how they are blended. Returns the error of each, as `export_adapter`. Other files in the directory stay.

        Rank and lora_alpha are the objective's own, so that an adapter's training can continue. peft loads each adapter.
        Its add_weighted_adapter(combination_type="cat") with the weights c(kl) w_i gives exactly the blend, and `from_adapters`
        builds the policy again. A policy with one delta for all objectives has one folder, "adapter".

        rank: as for `export_adapter`.
        """
        return writing.export_each(self, directory, rank)

    def export_stack(self, path: str | Path, *, rank: int | None = None, weights=None, kl=None) -> float:
        """Write all objectives as one rank-stacked PEFT LoRA adapter, which vLLM serves under a weighting per request (see
        `serving.vllm_plugin`). Returns its error, as `export_adapter`.

        A is stacked, and B is side by side, scaled by lora_alpha / rank alone. peft loads the stack as an ordinary adapter: the
        sum of all deltas with unit weights. clp_blend.json says which rows are whose, and how weights and KL coefficient
        become the coefficients of the deltas. The rank is the sum of the ranks, padded with zeros to the next one that vLLM
        has. Other files in the folder stay.

        rank: the most products of each objective per layer, as for `export_adapter`.
        weights, kl: those of a request that has none. Defaults: uniform, and the policy's own default.

        Raises ConfigError as `export_adapter`, for a delta with a bias, and for a sum of ranks above vLLM's largest.
        """
        return stacking.export_stack(self, path, rank, weights, kl)

    def merge(self, weights=None, kl=None) -> PreTrainedModel:
        """An ordinary transformers model with the weights of the blend at (weights, kl). This policy is not changed.

        If only the output projection is conditioned and shares its weight with the input embedding, the merged model has
        separate weights (tie_word_embeddings=False). With prompt conditioning its prompts need `prompt_text(weights, kl)`.
        """
        return merged(self, self.coefficients(self.conditions(weights, kl))[0])

    def attach(self, model: PreTrainedModel | None = None) -> PreTrainedModel:
        """A transformers model whose forward and generate take `weights=` and `kl=`, for all rows or one per row.

        model: another loaded copy of the base model, which is changed in place (its detach() undoes that). None makes a model
            that shares the base model's weights.

        The deltas are shared in both cases, and this policy is not changed; see `attached`. Raises ConfigError for a model with
        other layers or shapes, or a quantised one.
        """
        if self.conditioning.prompt:
            warnings.warn(
                "this policy writes the weighting into the prompt, and an attached model reads prompts as they are: put "
                "policy.prompt_text(weights, kl) into them",
                stacklevel=2,
            )
        return attached.attach(self, self.plain_copy(shared=True) if model is None else model)
