"""Hugging Face's T5 in PyTorch at the same shape: an encoder-decoder of other details (relative positions, no QK-norm)."""

import numpy as np
import torch
from transformers import T5Config, T5ForConditionalGeneration

from peers import torch_gpt
from peers.case import BETA1, BETA2, DECAY, EPS, RATE, Case, V


class Trainer(torch_gpt.Trainer):
    def build(self, case: Case):
        s = case.run.shape
        config = T5Config(vocab_size=V, d_model=s.D, d_kv=s.H, d_ff=s.F, num_layers=s.L_input, num_decoder_layers=s.L,
                          num_heads=s.N, feed_forward_proj="gated-silu", dropout_rate=0.0, decoder_start_token_id=256,
                          pad_token_id=258, eos_token_id=257)  # fmt: skip
        torch.manual_seed(0)
        self.model = T5ForConditionalGeneration(config)
        self.model.train()
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=RATE, betas=(BETA1, BETA2), eps=EPS, weight_decay=DECAY, fused=True
        )
        x, y = case.tokens[..., : case.S].astype(np.int64), case.tokens[..., case.S :].astype(np.int64)
        self.data = [(torch.from_numpy(a), torch.from_numpy(b)) for a, b in zip(x, y, strict=True)]

    def loss(self, inputs, labels):
        return self.model(input_ids=inputs, labels=labels).loss
