"""A model folder that answers: what is let in, how it is called, a faster path where that answers the same."""
