"""How fast GmNet is, next to other models and to what the machine can do. See docs/benchmarks.md."""
