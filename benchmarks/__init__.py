"""What a training step costs, beside what it can't cost less than and beside its rivals.

`python -m benchmarks` runs all of them; see README.md in this folder.
"""
