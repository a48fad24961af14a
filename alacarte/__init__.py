"""The library behind the steps.

launch.py arguments.py help.py     from the arguments of a command to a configuration and an MLflow run; --help
tracking.py source.py              runs, run ids, and the reuse of finished runs with the same source
stores.py locks.py processes.py    open MLflow's stores, locks between processes, a step as a child process
data/                              read a table, type its columns, split its rows
features.py own_code.py            from columns to the inputs of a model; errors of the team's own code
learners/                          fit, train further, predict, save: one file for each framework
formats/                           which model files may be loaded, and a trial in a child process
evaluation/ registry.py            metrics, comparison, gate; versions, aliases, promotion
feedback/                          the store of predictions and labels
monitoring/ retraining/ scoring.py a window of predictions, training with labels, answers for a table
serving/                           the server
databricks/                        the same steps as jobs of a workspace
verdicts.py                        signatures of the verdicts of the gate
template.py                        give a clone its own name
"""

import os

__version__ = "0.1.0"

# OpenMP threads that spin while they wait bring a busy machine to a halt: a fit of boosted trees takes many times longer
# beside another one on two cores. Read when scikit-learn or torch first loads, so it is set before either is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
