"""Training forward of the Hugging Face modules: the same weights and result, with branches packed side by side.

Hugging Face's own forward takes one dialogue a sequence; this one lets all branches of ``packing.py`` share the keys
and values of the visual prefix.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from packing import Batch, prefix
from torch import nn
from transformers import LlavaForConditionalGeneration

PATCH_HEADS = (6, 6, 2, 10, 9)  # kind, colour, size, digit, place


class PatchHeads(nn.Module):
    """Linear readouts of a cell's content from each of the tower's features or visual tokens; dropped after training.

    On the features they stand in for CLIP's pre-training. On the visual tokens they keep the projector from losing what
    the language model doesn't use yet: without them shapes faded there (probed at 65 %, in the features at 99.9 %)
    before the words for them were learned.
    """

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.heads = nn.ModuleList(nn.Linear(width, n) for n in PATCH_HEADS)

    def forward(self, features: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cross entropy summed over the readouts.

        Args:
            features: [n, visual tokens, width].
            targets: [n, 5, visual tokens], IGNORE where undefined.

        Returns:
            The loss, and the accuracy of each readout [5].
        """
        features, loss, accuracy = self.norm(features), 0.0, []
        for head, wanted in zip(self.heads, targets.flatten(2).unbind(1)):
            logits = head(features).float().flatten(0, 1)
            loss = loss + F.cross_entropy(logits, wanted.flatten())
            accuracy.append((logits.argmax(-1) == wanted.flatten())[wanted.flatten() >= 0].float().mean())
        return loss, torch.stack(accuracy)


