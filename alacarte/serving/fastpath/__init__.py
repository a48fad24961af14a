"""scikit-learn and torch models as numpy calls, used where they give MLflow's own answers."""
