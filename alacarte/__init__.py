"""What the steps share."""

import os

__version__ = "0.1.0"

# OpenMP threads that spin while they wait bring a busy machine to a halt: a fit of boosted trees takes many times longer
# beside another one on two cores. Read when scikit-learn or torch first loads, so it is set before either is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
