"""Slow float64 oracles for the mappings, written from the formulas one row at a time.

They share nothing with the package: plain Python numbers, loops over the entries, ``math.fsum`` for sums, and
an absent score (−inf) is really deleted and its 0 put back afterwards, where the package fills and masks.
"""

import functools
import math

import torch

EPSILON = 1e-6  # the weight that EvSoftMax gives in training to what it drops


def over_rows(row_function, scores, dim=-1):
    """``row_function`` on every vector along ``dim``.

    Args:
        row_function: list of floats → list of floats of the same length.
        scores: tensor of any shape and floating dtype; its values are taken as they are, in float64.
        dim: the dimension that holds the vectors.

    Returns:
        float64 tensor, the shape of ``scores``.
    """
    moved = scores.detach().double().movedim(dim, -1)
    rows = [row_function(row) for row in moved.reshape(-1, moved.size(-1)).tolist()]
    return torch.tensor(rows, dtype=torch.float64).reshape(moved.shape).movedim(-1, dim)


def deletes_absent(row_function):
    """``row_function`` without the entries that are −inf: zeros in their place and in an empty row."""

    @functools.wraps(row_function)
    def on_present(row, *args, **kwargs):
        present = [i for i, x in enumerate(row) if x != -math.inf]
        probabilities = [0.0] * len(row)
        if present:
            for i, p in zip(present, row_function([row[i] for i in present], *args, **kwargs), strict=True):
                probabilities[i] = p
        return probabilities

    return on_present


def modulator(row, thresholds, gains):
    """σ(x) = x + Σ_n [ g_b,n · max(b_n − x, 0)^n + g_d,n · max(x − d_n, 0)^n ]  (DESIGN.md, section 1).

    Args:
        row: scores; −inf stays −inf.
        thresholds: [(b_1, d_1), (b_2, d_2), …].
        gains: [(g_b,1, g_d,1), (g_b,2, g_d,2), …].
    """
    modulated = []
    for x in row:
        terms = [x]
        if x != -math.inf:
            for n, ((b, d), (gain_b, gain_d)) in enumerate(zip(thresholds, gains, strict=True), start=1):
                if x < b:
                    terms.append(gain_b * (b - x) ** n)
                if x > d:
                    terms.append(gain_d * (x - d) ** n)
        modulated.append(math.fsum(terms))
    return modulated


@deletes_absent
def softmax(row):
    """p_i = exp(x_i) / Σ exp(x_k)."""
    largest = max(row)
    weights = [math.exp(x - largest) for x in row]
    return [w / math.fsum(weights) for w in weights]


@deletes_absent
def multimax(row, thresholds, gains):
    """p = softmax(σ(x))  (Zhou, Fritz & Keuper 2024)."""
    return softmax(modulator(row, thresholds, gains))


@deletes_absent
def sparsemax(row):
    """p = argmin over the simplex of ‖p − x‖², in closed form (Martins & Astudillo 2016).

    With x sorted, x_(1) ≥ x_(2) ≥ …:  k = max{ j : 1 + j·x_(j) > Σ_{i≤j} x_(i) },
    τ = (Σ_{i≤k} x_(i) − 1) / k,  p_i = max(x_i − τ, 0).
    """
    largest = max(row)
    ordered = sorted((x - largest for x in row), reverse=True)  # τ moves with a shift, p does not
    k = max(j for j in range(1, len(row) + 1) if 1 + j * ordered[j - 1] > math.fsum(ordered[:j]))
    tau = (math.fsum(ordered[:k]) - 1) / k
    return [max(x - largest - tau, 0.0) for x in row]


@deletes_absent
def entmax(row, alpha):
    """p_i = max((α − 1)·x_i − τ, 0)^(1 / (α − 1)) with Σ p = 1  (Peters, Niculae & Martins 2019, section 3).

    Σ p falls with τ: it is at least 1 at τ = max((α − 1)·x) − 1 and 0 at the maximum. That interval is halved
    until no float lies inside.
    """
    largest = max(row)
    scaled = [(alpha - 1) * (x - largest) for x in row]  # τ moves with a shift, p does not

    def probabilities(tau):
        return [max(z - tau, 0.0) ** (1 / (alpha - 1)) for z in scaled]

    low, high = -1.0, 0.0
    while low < (middle := (low + high) / 2) < high:
        if math.fsum(probabilities(middle)) >= 1:
            low = middle
        else:
            high = middle
    return probabilities(low)


@deletes_absent
def evsoftmax(row, training=False):
    """p_i = w_i exp(x_i) / Σ w_k exp(x_k), w_i = 1 where x_i ≥ mean(x), else 0 (in training 1e-6).

    Source: Itkina et al. 2021. Rounding of the mean is kept from dropping equal scores by
    comparing n·x_i with Σ x_k.
    """
    total, largest = math.fsum(row), max(row)
    below = EPSILON if training else 0.0
    weights = [(1.0 if x * len(row) >= total else below) * math.exp(x - largest) for x in row]
    return [w / math.fsum(weights) for w in weights]


# ------------------------------------------------------------------------------------------ metrics


def relevance_threshold(row):
    """ε = log(1/K) + logsumexp(x) over the K scores that are there."""
    present = [x for x in row if x != -math.inf]
    largest = max(present)
    return largest + math.log(math.fsum(math.exp(x - largest) for x in present)) - math.log(len(present))


def mean_between(low, high, scores, values):
    """The mean of the values whose scores lie between; None where there are none."""
    between = [value for x, value in zip(scores, values) if low < x < high]
    return math.fsum(between) / len(between) if between else None


def multimodality(scores, probabilities, threshold):
    """(1/N) Σ_{ε < x_n < max x} (1 − (max φ − φ_n)); None where N = 0  (Zhou et al. 2024, Definition 3.2)."""
    return mean_between(threshold, max(scores), scores, [1 - (max(probabilities) - p) for p in probabilities])


def sparsity(scores, probabilities, threshold, reference):
    """(1/L) Σ_{x_l < ε} exp((s − φ_l)/s − 1); None where L = 0  (Zhou et al. 2024, Definition 3.3)."""
    terms = [math.exp((reference - p) / reference - 1) for p in probabilities]
    return mean_between(-math.inf, threshold, scores, terms)


def entropy(probabilities):
    """−Σ p log p, in nats."""
    return -math.fsum(p * math.log(p) for p in probabilities if p > 0)


def cosine(u, v):
    """u · v / (|u| |v|)."""
    lengths = [math.sqrt(math.fsum(a * a for a in vector)) for vector in (u, v)]
    return math.fsum(a * b for a, b in zip(u, v)) / (lengths[0] * lengths[1])


def mean_average_distance(vectors):
    """The mean of 1 − cos(h_i, h_j) over the pairs i ≠ j  (Chen et al. 2020)."""
    pairs = [(i, j) for i in range(len(vectors)) for j in range(len(vectors)) if i != j]
    return math.fsum(1 - cosine(vectors[i], vectors[j]) for i, j in pairs) / len(pairs)
