"""The U-Net of Stable Diffusion 1.5 in its real shape, with random weights."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTHS = (320, 640, 1280, 1280)


class Resnet(nn.Module):
    def __init__(self, inner: int, outer: int, time: int):
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(32, inner), nn.GroupNorm(32, outer)
        self.conv1 = nn.Conv2d(inner, outer, 3, padding=1)
        self.conv2 = nn.Conv2d(outer, outer, 3, padding=1)
        self.time_emb_proj = nn.Linear(time, outer)
        self.conv_shortcut = nn.Conv2d(inner, outer, 1) if inner != outer else nn.Identity()

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x))) + self.time_emb_proj(F.silu(time))[..., None, None]
        return self.conv_shortcut(x) + self.conv2(F.silu(self.norm2(h)))


class Attention(nn.Module):
    def __init__(self, width: int, context: int):
        super().__init__()
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k, self.to_v = (nn.Linear(context, width, bias=False) for _ in range(2))
        self.to_out = nn.Linear(width, width)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (8, -1)).transpose(1, 2)
                   for t in (self.to_q(x), self.to_k(context), self.to_v(context)))
        return self.to_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Transformer(nn.Module):
    def __init__(self, width: int, context: int):
        super().__init__()
        self.norm = nn.GroupNorm(32, width)
        self.proj_in, self.proj_out = (nn.Conv2d(width, width, 1) for _ in range(2))
        self.attn1, self.attn2 = Attention(width, width), Attention(width, context)
        self.norms = nn.ModuleList([nn.LayerNorm(width) for _ in range(3)])
        self.up, self.down = nn.Linear(width, 8 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        h = self.proj_in(self.norm(x)).flatten(2).mT
        seen = self.norms[0](h)
        h = h + self.attn1(seen, seen)
        h = h + self.attn2(self.norms[1](h), context)
        value, gate = self.up(self.norms[2](h)).chunk(2, -1)
        h = h + self.down(value * F.gelu(gate))
        return x + self.proj_out(h.mT.unflatten(-1, x.shape[2:]))


class UNet(nn.Module):
    def __init__(self, widths: tuple[int, ...] = WIDTHS, context: int = 768):
        super().__init__()
        first, last, time = widths[0], widths[-1], 4 * widths[0]
        self.conv_in, self.conv_out = (nn.Conv2d(*pair, 3, padding=1)
                                       for pair in ((4, first), (first, 4)))
        self.time = nn.Sequential(nn.Linear(first, time), nn.SiLU(), nn.Linear(time, time))
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        skips, here = [first], first
        for i, width in enumerate(widths):  # the last level has no attention
            for _ in range(2):
                self.down.append(nn.ModuleList([Resnet(here, width, time)] + [
                    Transformer(width, context)] * (i < 3)))
                skips, here = [*skips, width], width
            if i < 3:
                self.down.append(nn.ModuleList([nn.Conv2d(width, width, 3, 2, 1)]))
                skips.append(width)
        self.mid = nn.ModuleList([Resnet(last, last, time), Transformer(last, context),
                                  Resnet(last, last, time)])
        for i, width in reversed(list(enumerate(widths))):
            for k in range(3):
                parts = [Resnet(here + skips.pop(), width, time)]
                parts += [Transformer(width, context)] * (i < 3)
                parts += [nn.Conv2d(width, width, 3, padding=1)] * (k == 2 and i > 0)
                self.up.append(nn.ModuleList(parts))
                here = width
        self.norm = nn.GroupNorm(32, first)

    def forward(self, sample: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
        "Noisy latents [N, 4, h, w], levels [N], prompts [N, T, context]: the noise in them."
        half = self.conv_in.out_channels // 2
        speed = torch.exp(-9.21 / half * torch.arange(half, device=sample.device))
        angle = timestep[:, None] * speed
        time = self.time(torch.cat([angle.cos(), angle.sin()], -1).to(sample.dtype))
        x = self.conv_in(sample)
        skips = [x]
        for parts in self.down:
            x = self._through(parts, x, time, context)
            skips.append(x)
        x = self._through(self.mid, x, time, context)
        for parts in self.up:
            x = self._through(parts, torch.cat([x, skips.pop()], 1), time, context)
        return self.conv_out(F.silu(self.norm(x)))

    @staticmethod
    def _through(parts: nn.ModuleList, x: Tensor, time: Tensor, context: Tensor) -> Tensor:
        for part in parts:
            if isinstance(part, nn.Conv2d):
                wide = part.stride == (1, 1)
                x = part(F.interpolate(x, scale_factor=2.0, mode="nearest") if wide else x)
            else:
                x = part(x, time if isinstance(part, Resnet) else context)
        return x
