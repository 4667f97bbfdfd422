"""TRL's GRPOTrainer and CLPTrainer on the same tiny model, with the same settings by the same names."""

from engine.conftest import build_model, build_tokenizer

SETTINGS = {
    "max_steps": 2,
    "per_device_train_batch_size": 8,
    "num_generations": 4,
    "max_completion_length": 6,
    "logging_steps": 1,
    "learning_rate": 1e-3,
    "beta": 0.04,
    "report_to": "none",
    "save_strategy": "no",
    "shuffle_dataset": False,
    "disable_tqdm": True,
}
ROWS = [{"prompt": f"w{i} w{i + 1}", "answer": f"w{2 * i}", "number": i} for i in range(8)]
RANK, LORA_ALPHA = 4, 8


def trl_trainer(folder, reward_funcs, rows=ROWS, *, model=None, tokenizer=None, eval_dataset=None, **options):
    """options: settings, and callbacks, reward_processing_classes of the constructor."""
    from datasets import Dataset
    from peft import LoraConfig
    from trl import GRPOConfig, GRPOTrainer

    extra = {k: options.pop(k) for k in ("callbacks", "reward_processing_classes") if k in options}
    args = GRPOConfig(
        output_dir=str(folder),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        **{**SETTINGS, **options},
    )
    return GRPOTrainer(
        model or build_model("llama"),
        reward_funcs,
        args,
        Dataset.from_list(rows) if isinstance(rows, list) else rows,
        Dataset.from_list(eval_dataset) if isinstance(eval_dataset, list) else eval_dataset,
        tokenizer or build_tokenizer(),
        peft_config=LoraConfig(
            r=RANK, lora_alpha=LORA_ALPHA, target_modules="all-linear", task_type="CAUSAL_LM"
        ),
        **extra,
    )


def our_trainer(folder, reward_funcs, rows=ROWS, *, model=None, tokenizer=None, eval_dataset=None, **options):
    from clp_engine import CLPConfig, CLPTrainer

    extra = {k: options.pop(k) for k in ("callbacks", "reward_processing_classes") if k in options}
    args = CLPConfig(output_dir=str(folder), rank=RANK, lora_alpha=LORA_ALPHA, **{**SETTINGS, **options})
    return CLPTrainer(
        model or build_model("llama"),
        reward_funcs,
        args,
        rows,
        eval_dataset,
        tokenizer or build_tokenizer(),
        **extra,
    )


BOTH = {"trl": trl_trainer, "clp": our_trainer}
