"""Losses that couple rows, written once for all engines, and what they come to.

`encode` is what comes before rows meet; each loss sees what it gives for all rows. The numbers are
those of the uncut batch in float64; PyTorch and JAX computed them apart.
"""

from typing import Any, NamedTuple

import numpy as np
from tests.conformance.adapters.base import leaves, mapped
from tests.oracle import EXACT, assert_close

from virtualbatch import whole_groups

ROWS = 7


def _grid(fn: Any, *shape: int) -> np.ndarray:
    return fn(1 + sum((3 + 2 * k) * i for k, i in enumerate(np.indices(shape))))


DATA = {
    "x": _grid(np.sin, ROWS, 4),
    "u": _grid(np.cos, ROWS, 4),
    "v": _grid(lambda t: np.sin(2 + t), ROWS, 4),
    "target": _grid(np.cos, ROWS),
    "y": np.array([0, 1, 2, 0, 1, 0, 2]),
    "t": np.array([1, 0, 0, 1, 1, 0, 1], bool),
    "g": np.array([0, 1, 0, 2, 1, 1, 0]),
}
PARAMETERS = {
    "W": _grid(np.cos, 4, 3) / 2,
    "V": _grid(np.sin, 4, 3) / 2,
    "h": np.array([0.5, -1.0, 0.75]),
    "scale": np.array(0.7),
    "bias": np.array(-1.0),
}


def encode(n: Any, params: Any, batch: Any) -> dict[str, Any]:
    """Embeddings, scores and labels, one entry per row each."""
    z = n.tanh(n.matmul(batch["x"], params["W"]))
    return {
        "z": z,
        "w": n.tanh(n.matmul(batch["u"], params["V"])),
        "n": n.tanh(n.matmul(batch["v"], params["V"])),
        "s": n.sum(z * params["h"], 1),
        **{name: batch[name] for name in ("target", "y", "t", "g")},
    }


def _unit(n: Any, a: Any) -> Any:
    return a / n.sqrt(n.sum(a * a, 1))[:, None]


def _own(n: Any, logits: Any) -> Any:
    """Cross-entropy of each row against its own column."""
    return n.mean(n.logsumexp(logits, 1) - n.diag(logits[:, : logits.shape[0]]))


def _similarity(n: Any, out: Any) -> Any:
    return n.matmul(_unit(n, out["z"]), n.transpose(_unit(n, out["w"])))


def clip(n: Any, params: Any, out: Any) -> Any:
    logits = n.exp(params["scale"]) * _similarity(n, out)
    return (_own(n, logits) + _own(n, n.transpose(logits))) / 2


