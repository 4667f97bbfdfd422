"""The treatment of each field of TRL's GRPOConfig. Every field has exactly one fate here, and none is ignored silently.

`settings` acts on this table, and `tools/trl_page.py` makes the tables of the migration guide from it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

TRL_VERSION = "1.16.0"  # the version whose fields are listed

SAME, DEFAULT, TRANSLATED, ACCEPTED, REFUSED = "same", "other default", "translated", "accepted", "refused"
ANYTHING = "anything"


@dataclass(frozen=True)
class Field:
    """One field of GRPOConfig.

    fate: SAME: a setting of CLPConfig with the same name and meaning. DEFAULT: the same, with another default. TRANSLATED:
        expressed by another setting, or by other values. ACCEPTED: no setting; `accepts` are the values that describe this
        trainer's fixed behaviour. REFUSED: not supported; `accepts` are the values that do not ask for it.
    default: TRL's default. note: the reason, the translation or the alternative, as a clause that can end an error message.
    """

    fate: str
    default: Any
    note: str = ""
    accepts: tuple | str = ()

    def takes(self, value: Any) -> bool:
        """Whether an ACCEPTED or REFUSED field allows `value`."""
        return self.accepts == ANYTHING or any(
            value == one and isinstance(value, bool) == isinstance(one, bool) for one in self.accepts
        )


def _same(default: Any, note: str = "") -> Field:
    return Field(SAME, default, note)


def _other(default: Any, why: str) -> Field:
    return Field(DEFAULT, default, why)


def _translated(default: Any, how: str) -> Field:
    return Field(TRANSLATED, default, how)


def _accepted(default: Any, why: str, values: tuple | str | None = None) -> Field:
    return Field(ACCEPTED, default, why, (default,) if values is None else values)


def _refused(default: Any, why: str, values: tuple | None = None) -> Field:
    return Field(REFUSED, default, why, (default,) if values is None else values)


_HUB = "nothing is uploaded; write trainer.policy.merge(weights) or export_adapter to a folder and push that"
_LOSS = "is of a loss_type that is not here; the loss types are sequence, grpo, dapo and dr_grpo"
_ENTROPY = "there is no entropy bonus; the KL to the reference (beta, alpha) keeps the policy from collapsing"
_REFERENCE = "the reference is the frozen base model, which the policy shares; one that moves is CLPTrainer(reference=)"
_ONE_BUFFER = "the trained parameters' gradient is one buffer, added up over the processes in one collective"
_LOADER = "there is no DataLoader: a step reads its few prompts by index; leave it out"
_COMPILE = "the kernels are compiled already; leave it out"
_EVAL_LOOP = "evaluation keeps means of completions and rewards alone; leave it out"
_TRACKIO = (
    "read by transformers' trackio callback (report_to); W&B's project is in the environment, WANDB_PROJECT"
)

FIELDS: dict[str, Field] = {
    # the run
    "output_dir": _other(None, "a run always has a folder"),
    "seed": _same(42),
    "data_seed": _refused(None, "the order of prompts follows seed; leave it out"),
    "full_determinism": _refused(
        False,
        "the same seed gives the same bits on a CPU; on a GPU call torch.use_deterministic_algorithms(True) first",
    ),
    "do_train": _accepted(False, "read by scripts alone, and there for them to read", (True, False)),
    "do_eval": _accepted(False, "read by scripts alone, and there for them to read", (True, False)),
    "do_predict": _refused(False, "there is no predict(); use policy.generate or clp_engine.evaluate"),
    "resume_from_checkpoint": _accepted(
        None,
        "read by scripts alone: trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)",
        ANYTHING,
    ),
    "use_cpu": _same(False, "model and adapters are on the CPU"),
    "local_rank": _accepted(-1, "the launcher says it in the environment", ANYTHING),
    # the model
    "model_init_kwargs": _same(
        None, "dtype and attn_implementation (eager, sdpa); other keys are refused, each with its reason"
    ),
    "trust_remote_code": _refused(
        False, "code that comes with a checkpoint is not run; load the model yourself and give it as model="
    ),
    "bf16": _other(
        None,
        "TRL's None is True, an autocast over float32 weights. Here True loads the frozen base in bfloat16, False in float32, "
        "None in float32 on a CPU and as the checkpoint is elsewhere; adapters, optimiser and softmax statistics stay float32",
    ),
    "fp16": _refused(False, "float16 needs a loss scale, which is not here; use bf16=True"),
    "bf16_full_eval": _refused(False, "evaluation has the numbers of training; use bf16=True"),
    "fp16_full_eval": _refused(False, "evaluation has the numbers of training; use bf16=True"),
    "tf32": _refused(None, "torch's own switch decides: torch.backends.cuda.matmul.allow_tf32"),
    "disable_dropout": _accepted(
        False,
        "dropout is off always: with it rollout and training would be different networks; leave it out",
        (True,),
    ),
    "cast_lm_head_to_fp32": _refused(
        False, "log-probs, entropy and KL are accumulated in float32 whatever the head's dtype; leave it out"
    ),
    "router_aux_loss_coef": _refused(
        None, "no load-balancing loss is added, experts are frozen; leave it out", (None, 0.0)
    ),
    "use_cache": _accepted(
        False, "rollouts keep a cache of their own and training passes none; leave it out"
    ),
    "gradient_checkpointing": _other(
        True,
        "a prompt is computed once for its group and the base is frozen: activations are small, and keeping them is faster",
    ),
    "gradient_checkpointing_kwargs": _accepted(
        None, "layers are recomputed by torch's non-reentrant form", (None, {}, {"use_reentrant": False})
    ),
    "activation_checkpointing": _translated(None, "the newer name of gradient_checkpointing"),
    "activation_checkpointing_kwargs": _accepted(
        None, "layers are recomputed by torch's non-reentrant form", (None, {}, {"use_reentrant": False})
    ),
    "torch_compile": _refused(False, _COMPILE),
    "torch_compile_backend": _refused(None, _COMPILE),
    "torch_compile_mode": _refused(None, _COMPILE),
    "use_liger_kernel": _refused(False, "the engine's own kernels do that work; leave it out"),
    "liger_kernel_config": _refused(None, "the engine's own kernels do that work; leave it out"),
    "neftune_noise_alpha": _refused(
        None, "noise on the embeddings would part rollout from training; leave it out"
    ),
    "torch_empty_cache_steps": _refused(
        None, "the allocator is left alone; call torch.cuda.empty_cache() in a callback"
    ),
    # the data
    "remove_unused_columns": _accepted(
        False, "reward functions receive every column; remove columns from the dataset yourself"
    ),
    "shuffle_dataset": _same(True),
    "train_sampling_strategy": _accepted(
        "random", "prompts are in a new order every epoch, or as they are with shuffle_dataset=False"
    ),
    "length_column_name": _refused(
        "length", "prompts of like length share a micro-batch by themselves; leave it out"
    ),
    "label_names": _refused(None, "there are no labels; every column goes to the reward functions"),
    "pad_to_multiple_of": _refused(
        "auto", "training packs tokens and pads nothing; leave it out", ("auto", None)
    ),
    "ds3_gather_for_generation": _refused(
        True, "there is no DeepSpeed here; with fsdp it is gather_for_generation in fsdp_config"
    ),
    "chat_template_kwargs": _same(None, "set in the tokenizer's template, which is saved with the policy"),
    "dataloader_drop_last": _accepted(False, "epochs join without a gap, no row is dropped"),
    "dataloader_num_workers": _accepted(0, _LOADER),
    "dataloader_pin_memory": _accepted(True, _LOADER),
    "dataloader_persistent_workers": _accepted(False, _LOADER),
    "dataloader_prefetch_factor": _accepted(None, _LOADER),
    "dataloader_multiprocessing_context": _accepted(None, _LOADER),
    "dataloader_in_order": _accepted(True, _LOADER),
    # completions
    "num_generations": _same(8),
    "num_generations_eval": _same(None),
    "max_completion_length": _same(512, "None is not taken: the length is what memory is planned for"),
    "temperature": _same(1.0),
    "top_p": _translated(1.0, "1.0 is None here"),
    "top_k": _translated(0, "0 is None here"),
    "min_p": _same(None),
    "repetition_penalty": _refused(
        1.0,
        "a token's log-prob would depend on which tokens came before it, and the gradient's would not; penalise it in a reward",
    ),
    "generation_kwargs": _refused(
        None, "temperature, top_k, top_p, min_p and stop_strings are settings of their own", (None, {})
    ),
    "cache_implementation": _refused(None, "rollouts have a cache of their own; leave it out"),
    "max_tool_calling_iterations": _refused(None, "there are no tool calls; completions are one turn"),
    "use_transformers_continuous_batching": _refused(
        False, "prompts take the places of completions that have ended with rollout_rows="
    ),
    "transformers_continuous_batching_config": _refused(None, "use rollout_rows="),
    "use_transformers_paged": _refused(False, "use rollout_rows="),
    "use_vllm": _same(False, "with clp-engine's plug-in, which blends for each completion"),
    "vllm_mode": _same("colocate"),
    "vllm_model_impl": _refused("vllm", "the plug-in was tried with vLLM's own models"),
    "vllm_enable_sleep_mode": _same(False),
    "vllm_structured_outputs_regex": _refused(
        None,
        "log-probs would be of the texts that the regex leaves, and the policy's would not; reward the form",
    ),
    "vllm_server_base_url": _same(None),
    "vllm_server_host": _same("0.0.0.0"),
    "vllm_server_port": _same(8000),
    "vllm_server_timeout": _same(240.0, "also of a server that is lost within a step"),
    "vllm_group_port": _accepted(
        51216, "adapters go to the server as files (vllm_stack_dir), not through a group", ANYTHING
    ),
    "vllm_gpu_memory_utilization": _same(0.3),
    "vllm_max_model_length": _same(None),
    "vllm_tensor_parallel_size": _refused(
        1,
        "one process has one device; start `vllm serve --tensor-parallel-size N` and give vllm_mode='server'",
    ),
    "vllm_importance_sampling_correction": _same(True, "also with rollout_func"),
    "vllm_importance_sampling_mode": _other(
        "sequence_mask",
        "a mask leaves out whole completions, and more of them the longer they are; weights by token, truncated, keep all",
    ),
    "vllm_importance_sampling_clip_max": _same(3.0),
    "vllm_importance_sampling_clip_min": _same(None),
    "vllm_importance_sampling_cap": _translated(None, "the older name of vllm_importance_sampling_clip_max"),
    # the objective
    "reward_weights": _same(
        None,
        "the fixed objective sum_i weight_i R_i. Left out, TRL adds the rewards up; here one model is trained that is "
        "steerable between them",
    ),
    "multi_objective_aggregation": _refused(
        "sum_then_normalize",
        "rewards are not normalised one by one; scale a reward in its function, or draw w from a weight_sampler",
    ),
    "beta": _other(
        0.0, "without a coefficient alpha=0.1 holds, (1 - alpha) w.R - alpha KL; beta=0.0 is TRL's default"
    ),
    "use_bias_correction_kl": _translated(
        True,
        "True corrects each token's KL and leaves out its effect on the tokens after it, as kl_estimator='k2' does; the "
        "default, 'return', leaves nothing out. False is 'k3'",
    ),
    "scale_rewards": _other(
        "group",
        "dividing by a standard deviation changes what beta means, in every group differently: none; True is group, False none",
    ),
    "loss_type": _other(
        "dapo",
        "sequence, 1 / B for every token, is the gradient of the objective; grpo, dapo and dr_grpo are TRL's, bnpo is dapo in "
        "one micro-batch, and cispo, sapo, luspo and vespo are not here",
    ),
    "mask_truncated_completions": _same(False),
    "num_iterations": _same(1),
    "epsilon": _same(0.2),
    "epsilon_high": _same(None),
    "delta": _same(None, "must lie above 1 + epsilon_high"),
    "importance_sampling_level": _refused(
        "token", "the ratio is by token; sequence-level ratios (GSPO) are not here"
    ),
    "off_policy_mask_threshold": _refused(
        None, "use delta, or fewer steps on a rollout (num_iterations, steps_per_generation)"
    ),
    "sapo_temperature_neg": _refused(1.05, _LOSS),
    "sapo_temperature_pos": _refused(1.0, _LOSS),
    "vespo_k_pos": _refused(2.0, _LOSS),
    "vespo_lambda_pos": _refused(3.0, _LOSS),
    "vespo_k_neg": _refused(3.0, _LOSS),
    "vespo_lambda_neg": _refused(2.0, _LOSS),
    "sync_ref_model": _refused(False, _REFERENCE),
    "ref_model_mixup_alpha": _refused(0.6, _REFERENCE),
    "ref_model_sync_steps": _refused(512, _REFERENCE),
    "top_entropy_quantile": _refused(
        1.0,
        "use token_selection='advantage_entropy' with selected_tokens=, which ranks tokens by |advantage| * entropy",
    ),
    "entropy_coef": _refused(0.0, _ENTROPY),
    "use_adaptive_entropy": _refused(False, _ENTROPY),
    "entropy_coef_min": _refused(0.0, _ENTROPY),
    "entropy_coef_max": _refused(1.0, _ENTROPY),
    "entropy_coef_delta": _refused(0.005, _ENTROPY),
    "entropy_target": _refused(0.2, _ENTROPY),
    # batches and optimisation
    "per_device_train_batch_size": _same(8, "completions; those of one optimiser step must be whole groups"),
    "gradient_accumulation_steps": _same(1),
    "steps_per_generation": _same(None, "must be a multiple of gradient_accumulation_steps"),
    "generation_batch_size": _translated(None, "steps_per_generation, times per_device_train_batch_size"),
    "auto_find_batch_size": _refused(
        False, "a smaller batch would be another objective; clp-engine info says what fits"
    ),
    "num_train_epochs": _same(3.0),
    "max_steps": _same(-1),
    "learning_rate": _other(
        1e-6, "low-rank adapters are trained, which take larger steps than whole weights"
    ),
    "lr_scheduler_type": _same("linear"),
    "lr_scheduler_kwargs": _same(None),
    "warmup_steps": _same(0, "below 1 a share of all steps, as in transformers 5"),
    "optim": _accepted(
        "adamw_torch_fused",
        "AdamW; for another optimiser give optimizers=",
        ("adamw_torch_fused", "adamw_torch"),
    ),
    "optim_args": _refused(None, "give an optimiser of your own: optimizers=(optimizer, None)"),
    "optim_target_modules": _refused(None, "give an optimiser of your own: optimizers=(optimizer, None)"),
    "weight_decay": _same(0.0),
    "adam_beta1": _same(0.9),
    "adam_beta2": _same(0.999),
    "adam_epsilon": _same(1e-8),
    "max_grad_norm": _same(1.0),
    "label_smoothing_factor": _refused(0.0, "there are no labels to smooth; leave it out"),
    "average_tokens_across_devices": _accepted(
        True,
        "TRL's GRPO loss does not read it either: a token weighs as much in whichever process it is",
        (True, False),
    ),
    # several processes
    "ddp_find_unused_parameters": _accepted(None, _ONE_BUFFER, ANYTHING),
    "ddp_bucket_cap_mb": _accepted(None, _ONE_BUFFER, ANYTHING),
    "ddp_broadcast_buffers": _accepted(None, _ONE_BUFFER, ANYTHING),
    "ddp_static_graph": _accepted(None, _ONE_BUFFER, ANYTHING),
    "ddp_backend": _same(None),
    "ddp_timeout": _same(1800),
    "fsdp": _same(None),
    "fsdp_config": _same(None),
    "deepspeed": _refused(
        None, "ZeRO hides weights that the kernels read; use fsdp='full_shard', which shards as ZeRO-3 does"
    ),
    "accelerator_config": _refused(
        None, "batches are dealt by whole groups, and there is no DataLoader to configure"
    ),
    "parallelism_config": _refused(
        None,
        "processes share the data (DDP) and the weights (fsdp, with vocab_parallel the output projection), no other dimension",
    ),
    # evaluation
    "eval_strategy": _same("no"),
    "eval_steps": _other(None, "TRL's None is logging_steps; given as None it is that here, too"),
    "eval_delay": _same(0),
    "eval_on_start": _same(False),
    "per_device_eval_batch_size": _other(8, "generating alone takes little memory; completions, as in TRL"),
    "prediction_loss_only": _refused(False, _EVAL_LOOP),
    "eval_do_concat_batches": _refused(True, _EVAL_LOOP),
    "eval_use_gather_object": _refused(False, _EVAL_LOOP),
    "eval_accumulation_steps": _refused(None, _EVAL_LOOP),
    "include_for_metrics": _refused(
        [], "log_metric, which reward functions receive, logs numbers of your own"
    ),
    "batch_eval_metrics": _refused(
        False, "log_metric, which reward functions receive, logs numbers of your own"
    ),
    # checkpoints
    "save_strategy": _same("steps", "no, steps or epoch; best is not here"),
    "save_steps": _same(500),
    "save_total_limit": _same(None),
    "save_only_model": _refused(
        False, "a checkpoint can always be resumed; the policy alone is in output_dir/policy"
    ),
    "save_on_each_node": _accepted(False, "the main process writes; nodes share the output folder"),
    "enable_jit_checkpoint": _accepted(
        False, "an interrupt (Ctrl-C) ends the step and saves; other signals are not caught"
    ),
    "load_best_model_at_end": _same(False, "the policy of the best evaluation is kept in output_dir/best"),
    "metric_for_best_model": _same(None, "no default: name a metric of evaluate(), such as eval_reward"),
    "greater_is_better": _same(None),
    "ignore_data_skip": _refused(
        False, "a resumed run goes on with the prompts that come next; leave it out"
    ),
    "restore_callback_states_from_checkpoint": _accepted(
        False, "the states that transformers' callbacks can export are always restored; leave it out", (True,)
    ),
    "push_to_hub": _refused(False, _HUB),
    "hub_model_id": _refused(None, _HUB),
    "hub_strategy": _refused("every_save", _HUB),
    "hub_token": _refused(None, _HUB),
    "hub_private_repo": _refused(None, _HUB),
    "hub_always_push": _refused(False, _HUB),
    "hub_revision": _refused(None, _HUB),
    # logs
    "logging_strategy": _same("steps"),
    "logging_steps": _same(10, "below 1 a share of all steps, as eval_steps and save_steps"),
    "logging_first_step": _same(False),
    "logging_nan_inf_filter": _accepted(
        True,
        "a loss that is not finite ends the run with the cause, so nothing is filtered or logged",
        (True, False),
    ),
    "log_on_each_node": _accepted(True, "there is one node, which logs", (True, False)),
    "log_level": _refused("passive", "use logging.getLogger('clp_engine').setLevel(...)"),
    "log_level_replica": _accepted(
        "warning", "of several processes the main one speaks", ("warning", "error", "passive")
    ),
    "include_num_input_tokens_seen": _refused(
        "no", "num_tokens is always logged; leave it out", ("no", False)
    ),
    "log_completions": _same(
        False, "every step's completions go to completions.jsonl in output_dir, whole; nothing is printed"
    ),
    "num_completions_to_print": _refused(
        None, "completions are written to completions.jsonl, not printed: use log_completions=True"
    ),
    "log_unique_prompts": _refused(False, "completions.jsonl has them all; filter it by prompt"),
    "log_multimodal": _accepted(True, "prompts are text alone", (True, False)),
    "log_completions_hub_repo": _refused(None, _HUB),
    "disable_tqdm": _translated(None, "None is False here"),
    "report_to": _same("none"),
    "run_name": _same(None),
    "project": _accepted("huggingface", _TRACKIO, ANYTHING),
    "trackio_space_id": _accepted(None, _TRACKIO, ANYTHING),
    "trackio_bucket_id": _accepted(None, _TRACKIO, ANYTHING),
    "trackio_static_space_id": _accepted(None, _TRACKIO, ANYTHING),
    "debug": _refused(
        "", "a gradient that is not finite ends the run with the cause; leave it out", ("", [])
    ),
    "skip_memory_metrics": _refused(
        True, "use torch.cuda.max_memory_allocated in a callback, or clp-engine info beforehand"
    ),
}
