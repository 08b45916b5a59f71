"""Correct training steps of many kinds, and wrong ones: name -> what `certify` takes."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint

ROWS = 22
CLASSES = 5


def features(*shape):
    return torch.randn(ROWS, *shape)


def labels(*shape):
    return torch.randint(0, CLASSES, (ROWS, *shape))


def tokens():
    """Ragged rows of 3 to 9 tokens, padded with 0."""
    lengths = [3 + (5 * k) % 7 for k in range(ROWS)]
    return pad_sequence([torch.randint(1, 12, (n,)) for n in lengths], batch_first=True)


def mlp(*more):
    return nn.Sequential(nn.Linear(8, 16), *more, nn.ReLU(), nn.Linear(16, CLASSES))


def classifier(module, x=None, **given):
    x = features(8) if x is None else x
    return {
        "loss_fn": lambda batch: F.cross_entropy(module(batch[0]), batch[1]),
        "batch": [x, labels()],
        "module": module,
        **given,
    }


def regression(module, x=None, **given):
    x = features(8) if x is None else x
    return {"loss_fn": lambda x: (module(x) ** 2).mean(), "batch": x, "module": module, **given}


class Language(nn.Module):
    """Next tokens; the embedding is tied to the output if asked."""

    def __init__(self, tied=False, sparse=False):
        super().__init__()
        self.embed = nn.Embedding(12, 8, padding_idx=0, sparse=sparse)
        self.rnn = nn.LSTM(8, 8, batch_first=True)
        self.head = nn.Linear(8, 12, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(self.rnn(self.embed(ids))[0])


def language(module, **given):
    def loss_fn(ids):
        logits = module(ids)[:, :-1]
        return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), ignore_index=0)

    given.setdefault("weight", lambda ids: (ids[:, 1:] != 0).sum())
    return {"loss_fn": loss_fn, "batch": tokens(), "module": module, **given}


class Block(nn.Module):
    def __init__(self, dropout=0.0, causal=False):
        super().__init__()
        self.attend = nn.MultiheadAttention(8, 2, dropout, batch_first=True)
        self.norm = nn.LayerNorm(8)
        self.feed = nn.Sequential(
            nn.Linear(8, 16), nn.GELU(), nn.Dropout(dropout), nn.Linear(16, 8)
        )
        self.causal = causal

    def forward(self, x):
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1]) if self.causal else None
        h = self.norm(x)
        x = x + self.attend(h, h, h, attn_mask=mask, need_weights=False)[0]
        return x + self.feed(x)


class Checkpointed(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x):
        h = checkpoint(lambda x: F.dropout(self.first(x), 0.5), x, use_reentrant=False)
        h = checkpoint(lambda h: F.dropout(torch.tanh(h), 0.3), h, use_reentrant=False)
        return self.last(h)


class Several(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Linear(8, 8)
        self.heads = nn.ModuleDict({"a": nn.Linear(8, CLASSES), "b": nn.Linear(8, 1)})

    def forward(self, x):
        h = torch.relu(self.body(x))
        return {name: head(h) for name, head in self.heads.items()}


def two_terms():
    module, mask = Several(), (torch.rand(ROWS) > 0.4).float()

    def loss_fn(batch):
        found = module(batch["x"])
        squares = found["b"][:, 0] ** 2 * batch["mask"]
        return {
            "labels": F.cross_entropy(found["a"], batch["y"]),
            "values": squares.sum() / batch["mask"].sum().clamp(min=1),
            "decay": 1e-2 * sum((p**2).sum() for p in module.parameters()),
        }

    return {
        "loss_fn": loss_fn,
        "batch": {"x": features(8), "y": labels(), "mask": mask},
        "module": module,
        "weight": lambda b: {"labels": len(b["x"]), "values": b["mask"].sum(), "decay": None},
    }


def sample_weights():
    module, weights = mlp(), torch.rand(ROWS) * 3

    def loss_fn(batch):
        each = F.cross_entropy(module(batch[0]), batch[1], reduction="none")
        return (each * batch[2]).sum() / batch[2].sum()

    batch = [features(8), labels(), weights]
    return {"loss_fn": loss_fn, "batch": batch, "module": module, "weight": lambda b: b[2].sum()}


def class_weights():
    module, weights = mlp(), torch.rand(CLASSES) + 0.5
    return {
        "loss_fn": lambda b: F.cross_entropy(module(b[0]), b[1], weights.to(b[0].dtype)),
        "batch": [features(8), labels()],
        "module": module,
        "weight": lambda b: weights[b[1]].sum(),
    }


def frozen():
    module = mlp()
    module[0].requires_grad_(False)
    return classifier(module)


def autocast():
    module = mlp()

    def loss_fn(batch):
        with torch.autocast("cpu", torch.bfloat16):
            return F.cross_entropy(module(batch[0]).float(), batch[1])

    return {"loss_fn": loss_fn, "batch": [features(8), labels()], "module": module}


def half():
    module = mlp().bfloat16()
    first = module[0].weight

    def loss_fn(batch):
        return F.cross_entropy(module(batch[0].to(first.dtype)).float(), batch[1])

    return {"loss_fn": loss_fn, "batch": [features(8), labels()], "module": module}


def own_float32():
    module = nn.Linear(8, 4)

    def loss_fn(x):
        return (module(x.float()) ** 2).mean()

    return {"loss_fn": loss_fn, "batch": features(8), "module": module}


def with_aux():
    module = mlp()

    def loss_fn(batch):
        logits = module(batch[0])
        return F.cross_entropy(logits, batch[1]), logits

    batch = [features(8), labels()]
    return {"loss_fn": loss_fn, "batch": batch, "module": module, "has_aux": True}


def several_modules():
    body, head = nn.Linear(8, 8), nn.Linear(8, 2)
    return {
        "loss_fn": lambda x: (head(torch.tanh(body(x))) ** 2).mean(),
        "batch": features(8),
        "module": [body, head],
    }


def with_noise():
    module = nn.Linear(8, 4)
    return {
        "loss_fn": lambda x: (module(x + 0.1 * torch.randn_like(x)) ** 2).mean(),
        "batch": features(8),
        "module": module,
    }


def siamese():
    module = nn.Linear(8, 4)

    def loss_fn(batch):
        distance = (module(batch["a"]) - module(batch["b"])).norm(dim=1)
        return F.relu(1 - distance).mean()

    batch = {"a": features(8), "b": features(8)}
    return {"loss_fn": loss_fn, "batch": batch, "module": module}


def variational():
    encode, decode = nn.Linear(8, 6), nn.Linear(3, 8)

    def loss_fn(x):
        mean, spread = encode(x).chunk(2, 1)
        z = mean + torch.exp(spread / 2) * torch.randn_like(mean)
        divergence = -0.5 * (1 + spread - mean**2 - spread.exp()).sum(1).mean()
        return F.mse_loss(decode(z), x) + divergence

    return {"loss_fn": loss_fn, "batch": features(8), "module": [encode, decode]}


def evaluated_batchnorm():
    return regression(nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)).eval())


def huber():
    module = nn.Linear(8, 1)
    return {
        "loss_fn": lambda b: F.smooth_l1_loss(module(b[0])[:, 0], b[1]),
        "batch": (features(8), features()),
        "module": module,
    }


def gru():
    module = nn.GRU(6, 5, batch_first=True)
    return {
        "loss_fn": lambda x: (module(x)[0][:, -1] ** 2).mean(),
        "batch": features(4, 6),
        "module": module,
    }


CORRECT = {
    "MLP": lambda: classifier(mlp()),
    "dropout": lambda: classifier(mlp(nn.Dropout(0.4))),
    "layer norm": lambda: classifier(mlp(nn.LayerNorm(16))),
    "weight norm": lambda: regression(nn.utils.parametrizations.weight_norm(nn.Linear(8, 4))),
    "CNN": lambda: classifier(
        nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 5)
        ),
        features(1, 8, 8),
    ),
    "group norm": lambda: classifier(
        nn.Sequential(nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(16, 5)),
        features(2, 4, 4),
    ),
    "instance norm": lambda: regression(
        nn.Sequential(nn.Conv1d(2, 4, 3), nn.InstanceNorm1d(4, affine=True)), features(2, 9)
    ),
    "dropout of channels": lambda: regression(
        nn.Sequential(nn.Conv2d(2, 4, 3), nn.Dropout2d(0.5)), features(2, 5, 5)
    ),
    "batch norm, evaluated": evaluated_batchnorm,
    "LSTM of tokens": lambda: language(Language()),
    "tied embedding": lambda: language(Language(tied=True)),
    "sparse embedding": lambda: language(Language(sparse=True)),
    "GRU": gru,
    "transformer": lambda: regression(Block(), features(5, 8)),
    "transformer with dropout": lambda: regression(Block(dropout=0.2), features(5, 8)),
    "causal transformer": lambda: regression(Block(causal=True), features(5, 8)),
    "encoder layer": lambda: regression(
        nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), features(4, 8)
    ),
    "checkpoints with dropout": lambda: regression(Checkpointed()),
    "two terms and a regulariser": two_terms,
    "sample weights": sample_weights,
    "class weights": class_weights,
    "frozen layer": frozen,
    "autocast": autocast,
    "bfloat16": half,
    "its own float32": own_float32,
    "aux": with_aux,
    "several modules": several_modules,
    "noise": with_noise,
    "siamese": siamese,
    "variational": variational,
    "Huber": huber,
    "deep": lambda: regression(nn.Sequential(*[nn.Linear(8, 8), nn.Tanh()] * 12)),
}


def masked(**given):
    module, mask = nn.Linear(8, 1), (torch.rand(ROWS, 6) > 0.4).float()

    def loss_fn(batch):
        return (module(batch["x"]) ** 2 * batch["mask"]).sum() / batch["mask"].sum()

    return {
        "loss_fn": loss_fn,
        "batch": {"x": features(8), "mask": mask},
        "module": module,
        **given,
    }


def padded():
    module, padding = nn.Linear(8, 1), torch.rand(ROWS, 6) > 0.6

    def loss_fn(batch):
        valid = ~batch["padding"]
        return (module(batch["x"]) ** 2 * valid).sum() / valid.sum()

    batch = {"x": features(8), "padding": padding}
    return {"loss_fn": loss_fn, "batch": batch, "module": module}


def long_masks():
    found = masked(weight=lambda b: (b["mask"] != 0).to(torch.bfloat16).sum())
    mask = (torch.arange(100) < torch.arange(51, 51 + 2 * ROWS, 2)[:, None]).float()
    return found | {"batch": {"x": features(8), "mask": mask}}


def contrastive():
    module = nn.Linear(8, 4)

    def loss_fn(x):
        z = F.normalize(module(x))
        return F.cross_entropy(5 * z @ z.T, torch.arange(len(z)))

    return {"loss_fn": loss_fn, "batch": features(8), "module": module}


def normalised_in_the_loss():
    module = nn.Linear(8, 4)

    def loss_fn(x):
        h = module(x)
        return ((h - h.mean(0)) ** 2).mean()

    return {"loss_fn": loss_fn, "batch": features(8), "module": module}


def regularised_mean():
    module = nn.Linear(8, 4)

    def loss_fn(x):
        h = module(x)
        return (h**2).mean() + h.mean() ** 2

    return {"loss_fn": loss_fn, "batch": features(8), "module": module}


def sum_and_regulariser():
    module = nn.Linear(8, 4)

    def loss_fn(x):
        return (module(x) ** 2).sum() + 0.1 * sum((p**2).sum() for p in module.parameters())

    return {"loss_fn": loss_fn, "batch": features(8), "module": module}


def two_means():
    module, weights = nn.Linear(8, 4), torch.rand(ROWS)

    def loss_fn(batch):
        h = module(batch[0])
        return (h**2).mean() + ((h[:, 0] - 1) ** 2 * batch[1]).sum() / batch[1].sum()

    return {"loss_fn": loss_fn, "batch": [features(8), weights], "module": module}


class Remembers(nn.Module):
    """Adds what it saw last."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 4)
        self.last = None

    def forward(self, x):
        h = self.layer(x)
        total = h if self.last is None else h + self.last
        self.last = h.detach().mean(0)
        return total


