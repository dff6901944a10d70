"""A small head for volumes: from the embeddings of their slices to one diagnosis."""

from __future__ import annotations

from torch import Tensor, nn


class SliceHead(nn.Module):
    """A transformer layer over the slices of a volume, each of which is one token, and a linear layer on their mean.

    Frepa's figure has frozen slices under an intra- and inter-image transformer of depth 6 and width 192; this is the
    smallest head of that kind, and ours. It does not know the order of the slices.

    :param width: channels of a slice's embedding.
    :param num_classes: of the diagnosis.
    :param features: width of the tokens, a multiple of the heads.
    :param heads: of attention.
    :raises ValueError: an argument is out of range.
    """

    def __init__(self, width: int, num_classes: int, *, features: int = 64, heads: int = 4) -> None:
        super().__init__()
        for name, value in (("width", width), ("num_classes", num_classes), ("features", features), ("heads", heads)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        if features % heads:
            raise ValueError(f"features must be a multiple of heads ({heads}), not {features}")
        self.token = nn.Linear(width, features)
        self.layer = nn.TransformerEncoderLayer(
            features, heads, 2 * features, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.fc = nn.Linear(features, num_classes)

    def forward(self, slices: Tensor) -> Tensor:
        """``float [N, S, width, h, w]``, the embeddings of S >= 1 slices, ``-> logits [N, num_classes]``.

        A slice that holds NaN alone pads a shorter volume: it is no token, and is not in the mean.
        """
        tokens = slices.mean((3, 4))
        absent = tokens.isnan().all(2)
        tokens = self.token(tokens.masked_fill(absent[..., None], 0))
        mixed = self.layer(tokens, src_key_padding_mask=absent).masked_fill(absent[..., None], 0)
        return self.fc(mixed.sum(1) / (~absent).sum(1, keepdim=True))
