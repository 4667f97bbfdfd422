"""The choice of a backbone for a model, with a trial before its use."""

from __future__ import annotations

from transformers import PreTrainedModel

from clp_engine.core.errors import ConfigError
from clp_engine.core.transformers_releases import keep_softcap
from clp_engine.models.backbones.base import Backbone
from clp_engine.models.backbones.causal import CausalBackbone
from clp_engine.models.backbones.encoder_decoder import EncoderDecoderBackbone
from clp_engine.models.backbones.whole_sequences import WholeSequenceBackbone


def make_backbone(model: PreTrainedModel) -> Backbone:
    """The backbone for a causal or encoder-decoder language model, tried on a few tokens. Raises ConfigError for others."""
    keep_softcap(model)
    if getattr(model.config, "is_encoder_decoder", False):
        backbone = EncoderDecoderBackbone(model)
        backbone.check_head()
        return backbone
    try:
        backbone = CausalBackbone(model)
        backbone.check_head()
        _ = backbone.packing_fault  # tried here, where no blend is in force
    except ConfigError as error:
        backbone = WholeSequenceBackbone(model, str(error))
        backbone.check_head()
    return backbone
