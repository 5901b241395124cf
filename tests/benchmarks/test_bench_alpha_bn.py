"""α-BN against the peers' way of writing it, and Core's loss against its definition."""

import copy

import pytest
import torch
from clock import in_turn, row
from torch import nn
from torch.nn import functional as F

from adaptlab import recipes
from adaptlab.testtime.alpha_bn import class_correlation, convert_alpha_bn, core_loss


class Peer(nn.Module):
    "As in the robustness repositories: a helper layer with momentum 1 reads the statistics."

    def __init__(self, bn, weight):
        super().__init__()
        self.bn, self.weight = bn, weight
        self.helper = nn.BatchNorm2d(bn.num_features, momentum=1.0, affine=False)

    def forward(self, x):
        self.helper(x)
        mean = (1 - self.weight) * self.bn.running_mean + self.weight * self.helper.running_mean
        var = (1 - self.weight) * self.bn.running_var + self.weight * self.helper.running_var
        return F.batch_norm(x, mean, var, self.bn.weight, self.bn.bias, False, 0, self.bn.eps)


@pytest.mark.parametrize("channels_last", [False, True])
def test_a_forward_pass(channels_last):
    torch.manual_seed(0)
    model = recipes.SmallCNN((32, 64, 128), in_channels=3).eval()
    x = torch.randn(64, 3, 32, 32)
    if channels_last:
        model, x = (t.to(memory_format=torch.channels_last) for t in (model, x))
    ours, theirs = convert_alpha_bn(model, 0.9, unbiased=True), copy.deepcopy(model)
    for block in theirs.blocks:
        block[1] = Peer(block[1], 0.1)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), atol=1e-4, rtol=1e-3)
        found = in_turn(lambda: ours(x), lambda: theirs(x), rounds=9)
    row(f"α-BN, a forward pass{', channels last' * channels_last}", *found, bound=1.0)


def test_the_loss():
    logits = torch.randn(64, 1000, generator=torch.Generator().manual_seed(0))

    def by_definition():
        r = class_correlation(logits.softmax(1))
        return (r.sum() - r.trace()) / len(r)

    torch.testing.assert_close(core_loss(logits), by_definition())
    row("Core's loss, B = 64, C = 1,000", *in_turn(lambda: core_loss(logits), by_definition),
        bound=1.0)
