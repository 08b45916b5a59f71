"""Losses that need all rows at once, made exact: predictions are gathered.

Keras hands predictions to its loss separately. So a window that gathers runs its micro-batches
forward, runs Keras' own loss once on the predictions of all rows, and goes through the
micro-batches again with the gradients of those predictions. Everything else happens once.

What a backend's window does, with a `WindowModel` of its model (`window`), where
`window.gathering` is not None and there are several micro-batches:

1. Pass 1, for each micro-batch, in the order and training mode of a plain window, with BatchNorm
   moments recorded: `y_pred = window.forward(x)`; `added = window.added(rows, added_shapes)`, read
   at once, are summed over micro-batches; `window.arrays(batch, y_pred, rows)` are concatenated
   along axis 0 (a None stays None). Nothing of a graph is kept.
2. Once: `y_pred = window.joined(arrays)` and `loss, tracked = window.loss_of_all_rows(batch,
   y_pred, added)` of the whole batch. Differentiate `optimizer.scale_loss(loss)` by the gathered
   predictions (`arrays` without the masks; integers have no gradient), by each of `added`, and by
   the trainable variables, which a loss may use itself. `window.update_metrics_of_all_rows(batch,
   y_pred)`, with predictions that hold no graph (on JAX without masks, as plain Keras shows them).
3. What the forward of pass 1 wrote (seeds, and all else that `state.state_variables` names) goes
   back to where the window began; after pass 2 it is again what it was after 2.
4. Pass 2, for each micro-batch: forward; `added` again; `loss, tracked = window.cut_loss(batch,
   y_pred, rows, totals)`, or (None, []) where every loss has seen all rows. One vector-Jacobian
   product of the gathered predictions `window.predictions(y_pred)` with their rows' gradients, of
   `added` with theirs, and of `optimizer.scale_loss(loss)` with 1; gradients, losses and `tracked`
   are summed. `window.update_metrics(batch, y_pred, rows)` shows the outputs that are not gathered.
5. The gradients of the variables from 2 are added once; optimizer, moving averages (moments of pass
   1, from where they began) and `window.track(loss of all rows + cut losses,
   window.tracked(tracked of all rows, tracked of the cut losses))`.

A window of one micro-batch is that of a model that gathers nothing.
"""
