"""Benches: `python -m bench all|kernels|NAME --out FILE`. A bench is one file with one function;
`python -m bench plot` draws what they wrote.

bench_NAME.py has `cases(device)`, which returns a list of `common.Case`; nothing registers it.
"""
