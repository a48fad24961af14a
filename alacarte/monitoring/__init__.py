"""A window of predictions: what changed since training, how good the answers were, and whether to retrain."""
