"""The engine uses nothing of JAX that is private."""

from tests.private_names import private_imports, private_names


def test_no_private_name_is_used():
    assert private_names("jax") == set()
    assert private_imports("jax", r"jax\._src|jaxlib") == set()
