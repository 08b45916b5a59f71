"""Makes losses that need all rows at once exact, by gathering predictions.

Keras computes a loss from predictions, apart from the forward. So a window that gathers runs its
micro-batches forward and runs Keras' own loss once on the predictions of all rows. Then it runs the
micro-batches again, with the gradients of those predictions. Everything else happens once.

A backend's window does the following if `window.gathering` is not None and there are several
micro-batches. `window` is the `WindowModel` of its model.

1. Pass 1, for each micro-batch, in the order and training mode of a plain window, with BatchNorm
   moments recorded: run `y_pred = window.forward(x)`. At once read `added = window.added(rows,
   added_shapes)`, and sum it over micro-batches. Concatenate `window.arrays(batch, y_pred, rows)`
   along axis 0 (a None stays None). Keep no graph.
2. Once, for the whole batch: `y_pred = window.joined(arrays)` and `loss, tracked =
   window.loss_of_all_rows(batch, y_pred, added)`. Differentiate `optimizer.scale_loss(loss)` by the
   gathered predictions (`arrays` without the masks; integers have no gradient), by each entry of
   `added`, and by the trainable variables, because a loss may use them itself. Then call
   `window.update_metrics_of_all_rows(batch, y_pred)` with predictions that hold no graph (on JAX
   without masks, as plain Keras shows them).
3. Set what the forward of pass 1 wrote (seeds, and all that `state.state_variables` names) back to
   its values at the start of the window. After pass 2, set it to its values after step 2.
4. Pass 2, for each micro-batch: run the forward, read `added` again, and compute `loss, tracked =
   window.cut_loss(batch, y_pred, rows, totals)`, which is (None, []) if every loss has seen all
   rows. One vector-Jacobian product takes `window.predictions(y_pred)` with the gradients of their
   rows, `added` with their gradients, and `optimizer.scale_loss(loss)` with 1. Sum gradients,
   losses and `tracked`. `window.update_metrics(batch, y_pred, rows)` shows the other outputs, which
   are not gathered.
5. Add the gradients of the variables from step 2 once. Then run the optimizer, update the moving
   averages (from their values at the start, with the moments of pass 1), and call
   `window.track(loss of all rows + cut losses, window.tracked(tracked of all rows, tracked of the
   cut losses))`.

A window of one micro-batch runs as if the model gathered nothing.
"""
