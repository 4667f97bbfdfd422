"""An evaluation by however many processes there are: python evaluating.py OUT, which is JSON."""

import json
import sys

import same_bits
import torch

from clp_engine import ConditionedPolicy, SamplingParams, evaluate
from clp_engine.training.parallel.processes import Parallel

torch.set_num_threads(1)
policy = ConditionedPolicy.from_pretrained(
    same_bits.model("qwen2"), ["even", "small"], tokenizer=same_bits.tokenizer("qwen2")
)
with torch.no_grad():
    for number, parameter in enumerate(policy.adapter_parameters().values()):
        parameter.normal_(0, 0.2, generator=torch.Generator().manual_seed(number))
evaluate(
    policy,
    [same_bits.even, same_bits.small],
    [row["prompt"] for row in same_bits.rows()],
    grid=4,
    batch_rows=6,
    num_generations=2,
    sampling=SamplingParams(5),
    bootstrap=20,
    progress=False,
    output_dir=json.loads(sys.argv[1]),
    parallel=Parallel.joined(use_cpu=True),
)
