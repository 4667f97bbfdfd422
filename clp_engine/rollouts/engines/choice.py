"""The choice of the engine that draws, and the reasons against a faster one."""

from __future__ import annotations

from clp_engine.core.errors import ConfigError
from clp_engine.models.conditioned import ConditionedModel
from clp_engine.rollouts.engines import cuda_graphs, native
from clp_engine.rollouts.engines.base import DecoderRequest, StepDecoder, Stepwise
from clp_engine.rollouts.engines.cuda_graphs import GraphDecoder
from clp_engine.rollouts.engines.generate import Generate
from clp_engine.rollouts.engines.modules import ApartDecoder, ModulesDecoder
from clp_engine.rollouts.engines.native import NativeDecoder
from clp_engine.rollouts.engines.trials import SWITCH, insisted
from clp_engine.rollouts.types import RolloutEngine, RolloutRequest, Samplable


def engine_of(source: Samplable) -> RolloutEngine:
    """The source's own engine, or the fastest that serves the source's model."""
    if source.engine is not None:
        return source.engine
    return Stepwise(_decoder) if source.conditioned.shares_prompts else Generate()


def _decoder(request: RolloutRequest) -> StepDecoder:
    return step_decoder(DecoderRequest.of(request))


def step_decoder(request: DecoderRequest) -> StepDecoder:
    """The native decoder on a CPU, graphs over fixed slots on a GPU, or transformers' modules if neither serves the model. Only
    the modules run the hooks that gather a sharded layer."""
    model = request.model
    modules = ApartDecoder if request.alone else ModulesDecoder
    graphs = model.weights_stay and model.device.type == "cuda"
    if graphs and cuda_graphs.serves(model):
        return GraphDecoder(request, cuda_graphs.choose(model))
    if graphs or not model.weights_stay:
        if insisted():
            raise ConfigError(f"{SWITCH}=native: {'; '.join(detours(model))}")
        return modules(request)
    plan = native.choose(model)
    return modules(request) if plan is None else NativeDecoder(request, plan)


def detours(model: ConditionedModel) -> list[str]:
    """The parts of the fast path that a model cannot use, one sentence each with the reason."""
    fault = model.backbone.packing_fault
    if not model.shares_prompts:
        return [
            f"completions are written by transformers' generate and scored as whole sequences, each with its prompt: {fault}"
        ]
    found = []
    if fault is not None:
        found.append(f"scoring pads its batches and computes prompts and completions in two passes: {fault}")
    if not model.weights_stay:
        found.append(
            "decoding goes through transformers' modules: the base model is sharded, and others keep addresses of weights"
        )
    elif model.device.type == "cpu" and (reason := native.plan(model).reason) is not None:
        found.append(f"decoding goes through transformers' modules: {reason}")
    elif model.device.type == "cuda" and not cuda_graphs.serves(model):
        found.append(
            "decoding runs without CUDA graphs: the blend or the attention is not that of fixed buffers"
        )
    elif model.device.type == "cuda" and (reason := cuda_graphs.plan(model).reason) is not None:
        found.append(f"decoding goes through transformers' modules, in CUDA graphs: {reason}")
    return found
