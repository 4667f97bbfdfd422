"""peft_config: the layers that are adapted and their scaling are those that peft itself chooses for the same config."""

import pytest

pytest.importorskip("peft")

from engine.conftest import COMPOSITE, ENCODER_DECODER, build_model, build_tokenizer
from engine.conftest import CONFIGS as FAMILIES
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer

from clp_engine import CLPConfig, CLPTrainer, ConfigError

ROWS = [{"prompt": "w1 w2"}] * 4
# Each with what it is for; names differ between families, so a config is tried where its layers are.
ATTENTION = {
    "gpt2": ["c_attn", "c_proj"],
    "t5": ["q", "v"],
    "t5-v1.1": ["q", "v"],
    "bart": ["q_proj", "v_proj"],
}
REGULAR = {
    "gpt2": r".*\.h\.1\..*c_.*",
    "t5": r"encoder\..*\.(q|wi)",
    "t5-v1.1": r"encoder\..*\.(q|wi_0)",
    "bart": r".*decoder.*fc\d",
}
NUMBERED = {"t5": "block", "t5-v1.1": "block", "gpt2": "h"}
CONFIGS = {
    "peft's own choice": lambda family: {},
    "all-linear": lambda family: {"target_modules": "all-linear", "lora_alpha": 3},
    "names": lambda family: {"target_modules": ATTENTION.get(family, ["q_proj", "down_proj"]), "r": 2},
    "a set": lambda family: {"target_modules": set(ATTENTION.get(family, ["k_proj", "o_proj"]))},
    "an expression": lambda family: {
        "target_modules": REGULAR.get(family, r".*layers\.[01]\.mlp\.(up|gate)_proj")
    },
    "rslora": lambda family: {"target_modules": "all-linear", "r": 6, "lora_alpha": 5, "use_rslora": True},
    "all but some": lambda family: {
        "target_modules": "all-linear",
        "exclude_modules": ATTENTION.get(family, ["q_proj", "up_proj"]),
    },
    "all but an expression": lambda family: {"target_modules": "all-linear", "exclude_modules": r".*\.1\..*"},
    "one layer": lambda family: {
        "target_modules": ATTENTION.get(family, ["q_proj", "down_proj"]),
        "layers_to_transform": [1],
        "layers_pattern": NUMBERED.get(family, "layers"),
    },
    "a layer of any name": lambda family: {
        "target_modules": ATTENTION.get(family, ["v_proj"]),
        "layers_to_transform": 0,
    },
    "patterns that change nothing": lambda family: {
        "target_modules": "all-linear",
        "rank_pattern": {"no_such_layer": 3},
        "alpha_pattern": {"no_such_layer": 3},
    },
}


def scalings(model) -> dict[str, float]:
    """Of each layer that peft adapts, by its name."""
    return {
        name.removeprefix("base_model.model."): (module.r["default"], module.scaling["default"])
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
    }


@pytest.mark.parametrize(
    "family", sorted(set(FAMILIES) - set(COMPOSITE))
)  # whose layers for images get no adapter here
@pytest.mark.parametrize("what", CONFIGS)
def test_layers_ranks_and_scalings_are_peft_s(tmp_path, family, what):
    options = CONFIGS[what](family)
    task = "SEQ_2_SEQ_LM" if family in ENCODER_DECODER else "CAUSAL_LM"
    theirs = scalings(get_peft_model(build_model(family), LoraConfig(task_type=task, **options)))
    assert theirs
    trainer = CLPTrainer(
        build_model(family),
        {"a": len, "b": len},
        CLPConfig(output_dir=str(tmp_path), max_completion_length=16),
        ROWS,
        processing_class=build_tokenizer(family),
        peft_config=LoraConfig(task_type=task, **options),
    )
    ours = {
        name: [(rank, pytest.approx(scaling)) for rank, scaling in zip(layer.ranks, layer.scalings)]
        for name, layer in trainer.policy.layers.items()
    }
    assert {name: [one, one] for name, one in theirs.items()} == ours


def test_a_model_type_without_a_choice_of_peft_s_needs_names(tmp_path, monkeypatch):
    model = build_model("llama")
    monkeypatch.setattr(type(model.config), "model_type", "unheard-of")
    with pytest.raises(ConfigError, match="peft has no choice of its own for 'unheard-of'"):
        CLPTrainer(
            model,
            len,
            CLPConfig(output_dir=str(tmp_path), max_completion_length=16),
            ROWS,
            None,
            build_tokenizer(),
            peft_config=LoraConfig(),
        )
