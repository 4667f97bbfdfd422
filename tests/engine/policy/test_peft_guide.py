"""docs/peft.md: its Python runs, in order, and so do its commands; what they wrote is what the page says."""

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from clp_engine.cli.main import main
from clp_engine.tasks.docsum import checkpoint_path

pytestmark = pytest.mark.check
PAGE = Path(__file__).parents[3] / "docs" / "peft.md"


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.M | re.S)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Adapters that peft wrote, as a user of the page has them."""
    folder = tmp_path_factory.mktemp("guide")
    for seed, (name, layers) in enumerate(
        {"coverage": ["q_proj", "v_proj"], "brevity": ["down_proj"]}.items()
    ):
        torch.manual_seed(seed)
        model = get_peft_model(
            AutoModelForCausalLM.from_pretrained(checkpoint_path()),
            LoraConfig(r=4 + 4 * seed, lora_alpha=8, target_modules=layers, task_type="CAUSAL_LM"),
        )
        for parameter_name, parameter in model.named_parameters():
            if "lora_B" in parameter_name:
                torch.nn.init.normal_(parameter, std=0.02)
        model.save_pretrained(folder / "adapters" / name)
    return folder


@pytest.fixture(scope="module")
def followed(folder):
    """What is there after every block of Python has run."""
    scope = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for block in blocks("python"):
            exec(compile(block, str(PAGE), "exec"), scope)
    yield scope
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_the_python_of_the_page_runs_and_makes_the_same_blend_in_peft_and_from_the_adapters(followed, folder):
    policy, ids = followed["policy"], followed["inputs"]["input_ids"]
    weights = {"coverage": 0.7, "brevity": 0.3}
    with torch.no_grad():
        expected = policy(ids, weights=weights).logits.log_softmax(-1)
        for found in (
            followed["again"](ids, weights=weights),
            followed["peft_model"](ids),
            policy.attach()(ids, weights=weights),
        ):
            assert (found.logits.log_softmax(-1) - expected).abs().max() < 1e-4
    assert 0 < followed["error"] < 1
    ranks = {
        p.name: json.loads((p / "adapter_config.json").read_text())["r"]
        for p in (folder / "runs/served").iterdir()
    }
    assert ranks == {"brevity-0": 4, "brevity-50": 12, "brevity-100": 8}


def test_its_commands_run_and_print_what_vllm_needs(followed, folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    (commands,) = blocks("bash")
    for line in commands.splitlines():
        program, *arguments = shlex.split(line)
        assert program == "clp-engine" and main(arguments) == 0
    printed = capsys.readouterr().out
    assert "adapter: runs/each/brevity" in printed and "blend: runs/each/clp_blend.json" in printed
    assert "rank: 12 (for vLLM: --max-lora-rank 16)" in printed
    assert re.search(r"rank: 8, relative error of the deltas 0\.\d+ \(for vLLM: --max-lora-rank 8\)", printed)
    assert (folder / "runs/model/model.safetensors").is_file()


def test_the_page_knows_vllm_s_ranks():
    from clp_engine.policy.peft.writing import VLLM_RANKS

    assert ", ".join(map(str, VLLM_RANKS)) in PAGE.read_text(encoding="utf-8")
