"""The step as Triton kernels; :mod:`gradprom_ext.triton_plan` lays out what they read and launches them.

.. code-block:: text

    measure   one program per chunk of a parameter: its share of the Gram matrix
    decide    ONE program: adds the shares in a fixed order, applies the gate, reads and advances the step counters,
              and works out the coefficients of every parameter's update
    update    one program per chunk, in reverse order: what `measure` read last is what the L2 cache still has

The maths is that of ``csrc/gradprom`` (``gram.h``, ``policy.h``, ``update.h``); change them together. Products and sums
are fp64, in which products of fp32 and 16-bit gradients are exact. There are no atomics: equal input gives equal bits.

Tensors come as addresses in tables of 64-bit words, so that one launch serves any number of them. What differs in kind
(types, number of states, access) is a ``constexpr`` and takes a launch of its own.
"""
# To ruff an argument in capitals is a constant (SIM300), and to mypy a tuple does not grow.
# ruff: noqa: SIM300
# mypy: disable-error-code=assignment

from __future__ import annotations

import triton
import triton.language as tl

# Columns of the table of items. An item is a parameter with everything that belongs to it.
NUMEL = tl.constexpr(0)
ROW = tl.constexpr(1)  # of the Gram matrix it belongs to
GROUP = tl.constexpr(2)
STEP = tl.constexpr(3)  # address of its counter of updates; 0 for stateless rules
GEOMETRY = tl.constexpr(4)  # where its sizes and strides begin in the table of geometry
TENSORS = tl.constexpr(5)  # the addresses of its tensors, in this order:
UPDATED = tl.constexpr(0)  # what the update reads and writes: the parameter, or its fp32 master;
ROUNDED = tl.constexpr(1)  # then the parameter, which receives the master's rounded values
STATES = tl.constexpr(2)
GRADS = tl.constexpr(5)  # main and auxiliary gradients; 0 where one is absent

# Columns of the table of chunks.
CHUNK_ITEM = tl.constexpr(0)
CHUNK_BEGIN = tl.constexpr(1)  # its first element within the item
CHUNK_SLOT = tl.constexpr(2)  # of its partial Gram matrix
CHUNK_WIDTH = tl.constexpr(3)

# A number that may live on the device is three words: the bits of an fp64, then the address of an fp32 and of an fp64.
# Two of them are 0.
NUMBER_WIDTH = tl.constexpr(3)

# Columns of the table of parameter groups: the learning rate (a number of three words), then the bits of fp64 values.
DECAY = tl.constexpr(3)
SIGN = tl.constexpr(4)  # of the gradient: -1 to maximize
MOMENTUM = tl.constexpr(5)
DAMPENING = tl.constexpr(6)
NESTEROV = tl.constexpr(7)
ONE_MINUS_BETA1 = tl.constexpr(8)
BETA2 = tl.constexpr(9)
ONE_MINUS_BETA2 = tl.constexpr(10)
LOG_BETA1 = tl.constexpr(11)
LOG_BETA2 = tl.constexpr(12)
EPS = tl.constexpr(13)
DECOUPLED = tl.constexpr(14)
GROUP_WIDTH = tl.constexpr(15)

# The gate's numbers, before the lambdas (three words each).
THRESHOLD = tl.constexpr(0)
MAX_GRAD_NORM = tl.constexpr(1)  # 0: no clipping
AUX_CAP = tl.constexpr(2)  # 0: no cap
LAMBDAS = tl.constexpr(3)

# Coefficients of one item's update: those of the rule, at most eight, and the sign of the gradient.
COEFFICIENTS = tl.constexpr(9)
COEFFICIENT_SIGN = tl.constexpr(8)

# Before the rows of the statistics; a launch that updates reads here what was decided.
SKIPPED = tl.constexpr(0)
COMBINED_NORM = tl.constexpr(1)
CLIP = tl.constexpr(2)
STATS_HEADER = tl.constexpr(3)

# Vectors of 16 bytes hold 2 to 8 elements. What is left of an aligned tensor behind its last run of 16 elements is a
# block of its own, so that everything before it is known to be whole vectors.
RUN = tl.constexpr(16)


