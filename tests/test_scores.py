"""Scores equal their closed forms; feature extractors are trained once and cached."""

import math

import pytest
import torch

from engine import cache, data, domain_classifier, inception

pytest.importorskip("torchmetrics")
from engine import scores
from engine.distributed import Processes

CPU = torch.device("cpu")
RECIPE = {**domain_classifier.RECIPE, "widths": (8, 8, 16), "epochs": 6, "batch": 16}


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


# --- FID ----------------------------------------------------------------------------------------


def matrix_root(a: torch.Tensor) -> torch.Tensor:
    values, vectors = torch.linalg.eigh(a)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def closed_form(mean_1, cov_1, mean_2, cov_2) -> float:
    root = matrix_root(cov_1)
    trace = torch.trace(cov_1 + cov_2 - 2 * matrix_root(root @ cov_2 @ root))
    return float((mean_1 - mean_2).square().sum() + trace)


def with_moments(x: torch.Tensor, mean: torch.Tensor, cov: torch.Tensor) -> torch.Tensor:
    """x, moved so that its sample mean and covariance are exactly these."""
    x_mean, x_cov = scores.moments(x)
    white = torch.linalg.solve(matrix_root(x_cov), (x - x_mean).T).T
    return white @ matrix_root(cov.double()) + mean


@pytest.mark.parametrize("offset, scale", [(0, 1), (1e3, 1e-2), (-50, 30)])
@pytest.mark.parametrize("d", [1, 3, 24])
def test_fid_of_two_gaussians_is_the_closed_form(d, offset, scale):
    spread = [normal(d, d, seed=i) for i in (1, 2)]
    covs = [scale**2 * (a @ a.T + 0.1 * torch.eye(d)) for a in spread]
    means = [offset + scale * normal(d, seed=i) for i in (3, 4)]
    real = with_moments(normal(200, d, seed=5), means[0], covs[0])
    fake = with_moments(normal(150, d, seed=6), means[1], covs[1])
    expected = closed_form(means[0], covs[0], means[1], covs[1])
    found = scores.frechet_distance(*scores.moments(real), fake)
    assert found == pytest.approx(expected, rel=1e-7)
    assert closed_form(means[0], covs[0], means[0], covs[0]) < 1e-6 * expected


def test_fid_of_diagonal_gaussians_by_hand():
    # |μ₁ − μ₂|² + Σ (σ₁ − σ₂)² = 1 + 4 + (1 − 2)² + (3 − 1)²
    fake = with_moments(normal(99, 2), torch.tensor([1.0, 2.0]), torch.diag(torch.tensor([4.0, 1])))
    zero, cov = torch.zeros(2), torch.diag(torch.tensor([1.0, 9.0]))
    assert scores.frechet_distance(zero, cov, fake) == pytest.approx(10, rel=1e-9)


@pytest.mark.parametrize("n, d", [(50, 8), (8, 8), (5, 40), (2, 3)])
@pytest.mark.parametrize("offset, scale", [(0, 1), (1e3, 1e-2)])
def test_fid_of_a_set_with_itself_is_zero(n, d, offset, scale):
    x = offset + scale * normal(n, d)  # n ≤ d: a singular covariance, which has a root all the same
    mean, cov = scores.moments(x)
    # An eigenvalue of rounding ε·λ has a root √ε·√λ: that is what a null space may add.
    allowed = 1e-7 if n <= d else 1e-12
    assert 0 <= scores.frechet_distance(mean, cov, x) <= allowed * d * float(cov.trace())
    other = scores.frechet_distance(mean, cov, x + scale)
    assert other == pytest.approx(d * scale**2, rel=1e-5)


def test_fid_of_what_is_no_number_is_none():
    x = normal(9, 2)
    x[3] = math.nan
    try:
        assert math.isnan(scores.frechet_distance(torch.zeros(2), torch.eye(2), x))
    except RuntimeError as error:  # LAPACK may refuse it
        assert "finite" in str(error) or "nan" in str(error).lower()


# --- KID, IS, precision and recall --------------------------------------------------------------


def test_kid_is_the_unbiased_mmd():
    real, fake = normal(12, 5), 1 + normal(12, 5, seed=1)

    def mean_kernel(x, y, same):
        k = (x @ y.T / 5 + 1) ** 3
        return (k.sum() - k.trace()) / (12 * 11) if same else k.mean()

    expected = mean_kernel(real, real, True) + mean_kernel(fake, fake, True)
    expected -= 2 * mean_kernel(real, fake, False)
    found, deviation = scores.kernel_distance(real, fake, subsets=3, subset_size=12, seed=0)
    assert found == pytest.approx(float(expected), rel=1e-12) and deviation < 1e-12


