"""From the champion and what people said since to the next version: which labels train, and what a killed run left."""
