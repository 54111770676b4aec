"""Small experiments that a chapter runs once and `make record` runs in full: one file each, shown where it is used."""
