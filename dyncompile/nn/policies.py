"""Policies: what a gate decides by. Each gives logits of what to compute, and starts open for nearly every sample."""

from torch import Tensor, nn

from dyncompile.nn.gates import OPEN_LOGIT
from dyncompile.nn.heads import Feature, Pool


class FeedForwardPolicy(nn.Module):
    """Pool, normalise, two layers (the feed-forward gate of SkipNet, arXiv 1711.09485, and ConvNet-AIG, 1711.11503).

    Args:
        feature: What it reads.
        hidden: Width between the layers.
        outputs: Logits per row, `[N, outputs]`; 0 for one, `[N]`.
    """

    def __init__(self, feature: Feature, hidden: int, outputs: int = 0) -> None:
        super().__init__()
        self.pool = Pool(feature)
        self.norm = nn.LayerNorm(feature.channels)
        self.inner = nn.Linear(feature.channels, hidden)
        self.outer = nn.Linear(hidden, max(outputs, 1))
        self.squeeze = outputs == 0
        nn.init.constant_(self.outer.bias, OPEN_LOGIT)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Logits for features and, where they have one, their mask `[N, L]`."""
        logits = self.outer(self.inner(self.norm(self.pool(x, mask))).relu())
        return logits.squeeze(-1) if self.squeeze else logits  # type: ignore[no-any-return]
