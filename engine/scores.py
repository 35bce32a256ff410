"""How like the real pictures samples are: FID, KID, Inception Score, precision and recall.

FID, KID and IS are torchmetrics', in float64, on features that are computed once. Every figure
depends on the feature extractor and on n; `Extractor.name` and the counts are kept beside it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from . import cache, data, domain_classifier, inception
from .dealing import deal
from .distributed import ALONE, Processes

PIECE = 500  # pictures whose features are computed at a time
SUBSET = 10_000  # pictures of a real set whose features are kept, beside the statistics of all


@dataclass
class Extractor:
    """Pictures (N, C, H, W) uint8 → features (N, d), logits (N, classes), float32 on the CPU."""

    name: str
    key: str
    run: Callable[[Tensor], tuple[Tensor, Tensor]]

    @torch.inference_mode()
    def of(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        features, logits = (part.float().cpu() for part in self.run(pixels))
        return features, logits

    def __call__(
        self, pixels: Iterable[Tensor], total: int, what: str
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Those of every piece of `pixels`, in turn; total, the number of pictures, is for show."""
        from tqdm import tqdm

        with tqdm(total=total, desc=f"features of {what}", leave=False, delay=2) as progress:
            for some in pixels:
                yield self.of(some)
                progress.update(len(some))


def domain_extractor(
    images: data.Images,
    test: data.Images,
    folder: Path,
    device: torch.device,
    processes: Processes = ALONE,
) -> Extractor:
    """The classifier of this data set: trained here, once, or from the cache."""
    model, info = domain_classifier.obtain(images, test, folder, device, processes=processes)
    name = (
        f"domain classifier of {images.name} ({info['accuracy']:.2%} of {info['test_images']} test "
        f"pictures right, recipe {info['key'][:8]}), {model.head.in_features} features"
    )

    def run(pixels: Tensor) -> tuple[Tensor, Tensor]:
        return model(domain_classifier.to_input(pixels.to(device)))

    return Extractor(name, f"domain-{info['key']}", run)


def inception_extractor(weights: Path, device: torch.device) -> Extractor:
    """Inception-v3 with the weights of this file; grey pictures become RGB."""
    import hashlib

    digest = hashlib.sha256(weights.read_bytes()).hexdigest()[:16]
    model = inception.load(weights).to(device)

    def run(pixels: Tensor) -> tuple[Tensor, Tensor]:
        parts = [model(p.to(device).expand(-1, 3, -1, -1)) for p in pixels.split(50)]
        return tuple(torch.cat(part) for part in zip(*parts, strict=True))

    name = f"Inception-v3 ({weights.name}, SHA-256 {digest[:8]}), {inception.FEATURES} features"
    return Extractor(name, f"inception-{digest}", run)


@dataclass
class Statistics:
    """Of a real set: mean and covariance over all of it, features and logits of a subset."""

    count: int  # pictures behind mean and cov
    mean: Tensor  # (d,) float64
    cov: Tensor  # (d, d) float64, over count − 1
    features: Tensor  # (m, d) float32, m ≤ SUBSET pictures in a fixed random order
    logits: Tensor  # (m, classes) float32
    labels: Tensor  # (m,) int64, −1 where there are none


def statistics(
    extractor: Extractor,
    images: data.Images,
    folder: Path,
    what: str,
    processes: Processes = ALONE,
) -> Statistics | None:
    """The statistics of a real set, from the cache or computed and put there.

    Of several processes all compute, and rank 0 alone has the cache and the result.
    """
    found = path = None
    if processes.first:
        key = cache.digest(1, extractor.key, cache.fingerprint(images), SUBSET)
        path = folder / f"statistics-{key}.safetensors"
        found = cache.load(path)
    if processes.broadcast(found is None):
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
        pieces = order.split(PIECE)

        def features_of(mine: range) -> Iterator[tuple[Tensor, Tensor]]:
            if not mine:  # more processes than pieces
                return iter(())
            chosen = torch.cat([pieces[i] for i in mine])
            return extractor(data.in_order(images, chosen, PIECE), len(chosen), what)

        made = deal(processes, len(pieces), features_of)
        if made is not None:
            found = tensors, info = collected(extractor, images, order[:SUBSET], *made)
            cache.store(path, tensors, info)
    return None if found is None else Statistics(found[1]["count"], **found[0])


def collected(
    extractor: Extractor, images: data.Images, kept: Tensor, features: Tensor, logits: Tensor
) -> tuple[dict[str, Tensor], dict]:
    """What `statistics` keeps of all the features: tensors and info of a file of the cache."""
    tensors = {
        **dict(zip(("mean", "cov"), moments(features), strict=True)),
        "features": features[: len(kept)],
        "logits": logits[: len(kept)],
        "labels": torch.full_like(kept, -1) if images.labels is None else images.labels[kept],
    }
    return tensors, {"extractor": extractor.name, "data": images.name, "count": len(images)}


def moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (d,) and covariance (d, d) over n − 1, float64, of features (n, d)."""
    x = features.double()
    mean = x.mean(0)
    x = x - mean
    return mean, x.T @ x / (len(x) - 1)


# torchmetrics would wait for all processes of the job to compute the metric; rank 0 alone does.
HERE = {"sync_on_compute": False}


class Given(nn.Module):
    """Stands where torchmetrics wants a feature extractor: the features are computed already."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


def frechet_distance(mean: Tensor, cov: Tensor, features: Tensor) -> float:
    """FID = |μ₁ − μ₂|² + tr(Σ₁ + Σ₂ − 2(Σ₁Σ₂)^½) (Heusel et al. 2017), float64.

    mean (d,) and cov (d, d) of the real set (`moments`); features (n, d) of the samples, n ≥ 2.
    With n ≤ d the samples' covariance is singular, and the distance far too large.
    """
    from torchmetrics.image.fid import FrechetInceptionDistance

    metric = FrechetInceptionDistance(feature=Given(len(mean)), **HERE)
    # Both sets are shifted by the real mean, which leaves the distance as it is: torchmetrics sums
    # x xᵀ, and far from the origin the covariance would be a small difference of large numbers.
    metric.real_features_cov_sum += cov.double()  # times count − 1 for a count of 2
    metric.real_features_num_samples += 2
    metric.update(features.double() - mean.double(), real=False)
    distance = float(metric.compute())
    return 0.0 if distance < 0 else distance  # rounding may end a little below zero; NaN stays


def kernel_distance(
    real: Tensor, features: Tensor, *, subsets: int, subset_size: int, seed: int
) -> tuple[float, float]:
    """KID: mean and standard deviation over random subsets of the unbiased squared MMD.

    Kernel (x·y/d + 1)³ (Bińkowski et al. 2018). real (m, d), features (n, d); subset_size ≤ m, n.
    """
    from torchmetrics.image.kid import KernelInceptionDistance

    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore", UserWarning)  # that it keeps the features
        torch.manual_seed(seed)
        given = Given(real.shape[1])
        metric = KernelInceptionDistance(
            feature=given, subsets=subsets, subset_size=subset_size, **HERE
        )
        metric.update(real.double(), real=True)
        metric.update(features.double(), real=False)
        mean, deviation = metric.compute()
    return float(mean), float(deviation)


def inception_score(logits: Tensor, *, splits: int, seed: int) -> tuple[float, float | None]:
    """IS = exp E_x KL(p(y|x) ‖ p(y)): mean and standard deviation over the splits.

    logits (n, classes), n ≥ splits, in a seeded random order (Salimans et al. 2016). One split has
    no deviation. Raises ValueError for an n that does not make as many splits.
    """
    from torchmetrics.image.inception import InceptionScore

    made = len(torch.empty(len(logits)).chunk(splits))
    if made != splits:
        raise ValueError(f"{len(logits)} pictures do not make {splits} splits: use fewer --splits")
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore", UserWarning)
        torch.manual_seed(seed)
        metric = InceptionScore(feature=Given(logits.shape[1]), splits=splits, **HERE)
        metric.update(logits.double())
        mean, deviation = metric.compute()
    return float(mean), float(deviation) if splits > 1 else None


def precision_recall(real: Tensor, fake: Tensor, *, k: int = 3) -> tuple[float, float]:
    """Precision: share of fake in the real manifold; recall: share of real in the fake one.

    A set's manifold is the union of balls around its points that reach to their k-th neighbour
    (Kynkäänniemi et al. 2019, eq. 1–3). real (m, d), fake (n, d); m, n > k. Distances are float64
    and computed in blocks of rows, 80 MB at n = 10,000.
    """
    if min(len(real), len(fake)) <= k:
        raise ValueError(
            f"{min(len(real), len(fake))} pictures have no {k}-th neighbour: use more --n"
        )
    centre = real.double().mean(0)  # small norms, so that little cancels in the distances
    real, fake = real.double() - centre, fake.double() - centre
    return _inside(fake, real, _radii(real, k)), _inside(real, fake, _radii(fake, k))


ROWS = 1000


def _squared(x: Tensor, y: Tensor) -> Tensor:
    """|x_i − y_j|² (n, m)."""
    out = torch.addmm(y.square().sum(1), x, y.T, alpha=-2)
    return out.add_(x.square().sum(1, keepdim=True)).clamp_(min=0)


def _radii(x: Tensor, k: int) -> Tensor:
    """Squared distance to the k-th neighbour, the point itself not counted. (n,)"""
    out = []
    for start in range(0, len(x), ROWS):
        d = _squared(x[start : start + ROWS], x)
        d.diagonal(start).fill_(-1)  # the point itself comes first, whatever the rounding
        out.append(d.topk(k + 1, dim=1, largest=False).values[:, -1])
    return torch.cat(out)


def _inside(x: Tensor, centres: Tensor, radii: Tensor) -> float:
    inside = [(_squared(part, centres) <= radii).any(1) for part in x.split(ROWS)]
    return float(torch.cat(inside).double().mean())
