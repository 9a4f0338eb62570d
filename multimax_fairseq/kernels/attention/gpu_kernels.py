"""Triton kernels of attention with MultiMax and softmax, for :mod:`.gpu`. Only imported where Triton is installed.

A program has a block of queries (or of keys) of one head, and goes through the keys (or queries) of that head block
by block; no score ever reaches memory. The formulas are those of :mod:`.rows`. Each query has

    peak      max_j σ_j, 0 in a row without scores
    factor    1 / Σ_j exp(σ_j − peak), 0 in a row without scores, NaN where scores are there and all σ_j are −inf
    expected  Σ_j p_j ∂L/∂p_j, summed from these very numbers: gradient · output is equal, but its rounding does not
              cancel, and would ruin the gradients of thresholds and gains in half precision

Source of the idea: Dao et al., *FlashAttention*, NeurIPS 2022. Of the random numbers: Salmon et al., *Parallel Random
Numbers: As Easy as 1, 2, 3*, SC 2011; 7 rounds are the fewest of Philox that pass all of their tests.
"""

import triton
import triton.language as tl

INF = tl.constexpr(float("inf"))
NAN = tl.constexpr(float("nan"))
# Replaces −inf in gradients: finite, also when squared, so that 0 times it is 0.
FAR_BELOW = tl.constexpr(-1e9)
PHILOX_ROUNDS = tl.constexpr(7)

# These change from call to call, so Triton is to make no special kernels for multiples of 16 and for 1.
VARIABLE = ["seed", "tgt_len", "src_len", "num_heads", "mask_batch", "mask_head", "mask_query", "mask_key"]


@triton.jit
def _parameters(pointer, ORDER: tl.constexpr):
    """The numbers below_1, above_1, below_2, above_2 of thresholds or gains, 0 beyond the order."""
    below_1, above_1, below_2, above_2 = 0.0, 0.0, 0.0, 0.0
    if ORDER >= 1:
        below_1, above_1 = tl.load(pointer), tl.load(pointer + 1)
    if ORDER >= 2:
        below_2, above_2 = tl.load(pointer + 2), tl.load(pointer + 3)
    return below_1, above_1, below_2, above_2


@triton.jit
def _sigma(x, thresholds, gains, ORDER: tl.constexpr):
    """σ(x); −inf exactly where the score is."""
    modulated = x
    if ORDER >= 2:  # the formula's order, as it decides what overflows
        below, above = tl.maximum(thresholds[2] - x, 0.0), tl.maximum(x - thresholds[3], 0.0)
        modulated += gains[2] * below * below + gains[3] * above * above
    if ORDER >= 1:
        modulated += gains[0] * tl.maximum(thresholds[0] - x, 0.0) + gains[1] * tl.maximum(x - thresholds[1], 0.0)
    return tl.where(x == -INF, -INF, modulated)


@triton.jit
def _sigma_backward(x, upstream, thresholds, gains, ORDER: tl.constexpr):
    """∂L/∂x from u = ∂L/∂σ; and 4 · ORDER terms: u times the slope for each parameter, then u times its power."""
    x = tl.maximum(x, FAR_BELOW)
    grad, slopes, powers = upstream, (), ()
    if ORDER >= 1:
        below, above = tl.maximum(thresholds[0] - x, 0.0), tl.maximum(x - thresholds[1], 0.0)
        slope_below, slope_above = tl.where(below > 0, upstream, 0.0), tl.where(above > 0, upstream, 0.0)
        grad += gains[1] * slope_above - gains[0] * slope_below
        slopes, powers = (slope_below, slope_above), (upstream * below, upstream * above)
    if ORDER >= 2:
        below, above = tl.maximum(thresholds[2] - x, 0.0), tl.maximum(x - thresholds[3], 0.0)
        half_below, half_above = upstream * below, upstream * above
        grad += 2 * (gains[3] * half_above - gains[2] * half_below)
        slopes += (2 * half_below, 2 * half_above)
        powers += (half_below * below, half_above * above)
    return grad, slopes + powers


