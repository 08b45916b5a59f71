"""Ten models to plan: five families, small and larger, in Keras and in PyTorch."""

from collections.abc import Callable
from typing import Any

import numpy as np

ROWS = 256
CLASSES = 10
# name -> (family, numbers that make it small or larger)
MODELS: dict[str, tuple[str, dict[str, int]]] = {
    "MLP": ("mlp", {"features": 64, "width": 256}),
    "wide MLP": ("mlp", {"features": 512, "width": 1024}),
    "CNN": ("cnn", {"side": 16, "channels": 16}),
    "larger CNN": ("cnn", {"side": 32, "channels": 24}),
    "ResNet": ("resnet", {"side": 16, "channels": 16}),
    "larger ResNet": ("resnet", {"side": 24, "channels": 24}),
    "transformer": ("transformer", {"length": 32, "width": 64}),
    "larger transformer": ("transformer", {"length": 64, "width": 128}),
    "LSTM": ("lstm", {"length": 24, "width": 64}),
    "larger LSTM": ("lstm", {"length": 48, "width": 128}),
}


def data(name: str, rows: int = ROWS) -> tuple[np.ndarray, np.ndarray]:
    """Seeded inputs (channels last) and classes for a model."""
    family, sizes = MODELS[name]
    rng = np.random.default_rng(0)
    shape: tuple[int, ...] = {
        "mlp": lambda: (sizes["features"],),
        "cnn": lambda: (sizes["side"], sizes["side"], 3),
        "resnet": lambda: (sizes["side"], sizes["side"], 3),
        "transformer": lambda: (sizes["length"], sizes["width"]),
        "lstm": lambda: (sizes["length"], sizes["width"]),
    }[family]()
    return rng.normal(size=(rows, *shape)).astype("float32"), rng.integers(0, CLASSES, rows)


def in_keras(name: str) -> Any:
    """The model, on the backend that Keras was imported with; it gives logits."""
    import keras
    from keras import layers

    keras.utils.set_random_seed(0)
    family, sizes = MODELS[name]

    def block(x: Any, channels: int) -> Any:
        found = layers.Conv2D(channels, 3, padding="same", use_bias=False)(x)
        found = layers.ReLU()(layers.BatchNormalization()(found))
        found = layers.Conv2D(channels, 3, padding="same", use_bias=False)(found)
        return layers.ReLU()(layers.Add()([x, layers.BatchNormalization()(found)]))

    def attend(x: Any, width: int) -> Any:
        found = layers.LayerNormalization()(x)
        x = x + layers.MultiHeadAttention(4, width // 4)(found, found)
        found = layers.Dense(4 * width, activation="gelu")(layers.LayerNormalization()(x))
        return x + layers.Dense(width)(found)

    inputs = layers.Input(data(name, 1)[0].shape[1:])
    x: Any = inputs
    if family == "mlp":
        for _ in range(3):
            x = layers.Dense(sizes["width"], activation="relu")(x)
    elif family == "cnn":
        x = layers.Conv2D(sizes["channels"], 3, padding="same", activation="relu")(x)
        x = layers.Conv2D(2 * sizes["channels"], 3, padding="same", activation="relu")(x)
        x = layers.Flatten()(layers.MaxPooling2D()(x))
    elif family == "resnet":
        x = layers.Conv2D(sizes["channels"], 3, padding="same")(x)
        for _ in range(3):
            x = block(x, sizes["channels"])
        x = layers.GlobalAveragePooling2D()(x)
    elif family == "transformer":
        for _ in range(2):
            x = attend(x, sizes["width"])
        x = layers.GlobalAveragePooling1D()(x)
    else:
        x = layers.LSTM(sizes["width"])(x)
    return keras.Model(inputs, layers.Dense(CLASSES)(x))


def in_torch(name: str) -> tuple[Any, Callable[[Any], Any]]:
    """(module, batch -> mean loss); it takes what `data` gives, as tensors."""
    import torch
    from torch import nn

    torch.manual_seed(0)
    family, sizes = MODELS[name]

    class Residual(nn.Module):
        def __init__(self, channels: int):
            super().__init__()
            self.inner = nn.Sequential(
                nn.Conv2d(channels, channels, 3, padding=1, bias=False),
                nn.BatchNorm2d(channels),
                nn.ReLU(),
                nn.Conv2d(channels, channels, 3, padding=1, bias=False),
                nn.BatchNorm2d(channels),
            )

        def forward(self, x: Any) -> Any:
            return torch.relu(x + self.inner(x))

    class Recurrent(nn.Module):
        def __init__(self, width: int):
            super().__init__()
            self.inner = nn.LSTM(width, width, batch_first=True)

        def forward(self, x: Any) -> Any:
            return self.inner(x)[0][:, -1]

    class MeanOverLength(nn.Module):
        def forward(self, x: Any) -> Any:
            return x.mean(1)

    if family == "mlp":
        features, width = sizes["features"], sizes["width"]
        layers: list[nn.Module] = [nn.Linear(features, width), nn.ReLU()]
        layers += [nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()]
        layers += [nn.Linear(width, CLASSES)]
    elif family == "cnn":
        channels, side = sizes["channels"], sizes["side"] // 2
        layers = [nn.Conv2d(3, channels, 3, padding=1), nn.ReLU()]
        layers += [nn.Conv2d(channels, 2 * channels, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
        layers += [nn.Flatten(), nn.Linear(2 * channels * side**2, CLASSES)]
    elif family == "resnet":
        channels = sizes["channels"]
        layers = [nn.Conv2d(3, channels, 3, padding=1), *(Residual(channels) for _ in range(3))]
        layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, CLASSES)]
    elif family == "transformer":
        width = sizes["width"]
        encoder = nn.TransformerEncoderLayer(width, 4, 4 * width, 0.0, "gelu", batch_first=True)
        layers = [nn.TransformerEncoder(encoder, 2, enable_nested_tensor=False)]
        layers += [MeanOverLength(), nn.Linear(width, CLASSES)]
    else:
        layers = [Recurrent(sizes["width"]), nn.Linear(sizes["width"], CLASSES)]
    module = nn.Sequential(*layers)

    def loss_fn(batch: Any) -> Any:
        x, y = batch
        x = x.movedim(-1, 1) if x.ndim == 4 else x
        return nn.functional.cross_entropy(module(x), y)

    return module, loss_fn
