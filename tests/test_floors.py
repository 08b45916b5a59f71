"""What `make test-floors` installs; that it passes is shown by running it."""

from tests.floors import constraints, floors, pins


def release(text):
    return tuple(int(part) for part in text.split("."))


def test_every_framework_has_a_floor_that_the_pins_are_not_below():
    lowest = floors()
    assert {"jax", "keras", "tensorflow", "torch"} <= lowest.keys()
    assert all(release(pins()[name]) >= release(floor) for name, floor in lowest.items())


def test_floors_replace_pins():
    found = constraints()
    assert "jax==0.10" in found
    assert not any(line.startswith(("jaxlib==", "jax==0.10.2")) for line in found)
    assert f"pytest=={pins()['pytest']}" in found
