"""What the tests see: ``python -m bench.mutants`` breaks a copy of the code, one line at a time,
and runs the tests that should notice."""
