"""The engine uses nothing of JAX that is private."""

from flax.linen.fp8_ops import OVERWRITE_WITH_GRADIENT
from tests.private_names import private_imports, private_names


def test_no_private_name_is_used():
    # The name of a collection of Flax, which users write too.
    assert private_names("jax") == {OVERWRITE_WITH_GRADIENT}
    assert private_imports("jax", r"jax\._src|jaxlib") == set()
