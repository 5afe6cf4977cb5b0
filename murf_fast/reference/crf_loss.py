from __future__ import annotations

from torch import Tensor

from murf_fast.reference._pairs import squared_distances

__all__ = ["crf_loss"]


def crf_loss(
    features: Tensor,
    positions: Tensor,
    colors: Tensor,
    weights: tuple[float, float] = (10.0, 3.0),
    deviations: tuple[float, float, float] = (0.25, 0.25, 0.05),
) -> Tensor:
    """``mean_ij k_ij |f_i - f_j|^2 / C`` of pixels, features (B, n, C), positions (B, n, 2), colours (B, n, 3).

    ``k = w_1 exp(-|p_i - p_j|^2 / 2 d_1^2 - |I_i - I_j|^2 / 2 d_2^2) + w_2 exp(-|p_i - p_j|^2 / 2 d_3^2)``, and the
    mean is over pairs of different pixels.
    """
    (appearance, smoothness), (far, color, near) = weights, deviations
    apart = squared_distances(positions, positions) / 2
    unlike = squared_distances(colors, colors) / 2
    kernel = appearance * (-apart / far**2 - unlike / color**2).exp() + smoothness * (-apart / near**2).exp()
    batch, count, channels = features.shape
    pairs = batch * count * (count - 1) * channels
    return (kernel * squared_distances(features, features)).sum() / pairs
