"""Benches: `python -m bench all|kernels|NAME --out FILE`. A bench is one file with one function.

bench_NAME.py has `cases(device)`, which returns a list of `common.Case`; nothing registers it.
"""
