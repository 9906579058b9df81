"""What the fused losses gain, measured: ``python -m bench`` measures everything and fills the
tables of README.md and docs/performance.md, ``pytest bench --benchmark-enable`` gives the
operations to pytest-benchmark."""
