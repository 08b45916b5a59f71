"""What every test relies on: quiet and reproducible TensorFlow, reproducible hypothesis."""

import os
import sys
from pathlib import Path

from hypothesis import settings

# Read when TensorFlow is imported. oneDNN picks other summation orders on other machines.
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
os.environ["TF_ENABLE_ONEDNN_OPTS"] = "0"

# The helpers beside the tests are imported as `tests.oracle` and so on.
ROOT = str(Path(__file__).parents[1])
if ROOT not in sys.path:
    sys.path.insert(0, ROOT)

settings.register_profile("reproducible", derandomize=True, deadline=None, print_blob=False)
settings.load_profile("reproducible")
