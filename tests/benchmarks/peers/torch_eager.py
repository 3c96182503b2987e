"""torch_gpt without torch.compile."""

from peers import torch_gpt


class Trainer(torch_gpt.Trainer):
    compiled = False
