"""What anomalib's modules of these names compute, said again in few words: for machines without anomalib.

Half a gigabyte of other packages has to be there before the real one can be imported.
"""

FILES = {
    "__init__.py": '__version__ = "{version}"',
    "models/components/sampling/k_center_greedy.py": """
        import torch

        VERSION = tuple(int(part) for part in "{version}".split("."))

        class Projection:
            def fit(self, x):
                self.matrix = torch.randn(9, x.shape[1])

            def transform(self, x):
                return x @ self.matrix.T.to(x.dtype)

        class KCenterGreedy:
            def __init__(self, embedding, sampling_ratio):
                self.embedding, self.coreset_size = embedding, int(len(embedding) * sampling_ratio)
                self.model, self.min_distances = Projection(), None

            def reset_distances(self):
                self.min_distances = None

            def select_coreset_idxs(self, selected_idxs=None):
                x = self.embedding.flatten(1)
                if self.embedding.ndim == 2:
                    self.model.fit(x)
                    x = self.model.transform(x)
                new = int(torch.randint(high=len(x), size=(1,)))
                chosen = [new] if VERSION >= (2, 4) else []
                nearest = torch.full((len(x),), torch.inf)
                while len(chosen) < self.coreset_size:
                    nearest = torch.minimum(nearest, torch.linalg.norm(x - x[new], dim=1))
                    new = int(nearest.argmax())
                    nearest[new] = 0
                    chosen.append(new)
                return chosen
    """,
    "models/components/filters/blur.py": """
        import torch
        import torch.nn.functional as F
        from torch import nn

        class GaussianBlur2d(nn.Module):
            def __init__(self, sigma, channels=1, kernel_size=None, border_type="reflect", padding="same"):
                super().__init__()
                n = kernel_size or 2 * int(4 * sigma + 0.5) + 1
                taps = torch.exp(-((torch.arange(n) - n // 2) ** 2) / (2 * sigma**2))
                self.register_buffer("kernel", torch.outer(taps, taps).div(taps.sum() ** 2).expand(channels, 1, n, n))
                self.channels, self.border_type, self.padding = channels, border_type, padding
                self.height = self.width = n

            def forward(self, input_tensor):
                if self.padding == "same":
                    input_tensor = F.pad(input_tensor, [self.width // 2] * 4, mode=self.border_type)
                return F.conv2d(input_tensor, self.kernel, groups=self.channels)
    """,
    "models/image/patchcore/anomaly_map.py": """
        import torch.nn.functional as F
        from torch import nn
        from anomalib.models.components.filters.blur import GaussianBlur2d

        class AnomalyMapGenerator(nn.Module):
            def __init__(self, sigma=4):
                super().__init__()
                self.blur = GaussianBlur2d(sigma)

            def compute_anomaly_map(self, patch_scores, image_size=None):
                if image_size is not None:
                    patch_scores = F.interpolate(patch_scores, size=tuple(image_size))
                return self.blur(patch_scores)

            def forward(self, patch_scores, image_size=None):
                return self.compute_anomaly_map(patch_scores, image_size)
    """,
    "models/image/patchcore/torch_model.py": """
        import torch
        from torch import nn

        class PatchcoreModel(nn.Module):
            def __init__(self, **_):
                super().__init__()
                self.register_buffer("memory_bank", torch.empty(0))

            @staticmethod
            def euclidean_dist(x, y):
                squares = x.square().sum(-1, keepdim=True) - 2 * x @ y.mT + y.square().sum(-1, keepdim=True).mT
                return squares.clamp(min=0).sqrt()

            def nearest_neighbors(self, embedding, n_neighbors):
                distances = self.euclidean_dist(embedding, self.memory_bank)
                return distances.min(1) if n_neighbors == 1 else distances.topk(n_neighbors, largest=False)
    """,
    "models/image/super_add/torch_model.py": """
        import torch
        import torch.nn.functional as F
        from torch import nn
        from anomalib.models.image.patchcore.torch_model import PatchcoreModel

        class SuperADDModel(nn.Module):
            def __init__(self):
                super().__init__()
                self.register_buffer("memory_bank", torch.empty(0))

            def nearest_neighbors(self, features_query, features_key, knn_neighbors, normalize=False):
                x, y = [F.normalize(x, dim=-1) if normalize else x for x in (features_query, features_key)]
                distances = PatchcoreModel.euclidean_dist(x, y)
                return distances.topk(knn_neighbors, largest=False, sorted=False)
    """,
}
