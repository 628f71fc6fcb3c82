"""The papers' equations as loops over scalars, written from the papers alone.

Slow on purpose: nothing here shares code, or a trick, with the kit.
"""

from collections.abc import Callable, Sequence
from fractions import Fraction
from math import exp, floor, inf, log, sqrt, tanh
from operator import mul

# Metrics: google/youtube-8m, average_precision_calculator.py and eval_util.py. A score of -inf is
# no prediction. Ties rank by video order, then by class index: sorted() is stable, and its input
# is in that order. Fractions, so that two equal metrics are equal whatever the order of summing.

Scores = Sequence[Sequence[float]]
Positives = Sequence[set[int]]


def ranked_classes(scores: Sequence[float]) -> list[int]:
    """The predicted classes of one video, best first."""
    predicted = [index for index, score in enumerate(scores) if score > -inf]
    return sorted(predicted, key=lambda index: -scores[index])


def average_precision_loops(hits: Sequence[bool], num_positives: int) -> Fraction:
    """Precision at every hit of a ranking, summed, over the number of positives."""
    total, found = Fraction(0), 0
    for rank, is_hit in enumerate(hits, start=1):
        if is_hit:
            found += 1
            total += Fraction(found, rank)
    return total / num_positives if num_positives else Fraction(0)


def pool_loops(scores: Scores, k: int) -> list[tuple[float, int, int]]:
    """(score, video, class) of every video's k best classes, in video and then class order."""
    return [
        (video_scores[index], video, index)
        for video, video_scores in enumerate(scores)
        for index in sorted(ranked_classes(video_scores)[:k])
    ]


def gap_loops(scores: Scores, positives: Positives, k: int) -> Fraction:
    """Global average precision: one ranking of all pooled pairs."""
    pool = sorted(pool_loops(scores, k), key=lambda pair: -pair[0])
    hits = [index in positives[video] for _, video, index in pool]
    return average_precision_loops(hits, sum(len(one) for one in positives))


def hit_at_one_loops(scores: Scores, positives: Positives) -> Fraction:
    """The share of videos whose best class is a positive."""
    hits = 0
    for video_scores, video_positives in zip(scores, positives, strict=True):
        ranking = ranked_classes(video_scores)
        hits += bool(ranking) and ranking[0] in video_positives
    return Fraction(hits, len(scores))


def perr_loops(scores: Scores, positives: Positives) -> Fraction:
    """The mean over videos of the precision among the g best classes, g the number of labels."""
    total = Fraction(0)
    for video_scores, video_positives in zip(scores, positives, strict=True):
        g, found = len(video_positives), 0
        for index in ranked_classes(video_scores)[:g]:
            if video_scores[index] > 0 and index in video_positives:
                found += 1
        total += Fraction(found, g) if g else 0
    return total / len(scores)


def map_loops(scores: Scores, positives: Positives, k: int) -> Fraction:
    """The mean over classes with a positive of the average precision among surviving pairs."""
    pool = pool_loops(scores, k)
    precisions = []
    for wanted in set().union(*positives):
        ranking = sorted((pair for pair in pool if pair[2] == wanted), key=lambda pair: -pair[0])
        hits = [wanted in positives[video] for _, video, _ in ranking]
        num_positives = sum(wanted in one for one in positives)
        precisions.append(average_precision_loops(hits, num_positives))
    return sum(precisions, Fraction(0)) / len(precisions) if precisions else Fraction(0)


def macro_map_loops(scores: Scores, positives: Positives) -> Fraction:
    """The mean over classes with a positive of the precision down to each, ties counted in it."""
    precisions = []
    for wanted in set().union(*positives):
        own = [row[wanted] for row, one in zip(scores, positives, strict=True) if wanted in one]
        column = [row[wanted] for row in scores]
        terms = [
            Fraction(sum(other >= score for other in own), sum(any_ >= score for any_ in column))
            for score in own
        ]
        precisions.append(sum(terms, Fraction(0)) / len(terms))
    return sum(precisions, Fraction(0)) / len(precisions) if precisions else Fraction(0)