def test_inception_score_of_known_classes():
    certain = 100 * torch.eye(4).repeat(50, 1)  # sure of four equally frequent classes
    assert scores.inception_score(certain, splits=1, seed=0) == (pytest.approx(4), None)
    found, deviation = scores.inception_score(certain, splits=4, seed=0)
    assert 3.5 < found < 4 and deviation > 0
    assert scores.inception_score(torch.zeros(20, 7), splits=1, seed=0)[0] == pytest.approx(1)
    with pytest.raises(ValueError, match="5 pictures do not make 4 splits"):
        scores.inception_score(torch.zeros(5, 7), splits=4, seed=0)


def test_seeds_repeat_and_leave_the_global_generator_alone():
    x, y = normal(40, 3), normal(40, 3, seed=1)
    options = {"subsets": 4, "subset_size": 10}
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    a, b, c = (scores.kernel_distance(x, y, **options, seed=s) for s in (0, 0, 1))
    assert a == b != c
    p, q, r = (scores.inception_score(x, splits=3, seed=s) for s in (0, 0, 1))
    assert p == q != r
    assert torch.equal(before, torch.random.get_rng_state())


def brute_force(real, fake, k):
    def radius(points, i):
        return sorted(math.dist(points[i], p) for j, p in enumerate(points) if j != i)[k - 1]

    def inside(points, centres):
        radii = [radius(centres, i) for i in range(len(centres))]
        hits = [
            any(math.dist(p, c) <= r for c, r in zip(centres, radii, strict=True)) for p in points
        ]
        return sum(hits) / len(hits)

    return inside(fake, real), inside(real, fake)


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("offset", [0, 1e7])
def test_precision_and_recall_by_brute_force(k, offset, monkeypatch):
    monkeypatch.setattr(scores, "ROWS", 7)  # several blocks, the last one short
    real, fake = normal(31, 2), 0.5 * normal(26, 2, seed=1) + 1.6
    expected = brute_force(real.tolist(), fake.tolist(), k)
    assert 0 < expected[1] < expected[0] < 1
    assert scores.precision_recall(real + offset, fake + offset, k=k) == pytest.approx(expected)


def test_precision_and_recall_at_the_ends():
    x = normal(20, 4)
    assert scores.precision_recall(x, x.clone()) == (1, 1)
    assert scores.precision_recall(x, x + 100) == (0, 0)
    collapsed = x[:1].repeat(20, 1)
    precision, recall = scores.precision_recall(x, collapsed)
    assert precision == 1 and recall <= 0.1
    with pytest.raises(ValueError, match="3 pictures have no 3-th neighbour"):
        scores.precision_recall(x, x[:3])


# --- feature extractors -------------------------------------------------------------------------


def two_classes(n: int, seed: int, size: int = 8) -> data.Images:
    """Dark pictures and bright ones, which any classifier tells apart."""
    labels = torch.arange(n) % 2
    noise = torch.randint(0, 100, (n, 1, size, size), generator=torch.Generator().manual_seed(seed))
    pixels = (noise + 120 * labels.view(-1, 1, 1, 1)).to(torch.uint8)
    return data.Images("two", n, 1, size, pixels=pixels, labels=labels, classes=("dark", "bright"))


def test_domain_classifier_is_trained_once_and_again_for_another_recipe(tmp_path, monkeypatch):
    trained = []
    real_train = domain_classifier.train
    monkeypatch.setattr(domain_classifier, "train", lambda *a: trained.append(a) or real_train(*a))
    images, test = two_classes(96, 0), two_classes(40, 1)
    torch.manual_seed(1)
    model, info = domain_classifier.obtain(images, test, tmp_path, CPU, RECIPE)
    assert info["accuracy"] > 0.95 and not model.training
    torch.manual_seed(2)  # the cache and the seed decide, not the generator's state
    again, same = domain_classifier.obtain(images, test, tmp_path, CPU, RECIPE)
    assert len(trained) == 1 and same["accuracy"] == info["accuracy"]
    x = domain_classifier.to_input(test.pixels)
    for a, b in zip(model(x), again(x), strict=True):
        assert torch.equal(a, b) and a.dtype == torch.float32
    assert model(x)[0].shape == (40, 16) and model(x)[1].shape == (40, 2)
    domain_classifier.obtain(images, test, tmp_path, CPU, {**RECIPE, "epochs": 1})
    domain_classifier.obtain(two_classes(96, 3), test, tmp_path, CPU, RECIPE)
    assert len(trained) == 3 and len(list(tmp_path.iterdir())) == 3
    for file in tmp_path.iterdir():
        file.write_bytes(file.read_bytes()[:-9])  # damaged: made anew
    domain_classifier.obtain(images, test, tmp_path, CPU, RECIPE)
    assert len(trained) == 4


