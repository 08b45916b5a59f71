"""Ragged rows of `ragged.py`, and the transformer that tags their tokens, in any framework."""

from typing import Any

import numpy as np

ROWS, LENGTH, MICROBATCH_SIZE = 128, 256, 16
TOKENS = MICROBATCH_SIZE * LENGTH
LAYERS, WIDTH, HEADS, WORDS, CLASSES = 3, 128, 4, 1000, 32


def data() -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Ids and labels, padded by 0, and the lengths of their rows."""
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(np.log(60), 0.7, ROWS), 4, LENGTH).astype(int)
    lengths[0] = LENGTH
    rng.shuffle(lengths)
    ids = rng.integers(1, WORDS, (ROWS, LENGTH)) * (np.arange(LENGTH) < lengths[:, None])
    labels = rng.integers(0, CLASSES, (ROWS, LENGTH))
    return {"ids": ids.astype("int32"), "labels": labels.astype("int32")}, lengths


def weights() -> dict[str, np.ndarray]:
    """Parameters of the transformer, by name."""
    rng = np.random.default_rng(1)
    head = WIDTH // HEADS
    shapes: dict[str, tuple[int, ...]] = {
        "words": (WORDS, WIDTH),
        "places": (LENGTH, WIDTH),
        "classes": (WIDTH, CLASSES),
    }
    for k in range(LAYERS):
        shapes |= {f"{name}{k}": (WIDTH, HEADS, head) for name in "qkv"}
        shapes |= {f"o{k}": (HEADS, head, WIDTH)}
        shapes |= {f"up{k}": (WIDTH, 4 * WIDTH), f"down{k}": (4 * WIDTH, WIDTH)}
    return {
        name: (rng.normal(size=shape) * WIDTH**-0.5).astype("float32")
        for name, shape in shapes.items()
    }


def token_loss(f: Any, w: dict[str, Any], batch: dict[str, Any]) -> Any:
    """Mean cross-entropy of the tokens; no token sees padding.

    Args:
        f: functions of the framework: `einsum`, `softmax`, `log_softmax`, `silu`, `rsqrt`, `take`,
            `mean`, `sum`, `one_hot` and `floats`.
        w: parameters.
        batch: ids and labels.
    """

    def norm(x: Any) -> Any:
        return x * f.rsqrt(f.mean(x * x) + 1e-6)

    ids = batch["ids"]
    valid = f.floats(ids != 0)
    unseen = ((valid - 1) * 1e9)[:, None, None, :]
    x = f.take(w["words"], ids) + w["places"][: ids.shape[1] or f.length(ids)]
    for k in range(LAYERS):
        y = norm(x)
        q, key, v = (f.einsum("btd,dhk->bhtk", y, w[f"{name}{k}"]) for name in "qkv")
        scores = f.einsum("bhtk,bhsk->bhts", q, key) * (WIDTH // HEADS) ** -0.5 + unseen
        seen = f.einsum("bhts,bhsk->bhtk", f.softmax(scores), v)
        x = x + f.einsum("bhtk,hkd->btd", seen, w[f"o{k}"])
        y = f.silu(f.einsum("btd,de->bte", norm(x), w[f"up{k}"]))
        x = x + f.einsum("bte,ed->btd", y, w[f"down{k}"])
    logits = f.log_softmax(f.einsum("btd,dc->btc", norm(x), w["classes"]))
    chosen = f.sum(logits * f.one_hot(batch["labels"]), -1)
    return -f.sum(chosen * valid, None) / f.sum(valid, None)
