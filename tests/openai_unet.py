"""guided-diffusion's U-Net written down a second time, from its description: functions over a
state dict with its key names, in any dtype. What `load_openai` is tested against.

`random_state` makes the weights from the options alone, so neither half of it uses our U-Net.
"""

import math

import torch
import torch.nn.functional as F


class Spec:
    """The order of blocks: (name, c_in, c_out, attends, "up"/"down"/"" after it)."""

    def __init__(self, *, image_size, model_channels, channel_mult, num_res_blocks, **options):
        self.o = dict(
            in_channels=2,
            out_channels=2,
            attention_resolutions=(),
            heads=lambda channels: 1,
            groups=4,
            adaptive=False,
            resblock_updown=False,
            num_classes=None,
            pool=None,  # of a classifier of `out_channels` classes: "attention" or "adaptive"
        )
        self.o |= options
        self.mc = model_channels
        first = int(channel_mult[0] * model_channels)
        self.inputs = [("conv", 2, first)]
        ds, ch, skips = 1, first, [first]
        attends = [image_size // r for r in self.o["attention_resolutions"]]
        for level, mult in enumerate(channel_mult):
            for _ in range(num_res_blocks):
                out = int(mult * model_channels)
                self.inputs.append(("res", ch, out, ds in attends, ""))
                ch = out
                skips.append(ch)
            if level < len(channel_mult) - 1:
                kind = "res" if self.o["resblock_updown"] else "op"
                self.inputs.append((kind, ch, ch, False, "down"))
                skips.append(ch)
                ds *= 2
        self.middle, self.positions = ch, (image_size // ds) ** 2
        self.outputs = []
        for level, mult in list(enumerate(channel_mult))[::-1]:
            for i in range(num_res_blocks + 1):
                out = int(mult * model_channels)
                up = level > 0 and i == num_res_blocks
                self.outputs.append((ch + skips.pop(), out, ds in attends, up))
                ch = out
                ds = ds // 2 if up else ds
        self.last = ch


def random_state(spec: Spec) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(5)
    state, temb = {}, 4 * spec.mc

    def put(name, *shape):
        fan_in = math.prod(shape[1:])
        state[f"{name}.weight"] = torch.randn(shape, generator=g) / fan_in**0.5
        state[f"{name}.bias"] = 0.3 * torch.randn(shape[0], generator=g)

    def norm(name, c):
        put(name, c)
        state[f"{name}.weight"] = 1 + 0.3 * torch.randn(c, generator=g)

    def res(name, c_in, c_out):
        norm(f"{name}.in_layers.0", c_in)
        put(f"{name}.in_layers.2", c_out, c_in, 3, 3)
        put(f"{name}.emb_layers.1", c_out * (2 if spec.o["adaptive"] else 1), temb)
        norm(f"{name}.out_layers.0", c_out)
        put(f"{name}.out_layers.3", c_out, c_out, 3, 3)
        if c_in != c_out:
            put(f"{name}.skip_connection", c_out, c_in, 1, 1)

    def attention(name, c):
        norm(f"{name}.norm", c)
        put(f"{name}.qkv", 3 * c, c, 1)
        put(f"{name}.proj_out", c, c, 1)

    put("time_embed.0", temb, spec.mc)
    put("time_embed.2", temb, temb)
    if spec.o["num_classes"]:
        put("label_emb", spec.o["num_classes"], temb)
        del state["label_emb.bias"]
    for i, (kind, c_in, c_out, *rest) in enumerate(spec.inputs):
        if kind == "conv":
            put("input_blocks.0.0", c_out, spec.o["in_channels"], 3, 3)
        elif kind == "op":
            put(f"input_blocks.{i}.0.op", c_out, c_in, 3, 3)
        else:
            res(f"input_blocks.{i}.0", c_in, c_out)
            if rest[0]:
                attention(f"input_blocks.{i}.1", c_out)
    res("middle_block.0", spec.middle, spec.middle)
    attention("middle_block.1", spec.middle)
    res("middle_block.2", spec.middle, spec.middle)
    if spec.o["pool"]:
        norm("out.0", spec.middle)
        if spec.o["pool"] == "adaptive":
            put("out.3", spec.o["out_channels"], spec.middle, 1, 1)
            return state
        put("out.2.qkv_proj", 3 * spec.middle, spec.middle, 1)
        put("out.2.c_proj", spec.o["out_channels"], spec.middle, 1)
        position = torch.randn(spec.middle, spec.positions + 1, generator=g)
        state["out.2.positional_embedding"] = position
        return state
    for i, (c_in, c_out, attends, up) in enumerate(spec.outputs):
        res(f"output_blocks.{i}.0", c_in, c_out)
        if attends:
            attention(f"output_blocks.{i}.1", c_out)
        if up:
            place = f"output_blocks.{i}.{2 if attends else 1}"
            if spec.o["resblock_updown"]:
                res(place, c_out, c_out)
            else:
                put(f"{place}.conv", c_out, c_out, 3, 3)
    norm("out.0", spec.last)
    put("out.2", spec.o["out_channels"], spec.last, 3, 3)
    return state


def rows(order: str, head: int, part: int, heads: int, d: int) -> list[int]:
    """The channels of qkv that are a head's q, k or v (part 0, 1, 2)."""
    if order == "h3d":
        return [(3 * head + part) * d + i for i in range(d)]
    if order == "3hd":
        return [(heads * part + head) * d + i for i in range(d)]
    return [3 * (head * d + i) + part for i in range(d)]


def forward(spec: Spec, state: dict, order: str, x, t, y=None):
    """The network's output in x.dtype; `order` is that of qkv's channels."""
    w = {k: v.to(x.dtype) if v.dtype != x.dtype else v for k, v in state.items()}

    def conv(name, h, **options):
        return F.conv2d(h, w[f"{name}.weight"], w[f"{name}.bias"], **options)

    def dense(name, h):
        return F.linear(h, w[f"{name}.weight"].flatten(1), w[f"{name}.bias"])

    def norm(name, h):
        return F.group_norm(h, spec.o["groups"], w[f"{name}.weight"], w[f"{name}.bias"], 1e-5)

    def sample(h, way):
        if way == "up":
            return h.repeat_interleave(2, 2).repeat_interleave(2, 3)
        n, c, height, width = h.shape
        return h.reshape(n, c, height // 2, 2, width // 2, 2).mean((3, 5)) if way else h

    def res(name, h, way=""):
        x = h
        h = sample(F.silu(norm(f"{name}.in_layers.0", h)), way)
        x = sample(x, way)
        h = conv(f"{name}.in_layers.2", h, padding=1)
        shift = dense(f"{name}.emb_layers.1", F.silu(emb))[:, :, None, None]
        if spec.o["adaptive"]:
            scale, shift = shift.chunk(2, 1)
            h = norm(f"{name}.out_layers.0", h) * (1 + scale) + shift
        else:
            h = norm(f"{name}.out_layers.0", h + shift)
        h = conv(f"{name}.out_layers.3", F.silu(h), padding=1)
        if f"{name}.skip_connection.weight" in w:
            x = conv(f"{name}.skip_connection", x)
        return x + h

    def attention(name, h):
        n, c, height, width = h.shape
        flat = norm(f"{name}.norm", h).reshape(n, c, height * width)
        qkv = dense(f"{name}.qkv", flat.transpose(1, 2)).transpose(1, 2)
        out = dense(f"{name}.proj_out", mix(qkv, order).transpose(1, 2)).transpose(1, 2)
        return h + out.reshape(n, c, height, width)

    def mix(qkv, order):  # (n, 3c, s) → (n, c, s)
        c = qkv.shape[1] // 3
        heads = spec.o["heads"](c)
        d, out = c // heads, []
        for head in range(heads):
            q, k, v = (qkv[:, rows(order, head, part, heads, d)] for part in range(3))
            weight = torch.einsum("bct,bcs->bts", q * d**-0.25, k * d**-0.25).softmax(-1)
            out.append(torch.einsum("bts,bcs->bct", weight, v))
        return torch.cat(out, 1)

    def pool(h):
        h = F.silu(norm("out.0", h))
        if spec.o["pool"] == "adaptive":
            return dense("out.3", h.mean((2, 3)))
        h = h.flatten(2)
        h = torch.cat([h.mean(2, keepdim=True), h], 2) + w["out.2.positional_embedding"]
        h = mix(dense("out.2.qkv_proj", h.transpose(1, 2)).transpose(1, 2), "3hd")
        return dense("out.2.c_proj", h.transpose(1, 2))[:, 0]

    half = spec.mc // 2
    rate = torch.exp(-math.log(10000) * torch.arange(half, dtype=x.dtype) / half)
    angle = t.to(x.dtype)[:, None] * rate
    emb = dense("time_embed.0", torch.cat([angle.cos(), angle.sin()], 1))
    emb = dense("time_embed.2", F.silu(emb))
    if y is not None:
        emb = emb + w["label_emb.weight"][y]

    h, skips = x, []
    for i, (kind, _, _, *rest) in enumerate(spec.inputs):
        if kind == "conv":
            h = conv("input_blocks.0.0", h, padding=1)
        elif kind == "op":
            h = conv(f"input_blocks.{i}.0.op", h, stride=2, padding=1)
        else:
            h = res(f"input_blocks.{i}.0", h, rest[1])
            h = attention(f"input_blocks.{i}.1", h) if rest[0] else h
        skips.append(h)
    h = res("middle_block.2", attention("middle_block.1", res("middle_block.0", h)))
    if spec.o["pool"]:
        return pool(h)
    for i, (_, _, attends, up) in enumerate(spec.outputs):
        h = res(f"output_blocks.{i}.0", torch.cat([h, skips.pop()], 1))
        h = attention(f"output_blocks.{i}.1", h) if attends else h
        place = f"output_blocks.{i}.{2 if attends else 1}"
        if up and spec.o["resblock_updown"]:
            h = res(place, h, "up")
        elif up:
            h = conv(f"{place}.conv", sample(h, "up"), padding=1)
    return conv("out.2", F.silu(norm("out.0", h)), padding=1)
