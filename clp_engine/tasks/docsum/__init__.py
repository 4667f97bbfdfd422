"""DocSum: summarise Python documentation with a small model, under conflicting rewards.

    rows = load_dataset("train", limit=512, seed=0)       # [{"prompt", "document", "reference", "name"}, ...]
    model = AutoModelForCausalLM.from_pretrained(checkpoint_path())
    scores = REWARDS["coverage"](prompts=..., completions=[...], reference=[...])

The documents are docstrings of this Python installation (`corpus`). The model and its tokenizer are shipped;
`tools/docsum_pretrain.py` is the recipe that made them. The rewards are coverage, brevity and faithfulness (`rewards`).
"""

from clp_engine.tasks.docsum.corpus import Pair, build
from clp_engine.tasks.docsum.dataset import (
    MAX_COMPLETION_TOKENS,
    MAX_PROMPT_TOKENS,
    checkpoint_path,
    format_prompt,
    load_dataset,
    make_prompt,
)
from clp_engine.tasks.docsum.rewards import REWARDS, brevity, coverage, faithfulness, rouge_1, rouge_l

__all__ = [
    "MAX_COMPLETION_TOKENS",
    "MAX_PROMPT_TOKENS",
    "REWARDS",
    "Pair",
    "brevity",
    "build",
    "checkpoint_path",
    "coverage",
    "faithfulness",
    "format_prompt",
    "load_dataset",
    "make_prompt",
    "rouge_1",
    "rouge_l",
]
