"""A PyTorch program whose author runs a type checker, and mistakes that the checker refuses."""

from typing import Any, Literal, assert_type

import torch

import virtualbatch as vb
import virtualbatch.torch as vbtorch

Batch = dict[str, torch.Tensor]


class Encoder(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.layer(x)
        return found


def batch_of(rows: int) -> Batch:
    return {"x": torch.randn(rows, 4), "mask": torch.ones(rows)}


def main() -> None:
    model = Encoder()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batch = batch_of(12)

    def loss_fn(batch: Batch) -> torch.Tensor:
        rows: torch.Tensor = model(batch["x"]).square().sum(1)
        return (rows * batch["mask"]).sum() / batch["mask"].sum()

    def terms(batch: Batch) -> dict[str, torch.Tensor]:
        return {"loss": loss_fn(batch)}

    def loss_and_aux(batch: Batch) -> tuple[torch.Tensor, Batch]:
        return loss_fn(batch), {"x": batch["x"]}

    def tokens(microbatch: Batch) -> torch.Tensor:
        return microbatch["mask"].sum()

    weight: vb.WeightFn = tokens
    named: vb.LossFn = loss_fn

    sizes: list[int | Literal["auto"] | vb.Auto] = [4, "auto", vb.Auto(memory_limit="1GiB")]
    for size in sizes:
        optimizer.zero_grad()
        vbtorch.backward(named, batch, module=model, microbatch_size=size, weight=weight)
        optimizer.step()

    alone = vbtorch.backward(loss_fn, batch, module=[model], microbatch_size=4, weight=tokens)
    assert_type(alone, torch.Tensor)
    several = vbtorch.backward(
        terms, batch, module=model, microbatch_size=4, weight=lambda batch: {"loss": tokens(batch)}
    )
    assert_type(several, torch.Tensor)
    with_aux = vbtorch.backward(
        loss_and_aux, batch, module=model, microbatch_size=4, weight=tokens, has_aux=True
    )
    assert_type(with_aux, tuple[torch.Tensor, Any])
    with_stats = vbtorch.backward(
        loss_fn, batch, module=model, microbatch_size=4, weight=tokens, stats=True
    )
    assert_type(with_stats, tuple[torch.Tensor, vb.WindowStats])
    with_both = vbtorch.backward(
        loss_and_aux,
        batch,
        module=model,
        microbatch_size=4,
        weight=tokens,
        has_aux=True,
        stats=True,
    )
    assert_type(with_both, tuple[torch.Tensor, Any, vb.WindowStats])

    deferred = vbtorch.loss(
        loss_fn, batch, module=model, accumulation_steps=3, weight=tokens, reduce=None
    )
    assert_type(deferred, torch.Tensor)
    deferred.backward()  # type: ignore[no-untyped-call]
    assert_type(
        vbtorch.loss(
            loss_and_aux, batch, module=model, microbatch_size=4, weight=tokens, has_aux=True
        ),
        tuple[torch.Tensor, Any],
    )

    def encoded(batch: Batch) -> torch.Tensor:
        return torch.nn.functional.normalize(model(batch["x"]))

    encode = vbtorch.rowwise(encoded, module=model, microbatch_size=4)
    assert_type(encode(batch), torch.Tensor)
    cut = vbtorch.rowwise(encoded, module=model)
    assert_type(cut(vb.Window([batch, batch])), torch.Tensor)

    noise = vb.NoiseScale()
    for window in vbtorch.windows([batch_of(4) for _ in range(6)], accumulation_steps=3):
        assert_type(window, vb.Window)
        _, stats = vbtorch.backward(loss_fn, window, module=model, weight=tokens, stats=True)
        noise.update(stats)
    assert_type(noise.estimate(), vb.NoiseEstimate)

    found = vbtorch.plan(loss_fn, batch, module=model, weight=tokens, memory_limit="1GiB")
    assert_type(found, vb.Plan)
    assert_type(found.sizes, tuple[vb.PlanRow, ...])
    certificate = vbtorch.certify(
        vbtorch.captured(loss_fn), batch, module=model, microbatch_size=4, weight=tokens
    )
    assert_type(certificate, vb.Certificate)
    certificate.raise_if_inexact()


def mistakes(model: Encoder, batch: Batch) -> None:
    def loss_fn(batch: Batch) -> torch.Tensor:
        return batch["x"].mean()

    def loss_and_aux(batch: Batch) -> tuple[torch.Tensor, Batch]:
        return loss_fn(batch), batch

    vbtorch.backward(loss_fn, batch, module=model, microbatch_size="auot")  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType]
    vbtorch.backward(loss_fn, batch, module=model, microbatch_size=2.0)  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType]
    vbtorch.backward(loss_fn, batch, module=model, mircobatch_size=2)  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue]
    vbtorch.backward(loss_fn, batch, microbatch_size=2)  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue]
    vbtorch.backward(loss_and_aux, batch, module=model, microbatch_size=2)  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType]
    vbtorch.backward(loss_fn, batch, module=model, microbatch_size=2, has_aux=True)  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType, reportCallIssue]
    vbtorch.backward(lambda batch: 1.0, batch, module=model, microbatch_size=2)  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType]
    vbtorch.backward(loss_fn, batch, module=model, microbatch_size=2, weight="mean")  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType]
    vbtorch.backward(loss_fn, batch, module=model, microbatch_size=2, weight=lambda x: "rows")  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType]
    vbtorch.backward(loss_fn, batch, module=model, microbatch_size=2, reduce="windows")  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType]
    vbtorch.backward(loss_fn, batch, module=model, microbatch_size=2, accumulator_dtype="half")  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType]
    vbtorch.loss(loss_fn, batch, module=model, microbatch_size=2, reduce="overlapped")  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType]
    vbtorch.loss(loss_fn, batch, module=model, microbatch_size="big")  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType]
    vbtorch.rowwise(model, microbatch_size="big")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    vbtorch.certify(loss_fn, batch, module=model, microbatch_size="auto")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    vbtorch.plan(loss_fn, batch, module=model, memory_limit=0.8)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    vbtorch.plan(loss_fn, batch, module=model).best()  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue]


if __name__ == "__main__":
    main()