@triton.constexpr_function
def gram_entry(n, i, j):
    """Index of entry (i, j), i <= j, in the upper triangle of a symmetric n x n matrix, row by row."""
    return i * n - i * (i - 1) // 2 + j - i


@triton.constexpr_function
def stats_row_size(num_aux):
    """Numbers that describe the decision on one row."""
    return 2 + 4 * num_aux


@triton.constexpr_function
def num_coefficients(rule):
    """How many numbers :func:`prepare_items` works out for a rule."""
    return {"sgd": 5, "adam": 8}[rule]


# ----------------------------------------------------------------------------------------------------------------------
# Tensors behind addresses


@triton.jit
def load(address, index, mask, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Elements of a tensor, those of 16 bits as fp32; 0 where ``mask`` is false: nothing is read there."""
    STORED: tl.constexpr = tl.uint16 if DTYPE == tl.bfloat16 else DTYPE
    pointer = address.to(tl.pointer_type(STORED))
    if ALIGNED:  # said of the pointer, because a cast forgets what is known of the address
        pointer = tl.multiple_of(pointer, 16)
    x = tl.load(pointer + index, mask=mask, other=0)
    if DTYPE == tl.bfloat16:  # the upper half of an fp32; by hand, because the interpreter's cast drops subnormals
        x = (x.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    if DTYPE == tl.float16:
        x = x.to(tl.float32)
    return x


@triton.jit
def stored(x, DTYPE: tl.constexpr):
    """As it is stored: rounded once, to nearest, ties to even; fp64 goes to 16 bits by way of fp32, as in PyTorch. For
    bf16 these are the bits."""
    if DTYPE == tl.bfloat16:  # by hand, because the interpreter's cast truncates
        bits = x.to(tl.float32).to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        x = tl.where((bits & 0x7FFFFFFF) > 0x7F800000, 0x7FC0, rounded).to(tl.uint16)
    elif DTYPE == tl.float16:
        x = x.to(tl.float32).to(tl.float16)
    else:
        x = x.to(DTYPE)
    return x


@triton.jit
def store(x, address, index, mask, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    pointer = address.to(tl.pointer_type(tl.uint16 if DTYPE == tl.bfloat16 else DTYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    tl.store(pointer + index, stored(x, DTYPE), mask=mask)


@triton.jit
def followed(master, address, index, mask, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Masters, or the parameters at ``address`` where those are no longer the masters' rounded values: they were
    written to since. csrc/gradprom/dtype.h: followed."""
    pointer = address.to(tl.pointer_type(tl.uint16))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    bits = tl.load(pointer + index, mask=mask, other=0)
    if DTYPE == tl.bfloat16:
        rounded = stored(master, DTYPE)
        value = (bits.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        rounded = stored(master, DTYPE).to(tl.uint16, bitcast=True)
        value = bits.to(tl.float16, bitcast=True).to(tl.float32)
    return tl.where(rounded == bits, master, value.to(master.dtype))


@triton.jit
def everywhere(x, mask):
    """The number ``x`` in the shape of ``mask``: the interpreter cannot stretch the outcome of a comparison."""
    return tl.full(mask.shape, x, x.dtype)


@triton.jit
def place(element, geometry, OPERAND: tl.constexpr, STRIDED: tl.constexpr):
    """Where element number ``element`` of an item lies in the memory of one of its tensors.

    ``geometry`` holds the number of dimensions, the sizes, and the strides of every tensor.
    """
    index = element
    if STRIDED:
        ndim = tl.load(geometry).to(tl.int32)
        sizes = geometry + 1
        strides = sizes + (1 + OPERAND) * ndim
        index = element * 0
        for back in range(ndim):
            d = ndim - 1 - back
            size = tl.load(sizes + d)
            index += (element % size) * tl.load(strides + d)
            element = element // size
    return index


@triton.jit
def addresses(item, FIRST: tl.constexpr, COUNT: tl.constexpr):
    """Of an item's tensors number ``FIRST`` and following; read once per program, not once per block."""
    found = ()
    for operand in tl.static_range(FIRST, FIRST + COUNT):
        found += (tl.load(item + (TENSORS + operand)),)
    return found


@triton.jit
def field(words, mask):
    """The fp64 value whose bits are in a table."""
    return tl.load(words, mask=mask, other=0).to(tl.float64, bitcast=True)


@triton.jit
def number(words, mask):
    """A number that the host knew, or that lies on the device: of its three words two are 0."""
    single = tl.load(words + 1, mask=mask, other=0)
    double = tl.load(words + 2, mask=mask, other=0)
    x = field(words, mask)
    x += tl.load(single.to(tl.pointer_type(tl.float32)), mask=single != 0, other=0.0).to(tl.float64)
    return x + tl.load(double.to(tl.pointer_type(tl.float64)), mask=double != 0, other=0.0)


# ----------------------------------------------------------------------------------------------------------------------
# Measure


@triton.jit
def add_products(
    sums, grads, geometry, element, mask, DTYPES: tl.constexpr, ALIGNED: tl.constexpr, STRIDED: tl.constexpr
):
    """Adds the products of the gradients at ``element`` to ``sums``, one block per entry of the Gram matrix."""
    N: tl.constexpr = len(DTYPES)
    x = ()
    for k in tl.static_range(N):
        index = place(element, geometry, GRADS + k, STRIDED)
        x += (load(grads[k], index, mask & (everywhere(grads[k], mask) != 0), DTYPES[k], ALIGNED).to(tl.float64),)
    total = ()
    for i in tl.static_range(N):
        for j in tl.static_range(i, N):
            total += (sums[gram_entry(N, i, j)] + x[i] * x[j],)
    return total


@triton.jit
def zeros(COUNT: tl.constexpr, SIZE: tl.constexpr):
    blocks = ()
    for _ in tl.static_range(COUNT):
        blocks += (tl.full([SIZE], 0.0, tl.float64),)
    return blocks


@triton.jit(do_not_specialize=["first_chunk", "chunk_length"])
def measure_kernel(
    chunks,
    items,
    geometries,
    partials,
    first_chunk,
    chunk_length,
    DTYPES: tl.constexpr,  # of the gradients
    ALIGNED: tl.constexpr,
    STRIDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``partials[slot]``: upper triangle of the Gram matrix of the gradients' elements in one chunk."""
    N: tl.constexpr = len(DTYPES)
    SIZE: tl.constexpr = N * (N + 1) // 2
    chunk = chunks + (first_chunk + tl.program_id(0)) * CHUNK_WIDTH
    item = items + tl.load(chunk + CHUNK_ITEM) * (TENSORS + GRADS + N)
    begin = tl.load(chunk + CHUNK_BEGIN)
    geometry = geometries + tl.load(item + GEOMETRY)
    if ALIGNED:
        begin = tl.multiple_of(begin, RUN)
    length = tl.minimum(tl.load(item + NUMEL) - begin, chunk_length).to(tl.int32)
    body = length // RUN * RUN if ALIGNED else length

    grads = addresses(item, GRADS, N)
    sums = zeros(SIZE, BLOCK)
    for start in range(0, body, BLOCK):
        at = start + tl.arange(0, BLOCK)
        sums = add_products(sums, grads, geometry, begin + at, at < body, DTYPES, ALIGNED, STRIDED)
    if ALIGNED:
        rest = body + tl.arange(0, RUN)
        ends = add_products(zeros(SIZE, RUN), grads, geometry, begin + rest, rest < length, DTYPES, ALIGNED, STRIDED)
    out = partials + tl.load(chunk + CHUNK_SLOT) * SIZE
    for e in tl.static_range(SIZE):
        total = tl.sum(sums[e], axis=0)
        if ALIGNED:
            total += tl.sum(ends[e], axis=0)
        tl.store(out + e, total)


# ----------------------------------------------------------------------------------------------------------------------
# Decide


@triton.jit
def row_grams(partials, row_slots, row, live, SIZE: tl.constexpr, ROWS: tl.constexpr, SLOTS: tl.constexpr):
    """The Gram matrices of ``ROWS`` rows at once: each sums its run of slots, ``SLOTS`` at a time."""
    first = tl.load(row_slots + row, mask=live, other=0)
    last = tl.load(row_slots + row + 1, mask=live, other=0)
    sums = ()
    for _ in tl.static_range(SIZE):
        sums += (tl.full([ROWS, SLOTS], 0.0, tl.float64),)
    for start in range(0, tl.max(last - first, axis=0).to(tl.int32), SLOTS):
        slot = first[:, None] + start + tl.arange(0, SLOTS)[None, :]
        mask = slot < last[:, None]
        total = ()
        for e in tl.static_range(SIZE):
            total += (sums[e] + tl.load(partials + slot * SIZE + e, mask=mask, other=0.0),)
        sums = total
    grams = ()
    for e in tl.static_range(SIZE):
        grams += (tl.sum(sums[e], axis=1),)
    return grams


@triton.jit(do_not_specialize=["rows"])
def gram_kernel(row_slots, partials, grams, rows, N: tl.constexpr, ROWS: tl.constexpr, SLOTS: tl.constexpr):
    """``grams[row]``: the whole matrices, for a decision elsewhere."""
    for start in range(0, rows, ROWS):
        row = start + tl.arange(0, ROWS)
        live = row < rows
        gram = row_grams(partials, row_slots, row, live, N * (N + 1) // 2, ROWS, SLOTS)
        for i in tl.static_range(N):
            for j in tl.static_range(i, N):
                entry = gram[gram_entry(N, i, j)]
                tl.store(grams + (row * N + i) * N + j, entry, mask=live)
                tl.store(grams + (row * N + j) * N + i, entry, mask=live)


@triton.jit
def cap_of(aux_weight, main_norm, norm, kappa):
    """The factor in [0, 1] that brings lambda down to ``|lambda * g_k| <= kappa * |g_0|``; csrc/gradprom/policy.h."""
    limit = main_norm / tl.where(norm == 0.0, 1.0, norm) * kappa
    size = tl.abs(aux_weight)
    free = (kappa == 0.0) | (norm == 0.0) | (size <= limit)
    return tl.where(free, 1.0, limit / tl.where(free, 1.0, size))


@triton.jit
def gate_rows(gram, gate, row, live, weights, stats, GATE: tl.constexpr, N: tl.constexpr):
    """Applies the policy to a vector of rows and writes their weights and statistics.

    Returns the squared norm of each row's combined gradient, and 1 where a gradient is not finite.
    """
    K: tl.constexpr = N - 1
    out = stats + STATS_HEADER + row * stats_row_size(K)
    threshold = field(gate + THRESHOLD, True)
    kappa = everywhere(field(gate + AUX_CAP, True), live)
    main_norm = tl.sqrt(gram[0])
    main_weight = tl.full(row.shape, 1.0, tl.float64)
    bad = ~(gram[0] - gram[0] == 0.0)  # x - x is 0 for every finite x
    w = ()
    for k in tl.static_range(1, N):
        dot, square = gram[k], gram[gram_entry(N, k, k)]
        norm = tl.sqrt(square)
        zero = (main_norm == 0.0) | (norm == 0.0)
        cosine = tl.where(zero, 0.0, dot / tl.where(zero, 1.0, main_norm) / tl.where(zero, 1.0, norm))
        aux_weight = number(gate + (LAMBDAS + (k - 1) * NUMBER_WIDTH), True)
        cap = cap_of(aux_weight, main_norm, norm, kappa)
        aux_weight = cap * aux_weight
        if GATE == "hard":
            opening = (cosine >= threshold).to(tl.float64)
        elif GATE == "soft":
            opening = tl.where((cosine >= threshold) & (cosine > 0.0), cosine, 0.0)
        elif GATE == "never":
            opening = tl.full(row.shape, 0.0, tl.float64)
        elif GATE == "always" or GATE == "project":
            opening = tl.full(row.shape, 1.0, tl.float64)
        else:
            tl.static_assert(False, "the kernels have no such gate")
        if GATE == "project":
            # g_k - (<g_0, g_k> / |g_0|^2) g_0, times lambda_k: the second term is a weight on g_0.
            against = cosine < 0.0
            main_weight -= tl.where(against, aux_weight * (dot / tl.where(against, gram[0], 1.0)), 0.0)
        bad = bad | ~(square - square == 0.0)
        w += (opening * aux_weight,)
        tl.store(out + (1 + k), cosine, mask=live)
        tl.store(out + (1 + K + k), opening, mask=live)
        tl.store(out + (1 + 2 * K + k), norm, mask=live)
        tl.store(out + (1 + 3 * K + k), cap, mask=live)
    tl.store(out, main_norm, mask=live)
    tl.store(out + 1, main_weight, mask=live)

    w = (main_weight,) + w  # noqa: RUF005
    squared = tl.full(row.shape, 0.0, tl.float64)
    for i in tl.static_range(N):
        tl.store(weights + row * N + i, w[i], mask=live)
        for j in tl.static_range(i, N):
            term = (1.0 if i == j else 2.0) * w[i] * w[j] * gram[gram_entry(N, i, j)]
            squared += tl.where((w[i] == 0.0) | (w[j] == 0.0), 0.0, term)
    # Rounding may leave a tiny negative number where gradients cancel.
    squared = tl.where(live & (squared > 0.0), squared, 0.0)
    return squared, tl.where(live & bad, 1.0, 0.0).to(tl.float64)


@triton.jit
def prepare_items(
    items, num_items, groups, coefficients, skipped, RULE: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr
):
    """The coefficients of every item's update, from its group and its step counter; raises the counter unless the step
    is ``skipped`` (not 0). One program does this for all: the programs of one item must read the same count.
    """
    for start in range(0, num_items, BLOCK):
        number_of = start + tl.arange(0, BLOCK)
        live = number_of < num_items
        item = items + number_of * WIDTH
        group = groups + tl.load(item + GROUP, mask=live, other=0) * GROUP_WIDTH
        address = tl.load(item + STEP, mask=live, other=0)
        counter = address.to(tl.pointer_type(tl.float32))
        counted = address != 0
        before = tl.load(counter, mask=counted, other=0.0)
        tl.store(counter, before + 1.0, mask=counted & (everywhere(skipped, counted) == 0.0))
        lr = number(group, live)
        decay = field(group + DECAY, live)
        if RULE == "adam":
            step = before.to(tl.float64) + 1.0
            correction1 = 1.0 - tl.exp(step * field(group + LOG_BETA1, live))
            correction2 = 1.0 - tl.exp(step * field(group + LOG_BETA2, live))
            decoupled = field(group + DECOUPLED, live) != 0.0
            values = (
                lr / tl.where(live, correction1, 1.0),
                tl.where(decoupled, 0.0, decay),
                1.0 - tl.where(decoupled, lr * decay, 0.0),
                field(group + ONE_MINUS_BETA1, live),
                field(group + BETA2, live),
                field(group + ONE_MINUS_BETA2, live),
                1.0 / tl.sqrt(tl.where(live, correction2, 1.0)),
                field(group + EPS, live),
            )
        elif RULE == "sgd":
            # torch.optim starts the buffer as a copy of the gradient, undamped.
            keep = 1.0 - tl.where(before == 0.0, 0.0, field(group + DAMPENING, live))
            values = (lr, decay, field(group + MOMENTUM, live), keep, field(group + NESTEROV, live))
        else:
            tl.static_assert(False, "the kernels have no such rule")
        out = coefficients + number_of * COEFFICIENTS
        for c in tl.static_range(len(values)):
            tl.store(out + c, values[c], mask=live)
        tl.store(out + COEFFICIENT_SIGN, field(group + SIGN, live), mask=live)


@triton.jit(do_not_specialize=["rows", "num_items"])
def decide_kernel(
    row_slots,
    items,
    groups,
    gate,
    partials,
    weights,
    coefficients,
    stats,
    skipped_steps,
    rows,
    num_items,
    GATE: tl.constexpr,
    RULE: tl.constexpr,
    N: tl.constexpr,
    ROWS: tl.constexpr,
    SLOTS: tl.constexpr,
    ITEMS: tl.constexpr,
):
    """From the partial Gram matrices to weights, statistics and coefficients, in one program."""
    squared = tl.full([ROWS], 0.0, tl.float64)
    bad = tl.full([ROWS], 0.0, tl.float64)
    for start in range(0, rows, ROWS):
        row = start + tl.arange(0, ROWS)
        live = row < rows
        gram = row_grams(partials, row_slots, row, live, N * (N + 1) // 2, ROWS, SLOTS)
        row_squared, row_bad = gate_rows(gram, gate, row, live, weights, stats, GATE, N)
        squared += row_squared
        bad += row_bad
    norm = tl.sqrt(tl.sum(squared, axis=0))
    skipped = tl.minimum(tl.sum(bad, axis=0), 1.0)
    limit = field(gate + MAX_GRAD_NORM, True)
    # torch.nn.utils.clip_grad_norm_, its 1e-6 included.
    clip = tl.where(limit > 0.0, tl.minimum(limit / (norm + 1e-6), 1.0), 1.0)
    tl.store(stats + SKIPPED, skipped)
    tl.store(stats + COMBINED_NORM, norm)
    tl.store(stats + CLIP, clip)
    if skipped_steps is not None:
        tl.store(skipped_steps, tl.load(skipped_steps) + skipped)
    prepare_items(items, num_items, groups, coefficients, skipped, RULE, TENSORS + GRADS + N, ITEMS)


@triton.jit(do_not_specialize=["num_items"])
def prepare_kernel(
    items, groups, coefficients, verdict, num_items, RULE: tl.constexpr, N: tl.constexpr, ITEMS: tl.constexpr
):
    """The part of :func:`decide_kernel` that is left where the decision was taken elsewhere."""
    skipped = tl.load(verdict + SKIPPED)
    prepare_items(items, num_items, groups, coefficients, skipped, RULE, TENSORS + GRADS + N, ITEMS)


# ----------------------------------------------------------------------------------------------------------------------
# Update


@triton.jit
def divide(x, y):
    """Rounded correctly, as in C++; plain division of fp32 is an approximation in Triton."""
    return tl.div_rn(x, y) if x.dtype == tl.float32 else x / y


@triton.jit
def square_root(x):
    return tl.sqrt_rn(x) if x.dtype == tl.float32 else tl.sqrt(x)


@triton.jit
def sgd(c, gradient, value, states):
    """New value and states of elements; ``c`` as :func:`prepare_items` orders them. csrc/gradprom/update.h: Sgd."""
    lr, decay, momentum, keep, nesterov = c
    g = tl.where(decay != 0.0, gradient + decay * value, gradient)
    direction = g
    if len(states) > 0:
        buffer = momentum * states[0] + keep * g
        direction = tl.where(nesterov != 0.0, g + momentum * buffer, buffer)
        states = (buffer,)
    return value - lr * direction, states


@triton.jit
def adam(c, gradient, value, states):
    """As :func:`sgd`. csrc/gradprom/update.h: Adam."""
    step_size, decay, shrink, one_minus_beta1, beta2, one_minus_beta2, inverse_sqrt_correction2, eps = c
    g = tl.where(decay != 0.0, gradient + decay * value, gradient)
    value = value * shrink
    mean = states[0] + one_minus_beta1 * (g - states[0])
    variance = beta2 * states[1] + one_minus_beta2 * g * g
    largest = variance
    new = (mean, variance)
    if len(states) > 2:
        largest = tl.where(states[2] > variance, states[2], variance)
        new = (mean, variance, largest)
    denominator = square_root(largest) * inverse_sqrt_correction2 + eps
    return value - step_size * divide(mean, denominator), new


@triton.jit
def apply_rule(RULE: tl.constexpr, c, gradient, value, states):
    if RULE == "sgd":
        value, states = sgd(c, gradient, value, states)
    elif RULE == "adam":
        value, states = adam(c, gradient, value, states)
    else:
        tl.static_assert(False, "the kernels have no such rule")
    return value, states


@triton.jit
def update_block(
    tensors,
    geometry,
    weights,
    c,
    element,
    mask,
    RULE: tl.constexpr,
    T: tl.constexpr,
    UPDATED_DTYPE: tl.constexpr,
    ROUNDED_DTYPE: tl.constexpr,
    STATE_DTYPES: tl.constexpr,
    GRAD_DTYPES: tl.constexpr,
    ALIGNED: tl.constexpr,
    STRIDED: tl.constexpr,
):
    """Steps the elements at ``element`` where ``mask``, in arithmetic of type ``T``."""
    at = place(element, geometry, UPDATED, STRIDED)
    value = load(tensors[UPDATED], at, mask, UPDATED_DTYPE, ALIGNED).to(T)
    rounded_at = at
    if ROUNDED_DTYPE is not None:
        rounded_at = place(element, geometry, ROUNDED, STRIDED)
        value = followed(value, tensors[ROUNDED], rounded_at, mask, ROUNDED_DTYPE, ALIGNED)
    states = ()
    for s in tl.static_range(len(STATE_DTYPES)):
        index = place(element, geometry, STATES + s, STRIDED)
        states += (load(tensors[STATES + s], index, mask, STATE_DTYPES[s], ALIGNED).to(T),)
    gradient = tl.full(element.shape, 0.0, T)
    for k in tl.static_range(len(GRAD_DTYPES)):
        # A weight of 0 deselects its gradient: it is not read, so that 0 times infinity cannot arise.
        index = place(element, geometry, GRADS + k, STRIDED)
        wanted = mask & (everywhere(weights[k], mask) != 0.0)
        gradient += weights[k] * load(tensors[GRADS + k], index, wanted, GRAD_DTYPES[k], ALIGNED).to(T)
    value, states = apply_rule(RULE, c, gradient, value, states)
    store(value, tensors[UPDATED], at, mask, UPDATED_DTYPE, ALIGNED)
    if ROUNDED_DTYPE is not None:
        store(value, tensors[ROUNDED], rounded_at, mask, ROUNDED_DTYPE, ALIGNED)
    for s in tl.static_range(len(STATE_DTYPES)):
        index = place(element, geometry, STATES + s, STRIDED)
        store(states[s], tensors[STATES + s], index, mask, STATE_DTYPES[s], ALIGNED)


@triton.jit(do_not_specialize=["first_chunk", "chunk_length"])
def update_kernel(
    chunks,
    items,
    geometries,
    weights,
    coefficients,
    verdict,
    first_chunk,
    chunk_length,
    RULE: tl.constexpr,
    T: tl.constexpr,  # type of the arithmetic
    UPDATED_DTYPE: tl.constexpr,
    ROUNDED_DTYPE: tl.constexpr,  # None without a master
    STATE_DTYPES: tl.constexpr,
    GRAD_DTYPES: tl.constexpr,
    ALIGNED: tl.constexpr,
    STRIDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Steps the elements of one chunk, from its end to its beginning, unless the step is skipped."""
    N: tl.constexpr = len(GRAD_DTYPES)
    chunk = chunks + (first_chunk + tl.num_programs(0) - 1 - tl.program_id(0)) * CHUNK_WIDTH
    number_of = tl.load(chunk + CHUNK_ITEM)
    item = items + number_of * (TENSORS + GRADS + N)
    begin = tl.load(chunk + CHUNK_BEGIN)
    geometry = geometries + tl.load(item + GEOMETRY)
    if ALIGNED:
        begin = tl.multiple_of(begin, RUN)
    length = tl.minimum(tl.load(item + NUMEL) - begin, chunk_length).to(tl.int32)
    length = tl.where(tl.load(verdict + SKIPPED) != 0.0, 0, length)
    body = length // RUN * RUN if ALIGNED else length

    coefficient = coefficients + number_of * COEFFICIENTS
    c = ()
    for i in tl.static_range(num_coefficients(RULE)):
        c += (tl.load(coefficient + i).to(T),)
    tensors = addresses(item, 0, GRADS + N)
    factor = tl.load(verdict + CLIP) * tl.load(coefficient + COEFFICIENT_SIGN)
    row = weights + tl.load(item + ROW) * N
    w = ()
    for k in tl.static_range(N):
        w += (tl.where(tensors[GRADS + k] != 0, tl.load(row + k) * factor, 0.0).to(T),)

    if body < length:
        rest = body + tl.arange(0, RUN)
        update_block(
            tensors,
            geometry,
            w,
            c,
            begin + rest,
            rest < length,
            RULE,
            T,
            UPDATED_DTYPE,
            ROUNDED_DTYPE,
            STATE_DTYPES,
            GRAD_DTYPES,
            ALIGNED,
            STRIDED,
        )
    blocks = (body + BLOCK - 1) // BLOCK
    for back in range(blocks):
        at = (blocks - 1 - back) * BLOCK + tl.arange(0, BLOCK)
        update_block(
            tensors,
            geometry,
            w,
            c,
            begin + at,
            at < body,
            RULE,
            T,
            UPDATED_DTYPE,
            ROUNDED_DTYPE,
            STATE_DTYPES,
            GRAD_DTYPES,
            ALIGNED,
            STRIDED,
        )
