"""The line that a finding names: the user's own, not one of a library's."""

import pytest

from virtualbatch.certify.users_line import Line, folder, users_line

SITE = "/venv/lib/python3.12/site-packages"
TORCH, JAX = folder(f"{SITE}/torch/__init__.py"), folder(f"{SITE}/jax/__init__.py")
USER = Line("/home/user/train.py", 12, "Trainer.loss")


def inside(path):
    return Line(f"{SITE}/{path}", 3, "Owner.method")


@pytest.mark.parametrize("library", ["torchvision/ops/boxes.py", "jaxopt/loss.py", "torch.py"])
def test_a_package_whose_path_begins_alike_is_another_one(library):
    lines = [inside("torch/nn/functional.py"), inside(library), USER]
    named = library.rpartition("/")[2]
    assert users_line(lines, (TORCH, JAX)) == f"Owner ({named}:3), train.py:12"


def test_lines_of_the_libraries_and_without_a_file_are_passed_over():
    lines = [inside("torch/nn/functional.py"), inside("jax/_src/core.py")]
    generated = Line("<string>", 1, "<module>")
    assert users_line([*lines, generated, USER], (TORCH, JAX)) == "train.py:12"
    assert users_line([*lines, generated], (TORCH, JAX)) == ""


def test_another_library_without_a_caller_is_named_alone():
    assert users_line([inside("flax/linen/normalization.py")], ()) == "Owner (normalization.py:3)"
