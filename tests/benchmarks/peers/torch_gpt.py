"""In the style of nanoGPT: PyTorch modules, scaled_dot_product_attention, torch.compile, autocast for bf16."""

import contextlib
import os

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from peers.case import BETA1, BETA2, CLIP, DECAY, EPS, NORM_EPS, RATE, ROPE_BASE, Case


def rope(x, cos, sin):
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


class Block(nn.Module):
    def __init__(self, D, N, H, width):
        super().__init__()
        self.N, self.H = N, H
        self.attn_norm, self.mlp_norm = nn.RMSNorm(D, NORM_EPS), nn.RMSNorm(D, NORM_EPS)
        self.q_norm, self.k_norm = nn.RMSNorm(H, NORM_EPS), nn.RMSNorm(H, NORM_EPS)
        self.qkv, self.o = nn.Linear(D, 3 * N * H, bias=False), nn.Linear(N * H, D, bias=False)
        self.gate_up, self.down = nn.Linear(D, 2 * width, bias=False), nn.Linear(width, D, bias=False)

    def forward(self, x, cos, sin):
        B, T, _ = x.shape
        q, k, v = (a.view(B, T, self.N, self.H) for a in self.qkv(self.attn_norm(x)).chunk(3, dim=-1))
        q, k = rope(self.q_norm(q).transpose(1, 2), cos, sin), rope(self.k_norm(k).transpose(1, 2), cos, sin)
        mixed = F.scaled_dot_product_attention(q, k, v.transpose(1, 2), is_causal=True)
        x = x + self.o(mixed.transpose(1, 2).reshape(B, T, -1))
        gate, up = self.gate_up(self.mlp_norm(x)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * up)


class Decoder(nn.Module):
    def __init__(self, s, V, length):
        super().__init__()
        self.D, self.embed = s.D, nn.Embedding(V, s.D)
        self.blocks = nn.ModuleList(Block(s.D, s.N, s.H, s.F) for _ in range(s.L))
        self.norm = nn.RMSNorm(s.D, NORM_EPS)
        angle = torch.arange(length)[:, None] * ROPE_BASE ** (-torch.arange(s.H // 2) / (s.H // 2))
        self.register_buffer("cos", angle.cos())
        self.register_buffer("sin", angle.sin())

    def forward(self, tokens, labels):
        x = self.embed(tokens) * self.D**0.5
        for block in self.blocks:
            x = block(x, self.cos, self.sin)
        logits = self.norm(x) @ self.embed.weight.T
        return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=-1)

    @torch.no_grad()
    def load(self, tree):
        def put(parameter, *arrays):
            joined = np.concatenate([np.asarray(a).reshape(a.shape[0], -1) for a in arrays], axis=1)
            parameter.copy_(torch.from_numpy(joined.T.copy()))

        self.embed.weight.copy_(torch.from_numpy(np.asarray(tree["embedding_VD"])))
        layers = tree["shared"]["layers"]
        for i, block in enumerate(self.blocks):
            a, m = layers["attn"], layers["mlp"]
            put(block.qkv.weight, a["q_DNH"][i], a["k_DKH"][i], a["v_DKH"][i])
            put(block.o.weight, a["o_NHD"][i].reshape(-1, self.D))
            put(block.gate_up.weight, m["gate_DF"][i], m["up_DF"][i])
            put(block.down.weight, m["down_FD"][i])


class Trainer:
    compiled = True

    def __init__(self, case: Case):
        torch.set_num_threads(len(os.sched_getaffinity(0)))
        self.build(case)
        self.parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.cast = torch.autocast("cpu", torch.bfloat16) if case.precision == "bf16" else contextlib.nullcontext()
        self.taken = 0

    def build(self, case: Case):
        """Sets model, optimizer and data: one tuple of tensors for `loss` for each step."""
        model = Decoder(case.shape, case.parameters["embedding_VD"].shape[0], case.length)
        model.load(case.parameters)
        matrices = [p for block in model.blocks for p in block.parameters() if p.ndim == 2]
        others = [p for p in model.parameters() if not any(p is m for m in matrices)]
        groups = [{"params": matrices, "weight_decay": DECAY}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=RATE, betas=(BETA1, BETA2), eps=EPS, fused=True)
        self.model = torch.compile(model) if self.compiled else model
        inputs, labels, weights = case.sequences
        labels = np.where(weights > 0, labels, -1)
        self.data = [
            (torch.from_numpy(x).long(), torch.from_numpy(y).long()) for x, y in zip(inputs, labels, strict=True)
        ]

    def loss(self, *batch):
        return self.model(*batch)

    def steps(self, count):
        loss = None
        for _ in range(count):
            with self.cast:
                loss = self.loss(*self.data[self.taken % len(self.data)])
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.parameters, CLIP)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            self.taken += 1
        return loss.item()
