"""Hugging Face's T5 in PyTorch at the same shape: an encoder-decoder of other details (relative positions, no QK-norm)."""

import contextlib
import os

import numpy as np
import torch
from transformers import T5Config, T5ForConditionalGeneration

from peers.case import BETA1, BETA2, CLIP, DECAY, EPS, RATE, Case, V


class Trainer:
    def __init__(self, case: Case):
        torch.set_num_threads(len(os.sched_getaffinity(0)))
        s = case.run.shape
        config = T5Config(vocab_size=V, d_model=s.D, d_kv=s.H, d_ff=s.F, num_layers=s.L_input, num_decoder_layers=s.L,
                          num_heads=s.N, feed_forward_proj="gated-silu", dropout_rate=0.0, decoder_start_token_id=256,
                          pad_token_id=258, eos_token_id=257)  # fmt: skip
        torch.manual_seed(0)
        self.model = T5ForConditionalGeneration(config)
        self.model.train()
        self.parameters = list(self.model.parameters())
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=RATE, betas=(BETA1, BETA2), eps=EPS, weight_decay=DECAY, fused=True
        )
        x, y = case.tokens[..., : case.S].astype(np.int64), case.tokens[..., case.S :].astype(np.int64)
        self.data = [(torch.from_numpy(a), torch.from_numpy(b)) for a, b in zip(x, y, strict=True)]
        self.cast = torch.autocast("cpu", torch.bfloat16) if case.precision == "bf16" else contextlib.nullcontext()
        self.taken = 0

    def steps(self, count):
        loss = None
        for _ in range(count):
            inputs, labels = self.data[self.taken % len(self.data)]
            with self.cast:
                loss = self.model(input_ids=inputs, labels=labels).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.parameters, CLIP)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            self.taken += 1
        return loss.item()