@triton.jit
def _added(totals, terms, COUNT: tl.constexpr):
    """``totals``, (queries,) each, and the sums of ``terms``, (queries, keys) each."""
    added = ()
    for number in tl.static_range(COUNT):
        added += (totals[number] + tl.sum(terms[number], 1),)
    return added


@triton.jit
def _masked(
    scores, query, key, queries, keys, mask, mask_query, mask_key, tgt_len, src_len,
    CAUSAL: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """Scores with the mask added; −inf beyond the last query and key.

    ``queries`` and ``keys`` are the indices from ``query`` and ``key`` on; they broadcast. ``MASK``: 0 for none, 1
    for one row for all queries, 2 for a row for each.
    """
    present = (queries < tgt_len) & (keys < src_len)
    if MASK == 1:  # only the common offset is in 64 bits, as in _at
        mask += tl.cast(key, tl.int64) * mask_key
        scores += tl.load(mask + (keys - key) * mask_key, mask=keys < src_len, other=0.0)
    if MASK == 2:
        mask += tl.cast(query, tl.int64) * mask_query + tl.cast(key, tl.int64) * mask_key
        scores += tl.load(mask + ((queries - query) * mask_query + (keys - key) * mask_key), mask=present, other=0.0)
    if CAUSAL:
        present = present & (keys <= queries)
    return tl.where(present, scores, -INF)


@triton.jit
def _kept(seed, head, queries, keys, dropout, DROPOUT: tl.constexpr):
    """Dropout's factor of a probability, 0 or 1 / (1 − dropout), from a counter of head, query and key.

    The counter has a word for each, so that no length overflows it. In a block of scores, most of the first two
    rounds is computed only once per row and once per column.
    """
    if DROPOUT:
        word, _, _, _ = tl.philox(seed, keys, queries, head, 0, PHILOX_ROUNDS)
        uniform = (word >> 8).to(tl.int32).to(tl.float32) * 5.9604644775390625e-08  # of 24 bits, as fp32 has
        return tl.where(uniform >= dropout, 1 / (1 - dropout), 0.0)
    else:
        return 1.0


@triton.jit
def _at(pointer, first, to_next_row, length, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr):
    """Addresses of ROWS rows of a matrix (length, HEAD_DIM) from ``first`` on, and which of them are inside it.

    Only the common offset is in 64 bits: an address for each number would take two registers.
    """
    rows, columns = tl.arange(0, ROWS)[:, None], tl.arange(0, BLOCK_DIM)[None, :]
    inside = rows < length - first
    if HEAD_DIM != BLOCK_DIM:
        inside = inside & (columns < HEAD_DIM)
    return pointer + tl.cast(first, tl.int64) * to_next_row + (rows * to_next_row + columns), inside


@triton.jit
def _read(pointer, first, to_next_row, length, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr):
    """Rows of a matrix, zeros beyond it."""
    at, inside = _at(pointer, first, to_next_row, length, ROWS, HEAD_DIM, BLOCK_DIM)
    return tl.load(at, mask=inside, other=0.0)


@triton.jit
def _write(
    block, pointer, first, to_next_row, length, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr
):
    at, inside = _at(pointer, first, to_next_row, length, ROWS, HEAD_DIM, BLOCK_DIM)
    tl.store(at, block.to(pointer.dtype.element_ty), mask=inside)


@triton.jit
def _place(length, BLOCK: tl.constexpr, LAST_FIRST: tl.constexpr):
    """This program's head, also in 64 bits, first row and rows. A head's programs are adjacent, the longest first."""
    blocks = tl.cdiv(length, BLOCK)
    head, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    if LAST_FIRST:
        block = blocks - 1 - block
    return head, head.to(tl.int64), block * BLOCK, block * BLOCK + tl.arange(0, BLOCK)


@triton.jit(do_not_specialize=VARIABLE)
def forward(
    query, key, value, thresholds, gains, mask, output, peaks, factors,
    query_head, query_row, key_head, key_row, value_head, value_row, output_head, output_row,
    num_heads, mask_batch, mask_head, mask_query, mask_key, tgt_len, src_len, seed, dropout,
    ORDER: tl.constexpr, CAUSAL: tl.constexpr, MASK: tl.constexpr, DROPOUT: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr, BLOCK_QUERIES: tl.constexpr, BLOCK_KEYS: tl.constexpr,
):  # fmt: skip
    """Output, (heads, tgt_len, HEAD_DIM), and peaks and factors, (heads, tgt_len).

    Args:
        query, key, value: (heads, length, HEAD_DIM), with strides ``*_head`` and ``*_row``; rows are contiguous.
        thresholds, gains: (ORDER, 2), fp32, contiguous.
        mask: fp32, (batch, num_heads, tgt_len | 1, src_len), to be added to scores, with strides ``mask_*``.
    """
    head, at, start, rows = _place(tgt_len, BLOCK_QUERIES, CAUSAL)
    thresholds, gains = _parameters(thresholds, ORDER), _parameters(gains, ORDER)
    if MASK > 0:
        mask += (at // num_heads) * mask_batch + (at % num_heads) * mask_head
    q = _read(query + at * query_head, start, query_row, tgt_len, BLOCK_QUERIES, HEAD_DIM, BLOCK_DIM)
    peak = tl.full((BLOCK_QUERIES,), -INF, tl.float32)
    total, seen = tl.zeros((BLOCK_QUERIES,), tl.float32), tl.zeros((BLOCK_QUERIES,), tl.float32)
    sums = tl.zeros((BLOCK_QUERIES, BLOCK_DIM), tl.float32)
    for first in range(0, tl.minimum(src_len, start + BLOCK_QUERIES) if CAUSAL else src_len, BLOCK_KEYS):
        keys = first + tl.arange(0, BLOCK_KEYS)
        k = _read(key + at * key_head, first, key_row, src_len, BLOCK_KEYS, HEAD_DIM, BLOCK_DIM)
        v = _read(value + at * value_head, first, value_row, src_len, BLOCK_KEYS, HEAD_DIM, BLOCK_DIM)
        x = _masked(
            tl.dot(q, tl.trans(k), input_precision="ieee"), start, first, rows[:, None], keys[None, :],
            mask, mask_query, mask_key, tgt_len, src_len, CAUSAL, MASK,
        )  # fmt: skip
        modulated = _sigma(x, thresholds, gains, ORDER)
        peak_now = tl.maximum(peak, tl.max(modulated, 1))
        shift = tl.where(peak_now == -INF, 0.0, peak_now)
        exponentials = tl.exp(modulated - shift[:, None])
        scale = tl.exp(peak - shift)
        total = total * scale + tl.sum(exponentials, 1)
        if ORDER >= 1:
            seen = tl.maximum(seen, tl.max(tl.where(x == -INF, 0.0, 1.0), 1))
        weights = exponentials * _kept(seed, head, rows[:, None], keys[None, :], dropout, DROPOUT)
        sums = tl.dot(weights.to(v.dtype), v, sums * scale[:, None], input_precision="ieee")
        peak = peak_now
    # The exponential of the peak is 1, so a sum of 0 means no score at all, or that σ of all is −inf.
    factor = tl.where(total == 0, tl.where(seen > 0, NAN, 0.0), 1 / total)
    _write(
        sums * factor[:, None], output + at * output_head, start, output_row, tgt_len,
        BLOCK_QUERIES, HEAD_DIM, BLOCK_DIM,
    )  # fmt: skip
    tl.store(peaks + at * tgt_len + rows, tl.where(total == 0, 0.0, peak), mask=rows < tgt_len)
    tl.store(factors + at * tgt_len + rows, factor, mask=rows < tgt_len)


@triton.jit
def _probabilities(
    q, k, query, key, queries, keys, peak, factor, thresholds, gains, mask, mask_query, mask_key, tgt_len, src_len,
    ORDER: tl.constexpr, CAUSAL: tl.constexpr, MASK: tl.constexpr, BY_KEY: tl.constexpr,
):  # fmt: skip
    """Scores and probabilities, (queries, keys), or (keys, queries) if ``BY_KEY``."""
    scores = (
        tl.dot(k, tl.trans(q), input_precision="ieee") if BY_KEY else tl.dot(q, tl.trans(k), input_precision="ieee")
    )
    x = _masked(scores, query, key, queries, keys, mask, mask_query, mask_key, tgt_len, src_len, CAUSAL, MASK)
    return x, tl.exp(_sigma(x, thresholds, gains, ORDER) - peak) * factor


@triton.jit(do_not_specialize=VARIABLE)
def backward_queries(
    query, key, value, grad, thresholds, gains, mask, peaks, factors, expecteds, grad_query, table,
    query_head, query_row, key_head, key_row, value_head, value_row, grad_head, grad_row,
    grad_query_head, grad_query_row,
    num_heads, mask_batch, mask_head, mask_query, mask_key, tgt_len, src_len, seed, dropout,
    ORDER: tl.constexpr, CAUSAL: tl.constexpr, MASK: tl.constexpr, DROPOUT: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr, BLOCK_QUERIES: tl.constexpr, BLOCK_KEYS: tl.constexpr,
):  # fmt: skip
    """∂L/∂query of a block of queries; Σ p · ∂L/∂p, (heads, tgt_len); and the sums for thresholds and gains.

    Args:
        grad: ∂L/∂output, (heads, tgt_len, HEAD_DIM).
        table: (programs, 2, ORDER, 2), the sums of slopes and of powers.
    """
    head, at, start, rows = _place(tgt_len, BLOCK_QUERIES, CAUSAL)
    thresholds, gains = _parameters(thresholds, ORDER), _parameters(gains, ORDER)
    if MASK > 0:
        mask += (at // num_heads) * mask_batch + (at % num_heads) * mask_head
    q = _read(query + at * query_head, start, query_row, tgt_len, BLOCK_QUERIES, HEAD_DIM, BLOCK_DIM)
    g = _read(grad + at * grad_head, start, grad_row, tgt_len, BLOCK_QUERIES, HEAD_DIM, BLOCK_DIM)
    peak = tl.load(peaks + at * tgt_len + rows, mask=rows < tgt_len, other=0.0)[:, None]
    factor = tl.load(factors + at * tgt_len + rows, mask=rows < tgt_len, other=0.0)[:, None]
    end = tl.minimum(src_len, start + BLOCK_QUERIES) if CAUSAL else src_len

    expected, totals = tl.zeros((BLOCK_QUERIES,), tl.float32), ()
    for _ in tl.static_range(4 * ORDER):
        totals += (tl.zeros((BLOCK_QUERIES,), tl.float32),)
    grad_q = tl.zeros((BLOCK_QUERIES, BLOCK_DIM), tl.float32)
    for again in tl.static_range(2):  # first what is expected, then the gradients, which need it
        for first in range(0, end, BLOCK_KEYS):
            keys = first + tl.arange(0, BLOCK_KEYS)
            k = _read(key + at * key_head, first, key_row, src_len, BLOCK_KEYS, HEAD_DIM, BLOCK_DIM)
            v = _read(value + at * value_head, first, value_row, src_len, BLOCK_KEYS, HEAD_DIM, BLOCK_DIM)
            x, p = _probabilities(
                q, k, start, first, rows[:, None], keys[None, :], peak, factor, thresholds, gains,
                mask, mask_query, mask_key, tgt_len, src_len, ORDER, CAUSAL, MASK, False,
            )  # fmt: skip
            grad_p = tl.dot(g, tl.trans(v), input_precision="ieee")
            grad_p *= _kept(seed, head, rows[:, None], keys[None, :], dropout, DROPOUT)
            if again:
                upstream = p * (grad_p - expected[:, None])
                grad_x, terms = _sigma_backward(x, upstream, thresholds, gains, ORDER)
                grad_q = tl.dot(grad_x.to(k.dtype), k, grad_q, input_precision="ieee")
                totals = _added(totals, terms, 4 * ORDER)
            else:
                expected += tl.sum(p * grad_p, 1)
    tl.store(expecteds + at * tgt_len + rows, expected, mask=rows < tgt_len)
    _write(
        grad_q, grad_query + at * grad_query_head, start, grad_query_row, tgt_len, BLOCK_QUERIES, HEAD_DIM, BLOCK_DIM
    )
    table += tl.program_id(0).to(tl.int64) * (4 * ORDER)
    for number in tl.static_range(4 * ORDER):
        tl.store(table + number, tl.sum(totals[number], 0))


@triton.jit(do_not_specialize=VARIABLE)
def backward_keys(
    query, key, value, grad, thresholds, gains, mask, peaks, factors, expecteds, grad_key, grad_value,
    query_head, query_row, key_head, key_row, value_head, value_row, grad_head, grad_row,
    grad_key_head, grad_key_row, grad_value_head, grad_value_row,
    num_heads, mask_batch, mask_head, mask_query, mask_key, tgt_len, src_len, seed, dropout,
    ORDER: tl.constexpr, CAUSAL: tl.constexpr, MASK: tl.constexpr, DROPOUT: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr, BLOCK_QUERIES: tl.constexpr, BLOCK_KEYS: tl.constexpr,
):  # fmt: skip
    """∂L/∂key and ∂L/∂value of a block of keys; arguments as in :func:`backward_queries`."""
    head, at, start, keys = _place(src_len, BLOCK_KEYS, False)
    thresholds, gains = _parameters(thresholds, ORDER), _parameters(gains, ORDER)
    if MASK > 0:
        mask += (at // num_heads) * mask_batch + (at % num_heads) * mask_head
    k = _read(key + at * key_head, start, key_row, src_len, BLOCK_KEYS, HEAD_DIM, BLOCK_DIM)
    v = _read(value + at * value_head, start, value_row, src_len, BLOCK_KEYS, HEAD_DIM, BLOCK_DIM)
    grad_k = tl.zeros((BLOCK_KEYS, BLOCK_DIM), tl.float32)
    grad_v = tl.zeros((BLOCK_KEYS, BLOCK_DIM), tl.float32)
    for first in range(start // BLOCK_QUERIES * BLOCK_QUERIES if CAUSAL else 0, tgt_len, BLOCK_QUERIES):
        rows = first + tl.arange(0, BLOCK_QUERIES)
        q = _read(query + at * query_head, first, query_row, tgt_len, BLOCK_QUERIES, HEAD_DIM, BLOCK_DIM)
        g = _read(grad + at * grad_head, first, grad_row, tgt_len, BLOCK_QUERIES, HEAD_DIM, BLOCK_DIM)
        peak = tl.load(peaks + at * tgt_len + rows, mask=rows < tgt_len, other=0.0)
        factor = tl.load(factors + at * tgt_len + rows, mask=rows < tgt_len, other=0.0)
        expected = tl.load(expecteds + at * tgt_len + rows, mask=rows < tgt_len, other=0.0)
        x, p = _probabilities(
            q, k, first, start, rows[None, :], keys[:, None], peak[None, :], factor[None, :], thresholds, gains,
            mask, mask_query, mask_key, tgt_len, src_len, ORDER, CAUSAL, MASK, True,
        )  # fmt: skip
        kept = _kept(seed, head, rows[None, :], keys[:, None], dropout, DROPOUT)
        grad_v = tl.dot((p * kept).to(g.dtype), g, grad_v, input_precision="ieee")
        grad_p = tl.dot(v, tl.trans(g), input_precision="ieee") * kept
        grad_x, _ = _sigma_backward(x, p * (grad_p - expected[None, :]), thresholds, gains, ORDER)
        grad_k = tl.dot(grad_x.to(q.dtype), q, grad_k, input_precision="ieee")
    _write(grad_k, grad_key + at * grad_key_head, start, grad_key_row, src_len, BLOCK_KEYS, HEAD_DIM, BLOCK_DIM)
    _write(grad_v, grad_value + at * grad_value_head, start, grad_value_row, src_len, BLOCK_KEYS, HEAD_DIM, BLOCK_DIM)
