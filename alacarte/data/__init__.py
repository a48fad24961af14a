"""Tables: read, typed, split and hashed."""
