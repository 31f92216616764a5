"""Where the README's numbers come from. Each module runs as `python -m bench.NAME` and can write its result as JSON."""
