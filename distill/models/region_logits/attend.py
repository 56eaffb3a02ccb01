"""Region logits of a class-token transformer by its own last attention: the class query looks at one region only."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distill.models.region_logits.layout import Layout, TimmModel
from distill.models.region_logits.mechanisms import Sight


class AttendHead(nn.Module):
    """`token:attend`. In the last block the class tokens attend to themselves and to the region's patch tokens, nothing else.

    A patch token's attention is weighted by (its share of the region) x (number of patch tokens), as if the region filled the
    image; so the whole image gives the model's own logits, and a region's logits depend on no other token of the last block's
    input. Only the class tokens are recomputed, then the model's own norm and head run. No paper defines this.
    For blocks of timm's `VisionTransformer` kind (norm1, attn.qkv, ls1, norm2, mlp, ls2).
    """

    kind = "token:attend"
    bias: Tensor

    def __init__(self, layout: Layout, matrix: Tensor) -> None:
        super().__init__()
        [part] = layout.parts
        self.prefix = part.prefix
        patches = (matrix * matrix.shape[1]).log()
        bias = torch.cat([patches.new_zeros(len(matrix), part.prefix), patches], dim=1)
        # every class token of every region is one query, region by region
        self.register_buffer("bias", bias.repeat_interleave(part.prefix, dim=0), persistent=False)

    def forward(self, model: TimmModel, sight: Sight) -> Tensor:
        """-> logits of each region, [B, R, K]; `sight.inner` is the input of the last block."""
        block, tokens = model.blocks[-1], sight.inner
        assert tokens is not None
        regions = sight.rows.shape[1]
        classes = tokens[:, : self.prefix].repeat(1, regions, 1)
        seen = self._attention(block.attn, block.norm1(tokens), regions)
        classes = classes + block.drop_path1(block.ls1(seen))
        classes = classes + block.drop_path2(block.ls2(block.mlp(block.norm2(classes))))
        flat = model.norm(classes).unflatten(1, (regions, self.prefix)).flatten(0, 1)
        return model.forward_head(flat).unflatten(0, (len(tokens), regions))

    def _attention(self, attention: Any, tokens: Tensor, regions: int) -> Tensor:
        """Normed tokens [B, L, C] -> what each class token of each region gathers, [B, R * P, C]."""
        width = attention.qkv.weight.shape[0] // 3
        weight, offset = attention.qkv.weight, attention.qkv.bias
        query = F.linear(tokens[:, : self.prefix], weight[:width], None if offset is None else offset[:width])
        both = F.linear(tokens, weight[width:], None if offset is None else offset[width:])
        key, value = both.chunk(2, dim=-1)
        heads = (attention.num_heads, -1)
        query, key, value = (t.unflatten(2, heads).transpose(1, 2) for t in (query, key, value))
        query, key = attention.q_norm(query), attention.k_norm(key)
        query = query.to(value.dtype).repeat(1, 1, regions, 1)
        gathered = F.scaled_dot_product_attention(
            query,
            key.to(value.dtype),
            value,
            attn_mask=self.bias.to(value.dtype),
            scale=attention.scale,
        )
        return attention.proj_drop(attention.proj(attention.norm(gathered.transpose(1, 2).flatten(2))))
