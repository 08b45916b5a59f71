"""PyTorch: two processes train on batches of 120 rows; a signal stops both, and they go on later.

Rank 0 has 601 rows and rank 1 has 600, one micro-batch less: none is repeated, none is left out.
Three go on where two stopped: torchrun --standalone --nproc_per_node=3 examples/torch_ddp.py
"""

import signal
from pathlib import Path

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn
from torch.distributed.run import main as torchrun
from torch.utils.data import DataLoader, Subset, TensorDataset

import virtualbatch.torch as vb


def windows(data, epochs):
    for epoch in range(epochs):
        order = torch.randperm(len(data), generator=torch.Generator().manual_seed(epoch)).tolist()
        rows = Subset(data, order[dist.get_rank() :: dist.get_world_size()])
        steps = 6 // dist.get_world_size()
        yield from vb.windows(DataLoader(rows, batch_size=20), steps, group=dist.group.WORLD)


def train(file, epochs):
    x, y = (torch.as_tensor(array) for array in load_digits(return_X_y=True))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)).double()
    ddp = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(ddp.parameters(), 0.01)
    done, *states = torch.load(file) if file.exists() else [0]
    for part, state in zip((model, optimizer), states, strict=False):
        part.load_state_dict(state)
    signals = []
    signal.signal(signal.SIGTERM, lambda number, _: signals.append(number))
    for update, window in enumerate(windows(TensorDataset(x[:1201] / 16, y[:1201]), epochs), 1):
        if update > done:
            optimizer.zero_grad()
            vb.backward(lambda b: nn.functional.cross_entropy(ddp(b[0]), b[1]), window, module=ddp)
            optimizer.step()
            stop = torch.tensor([len(signals)])
            dist.all_reduce(stop, dist.ReduceOp.MAX)  # whoever was told to stop tells the others
            if stop:
                break
    if dist.get_rank() == 0:
        torch.save([update, model.state_dict(), optimizer.state_dict()], file.with_suffix(".new"))
        file.with_suffix(".new").replace(file)  # a file is never half written
    right = (model(x[1201:] / 16).argmax(1) == y[1201:]).double().mean()
    print(f"rank {dist.get_rank()}: {update} updates, accuracy {right:.3f}", flush=True)


if __name__ == "__main__" and dist.is_torchelastic_launched():
    dist.init_process_group("gloo")
    train(Path("digits.pt"), epochs=4)
    dist.destroy_process_group()
elif __name__ == "__main__":
    torchrun(["--standalone", "--nproc_per_node=2", __file__])
