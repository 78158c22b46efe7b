"""Schedulers that run units of work; each is imported only by who uses it."""