def nt_xent(n: Any, params: Any, out: Any) -> Any:
    z = _unit(n, n.concat([out["z"], out["w"]]))
    count = z.shape[0]
    logits = n.where(n.eye(count), n.full(-1e9), n.matmul(z, n.transpose(z)) / 0.5)
    partner = n.concat([logits[count // 2 :], logits[: count // 2]])
    return n.mean(n.logsumexp(logits, 1) - n.diag(partner))


def siglip(n: Any, params: Any, out: Any) -> Any:
    logits = n.exp(params["scale"]) * _similarity(n, out) + params["bias"]
    sign = 2 * n.cast(n.eye(logits.shape[0]), "float64") - 1
    return n.sum(n.softplus(-sign * logits)) / logits.shape[0]


def ranking(n: Any, params: Any, out: Any) -> Any:
    columns = _unit(n, n.concat([out["w"], out["n"]]))
    return _own(n, 20 * n.matmul(_unit(n, out["z"]), n.transpose(columns)))


def supcon(n: Any, params: Any, out: Any) -> Any:
    z = _unit(n, out["z"])
    logits, same = n.matmul(z, n.transpose(z)) / 0.1, _alike(n, out["y"])
    is_self = n.eye(z.shape[0])
    others = n.logsumexp(n.where(is_self, n.full(-1e30), logits), 1)
    same = n.cast(same, "float64") - n.cast(is_self, "float64")
    return -n.mean(n.sum(same * (logits - others[:, None]), 1) / n.sum(same, 1))


def triplets(n: Any, params: Any, out: Any) -> Any:
    z = out["z"]
    distance = n.sqrt(n.sum((z[:, None] - z[None]) ** 2, 2) + 1e-12)
    same = _alike(n, out["y"])
    farthest = n.max(n.where(same, distance, n.full(-1e30)), 1)
    nearest = n.min(n.where(same, n.full(1e30), distance), 1)
    return n.mean(n.relu(farthest - nearest + 1))


def _alike(n: Any, labels: Any) -> Any:
    return n.equal(labels[:, None], labels[None])


def _centred(n: Any, a: Any) -> Any:
    return a - n.mean(a, 0)


def barlow_twins(n: Any, params: Any, out: Any) -> Any:
    z, w = (a / n.sqrt(n.mean(a * a, 0)) for a in (_centred(n, out[k]) for k in "zw"))
    found = n.matmul(n.transpose(z), w) / z.shape[0]
    same = n.cast(n.eye(3), "float64")
    return n.sum((found - same) ** 2 * (same + 5e-3 * (1 - same)))


def vicreg(n: Any, params: Any, out: Any) -> Any:
    total = 25 * n.mean((out["z"] - out["w"]) ** 2)
    for a in (_centred(n, out["z"]), _centred(n, out["w"])):
        covariance = n.matmul(n.transpose(a), a) / (a.shape[0] - 1)
        variance = n.diag(covariance)
        total = total + 25 * n.mean(n.relu(1 - n.sqrt(variance + 1e-4)))
        total = total + (n.sum(covariance**2) - n.sum(variance**2)) / 3
    return total


def decorrelation(n: Any, params: Any, out: Any) -> Any:
    a = _centred(n, out["z"])
    covariance = n.matmul(n.transpose(a), a) / a.shape[0]
    return (n.sum(covariance**2) - n.sum(n.diag(covariance) ** 2)) / 2


def auc(n: Any, params: Any, out: Any) -> Any:
    positive = n.cast(out["t"], "float64")
    pairs = positive[:, None] * (1 - positive)[None]
    return n.sum(pairs * n.softplus(out["s"][None] - out["s"][:, None])) / n.sum(pairs)


def pearson(n: Any, params: Any, out: Any) -> Any:
    a, b = _centred(n, out["s"]), _centred(n, out["target"])
    return 1 - n.sum(a * b) / n.sqrt(n.sum(a * a) * n.sum(b * b))


def concordance(n: Any, params: Any, out: Any) -> Any:
    a, b = _centred(n, out["s"]), _centred(n, out["target"])
    apart = (n.mean(out["s"]) - n.mean(out["target"])) ** 2
    return 1 - 2 * n.mean(a * b) / (n.mean(a * a) + n.mean(b * b) + apart)


def r2(n: Any, params: Any, out: Any) -> Any:
    return n.sum((out["s"] - out["target"]) ** 2) / n.sum(_centred(n, out["target"]) ** 2)


def _probability(n: Any, out: Any) -> tuple[Any, Any]:
    return 1 / (1 + n.exp(-out["s"])), n.cast(out["t"], "float64")


def dice(n: Any, params: Any, out: Any) -> Any:
    found, due = _probability(n, out)
    return 1 - 2 * n.sum(found * due) / (n.sum(found) + n.sum(due) + 1e-6)


def soft_f1(n: Any, params: Any, out: Any) -> Any:
    found, due = _probability(n, out)
    hits = n.sum(found * due)
    wrong = n.sum(found * (1 - due)) + n.sum((1 - found) * due)
    return 1 - hits / (hits + wrong / 2)


def cox(n: Any, params: Any, out: Any) -> Any:
    # At risk is who has the same target or a larger one.
    at_risk = out["target"][None] >= out["target"][:, None]
    risk = n.logsumexp(n.where(at_risk, out["s"][None], n.full(-1e30)), 1)
    event = n.cast(out["t"], "float64")
    return -n.sum((out["s"] - risk) * event) / n.sum(event)


def listwise(n: Any, params: Any, out: Any) -> Any:
    total = 0.0
    for group in range(3):
        inside = n.equal(out["g"], group)
        score = n.where(inside, out["s"], n.full(-1e30))
        due = n.where(inside, out["target"], n.full(-1e30))
        due = n.exp(due - n.logsumexp(due, 0))
        gap = n.where(inside, out["s"] - n.logsumexp(score, 0), n.full(0.0))
        total = total - n.sum(due * gap)
    return total / 3


def whitened_in_groups(n: Any, params: Any, out: Any) -> Any:
    total = 0.0
    for group in range(3):
        inside = n.cast(n.equal(out["g"], group), "float64")
        count = n.sum(inside)
        gap = out["s"] - n.sum(inside * out["s"]) / count
        spread = n.sqrt(n.sum(inside * gap**2) / count + 1e-4)
        total = total + n.sum(inside * out["target"] * gap / spread)
    return total / 7


def spread_penalty(n: Any, params: Any, out: Any) -> Any:
    spread = n.sqrt(n.mean(_centred(n, out["s"]) ** 2))
    return n.mean(out["s"] ** 2) + 0.1 / spread + 1e-2 * n.sum(params["W"] ** 2)


def alignment_and_uniformity(n: Any, params: Any, out: Any) -> Any:
    """https://arxiv.org/abs/2005.10242"""
    z, w = _unit(n, out["z"]), _unit(n, out["w"])
    apart = n.sum((z[:, None] - z[None]) ** 2, 2)
    others = 1 - n.cast(n.eye(z.shape[0]), "float64")
    return n.mean(n.sum((z - w) ** 2, 1)) + n.log(n.sum(others * n.exp(-2 * apart)))


def mean_discrepancy(n: Any, params: Any, out: Any) -> Any:
    """Maximum mean discrepancy of two groups, with a Gaussian kernel."""
    kernel = n.exp(-n.sum((out["z"][:, None] - out["z"][None]) ** 2, 2))
    inside = n.cast(out["t"], "float64")
    sign = inside / n.sum(inside) - (1 - inside) / n.sum(1 - inside)
    return n.sum(sign[:, None] * sign[None] * kernel)


def independence(n: Any, params: Any, out: Any) -> Any:
    """Hilbert-Schmidt independence criterion of two embeddings, with linear kernels."""
    z, w = _centred(n, out["z"]), _centred(n, out["w"])
    return n.sum(n.matmul(n.transpose(z), w) ** 2) / (z.shape[0] - 1) ** 2


def sorted_distance(n: Any, params: Any, out: Any) -> Any:
    """Wasserstein distance of scores and targets: the mean gap of both when sorted."""
    return n.mean((n.sort(out["s"]) - n.sort(out["target"])) ** 2)


def focal_tversky(n: Any, params: Any, out: Any) -> Any:
    """https://arxiv.org/abs/1810.07842"""
    found, due = _probability(n, out)
    hits = n.sum(found * due)
    wrong = 0.7 * n.sum((1 - found) * due) + 0.3 * n.sum(found * (1 - due))
    return n.exp(0.75 * n.log(1 - hits / (hits + wrong)))


class Expected(NamedTuple):
    """What a loss comes to, uncut.

    Fields:
        value: of the loss.
        W: sum of the squared gradient of W; likewise V and h.
        scale: gradient of the scale.
    """

    value: float
    W: float
    V: float
    h: float
    scale: float


LOSSES: dict[Any, Expected | None] = {
    clip: Expected(4.654236039481255, 61.33491389807197, 16.99919286561458, 0, 3.276782734309453),
    nt_xent: Expected(5.22668707919919, 45.17532153640752, 11.009012807307492, 0, 0),
    siglip: Expected(
        6.668147127032691, 143.88349842850303, 35.32224280133302, 0, 5.069084987795343
    ),
    ranking: Expected(36.72796914678401, 4843.538782763398, 1705.99223120435, 0, 0),
    supcon: Expected(10.054826198933089, 850.733262928984, 0, 0, 0),
    triplets: Expected(1.1956948346959904, 2.99593612530784, 0, 0, 0),
    barlow_twins: Expected(10.366150113212806, 1321.6431783323028, 44.61811495814735, 0, 0),
    vicreg: Expected(43.90388229959465, 27.621519018941814, 97.21438475507149, 0, 0),
    decorrelation: Expected(0.0001346826682157964, 1.8544183562489262e-05, 0, 0, 0),
    auc: Expected(0.7086263055316286, 0.46308254286648876, 0, 0.004561637076285107, 0),
    pearson: Expected(1.56005391625047, 144.49571805591643, 0, 1.5840105012226895, 0),
    concordance: Expected(1.1071920357997123, 13.470282189261404, 0, 0.1333732635133798, 0),
    r2: Expected(1.139296951866065, 17.27873635847899, 0, 0.17262890187450655, 0),
    dice: Expected(0.4708561567555002, 0.03019998269205793, 0, 0.0002973199703397193, 0),
    soft_f1: Expected(0.4708560860830784, 0.030199989574787787, 0, 0.000297320038076864, 0),
    cox: Expected(0.9804967772825469, 0.34563046313912105, 0, 0.004903520858051774, 0),
    listwise: Expected(0.740386363411865, 0.2044214190345044, 0, 0.002016315372139332, 0),
    whitened_in_groups: Expected(
        -0.10873018877575934, 32.273246928049645, 0, 0.35211724465651334, 0
    ),
    spread_penalty: Expected(1.2681587503692058, 352.5331991952379, 0, 4.9333466646428, 0),
    # Further losses, which the uncut batch of each engine judges alone.
    alignment_and_uniformity: None,
    mean_discrepancy: None,
    independence: None,
    sorted_distance: None,
    focal_tversky: None,
}
BY_NAME = {loss.__name__: loss for loss in LOSSES}
# Rows of a micro-batch: one each, with a remainder, all of them, more than there are.
SIZES = (1, 2, 3, 7, 9)


def coupled_losses_are_exact(engine: Any, compiled: Any, name: str) -> None:
    loss = BY_NAME[name]
    params = engine.parameters(PARAMETERS)
    batch = mapped(engine.array, DATA)
    due = engine.coupled(encode, loss, params)(batch)
    expected = LOSSES[loss]
    if expected is not None:
        _assert_expected(due, expected)
    for size in SIZES:
        found = engine.coupled(encode, loss, params, compiled=compiled, microbatch_size=size)
        result = found(batch)
        assert_close(result.loss, due.loss, EXACT)
        # Against the largest of all: where a loss does not change with a shift, a gradient is 0,
        # and what is found is rounding.
        assert_close(_flat(result.gradients), _flat(due.gradients), EXACT)


def _flat(gradients: Any) -> np.ndarray:
    pairs = zip(leaves(gradients), leaves(PARAMETERS), strict=True)
    return np.concatenate([np.ravel(0 * like if g is None else g) for g, like in pairs])


def _assert_expected(result: Any, due: Expected) -> None:
    # Sums of squares, twice as far off as what is squared, and further where entries cancel.
    assert_close(result.loss, np.asarray(due.value), EXACT)
    for name in ("W", "V", "h"):
        gradient = result.gradients[name]
        square = 0.0 if gradient is None else (gradient**2).sum()
        np.testing.assert_allclose(square, getattr(due, name), rtol=1e-11, atol=1e-20)
    scale = result.gradients["scale"]
    np.testing.assert_allclose(0.0 if scale is None else scale, due.scale, rtol=1e-11, atol=1e-20)


# Rows of lists that are ranked.
LISTS = (8, 8, 5, 8, 10, 7, 9)


def whole_groups_are_exact(engine: Any, compiled: Any) -> None:
    """A mean over lists, each ranked inside; rows of a list need not be neighbours."""
    n = engine.ops

    def together(batch: Any) -> Any:
        return n.equal(batch["list"][:, None], batch["list"][None])

    def lists(batch: Any) -> Any:
        return n.sum(1 / n.sum(n.cast(together(batch), "float64"), 1))

    def loss_fn(params: Any, batch: Any) -> Any:
        score = n.matmul(n.tanh(n.matmul(batch["x"], params["W"])), params["h"])
        same = together(batch)
        found, due = (
            row - n.logsumexp(n.where(same, row[None], n.full(-1e30)), 1)
            for row in (score[:, 0], batch["gain"])
        )
        return -n.sum(n.exp(due) * found) / lists(batch)

    rows = np.random.default_rng(0).permutation(sum(LISTS))
    data = {
        "x": _grid(np.sin, sum(LISTS), 4),
        "gain": _grid(np.cos, sum(LISTS)),
        "list": np.repeat(np.arange(len(LISTS)), LISTS)[rows],
    }
    params = engine.parameters({"W": PARAMETERS["W"], "h": PARAMETERS["h"][:, None]})
    batch = mapped(engine.array, data)
    due = engine.plain(loss_fn, params, batch)
    window = whole_groups(batch, data["list"], microbatch_size=16)
    assert len(window) > 2
    found = engine.program(loss_fn, params, compiled=compiled, weight=lists)(window)
    assert_close(found.loss, due.loss, EXACT)
    for name, gradient in due.gradients.items():
        assert_close(found.gradients[name], gradient, EXACT)
    by_rows = engine.program(loss_fn, params, compiled=compiled, check=False)(window)
    # Forgetting that the mean is over lists is wrong by percents.
    assert abs(by_rows.loss / due.loss - 1) > 1e-3
