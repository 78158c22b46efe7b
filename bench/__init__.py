"""Benches: `python -m bench all|kernels|NAME --out FILE`; `python -m bench plot` draws the results.

A bench is a file bench_NAME.py with a function `cases(device)` that returns a list of
`common.Case`. Benches are found by their file names.
"""