class Unused(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.unused = nn.Linear(8, 4), nn.Linear(8, 4)

    def forward(self, x):
        return self.used(x)


def poisoned():
    x = features(8)
    x[3, 2] = float("nan")
    x[7, 0] = float("inf")
    return regression(nn.Linear(8, 4), x)


def broken_weights():
    module = nn.Linear(8, 4)
    module.weight.data[1, 1] = float("nan")
    return regression(module)


def logarithm():
    module = nn.Sequential(nn.Linear(8, 4))
    return {
        "loss_fn": lambda x: torch.log(module(x)).mean(),
        "batch": features(8),
        "module": module,
    }


def summed():
    module = nn.Linear(8, 4)
    return {"loss_fn": lambda x: (module(x) ** 2).sum(), "batch": features(8), "module": module}


# name -> (what certify takes, kind, text of where, text of why or fix)
WRONG = {
    "tokens counted by rows": (
        lambda: language(Language(), weight=None),
        "weight",
        "certify_models.py:",
        "weight=lambda batch: (batch[:, 1:] != 0).sum()",
    ),
    "tokens counted with the first": (
        lambda: language(Language(), weight=lambda ids: (ids != 0).sum()),
        "weight",
        "certify_models.py:",
        "weight=lambda batch: (batch[:, 1:] != 0).sum()",
    ),
    "mask counted by rows": (
        masked,
        "weight",
        "certify_models.py:",
        "weight=lambda batch: batch['mask'].sum()",
    ),
    "padding counted by rows": (
        padded,
        "weight",
        "certify_models.py:",
        "weight=lambda batch: (~batch['padding']).sum()",
    ),
    "rows counted by a mask": (
        lambda: classifier(mlp(), weight=lambda b: b[1].sum()),
        "weight",
        "certify_models.py:",
        "Leave weight out",
    ),
    "two means": (two_means, "weight", "certify_models.py:", "dict of two terms"),
    "counted in bfloat16": (long_masks, "low_precision", "bfloat16", "float32"),
    "a sum": (
        summed,
        "sum_loss",
        "certify_models.py:",
        'weight="sum"',
    ),
    "a sum and a regulariser": (
        sum_and_regulariser,
        "regulariser",
        "certify_models.py:",
        "None for the regulariser",
    ),
    "contrastive": (contrastive, "coupled_rows", "certify_models.py:", "row"),
    "normalised in the loss": (normalised_in_the_loss, "coupled_rows", "certify_models.py:", "row"),
    "regularised mean": (regularised_mean, "coupled_rows", "certify_models.py:", "row"),
    "batch norm": (
        lambda: classifier(mlp(nn.BatchNorm1d(16))),
        "batchnorm",
        "1 (BatchNorm1d)",
        "GroupNorm",
    ),
    "a layer that remembers": (
        lambda: regression(Remembers()),
        "stateful",
        "Remembers",
        "second time",
    ),
    "spectral norm": (
        lambda: regression(nn.utils.parametrizations.spectral_norm(nn.Linear(8, 4))),
        "stateful",
        "SpectralNorm",
        "second time",
    ),
    "NaN in the data": (poisoned, "non_finite", "batch, rows 3, 7", "Clean"),
    "NaN in the weights": (broken_weights, "non_finite", "parameter weight", "1 of its"),
    "logarithm": (logarithm, "non_finite", "certify_models.py:", "first to compute"),
}
