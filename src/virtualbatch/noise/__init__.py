"""The noise of gradients, and which batch size it recommends."""
