"""Students to start from, one file each: a backbone that gives x (B, D), and the head that is served on it."""
