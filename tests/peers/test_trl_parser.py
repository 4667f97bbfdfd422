"""TRL's own parser of scripts makes a CLPConfig as it makes a GRPOConfig."""

import pytest

pytest.importorskip("trl")

from trl import ScriptArguments, TrlParser

from clp_engine import CLPConfig


def test_flags_of_a_script_make_the_config_that_its_arguments_make(tmp_path):
    words = """--output_dir there --reward_weights 1 2 --logging_steps 5 --save_steps 0.5 --bf16 false --beta 0.04
        --eval_strategy epoch --report_to tensorboard --scale_rewards group --target_modules q_proj v_proj""".split()
    words += ["--lr_scheduler_kwargs", '{"num_cycles": 2}', "--dataset_name", "x"]
    script, parsed = TrlParser((ScriptArguments, CLPConfig)).parse_args_and_config(words)
    made = CLPConfig(
        output_dir="there",
        reward_weights=[1, 2],
        logging_steps=5,
        save_steps=0.5,
        bf16=False,
        beta=0.04,
        eval_strategy="epoch",
        report_to=["tensorboard"],
        scale_rewards="group",
        target_modules=["q_proj", "v_proj"],
        lr_scheduler_kwargs={"num_cycles": 2},
    )
    assert script.dataset_name == "x" and parsed == made
    assert TrlParser((CLPConfig,)).parse_args_and_config([])[0] == CLPConfig()


def test_a_yaml_file_of_a_script_is_read_and_what_is_not_a_setting_is_refused(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("output_dir: there\nlearning_rate: 1.0e-5\nmodel_init_kwargs:\n  dtype: bfloat16\n")
    (parsed,) = TrlParser((CLPConfig,)).parse_args_and_config(["--config", str(file)])
    assert parsed == CLPConfig("there", learning_rate=1e-5, model_init_kwargs={"dtype": "bfloat16"})
    file.write_text("torch_compile: true\n")
    with pytest.raises(ValueError, match="torch_compile"):
        TrlParser((CLPConfig,)).parse_args_and_config(["--config", str(file)])
