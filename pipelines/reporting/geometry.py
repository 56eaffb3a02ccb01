"""Numbers of representations: class-mean logits, correlations of logits, CKA, a map of embeddings. Pure functions."""

from __future__ import annotations

import warnings

import numpy as np

from pipelines.reporting.dump import Array, Dump

COMPONENTS = 50


def class_mean_logits(dump: Dump) -> Array:
    """The mean logits of each class's images, [K, K]; a row of NaN for a class without an image."""
    counts = np.bincount(dump["labels"], minlength=len(dump["class_logit_sums"]))
    return dump["class_logit_sums"] / np.where(counts > 0, counts, np.nan)[:, None]


def logit_correlations(dump: Dump) -> Array:
    """The correlation over all images of each two classes' logits, [K, K]; NaN beside a logit that never changes."""
    images = len(dump["labels"])
    mean = dump["class_logit_sums"].sum(0) / images
    covariance = dump["logit_products"] / images - np.outer(mean, mean)
    # what rounding leaves of a variance of nothing is no variance
    variance = np.diag(covariance).copy()
    variance[variance <= 1e-12 * np.maximum(mean**2, 1e-30)] = np.nan
    return covariance / np.sqrt(np.outer(variance, variance))


def absolute_difference(first: Array, second: Array) -> Array:
    """|first - second| of two matrices, with a diagonal of 0 as in the figure of SDD; NaN stays NaN, on the diagonal too."""
    found = np.abs(first - second)
    np.fill_diagonal(found, 0 * np.diag(found))
    return found


def linear_cka(first: Array, second: Array) -> float:
    """Linear centred kernel alignment of two representations [N, C1] and [N, C2] of the same images, 0 to 1.

    Kornblith et al. 2019, equation 4, in its feature form: N x N matrices are never made. NaN for one that does not vary.
    """
    first, second = (each.astype(np.float64) - each.mean(0, dtype=np.float64) for each in (first, second))
    cross = np.linalg.norm(first.T @ second) ** 2
    with np.errstate(invalid="ignore"):
        return float(cross / (np.linalg.norm(first.T @ first) * np.linalg.norm(second.T @ second)))


def shown_classes(labels: Array, classes: int) -> Array:
    """The classes that a map of embeddings shows: those with the most images in the sample, ties by their number, sorted."""
    counts = np.bincount(labels)
    return np.sort([k for k in np.argsort(-counts, kind="stable")[:classes] if counts[k]])


def embedding_map(embeddings: Array, seed: int = 0) -> Array:
    """t-SNE in two dimensions of embeddings [N, D] after PCA to 50: float [N, 2], the same for the same seed."""
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits

    components = min(COMPONENTS, *embeddings.shape)
    reduced = PCA(components, random_state=seed).fit_transform(embeddings)
    perplexity = min(30.0, max(1.0, (len(embeddings) - 1) / 3))
    # one thread: a step takes 3 ms, and two threads that wait for each other in a busy loop cost ten times the CPU seconds
    with warnings.catch_warnings(), threadpool_limits(1):
        warnings.simplefilter("ignore")  # of the thread pools that it looks for
        return TSNE(perplexity=perplexity, init="pca", random_state=seed).fit_transform(reduced)