# Selection: WILLOW's greedy rule (arXiv:1706.06905) under a limit in bytes. A mixture is ranked, so
# its scores need no division by the sum of the weights; floats as weights round in members' order.


def mixed_loops(
    members: Sequence[Scores], weights: Sequence[Fraction | float]
) -> list[list[Fraction | float]]:
    """Members' scores, weighted and summed; a missing one counts 0, one all miss stays missing."""
    return [
        [
            sum(w * Fraction(max(score, 0)) for w, score in zip(weights, scores, strict=True))
            if max(scores) > -inf
            else -inf
            for scores in zip(*rows, strict=True)
        ]
        for rows in zip(*members, strict=True)
    ]


def greedy_loops(
    candidates: dict[str, Scores],
    weights: dict[str, Fraction | float],
    sizes: dict[str, int],
    positives: Positives,
    k: int,
    limit: int,
) -> list[tuple[str, Fraction]]:
    """(name, GAP of all members then) of each step."""
    steps: list[tuple[str, Fraction]] = []
    while True:
        members = [name for name, _ in steps]
        left = limit - sum(sizes[name] for name in members)
        choices = []
        for name in candidates:
            if name not in members and sizes[name] <= left:
                names = [*members, name]
                # alone, a candidate is ranked as it is, though its weight may be 0
                shares = [weights[one] for one in names] if members else [1]
                mixed = mixed_loops([candidates[one] for one in names], shares)
                choices.append((-gap_loops(mixed, positives, k), sizes[name], name))
        if not choices or (steps and -min(choices)[0] <= steps[-1][1]):
            return steps
        gap, _, name = min(choices)
        steps.append((name, -gap))


# Layers. A vector is a sequence of floats, a matrix one of its rows; frames are (T, D). W is (in,
# out), as the papers write x W.

Vector = Sequence[float]
Matrix = Sequence[Vector]


def sigmoid(x: float) -> float:
    """The logistic function."""
    return 1 / (1 + exp(-x))


def softmax_loops(logits: Vector) -> list[float]:
    """Exponentials over their sum."""
    powers = [exp(logit) for logit in logits]
    return [power / sum(powers) for power in powers]


def product_loops(vector: Vector, matrix: Matrix) -> list[float]:
    """x W: entry j is the sum over i of x[i] W[i][j]."""
    return [
        sum(vector[i] * matrix[i][j] for i in range(len(vector))) for j in range(len(matrix[0]))
    ]


def l2_loops(vector: Vector) -> list[float]:
    """x / sqrt(max(sum x^2, 1e-12)), tf.nn.l2_normalize."""
    squares = sum(x * x for x in vector)
    return [x / sqrt(max(squares, 1e-12)) for x in vector]


def dequantise_loops(stored: int) -> float:
    """google/youtube-8m, utils.Dequantize with max 2 and min -2."""
    return stored * (4 / 255) + (4 / 512 - 2)


def prepare_loops(modalities: Sequence[Matrix], num_frames: int) -> list[list[float]]:
    """Join the modalities of every frame, L2-normalise the joint frame, zeros after the last."""
    joined = []
    for t in range(len(modalities[0])):
        frame = [x for modality in modalities for x in modality[t]]
        joined.append(l2_loops(frame) if t < num_frames else [0.0] * len(frame))
    return joined


def random_indices_loops(draws: Vector, num_frames: int) -> list[int]:
    """google/youtube-8m, model_utils.SampleRandomFrames: floor(u * n), with replacement."""
    return [min(floor(u * num_frames), num_frames - 1) for u in draws]


def uniform_indices_loops(num_samples: int, num_frames: int) -> list[int]:
    """S4's sampler: floor((i / N) * n)."""
    return [floor(Fraction(i, num_samples) * num_frames) for i in range(num_samples)]


def batch_norm_loops(rows: Matrix, scale: Vector, shift: Vector) -> list[list[float]]:
    """Ioffe and Szegedy, algorithm 1, over all rows; TF-slim's epsilon."""
    means = [sum(column) / len(rows) for column in zip(*rows, strict=True)]
    variances = [
        sum((row[d] - means[d]) ** 2 for row in rows) / len(rows) for d in range(len(means))
    ]
    return [fixed_norm_loops(row, means, variances, scale, shift) for row in rows]


