"""From the champion and its new labels to the next version: which labels train, and how to recover after a killed run."""
