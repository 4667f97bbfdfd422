"""Log-probs of a Llama- or Qwen2-like policy by its formula, in any dtype: what a decoder's are compared with.

    theta_l(w) = theta_l + sum_i c_i s_i B_i A_i        formed in float64, then rounded to the dtype, layer by layer
    x += W_o softmax(rope(W_q n) rope(W_k n)^T / sqrt(D)) W_v n,    x += W_down (silu(W_gate n) * W_up n),    n = norm(x)

Neither transformers' modules nor this project's kernels take part: they keep norms and rotations in float32 whatever the dtype.
Below float32, norms, softmax and the log-probs are float32, as transformers has them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clp_engine.models.low_rank_layers import ConditionedLinear
from clp_engine.policy.policy import ConditionedPolicy

FAMILIES = ("llama", "qwen2")


def blended_weight(module: nn.Module, coefficients: Tensor) -> Tensor:
    """(N, K) float64: the weight of a layer under the blend `coefficients` (D,)."""
    weight = module.weight.double()
    if not isinstance(module, ConditionedLinear):
        return weight
    at = 0
    for c, scale, rank in zip(coefficients.tolist(), module.scalings, module.ranks):
        b, a = module.lora_b[:, at : at + rank].double(), module.lora_a[at : at + rank].double()
        weight = weight + c * scale * b @ a
        at += rank
    return weight


@torch.no_grad()
def log_probs(
    policy: ConditionedPolicy, coefficients: Tensor, ids: Tensor, prompt: int, dtype: torch.dtype
) -> Tensor:
    """(B, S - prompt): log p(ids[:, t] | ids[:, :t]) for t >= prompt, of ids (B, S), all rows under `coefficients` (D,).
    Raises ValueError for a model of another family."""
    model, config = policy.model, policy.model.config
    if config.model_type not in FAMILIES or config.rope_parameters["rope_type"] != "default":
        raise ValueError(f"{config.model_type}: expected one of {', '.join(FAMILIES)}, with plain rotations")
    wide = torch.promote_types(dtype, torch.float32)
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads

    def linear(x: Tensor, module: nn.Module) -> Tensor:
        bias = None if module.bias is None else module.bias.to(dtype)
        return F.linear(x, blended_weight(module, coefficients).to(dtype), bias)

    def norm(x: Tensor, module: nn.Module) -> Tensor:
        y = x.to(wide)
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + config.rms_norm_eps)
        return module.weight.to(dtype) * y.to(dtype)

    (batch, length), device = ids.shape, ids.device
    even = torch.arange(0, width, 2, device=device, dtype=torch.float64)
    angles = torch.outer(
        torch.arange(length, device=device, dtype=torch.float64),
        config.rope_parameters["rope_theta"] ** (-even / width),
    )
    cos, sin = (f(angles).repeat(1, 2).to(dtype) for f in (torch.cos, torch.sin))

    def rotated(x: Tensor) -> Tensor:
        one, other = x.chunk(2, -1)
        return x * cos + torch.cat([-other, one], -1) * sin

    def by_head(x: Tensor, count: int) -> Tensor:
        return x.view(batch, length, count, width).transpose(1, 2)

    ahead = torch.ones(length, length, dtype=torch.bool, device=device).triu(1)
    x = model.model.embed_tokens.weight[ids].to(dtype)
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        n = norm(x, layer.input_layernorm)
        q = rotated(by_head(linear(n, attention.q_proj), heads))
        k = rotated(by_head(linear(n, attention.k_proj), kv_heads))
        v = by_head(linear(n, attention.v_proj), kv_heads)
        k, v = (t.repeat_interleave(heads // kv_heads, 1) for t in (k, v))
        scores = (q @ k.transpose(2, 3) * width**-0.5).masked_fill(ahead, -torch.inf)
        attended = scores.to(wide).softmax(-1).to(dtype) @ v
        x = x + linear(attended.transpose(1, 2).flatten(2), attention.o_proj)
        n = norm(x, layer.post_attention_layernorm)
        x = x + linear(F.silu(linear(n, mlp.gate_proj)) * linear(n, mlp.up_proj), mlp.down_proj)
    logits = linear(norm(x[:, prompt - 1 : -1], model.model.norm), policy.backbone.head.module)
    return logits.to(wide).log_softmax(-1).gather(-1, ids[:, prompt:, None])[..., 0]