class GroundHead(nn.Module):
    """Linear readout, halfway through the decoder, of the places of what a noun phrase means; dropped after training.

    An answer of one bit says little about why it is right: relations stayed at chance for thousands of steps. Where
    a phrase's objects are is nine bits, and counting, existence and relations follow from it.
    """

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 9)

    def forward(self, hidden: torch.Tensor, grounds: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Binary cross entropy summed over places.

        Args:
            hidden: [n, rows * length, width].
            grounds: [n, rows, length], as in ``Batch``.

        Returns:
            The loss, and the share of phrases with all nine places right.
        """
        bits = grounds.flatten(1)
        known = bits >= 0
        wanted = (bits[known][:, None] >> torch.arange(9, device=bits.device)) & 1
        logits = self.head(self.norm(hidden[known])).float()
        loss = F.binary_cross_entropy_with_logits(logits, wanted.float(), reduction="none").sum(-1).mean()
        return loss, ((logits > 0) == (wanted > 0)).all(-1).float().mean()


def vision_features(model: LlavaForConditionalGeneration, pixels: torch.Tensor) -> torch.Tensor:
    """Output of the last but one layer of the tower without the class token, [n, visual tokens, width]."""
    tower = getattr(model.model.vision_tower, "vision_model", model.model.vision_tower)
    hidden = tower.pre_layrnorm(tower.embeddings(pixels))
    for layer in tower.encoder.layers[:-1]:
        hidden = layer(hidden, None)
        hidden = hidden[0] if isinstance(hidden, tuple) else hidden
    return hidden[:, 1:]


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-b, a), dim=-1) * sin


def block(
    x: torch.Tensor,
    norm1: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, o: torch.Tensor,
    norm2: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor,
    cos: torch.Tensor, sin: torch.Tensor, mask: torch.Tensor, n_prefix: int, n_heads: int, eps: float,
) -> torch.Tensor:  # fmt: skip
    """One LLaMA layer over a prefix and its branches.

    Args:
        x: [n, n_prefix + rows * length, width].
        norm1 ... down: the layer's weights.
        cos, sin: [n, 1, n_prefix + rows * length, head size].
        mask: bool [n * rows, 1, length, n_prefix + length]; True is visible.

    Returns:
        Same shape as ``x``.
    """
    n, n_tokens, width = x.shape
    rows = mask.shape[0] // n
    length = mask.shape[2]
    h = F.rms_norm(x, (width,), norm1, eps)
    query, key, value = F.linear(h, torch.cat((q, k, v))).view(n, n_tokens, 3, n_heads, -1).permute(2, 0, 3, 1, 4)
    query, key = _rotate(query, cos, sin), _rotate(key, cos, sin)

    def of_rows(t: torch.Tensor) -> torch.Tensor:
        # [n, heads, rows * length, size] -> [n, rows, heads, length, size]
        return t[:, :, n_prefix:].reshape(n, n_heads, rows, length, -1).transpose(1, 2)

    def with_prefix(t: torch.Tensor) -> torch.Tensor:
        shared = t[:, None, :, :n_prefix].expand(-1, rows, -1, -1, -1)
        return torch.cat((shared, of_rows(t)), dim=3).flatten(0, 1)

    seen = F.scaled_dot_product_attention(
        query[:, :, :n_prefix], key[:, :, :n_prefix], value[:, :, :n_prefix], is_causal=True
    )
    told = F.scaled_dot_product_attention(
        of_rows(query).flatten(0, 1), with_prefix(key), with_prefix(value), attn_mask=mask
    )
    told = told.view(n, rows, n_heads, length, -1).permute(0, 1, 3, 2, 4).reshape(n, rows * length, -1)
    x = x + F.linear(torch.cat((seen.transpose(1, 2).flatten(2), told), dim=1), o)
    h = F.rms_norm(x, (width,), norm2, eps)
    gated, raised = F.linear(h, torch.cat((gate, up))).chunk(2, dim=-1)
    return x + F.linear(F.silu(gated) * raised, down)


def compile_block() -> None:
    """Has ``forward`` run compiled layers from now on."""
    global block
    block = torch.compile(block, dynamic=False)


class Outputs(NamedTuple):
    """What a forward gives.

    Attributes:
        logits: [m, vocabulary] of the m targets that are not IGNORE, in row-major order.
        chosen: bool [n, rows, length]: those targets.
        features: [n, visual tokens, vision width], of the tower.
        visual: [n, visual tokens, width], the visual tokens.
        middle: [n, rows * length, width], the text's hidden states halfway through the decoder.
    """

    logits: torch.Tensor
    chosen: torch.Tensor
    features: torch.Tensor
    visual: torch.Tensor
    middle: torch.Tensor


def forward(model: LlavaForConditionalGeneration, batch: Batch) -> Outputs:
    """Logits of every answer token of a batch, and what the auxiliary losses look at.

    Args:
        model: the model; weights in float32.
        batch: n samples.
    """
    lm = model.model.language_model
    features = vision_features(model, batch.pixels)
    visual = model.model.multi_modal_projector(features)
    n, rows, length = batch.tokens.shape
    start = lm.embed_tokens(torch.tensor(prefix(), device=batch.tokens.device)).expand(n, -1, -1)
    x = torch.cat((start, visual.to(start.dtype), lm.embed_tokens(batch.tokens.flatten(1))), dim=1)
    n_prefix = len(prefix()) + visual.shape[1]

    positions = torch.cat(
        (torch.arange(n_prefix, device=x.device).expand(n, -1), n_prefix + batch.positions.flatten(1)), dim=1
    )
    cos, sin = lm.rotary_emb(x, positions)
    branch = batch.branch.flatten(0, 1)
    own = branch[:, :, None] == branch[:, None, :]
    own &= torch.ones(length, length, dtype=torch.bool, device=x.device).tril()
    mask = F.pad(own, (n_prefix, 0), value=True)[:, None]

    config = model.config.text_config
    for i, layer in enumerate(lm.layers):
        if i == len(lm.layers) // 2:
            middle = x[:, n_prefix:]
        a, m = layer.self_attn, layer.mlp
        x = block(
            x, layer.input_layernorm.weight, a.q_proj.weight, a.k_proj.weight, a.v_proj.weight, a.o_proj.weight,
            layer.post_attention_layernorm.weight, m.gate_proj.weight, m.up_proj.weight, m.down_proj.weight,
            cos[:, None], sin[:, None], mask, n_prefix, config.num_attention_heads, config.rms_norm_eps,
        )  # fmt: skip
    chosen = batch.targets >= 0
    return Outputs(model.lm_head(lm.norm(x[:, n_prefix:][chosen.flatten(1)])), chosen, features, visual, middle)