def fixed_norm_loops(
    row: Vector, mean: Vector, variance: Vector, scale: Vector, shift: Vector
) -> list[float]:
    """The same with given statistics, as at inference."""
    return [
        scale[d] * (row[d] - mean[d]) / sqrt(variance[d] + 1e-3) + shift[d] for d in range(len(row))
    ]


def average_loops(frames: Matrix) -> list[float]:
    """S2, average pooling."""
    return [sum(frame[d] for frame in frames) / len(frames) for d in range(len(frames[0]))]


def soft_bof_loops(assignments: Matrix) -> list[float]:
    """S2, equation 7, then the code's L2 norm."""
    clusters = range(len(assignments[0]))
    return l2_loops([sum(frame[k] for frame in assignments) for k in clusters])


def netvlad_loops(frames: Matrix, assignments: Matrix, centres: Matrix) -> list[float]:
    """NetVLAD (1511.07247), equation 4; then an L2 norm of each cluster, then of the whole."""
    descriptor: list[float] = []
    for k, centre in enumerate(centres):
        residual = [
            sum(a[k] * (x[d] - centre[d]) for x, a in zip(frames, assignments, strict=True))
            for d in range(len(centre))
        ]
        descriptor += l2_loops(residual)
    return l2_loops(descriptor)


def gating_loops(features: Vector, gate_logits: Vector) -> list[float]:
    """S2, equation 1: each feature times the sigmoid of its gate's logit."""
    return [x * sigmoid(g) for x, g in zip(features, gate_logits, strict=True)]


