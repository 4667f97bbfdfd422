"""The engine for models whose completions share nothing: transformers' generate writes one prompt after another.

No prompt is padded, so that a model's handling of padding does not matter. State-space and recurrent models use this engine.
"""

from __future__ import annotations

import torch

from clp_engine.rollouts.rows import Rows
from clp_engine.rollouts.types import OWN_ENGINE, Rollout, RolloutRequest


class Generate:
    """Draws by transformers' generate; see `types.RolloutEngine`."""

    def run(self, request: RolloutRequest) -> Rollout:
        model, group, blend, rows = request.source.conditioned, request.group, request.blend, Rows(request)
        for p in range(len(request.prompt_ids)):
            chosen = torch.arange(p * group, (p + 1) * group, device=request.prompt_ids.device)
            rows.keep(chosen[:0])
            rows.join(chosen)

            def draw(logits: torch.Tensor) -> tuple[torch.Tensor, bool]:
                drawn = rows.draw(logits)
                return drawn, bool(rows.done.all())

            prompt = request.prompt_ids[p : p + 1, request.prompt_mask[p]]
            with model.blend.use(None if blend is None else blend[p : p + 1].expand(group, -1)):
                model.backbone.generate(prompt, group, rows.limit, draw)
        return request.rollout(*rows.completions(), engine=OWN_ENGINE)