def test_statistics_of_the_real_set_are_cached(tmp_path, monkeypatch):
    calls = []

    def run(pixels):
        calls.append(len(pixels))
        flat = pixels.flatten(1).float()
        return flat[:, :5], flat[:, :3]

    images = two_classes(30, 0)
    extractor = scores.Extractor("first pixels", "first", run)
    monkeypatch.setattr(scores, "SUBSET", 12)
    a, b = (scores.statistics(extractor, images, tmp_path, "the set") for _ in range(2))
    assert calls == [30] and a.count == b.count == 30
    pixels = images.pixels.flatten(1).double()[:, :5]
    assert torch.allclose(b.mean, pixels.mean(0)) and torch.allclose(b.cov, torch.cov(pixels.T))
    assert b.features.shape == (12, 5) and torch.equal(a.features, b.features)
    brightness = b.logits.mean(1) > 105  # labels go with their pictures
    assert torch.equal(brightness.long(), b.labels)
    scores.statistics(scores.Extractor("other", "other", run), images, tmp_path, "the set")
    assert calls == [30, 30]


def test_fingerprints_tell_data_sets_apart():
    images = two_classes(20, 0)
    other = two_classes(20, 0)
    assert cache.fingerprint(images) == cache.fingerprint(other)
    other.labels = 1 - other.labels
    decoded = data.Images("x", 20, 1, 8, read=lambda i: images.pixels[i].numpy())
    decoded.labels = images.labels
    assert cache.fingerprint(images) == cache.fingerprint(decoded)
    prints = {cache.fingerprint(i) for i in (images, other, two_classes(20, 1), two_classes(22, 0))}
    assert len(prints) == 4


def test_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache.folder() == tmp_path / "diffusion-engine"
    assert cache.folder("elsewhere").name == "elsewhere"


def test_inception_is_the_published_network():
    with torch.device("meta"):
        model = inception.Inception()
    # 23,834,568 for 1000 classes and without the auxiliary ones (Szegedy et al. 2016), 8 more here.
    assert sum(p.numel() for p in model.parameters()) == 23_834_568 + 8 * 2049
    names = model.state_dict()
    assert names["Mixed_7c.branch3x3dbl_3b.conv.weight"].shape == (384, 384, 3, 1)
    assert names["Mixed_6c.branch7x7dbl_2.conv.weight"].shape == (160, 160, 7, 1)
    assert names["fc.weight"].shape == (1008, 2048)


def test_inception_resizes_as_tensorflow_did():
    x = torch.arange(4.0).view(1, 1, 1, 4).expand(1, 1, 4, 4)
    # source = i·4/6, and past the last pixel the last pixel
    expected = torch.tensor([0, 2 / 3, 4 / 3, 2, 8 / 3, 3])
    assert torch.allclose(inception.resize(x, 6), expected.expand(1, 1, 6, 6))
    assert torch.allclose(inception.resize(x.transpose(2, 3), 6)[0, 0, :, 0], expected)


def test_inception_weights_are_found_or_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(ValueError, match=r"torch.hub's cache.: nothing is downloaded"):
        inception.find()
    with pytest.raises(ValueError, match="no Inception weights at nowhere"):
        inception.find("nowhere")
    file = tmp_path / "checkpoints" / inception.FILES[0]
    file.parent.mkdir()
    torch.save({"fc.bias": torch.zeros(3)}, file)
    assert inception.find() == inception.find(file) == inception.find(file.parent) == file
    for content in (None, b"no weights"):
        if content is not None:
            file.write_bytes(content)
        with pytest.raises(ValueError, match="does not hold the Inception weights"):
            inception.load(file)


def test_more_processes_than_pieces(tmp_path):
    """One has no picture of a data set that is decoded batch by batch."""

    class Idle(Processes):
        def broadcast(self, thing):
            return True

        def to_first(self, tensors):
            return tensors.append("sent") if len(tensors[0]) else None

    images = data.Images("x", 20, 1, 4, read=lambda i: pytest.fail("a picture is decoded"))
    extractor = scores.Extractor("x", "x", lambda x: pytest.fail("features are computed"))
    assert scores.statistics(extractor, images, tmp_path, "x", Idle(1, 2)) is None
