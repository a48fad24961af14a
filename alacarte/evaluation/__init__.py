"""Metrics, the paired comparison with the champion, the gate, and plots."""
