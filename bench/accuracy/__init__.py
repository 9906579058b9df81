"""What the methods gain in accuracy: ``python -m bench.accuracy`` runs a study with
``imcl-train``, and fills the tables and plots of docs/accuracy.md."""