def moe_loops(
    features: Vector, gates: Matrix, experts: Matrix, bias: Vector, num_experts: int
) -> list[float]:
    """Google's MoeModel: column c * (M + 1) + m is gate m of class c; the last gate is a dummy."""
    gate_logits = product_loops(features, gates)
    expert_logits = [x + b for x, b in zip(product_loops(features, experts), bias, strict=True)]
    probabilities = []
    for c in range(len(bias) // num_experts):
        first = c * (num_experts + 1)
        shares = softmax_loops(gate_logits[first : first + num_experts + 1])
        probabilities.append(
            sum(shares[m] * sigmoid(expert_logits[c * num_experts + m]) for m in range(num_experts))
        )
    return probabilities


def cross_entropy_loops(probabilities: Matrix, labels: Matrix) -> float:
    """google/youtube-8m, losses.CrossEntropyLoss: a sum over classes, a mean over videos."""
    total = 0.0
    for video_probabilities, video_labels in zip(probabilities, labels, strict=True):
        for p, y in zip(video_probabilities, video_labels, strict=True):
            total -= y * log(p + 1e-5) + (1 - y) * log(1 - p + 1e-5)
    return total / len(probabilities)


def clip_loops(gradient: Vector, limit: float) -> list[float]:
    """tf.clip_by_norm of one variable."""
    norm = sqrt(sum(x * x for x in gradient))
    return [x * limit / norm if norm > limit else x for x in gradient]


# The papers' other poolings, gates and modality fusions.

Statistics = tuple[Vector, Vector, Vector, Vector]  # mean, variance, scale, shift of a batch norm


def sequence_indices_loops(draw: float, num_frames: int, num_samples: int) -> list[int]:
    """google/youtube-8m, SampleRandomSequence: a start, then one frame after the other."""
    start = floor(Fraction(draw) * (max(num_frames - num_samples, 0) + 1))
    return [min(start + i, num_frames - 1) for i in range(num_samples)]


def dbof_loops(frames: Matrix, weight: Matrix, norm: Statistics, activation: str) -> Matrix:
    """1609.08675, section 3.2: every frame's units, before they are pooled."""
    units = [fixed_norm_loops(product_loops(frame, weight), *norm) for frame in frames]
    if activation == "sigmoid":
        return [[sigmoid(x) for x in row] for row in units]
    ceiling = 6.0 if activation == "relu6" else inf
    return [[min(max(x, 0.0), ceiling) for x in row] for row in units]


def largest_loops(rows: Matrix) -> list[float]:
    """Max pooling: the largest value of each column."""
    return [max(column) for column in zip(*rows, strict=True)]


def gated_bof_loops(
    assignments: Matrix, gate_in: Matrix, gate_out: Matrix, norm: Statistics
) -> list[float]:
    """WILLOW's GatedDbof: summed assignments, gated by their maximum through a narrow matrix."""
    sums = [sum(column) for column in zip(*assignments, strict=True)]
    narrow = product_loops(l2_loops(largest_loops(assignments)), gate_in)
    logits = fixed_norm_loops(product_loops(narrow, gate_out), *norm)
    return l2_loops(gating_loops(sums, logits))


def net_fv_loops(
    frames: Matrix, assignments: Matrix, centres: Matrix, covariances: Matrix
) -> list[float]:
    """S2, equations 8 and 9, with the code's scales (cov^2 + 1e-6) and its norms."""
    fv1: list[float] = []
    fv2: list[float] = []
    for k, centre in enumerate(centres):
        scales = [cov**2 + 1e-6 for cov in covariances[k]]
        first, second = [], []
        for d in range(len(centre)):
            parts = [(a[k], x[d] - centre[d]) for x, a in zip(frames, assignments, strict=True)]
            first.append(sum(a * r / scales[d] for a, r in parts))
            second.append(sum(a * (r**2 / scales[d] ** 2 - 1) for a, r in parts))
        fv1 += l2_loops(first)
        fv2 += second
    return l2_loops(fv1) + l2_loops(fv2)


def residual_sums_loops(frames: Matrix, assignments: Matrix, centres: Matrix) -> list[list[float]]:
    """NetVLAD's sums before any norm: one row a cluster."""
    return [
        [
            sum(a[k] * (x[d] - centre[d]) for x, a in zip(frames, assignments, strict=True))
            for d in range(len(centre))
        ]
        for k, centre in enumerate(centres)
    ]


def non_local_loops(
    rows: Matrix, theta: Matrix, phi: Matrix, g: Matrix, output: Matrix, temperature: float
) -> list[list[float]]:
    """S5, equations 3 to 5, with the code's temperature: each row and what it takes from all."""
    queries, keys, values = ([product_loops(row, w) for row in rows] for w in (theta, phi, g))
    mixed = []
    for row, query in zip(rows, queries, strict=True):
        logits = [temperature * sum(map(mul, query, key)) for key in keys]
        shares = softmax_loops(logits)
        taken = [
            sum(share * value[i] for share, value in zip(shares, values, strict=True))
            for i in range(len(values[0]))
        ]
        mixed.append([x + y for x, y in zip(row, product_loops(taken, output), strict=True)])
    return mixed


def whitening_residual_loops(frame: Vector, centre: Vector, order: int) -> list[float]:
    """S4, section 3.3: a residual, or its outer product with itself, brought to length 1."""
    difference = [x - c for x, c in zip(frame, centre, strict=True)]
    if order == 2:
        difference = [x * y for x in difference for y in difference]
    length = sqrt(sum(x * x for x in difference))
    return [x / length for x in difference]


def whitened_loops(
    frames: Matrix,
    assignments: Matrix,
    centres: Matrix,
    means: Matrix,
    variances: Matrix,
    order: int,
) -> list[list[float]]:
    """S4, section 3.3: whitened residuals, weighted, summed, and normalised by cluster."""
    clusters = []
    for k, centre in enumerate(centres):
        total = [0.0] * len(means[k])
        for x, a in zip(frames, assignments, strict=True):
            residual = whitening_residual_loops(x, centre, order)
            for i, r in enumerate(residual):
                total[i] += a[k] * (r - means[k][i]) / sqrt(variances[k][i] + 1e-6)
        clusters.append(l2_loops(total))
    return clusters


def residual_moments_loops(
    frames: Matrix, centre: Vector, order: int
) -> tuple[list[float], list[float]]:
    """Mean and variance of one cluster's residuals over all frames, dimension by dimension."""
    rows = [whitening_residual_loops(frame, centre, order) for frame in frames]
    means = [sum(column) / len(rows) for column in zip(*rows, strict=True)]
    variances = [
        sum((row[i] - means[i]) ** 2 for row in rows) / len(rows) for i in range(len(means))
    ]
    return means, variances


def affine_loops(vector: Vector, weight: Matrix, bias: Vector) -> list[float]:
    """x W + b."""
    return [x + b for x, b in zip(product_loops(vector, weight), bias, strict=True)]


def nextvlad_loops(
    frames: Matrix,
    expand: tuple[Matrix, Vector],
    attention: tuple[Matrix, Vector],
    assignment: tuple[Matrix, Statistics],
    centres: Matrix,
    output_norm: Statistics,
) -> list[float]:
    """NeXtVLAD (1811.05014), equations 5 to 9, for one video's frames."""
    num_groups, num_clusters, size = len(attention[1]), len(centres), len(centres[0])
    sums = [[0.0] * size for _ in centres]
    for frame in frames:
        wide = affine_loops(frame, *expand)
        attentions = [sigmoid(x) for x in affine_loops(wide, *attention)]
        logits = fixed_norm_loops(product_loops(wide, assignment[0]), *assignment[1])
        for g in range(num_groups):
            group = wide[g * size : (g + 1) * size]
            shares = softmax_loops(logits[g * num_clusters : (g + 1) * num_clusters])
            for k, centre in enumerate(centres):
                for d in range(size):
                    sums[k][d] += attentions[g] * shares[k] * (group[d] - centre[d])
    return fixed_norm_loops([x for row in sums for x in l2_loops(row)], *output_norm)


def glu_loops(
    features: Vector, gate: tuple[Matrix, Vector], value: tuple[Matrix, Vector]
) -> list[float]:
    """Dauphin et al. (2017), equation 1."""
    return gating_loops(affine_loops(features, *value), affine_loops(features, *gate))


def se_gating_loops(
    features: Vector, squeeze: Matrix, norm: Statistics, excite: Matrix
) -> list[float]:
    """NeXtVLAD (1811.05014), section 3.3: context gating through a narrow layer."""
    narrow = [max(x, 0) for x in fixed_norm_loops(product_loops(features, squeeze), *norm)]
    return gating_loops(features, product_loops(narrow, excite))


def mfb_loops(left: Vector, right: Vector, factors: int) -> list[float]:
    """S1, equations 2 to 5, from the two projections: multiply, sum by k, ReLU, L2."""
    products = [x * y for x, y in zip(left, right, strict=True)]
    sums = [sum(products[i : i + factors]) for i in range(0, len(products), factors)]
    return l2_loops([max(x, 0) for x in sums])


def distance_loops(lefts: Matrix, rights: Matrix) -> float:
    """S3, section 3.3: the mean over videos of the squared L2 distance of two mappings."""
    total = 0.0
    for left, right in zip(lefts, rights, strict=True):
        total += sum((x - y) ** 2 for x, y in zip(left, right, strict=True))
    return total / len(lefts)


# Recurrent stacks, PyTorch's cells, and the attention over them (S3, section 3).

CellWeights = tuple[Matrix, Matrix, Vector, Vector]
Step = Callable[[Vector, Sequence[Vector], CellWeights], list[list[float]]]


def gru_loops(x: Vector, states: Sequence[Vector], weights: CellWeights) -> list[list[float]]:
    """One step, as torch.nn.GRU's documentation writes it; the state is h.

    W is (3H, in), U (3H, H), b and d (3H), with the rows of r, z and n in that order.
    """
    w, u, b, d = weights
    (h,) = states
    size = len(h)
    wx = [sum(w[j][i] * x[i] for i in range(len(x))) + b[j] for j in range(3 * size)]
    uh = [sum(u[j][i] * h[i] for i in range(size)) + d[j] for j in range(3 * size)]
    r = [sigmoid(wx[j] + uh[j]) for j in range(size)]
    z = [sigmoid(wx[size + j] + uh[size + j]) for j in range(size)]
    n = [tanh(wx[2 * size + j] + r[j] * uh[2 * size + j]) for j in range(size)]
    return [[(1 - z[j]) * n[j] + z[j] * h[j] for j in range(size)]]


def lstm_loops(x: Vector, states: Sequence[Vector], weights: CellWeights) -> list[list[float]]:
    """One step, as torch.nn.LSTM's documentation writes it; the states are c and h.

    As the GRU's, with the rows of i, f, g and o in that order.
    """
    w, u, b, d = weights
    c, h = states
    size = len(h)
    gates = [
        sum(w[j][k] * x[k] for k in range(len(x)))
        + sum(u[j][k] * h[k] for k in range(size))
        + b[j]
        + d[j]
        for j in range(4 * size)
    ]
    i = [sigmoid(gates[j]) for j in range(size)]
    f = [sigmoid(gates[size + j]) for j in range(size)]
    g = [tanh(gates[2 * size + j]) for j in range(size)]
    o = [sigmoid(gates[3 * size + j]) for j in range(size)]
    cells = [f[j] * c[j] + i[j] * g[j] for j in range(size)]
    return [cells, [o[j] * tanh(cells[j]) for j in range(size)]]


def recurrence_loops(
    frames: Matrix, layers: Sequence[Sequence[CellWeights]], step: Step, num_states: int
) -> tuple[Matrix, list[list[float]]]:
    """The top layer's output at every frame, and the final states of each layer and direction.

    A layer has the weights of one direction or of two; the second reads from the last frame to the
    first, and a frame's output is both directions' h side by side.
    """
    finals = []
    for directions in layers:
        outputs: list[list[float]] = [[] for _ in frames]
        for weights, order in zip(directions, (1, -1), strict=False):
            states = [[0.0] * len(weights[1][0])] * num_states
            for t in list(range(len(frames)))[::order]:
                states = step(frames[t], states, weights)
                outputs[t] = outputs[t] + states[-1]
            finals += states
        frames = outputs
    return frames, finals


def attend_loops(outputs: Matrix, weight: Matrix, bias: Vector, context: Vector) -> list[float]:
    """Yang et al. (2016), equations 5 to 7: the outputs' mean by softmax(tanh(h W + b) . u)."""
    units = [[tanh(x) for x in affine_loops(output, weight, bias)] for output in outputs]
    shares = softmax_loops([sum(x * c for x, c in zip(u, context, strict=True)) for u in units])
    return [
        sum(a * h[d] for a, h in zip(shares, outputs, strict=True)) for d in range(len(outputs[0]))
    ]


# Attention before, after and inside NetVLAD (S4, sections 3.1 and 3.2).


def layer_norm_loops(row: Vector, scale: Vector, shift: Vector) -> list[float]:
    """Ba et al. (2016): a row minus its mean over its deviation; PyTorch's epsilon."""
    mean = sum(row) / len(row)
    variance = sum((x - mean) ** 2 for x in row) / len(row)
    return [
        g * (x - mean) / sqrt(variance + 1e-5) + b
        for x, g, b in zip(row, scale, shift, strict=True)
    ]


def heads_loops(
    rows: Matrix, projections: Sequence[Matrix], num_heads: int, logit_norm: Statistics | None
) -> list[list[float]]:
    """Vaswani et al. (2017), equation 1 in each head; the heads' outputs side by side.

    ``projections`` are those of queries, keys and values. ``logit_norm`` has a value for each key
    position, and takes the place of the division by the root of a head's size.
    """
    queries, keys, values = (
        [product_loops(row, projection) for row in rows] for projection in projections
    )
    size = len(queries[0]) // num_heads
    attended: list[list[float]] = [[] for _ in rows]
    for first in range(0, num_heads * size, size):
        head = range(first, first + size)
        for query, row in zip(queries, attended, strict=True):
            logits = [sum(query[d] * key[d] for d in head) for key in keys]
            if logit_norm is None:
                logits = [logit / sqrt(size) for logit in logits]
            else:
                logits = fixed_norm_loops(logits, *logit_norm)
            shares = softmax_loops(logits)
            row += [
                sum(a * value[d] for a, value in zip(shares, values, strict=True)) for d in head
            ]
    return attended
