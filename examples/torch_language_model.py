"""PyTorch: a language model on ragged, padded text, where every token counts once."""

from pydoc_data.topics import topics

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence

import virtualbatch.torch as vb

PADDING = 0
torch.manual_seed(0)
torch.set_num_threads(1)  # threads have nothing to win on a model this small
paragraphs = [part.encode() for text in topics.values() for part in text.split("\n\n")]
rows = [torch.tensor(list(part)) for part in paragraphs if 20 <= len(part) <= 120]

embedding = nn.Embedding(256, 64, padding_idx=PADDING)
recurrence = nn.GRU(64, 64, batch_first=True)
head = nn.Linear(64, 256)
model = nn.ModuleList([embedding, recurrence, head])
optimizer = torch.optim.Adam(model.parameters(), 0.01)


def next_batch():
    # Sorted by length, as is common: then micro-batches differ most.
    chosen = [rows[index] for index in torch.randperm(len(rows))[:64]]
    return pad_sequence(sorted(chosen, key=len), True, PADDING)


def loss_fn(tokens):
    logits = head(recurrence(embedding(tokens[:, :-1]))[0])
    return nn.functional.cross_entropy(logits.mT, tokens[:, 1:], ignore_index=PADDING)


# Micro-batches differ in tokens, so the mean of their means is not that of the batch.
def weight(tokens):
    return (tokens[:, 1:] != PADDING).sum()


def accumulate(tokens, weight, check=True):
    optimizer.zero_grad()
    return vb.backward(loss_fn, tokens, module=model, microbatch_size=8, weight=weight, check=check)


loss_fn(tokens := next_batch()).backward()
whole = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
for name, by in {"rows": None, "tokens": weight}.items():
    accumulate(tokens, by, check=False)  # which would refuse the wrong one
    found = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    apart = (found - whole).norm() / whole.norm()
    print(f"weighed by {name:6} the gradient is off from the whole batch's by {apart:.0e}")
assert apart < 1e-5, "the gradient is not that of the whole batch"

losses = []
for _ in range(20):
    losses.append(accumulate(next_batch(), weight))
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
print(f"loss per token: {losses[0]:.3f} at first, {losses[-1]:.3f} after {len(losses)} updates")
assert losses[-1] < 0.7 * losses[0], "the model did not learn"
